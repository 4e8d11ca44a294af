"""Step b: who may connect but not do this is refused at L7, with the policy named, and the kernel says ALLOWED."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from meshbridge.demo.walk.context import SERVICE_PATH, Walk, now_ns
from meshbridge.observe.flow import FlowKind, FlowVerdict

LETTER = "b"
TITLE = "What needs L7 is refused at L7"
ABOUT = (
    "finance/client may connect, but the AuthorizationPolicy asks for POST on /api/v1/process and a token with the\n"
    "scope `transactions`. The kernel cannot see these, so it says ALLOWED; ext_authz refuses."
)


@dataclass(frozen=True, slots=True)
class Case:
    name: str
    client: str = "finance/client"
    claims: dict[str, Any] | None = None
    method: str = "POST"
    path: str = SERVICE_PATH
    family: str = "4"


_RIGHT = {"scope": "transactions"}
CASES = (
    Case("no token"),
    Case("a token of another scope", claims={"scope": "reports"}, family="6"),
    Case("GET instead of POST", claims=_RIGHT, method="GET"),
    Case("another path", claims=_RIGHT, path="/api/v1/other", family="6"),
    Case("no token, from the server's own node", client="finance/client-near"),
)


def run(walk: Walk) -> None:
    for case in CASES:
        service, client = walk.service, walk.pod(case.client)
        token = walk.token(**case.claims) if case.claims is not None else ""
        since, before = now_ns(), walk.arrived()
        url = walk.url(case.family, case.path)
        outcome = walk.request(client, url, "--method", case.method, token=token)
        flow = walk.wait_flow(service.node, since, FlowKind.VERDICT, client, service, case.family)
        reached = walk.arrived().since(before, "bytes")
        walk.report.check(
            f"{case.name}: 403 by L7, and it says by what",
            outcome.status == 403 and "transaction-service-l7-jwt" in outcome.explanation,
            f"{outcome}, {outcome.explanation or 'without a word'}",
            "the client's answer",
        )
        walk.report.check(
            f"{case.name}: the kernel says ALLOWED, the application sees nothing",
            flow is not None and flow.verdict is FlowVerdict.ALLOWED and reached == 0,
            f"{flow.verdict if flow else 'no event'}, {reached} bytes",
            f"{service.node}'s events, counters of the application",
        )
