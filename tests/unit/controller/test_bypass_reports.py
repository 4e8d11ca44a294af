"""What a BypassReport says, how large it can be, and when one is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cluster_views import World, document, pod

from meshbridge.bypass.annotations import EXCLUDE_INBOUND_PORTS, EXCLUDE_OUTBOUND_PORTS
from meshbridge.controller.bypassreports import LIST_AGAIN_S, MAX_BYTES, MAX_NAMES, Reports, status_of
from meshbridge.controller.picture import Picture
from meshbridge.controller.writer import Outbox
from meshbridge.kube.api import NOT_FOUND, Page, RefusedError, Resource
from meshbridge.policy.model import Document
from meshbridge.xds.nodereport import ConditionStatus, NodeReport, PodCondition

NOW = datetime(2026, 11, 24, 7, 0, tzinfo=UTC)
STRICT = document("PeerAuthentication", "strict", "shop", spec={"mtls": {"mode": "STRICT"}})


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def server(name: str, ip: str, ports: str = "9090", **more: Any) -> Document:
    return pod(name, ip, annotations={EXCLUDE_INBOUND_PORTS: ports}, app="api", **more)


def owned(of: Document, owner: str) -> Document:
    """A pod of a Deployment's ReplicaSet."""
    metadata = {
        **of.data["metadata"],
        "labels": {"app": owner, "pod-template-hash": "7f9c"},
        "ownerReferences": [{"kind": "ReplicaSet", "name": f"{owner}-7f9c", "controller": True}],
    }
    return Document(
        of.kind, of.api_version, of.namespace, of.name, {**of.data, "metadata": metadata}, of.source, of.uid
    )


def picture(world: World) -> Picture:
    found = world.controller.picture()
    assert found is not None
    return found


def status(world: World, name: str) -> dict[str, Any]:
    seen = picture(world)
    (kind,) = [kind for kind in seen.scene.kinds if name in {each.name for each in kind.pods}]
    return status_of(kind, seen)


def test_it_says_what_is_lost_where_from_and_what_stands_in(world: World) -> None:
    allow = document(
        "AuthorizationPolicy", "who", "shop",
        spec={"selector": {"matchLabels": {"app": "api"}},
              "rules": [{"from": [{"source": {"principals": ["cluster.local/ns/shop/sa/sa"]}}]}]},
    )  # fmt: skip
    world.put(
        server("api", "10.0.0.1"), pod("web", "10.0.0.2"), pod("db", "10.0.0.3", namespace="other"), STRICT, allow
    )
    found = status(world, "api")
    assert (found["ports"], found["enforcement"], found["accepted"]) == ("9090", "Kernel", False)
    assert "encryption" in found["lost"]
    assert "peer-certificate" in found["weakened"]
    (row,) = found["bypasses"]
    assert (row["direction"], row["ports"], row["route"]["kind"]) == ("ingress", ["9090"], "excludeInboundPorts")
    (rule,) = [g for g in row["guarantees"] if g["kind"] == "authorization"]
    assert rule["policy"] == {
        "kind": "AuthorizationPolicy",
        "namespace": "shop",
        "name": "who",
        "rule": "spec.rules[0]",
    }
    assert row["compensation"]["allowed"] == ["shop/web"]
    assert "other/db" in row["compensation"]["refused"]
    assert row["ruling"]["unaccepted"] == found["lost"]
    assert "pod" not in row


def test_it_says_who_accepted_it(world: World) -> None:
    accepting = Document(
        "BypassPolicy", "meshbridge.io/v1alpha1", "shop", "scrape",
        {"metadata": {"name": "scrape"},
         "spec": {"accept": ["telemetry", "encryption", "identity", "l7"], "reason": "r"}},
    )  # fmt: skip
    world.put(server("api", "10.0.0.1"), pod("web", "10.0.0.2"), STRICT, accepting)
    found = status(world, "api")
    assert found["accepted"]
    (row,) = found["bypasses"]
    assert [(p["kind"], p["name"]) for p in row["ruling"]["policies"]] == [("BypassPolicy", "scrape")]
    assert row["ruling"]["unaccepted"] == []


def test_half_a_bypass_stands_in_it_on_both_sides(world: World) -> None:
    service = document("Service", "api", "shop", spec={"selector": {"app": "api"}, "ports": [{"port": 9090}]})
    scraper = pod("scraper", "10.0.0.2", annotations={EXCLUDE_OUTBOUND_PORTS: "7070"})
    world.put(server("api", "10.0.0.1"), scraper, service, STRICT)
    (half,) = status(world, "api")["halfBypasses"]
    assert (half["role"], half["server"], half["port"], half["delivery"]) == ("server", "shop/api", 9090, "broken")
    assert half["clients"] == ["shop/scraper"]
    (half,) = status(world, "scraper")["halfBypasses"]
    assert half["role"] == "client"


