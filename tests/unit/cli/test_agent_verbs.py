"""The verbs that read agents, against the real Observer service on a Unix socket."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from meshbridge.agent.observer import ObserverService, SocketError, start_observer
from meshbridge.agent.ring import FlowRing
from meshbridge.cli import cli
from meshbridge.errors import MeshBridgeError
from meshbridge.observe import client
from meshbridge.observe.client import Agent, AgentUnreachable, Follower, find_agents, merged_history
from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict
from meshbridge.policy.model import Layer, Origin
from meshbridge.protos import observer_pb2 as pb

WEB = FlowPeer(ip_address("10.0.1.10"), 41112, 4711, "shop", "web")
API = FlowPeer(ip_address("10.0.2.11"), 80, 4712, "shop", "api")
RULE = Origin("CiliumNetworkPolicy", "shop", "api", "spec.ingress[0]", "p.yaml", 9)


def drop(time_ns: int, node: str = "node-1") -> Flow:
    return Flow(
        time_ns, node, FlowKind.DROP, FlowVerdict.DROPPED, endpoint_id=512, reason=133, source=WEB, destination=API,
        protocol=6, tcp_flags=2, layer=Layer.NETWORK, network_rules=(RULE,),
    )  # fmt: skip


@dataclass
class Served:
    """One agent's service with a scripted node, in a thread of its own."""

    path: Path
    status_: pb.Status = field(
        default_factory=lambda: pb.Status(node="node-1", controller_connected=True, revision_programmed=3,
                                          revision_received=3)
    )  # fmt: skip
    ring: FlowRing = field(default_factory=lambda: FlowRing("node-1"))
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _server: Any = None

    def endpoints(self) -> tuple[pb.EndpointState, ...]:
        return (pb.EndpointState(id=512, namespace="shop", pod="api", identity=4712, state="ready"),)

    def status(self) -> pb.Status:
        return self.status_

    async def add_endpoint(self, request: pb.AddEndpointRequest) -> pb.AddEndpointResponse:
        raise MeshBridgeError("no interface 'x'", where="pod a/b", fix="name one")

    def start(self) -> None:
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.serve()

    def serve(self) -> None:
        self._server = self.call(start_observer(ObserverService(self, self.ring), self.path))

    def add(self, *flows: Flow) -> None:
        async def put() -> None:
            for flow in flows:
                self.ring.add(flow)

        self.call(put())

    def end(self) -> None:
        self.call(self._server.stop(0))

    def call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


@pytest.fixture
def run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(client, "RUN_DIRECTORY", tmp_path)
    return tmp_path


@pytest.fixture
def agent(run_directory: Path) -> Iterator[Served]:
    served = Served(run_directory / "node-1" / "agent.sock")
    served.start()
    yield served
    served.end()


def meshbridge(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments, catch_exceptions=True)


def test_observe_shows_what_is_kept(agent: Served) -> None:
    agent.add(drop(10**18), drop(2 * 10**18))
    result = meshbridge("observe", "--verdict", "DROPPED", "-n", "shop", "--last", "1")
    assert result.exit_code == 0
    (line,) = result.output.splitlines()
    assert line.endswith("shop/web:41112 (ID:4711) <> shop/api:80 (ID:4712) Policy denied DROPPED (TCP Flags: SYN)")
    assert "\x1b" not in result.output, "colours are for terminals"


def test_observe_prints_a_table_and_json(agent: Served) -> None:
    agent.add(drop(10**18))
    table = meshbridge("observe", "-o", "table").output.splitlines()
    assert table[0].split() == ["TIMESTAMP", "SOURCE", "DESTINATION", "TYPE", "VERDICT", "SUMMARY"]
    assert "Policy denied   DROPPED" in table[1]
    (line,) = meshbridge("observe", "-o", "json").output.splitlines()
    assert json.loads(line)["flow"]["drop_reason_desc"] == "POLICY_DENIED"


def test_flows_of_several_agents_are_merged_by_time(agent: Served, run_directory: Path) -> None:
    other = Served(run_directory / "node-2" / "agent.sock")
    other.start()
    try:
        agent.add(drop(1 * 10**18), drop(3 * 10**18))
        other.add(drop(2 * 10**18, "node-2"))
        times = [flow.time_ns // 10**18 for flow in merged_history(find_agents(None, None))]
        assert times == [1, 2, 3]
        assert "[node-2]" in meshbridge("observe").output
        assert "[node-2]" not in meshbridge("observe", "--node", "node-1").output
    finally:
        other.end()


def test_an_agent_that_died_is_named_and_hides_no_other(agent: Served, run_directory: Path) -> None:
    dead = run_directory / "node-2" / "agent.sock"
    dead.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(dead))
    agent.add(drop(10**18))
    result = meshbridge("observe")
    assert result.exit_code == 0
    assert "shop/web:41112" in result.stdout
    assert result.stderr == (
        "Warning: agent node-2 does not answer (Connection refused): nothing of that node is shown\n"
    )
    assert meshbridge("status").exit_code == 3, "a node without its agent is not well"
    assert meshbridge("observe", "--node", "node-2").exit_code == 1


