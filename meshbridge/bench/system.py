"""The product itself, by its own commands: a controller on manifests the bench writes, an agent, an authz server."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc

from meshbridge.bench import cluster
from meshbridge.bench.cluster import Object, Place
from meshbridge.bench.errors import BenchError
from meshbridge.bench.network import NETNS, Netns, Node, delete_netns, running_processes, stale_names
from meshbridge.bench.processes import Process, start
from meshbridge.bench.workbench import Workbench
from meshbridge.datapath.maps import DEFAULT_PIN_ROOT, open_pinned_maps
from meshbridge.datapath.policysets import read_sets
from meshbridge.datapath.tables import TableName, kernel_tables
from meshbridge.protos import observer_pb2, observer_pb2_grpc
from meshbridge.xds.auth import load_or_create_key, mint_token, node_caller

RUN = Path("/run/meshbridge")
ENDPOINT_TIMEOUT_S = 60  # a controller that reads ten thousand pods first takes its time
_POLL_S = 0.005
_STATUS_POLL_S = 0.03  # asking costs the agent a connection: not so often that it slows what is timed
_TOKEN_LIFETIME = timedelta(hours=2)


@dataclass(slots=True)
class System:
    """One controller, and one node with its agent; everything of it ends with the workbench's stack.

    ``agent_core`` is the measured core where the agent is what is measured; else agents keep off it.
    """

    bench: Workbench
    node: Node
    folder: Path
    controller: Process
    agent_core: int | None
    agent: Process = field(init=False)

    @property
    def manifests(self) -> Path:
        return self.folder / "manifests"

    @property
    def pins(self) -> Path:
        return DEFAULT_PIN_ROOT / self.node.name

    @property
    def authz_socket(self) -> Path:
        return RUN / self.node.name / "authz.sock"

    def write(self, objects: Iterable[Object], stem: str) -> None:
        """The controller sees these objects from now on; each file appears whole."""
        for name, text in cluster.files(objects, stem):
            replace_file(self.manifests / name, text)

    def start_agent(self) -> Process:
        """Start the node's agent (again)."""
        self.agent = self._start("agent", self.agent_core)
        return self.agent

    def start_authz(self) -> Process:
        """Start the node's authz server; its socket is there when this returns."""
        authz = self._start("authz", self.bench.core)
        wait_until(self.authz_socket.exists, "the authz server's socket", authz)
        return authz

    def add_endpoint(self, place: Place, interface: str, netns: Netns, *, wait_ready: bool = True) -> None:
        """The agent enforces the pod's policy on the interface; what a CNI plugin would ask for."""
        request = observer_pb2.AddEndpointRequest(
            namespace=cluster.NAMESPACE, pod=place.name, uid=place.uid, interfaces=[interface],
            netns=str(netns.path), wait_ready=wait_ready, timeout_s=ENDPOINT_TIMEOUT_S,
        )  # fmt: skip
        with self._channel() as channel:
            try:
                answer = _stub(channel).AddEndpoint(request, timeout=ENDPOINT_TIMEOUT_S + 2, wait_for_ready=True)
            except grpc.RpcError as error:
                self.agent.check()
                raise BenchError(f"does not take pod {place.name}: {error.details()}", where="agent") from error
        if wait_ready and not answer.ready:
            raise BenchError(f"pod {place.name} got no policy; {self.agent.last_lines()}", where="agent")

    def status(self) -> observer_pb2.Status | None:
        """What the agent says of itself; None while nobody answers."""
        with self._channel() as channel:
            try:
                answer = _stub(channel).GetStatus(observer_pb2.GetStatusRequest(), timeout=2)
            except grpc.RpcError:
                return None
        assert isinstance(answer, observer_pb2.Status)
        return answer

    def wait_programmed(self, endpoints: int, policies: int, timeout_s: float = 180) -> observer_pb2.Status:
        """Every endpoint is ready, and everything received is in the kernel."""
        found: list[observer_pb2.Status] = []

        def programmed() -> bool:
            self.controller.check()
            status = self.status()
            if status is None or status.policies < policies or status.endpoints_ready < endpoints:
                return False
            found.append(status)
            return status.revision_programmed >= status.revision_received > 0

        what = f"{endpoints} endpoints and {policies} policies in the kernel"
        wait_until(programmed, what, self.agent, timeout_s, _STATUS_POLL_S)
        return found[-1]

    def policy_entries(self) -> int:
        """How many policy entries the node's kernel has."""
        maps = open_pinned_maps(self.pins)
        try:
            sets = read_sets(kernel_tables(maps)[TableName.POLICY_SETS].read())
            return sum(map(len, sets.values()))
        finally:
            maps.close()

    def _channel(self) -> grpc.Channel:
        # A Unix socket has no authority, and servers may refuse the path that grpc would send as one.
        options = [("grpc.default_authority", "localhost")]
        return grpc.insecure_channel(f"unix:{RUN / self.node.name / 'agent.sock'}", options=options)

    def _start(self, verb: str, core: int | None) -> Process:
        self.controller.check()
        argv = [meshbridge(), verb, "--node", self.node.name, "--controller", f"unix:{self.folder / 'controller.sock'}"]
        argv += ["--token-file", str(self.folder / "node.token")]
        process = start(
            self.bench.stack, argv, self.bench.folder / f"{self.node.name}-{verb}.log", netns=self.node.netns, core=core
        )
        process.name = verb
        return process


