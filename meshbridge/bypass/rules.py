"""Packet filter rules as they stand in a pod's network namespace, in one form for iptables and nftables.

What a rule says that is not understood is kept as text in ``unknown``: the packets it may match then count as not
captured (walk.py), never as captured.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from meshbridge.bypass.sets import PORTS, Box, IntSet
from meshbridge.identity.model import IpFamily

MAX_TEXT_BYTES: Final = 1 << 20
MAX_RULES: Final = 4096


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


@dataclass(frozen=True, slots=True)
class SeenRules:
    """All rules read in one network namespace; ``problems`` say what could not be read."""

    rule_sets: tuple[RuleSet, ...] = ()
    problems: tuple[str, ...] = ()

    def of(self, family: IpFamily) -> tuple[RuleSet, ...]:
        """The rule sets of one family; what could not be read makes every outcome unknown."""
        own = tuple(rules for rules in self.rule_sets if rules.family is family)
        return (*own, RuleSet("unread", family, problems=self.problems)) if self.problems else own


SERVICE_PORTS: Final[Mapping[str, int]] = {
    "ftp": 21, "ssh": 22, "telnet": 23, "smtp": 25, "domain": 53, "http": 80, "kerberos": 88, "pop3": 110, "ntp": 123,
    "imap2": 143, "ldap": 389, "https": 443, "ldaps": 636, "imaps": 993, "mysql": 3306, "postgresql": 5432,
    "amqp": 5672, "redis": 6379, "http-alt": 8080, "memcached": 11211,
}  # fmt: skip


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
