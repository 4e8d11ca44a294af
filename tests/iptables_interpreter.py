"""A slow, literal reader of iptables rules: one packet, rule by rule, first match decides; no code of bypass in it.

Only what Istio's rules use; an option it does not know is an error, so that nothing is passed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import ip_address, ip_network


@dataclass(frozen=True)
class Packet:
    """The first packet of a flow; ``state`` is always NEW, the mark is 0 when it starts."""

    protocol: str = "tcp"
    source: str = "10.0.0.9"
    destination: str = "10.0.0.1"
    port: int = 80
    input: str = ""
    output: str = ""
    uid: int = 1000
    gid: int = 1000


def outcome(text: str, hook: str, packet: Packet) -> tuple[str, int]:
    """What iptables-restore input does with a packet: ("redirect" | "tproxy" | "pass" | "drop", port)."""
    tables: dict[str, dict[str, list[list[str]]]] = {}
    table = ""
    for line in text.splitlines():
        if line.startswith("*"):
            table = line[1:]
            tables[table] = {}
        elif line.startswith("-A"):
            words = line.split()
            tables[table].setdefault(words[1], []).append(words[2:])
    mark = 0
    for table in ("mangle", "nat"):
        verdict, mark = _chain(tables.get(table, {}), hook, packet, mark)
        if verdict is not None and verdict[0] in ("redirect", "tproxy", "drop"):
            return verdict
    return ("pass", 0)


def _chain(
    chains: dict[str, list[list[str]]], name: str, packet: Packet, mark: int
) -> tuple[tuple[str, int] | None, int]:
    for words in chains.get(name, []):
        options = list(words)
        target = options[options.index("-j") + 1 :]
        if not _matches(options[: options.index("-j")], packet, mark):
            continue
        if target[0] == "RETURN":
            return None, mark
        if target[0] == "ACCEPT":
            return ("accept", 0), mark
        if target[0] == "DROP":
            return ("drop", 0), mark
        if target[0] == "REDIRECT":
            return ("redirect", int(target[target.index("--to-ports") + 1])), mark
        if target[0] == "TPROXY":
            return ("tproxy", int(target[target.index("--on-port") + 1])), mark
        if target[0] == "MARK":
            mark = int(target[2])
            continue
        if target[0] == "CONNMARK":
            mark = 0 if "--restore-mark" in target else mark
            continue
        verdict, mark = _chain(chains, target[0], packet, mark)
        if verdict is not None:
            return verdict, mark
    return None, mark


def _matches(words: list[str], packet: Packet, mark: int) -> bool:
    negated, module = False, ""
    while words:
        word = words.pop(0)
        if word == "!":
            negated = True
            continue
        value = words.pop(0)
        if word == "-m":
            module = value
            continue
        if word == "-p":
            holds = packet.protocol == value
        elif word == "-s":
            holds = ip_address(packet.source) in ip_network(value, strict=False)
        elif word == "-d":
            holds = ip_address(packet.destination) in ip_network(value, strict=False)
        elif word == "-i":
            holds = packet.input == value
        elif word == "-o":
            holds = packet.output == value
        elif word == "--dport":
            holds = packet.protocol in ("tcp", "udp") and _in_range(packet.port, value)
        elif word == "--dports":
            holds = packet.protocol in ("tcp", "udp") and any(_in_range(packet.port, item) for item in value.split(","))
        elif word == "--uid-owner":
            holds = packet.uid == int(value)
        elif word == "--gid-owner":
            holds = packet.gid == int(value)
        elif word == "--ctstate":
            holds = "NEW" in value.split(",")
        elif word == "--mark":
            holds = (0 if module == "connmark" else mark) == int(value, 0)
        else:
            raise AssertionError(f"unknown option {word}")
        if holds == negated:
            return False
        negated = False
    return True


def _in_range(port: int, text: str) -> bool:
    first, _, last = text.partition(":")
    return _number(first or "0") <= port <= _number(last or (first if ":" not in text else "65535"))


def _number(text: str) -> int:
    if text.startswith("0x"):
        return int(text, 16)
    return int(text, 8) if text.startswith("0") and len(text) > 1 else int(text)
