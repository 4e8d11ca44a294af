"""What mends half a bypass, applied where a BypassPolicy says ``fix: apply``, and removed with its cause.

Only where the bypass is allowed and nothing is lost that nobody accepted, and only where the object reaches no pod
whose Envoy sees the port: nothing is applied for more than the plan says. Objects of others are left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final

from meshbridge.bypass.bypasspolicy import GROUP, BypassPolicy, Mending
from meshbridge.bypass.export import MANAGED_BY
from meshbridge.bypass.fixes import Fix, both, fixes, reached_beyond
from meshbridge.bypass.report import rows_of
from meshbridge.controller.conditions import named
from meshbridge.controller.events import Notice, Regarding
from meshbridge.controller.picture import Picture
from meshbridge.controller.policystatus import MANAGER, VERSION
from meshbridge.controller.scene import Scene
from meshbridge.controller.writer import Outbox
from meshbridge.kube.api import Api, Resource
from meshbridge.kube.manifests import Key
from meshbridge.policy.model import Direction, Document, Origin

APPLIED_BY: Final = {"meshbridge.io/applied-by": "controller"}
"""Tells what the controller applied, and removes, from what ``meshbridge bypass fix`` did for a person."""
GUARD: Final = "AuthorizationPolicy"
MADE: Final = {
    ("security.istio.io", GUARD): "authorizationpolicies",
    ("security.istio.io", "PeerAuthentication"): "peerauthentications",
    ("networking.istio.io", "DestinationRule"): "destinationrules",
}
"""In the order in which they are applied, what closes before what opens; they are deleted the other way round."""
_ORDER: Final = {kind: position for position, kind in enumerate(MADE)}
REASON: Final = "meshbridge.io/reason"
MAX_REASON: Final = 1_024
MAX_NAME: Final = 63

Object = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """An object that is to be there, and the policies that ask for it."""

    body: Object
    policies: tuple[BypassPolicy, ...]

    @property
    def key(self) -> Key:
        metadata = self.body["metadata"]
        return self.body["apiVersion"].partition("/")[0], self.body["kind"], metadata["namespace"], metadata["name"]


@dataclass(frozen=True, slots=True)
class Unfixed:
    """Why something that policies ask for is not applied; ``about`` is an object in its way."""

    policies: tuple[BypassPolicy, ...]
    text: str
    about: Document | None = None


def is_ours(document: Document) -> bool:
    """Whether the controller applied it."""
    metadata = document.data.get("metadata")
    labels = metadata.get("labels") if isinstance(metadata, Mapping) else None
    return document.key[:2] in MADE and isinstance(labels, Mapping) and APPLIED_BY.items() <= labels.items()


def wanted_fixes(picture: Picture) -> tuple[list[Wanted], list[Unfixed]]:
    """What is to be applied, computed as if nothing were: what mends a connection may not be taken for needless."""
    if not any(policy.fix is Mending.APPLY for policy in picture.policies):
        return [], []
    made = [document for key, held in picture.documents.items() if key[:2] in MADE for document in held]
    scene = _scene_without(picture, [document for document in made if is_ours(document)])
    asking = _Asking(scene, picture.policies)
    others = [document for document in made if not is_ours(document)]
    found: dict[str, Fix] = {}
    for fix in fixes(scene.inventory, others, asking.asks):
        steady = _steady(fix, scene)
        key = repr((steady.apply["kind"], steady.apply["metadata"])) if steady.apply else steady.todo
        found[key] = both(found[key], steady) if key in found else steady
    wanted: list[Wanted] = []
    unfixed: list[Unfixed] = []
    for fix in sorted(found.values(), key=lambda fix: _is_guard(fix)):
        policies = asking.policies(fix)
        if _is_guard(fix):
            if any(_guards(fix, each.body) for each in wanted):
                wanted.append(Wanted(_body(fix, policies), policies))
        elif beyond := reached_beyond(fix, scene.inventory):
            names = named({asking.name(key) for key in beyond})
            text = f"{fix.about} is not mended, as {names} would be sent plaintext as well, whose Envoys see the port"
            unfixed.append(Unfixed(policies, asking.told(text)))
        elif fix.apply is None:
            unfixed.append(Unfixed(policies, asking.told(f"{fix.about} is for a person to mend: {fix.todo}")))
        else:
            wanted.append(Wanted(_body(fix, policies), policies))
    return sorted(wanted, key=lambda each: (_ORDER[each.key[:2]], each.key)), unfixed


def _is_guard(fix: Fix) -> bool:
    return fix.apply is not None and fix.apply["kind"] == GUARD


def _guards(fix: Fix, body: Object) -> bool:
    """Whether it is what keeps closed to strangers what ``body`` opens to plaintext: it has its name."""
    assert fix.apply is not None
    names = [(made["metadata"]["namespace"], made["metadata"]["name"]) for made in (fix.apply, body)]
    return body["kind"] == "PeerAuthentication" and names[0] == names[1]


class _Asking:
    """Who asks for which port of a server to be mended."""

    def __init__(self, scene: Scene, policies: Iterable[BypassPolicy]) -> None:
        self._scene = scene
        self._policies = {_place(policy.origin): policy for policy in policies}
        self._names = {pod.key: kind.name for kind in scene.kinds for pod in kind.standing}
        self._pods = {pod.key: pod for pod in scene.inventory.workloads}
        self._asking: dict[str, list[tuple[Any, tuple[Origin, ...]]]] = {}

    def asks(self, server: str, port: int) -> bool:
        return bool(self._origins(server, port))

    def policies(self, fix: Fix) -> tuple[BypassPolicy, ...]:
        places = {_place(origin) for cause in fix.causes for origin in self._origins(*cause)}
        return tuple(self._policies[place] for place in sorted(places))

    def name(self, pod: str) -> str:
        return self._names.get(pod, pod)

    def told(self, text: str) -> str:
        """With names that outlive a pod, so that a rollout changes nothing that is said."""
        for pod in sorted(self._names, key=len, reverse=True):
            text = text.replace(pod, self._names[pod])
        return text

    def _origins(self, server: str, port: int) -> tuple[Origin, ...]:
        if server not in self._asking:
            rows = rows_of(self._pods[server], self._scene.inventory)
            self._asking[server] = [
                (row.ports, row.ruling.policies)
                for row in rows
                if row.direction is Direction.INGRESS and row.ruling is not None and row.ruling.fix
            ]
        return tuple(origin for ports, origins in self._asking[server] if port in ports for origin in origins)


def _place(origin: Origin) -> tuple[str, str, str]:
    return origin.kind, origin.namespace, origin.name


def _scene_without(picture: Picture, ours: Sequence[Document]) -> Scene:
    if not ours:
        return picture.scene
    keys = {document.key for document in ours}
    return picture.scene_of([parsed for parsed in picture.parsed if parsed.document.key not in keys])


def _steady(fix: Fix, scene: Scene) -> Fix:
    """Under a name that outlives the pod that stood for its kind."""
    if fix.apply is None or fix.apply["kind"] == "DestinationRule":
        return fix
    makers = sorted(
        k.name for k in scene.kinds for pod in k.standing if pod.key in {server for server, _ in fix.causes}
    )
    metadata = {**fix.apply["metadata"], "name": f"meshbridge-{makers[0].partition('/')[2]}"[:MAX_NAME]}
    return replace(fix, apply={**fix.apply, "metadata": metadata})


def _body(fix: Fix, policies: Iterable[BypassPolicy]) -> Object:
    assert fix.apply is not None
    owners = [
        {"apiVersion": f"{GROUP}/{VERSION}", "kind": p.origin.kind, "name": p.origin.name, "uid": p.uid}
        for p in sorted(policies, key=lambda policy: policy.uid)
    ]
    metadata = {
        "name": fix.apply["metadata"]["name"],
        "namespace": fix.apply["metadata"]["namespace"],
        "labels": {**MANAGED_BY, **APPLIED_BY},
        "annotations": {REASON: fix.why[:MAX_REASON]},
        "ownerReferences": owners,
    }
    return {**fix.apply, "metadata": metadata}


class Fixes:
    """Brings the objects to what is to be applied.

    Cost: nothing where no policy asks; else what ``meshbridge bypass fix`` costs, for kinds of pods instead of pods, at
    every look, and one write for each change.
    """

    def __init__(self, api: Api) -> None:
        self._api = api
        self.unfixed: list[Unfixed] = []

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        """What is wanted is applied, what is not wanted any more is gone, and what others made is as it was."""
        wanted, unfixed = wanted_fixes(picture)
        present = {key: held[0] for key, held in picture.documents.items() if key[:2] in MADE and held}
        keys = {each.key for each in wanted}
        for key, document in sorted(present.items(), key=lambda one: (-_ORDER[one[0][:2]], one[0])):
            if is_ours(document) and key not in keys:
                act = partial(_delete, self._api, document)
                out.write(f"delete {MADE[key[:2]]}", act, f"{key[1]} {key[2]}/{key[3]}")
        unguarded: set[tuple[str, str]] = set()
        for each in wanted:
            _, kind, *place = each.key
            if kind == "PeerAuthentication" and tuple(place) in unguarded:
                continue  # what would keep strangers out beside it is not there
            failed = self._apply(each, present.get(each.key), out)
            if failed is not None:
                unfixed.append(failed)
                unguarded |= {(place[0], place[1])} if kind == GUARD else set()
        self.unfixed = unfixed

    def of(self, policy: BypassPolicy) -> list[str]:
        """Why what it asks for is not applied."""
        return [each.text for each in self.unfixed if any(asking.uid == policy.uid for asking in each.policies)]

    def notices(self) -> Iterable[Notice]:
        """What is to be said on the objects that are in the way."""
        for each in self.unfixed:
            if each.about is not None and each.about.uid:
                held = each.about
                about = Regarding(held.api_version, held.kind, held.namespace, held.name, held.uid)
                yield Notice(about, "FixNotApplied", each.text)

    def _apply(self, wanted: Wanted, present: Document | None, out: Outbox) -> Unfixed | None:
        group, kind, namespace, name = wanted.key
        where = f"{kind} {namespace}/{name}"
        if present is not None and not is_ours(present):
            text = f"{where} is there and is not the controller's, so what mends the bypass is not applied; rename it"
            return Unfixed(wanted.policies, text, present)
        if present is not None and _says(present.data, wanted.body):
            return None
        resource = _resource(wanted.body["apiVersion"], kind)
        act = partial(self._api.apply, resource, wanted.body, manager=MANAGER)
        if out.write(f"patch {MADE[group, kind]}", act, where) is None:
            text = f"{where} cannot be applied, or somebody changed what the controller had written: undo that"
            return Unfixed(wanted.policies, text, present)
        return None


def _says(data: Mapping[str, Any], body: Object) -> bool:
    """Whether an object is what is wanted; what others added beside it does not count."""
    metadata, wanted = data["metadata"], body["metadata"]
    return bool(
        data.get("spec") == body["spec"]
        and wanted["labels"].items() <= (metadata.get("labels") or {}).items()
        and wanted["annotations"].items() <= (metadata.get("annotations") or {}).items()
        and {o["uid"] for o in wanted["ownerReferences"]} == {o["uid"] for o in metadata.get("ownerReferences") or []}
    )


def _delete(api: Api, document: Document) -> None:
    resource = _resource(document.api_version, document.kind)
    api.delete(resource, document.namespace, document.name, uid=document.uid)


def _resource(api_version: str, kind: str) -> Resource:
    group, _, version = api_version.partition("/")
    return Resource(group, version, MADE[group, kind], kind, True)
