"""One object that trips the controller is named, and costs no other object anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_cluster_views import A, World, cnp, pod

from meshbridge.controller.cluster import Cluster
from meshbridge.kube.problems import ProblemReason
from meshbridge.policy import parse as parsers
from meshbridge.policy.parse import Parsed
from meshbridge.policy.parse.ciliumnetworkpolicy import parse_cilium_network_policy
from meshbridge.xds import types as xds

CNP = ("cilium.io", "CiliumNetworkPolicy")


def test_a_policy_whose_parser_fails_is_refused_and_all_others_go_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def parse(document: Any) -> Parsed:
        if document.name == "odd":
            raise RecursionError("a defect")
        return parse_cilium_network_policy(document)

    monkeypatch.setitem(parsers.POLICY_KINDS, CNP, parse)  # type: ignore[misc]
    world = World(tmp_path)
    a = world.connect(A)
    world.put(pod("web", "10.0.0.1"), cnp("odd", "web", {"app": "x"}), cnp("good", "web", {"app": "y"}))
    assert world.names(a, xds.POLICY) == {f"cilium.io/CiliumNetworkPolicy/shop/{name}" for name in ("odd", "good")}
    assert world.names(a, xds.ENDPOINT) == {"uid-web"}
    (problem,) = [p for p in world.controller.problems if p.reason is ProblemReason.REFUSED]
    assert "CiliumNetworkPolicy shop/odd: cannot be read: RecursionError: a defect" in problem.text
    world.drop(cnp("odd", "web", {"app": "x"}))
    assert not world.controller.problems


def test_what_fails_after_parsing_keeps_what_was_known_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path)
    a = world.connect(A)
    world.put(cnp("p", "web", {"app": "x"}), pod("web", "10.0.0.1"))
    whole = Cluster._put_policies

    def put(self: Cluster, *arguments: Any) -> None:
        raise KeyError("a defect")

    monkeypatch.setattr(Cluster, "_put_policies", put)
    world.put(cnp("p", "other", {"app": "x"}), pod("late", "10.0.0.2"))
    assert world.names(a, xds.ENDPOINT) == {"uid-web", "uid-late"}
    assert world.names(a, xds.POLICY) == {"cilium.io/CiliumNetworkPolicy/shop/p"}
    (problem,) = world.controller.problems
    assert "CiliumNetworkPolicy shop/p: cannot be taken in (KeyError: 'a defect')" in problem.text
    monkeypatch.setattr(Cluster, "_put_policies", whole)
    world.put(cnp("p", "other", {"app": "x"}))
    assert not world.controller.problems
