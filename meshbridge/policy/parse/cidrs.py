"""A CIDR with pieces cut out of it, which NetworkPolicy's ipBlock and Cilium's CIDR sets both have."""

from __future__ import annotations

from collections.abc import Mapping

from meshbridge.policy.parse.reader import Reader
from meshbridge.policy.selectors import CidrPeers


def cidr_peers(at: Reader, fields: Mapping[str, Reader], *, in_cluster: bool) -> CidrPeers:
    """Read ``cidr`` and ``except`` of the object at ``at``; refused when a piece is not inside.

    Args:
        in_cluster: whether addresses of pods and nodes match too, which is where the owners differ.
    """
    if "cidr" not in fields:
        at.refuse("has no cidr", "write cidr: address/prefix")
    cidr = fields["cidr"].network(bare_address=False)
    excepts = []
    for item in fields["except"].items() if "except" in fields else []:
        network = item.network(bare_address=False)
        if network.version != cidr.version or not network.subnet_of(cidr):  # type: ignore[arg-type]
            item.refuse(f"{network} is not inside {cidr}", "except only cuts pieces out of its own cidr")
        excepts.append(network)
    return CidrPeers(cidr, tuple(sorted(excepts, key=str)), pods=in_cluster, nodes=in_cluster)
