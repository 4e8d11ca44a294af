"""BypassReports: for each pod that passes by its sidecar, what that loses and what stands in, for ``kubectl``.

It is what ``meshbridge bypass show`` says of the pod, by its specification, bounded, with what its node reports of it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Any, Final

from meshbridge.bypass.export import MANAGED_BY
from meshbridge.bypass.guarantees import Fate
from meshbridge.bypass.halfreport import HalfBypass, half_bypasses
from meshbridge.bypass.record import report_record
from meshbridge.bypass.report import Report, Row, rows_of
from meshbridge.bypass.sets import IntSet, union
from meshbridge.controller.conditions import Condition, condition_records
from meshbridge.controller.picture import Picture
from meshbridge.controller.policystatus import MANAGER
from meshbridge.controller.scene import Kind, Scene
from meshbridge.controller.writer import Outbox
from meshbridge.identity.model import Workload
from meshbridge.kube.api import NOT_FOUND, Api, RefusedError, Resource
from meshbridge.policy.capture import ISTIO_PORTS, PortClass
from meshbridge.xds.nodereport import NO_REPORT

REPORTS: Final = Resource("meshbridge.io", "v1alpha1", "bypassreports", "BypassReport", True)
MAX_ROWS: Final = 64
MAX_NAMES: Final = 32
MAX_TEXT: Final = 512
MAX_BYTES: Final = 128 << 10
"""Far below the 1.5 MiB that the API server takes, with what it adds itself."""
LIST_AGAIN_S: Final = 300.0

Status = dict[str, Any]


def status_of(kind: Kind, picture: Picture) -> Status:
    """What holds of every pod of a kind, with names of whoever made the other pods, since pods come and go."""
    inventory, pod = picture.scene.inventory, kind.first
    named = _Names({each.key: kind.name for kind in picture.scene.kinds for each in kind.standing})
    rows = _merged(row for row in rows_of(pod, inventory) if _counts(row))
    halves = [half for half in half_bypasses(inventory, of=pod.key) if pod.key in (half.server, *half.clients)]
    found = report_record(Report(tuple(map(named.row, rows)), (), tuple(map(named.half, halves))))
    bypasses = [_bypass(row) for row in found["bypasses"]]
    status: Status = {
        "ports": ",".join(_ports(union(row.ports for row in rows)))[:MAX_TEXT],
        **{fate.value: _kinds(rows, fate) for fate in Fate},
        "accepted": all(row.ruling is None or row.ruling.otherwise is None for row in rows),
        "enforcement": _enforcement(rows),
        "bypasses": bypasses,
        "halfBypasses": [
            {"role": "server" if half.server == pod.key else "client", **_camel(record)}
            for half, record in zip(halves, found["half_bypasses"], strict=True)
        ],
    }
    return _bounded(status)


class _Names:
    """Values with the names of whoever made a pod in place of the pod's."""

    def __init__(self, names: Mapping[str, str]) -> None:
        self._names = names

    def row(self, row: Row) -> Row:
        compensation = row.compensation
        if compensation is None:
            return row
        allowed, refused = self._all(compensation.allowed), self._all(compensation.refused)
        return replace(row, compensation=replace(compensation, allowed=allowed, refused=refused))

    def half(self, half: HalfBypass) -> HalfBypass:
        # without when one was last seen: that changes with every connection
        return replace(half, server=self._of(half.server), clients=self._all(half.clients), observed_ns=0)

    def _all(self, names: Iterable[str]) -> tuple[str, ...]:
        return tuple(sorted(set(map(self._of, names))))

    def _of(self, name: str) -> str:
        """Of a pod, or of ``pod:port``."""
        pod, colon, port = name.partition(":")
        return f"{self._names[pod]}{colon}{port}" if pod in self._names else name


def _counts(row: Row) -> bool:
    """Whether somebody asked for it: injection itself excludes Istio's own ports in every pod."""
    return row.port_class is PortClass.EXCLUDED and bool(row.ports - IntSet.of(*ISTIO_PORTS))


