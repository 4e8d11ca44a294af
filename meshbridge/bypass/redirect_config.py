"""What istio-iptables is told, and the rules it writes from that.

Values stay the strings they were: what an argument says wrongly, the rules do wrongly, or iptables refuses. So the
surprises (octal ports, ignored exclusions, loopback ranges) are not special cases here; they follow from the rules.

Spec: istio tools/istio-iptables/pkg/capture/run.go, tools/common/config, Istio 1.32.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_network
from itertools import islice
from typing import Final

from meshbridge.bypass.iptables import parse_rule
from meshbridge.bypass.rules import MAX_RULES, Base, Hook, Rule, RuleSet, port_range
from meshbridge.identity.model import IpFamily, IpNetwork

LOOPBACK: Final = {IpFamily.IPV4: "127.0.0.1/32", IpFamily.IPV6: "::1/128"}
_PASSTHROUGH: Final = {IpFamily.IPV4: "127.0.0.6/32", IpFamily.IPV6: "::6/128"}
OUTBOUND_MARK: Final = "1338"
AGENT_DNS_PORT: Final = "15053"


@dataclass(frozen=True, slots=True)
class RedirectConfig:
    """The settings of istio-iptables; the defaults are those of the program, so a missing list is none, not all.

    ``sources`` names, for a field, what set it (an argument, a variable, an annotation), for people.
    """

    mode: str = ""
    include_inbound_ports: str = ""
    exclude_inbound_ports: str = ""
    include_outbound_ports: str = ""
    exclude_outbound_ports: str = ""
    include_outbound_ranges: str = ""
    exclude_outbound_ranges: str = ""
    reroute_interfaces: str = ""
    exclude_interfaces: str = ""
    proxy_port: str = "15001"
    inbound_port: str = "15006"
    tunnel_port: str = "15008"
    proxy_uid: str = ""
    proxy_gid: str = ""
    tproxy_mark: str = "1337"
    redirect_dns: bool = False
    capture_all_dns: bool = False
    dns_servers: tuple[str, ...] = ()
    dual_stack: bool = False
    drop_invalid: bool = False
    native_nftables: bool = False
    dry_run: bool = False
    skip_rule_apply: bool = False
    cleanup_only: bool = False
    owner_groups_include: str = "*"
    owner_groups_exclude: str = ""
    loopback: str = LOOPBACK[IpFamily.IPV4]
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, compare=False)

    @property
    def writes_rules(self) -> bool:
        return not (self.dry_run or self.skip_rule_apply or self.cleanup_only)

    @property
    def uids(self) -> list[str]:
        return items(self.proxy_uid or "1337")

    @property
    def gids(self) -> list[str]:
        return items(self.proxy_gid or self.proxy_uid or "1337")

    def source(self, name: str) -> str:
        """What set the field, with its value."""
        return self.sources.get(name, "")


class RefusedError(ValueError):
    """istio-iptables (or the iptables it calls) ends with an error: the pod never starts.

    ``field`` is the field of RedirectConfig, ``value`` the offending item.
    """

    def __init__(self, field_name: str, value: str, reason: str) -> None:
        super().__init__(f"{value!r}: {reason}")
        self.field, self.value, self.reason = field_name, value, reason


def items(text: str) -> list[str]:
    """A comma-separated list as istio-iptables splits it: empty items do not count, blanks stay."""
    return [item for item in text.split(",") if item]


def parse_prefix(text: str) -> IpNetwork:
    """A CIDR as Go's netip.ParsePrefix takes it: an address and a decimal length, no mask, no zone.

    Raises:
        ValueError: It is not one.
    """
    address, _, length = text.partition("/")
    if not re.fullmatch(r"0|[1-9][0-9]{0,2}", length) or "%" in address or not text.isascii():
        raise ValueError(f"{text!r} is not an address and a prefix length")
    return ip_network(text, strict=False)


def ranges(text: str, family: IpFamily, name: str = "") -> list[IpNetwork]:
    """The CIDRs of a list that belong to one family.

    Raises:
        RefusedError: An item is not a CIDR.
    """
    found = []
    for item in items(text):
        try:
            network = parse_prefix(item)
        except ValueError as error:
            raise RefusedError(name, item, "not a CIDR") from error
        if IpFamily.of(network) is family:
            found.append(network)
    return found


def has_loopback(text: str) -> bool:
    """Whether a range of the list starts at a loopback address (then ``-o lo`` is no longer let go)."""
    if text == "*":
        return False
    return any(parse_prefix(item).network_address.is_loopback or _address_is_loopback(item) for item in items(text))


def _address_is_loopback(item: str) -> bool:
    return item.startswith("127.") or item.partition("/")[0] == "::1"


@lru_cache(maxsize=128)
def istio_rules(config: RedirectConfig, family: IpFamily) -> RuleSet:
    """The rules istio-iptables writes for one family.

    A user or group given by name stays not understood: who it is depends on a file in the container.

    Raises:
        RefusedError: It ends with an error instead, and the pod never starts.
    """
    if not config.writes_rules:
        return RuleSet("expected", family)
    chains: dict[str, list[Rule]] = {}
    lines = list(islice(rule_lines(config, family), MAX_RULES + 1))
    if len(lines) > MAX_RULES:
        return RuleSet("expected", family, problems=(f"the settings make more than {MAX_RULES} rules",))
    for table, line, origin in lines:
        chain, rule = parse_rule(line, table, family, origin)
        chains.setdefault(chain, []).append(rule)
    bases = (
        Base(Hook.PREROUTING, "filter", -150, "mangle/PREROUTING"),
        Base(Hook.OUTPUT, "filter", -150, "mangle/OUTPUT"),
        Base(Hook.PREROUTING, "nat", -100, "nat/PREROUTING"),
        Base(Hook.OUTPUT, "nat", -100, "nat/OUTPUT"),
    )
    return RuleSet("expected", family, {name: tuple(rules) for name, rules in chains.items()}, bases)


def restore_text(config: RedirectConfig, family: IpFamily) -> str:
    """The same rules as input for iptables-restore or ip6tables-restore."""
    lines = list(rule_lines(config, family))
    text = []
    for table in ("mangle", "nat"):
        own = [line for name, line, _ in lines if name == table]
        chains = sorted({word for line in own for word in line.split() if word.startswith("ISTIO_")})
        builtin = [":PREROUTING ACCEPT [0:0]", ":OUTPUT ACCEPT [0:0]"]
        text += [f"*{table}", *builtin, *(f":{chain} - [0:0]" for chain in chains), *own, "COMMIT"]
    return "\n".join([*text, ""])


def rule_lines(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    """Each rule in its final order as (table, ``-A …``, the field of RedirectConfig that caused it).

    Raises:
        RefusedError: istio-iptables or iptables ends with an error.
    """
    check(config)
    yield from _prerouting(config, family)
    yield from _inbound(config, family)
    yield from _outbound(config, family)
    yield "nat", f"-A ISTIO_REDIRECT -p tcp -j REDIRECT --to-ports {config.proxy_port}", ""
    yield "nat", f"-A ISTIO_IN_REDIRECT -p tcp -j REDIRECT --to-ports {config.inbound_port}", ""


def check(config: RedirectConfig) -> None:
    """Raise RefusedError for every value that ends istio-iptables or the iptables it calls."""
    for name in ("exclude_inbound_ports", "include_inbound_ports", "exclude_outbound_ports", "include_outbound_ports"):
        text = getattr(config, name)
        if name == "include_inbound_ports" and text == "*":
            continue
        if name == "exclude_inbound_ports" and config.include_inbound_ports != "*":
            continue  # not looked at
        for item in items(text):
            try:
                port_range(item.strip())
            except ValueError as error:
                raise RefusedError(name, item, "invalid port or service") from error
    for name in ("proxy_port", "inbound_port", "tunnel_port"):
        try:
            port_range(getattr(config, name))
        except ValueError as error:
            raise RefusedError(name, getattr(config, name), "invalid port or service") from error
    if config.exclude_outbound_ranges == "*":
        raise RefusedError("exclude_outbound_ranges", "*", "invalid value for OUTBOUND_IP_RANGES_EXCLUDE")
    for name in ("include_outbound_ranges", "exclude_outbound_ranges"):
        if getattr(config, name) != "*":
            ranges(getattr(config, name), IpFamily.IPV4, name)
    for name in ("exclude_interfaces", "reroute_interfaces"):
        for item in items(getattr(config, name)):
            if len(item) > 15 or not item.strip() or item.split() != [item.strip()]:
                raise RefusedError(name, item, "not an interface name")
    if len(items(config.owner_groups_include)) > 64:
        raise RefusedError("owner_groups_include", config.owner_groups_include[:80], "more than 64 groups")
    _check_loopback(config)


def _check_loopback(config: RedirectConfig) -> None:
    try:
        network = parse_prefix(config.loopback)
    except ValueError as error:
        raise RefusedError("loopback", config.loopback, "not a CIDR") from error
    if network.version != 4 or not _address_is_loopback(config.loopback) or network.prefixlen < 8:
        raise RefusedError("loopback", config.loopback, "not an IPv4 loopback range")


def _prerouting(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    """Reroute rules are inserted at the top, so they stand before the exclusions of interfaces."""
    rerouted = items(config.reroute_interfaces)
    if config.include_outbound_ranges == "*":
        redirects = [f"-A PREROUTING -i {name} -j ISTIO_REDIRECT" for name in reversed(rerouted)]
    else:
        cidrs = ranges(config.include_outbound_ranges, family)
        redirects = [
            f"-A PREROUTING -i {name} -d {cidr} -j ISTIO_REDIRECT"
            for cidr in reversed(cidrs)
            for name in reversed(rerouted)
        ]
    for line in redirects:
        yield "nat", line, "reroute_interfaces"
    for name in reversed(rerouted):
        yield "nat", f"-A PREROUTING -i {name} -j RETURN", "reroute_interfaces"
    for name in items(config.exclude_interfaces):
        yield "nat", f"-A PREROUTING -i {name} -j RETURN", "exclude_interfaces"
        yield "nat", f"-A OUTPUT -o {name} -j RETURN", "exclude_interfaces"
    if config.mode == "TPROXY":
        for name in items(config.exclude_interfaces):
            yield "mangle", f"-A PREROUTING -i {name} -j RETURN", "exclude_interfaces"
            yield "mangle", f"-A OUTPUT -o {name} -j RETURN", "exclude_interfaces"
    if config.drop_invalid:
        yield "mangle", "-A PREROUTING -m conntrack --ctstate INVALID -j DROP", "drop_invalid"
    yield "nat", f"-A ISTIO_INBOUND -p tcp --dport {config.tunnel_port} -j RETURN", "tunnel_port"


def _inbound(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    included = config.include_inbound_ports
    if not included:
        return
    tproxy = config.mode == "TPROXY"
    table = "mangle" if tproxy else "nat"
    yield table, "-A PREROUTING -p tcp -j ISTIO_INBOUND", "include_inbound_ports"
    if tproxy:
        yield from _tproxy(config, family)
    if included == "*":
        for port in items(config.exclude_inbound_ports):
            yield table, f"-A ISTIO_INBOUND -p tcp --dport {port} -j RETURN", "exclude_inbound_ports"
        if tproxy:
            yield "mangle", "-A ISTIO_INBOUND -p tcp -m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT", ""
        yield (
            table,
            f"-A ISTIO_INBOUND -p tcp -j {'ISTIO_TPROXY' if tproxy else 'ISTIO_IN_REDIRECT'}",
            "include_inbound_ports",
        )
        return
    for port in items(included):
        if tproxy:
            established = "-m conntrack --ctstate RELATED,ESTABLISHED -j ISTIO_DIVERT"
            yield "mangle", f"-A ISTIO_INBOUND -p tcp --dport {port} {established}", ""
        target = "ISTIO_TPROXY" if tproxy else "ISTIO_IN_REDIRECT"
        yield table, f"-A ISTIO_INBOUND -p tcp --dport {port} -j {target}", "include_inbound_ports"


def _tproxy(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    mark, loopback = config.tproxy_mark, _loopback(config, family)
    yield "mangle", f"-A ISTIO_DIVERT -j MARK --set-mark {mark}", ""
    yield "mangle", "-A ISTIO_DIVERT -j ACCEPT", ""
    target = f"TPROXY --on-port {config.inbound_port} --tproxy-mark {mark}/0xffffffff"
    yield "mangle", f"-A ISTIO_TPROXY ! -d {loopback} -p tcp -j {target}", "include_inbound_ports"
    yield "mangle", f"-A ISTIO_INBOUND -p tcp -m mark --mark {mark} -j RETURN", ""
    yield "mangle", f"-A ISTIO_INBOUND -s {_PASSTHROUGH[family]} -i lo -p tcp -j RETURN", ""
    yield "mangle", f"-A ISTIO_INBOUND -i lo -p tcp -m mark ! --mark {OUTBOUND_MARK} -j RETURN", ""
    yield "mangle", f"-A PREROUTING -p tcp -m mark --mark {mark} -j CONNMARK --save-mark", ""
    yield "mangle", f"-A OUTPUT -o lo -p tcp -m mark --mark {mark} -j RETURN", ""
    for owner in [*(f"--uid-owner {uid}" for uid in config.uids), *(f"--gid-owner {gid}" for gid in config.gids)]:
        yield (
            "mangle",
            f"-A OUTPUT ! -d {loopback} -o lo -p tcp -m owner {owner} -j MARK --set-mark {OUTBOUND_MARK}",
            "",
        )
    yield "mangle", f"-A OUTPUT -p tcp -m connmark --mark {mark} -j CONNMARK --restore-mark", ""


def _loopback(config: RedirectConfig, family: IpFamily) -> str:
    return config.loopback if family is IpFamily.IPV4 else LOOPBACK[family]


def _outbound(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    loopback = _loopback(config, family)
    yield "nat", "-A OUTPUT -j ISTIO_OUTPUT", ""
    for port in items(config.exclude_outbound_ports):
        for protocol in ("tcp", "udp"):
            yield "nat", f"-A ISTIO_OUTPUT -p {protocol} --dport {port} -j RETURN", "exclude_outbound_ports"
    yield "nat", f"-A ISTIO_OUTPUT -o lo -s {_PASSTHROUGH[family]} -j RETURN", "loopback"
    yield from _owners(config, family)
    yield from _owner_groups(config)
    if config.redirect_dns:
        yield from _dns(config, family)
    yield "nat", f"-A ISTIO_OUTPUT -d {loopback} -j RETURN", "loopback"
    for cidr in ranges(config.exclude_outbound_ranges, family):
        yield "nat", f"-A ISTIO_OUTPUT -d {cidr} -j RETURN", "exclude_outbound_ranges"
    for port in items(config.include_outbound_ports):
        yield "nat", f"-A ISTIO_OUTPUT -p tcp --dport {port} -j ISTIO_REDIRECT", "include_outbound_ports"
    if config.include_outbound_ranges == "*":
        yield "nat", "-A ISTIO_OUTPUT -j ISTIO_REDIRECT", "include_outbound_ranges"
        return
    for cidr in ranges(config.include_outbound_ranges, family):
        yield "nat", f"-A ISTIO_OUTPUT -d {cidr} -j ISTIO_REDIRECT", "include_outbound_ranges"


def _owners(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    loopback, dns = _loopback(config, family), config.redirect_dns
    lets_lo_go = not has_loopback(config.include_outbound_ranges)
    local = "-p tcp ! --dport 53 " if dns else ""
    for kind, numbers in (("uid", config.uids), ("gid", config.gids)):
        for number in numbers:
            origin = f"proxy_{kind}"
            if dns and kind == "uid":
                but = f"-m multiport ! --dports 53,{config.tunnel_port}"
            else:
                but = f"! --dport {config.tunnel_port}"
            own = f"-m owner --{kind}-owner {number}"
            yield "nat", f"-A ISTIO_OUTPUT ! -d {loopback} -o lo -p tcp {but} {own} -j ISTIO_IN_REDIRECT", origin
            if lets_lo_go:
                yield "nat", f"-A ISTIO_OUTPUT -o lo {local}-m owner ! --{kind}-owner {number} -j RETURN", "loopback"
            yield "nat", f"-A ISTIO_OUTPUT {own} -j RETURN", origin


def _owner_groups(config: RedirectConfig) -> Iterator[tuple[str, str, str]]:
    if config.owner_groups_include == "*":
        for group in items(config.owner_groups_exclude):
            yield "nat", f"-A ISTIO_OUTPUT -m owner --gid-owner {group} -j RETURN", "owner_groups_exclude"
        return
    none_of = " ".join(f"-m owner ! --gid-owner {group}" for group in items(config.owner_groups_include))
    yield "nat", f"-A ISTIO_OUTPUT {none_of + ' ' if none_of else ''}-j RETURN", "owner_groups_include"


def _dns(config: RedirectConfig, family: IpFamily) -> Iterator[tuple[str, str, str]]:
    to_agent = f"-j REDIRECT --to-ports {AGENT_DNS_PORT}"
    version = 4 if family is IpFamily.IPV4 else 6
    servers = [server for server in config.dns_servers if ip_network(server).version == version]
    if not config.capture_all_dns and not servers:
        return
    yield "nat", "-A ISTIO_OUTPUT -j ISTIO_OUTPUT_DNS", "redirect_dns"
    for protocol in ("tcp", "udp"):
        for where in [""] if config.capture_all_dns else [f"-d {server} " for server in servers]:
            yield "nat", f"-A ISTIO_OUTPUT_DNS {where}-p {protocol} --dport 53 {to_agent}", "redirect_dns"
