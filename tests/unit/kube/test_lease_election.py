"""Two replicas and one Lease, with clocks that the test moves: who may write when."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.kube.api import CONFLICT, FORBIDDEN, ClusterError, RefusedError, Resource
from meshbridge.kube.lease import Election, Timing

TIMING = Timing(duration_s=15, retry_s=2)


class Server:
    """One Lease, and the time of the world."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.time_s = 1000.0
        self.failure: Exception | None = None

    def read(self, resource: Resource, namespace: str, name: str) -> Mapping[str, Any] | None:
        if self.failure is not None:
            raise self.failure
        return self.lease

    def create(self, resource: Resource, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.lease is not None:
            raise RefusedError(CONFLICT, "there is one")
        return self._put(body)

    def replace(self, resource: Resource, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if self.failure is not None:
            raise self.failure
        if self.lease is None or body["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise RefusedError(CONFLICT, "another version")
        return self._put(body)

    def _put(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        self.version += 1
        self.lease = {**body, "metadata": {**body["metadata"], "resourceVersion": str(self.version)}}
        return self.lease

    def spec(self) -> Mapping[str, Any]:
        assert self.lease is not None
        found: Mapping[str, Any] = self.lease["spec"]
        return found


@pytest.fixture
def server() -> Server:
    return Server()


def replica(server: Server, identity: str, skew: timedelta = timedelta()) -> Election:
    wrong = datetime(2026, 11, 24, tzinfo=UTC) + skew
    return Election(
        server, "ns", "lease", identity, TIMING, lambda: server.time_s,  # type: ignore[arg-type]  # what it asks of it
        lambda: wrong + timedelta(seconds=server.time_s),
    )  # fmt: skip


def test_the_first_one_has_it_and_the_second_waits(server: Server) -> None:
    a, b = replica(server, "a"), replica(server, "b")
    for election in (a, b):
        election.attempt()
    assert (a.held_for_s, b.held_for_s) == (10, 0)
    assert server.spec()["holderIdentity"] == "a"
    assert (server.spec()["leaseDurationSeconds"], server.spec()["leaseTransitions"]) == (15, 0)


@pytest.mark.parametrize("skew", [timedelta(hours=-5), timedelta(), timedelta(hours=5)], ids=str)
def test_a_silent_holder_stops_before_another_may_begin_whatever_the_clocks_say(
    server: Server, skew: timedelta
) -> None:
    a, b = replica(server, "a"), replica(server, "b", skew)
    a.attempt()
    server.time_s += 1
    b.attempt()  # sees the lease for the first time: only from now on it counts
    server.time_s += 9
    assert a.held_for_s == 0
    b.attempt()
    assert b.held_for_s == 0
    server.time_s += 5.9
    b.attempt()
    assert b.held_for_s == 0
    server.time_s += 0.1
    b.attempt()
    assert (a.held_for_s, b.held_for_s) == (0, 10)
    assert server.spec()["leaseTransitions"] == 1
    a.attempt()
    assert a.held_for_s == 0


def test_who_waits_looks_again_no_later_than_the_lease_runs_out(server: Server) -> None:
    a, b = replica(server, "a"), replica(server, "b")
    a.attempt()
    b.attempt()
    assert (a.look_again_s, b.look_again_s) == (2, 2)
    server.time_s += 14.5
    assert b.look_again_s == 0.5
    server.time_s += 0.5
    assert b.look_again_s == 2


def test_every_renewal_begins_the_others_time_anew(server: Server) -> None:
    a, b = replica(server, "a"), replica(server, "b")
    for _ in range(50):
        a.attempt()
        b.attempt()
        assert (a.held_for_s, b.held_for_s) == (10, 0)
        server.time_s += 2
    assert server.spec()["leaseTransitions"] == 0


def test_who_lets_it_go_is_followed_at_once(server: Server) -> None:
    a, b = replica(server, "a"), replica(server, "b")
    a.attempt()
    b.attempt()
    a.release()
    assert a.held_for_s == 0
    b.attempt()
    assert b.held_for_s == 10


def test_who_never_had_it_lets_nothing_go(server: Server) -> None:
    a, b = replica(server, "a"), replica(server, "b")
    a.attempt()
    b.attempt()
    b.release()
    assert server.spec()["holderIdentity"] == "a"


def test_a_late_release_leaves_the_next_holder_alone(server: Server) -> None:
    a, b = replica(server, "a"), replica(server, "b")
    a.attempt()
    b.attempt()
    server.time_s += 16
    b.attempt()
    a.release()
    assert server.spec()["holderIdentity"] == "b"


def test_a_process_started_anew_waits_for_its_predecessors_lease(server: Server) -> None:
    replica(server, "host_1").attempt()
    again = replica(server, "host_2")
    again.attempt()
    assert again.held_for_s == 0


def test_a_lease_that_was_deleted_is_made_anew(server: Server) -> None:
    a = replica(server, "a")
    a.attempt()
    server.lease = None
    server.time_s += 2
    a.attempt()
    assert a.held_for_s == 10


@pytest.mark.parametrize("spec", [None, {}, {"leaseDurationSeconds": "x"}, {"leaseTransitions": None}, 7], ids=repr)
def test_an_odd_lease_of_nobody_is_taken(server: Server, spec: Any) -> None:
    server.lease = {"metadata": {"name": "lease", "namespace": "ns", "resourceVersion": "0"}, "spec": spec}
    a = replica(server, "a")
    a.attempt()
    assert a.held_for_s == 10


@pytest.mark.parametrize("lasts", [10**9, -1, 0, None, "15"], ids=repr)
def test_no_lease_lasts_for_ever(server: Server, lasts: Any) -> None:
    spec = {"holderIdentity": "gone", "leaseDurationSeconds": lasts}
    server.lease = {"metadata": {"name": "lease", "namespace": "ns", "resourceVersion": "0"}, "spec": spec}
    a = replica(server, "a")
    a.attempt()
    assert a.held_for_s == 0
    server.time_s += 3_600
    a.attempt()
    assert a.held_for_s == 10


def test_a_server_that_is_away_is_a_problem_until_it_is_back_and_ends_the_lease_in_time(server: Server) -> None:
    a = replica(server, "a")
    a.attempt()
    server.failure = ClusterError("cannot be reached")
    server.time_s += 9
    a.attempt()
    assert ("cannot be reached" in a.problem, a.held_for_s) == (True, 1)
    server.time_s += 1
    a.attempt()
    assert a.held_for_s == 0
    server.failure = RefusedError(FORBIDDEN, "not you")
    a.attempt()
    assert "not you" in a.problem
    assert "give the controller's role the verbs" in a.problem
    server.failure = None
    a.attempt()
    assert (a.problem, a.held_for_s) == ("", 10)


@given(st.integers(0, 2**32))
def test_two_never_may_write_at_once_whatever_fails_when(seed: int) -> None:
    server, chance = Server(), random.Random(seed)
    replicas = [replica(server, name, timedelta(hours=chance.randint(-9, 9))) for name in "abc"]
    for _ in range(200):
        server.time_s += chance.choice([0.0, 0.1, 1.0, 2.0, 6.0])
        server.failure = ClusterError("away") if chance.random() < 0.3 else None
        election = chance.choice(replicas)
        if chance.random() < 0.05:
            election.release()
        else:
            election.attempt()
        assert sum(each.held_for_s > 0 for each in replicas) <= 1
