"""Native nftables rules (``nft -j list ruleset``), as istio-nftables writes them, in the form of rules.py.

Spec: libnftables-json(5).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_address, ip_network
from typing import Any, Final

from meshbridge.bypass.rules import MAX_RULES, MAX_TEXT_BYTES, Action, Base, Hook, MarkMatch, Rule, RuleSet, port_number
from meshbridge.bypass.sets import PORTS, Box, IntSet, NameSet, addresses
from meshbridge.identity.model import IpFamily

_FAMILIES = {IpFamily.IPV4: ("ip", "inet"), IpFamily.IPV6: ("ip6", "inet")}
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "ipv6-icmp": 58, "icmpv6": 58, "sctp": 132, "dccp": 33, "udplite": 136}
_PLAIN: Final = {
    "return": Action.RETURN,
    "accept": Action.ACCEPT,
    "drop": Action.DROP,
    "reject": Action.DROP,
    "notrack": Action.UNTRACK,
}
_WITHOUT_EFFECT = frozenset({"counter", "log", "continue", "ct helper", "ct timeout"})
_DIVERTING = frozenset({"dnat", "snat", "masquerade", "queue", "fwd", "dup", "synproxy"})
MAX_ELEMENTS: Final = 4096
_ALL_BITS: Final = 0xFFFFFFFF


def parse_nft_json(text: str, family: IpFamily, skip: Collection[tuple[str, str]] = ()) -> RuleSet:
    """Read the ruleset for one address family, without the tables (family, name) in ``skip``.

    iptables-nft's own tables are read through iptables-save, which knows their extensions: they are to be skipped here.
    Never raises: what cannot be read is told in ``problems`` or in a rule's ``unknown``.
    """
    backend = "nftables"
    if len(text) > MAX_TEXT_BYTES:
        return RuleSet(backend, family, problems=(f"more than {MAX_TEXT_BYTES} bytes of rules",))
    try:
        items = json.loads(text)["nftables"]
        items = [item for item in items if isinstance(item, dict)]
    except (ValueError, KeyError, TypeError, RecursionError):
        return RuleSet(backend, family, problems=("not the JSON that nft prints",))
    chains: dict[str, list[Rule]] = {}
    bases: list[Base] = []
    drops: set[str] = set()
    problems: list[str] = []
    for item in items:
        kind, body = next(iter(item.items()), ("", None))
        if not isinstance(body, dict) or body.get("family") not in _FAMILIES[family]:
            continue
        table = (str(body.get("family")), str(body.get("table")))
        if table in skip:
            continue
        if kind == "chain":
            name = "/".join((*table, str(body.get("name"))))
            chains.setdefault(name, [])
            if (hook := _hook(body.get("hook"))) is not None:
                nat = "nat" if body.get("type") == "nat" else "filter"
                bases.append(Base(hook, nat, _integer(body.get("prio")), name))
                if body.get("policy") == "drop":
                    drops.add(name)
        elif kind == "rule":
            name = "/".join((*table, str(body.get("chain"))))
            chains.setdefault(name, []).append(_rule(body, "/".join(table), family))
            if sum(map(len, chains.values())) > MAX_RULES:
                problems.append(f"more than {MAX_RULES} rules")
                break
    read = {name: tuple(rules) for name, rules in chains.items()}
    return RuleSet(backend, family, read, tuple(bases), frozenset(drops), tuple(problems))


def _hook(name: object) -> Hook | None:
    return Hook(name) if name in ("prerouting", "output") else None


def _integer(value: object) -> int:
    return value if isinstance(value, int) else 0


def _rule(body: Mapping[str, Any], table: str, family: IpFamily) -> Rule:
    expressions = body.get("expr")
    everything = Box.everything(family)
    # a counter's value is no part of what a rule says
    said = (
        [e for e in expressions if not (isinstance(e, dict) and "counter" in e)]
        if isinstance(expressions, list)
        else []
    )
    text = json.dumps(said, separators=(",", ":"))[:400]
    rule = Rule(everything, Action.CONTINUE, text)
    if not isinstance(expressions, list):
        return replace(rule, action=Action.UNKNOWN, unknown=("no expressions",))
    for expression in expressions:
        kind, value = (
            next(iter(expression.items()), ("", None)) if isinstance(expression, dict) and expression else ("", None)
        )
        if kind in _WITHOUT_EFFECT:
            continue
        try:
            if rule.action is not Action.CONTINUE:
                raise ValueError("a second statement")
            rule = _statement(rule, kind, value, table, family)
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            unknown = (*rule.unknown, str(kind)[:40])
            known_match = kind in ("match", "xt") and not (isinstance(value, dict) and value.get("type") == "target")
            rule = replace(rule, unknown=unknown, action=rule.action if known_match else Action.UNKNOWN)
        if rule.match == _nothing(family):
            return rule
    return rule


def _statement(rule: Rule, kind: str, value: Any, table: str, family: IpFamily) -> Rule:
    if kind == "match":
        return _match(rule, value, family)
    if kind in _PLAIN:
        return replace(rule, action=_PLAIN[kind])
    if kind in ("jump", "goto"):
        return replace(rule, action=Action(kind), target=f"{table}/{value['target']}")
    if kind == "redirect":
        return replace(rule, action=Action.REDIRECT, port=_one_port(value["port"]) if value else 0)
    if kind == "tproxy":
        return replace(rule, action=Action.TPROXY, port=_one_port(value.get("port", 0)))
    if kind in _DIVERTING:
        return replace(rule, action=Action.DIVERT)
    if kind == "mangle":
        return _mangle(rule, value)
    raise ValueError(kind)


def _mangle(rule: Rule, value: Any) -> Rule:
    """``meta mark set N`` changes what later rules match; setting the connection's mark does not."""
    if "ct" in value["key"]:
        return rule
    if value["key"] == {"meta": {"key": "mark"}} and isinstance(value["value"], int):
        return replace(rule, action=Action.MARK, port=value["value"])
    raise ValueError(value)


