"""What Envoy takes a workload's ports for, as the Services in front of them declare it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from meshbridge.identity.model import Workload
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.parse.cluster import Service, ServicePort

_HTTP: Final = frozenset({"http", "http2", "grpc", "grpc-web", "kubernetes.io/h2c", "kubernetes.io/ws"})
_TCP: Final = frozenset({"tcp", "tls", "https", "mongo", "mysql", "redis", "kubernetes.io/wss"})
_SERVER_FIRST: Final = frozenset({"mysql"})


def declared_protocols(
    workload: Workload, services: Iterable[Service]
) -> tuple[Mapping[int, AppProtocol], frozenset[int]]:
    """What the Services in front of the pod declare its ports to be; where two disagree the port is sniffed.

    Spec: Istio, "Protocol Selection": appProtocol, else the port name up to its first dash.
    """
    declared: dict[int, set[AppProtocol]] = {}
    server_first: set[int] = set()
    for service in services:
        if not service.selects(workload):
            continue
        for port in service.ports:
            target = port.target_at(workload.ports)
            if target is None or port.protocol != "TCP":
                continue
            word = _word(port)
            declared.setdefault(target, set()).add(protocol_of(word))
            if word in _SERVER_FIRST:
                server_first.add(target)
    agreed = {port: found.pop() for port, found in sorted(declared.items()) if len(found) == 1}
    known = {port: protocol for port, protocol in agreed.items() if protocol is not AppProtocol.AUTO}
    return known, frozenset(port for port in server_first if known.get(port) is AppProtocol.TCP)


def declared_protocol(port: ServicePort) -> AppProtocol:
    """What one port of a Service is declared to be."""
    return protocol_of(_word(port))


def _word(port: ServicePort) -> str:
    return (port.app_protocol or port.name.partition("-")[0]).lower()


def protocol_of(word: str) -> AppProtocol:
    """What a declared protocol is to Envoy; one that is not known is sniffed."""
    if word in _HTTP:
        return AppProtocol.HTTP
    return AppProtocol.TCP if word in _TCP else AppProtocol.AUTO
