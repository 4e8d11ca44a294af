"""Active proof on a real node: it holds for a real compensation, and for none that somebody broke."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from agent_harness import NodeHarness, Pod, inside, run, running_node
from click.testing import CliRunner
from test_agent_capture import ENVOY_PORT, STRICT_AND_A_PATH, eventually, excluded, redirect, with_sidecar

from meshbridge import abi
from meshbridge.cli import cli
from meshbridge.datapath.loader import Datapath, open_datapath
from meshbridge.datapath.policysets import EntryValue, PackedSet, pack_entries, unpack_entries
from meshbridge.datapath.policytable import PolicyTable
from meshbridge.observe.flow import FlowKind
from meshbridge.protos import observer_pb2 as pb

pytestmark = pytest.mark.root

PORT = 9090
PROVED_S, FOUND_S = 10.0, 40.0
PROVE = """
apiVersion: meshbridge.io/v1alpha1
kind: BypassPolicy
metadata: {name: api, namespace: shop}
spec: {proof: true, selector: {matchLabels: {app: api}}}
"""


@pytest.fixture(params=["auto", "clsact"])
def node(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[NodeHarness]:
    with running_node(tmp_path, subnet=82, attach=request.param) as harness:
        yield harness


@pytest.fixture
def api(node: NodeHarness) -> Pod:
    """A server whose port 9090 bypasses Envoy; only namespace monitoring is let in there."""
    pod = with_sidecar(node, "shop", "api", excludeInboundPorts=str(PORT))
    with_sidecar(node, "monitoring", "prometheus")
    with_sidecar(node, "shop", "web")
    redirect(pod)
    node.listen(pod, ENVOY_PORT)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    eventually(lambda: excluded(node, pod) == [[PORT, PORT]])
    return pod


def enforced(node: NodeHarness, pod: Pod) -> pb.Condition | None:
    conditions = [c for state in node.client.endpoints() if state.pod == pod.workload.name for c in state.conditions]
    return next((condition for condition in conditions if condition.type == "Enforced"), None)


def is_proved(node: NodeHarness, pod: Pod) -> bool:
    condition = enforced(node, pod)
    return condition is not None and condition.status and not condition.unknown


def is_refuted(node: NodeHarness, pod: Pod) -> bool:
    condition = enforced(node, pod)
    return condition is not None and not condition.status and condition.reason == "ProbeContradicts"


def events(node: NodeHarness) -> list[tuple[str, dict[str, str]]]:
    found = [flow.agent for flow in node.flows() if flow.kind is FlowKind.AGENT and flow.agent is not None]
    return [(event.name, dict(event.details)) for event in found if event.name.startswith("compensation")]


def prove(node: NodeHarness, pod: Pod) -> pb.Condition:
    node.apply(PROVE)
    node.sync()
    eventually(lambda: is_proved(node, pod), PROVED_S)
    condition = enforced(node, pod)
    assert condition is not None
    return condition


class Listener:
    """A server that says how many connections it was given; nobody is to connect."""

    def __init__(self, node: NodeHarness, pod: Pod) -> None:
        code = (
            "import socket,sys,signal\nn=[0]\n"
            f"s=socket.create_server(('::',{PORT}),family=socket.AF_INET6,dualstack_ipv6=True,backlog=16)\n"
            "def end(*_): print(n[0],flush=True); sys.exit()\n"
            "signal.signal(signal.SIGTERM,end)\nprint('up',flush=True)\n"
            "while True:\n c,_=s.accept(); n[0]+=1; c.close()\n"
        )
        self._process = subprocess.Popen(inside(pod.netns, sys.executable, "-c", code), stdout=subprocess.PIPE)
        node._processes.append(self._process)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"

    def accepted(self) -> int:
        self._process.terminate()
        out, _ = self._process.communicate(timeout=10)
        return int(out)


class Sniffer:
    """Everything that a packet socket in the pod sees of TCP to the bypassed port, and from it."""

    def __init__(self, node: NodeHarness, pod: Pod) -> None:
        code = (
            "import socket,sys,json,signal\n"
            "s=socket.socket(socket.AF_PACKET,socket.SOCK_RAW,socket.htons(3))\n"
            "found=[]\n"
            "def end(*_): print(json.dumps(found),flush=True); sys.exit()\n"
            "signal.signal(signal.SIGTERM,end)\nprint('up',flush=True)\n"
            "while True:\n"
            " d,a=s.recvfrom(2048)\n"
            " v={b'\\x08\\x00':(4,34,26,9+14),b'\\x86\\xdd':(6,54,22,6+14)}.get(d[12:14])\n"
            " if not v or len(d)<v[1]+14 or d[v[3]]!=6: continue\n"
            " f,t,src,_=v; ports=int.from_bytes(d[t:t+2],'big'),int.from_bytes(d[t+2:t+4],'big')\n"
            f" if {PORT} not in ports: continue\n"
            " n=4 if f==4 else 16\n"
            " kind=socket.AF_INET if f==4 else socket.AF_INET6\n"
            " found.append([f,socket.inet_ntop(kind,d[src:src+n]),*ports,d[t+13]])\n"
        )
        self._process = subprocess.Popen(inside(pod.netns, sys.executable, "-c", code), stdout=subprocess.PIPE)
        node._processes.append(self._process)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"

    def seen(self) -> list[list[Any]]:
        self._process.terminate()
        out, _ = self._process.communicate(timeout=10)
        found: list[list[Any]] = json.loads(out)
        return found


def counters(pod: Pod, *names: str) -> dict[str, int]:
    lines = run(*inside(pod.netns, "nstat", "-asz", *names)).splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in lines if line.split()[0] in names}


@contextmanager
def pinned(node: NodeHarness) -> Iterator[Datapath]:
    with open_datapath(node.pin_root / node.name) as datapath:
        yield datapath


def interface_index(node: NodeHarness, pod: Pod) -> int:
    return int(json.loads(run("ip", "-n", node.netns, "-j", "link", "show", pod.interface))[0]["ifindex"])


def record(node: NodeHarness, datapath: Datapath, pod: Pod) -> abi.EndpointValue:
    value = datapath.maps.endpoints.get(abi.EndpointKey(ifindex=interface_index(node, pod)))
    assert value is not None
    return value


def test_a_real_compensation_is_proved_and_nobody_in_the_pod_hears_of_it(node: NodeHarness, api: Pod) -> None:
    sniffer, listener = Sniffer(node, api), Listener(node, api)
    names = ("TcpPassiveOpens", "TcpOutSegs", "TcpOutRsts", "TcpInCsumErrors")
    before = counters(api, *names)
    assert enforced(node, api) is None, "nobody asked for a proof yet"
    condition = prove(node, api)
    assert condition.reason == "Proved"
    for said in ("let in: monitoring/prometheus", "kept out: ", "IPv4 TCP 9090, IPv6 TCP 9090"):
        assert said in condition.message
    time.sleep(0.5)
    after = counters(api, *names)
    assert listener.accepted() == 0
    grown = {name: after[name] - before[name] for name in names}
    seen = sniffer.seen()
    prometheus = node.pods["monitoring/prometheus"]
    assert {(row[0], row[1]) for row in seen} == {(4, prometheus.ipv4), (6, prometheus.ipv6)}, "only of whom is let in"
    assert {(row[3], row[4]) for row in seen} == {(PORT, 0x02)}, "nothing but SYNs to the port: no answer, no reset"
    assert grown == {"TcpPassiveOpens": 0, "TcpOutSegs": 0, "TcpOutRsts": 0, "TcpInCsumErrors": len(seen)}
    with pinned(node) as datapath, datapath.maps.conntrack.flows(record(node, datapath, api).incarnation) as flows:
        assert not [key for key in flows.snapshot() if PORT in (key.destination_port, key.source_port)]
    assert [(name, detail["status"]) for name, detail in events(node)] == [("compensation-proved", "True")]
    assert not [flow for flow in node.flows() if flow.kind is not FlowKind.AGENT and flow.destination.port == PORT]
    assert not any("not proved" in problem for problem in node.client.status().problems)


def test_it_is_shown_in_every_form(node: NodeHarness, api: Pod) -> None:
    prove(node, api)
    socket_option = ["--socket", str(node.socket)]
    listed = CliRunner().invoke(cli, ["endpoint", "list", "-o", "json", *socket_option])
    (condition,) = [c for r in json.loads(listed.output) if r["pod"] == "api" for c in r["conditions"]]
    assert (condition["type"], condition["status"], condition["reason"]) == ("Enforced", True, "Proved")
    shown = CliRunner().invoke(cli, ["bypass", "show", "shop/api", *socket_option])
    assert "proof      Enforced (Proved): " in shown.output
    monitored = CliRunner().invoke(cli, ["monitor", "--type", "agent", "--no-follow", *socket_option])
    assert "compensation-proved: pod shop/api" in monitored.output


def test_what_is_programmed_anew_is_proved_anew(node: NodeHarness, api: Pod) -> None:
    first = prove(node, api)
    node.apply(STRICT_AND_A_PATH.replace("namespaces: [monitoring]", "namespaces: [nowhere]"))
    node.sync()
    eventually(lambda: (c := enforced(node, api)) is not None and c.reason == "ProvedInPart", PROVED_S)
    condition = enforced(node, api)
    assert condition is not None
    assert condition.status
    assert condition.since_unix_ns > first.since_unix_ns, "it was not proved for a moment"
    assert "lets nobody in" in condition.message


def test_an_open_connection_of_the_same_source_is_not_disturbed(node: NodeHarness, api: Pod) -> None:
    node.listen(api, PORT)
    prove(node, api)
    stream = node.stream(node.pods["monitoring/prometheus"].netns, api.ipv4, PORT)
    for turn in range(6):  # each is programmed, and proved, anew
        node.apply(STRICT_AND_A_PATH.replace("/metrics", f"/metrics/{turn}"))
        node.sync()
        eventually(lambda: is_proved(node, api), PROVED_S)
    result = stream.finish()
    assert (result["bad"], result["retransmits"]) == (0, 0), result


def test_another_agent_proves_it_again_and_nothing_is_refuted_meanwhile(node: NodeHarness, api: Pod) -> None:
    prove(node, api)
    node.kill_agent()
    node.start_agent()
    node.wait(lambda status: status.revision_programmed >= node.controller.revision, "revision")
    eventually(lambda: is_proved(node, api), PROVED_S)
    assert [name for name, _ in events(node)] == ["compensation-proved"]


def test_a_flood_of_drops_refutes_nothing(node: NodeHarness, api: Pod) -> None:
    """Events of probes get lost among others; that is no proof, and none of the contrary."""
    prove(node, api)
    web = node.pods["shop/web"]
    code = (
        "import socket,time\n"
        "end=time.time()+14\n"
        "while time.time()<end:\n"
        " for _ in range(200):\n"
        "  s=socket.socket(); s.setblocking(False)\n"
        f"  try: s.connect(('{api.ipv4}',{PORT}))\n"
        "  except OSError: pass\n"
        "  s.close()\n"
    )
    flood = subprocess.Popen(inside(web.netns, sys.executable, "-S", "-c", code))
    node._processes.append(flood)
    seen = set()
    while flood.poll() is None:
        condition = enforced(node, api)
        assert condition is not None
        seen.add(condition.reason)
        time.sleep(0.1)
    print(f"conditions during the flood: {seen}; events lost: {node.client.status().events_lost}")
    assert node.client.status().events_lost > 1000, "it was a flood"
    assert seen <= {"Proved", "EventsLost"}
    eventually(lambda: is_proved(node, api), FOUND_S)


def break_entries(node: NodeHarness, api: Pod, change: Callable[[PackedSet], PackedSet]) -> None:
    """Write the pod's ingress sets as ``change`` makes them, behind the agent's back."""
    with pinned(node) as datapath:
        table = PolicyTable(datapath.maps)
        held = dict(table.read())
        ids = list(record(node, datapath, api).policy_set)[:2]
        for number in ids:
            key = number.to_bytes(4, sys.byteorder)
            changed = change(PackedSet.of_content(held[key])).content
            table.delete([key])
            table.put([(key, changed)])


def without_allows(packed: PackedSet) -> PackedSet:
    allow = abi.PolicyVerdict.POLICY_ALLOW
    kept = {
        k: v for k, v in unpack_entries(packed.entries) if v.verdict != allow or k.layer != abi.PolicyLayer.LAYER_MESH
    }
    return pack_entries(kept, packed.layers())


def without_denials(packed: PackedSet) -> PackedSet:
    """The same, but every deny of the mesh layer, written or by default, lets in."""

    def open_(value: EntryValue) -> EntryValue:
        return value._replace(verdict=int(abi.PolicyVerdict.POLICY_ALLOW), deny_reason=0)

    network, mesh = packed.layers()
    entries = {k: open_(v) if k.layer == abi.PolicyLayer.LAYER_MESH else v for k, v in unpack_entries(packed.entries)}
    return pack_entries(entries, (network, mesh._replace(verdict=int(abi.PolicyVerdict.POLICY_ALLOW), deny_reason=0)))


def change_set_id(node: NodeHarness, api: Pod) -> None:
    with pinned(node) as datapath:
        value = record(node, datapath, api)
        other = record(node, datapath, node.pods["shop/web"])
        for index in range(4):
            value.policy_set[index] = other.policy_set[index]
        datapath.maps.endpoints.put(abi.EndpointKey(ifindex=value.ifindex), value)


def detach(node: NodeHarness, api: Pod) -> None:
    ifindex = interface_index(node, api)
    if node.attach == "clsact":
        code = f"from meshbridge.datapath import clsact; clsact.remove({ifindex}, clsact.Parent.EGRESS)"
    else:
        code = (
            "from meshbridge.datapath import syscall; "
            f"syscall.link_detach(syscall.get_pinned('{node.pin_root / node.name}/links/{ifindex}-to_pod'))"
        )
    run(*inside(node.netns, sys.executable, "-c", code))


SABOTAGE: dict[str, Callable[[NodeHarness, Pod], None]] = {
    "an entry that lets in is gone": lambda node, api: break_entries(node, api, without_allows),
    "verdicts are flipped": lambda node, api: break_entries(node, api, without_denials),
    "the endpoint has another pod's sets": change_set_id,
    "the program is taken off": detach,
}


@pytest.mark.parametrize("sabotage", SABOTAGE.values(), ids=SABOTAGE.keys())
def test_a_compensation_that_somebody_broke_is_refuted(
    node: NodeHarness, api: Pod, sabotage: Callable[[NodeHarness, Pod], None]
) -> None:
    node.listen(api, PORT)
    scraper, web = node.pods["monitoring/prometheus"], node.pods["shop/web"]
    prove(node, api)
    sabotage(node, api)
    took = eventually(lambda: len(events(node)) == 3, FOUND_S)
    (_, _), (name, refuted), (_, mended) = events(node)
    print(f"found and mended after {took:.1f} s: {refuted['message']}")
    assert (name, refuted["status"], refuted["reason"]) == ("compensation-not-proved", "False", "ProbeContradicts")
    assert "expected to be" in refuted["message"]
    assert "seen: " in refuted["message"]
    assert mended["status"] == "True"
    for address in (api.ipv4, api.ipv6):
        assert node.reaches(scraper.netns, address, PORT)
        assert not node.reaches(web.netns, address, PORT)
    assert "compensation.not_proved" in node.log.read_text()


def test_while_it_cannot_be_mended_it_says_so(node: NodeHarness, api: Pod) -> None:
    """What the programs let in is lost behind them, by something that is none of ours."""
    prove(node, api)
    run(*inside(node.netns, "tc", "qdisc", "replace", "dev", api.interface, "root", "blackhole"))
    eventually(lambda: is_refuted(node, api), FOUND_S)
    condition = enforced(node, api)
    assert condition is not None
    assert "did not arrive" in condition.message
    assert any("its compensation is not proved" in problem for problem in node.client.status().problems)
    shown = CliRunner().invoke(cli, ["endpoint", "list", "--socket", str(node.socket)])
    assert "Enforced does not hold (ProbeContradicts)" in shown.output
    run(*inside(node.netns, "tc", "qdisc", "del", "dev", api.interface, "root"))
    eventually(lambda: is_proved(node, api), FOUND_S)


def test_what_cannot_be_seen_is_not_proved(node: NodeHarness, api: Pod) -> None:
    prove(node, api)
    run(*inside(api.netns, "ip", "link", "set", "eth0", "down"))
    eventually(lambda: (c := enforced(node, api)) is not None and c.unknown and c.reason == "NotProbed", FOUND_S)
    assert not is_proved(node, api)
    assert "Traceback" not in node.log.read_text()
