"""What stands in for Envoy on bypassed inbound ports, pod by pod, in a form that can be written down as policies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from meshbridge.bypass.guarantees import may_concern
from meshbridge.bypass.inventory import Inventory, target_port
from meshbridge.bypass.partition import InexpressibleError, Partition, partition
from meshbridge.bypass.sets import IntSet
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.baseline import Guard
from meshbridge.policy.capture import PortClass
from meshbridge.policy.lowering import guard_of
from meshbridge.policy.mesh import Attribute

_PER_POD = frozenset(
    {
        "pod-template-hash",
        "controller-revision-hash",
        "statefulset.kubernetes.io/pod-name",
        "apps.kubernetes.io/pod-index",
        "batch.kubernetes.io/job-completion-index",
    }
)
_BY_THE_INJECTOR = ("security.istio.io/", "service.istio.io/", "istio.io/rev")


@dataclass(frozen=True, slots=True)
class Subject:
    """Pods that a label selector picks in one namespace."""

    namespace: str
    labels: tuple[tuple[str, str], ...]

    def selects(self, workload: Workload) -> bool:
        return workload.namespace == self.namespace and all(workload.labels.get(k) == v for k, v in self.labels)


@dataclass(frozen=True, slots=True)
class Compensated:
    """TCP ports of some pods on which the same sources are let in. ``probed``: by its own node they are as well."""

    subject: Subject
    name: str
    ports: IntSet
    partition: Partition
    probed: bool


@dataclass(frozen=True, slots=True)
class Omission:
    """A pod, or some of its ports, whose compensation cannot be written down, and why."""

    pod: str
    error: InexpressibleError

    def __str__(self) -> str:
        return f"pod {self.pod}: {self.error}"


def compensated_ports(inventory: Inventory) -> tuple[list[Compensated], list[Omission]]:
    """Every compensation of the inventory that drops somebody; pods with equal labels are written once."""
    found: dict[Compensated, None] = {}
    omissions: list[Omission] = []
    excluded = {w.key: _excluded(w, inventory) for w in inventory.workloads if not w.host_network}
    groups: dict[str, list[Compensated]] = {}
    for workload in inventory.workloads:
        if workload.proxy is not ProxyClass.SIDECAR or not any(excluded.get(workload.key, ())):
            continue
        try:
            ports = _common(excluded[workload.key])
        except InexpressibleError as error:
            omissions.append(Omission(workload.key, error))
            continue
        guard = guard_of(workload, inventory.policies.selecting(workload)).past_envoy
        groups[workload.key] = _groups(workload, subject_of(workload), guard, ports, omissions)
    lets_in = {
        key: {(group.ports, group.partition, group.probed) for group in of_pod} for key, of_pod in groups.items()
    }
    for workload in inventory.workloads:
        if not groups.get(workload.key):
            continue
        try:
            _check_reach(workload, inventory.workloads, excluded, lets_in)
        except InexpressibleError as error:
            omissions.append(Omission(workload.key, error))
            continue
        found.update(dict.fromkeys(groups[workload.key]))
    return list(found), omissions


def _excluded(workload: Workload, inventory: Inventory) -> tuple[IntSet, ...]:
    """The excluded TCP ports, by each address family the pod has."""
    classes = inventory.states[workload.key].inbound(intended=inventory.predicted)
    families = sorted({IpFamily.of(address) for address in workload.addresses}) or [IpFamily.IPV4]
    return tuple(
        IntSet.of(*((r.first, r.last) for r in classes[f].ranges if r.port_class is PortClass.EXCLUDED))
        for f in families
    )


def _common(by_family: tuple[IntSet, ...]) -> IntSet:
    if len(set(by_family)) > 1:
        raise InexpressibleError(
            "ports are excluded for one address family only, and a rule holds for both",
            fix="set ISTIO_DUAL_STACK, so that both are redirected alike",
        )
    return by_family[0]


def subject_of(workload: Workload) -> Subject:
    """The labels by which a rule finds a pod and its replicas, without those that each pod has of its own."""
    labels = {
        key: value
        for key, value in workload.labels.items()
        if key not in _PER_POD and not key.startswith(_BY_THE_INJECTOR)
    }
    return Subject(workload.namespace, tuple(sorted(labels.items())))


def _check_reach(
    workload: Workload,
    others: Iterable[Workload],
    excluded: Mapping[str, tuple[IntSet, ...]],
    lets_in: Mapping[str, set[tuple[IntSet, Partition, bool]]],
) -> None:
    """A rule must not reach another pod that is captured on these ports, or lets others in: there it would not only
    subtract."""
    subject = subject_of(workload)
    for other in others:
        if other.key not in excluded or not subject.selects(other):
            continue
        if excluded[other.key] != excluded[workload.key]:
            raise InexpressibleError(
                f"no label tells it from {other.key}, whose excluded ports are others",
                fix="give pods with different exclusions a label that differs",
            )
        if lets_in.get(other.key) != lets_in[workload.key]:
            raise InexpressibleError(
                f"no label tells it from {other.key}, which lets others in",
                fix="give pods with different policies a label that differs",
            )


def _groups(
    workload: Workload, subject: Subject, guard: Guard, ports: IntSet, omissions: list[Omission]
) -> list[Compensated]:
    probed = {port for probe in workload.probe_ports if (port := target_port(workload, probe)) is not None}
    named = probed | set(guard.mtls.ports)
    for rule in guard.rules:
        for condition in rule.all_conditions:
            if condition.attribute is Attribute.PORTS:
                named.update(int(value) for value in (*condition.values, *condition.not_values))
    singles = [port for port in sorted(named) if port in ports]
    rest = ports - IntSet.of(*singles)
    alike: dict[tuple[Partition, bool], IntSet] = {}
    for segment in [*(IntSet.of(port) for port in singles), *([rest] if rest else [])]:
        port = segment.spans[0][0]
        try:
            parts = partition(guard, port, [rule for rule in guard.rules if may_concern(rule, port)])
        except InexpressibleError as error:
            omissions.append(Omission(f"{workload.key} TCP {ports_text(segment)}", error))
            continue
        if not parts.denies_nobody:
            key = (parts, port in probed)
            alike[key] = alike.get(key, IntSet()) | segment
    return [
        Compensated(subject, workload.name, members, parts, own_node) for (parts, own_node), members in alike.items()
    ]


def ports_text(ports: IntSet) -> str:
    """``80,8000-8999``."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in ports)
