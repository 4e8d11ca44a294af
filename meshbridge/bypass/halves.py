"""The half bypass: one side captures a connection, the other does not, and pilot knows of neither.

Spec: ISTIO.md §b, the 2×2 table; pilot sends mutual TLS to an endpoint by its label, whatever its annotations exclude.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

from meshbridge.policy.mesh import MtlsMode
from meshbridge.policy.model import Origin

_HELLO_SENT = "the client's Envoy sends mutual TLS"
_HELLO_READ = "the application gets a TLS hello"


class Delivered(StrEnum):
    """What reaches the application."""

    MTLS = "mtls"
    PLAINTEXT = "plaintext"  # delivered, without an identity
    BROKEN = "broken"


class ClientTls(StrEnum):
    """What a DestinationRule makes the client's Envoy do; ``auto`` when none says.

    ``label`` is what is automatic where no endpoints are told apart, in front of a headless Service: the server's label
    decides, and a PeerAuthentication that selects it does not.
    """

    AUTO = "auto"
    LABEL = "label"
    DISABLE = "DISABLE"
    ISTIO_MUTUAL = "ISTIO_MUTUAL"


@dataclass(frozen=True, slots=True)
class Sending:
    """What a client's Envoy does with a connection. ``tls`` None: a TLS of which nobody here knows what it meets.

    ``unknown``: its registry has no such destination, so that PassthroughCluster takes it, as plaintext; ``blocked``:
    nothing does. ``origin`` is the object that says so.
    """

    tls: ClientTls | None = ClientTls.AUTO
    origin: Origin | None = None
    unknown: bool = False
    blocked: bool = False


AUTOMATIC: Final = Sending()


@dataclass(frozen=True, slots=True)
class Side:
    """One end of a connection: does it have a sidecar, and does that see the port."""

    sidecar: bool
    captured: bool

    @property
    def through_envoy(self) -> bool:
        return self.sidecar and self.captured


@dataclass(frozen=True, slots=True)
class Delivery:
    """What will happen, why, and what to do about it; ``half`` when the two sides do not agree.

    ``origin`` is the object that makes the client's Envoy send what it sends.
    """

    outcome: Delivered
    why: str
    fix: str = ""
    half: bool = False
    origin: Origin | None = None


def delivery(client: Side, server: Side, mode: MtlsMode, sending: Sending = AUTOMATIC) -> Delivery | None:
    """The outcome of a connection to a server's port under its effective mTLS mode; None: nobody can tell.

    Policies are not asked here: a connection that is delivered may still be refused, and one without an identity is by
    every ALLOW rule that asks for one.

    Args:
        sending: what the client's Envoy sends, where it sees the connection.
    """
    half = client.sidecar and server.sidecar and client.captured != server.captured
    if not client.through_envoy:
        return _plaintext_sent(client, server, mode, half)
    if sending.blocked:
        return replace(_BLOCKED, half=half, origin=sending.origin)
    if sending.tls is None:
        return None
    if _sends_mtls(server, mode, sending.tls):
        found = _mtls_sent(server, mode, sending.tls, half)
    else:
        found = _plaintext_sent(client, server, mode, half, sending)
    return replace(found, origin=sending.origin)


_BLOCKED: Final = Delivery(
    Delivered.BROKEN,
    "the source's sidecar knows no such destination, and outboundTrafficPolicy is REGISTRY_ONLY",
    "make it known by a Service or a ServiceEntry",
)


def _sends_mtls(server: Side, mode: MtlsMode, tls: ClientTls) -> bool:
    """Automatic mutual TLS goes by the server's label and its PeerAuthentication, not by what it excludes."""
    if tls is ClientTls.AUTO:
        return server.sidecar and mode is not MtlsMode.DISABLE
    if tls is ClientTls.LABEL:
        return server.sidecar
    return tls is ClientTls.ISTIO_MUTUAL


def _mtls_sent(server: Side, mode: MtlsMode, tls: ClientTls, half: bool) -> Delivery:
    if not server.through_envoy:
        why = f"{_HELLO_SENT}, and the server's does not see the port: {_HELLO_READ}"
        fix = "a DestinationRule with port-level tls mode DISABLE, "
        if tls is ClientTls.AUTO:
            fix += "a PeerAuthentication with portLevelMtls DISABLE for the port, "
        return Delivery(Delivered.BROKEN, why, f"{fix}or the same exclusion at the client", half)
    if mode is MtlsMode.DISABLE:
        why = f"{_HELLO_SENT}, and the server's passes it on as it is: {_HELLO_READ}"
        fix = "remove ISTIO_MUTUAL from the DestinationRule"
        if tls is ClientTls.LABEL:
            fix = "a DestinationRule with port-level tls mode DISABLE: a headless Service's clients go by nothing else"
        return Delivery(Delivered.BROKEN, why, fix, half)
    return Delivery(Delivered.MTLS, "both sides go through Envoy", half=half)


def _plaintext_sent(client: Side, server: Side, mode: MtlsMode, half: bool, sending: Sending = AUTOMATIC) -> Delivery:
    sender = "the client's Envoy sends plaintext" if client.through_envoy else "the client sends plaintext"
    if sending.unknown:
        sender += " to an address that is no Service's (PassthroughCluster)"
    if not server.through_envoy:
        return Delivery(
            Delivered.PLAINTEXT, f"{sender}, and no Envoy of the server sees it: no mutual TLS, no policy", half=half
        )
    if mode is MtlsMode.STRICT:
        why = f"{sender}, and the server's Envoy demands mutual TLS (STRICT): it resets the connection"
        fix = "exclude the port inbound at the server too, or capture it at the client"
        if sending.unknown:
            fix = (
                "call it by a Service; for scraping, Istio's merged metrics (port 15020), or let the port be PERMISSIVE"
            )
        elif client.through_envoy:
            fix = "a DestinationRule that says ISTIO_MUTUAL for the port"
        elif not client.sidecar:
            fix = "give the client a sidecar, or let the port be PERMISSIVE"
        return Delivery(Delivered.BROKEN, why, fix, half)
    why = f"{sender}; the server's Envoy lets it in without an identity ({mode.value})"
    return Delivery(Delivered.PLAINTEXT, why, "rules that ask for an identity refuse it" if half else "", half)
