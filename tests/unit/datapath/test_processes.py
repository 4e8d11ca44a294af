"""What is read of processes in /proc: of this one, and of files that a hostile one would like to be there."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from meshbridge.datapath.processes import held, listeners, processes_in, translated

OWN = os.stat("/proc/self/ns/net").st_ino
STATUS = "Name:\tx\\nUid:\\t0\nUid:\t{uids}\nGid:\t5\t6\t7\t8\nPPid:\t3\nGroups:\t1337\n"
STAT = b"42 (a) R 1 (x\n) S 3 1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 987 1 1\n"


def written(proc: Path, **files: str | bytes) -> Path:
    directory = proc / "42"
    (directory / "ns").mkdir(parents=True, exist_ok=True)
    if not (directory / "ns/net").exists():
        (directory / "ns/net").symlink_to("/proc/self/ns/net")
    for name, content in files.items():
        (directory / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return proc


def test_all_four_ids_are_read_and_the_supplementary_groups_are_not(tmp_path: Path) -> None:
    proc = written(tmp_path, status=STATUS.format(uids="1\t2\t3\t4"), stat=STAT, cgroup="0::/pod/app\n")
    with held(42, OWN, proc) as found:
        assert found is not None
        read = found.process("0::/\n")
    assert read is not None
    assert (read.uids, read.gids) == ({1, 2, 3, 4}, {5, 6, 7, 8})
    assert (read.parent, read.started, read.container) == (3, 987, "0::/pod/app\n")
    assert read.command == "a? R 1 ?x?"


def test_the_agents_own_control_groups_tell_nothing(tmp_path: Path) -> None:
    proc = written(tmp_path, status=STATUS.format(uids="1\t2\t3\t4"), stat=STAT, cgroup="0::/\n")
    with held(42, OWN, proc) as found:
        assert found is not None
        read = found.process("0::/\n")
    assert read is not None
    assert read.container == ""


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"status": "Uid:\tx\nGid:\t1\nPPid:\t1\n", "stat": STAT},
        {"status": STATUS.format(uids="1 2 3 4"), "stat": b"42 (x"},
        {"status": STATUS.format(uids="1 2 3 4"), "stat": b""},
    ],
    ids=["it has ended", "ids that are none", "a line cut short", "an empty line"],
)
def test_what_cannot_be_read_is_nobody(files: dict[str, str | bytes], tmp_path: Path) -> None:
    proc = written(tmp_path, **files)
    with held(42, OWN, proc) as found:
        assert found is not None
        assert found.process("") is None


def test_one_that_ended_or_moved_is_not_held(tmp_path: Path) -> None:
    with held(42, OWN, tmp_path) as found:
        assert found is None
    with held(42, OWN + 1, written(tmp_path)) as found:
        assert found is None


def test_processes_are_found_by_their_namespace(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "7").mkdir()  # ended
    assert processes_in({OWN}, written(tmp_path)) == {OWN: [42]}
    assert processes_in({OWN + 1}, tmp_path) == {}
    assert processes_in(set(), tmp_path) == {}


def test_listening_sockets_are_found_with_who_holds_them() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as idle:
        port = server.getsockname()[1]
        (found,) = listeners({port})
        assert (found.port, found.inode) == (port, os.fstat(server.fileno()).st_ino)
        assert port not in {one.port for one in listeners({port - 1, port + 1})}, "the kernel is asked for a range"
        with held(os.getpid(), OWN) as process:
            assert process is not None
            owned = [each for each in process.descriptors() if each is not None]
            (own,) = [each for each in owned if each.inode == found.inode]
            assert (own.uid, own.gid) == (os.getuid(), os.getgid())
            assert process.sends_by(found.inode)
            assert not process.sends_by(os.fstat(idle.fileno()).st_ino), (
                "a socket that is bound to nothing sends nothing"
            )
            assert len(list(process.descriptors(3))) == 3


def test_ids_of_a_user_namespace_are_counted_as_the_node_does() -> None:
    assert translated({1337}, [(0, 0, 4294967295)]) == {1337}
    assert translated({1337}, [(0, 100000, 1000), (1000, 300000, 65536)]) == {300337}
    assert translated({1337}, [(0, 100000, 1000)]) == frozenset()
