"""The whole path with nothing played: controller and authz processes, two Envoys, the inputs' own policy."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import yaml
from cryptography.hazmat.primitives.asymmetric import ec
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from meshnet import Pod, envoy_process, pod_pair, shared_directory, tcp_server
from test_sidecar_live import echo_app, http_app

from meshbridge.xds.auth import load_or_create_key, mint_token, node_caller, pod_caller
from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap_json
from meshbridge.xds.secrets import SpiffeId, load_or_create_authority

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("envoy")]

INPUT_POLICY = Path(__file__).parents[2] / "manifests" / "inputs" / "istio-l7-policy.yaml"
JWT_KEY = ec.generate_private_key(ec.SECP256R1())
ISSUER = "https://issuer.test"
HTTP, TCP = 8080, 9000
PROCESS = "/api/v1/process"


def manifest(pod: Pod, app: str) -> dict[str, Any]:
    workload = pod.workload
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": workload.name,
            "namespace": workload.namespace,
            "uid": workload.uid,
            "labels": {"app": app},
            "annotations": {"sidecar.istio.io/status": "{}"},
        },
        "spec": {
            "nodeName": workload.node,
            "serviceAccountName": workload.service_account,
            "initContainers": [
                {"name": "istio-init", "args": ["istio-iptables", "-p", "15001", "-z", "15006", "-b", "*", "-i", "*"]}
            ],
            "containers": [{"name": "app"}, {"name": "istio-proxy", "args": ["proxy", "sidecar"]}],
        },
        "status": {
            "phase": "Running",
            "podIP": str(pod.v4),
            "podIPs": [{"ip": str(pod.v4)}, {"ip": str(pod.v6)}],
        },
    }


def mesh_manifests(server: Pod, client: Pod) -> str:
    key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(JWT_KEY.public_key())) | {"kid": "k1"}
    selector = {"matchLabels": {"app": "transaction-service"}}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "transaction-service", "namespace": "finance"},
        "spec": {
            "selector": selector["matchLabels"],
            "ports": [{"name": "http", "port": HTTP, "targetPort": HTTP}, {"name": "tcp", "port": TCP}],
        },
    }
    authentication = {
        "apiVersion": "security.istio.io/v1",
        "kind": "RequestAuthentication",
        "metadata": {"name": "issuer", "namespace": "finance"},
        "spec": {"selector": selector, "jwtRules": [{"issuer": ISSUER, "jwks": json.dumps({"keys": [key]})}]},
    }
    strict = {
        "apiVersion": "security.istio.io/v1",
        "kind": "PeerAuthentication",
        "metadata": {"name": "strict", "namespace": "finance"},
        "spec": {"selector": selector, "mtls": {"mode": "STRICT"}},
    }
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "finance"}}
    pods = [manifest(server, "transaction-service"), manifest(client, "client")]
    return yaml.safe_dump_all([namespace, service, authentication, strict, *pods])


@dataclass
class Mesh:
    server: Pod
    client: Pod
    directory: Path
    manifests: Path
    authz_socket: Path
    start_authz: Callable[[], subprocess.Popen[bytes]]
    authz: subprocess.Popen[bytes]
    metrics_port: int

    def ask(self, *arguments: str, path: str = PROCESS) -> tuple[int, str]:
        result = self.client.curl(f"http://{self.server.v4}:{HTTP}{path}", *arguments)
        return int(result.stdout.split()[1]) if result.stdout else 0, result.stdout

    def post(self, scope: Any = "transactions", **more: Any) -> tuple[int, str]:
        return self.ask("-X", "POST", "-H", f"authorization: Bearer {token(scope)}", **more)

    def authz_log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.directory / "authz.log").read_text().splitlines()]


def token(scope: Any) -> str:
    claims = {"iss": ISSUER, "sub": "me", "scope": scope, "exp": int(time.time()) + 600}
    return jwt.encode(claims, JWT_KEY, algorithm="ES256", headers={"kid": "k1"})


def process(directory: Path, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", "from meshbridge.cli import main; main()", *arguments]
    with (directory / f"{name}.log").open("ab") as log:
        return subprocess.Popen(command, stdout=log, stderr=log)


@contextlib.contextmanager
def killed_afterwards(started: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    try:
        yield
    finally:
        for running in started:
            running.kill()
            running.wait()


def until(condition: Callable[[], bool], what: str, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"after {timeout_s} s still not: {what}"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with shared_directory() as made:
        yield made


@pytest.fixture(scope="module")
def mesh(directory: Path) -> Iterator[Mesh]:
    manifests, state = directory / "manifests", directory / "state"
    manifests.mkdir()
    state.mkdir(mode=0o700)
    xds, authz_socket = directory / "xds.sock", directory / "authz.sock"
    key = load_or_create_key(state / "token.key")
    now = datetime.now(UTC)
    node_token = directory / "node.token"
    node_token.write_text(mint_token(key, node_caller("node-a"), now=now))
    started: list[subprocess.Popen[bytes]] = []
    with socket.create_server(("127.0.0.1", 0)) as probe:
        metrics_port = probe.getsockname()[1]

    def start_authz() -> subprocess.Popen[bytes]:
        running = process(
            directory,
            "authz",
            *("authz", "--node", "node-a", "--controller", f"unix:{xds}", "--token-file", str(node_token)),
            *("--listen", f"unix:{authz_socket}", "--metrics", f"127.0.0.1:{metrics_port}"),
        )
        started.append(running)
        return running

    with pod_pair("mbenvm") as (server, client), killed_afterwards(started), contextlib.ExitStack() as stack:
        (manifests / "mesh.yaml").write_text(mesh_manifests(server, client))
        (manifests / "policy.yaml").write_bytes(INPUT_POLICY.read_bytes())
        started.append(
            process(
                directory,
                "controller",
                *("controller", "--manifests", str(manifests), "--listen", f"unix:{xds}", "--state-dir", str(state)),
            )
        )
        authz = start_authz()
        until(xds.exists, "controller listens")
        for pod in (server, client):
            w = pod.workload
            caller = pod_caller(w.node, w.namespace, w.name, w.service_account, w.uid)
            inputs = BootstrapInputs(w, mint_token(key, caller, now=now), str(xds), str(authz_socket))
            stack.enter_context(envoy_process(pod, bootstrap_json(inputs), directory))
        stack.enter_context(tcp_server(server, str(server.v4), HTTP, http_app))
        stack.enter_context(tcp_server(server, str(server.v4), TCP, echo_app))
        found = Mesh(server, client, directory, manifests, authz_socket, start_authz, authz, metrics_port)
        until(lambda: found.ask("-X", "POST")[0] == 403, "authz answers")
        yield found


CASES = {
    "no token": (lambda mesh: mesh.ask("-X", "POST"), 403),
    "another scope": (lambda mesh: mesh.post("other"), 403),
    "GET": (lambda mesh: mesh.ask("-H", f"authorization: Bearer {token('transactions')}"), 403),
    "another path": (lambda mesh: mesh.post(path="/api/v1/other"), 403),
    "the path with dots": (lambda mesh: mesh.post(path="/api/v1/process/../other"), 403),
    "scope as text": (lambda mesh: mesh.post("transactions"), 200),
    "scope among others": (lambda mesh: mesh.post("read transactions"), 200),
    "scope in a list": (lambda mesh: mesh.post(["read", "transactions"]), 200),
    "a bad token": (lambda mesh: mesh.ask("-X", "POST", "-H", "authorization: Bearer x.y.z"), 401),
}


@pytest.mark.parametrize(("ask", "status"), CASES.values(), ids=CASES.keys())
def test_the_inputs_own_policy(mesh: Mesh, ask: Callable[[Mesh], tuple[int, str]], status: int) -> None:
    assert ask(mesh)[0] == status


def test_answer_and_log_name_the_policy_and_its_line(mesh: Mesh) -> None:
    _, answer = mesh.ask("-X", "POST")
    assert "x-meshbridge-policy: finance/transaction-service-l7-jwt" in answer
    assert "no rule of any ALLOW policy matches the request" in answer
    line = next(line for line in reversed(mesh.authz_log()) if line["event"] == "check.decided")
    assert (line["verdict"], line["pod"], line["identity"]) == ("deny", "finance/server", "matches")
    assert "policy.yaml:" in line["rule"]
    assert line["principal"] == "spiffe://cluster.local/ns/finance/sa/client"


def own_tls(mesh: Mesh, tmp_path: Path, account: str) -> bytes:
    """POST with ``account``'s certificate by our own TLS, past the client's sidecar, from the client's address."""
    now = datetime.now(UTC)
    authority = load_or_create_authority(mesh.directory / "state", "cluster.local", now)
    svid = authority.issue(SpiffeId("cluster.local", "finance", account), now)
    (tmp_path / "chain.pem").write_bytes(svid.chain)
    (tmp_path / "key.pem").write_bytes(svid.key)
    context = ssl.create_default_context(cadata=authority.root_pem.decode())
    context.check_hostname = False
    context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
    with context.wrap_socket(mesh.client.connect_as_proxy(str(mesh.server.v4), HTTP)) as tls:
        tls.sendall(
            f"POST {PROCESS} HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {token('transactions')}\r\n"
            "content-length: 0\r\nconnection: close\r\n\r\n".encode()
        )
        data = b""
        while chunk := tls.recv(4096):
            data += chunk
        return data


