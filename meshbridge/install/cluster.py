"""A cluster as the installer changes it: objects there, objects gone, and what others own left alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from meshbridge.errors import MeshBridgeError
from meshbridge.install.manifests import (
    INSTALLER,
    MANAGED_BY,
    NAMESPACE,
    Object,
    group_of,
    is_definition,
    is_foreign,
    key_of,
    name_of,
)
from meshbridge.install.rollout import Rollout, rollout_of
from meshbridge.kube.api import CONFLICT, FORBIDDEN, NOT_FOUND, Api, ClusterError, RefusedError, Resource

POLL_S: Final = 1.0
SERVED_S: Final = 60.0
KINDS: Final = (
    ("", "Namespace"), ("", "ServiceAccount"), ("", "Service"), ("", "ConfigMap"), ("", "Secret"),
    ("coordination.k8s.io", "Lease"),
    ("admissionregistration.k8s.io", "MutatingWebhookConfiguration"),
    ("admissionregistration.k8s.io", "ValidatingWebhookConfiguration"),
    ("apiextensions.k8s.io", "CustomResourceDefinition"),
    ("apps", "DaemonSet"), ("apps", "Deployment"),
    ("networking.k8s.io", "NetworkPolicy"), ("policy", "PodDisruptionBudget"),
    ("rbac.authorization.k8s.io", "ClusterRole"), ("rbac.authorization.k8s.io", "ClusterRoleBinding"),
    ("rbac.authorization.k8s.io", "Role"), ("rbac.authorization.k8s.io", "RoleBinding"),
)  # fmt: skip
"""What an installation may consist of, in this version or another."""

_HELM_RELEASE: Final = "meta.helm.sh/release-name"

Tell = Callable[[str], None]


class InstallError(MeshBridgeError):
    """The cluster is not as it was asked for."""


@dataclass(slots=True)
class Cluster:
    """An API server, and what it calls the kinds of an installation. ``tell`` is given each step as a sentence."""

    api: Api
    tell: Tell
    _resources: dict[tuple[str, str], Resource] = field(default_factory=dict)

    def apply(self, objects: Sequence[Object], *, dry_run: bool = False, force: bool = False) -> None:
        """Every object is there and is what it says. Definitions that others brought stay as they are.

        Raises:
            InstallError: the server refuses one; what came before it is there. Or all of it is a Helm release's.
        """
        if not force:
            self._check_not_helms(objects)
        fresh: list[Object] = []
        for each in objects:
            if is_foreign(each) and (owner := self._owner(each)):
                self.tell(f"{name_of(each)}: is there already ({owner}), left as it is")
                continue
            if fresh and not is_definition(each):
                self._wait_served(fresh)
                fresh = []
            existed = self._write(each, dry_run=dry_run, force=force)
            if is_definition(each) and not dry_run:
                fresh.append(each)
            self.tell(f"{name_of(each)}: {'applied' if existed else 'created'}{' (dry run)' if dry_run else ''}")
        self._wait_served(fresh)

    def prune(self, objects: Sequence[Object]) -> None:
        """What an earlier version installed and this one does not have is gone; never a definition."""
        wanted = set(map(key_of, objects))
        for group, kind in KINDS:
            if kind == "CustomResourceDefinition":
                continue
            for each in self.labelled(group, kind, f"{MANAGED_BY}={INSTALLER}"):
                if key_of(each) not in wanted:
                    self.delete(each)

    def rollouts(self) -> list[Rollout]:
        """Where each workload of ours stands."""
        selector = "app.kubernetes.io/name=meshbridge"
        pods = self.labelled("", "Pod", selector, NAMESPACE)
        workloads = [each for kind in ("Deployment", "DaemonSet") for each in self.labelled("apps", kind, selector)]
        return [rollout_of(each, pods) for each in workloads]

    def wait(self, timeout_s: float, objects: Sequence[Object] = ()) -> None:
        """Every workload of ours serves, as it was last asked for.

        Args:
            objects: Workloads that have to be there.

        Raises:
            InstallError: not within ``timeout_s``, and what is still missing.
        """
        needed = {each["metadata"]["name"] for each in objects if each["kind"] in ("Deployment", "DaemonSet")}
        until = time.monotonic() + timeout_s
        told: dict[str, str] = {}
        while True:
            found = self.rollouts()
            for each in found:
                if told.get(each.name) != str(each):
                    told[each.name] = str(each)
                    self.tell(str(each))
            missing = sorted(needed - {each.name for each in found})
            open_ = [each for each in found if not each.complete]
            if not missing and not open_ and found:
                return
            if time.monotonic() >= until:
                raise _not_in_time(timeout_s, missing, open_)
            time.sleep(POLL_S)

    def delete(self, each: Object) -> bool:
        """It is gone or on its way, with all that it owns; False: it was not there.

        Raises:
            InstallError: the server refuses.
        """
        found = self.find(each)
        if found is None:
            return False
        metadata = found["metadata"]
        resource = self.resource(group_of(each), each["kind"])
        try:
            self.api.delete(resource, metadata.get("namespace") or "", metadata["name"], uid=metadata["uid"])
        except RefusedError as refused:
            raise self._refusal(each, refused) from None
        self.tell(f"{name_of(each)}: deleted")
        return True

    def wait_gone(self, objects: Iterable[Object], timeout_s: float) -> None:
        """None of them is there any more.

        Raises:
            InstallError: not within ``timeout_s``.
        """
        until = time.monotonic() + timeout_s
        left = list(objects)
        while left := [each for each in left if self.find(each) is not None]:
            if time.monotonic() >= until:
                raise InstallError(
                    f"still there after {timeout_s:.0f} s: {', '.join(map(name_of, left))}", where=self.api.where,
                    fix="'kubectl get' with -o yaml shows in metadata.finalizers who holds it",
                )  # fmt: skip
            time.sleep(POLL_S)

    def find(self, each: Object) -> Object | None:
        """The object as the cluster has it; None: it is not there, or its kind is unknown.

        Raises:
            InstallError: the server refuses.
        """
        resource = self.known(group_of(each), each["kind"])
        if resource is None:
            return None
        metadata = each["metadata"]
        try:
            return self.api.get(f"{resource.path(metadata.get('namespace') or '')}/{metadata['name']}")
        except RefusedError as refused:
            if refused.code == NOT_FOUND:
                return None
            raise self._refusal(each, refused) from None

    def labelled(self, group: str, kind: str, selector: str = "", namespace: str = "") -> list[Object]:
        """The objects of a kind that ``selector`` selects; none where the cluster does not know the kind.

        Raises:
            InstallError: the server refuses.
        """
        resource = self.known(group, kind)
        if resource is None:
            return []
        try:
            answer = self.api.get(resource.path(namespace), {"labelSelector": selector} if selector else {})
        except RefusedError as refused:
            if refused.code == NOT_FOUND:
                return []
            raise self._refused(resource.name, refused) from None
        return [{**each, "apiVersion": resource.api_version, "kind": kind} for each in answer.get("items") or []]

    def known(self, group: str, kind: str) -> Resource | None:
        """What the cluster calls a kind; None where it does not have it."""
        if (group, kind) not in self._resources:
            wanted = {pair for pair in {*KINDS, ("", "Pod"), (group, kind)} if pair not in self._resources}
            self._resources.update({(r.group, r.kind): r for r in self.api.discover(wanted)})
        return self._resources.get((group, kind))

    def resource(self, group: str, kind: str) -> Resource:
        """Raises: InstallError: the cluster does not have the kind."""
        found = self.known(group, kind)
        if found is None:
            raise InstallError(f"does not know {kind} of {group or 'the core group'}", where=self.api.where)
        return found

    def _check_not_helms(self, objects: Iterable[Object]) -> None:
        """Two installers of one thing would undo each other's work."""
        for each in objects:
            if each["kind"] not in ("Deployment", "DaemonSet"):
                continue
            annotations = (self.find(each) or {}).get("metadata", {}).get("annotations") or {}
            if release := annotations.get(_HELM_RELEASE):
                raise InstallError(
                    f"is of the Helm release {release!r}", where=f"{self.api.where}, {name_of(each)}",
                    fix="use 'helm upgrade', or take all of it over with --force-conflicts",
                )  # fmt: skip

    def _owner(self, definition: Object) -> str:
        """Who brought a definition that is there; empty: nobody, or we."""
        found = self.find(definition)
        if found is None:
            return ""
        metadata = found["metadata"]
        labels = metadata.get("labels") or {}
        if labels.get(MANAGED_BY) == INSTALLER:
            return ""
        managers = [str(entry.get("manager")) for entry in metadata.get("managedFields") or [] if entry.get("manager")]
        return "by " + (labels.get(MANAGED_BY) or ", ".join(dict.fromkeys(managers)) or "somebody else")

    def _write(self, each: Object, *, dry_run: bool, force: bool) -> bool:
        resource = self.resource(group_of(each), each["kind"])
        existed = self.find(each) is not None
        try:
            self.api.apply(resource, each, dry_run=dry_run, manager=INSTALLER, force=force)
        except RefusedError as refused:
            if dry_run and refused.code == NOT_FOUND and each["metadata"].get("namespace") == NAMESPACE:
                return False  # its namespace would be there by then
            raise self._refusal(each, refused) from None
        return existed

    def _wait_served(self, definitions: Iterable[Object]) -> None:
        until = time.monotonic() + SERVED_S
        for each in definitions:
            while not _is_established(found := self.find(each) or {}):
                if time.monotonic() >= until:
                    raise InstallError(
                        f"is not served after {SERVED_S:.0f} s: {_names_refused(found)}",
                        where=f"{self.api.where}, {name_of(each)}", fix="its status says why",
                    )  # fmt: skip
                time.sleep(0.1)

    def _refusal(self, each: Object, refused: RefusedError) -> MeshBridgeError:
        return self._refused(name_of(each), refused)

    def _refused(self, what: str, refused: RefusedError) -> MeshBridgeError:
        fix = ""
        if refused.code == FORBIDDEN:
            fix = "installing needs the rights of a cluster's administrator"
        if refused.code == CONFLICT:
            fix = "somebody else changed these fields: undo that, or take them over with --force-conflicts"
        if refused.code not in (FORBIDDEN, CONFLICT) and refused.code < 422:
            return self.api.error(refused)
        return InstallError(
            f"answers {refused.code}: {refused.message}", where=f"{self.api.where}, {what}", fix=fix
        )  # fmt: skip


def _not_in_time(timeout_s: float, missing: Sequence[str], open_: Sequence[Rollout]) -> InstallError:
    said = [f"{name} is not there" for name in missing]
    for each in open_:
        said.append("; ".join([str(each), *each.waits_for[:3]]))
    fix = f"'kubectl -n {NAMESPACE} describe pods' and 'kubectl -n {NAMESPACE} logs' say more"
    if any("free ports" in text for each in open_ for text in each.waits_for):
        fix = "on a cluster of one node use --replicas 1"
    return InstallError(f"not ready after {timeout_s:.0f} s: {'. '.join(said) or 'nothing is installed'}", fix=fix)


def _conditions(definition: Object) -> dict[str, Any]:
    return {c.get("type"): c for c in (definition.get("status") or {}).get("conditions") or []}


def _is_established(definition: Object) -> bool:
    return (_conditions(definition).get("Established") or {}).get("status") == "True"


def _names_refused(definition: Object) -> str:
    return str((_conditions(definition).get("NamesAccepted") or {}).get("message") or "no reason given")


__all__ = ["KINDS", "Cluster", "ClusterError", "InstallError"]