def _match(rule: Rule, value: Any, family: IpFamily) -> Rule:
    left, right, operator = value["left"], value["right"], value["op"]
    kind, selector = next(iter(left.items()))
    mask = _ALL_BITS
    if kind == "&":
        (left, mask), kind = selector, ""
        if isinstance(mask, int) and isinstance(right, int) and operator in ("==", "!="):
            kind, selector = next(iter(left.items()))
        if kind not in ("ct", "meta") or selector.get("key") != "mark":
            raise ValueError(left)
    if kind == "ct" and selector.get("key") == "state":
        return _when(rule, ("new" in _list(right)) != (operator == "!="), family)
    if kind == "ct" and selector.get("key") == "mark":
        return _when(rule, (right == 0) != (operator == "!="), family)
    if kind == "fib" or kind not in ("meta", "payload"):
        raise ValueError(kind)
    name = selector["key"] if kind == "meta" else f"{selector['protocol']} {selector['field']}"
    if name == "nfproto":
        return _when(rule, (right == ("ipv4" if family is IpFamily.IPV4 else "ipv6")) != (operator == "!="), family)
    if name == "mark" and kind == "meta":
        if rule.mark is not None or operator not in ("==", "!=") or not isinstance(right, int):
            raise ValueError(right)
        return replace(rule, mark=MarkMatch(right, mask, negated=operator == "!="))
    axis, read = _SELECTORS[name]
    whole = getattr(Box.everything(family), axis)
    if name in ("ip daddr", "ip saddr", "ip6 daddr", "ip6 saddr"):
        if name.startswith("ip6") != (family is IpFamily.IPV6):
            return _when(rule, holds=False, family=family)  # a rule for the other family, in an inet table
    elif name in ("tcp dport", "udp dport", "th dport"):
        protocols = IntSet.of(6, 17) if name[:2] == "th" else IntSet.of(_PROTOCOLS[name[:3]])
        rule = _narrow(rule, "protocol", protocols, family)
    if operator in ("<=", ">=", "<", ">"):
        members: IntSet | NameSet = _compared(operator, right, whole)
    else:
        members = read(right)
    if operator == "!=":
        members = whole - members
    elif operator not in ("==", "in", "<=", ">=", "<", ">"):
        raise ValueError(operator)
    return _narrow(rule, axis, members, family)


