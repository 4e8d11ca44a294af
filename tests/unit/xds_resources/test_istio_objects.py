"""The examples under deploy/istio are what ``meshbridge ext-authz`` writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from meshbridge.cli.ext_authz import command
from meshbridge.controller.meshconfig import read_mesh_config
from meshbridge.policy.model import Document
from meshbridge.policy.parse import parse
from meshbridge.xds.filters import AUTHZ_TIMEOUT
from meshbridge.xds.istio import Authz, envoy_filter

EXAMPLES = Path(__file__).parents[3] / "deploy/istio"

WRITTEN = {
    "ask-mesh-wide.yaml": ["policy", "-n", "istio-system"],
    "ask-workload.yaml": ["policy", "-n", "finance", "-l", "app=ledger"],
    "ask-beside-another.yaml": ["envoyfilter", "-n", "finance", "-l", "app=ledger"],
}


def run(*arguments: str) -> Any:
    done = CliRunner().invoke(command, list(arguments))
    assert done.exit_code == 0, done.output
    return yaml.safe_load(done.output)


@pytest.mark.parametrize(("file", "arguments"), WRITTEN.items(), ids=WRITTEN)
def test_an_example_is_what_the_verb_writes(file: str, arguments: list[str]) -> None:
    assert yaml.safe_load((EXAMPLES / file).read_text()) == run(*arguments)


def test_the_meshconfig_names_a_provider_that_istio_can_ask() -> None:
    example = yaml.safe_load((EXAMPLES / "mesh-config.yaml").read_text())["meshConfig"]
    assert example == run("provider")
    document = Document("ConfigMap", "v1", "istio-system", "istio", {"data": {"mesh": yaml.safe_dump(example)}})
    assert read_mesh_config(document).asks("meshbridge")


def test_no_request_is_held_longer_than_the_timeout() -> None:
    config = envoy_filter(Authz(), "finance", {})["spec"]["configPatches"]
    for patch in config:
        asked = patch["patch"]["value"]["typed_config"]
        assert asked["grpc_service"]["timeout"] == f"{AUTHZ_TIMEOUT.total_seconds():g}s"
        assert asked["failure_mode_allow"] is False


def test_the_policies_are_understood_by_ourselves() -> None:
    for file in ("ask-mesh-wide.yaml", "ask-workload.yaml"):
        data = yaml.safe_load((EXAMPLES / file).read_text())
        metadata = data["metadata"]
        parsed = parse(Document(data["kind"], data["apiVersion"], metadata["namespace"], metadata["name"], data))
        assert not parsed.refusals


def test_what_is_no_label_is_said() -> None:
    done = CliRunner().invoke(command, ["policy", "-n", "finance", "-l", "app"])
    assert (done.exit_code, "write app=web" in done.output) == (2, True)
