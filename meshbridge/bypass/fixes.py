"""What mends half a bypass: objects for Istio, or the annotation that is missing on the other side; and what makes a
bypass unnecessary, which is said first.

Spec: ISTIO.md §b; istio: portLevelSettings of a DestinationRule, portLevelMtls, metrics merging and its mTLS port
(ENVOY_SECURE_MERGED_METRICS_PORT, 1.31), rewriteAppHTTPProbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from meshbridge.bypass.annotations import EXCLUDE_INBOUND_PORTS
from meshbridge.bypass.compensated import subject_of
from meshbridge.bypass.export import MANAGED_BY
from meshbridge.bypass.halfreport import SCRAPE, SCRAPE_PORT, HalfBypass, half_bypasses, via_service
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import Inventory, target_port
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import ISTIO_PORTS, PortClass
from meshbridge.policy.mesh import MtlsMode, effective_mtls, scopes_of
from meshbridge.policy.model import Document
from meshbridge.policy.parse.cluster import Service
from meshbridge.policy.parse.peerauthentication import is_made_by_fix
from meshbridge.policy.registry import CLUSTER_DOMAIN, TlsMode

Object = dict[str, Any]

MADE: Final = ("AuthorizationPolicy", "PeerAuthentication", "DestinationRule")
"""The kinds of objects that are made, in the order in which they are applied: what closes before what opens."""

_REWRITE_PROBES = "sidecar.istio.io/rewriteAppHTTPProbers"


@dataclass(frozen=True, slots=True)
class Fix:
    """One way to mend what ``about`` names: an object to apply, or something only a person can do (``todo``).

    ``causes`` are the servers' ports that it is for.
    """

    about: str
    why: str
    apply: Object | None = None
    todo: str = ""
    causes: frozenset[tuple[str, int]] = frozenset()


@dataclass(frozen=True, slots=True)
class Advice:
    """Why a pod need not bypass its sidecar on a port at all."""

    pod: str
    port: int
    text: str


def advice(inventory: Inventory) -> list[Advice]:
    """Bypassed ports that something in Istio makes unnecessary."""
    found = []
    for workload in inventory.workloads:
        if workload.proxy is not ProxyClass.SIDECAR or workload.host_network:
            continue
        for port in _excluded_ports(workload, inventory):
            given = workload.annotations
            if given.get(SCRAPE) == "true" and given.get(SCRAPE_PORT) == str(port):
                text = (
                    "Istio merges the application's metrics into its own on port 15020, and serves both with mutual "
                    "TLS on ENVOY_SECURE_MERGED_METRICS_PORT (proxyMetadata, Istio 1.31): nothing has to be excluded "
                    "to be scraped"
                )
                found.append(Advice(workload.key, port, text))
            probes = {target_port(workload, probe) for probe in workload.probe_ports}
            if port in probes and given.get(_REWRITE_PROBES) != "false":
                text = "Istio rewrites the kubelet's probes to port 15020: nothing has to be excluded for them"
                found.append(Advice(workload.key, port, text))
    return found


def fixes(
    inventory: Inventory, documents: Iterable[Document], wanted: Callable[[str, int], bool] = lambda *_: True
) -> list[Fix]:
    """What mends every half bypass that breaks, in an order that does not depend on the objects' order.

    Args:
        documents: all objects, among which those may stand that earlier fixes made.
        wanted: whether a server's port is to be looked at.
    """
    ours = frozenset(
        (document.kind, document.namespace, document.name) for document in documents if is_made_here(document)
    )
    mender = _Mender(inventory, ours)
    found: dict[str, Fix] = {}
    for half in half_bypasses(inventory):
        if half.delivery.outcome is not Delivered.BROKEN or not wanted(half.server, half.port):
            continue
        fix = replace(mender.fix(half), causes=frozenset([(half.server, half.port)]))
        key = repr((fix.apply["kind"], fix.apply["metadata"])) if fix.apply else fix.todo
        found[key] = both(found[key], fix) if key in found else fix
    guards = [replace(guard, causes=fix.causes) for fix in found.values() if (guard := mender.guard(fix)) is not None]
    return [*guards, *found.values()]


def is_made_here(document: Document) -> bool:
    """Whether an earlier fix made this object: by its kind, its label and its name."""
    return document.kind in MADE and is_made_by_fix(document)


def reached_beyond(fix: Fix, inventory: Inventory) -> tuple[str, ...]:
    """The pods whose Envoys see a port that the fix's object would have clients send plaintext to, or take it on.

    To apply it would take mutual TLS from them, which no plan says. What only denies reaches nobody so.
    """
    if fix.apply is None or fix.apply["kind"] == "AuthorizationPolicy":
        return ()
    namespace, spec = fix.apply["metadata"]["namespace"], fix.apply["spec"]
    found: set[str] = set()
    for workload in inventory.workloads:
        if workload.namespace != namespace or workload.proxy is not ProxyClass.SIDECAR or workload.host_network:
            continue
        if "portLevelMtls" in spec:
            reached = spec["selector"]["matchLabels"].items() <= workload.labels.items()
            ports = {int(port) for port in spec["portLevelMtls"]} if reached else set()
        else:
            numbers = {item["port"]["number"] for item in spec["trafficPolicy"]["portLevelSettings"]}
            ports = _targets(workload, spec["host"], numbers, inventory)
        if any(not _is_excluded(workload, port, inventory) for port in ports):
            found.add(workload.key)
    return tuple(sorted(found))


def _targets(workload: Workload, host: str, numbers: set[int], inventory: Inventory) -> set[int]:
    """The ports of a workload that these ports of a Service lead to."""
    return {
        port
        for service in inventory.services
        if f"{service.name}.{service.namespace}.{CLUSTER_DOMAIN}" == host and service.selects(workload)
        for entry in service.ports
        if entry.port in numbers and (port := target_port(workload, entry.target)) is not None
    }


def _is_excluded(workload: Workload, port: int, inventory: Inventory) -> bool:
    classes = inventory.states[workload.key].inbound(intended=inventory.predicted)
    families = {IpFamily.of(address) for address in workload.addresses} or {IpFamily.IPV4}
    return all(classes[family].at(port) is PortClass.EXCLUDED for family in families)


def both(one: Fix, other: Fix) -> Fix:
    """Two fixes in one object: of two objects for one scope Istio would follow the older only."""
    about = one.about if other.about in one.about else f"{one.about}; {other.about}"
    one = replace(one, causes=one.causes | other.causes)
    if one.apply is None or other.apply is None:
        return replace(one, about=about)
    spec, added = dict(one.apply["spec"]), other.apply["spec"]
    if "portLevelMtls" in spec:
        spec["portLevelMtls"] = {**spec["portLevelMtls"], **added["portLevelMtls"]}
    elif "rules" in spec:
        ports = {port for rules in (spec["rules"], added["rules"]) for port in rules[0]["to"][0]["operation"]["ports"]}
        operation = {"operation": {"ports": sorted(ports, key=int)}}
        spec["rules"] = [{**spec["rules"][0], "to": [operation]}]
    else:
        settings = [*spec["trafficPolicy"]["portLevelSettings"], *added["trafficPolicy"]["portLevelSettings"]]
        by_port = {item["port"]["number"]: item for item in settings}
        spec["trafficPolicy"] = {"portLevelSettings": [by_port[number] for number in sorted(by_port)]}
    return replace(one, about=about, apply={**one.apply, "spec": spec})


def _about(half: HalfBypass) -> str:
    via = f" through {half.via}" if half.via else ""
    return f"{', '.join(half.clients)} → {half.server}:{half.port}{via}"


class _Mender:
    def __init__(self, inventory: Inventory, ours: frozenset[tuple[str, str, str]]) -> None:
        self._inventory, self._ours = inventory, ours
        self._workloads = {workload.key: workload for workload in inventory.workloads}

    def fix(self, half: HalfBypass) -> Fix:
        server = self._workloads[half.server]
        if half.port in _excluded_ports(server, self._inventory):
            return self._plaintext(half, server)
        if half.delivery.half:
            return _missing_annotation(half, server)
        by = f" ({half.delivery.origin.kind} {half.delivery.origin.policy})" if half.delivery.origin else ""
        return Fix(_about(half), half.delivery.why, todo=f"{half.delivery.fix}{by}")

    def _plaintext(self, half: HalfBypass, server: Workload) -> Fix:
        """The server does not see the port: clients' Envoys have to send plaintext there."""
        registry, found = self._inventory.registry, self._service(half, server)
        if found is None or registry is None or registry.mesh.own_sidecars:
            return self._port_level_mtls(half, server)
        service, number = found
        host = f"{service.name}.{service.namespace}.{CLUSTER_DOMAIN}"
        rule = registry.rule_for(self._workloads[half.clients[0]], service)
        if rule is not None and rule.fqdn != host and rule.namespace in (
            service.namespace, registry.mesh.root_namespace,
        ):  # fmt: skip
            rule = None  # one for the host itself, in the Service's namespace, comes before it
        if rule is not None and ("DestinationRule", rule.namespace, rule.name) not in self._ours:
            if half.delivery.origin is None and not service.headless:
                return self._port_level_mtls(half, server)
            todo = (
                f"add to DestinationRule {rule.namespace}/{rule.name}, trafficPolicy.portLevelSettings: "
                f"{{port: {{number: {number}}}, tls: {{mode: DISABLE}}}}; a second rule for the host would not count"
            )
            return Fix(_about(half), half.delivery.why, todo=todo)
        ports = sorted({number, *(rule.port_tls if rule is not None else ())})
        settings = [{"port": {"number": port}, "tls": {"mode": TlsMode.DISABLE.value}} for port in ports]
        return Fix(
            _about(half),
            half.delivery.why,
            {
                "apiVersion": "networking.istio.io/v1",
                "kind": "DestinationRule",
                "metadata": {
                    "name": rule.name if rule is not None else f"meshbridge-{service.name}"[:63],
                    "namespace": service.namespace,
                    "labels": dict(MANAGED_BY),
                },
                "spec": {"host": host, "trafficPolicy": {"portLevelSettings": settings}},
            },
        )

    def guard(self, fix: Fix) -> Fix | None:
        """What keeps closed to strangers what a PeerAuthentication of ours opens to plaintext.

        Where mutual TLS was STRICT without it, a caller without the mesh's identity was refused. The kernel judges by
        what policies say, so with the mode off it would let strangers in; and Envoy would, once it sees the port again.
        """
        if fix.apply is None or fix.apply["kind"] != "PeerAuthentication":
            return None
        metadata, spec = fix.apply["metadata"], fix.apply["spec"]
        strict = sorted({port for port in map(int, spec["portLevelMtls"]) if self._was_strict(metadata, spec, port)})
        if not strict:
            return None
        strangers = [{"source": {"notPrincipals": ["*"]}}]
        operations = [{"operation": {"ports": [str(port) for port in strict]}}]
        return Fix(
            fix.about,
            "mutual TLS was demanded there; who has no identity of the mesh stays out",
            {
                "apiVersion": "security.istio.io/v1",
                "kind": "AuthorizationPolicy",
                "metadata": {**metadata, "labels": dict(MANAGED_BY)},
                "spec": {
                    "selector": spec["selector"],
                    "action": "DENY",
                    "rules": [{"from": strangers, "to": operations}],
                },
            },
        )

    def _was_strict(self, metadata: Mapping[str, Any], spec: Mapping[str, Any], port: int) -> bool:
        labels = spec["selector"]["matchLabels"].items()
        for server in self._inventory.workloads:
            if server.namespace == metadata["namespace"] and labels <= server.labels.items():
                selecting = self._inventory.policies.selecting(server).peer_authentication
                others = tuple(p for p in selecting if ("PeerAuthentication", p.namespace, p.name) not in self._ours)
                if effective_mtls(others, server.peer(), self._inventory.policies.mesh).at(port)[0] is MtlsMode.STRICT:
                    return True
        return False

    def _service(self, half: HalfBypass, server: Workload) -> tuple[Service, int] | None:
        """The Service that clients call, also where they call it by the pod's own address."""
        for service, number in self._inventory.frontends(server, half.port):
            if half.via == via_service(service, number) or (not half.via and service.headless and number == half.port):
                return service, number
        return None

    def _port_level_mtls(self, half: HalfBypass, server: Workload) -> Fix:
        """Clients go by the server's PeerAuthentication; of those in a scope only the oldest counts."""
        ports = {half.port}
        name = f"meshbridge-{server.name}"[:63]
        own = scopes_of(
            self._inventory.policies.selecting(server).peer_authentication, server.peer(), self._inventory.policies.mesh
        )[2]
        if own is not None and ("PeerAuthentication", own.namespace, own.name) in self._ours:
            ports, name = ports | own.port_modes.keys(), own.name
        elif own is not None:
            todo = (
                f"add to PeerAuthentication {own.namespace}/{own.name}: "
                f"portLevelMtls: {{{half.port}: {{mode: DISABLE}}}}; a second policy for the pod would not count"
            )
            return Fix(_about(half), half.delivery.why, todo=todo)
        labels = dict(subject_of(server).labels)
        if not labels:
            return Fix(_about(half), half.delivery.why, todo=f"give pod {server.key} a label, then ask again")
        return Fix(
            _about(half),
            half.delivery.why,
            {
                "apiVersion": "security.istio.io/v1",
                "kind": "PeerAuthentication",
                "metadata": {"name": name, "namespace": server.namespace, "labels": dict(MANAGED_BY)},
                "spec": {
                    "selector": {"matchLabels": labels},
                    "mtls": {"mode": MtlsMode.UNSET.value},
                    "portLevelMtls": {str(port): {"mode": MtlsMode.DISABLE.value} for port in sorted(ports)},
                },
            },
        )


def _missing_annotation(half: HalfBypass, server: Workload) -> Fix:
    """The client sends plaintext and the server demands a certificate: both sides have to do the same."""
    given = server.annotations.get(EXCLUDE_INBOUND_PORTS, "")
    value = ",".join([*filter(None, [given]), str(half.port)])
    todo = (
        f"capture the port at {', '.join(half.clients)} again, which keeps mutual TLS; or exclude it at the server "
        f'too, in the template of pod {server.key}: annotation {EXCLUDE_INBOUND_PORTS}: "{value}"'
    )
    return Fix(_about(half), half.delivery.why, todo=todo)


def _excluded_ports(workload: Workload, inventory: Inventory) -> list[int]:
    classes = inventory.states[workload.key].inbound(intended=inventory.predicted)
    families = {IpFamily.of(address) for address in workload.addresses} or {IpFamily.IPV4}
    return [
        port
        for port in inventory.declared_ports(workload)
        if port not in ISTIO_PORTS and any(classes[family].at(port) is PortClass.EXCLUDED for family in families)
    ]
