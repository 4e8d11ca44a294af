"""When the kernel's tables cannot take a policy, whoever it is for closes, and nobody else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbridge.agent.enforcer import Enforcer
from meshbridge.datapath.ipcache import Ipcache
from meshbridge.datapath.maps import MapSizes
from meshbridge.datapath.policysets import PackedSet, RuleIds, pack_map
from meshbridge.datapath.reconcile import DesiredEndpoint, DesiredState
from meshbridge.datapath.syscall import BpfFullError
from meshbridge.policy.model import Layer, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict

pytestmark = pytest.mark.root
LINES = 24


@pytest.fixture
def enforcer() -> Iterator[Enforcer]:
    pin_dir = Path(f"/sys/fs/bpf/meshbridge-tests/mbagt-full-{os.getpid()}")
    opened = Enforcer(pin_dir, None, MapSizes(policy=LINES, events=1 << 16))
    try:
        yield opened
    finally:
        opened.close()
        for path in sorted(pin_dir.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        pin_dir.rmdir()


def packed(entries: int, port: int) -> PackedSet:
    entry = PolicyEntry(Verdict.ALLOW, 1, (Origin("CNP", "shop", "p"),))
    keys = (PolicyKey(300 + n, Layer.NETWORK, 6, port, 16) for n in range(entries))
    return pack_map(PolicyMap(dict.fromkeys(keys, entry)), RuleIds())


def state(seven: PackedSet, eight: PackedSet) -> DesiredState:
    ends = {n: DesiredEndpoint(n, n, n, 300, (s,) * 4) for n, s in ((900_007, seven), (900_008, eight))}
    return DesiredState(ends, Ipcache({}, {}))


def test_a_policy_that_does_not_fit_closes_its_endpoint_and_a_smaller_one_opens_it_again(enforcer: Enforcer) -> None:
    small, other = packed(5, 80), packed(5, 81)
    enforcer.apply(state(small, other))
    with pytest.raises(BpfFullError):
        enforcer.apply(state(packed(100, 82), other))
    records = enforcer.observed.endpoints
    assert not records[900_007].ready
    assert records[900_008].ready
    enforcer.apply(state(packed(8, 82), other))
    assert enforcer.observed.endpoints[900_007].ready
    assert sum(len(found) for found in enforcer.observed.sets.values()) == 13