def _compared(operator: str, bound: Any, whole: IntSet) -> IntSet:
    number = bound if isinstance(bound, int) else int(ip_address(bound))
    last = whole.spans[-1][1]
    spans = {"<=": (0, number), "<": (0, number - 1), ">=": (number, last), ">": (number + 1, last)}
    return IntSet.of(spans[operator]) & whole


def _narrow(rule: Rule, axis: str, members: IntSet | NameSet, family: IpFamily) -> Rule:
    kept = getattr(rule.match, axis) & members
    return replace(rule, match=rule.match._replace(**{axis: kept}) if kept else _nothing(family))


def _when(rule: Rule, holds: bool, family: IpFamily) -> Rule:
    return rule if holds else replace(rule, match=_nothing(family))


def _nothing(family: IpFamily) -> Box:
    return Box.everything(family)._replace(port=IntSet())


def _list(value: Any) -> Sequence[Any]:
    if isinstance(value, dict) and "set" in value:
        value = value["set"]
    values = value if isinstance(value, list) else [value]
    if len(values) > MAX_ELEMENTS:
        raise ValueError("too many elements")
    return values


def _one_port(value: Any) -> int:
    return _span(value, port_number)[0]


def _span(value: Any, number: Callable[[str], int]) -> tuple[int, int]:
    if isinstance(value, dict) and "range" in value:
        first, last = value["range"]
        return (_span(first, number)[0], _span(last, number)[1])
    read = value if isinstance(value, int) and not isinstance(value, bool) else number(value)
    return (read, read)


def _read_ports(value: Any) -> IntSet:
    return IntSet.of(*(_span(item, port_number) for item in _list(value))) & PORTS


def _read_numbers(value: Any) -> IntSet:
    return IntSet.of(*(_span(item, int) for item in _list(value)))


def _read_protocols(value: Any) -> IntSet:
    return IntSet.of(*(item if isinstance(item, int) else _PROTOCOLS[item] for item in _list(value)))


def _read_names(value: Any) -> NameSet:
    names = [item for item in _list(value) if isinstance(item, str) and not item.endswith("*")]
    if len(names) != len(_list(value)):
        raise ValueError(value)
    return NameSet.of(*names)


def _read_addresses(value: Any) -> IntSet:
    spans: list[tuple[int, int]] = []
    for item in _list(value):
        if isinstance(item, dict) and "prefix" in item:
            network = ip_network(f"{item['prefix']['addr']}/{item['prefix']['len']}", strict=False)
            spans.extend(addresses(network).spans)
        else:
            spans.append(_span(item, lambda text: int(ip_address(text))))
    return IntSet.of(*spans)


_SELECTORS: Final[Mapping[str, tuple[str, Callable[[Any], Any]]]] = {
    "l4proto": ("protocol", _read_protocols),
    "ip protocol": ("protocol", _read_protocols),
    "ip6 nexthdr": ("protocol", _read_protocols),
    "tcp dport": ("port", _read_ports),
    "udp dport": ("port", _read_ports),
    "th dport": ("port", _read_ports),
    "ip daddr": ("destination", _read_addresses),
    "ip6 daddr": ("destination", _read_addresses),
    "ip saddr": ("source", _read_addresses),
    "ip6 saddr": ("source", _read_addresses),
    "iifname": ("input", _read_names),
    "oifname": ("output", _read_names),
    "iif": ("input", _read_names),
    "oif": ("output", _read_names),
    "skuid": ("uid", _read_numbers),
    "skgid": ("gid", _read_numbers),
}
