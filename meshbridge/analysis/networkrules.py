"""Rules of network policies that decide no flow: read from the compiled maps, never from how the rules are written."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, Final

from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import Pods, Reach, Scene
from meshbridge.policy.model import Anything, Direction, Document, NetworkRule, Origin, Tier, Verdict
from meshbridge.policy.parse.ports import ICMP, ICMPV6, PROTOCOLS

_OTHER_PROTOCOL: Final = 47
"""GRE, for rules that speak of every protocol."""

_NOBODY: Final[tuple[list[str], ...]] = ([], ["none"])
_TRIED: Final = 64
"""Flows that are tried before the maps are compiled without a rule."""

Probe = tuple[int, int, int]
"""A peer's number, a protocol, a port."""

Masked = tuple[int, NetworkRule]
"""A rule behind the mask of its peers."""


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
    mask = 0
    for rule in rules:
        mask |= scene.peers_of(rule)
    for pods in selected:
        reach = scene.reach(pods, direction)
        if not reach.isolates:
            return None  # nothing has to be allowed
        near = [one for one in scene.rules_on(pods, direction) if one[0] & mask and one[1].origin != origin]
        if _decides_alone(scene, rules, near, pods, direction):
            return None
        without: Reach | None = None
        seen: set[tuple[int, Verdict]] = set()  # entries that say the same have the same origins, as one object
        for number, protocol, port in _probes(scene, rules, pods, direction):
            now = reach.decide(number, protocol, port).network
            verdict, origins = now.verdict, now.origins
            if (id(origins), verdict) in seen:
                continue
            if now.key is not None and origin in origins:
                origins = tuple(other for other in origins if other != origin)
            if not origins and origin in now.origins:  # no other rule is in the entry that decides
                if without is None:
                    without = _without(scene, near, pods, direction)
                decision = without.decide(number, protocol, port).network
                verdict, origins = decision.verdict, decision.origins
            else:
                seen.add((id(now.origins), now.verdict))
            if verdict is not now.verdict:
                return None
            (denying if verdict is Verdict.DENY else allowing).update(dict.fromkeys(origins))
    if denying and not allowing:
        text = f"everything it allows is denied by {listed(denying)}"
        return finding("MB0502", origin, text, related=denying)
    if not denying:
        text = f"everything it allows is allowed by {listed(allowing)} too"
        return finding("MB0503", origin, text, related=allowing) if allowing else None
    text = f"part of what it allows is denied by {listed(denying)}, the rest is allowed by {listed(allowing)} too"
    return finding("MB0503", origin, text, related=[*denying, *allowing])


def _without(scene: Scene, near: list[Masked], pods: Pods, direction: Direction) -> Reach:
    """What is left to ``near``; all other rules are about other peers: they isolate, and decide none of these flows."""
    kept = {id(rule) for _, rule in near}
    others = tuple(rule if id(rule) in kept else scene.emptied(rule) for rule in pods.selected.network)
    return scene.reach(pods, direction, others)


def _decides_alone(
    scene: Scene, rules: list[NetworkRule], near: list[Masked], pods: Pods, direction: Direction
) -> bool:
    """Whether some flow the rules match is matched by no other rule: without them, default deny has it.

    Args:
        near: those of the others that are about one of their peers.
    """
    for number, protocol, port in islice(_probes(scene, rules, pods, direction), _TRIED):
        peer = scene.bits[number]
        if not any(mask & peer and _may_match_port(rule, protocol, port) for mask, rule in near):
            return True
    return False


def _may_match_port(rule: NetworkRule, protocol: int, port: int) -> bool:
    return isinstance(rule.ports, Anything) or any(
        match.name or (match.protocol in (0, protocol) and match.first <= port <= match.last) for match in rule.ports
    )


def _probes(scene: Scene, rules: list[NetworkRule], pods: Pods, direction: Direction) -> Iterator[Probe]:
    """A flow of every kind that the rules match: each peer, each stretch of ports that no rule of the pods divides."""
    cuts = scene.cuts_of(pods)
    for rule in rules:
        numbers: Iterable[int] = scene.identities
        if not isinstance(rule.peers, Anything):
            numbers = scene.compiler.index.numbers(scene.peers_of(rule))
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
                    inside = cuts[bisect_left(cuts, match.first) : bisect_right(cuts, match.last)]
                    for port in dict.fromkeys((match.first, *inside)):
                        yield number, match.protocol, port
