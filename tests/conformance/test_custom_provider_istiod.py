"""Our ext_authz server as Istio's provider: configured by a real istiod, asked by a real Envoy, answered by itself."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from api_server import missing
from authz_world import OTHER_PORT, TCP, Endpoint, World, endpoint_slice, service, token, until, world
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest, CheckResponse
from envoy.service.auth.v3.external_auth_pb2_grpc import AuthorizationServicer, add_AuthorizationServicer_to_server
from envoy_world import ROOT_NAMESPACE
from meshnet import Pod, in_netns, run

from meshbridge.xds.istio import NAMESPACE, PORT, Authz, custom_policy, envoy_filter

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

SERVER = {"app": "transaction-service"}
OURS = custom_policy("finance", SERVER)
OTHERS = custom_policy("finance", SERVER, "other") | {
    "spec": {"selector": {"matchLabels": SERVER}, "action": "CUSTOM", "provider": {"name": "other"}, "rules": [{}]}
}


@pytest.fixture(scope="module")
def mesh(third_party: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    istio = third_party("istio")
    if reason := missing():
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    with world(istio, tmp_path_factory.mktemp, plaintext=("authz-2",)) as made, another_provider(made):
        made.put(OURS)
        made.start_authz(made.authz_pods[0])
        made.endpoints(Endpoint(made.authz_pods[0]))
        until(lambda: made.ask(scope="transactions")[0] == 200, "our server is asked and allows", 60)
        yield made


class Another(AuthorizationServicer):  # type: ignore[misc]  # generated without types
    """Somebody else's provider: it refuses who sends ``x-other: no``."""

    def Check(self, request: CheckRequest, _: grpc.ServicerContext) -> CheckResponse:
        response = CheckResponse()
        response.status.code = 7 if request.attributes.request.http.headers.get("x-other") == "no" else 0
        return response


@contextlib.contextmanager
def another_provider(mesh: World) -> Iterator[None]:
    """It runs in the pod of our second server."""
    pod = mesh.authz_pods[1]
    server = grpc.server(ThreadPoolExecutor(4))
    add_AuthorizationServicer_to_server(Another(), server)

    def start() -> None:
        server.add_insecure_port(f"{pod.v4}:{OTHER_PORT}")
        server.start()

    in_netns(pod.netns, start)
    ports = {"grpc": OTHER_PORT}
    mesh.api.create(
        service("other", NAMESPACE, ports, {"app": "authz"}), endpoint_slice("other", NAMESPACE, ports, [Endpoint(pod)])
    )
    try:
        yield
    finally:
        server.stop(0).wait()


def forged() -> str:
    """The right claims under a signature that nobody made."""
    return f"authorization: Bearer {token('transactions')[:-16]}{'A' * 16}"


CASES = {
    "the right token": (lambda mesh: mesh.ask(scope="transactions"), 200, "allowed"),
    "no token": (lambda mesh: mesh.ask(), 403, "policy"),
    "another scope": (lambda mesh: mesh.ask(scope="other"), 403, "policy"),
    "GET": (lambda mesh: mesh.ask(scope="transactions", method="GET"), 403, "policy"),
    "another path": (lambda mesh: mesh.ask(scope="transactions", path="/x"), 403, "policy"),
    "a token nobody signed": (lambda mesh: mesh.ask("-H", forged()), 401, "bad-token"),
}


@pytest.mark.parametrize(("ask", "status", "reason"), CASES.values(), ids=CASES.keys())
def test_our_server_decides_by_claims_it_has_verified_itself(
    mesh: World, ask: Callable[[World], tuple[int, str]], status: int, reason: str
) -> None:
    found, answer = ask(mesh)
    assert (found, f"x-meshbridge-reason: {reason}" in answer) == (status, True), answer


def decided(mesh: World) -> dict[str, object]:
    return [line for line in mesh.authz_log(mesh.authz_pods[0]) if line["event"] == "check.decided"][-1]


def echoed(mesh: World) -> bytes:
    """What comes back from the TCP port; nothing where the connection is refused."""
    with mesh.client.connect("10.96.9.1", TCP) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(b"hello")
        return sock.recv(5)
    return b""


def test_tcp_connections_are_asked_about_too(mesh: World) -> None:
    assert echoed(mesh) == b"hello"
    found = decided(mesh)
    assert (found["verdict"], found["pod"], found["port"], "method" in found) == ("allow", "finance/server", TCP, False)


def test_the_clusters_endpoints_are_those_of_the_envoys_own_node(mesh: World) -> None:
    """By internalTrafficPolicy: Local; a server of another node would know nothing of the pod."""
    here, elsewhere = mesh.authz_pods
    found = endpoint_slice("meshbridge-authz", NAMESPACE, {"grpc": PORT}, [Endpoint(here), Endpoint(elsewhere)])
    found["endpoints"][1] |= {"nodeName": "node-b"}
    mesh.put(found)
    dumped = mesh.config_dump(mesh.server)
    assert str(here.v4) in dumped
    assert f'"{elsewhere.v4}"' not in _endpoints(dumped, Authz().cluster)
    mesh.endpoints(Endpoint(here))


def _endpoints(dumped: str, cluster: str) -> str:
    for each in json.loads(dumped)["configs"]:
        for one in each.get("dynamic_endpoint_configs", ()):
            if one["endpoint_config"].get("cluster_name") == cluster:
                return json.dumps(one)
    raise AssertionError(f"no endpoints of {cluster}")


