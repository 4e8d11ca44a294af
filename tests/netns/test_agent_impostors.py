"""A process that runs as the proxy's user, on a real node: found among all others, told, and told when it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from agent_harness import NodeHarness, Pod, inside, running_node
from click.testing import CliRunner
from test_agent_capture import ENVOY_PORT, STRICT_AND_A_PATH, eventually, redirect, with_sidecar
from test_agent_ghosts import conditions, given_away

from meshbridge.cli import cli

pytestmark = pytest.mark.root

FOUND_S = 10.0
OUTBOUND_PORT = 15001
_MOUNTS = (Path("/sys/fs/cgroup/unified"), Path("/sys/fs/cgroup"))
CGROUPS = next((path for path in _MOUNTS if (path / "cgroup.procs").exists()), None)
LOOKS_S = 5.0
"""Longer than two looks at a pod's processes."""


@pytest.fixture
def node(tmp_path: Path) -> Iterator[NodeHarness]:
    with running_node(tmp_path, subnet=83) as harness:
        yield harness


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []
    yield started
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(5)


@pytest.fixture
def cgroups() -> Iterator[tuple[Path, Path]]:
    """The control groups of two containers."""
    if CGROUPS is None:
        pytest.skip("no control groups of version 2 are mounted")
    made = [CGROUPS / f"mbimp{os.getpid()}-{name}" for name in ("proxy", "app")]
    try:
        for path in made:
            path.mkdir()
        yield made[0], made[1]
    finally:
        for path in made:
            for _ in range(50):  # of a process that was just killed it is still in use
                with suppress(OSError):
                    path.rmdir()
                    break
                time.sleep(0.1)


def start(
    pod: Pod, code: str, processes: list[subprocess.Popen[bytes]], cgroup: Path | None = None
) -> subprocess.Popen[bytes]:
    """A process in the pod that runs this once it is in its control group, and says when it is ready."""
    enter = f"open({str(cgroup / 'cgroup.procs')!r},'w').write('0')\n" if cgroup else ""
    ready = "sys.stdout.write('up\\n');sys.stdout.flush()\n"
    text = f"import os,socket,sys,time\n{enter}{code}\n{ready}time.sleep(600)\n"
    process = subprocess.Popen(inside(pod.netns, sys.executable, "-S", "-c", text), stdout=subprocess.PIPE,
                               process_group=0)  # fmt: skip
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == b"up\n"
    return process


NAME = Path(sys.executable).name
"""What the kernel calls it."""

ENVOY = f"""
os.setgid(1337);os.setuid(1337)
def listen(p): return socket.create_server(('::',p),family=socket.AF_INET6,dualstack_ipv6=True,reuse_port=True)
held=[listen(p) for p in ({ENVOY_PORT},{OUTBOUND_PORT})]
if os.fork()==0: time.sleep(600)
"""
"""What stands for Envoy: it listens where the rules redirect to, and has a child as pilot-agent has."""


def meshed(node: NodeHarness, processes: list[subprocess.Popen[bytes]]) -> tuple[Pod, Pod]:
    api, web = with_sidecar(node, "shop", "api"), with_sidecar(node, "shop", "web")
    for pod in (api, web):
        redirect(pod)
        start(pod, ENVOY, processes)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    eventually(lambda: len([s for s in node.client.endpoints() if s.state == "ready"]) == 2)
    return api, web


def events(node: NodeHarness) -> list[tuple[str, str, str, str]]:
    """Name, pod, direction and route of each ghost that was told, in order."""
    told = [(flow.agent, flow.destination.pod) for flow in node.flows() if flow.agent is not None]
    found = [(agent.name, pod, dict(agent.details)) for agent, pod in told]
    return [(name, pod, details["direction"], details["route"]) for name, pod, details in found if "route" in details]


