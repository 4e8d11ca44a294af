"""Step h: the inputs' cluster-wide network policy lets Prometheus in, and isolates all other ports of its targets."""

from __future__ import annotations

import time

from meshbridge.demo import lifecycle, pods
from meshbridge.demo.layout import KUBELET, MANIFESTS
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk import scraping
from meshbridge.demo.walk.context import Outcome, Walk, rules_text
from meshbridge.demo.walk.scraping import (
    API_PORT,
    CCNP,
    LEDGER,
    METRICS_PATH,
    METRICS_PORT,
    NEIGHBOUR,
    SCRAPED,
)
from meshbridge.demo.walk.sources import Source, call_all, wait_event
from meshbridge.observe.flow import FlowKind
from meshbridge.observe.reasons import drop_reason
from meshbridge.policy.model import Layer

LETTER = "h"
TITLE = "The scraper's network policy, and what else it does"
ABOUT = (
    "The inputs' CiliumClusterwideNetworkPolicy comes, as it is. It lets monitoring's Prometheus in on 8080, and so\n"
    "isolates all else of the pods that it selects: said before, and then tried on ledger's API, port 9000."
)
POLICY_NAME = "allow-prometheus-scrape"
API_CLIENT = Source("marketing/client", "uses ledger's API")
OTHER = Source(NEIGHBOUR, "another pod in monitoring")
SOMETHING_BREAKS = 3


def run(walk: Walk) -> None:
    scraping.bring(walk, exclusions=True)
    scraping.set_targets([walk.pod(name) for name in SCRAPED])
    reached = _api(walk)
    walk.report.check(
        "before: ledger's API answers",
        all(outcome.status == 200 for outcome in reached),
        ", ".join(map(str, reached)),
        f"{API_CLIENT.name}'s request on {API_PORT} over both families",
    )
    _warned(walk)
    lifecycle.STORE.apply(CCNP)
    _in_force(walk)
    _scraped(walk)
    _neighbour(walk)
    _warning_is_true(walk)


def _warned(walk: Walk) -> None:
    """The plan for what is about to be applied, asked of the same files."""
    argv = ("bypass", "plan", "-f", str(MANIFESTS), "-f", str(KUBELET), "-f", str(CCNP))
    said = walk.output(*argv)
    warnings = [line for line in said.lines if "default deny" in line and POLICY_NAME in line]
    walk.quote(argv, warnings or said.lines[-5:])
    named = {name: any(name in line and f"{API_PORT}/TCP" in line for line in warnings) for name in SCRAPED}
    walk.report.check(
        "the warning comes before the policy, and names pods and ports",
        all(named.values()) and said.code == SOMETHING_BREAKS,
        f"{', '.join(f'{name} {API_PORT}' for name in named if named[name]) or 'nothing'} named, exit code {said.code}",
        "the command above, on the files in force and the inputs' policy, which is not applied yet",
    )


def _in_force(walk: Walk) -> None:
    """Wait until both targets are isolated, as their agents say."""

    def isolated() -> bool:
        return "\n".join(walk.output("endpoint", "list", "-o", "json").lines).count(POLICY_NAME) >= len(SCRAPED)

    poll(isolated, 5.0)


def _scraped(walk: Walk) -> None:
    said = scraping.wait_health(walk, SCRAPED, up=True, since=time.time() + scraping.SCRAPE_INTERVAL_S)
    walk.report.check(
        "Prometheus says that its targets are up, by scrapes after that",
        len(said) == len(SCRAPED) and all(health.up for health in said.values()),
        scraping.health_text(said, SCRAPED),
        "Prometheus's API, /api/v1/targets",
    )


def _neighbour(walk: Walk) -> None:
    made = call_all(walk, (OTHER,), SCRAPED, METRICS_PORT, METRICS_PATH, timeout_s=1.5)
    for name in SCRAPED:
        drop = wait_event(walk, made.since_ns, FlowKind.DROP, OTHER, name, METRICS_PORT)
        ours = drop is not None and drop.layer is Layer.NETWORK and {r.name for r in drop.rules} == {POLICY_NAME}
        outcomes = [call.outcome for call in made.of(OTHER) if call.target == name]
        walk.report.check(
            f"{OTHER} is dropped on {name}'s {METRICS_PORT}, attributed to that policy's isolation",
            ours and all(outcome.status == 0 for outcome in outcomes) and made.packets[name] == 0 and not made.unseen,
            f"{outcomes[0]}, {made.packets[name]} packets in the pod; "
            + (f"{drop_reason(drop.reason).text}, isolated by {rules_text(drop)}" if drop else "no drop event"),
            "the answers over both families, packet sockets on the pod's eth0, the agents' events",
        )
    walk.command("monitor", "--type", "drop", "-v", "--no-follow", "--last", "1")


def _warning_is_true(walk: Walk) -> None:
    since, before = time.time_ns(), walk.arrived(walk.pod(LEDGER))
    reached = _api(walk)
    drop = wait_event(walk, since, FlowKind.DROP, API_CLIENT, LEDGER, API_PORT)
    requests = walk.arrived(walk.pod(LEDGER)).since(before, f"requests:{API_CLIENT.name}-api")
    walk.report.check(
        "the warning was true: ledger's API is not reached any more",
        all(outcome.status == 0 for outcome in reached) and requests == 0 and drop is not None,
        f"{', '.join(map(str, reached))}; {requests} requests at the application; "
        + (rules_text(drop) if drop else "no drop event"),
        f"{API_CLIENT.name}'s request on {API_PORT}, counters of the application, the agents' events",
    )
    answers = [answer.status for answer in pods.probe_answers(walk.pod(LEDGER))]
    walk.report.check(
        "but the kubelet's probe of it passes",
        answers == [200],
        ", ".join(f"HTTP {status}" for status in answers),
        "its readiness probe, from the node's own address",
    )


def _api(walk: Walk) -> list[Outcome]:
    ledger, client = walk.pod(LEDGER), walk.pod(API_CLIENT.name)
    options = ("--method", "GET", "--mark", f"{API_CLIENT.name}-api")
    urls = [f"http://{ledger.ipv4}:{API_PORT}/", f"http://[{ledger.ipv6}]:{API_PORT}/"]
    return [walk.request(client, url, *options, timeout_s=1.5) for url in urls]