def test_what_injection_itself_excludes_in_every_pod_is_no_bypass(world: World) -> None:
    containers = [{"name": "app"}, {"name": "istio-proxy"}]
    spec = {"containers": containers, "initContainers": [{"name": "istio-validation"}]}
    world.put(pod("plain", "10.0.0.1", spec=spec), server("api", "10.0.0.2", spec=spec))
    assert {kind.first.name: kind.bypasses for kind in picture(world).scene.kinds} == {"plain": False, "api": True}
    assert status(world, "api")["ports"] == "9090"


def test_pods_that_come_and_go_change_nothing_for_others(world: World) -> None:
    world.put(server("api", "10.0.0.1"), STRICT)
    found = []
    for replicas in (["w1"], ["w1", "w2", "w3"], ["w4", "w5"]):
        pods = [owned(pod(name, f"10.0.1.{n}"), "web") for n, name in enumerate(replicas, 1)]
        world.put(*pods)
        found.append(status(world, "api"))
        world.drop(*pods)
    assert found[0] == found[1] == found[2]
    assert "shop/web" in found[0]["bypasses"][0]["compensation"]["allowed"]


def test_two_hundred_ports_are_one_row(world: World) -> None:
    ports = ",".join(str(port) for port in range(10_001, 10_401, 2))
    containers = [
        {"name": "a", "ports": [{"containerPort": p} for p in range(10_001, 10_401, 2)]},
        {"name": "istio-proxy"},
    ]
    world.put(server("api", "10.0.0.1", ports, spec={"containers": containers}), STRICT)
    (row,) = status(world, "api")["bypasses"]
    assert len(row["ports"]) == 200


def test_it_is_cut_below_the_servers_limit_and_says_so(world: World) -> None:
    rules = [
        {
            "from": [{"source": {"principals": [f"{'x' * 240}/ns/{n}/sa/a"]}}],
            "to": [{"operation": {"ports": [str(9000 + n)]}}],
        }
        for n in range(60)
    ]
    huge = [
        document(
            "AuthorizationPolicy",
            f"p{n:03}",
            "shop",
            spec={"selector": {"matchLabels": {"app": "api"}}, "rules": rules},
        )
        for n in range(12)
    ]
    world.put(server("api", "10.0.0.1", ",".join(str(9000 + n) for n in range(60))), STRICT, *huge)
    found = status(world, "api")
    assert len(json.dumps(found).encode()) <= MAX_BYTES
    assert "entries are left out; 'meshbridge bypass show' has them all" in found["truncated"]
    assert found["lost"]
    assert found["ports"]


def test_long_lists_of_names_end_and_are_counted(world: World) -> None:
    others = [pod(f"w{n:03}", f"10.0.2.{n}", app=f"w{n:03}") for n in range(1, 80)]
    world.put(server("api", "10.0.0.1"), STRICT, *others)
    compensation = status(world, "api")["bypasses"][0]["compensation"]
    assert (len(compensation["allowed"]), compensation["allowedCount"]) == (MAX_NAMES, 79)


