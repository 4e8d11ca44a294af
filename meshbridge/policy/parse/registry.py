"""ServiceEntry, WorkloadEntry, DestinationRule, Sidecar and Gateway, as far as they decide what sidecars see and send.

Of other fields nothing is asked. An object that cannot be read has no part in answers, and is said to be refused.

Spec: istio, networking.istio.io/v1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from meshbridge.identity.model import IpAddress, IpNetwork
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.model import Document, Layer, Refusal
from meshbridge.policy.parse.lenient import address, child, children, strings, text
from meshbridge.policy.parse.parsed import Parsed, origin_of
from meshbridge.policy.parse.reader import Invalid, Reader, shown
from meshbridge.policy.protocols import protocol_of
from meshbridge.policy.registry import (
    DestinationRule,
    EgressListener,
    Gateway,
    RegistryObject,
    ServiceEntry,
    SidecarScope,
    TlsMode,
    WorkloadEntry,
)

_MAX_PORT: Final = 65535
_RESOLUTIONS: Final = ("NONE", "STATIC", "DNS", "DNS_ROUND_ROBIN", "DYNAMIC_DNS")


def parse_registry_object(document: Document) -> Parsed:
    """One object; a refused one selects and denies nobody."""
    try:
        spec = child(Reader(document.data, ""), "spec")
        if not isinstance(spec.value, dict):
            spec.refuse(f"expected a mapping, found {shown(spec.value)}", "see the kind's reference")
        return Parsed(document, registry=(_KINDS[document.kind](document, spec),))
    except Exception as raised:
        error = Invalid.of(raised)
        refusal = Refusal(document, error.reason, error.path, error.fix, Layer.MESH, (), frozenset())
        return Parsed(document, refusals=(refusal,))


def _service_entry(document: Document, spec: Reader) -> ServiceEntry:
    hosts = tuple(item.text() for item in children(spec, "hosts"))
    if not hosts:
        child(spec, "hosts").refuse("has no host", "write one")
    resolution = child(spec, "resolution")
    if resolution.value is not None:
        resolution.text(_RESOLUTIONS)
    return ServiceEntry(
        document.namespace,
        document.name,
        hosts,
        tuple(_network(item) for item in children(spec, "addresses")),
        tuple(_server_port(item) for item in children(spec, "ports")),
        _export_to(spec),
        origin_of(document, ""),
    )


def _workload_entry(document: Document, spec: Reader) -> WorkloadEntry:
    return WorkloadEntry(
        document.namespace,
        document.name,
        _host_address(child(spec, "address")),
        origin_of(document, ""),
    )


def _destination_rule(document: Document, spec: Reader) -> DestinationRule:
    host = text(spec, "host")
    if not host:
        child(spec, "host").refuse("is empty", "write a host")
    policy = child(spec, "trafficPolicy")
    ports: dict[int, TlsMode | None] = {}
    for item in children(policy, "portLevelSettings"):
        ports[child(child(item, "port"), "number").integer(1, _MAX_PORT)] = _tls_mode(item)
    return DestinationRule(
        document.namespace,
        document.name,
        host,
        _tls_mode(policy),
        ports,
        _export_to(spec),
        strings(child(spec, "workloadSelector"), "matchLabels"),
        origin_of(document, "spec.trafficPolicy"),
    )


def _tls_mode(policy: Reader) -> TlsMode | None:
    """``tls`` that is written without a mode is DISABLE, the first value there is."""
    tls = child(policy, "tls")
    if tls.value is None:
        return None
    mode = child(tls, "mode")
    return TlsMode(mode.text(list(TlsMode))) if mode.value is not None else TlsMode.DISABLE


def _sidecar(document: Document, spec: Reader) -> SidecarScope:
    mode = child(child(spec, "outboundTrafficPolicy"), "mode")
    registry_only = mode.text(("REGISTRY_ONLY", "ALLOW_ANY")) == "REGISTRY_ONLY" if mode.value is not None else None
    egress = child(spec, "egress")
    ingress = child(spec, "ingress")
    return SidecarScope(
        document.namespace,
        document.name,
        strings(child(spec, "workloadSelector"), "labels"),
        tuple(_egress_listener(item) for item in egress.items(at_least=1)) if egress.value is not None else None,
        registry_only,
        tuple(_server_port(child(item, "port")) for item in ingress.items()) if ingress.value is not None else None,
        origin_of(document, "spec"),
    )


def _egress_listener(at: Reader) -> EgressListener:
    port = child(child(at, "port"), "number")
    hosts = []
    for item in child(at, "hosts").items(at_least=1):
        namespace, slash, name = item.text().partition("/")
        if not slash or not namespace or not name:
            item.refuse(f"{shown(item.value)} is no host", "write namespace/name, ./name or */name")
        hosts.append((namespace, name))
    return EgressListener(port.integer(0, _MAX_PORT) if port.value is not None else 0, tuple(hosts))


def _gateway(document: Document, spec: Reader) -> Gateway:
    servers = tuple(_server_port(child(item, "port")) for item in children(spec, "servers"))
    return Gateway(document.namespace, document.name, strings(spec, "selector"), servers, origin_of(document, "spec"))


def _server_port(at: Reader) -> tuple[int, AppProtocol]:
    return child(at, "number").integer(1, _MAX_PORT), protocol_of(text(at, "protocol").lower())


def _export_to(spec: Reader) -> tuple[str, ...]:
    return tuple(item.text() for item in children(spec, "exportTo"))


def _network(at: Reader) -> IpNetwork:
    return at.network(bare_address=True)


def _host_address(at: Reader) -> IpAddress | None:
    """An address; None where a name or a socket stands."""
    if at.value is None:
        return None
    try:
        return address(at)
    except Invalid:
        at.text()
        return None


_KINDS: Final[Mapping[str, Callable[[Document, Reader], RegistryObject]]] = {
    "ServiceEntry": _service_entry,
    "WorkloadEntry": _workload_entry,
    "DestinationRule": _destination_rule,
    "Sidecar": _sidecar,
    "Gateway": _gateway,
}
REGISTRY_KINDS: Final = frozenset(("networking.istio.io", kind) for kind in _KINDS)
