"""What a CNI's objects say of encryption between nodes, and what a policy may make of it."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from meshbridge.bypass.encryption import Mechanism, NodeEncryption, encryption_of_links, node_encryption
from meshbridge.bypass.guarantees import Fate, GuaranteeKind
from meshbridge.bypass.inventory import inventory
from meshbridge.bypass.report import rows_of
from meshbridge.identity.model import IpFamily
from meshbridge.kube.objects import read_objects
from meshbridge.policy.model import Document

NOW = datetime(2026, 11, 24, tzinfo=UTC)
BOTH = frozenset(IpFamily)
V4, V6 = [IpFamily.IPV4], [IpFamily.IPV6]


def documents(*texts: str) -> list[Document]:
    found = read_objects("---\n".join(texts).encode(), "")
    assert not found.problems
    return list(found.documents)


def cilium(**data: str) -> str:
    lines = "".join(f"  {name.replace('_', '-')}: '{value}'\n" for name, value in data.items())
    return f"apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: cilium-config, namespace: kube-system}}\ndata:\n{lines}"


def cilium_node(name: str, key: str = "", spi: int = 0) -> str:
    annotations = f"{{network.cilium.io/wg-pub-key: {key}}}" if key else "{}"
    spec = f"{{encryption: {{key: {spi}}}}}" if spi else "{}"
    metadata = f"{{name: {name}, annotations: {annotations}}}"
    return f"{{apiVersion: cilium.io/v2, kind: CiliumNode, metadata: {metadata}, spec: {spec}}}\n"


def node(name: str, key: str = "") -> str:
    annotations = f"{{projectcalico.org/WireguardPublicKey: {key}}}" if key else "{}"
    return f"{{apiVersion: v1, kind: Node, metadata: {{name: {name}, annotations: {annotations}}}}}\n"


def felix(spec: str, name: str = "default") -> str:
    metadata = f"{{name: {name}}}"
    return f"{{apiVersion: crd.projectcalico.org/v1, kind: FelixConfiguration, metadata: {metadata}, spec: {spec}}}\n"


SAID: dict[str, tuple[list[str], Mechanism | None, bool, bool]] = {
    "nothing": ([node("a")], None, False, False),
    "Cilium's WireGuard, every node with a key": (
        [cilium(enable_wireguard="true"), cilium_node("a", "k"), cilium_node("b", "k")],
        Mechanism.CILIUM_WIREGUARD, True, True),
    "Cilium's WireGuard, one node without": (
        [cilium(enable_wireguard="true"), cilium_node("a", "k"), cilium_node("b")],
        Mechanism.CILIUM_WIREGUARD, False, False),
    "Cilium's WireGuard, a node that Cilium does not know": (
        [cilium(enable_wireguard="true"), cilium_node("a", "k"), node("a"), node("c")],
        Mechanism.CILIUM_WIREGUARD, False, False),
    "switched on, and no node's object is known": (
        [cilium(enable_wireguard="true")], Mechanism.CILIUM_WIREGUARD, False, False),
    "switched off, and keys left over": (
        [cilium(enable_wireguard="false"), cilium_node("a", "k")], None, False, False),
    "Cilium's IPsec": (
        [cilium(enable_ipsec="true"), cilium_node("a", spi=3)], Mechanism.CILIUM_IPSEC, True, True),
    "Calico's WireGuard, IPv4": (
        [felix("{wireguardEnabled: true}"), node("a", "k")], Mechanism.CALICO_WIREGUARD, True, False),
    "Calico's WireGuard, both": (
        [felix("{wireguardEnabled: true, wireguardEnabledV6: true}"), node("a", "k")],
        Mechanism.CALICO_WIREGUARD, True, True),
    "Calico's for one node alone": ([felix("{wireguardEnabled: true}", "node.a"), node("a", "k")], None, False, False),
    "a text in place of true": ([felix("{wireguardEnabled: 'true'}"), node("a", "k")], None, False, False),
}  # fmt: skip


@pytest.mark.parametrize(("texts", "mechanism", "v4", "v6"), SAID.values(), ids=SAID.keys())
def test_what_objects_say(texts: list[str], mechanism: Mechanism | None, v4: bool, v6: bool) -> None:
    found = node_encryption(documents(*texts))
    assert (found.mechanism if found else None) is mechanism
    assert (bool(found and found.covers("a", V4)), bool(found and found.covers("a", V6))) == (v4, v6)


def test_it_is_said_by_somebody_and_never_claimed() -> None:
    found = node_encryption(documents(cilium(enable_wireguard="true"), cilium_node("a", "k"), cilium_node("b")))
    assert str(found) == (
        "Cilium's WireGuard between nodes, said by ConfigMap kube-system/cilium-config, enable-wireguard "
        "(1 of 2 known nodes have a key); not proved"
    )


LINKS: dict[str, tuple[list[tuple[str, str]], NodeEncryption | None]] = {
    "none": ([("eth0", ""), ("veth1", "veth")], None),
    "Cilium's": (
        [("cilium_wg0", "wireguard")],
        NodeEncryption(Mechanism.CILIUM_WIREGUARD, "link cilium_wg0 of node a", frozenset("a"), frozenset("a"))),
    "the name of another kind": ([("cilium_wg0", "dummy"), ("wireguard.cali", "veth")], None),
    "somebody's own": ([("wg0", "wireguard")], None),
    "Calico's, IPv4 alone": (
        [("wireguard.cali", "wireguard")],
        NodeEncryption(Mechanism.CALICO_WIREGUARD, "link wireguard.cali of node a", frozenset("a"), frozenset("a"),
                       frozenset({IpFamily.IPV4}))),
    "Calico's, both": (
        [("wireguard.cali", "wireguard"), ("wg-v6.cali", "wireguard")],
        NodeEncryption(Mechanism.CALICO_WIREGUARD, "link wg-v6.cali, wireguard.cali of node a", frozenset("a"),
                       frozenset("a"), BOTH)),
}  # fmt: skip


@pytest.mark.parametrize(("links", "expected"), LINKS.values(), ids=LINKS.keys())
def test_what_a_nodes_links_say(links: list[tuple[str, str]], expected: NodeEncryption | None) -> None:
    assert encryption_of_links("a", links) == expected


POD = """
{apiVersion: v1, kind: Namespace, metadata: {name: shop, labels: {istio-injection: enabled}}}
---
apiVersion: v1
kind: Pod
metadata: {name: api, namespace: shop, annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "8080"}}
spec: {containers: [{name: app, ports: [{containerPort: 8080}]}]}
"""
POLICY = """
apiVersion: meshbridge.io/v1alpha1
kind: BypassPolicy
metadata: {name: p, namespace: shop}
spec: {accept: [encryption, identity], reason: r, otherwise: deny, requireNodeEncryption: true}
"""
ENCRYPTED = [cilium(enable_wireguard="true"), cilium_node("a", "k")]


def test_the_loss_stays_a_loss_and_says_what_makes_up_for_it() -> None:
    for said in ([], ENCRYPTED):
        known = inventory(documents(POD, *said), now=NOW)
        (row,) = [row for row in rows_of(known.workloads[0], known) if row.ports.spans[0][0] == 8080]
        (lost,) = [g for g in row.guarantees if g.kind is GuaranteeKind.ENCRYPTION]
        assert lost.fate is Fate.LOST
        assert ("not proved" in lost.stands_in) is bool(said)


@pytest.mark.parametrize(
    ("said", "accepted"),
    [([], False), (ENCRYPTED, True), ([*ENCRYPTED, cilium_node("b")], False)],
    ids=["nothing encrypts", "every node does", "one node does not"],
)
def test_a_policy_may_require_it(said: list[str], accepted: bool) -> None:
    known = inventory(documents(POD, POLICY, *said), now=NOW)
    (row,) = [row for row in rows_of(known.workloads[0], known) if row.ports.spans[0][0] == 8080]
    assert row.ruling is not None
    missing = {guarantee.kind for guarantee in row.ruling.unaccepted}
    assert (GuaranteeKind.ENCRYPTION not in missing) is accepted
    assert any("nothing says so" in note for note in row.ruling.notes) is not accepted
