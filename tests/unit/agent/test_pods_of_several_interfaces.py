"""A pod that leaves one of its interfaces to its application alone, as the agent compiles it."""

from __future__ import annotations

from ipaddress import ip_address

from meshbridge.agent.compilation import Compilation
from meshbridge.agent.view import LocalPod
from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.bypass.rules import SeenRules
from meshbridge.datapath.policysets import RuleIds
from meshbridge.identity.model import IpFamily, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.policy.capture import PortClass
from meshbridge.policy.policyset import PolicySet

ARGUMENTS = a.render_init_args({a.EXCLUDE_INTERFACES: "net1"}, MeshDefaults())
POD = LocalPod(
    Workload("shop", "web", "web", "n", (ip_address("10.0.0.1"),), proxy=ProxyClass.SIDECAR, init_args=ARGUMENTS)
)


SEEN = SeenRules((parse_iptables_save(restore_text(parse_init_args(ARGUMENTS, {})[0], IpFamily.IPV4), IpFamily.IPV4),))


def test_a_port_that_bypasses_envoy_on_one_interface_is_compensated_on_all() -> None:
    identities = number_peers({ip_address("10.1.0.1"): Peer("shop", {"app": "db"})}).identities
    compilation = Compilation(RuleIds())

    def captured() -> PortClass:
        compilation.update({"web": POD}, PolicySet(), identities, seen={"web": SEEN})
        return compilation._used["web"].inbound[IpFamily.IPV4].at(8080)

    assert captured() is PortClass.CAPTURED, "eth0 alone is under our programs"
    compilation.several = frozenset({"web"})
    assert captured() is PortClass.EXCLUDED, "what comes by net1 is not seen by Envoy, and the kernel cannot tell"
    compilation.several = frozenset()
    assert captured() is PortClass.CAPTURED
