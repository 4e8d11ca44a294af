"""A controller's view of a real API server: what is created, changed and deleted there is what it holds."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from api_server import NOBODY, ApiServer

from meshbridge.kube.api import Api
from meshbridge.kube.follow import Follower

STRICT = {
    "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
    "metadata": {"name": "followed", "namespace": "default"}, "spec": {"mtls": {"mode": "STRICT"}},
}  # fmt: skip
CILIUM: dict[str, Any] = {
    "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cilium-config", "namespace": "kube-system"},
    "data": {"enable-policy": "always"},
}  # fmt: skip
DENY = {"podSelector": {}, "policyTypes": ["Ingress"]}


def policy(name: str, spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "default"}, "spec": spec,
    }  # fmt: skip


def test_what_happens_in_a_cluster_is_followed(api_server: ApiServer) -> None:
    async def whole() -> None:
        follower = Follower(Api(api_server.client()), "istio-system")
        changes = follower.changes()

        async def until(condition: Callable[[], bool]) -> None:
            async with asyncio.timeout(30):
                while not condition():
                    await anext(changes)

        def specs() -> dict[str, Any]:
            return {k[3]: d[0].data["spec"] for k, d in follower.documents.items() if k[2] == "default"}

        await until(lambda: ("", "Namespace", "", "default") in follower.documents)
        api_server.create(policy("deny", DENY))
        await until(lambda: "deny" in specs())
        changed = {**DENY, "policyTypes": ["Ingress", "Egress"]}
        path = "/apis/networking.k8s.io/v1/namespaces/default/networkpolicies/deny"
        _, current = api_server.call("GET", path)
        api_server.call("PUT", path, {**current, "spec": changed})
        await until(lambda: specs()["deny"]["policyTypes"] == ["Ingress", "Egress"])
        api_server.delete(policy("deny", DENY))
        await until(lambda: "deny" not in specs())
        cilium = ("", "ConfigMap", "kube-system", "cilium-config")
        api_server.create(CILIUM, {**CILIUM, "metadata": {**CILIUM["metadata"], "name": "other"}})
        await until(lambda: cilium in follower.documents)
        assert ("", "ConfigMap", "kube-system", "other") not in follower.documents
        api_server.delete(CILIUM)
        await until(lambda: cilium not in follower.documents)
        # a kind that is installed while we look
        api_server.install("security.istio.io/v1", "PeerAuthentication", namespaced=True)
        api_server.create(STRICT)
        await until(lambda: "followed" in specs())
        assert not follower.problems
        await changes.aclose()

    try:
        asyncio.run(whole())
    finally:
        api_server.delete(policy("deny", DENY), STRICT)


def test_an_optional_kind_that_may_not_be_read_is_told_and_holds_nothing_up(api_server: ApiServer) -> None:
    async def whole() -> None:
        optional = {("", "Node"), ("cilium.io", "CiliumNode")}
        follower = Follower(Api(api_server.client(NOBODY)), "istio-system", frozenset(), optional)
        async with asyncio.timeout(30):
            await anext(follower.changes())
        assert follower.synced
        assert not follower.documents
        assert "may not be listed and watched" in next(iter(follower.problems)).text

    asyncio.run(whole())
