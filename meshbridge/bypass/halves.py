"""The half bypass: one side captures a connection, the other does not, and pilot knows of neither.

Spec: ISTIO.md §b, the 2×2 table; pilot sends mutual TLS to an endpoint by its label, whatever its annotations exclude.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshbridge.policy.mesh import MtlsMode

_HELLO_SENT = "the client's Envoy sends mutual TLS"
_HELLO_READ = "the application gets a TLS hello"


class Delivered(StrEnum):
    """What reaches the application."""

    MTLS = "mtls"
    PLAINTEXT = "plaintext"  # delivered, without an identity
    BROKEN = "broken"


class ClientTls(StrEnum):
    """What a DestinationRule makes the client's Envoy do; ``auto`` when none says."""

    AUTO = "auto"
    DISABLE = "DISABLE"
    ISTIO_MUTUAL = "ISTIO_MUTUAL"


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
    """What will happen, why, and what to do about it; ``half`` when the two sides do not agree."""

    outcome: Delivered
    why: str
    fix: str = ""
    half: bool = False


def delivery(client: Side, server: Side, mode: MtlsMode, tls: ClientTls = ClientTls.AUTO) -> Delivery:
    """The outcome of a connection to a server's port under its effective mTLS mode.

    Policies are not asked here: a connection that is delivered may still be refused, and one without an identity is by
    every ALLOW rule that asks for one.
    """
    half = client.sidecar and server.sidecar and client.captured != server.captured
    if client.through_envoy and _sends_mtls(server, mode, tls):
        return _mtls_sent(server, mode, half)
    return _plaintext_sent(client, server, mode, half)


def _sends_mtls(server: Side, mode: MtlsMode, tls: ClientTls) -> bool:
    """Automatic mutual TLS goes by the server's label and its PeerAuthentication, not by what it excludes."""
    if tls is ClientTls.AUTO:
        return server.sidecar and mode is not MtlsMode.DISABLE
    return tls is ClientTls.ISTIO_MUTUAL


def _mtls_sent(server: Side, mode: MtlsMode, half: bool) -> Delivery:
    if not server.through_envoy:
        why = f"{_HELLO_SENT}, and the server's does not see the port: {_HELLO_READ}"
        fix = (
            "a DestinationRule with port-level tls mode DISABLE, a PeerAuthentication with portLevelMtls DISABLE for "
            "the port, or the same exclusion at the client"
        )
        return Delivery(Delivered.BROKEN, why, fix, half)
    if mode is MtlsMode.DISABLE:
        why = f"{_HELLO_SENT}, and the server's passes it on as it is: {_HELLO_READ}"
        return Delivery(Delivered.BROKEN, why, "remove ISTIO_MUTUAL from the DestinationRule", half)
    return Delivery(Delivered.MTLS, "both sides go through Envoy", half=half)


def _plaintext_sent(client: Side, server: Side, mode: MtlsMode, half: bool) -> Delivery:
    sender = "the client's Envoy sends plaintext" if client.through_envoy else "the client sends plaintext"
    if not server.through_envoy:
        return Delivery(
            Delivered.PLAINTEXT, f"{sender}, and no Envoy of the server sees it: no mutual TLS, no policy", half=half
        )
    if mode is MtlsMode.STRICT:
        why = f"{sender}, and the server's Envoy demands mutual TLS (STRICT): it resets the connection"
        fix = "exclude the port inbound at the server too, or capture it at the client"
        if not client.sidecar:
            fix = "give the client a sidecar, or let the port be PERMISSIVE"
        return Delivery(Delivered.BROKEN, why, fix, half)
    why = f"{sender}; the server's Envoy lets it in without an identity ({mode.value})"
    return Delivery(Delivered.PLAINTEXT, why, "rules that ask for an identity refuse it" if half else "", half)
