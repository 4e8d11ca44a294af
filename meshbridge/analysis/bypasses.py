"""What the report on bypasses says, as findings; the report itself is ``meshbridge bypass``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Final

from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import Scene
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.encryption import node_encryption
from meshbridge.bypass.findings import FindingCode
from meshbridge.bypass.guarantees import Fate, GuaranteeKind
from meshbridge.bypass.halfreport import half_bypasses
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import Inventory
from meshbridge.bypass.report import Report, report
from meshbridge.bypass.state import CaptureState
from meshbridge.identity.model import IpFamily
from meshbridge.policy.capture import PortClass
from meshbridge.policy.model import Direction, Severity

_REGISTRY: Final = GuaranteeKind.REGISTRY_ONLY

CODE_OF: Final[Mapping[FindingCode, str]] = {
    FindingCode.INJECTOR_REFUSES: "MB0604",
    FindingCode.NEVER_STARTS: "MB0604",
    FindingCode.OCTAL_PORT: "MB0605",
    FindingCode.PORT_RANGE: "MB0606",
    FindingCode.SERVICE_NAME: "MB0606",
    FindingCode.UNKNOWN_PORT: "MB0607",
    FindingCode.EXCLUDE_IGNORED: "MB0608",
    FindingCode.DEFAULT_EXCLUSION_LOST: "MB0608",
    FindingCode.MESH_WIDE_LOST: "MB0608",
    FindingCode.REROUTE_IGNORES: "MB0608",
    FindingCode.AMBIENT_IGNORES: "MB0608",
    FindingCode.ARGUMENTS_CONTRADICT: "MB0609",
    FindingCode.MODE_NONE_IN_ARGUMENTS: "MB0609",
    FindingCode.UNKNOWN_ARGUMENT: "MB0609",
    FindingCode.MESH_WIDE: "MB0610",
    FindingCode.CAPTURES_ISTIO_PORT: "MB0610",
    FindingCode.LOOPBACK_CAPTURED: "MB0610",
    FindingCode.IPV6_BYPASSES: "MB0610",
    FindingCode.ANY_UID: "MB0610",
    FindingCode.NO_REDIRECTION: "MB0610",
    FindingCode.INIT_CONTAINERS: "MB0610",
}
"""What only rules seen in a running pod's namespace show is no finding here: ``meshbridge status`` has it."""


def settings(scene: Scene) -> Iterator[Finding]:
    """Redirection settings that are not what they look like."""
    found: dict[tuple[str, Severity, str, str, str], list[str]] = {}
    for pods in scene.pods:
        for each in capture_state(pods.pod).findings:
            code = CODE_OF.get(each.code)
            if code is not None:
                # the pod's name stands in some subjects; who the finding is about is said elsewhere
                subject = "" if pods.pod.key in each.subject else f"{each.subject}: "
                key = (code, Severity(each.severity.value), subject, each.what, each.fix)
                found.setdefault(key, []).append(pods.names[0])
    for (code, severity, subject, what, fix), keys in found.items():
        more = f" ({len(keys) - 1} more kinds of pods say the same)" if len(keys) > 1 else ""
        origin = scene.origin_of_pod(keys[0])
        yield finding(code, origin, f"{subject}{what}{more}", fix=fix, severity=severity)


def lost_guarantees(scene: Scene) -> Iterator[Finding]:
    """Excluded ports, and what the mesh guaranteed there, nobody does any more, and no BypassPolicy accepts."""
    for row in _report(scene).rows:
        lost = [g for g in row.with_fate(Fate.LOST) if g.kind is not _REGISTRY or scene.mesh.registry_only]
        refused = ""
        if row.ruling is not None and row.ruling.policies:
            lost = [guarantee for guarantee in lost if guarantee in row.ruling.unaccepted]
            refused = "" if row.ruling.allowed else "; BypassPolicies select the pod, and none allows it"
        if row.port_class is not PortClass.EXCLUDED or not (lost or refused):
            continue
        ports = ",".join(str(first) if first == last else f"{first}-{last}" for first, last in row.ports.spans[:4])
        way = "" if row.direction is Direction.INGRESS else "outbound "
        kinds = listed(dict.fromkeys(guarantee.kind.value for guarantee in lost), 6)
        loses = f", which loses {kinds}" if kinds else ""
        text = f"{way}port {ports} bypasses the sidecar by {row.route}{loses}{refused}"
        related = [guarantee.origin for guarantee in lost if guarantee.origin is not None]
        yield finding("MB0601", scene.origin_of_pod(row.pod), text, related=related)


def halves(scene: Scene) -> Iterator[Finding]:
    """Connections of which one side bypasses its sidecar and the other does not."""
    for half in (half for half in _report(scene).halves if half.delivery.half):
        via = f" through {half.via}" if half.via else ""
        text = f"{listed(half.clients)} to port {half.port}{via}: {half.delivery.why}"
        broken = half.delivery.outcome is Delivered.BROKEN
        yield finding(
            "MB0602" if broken else "MB0603", scene.origin_of_pod(half.server), text,
            fix=half.delivery.fix if broken else "",
            related=[scene.origin_of_pod(client) for client in half.clients[:3]],
        )  # fmt: skip


@lru_cache(maxsize=1)
def _report(scene: Scene) -> Report:
    """The report on one of each kind of pods; what bypasses nothing only takes part as the other end."""
    kinds = tuple(pods.pod for pods in scene.pods)
    states = {pod.key: capture_state(pod) for pod in kinds}
    everybody = Inventory(
        kinds, scene.services, scene.policies, states, bypass_policies=scene.bypass_policies,
        registry=scene.cluster.registry, encryption=node_encryption(scene.documents),
    )  # fmt: skip
    bypassing = tuple(pod for pod in kinds if _bypasses(states[pod.key], scene.families_of(pod)))
    if not bypassing:
        return Report()
    rows = report(replace(everybody, workloads=bypassing, policies=replace(scene.policies, network=()))).rows
    return Report(rows, halves=tuple(half_bypasses(everybody)))


def _bypasses(state: CaptureState, families: frozenset[IpFamily]) -> bool:
    """Whether something that the mesh would guard goes past the sidecar, in a family that the pod has."""
    return any(span.port_class is PortClass.EXCLUDED and span.family in families for span in state.intended)
