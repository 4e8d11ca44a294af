"""Step l: a bypass is planned, refused, accepted, compensated; then one comes that nobody planned, and goes again."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from meshbridge.demo import lifecycle
from meshbridge.demo.layout import KUBELET, MANIFESTS, SAMPLE_MANIFESTS
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk import scraping
from meshbridge.demo.walk.context import Output, Walk, rules_text
from meshbridge.demo.walk.rules import extra_rule
from meshbridge.demo.walk.scraping import API_PORT, METRICS_PATH, METRICS_PORT, NEIGHBOUR
from meshbridge.demo.walk.sources import Round, Source, call_all, wait_event
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.policy.precedence import DropReason

LETTER = "l"
TITLE = "A bypass that was decided on, and one that was not"
ABOUT = (
    "finance/reports is to leave port 8080 out of its sidecar. A BypassPolicy accepts no loss: the plan says so, and\n"
    "the pod is refused. Then the loss is accepted, with an end and a reason, the kernel stands in, and the node's\n"
    "agent proves it by probes. Last, somebody's rule takes port 9000 past Envoy, which no annotation says: a ghost\n"
    "bypass."
)
REPORTS = "finance/reports"
POLICIES = SAMPLE_MANIFESTS / "bypass"
GUARD, ACCEPTED, POD = (POLICIES / name for name in ("guard.yaml", "accepted.yaml", "reports.yaml"))
SCRAPER = Source(NEIGHBOUR, "in monitoring, which the policy lets in on 8080")
STRANGER = Source("marketing/client", "no policy lets it in")
COLLEAGUE = Source("finance/client", "in finance, which the policy lets in on 9000")
NOT_ACCEPTED = 4
GHOST_FOUND_S = 10.0
PROVED_S = 10.0
_PROVED = f"compensation-proved: pod {REPORTS}"
_TIMEOUT_S = 1.5
_MONITOR = ("monitor", "--type", "agent", "--no-follow")


def run(walk: Walk) -> None:
    scraping.bring(walk, exclusions=True)
    scraping.set_targets([])
    _refused(walk)
    _accepted(walk)
    _ghost(walk)
    lifecycle.STORE.delete(POD)
    lifecycle.STORE.delete(ACCEPTED)
    lifecycle.wait_pods(walk.report.say)


def _refused(walk: Walk) -> None:
    lifecycle.STORE.apply(GUARD)
    plan = _plan(walk, POD)
    walk.report.check(
        "the plan: what would be lost, that nobody accepts it, and that the pod is refused",
        plan.code == NOT_ACCEPTED and any("refused at admission: loses encryption" in line for line in plan.lines),
        f"exit code {plan.code}",
        "the command above",
    )
    argv = ("demo", "apply", "-f", str(POD))
    said = walk.output(*argv)
    walk.quote(argv, said.lines)
    walk.report.check(
        "applied all the same: refused, and nothing of the file is in force",
        said.code == 1 and any("denied the request" in line for line in said.lines) and not _known(),
        f"exit code {said.code}",
        "the command above, the manifests in force",
    )


def _accepted(walk: Walk) -> None:
    lifecycle.STORE.apply(ACCEPTED)
    plan = _plan(walk, POD)
    walk.report.check(
        "accepted: the plan has nothing to object to",
        plan.code == 0 and any("accepted by reports" in line for line in plan.lines),
        f"exit code {plan.code}",
        "the command above",
    )
    argv = ("demo", "apply", "-f", str(POD))
    said = walk.output(*argv)
    walk.quote(argv, said.lines)
    made, drop = _knock(walk, STRANGER, METRICS_PORT, FlowKind.DROP)
    walk.report.check(
        "compensated: who has no business there is dropped by the kernel",
        said.code == 0 and _compensated(drop) and not made.packets[REPORTS] and not made.unseen,
        f"{made.calls[0].outcome}, {made.packets[REPORTS]} packets in the pod; {_dropped(drop)}",
        f"{STRANGER.name}'s request over both families, packet socket on the pod's eth0, the agents' events",
    )
    into = call_all(walk, (SCRAPER,), (REPORTS,), METRICS_PORT, METRICS_PATH)
    arrived = sum(into.requests(call) for call in into.calls)
    walk.report.check(
        "and who has is let in, past Envoy",
        arrived == len(into.calls) and not into.envoy_connections(REPORTS),
        f"{into.calls[0].outcome}, {arrived} requests at the application, "
        f"{into.envoy_connections(REPORTS)} connections at Envoy",
        f"{SCRAPER.name}'s request over both families, counters of the application and of Envoy",
    )
    _proved(walk)
    walk.command("bypass", "show", REPORTS, "--node", walk.pod(REPORTS).node)


def _proved(walk: Walk) -> None:
    poll(lambda: _condition(walk, "Enforced").get("status"), PROVED_S)
    condition = _condition(walk, "Enforced")
    told = [line for line in walk.output(*_MONITOR, "--node", walk.pod(REPORTS).node).lines if _PROVED in line]
    walk.quote(_MONITOR, told[-1:])
    walk.report.check(
        "proved by the agent's probes: who is let in arrives in the pod, who is not does not",
        condition.get("status") is True and condition.get("reason") == "Proved" and bool(told),
        f"Enforced {condition.get('status')}: {condition.get('message', 'no condition')}",
        "packet socket in the pod's namespace, the datapath's events and counters; endpoint list -o json",
    )


def _ghost(walk: Walk) -> None:
    record = walk.pod(REPORTS)
    rule = ("PREROUTING", "-p", "tcp", "--dport", str(API_PORT), "-j", "RETURN")
    walk.report.say(f"in {REPORTS}'s namespace: iptables -t nat -I {' '.join(rule)}")
    with extra_rule(record, *rule):
        began = time.monotonic()
        found = poll(lambda: _named(walk), GHOST_FOUND_S)
        took = time.monotonic() - began
        walk.quote(("bypass", "show", REPORTS), found or [])
        walk.report.check(
            "a ghost bypass: found although nothing of the pod changed",
            bool(found) and took <= GHOST_FOUND_S,
            f"after {took:.1f} s" if found else "not found",
            "bypass show, asked until it names 9000",
        )
        told, condition = poll(lambda: _told(walk, "ghost-bypass-found"), GHOST_FOUND_S), _condition(walk, "Captured")
        walk.quote(_MONITOR, told)
        walk.report.check(
            "told: an event of the agent, and a condition of the endpoint",
            bool(told) and condition.get("reason") == "GhostBypass" and f"TCP {API_PORT}" in condition["message"],
            f"{len(told)} events; {condition.get('message', 'no condition')}",
            "the command above, endpoint list -o json",
        )
        made, drop = _knock(walk, STRANGER, API_PORT, FlowKind.DROP)
        walk.report.check(
            "and compensated at once: the kernel stands in on 9000",
            _compensated(drop) and not made.packets[REPORTS] and not made.unseen,
            f"{made.calls[0].outcome}, {made.packets[REPORTS]} packets in the pod; {_dropped(drop)}",
            f"{STRANGER.name}'s request over both families, packet socket on the pod's eth0, the agents' events",
        )
    back = poll(lambda: _round(walk, STRANGER, API_PORT).calls[0].outcome.status == 403, GHOST_FOUND_S)
    served = _round(walk, COLLEAGUE, API_PORT)
    walk.report.check(
        "the rule is gone: Envoy judges 9000 again, both ways",
        back and all(call.outcome.status == 200 for call in served.calls),
        f"{STRANGER.name} {'403' if back else 'no answer of Envoy'}, {COLLEAGUE.name} {served.calls[0].outcome}",
        "their requests over both families",
    )
    gone = poll(lambda: _told(walk, "ghost-bypass-gone"), GHOST_FOUND_S)
    walk.quote(_MONITOR, gone)
    walk.report.check(
        "and that it is gone is told as well",
        bool(gone) and not _condition(walk, "Captured"),
        f"{len(gone)} events; {_condition(walk, 'Captured').get('message', 'no condition')}",
        "the command above, endpoint list -o json",
    )


def _plan(walk: Walk, file: Path) -> Output:
    argv = ("bypass", "plan", "-f", str(file), "--with", str(MANIFESTS), "--with", str(KUBELET))
    said = walk.output(*argv)
    walk.quote(argv, said.lines)
    return said


def _known() -> bool:
    return any(item.get("metadata", {}).get("name") == "reports" and item.get("kind") == "Pod"
               for item in lifecycle.STORE.objects())  # fmt: skip


def _told(walk: Walk, name: str) -> list[str]:
    lines = walk.output(*_MONITOR, "--node", walk.pod(REPORTS).node).lines
    return [line for line in lines if f"{name}: pod {REPORTS}" in line and f"ports {API_PORT}" in line]


def _condition(walk: Walk, kind: str) -> dict[str, Any]:
    """A condition of the pod's endpoint; empty where there is nothing to say."""
    said = walk.output("endpoint", "list", "-o", "json", "--node", walk.pod(REPORTS).node)
    endpoints = json.loads("\n".join(said.lines)) if said.code == 0 else []
    found = (c for e in endpoints if f"{e['namespace']}/{e['pod']}" == REPORTS for c in e["conditions"])
    return next((condition for condition in found if condition["type"] == kind), {})


def _named(walk: Walk) -> list[str]:
    lines = walk.output("bypass", "show", REPORTS, "--node", walk.pod(REPORTS).node).lines
    return [line for line in lines if "rules-missing" in line and str(API_PORT) in line]


def _knock(walk: Walk, source: Source, port: int, kind: FlowKind) -> tuple[Round, Flow | None]:
    made = _round(walk, source, port)
    return made, wait_event(walk, made.since_ns, kind, source, REPORTS, port, timeout_s=3.0)


def _round(walk: Walk, source: Source, port: int) -> Round:
    return call_all(walk, (source,), (REPORTS,), port, METRICS_PATH, timeout_s=_TIMEOUT_S)


def _compensated(drop: Flow | None) -> bool:
    return drop is not None and drop.reason == DropReason.COMPENSATION


def _dropped(drop: Flow | None) -> str:
    return f"dropped on {drop.node}, {rules_text(drop)}" if drop else "no drop event"
