"""Who a real API server says a caller is: tokens of pods on nodes, as the kubelet asks for them, and all the others."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
from api_server import NOBODY, READER, ApiServer, free_port, wait_for

from meshbridge.controller.tokenreviews import TokenReviews
from meshbridge.kube.api import Api, ClusterError
from meshbridge.kube.tokenreview import TokenReview, review_token
from meshbridge.xds.auth import AUDIENCE, AuthenticationError, UnavailableError, bearer, node_caller
from meshbridge.xds.client import ControllerClient

NAMESPACE = "meshbridge-system"
REVIEWER = {
    "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": "token-reviewer"},
    "rules": [{"apiGroups": ["authentication.k8s.io"], "resources": ["tokenreviews"], "verbs": ["create"]}],
}  # fmt: skip
BINDING = {
    "apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRoleBinding", "metadata": {"name": "token-reviewer"},
    "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "token-reviewer"},
    "subjects": [{"kind": "User", "name": READER, "apiGroup": "rbac.authorization.k8s.io"}],
}  # fmt: skip


def named(kind: str, name: str, namespace: str = "", **rest: Any) -> dict[str, Any]:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": "v1", "kind": kind, "metadata": metadata, **rest}


def pod(name: str, account: str, namespace: str = NAMESPACE) -> dict[str, Any]:
    spec = {
        "nodeName": "node-a", "serviceAccountName": account, "automountServiceAccountToken": False,
        "containers": [{"name": "c", "image": "i"}],
    }  # fmt: skip
    return named("Pod", name, namespace, spec=spec)


OBJECTS = [
    named("Namespace", NAMESPACE), named("Namespace", "elsewhere"), named("Node", "node-a"),
    *(named("ServiceAccount", name, NAMESPACE) for name in ("meshbridge-agent", "meshbridge-authz", "default")),
    named("ServiceAccount", "meshbridge-agent", "elsewhere"),
    pod("agent", "meshbridge-agent"), pod("authz", "meshbridge-authz"), pod("other", "default"),
    pod("agent", "meshbridge-agent", "elsewhere"),
    REVIEWER, BINDING,
]  # fmt: skip


@pytest.fixture(scope="module")
def cluster(api_server: ApiServer) -> Iterator[ApiServer]:
    api_server.create(*OBJECTS)
    yield api_server
    api_server.delete(*reversed(OBJECTS))


def token(
    server: ApiServer, account: str, of_pod: str = "", namespace: str = NAMESPACE, audience: str = AUDIENCE
) -> str:
    """What the kubelet projects into a pod; without ``of_pod`` one that is bound to none."""
    spec: dict[str, Any] = {"audiences": [audience], "expirationSeconds": 600}
    if of_pod:
        _, found = server.call("GET", f"/api/v1/namespaces/{namespace}/pods/{of_pod}")
        spec["boundObjectRef"] = {"apiVersion": "v1", "kind": "Pod", "name": of_pod, "uid": found["metadata"]["uid"]}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    code, answer = server.call("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token", request)
    assert code == 201, answer
    found = answer["status"]["token"]
    assert isinstance(found, str)
    return found


class Reviewed(TokenReviews):
    """Asks the real API server, and counts how often."""

    def __init__(self, server: ApiServer, user: str = READER, now: Any = time.time) -> None:
        self.asked = 0
        api = Api(server.client(user))

        def review(of: str) -> TokenReview:
            self.asked += 1
            return review_token(api, of, AUDIENCE)

        super().__init__(review, NAMESPACE, now)

    def refusal(self, of: str) -> str:
        with pytest.raises(AuthenticationError) as refused:
            asyncio.run(self.authenticate(bearer(of)))
        assert of not in str(refused.value)
        return str(refused.value)


@pytest.mark.parametrize("name", ["agent", "authz"])
def test_a_node_pods_projected_token_is_its_nodes(cluster: ApiServer, name: str) -> None:
    caller, left_s = asyncio.run(Reviewed(cluster).authenticate(bearer(token(cluster, f"meshbridge-{name}", name))))
    assert caller == node_caller("node-a")
    assert 590 < left_s <= 600


def test_other_service_accounts_are_no_nodes(cluster: ApiServer) -> None:
    reviews = Reviewed(cluster)
    assert "serviceaccount:meshbridge-system:default' is no node" in reviews.refusal(token(cluster, "default", "other"))
    theirs = token(cluster, "meshbridge-agent", "agent", "elsewhere")
    assert "serviceaccount:elsewhere:meshbridge-agent' is no node" in reviews.refusal(theirs)
    assert reviews.asked == 2


def test_a_token_that_no_pod_on_a_node_holds_is_refused(cluster: ApiServer) -> None:
    assert "bound to no pod on a node" in Reviewed(cluster).refusal(token(cluster, "meshbridge-agent"))


def test_a_token_for_somebody_else_is_refused_without_asking(cluster: ApiServer) -> None:
    reviews = Reviewed(cluster)
    for_api_server = token(cluster, "meshbridge-agent", "agent", audience="https://kubernetes.default.svc")
    assert "not for the audience 'meshbridge'" in reviews.refusal(for_api_server)
    assert "no service account token" in reviews.refusal("rubbish")
    assert reviews.asked == 0


def test_an_expired_token_is_refused_by_both(cluster: ApiServer) -> None:
    good = token(cluster, "meshbridge-agent", "agent")
    late = Reviewed(cluster, now=lambda: time.time() + 601)
    assert "has expired" in late.refusal(good)
    claims = jwt.decode(good, options={"verify_signature": False})
    claims |= {"exp": int(time.time()) - 60, "nbf": 0, "iat": 0}
    expired = jwt.encode(claims, (cluster.directory / "sa.key").read_text(), "RS256", jwt.get_unverified_header(good))
    assert not review_token(Api(cluster.client(READER)), expired, AUDIENCE).authenticated


def test_a_token_that_is_signed_by_another_key_is_refused(cluster: ApiServer, tmp_path: Path) -> None:
    good = token(cluster, "meshbridge-agent", "agent")
    subprocess.run(["openssl", "genrsa", "-out", tmp_path / "key", "2048"], check=True, capture_output=True)
    forged = jwt.encode(
        jwt.decode(good, options={"verify_signature": False}), (tmp_path / "key").read_text(), "RS256",
        jwt.get_unverified_header(good),
    )  # fmt: skip
    reviews = Reviewed(cluster)
    assert "does not accept the token" in reviews.refusal(forged)
    assert "does not accept the token" in reviews.refusal(forged)
    assert reviews.asked == 1, "a refusal is kept for a while"


def test_a_token_of_a_pod_that_is_gone_is_refused_once_its_answer_is_old(cluster: ApiServer) -> None:
    brief, clock = pod("brief", "meshbridge-agent"), [time.time()]
    cluster.create(brief)
    reviews = Reviewed(cluster, now=lambda: clock[0])
    held = token(cluster, "meshbridge-agent", "brief")
    asyncio.run(reviews.authenticate(bearer(held)))
    cluster.delete(brief)
    api = Api(cluster.client(READER))  # the API server keeps answers for ten seconds of its own
    wait_for(lambda: not review_token(api, held, AUDIENCE).authenticated, "the token went with its pod")
    asyncio.run(reviews.authenticate(bearer(held)))
    clock[0] += 301
    assert "does not accept the token" in reviews.refusal(held)


def test_who_may_not_ask_says_so(cluster: ApiServer) -> None:
    held = token(cluster, "meshbridge-agent", "agent")
    with pytest.raises(UnavailableError, match="answers 403: tokenreviews"):
        asyncio.run(Reviewed(cluster, NOBODY).authenticate(bearer(held)))


def test_a_token_accepted_before_is_good_while_the_api_server_is_away(cluster: ApiServer) -> None:
    held, fresh = (token(cluster, "meshbridge-agent", "agent") for _ in range(2))
    clock, away = [time.time()], [False]
    api = Api(cluster.client(READER))

    def review(of: str) -> TokenReview:
        if away[0]:
            raise ClusterError("cannot be reached", where="cluster")
        return review_token(api, of, AUDIENCE)

    reviews = TokenReviews(review, NAMESPACE, lambda: clock[0])
    asyncio.run(reviews.authenticate(bearer(held)))
    away[0] = True
    clock[0] += 400
    caller, left_s = asyncio.run(reviews.authenticate(bearer(held)))
    assert caller == node_caller("node-a")
    assert 190 < left_s < 210
    other = token(cluster, "meshbridge-authz", "authz")
    with pytest.raises(UnavailableError, match="cannot be asked"):
        asyncio.run(reviews.authenticate(bearer(other)))
    clock[0] += 250
    with pytest.raises(AuthenticationError, match="has expired"):
        asyncio.run(reviews.authenticate(bearer(held)))
    assert fresh != other


def test_an_agent_follows_a_controller_by_its_projected_token(cluster: ApiServer, tmp_path: Path) -> None:
    """The command of the chart: nobody but the API server vouches for anybody."""
    socket, http = tmp_path / "s", f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-c", "from meshbridge.cli import main; main()", "controller", "--kubernetes",
               "--kubeconfig", str(cluster.kubeconfig("admin")), "--namespace", NAMESPACE, "--listen", f"unix:{socket}",
               "--state-dir", str(tmp_path / "state"), "--metrics", http]  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        controller = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        wait_for(socket.exists, f"the controller listens, see {tmp_path}")
        held, refused = token(cluster, "meshbridge-agent", "agent"), token(cluster, "default", "other")

        async def whole() -> None:
            client = ControllerClient(f"unix:{socket}", "node-a", lambda: held)
            updates = client.updates()
            async with asyncio.timeout(30):
                assert (await anext(updates)).revision > 0
            await updates.aclose()
            stranger = ControllerClient(f"unix:{socket}", "node-a", lambda: refused)
            updates = stranger.updates()
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(2):
                    await anext(updates)
            assert not stranger.connected

        asyncio.run(whole())
    finally:
        controller.terminate()
        controller.wait(20)
    text = (tmp_path / "log").read_text()
    assert "meshbridge-system:default' is no node" in text
    assert held not in text
    assert refused not in text
    assert not (tmp_path / "state/token.key").exists()
