"""The certificate against the address: does the pod that sent this hold the name it presents?

A stolen key names its owner from any address. The kernel's identity comes from the address, so the two are compared
wherever an address has one owner.

Spec: DESIGN §3, authz.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from meshbridge.identity.model import Peer, ProxyClass
from meshbridge.policy.mesh import MeshSettings

_SPIFFE: Final = re.compile(r"spiffe://([^/]+)/ns/([^/]+)/sa/([^/]+)")


class Binding(StrEnum):
    """What the comparison found; all but DIFFERS let the request go on to policy."""

    MATCHES = "matches"
    DIFFERS = "differs"
    NO_CERTIFICATE = "no-certificate"
    UNKNOWN_ADDRESS = "unknown-address"
    NODE = "node"
    MASQUERADED = "masqueraded"
    GATEWAY = "gateway"
    OTHER_CLUSTER = "other-cluster"


@dataclass(frozen=True, slots=True)
class SpiffeName:
    """The three parts of a mesh principal."""

    trust_domain: str
    namespace: str
    service_account: str


def parse_principal(principal: str) -> SpiffeName | None:
    """The parts of ``spiffe://TRUST-DOMAIN/ns/NAMESPACE/sa/ACCOUNT``; None for any other name."""
    match = _SPIFFE.fullmatch(principal)
    return SpiffeName(*match.groups()) if match else None


def compare(principal: str, holder: Peer | None, mesh: MeshSettings) -> Binding:
    """Compare the certificate's name with the holder of the address it came from.

    Trust domains count as equal when both are the mesh's own or its aliases. A certificate without a SPIFFE name
    differs from every pod.
    """
    if not principal:
        return Binding.NO_CERTIFICATE
    if holder is None:
        return Binding.UNKNOWN_ADDRESS
    if holder.masqueraded:
        return Binding.MASQUERADED
    if not holder.is_pod:
        return Binding.NODE
    if holder.cluster != mesh.cluster:
        return Binding.OTHER_CLUSTER
    if holder.proxy in (ProxyClass.GATEWAY, ProxyClass.WAYPOINT):
        return Binding.GATEWAY
    name = parse_principal(principal)
    if name is None or (name.namespace, name.service_account) != (holder.namespace, holder.service_account):
        return Binding.DIFFERS
    ours = {mesh.trust_domain, *mesh.trust_domain_aliases}
    same_domain = name.trust_domain == holder.trust_domain or {name.trust_domain, holder.trust_domain} <= ours
    return Binding.MATCHES if same_domain else Binding.DIFFERS
