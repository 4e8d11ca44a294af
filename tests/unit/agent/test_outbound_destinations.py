"""What the agent reports of its pods' inbound ports, and what it makes of others': towards whom it compensates."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from meshbridge.agent.compilation import MAX_OUTBOUND_NETWORKS, Compilation
from meshbridge.agent.view import LocalPod
from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.bypasspolicy import BypassPolicies
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.rules import SeenRules
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import IpFamily, Peer, ProxyClass, TcpPorts, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.model import Document
from meshbridge.policy.policyset import PolicySet

V4 = IpFamily.IPV4
ON_9090 = (TcpPorts(V4, 9090, 9090), TcpPorts(IpFamily.IPV6, 9090, 9090))


def pod(name: str = "api", number: int = 1, **annotations: str) -> LocalPod:
    given = {a.TRAFFIC + key: value for key, value in annotations.items()}
    workload = Workload(
        "shop", name, name, "n", (ip_address(f"10.0.0.{number}"), ip_address(f"fd00::{number}")), {"app": name},
        annotations=given, proxy=ProxyClass.SIDECAR, init_env={"ISTIO_DUAL_STACK": "true"},
        init_args=a.render_init_args(given, MeshDefaults()),
    )  # fmt: skip
    return LocalPod(workload)


def rules(of: LocalPod) -> SeenRules:
    """What istio-init makes of the pod."""
    config, _ = parse_init_args(of.workload.init_args or (), of.workload.init_env)
    return SeenRules(tuple(parse_iptables_save(restore_text(config, family), family) for family in IpFamily))


PLAIN, EXCLUDING = pod(), pod(excludeInboundPorts="9090")
REPORTED: dict[str, tuple[LocalPod, SeenRules | None, tuple[TcpPorts, ...]]] = {
    "what is asked for and seen": (EXCLUDING, rules(EXCLUDING), ON_9090),
    "not what is asked for and not seen yet": (EXCLUDING, None, ()),
    "not what is asked for and captured all the same": (EXCLUDING, rules(PLAIN), ()),
    "not what nobody asked for": (PLAIN, rules(EXCLUDING), ()),
    "not the ports whose rules are still to come": (EXCLUDING, SeenRules(), ON_9090),
    "nothing of a pod that captures all": (PLAIN, rules(PLAIN), ()),
    "nothing of a pod with a fault": (replace(EXCLUDING, fault="x"), rules(EXCLUDING), ()),
}


@pytest.mark.parametrize(("given", "seen", "expected"), REPORTED.values(), ids=REPORTED.keys())
def test_a_report_says(given: LocalPod, seen: SeenRules | None, expected: tuple[TcpPorts, ...]) -> None:
    seen_of = {"api": seen} if seen is not None else {}
    found = Compilation(RuleIds()).exclusions({"api": given}, seen_of)
    assert found == ({"api": expected} if expected else {})


def test_a_report_leaves_out_what_is_audited_as_nothing_is_dropped_there() -> None:
    given = pod(excludeInboundPorts="9090,9100")
    version = "meshbridge.io/v1alpha1"
    spec = {"mode": "audit", "routes": [{"direction": "inbound", "ports": [9090]}]}
    data = {"apiVersion": version, "kind": "BypassPolicy", "metadata": {}, "spec": spec}
    policies = [Document("BypassPolicy", version, "shop", "p", data)]
    kept = Compilation(RuleIds(), bypass_policies=BypassPolicies.of(policies, datetime.now(UTC)))
    assert kept.exclusions({"api": given}, {"api": rules(given)}) == {
        "api": (TcpPorts(V4, 9100, 9100), TcpPorts(IpFamily.IPV6, 9100, 9100))
    }


def sender(ranges: str) -> LocalPod:
    return pod("web", 2, excludeOutboundIPRanges=ranges)


def compilation(*, knows: bool = True) -> Compilation:
    return Compilation(RuleIds(), knows_destinations=knows)


def test_ranges_are_told_apart_where_something_is_compensated_towards_them() -> None:
    web = sender("10.42.0.0/16,fd42::/32")
    pods, seen = {"web": web}, {"web": rules(web)}
    assert compilation().outbound_networks(pods, seen) == {ip_network("10.42.0.0/16"), ip_network("fd42::/32")}
    assert compilation(knows=False).outbound_networks(pods, seen) == frozenset()
    assert compilation().outbound_networks({"api": PLAIN}, {"api": rules(PLAIN)}) == frozenset()


def authorization(action: str, rule: dict[str, Any]) -> PolicySet:
    spec = {"selector": {"matchLabels": {"app": "api"}}, "action": action, "rules": [rule]}
    version = "security.istio.io/v1"
    data = {"apiVersion": version, "kind": "AuthorizationPolicy", "metadata": {}, "spec": spec}
    return PolicySet.of([Document("AuthorizationPolicy", version, "shop", "p", data)])


DENIED = authorization("DENY", {})
BY_METHOD = authorization("ALLOW", {"to": [{"operation": {"methods": ["GET"]}}]})
API = Peer("shop", {"app": "api"}, proxy=ProxyClass.SIDECAR)


def compensated(kept: Compilation, pods: dict[str, LocalPod], policies: PolicySet, api: Peer) -> bool:
    seen = {uid: rules(given) for uid, given in pods.items()}
    networks = kept.outbound_networks(pods, seen)
    numbering = number_peers({ip_address("10.42.0.1"): api}, networks)
    kept.update(pods, policies, numbering.identities, seen=seen)
    compiled = kept.compiled["web"]
    assert compiled.sets is not None, compiled.fault
    number = numbering.addresses[ip_address("10.42.0.1")].identity
    return number in compiled.sets[2 + V4].by_identity()


def test_of_too_many_ranges_what_is_sent_to_some_counts_as_sent_to_all() -> None:
    beside = ",".join(f"10.{n}.{m}.0/24" for n in (43, 44) for m in range(0, 64, 2))
    assert not compensated(compilation(), {"web": sender(beside)}, DENIED, API)
    assert compensated(compilation(), {"web": sender(f"{beside},10.42.0.0/16")}, DENIED, API)
    many = {
        "web": sender("10.43.0.0/16"),
        **{f"w{n}": pod(f"w{n}", n, excludeOutboundIPRanges=",".join(f"10.{n}.{m}.0/24" for m in range(0, 120, 2)))
           for n in range(50, 55)},
    }  # fmt: skip
    kept = compilation()
    assert kept.outbound_networks(many, {uid: rules(given) for uid, given in many.items()}) == frozenset()
    assert MAX_OUTBOUND_NETWORKS < 5 * 60
    assert compensated(kept, many, DENIED, API), "drops nothing that the destination would let in"
    assert not compensated(kept, {"web": many["web"]}, DENIED, API), "and is exact again when there are fewer"


def test_a_destination_that_is_told_to_exclude_the_port_is_compensated_by_its_own_lowering() -> None:
    web = {"web": pod("web", 2, excludeOutboundPorts="9090")}
    excluding = replace(API, excluded=ON_9090)
    assert not compensated(compilation(), web, BY_METHOD, API)
    assert compensated(compilation(), web, BY_METHOD, excluding)
    assert not compensated(compilation(knows=False), web, BY_METHOD, excluding)


def test_a_change_of_what_a_destination_excludes_compiles_whom_it_concerns() -> None:
    pods = {"web": pod("web", 2, excludeOutboundPorts="9090"), "db": pod("db", 3)}
    seen = {uid: rules(given) for uid, given in pods.items()}
    kept = compilation()
    before = number_peers({ip_address("10.42.0.1"): API})
    kept.update(pods, BY_METHOD, before.identities, seen=seen)
    after = number_peers({ip_address("10.42.0.1"): replace(API, excluded=ON_9090)}, known=before.identities)
    assert kept.update(pods, BY_METHOD, {**before.identities, **after.identities}, PolicySet(), seen) == 1
    scratch = compilation()
    scratch.rules = kept.rules
    scratch.update(pods, BY_METHOD, {**before.identities, **after.identities}, seen=seen)
    assert scratch.compiled == kept.compiled
