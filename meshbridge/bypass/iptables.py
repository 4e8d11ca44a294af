"""Reading what iptables-save prints, and single rules as iptables-restore takes them.

Spec: iptables-save(8), iptables-extensions(8).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from ipaddress import ip_network
from typing import Final

from meshbridge.bypass.rules import (
    MAX_RULES,
    MAX_TEXT_BYTES,
    Action,
    Base,
    Hook,
    MarkMatch,
    Rule,
    RuleSet,
    port_number,
    port_range,
)
from meshbridge.bypass.sets import INTERFACES, TCP, UDP, Box, IntSet, NameSet, addresses
from meshbridge.identity.model import IpFamily

MAX_LINE_BYTES: Final = 4096
_TABLE_ORDER = {"raw": -300, "mangle": -150, "nat": -100}
_HOOKS = {"PREROUTING": Hook.PREROUTING, "OUTPUT": Hook.OUTPUT}
_MODULES = frozenset({"tcp", "udp", "owner", "multiport", "conntrack", "state", "mark", "connmark", "comment"})
_PROTOCOLS = {"tcp": 6, "udp": 17, "icmp": 1, "ipv6-icmp": 58, "icmpv6": 58, "sctp": 132, "dccp": 33, "udplite": 136}
_TARGETS = {
    "RETURN": Action.RETURN,
    "ACCEPT": Action.ACCEPT,
    "DROP": Action.DROP,
    "REDIRECT": Action.REDIRECT,
    "TPROXY": Action.TPROXY,
    "MARK": Action.MARK,
    "NOTRACK": Action.UNTRACK,
    **dict.fromkeys(("DNAT", "SNAT", "MASQUERADE", "NETMAP"), Action.DIVERT),
    **dict.fromkeys(("LOG", "NFLOG", "TRACE", "CONNMARK", "TCPMSS", "DSCP", "CT"), Action.CONTINUE),
}
_CHAIN_LINE = re.compile(r":(\S+) (\S+)")


def parse_iptables_save(text: str, family: IpFamily, backend: str = "iptables") -> RuleSet:
    """Read what iptables-save prints; of the tables only raw, mangle and nat decide where a packet goes.

    Never raises: what cannot be read is told in ``problems`` or in a rule's ``unknown``.
    """
    if len(text.encode(errors="replace")) > MAX_TEXT_BYTES:
        return RuleSet(backend, family, problems=(f"more than {MAX_TEXT_BYTES} bytes of rules",))
    chains: dict[str, list[Rule]] = {}
    bases: list[Base] = []
    drops: set[str] = set()
    problems: list[str] = []
    table, count = "", 0
    for line in text.splitlines():
        line = line.strip()
        if line.startswith("*"):
            table = line[1:].strip()
        elif line.startswith(":") and table in _TABLE_ORDER and (found := _CHAIN_LINE.match(line)):
            name = f"{table}/{found[1]}"
            chains.setdefault(name, [])
            if found[2] != "-" and (hook := _HOOKS.get(found[1])):
                bases.append(Base(hook, "nat" if table == "nat" else "filter", _TABLE_ORDER[table], name))
                if found[2] == "DROP":
                    drops.add(name)
        elif line.startswith(("-A ", "[")) and table in _TABLE_ORDER:
            count += 1
            if count > MAX_RULES:
                problems.append(f"more than {MAX_RULES} rules")
                break
            chain, rule = parse_rule(line, table, family)
            chains.setdefault(chain, []).append(rule)
        elif line and not line.startswith(("#", "COMMIT", ":", "-A ", "[")):
            problems.append(f"line not understood: {line[:120]!r}")
    return RuleSet(
        backend,
        family,
        {name: tuple(rules) for name, rules in chains.items()},
        tuple(bases),
        frozenset(drops),
        tuple(problems),
    )


def parse_rule(line: str, table: str, family: IpFamily, origin: str = "") -> tuple[str, Rule]:
    """Read one ``-A CHAIN …`` line; the chain it belongs to (``table/CHAIN``) and the rule.

    A rule that cannot be read at all matches every packet with an unknown action.
    """
    everything = Box.everything(family)
    if len(line) > MAX_LINE_BYTES:
        return f"{table}/", Rule(everything, Action.UNKNOWN, line[:120], unknown=("line too long",))
    try:
        words = shlex.split(line, posix=True)
    except ValueError as error:
        return f"{table}/{_word(line, 1)}", Rule(everything, Action.UNKNOWN, line, unknown=(str(error),))
    if words and words[0].startswith("["):
        words = words[1:]
    if len(words) < 2 or words[0] != "-A":
        return f"{table}/", Rule(everything, Action.UNKNOWN, line, unknown=("not a rule",))
    reader = _Reader(words[2:], table, family)
    rule = reader.read()
    return f"{table}/{words[1]}", replace(rule, text=line, origin=origin)


class _Reader:
    """Walks over the words of one rule, narrowing its box."""

    def __init__(self, words: Sequence[str], table: str, family: IpFamily) -> None:
        self.words = list(words)
        self.table, self.family = table, family
        self.box: Box | None = Box.everything(family)
        self.unknown: list[str] = []
        self.negated = False
        self.module = ""
        self.action, self.target, self.port, self.mask = Action.CONTINUE, "", 0, 0xFFFFFFFF
        self.mark: MarkMatch | None = None

    def read(self) -> Rule:
        while self.words:
            word = self.words.pop(0)
            if word == "!":
                self.negated = True
                continue
            handler = _OPTIONS.get(word)
            if handler is None:
                self.unknown.append(word)
            else:
                try:
                    handler(self)
                except (ValueError, IndexError):
                    self.unknown.append(word)
            self.negated = False
        everything = Box.everything(self.family)
        if self.box is None:  # contradicts itself: matches nothing, so it has no effect
            empty = everything._replace(port=IntSet())
            return Rule(empty, Action.CONTINUE, "")
        return Rule(self.box, self.action, "", self.target, self.port, self.mask, self.mark, tuple(self.unknown))

    def value(self) -> str:
        return self.words.pop(0)

    def narrow(self, axis: str, members: IntSet | NameSet) -> None:
        if self.box is None:
            return
        whole = getattr(Box.everything(self.family), axis)
        kept = getattr(self.box, axis) & (whole - members if self.negated else members)
        self.box = self.box._replace(**{axis: kept}) if kept else None

    def never(self) -> None:
        self.box = None

    def truth(self, holds: bool) -> None:
        if holds == self.negated:
            self.never()


def _protocol(reader: _Reader) -> None:
    name = reader.value()
    number = _PROTOCOLS[name] if name in _PROTOCOLS else 0 if name == "all" else int(name, 0)
    if number:
        reader.narrow("protocol", IntSet.of(number))


def _network(axis: str) -> Callable[[_Reader], None]:
    def read(reader: _Reader) -> None:
        network = ip_network(reader.value(), strict=False)
        if IpFamily.of(network) is not reader.family:
            raise ValueError(network)
        reader.narrow(axis, addresses(network))

    return read


def _interface(axis: str) -> Callable[[_Reader], None]:
    def read(reader: _Reader) -> None:
        name = reader.value()
        if name == "+":
            reader.narrow(axis, INTERFACES)
        elif name.endswith("+"):  # a prefix of names: not known which interfaces will have it
            raise ValueError(name)
        else:
            reader.narrow(axis, NameSet.of(name))

    return read


def _ports(reader: _Reader) -> None:
    reader.narrow("port", port_range(reader.value()))
    _only_with_ports(reader)


def _port_list(reader: _Reader) -> None:
    reader.narrow("port", IntSet.of(*(span for item in reader.value().split(",") for span in port_range(item))))
    _only_with_ports(reader)


def _only_with_ports(reader: _Reader) -> None:
    if reader.box is not None and not reader.box.protocol - (TCP | UDP):
        return
    raise ValueError("a port match without tcp or udp")


def _owner(axis: str) -> Callable[[_Reader], None]:
    def read(reader: _Reader) -> None:
        first, _, last = reader.value().partition("-")
        reader.narrow(axis, IntSet.of((int(first, 0), int(last or first, 0))))

    return read


def _state(reader: _Reader) -> None:
    """Only first packets are judged here, so a match is true exactly when it names NEW."""
    reader.truth("NEW" in reader.value().split(","))


def _mark(reader: _Reader) -> None:
    value, _, mask = reader.value().partition("/")
    if reader.module == "connmark":  # a new connection has no mark yet
        reader.truth(int(value, 0) == 0)
        return
    if reader.mark is not None:
        raise ValueError("two marks")
    reader.mark = MarkMatch(int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF, reader.negated)


def _tcp_flags(reader: _Reader) -> None:
    mask, wanted = set(reader.value().split(",")), set(reader.value().split(",")) - {"NONE"}
    reader.truth(({"SYN"} & mask) == wanted)  # the first packet of a flow is a SYN


def _syn(reader: _Reader) -> None:
    reader.truth(True)


def _module(reader: _Reader) -> None:
    reader.module = reader.value()
    if reader.module not in _MODULES:
        raise ValueError(reader.module)


def _skip_value(reader: _Reader) -> None:
    reader.value()


def _jump(reader: _Reader) -> None:
    target = reader.value()
    reader.target = target
    known = _TARGETS.get(target)
    options, reader.words = reader.words, []
    if known is None:
        # extensions are in capitals and take options; chains take none
        reader.action = Action.UNKNOWN if options else Action.JUMP
        reader.target = f"{reader.table}/{target}" if not options else target
        return
    reader.action = known
    values = dict(_pairs(options))
    if known is Action.REDIRECT:
        reader.port = port_number(values["--to-ports"]) if "--to-ports" in values else _redirect_port(values)
    elif known is Action.TPROXY:
        reader.port = port_number(values.get("--on-port", "0"))
    elif known is Action.MARK:
        _read_mark_target(reader, values)
    elif target == "CT" and "--notrack" in options:
        reader.action = Action.UNTRACK


def _redirect_port(values: Mapping[str, str]) -> int:
    return port_number(values["--to-port"]) if "--to-port" in values else 0


def _read_mark_target(reader: _Reader, values: Mapping[str, str]) -> None:
    text = values.get("--set-xmark", values.get("--set-mark", ""))
    value, _, mask = text.partition("/")
    if not text:
        reader.action = Action.UNKNOWN
        return
    reader.port, reader.mask = int(value, 0), int(mask, 0) if mask else 0xFFFFFFFF
    if "--set-mark" in values:  # leaves the bits outside of the mask and sets those of the value
        reader.mask |= reader.port


def _goto(reader: _Reader) -> None:
    reader.action, reader.target = Action.GOTO, f"{reader.table}/{reader.value()}"


def _pairs(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for position, word in enumerate(words):
        if word.startswith("--"):
            following = words[position + 1] if position + 1 < len(words) else ""
            yield word, "" if following.startswith("--") else following


_OPTIONS: Final[Mapping[str, Callable[[_Reader], None]]] = {
    **dict.fromkeys(("-p", "--protocol"), _protocol),
    **dict.fromkeys(("-s", "--source"), _network("source")),
    **dict.fromkeys(("-d", "--destination"), _network("destination")),
    **dict.fromkeys(("-i", "--in-interface"), _interface("input")),
    **dict.fromkeys(("-o", "--out-interface"), _interface("output")),
    **dict.fromkeys(("--dport", "--destination-port"), _ports),
    **dict.fromkeys(("--dports", "--destination-ports"), _port_list),
    **dict.fromkeys(("--ctstate", "--state"), _state),
    **dict.fromkeys(("-j", "--jump"), _jump),
    **dict.fromkeys(("-g", "--goto"), _goto),
    **dict.fromkeys(("-m", "--match"), _module),
    "--uid-owner": _owner("uid"),
    "--gid-owner": _owner("gid"),
    "--mark": _mark,
    "--comment": _skip_value,
    "--tcp-flags": _tcp_flags,
    "--syn": _syn,
}


def _word(line: str, index: int) -> str:
    words = line.split()
    return words[index] if index < len(words) else ""
