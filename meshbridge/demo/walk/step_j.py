"""Step j: what a bypass is for. No Envoy touches a scrape any more, and the scrape is that much faster."""

from __future__ import annotations

import json
import statistics
import time

from meshbridge.demo import lifecycle, pods, processes, sidecar
from meshbridge.demo.errors import DemoError
from meshbridge.demo.records import PodRecord
from meshbridge.demo.walk import scraping
from meshbridge.demo.walk.context import Walk
from meshbridge.demo.walk.scraping import CANARY, FORGOTTEN, LEDGER, METRICS_PATH, METRICS_PORT, PROMETHEUS, SCRAPED
from meshbridge.demo.walk.sources import ENVOY_COUNTERS

LETTER = "j"
TITLE = "What the bypass is worth"
ABOUT = (
    "Prometheus scrapes on, and the counters of its own Envoy and of its targets' are watched. Then scrapes are timed\n"
    "through both sidecars (canary → forgotten) and past them (Prometheus → ledger): same nodes and programs, in turns."
)
_SCRAPES = 4
_ROUNDS, _PER_ROUND = 12, 50
_OUTGOING_CONNECTIONS = r"^listener\.outbound\.downstream_cx_total$"


def run(walk: Walk) -> None:
    scraping.bring(walk, exclusions=True)
    _bring_pair(walk)
    _untouched(walk)
    _latency(walk)


def _bring_pair(walk: Walk) -> None:
    """The pair without exclusions is step i's; here the two meet each other only."""
    lifecycle.STORE.apply(scraping.HALF_BYPASSES)
    lifecycle.wait_pods(walk.report.say)


def _untouched(walk: Walk) -> None:
    scraping.set_targets([walk.pod(name) for name in SCRAPED])
    scraping.wait_health(walk, SCRAPED, up=True, since=time.time())
    targets, scraper = {name: walk.pod(name) for name in SCRAPED}, walk.pod(PROMETHEUS)
    before = {name: walk.arrived(record) for name, record in targets.items()}
    out_before = _outgoing(scraper)
    time.sleep(_SCRAPES * scraping.SCRAPE_INTERVAL_S)
    after = {name: walk.arrived(record) for name, record in targets.items()}
    scrapes = {name: after[name].since(before[name], "requests") for name in SCRAPED}
    touched = {name: after[name].envoy_connections - before[name].envoy_connections for name in SCRAPED}
    outgoing = _outgoing(scraper) - out_before
    seen = ", ".join(f"{name} {scrapes[name]} scrapes, {touched[name]} connections" for name in SCRAPED)
    walk.report.check(
        "scrapes arrive, and no Envoy sees any of it",
        all(count >= _SCRAPES - 1 for count in scrapes.values()) and not any(touched.values()) and outgoing == 0,
        f"{seen}; Prometheus's own Envoy {outgoing} connections",
        f"counters of the applications, {ENVOY_COUNTERS}, the scraper's downstream_cx_total at 15001",
    )


def _outgoing(record: PodRecord) -> int:
    """How many connections the pod's own Envoy has taken from its application."""
    found = sidecar.counters(record, _OUTGOING_CONNECTIONS)
    if not found:
        raise DemoError("has no counter of outbound connections", where=f"Envoy of {record.key}")
    return sum(found.values())


def _latency(walk: Walk) -> None:
    scraping.set_targets([])
    routes = {"both Envoys": (CANARY, FORGOTTEN), "neither": (PROMETHEUS, LEDGER)}
    medians: dict[str, list[float]] = {name: [] for name in routes}
    _round(walk, CANARY, FORGOTTEN)
    for number in range(_ROUNDS):
        for name in list(routes)[:: 1 if number % 2 else -1]:
            medians[name].append(_round(walk, *routes[name]))
    pairs = zip(medians["both Envoys"], medians["neither"], strict=True)
    low, ratio, high = statistics.quantiles([with_both / without for with_both, without in pairs], n=4)
    walk.report.check(
        "one scrape is faster without the two Envoys",
        low > 1,
        f"x{ratio:.1f} (middle half {low:.1f} to {high:.1f}); medians "
        + ", ".join(f"{name} {statistics.median(values) * 1000:.2f} ms" for name, values in medians.items()),
        f"{_ROUNDS} pairs of rounds of {_PER_ROUND} scrapes on an open connection, in turns; each pair's medians",
    )


def _round(walk: Walk, client: str, server: str) -> float:
    """The median time of a scrape in one round of many."""
    url = f"http://{walk.pod(server).ipv4}:{METRICS_PORT}{METRICS_PATH}"
    argv = ["python3", "-m", "meshbridge.demo.apps.latency", "--count", str(_PER_ROUND), url]
    done = processes.run(pods.exec_command(walk.pod(client), argv), timeout_s=30)
    if done.returncode:
        raise DemoError(f"the scrapes of {server} failed: {done.stderr.decode()[-300:]}", where=f"pod {client}")
    times: list[float] = json.loads(done.stdout)
    return statistics.median(times)
