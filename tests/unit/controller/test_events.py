"""Which Events there are, and when one is written again: an API server that remembers, and a clock the test moves."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from typing import Any

import pytest

from meshbridge.controller.events import AGAIN_S, MAX_MESSAGE, PER_LOOK, Events, Notice, Regarding, notices
from meshbridge.controller.picture import Picture
from meshbridge.controller.writer import NotLeadingError, Outbox
from meshbridge.identity.model import Workload
from meshbridge.kube.api import CONFLICT, FORBIDDEN, NOT_FOUND, RefusedError, Resource
from meshbridge.kube.manifests import Key
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.policy.model import Document
from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

NOW = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
CNP = "cilium.io/v2"


class Server:
    """Events as an API server keeps them."""

    def __init__(self) -> None:
        self.events: dict[str, dict[str, Any]] = {}
        self.writes: list[str] = []
        self.refusing = 0

    def read(self, resource: Resource, namespace: str, name: str) -> Mapping[str, Any] | None:
        return self.events.get(name)

    def create(self, resource: Resource, body: Mapping[str, Any]) -> Mapping[str, Any]:
        self._check()
        name = body["metadata"]["name"]
        if name in self.events:
            raise RefusedError(CONFLICT, "there")
        self.events[name] = dict(body)
        self.writes.append("create")
        return body

    def merge(self, resource: Resource, namespace: str, name: str, patch: Mapping[str, Any]) -> Mapping[str, Any]:
        self._check()
        if name not in self.events:
            raise RefusedError(NOT_FOUND, "gone")
        self.events[name] |= patch
        self.writes.append("patch")
        return self.events[name]

    def _check(self) -> None:
        if self.refusing:
            raise RefusedError(self.refusing, "no")


class World:
    def __init__(self) -> None:
        self.server, self.time_s = Server(), 1000.0
        self.events = self.another()
        self.out = Outbox(lambda: 10.0, lambda: False)

    def another(self) -> Events:
        """As of a replica that begins to lead."""
        return Events(self.server, "a-replica", lambda: self.time_s)  # type: ignore[arg-type]  # what it asks of it

    def look(self, picture: Picture, after_s: float = 60.0) -> None:
        self.time_s += after_s
        self.events.write(picture, self.out, NOW + timedelta(seconds=self.time_s))

    @property
    def said(self) -> list[tuple[str, str, int]]:
        return [(e["reason"], e["message"], e["count"]) for e in self.server.events.values()]


@pytest.fixture
def world() -> World:
    return World()


def refused(*names: str, text: str = "no such field", api: str = CNP, kind: str = "CiliumNetworkPolicy") -> Picture:
    group = api.rpartition("/")[0]
    documents: dict[Key, tuple[Document, ...]] = {
        (group, kind, "shop", name): (Document(kind, api, "shop", name, {}, uid=f"uid-{name}"),) for name in names
    }
    problems = {key: (Problem(ProblemReason.REFUSED, text),) for key in documents}
    return Picture(documents, problems, (), (), {})


def unwell(*conditions: PodCondition, node: str = "n1") -> Picture:
    pod = Workload("shop", "web", "uid-web", "n1", (ip_address("10.0.0.1"),))
    return Picture({}, {}, (), (pod,), {node: NodeReport(conditions={"uid-web": conditions})})


GHOST = PodCondition("Captured", ConditionStatus.FALSE, "GhostBypass", "8080 bypasses Envoy")
NOT_HOOKED = PodCondition("Enforced", ConditionStatus.FALSE, "NotHooked", "no interface")


def test_a_refused_object_has_one_event_however_often_it_is_looked_at(world: World) -> None:
    for _ in range(20):
        world.look(refused("p"))
    assert world.said == [("Refused", "no such field", 1)]
    assert world.server.writes == ["create"]
    (event,) = world.server.events.values()
    assert event["involvedObject"] == {
        "apiVersion": CNP, "kind": "CiliumNetworkPolicy", "namespace": "shop", "name": "p", "uid": "uid-p",
    }  # fmt: skip
    assert (event["type"], event["metadata"]["namespace"]) == ("Warning", "shop")
    assert event["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "meshbridge"}


def test_it_is_counted_up_when_it_says_something_else(world: World) -> None:
    world.look(refused("p"))
    world.look(refused("p", text="another"), 5)
    assert world.said == [("Refused", "no such field", 1)], "not faster than it can be read"
    world.look(refused("p", text="another"))
    assert world.said == [("Refused", "another", 2)]


def test_it_is_written_again_before_the_server_forgets_it(world: World) -> None:
    for _ in range(150):
        world.look(refused("p"))
    assert 60 * 150 / AGAIN_S == 5
    assert world.said == [("Refused", "no such field", 5)]


def test_the_next_leader_finds_it_and_counts_it_on(world: World) -> None:
    world.look(refused("p"))
    world.events = world.another()
    world.look(refused("p"))
    assert world.server.writes == ["create"]
    world.events = world.another()
    world.look(refused("p", text="another"))
    assert world.said == [("Refused", "another", 2)]


def test_one_that_the_server_forgot_is_made_anew(world: World) -> None:
    world.look(refused("p"))
    world.server.events.clear()
    world.look(refused("p", text="another"))
    world.look(refused("p", text="another"))
    assert world.said == [("Refused", "another", 1)]


def test_what_is_mended_is_written_no_more(world: World) -> None:
    world.look(refused("p"))
    world.look(refused(), 3 * AGAIN_S)
    assert world.server.writes == ["create"]


def test_many_are_written_some_at_a_time_and_the_refused_keep_no_other_waiting(world: World) -> None:
    names = [f"p{n:03}" for n in range(3 * PER_LOOK)]
    world.server.refusing = FORBIDDEN
    world.look(refused(*names))
    assert (world.server.events, world.out.unfinished) == ({}, True)
    world.server.refusing = 0
    world.look(refused(*names))
    world.look(refused(*names))
    assert {e["involvedObject"]["name"] for e in world.server.events.values()} == set(names[PER_LOOK:])
    world.look(refused(*names))
    assert len(world.server.events) == len(names)


def test_without_permission_one_problem_says_so_for_all(world: World) -> None:
    world.server.refusing = FORBIDDEN
    world.look(refused("a", "b", "c"))
    (problem,) = world.out.problems
    assert (problem.reason, "may not create events" in problem.text) == (ProblemReason.UNWRITABLE, True)


def test_who_does_not_lead_writes_nothing() -> None:
    world = World()
    world.out = Outbox(lambda: 0.0, lambda: False)
    with pytest.raises(NotLeadingError):
        world.look(refused("p"))
    assert not world.server.writes


SAID = {
    "a refused policy": (refused("p"), ["Refused"]),
    "our own kinds have conditions": (refused("p", api="meshbridge.io/v1alpha1", kind="BypassPolicy"), []),
    "a ghost bypass": (unwell(GHOST), ["GhostBypass"]),
    "a pod that is not hooked": (unwell(NOT_HOOKED), ["NotEnforced"]),
    "both": (unwell(NOT_HOOKED, GHOST), ["NotEnforced", "GhostBypass"]),
    "a pod that is just starting": (unwell(PodCondition("Enforced", ConditionStatus.UNKNOWN, "WaitingForPolicy")), []),
    "a proof that failed": (unwell(PodCondition("Proved", ConditionStatus.FALSE, "Leaks")), ["ProofFailed"]),
    "what a node says of a pod that is not its own": (unwell(GHOST, node="n2"), []),
}


@pytest.mark.parametrize(("picture", "reasons"), SAID.values(), ids=SAID.keys())
def test_what_there_is_to_say(picture: Picture, reasons: list[str]) -> None:
    assert [notice.reason for notice in notices(picture)] == reasons


def test_a_pod_is_given_time_to_be_hooked_and_a_ghost_bypass_none(world: World) -> None:
    world.look(unwell(NOT_HOOKED, GHOST))
    assert [reason for reason, *_ in world.said] == ["GhostBypass"]
    world.look(unwell(GHOST), 5)
    world.look(unwell(NOT_HOOKED, GHOST), 5)
    world.look(unwell(NOT_HOOKED, GHOST), 9)
    assert [reason for reason, *_ in world.said] == ["GhostBypass"], "hooked in between: its time begins anew"
    world.look(unwell(NOT_HOOKED, GHOST), 2)
    assert [reason for reason, *_ in world.said] == ["GhostBypass", "NotEnforced"]


def test_names_and_messages_keep_to_the_servers_limits() -> None:
    (notice,) = notices(refused("x" * 253, text="y" * 5000))
    assert (len(notice.name), len(notice.message)) == (217, MAX_MESSAGE)
    of_cluster = Notice(Regarding("v1", "Node", "", "n", "u"), "Refused", "")
    assert of_cluster.namespace == "default"
