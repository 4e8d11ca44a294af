"""Step a: a caller whom network policy keeps out is dropped in the kernel, before any Envoy sees it."""

from __future__ import annotations

from meshbridge.demo.walk.context import SERVICE, SERVICE_PORT, Walk, now_ns, rules_text
from meshbridge.demo.walk.sniffer import Sniffer
from meshbridge.observe.flow import Flow, FlowKind
from meshbridge.observe.reasons import drop_reason

LETTER = "a"
TITLE = "Who may not connect costs no Envoy"
ABOUT = (
    "marketing/client POSTs to finance/transaction-service:8080, with a token that policy would accept. The\n"
    "CiliumNetworkPolicy lets in finance only: its packets must end in the kernel of the server's node."
)
CLIENT = "marketing/client"


def run(walk: Walk) -> None:
    for family in ("4", "6"):
        _one_family(walk, family)
    lines = walk.command("observe", "-n", "marketing", "--verdict", "DROPPED", "--to-pod", SERVICE, "--last", "2")
    told = [line for line in lines if "marketing/client" in line and "DROPPED" in line and "Policy denied" in line]
    walk.report.check("observe shows the drops", bool(told), f"{len(told)} lines", "the command above")
    lines = walk.command("monitor", "--type", "drop", "-v", "--no-follow", "--last", "1")
    named = any("cilium-l4-policy.yaml:" in line for line in lines)
    walk.report.check(
        "monitor names object, rule, file and line", named, "named" if named else "not named", "the command above"
    )


def _one_family(walk: Walk, family: str) -> None:
    service, client = walk.service, walk.pod(CLIENT)
    source = walk.address(client, family)
    name = f"IPv{family}"
    walk.report.say(f"{name}: sending, and waiting for an answer that must not come")
    since, before = now_ns(), walk.arrived()
    with (
        Sniffer(service.layout.netns, walk.uplink(service.node), [source], port=SERVICE_PORT) as at_node,
        Sniffer(service.netns, "eth0", [source]) as in_pod,
    ):
        outcome = walk.request(client, walk.url(family), token=walk.token(scope="transactions"), timeout_s=2.0)
        drop = walk.wait_flow(service.node, since, FlowKind.DROP, client, service, family)
    after = walk.arrived()
    check = walk.report.check
    check(f"{name}: the client gets no HTTP answer", outcome.status == 0, str(outcome), "the client's own report")
    received, connections = after.since(before, "bytes"), after.since(before, "connections")
    check(
        f"{name}: no payload byte reaches the application",
        received == connections == 0,
        f"{received} bytes, {connections} connections",
        "counters of the application",
    )
    check(
        f"{name}: its packets reach {service.node} and end there",
        at_node.packets > 0 and in_pod.packets == 0 and not in_pod.lost,
        f"{at_node.packets} packets into the node, {in_pod.packets} into the pod",
        "packet sockets on the node's uplink and the pod's eth0",
    )
    envoy = after.envoy_connections - before.envoy_connections
    check(
        f"{name}: the server's Envoy is not touched",
        envoy == 0,
        f"{envoy} connections",
        "Envoy's downstream_cx_total at 15006",
    )
    check(f"{name}: {service.node}'s kernel says why", _says_why(drop), _text(drop), "the agent's events")


def _says_why(drop: Flow | None) -> bool:
    return drop is not None and any(rule.name == "transaction-service-l4-access" for rule in drop.network_rules)


def _text(drop: Flow | None) -> str:
    if drop is None:
        return "no drop event"
    reason = drop_reason(drop.reason)
    return f"{reason.text} ({reason.number}), {rules_text(drop)}"
