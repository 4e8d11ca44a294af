"""Step c: what policy allows passes, whichever way the claim is written, from both nodes, over both families."""

from __future__ import annotations

from typing import Any

from meshbridge.demo.walk.context import Walk

LETTER = "c"
TITLE = "What policy allows passes"
ABOUT = "finance POSTs with the scope `transactions`: as a string and as one of a list, from either node."
CASES: tuple[tuple[str, str, str, Any], ...] = (
    ("scope as a string", "finance/client", "4", "transactions"),
    ("scope in a list", "finance/client", "6", ["reports", "transactions"]),
    ("scope as a string, from the server's own node", "finance/client-near", "6", "transactions"),
    ("scope in a list, from the server's own node", "finance/client-near", "4", ["transactions"]),
)


def run(walk: Walk) -> None:
    for name, client, family, scope in CASES:
        before = walk.arrived()
        outcome = walk.request(walk.pod(client), walk.url(family), token=walk.token(scope=scope))
        after = walk.arrived()
        requests, received = after.since(before, "requests"), after.since(before, "bytes")
        allowed_by = outcome.headers.get("x-meshbridge-policy", "")
        reached = f"{requests} request, {received} bytes at the application"
        walk.report.check(
            f"{name}: 200",
            outcome.status == 200 and requests == 1 and received > 0 and "transaction-service-l7-jwt" in allowed_by,
            f"{outcome} in {outcome.elapsed_s * 1000:.0f} ms, allowed by {allowed_by or 'nobody'}; {reached}",
            "the client's answer, counters of the application",
        )
