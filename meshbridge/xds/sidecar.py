"""What one sidecar's Envoy configuration is made from: values only, no Envoy message in sight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from meshbridge.identity.model import DEFAULT_TRUST_DOMAIN, IpAddress, Workload
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import DEFAULT_MESH, EffectiveMtls, JwtRule, PathNormalization

OUTBOUND_PORT = 15001
INBOUND_PORT = 15006
HBONE_PORT = 15008
STATUS_PORT = 15020
HEALTH_PORT = 15021
METRICS_PORT = 15090

# Ports of a sidecar itself: iptables never redirects them, so nobody terminates TLS there.
UNCAPTURED_PORTS = frozenset({HBONE_PORT, STATUS_PORT, HEALTH_PORT, METRICS_PORT})


@dataclass(frozen=True, slots=True)
class MtlsDestination:
    """An address behind which a sidecar terminates mTLS: on every port but ``except_ports``, or only there."""

    address: IpAddress
    mtls: bool = True
    except_ports: frozenset[int] = frozenset()

    def accepts_mtls(self, port: int | None) -> bool:
        """Whether a client speaks mTLS to ``port``; None is any port that is not named anywhere."""
        if port in UNCAPTURED_PORTS:
            return False
        return self.mtls != (port in self.except_ports)


@dataclass(frozen=True, slots=True)
class Sidecar:
    """A pod with a sidecar and everything of the mesh that its Envoy has to know.

    ``protocols`` is keyed by pod port; a port that is not in it is sniffed. ``jwt_rules`` are those of every
    RequestAuthentication that selects the pod. ``restricted``: some policy may refuse a connection that has come as far
    as Envoy, so a TCP server may not speak before its client has been judged, unless it is on ``server_first_ports``.
    """

    workload: Workload
    trust_domains: tuple[str, ...] = (DEFAULT_TRUST_DOMAIN,)
    mtls: EffectiveMtls = field(default_factory=EffectiveMtls)
    protocols: Mapping[int, AppProtocol] = field(default_factory=dict, hash=False)
    server_first_ports: frozenset[int] = frozenset()
    jwt_rules: tuple[JwtRule, ...] = ()
    path_normalization: PathNormalization = DEFAULT_MESH.path_normalization
    destinations: tuple[MtlsDestination, ...] = ()
    restricted: bool = False
