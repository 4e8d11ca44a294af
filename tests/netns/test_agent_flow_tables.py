"""Flow tables over restarts of the agent: each endpoint keeps its own, and none is ever two endpoints'."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from meshbridge.agent.enforcer import Enforcer
from meshbridge.datapath.ipcache import Ipcache
from meshbridge.datapath.maps import MapSizes, open_pinned_maps
from meshbridge.datapath.policysets import RuleIds, pack_map
from meshbridge.datapath.reconcile import DesiredEndpoint, DesiredState
from meshbridge.policy.model import PolicyMap

pytestmark = pytest.mark.root
SETS = (pack_map(PolicyMap(), RuleIds()),) * 4
SEVEN, EIGHT = 900_017, 900_018


@pytest.fixture
def pin_dir() -> Iterator[Path]:
    path = Path(f"/sys/fs/bpf/meshbridge-tests/mbagt-flows-{os.getpid()}")
    yield path
    for child in sorted(path.rglob("*"), reverse=True):
        child.rmdir() if child.is_dir() else child.unlink()
    path.rmdir()


def start(pin_dir: Path) -> closing[Enforcer]:
    return closing(Enforcer(pin_dir, None, MapSizes(conntrack=8, conntrack_per_endpoint=64, events=1 << 16)))


def state(**incarnations: int) -> DesiredState:
    """Endpoints ``i7`` and ``i8`` by their incarnations."""
    ends = {SEVEN + int(name[1:]) - 7: number for name, number in incarnations.items()}
    return DesiredState({i: DesiredEndpoint(i, i, number, 300, SETS) for i, number in ends.items()}, Ipcache({}, {}))


def tables(pin_dir: Path) -> dict[int, int]:
    with closing(open_pinned_maps(pin_dir)) as maps:
        return maps.conntrack.tables()


def test_an_agent_that_comes_back_finds_every_flow_table_and_writes_nothing(pin_dir: Path) -> None:
    with start(pin_dir) as first:
        first.apply(state(i7=1, i8=2))
        written = {record.incarnation: record.flow_table for record in first.observed.endpoints.values()}
    assert sorted(written.values()) == [1, 2]
    assert tables(pin_dir) == written
    with start(pin_dir) as second:
        assert second.apply(state(i7=1, i8=2)).writes == 0
    assert tables(pin_dir) == written


def test_a_table_made_before_a_kill_is_its_incarnations_afterwards_or_nobodys(pin_dir: Path) -> None:
    with start(pin_dir) as killed:
        killed.apply(state(i7=1))
        killed._maps.conntrack.create(5)  # and dies before an endpoint names it
        killed._maps.conntrack.create(6)
    made = tables(pin_dir)
    with start(pin_dir) as second:
        second.apply(state(i7=1, i8=5))
        assert second.observed.endpoints[EIGHT].flow_table == made[5]
        second.sweep()
    assert tables(pin_dir) == {1: made[1], 5: made[5]}


def test_another_pod_on_an_interface_gets_another_table_before_the_old_one_goes(pin_dir: Path) -> None:
    with start(pin_dir) as enforcer:
        enforcer.apply(state(i7=1))
        enforcer.apply(state(i7=2))
        both = tables(pin_dir)
        assert both[1] != both[2] == enforcer.observed.endpoints[SEVEN].flow_table
        enforcer.sweep()
        assert tables(pin_dir) == {2: both[2]}
