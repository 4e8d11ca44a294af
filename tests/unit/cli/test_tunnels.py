"""Verbs that ask agents, by sockets that lead elsewhere: here to processes of ``meshbridge relay``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from test_agent_verbs import Served

from meshbridge.cli import cli
from meshbridge.cli.tunnel import Exit, tunnels
from meshbridge.errors import MeshBridgeError
from meshbridge.observe.client import RUN_DIRECTORY_VARIABLE, find_agents


class Relay:
    """As a program in a pod: bytes in, bytes out."""

    def __init__(self, run_directory: Path, node: str) -> None:
        self.process = subprocess.Popen(
            [Path(sys.executable).with_name("meshbridge"), "relay", "--node", node],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, RUN_DIRECTORY_VARIABLE: str(run_directory)},
        )  # fmt: skip

    def read(self) -> bytes:
        assert self.process.stdout is not None
        return os.read(self.process.stdout.fileno(), 65536)

    def write(self, data: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        assert self.process.stderr is not None
        return self.process.stderr.read().decode()


def test_verbs_answer_for_all_nodes_and_name_those_that_cannot_be_reached(tmp_path: Path) -> None:
    for node in ("node-1", "node-2"):
        (tmp_path / node).mkdir()
    agents = [Served(tmp_path / node / "agent.sock") for node in ("node-1", "node-2")]
    for agent in agents:
        agent.start()

    def gone() -> Relay:
        raise MeshBridgeError("its kubelet is away")

    said: list[str] = []
    exits = [Exit(node, partial(Relay, tmp_path, node)) for node in ("node-1", "node-2")]
    try:
        with tunnels(exits, said.append) as directory:
            listed = CliRunner().invoke(cli, ["endpoint", "list", "-o", "json"])
            assert listed.exit_code == 0, listed.exception
            assert [each["node"] for each in json.loads(listed.output)] == ["node-1", "node-2"]
            one = CliRunner().invoke(cli, ["status", "--node", "node-2", "-o", "json"])
            assert (one.exit_code, len(json.loads(one.output))) == (0, 1), one.exception
        assert said == []
        assert not directory.exists()
        with tunnels([*exits, Exit("node-3", gone)], said.append):
            failed = CliRunner().invoke(cli, ["endpoint", "list"])
            assert failed.exit_code == 1
            assert said == ["Warning: node node-3: its kubelet is away"]
    finally:
        for agent in agents:
            agent.end()


def test_an_agent_that_is_not_there_is_told_by_the_relay(tmp_path: Path) -> None:
    said: list[str] = []
    with tunnels([Exit("node-1", partial(Relay, tmp_path, "node-1"))], said.append):
        failed = CliRunner().invoke(cli, ["endpoint", "list"])
    assert failed.exit_code == 1
    assert "no agent's socket is there" in said[0]


def test_outside_of_tunnels_verbs_look_where_they_always_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RUN_DIRECTORY_VARIABLE, raising=False)
    with tunnels([], [].append):
        assert RUN_DIRECTORY_VARIABLE in os.environ
    assert RUN_DIRECTORY_VARIABLE not in os.environ
    (tmp_path / "n").mkdir()
    (tmp_path / "n/agent.sock").touch()
    assert [agent.name for agent in find_agents(None, None, tmp_path)] == ["n"]
