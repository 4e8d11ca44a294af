"""Istio's arguments and rules, row by row as its own code has them."""

from __future__ import annotations

import pytest

from meshbridge.demo import istio_init
from meshbridge.demo.errors import InjectionError
from meshbridge.demo.istio_init import InitArguments
from meshbridge.identity.model import IpFamily

TRAFFIC = istio_init.TRAFFIC
PLAIN = "istio-iptables -p 15001 -z 15006 -u 1337 -m REDIRECT -i * -x  -b * -d 15090,15021,15020"

RENDERED = {
    "no annotation": ({}, PLAIN),
    "an excluded inbound port comes last": ({TRAFFIC + "excludeInboundPorts": "8080"}, PLAIN + ",8080"),
    "a status port takes the place of 15020": ({istio_init.STATUS_PORT_ANNOTATION: "15999"}, PLAIN[:-5] + "15999"),
    "status port 0 excludes none": ({istio_init.STATUS_PORT_ANNOTATION: "0"}, PLAIN[:-6]),
    "an included port replaces the star": (
        {TRAFFIC + "includeInboundPorts": "80,81"},
        PLAIN.replace("-b *", "-b 80,81"),
    ),
    "no inbound at all": ({TRAFFIC + "includeInboundPorts": ""}, PLAIN.replace("-b *", "-b ")),
    "an octal port is not corrected": ({TRAFFIC + "excludeInboundPorts": "0120"}, PLAIN + ",0120"),
    "outbound exclusions": ({TRAFFIC + "excludeOutboundPorts": "9090,8080"}, PLAIN + " -o 9090,8080"),
    "outbound inclusions are not validated": ({TRAFFIC + "includeOutboundPorts": "3000:9090"}, PLAIN + " -q 3000:9090"),
    "interfaces": ({TRAFFIC + "excludeInterfaces": "net1"}, PLAIN + " -c net1"),
    "the new name of reroute interfaces wins": (
        {TRAFFIC + "kubevirtInterfaces": "a", "istio.io/reroute-virtual-interfaces": "b"},
        PLAIN + " -k b",
    ),
}


@pytest.mark.parametrize(("annotations", "arguments"), RENDERED.values(), ids=RENDERED.keys())
def test_annotations_become_arguments(annotations: dict[str, str], arguments: str) -> None:
    assert " ".join(istio_init.render(annotations, "shop/web")) == arguments


REFUSED = {
    "a star among excluded ports": {TRAFFIC + "excludeInboundPorts": "*"},
    "a range of ports": {TRAFFIC + "excludeOutboundPorts": "80-90"},
    "a port too large": {TRAFFIC + "includeInboundPorts": "65536"},
    "an address without a prefix length": {TRAFFIC + "excludeOutboundIPRanges": "10.0.0.1"},
    "a CIDR with host bits": {TRAFFIC + "includeOutboundIPRanges": "10.0.0.1/8"},
    "a CIDR after a space": {TRAFFIC + "includeOutboundIPRanges": "10.0.0.0/8, 11.0.0.0/8"},
    "an unknown mode": {istio_init.MODE_ANNOTATION: "CAPTURE"},
}


@pytest.mark.parametrize("annotations", REFUSED.values(), ids=REFUSED.keys())
def test_the_injector_refuses_the_pod(annotations: dict[str, str]) -> None:
    with pytest.raises(InjectionError, match="shop/web") as raised:
        istio_init.render(annotations, "shop/web")
    assert raised.value.fix


PARSED = {
    "separate": (["-b", "80", "-d", "1,2"], InitArguments(include_inbound_ports="80", exclude_inbound_ports="1,2")),
    "attached": (["-b80"], InitArguments(include_inbound_ports="80")),
    "long": (["--istio-inbound-ports", "80"], InitArguments(include_inbound_ports="80")),
    "long with an equals sign": (["--istio-inbound-ports=80"], InitArguments(include_inbound_ports="80")),
    "the last of a repeated flag wins": (["-b", "80", "-b", "81"], InitArguments(include_inbound_ports="81")),
    "a missing -b means none": (["istio-iptables", "-i", "*"], InitArguments(include_outbound_ranges="*")),
    "an empty value": (["-x", "", "-b", "*"], InitArguments(include_inbound_ports="*")),
    "a flag without its value": (["-b"], InitArguments()),
    "other flags": (["--log_output_level=default:info", "-b", "80"], InitArguments(include_inbound_ports="80")),
}


@pytest.mark.parametrize(("words", "arguments"), PARSED.values(), ids=PARSED.keys())
def test_arguments_are_read_as_istio_reads_them(words: list[str], arguments: InitArguments) -> None:
    assert istio_init.parse(words) == arguments


