"""What every step needs: the pods, requests from inside them, and the counters that judge."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import IO, Any

from meshbridge.demo import lifecycle, pods, sidecar, tokens
from meshbridge.demo.apps.server import COUNTERS_PORT
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import APPLICATION_UID, NODES, meshbridge
from meshbridge.demo.netns import http_get
from meshbridge.demo.processes import Command
from meshbridge.demo.records import PodRecord
from meshbridge.demo.waiting import poll
from meshbridge.demo.walk.report import Report
from meshbridge.observe.client import find_agents, merged_history
from meshbridge.observe.filters import FlowFilter, PodFilter
from meshbridge.observe.flow import Flow, FlowKind

SERVICE_PORT = 8080
SERVICE_PATH = "/api/v1/process"
SERVICE = "finance/transaction-service"
EVENT_TIMEOUT_S = 3.0
# Envoy's counters that move when anybody reaches the inbound listener, with a filter chain for it or (STRICT) without.
_INBOUND_CONNECTIONS = r"^listener\.inbound\.(downstream_cx_total|no_filter_chain_match)$"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ended: status 0 means that no HTTP answer came, ``error`` why."""

    status: int
    headers: dict[str, str]
    body: str
    error: str
    elapsed_s: float

    def __str__(self) -> str:
        return f"HTTP {self.status}" if self.status else f"no answer ({self.error})"

    @property
    def explanation(self) -> str:
        """What the refusal says of itself: our header, else the body."""
        named = [f"{name}: {value}" for name, value in self.headers.items() if name.startswith("x-meshbridge-")]
        return "; ".join([*named, *([self.body.strip()] if self.body.strip() else [])])


@dataclass(frozen=True, slots=True)
class Arrived:
    """What had reached the service at one moment: its application's own counters, and its Envoy's."""

    counters: dict[str, int]
    envoy_connections: int

    def since(self, earlier: Arrived, name: str) -> int:
        """By how much a counter of the application has grown."""
        return self.counters.get(name, 0) - earlier.counters.get(name, 0)


@dataclass(frozen=True, slots=True)
class Output:
    """What a command printed, and its exit code."""

    code: int
    lines: list[str]


@dataclass(slots=True)
class Traffic:
    """A running traffic program; ``attempts`` are there once it was stopped."""

    process: subprocess.Popen[bytes]
    attempts: list[dict[str, Any]] = field(default_factory=list)
    stopped: bool = False

    def stop(self) -> list[dict[str, Any]]:
        """End it, if that was not done already, and return what became of each attempt."""
        if not self.stopped:
            self.stopped = True
            output, errors = self.process.communicate(timeout=20)
            try:
                self.attempts = json.loads(output)
            except json.JSONDecodeError as error:
                raise DemoError(f"the traffic program failed: {errors.decode()[-300:]}", where="demo") from error
        return self.attempts


@dataclass(slots=True)
class Conversation:
    """One open connection of a client; each call sends a request on it."""

    process: subprocess.Popen[bytes]

    def request(self) -> Outcome:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return Outcome(0, {}, "", "the client had ended", 0.0)
        return _outcome(self.process.stdout)