def _merged(rows: Iterable[Row]) -> list[Row]:
    """Ports that share everything else are one row: two hundred ports are not two hundred rows."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(repr(replace(row, ports=IntSet())), []).append(row)
    return [replace(alike[0], ports=union(row.ports for row in alike)) for alike in found.values()]


def _ports(ranges: Iterable[Iterable[int]]) -> list[str]:
    return [str(first) if first == last else f"{first}-{last}" for first, last in ranges]


def _kinds(rows: Iterable[Row], fate: Fate) -> list[str]:
    return sorted({guarantee.kind.value for row in rows for guarantee in row.with_fate(fate)})


def _enforcement(rows: Iterable[Row]) -> str:
    """``Kernel``: something stands in everywhere it can; ``Audit``: nothing is dropped yet; ``None``: nothing could."""
    found = [row for row in rows if row.compensation is not None and row.compensation.enforced]
    if any(row.ruling is not None and row.ruling.mode.name == "AUDIT" for row in found):
        return "Audit"
    return "Kernel" if found else "None"


def _bypass(row: Mapping[str, Any]) -> Status:
    found: Status = _camel({key: value for key, value in row.items() if key != "pod"})
    found["ports"] = _ports(row["ports"])
    if row["ruling"] is not None:
        unaccepted = {guarantee["kind"] for guarantee in row["ruling"]["unaccepted"]}
        found["ruling"]["unaccepted"] = sorted(unaccepted)
    return found


def _camel(value: Any) -> Any:
    """Keys as Kubernetes spells them, texts and lists of texts that end, and no files, since a cluster has none."""
    if isinstance(value, Mapping):
        kept = {key: item for key, item in value.items() if key not in ("file", "line") and item is not None}
        return {_key(key): _camel(item) for key, item in kept.items()}
    if isinstance(value, list):
        listed = [_camel(item) for item in value]
        return listed[:MAX_NAMES] if all(isinstance(item, str) for item in listed) else listed
    if isinstance(value, str):
        return value if len(value) <= MAX_TEXT else f"{value[: MAX_TEXT - 1]}…"
    return value


def _key(key: str) -> str:
    first, *rest = ("policy" if key == "origin" else "policies" if key == "origins" else key).split("_")
    return first + "".join(word.capitalize() for word in rest)


def _bounded(status: Status) -> Status:
    """Cut, and it says so, until it fits: the summary above the rows is always whole."""
    rows, halves = status["bypasses"], status["halfBypasses"]
    shown: Status = {**status, "bypasses": rows[:MAX_ROWS], "halfBypasses": halves[:MAX_ROWS]}
    while len(json.dumps(shown).encode()) > MAX_BYTES and (shown["halfBypasses"] or shown["bypasses"]):
        longest = "bypasses" if len(shown["bypasses"]) > len(shown["halfBypasses"]) else "halfBypasses"
        shown[longest] = shown[longest][: len(shown[longest]) // 2]
    left_out = len(rows) - len(shown["bypasses"]) + len(halves) - len(shown["halfBypasses"])
    if left_out:
        text = f"{left_out} of {len(rows) + len(halves)} entries are left out; 'meshbridge bypass show' has them all"
        shown["truncated"] = text
    return shown


@dataclass(frozen=True, slots=True)
class _Known:
    """A report that is there: its own UID, its pod's, and what it says."""

    uid: str
    pod: str
    digest: str
    conditions: object


