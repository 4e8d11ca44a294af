"""A node in a network namespace: real veths, the real agent as a process, the real xDS server, scripted."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import yaml

from meshbridge.controller.messages import address_message, endpoint_message, policy_message
from meshbridge.identity.model import Entity, Peer, Workload
from meshbridge.observe.client import Agent as AgentClient
from meshbridge.observe.client import AgentUnreachable
from meshbridge.observe.flow import Flow
from meshbridge.policy.model import Document, Source
from meshbridge.protos import agent_pb2, observer_pb2
from meshbridge.xds import types as xds
from meshbridge.xds.auth import Caller, TokenKey, mint_token, node_caller
from meshbridge.xds.server import DeltaServer, start_server
from meshbridge.xds.snapshot import Resource, Snapshot

PREFIX = f"mbagt{os.getpid() % 100000}"
KEY = b"k" * 32
MESHBRIDGE = str(Path(sys.executable).parent / "meshbridge")
GATEWAY4, GATEWAY6 = "10.77.0.1", "fd77::1"


def run(*argv: str, check: bool = True) -> str:
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(argv)}: {done.stderr.strip()}")
    return done.stdout


def inside(netns: str, *argv: str) -> list[str]:
    # `ip netns exec` would hide bpffs
    return ["nsenter", f"--net=/run/netns/{netns}", *argv]


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod with a real interface."""

    workload: Workload
    netns: str
    interface: str

    @property
    def ipv4(self) -> str:
        return str(self.workload.addresses[0])

    @property
    def ipv6(self) -> str:
        return str(self.workload.addresses[1])

    @property
    def key(self) -> str:
        return self.workload.key


