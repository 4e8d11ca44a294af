"""The capture state equals what a literal first-match reader of the same rules says, packet by packet."""

from __future__ import annotations

from ipaddress import ip_address

from hypothesis import given, settings
from hypothesis import strategies as st
from iptables_interpreter import Packet, outcome

from meshbridge.bypass.iptables import parse_iptables_save
from meshbridge.bypass.redirect_config import RedirectConfig, istio_rules, restore_text
from meshbridge.bypass.rules import Hook, RuleSet
from meshbridge.bypass.sets import Box
from meshbridge.bypass.walk import Outcome, Region, regions
from meshbridge.identity.model import IpFamily

V4, V6 = IpFamily.IPV4, IpFamily.IPV6
PORTS = ("0", "53", "80", "0120", "8080", "15008", "15020", "15021", "15090", "65535", "3000:9090", "0x50")
CIDRS = ("10.0.0.0/8", "10.1.2.0/24", "10.1.2.3/32", "127.0.0.0/8", "127.0.0.1/32", "fd00::/8", "::1/128", "0.0.0.0/0")
ADDRESSES = ("10.0.0.1", "10.1.2.3", "10.1.2.4", "11.0.0.1", "127.0.0.1", "127.0.0.6")
ADDRESSES_V6 = ("fd00::1", "fe80::1", "::1", "::6", "2001:db8::1")
INTERFACES = ("eth0", "lo", "tap0", "net1")


def lists(values: tuple[str, ...]) -> st.SearchStrategy[str]:
    return st.lists(st.sampled_from(values), max_size=3).map(",".join)


CONFIGS = st.builds(
    RedirectConfig,
    mode=st.sampled_from(["REDIRECT", "TPROXY", "NONE"]),
    include_inbound_ports=st.one_of(st.just("*"), lists(PORTS)),
    exclude_inbound_ports=lists(PORTS),
    include_outbound_ports=lists(PORTS),
    exclude_outbound_ports=lists(PORTS),
    include_outbound_ranges=st.one_of(st.just("*"), lists(CIDRS)),
    exclude_outbound_ranges=lists(CIDRS),
    reroute_interfaces=lists(("tap0", "net1")),
    exclude_interfaces=lists(INTERFACES),
    proxy_uid=st.sampled_from(["1337", "", "1337,2000"]),
    owner_groups_include=st.sampled_from(["*", "", "1000", "1000,3000"]),
    owner_groups_exclude=lists(("1000", "3000")),
    redirect_dns=st.booleans(),
    capture_all_dns=st.booleans(),
    dns_servers=st.sampled_from([(), ("10.1.2.3",)]),
    drop_invalid=st.booleans(),
)
NUMBERS = (0, 53, 79, 80, 81, 120, 3000, 8080, 9090, 9091, 15006, 15008, 15020, 15021, 15090, 65535)


def packets(family: IpFamily) -> st.SearchStrategy[tuple[str, Packet]]:
    addresses = ADDRESSES if family is V4 else ADDRESSES_V6
    fields = {
        "protocol": st.sampled_from(["tcp", "udp", "icmp"]),
        "source": st.sampled_from(addresses),
        "destination": st.sampled_from(addresses),
        "port": st.sampled_from(NUMBERS),
        "uid": st.sampled_from([0, 1000, 1337, 2000]),
        "gid": st.sampled_from([0, 1000, 1337, 3000]),
    }
    arriving = st.builds(Packet, input=st.sampled_from(INTERFACES), **fields)
    sent = st.builds(Packet, output=st.sampled_from(INTERFACES), **fields)
    return st.one_of(arriving.map(lambda packet: ("PREROUTING", packet)), sent.map(lambda packet: ("OUTPUT", packet)))


def region_of(rules: RuleSet, hook: str, packet: Packet) -> Region:
    """The one region that holds a packet, of all regions of all packets."""
    everything = Box.everything(rules.family)
    numbers = {"tcp": 6, "udp": 17, "icmp": 1}
    found = [
        region
        for region in regions((rules,), Hook(hook.lower()), everything)
        if numbers[packet.protocol] in region.box.protocol
        and int(ip_address(packet.source)) in region.box.source
        and int(ip_address(packet.destination)) in region.box.destination
        and packet.port in region.box.port
        and packet.input in region.box.input
        and packet.output in region.box.output
        and packet.uid in region.box.uid
        and packet.gid in region.box.gid
    ]
    assert len(found) == 1, "regions are disjoint and cover everything"
    return found[0]


def check(config: RedirectConfig, family: IpFamily, hook: str, packet: Packet) -> None:
    text = restore_text(config, family)
    kind, port = outcome(text, hook, packet)
    for rules in (istio_rules(config, family), parse_iptables_save(text, family)):
        region = region_of(rules, hook, packet)
        expected = {"redirect": Outcome.REDIRECTED, "tproxy": Outcome.REDIRECTED, "drop": Outcome.DROPPED}
        assert (region.outcome, region.port) == (expected.get(kind, Outcome.PASSED), port)


@settings(max_examples=200, deadline=None)
@given(CONFIGS, packets(V4))
def test_regions_agree_with_the_interpreter_on_ipv4(config: RedirectConfig, sent: tuple[str, Packet]) -> None:
    check(config, V4, *sent)


@settings(max_examples=80, deadline=None)
@given(CONFIGS, packets(V6))
def test_regions_agree_with_the_interpreter_on_ipv6(config: RedirectConfig, sent: tuple[str, Packet]) -> None:
    check(config, V6, *sent)


RULE_TEXTS = st.builds(
    lambda protocol, port, negated, address, target: " ".join(
        [
            *(["-p", protocol] if protocol else []),
            *(([*(["!"] if negated else []), "--dport", port]) if protocol in ("tcp", "udp") and port else []),
            *(["!", "-d", address] if negated and address else ["-d", address] if address else []),
            "-j",
            target,
        ]
    ),
    st.sampled_from(["tcp", "udp", "icmp", ""]),
    st.sampled_from(["80", "80:90", "8080", ""]),
    st.booleans(),
    st.sampled_from(["10.1.2.3/32", "10.0.0.0/8", ""]),
    st.sampled_from(["RETURN", "ACCEPT", "A", "B", "REDIRECT --to-ports 15006", "REDIRECT --to-ports 15001", "DROP"]),
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(RULE_TEXTS, max_size=6),
    st.lists(RULE_TEXTS.filter(lambda text: not text.endswith(" A")), max_size=4),
    st.lists(RULE_TEXTS.filter(lambda text: not text.endswith((" A", " B"))), max_size=4),
    packets(V4),
)
def test_regions_agree_on_rules_nobody_planned(
    base: list[str], chain_a: list[str], chain_b: list[str], sent: tuple[str, Packet]
) -> None:
    hook, packet = sent
    lines = ["*nat", ":PREROUTING ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]", ":A - [0:0]", ":B - [0:0]"]
    lines += [f"-A {hook} {text}" for text in base]
    lines += [f"-A A {text}" for text in chain_a] + [f"-A B {text}" for text in chain_b] + ["COMMIT"]
    text = "\n".join(lines)
    region = region_of(parse_iptables_save(text, V4), hook, packet)
    kind, port = outcome(text, hook, packet)
    expected = {"redirect": Outcome.REDIRECTED, "drop": Outcome.DROPPED}
    assert (region.outcome, region.port) == (expected.get(kind, Outcome.PASSED), port)
