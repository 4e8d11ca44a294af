"""What default deny takes away: ports that stop working, and what every pod of a mesh needs to stay alive."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from ipaddress import IPv4Address
from typing import Final

from meshbridge.analysis.finding import Finding, finding, listed
from meshbridge.analysis.scene import DNS, HOST, ISTIOD, Pods, Reach, Scene, ports_text
from meshbridge.identity.model import ProxyClass
from meshbridge.policy.capture import HBONE_PORT
from meshbridge.policy.model import Direction, NetworkRule, Origin, Severity, Verdict
from meshbridge.policy.parse.ports import PROTOCOLS

_TCP, _UDP = PROTOCOLS["TCP"], PROTOCOLS["UDP"]
_ISTIOD_PORT, _DNS_PORT, _MERGED_METRICS, _READINESS = 15012, 53, 15020, 15021
_AMBIENT_PROBES: Final = IPv4Address("169.254.7.127")
_NODE_LOCAL_DNS: Final = IPv4Address("169.254.20.10")
_SCRAPE, _MERGE = "prometheus.io/scrape", "prometheus.istio.io/merge-metrics"
_PROMETHEUS: Final = ({"app": "prometheus"}, {"app.kubernetes.io/name": "prometheus"})

Policy = tuple[str, str, str]


def _policy(origin: Origin) -> Policy:
    return (origin.kind, origin.namespace, origin.name)


def _isolating(rules: Iterable[NetworkRule], direction: Direction) -> dict[Policy, Origin]:
    """The policies that switch default deny on, with the first of their rules that does."""
    found: dict[Policy, Origin] = {}
    for rule in rules:
        if rule.direction is direction and rule.default_deny and rule.origin.rule != "refused":
            found.setdefault(_policy(rule.origin), rule.origin)
    return found


def default_deny(scene: Scene) -> Iterator[Finding]:
    """Policies that isolate pods, with the pods and what stops working for them.

    What another policy closes anyway is not laid at the door of any: where two isolate, neither does it alone.
    """
    for direction in Direction:
        taken: dict[Policy, dict[str, bool]] = {}
        origins: dict[Policy, Origin] = {}
        for pods in scene.pods:
            isolating = _isolating(pods.selected.network, direction)
            for policy, origin in isolating.items() if len(isolating) == 1 else ():
                if policy in scene.deny_only[direction]:
                    continue
                others = tuple(rule for rule in pods.selected.network if _policy(rule.origin) != policy)
                lost = _lost(scene, pods, scene.reach(pods, direction, others), direction)
                if lost is not None:
                    origins.setdefault(policy, origin)
                    taken.setdefault(policy, {})[lost[0]] = lost[1]
        for policy, texts in taken.items():
            opens = any(_policy(r.origin) == policy and r.peers != () for r in scene.policies.network)
            severity = None if opens and any(texts.values()) else Severity.INFO
            worst = sorted(texts, key=lambda text: not texts[text])
            text = f"switches default deny on ({direction.name.lower()}): {'; '.join(worst[:3])}"
            more = f"; and {len(worst) - 3} more kinds of pods" if len(worst) > 3 else ""
            yield finding("MB0301", origins[policy], text + more, severity=severity)


def _lost(scene: Scene, pods: Pods, before: Reach, direction: Direction) -> tuple[str, bool] | None:
    """What is gone since ``before``, in words, and whether a port is closed to all that are known."""
    after = scene.reach(pods, direction)
    if direction is Direction.EGRESS:
        gone = _unreachable(scene, pods, before, after)
        return (f"{pods} no longer reaches {listed(gone)}", False) if gone else None
    closed, fewer = [], []
    for (port, protocol), name in scene.declared_ports(pods).items():
        number = PROTOCOLS[protocol]
        reached = before.passing(number, port) & scene.sources - {pods.number}
        kept = after.passing(number, port) & scene.sources - {pods.number}
        if reached - kept and not kept:
            closed.append((port, protocol, name))
        elif reached - kept:
            fewer.append(f"{port}/{protocol} is left to {listed(scene.named(kept))}")
    if not closed and not fewer:
        return None
    parts = [f"{ports_text(closed)} {'stops' if len(closed) == 1 else 'stop'} working"] if closed else []
    return f"of {pods}, {', '.join([*parts, *fewer])}", bool(closed)


def _unreachable(scene: Scene, pods: Pods, before: Reach, after: Reach) -> list[str]:
    """``pod:port`` of what the pods reached before."""
    gone: dict[int, list[tuple[int, str]]] = {}
    for (port, protocol), declaring in scene.declaring.items():
        number = PROTOCOLS[protocol]
        for other in (before.passing(number, port) - after.passing(number, port)) & declaring - {pods.number}:
            gone.setdefault(other, []).append((port, protocol))
    found = []
    for number in sorted(gone):  # numbers are in the order of the pods
        found += [f"{scene.pod_of(number).names[0]}:{port}" for port, _ in sorted(gone[number])]
    return found


def denying_isolates(scene: Scene) -> Iterator[Finding]:
    """Policies that only deny, and by that alone isolate: nothing else does."""
    for direction in Direction:
        concerned: dict[Policy, list[Pods]] = {}
        origins: dict[Policy, Origin] = {}
        for pods in scene.pods:
            for policy, origin in _isolating(pods.selected.network, direction).items():
                if policy not in scene.deny_only[direction]:
                    continue
                relaxed = tuple(
                    replace(rule, default_deny=False) if _policy(rule.origin) == policy else rule
                    for rule in pods.selected.network
                )
                if not scene.reach(pods, direction, relaxed).isolates:
                    origins.setdefault(policy, origin)
                    concerned.setdefault(policy, []).append(pods)
        for policy, every in concerned.items():
            name = direction.name.lower()
            text = (
                f"has deny rules only, and switches default deny on ({name}) for {listed(every)} all the same: what no "
            )
            text += "other rule allows is dropped"
            fix = f"Set enableDefaultDeny: {{{name}: false}}, or add a rule that allows the rest."
            yield finding("MB0302", origins[policy], text, fix=fix)


def without_istiod(scene: Scene) -> Iterator[Finding]:
    """Sidecars whose egress isolation keeps them from istiod."""
    servers, known = scene.servers(ISTIOD)
    cut: dict[Origin, list[Pods]] = {}
    for pods in scene.pods:
        reach = scene.reach(pods, Direction.EGRESS)
        if pods.pod.proxy is not ProxyClass.SIDECAR or not reach.isolates or pods.number in servers:
            continue
        if not any(reach.passes(number, _TCP, _ISTIOD_PORT) for number in servers):
            for origin in _isolating(pods.selected.network, Direction.EGRESS).values():
                cut.setdefault(origin, []).append(pods)
    for origin, every in cut.items():
        text = f"keeps {listed(every)} from istiod (TCP {_ISTIOD_PORT}){'' if known else _assumed(ISTIOD)}"
        yield finding("MB0303", origin, text, severity=None if known else Severity.WARNING)


def without_dns(scene: Scene) -> Iterator[Finding]:
    """Pods whose egress isolation keeps them from DNS; only told of those that may reach nothing else either."""
    servers, known = scene.servers(DNS)
    resolvers = (*servers, scene.at_address(_NODE_LOCAL_DNS), HOST)
    cut: dict[Origin, list[Pods]] = {}
    silent: set[Pods] = set()
    for pods in scene.pods:
        reach = scene.reach(pods, Direction.EGRESS)
        if not reach.isolates or pods.number in servers:
            continue
        if any(reach.passes(number, _UDP, _DNS_PORT) for number in resolvers):
            continue
        if all(entry.verdict is Verdict.DENY for entry in reach.map.entries.values()):
            silent.add(pods)
        for origin in _isolating(pods.selected.network, Direction.EGRESS).values():
            cut.setdefault(origin, []).append(pods)
    for origin, every in cut.items():
        text = f"keeps {listed(every)} from DNS (UDP {_DNS_PORT}){'' if known else _assumed(DNS)}"
        if silent.issuperset(every):
            yield finding("MB0304", origin, f"{text}; nothing else may be reached either", severity=Severity.INFO)
        else:
            yield finding("MB0304", origin, text)


def _assumed(labels: Mapping[str, str]) -> str:
    return f", taken to be the pods with {' and '.join(f'{key}={value}' for key, value in labels.items())}"


def tunnels(scene: Scene) -> Iterator[Finding]:
    """Ambient pods whose ports are open to each other, but not the tunnel that carries them."""
    ambient = {pods.number: pods for pods in scene.pods if pods.pod.proxy is ProxyClass.AMBIENT}
    for direction in Direction:
        blocked: dict[Origin, dict[str, None]] = {}
        for pods in ambient.values():
            reach = scene.reach(pods, direction)
            if not reach.isolates:
                continue
            for other in ambient.values():
                server = pods if direction is Direction.INGRESS else other
                ports = [port for port, protocol in scene.declared_ports(server) if protocol == "TCP"]
                opened = [port for port in ports if reach.passes(other.number, _TCP, port)]
                if other is pods or not opened or reach.passes(other.number, _TCP, HBONE_PORT):
                    continue
                client = other if direction is Direction.INGRESS else pods
                for origin in reach.decide(other.number, _TCP, opened[0]).network.origins:
                    blocked.setdefault(origin, {})[f"{client.names[0]} to {server.names[0]}:{opened[0]}"] = None
        for origin, flows in blocked.items():
            text = f"opens {listed(flows)}, which travels to port {HBONE_PORT}, and that is closed"
            yield finding("MB0305", origin, text)


def probes(scene: Scene) -> Iterator[Finding]:
    """Pods that kubelet can no longer probe."""
    for pods in scene.pods:
        ports = scene.probe_ports(pods)
        reach = scene.reach(pods, Direction.INGRESS)
        if not ports or (not reach.map.entries and not reach.isolates):
            continue
        if pods.pod.proxy is ProxyClass.AMBIENT and reach.isolates:
            prober = scene.at_address(_AMBIENT_PROBES)
            shut = sorted(port for port in ports if not reach.passes(prober, _TCP, port))
            for origin in list(_isolating(pods.selected.network, Direction.INGRESS).values()) if shut else ():
                text = f"keeps kubelet's probes ({_AMBIENT_PROBES}) from {pods}, ports {listed(shut)}"
                yield finding("MB0306", origin, text, related=[scene.origin_of(pods)])
        rewritten = {_MERGED_METRICS, _READINESS} if pods.pod.proxy is ProxyClass.SIDECAR else set()
        denied: dict[Origin, set[int]] = {}
        for port in ports | rewritten:
            decision = reach.decide(HOST, _TCP, port, localhost=True).network
            if decision.verdict is Verdict.DENY:
                for origin in decision.origins:
                    denied.setdefault(origin, set()).add(port)
        for origin, refused in denied.items():
            text = f"denies {pods} its own node on {listed(sorted(refused))}, where kubelet probes it"
            yield finding("MB0307", origin, text, related=[scene.origin_of(pods)])


def scrapes(scene: Scene) -> Iterator[Finding]:
    """Pods that ask to be scraped, and whose merged metrics Prometheus may not reach."""
    scrapers = [p for p in scene.pods if any(labels.items() <= p.pod.labels.items() for labels in _PROMETHEUS)]
    for pods in scene.pods:
        asked = pods.pod.annotations.get(_SCRAPE) == "true" and pods.pod.annotations.get(_MERGE) != "false"
        reach = scene.reach(pods, Direction.INGRESS)
        if not asked or pods.pod.proxy is not ProxyClass.SIDECAR or not reach.isolates:
            continue
        kept_out = [p for p in scrapers if p is not pods and not reach.passes(p.number, _TCP, _MERGED_METRICS)]
        for origin in list(_isolating(pods.selected.network, Direction.INGRESS).values()) if kept_out else ():
            text = f"keeps {listed(kept_out)} from port {_MERGED_METRICS} of {pods}, where its metrics are merged"
            yield finding("MB0308", origin, text, related=[scene.origin_of(pods)])