@dataclass(slots=True)
class Walk:
    """The mesh as the steps see it, and the report they write."""

    report: Report

    @property
    def service(self) -> PodRecord:
        return lifecycle.find_pod(SERVICE)

    def pod(self, name: str) -> PodRecord:
        return lifecycle.find_pod(name)

    def token(self, **claims: Any) -> str:
        return tokens.mint(claims)

    def address(self, record: PodRecord, family: str) -> str:
        return record.ipv6 if family == "6" else record.ipv4

    def url(self, family: str = "4", path: str = SERVICE_PATH, scheme: str = "http") -> str:
        host = self.address(self.service, family)
        return f"{scheme}://{f'[{host}]' if family == '6' else host}:{SERVICE_PORT}{path}"

    def request(
        self,
        client: PodRecord,
        url: str,
        *options: str,
        token: str = "",
        uid: int = APPLICATION_UID,
        timeout_s: float = 3.0,
    ) -> Outcome:
        """One request by a program in the client's pod."""
        argv = ["python3", "-m", "meshbridge.demo.apps.request", "--timeout", str(timeout_s), *options, url]
        with _popen(pods.exec_command(client, argv, {"TOKEN": token}, uid)) as process:
            return _outcome(process.stdout)

    @contextmanager
    def conversation(self, client: PodRecord, url: str, *options: str, token: str = "") -> Iterator[Conversation]:
        """A client that keeps one connection open."""
        argv = ["python3", "-m", "meshbridge.demo.apps.request", "--keep-open", *options, url]
        with _popen(pods.exec_command(client, argv, {"TOKEN": token})) as process:
            yield Conversation(process)

    @contextmanager
    def traffic(self, client: PodRecord, *argv: str, token: str = "", uid: int = APPLICATION_UID) -> Iterator[Traffic]:
        """Steady traffic from the client's pod, under way when the block begins and stopped at its end."""
        command = ["python3", "-m", "meshbridge.demo.apps.traffic", *argv]
        with _popen(pods.exec_command(client, command, {"TOKEN": token}, uid)) as process:
            assert process.stdout is not None
            if process.stdout.readline() != b"started\n":
                raise DemoError("the traffic program did not start", where=f"pod {client.key}")
            traffic = Traffic(process)
            yield traffic
            traffic.stop()

    def arrived(self, record: PodRecord | None = None) -> Arrived:
        """A server's counters now; the service's, when none is named."""
        record = record or self.service
        answer = http_get(record.netns, "127.0.0.1", COUNTERS_PORT, "/")
        if answer.status != 200:
            raise DemoError(f"its counters do not answer: {answer.error}", where=f"pod {record.key}")
        connections = sidecar.counters(record, _INBOUND_CONNECTIONS)
        if not connections:
            raise DemoError("has no counter of inbound connections", where=f"Envoy of {record.key}")
        return Arrived(json.loads(answer.body), sum(connections.values()))

    def flows(self, node: str, since_ns: int, kind: FlowKind, source: PodRecord, destination: PodRecord) -> list[Flow]:
        """What the node's agent recorded of new flows from one pod to another."""
        wanted = FlowFilter(
            kinds=frozenset({kind}),
            from_pods=(PodFilter(source.namespace, source.name),),
            to_pods=(PodFilter(destination.namespace, destination.name),),
            since_ns=since_ns,
        )
        return [flow for flow in merged_history(find_agents(None, node)) if wanted.matches(flow) and flow.kind is kind]

    def wait_flow(
        self, node: str, since_ns: int, kind: FlowKind, source: PodRecord, destination: PodRecord, family: str = ""
    ) -> Flow | None:
        """The newest such flow, waited for a moment; None when there is none."""
        version = {"4": (4,), "6": (6,), "": (4, 6)}[family]

        def look() -> list[Flow]:
            found = self.flows(node, since_ns, kind, source, destination)
            return [flow for flow in found if flow.source.address and flow.source.address.version in version]

        found = poll(look, EVENT_TIMEOUT_S)
        return found[-1] if found else None

    def command(self, *argv: str) -> list[str]:
        """Run a `meshbridge` command, show it and what it printed; returns its lines."""
        lines = self.output(*argv).lines
        self.quote(argv, lines)
        return lines

    def output(self, *argv: str) -> Output:
        """Run a `meshbridge` command without showing it."""
        done = subprocess.run([meshbridge(), *argv], capture_output=True, text=True, timeout=60, check=False)
        return Output(done.returncode, (done.stdout + done.stderr).splitlines())

    def quote(self, argv: Sequence[str], lines: list[str]) -> None:
        """Show a `meshbridge` command with those of its lines that matter."""
        self.report.quote(f"meshbridge {' '.join(argv)}", lines)

    def uplink(self, node: str) -> str:
        """The interface by which the other node's packets come in."""
        (other,) = [name for name in NODES if name != node]
        return f"to-{other}"


def now_ns() -> int:
    """The moment from which on events count as later; the agents' clock, which is this machine's."""
    return time.time_ns()


def rules_text(flow: Flow) -> str:
    """The rules behind a flow, with file and line."""
    return ", ".join(str(rule) for rule in flow.rules) or "no rule named"


def summary(outcomes: Sequence[Outcome]) -> str:
    return ", ".join(str(outcome) for outcome in outcomes)


@contextmanager
def _popen(command: Command) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        command.full_argv(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"LANG": "C.UTF-8", **command.env},
    )
    try:
        yield process
    finally:
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # it may have ended by itself
            process.stdin.close()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


def _outcome(stdout: IO[bytes] | None) -> Outcome:
    assert stdout is not None
    line = stdout.readline()
    if not line:
        return Outcome(0, {}, "", "the client wrote nothing", 0.0)
    return Outcome(**json.loads(line))