def test_a_process_that_runs_as_the_proxy_is_told_until_it_ends_and_nobody_else_is(
    node: NodeHarness, processes: list[subprocess.Popen[bytes]]
) -> None:
    api, web = meshed(node, processes)
    start(web, "os.setuid(1000)", processes)  # the application
    time.sleep(LOOKS_S)
    assert not events(node), "Envoy and its children are no ghosts"
    ghost = start(web, "os.setuid(1337)", processes)
    took = eventually(lambda: bool(events(node)), FOUND_S)
    (told,) = set(events(node))
    route = f"proxy uid or gid (process {ghost.pid} ({NAME}) runs as uid 1337)"
    assert told == ("ghost-bypass-found", "web", "egress", route), took
    (condition,) = conditions(node, web)
    assert (condition.type, condition.status, condition.reason) == ("Captured", False, "GhostBypass")
    assert f"process {ghost.pid}" in condition.message
    assert not conditions(node, api)
    (row,) = [
        row
        for row in json.loads(node.client.bypasses())["bypasses"]
        if row["class"] == "excluded" and row["direction"] == "egress"
    ]
    assert (row["pod"], row["route"]["kind"]) == ("shop/web", "proxy uid or gid")
    assert row["route"]["detail"] == f"process {ghost.pid} ({NAME}) runs as uid 1337"
    assert row["compensation"]["enforced"] is False
    assert [g["kind"] for g in row["guarantees"] if g["fate"] == "lost"]
    shown = CliRunner().invoke(cli, ["bypass", "show", "shop/web", "--socket", str(node.socket)])
    assert f"process {ghost.pid} ({NAME}) runs as uid 1337" in shown.output
    ghost.kill()
    ghost.wait(5)
    eventually(lambda: {event[0] for event in events(node)} == {"ghost-bypass-found", "ghost-bypass-gone"}, FOUND_S)
    assert not conditions(node, web)
    assert {event[1] for event in events(node)} == {"web"}


SOCKET_OF_A_MOMENT = "os.seteuid(1337);s=socket.socket();os.seteuid(0)\ns.settimeout(3);s.connect(({address!r},8080))\n"
WAYS = {
    "the group alone": ("os.setgid(1337);os.setuid(1000)", "runs as gid 1337"),
    "a user it may become again": ("os.setresuid(1000,1000,1337)", "runs as uid 1337"),
    "a hostile name": (
        "open('/proc/self/comm','wb').write(b'a) runs\\n\\x1b[2J');os.setuid(1337)", "(a? runs???2J) runs as uid 1337",
    ),
    "a socket made as the proxy, by one that is it no longer": (SOCKET_OF_A_MOMENT, "holds a socket of uid 1337"),
}  # fmt: skip


@pytest.mark.parametrize(("code", "says"), WAYS.values(), ids=WAYS.keys())
def test_whatever_the_rules_take_for_the_proxy_is_found(
    code: str, says: str, node: NodeHarness, processes: list[subprocess.Popen[bytes]]
) -> None:
    api, web = meshed(node, processes)
    start(web, code.format(address=api.ipv4), processes)
    eventually(lambda: any(event[1] == "web" for event in events(node)), FOUND_S)
    (route,) = {event[3] for event in events(node) if event[1] == "web"}
    assert says in route


def test_of_many_some_are_named_and_the_rest_is_counted(
    node: NodeHarness, processes: list[subprocess.Popen[bytes]]
) -> None:
    _, web = meshed(node, processes)
    start(web, "os.setuid(1337)\nfor _ in range(20):\n if os.fork()==0: time.sleep(600)", processes)
    eventually(lambda: bool(conditions(node, web)), FOUND_S)
    time.sleep(LOOKS_S)
    (condition,) = conditions(node, web)
    assert condition.message.count("runs as uid 1337") == 16, "eight for each family"
    assert "13 more are not named" in condition.message


def test_with_containers_the_proxy_is_known_by_its_own_and_short_lived_ones_by_their_packets(
    node: NodeHarness, cgroups: tuple[Path, Path], processes: list[subprocess.Popen[bytes]]
) -> None:
    proxy, app = cgroups
    api, web = with_sidecar(node, "shop", "api"), with_sidecar(node, "shop", "web")
    for pod in (api, web):
        redirect(pod)
    start(api, ENVOY, processes)
    start(web, ENVOY, processes, proxy)
    # the pilot-agent: in the proxy's container, and no relative of who listens
    start(web, "os.setuid(1337)", processes, proxy)
    node.apply(STRICT_AND_A_PATH)
    node.sync()
    eventually(lambda: len([s for s in node.client.endpoints() if s.state == "ready"]) == 2)
    time.sleep(LOOKS_S)
    send = f"os.setuid(1337)\ntry: socket.create_connection(({api.ipv4!r},8080),1)\nexcept OSError: pass"

    def briefly(group: Path) -> None:
        sending = start(web, send, processes, group)
        sending.kill()
        sending.wait(5)

    for _ in range(3):
        briefly(proxy)
    time.sleep(LOOKS_S)
    assert not events(node)
    assert not given_away(node, web), "the proxy's own packets are none"
    briefly(app)
    eventually(lambda: bool(given_away(node, web)), FOUND_S)
    assert given_away(node, web) == [("egress", "8080", "1337")]
    # who listens beside the proxy is no part of it
    late = start(web, ENVOY, processes, app)
    eventually(lambda: any(f"process {late.pid} " in event[3] for event in events(node)), FOUND_S)
    assert {event[1] for event in events(node)} == {"web"}
