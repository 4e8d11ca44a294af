"""The CNI plugin by itself: what it sends, prints and ends with, whoever calls it and whatever answers."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

REPO = Path(__file__).parents[3]
CONFIG: dict[str, Any] = {"cniVersion": "1.0.0", "name": "n", "type": "meshbridge-cni", "prevResult": {"ips": []}}
VARIABLES = {
    "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0",
    "CNI_ARGS": "K8S_POD_NAME=p", "CNI_PATH": "/opt/cni/bin",
}  # fmt: skip


@pytest.fixture(scope="session")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cc") is None or shutil.which("make") is None:
        pytest.skip("needs a C compiler and make: run scripts/setup dev")
    subprocess.run(["make", "-s", "cni"], cwd=REPO, check=True)
    return REPO / "build/meshbridge-cni"


class Agent:
    """Whoever listens; keeps what it is sent, and answers by ``respond``."""

    def __init__(self, path: Path, respond: Callable[[socket.socket], None]) -> None:
        self.path, self.parts = path, list[bytes]()
        self._respond = respond
        self._listening = socket.socket(socket.AF_UNIX)
        self._listening.bind(str(path))
        self._listening.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                caller, _ = self._listening.accept()
            except OSError:
                return
            with caller:
                self.parts = _parts(caller)
                self._respond(caller)

    def close(self) -> None:
        self._listening.close()


def _parts(caller: socket.socket) -> list[bytes]:
    with caller.makefile("rb") as stream:
        assert stream.read(7) == b"MBCNI1\n"
        return [stream.read(struct.unpack("<I", stream.read(4))[0]) for _ in range(7)]


def frame(status: int, body: bytes) -> bytes:
    return struct.pack("<II", status, len(body)) + body


@pytest.fixture
def listen(tmp_path: Path) -> Iterator[Callable[..., Agent]]:
    agents: list[Agent] = []

    def start(answer: bytes | Callable[[socket.socket], None]) -> Agent:
        respond = answer if callable(answer) else lambda caller: caller.sendall(answer)
        agents.append(Agent(tmp_path / f"s{len(agents)}", respond))
        return agents[-1]

    yield start
    for agent in agents:
        agent.close()


def call(
    plugin: Path, config: Any, variables: Mapping[str, str] = VARIABLES, **changed: str
) -> subprocess.CompletedProcess[bytes]:
    given = config if isinstance(config, bytes) else json.dumps(config).encode()
    environment = {**variables, **changed}
    return subprocess.run([plugin], input=given, env=environment, capture_output=True, timeout=90, check=False)


def to(agent: Agent, **more: Any) -> dict[str, Any]:
    return {**CONFIG, "socket": str(agent.path), **more}


def error(done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    assert done.returncode == 1
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    assert found["msg"].startswith("meshbridge-cni: ")
    return found


def test_a_call_goes_to_the_agent_as_it_is_and_its_answer_comes_back(
    plugin: Path, listen: Callable[..., Agent]
) -> None:
    agent = listen(frame(0, b'{"ips":[]}\n'))
    config = to(agent, nested={"socket": "/elsewhere", "list": ['"socket": "/x"', {"socket": 5}]})
    done = call(plugin, config)
    assert (done.returncode, done.stdout) == (0, b'{"ips":[]}\n')
    assert agent.parts == [*(value.encode() for value in VARIABLES.values()), json.dumps(config).encode()]


def test_a_refusal_of_the_agent_is_one_of_the_plugin(plugin: Path, listen: Callable[..., Agent]) -> None:
    done = call(plugin, to(listen(frame(1, b'{"code":100}'))))
    assert (done.returncode, done.stdout) == (1, b'{"code":100}')


def test_versions_are_told_without_an_agent(plugin: Path) -> None:
    done = call(plugin, {"cniVersion": "1.0.0"}, CNI_COMMAND="VERSION")
    assert "1.1.0" in json.loads(done.stdout)["supportedVersions"]
    assert done.returncode == 0


@pytest.mark.parametrize(("verb", "code"), [("ADD", 11), ("CHECK", 11), ("GC", 11), ("STATUS", 50)])
def test_without_an_agent_everything_fails(plugin: Path, tmp_path: Path, verb: str, code: int) -> None:
    found = error(call(plugin, {**CONFIG, "cniVersion": "0.4.0", "socket": f"{tmp_path}/none"}, CNI_COMMAND=verb))
    assert (found["code"], found["cniVersion"]) == (code, "0.4.0")
    assert f"{tmp_path}/none" in found["msg"]


@pytest.mark.parametrize("config", [b"", b"rubbish", json.dumps({**CONFIG, "socket": "/nowhere"}).encode()])
def test_but_not_a_deletion(plugin: Path, config: bytes) -> None:
    done = call(plugin, config, CNI_COMMAND="DEL")
    assert (done.returncode, done.stdout) == (0, b"")


def test_nor_a_deletion_that_the_agent_does_not_answer(plugin: Path, listen: Callable[..., Agent]) -> None:
    ended = call(plugin, to(listen(lambda _: None)), CNI_COMMAND="DEL")
    assert (ended.returncode, ended.stdout) == (0, b"")
    started = time.monotonic()
    slow = call(plugin, to(listen(lambda _: time.sleep(20))), CNI_COMMAND="DEL")
    assert (slow.returncode, slow.stdout) == (0, b"")
    assert time.monotonic() - started < 13


@pytest.mark.parametrize(
    "answer",
    [b"", b"\0\0\0", frame(0, b"")[:4] + struct.pack("<I", 50), frame(0, b"")[:4] + struct.pack("<I", 1 << 31)],
    ids=["nothing", "half a header", "less than it says", "more than anybody needs"],
)
def test_an_answer_that_is_none_fails(plugin: Path, listen: Callable[..., Agent], answer: bytes) -> None:
    assert error(call(plugin, to(listen(answer))))["code"] in (6, 11)


HOSTILE = {
    "no command": ({"CNI_COMMAND": ""}, CONFIG, 4),
    "another command": ({"CNI_COMMAND": "add"}, CONFIG, 4),
    "a variable beyond all bounds": ({"CNI_ARGS": "x" * 5000}, CONFIG, 4),
    "a socket that is a number": ({}, {**CONFIG, "socket": 5}, 7),
    "a relative socket": ({}, {**CONFIG, "socket": "run/x"}, 7),
    "a socket with an escape": ({}, b'{"socket":"/\\u0061"}', 7),
    "a socket that no address holds": ({}, {**CONFIG, "socket": "/" + "x" * 200}, 7),
    "a socket that would break our JSON": ({}, b'{"socket":"/a\x7f"}', 7),
    "2 MiB of configuration": ({}, b" " * (2 << 20), 6),
}


@pytest.mark.parametrize(("variables", "config", "code"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_input_is_refused(plugin: Path, variables: dict[str, str], config: Any, code: int) -> None:
    assert error(call(plugin, config, **variables))["code"] == code


@pytest.mark.parametrize(
    "config",
    [
        b'{"socket',
        b'{"socket":',
        b'{"a":"\\',
        b"]]]}}}" * 99,
        b"[" * 10_000,
        b'\0\0{"',
        b'{"x":{"socket":"/run/other"}}',
    ],
)
def test_what_is_no_json_ends_at_the_usual_socket(plugin: Path, config: bytes) -> None:
    """Never a crash; the agent would refuse it, and here is none."""
    if os.path.exists("/run/meshbridge/cni.sock"):
        pytest.skip("an agent runs here")
    found = error(call(plugin, config))
    assert found["code"] in (7, 11)
    assert found["cniVersion"] == "1.0.0"


def test_a_version_that_would_break_our_json_is_not_repeated(plugin: Path) -> None:
    for version in ("1.0.0\\", '1","x":"', "9" * 17, ""):
        assert error(call(plugin, {"cniVersion": version, "socket": "/nowhere"}))["cniVersion"] == "1.0.0"


def test_somebody_elses_socket_is_not_believed(plugin: Path, listen: Callable[..., Agent], tmp_path: Path) -> None:
    """Whoever could listen there would say which pods are guarded."""
    if os.geteuid() != 0:
        pytest.skip("needs root: another user has to listen")
    path = Path("/tmp") / f"mb-cni-{os.getpid()}"
    path.mkdir(mode=0o777)
    path.chmod(0o777)
    code = (
        "import os,socket\nos.setgid(65534);os.setuid(65534)\n"
        f"s=socket.socket(socket.AF_UNIX);s.bind({str(path / 's')!r});s.listen()\n"
        "print('up',flush=True);c,_=s.accept();c.sendall(bytes(8));c.close()\n"
    )
    other = subprocess.Popen(["python3", "-c", code], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == b"up\n"
        assert "is not root" in error(call(plugin, {**CONFIG, "socket": str(path / "s")}))["msg"]
    finally:
        other.kill()
        other.wait()
        shutil.rmtree(path)


def test_it_needs_nothing_of_the_host(plugin: Path) -> None:
    content = plugin.read_bytes()
    start, size, count = (struct.unpack_from(form, content, at)[0] for form, at in (("<Q", 32), ("<H", 54), ("<H", 56)))
    kinds = {struct.unpack_from("<I", content, start + size * number)[0] for number in range(count)}
    assert 1 in kinds, "PT_LOAD"
    assert 3 not in kinds, "PT_INTERP: an interpreter of the host's"
    assert len(content) < 1 << 20