def test_monitor_names_rule_file_and_line(agent: Served) -> None:
    agent.add(drop(10**18))
    result = meshbridge("monitor", "--type", "drop", "-v", "--related-to", "512", "--no-follow")
    assert "isolated by: CiliumNetworkPolicy shop/api spec.ingress[0] (p.yaml:9)" in result.output
    assert meshbridge("monitor", "--related-to", "513", "--no-follow").output == ""
    assert meshbridge("monitor", "--related-to", "shop/api", "--no-follow").output.startswith("xx drop (Policy denied)")


def test_endpoint_list(agent: Served) -> None:
    assert meshbridge("endpoint", "list").output.splitlines()[2].startswith("512        Disabled")
    assert json.loads(meshbridge("endpoint", "list", "-o", "json").output)[0]["pod"] == "api"
    of_others = [json.loads(meshbridge("endpoint", "list", "-n", ns, "-o", "json").output) for ns in ("shop", "x")]
    assert list(map(len, of_others)) == [1, 0]


def test_status_exits_with_3_when_degraded(agent: Served) -> None:
    assert meshbridge("status").exit_code == 0
    agent.status_.problems.append("p.yaml:3: bad")
    result = meshbridge("status")
    assert result.exit_code == 3
    assert "  ! p.yaml:3: bad" in result.output
    assert json.loads(meshbridge("status", "-o", "json").output)[0]["degraded"] is True


@pytest.mark.parametrize("verb", [("observe",), ("monitor",), ("endpoint", "list"), ("status",)])
def test_without_an_agent_it_is_said_where_and_what_to_do(verb: tuple[str, ...], run_directory: Path) -> None:
    result = meshbridge(*verb)
    assert isinstance(result.exception, AgentUnreachable)
    assert f"{run_directory}/*/agent.sock: no agent's socket is there; start 'meshbridge agent'" in str(
        result.exception
    )


def test_a_socket_nobody_listens_on_is_said_to_be_one(agent: Served, run_directory: Path) -> None:
    agent.end()
    agent.path.parent.mkdir(exist_ok=True)
    agent.path.touch()
    result = meshbridge("status", "--socket", str(agent.path))
    assert isinstance(result.exception, AgentUnreachable)
    assert "is 'meshbridge agent' running on this node" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("observe", "--since", "yesterday"), "'yesterday' is no time"),
        (("observe", "--from-pod", "a/b/c"), "'a/b/c' is no pod"),
        (("monitor", "--related-to", "5", "--related-to", "a/b"), "mixes endpoint numbers and pods"),
    ],
)
def test_options_that_mean_nothing_are_refused(arguments: tuple[str, ...], sentence: str, agent: Served) -> None:
    assert sentence in str(meshbridge(*arguments).exception)


def test_options_that_are_no_choice_exit_with_2(agent: Served) -> None:
    assert meshbridge("observe", "--verdict", "MAYBE").exit_code == 2
    assert meshbridge("observe", "--port", "70000").exit_code == 2


def test_following_sees_the_past_then_what_comes_and_outlives_a_restart(agent: Served) -> None:
    agent.add(drop(1 * 10**18))
    follower = Follower([Agent(agent.path)])
    follower.start()
    assert [flow.time_ns for flow in follower.history()] == [10**18]
    live = (flow for flow in follower.live() if flow is not None)
    agent.add(drop(2 * 10**18))
    assert next(live).time_ns == 2 * 10**18
    agent.end()
    assert "trying again" in follower.notices.get(timeout=5)
    agent.serve()
    assert "connected again" in follower.notices.get(timeout=10)
    agent.add(drop(3 * 10**18))
    assert next(live).time_ns == 3 * 10**18, "and nothing of the past a second time"


def test_errors_of_a_call_carry_where_what_and_how_to_fix(agent: Served) -> None:
    import grpc

    connection = Agent(agent.path)
    with connection.channel() as channel, pytest.raises(grpc.RpcError) as error:
        connection.stub(channel).AddEndpoint(pb.AddEndpointRequest(), timeout=5)
    assert error.value.details() == "pod a/b: no interface 'x'; name one"


def test_the_socket_is_only_for_its_owner_and_only_one_agent_has_it(agent: Served, run_directory: Path) -> None:
    assert agent.path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(SocketError, match="an agent of this node is running"):
        asyncio.run(start_observer(ObserverService(agent, agent.ring), agent.path))


def test_a_socket_path_that_is_too_long_is_refused(agent: Served, tmp_path: Path) -> None:
    with pytest.raises(SocketError, match="shorter --socket"):
        asyncio.run(start_observer(ObserverService(agent, agent.ring), tmp_path / ("x" * 120)))


@pytest.mark.parametrize("verb", ["agent", "observe", "monitor", "endpoint", "status"])
def test_help_shows_examples_and_exit_codes(verb: str) -> None:
    arguments = (verb, "list", "--help") if verb == "endpoint" else (verb, "--help")
    text = meshbridge(*arguments).output
    assert "Examples:" in text
    assert "Exit codes:" in text
