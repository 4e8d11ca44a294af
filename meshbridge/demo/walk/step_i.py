"""Step i: one side excludes a port and the other does not. Said before, and then seen to break as it was said."""

from __future__ import annotations

import time

from meshbridge.demo import lifecycle, sidecar
from meshbridge.demo.layout import KUBELET, MANIFESTS
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk import scraping
from meshbridge.demo.walk.context import Walk, now_ns
from meshbridge.demo.walk.scraping import FORGOTTEN, LEDGER, METRICS_PATH, METRICS_PORT, PROMETHEUS, SCRAPED
from meshbridge.demo.walk.sources import ENVOY_COUNTERS, Source, call_all, wait_event
from meshbridge.observe.flow import FlowKind, FlowVerdict

LETTER = "i"
TITLE = "Half a bypass"
ABOUT = (
    "marketing/forgotten is a target too, but nobody excluded its 8080; Prometheus excludes 8080 outbound.\n"
    "monitoring/canary is a second Prometheus, whose outbound 8080 nobody excluded, while ledger excludes it inbound."
)
CANARY = Source(scraping.CANARY, "its sidecar captures 8080")
SCRAPER = Source(PROMETHEUS, "8080 excluded outbound")
_NO_CHAIN = r"^listener\.inbound\.no_filter_chain_match$"


def run(walk: Walk) -> None:
    scraping.bring(walk, exclusions=True)
    lifecycle.STORE.apply(scraping.CCNP)
    scraping.set_targets([walk.pod(name) for name in SCRAPED])
    lifecycle.STORE.apply(scraping.HALF_BYPASSES)
    lifecycle.wait_pods(walk.report.say)
    _reported(walk)
    _server_captures(walk)
    _client_captures(walk)


def _reported(walk: Walk) -> None:
    """Both halves are said while nobody has met them."""
    argv = ("bypass", "plan", "-f", str(MANIFESTS), "-f", str(KUBELET))
    said = walk.output(*argv)
    halves = [line for line in said.lines if "half bypass" in line]
    walk.quote(argv, halves or said.lines[-5:])
    strict = [line for line in halves if PROMETHEUS in line and f"{FORGOTTEN}:{METRICS_PORT}: broken" in line]
    hello = [line for line in halves if CANARY.name in line and f"{LEDGER}:{METRICS_PORT}: broken" in line]
    walk.report.check(
        "beforehand: Prometheus to forgotten is half a bypass that STRICT breaks",
        any("STRICT" in line and "reset" in line for line in strict),
        "said" if strict else "not said",
        "the command above",
    )
    walk.report.check(
        "beforehand: canary to ledger is half a bypass that sends the application a TLS hello",
        any("TLS hello" in line for line in hello),
        "said" if hello else "not said",
        "the command above",
    )


def _server_captures(walk: Walk) -> None:
    forgotten = walk.pod(FORGOTTEN)
    before, closed_before = walk.arrived(forgotten), sum(sidecar.counters(forgotten, _NO_CHAIN).values())
    since, started = now_ns(), time.time()
    scraping.set_targets([walk.pod(name) for name in (*SCRAPED, FORGOTTEN)])
    said = scraping.wait_health(walk, (FORGOTTEN,), up=False, since=started)
    flow = wait_event(walk, since, FlowKind.VERDICT, SCRAPER, FORGOTTEN, METRICS_PORT)
    after, closed = walk.arrived(forgotten), sum(sidecar.counters(forgotten, _NO_CHAIN).values())
    scraping.set_targets([walk.pod(name) for name in SCRAPED])
    check = walk.report.check
    check(
        "Prometheus to forgotten: the kernel says ALLOWED",
        flow is not None and flow.verdict is FlowVerdict.ALLOWED,
        flow.verdict.value if flow else "no event",
        f"{forgotten.node}'s events",
    )
    error = said[FORGOTTEN].error if FORGOTTEN in said else ""
    check(
        "Prometheus to forgotten: reset by Envoy, and down as Prometheus sees it",
        ("reset" in error or "EOF" in error) and closed > closed_before,
        f"{scraping.health_text(said, (FORGOTTEN,))}; {closed - closed_before} connections closed by Envoy, no chain",
        "Prometheus's API, Envoy's no_filter_chain_match at 15006",
    )
    reached = after.since(before, "bytes")
    check(
        "Prometheus to forgotten: no byte reaches the application",
        reached == 0 and after.envoy_connections > before.envoy_connections,
        f"{reached} bytes, {after.envoy_connections - before.envoy_connections} connections at Envoy",
        f"counters of the application, {ENVOY_COUNTERS}",
    )


def _client_captures(walk: Walk) -> None:
    made = call_all(walk, (CANARY,), (LEDGER,), METRICS_PORT, METRICS_PATH)
    flow = wait_event(walk, made.since_ns, FlowKind.VERDICT, CANARY, LEDGER, METRICS_PORT)
    hellos = poll(lambda: walk.arrived(walk.pod(LEDGER)).since(made.before[LEDGER], "tls_hellos"), 2.0)
    walk.report.check(
        "canary to ledger: the application receives a TLS hello in place of a request",
        hellos >= 2 and not any(made.requests(call) for call in made.calls),
        f"{hellos} TLS hellos, {sum(made.requests(call) for call in made.calls)} requests; "
        f"the kernel says {flow.verdict if flow else 'nothing'}",
        "the first bytes of each connection, counted by the application",
    )
    walk.report.check(
        "canary to ledger: its client gets no answer from the application",
        not any(call.outcome.status == 200 for call in made.calls),
        ", ".join(str(call.outcome) for call in made.calls),
        "the client's answer over both families",
    )
