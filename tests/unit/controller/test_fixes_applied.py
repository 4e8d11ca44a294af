"""What the controller applies to mend half a bypass: where it is asked, for no more than is asked, and not for ever."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from test_bypass_reports import owned, picture, server
from test_cluster_views import World, document, pod

from meshbridge.controller.fixing import APPLIED_BY, Fixes, wanted_fixes
from meshbridge.controller.writer import Outbox
from meshbridge.kube.api import CONFLICT, RefusedError, Resource
from meshbridge.policy.model import Document, Source

NOW = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
SERVICE = document(
    "Service", "api", "shop", spec={"selector": {"app": "api"}, "ports": [{"port": 80, "targetPort": 9090}]}
)
STRICT = document("PeerAuthentication", "strict", "shop", spec={"mtls": {"mode": "STRICT"}})
ACCEPTED = {"accept": ["telemetry", "encryption", "identity", "l7"], "reason": "r"}
API, CLIENT = server("api", "10.0.0.1"), pod("client", "10.0.0.2")
RULE = {"port": {"number": 80}, "tls": {"mode": "DISABLE"}}


def policy(name: str = "scrape", **spec: Any) -> Document:
    data = {"metadata": {"name": name}, "spec": {"fix": "apply", **ACCEPTED, **spec}}
    return Document("BypassPolicy", "meshbridge.io/v1alpha1", "shop", name, data, uid=f"uid-{name}")


class Server:
    """The controller's objects as an API server keeps them; what is written is what the controller sees next."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.objects: dict[tuple[str, str], Document] = {}
        self.writes: list[str] = []
        self.refusing = 0

    def put(self, body: Mapping[str, Any]) -> None:
        metadata = body["metadata"]
        found = Document(
            body["kind"], body["apiVersion"], metadata["namespace"], metadata["name"], body,
            Source("", {}), f"uid-{metadata['name']}",
        )  # fmt: skip
        self.objects[found.kind, found.name] = found
        self.world.put(found)

    def apply(self, resource: Resource, body: Mapping[str, Any], *, manager: str) -> Mapping[str, Any]:
        if self.refusing:
            raise RefusedError(self.refusing, "somebody says otherwise")
        self.put(body)
        self.writes.append(f"apply {body['kind']} {body['metadata']['name']}")
        return body

    def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        gone = self.objects.pop((resource.kind, name))
        assert gone.uid == uid
        self.world.drop(gone)
        self.writes.append(f"delete {resource.kind} {name}")


class Writing:
    def __init__(self, world: World) -> None:
        self.world, self.server = world, Server(world)
        self.fixes = Fixes(self.server)  # type: ignore[arg-type]  # what it asks of it

    def look(self) -> list[str]:
        self.server.writes.clear()
        self.fixes.write(picture(self.world), Outbox(lambda: 10.0, lambda: False), NOW)
        return list(self.server.writes)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


@pytest.fixture
def writing(world: World) -> Writing:
    return Writing(world)


def test_it_is_applied_where_it_is_asked_for_and_stays(world: World, writing: Writing) -> None:
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == ["apply DestinationRule meshbridge-api"]
    body = writing.server.objects["DestinationRule", "meshbridge-api"].data
    assert body["spec"] == {"host": "api.shop.svc.cluster.local", "trafficPolicy": {"portLevelSettings": [RULE]}}
    assert APPLIED_BY.items() <= body["metadata"]["labels"].items()
    assert body["metadata"]["labels"]["app.kubernetes.io/managed-by"] == "meshbridge"
    assert body["metadata"]["ownerReferences"] == [
        {"apiVersion": "meshbridge.io/v1alpha1", "kind": "BypassPolicy", "name": "scrape", "uid": "uid-scrape"}
    ]
    for _ in range(3):
        assert writing.look() == [], "that it mends is no reason to take it away"
    assert writing.fixes.unfixed == []


def test_beside_a_rule_of_somebody_elses_it_is_a_port_of_a_peer_authentication(world: World, writing: Writing) -> None:
    """Under a name that does not depend on which pod of a Deployment is looked at."""
    theirs = {
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "theirs", "namespace": "shop"},
        "spec": {"host": "api.shop.svc.cluster.local", "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}},
    }  # fmt: skip
    writing.server.put(theirs)
    replicas = [owned(server(f"api-7f9c-{n}", f"10.0.0.{n}"), "api") for n in range(5, 9)]
    world.put(*replicas[:3], CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == ["apply AuthorizationPolicy meshbridge-api", "apply PeerAuthentication meshbridge-api"]
    spec = writing.server.objects["PeerAuthentication", "meshbridge-api"].data["spec"]
    assert spec["portLevelMtls"] == {"9090": {"mode": "DISABLE"}}
    assert spec["selector"]["matchLabels"]["app"] == "api"
    assert writing.look() == []
    world.drop(*replicas[:2])
    world.put(replicas[3])
    assert writing.look() == []
    world.put(policy(fix="advise"))
    assert writing.look() == ["delete PeerAuthentication meshbridge-api", "delete AuthorizationPolicy meshbridge-api"]


def test_what_opens_is_not_applied_without_what_keeps_strangers_out(world: World, writing: Writing) -> None:
    theirs = {
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "theirs", "namespace": "shop"},
        "spec": {"host": "api.shop.svc.cluster.local", "trafficPolicy": {"loadBalancer": {"simple": "RANDOM"}}},
    }  # fmt: skip
    in_the_way = {
        "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
        "metadata": {"name": "meshbridge-api", "namespace": "shop"}, "spec": {"selector": {"matchLabels": {"x": "y"}}},
    }  # fmt: skip
    writing.server.put(theirs)
    writing.server.put(in_the_way)
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == []
    assert "AuthorizationPolicy shop/meshbridge-api is there" in writing.fixes.unfixed[0].text
    old = pod("api-old", "10.0.0.3", app="api")
    world.put(old)
    assert writing.look() == [], "nor is the guard alone"


