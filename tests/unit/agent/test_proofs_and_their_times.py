"""Proofs as they come and go: conditions, events, and when each is tried again."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import ip_address

from meshbridge import abi
from meshbridge.abi import address_bytes
from meshbridge.agent.endpoints import Hooked
from meshbridge.agent.proofs import REPEAT_S, RETRY_S, Proofs, Schedule, Wanted
from meshbridge.agent.prover import Expected
from meshbridge.bypass.proof import Demand, Outcome, Status
from meshbridge.bypass.sets import IntSet
from meshbridge.datapath.policysets import PackedSet
from meshbridge.datapath.probes import ProbeFlow
from meshbridge.identity.model import IpFamily, ProxyClass, Workload
from meshbridge.observe.flow import Flow

API = Workload("shop", "api", "u", "n", (ip_address("10.0.0.1"),), proxy=ProxyClass.SIDECAR)
SETS = tuple(PackedSet(bytes(48), bytes(20 * n)) for n in range(4))
WANTED = Wanted(API, Demand({IpFamily.IPV4: IntSet.of(9090)}), (Hooked(7, "v", 4, 9, "u"),), SETS)
ANEW = replace(WANTED, sets=SETS[::-1])
PROVED = Outcome(Status.TRUE, "Proved", "as it should be")
REFUTED = Outcome(Status.FALSE, "ProbeContradicts", "it reached the pod")


def names(events: list[Flow]) -> list[str]:
    return [flow.agent.name for flow in events if flow.agent is not None]


def said(proofs: Proofs) -> tuple[bool, bool, str]:
    condition = proofs.condition("u")
    assert condition is not None
    return condition.status, condition.unknown, condition.reason


def test_nothing_is_said_to_be_proved_before_it_is() -> None:
    proofs = Proofs("n")
    assert proofs.condition("u") is None
    assert proofs.update({"u": WANTED}, 1) == []
    assert said(proofs) == (False, True, "Pending")
    changed, events = proofs.take("u", WANTED, PROVED, 2)
    assert (changed, names(events)) == (True, ["compensation-proved"])
    assert said(proofs) == (True, False, "Proved")
    assert proofs.pods() == {Status.TRUE: 1, Status.FALSE: 0, Status.UNKNOWN: 0}
    assert proofs.problems() == []


def test_what_is_programmed_anew_is_not_proved_by_what_was_before() -> None:
    proofs = Proofs("n")
    proofs.update({"u": WANTED}, 1)
    proofs.take("u", WANTED, PROVED, 2)
    assert proofs.update({"u": ANEW}, 3) == []
    assert said(proofs) == (False, True, "Pending")
    assert proofs.take("u", WANTED, PROVED, 4) == (False, []), "a proof that comes too late"
    changed, events = proofs.take("u", ANEW, PROVED, 5)
    assert (changed, names(events)) == (True, []), "told once as long as it goes on"
    condition = proofs.condition("u")
    assert condition is not None
    assert condition.since_unix_ns == 5


def test_a_failure_is_told_once_and_counted() -> None:
    proofs = Proofs("n")
    proofs.update({"u": WANTED}, 1)
    proofs.take("u", WANTED, PROVED, 2)
    changed, events = proofs.take("u", WANTED, REFUTED, 3)
    assert (changed, names(events), proofs.failed) == (True, ["compensation-not-proved"], 1)
    assert proofs.take("u", WANTED, REFUTED, 4) == (False, [])
    assert said(proofs) == (False, False, "ProbeContradicts")
    assert proofs.problems() == ["pod shop/api: its compensation is not proved (ProbeContradicts): it reached the pod"]
    assert proofs.update({}, 5) == []
    assert proofs.condition("u") is None


def test_without_a_policy_in_force_there_is_nothing_to_prove_and_it_is_not_enforced() -> None:
    proofs = Proofs("n")
    for wanted, reason in (
        (replace(WANTED, sets=None), "NotProgrammed"),
        (replace(WANTED, fault="the kernel refused it"), "NotProgrammed"),
        (replace(WANTED, hooked=()), "NotHooked"),
    ):
        assert proofs.update({"u": wanted}, 1) == []
        assert said(proofs) == (False, False, reason)
    assert proofs.update({"u": replace(WANTED, demand=Demand())}, 2) == []
    assert said(proofs) == (True, False, "NothingToProve")
    proofs.update({"u": replace(WANTED, demand=Demand(outbound=True))}, 3)
    assert said(proofs) == (False, True, "NotProbed")


def test_a_proof_is_due_at_once_and_again_and_sooner_where_it_failed() -> None:
    schedule = Schedule()
    schedule.update({"u": WANTED}, 100.0)
    due = schedule.first(0.0)
    assert due is not None
    assert (due.uid, due.at_s, due.turn) == ("u", 100.0, 0)
    schedule.done("u", WANTED, proved=True, now_s=101.0)
    schedule.update({"u": WANTED}, 102.0)
    times = []
    for now in (200.0, 300.0, 400.0, 500.0, 600.0, 700.0, 800.0):
        due = schedule.first(0.0)
        assert due is not None
        times.append(due.at_s)
        schedule.done("u", WANTED, proved=False, now_s=now)
    assert times[0] == 101.0 + REPEAT_S
    assert [t - now for t, now in zip(times[1:], (200, 300, 400, 500, 600, 700), strict=True)] == [
        *RETRY_S,
        RETRY_S[-1],
    ]
    schedule.update({"u": ANEW}, 900.0)
    due = schedule.first(0.0)
    assert due is not None
    assert due.at_s == 900.0
    schedule.done("u", WANTED, proved=True, now_s=901.0)
    assert due.at_s == 900.0, "what was proved was something else"
    schedule.update({"u": replace(ANEW, demand=Demand())}, 902.0)
    assert schedule.first(0.0) is None


def event(flow: ProbeFlow, ifindex: int, reason: int) -> abi.FlowEvent:
    found = abi.FlowEvent(
        ifindex=ifindex, protocol=6, direction=0, source_port=flow.source_port, destination_port=flow.destination_port,
        reason=reason, type=1 if reason else 2, source_identity=300, endpoint_id=4,
    )  # fmt: skip
    found.source[:], found.destination[:] = address_bytes(flow.source), address_bytes(flow.destination)
    return found


def test_a_probe_takes_one_event_and_nobody_elses() -> None:
    flow = ProbeFlow(ip_address("10.0.0.9"), 61234, ip_address("10.0.0.1"), 9090)
    expected = Expected()
    assert not expected.take(event(flow, 7, 229)), "nothing is on its way"
    expected.announce(7, flow)
    assert not expected.take(event(flow, 8, 229)), "on another interface"
    assert not expected.take(event(replace(flow, source_port=61235), 7, 229))
    assert expected.take(event(flow, 7, 229))
    told = expected.told(7, flow)
    assert told is not None
    assert (told.reason, told.identity, told.endpoint) == (229, 300, 4)
    assert not expected.take(event(flow, 7, 0)), "a second one is somebody's packet"
    assert expected.told(7, flow) is told
    expected.clear()
    assert not expected.take(event(flow, 7, 229))


def test_what_was_never_proved_goes_before_what_is_proved_again() -> None:
    schedule = Schedule()
    schedule.update({"old": WANTED}, 100.0)
    schedule.done("old", WANTED, proved=True, now_s=100.0)
    schedule.update({"old": WANTED, "new": WANTED}, 150.0)
    for now, expected in ((105.0, "old"), (150.0, "new")):
        due = schedule.first(now)
        assert due is not None
        assert due.uid == expected
