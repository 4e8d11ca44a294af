"""The certificate against the address it came from."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.authz.binding import Binding, compare, parse_principal
from meshbridge.identity.model import Entity, Peer, ProxyClass
from meshbridge.policy.mesh import MeshSettings

MESH = MeshSettings(trust_domain="td1", trust_domain_aliases=("old",))
CLIENT = Peer("finance", service_account="client", trust_domain="td1", proxy=ProxyClass.SIDECAR)
OWN = "spiffe://td1/ns/finance/sa/client"


def changed(**changes: object) -> Peer:
    return dataclasses.replace(CLIENT, **changes)  # type: ignore[arg-type]


CASES = {
    "its own name": (OWN, CLIENT, Binding.MATCHES),
    "its own name under an alias": ("spiffe://old/ns/finance/sa/client", CLIENT, Binding.MATCHES),
    "another account of its namespace": ("spiffe://td1/ns/finance/sa/admin", CLIENT, Binding.DIFFERS),
    "its account in another namespace": ("spiffe://td1/ns/other/sa/client", CLIENT, Binding.DIFFERS),
    "its name in a foreign trust domain": ("spiffe://foreign/ns/finance/sa/client", CLIENT, Binding.DIFFERS),
    "a longer name": (OWN + "/x", CLIENT, Binding.DIFFERS),
    "no SPIFFE name": ("CN=client", CLIENT, Binding.DIFFERS),
    "plaintext": ("", CLIENT, Binding.NO_CERTIFICATE),
    "another's name from a pod without a proxy": (
        "spiffe://td1/ns/finance/sa/admin",
        changed(proxy=ProxyClass.NONE),
        Binding.DIFFERS,
    ),
    "a gateway": (OWN, changed(proxy=ProxyClass.GATEWAY, service_account="gw"), Binding.GATEWAY),
    "a waypoint": (OWN, changed(proxy=ProxyClass.WAYPOINT, service_account="wp"), Binding.GATEWAY),
    "a node": (OWN, Peer(entities=frozenset({Entity.REMOTE_NODE})), Binding.NODE),
    "a masqueraded pod": (OWN, Peer(entities=frozenset({Entity.HOST}), masqueraded=True), Binding.MASQUERADED),
    "a pod of another cluster": (OWN, changed(cluster="west", service_account="x"), Binding.OTHER_CLUSTER),
    "an address nobody holds": (OWN, None, Binding.UNKNOWN_ADDRESS),
}


@pytest.mark.parametrize(("principal", "holder", "expected"), CASES.values(), ids=CASES.keys())
def test_compare(principal: str, holder: Peer | None, expected: Binding) -> None:
    assert compare(principal, holder, MESH) is expected


@given(st.text(max_size=80))
def test_only_the_exact_name_matches_a_pod(principal: str) -> None:
    assert (compare(principal, CLIENT, MESH) is Binding.MATCHES) == (
        principal in (OWN, "spiffe://old/ns/finance/sa/client")
    )


def test_parse_principal_reads_the_three_parts() -> None:
    name = parse_principal(OWN)
    assert name is not None
    assert (name.trust_domain, name.namespace, name.service_account) == ("td1", "finance", "client")
    assert parse_principal("spiffe://td1/ns/finance") is None
