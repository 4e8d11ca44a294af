"""Two controllers, one writer: who it is, when the other takes over, and that never both write."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from api_server import REPLICAS, ApiServer, path_of, wait_for
from controllers import LEASE, Process, controller, installation, roles

LEASE_S = 15
POLICIES = "/apis/meshbridge.io/v1alpha1/namespaces/default/bypasspolicies"


@pytest.fixture(scope="module")
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    with installation(api_server) as server:
        yield server


@pytest.fixture(autouse=True)
def no_lease(cluster: ApiServer) -> None:
    cluster.delete(LEASE)
    cluster.create(LEASE)


def holder(server: ApiServer) -> str:
    code, lease = server.call("GET", f"{path_of(LEASE)}/meshbridge-controller")
    return str((lease.get("spec") or {}).get("holderIdentity", "")) if code == 200 else ""


def leader_of(*replicas: Process) -> Process:
    found: list[Process] = []

    def one_leads() -> bool:
        found[:] = [replica for replica in replicas if replica.process.poll() is None and replica.leads]
        return bool(found)

    wait_for(one_leads, "somebody leads", 60)
    (leader,) = found
    return leader


def policy(server: ApiServer, name: str) -> str:
    """A policy is made; the path it has."""
    body = {
        "apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy",
        "metadata": {"name": name, "namespace": "default"}, "spec": {"routes": []},
    }  # fmt: skip
    server.create(body)
    return f"{POLICIES}/{name}"


def conditions(server: ApiServer, path: str) -> dict[str, Any]:
    _, found = server.call("GET", path)
    return {c["type"]: c for c in (found.get("status") or {}).get("conditions", [])}


def has_status(server: ApiServer, path: str, timeout_s: float = 20) -> None:
    wait_for(lambda: "Accepted" in conditions(server, path), f"{path} has a status", timeout_s)


def written_by(server: ApiServer, since: float) -> list[tuple[float, str, str]]:
    """When the server answered each write of a replica, whose it was, and what it wrote; leases apart."""
    found = []
    for event in server.writes():
        at = datetime.fromisoformat(event["stageTimestamp"]).timestamp()
        user, ref = event["user"]["username"], event["objectRef"]
        if at >= since and user in REPLICAS and event["responseStatus"]["code"] < 300:
            found.append((at, user, f"{ref['resource']}/{ref.get('subresource', '')}"))
    return found


def never_two_writers(server: ApiServer, since: float) -> None:
    """Every write falls into a time in which its writer had the lease, by the server's own record."""
    owner = ""
    changes = 0
    for _, user, what in sorted(written_by(server, since)):
        if what == "leases/":
            changes += owner != user
            owner = user
        else:
            assert user == owner, f"{user} wrote {what} while {owner} had the lease"
    assert changes


def test_the_other_takes_over_within_the_lease_when_the_leader_is_killed(cluster: ApiServer, tmp_path: Path) -> None:
    began = time.time()
    with controller(cluster, tmp_path / "a", REPLICAS[0]) as a, controller(cluster, tmp_path / "b", REPLICAS[1]) as b:
        leader = leader_of(a, b)
        other = b if leader is a else a
        has_status(cluster, policy(cluster, "first"))
        leader.signal(signal.SIGKILL)
        killed = time.monotonic()
        leader.process.wait()
        assert other.serves, "who does not lead serves all the same"
        has_status(cluster, policy(cluster, "second"), LEASE_S + 15)
        took_s = time.monotonic() - killed
        print(f"takeover after kill -9: {took_s:.1f} s")
        assert leader_of(other) is other
    never_two_writers(cluster, began)


def test_a_leader_that_ends_hands_over_at_once(cluster: ApiServer, tmp_path: Path) -> None:
    began = time.time()
    with controller(cluster, tmp_path / "a", REPLICAS[0]) as a:
        leader_of(a)
        with controller(cluster, tmp_path / "b", REPLICAS[1]) as b:
            a.signal(signal.SIGTERM)
            ended = time.monotonic()
            assert a.process.wait(20) == 0
            leader_of(b)
            took_s = time.monotonic() - ended
            print(f"takeover after SIGTERM: {took_s:.1f} s")
            assert took_s < LEASE_S / 2
    assert holder(cluster) == "", "the last one has let it go"
    never_two_writers(cluster, began)


def test_a_leader_that_slept_past_its_lease_writes_nothing_more(cluster: ApiServer, tmp_path: Path) -> None:
    began = time.time()
    with controller(cluster, tmp_path / "a", REPLICAS[0]) as a:
        leader_of(a)
        with controller(cluster, tmp_path / "b", REPLICAS[1]) as b:
            a.signal(signal.SIGSTOP)
            path = policy(cluster, "while-asleep")
            wait_for(lambda: b.leads, "the other leads", LEASE_S + 15)
            a.signal(signal.SIGCONT)
            has_status(cluster, path)
            has_status(cluster, policy(cluster, "after"))
            wait_for(lambda: not a.leads, "it knows that it does not lead")
    never_two_writers(cluster, began)


def test_without_permission_it_serves_and_says_so(cluster: ApiServer, tmp_path: Path) -> None:
    binding = next(each for each in roles() if each["kind"] == "RoleBinding")
    cluster.delete(binding)
    try:
        with controller(cluster, tmp_path / "a") as a:
            wait_for(lambda: "leases" in a.get("/problems"), "it is a problem")
            assert "give the controller's role the verbs get and update" in a.get("/problems")
            assert a.serves
            assert not a.leads
            cluster.create(binding)
            leader_of(a)
            wait_for(lambda: "leases" not in a.get("/problems"), "it is none any more")
    finally:
        cluster.create(binding)


def test_read_only_writes_nothing(cluster: ApiServer, tmp_path: Path) -> None:
    began = time.time()
    with controller(cluster, tmp_path / "a", REPLICAS[0], "--read-only") as a:
        policy(cluster, "unseen")
        time.sleep(5)
        assert a.serves
    assert written_by(cluster, began) == []