GONE = {
    "the bypass": lambda: pod("api", "10.0.0.1", app="api"),
    "the policy's word": lambda: policy(fix="advise"),
    "the acceptance": lambda: policy(accept=["telemetry"]),
    "its time": lambda: policy(until="2026-01-01T00:00:00Z"),
    "that the route is allowed": lambda: policy(routes=[]),
    "that anybody understands it": lambda: policy(routes="x"),
    "what was broken": lambda: document("PeerAuthentication", "strict", "shop", spec={"mtls": {"mode": "DISABLE"}}),
}


@pytest.mark.parametrize("change", GONE.values(), ids=GONE.keys())
def test_it_goes_with_its_cause(world: World, writing: Writing, change: Any) -> None:
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == ["apply DestinationRule meshbridge-api"]
    world.put(change())
    assert writing.look() == ["delete DestinationRule meshbridge-api"]
    assert writing.look() == []


NOT_ASKED = {
    "nobody asks": lambda: policy(fix="advise"),
    "something is lost that nobody accepted": lambda: policy(accept=["telemetry"]),
    "the route is not allowed": lambda: policy(routes=[{"direction": "outbound"}]),
    "a stricter policy advises": lambda: policy("stricter", fix="advise"),
}


@pytest.mark.parametrize("given", NOT_ASKED.values(), ids=NOT_ASKED.keys())
def test_it_is_not_applied_when(world: World, writing: Writing, given: Any) -> None:
    stricter = given()
    also = [policy()] if stricter.name != "scrape" else []
    world.put(API, CLIENT, SERVICE, STRICT, stricter, *also)
    assert writing.look() == []


def test_it_is_not_applied_where_it_would_take_mutual_tls_from_another_pod(world: World, writing: Writing) -> None:
    """Half way through a rollout: the Service has pods that exclude the port and pods that do not."""
    world.put(API, pod("api-old", "10.0.0.3", app="api"), CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == []
    (unfixed,) = writing.fixes.unfixed
    assert "shop/api-old would be sent plaintext as well, whose Envoys see the port" in unfixed.text
    assert writing.fixes.of(picture(world).policies[0]) == [unfixed.text]
    world.drop(pod("api-old", "10.0.0.3", app="api"))
    assert writing.look() == ["apply DestinationRule meshbridge-api"]
    world.put(pod("api-old", "10.0.0.3", app="api"))
    assert writing.look() == ["delete DestinationRule meshbridge-api"], "and not kept where it begins to"


def test_an_object_of_somebody_else_is_left_alone_and_told(world: World, writing: Writing) -> None:
    theirs = {
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "meshbridge-api", "namespace": "shop"}, "spec": {"host": "other"},
    }  # fmt: skip
    writing.server.put(theirs)
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == []
    (notice,) = writing.fixes.notices()
    assert (notice.regarding.name, notice.reason) == ("meshbridge-api", "FixNotApplied")
    assert "is not the controller's" in writing.fixes.of(picture(world).policies[0])[0]


def test_what_a_person_applied_with_our_command_stays(world: World, writing: Writing) -> None:
    by_hand = {
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "meshbridge-api", "namespace": "shop",
                     "labels": {"app.kubernetes.io/managed-by": "meshbridge"}},
        "spec": {"host": "api.shop.svc.cluster.local", "trafficPolicy": {"portLevelSettings": [RULE]}},
    }  # fmt: skip
    writing.server.put(by_hand)
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == []
    assert writing.fixes.unfixed == []


def test_what_only_a_person_can_mend_stays_advice(world: World, writing: Writing) -> None:
    own_rule = {
        "apiVersion": "networking.istio.io/v1", "kind": "DestinationRule",
        "metadata": {"name": "theirs", "namespace": "shop"},
        "spec": {"host": "api.shop.svc.cluster.local", "trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL"}}},
    }  # fmt: skip
    writing.server.put(own_rule)
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    assert writing.look() == []
    (unfixed,) = writing.fixes.unfixed
    assert "is for a person to mend: add to DestinationRule shop/theirs" in unfixed.text


def test_what_somebody_changed_in_it_is_not_taken_back(world: World, writing: Writing) -> None:
    world.put(API, CLIENT, SERVICE, STRICT, policy())
    writing.look()
    changed = writing.server.objects["DestinationRule", "meshbridge-api"].data
    writing.server.put({**changed, "spec": {**changed["spec"], "trafficPolicy": {}}})
    writing.server.refusing = CONFLICT
    assert writing.look() == []
    assert "somebody changed what the controller had written" in writing.fixes.unfixed[0].text


def test_nothing_is_computed_where_nobody_asks(world: World) -> None:
    world.put(API, CLIENT, SERVICE, STRICT, policy(fix="advise"))
    seen = picture(world)
    assert wanted_fixes(seen) == ([], [])
    assert "scene" not in seen.__dict__
