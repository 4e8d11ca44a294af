"""Rule lists to compare with: what a policy of n allowed peers is without sets or an index."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from meshbridge.bench.network import Netns
from meshbridge.bench.processes import run


class Backend(StrEnum):
    """Debian's two implementations of the same command line."""

    NFT = "iptables-nft-restore"
    LEGACY = "iptables-legacy-restore"


@dataclass(frozen=True, slots=True)
class RuleList:
    """``rules`` peers in the FORWARD chain, of which the last is the one that matches; what none matches is dropped.

    With ``established_first``, packets of open connections pass in the first rule, as the common CNI plugins do it.
    """

    rules: int
    backend: Backend
    established_first: bool = False


def restore_text(rule_list: RuleList, client: str, server: str) -> str:
    """Input of iptables-restore that lets only ``client`` and ``server`` talk, both directions."""
    lines = ["*filter", ":FORWARD DROP [0:0]"]
    if rule_list.established_first:
        lines.append("-A FORWARD -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT")
    for number in range(rule_list.rules - 2):
        peer = f"10.99.{number // 250}.{number % 250 + 1}"
        lines.append(f"-A FORWARD -s {peer}/32 -d {server}/32 -p tcp -j ACCEPT")
    lines.append(f"-A FORWARD -s {server}/32 -d {client}/32 -p tcp -j ACCEPT")
    lines.append(f"-A FORWARD -s {client}/32 -d {server}/32 -p tcp -j ACCEPT")
    return "\n".join([*lines, "COMMIT", ""])


def apply(netns: Netns, rule_list: RuleList, client: str, server: str) -> None:
    """The node forwards by ``rule_list`` only."""
    run([rule_list.backend], netns=netns, stdin=restore_text(rule_list, client, server))