class Reports:
    """Brings the reports to what holds: one for each pod that passes by its sidecar, none for any other.

    Cost: what is said is computed once for each kind of pods that bypass, and anew when a policy, a Service or the
    kinds that there are change. A pod that comes costs one write, one that goes none, as its report goes with it; a
    change of what holds of a kind one write for each of its pods. All are listed every five minutes, to put right what
    somebody else wrote.
    """

    def __init__(self, api: Api, clock: Callable[[], float] = time.monotonic) -> None:
        self._api, self._clock = api, clock
        self._known: dict[tuple[str, str], _Known] = {}
        self._listed_at: float | None = None
        self._scene: Scene | None = None
        self._said: dict[tuple[Any, ...], Status] = {}

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        """There are the reports that are wanted, and they say what holds."""
        if self._listed_at is None or self._clock() - self._listed_at >= LIST_AGAIN_S:
            listed = self._list()
            if listed is None:
                return  # their definition is not installed
            self._known, self._listed_at = listed, self._clock()
        wanted: dict[tuple[str, str], tuple[Workload, Status]] = {}
        statuses = self._statuses(picture)
        for kind in picture.scene.kinds:
            status = statuses.get(kind.key)
            if status is not None and (status["bypasses"] or "truncated" in status):
                wanted |= {(pod.namespace, pod.name): (pod, status) for pod in kind.pods if pod.uid}
        live = {(pod.namespace, pod.name) for pod in picture.enforced}
        for key in self._known.keys() - wanted.keys():
            known = self._known.pop(key)
            if key in live:  # else it goes with its pod
                act = partial(_delete, self._api, *key, known.uid)
                out.write("delete bypassreports", act, f"BypassReport {key[0]}/{key[1]}")
        for key, (pod, status) in sorted(wanted.items()):
            self._put(key, pod, status, picture, out, now)

    def _statuses(self, picture: Picture) -> Mapping[tuple[Any, ...], Status]:
        """By kind, as of the last look where nothing but the number of pods has changed."""
        scene = picture.scene
        if self._scene is None or not scene.is_like(self._scene):
            self._said = {kind.key: status_of(kind, picture) for kind in scene.kinds if kind.bypasses}
        self._scene = scene
        return self._said

    def _put(
        self, key: tuple[str, str], pod: Workload, status: Status, picture: Picture, out: Outbox, now: datetime
    ) -> None:
        known = self._known.get(key)
        told = picture.reports.get(pod.node, NO_REPORT).conditions.get(pod.uid, ())
        conditions = [Condition(c.type, c.status, c.reason, c.message) for c in told]
        observed = known.conditions if known is not None else None
        records = condition_records(conditions, observed, now)
        kept = (
            [r for r in observed if r.get("type") in {c.type for c in conditions}] if isinstance(observed, list) else []
        )
        said = {**status, "node": pod.node, "conditions": list(records) if records is not None else kept}
        digest = _digest(said)
        if known is not None and (known.pod, known.digest) == (pod.uid, digest):
            return
        act = partial(self._api.apply, REPORTS, _report(pod, said), force=True, manager=MANAGER)
        answer = out.write("patch bypassreports", act, f"BypassReport {pod.key}")
        if answer is not None:
            self._known[key] = _Known(str(answer["metadata"]["uid"]), pod.uid, digest, said["conditions"])

    def _list(self) -> dict[tuple[str, str], _Known] | None:
        found = {}
        try:
            for page in self._api.pages(REPORTS):
                for document in page.documents:
                    found[document.namespace, document.name] = _known(document.data, document.uid)
        except RefusedError as refused:
            if refused.code == NOT_FOUND:
                return None
            raise self._api.error(refused) from None
        return found


def _delete(api: Api, namespace: str, name: str, uid: str) -> None:
    api.delete(REPORTS, namespace, name, uid=uid)


def _known(data: Mapping[str, Any], uid: str) -> _Known:
    owners = data["metadata"].get("ownerReferences") or [{}]
    status = data.get("status") or {}
    return _Known(uid, str(owners[0].get("uid", "")), _digest(status), status.get("conditions"))


def _digest(status: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(status, sort_keys=True).encode(), digest_size=16).hexdigest()


def _report(pod: Workload, status: Status) -> dict[str, Any]:
    owner = {"apiVersion": "v1", "kind": "Pod", "name": pod.name, "uid": pod.uid}
    metadata = {"name": pod.name, "namespace": pod.namespace, "labels": dict(MANAGED_BY), "ownerReferences": [owner]}
    return {"kind": REPORTS.kind, "metadata": metadata, "status": status}
