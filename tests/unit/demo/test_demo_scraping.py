"""The second half's manifests: the inputs are completed, never changed, and annotations come out and go in."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from meshbridge.demo.complete import completed
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import INPUTS, NODES, SAMPLE_MANIFESTS
from meshbridge.demo.walk import scraping
from meshbridge.demo.workloads import desired_pods

EXCLUSIONS = "traffic.sidecar.istio.io/"


def inputs_deployment() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((INPUTS / "prometheus-deployment.yaml").read_text())
    return found


def test_the_inputs_deployment_keeps_annotations_labels_and_containers() -> None:
    given, made = inputs_deployment(), scraping.prometheus_deployment()
    assert made["spec"]["template"]["metadata"] == given["spec"]["template"]["metadata"]
    assert made["metadata"] == given["metadata"]
    names = [container["name"] for container in made["spec"]["template"]["spec"]["containers"]]
    assert names == [container["name"] for container in given["spec"]["template"]["spec"]["containers"]]


def test_the_completed_deployment_is_a_pod_with_the_inputs_exclusions() -> None:
    objects = list(yaml.safe_load_all((SAMPLE_MANIFESTS / "namespaces.yaml").read_text()))
    objects += [item for items in scraping.sources().values() for item in items]
    pods, refused = desired_pods(objects, tuple(NODES))
    assert not refused
    (prometheus,) = [pod for key, pod in pods.items() if key.startswith("monitoring/prometheus-")]
    (init,) = prometheus.pod["spec"]["initContainers"]
    assert init["args"][init["args"].index("-o") + 1] == "9090,8080"
    assert init["args"][init["args"].index("-d") + 1].split(",")[-1] == "9090"


ADDITIONS: dict[str, tuple[Any, Any, Any]] = {
    "a key that is missing": ({"a": 1}, {"b": 2}, {"a": 1, "b": 2}),
    "a key with nothing in it": ({"a": None}, {"a": {"b": 1}}, {"a": {"b": 1}}),
    "the same value": ({"a": [1]}, {"a": [1]}, {"a": [1]}),
    "into the item of that name": (
        {"c": [{"name": "x"}, {"name": "y", "k": 1}]},
        {"c": [{"name": "y", "l": 2}]},
        {"c": [{"name": "x"}, {"name": "y", "k": 1, "l": 2}]},
    ),
}


@pytest.mark.parametrize(("manifest", "additions", "expected"), ADDITIONS.values(), ids=ADDITIONS.keys())
def test_additions_are_merged(manifest: Any, additions: Any, expected: Any) -> None:
    assert completed(manifest, additions) == expected


CHANGES: dict[str, tuple[Any, Any, str]] = {
    "another value": ({"a": {"b": "9090"}}, {"a": {"b": "8080"}}, "a.b: would change '9090' to '8080'"),
    "another item of a list": ({"c": [{"name": "x"}]}, {"c": [{"name": "z"}]}, "c: would add z"),
    "another kind of value": ({"a": "9090"}, {"a": {"b": 1}}, "a: would change"),
    "a longer plain list": ({"a": [1]}, {"a": [1, 2]}, "a: would change"),
}


@pytest.mark.parametrize(("manifest", "additions", "said"), CHANGES.values(), ids=CHANGES.keys())
def test_additions_that_would_change_something_are_refused(manifest: Any, additions: Any, said: str) -> None:
    with pytest.raises(DemoError) as error:
        completed(manifest, additions)
    assert said in str(error.value)


def test_without_exclusions_only_those_annotations_are_gone() -> None:
    given = inputs_deployment()
    given["spec"]["template"]["metadata"]["annotations"]["team"] = "metrics"
    bare = scraping.without_exclusions(given)
    assert bare["spec"]["template"]["metadata"]["annotations"] == {"team": "metrics"}
    assert bare["spec"]["template"]["metadata"]["labels"] == given["spec"]["template"]["metadata"]["labels"]
    assert EXCLUSIONS in str(given), "the original is not touched"


def test_every_target_is_excluded_on_the_metrics_port() -> None:
    for item in scraping.sources()["targets.yaml"]:
        assert item["metadata"]["annotations"] == {f"{EXCLUSIONS}excludeInboundPorts": str(scraping.METRICS_PORT)}
        assert item["metadata"]["labels"]["prometheus.io/scrape"] == "true"


TARGETS = b"""{"status": "success", "data": {"activeTargets": [
 {"labels": {"pod": "finance/ledger"}, "health": "up", "lastError": "", "lastScrape": "2026-11-24T08:03:37.123456789Z"},
 {"labels": {"pod": "finance/statements"}, "health": "down", "lastError": "i/o timeout",
  "lastScrape": "2026-11-24T09:03:38.5+01:00"},
 {"labels": {"pod": "marketing/campaigns"}, "health": "unknown", "lastError": "", "lastScrape": "0001-01-01T00:00:00Z"}
]}}"""


def test_health_is_what_prometheus_says_of_targets_it_has_scraped() -> None:
    found = scraping.read_health(TARGETS)
    assert set(found) == {"finance/ledger", "finance/statements"}
    assert found["finance/ledger"].up
    assert str(found["finance/statements"]) == "down (i/o timeout)"
    assert 1.3 < found["finance/statements"].scraped_at - found["finance/ledger"].scraped_at < 1.4
