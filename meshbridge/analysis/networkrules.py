"""Rules of network policies that decide no flow: read from the compiled maps, never from how the rules are written."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any, Final

from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import Pods, Scene, without_effect
from meshbridge.identity.model import Peer
from meshbridge.policy.model import Anything, Direction, Document, NetworkRule, Origin, PortMatch, Tier, Verdict
from meshbridge.policy.parse.ports import ICMP, ICMPV6, LAST_PORT, PROTOCOLS

_OTHER_PROTOCOL: Final = 47
"""GRE, for rules that speak of every protocol."""

_NOBODY: Final[tuple[list[str], ...]] = ([], ["none"])
_TRIED: Final = 64
"""Flows that are tried before the maps are compiled without a rule."""

Probe = tuple[int, int, int]
"""A peer's number, a protocol, a port."""


def never_matching(scene: Scene) -> Iterator[Finding]:
    """Rules with an empty list of peers, which means nobody."""
    for rule in scene.policies.network:
        document = scene.document(rule.origin)
        if rule.peers != () or document is None or rule.origin.rule == "refused":
            continue
        element = _value(document, rule.origin.rule)
        for name in (name for name, value in element.items() if value in _NOBODY and name.startswith(("from", "to"))):
            text = f"{name} names nobody, so the rule matches nothing"
            yield finding("MB0501", rule.origin, text, fix=f"Delete {name} for anybody, or name some.")


def _value(document: Document, path: str) -> Any:
    """What stands at a path like ``spec.ingress[0]``; an empty mapping where nothing does."""
    value: Any = document.data
    for step in path.replace("[", ".").replace("]", "").split("."):
        if isinstance(value, list) and step.isdigit() and int(step) < len(value):
            value = value[int(step)]
        elif isinstance(value, dict):
            value = value.get(step)
        else:
            return {}
    return value if isinstance(value, dict) else {}


def without_influence(scene: Scene) -> Iterator[Finding]:
    """Allow rules without which no verdict would change, on any pod they select, for any peer that is known.

    The maps compiled with and without the rule are compared on every kind of flow that it matches. In the tiers above
    and below NetworkPolicies the order decides, and a rule may be there for what is to come: these are left out.
    """
    selecting: dict[Origin, list[Pods]] = {}
    written: dict[Origin, list[NetworkRule]] = {}
    for rule in scene.policies.network:
        if rule.verdict is Verdict.ALLOW and rule.tier is Tier.NORMAL and rule.peers != ():
            written.setdefault(rule.origin, []).append(rule)
    for pods in scene.pods:
        for origin in dict.fromkeys(rule.origin for rule in pods.selected.network if rule.origin in written):
            selecting.setdefault(origin, []).append(pods)
    for origin, every in selecting.items():
        if any(rule.http for rule in written[origin]):
            continue  # what it allows, each request decides
        found = _decided_by_others(scene, written[origin], every)
        if found is not None:
            yield found


def _decided_by_others(scene: Scene, rules: list[NetworkRule], selected: list[Pods]) -> Finding | None:
    origin, direction = rules[0].origin, rules[0].direction
    denying: dict[Origin, None] = {}
    allowing: dict[Origin, None] = {}
    for pods in selected:
        reach = scene.reach(pods, direction)
        if not reach.isolates:
            return None  # nothing has to be allowed
        if _decides_alone(scene, rules, pods, direction):
            return None
        others = tuple(without_effect(r) if r.origin == origin else r for r in pods.selected.network)
        without = scene.reach(pods, direction, others)
        for number, protocol, port in _probes(scene, rules, pods, direction):
            decision = without.decide(number, protocol, port).network
            if decision.verdict is not reach.decide(number, protocol, port).network.verdict:
                return None
            (denying if decision.verdict is Verdict.DENY else allowing).update(dict.fromkeys(decision.origins))
    if denying and not allowing:
        text = f"everything it allows is denied by {listed(denying)}"
        return finding("MB0502", origin, text, related=denying)
    if not denying:
        text = f"everything it allows is allowed by {listed(allowing)} too"
        return finding("MB0503", origin, text, related=allowing) if allowing else None
    text = f"part of what it allows is denied by {listed(denying)}, the rest is allowed by {listed(allowing)} too"
    return finding("MB0503", origin, text, related=[*denying, *allowing])


def _decides_alone(scene: Scene, rules: list[NetworkRule], pods: Pods, direction: Direction) -> bool:
    """Whether some flow the rules match is matched by no other rule: without them, default deny has it."""
    others = [r for r in pods.selected.network if r.direction is direction and r.origin != rules[0].origin]
    for number, protocol, port in islice(_probes(scene, rules, pods, direction), _TRIED):
        peer = scene.identities[number]
        if not any(_may_match(rule, peer, protocol, port) for rule in others):
            return True
    return False


def _may_match(rule: NetworkRule, peer: Peer, protocol: int, port: int) -> bool:
    ports = isinstance(rule.ports, Anything) or any(
        match.name or (match.protocol in (0, protocol) and match.first <= port <= match.last) for match in rule.ports
    )
    return ports and (isinstance(rule.peers, Anything) or any(selector.matches(peer) for selector in rule.peers))


def _probes(scene: Scene, rules: list[NetworkRule], pods: Pods, direction: Direction) -> Iterator[Probe]:
    """A flow of every kind that the rules match: each peer, each stretch of ports that no rule of the pods divides."""
    index = scene.compiler.index
    cuts = sorted({cut for rule in pods.selected.network for match in _matches(rule) for cut in _ends(match)})
    for rule in rules:
        numbers = list(scene.identities)
        if not isinstance(rule.peers, Anything):
            mask = 0
            for selector in rule.peers:
                mask |= index.matching(selector)
            numbers = index.numbers(mask)
        for number in numbers:
            ports = pods.pod.ports if direction is Direction.INGRESS else scene.identities[number].ports
            if isinstance(rule.ports, Anything):
                protocols = (*PROTOCOLS.values(), ICMP, ICMPV6, _OTHER_PROTOCOL)
                yield from ((number, protocol, cut) for protocol in protocols for cut in (0, *cuts))
                continue
            for match in rule.ports:
                if match.name:
                    named = (
                        p.port for p in ports if p.name == match.name and PROTOCOLS.get(p.protocol) == match.protocol
                    )
                    yield from ((number, match.protocol, port) for port in named)
                else:
                    inside = (cut for cut in cuts if match.first <= cut <= match.last)
                    for port in dict.fromkeys((match.first, *inside)):
                        yield number, match.protocol, port


def _matches(rule: NetworkRule) -> tuple[PortMatch, ...]:
    return () if isinstance(rule.ports, Anything) else tuple(match for match in rule.ports if not match.name)


def _ends(match: PortMatch) -> tuple[int, ...]:
    return tuple(cut for cut in (match.first, match.last + 1) if cut <= LAST_PORT)
