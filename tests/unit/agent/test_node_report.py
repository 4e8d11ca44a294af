"""What an agent tells the controller of its pods: which policies it holds, and which pods are not as they should be."""

from __future__ import annotations

import pytest

from meshbridge.agent.reporting import node_report
from meshbridge.bypass.bypasspolicy import parse_bypass_policy
from meshbridge.identity.model import IpFamily, TcpPorts
from meshbridge.policy.model import Document
from meshbridge.protos.observer_pb2 import Condition, EndpointState
from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

GHOST = Condition(type="Captured", status=False, reason="GhostBypass", message="inbound bypasses Envoy")
GHOST_TOLD = PodCondition("Captured", ConditionStatus.FALSE, "GhostBypass", "inbound bypasses Envoy")
PROBED = Condition(type="Enforced", status=True, reason="Proved", message="4 probes")
DOUBTED = Condition(type="Enforced", unknown=True, reason="Pending", message="not yet")
AUDITED = Condition(type="Enforced", status=False, reason="Audited", message="TCP 9090")
NOT_HOOKED = PodCondition("Enforced", ConditionStatus.FALSE, "NotHooked", "no interface")

STATES = {
    "enforced": ([EndpointState(uid="a", state="ready", message="a note")], ()),
    "not hooked": ([EndpointState(uid="a", state="not-hooked", message="no interface")], (NOT_HOOKED,)),
    "a ghost bypass": ([EndpointState(uid="a", state="ready", conditions=[GHOST])], (GHOST_TOLD,)),
    "one of two interfaces not hooked": (
        [EndpointState(uid="a", state="ready"), EndpointState(uid="a", state="not-hooked", message="no interface")],
        (NOT_HOOKED,),
    ),
    "a compensation that is proved": (
        [EndpointState(uid="a", state="ready", conditions=[PROBED])],
        (PodCondition("Proved", ConditionStatus.TRUE, "Proved", "4 probes"),),
    ),
    "one that is not proved yet": (
        [EndpointState(uid="a", state="ready", conditions=[DOUBTED])],
        (PodCondition("Proved", ConditionStatus.UNKNOWN, "Pending", "not yet"),),
    ),
    "one that is audited": ([EndpointState(uid="a", state="ready", conditions=[AUDITED])], ()),
    "an interface of nobody": ([EndpointState(state="waiting-for-policy")], ()),
    "an interface whose pod is gone": ([EndpointState(uid="a", state="disconnected")], ()),
}


@pytest.mark.parametrize(("states", "told"), STATES.values(), ids=STATES.keys())
def test_what_is_said_of_a_pod(states: list[EndpointState], told: tuple[PodCondition, ...]) -> None:
    assert node_report({}, [], states).conditions == ({"a": told} if told else {})


def test_policies_are_told_by_what_the_api_server_gave_them() -> None:
    def policy(name: str, **metadata: object) -> Document:
        data = {"metadata": {"name": name, **metadata}, "spec": {}}
        uid = metadata.get("uid", "")
        return Document("BypassPolicy", "meshbridge.io/v1alpha1", "shop", name, data, uid=str(uid))

    written = [policy("a", uid="u1", generation=3), policy("of a file"), policy("odd", uid="u2", generation=True)]
    ports = {"a": (TcpPorts(IpFamily.IPV4, 8080, 8080),)}
    assert node_report(ports, map(parse_bypass_policy, written), []) == NodeReport(ports, {"u1": 3, "u2": 0})
