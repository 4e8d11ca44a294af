"""What mends half a bypass: objects for Istio, or the annotation that is missing on the other side; and what makes a
bypass unnecessary, which is said first.

Spec: ISTIO.md §b; istio: portLevelSettings of a DestinationRule, portLevelMtls, metrics merging and its mTLS port
(ENVOY_SECURE_MERGED_METRICS_PORT, 1.31), rewriteAppHTTPProbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from meshbridge.bypass.annotations import EXCLUDE_INBOUND_PORTS
from meshbridge.bypass.compensated import subject_of
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import Inventory, target_port
from meshbridge.bypass.report import HalfBypass, half_bypasses
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.policy.capture import ISTIO_PORTS, PortClass
from meshbridge.policy.mesh import MtlsMode
from meshbridge.policy.model import Document

Object = dict[str, Any]

MANAGED_BY: Final = {"app.kubernetes.io/managed-by": "meshbridge"}
_CLUSTER_DOMAIN = "svc.cluster.local"
_SCRAPE, _SCRAPE_PORT = "prometheus.io/scrape", "prometheus.io/port"
_REWRITE_PROBES = "sidecar.istio.io/rewriteAppHTTPProbers"


@dataclass(frozen=True, slots=True)
class Fix:
    """One way to mend what ``about`` names: an object to apply, or something only a person can do (``todo``)."""

    about: str
    why: str
    apply: Object | None = None
    todo: str = ""


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
            if given.get(_SCRAPE) == "true" and given.get(_SCRAPE_PORT) == str(port):
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


def fixes(inventory: Inventory, documents: Iterable[Document]) -> list[Fix]:
    """What mends every half bypass that breaks, in an order that does not depend on the objects' order.

    Args:
        documents: all objects, among which a DestinationRule for the same host may stand already.
    """
    rules = {
        (document.namespace, host): document
        for document in documents
        if document.kind == "DestinationRule" and isinstance(host := _spec(document).get("host"), str)
    }
    workloads = {workload.key: workload for workload in inventory.workloads}
    found: dict[str, Fix] = {}
    for half in half_bypasses(inventory):
        if half.delivery.outcome is not Delivered.BROKEN:
            continue
        server = workloads[half.server]
        captured = half.port not in _excluded_ports(server, inventory)
        fix = _missing_annotation(half, server) if captured else _plaintext(half, server, inventory, rules)
        key = repr((fix.apply["kind"], fix.apply["metadata"])) if fix.apply else fix.todo
        found[key] = _both(found[key], fix) if key in found else fix
    return list(found.values())


def _both(one: Fix, other: Fix) -> Fix:
    """Two fixes in one object: of two objects for one scope Istio would follow the older only."""
    about = one.about if other.about in one.about else f"{one.about}; {other.about}"
    if one.apply is None or other.apply is None:
        return replace(one, about=about)
    spec, added = dict(one.apply["spec"]), other.apply["spec"]
    if "portLevelMtls" in spec:
        spec["portLevelMtls"] = {**spec["portLevelMtls"], **added["portLevelMtls"]}
    else:
        settings = [*spec["trafficPolicy"]["portLevelSettings"], *added["trafficPolicy"]["portLevelSettings"]]
        by_port = {item["port"]["number"]: item for item in settings}
        spec["trafficPolicy"] = {"portLevelSettings": [by_port[number] for number in sorted(by_port)]}
    return replace(one, about=about, apply={**one.apply, "spec": spec})


def _about(half: HalfBypass) -> str:
    via = f" through {half.via}" if half.via else ""
    return f"{', '.join(half.clients)} → {half.server}:{half.port}{via}"


def _plaintext(half: HalfBypass, server: Workload, inventory: Inventory, rules: dict[tuple[str, str], Document]) -> Fix:
    """The server does not see the port: clients' Envoys have to send plaintext there."""
    if not half.via:
        return _port_level_mtls(half, server, inventory)
    name, _, number = half.via.removeprefix("Service ").rpartition(":")
    namespace, _, service = name.partition("/")
    host = f"{service}.{namespace}.{_CLUSTER_DOMAIN}"
    settings = {"port": {"number": int(number)}, "tls": {"mode": "DISABLE"}}
    known = (host, f"{service}.{namespace}.svc", f"{service}.{namespace}", service)
    existing = next((rules[namespace, name] for name in known if (namespace, name) in rules), None)
    if existing is not None:
        todo = (
            f"add to DestinationRule {existing.namespace}/{existing.name}, trafficPolicy.portLevelSettings: "
            f"{{port: {{number: {number}}}, tls: {{mode: DISABLE}}}}; a second rule for the host would not count"
        )
        return Fix(_about(half), half.delivery.why, todo=todo)
    return Fix(
        _about(half),
        half.delivery.why,
        {
            "apiVersion": "networking.istio.io/v1",
            "kind": "DestinationRule",
            "metadata": {"name": f"meshbridge-{service}"[:63], "namespace": namespace, "labels": dict(MANAGED_BY)},
            "spec": {"host": host, "trafficPolicy": {"portLevelSettings": [settings]}},
        },
    )


def _port_level_mtls(half: HalfBypass, server: Workload, inventory: Inventory) -> Fix:
    """Clients go by the server's PeerAuthentication; the one that is oldest in a scope is the only one that counts."""
    own = [
        policy
        for policy in inventory.policies.selecting(server).peer_authentication
        if policy.selector is not None
        and policy.namespace == server.namespace
        and policy.selector.matches(server.peer())
    ]
    if own:
        oldest = min(own, key=lambda policy: (policy.created, policy.name))
        todo = (
            f"add to PeerAuthentication {oldest.namespace}/{oldest.name}: "
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
            "metadata": {
                "name": f"meshbridge-{server.name}"[:63],
                "namespace": server.namespace,
                "labels": dict(MANAGED_BY),
            },
            "spec": {
                "selector": {"matchLabels": labels},
                "mtls": {"mode": MtlsMode.UNSET.value},
                "portLevelMtls": {str(half.port): {"mode": MtlsMode.DISABLE.value}},
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


def _spec(document: Document) -> Object:
    spec = document.data.get("spec")
    return spec if isinstance(spec, dict) else {}