def start_system(bench: Workbench, node: Node, objects: Sequence[Object], *, agent_core: int | None = None) -> System:
    """A controller that serves ``objects``, and the node's agent, both in the node's namespace."""
    folder = bench.folder / node.name
    system = System(bench, node, folder, _start_controller(bench, node, folder, objects), agent_core)
    system.start_agent()
    return system


def _start_controller(bench: Workbench, node: Node, folder: Path, objects: Sequence[Object]) -> Process:
    (folder / "manifests").mkdir(parents=True)
    bench.stack.callback(remove_node, node.name)
    key = load_or_create_key(folder / "state" / "token.key")
    token = mint_token(key, node_caller(node.name), now=datetime.now(UTC), lifetime=_TOKEN_LIFETIME)
    (folder / "node.token").touch(mode=0o600)
    (folder / "node.token").write_text(token)
    for file, text in cluster.files([*cluster.base({node.name: node.address}), *objects], "objects"):
        replace_file(folder / "manifests" / file, text)
    argv = [meshbridge(), "controller", "--manifests", str(folder / "manifests"), "--state", str(folder / "state")]
    argv += ["--listen", f"unix:{folder / 'controller.sock'}"]
    controller = start(bench.stack, argv, bench.folder / f"{node.name}-controller.log", netns=node.netns)
    controller.name = "controller"
    wait_until((folder / "controller.sock").exists, "the controller's socket", controller)
    return controller


def replace_file(path: Path, text: str) -> None:
    """The file has this content from one moment to the next; watchers never see half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)


def remove_node(node: str) -> None:
    """Nothing of the node is left in bpffs and under /run."""
    for directory in (DEFAULT_PIN_ROOT / node, RUN / node):
        if directory.is_dir():
            shutil.rmtree(directory)


def sweep() -> None:
    """Remove what earlier runs left that were killed: namespaces with their links, pins, sockets, files."""
    running = running_processes()
    places: dict[Path, Callable[[str], None]] = {
        NETNS: lambda name: delete_netns(Netns(name)),
        DEFAULT_PIN_ROOT: remove_node,
        RUN: remove_node,
        Path(tempfile.gettempdir()): lambda name: shutil.rmtree(Path(tempfile.gettempdir()) / name),
    }
    for directory, remove in places.items():
        names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
        for name in stale_names(names, running):
            remove(name)


def wait_until(
    condition: Callable[[], bool], what: str, process: Process, timeout_s: float = 20, poll_s: float = _POLL_S
) -> None:
    """``condition`` holds; BenchError when ``process`` ends first, or the time is up."""
    until = time.monotonic() + timeout_s
    while not condition():
        process.check()
        if time.monotonic() > until:
            raise BenchError(f"no {what} after {timeout_s:g} s: {process.last_lines()}", where=process.name)
        time.sleep(poll_s)


def meshbridge() -> str:
    return str(Path(sys.prefix) / "bin" / "meshbridge")


def _stub(channel: grpc.Channel) -> observer_pb2_grpc.ObserverStub:
    return observer_pb2_grpc.ObserverStub(channel)  # type: ignore[no-untyped-call]  # generated
