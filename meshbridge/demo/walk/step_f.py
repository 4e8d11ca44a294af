"""Step f: an agent killed under traffic, policy files nobody can read, and who may use a node's address."""

from __future__ import annotations

import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

from meshbridge.demo import lifecycle, node_agent, records
from meshbridge.demo.injection import PROBE_PORT
from meshbridge.demo.layout import INPUTS, MANIFESTS, NETNS, PROXY_UID
from meshbridge.demo.netns import http_get
from meshbridge.demo.processes import ProcessId, send
from meshbridge.demo.records import PodRecord
from meshbridge.demo.waiting import poll, wait_for
from meshbridge.demo.walk.context import EVENT_TIMEOUT_S, SERVICE_PORT, Walk, now_ns, rules_text
from meshbridge.demo.walk.sniffer import Sniffer
from meshbridge.observe.client import find_agents, merged_history
from meshbridge.observe.flow import Flow, FlowKind, FlowVerdict

LETTER = "f"
TITLE = "What breaks does not loosen"
ABOUT = (
    "The server node's agent is killed with SIGKILL under traffic that policy allows and traffic that it denies; then\n"
    "come policy files with mistakes; then two callers with the node's address: the node itself, and a pod behind it."
)
ALLOWED, DENIED = "finance/client", "marketing/client"
POLICY = INPUTS / "cilium-l4-policy.yaml"
PROBE_PATH = "/app-health/app/readyz"
_STEADY_ATTEMPTS = 50

UNREADABLE = "apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: transaction-service-l4-access\n"
OUT_OF_RANGE = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata:
  name: let-marketing-in
  namespace: finance
spec:
  endpointSelector:
    matchLabels:
      app: transaction-service
  ingress:
  - fromEndpoints:
    - matchLabels:
        "k8s:io.kubernetes.pod.namespace": marketing
  - toPorts:
    - ports:
      - port: "80800"
        protocol: TCP
"""
MASQUERADER = """\
apiVersion: v1
kind: Pod
metadata:
  name: masquerader
  namespace: marketing
  labels:
    app: masquerader
    sidecar.istio.io/inject: "false"
spec:
  nodeName: {node}
  containers:
  - name: app
    command: ["sleep", "infinity"]