def test_stolen_certificate_is_refused_and_says_so_its_own_passes(mesh: Mesh, tmp_path: Path) -> None:
    stolen = own_tls(mesh, tmp_path, "server")
    assert stolen.startswith(b"HTTP/1.1 403")
    assert b"x-meshbridge-reason: identity-differs" in stolen
    assert f"{mesh.client.v4} is a pod of service account finance/client".encode() in stolen
    assert own_tls(mesh, tmp_path, "client").startswith(b"HTTP/1.1 200")


def test_plaintext_meets_no_chain_in_strict_mode(mesh: Mesh) -> None:
    with mesh.client.connect_as_proxy(str(mesh.server.v4), HTTP) as plaintext:
        plaintext.sendall(f"POST {PROCESS} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        with contextlib.suppress(ConnectionResetError):
            assert plaintext.recv(100) == b""


def test_tcp_port_is_closed_as_the_only_allow_rule_needs_http(mesh: Mesh) -> None:
    with mesh.client.connect(str(mesh.server.v4), TCP) as connection:
        connection.sendall(b"hello\n")
        with contextlib.suppress(ConnectionResetError):
            assert connection.recv(100) == b""


def test_policy_file_that_changes_is_in_force_soon(mesh: Mesh) -> None:
    policy = mesh.manifests / "policy.yaml"
    before = policy.read_text()
    try:
        policy.write_text(before.replace(PROCESS, "/api/v1/other"))
        until(lambda: mesh.post(path="/api/v1/other")[0] == 200, "the new path is allowed")
        assert mesh.post()[0] == 403
    finally:
        policy.write_text(before)
        until(lambda: mesh.post()[0] == 200, "the old path is allowed again")


def test_header_sent_twice_gets_past_no_rule_for_one_of_its_values(mesh: Mesh) -> None:
    def status(*values: str) -> int:
        headers = [word for value in values for word in ("-H", f"x-a: {value}")]
        return mesh.ask("-X", "POST", "-H", f"authorization: Bearer {token('transactions')}", *headers)[0]

    deny = mesh.manifests / "deny.yaml"
    rule = {"when": [{"key": "request.headers[x-a]", "values": ["1"]}]}
    policy = {
        "apiVersion": "security.istio.io/v1",
        "kind": "AuthorizationPolicy",
        "metadata": {"name": "no-one", "namespace": "finance"},
        "spec": {"action": "DENY", "selector": {"matchLabels": {"app": "transaction-service"}}, "rules": [rule]},
    }
    try:
        deny.write_text(yaml.safe_dump(policy))
        until(lambda: status("1") == 403, "the header is denied")
        assert (status("2"), status("1", "2"), status("2", "1"), status("1,2")) == (200, 403, 403, 200)
    finally:
        deny.unlink()
        until(lambda: status("1") == 200, "the header is allowed again")


def test_policy_that_cannot_be_read_denies_and_is_named(mesh: Mesh) -> None:
    policy = mesh.manifests / "policy.yaml"
    before = policy.read_text()
    try:
        policy.write_text(before.replace("methods:", "methodz:"))
        until(lambda: mesh.post()[0] == 403, "the refused policy denies")
        _, answer = mesh.post()
        assert "transaction-service-l7-jwt is refused and may deny this" in answer
    finally:
        policy.write_text(before)
        until(lambda: mesh.post()[0] == 200, "allowed again")


def test_new_mesh_pod_changes_every_outbound_listener_and_drains_none(mesh: Mesh) -> None:
    updated = mesh.client.stat("listener_manager.listener_in_place_updated")
    extra = manifest(mesh.client, "extra")
    extra["metadata"] |= {"name": "extra", "uid": "uid-extra"}
    extra["status"] |= {"podIP": "10.99.0.77", "podIPs": [{"ip": "10.99.0.77"}]}
    path = mesh.manifests / "extra.yaml"
    try:
        path.write_text(yaml.safe_dump(extra))
        until(lambda: mesh.client.stat("listener_manager.listener_in_place_updated") > updated, "updated in place")
        assert mesh.client.stat("listener_manager.total_filter_chains_draining") == 0
        assert mesh.client.stat("listener_manager.lds.update_rejected") == 0
        assert mesh.post()[0] == 200
    finally:
        path.unlink(missing_ok=True)


def test_metrics_count_verdicts_by_policy(mesh: Mesh) -> None:
    mesh.post()
    with urllib.request.urlopen(f"http://127.0.0.1:{mesh.metrics_port}/metrics", timeout=5) as answer:
        text = answer.read().decode()
    assert 'policy="finance/transaction-service-l7-jwt",reason="allowed",verdict="allow"' in text
    assert 'meshbridge_authz_identity_checks_total{result="matches"}' in text
    assert "meshbridge_authz_ready 1.0" in text


def test_killed_authz_is_503_and_a_new_one_takes_over(mesh: Mesh) -> None:
    os.kill(mesh.authz.pid, signal.SIGKILL)
    mesh.authz.wait()
    status, answer = mesh.post()
    assert status == 503
    assert "x-meshbridge-reason: authorization server gave no answer" in answer
    mesh.authz = mesh.start_authz()
    until(lambda: mesh.post()[0] == 200, "the new server answers")


def test_drain_under_load_loses_no_answer(mesh: Mesh) -> None:
    """SIGTERM while requests run: each is decided by policy, or is the 503 of nobody being there; none hangs."""
    statuses: list[int] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            statuses.append(mesh.post()[0])

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    until(lambda: len(statuses) > 8, "load runs")
    mesh.authz.send_signal(signal.SIGTERM)
    assert mesh.authz.wait(10) == 0
    mesh.authz = mesh.start_authz()
    seen = len(statuses)
    until(lambda: 200 in statuses[seen:], "the new server answers")
    stop.set()
    for thread in threads:
        thread.join(15)
    assert set(statuses) <= {200, 503}
    assert statuses[0] == 200


def test_truncated_check_request_on_the_real_socket_is_refused(mesh: Mesh) -> None:
    with grpc.insecure_channel(f"unix:{mesh.authz_socket}") as channel:
        call = channel.unary_unary("/envoy.service.auth.v3.Authorization/Check")
        assert CheckResponse.FromString(call(b"\x0a\x40abc", timeout=5)).status.code != 0
    assert any(line.get("reason") == "bad-check-request" for line in mesh.authz_log())


def test_no_log_holds_a_token(mesh: Mesh) -> None:
    mesh.post()
    text = (mesh.directory / "authz.log").read_text()
    assert "check.decided" in text
    assert "eyJ" not in text
