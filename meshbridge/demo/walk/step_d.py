"""Step d: a policy taken away and put back, and how fast that is in force, for new and for open connections."""

from __future__ import annotations

import time
from typing import Any

from meshbridge.demo import lifecycle
from meshbridge.demo.layout import INPUTS, PROXY_UID
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk.context import SERVICE_PORT, Walk, now_ns, rules_text
from meshbridge.observe.flow import FlowKind

LETTER = "d"
TITLE = "A policy changes: new connections and open ones"
ABOUT = (
    "The CiliumNetworkPolicy is deleted, and comes back. Meanwhile a program in marketing/client opens a connection\n"
    "every 5 ms, as Envoy's user so that nothing redirects it: from its answers the times are read."
)
CLIENT = "marketing/client"
POLICY = INPUTS / "cilium-l4-policy.yaml"
INTERVAL_S = 0.005
_IN_FORCE_S = 1.0
_TIMEOUT_S = 10.0


def run(walk: Walk) -> None:
    try:
        _run(walk)
    finally:
        lifecycle.STORE.apply(POLICY)


def _run(walk: Walk) -> None:
    service, client = walk.service, walk.pod(CLIENT)
    check, target = walk.report.check, f"{service.ipv4}:{SERVICE_PORT}"
    token = walk.token(scope="transactions")
    connect = ("connect", target, "--interval", str(INTERVAL_S), "--timeout", "0.5")
    with walk.traffic(client, *connect, uid=PROXY_UID) as prober:
        deleted = time.monotonic()
        lifecycle.STORE.delete(POLICY)
        walk.report.say("deleted; waiting for marketing to get an answer")
        allowed = poll(lambda: walk.request(client, walk.url(), token=token, timeout_s=1.0).status == 200, _TIMEOUT_S)
        check(
            "with the policy gone, marketing with a valid token gets Envoy's answer",
            allowed,
            "200" if allowed else "none",
            "the client's answer",
        )
        refused = walk.request(client, walk.url())
        check("and without a token the refusal is Envoy's", refused.status == 403, str(refused), "the client's answer")
        with walk.conversation(client, walk.url(), token=token) as conversation:
            opened = conversation.request()
            check(
                "a connection through the sidecar is opened", opened.status == 200, str(opened), "the client's answer"
            )
            restored, restored_ns = time.monotonic(), now_ns()
            lifecycle.STORE.apply(POLICY)
            walk.report.say("put back; waiting until marketing is dropped again")
            drop = walk.wait_flow(service.node, restored_ns, FlowKind.DROP, client, service)
            check(
                "dropped again",
                drop is not None,
                rules_text(drop) if drop else "no drop event",
                f"{service.node}'s events",
            )
            attempts = prober.stop()
            before = walk.arrived()
            walk.report.say("sending on the connection that was open; no answer must come")
            on_open = conversation.request()
            reached = walk.arrived().since(before, "bytes")
            check(
                "also on the connection that was open",
                on_open.status == 0 and reached == 0,
                f"{on_open}, {reached} bytes at the application",
                "the client's answer, counters of the application",
            )
    _times(walk, attempts, deleted, restored)


def _times(walk: Walk, attempts: list[dict[str, Any]], deleted: float, restored: float) -> None:
    """Read from the attempts when each change was in force: each is answered or not by what held when it was sent."""
    after_delete = [attempt for attempt in attempts if deleted <= attempt["at"] < restored]
    after_restore = [attempt for attempt in attempts if attempt["at"] >= restored]
    opened = next((attempt["at"] - deleted for attempt in after_delete if attempt["ok"]), None)
    last_passed = max((attempt["at"] - restored for attempt in after_restore if attempt["ok"]), default=0.0)
    blocked = any(not attempt["ok"] for attempt in after_restore)
    how = f"a connection attempt every {INTERVAL_S * 1000:.0f} ms"
    walk.report.check(
        "deletion is in force within a second",
        opened is not None and opened < _IN_FORCE_S,
        f"{opened * 1000:.0f} ms from the file's removal to the first answered connection"
        if opened is not None
        else "never",
        how,
    )
    walk.report.check(
        "the policy is back in force within a second",
        blocked and last_passed < _IN_FORCE_S,
        f"{last_passed * 1000:.0f} ms from the file's writing to the last answered connection",
        how,
    )