CRD = yaml.safe_load((Path(__file__).parents[3] / "deploy/crds/meshbridge.io_bypassreports.yaml").read_text())
SCHEMA = CRD["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "integer": int}


def undeclared(value: Any, schema: Mapping[str, Any], path: str = "status") -> list[str]:
    """What of a value an API server would refuse, as its definition does not declare it so."""
    if not isinstance(value, TYPES[schema["type"]]) or value not in schema.get("enum", [value]):
        return [f"{path}: {value!r}"]
    if isinstance(value, dict):
        known = schema["properties"]
        unknown = [f"{path}.{key}" for key in value.keys() - known.keys()]
        return unknown + [
            e for key in value.keys() & known.keys() for e in undeclared(value[key], known[key], f"{path}.{key}")
        ]
    if isinstance(value, list):
        return [e for item in value for e in undeclared(item, schema["items"], f"{path}[]")]
    return []


def test_the_definition_declares_all_that_is_written(world: World) -> None:
    """An API server refuses a report as a whole for one field that it does not know."""
    accepting = Document(
        "BypassPolicy", "meshbridge.io/v1alpha1", "shop", "scrape",
        {"metadata": {"name": "scrape"},
         "spec": {"accept": ["telemetry"], "reason": "r", "proof": True, "fix": "apply"}},
    )  # fmt: skip
    allow = document(
        "AuthorizationPolicy", "who", "shop", spec={"rules": [{"from": [{"source": {"namespaces": ["shop"]}}]}]}
    )
    service = document("Service", "api", "shop", spec={"selector": {"app": "api"}, "ports": [{"port": 9090}]})
    client = pod("client", "10.0.0.2", annotations={EXCLUDE_OUTBOUND_PORTS: "9090,443"})
    world.put(server("api", "10.0.0.1"), client, pod("web", "10.0.0.3"), service, STRICT, allow, accepting)
    for name in ("api", "client"):
        found = {**status(world, name), "node": "n", "conditions": []}
        assert found["bypasses"]
        assert undeclared(found, SCHEMA) == []
    assert status(world, "api")["halfBypasses"]


class Server:
    """BypassReports as an API server keeps them."""

    def __init__(self) -> None:
        self.reports: dict[tuple[str, str], dict[str, Any]] = {}
        self.writes: list[str] = []
        self.installed = True
        self.made = 0

    def pages(self, resource: Resource) -> Iterator[Page]:
        if not self.installed:
            raise RefusedError(NOT_FOUND, "no such kind")
        found = [
            Document("BypassReport", resource.api_version, *key, data, uid=data["metadata"]["uid"])
            for key, data in self.reports.items()
        ]
        yield Page(tuple(found), "1")

    def apply(self, resource: Resource, body: Mapping[str, Any], **_: Any) -> Mapping[str, Any]:
        metadata = body["metadata"]
        key = (metadata["namespace"], metadata["name"])
        self.made += key not in self.reports
        uid = self.reports[key]["metadata"]["uid"] if key in self.reports else f"report-{self.made}"
        written: dict[str, Any] = json.loads(json.dumps(body))
        self.reports[key] = {**written, "metadata": {**metadata, "uid": uid}}
        self.writes.append(f"apply {metadata['name']}")
        return self.reports[key]

    def delete(self, resource: Resource, namespace: str, name: str, *, uid: str) -> None:
        assert self.reports[namespace, name]["metadata"]["uid"] == uid
        del self.reports[namespace, name]
        self.writes.append(f"delete {name}")


class Writing:
    def __init__(self, world: World) -> None:
        self.world, self.server, self.time_s = world, Server(), 0.0
        self.reports = self.another()

    def another(self) -> Reports:
        return Reports(self.server, lambda: self.time_s)  # type: ignore[arg-type]  # what it asks of it

    def look(self) -> list[str]:
        """What is written at a look."""
        self.server.writes.clear()
        self.reports.write(picture(self.world), Outbox(lambda: 10.0, lambda: False), NOW)
        return list(self.server.writes)


def test_a_report_is_written_once_for_each_change(world: World) -> None:
    writing = Writing(world)
    world.put(server("api", "10.0.0.1"), pod("web", "10.0.0.2"), STRICT)
    assert writing.look() == ["apply api"]
    report = writing.server.reports["shop", "api"]
    assert report["metadata"]["ownerReferences"] == [
        {"apiVersion": "v1", "kind": "Pod", "name": "api", "uid": "uid-api"}
    ]
    assert report["metadata"]["labels"] == {"app.kubernetes.io/managed-by": "meshbridge"}
    assert report["status"]["node"] == "node-a"
    assert writing.look() == []
    writing.time_s += LIST_AGAIN_S
    assert writing.look() == [], "listed again, and the same"
    writing.reports = writing.another()
    assert writing.look() == [], "the next leader finds the same"
    world.drop(STRICT)
    assert writing.look() == ["apply api"]


def test_it_goes_when_the_bypass_is_gone_and_is_left_to_the_server_when_the_pod_is(world: World) -> None:
    writing = Writing(world)
    world.put(server("a", "10.0.0.1"), server("b", "10.0.0.2"))
    assert writing.look() == ["apply a", "apply b"]
    world.put(pod("a", "10.0.0.1", app="api"))
    assert writing.look() == ["delete a"]
    world.drop(server("b", "10.0.0.2"))
    assert writing.look() == []


def test_a_new_pod_of_an_old_name_has_a_report_of_its_own(world: World) -> None:
    writing = Writing(world)
    world.put(server("a", "10.0.0.1", uid="first"))
    writing.look()
    world.put(server("a", "10.0.0.1", uid="second"))
    assert writing.look() == ["apply a"]
    owners = writing.server.reports["shop", "a"]["metadata"]["ownerReferences"]
    assert [owner["uid"] for owner in owners] == ["second"]


def test_what_somebody_else_wrote_is_put_right(world: World) -> None:
    writing = Writing(world)
    world.put(server("a", "10.0.0.1"))
    writing.look()
    writing.server.reports["shop", "a"]["status"]["lost"] = []
    writing.server.reports["shop", "stray"] = {"metadata": {"uid": "s"}}
    world.put(pod("stray", "10.0.0.9"))
    writing.time_s += LIST_AGAIN_S
    assert writing.look() == ["delete stray", "apply a"]


def test_what_its_node_says_of_it_stands_in_it(world: World) -> None:
    writing = Writing(world)
    world.put(server("a", "10.0.0.1"))
    writing.look()
    ghost = PodCondition("Captured", ConditionStatus.FALSE, "GhostBypass", "8080 bypasses Envoy")
    world.controller.report("node-a", NodeReport(conditions={"uid-a": (ghost,)}))
    assert writing.look() == ["apply a"]
    assert writing.look() == []
    (condition,) = writing.server.reports["shop", "a"]["status"]["conditions"]
    assert (condition["type"], condition["status"]) == ("Captured", "False")
    world.controller.report("node-a", NodeReport())
    assert writing.look() == ["apply a"]
    assert writing.server.reports["shop", "a"]["status"]["conditions"] == []


def test_without_the_definition_nothing_is_written(world: World) -> None:
    writing = Writing(world)
    writing.server.installed = False
    world.put(server("a", "10.0.0.1"))
    assert writing.look() == []
    writing.server.installed = True
    assert writing.look() == ["apply a"]
