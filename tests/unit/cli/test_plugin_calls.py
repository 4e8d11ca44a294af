"""What a command line of ``kubectl meshbridge`` means."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbridge.cli.plugin import Call, read_call

CALLS = {
    "flows of all nodes": ("observe -A --last 3", Call(("observe", "--last", "3"), agents=True)),
    "a context is for finding the agents": (
        "observe --context prod -n shop --kubeconfig=k",
        Call(("observe", "-n", "shop"), agents=True, kubeconfig=Path("k"), context="prod"),
    ),
    "one node": ("monitor --node n1", Call(("monitor", "--node", "n1"), agents=True, node="n1")),
    "endpoints": ("endpoint list -n shop", Call(("endpoint", "list", "-n", "shop"), agents=True)),
    "bypasses that run": ("bypass list", Call(("bypass", "list"), agents=True)),
    "bypasses of files": ("bypass list -f d", Call(("bypass", "list", "-f", "d"))),
    "bypasses of files, in one word": ("bypass list -fd", Call(("bypass", "list", "-fd"))),
    "fixes are read from the API server": ("bypass fix --context c", Call(("bypass", "fix", "--context", "c"))),
    "what reads the API server knows its options": (
        "explain --context c -A --from a/b --to c/d:1",
        Call(("explain", "--context", "c", "-A", "--from", "a/b", "--to", "c/d:1")),
    ),
    "status is the cluster's": ("status --context c", Call(("status", "--context", "c", "--cluster"))),
    "status of a node": (
        "status --node n --context c",
        Call(("status", "--node", "n"), agents=True, context="c", node="n"),
    ),
    "help needs no cluster": ("observe --help", Call(("observe", "--help"))),
    "nothing": ("", Call(())),
}


@pytest.mark.parametrize(("line", "expected"), CALLS.values(), ids=CALLS.keys())
def test_calls(line: str, expected: Call) -> None:
    assert read_call(line.split()) == expected
