"""Step k: annotations that say one thing and do another. Each is named, and what the rules do is what is enforced."""

from __future__ import annotations

from meshbridge.demo import lifecycle
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk import scraping
from meshbridge.demo.walk.context import Walk, rules_text
from meshbridge.demo.walk.rules import extra_rule
from meshbridge.demo.walk.scraping import CONTRADICTORY, METRICS_PATH, METRICS_PORT, NEIGHBOUR, OCTAL
from meshbridge.demo.walk.sources import Round, Source, call_all, wait_event
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.policy.precedence import DropReason

LETTER = "k"
TITLE = "Annotations that are not what happens"
ABOUT = (
    "finance/contradictory excludes 8080 by annotation, but came with an istio-init that was rendered without it.\n"
    "finance/octal excludes `0120`, which iptables takes for 80, and 9999, which nobody declares. Then a rule changes."
)
STRANGER = Source("marketing/client", "no policy lets it in")
SCRAPER = Source(NEIGHBOUR, "let in; its outbound 8080 is excluded")
OCTAL_MEANT, OCTAL_DONE, UNKNOWN = 120, 80, 9999
_RULES_READ_S = 8.0
_TIMEOUT_S = 1.5


def run(walk: Walk) -> None:
    scraping.bring(walk, exclusions=True)
    scraping.set_targets([])
    lifecycle.STORE.apply(scraping.MISLEADING)
    lifecycle.wait_pods(walk.report.say)
    _contradiction(walk)
    _octal_and_unknown(walk)
    _rules_change(walk)


def _contradiction(walk: Walk) -> None:
    _named(walk, CONTRADICTORY, "arguments-contradict-annotations", "8080", "annotation against istio-init's arguments")
    _judged_by_envoy(
        walk, CONTRADICTORY, METRICS_PORT, "contradictory: 8080 goes to Envoy, as the arguments and the rules have it"
    )


def _octal_and_unknown(walk: Walk) -> None:
    _named(walk, OCTAL, "octal-port", f"port {OCTAL_DONE}", "the octal port")
    _named(walk, OCTAL, "unknown-port", str(UNKNOWN), "the port that no container declares")
    _judged_by_envoy(walk, OCTAL, OCTAL_MEANT, f"octal: {OCTAL_MEANT}, which was meant, goes to Envoy")
    for port, what in ((OCTAL_DONE, "which iptables made of 0120"), (UNKNOWN, "which nobody declares")):
        made, drop = _knock(walk, STRANGER, OCTAL, port, FlowKind.DROP)
        walk.report.check(
            f"octal: on {port}, {what}, the kernel stands in",
            _compensated(drop) and not made.packets[OCTAL] and not made.unseen,
            f"{made.calls[0].outcome}, {made.packets[OCTAL]} packets in the pod; {_dropped(drop)}",
            f"{STRANGER.name}'s request over both families, packet socket on the pod's eth0, the agents' events",
        )


def _rules_change(walk: Walk) -> None:
    """Somebody's rule takes 8080 out of a running pod's capture, which no specification says."""
    record = walk.pod(CONTRADICTORY)
    rule = ["PREROUTING", "-p", "tcp", "--dport", str(METRICS_PORT), "-j", "RETURN"]
    walk.report.say(f"in {CONTRADICTORY}'s namespace: iptables -t nat -I {' '.join(rule)}")
    with extra_rule(record, *rule):
        excluded = poll(
            lambda: _knock(walk, STRANGER, CONTRADICTORY, METRICS_PORT, FlowKind.DROP, wait=False)[1], _RULES_READ_S
        )
        made, drop = _knock(walk, STRANGER, CONTRADICTORY, METRICS_PORT, FlowKind.DROP)
        walk.report.check(
            "a rule in the pod takes 8080 out of the capture: the kernel stands in",
            excluded is not None and _compensated(drop) and not made.packets[CONTRADICTORY],
            f"{made.calls[0].outcome}, {made.packets[CONTRADICTORY]} packets in the pod; {_dropped(drop)}",
            f"{STRANGER.name}'s request over both families, packet socket on the pod's eth0, the agents' events",
        )
        into = call_all(walk, (SCRAPER,), (CONTRADICTORY,), METRICS_PORT, METRICS_PATH)
        arrived = sum(into.requests(call) for call in into.calls)
        walk.report.check(
            "and lets in whom Envoy would have let in",
            arrived == len(into.calls) and not into.envoy_connections(CONTRADICTORY),
            f"{into.calls[0].outcome}, {arrived} requests at the application, "
            f"{into.envoy_connections(CONTRADICTORY)} connections at Envoy",
            f"{SCRAPER.name}'s request over both families, counters of the application and of Envoy",
        )
        _named(walk, CONTRADICTORY, "rules-missing", "8080", "the rules against the specification")
    back = poll(
        lambda: _round(walk, STRANGER, CONTRADICTORY, METRICS_PORT).calls[0].outcome.status == 403, _RULES_READ_S
    )
    walk.report.check(
        "the rule is gone: Envoy judges again",
        back,
        "403" if back else "no answer of Envoy",
        f"{STRANGER.name}'s request",
    )


def _named(walk: Walk, pod: str, code: str, quoted: str, what: str) -> None:
    argv = ("bypass", "show", pod, "--node", walk.pod(pod).node)
    told = [line for line in walk.output(*argv).lines if code in line and quoted in line]
    walk.quote(argv, told)
    walk.report.check(f"{what}: named", bool(told), code if told else "not named", "the command above")


def _judged_by_envoy(walk: Walk, pod: str, port: int, claim: str) -> None:
    made, flow = _knock(walk, STRANGER, pod, port, FlowKind.VERDICT)
    walk.report.check(
        claim,
        all(call.outcome.status == 403 for call in made.calls)
        and made.envoy_connections(pod) >= len(made.calls)
        and made.bytes_at(pod) == 0,
        f"{made.calls[0].outcome}, {made.envoy_connections(pod)} connections at Envoy, {made.bytes_at(pod)} bytes at "
        f"the application; the kernel says {flow.verdict if flow else 'nothing'}",
        f"{STRANGER.name}'s request over both families, counters of Envoy and of the application",
    )


def _knock(
    walk: Walk, source: Source, pod: str, port: int, kind: FlowKind, *, wait: bool = True
) -> tuple[Round, Flow | None]:
    made = _round(walk, source, pod, port)
    return made, wait_event(walk, made.since_ns, kind, source, pod, port, timeout_s=3.0 if wait else 0.0)


def _round(walk: Walk, source: Source, pod: str, port: int) -> Round:
    return call_all(walk, (source,), (pod,), port, METRICS_PATH, timeout_s=_TIMEOUT_S)


def _compensated(drop: Flow | None) -> bool:
    return drop is not None and drop.reason == DropReason.COMPENSATION


def _dropped(drop: Flow | None) -> str:
    return f"dropped on {drop.node}, {rules_text(drop)}" if drop else "no drop event"