ASK = """
import sys, grpc
with grpc.insecure_channel(sys.argv[1]) as channel:
    call = channel.unary_unary("/envoy.service.auth.v3.Authorization/Check")
    print(call(bytes.fromhex(sys.argv[2]), timeout=5).hex())
"""


def asked_from(pod: Pod, authz: Pod, about: Pod) -> str:
    """The reason that somebody in ``pod`` is told who asks about requests to ``about``."""
    request = CheckRequest()
    for end, address in ((request.attributes.source, "10.99.0.77"), (request.attributes.destination, about.v4)):
        end.address.socket_address.address = str(address)
        end.address.socket_address.port_value = 8080
    request.attributes.request.http.method = "GET"

    # As an Envoy does: past the pod's own redirection. gRPC's threads follow nobody into a namespace, a process does.
    rule = ["OUTPUT", "-p", "tcp", "-d", str(authz.v4), "-j", "ACCEPT"]
    inside = ["nsenter", f"--net=/run/netns/{pod.netns}"]
    run(*inside, "iptables", "-w", "-t", "nat", "-I", *rule)
    told = run(*inside, sys.executable, "-c", ASK, f"{authz.v4}:{PORT}", request.SerializeToString().hex())
    run(*inside, "iptables", "-w", "-t", "nat", "-D", *rule)
    answer = CheckResponse.FromString(bytes.fromhex(told))
    headers = answer.denied_response.headers or answer.ok_response.response_headers_to_add
    return str(next(each.header.value for each in headers if each.header.key == "x-meshbridge-reason"))


def test_plaintext_where_it_is_asked_for(mesh: World) -> None:
    """The second pod says nothing of TLS, neither in its labels nor by its options; Envoys then ask in the clear."""
    one, two = mesh.authz_pods
    running = mesh.start_authz(two, "--plaintext")
    mesh.endpoints(Endpoint(two))
    until(lambda: str(two.v4) in _endpoints(mesh.config_dump(mesh.server), Authz().cluster), "the other is known")
    until(lambda: str(one.v4) not in _endpoints(mesh.config_dump(mesh.server), Authz().cluster), "the one is gone")
    assert [mesh.ask(scope=scope)[0] for scope in ("transactions", "other")] == [200, 403]
    log = [line for line in mesh.authz_log(two) if line["event"] == "check.decided"]
    assert [line["verdict"] for line in log[-2:]] == ["allow", "deny"]
    reasons = [asked_from(mesh.server, two, about) for about in (mesh.server, mesh.client)]
    assert reasons == ["policy", "caller-differs"]
    mesh.endpoints(Endpoint(one))
    until(lambda: str(two.v4) not in _endpoints(mesh.config_dump(mesh.server), Authz().cluster), "the one is back")
    running.kill()
    assert mesh.ask(scope="transactions")[0] == 200


def test_a_policy_in_the_root_namespace_is_for_the_whole_mesh(mesh: World) -> None:
    """Our server's own pods have no Envoy, so nothing loops."""
    everybody = custom_policy(ROOT_NAMESPACE, {})
    mesh.put(everybody)
    mesh.api.delete(OURS)
    try:
        until(
            lambda: "ns[finance]-policy[meshbridge-ext-authz]" not in mesh.config_dump(mesh.server), "it alone is left"
        )
        assert [mesh.ask(scope=scope)[0] for scope in ("transactions", "other")] == [200, 403]
        assert "x-meshbridge-reason: policy" in mesh.ask(scope="other")[1]
    finally:
        mesh.put(OURS)
        mesh.api.delete(everybody)


def test_two_providers_at_one_workload_make_istio_deny_everything(mesh: World) -> None:
    mesh.put(OTHERS)
    try:
        until(lambda: "RBAC: access denied" in mesh.ask(scope="transactions")[1], "Istio denies by itself")
        status, answer = mesh.ask(scope="transactions")
        assert (status, "x-meshbridge" in answer) == (403, False)
        assert echoed(mesh) == b""
    finally:
        mesh.api.delete(OTHERS)
    until(lambda: mesh.ask(scope="transactions")[0] == 200, "ours is asked again")


def test_our_own_filter_works_beside_another_provider(mesh: World) -> None:
    """Each of the two decides: what one refuses is refused."""
    ours = envoy_filter(Authz(), "finance", SERVER)
    mesh.api.delete(OURS)
    mesh.put(OTHERS, ours)
    try:
        until(lambda: "x-meshbridge-reason" in mesh.ask(scope="other")[1], "our filter asks")
        until(lambda: mesh.ask("-H", "x-other: no", scope="transactions")[0] == 403, "the other's asks")
        status, answer = mesh.ask(scope="transactions")
        assert (status, "x-meshbridge-reason: allowed" in answer) == (200, True), answer
        assert mesh.ask("-H", "x-other: no", scope="transactions")[0] == 403
        assert mesh.ask(scope="other")[0] == 403
        assert mesh.ask("-H", forged())[0] == 401
        assert echoed(mesh) == b"hello"
        assert "method" not in decided(mesh)
    finally:
        mesh.api.delete(OTHERS, ours)
        mesh.put(OURS)
    until(lambda: "x-meshbridge" in mesh.ask(scope="other")[1], "ours is the provider again")