"""


def run(walk: Walk) -> None:
    _kill_the_agent(walk)
    _malformed(walk, "cilium-l4-policy.yaml", UNREADABLE, "a file that is no YAML", "cilium-l4-policy.yaml")
    _malformed(walk, "let-marketing-in.yaml", OUT_OF_RANGE, "a policy with port 80800", "80800")
    _node_address(walk)


def _kill_the_agent(walk: Walk) -> None:
    service, allowed, denied = walk.service, walk.pod(ALLOWED), walk.pod(DENIED)
    agent = f"agent-{service.node}"
    killed = records.load_components()[agent]
    token, since = walk.token(scope="transactions"), now_ns()
    clients, servers = (allowed.ipv4, allowed.ipv6), (service.ipv4, service.ipv6)
    uplink = walk.uplink(service.node)
    knock = ("--interval", "0.02", "--timeout", "1")
    steady = ("--interval", "0.01", "--timeout", "5")
    node = service.layout.netns
    with (
        Sniffer(service.netns, "eth0", [denied.ipv4, denied.ipv6]) as in_pod,
        Sniffer(node, uplink, clients, servers) as node_in,
        Sniffer(service.netns, "eth0", clients, servers) as pod_in,
        Sniffer(service.netns, "eth0", servers, clients, outgoing=True) as pod_out,
        Sniffer(node, uplink, servers, clients, outgoing=True) as node_out,
        walk.traffic(allowed, "http", walk.url("4"), *steady, token=token) as fresh,
        walk.traffic(allowed, "http", walk.url("6"), *steady, "--keep-alive", token=token) as kept,
        walk.traffic(denied, "connect", f"{service.ipv4}:{SERVICE_PORT}", *knock, uid=PROXY_UID) as knocking,
        walk.traffic(denied, "connect", f"[{service.ipv6}]:{SERVICE_PORT}", *knock, uid=PROXY_UID) as knocking_too,
    ):
        _let_run(walk, "traffic runs")
        killed_at = time.monotonic()
        send(killed, signal.SIGKILL)
        walk.report.say(f"{agent} (pid {killed.pid}) killed; the kubelet starts it again")
        back = wait_for(lambda: _agent_back(service, agent, killed), 60.0, f"{agent} to be back")
        back_at = time.monotonic()
        assert back is not None
        walk.report.say(f"pid {back.pid} has taken over after {back_at - killed_at:.1f} s; traffic goes on")
        _let_run(walk, "traffic runs")
    _judge_traffic(
        walk, [*fresh.attempts, *kept.attempts], [*knocking.attempts, *knocking_too.attempts], killed_at, back_at
    )
    unseen = sum(sniffer.lost for sniffer in (in_pod, node_in, pod_in, pod_out, node_out))
    walk.report.check(
        "not one packet of the allowed is lost",
        node_in.packets == pod_in.packets > 0 and pod_out.packets == node_out.packets > 0 and not unseen,
        f"{node_in.packets} into the node and {pod_in.packets} into the pod, "
        f"{pod_out.packets} out of the pod and {node_out.packets} out of the node",
        "packet sockets on the node's uplink and the pod's eth0",
    )
    walk.report.check(
        "not one packet of the denied got into the pod",
        in_pod.packets == 0 and not unseen,
        f"{in_pod.packets} packets",
        "packet socket on the pod's eth0",
    )
    drop = walk.wait_flow(service.node, since, FlowKind.DROP, denied, service)
    walk.report.check(
        "the new agent reports drops",
        drop is not None,
        rules_text(drop) if drop else "no event",
        f"{service.node}'s events",
    )


def _judge_traffic(
    walk: Walk, requests: list[dict[str, Any]], knocks: list[dict[str, Any]], killed_at: float, back_at: float
) -> None:
    failed = [request for request in requests if not request["ok"]]
    slowest_s = max((request["took_s"] for request in requests), default=0.0)
    without = sum(killed_at <= request["at"] < back_at for request in requests)
    walk.report.check(
        "every allowed request is answered, before, while and after",
        not failed and without > 0,
        f"{len(requests) - len(failed)} of {len(requests)}, {without} of them without an agent; "
        f"slowest {slowest_s * 1000:.0f} ms"
        + (f"; first failure: {failed[0]['status'] or failed[0]['error']}" if failed else ""),
        "two clients, one on new connections over IPv4, one on an open one over IPv6",
    )
    passed = sum(knock["ok"] for knock in knocks)
    without = sum(killed_at <= knock["at"] < back_at for knock in knocks)
    walk.report.check(
        "every denied connection is dropped, before, while and after",
        passed == 0 and without > 0,
        f"{passed} of {len(knocks)} answered, {without} tried without an agent",
        "a connection attempt every 20 ms over IPv4, and one over IPv6",
    )


def _let_run(walk: Walk, what: str) -> None:
    """Wait until the service has answered some more requests."""
    start = walk.arrived()
    wait_for(lambda: walk.arrived().since(start, "requests") >= _STEADY_ATTEMPTS, 20.0, f"{what}: more requests")


def _agent_back(service: PodRecord, agent: str, killed: ProcessId) -> ProcessId | None:
    process = records.load_components()[agent]
    if process == killed or not process.alive:
        return None
    status = node_agent.status(service.layout)
    ready = status and status.controller_connected and status.revision_programmed and status.uptime_s < 60
    return process if ready and status and status.endpoints_ready == status.endpoints_total else None


def _malformed(walk: Walk, name: str, content: str, what: str, quoted: str) -> None:
    service, allowed, denied = walk.service, walk.pod(ALLOWED), walk.pod(DENIED)
    token = walk.token(scope="transactions")
    with tempfile.TemporaryDirectory(prefix="mb-demo-") as directory:
        path = Path(directory) / name
        path.write_text(content)
        lifecycle.STORE.apply(path)
    try:
        walk.report.say(f"{what} is applied; waiting for somebody to say so")
        problem = poll(lambda: _problem(service, name, quoted), EVENT_TIMEOUT_S)
        walk.report.check(
            f"{what}: named and refused", bool(problem), problem or "nobody names it", "`meshbridge status`"
        )
        since, before = now_ns(), walk.arrived()
        outcome = walk.request(denied, walk.url(), token=token, timeout_s=1.0)
        drop = walk.wait_flow(service.node, since, FlowKind.DROP, denied, service)
        reached = walk.arrived().since(before, "bytes")
        walk.report.check(
            f"{what}: nothing is loosened",
            outcome.status == 0 and reached == 0 and drop is not None,
            f"marketing: {outcome}, {reached} bytes, {'dropped' if drop else 'no drop event'}",
            "counters of the application, the kernel's events",
        )
        outcome = walk.request(allowed, walk.url(), token=token)
        walk.report.check(f"{what}: nor cut off", outcome.status == 200, f"finance: {outcome}", "the client's answer")
    finally:
        (MANIFESTS / name).unlink()
        lifecycle.STORE.apply(POLICY)
    gone = poll(lambda: not _problem(service, name, quoted), EVENT_TIMEOUT_S)
    walk.report.check(f"{what}: shown until mended", gone, "gone" if gone else "still shown", "`meshbridge status`")


def _problem(service: PodRecord, name: str, quoted: str) -> str:
    status = node_agent.status(service.layout)
    return next(
        (problem for problem in (status.problems if status else ()) if name in problem and quoted in problem), ""
    )


def _node_address(walk: Walk) -> None:
    service = walk.service
    with tempfile.TemporaryDirectory(prefix="mb-demo-") as directory:
        path = Path(directory) / "masquerader.yaml"
        path.write_text(MASQUERADER.format(node=service.node))
        lifecycle.STORE.apply(path)
    try:
        walk.report.say(f"a pod without sidecar starts on {service.node}; the node masquerades it")
        lifecycle.wait_pods(walk.report.say)
        pod = walk.pod("marketing/masquerader")
        for family, tool in (("4", "iptables"), ("6", "ip6tables")):
            _one_family(walk, pod, family, tool)
    finally:
        (MANIFESTS / "masquerader.yaml").unlink()
    lifecycle.wait_pods(walk.report.say)


def _one_family(walk: Walk, pod: PodRecord, family: str, tool: str) -> None:
    service = walk.service
    node = service.layout
    address = str(node.ipv6.ip if family == "6" else node.ipv4.ip)
    target, source = walk.address(service, family), walk.address(pod, family)
    since = now_ns()
    answer = http_get(node.netns, target, PROBE_PORT, PROBE_PATH)
    flow = _from_address(service, since, FlowKind.VERDICT, address)
    walk.report.check(
        f"IPv{family}: a probe from the node's own address passes",
        answer.status == 200 and flow is not None and flow.verdict is FlowVerdict.ALLOWED,
        f"HTTP {answer.status} {answer.error}".strip() + f", {flow.verdict if flow else 'no event'} from {address}",
        f"the answer, {node.name}'s events",
    )
    rule = ["POSTROUTING", "-s", source, "-d", target, "-j", "MASQUERADE"]
    nat = ["nsenter", f"--net={NETNS / node.netns}", tool, "-w", "-t", "nat"]
    subprocess.run([*nat, "-A", *rule], check=True, capture_output=True)
    try:
        since = now_ns()
        host = f"[{target}]" if family == "6" else target
        outcome = walk.request(pod, f"http://{host}:{PROBE_PORT}{PROBE_PATH}", "--method", "GET", timeout_s=1.5)
        drop = _from_address(service, since, FlowKind.DROP, address)
    finally:
        subprocess.run([*nat, "-D", *rule], check=True, capture_output=True)
    walk.report.check(
        f"IPv{family}: a masqueraded pod with that address does not",
        outcome.status == 0 and drop is not None,
        f"{outcome}, {f'dropped as {address}, {rules_text(drop)}' if drop else 'no drop event from that address'}",
        f"the client's answer, {node.name}'s events",
    )


def _from_address(service: PodRecord, since_ns: int, kind: FlowKind, address: str) -> Flow | None:
    def look() -> list[Flow]:
        return [
            flow
            for flow in merged_history(find_agents(None, service.node))
            if flow.kind is kind
            and flow.time_ns >= since_ns
            and str(flow.source.address) == address
            and str(flow.destination.address) in (service.ipv4, service.ipv6)
            and flow.destination.port == PROBE_PORT
        ]

    found = poll(look, EVENT_TIMEOUT_S)
    return found[-1] if found else None
