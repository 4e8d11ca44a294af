"""Packet filter rules as they stand in a pod's network namespace, in one form for iptables and nftables.

What a rule says that is not understood here is kept as text in ``unknown``: the packets it may match then count as not
captured (walk.py), never as captured.

Spec: iptables-save(8), iptables-extensions(8).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from ipaddress import ip_network
from typing import Final

from meshbridge.bypass.sets import INTERFACES, PORTS, TCP, UDP, Box, IntSet, NameSet, addresses
from meshbridge.identity.model import IpFamily

MAX_TEXT_BYTES: Final = 1 << 20
MAX_RULES: Final = 4096
MAX_LINE_BYTES: Final = 4096


class Hook(StrEnum):
    """Where redirection can happen: on what arrives at the pod, and on what the pod sends."""

    PREROUTING = "prerouting"
    OUTPUT = "output"


class Action(StrEnum):
    """What a rule does with a packet that it matches."""

    JUMP = "jump"
    GOTO = "goto"
    RETURN = "return"
    ACCEPT = "accept"
    DROP = "drop"
    REDIRECT = "redirect"  # to a port of this host; ``port`` 0 is the packet's own
    TPROXY = "tproxy"
    DIVERT = "divert"  # DNAT and the like: neither Envoy nor the addressed port gets it for certain
    UNTRACK = "untrack"  # no nat rule applies to it any more
    MARK = "mark"
    CONTINUE = "continue"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class MarkMatch:
    """A condition on the packet's mark, which is a known number at every step and so no part of the box."""

    value: int
    mask: int = 0xFFFFFFFF
    negated: bool = False

    def holds(self, mark: int) -> bool:
        return (mark & self.mask == self.value) != self.negated


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule: the packets it matches at most, what it does, and its text for people.

    ``origin`` says which setting wrote it, where that is known. ``port`` is the port of the action; MARK sets the bits
    ``mask`` to those of ``port``.
    """

    match: Box
    action: Action
    text: str
    target: str = ""
    port: int = 0
    mask: int = 0xFFFFFFFF
    mark: MarkMatch | None = None
    unknown: tuple[str, ...] = ()
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Base:
    """A chain the kernel enters by itself: its hook, its kind (``nat`` or ``filter``), and its order in the hook."""

    hook: Hook
    kind: str
    priority: int
    chain: str


@dataclass(frozen=True, slots=True)
class RuleSet:
    """The rules of one backend (legacy iptables, nft iptables, native nftables) for one address family."""

    backend: str
    family: IpFamily
    chains: Mapping[str, tuple[Rule, ...]] = field(default_factory=dict, hash=False)
    bases: tuple[Base, ...] = ()
    drops: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        return not any(self.chains.values()) and not self.problems


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
SERVICE_PORTS: Final[Mapping[str, int]] = {
    "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "domain": 53, "http": 80, "kerberos": 88, "pop3": 110, "ntp": 123,
    "imap2": 143, "ldap": 389, "https": 443, "ldaps": 636, "imaps": 993, "mysql": 3306, "postgresql": 5432,
    "amqp": 5672, "redis": 6379, "http-alt": 8080, "memcached": 11211,
}  # fmt: skip
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
            empty = replace(everything, port=IntSet())
            return Rule(empty, Action.CONTINUE, "")
        return Rule(self.box, self.action, "", self.target, self.port, self.mask, self.mark, tuple(self.unknown))

    def value(self) -> str:
        return self.words.pop(0)

    def narrow(self, axis: str, members: IntSet | NameSet) -> None:
        if self.box is None:
            return
        whole = getattr(Box.everything(self.family), axis)
        kept = getattr(self.box, axis) & (whole - members if self.negated else members)
        self.box = replace(self.box, **{axis: kept}) if kept else None

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


def port_range(text: str) -> IntSet:
    """``80``, ``0x50``, ``0120`` (octal: 80), ``80:90``, ``:90``, ``80:``: numbers as iptables reads them."""
    first, colon, last = text.partition(":")
    if not colon:
        return IntSet.of(port_number(first))
    return IntSet.of((port_number(first) if first else 0, port_number(last) if last else 65535)) & PORTS


def port_number(text: str) -> int:
    """A port as iptables reads it (strtoul, base 0): a leading zero makes it octal.

    Raises:
        ValueError: iptables refuses it, or it is a service name whose number depends on a file in the container.
    """
    digits = text.lstrip(" \t")
    if digits in SERVICE_PORTS:
        return SERVICE_PORTS[digits]
    number = int(digits, 8) if re.fullmatch(r"0[0-7]+", digits) else int(digits, 0) if digits.isascii() else -1
    if digits.startswith(("-", "+")) or "_" in digits or not 0 <= number <= 65535 or digits[:2].lower() in ("0b", "0o"):
        raise ValueError(text)
    return number


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


@dataclass(frozen=True, slots=True)
class SeenRules:
    """All rules read in one network namespace; ``problems`` say what could not be read."""

    rule_sets: tuple[RuleSet, ...] = ()
    problems: tuple[str, ...] = ()

    def of(self, family: IpFamily) -> tuple[RuleSet, ...]:
        """The rule sets of one family; what could not be read makes every outcome unknown."""
        own = tuple(rules for rules in self.rule_sets if rules.family is family)
        return (*own, RuleSet("unread", family, problems=self.problems)) if self.problems else own
