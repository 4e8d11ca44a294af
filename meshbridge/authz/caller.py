"""Who asks over TCP. Any pod can reach the port, so each is answered about its own traffic alone.

An Envoy asks about connections to its own pod, and connects from that pod's address: the kernel lets no pod send from
another one's. Where the connection has a certificate, the name in it has to be the pod's too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Final
from urllib.parse import unquote

from meshbridge.authz.binding import parse_principal
from meshbridge.identity.model import IpAddress, Workload
from meshbridge.policy.mesh import MeshSettings

_SPIFFE: Final = b"spiffe://"
_NAMES: Final = "x509_subject_alternative_name"


@dataclass(frozen=True, slots=True)
class Caller:
    """The other end of the connection a Check came over.

    ``address`` is None on a Unix socket, whose owner the kernel has checked. ``certified``: the connection has a client
    certificate, of the name ``principal``.
    """

    address: IpAddress | None = None
    principal: str = ""
    certified: bool = False


LOCAL: Final = Caller()
"""Whoever may open the Unix socket."""


def caller_of(peer: str, authenticated: Mapping[str, Iterable[bytes]]) -> Caller:
    """The caller as gRPC describes it: ``ipv4:ADDRESS:PORT`` or ``ipv6:[ADDRESS]:PORT``, and TLS properties."""
    if not authenticated:
        return Caller(_address(peer))
    names = (name for name in authenticated.get(_NAMES, ()) if name.startswith(_SPIFFE))
    certified = bool(authenticated.get("x509_pem_cert"))
    return Caller(_address(peer), next(names, b"").decode("ascii", "replace"), certified)


def why_not(caller: Caller, workload: Workload, mesh: MeshSettings) -> str:
    """Why the caller is told nothing about connections to ``workload``; "" when it is.

    Connections from the server's own loopback are those of a sidecar before it, and are not told apart.
    """
    if caller.address is None or caller.address.is_loopback:
        return ""
    if caller.address not in workload.addresses:
        return f"{caller.address} asks about {workload.key}, which has another address"
    if not caller.certified:
        return ""
    name = parse_principal(caller.principal)
    own = (workload.namespace, workload.service_account)
    if name is None or (name.namespace, name.service_account) != own:
        return f"{caller.principal or 'a certificate without a mesh name'} asks about {workload.key}"
    if name.trust_domain not in (mesh.trust_domain, *mesh.trust_domain_aliases):
        return f"{caller.principal} is of another trust domain than {workload.key}"
    return ""


@lru_cache(maxsize=8192)
def _address(peer: str) -> IpAddress | None:
    family, _, rest = unquote(peer).partition(":")
    if family not in ("ipv4", "ipv6"):
        return None
    address = ip_address(rest.rpartition(":")[0].strip("[]").partition("%")[0])
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