@dataclass
class ScriptedController:
    """The real delta server; what it serves is set by the test."""

    socket: Path
    revision: int = 0
    _snapshot: Snapshot | None = None
    _wakes: set[Callable[[], None]] = field(default_factory=set)
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _server: Any = None
    _thread: threading.Thread | None = None

    @property
    def snapshot(self) -> Snapshot | None:
        return self._snapshot

    @property
    def refusal(self) -> str:
        return ""

    def open(self, _caller: Caller, wake: Callable[[], None]) -> ScriptedController:
        self._wakes.add(wake)
        return self

    def close(self) -> None:
        pass

    def start(self) -> None:
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.serve()

    def serve(self) -> None:
        self._server = self._call(start_server(DeltaServer(TokenKey(KEY), self), f"unix:{self.socket}"))

    def go_away(self) -> None:
        self._call(self._server.stop(0))
        self._wakes.clear()

    def stop(self) -> None:
        with suppress(Exception):
            self.go_away()
        self._loop.call_soon_threadsafe(self._loop.stop)
        assert self._thread is not None
        self._thread.join(5)

    def put(self, types: Mapping[str, Mapping[str, Any]]) -> int:
        """Serve this state as the next revision."""
        self.revision += 1
        full = {**types, xds.REVISION: {"revision": agent_pb2.Revision(number=self.revision)}}
        self._snapshot = Snapshot(
            {
                type_url: {name: Resource.of(m.SerializeToString(deterministic=True)) for name, m in named.items()}
                for type_url, named in full.items()
            }
        )
        self._loop.call_soon_threadsafe(lambda: [wake() for wake in list(self._wakes)])
        return self.revision

    def _call(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(10)


@dataclass
class NodeHarness:
    """One node and everything on it; ``close`` leaves nothing behind."""

    directory: Path
    name: str = ""
    subnet: int = 77
    attach: str = "auto"
    all_mesh_policies: bool = False
    options: tuple[str, ...] = ()
    """Further ones of the agent, for its clean-up too."""
    pods: dict[str, Pod] = field(default_factory=dict)
    policies: dict[str, Document] = field(default_factory=dict)
    services: dict[str, agent_pb2.Service] = field(default_factory=dict)
    faults: dict[str, str] = field(default_factory=dict)
    controller: ScriptedController = field(init=False)
    agent: subprocess.Popen[bytes] | None = None
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _count: int = 0

    def __post_init__(self) -> None:
        self.prefix = f"{PREFIX}-{self.subnet}"
        self.name = self.name or f"{PREFIX}n"
        self.netns = f"{self.prefix}-node"
        self.controller = ScriptedController(self.directory / "controller.sock")
        self.socket = self.directory / "agent.sock"
        self.cni_socket = self.directory / "cni.sock"
        self.token = self.directory / "token"
        self.token.write_text(mint_token(KEY, node_caller(self.name), now=datetime.now(UTC)))
        self.pin_root = Path("/sys/fs/bpf/meshbridge-tests")
        self.log = self.directory / "agent.log"

    # Set-up

    def open(self) -> NodeHarness:
        self._remove_namespaces()
        run("ip", "netns", "add", self.netns)
        run("ip", "-n", self.netns, "link", "set", "lo", "up")
        self._sysctl(self.netns, "net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
        self.controller.start()
        return self

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(5)
        if self.agent is not None:
            self.agent.kill()
            self.agent.wait(5)
        self.controller.stop()
        subprocess.run(inside(self.netns, *self.cleanup_command()), capture_output=True, timeout=30, check=False)
        self._remove_namespaces()
        with suppress(OSError):
            self.pin_root.rmdir()

    def _remove_namespaces(self) -> None:
        for line in run("ip", "netns", "list").splitlines():
            name = line.split()[0]
            if name.startswith(f"{self.prefix}-"):
                run("ip", "netns", "del", name)

    def _sysctl(self, netns: str, *settings: str) -> None:
        run(*inside(netns, "sysctl", "-qw", *settings))

    def add_pod(self, namespace: str, name: str, *, announce: bool = True, **labels: str) -> Pod:
        """A pod with an interface. It is told to the controller by ``sync``."""
        self._count += 1
        number = self._count + 1
        netns, interface = f"{self.prefix}-p{number}", f"mbv{number}"
        ipv4, ipv6 = f"10.{self.subnet}.0.{number}", f"fd{self.subnet}::{number:x}"
        workload = Workload(
            namespace, name, f"uid-{name}-{number}", self.name, (ip_address(ipv4), ip_address(ipv6)),
            labels=labels or {"app": name}, namespace_labels={"kubernetes.io/metadata.name": namespace},
        )  # fmt: skip
        pod = Pod(workload, netns, interface)
        self._plug(pod, ipv4, ipv6)
        self.pods[pod.key] = pod
        if announce:
            self.announce(pod)
        return pod

    def _plug(self, pod: Pod, ipv4: str, ipv6: str) -> None:
        run("ip", "netns", "add", pod.netns)
        self._sysctl(pod.netns, "net.ipv6.conf.default.accept_dad=0", "net.ipv6.conf.all.accept_dad=0")
        self._sysctl(self.netns, "net.ipv6.conf.default.accept_dad=0")
        run("ip", "-n", self.netns, "link", "add", pod.interface, "type", "veth", "peer", "name", "eth0", "netns",
            pod.netns)  # fmt: skip
        node, inner = ("ip", "-n", self.netns), ("ip", "-n", pod.netns)
        run(*node, "addr", "add", f"{GATEWAY4}/32", "dev", pod.interface)
        run(*node, "addr", "add", f"{GATEWAY6}/128", "dev", pod.interface, "nodad")
        run(*node, "link", "set", pod.interface, "up")
        run(*inner, "link", "set", "lo", "up")
        run(*inner, "addr", "add", f"{ipv4}/32", "dev", "eth0")
        run(*inner, "addr", "add", f"{ipv6}/128", "dev", "eth0", "nodad")
        run(*inner, "link", "set", "eth0", "up")
        for family, gateway in (("-4", GATEWAY4), ("-6", GATEWAY6)):
            run(*inner, family, "route", "add", gateway, "dev", "eth0")
            run(*inner, family, "route", "add", "default", "via", gateway)
        run(*node, "-4", "route", "add", f"{ipv4}/32", "dev", pod.interface)
        run(*node, "-6", "route", "add", f"{ipv6}/128", "dev", pod.interface)

    def remove_pod(self, pod: Pod) -> None:
        run("ip", "netns", "del", pod.netns)
        run("ip", "-n", self.netns, "link", "del", pod.interface, check=False)
        self.pods.pop(pod.key)

    def announce(self, pod: Pod, *, wait_ready: bool = False) -> observer_pb2.AddEndpointResponse:
        """What a CNI plugin does."""
        request = observer_pb2.AddEndpointRequest(
            namespace=pod.workload.namespace, pod=pod.workload.name, uid=pod.workload.uid,
            interfaces=[pod.interface], wait_ready=wait_ready, timeout_s=10,
        )  # fmt: skip
        client = self.client
        with client.channel() as channel:
            return client.stub(channel).AddEndpoint(request, timeout=15)  # type: ignore[no-any-return]

    # What the controller says

    def apply(self, text: str) -> None:
        """Add or replace policies."""
        for data in yaml.safe_load_all(text):
            meta = data["metadata"]
            document = Document(data["kind"], data["apiVersion"], meta.get("namespace", ""), meta["name"], data,
                                Source("policies.yaml", {"": 1, "spec": 6, "spec.ingress[0]": 9}))  # fmt: skip
            self.policies["/".join(document.key)] = document

    def sync(self, *, wait: bool = True, others: Iterable[tuple[str, Peer]] = ()) -> int:
        """Send pods, addresses and policies as one revision; returns its number, with ``wait`` once it is in force."""
        addresses: dict[str, Any] = {}
        for pod in self.pods.values():
            for address in pod.workload.addresses:
                addresses[str(address)] = address_message(
                    address, pod.workload.peer(), name=pod.workload.name, uid=pod.workload.uid, node=self.name
                )
        for text, peer in others:
            addresses[text] = address_message(ip_address(text), peer)
        revision = self.controller.put(
            {
                xds.ENDPOINT: {
                    pod.workload.uid: endpoint_message(pod.workload, fault=self.faults.get(pod.key, ""))
                    for pod in self.pods.values()
                },
                xds.ADDRESS: addresses,
                xds.SERVICE: self.services,
                xds.POLICY: {key: policy_message(document) for key, document in self.policies.items()},
                xds.MESH: {"mesh": agent_pb2.Mesh(root_namespace="istio-system", trust_domain="cluster.local",
                                                  cluster="default", all_mesh_policies=self.all_mesh_policies)},
            }
        )  # fmt: skip
        if wait:
            self.wait(lambda status: status.revision_programmed >= revision, f"revision {revision}")
        return revision

    def relabel(self, pod: Pod, **labels: str) -> Pod:
        changed = replace(pod, workload=replace(pod.workload, labels=labels))
        self.pods[pod.key] = changed
        return changed

    # The agent

    def _agent_options(self) -> list[str]:
        return ["agent", "--node", self.name, "--bpffs", str(self.pin_root), "--attach", self.attach, *self.options]

    def cleanup_command(self) -> list[str]:
        return [MESHBRIDGE, *self._agent_options(), "--cleanup"]

    def start_agent(self) -> float:
        """Start the agent; returns the seconds until its socket answered."""
        started = time.monotonic()
        options = [*self._agent_options(), "--socket", str(self.socket), "--token-file", str(self.token)]
        options += ["--controller", f"unix:{self.controller.socket}", "--cni-socket", str(self.cni_socket)]
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(inside(self.netns, MESHBRIDGE, *options), stderr=log, stdout=log)
        self.wait(lambda _: True, "the agent's socket")
        return time.monotonic() - started

    def kill_agent(self, number: int = signal.SIGKILL) -> None:
        assert self.agent is not None
        self.agent.send_signal(number)
        self.agent.wait(10)
        self.agent = None

    @property
    def client(self) -> AgentClient:
        return AgentClient(self.socket)

    def wait(self, condition: Callable[[observer_pb2.Status], bool], what: str, timeout_s: float = 20.0) -> None:
        deadline = time.monotonic() + timeout_s
        status: observer_pb2.Status | None = None
        while time.monotonic() < deadline:
            if self.agent is not None and self.agent.poll() is not None:
                raise AssertionError(f"the agent ended: {self.log.read_text()[-3000:]}")
            with suppress(AgentUnreachable):
                status = self.client.status()
                if condition(status):
                    return
            time.sleep(0.02)
        raise AssertionError(f"no {what} after {timeout_s} s; {status}; {self.log.read_text()[-3000:]}")

    def flows(self) -> list[Flow]:
        return self.client.history()

    # Traffic

    def listen(self, pod: Pod, port: int, uid: int = 0) -> None:
        """A TCP server in the pod that sends back what it gets, in both families."""
        code = (
            f"import os,socket,threading,sys\nos.setuid({uid})\n"
            f"s=socket.create_server(('::',{port}),family=socket.AF_INET6,dualstack_ipv6=True,backlog=512)\n"
            "sys.stdout.write('up\\n');sys.stdout.flush()\n"
            "def serve(c):\n"
            " with c:\n"
            "  while (d:=c.recv(65536)): c.sendall(d)\n"
            "while True: threading.Thread(target=serve,args=(s.accept()[0],),daemon=True).start()\n"
        )
        process = subprocess.Popen(inside(pod.netns, sys.executable, "-c", code), stdout=subprocess.PIPE)
        self._processes.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"

    def reaches(
        self, netns: str, address: str, port: int, *, timeout_s: float = 0.6, bind: str = "", uid: int = 0
    ) -> bool:
        """Whether a payload goes to ``address`` and comes back."""
        code = (
            f"import os,socket,sys\nos.setuid({uid})\n"
            f"try:\n s=socket.create_connection(({address!r},{port}),{timeout_s},"
            f"source_address=({bind!r},0) if {bind!r} else None)\n"
            " s.sendall(b'payload'); sys.exit(0 if s.recv(7)==b'payload' else 3)\n"
            "except OSError: sys.exit(4)\n"
        )
        done = subprocess.run(inside(netns, sys.executable, "-S", "-c", code), timeout=20, check=False)
        assert done.returncode in (0, 4), done
        return done.returncode == 0

    def stream(self, netns: str, address: str, port: int) -> Stream:
        """A connection that sends a numbered payload every few milliseconds and checks that it comes back."""
        return Stream(netns, address, port, self._processes)


class Stream:
    """Traffic that goes on while something else happens."""

    def __init__(self, netns: str, address: str, port: int, processes: list[subprocess.Popen[bytes]]) -> None:
        code = (
            "import socket,sys,time,json,signal\n"
            "stop=[]\n"
            "signal.signal(signal.SIGTERM,lambda *_:stop.append(1))\n"
            f"s=socket.create_connection(({address!r},{port}),3)\n"
            "s.setsockopt(socket.IPPROTO_TCP,socket.TCP_NODELAY,1)\n"
            "sys.stdout.write('up\\n');sys.stdout.flush()\n"
            "n=bad=0;worst=0.0\n"
            "while not stop:\n"
            " t=time.monotonic();m=b'%08d'%n\n"
            " try:\n"
            "  s.sendall(m);r=b''\n"
            "  while len(r)<8:\n"
            "   d=s.recv(8-len(r))\n"
            "   if not d: raise OSError\n"
            "   r+=d\n"
            "  bad+=r!=m\n"
            " except OSError: bad+=1;break\n"
            " worst=max(worst,time.monotonic()-t);n+=1;time.sleep(0.001)\n"
            "retrans=int.from_bytes(s.getsockopt(socket.IPPROTO_TCP,11,104)[100:104],'little')\n"
            "print(json.dumps(dict(sent=n,bad=bad,worst=worst,retransmits=retrans)))\n"
        )
        self._process = subprocess.Popen(inside(netns, sys.executable, "-c", code), stdout=subprocess.PIPE)
        processes.append(self._process)
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == b"up\n"

    def finish(self) -> dict[str, Any]:
        self._process.terminate()
        out, _ = self._process.communicate(timeout=15)
        result: dict[str, Any] = json.loads(out)
        return result


NODE_PEER = Peer(entities=frozenset({Entity.REMOTE_NODE}))


@contextmanager
def running_node(directory: Path, **settings: Any) -> Iterator[NodeHarness]:
    """A node with its agent, as of ``NodeHarness``; nothing of it is left afterwards."""
    harness = NodeHarness(directory, **settings)
    try:
        harness.open()
        harness.start_agent()
        yield harness
    finally:
        harness.close()
