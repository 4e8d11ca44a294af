"""Step g: a port is taken out of the sidecars, and the kernel lets in whom Envoy let in, without anybody's asking."""

from __future__ import annotations

import time

from meshbridge.demo.walk import scraping
from meshbridge.demo.walk.context import Outcome, Walk, rules_text
from meshbridge.demo.walk.scraping import (
    LEDGER,
    METRICS_PATH,
    METRICS_PORT,
    NEIGHBOUR,
    PROMETHEUS,
    SCRAPED,
    STATEMENTS,
    WEB_PORT,
)
from meshbridge.demo.walk.sniffer import Sniffer
from meshbridge.demo.walk.sources import ENVOY_COUNTERS, Round, Source, call_all, wait_event, wait_events
from meshbridge.observe.flow import FlowKind
from meshbridge.observe.reasons import drop_reason
from meshbridge.policy.model import Direction
from meshbridge.policy.precedence import DropReason

LETTER = "g"
TITLE = "A port leaves the sidecar, and the kernel stands in"
ABOUT = (
    "Debian's Prometheus is to scrape finance/ledger, marketing/campaigns and finance/statements on 8080: all STRICT,\n"
    "with AuthorizationPolicies that let in namespace monitoring only. First every sidecar sees the port, and Envoy's\n"
    "answers are recorded. Then 8080 is excluded by annotation and the same callers come again. Nobody writes a policy."
)
LET_IN = (Source(PROMETHEUS, "the scraper's pod"), Source(NEIGHBOUR, "another pod in monitoring"))
KEPT_OUT = (
    Source("finance/client", "with sidecar, ledger's own namespace"),
    Source("marketing/client", "with sidecar, another namespace"),
    Source("finance/reporter", "without sidecar"),
    Source("node-2", "ledger's own node"),
    Source("node-1", "the other node"),
)
_REFUSED_TIMEOUT_S = 1.5


def run(walk: Walk) -> None:
    walk.report.say("pods without exclusions start, and Debian's Prometheus")
    scraping.bring(walk, exclusions=False)
    before = _with_envoy(walk)
    walk.report.say("the annotations come: Prometheus, its neighbour and the three targets start again")
    scraping.set_targets([])
    scraping.bring(walk, exclusions=True)
    after = _without_envoy(walk)
    walk.report.check(
        "the same sources are kept out as before, and the same let in",
        before == after and len(before) == len(LET_IN) * len(SCRAPED),
        f"let in by Envoy: {_pairs(before)}; by the kernel: {_pairs(after)}",
        "the rounds above",
    )
    _path_asked_for(walk)
    _refused_from_anybody(walk)
    walk.command("bypass", "list")


def _with_envoy(walk: Walk) -> set[tuple[str, str]]:
    """Record Envoy's answer to every source; returns the pairs of source and target that were let in."""
    out, into = _round(walk, KEPT_OUT), _round(walk, LET_IN)
    events = wait_events(walk, out.since_ns, FlowKind.VERDICT, KEPT_OUT, (LEDGER,), METRICS_PORT)
    for source in KEPT_OUT:
        event = events[source, LEDGER]
        walk.report.check(
            f"captured, {source}: refused by Envoy",
            all(_refused_by_envoy(call.outcome) for call in out.of(source)),
            f"{_answers(out, source)}; the kernel says {event.verdict if event else 'nothing'}",
            "the callers' answers over both families, the agents' events",
        )
    walk.report.check(
        "captured: no byte of theirs reaches an application, every one reaches an Envoy",
        all(out.bytes_at(name) == 0 and out.envoy_connections(name) >= 2 * len(KEPT_OUT) for name in SCRAPED),
        ", ".join(f"{name} {out.bytes_at(name)} bytes, {out.envoy_connections(name)} connections" for name in SCRAPED),
        f"counters of the applications, {ENVOY_COUNTERS}",
    )
    _let_in(walk, into, "captured")
    scraping.set_targets([walk.pod(name) for name in (*SCRAPED, STATEMENTS)])
    said = scraping.wait_health(walk, (*SCRAPED, STATEMENTS), up=True, since=time.time())
    walk.report.check(
        "captured: Prometheus says that all three targets are up, the one that asks for a path as well",
        len(said) == 3 and all(health.up for health in said.values()),
        scraping.health_text(said, (*SCRAPED, STATEMENTS)),
        "Prometheus's API, /api/v1/targets",
    )
    return _pairs_in(out, into)


def _without_envoy(walk: Walk) -> set[tuple[str, str]]:
    """The same round with the port excluded."""
    out, into = _round(walk, KEPT_OUT), _round(walk, LET_IN)
    events = wait_events(walk, out.since_ns, FlowKind.DROP, KEPT_OUT, SCRAPED, METRICS_PORT)
    for source in KEPT_OUT:
        drops = {name: events[source, name] for name in SCRAPED}
        named = all(
            drop is not None
            and drop.reason == DropReason.COMPENSATION
            and {rule.kind for rule in drop.mesh_rules} <= {"AuthorizationPolicy", "PeerAuthentication"}
            for drop in drops.values()
        )
        shown = drops[LEDGER]
        walk.report.check(
            f"excluded, {source}: dropped by the kernel, by the mesh's own policy",
            named and all(call.outcome.status == 0 for call in out.of(source)),
            f"{_answers(out, source)}; {_why(shown.reason)}, {rules_text(shown)}" if shown else "no drop event",
            "the callers' answers over both families, the agents' events",
        )
    walk.report.check(
        "excluded: not one packet of theirs gets into a pod",
        not out.unseen and not any(out.packets.values()) and not any(out.bytes_at(name) for name in SCRAPED),
        ", ".join(f"{name} {out.packets[name]} packets, {out.bytes_at(name)} bytes" for name in SCRAPED),
        "packet sockets on the pods' eth0, counters of the applications",
    )
    _let_in(walk, into, "excluded")
    walk.report.check(
        "excluded: no Envoy of a target sees any of it",
        not any(into.envoy_connections(name) + out.envoy_connections(name) for name in SCRAPED),
        ", ".join(f"{name} {into.envoy_connections(name)} connections" for name in SCRAPED),
        ENVOY_COUNTERS,
    )
    return _pairs_in(out, into)


