"""The rights that are installed are those that the components use: whatever is followed may be read, and no more."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from meshbridge.cli.webhook import KINDS, SAID_OF_NODES
from meshbridge.install.manifests import Options, packaged, render
from meshbridge.kube.objects import POLICY_KINDS, STATE_KINDS

READ = {"get", "list", "watch"}
NOT_FOLLOWED = {"apps", "batch"}
FOLLOWED = {
    "controller": POLICY_KINDS | STATE_KINDS,
    "webhook": KINDS | SAID_OF_NODES,
}
IRREGULAR = {
    "Gateway": "gateways", "EndpointSlice": "endpointslices", "CiliumCIDRGroup": "ciliumcidrgroups",
    "FelixConfiguration": "felixconfigurations",
}  # fmt: skip


def plural(kind: str) -> str:
    lower = kind.lower()
    return IRREGULAR.get(kind) or (f"{lower[:-1]}ies" if lower.endswith("y") else f"{lower}s")


def role(name: str) -> list[Mapping[str, Any]]:
    (found,) = [
        each for each in render(packaged(), Options())
        if each["kind"] == "ClusterRole" and each["metadata"]["name"] == f"meshbridge-{name}"
    ]  # fmt: skip
    rules: list[Mapping[str, Any]] = found["rules"]
    return rules


@pytest.mark.parametrize("component", FOLLOWED)
def test_every_kind_that_is_followed_may_be_read_and_no_other(component: str) -> None:
    wanted = {(group, plural(kind)) for group, kind in FOLLOWED[component] if group not in NOT_FOLLOWED}
    readable = {
        (group, resource)
        for rule in role(component) if set(rule["verbs"]) >= READ
        for group in rule["apiGroups"] for resource in rule["resources"]
    }  # fmt: skip
    assert wanted - readable == set()
    # what we own is read back by whoever writes it
    assert {pair for pair in readable - wanted if pair[0] != "meshbridge.io"} == set()


@pytest.mark.parametrize("component", [*FOLLOWED, "fixes"])
def test_no_role_reaches_secrets_or_everything(component: str) -> None:
    for rule in role(component):
        assert "*" not in [*rule["apiGroups"], *rule["resources"], *rule["verbs"]]
        assert "secrets" not in rule["resources"]
        assert "configmaps" not in rule["resources"] or rule["resourceNames"]
        assert not {"escalate", "bind", "impersonate"} & set(rule["verbs"])


def test_agents_and_authz_servers_may_do_nothing_in_the_cluster() -> None:
    bound = {
        subject["name"]
        for each in render(packaged(), Options()) if each["kind"].endswith("RoleBinding")
        for subject in each["subjects"]
    }  # fmt: skip
    assert bound == {"meshbridge-controller", "meshbridge-webhook"}


def test_namespaced_rights_to_secrets_are_by_name_and_make_none() -> None:
    for each in render(packaged(), Options()):
        for rule in each.get("rules", []) if each["kind"] == "Role" else []:
            assert rule.get("resourceNames"), rule
            assert "create" not in rule["verbs"]
