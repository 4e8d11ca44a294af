"""An address taken away from a pod that stays: its open flows are judged again, after it is gone."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv4Address

from meshbridge.datapath.ipcache import Ipcache
from meshbridge.datapath.policysets import RuleIds, pack_map
from meshbridge.datapath.reconcile import Delete, DesiredEndpoint, DesiredState, ObservedState, Put, plan
from meshbridge.datapath.tables import TableName
from meshbridge.policy.model import PolicyMap

ENDPOINT = DesiredEndpoint(7, 512, 1, 300, (pack_map(PolicyMap(), RuleIds()),) * 4,
                           frozenset({IPv4Address("10.0.0.5"), IPv4Address("10.0.0.6")}))  # fmt: skip


def state(endpoint: DesiredEndpoint) -> DesiredState:
    return DesiredState({7: endpoint}, Ipcache({}, {}))


def test_open_flows_are_judged_again_once_the_address_is_gone() -> None:
    before = plan(ObservedState(), state(ENDPOINT)).after
    result = plan(before, state(replace(ENDPOINT, addresses=frozenset({IPv4Address("10.0.0.5")}))))
    enforced = [step for step in result.steps[: result.enforced_after] if isinstance(step, Put | Delete)]
    assert [step.table for step in enforced] == [TableName.ADDRESSES, TableName.ENDPOINTS]
    assert isinstance(enforced[0], Delete)
    assert result.after.endpoints[7].revision == before.endpoints[7].revision + 1