def _path_asked_for(walk: Walk) -> None:
    """finance/statements lets in a path only: nobody sees paths now, so the scrape is refused, and it is said why."""
    scraping.set_targets([walk.pod(name) for name in (*SCRAPED, STATEMENTS)])
    since, started = time.time_ns(), time.time()
    up = scraping.wait_health(walk, SCRAPED, up=True, since=started)
    down = scraping.wait_health(walk, (STATEMENTS,), up=False, since=started)
    walk.report.check(
        "excluded: Prometheus says that ledger and campaigns are up",
        len(up) == len(SCRAPED) and all(health.up for health in up.values()),
        scraping.health_text(up, SCRAPED),
        "Prometheus's API, /api/v1/targets",
    )
    reached = walk.arrived(walk.pod(STATEMENTS)).counters.get("bytes", 0)
    drop = wait_event(walk, since, FlowKind.DROP, LET_IN[0], STATEMENTS, METRICS_PORT)
    walk.report.check(
        "excluded, a policy that asks for a path: the scrape is refused in the kernel",
        bool(down) and not down[STATEMENTS].up and reached == 0 and drop is not None,
        f"{scraping.health_text(down, (STATEMENTS,))}; {reached} bytes at the application; "
        + (f"dropped on {drop.node}, {rules_text(drop)}" if drop else "no drop event"),
        "Prometheus's API, counters of the application, the agents' events",
    )
    lines = walk.command("bypass", "show", STATEMENTS, "--node", walk.pod(STATEMENTS).node)
    told = [line for line in lines if "statements-metrics" in line and "lost" in line and "paths" in line]
    walk.report.check(
        "bypass show says which guarantee that is",
        bool(told),
        told[0].strip() if told else "no line names the policy, its path and that it is lost",
        "the command above",
    )


def _refused_from_anybody(walk: Walk) -> None:
    """No policy of ledger opens 9090, and Prometheus's outbound 9090 is excluded: it is dropped where it is sent."""
    scraper, ledger = LET_IN[0], walk.pod(LEDGER)
    with Sniffer(ledger.layout.netns, walk.uplink(ledger.node), scraper.addresses(walk), port=WEB_PORT) as between:
        made = call_all(walk, (scraper,), (LEDGER,), WEB_PORT, METRICS_PATH, timeout_s=_REFUSED_TIMEOUT_S)
    drop = wait_event(walk, made.since_ns, FlowKind.DROP, scraper, LEDGER, WEB_PORT)
    walk.report.check(
        "excluded outbound, refused by ledger from anybody: dropped at the source",
        drop is not None and drop.direction is Direction.EGRESS and not between.packets and not between.lost,
        f"{_answers(made, scraper)}, {between.packets} packets between the nodes; "
        + (f"{_why(drop.reason)} at {drop.node}, {rules_text(drop)}" if drop else "no drop event"),
        f"{PROMETHEUS}'s request on {WEB_PORT} over both families, packet socket on {ledger.node}'s uplink",
    )


def _round(walk: Walk, sources: tuple[Source, ...]) -> Round:
    timeout_s = _REFUSED_TIMEOUT_S if sources is KEPT_OUT else 3.0
    return call_all(walk, sources, SCRAPED, METRICS_PORT, METRICS_PATH, timeout_s=timeout_s)


def _let_in(walk: Walk, into: Round, how: str) -> None:
    for source in LET_IN:
        calls = into.of(source)
        arrived = sum(into.requests(call) for call in calls)
        walk.report.check(
            f"{how}, {source}: let in",
            all(call.outcome.status == 200 for call in calls) and arrived == len(calls),
            f"{_answers(into, source)}; {arrived} requests at the applications",
            "the callers' answers over both families, counters of the applications",
        )


def _pairs_in(*rounds: Round) -> set[tuple[str, str]]:
    """Who got something to whose application, over both families."""
    answers: dict[tuple[str, str], list[int]] = {}
    for call in (call for made in rounds for call in made.calls):
        answers.setdefault((call.source.name, call.target), []).append(call.outcome.status)
    return {pair for pair, statuses in answers.items() if all(status == 200 for status in statuses)}


def _refused_by_envoy(outcome: Outcome) -> bool:
    """403 with the policy's reason, or a connection that STRICT closes; silence would be somebody else's work."""
    return outcome.status == 403 or (outcome.status == 0 and "timed out" not in outcome.error)


def _answers(made: Round, source: Source) -> str:
    """Each different answer once."""
    return ", ".join(dict.fromkeys(str(call.outcome) for call in made.of(source)))


def _why(reason: int) -> str:
    named = drop_reason(reason)
    return f"{named.text} ({named.number})"


def _pairs(pairs: set[tuple[str, str]]) -> str:
    return ", ".join(f"{source} → {target}" for source, target in sorted(pairs)) or "nobody"
