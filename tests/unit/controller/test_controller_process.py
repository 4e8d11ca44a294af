"""The production command as a process: manifests in, revisions out, over its own socket with its own tokens."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from envoy.config.core.v3.base_pb2 import Node
from envoy.service.discovery.v3 import ads_pb2_grpc
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest

from meshbridge.protos.agent_pb2 import Policy
from meshbridge.xds import types as xds
from meshbridge.xds.auth import load_key, mint_token, node_caller
from meshbridge.xds.bearer import bearer
from meshbridge.xds.client import ControllerClient, Update

INPUTS = Path(__file__).parents[3] / "manifests" / "inputs"
COMMAND = [sys.executable, "-c", "from meshbridge.cli import main; main()", "controller"]
POLICY = "cilium.io/CiliumNetworkPolicy/finance/transaction-service-l4-access"
POD = """\
apiVersion: v1
kind: Pod
metadata: {name: server, namespace: finance, uid: uid-server, labels: {app: transaction-service}}
spec: {nodeName: node-a, containers: [{name: app}]}
status: {phase: Running, podIP: 10.0.0.1}
"""


class Process:
    def __init__(self, directory: Path) -> None:
        self.manifests, self.kubelet, self.state = directory / "manifests", directory / "kubelet", directory / "state"
        self.socket = directory / "s"
        for folder in (self.manifests, self.kubelet):
            folder.mkdir()
        self.policy = self.manifests / "policy.yaml"
        self.policy.write_bytes((INPUTS / "cilium-l4-policy.yaml").read_bytes())
        (self.kubelet / "server.yaml").write_text(POD)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.http = f"127.0.0.1:{probe.getsockname()[1]}"
        self.child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [*COMMAND, "--listen", f"unix:{self.socket}"]
        command += ["--manifests", str(self.manifests), "--manifests", str(self.kubelet)]
        command += ["--state-dir", str(self.state), "--metrics", self.http]
        self.child = subprocess.Popen(command, stderr=subprocess.PIPE)

    def end(self, number: signal.Signals) -> tuple[int, str]:
        assert self.child is not None
        self.child.send_signal(number)
        _, log = self.child.communicate(timeout=20)
        code, self.child = self.child.returncode, None
        return code, log.decode()

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://{self.http}{path}", timeout=5) as answer:
            return answer.read().decode()

    def token(self) -> str:
        return mint_token(load_key(self.state / "token.key"), node_caller("node-a"), now=datetime.now(UTC))

    def client(self) -> ControllerClient:
        return ControllerClient(f"unix:{self.socket}", "node-a", self.token)


@pytest.fixture
def process(tmp_path: Path) -> Iterator[Process]:
    running = Process(tmp_path)
    yield running
    if running.child is not None:
        running.child.kill()
        running.child.communicate()


async def next_with(updates: AsyncIterator[Update], type_url: str) -> Update:
    """The next update in which something of that type changed."""
    async with asyncio.timeout(30):
        async for update in updates:
            if update.changed[type_url]:
                return update
    raise AssertionError("the client ended")


def port_of(update: Update) -> str:
    policy = update.changed[xds.POLICY][POLICY]
    assert isinstance(policy, Policy)
    port: str = json.loads(policy.json)["spec"]["ingress"][0]["toPorts"][0]["ports"][0]["port"]
    return port


def test_policies_travel_a_broken_file_loosens_nothing_and_a_restart_loses_nothing(process: Process) -> None:
    async def body() -> None:
        process.start()
        updates = process.client().updates()
        first = await next_with(updates, xds.POLICY)
        assert port_of(first) == "8080"
        assert set(first.changed[xds.ENDPOINT]) == {"uid-server"}
        assert set(first.changed[xds.ADDRESS]) == {"10.0.0.1"}

        text = process.policy.read_text()
        process.policy.write_text(text.replace("8080", "9090"))
        assert port_of(await next_with(updates, xds.POLICY)) == "9090"

        process.policy.write_text("a: [")
        broken = await next_with(updates, xds.PROBLEM)
        assert not any(broken.removed.values())
        (problem,) = json.loads(process.get("/problems"))
        assert (problem["file"], problem["line"], problem["reason"]) == (str(process.policy), 2, "unreadable")
        assert 'meshbridge_controller_problems{reason="unreadable"} 1.0' in process.get("/metrics")
        assert json.loads(process.get("/healthz")) == {"synced": True}

        process.end(signal.SIGKILL)
        process.start()
        process.policy.with_name("other.yaml").write_text(text.replace("l4-access", "second"))
        after = await next_with(updates, xds.POLICY)
        assert POLICY not in after.changed[xds.POLICY], "it is still what the client holds"
        assert not any(after.removed.values()), "the broken file's policy outlived the restart"
        assert after.revision > broken.revision
        code, log = process.end(signal.SIGTERM)
        assert code == 0
        assert "Traceback" not in log
        assert "PRIVATE KEY" not in log
        assert process.token() not in log
        await updates.aclose()  # type: ignore[attr-defined]

    asyncio.run(body())


def test_a_wrong_setting_is_one_sentence_and_no_start(process: Process) -> None:
    process.state.mkdir()
    key = process.state / "token.key"
    key.write_bytes(b"k" * 32)
    key.chmod(0o644)
    process.start()
    assert process.child is not None
    _, log = process.child.communicate(timeout=20)
    assert process.child.returncode == 1
    assert log.decode().strip() == f"Error: token key {key}: mode 0644 lets others read it; chmod 600 {key}"
    process.child = None


def test_metrics_are_served_on_loopback_only(tmp_path: Path) -> None:
    command = [*COMMAND, "--manifests", str(tmp_path), "--metrics", "0.0.0.0:9"]
    done = subprocess.run(
        [*command, "--state-dir", str(tmp_path / "state")],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1
    assert b"not on loopback" in done.stderr


async def subscribe(call: grpc.aio.StreamStreamCall, type_url: str) -> None:
    await call.write(DeltaDiscoveryRequest(node=Node(id="node-a"), type_url=type_url))


def test_what_a_node_does_not_take_is_a_problem_until_its_stream_ends(process: Process) -> None:
    async def until(wanted: int) -> list[dict[str, object]]:
        async with asyncio.timeout(30):
            while len(found := json.loads(process.get("/problems"))) != wanted:  # noqa: ASYNC110 - of a process
                await asyncio.sleep(0.05)
        return list(found)

    async def body() -> None:
        process.start()
        await next_with(process.client().updates(), xds.POLICY)
        async with grpc.aio.insecure_channel(f"unix:{process.socket}") as channel:
            stub = ads_pb2_grpc.AggregatedDiscoveryServiceStub(channel)
            call = stub.DeltaAggregatedResources(metadata=bearer(process.token()))
            await subscribe(call, xds.POLICY)
            response = await call.read()
            answer = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
            answer.error_detail.message = "field 99 is of a later\nversion"
            await call.write(answer)
            (problem,) = await until(1)
            assert problem["reason"] == "nacked"
            assert str(problem["text"]).startswith(
                f"node node-a does not take Policy {POLICY}: field 99 is of a later version; "
            )
            metrics = process.get("/metrics")
            assert 'meshbridge_controller_problems{reason="nacked"} 1.0' in metrics
            assert 'meshbridge_xds_nacks_total{type="Policy"} 1.0' in metrics
            call.cancel()
            await until(0)
        _, log = process.end(signal.SIGTERM)
        assert "resources.refused" in log

    asyncio.run(body())
