"""Our place in a node's CNI configuration: taken, kept, given back, and what cannot be understood left as it is."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from meshbridge.agent.chain import Chain
from meshbridge.agent.chainfile import ChainError, UnreadableChainError, chained, unchained

PTP = {"type": "ptp", "ipam": {"type": "host-local"}}
OURS = {"type": "meshbridge-cni"}
LIST: dict[str, Any] = {"cniVersion": "1.0.0", "name": "pods", "disableCheck": True, "plugins": [PTP]}
SINGLE = {"cniVersion": "0.4.0", "name": "pods", **PTP}


@pytest.fixture
def chain(tmp_path: Path) -> Chain:
    for name in ("net.d", "bin", "image"):
        (tmp_path / name).mkdir()
    (tmp_path / "image/meshbridge-cni").write_bytes(b"program 1")
    return Chain(tmp_path / "net.d", tmp_path / "bin", program=tmp_path / "image/meshbridge-cni")


def write(chain: Chain, name: str, content: Any) -> Path:
    path = chain.configurations / name
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return path


def types(path: Path) -> list[str]:
    return [plugin["type"] for plugin in json.loads(path.read_bytes())["plugins"]]


def names(chain: Chain) -> list[str]:
    return sorted(path.name for path in chain.configurations.iterdir())


def test_the_configuration_that_runtimes_take_ends_with_us(chain: Chain) -> None:
    first, second = write(chain, "10-a.conflist", LIST), write(chain, "20-b.conflist", LIST)
    first.chmod(0o600)
    chain.keep()
    assert chain.problem == ""
    assert types(first) == ["ptp", "meshbridge-cni"]
    assert json.loads(first.read_bytes())["disableCheck"] is True
    assert first.stat().st_mode & 0o777 == 0o600
    assert types(second) == ["ptp"]
    program = chain.programs / "meshbridge-cni"
    assert (program.read_bytes(), program.stat().st_mode & 0o777) == (b"program 1", 0o755)
    assert names(chain) == ["10-a.conflist", "20-b.conflist"]


def test_nothing_is_written_again_until_somebody_else_writes(chain: Chain) -> None:
    path = write(chain, "10-a.conflist", LIST)
    chain.keep()
    inode = path.stat().st_ino
    chain.keep()
    assert path.stat().st_ino == inode
    write(chain, "10-a.conflist", {**LIST, "plugins": [PTP, {"type": "portmap"}]})
    chain.keep()
    assert types(path) == ["ptp", "portmap", "meshbridge-cni"]
    write(chain, "05-first.conflist", LIST)
    chain.keep()
    assert types(chain.configurations / "05-first.conflist") == ["ptp", "meshbridge-cni"]
    (chain.programs / "meshbridge-cni").unlink()
    chain.keep()
    assert (chain.programs / "meshbridge-cni").exists()


def test_who_comes_behind_us_may_stay_there(chain: Chain) -> None:
    path = write(chain, "10-a.conflist", {**LIST, "plugins": [PTP, OURS, {"type": "istio-cni"}]})
    chain.keep()
    assert types(path) == ["ptp", "meshbridge-cni", "istio-cni"]


def test_a_plugin_of_another_version_of_us_is_replaced(chain: Chain) -> None:
    chain.socket = Path("/run/other.sock")
    path = write(chain, "10-a.conflist", {**LIST, "plugins": [OURS, PTP, OURS]})
    chain.keep()
    assert json.loads(path.read_bytes())["plugins"] == [PTP, {**OURS, "socket": "/run/other.sock"}]


def test_a_single_plugin_becomes_a_list_and_is_given_back(chain: Chain) -> None:
    path = write(chain, "10-a.conf", SINGLE)
    before = path.read_bytes()
    chain.keep()
    assert names(chain) == ["10-a.conf.meshbridge-original", "10-a.conflist"]
    made = json.loads((chain.configurations / "10-a.conflist").read_bytes())
    assert made == {"cniVersion": "0.4.0", "name": "pods", "plugins": [SINGLE, OURS]}
    write(chain, "10-a.conf", {**SINGLE, "mtu": 1400})
    chain.keep()
    assert names(chain) == ["10-a.conf.meshbridge-original", "10-a.conflist"]
    assert json.loads((chain.configurations / "10-a.conflist").read_bytes())["plugins"][0]["mtu"] == 1400
    write(chain, "10-a.conf.meshbridge-original", before)
    chain.socket = chain.programs.parent / "cni.sock"
    chain.socket.touch()
    assert chain.remove() == 1
    assert not chain.socket.exists()
    assert names(chain) == ["10-a.conf"]
    assert path.read_bytes() == before


def test_what_is_taken_out_leaves_the_rest(chain: Chain) -> None:
    path = write(chain, "10-a.conflist", LIST)
    broken = write(chain, "30-c.conflist", b"{")
    chain.keep()
    chain.socket = chain.programs.parent / "cni.sock"
    chain.socket.touch()
    assert chain.remove() == 1
    assert not chain.socket.exists()
    assert json.loads(path.read_bytes()) == LIST
    assert broken.read_bytes() == b"{"
    assert list(chain.programs.iterdir()) == []
    assert chain.remove() == 0


LEFT_ALONE = {
    "no JSON": b"{",
    "JSON without an end": b"[" * 200_000,
    "a list": b"[]",
    "no name": {**LIST, "name": 5},
    "no plugins": {**LIST, "plugins": []},
    "plugins that are none": {**LIST, "plugins": ["ptp"]},
    "plugins without a type": {**LIST, "plugins": [{}]},
    "more than a mebibyte": json.dumps({**LIST, "x": "x" * (1 << 20)}).encode(),
}


@pytest.mark.parametrize("content", LEFT_ALONE.values(), ids=LEFT_ALONE.keys())
def test_what_no_runtime_reads_is_left_alone_and_the_next_is_taken(chain: Chain, content: Any) -> None:
    bad, good = write(chain, "10-a.conflist", content), write(chain, "20-b.conflist", LIST)
    before = bad.read_bytes()
    chain.keep()
    assert bad.read_bytes() == before
    assert f"CNI configuration {bad}" in chain.problem
    assert types(good) == ["ptp", "meshbridge-cni"]


@pytest.mark.parametrize("version", ["0.2.0", None, 1, "9.0.0"])
def test_what_runtimes_use_and_we_cannot_join_stands_before_all_others(chain: Chain, version: Any) -> None:
    used, other = write(chain, "10-a.conflist", {**LIST, "cniVersion": version}), write(chain, "20-b.conflist", LIST)
    chain.keep()
    assert types(used) == types(other) == ["ptp"]
    assert "attached late" in chain.problem


def test_files_that_are_no_files_are_left_alone(chain: Chain, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text(json.dumps(LIST))
    os.mkfifo(chain.configurations / "05-pipe.conflist")
    (chain.configurations / "10-link.conflist").symlink_to(tmp_path / "elsewhere")
    chain.keep()
    assert "05-pipe" in chain.problem or "10-link" in chain.problem
    assert json.loads((tmp_path / "elsewhere").read_text()) == LIST
    assert (chain.configurations / "10-link.conflist").is_symlink()


def test_a_node_without_a_configuration_is_waited_for(chain: Chain) -> None:
    chain.keep()
    assert "no CNI configuration" in chain.problem
    path = write(chain, "10-a.conflist", LIST)
    chain.keep()
    assert chain.problem == ""
    assert types(path) == ["ptp", "meshbridge-cni"]


def test_an_image_without_the_program_says_so(chain: Chain) -> None:
    path = write(chain, "10-a.conflist", LIST)
    chain.program.unlink()
    chain.keep()
    assert "meshbridge-cni: No such file" in chain.problem
    assert types(path) == ["ptp"], "a plugin that is not there would keep every pod from starting"


def test_joining_and_leaving_is_the_identity() -> None:
    with_us = chained(json.dumps(LIST).encode(), OURS, is_list=True)
    assert with_us is not None
    assert chained(with_us, OURS, is_list=True) is None
    without = unchained(with_us)
    assert without is not None
    assert json.loads(without) == LIST
    assert unchained(without) is None


def test_a_single_plugin_without_a_type_is_none() -> None:
    with pytest.raises(UnreadableChainError):
        chained(b'{"cniVersion":"1.0.0","name":"x"}', OURS, is_list=False)
    with pytest.raises(ChainError):
        chained(json.dumps({**LIST, "plugins": [OURS]}).encode(), OURS, is_list=True)
