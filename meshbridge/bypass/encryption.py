"""Whether something encrypts what travels between nodes, as the CNI's own objects say it.

mTLS that a bypass loses is partly made up for by it: between nodes, for whoever listens there. It names no peer, and on
one node nothing is encrypted. What is found here is **said**, never proved: a key in an annotation is no packet seen.

ztunnel's HBONE is not among them. It captures no pod that has a sidecar, and what bypasses an ambient pod's capture is
plaintext: it makes up for none of these bypasses.

Spec: Cilium, enable-wireguard, enable-ipsec, annotation network.cilium.io/wg-pub-key, CiliumNode spec.encryption.key;
Calico, FelixConfiguration wireguardEnabled, annotation projectcalico.org/WireguardPublicKey.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from meshbridge.identity.model import IpFamily
from meshbridge.policy.cilium import CILIUM_NODE, FELIX
from meshbridge.policy.model import Document
from meshbridge.policy.parse import CILIUM_CONFIG

_LINK_KIND: Final = "wireguard"
_BOTH: Final = frozenset(IpFamily)


class Mechanism(StrEnum):
    """What encrypts; the names are stable (JSON)."""

    CILIUM_WIREGUARD = "cilium-wireguard"
    CILIUM_IPSEC = "cilium-ipsec"
    CALICO_WIREGUARD = "calico-wireguard"


CILIUM_LINK: Final = "cilium_wg0"
WIREGUARD_LINKS: Final[Mapping[str, Mechanism]] = {
    CILIUM_LINK: Mechanism.CILIUM_WIREGUARD,
    "wireguard.cali": Mechanism.CALICO_WIREGUARD,
    "wg-v6.cali": Mechanism.CALICO_WIREGUARD,
}
_FAMILIES_OF_LINKS: Final[Mapping[str, frozenset[IpFamily]]] = {
    "wireguard.cali": frozenset({IpFamily.IPV4}),
    "wg-v6.cali": frozenset({IpFamily.IPV6}),
}
_KEYS: Final[Mapping[Mechanism, str]] = {
    Mechanism.CILIUM_WIREGUARD: "network.cilium.io/wg-pub-key",
    Mechanism.CALICO_WIREGUARD: "projectcalico.org/WireguardPublicKey",
}
_NAMES: Final[Mapping[Mechanism, str]] = {
    Mechanism.CILIUM_WIREGUARD: "Cilium's WireGuard",
    Mechanism.CILIUM_IPSEC: "Cilium's IPsec",
    Mechanism.CALICO_WIREGUARD: "Calico's WireGuard",
}


@dataclass(frozen=True, slots=True)
class NodeEncryption:
    """Encryption between nodes, as ``said_by`` says.

    ``nodes`` are those that have published a key, None where no node's object is known. ``all_nodes`` are all that are
    known. Between a node with a key and one without nothing is encrypted.
    """

    mechanism: Mechanism
    said_by: str
    nodes: frozenset[str] | None = None
    all_nodes: frozenset[str] = frozenset()
    families: frozenset[IpFamily] = _BOTH

    def covers(self, node: str, families: Iterable[IpFamily] = ()) -> bool:
        """Whether all that a pod of ``node`` exchanges with pods of other nodes is said to be encrypted.

        One node without a key is enough for a no, as nobody knows where the other end will be.
        """
        if not frozenset(families) <= self.families:
            return False
        if self.nodes is None:
            return False
        return (not node or node in self.nodes) and self.all_nodes <= self.nodes

    def __str__(self) -> str:
        keys = "no node's key is known"
        if self.nodes is not None:
            keys = f"{len(self.nodes)} of {len(self.all_nodes | self.nodes)} known nodes have a key"
        return f"{_NAMES[self.mechanism]} between nodes, said by {self.said_by} ({keys}); not proved"


def node_encryption(documents: Iterable[Document]) -> NodeEncryption | None:
    """What the objects of a cluster say; None: nothing encrypts between nodes, as far as they tell.

    Where several do, the one that more nodes have a key for.
    """
    given = list(documents)
    nodes = [each for each in given if (_group(each), each.kind) == ("", "Node")]
    cilium_nodes = [each for each in given if (_group(each), each.kind) == CILIUM_NODE]
    everybody = frozenset(each.name for each in (*nodes, *cilium_nodes))
    found: list[NodeEncryption] = []
    for each in given:
        if each.key == CILIUM_CONFIG:
            found += _cilium(each, cilium_nodes, nodes, everybody)
        elif (_group(each), each.kind) == FELIX and each.name == "default":
            found += _calico(each, nodes, everybody)
    return max(found, key=lambda each: (len(each.nodes or ()), each.mechanism), default=None)


def encryption_of_links(node: str, links: Iterable[tuple[str, str]]) -> NodeEncryption | None:
    """What a node's own links, as (name, kind), say of it; of other nodes they say nothing.

    A link of the name alone is none: anybody can name one so.
    """
    found = {name for name, kind in links if name in WIREGUARD_LINKS and kind == _LINK_KIND}
    for name in sorted(found):
        families = _FAMILIES_OF_LINKS.get(name, _BOTH)
        if name != CILIUM_LINK and len(found) > 1:
            families = _BOTH
        said = f"link {', '.join(sorted(found))} of node {node}"
        return NodeEncryption(WIREGUARD_LINKS[name], said, frozenset({node}), frozenset({node}), families)
    return None


def _cilium(
    config: Document, cilium_nodes: list[Document], nodes: list[Document], everybody: frozenset[str]
) -> Iterable[NodeEncryption]:
    data = _mapping(config.data.get("data"))
    if _is_on(data.get("enable-wireguard")):
        mechanism = Mechanism.CILIUM_WIREGUARD
        key = _KEYS[mechanism]
        known = cilium_nodes or nodes
        with_key = frozenset(each.name for each in known if _annotations(each).get(key))
        said = f"ConfigMap {config.namespace}/{config.name}, enable-wireguard"
        yield NodeEncryption(mechanism, said, with_key if known else None, everybody)
    if _is_on(data.get("enable-ipsec")):
        with_key = frozenset(each.name for each in cilium_nodes if _ipsec_key(each))
        said = f"ConfigMap {config.namespace}/{config.name}, enable-ipsec"
        yield NodeEncryption(Mechanism.CILIUM_IPSEC, said, with_key if cilium_nodes else None, everybody)


def _calico(felix: Document, nodes: list[Document], everybody: frozenset[str]) -> Iterable[NodeEncryption]:
    spec = _mapping(felix.data.get("spec"))
    switches = {IpFamily.IPV4: "wireguardEnabled", IpFamily.IPV6: "wireguardEnabledV6"}
    families = frozenset(family for family, switch in switches.items() if spec.get(switch) is True)
    if not families:
        return
    mechanism = Mechanism.CALICO_WIREGUARD
    with_key = frozenset(each.name for each in nodes if _annotations(each).get(_KEYS[mechanism]))
    said = f"FelixConfiguration {felix.name}, {', '.join(switches[family] for family in sorted(families))}"
    yield NodeEncryption(mechanism, said, with_key if nodes else None, everybody, families)


def _ipsec_key(node: Document) -> bool:
    key = _mapping(_mapping(node.data.get("spec")).get("encryption")).get("key")
    return isinstance(key, int) and not isinstance(key, bool) and key > 0


def _is_on(value: object) -> bool:
    return isinstance(value, str) and value.strip().lower() == "true"


def _annotations(document: Document) -> Mapping[str, Any]:
    return _mapping(_mapping(document.data.get("metadata")).get("annotations"))


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _group(document: Document) -> str:
    return document.api_version.rpartition("/")[0]