def rules(family: IpFamily = IpFamily.IPV4, **arguments: str) -> list[str]:
    text = istio_init.rules(
        InitArguments(**{"include_inbound_ports": "*", "include_outbound_ranges": "*", **arguments}), family
    )
    assert text.startswith("*nat\n")
    assert text.endswith("COMMIT\n")
    return [line for line in text.splitlines() if line.startswith("-A")]


def chain(name: str, family: IpFamily = IpFamily.IPV4, **arguments: str) -> list[str]:
    return [line.removeprefix(f"-A {name} ") for line in rules(family, **arguments) if line.startswith(f"-A {name} ")]


def test_redirect_chains_name_envoys_ports() -> None:
    assert chain("ISTIO_REDIRECT") == ["-p tcp -j REDIRECT --to-ports 15001"]
    assert chain("ISTIO_IN_REDIRECT") == ["-p tcp -j REDIRECT --to-ports 15006"]


INBOUND = {
    "every port but the excluded": (
        {"exclude_inbound_ports": "15090,8080"},
        ["--dport 15008 -j RETURN", "--dport 15090 -j RETURN", "--dport 8080 -j RETURN", "-j ISTIO_IN_REDIRECT"],
    ),
    "a list captures its ports and ignores exclusions": (
        {"include_inbound_ports": "80,81", "exclude_inbound_ports": "80"},
        ["--dport 15008 -j RETURN", "--dport 80 -j ISTIO_IN_REDIRECT", "--dport 81 -j ISTIO_IN_REDIRECT"],
    ),
}


@pytest.mark.parametrize(("arguments", "expected"), INBOUND.values(), ids=INBOUND.keys())
def test_inbound_chain(arguments: dict[str, str], expected: list[str]) -> None:
    assert chain("ISTIO_INBOUND", **arguments) == [f"-p tcp {rule}" for rule in expected]
    assert chain("PREROUTING", **arguments) == ["-p tcp -j ISTIO_INBOUND"]


def test_no_included_inbound_port_means_no_inbound_rule() -> None:
    assert chain("PREROUTING", include_inbound_ports="") == []


def test_outbound_chain_in_istios_order() -> None:
    assert chain("ISTIO_OUTPUT", exclude_outbound_ports="9090", exclude_outbound_ranges="10.0.0.0/8,fd00::/8") == [
        "-p tcp --dport 9090 -j RETURN",
        "-p udp --dport 9090 -j RETURN",
        "-o lo -s 127.0.0.6/32 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --uid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-o lo -m owner ! --uid-owner 1337 -j RETURN",
        "-m owner --uid-owner 1337 -j RETURN",
        "-o lo ! -d 127.0.0.1/32 -p tcp ! --dport 15008 -m owner --gid-owner 1337 -j ISTIO_IN_REDIRECT",
        "-o lo -m owner ! --gid-owner 1337 -j RETURN",
        "-m owner --gid-owner 1337 -j RETURN",
        "-d 127.0.0.1/32 -j RETURN",
        "-d 10.0.0.0/8 -j RETURN",
        "-p tcp -j ISTIO_REDIRECT",
    ]


def test_ipv6_rules_use_ipv6_addresses_and_only_ipv6_ranges() -> None:
    lines = chain("ISTIO_OUTPUT", IpFamily.IPV6, include_outbound_ranges="10.0.0.0/8,fd00::/8")
    assert lines[0] == "-o lo -s ::6/128 -j RETURN"
    assert "-d ::1/128 -j RETURN" in lines
    assert lines[-1] == "-d fd00::/8 -p tcp -j ISTIO_REDIRECT"
    assert not [line for line in lines if "10.0.0.0" in line]


def test_included_outbound_ports_are_captured_whatever_the_address() -> None:
    assert chain("ISTIO_OUTPUT", include_outbound_ranges="", include_outbound_ports="443")[-1] == (
        "-p tcp --dport 443 -j ISTIO_REDIRECT"
    )


def test_a_loopback_range_removes_the_rules_that_spare_loopback() -> None:
    lines = chain("ISTIO_OUTPUT", include_outbound_ranges="127.0.0.0/8")
    assert not [line for line in lines if line.startswith("-o lo -m owner !")]


def test_an_excluded_interface_comes_before_everything_and_reroute_interfaces_are_captured() -> None:
    lines = chain("PREROUTING", exclude_interfaces="net1", reroute_interfaces="tap0")
    assert lines == [
        "-i net1 -j RETURN",
        "-i tap0 -p tcp -j ISTIO_REDIRECT",
        "-i tap0 -j RETURN",
        "-p tcp -j ISTIO_INBOUND",
    ]


def test_mode_none_as_an_argument_gives_the_full_rules() -> None:
    assert rules(mode="NONE") == rules(mode="REDIRECT")


def test_tproxy_is_refused_rather_than_played_wrongly() -> None:
    with pytest.raises(InjectionError, match="TPROXY"):
        rules(mode="TPROXY")
