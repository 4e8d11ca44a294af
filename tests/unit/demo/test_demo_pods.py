"""Which pods the sample mesh runs, and what the injector makes of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from meshbridge.demo.injection import INJECT, STATUS, inject, wants_sidecar
from meshbridge.demo.names import hosts
from meshbridge.demo.records import PodRecord
from meshbridge.demo.workloads import desired_pods

NODES = ("node-1", "node-2")
ENABLED = {"istio-injection": "enabled"}


def pod(**spec: Any) -> dict[str, Any]:
    container = {"name": "app", "command": ["sleep"], "ports": [{"name": "http", "containerPort": 8080}]}
    return {
        "kind": "Pod",
        "metadata": {"name": "web", "namespace": "shop", "labels": {}},
        "spec": {"containers": [container], **spec},
    }


def namespace(name: str, **labels: str) -> dict[str, Any]:
    return {"kind": "Namespace", "metadata": {"name": name, "labels": labels}}


DECISIONS = {
    "a labelled namespace injects": (ENABLED, {}, {}, {}, True),
    "another namespace does not": ({}, {}, {}, {}, False),
    "a pod opts in by label": ({}, {INJECT: "true"}, {}, {}, True),
    "a pod opts out by label": (ENABLED, {INJECT: "false"}, {}, {}, False),
    "the label beats the annotation": (ENABLED, {INJECT: "true"}, {INJECT: "false"}, {}, True),
    "host network is never injected": (ENABLED, {INJECT: "true"}, {}, {"hostNetwork": True}, False),
}


@pytest.mark.parametrize(
    ("of_namespace", "labels", "annotations", "spec", "wanted"), DECISIONS.values(), ids=DECISIONS.keys()
)
def test_injection_decision(
    of_namespace: dict[str, str],
    labels: dict[str, str],
    annotations: dict[str, str],
    spec: dict[str, Any],
    wanted: bool,
) -> None:
    written = pod(**spec)
    written["metadata"].update(labels=labels, annotations=annotations)
    assert wants_sidecar(written, of_namespace) is wanted


def test_injection_adds_both_containers_and_leaves_the_written_pod_alone() -> None:
    written = pod()
    final = inject(written, ENABLED)
    assert [container["name"] for container in final["spec"]["containers"]] == ["app", "istio-proxy"]
    assert [container["name"] for container in final["spec"]["initContainers"]] == ["istio-init"]
    assert json.loads(final["metadata"]["annotations"][STATUS])["containers"] == ["istio-proxy"]
    assert written == pod()


def test_an_istio_init_that_is_already_there_keeps_its_arguments() -> None:
    written = pod(initContainers=[{"name": "istio-init", "args": ["-b", "80"]}])
    written["metadata"]["annotations"] = {"traffic.sidecar.istio.io/includeInboundPorts": "8080"}
    assert inject(written, ENABLED)["spec"]["initContainers"] == [{"name": "istio-init", "args": ["-b", "80"]}]


def test_a_placeholder_proxy_container_is_replaced() -> None:
    written = pod()
    written["spec"]["containers"].append({"name": "istio-proxy"})
    names = [container["name"] for container in inject(written, ENABLED)["spec"]["containers"]]
    assert names.count("istio-proxy") == 1


def test_probes_are_rewritten_to_the_sidecars_agent_and_named_ports_resolved() -> None:
    written = pod()
    written["spec"]["containers"][0]["readinessProbe"] = {"httpGet": {"path": "/ok", "port": "http"}}
    final = inject(written, ENABLED)
    assert final["spec"]["containers"][0]["readinessProbe"]["httpGet"] == {
        "path": "/app-health/app/readyz",
        "port": 15020,
    }
    dual_stack, variable = final["spec"]["containers"][1]["env"]
    assert dual_stack["name"] == "ISTIO_DUAL_STACK"
    assert json.loads(variable["value"]) == {"/app-health/app/readyz": {"path": "/ok", "port": 8080}}


def test_a_refused_annotation_keeps_only_its_own_pod_from_running() -> None:
    bad, good = pod(), pod()
    bad["metadata"].update(name="bad", annotations={"traffic.sidecar.istio.io/excludeInboundPorts": "*"})
    pods, problems = desired_pods([namespace("shop", **ENABLED), bad, good], NODES)
    assert list(pods) == ["shop/web"]
    assert "excludeInboundPorts" in problems["shop/bad"]


def test_a_pod_without_its_namespace_is_refused() -> None:
    _pods, problems = desired_pods([pod()], NODES)
    assert "namespace 'shop' does not exist" in problems["shop/web"]


def test_an_unknown_node_is_named_with_those_that_exist() -> None:
    _pods, problems = desired_pods([namespace("shop"), pod(nodeName="node-9")], NODES)
    assert "node-1, node-2" in problems["shop/web"]


NOT_PLAYED = {
    "host network": ({"hostNetwork": True}, "hostNetwork"),
    "an init container": ({"initContainers": [{"name": "migrate"}]}, "migrate"),
}


@pytest.mark.parametrize(("spec", "named"), NOT_PLAYED.values(), ids=NOT_PLAYED.keys())
def test_what_is_not_played_is_refused_by_name(spec: dict[str, Any], named: str) -> None:
    _pods, problems = desired_pods([namespace("shop"), pod(**spec)], NODES)
    assert named in problems["shop/web"]


def test_a_pod_keeps_its_node() -> None:
    first, _ = desired_pods([namespace("shop"), pod()], NODES)
    second, _ = desired_pods([pod(), namespace("shop")], NODES)
    assert first["shop/web"].node == second["shop/web"].node


def test_a_deployment_makes_its_replicas_and_a_changed_template_makes_others() -> None:
    template = {"metadata": {"labels": {"app": "web"}}, "spec": pod()["spec"]}
    deployment = {
        "kind": "Deployment",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"replicas": 2, "template": template},
    }
    before, _ = desired_pods([namespace("shop"), deployment], NODES)
    template["metadata"]["labels"]["version"] = "2"
    after, _ = desired_pods([namespace("shop"), deployment], NODES)
    assert len(before) == len(after) == 2
    assert not before.keys() & after.keys()
    assert all(item.pod["metadata"]["labels"]["app"] == "web" for item in before.values())


def record(name: str, ipv4: str, ready: bool, **labels: str) -> PodRecord:
    written = {"metadata": {"labels": labels}, "spec": {"containers": []}}
    return PodRecord("shop", name, name, "", "node-1", ipv4, "fd00::1", written, ready=ready)


def test_a_service_name_is_the_addresses_of_its_ready_pods() -> None:
    service = {
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"selector": {"app": "web"}},
    }
    pods = [
        record("a", "10.0.0.1", True, app="web"),
        record("b", "10.0.0.2", False, app="web"),
        record("c", "10.0.0.3", True),
    ]
    lines = [line for line in hosts([service], pods).splitlines() if " web.shop " in line]
    assert [line.split()[0] for line in lines] == ["10.0.0.1", "fd00::1"]
