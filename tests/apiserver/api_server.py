"""A real API server on a real etcd, both on the loopback: without nodes and controllers, it keeps what it is given."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient

from meshbridge.kube.cluster import connect

REPO = Path(__file__).parent.parent.parent
ADMIN, NOBODY, READER = "admin", "nobody", "reader"
REPLICAS = ("replica-a", "replica-b")
"""Users who may do what a test gives them, as two replicas of one program."""
ETCD = Path("/var/cache/meshbridge/etcd/current/usr/bin/etcd")
STARTED_S = 90

_AUDITED = {
    "apiVersion": "audit.k8s.io/v1", "kind": "Policy", "omitStages": ["RequestReceived"],
    "rules": [{"level": "Metadata", "verbs": ["create", "update", "patch", "delete"]}],
}  # fmt: skip

CRDS = {
    "cilium.io/v2": {"CiliumNetworkPolicy": True, "CiliumClusterwideNetworkPolicy": False},
    "security.istio.io/v1": {"AuthorizationPolicy": True, "PeerAuthentication": True, "RequestAuthentication": True},
    "policy.networking.k8s.io/v1alpha1": {"AdminNetworkPolicy": False},
}
"""What tests install where they say nothing else: whether each kind is namespaced."""


@dataclass(frozen=True)
class ApiServer:
    """Where it is. Each user's token is the user's name."""

    url: str
    directory: Path

    def kubeconfig(self, token: str) -> Path:
        path = self.directory / f"kubeconfig-{token}"
        config = {
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {
                "server": self.url, "certificate-authority": str(self.directory / "certs/apiserver.crt")}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        }  # fmt: skip
        path.write_text(json.dumps(config))
        path.chmod(0o600)
        return path

    def client(self, token: str = ADMIN) -> ApiClient:
        return connect(self.kubeconfig(token))

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request as the administrator, with nothing of the code under test in it."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {ADMIN}", "Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        context = ssl.create_default_context(cafile=str(self.directory / "certs/apiserver.crt"))
        try:
            with urllib.request.urlopen(request, timeout=30, context=context) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def writes(self) -> list[dict[str, Any]]:
        """Every write it has answered, with who made it and when, in its own words."""
        path = self.directory / "audit.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def create(self, *objects: dict[str, Any]) -> None:
        for each in objects:
            code, answer = self.call("POST", path_of(each), each)
            assert code in (201, 409), answer
            if "status" in each:
                path = f"{path_of(each)}/{each['metadata']['name']}/status"
                _, current = self.call("GET", path)
                code, answer = self.call("PUT", path, {**current, "status": each["status"]})
                assert code == 200, answer

    def delete(self, *objects: dict[str, Any]) -> None:
        for each in objects:
            path = f"{path_of(each)}/{each['metadata']['name']}"
            self.call("DELETE", f"{path}?gracePeriodSeconds=0")
            if each["kind"] == "Namespace":  # no controller is there that would let it go
                code, current = self.call("GET", path)
                if code == 200:
                    self.call("PUT", f"{path}/finalize", {**current, "spec": {"finalizers": []}})

    def install(self, api_version: str, kind: str, *, namespaced: bool) -> None:
        """A definition of a kind that takes anything, served when this returns."""
        crd = definition(api_version, kind, namespaced=namespaced)
        self.create(crd)
        listed = f"/apis/{api_version}/{crd['spec']['names']['plural']}"
        wait_for(lambda: self.call("GET", listed)[0] == 200, f"{kind} is served")

    def uninstall(self, api_version: str, kind: str) -> None:
        self.delete(definition(api_version, kind, namespaced=True))
        listed = f"/apis/{api_version}/{plural(kind)}"
        wait_for(lambda: self.call("GET", listed)[0] == 404, f"{kind} is gone")


def plural(kind: str) -> str:
    lower = kind.lower()
    return f"{lower[:-1]}ies" if lower.endswith("y") else lower if lower.endswith("s") else f"{lower}s"


def path_of(each: dict[str, Any]) -> str:
    version, namespace = each["apiVersion"], each["metadata"].get("namespace")
    root = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{root}/namespaces/{namespace}/{plural(each['kind'])}" if namespace else f"{root}/{plural(each['kind'])}"


def definition(api_version: str, kind: str, *, namespaced: bool) -> dict[str, Any]:
    group, _, version = api_version.partition("/")
    schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural(kind)}.{group}",
                     "annotations": {"api-approved.kubernetes.io": "unapproved, a test's"}},
        "spec": {
            "group": group, "scope": "Namespaced" if namespaced else "Cluster",
            "names": {"kind": kind, "plural": plural(kind), "singular": kind.lower()},
            "versions": [{"name": version, "served": True, "storage": True, "schema": {"openAPIV3Schema": schema}}],
        },
    }  # fmt: skip


def wait_for(condition: Callable[[], bool], what: str, timeout_s: float = 30) -> None:
    until = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < until, f"not so after {timeout_s} s: {what}"
        time.sleep(0.1)


def missing() -> str:
    """Why there is no API server here; empty when there is one."""
    if not ETCD.exists():
        return "needs etcd: run scripts/setup dev"
    found = subprocess.run([REPO / "scripts/third-party", "--path", "kubernetes"], capture_output=True, text=True)
    return "" if found.returncode == 0 else f"needs kube-apiserver: {found.stderr.strip()}"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


@contextmanager
def running_api_server(directory: Path, kinds_of: Mapping[str, Mapping[str, bool]] = CRDS) -> Iterator[ApiServer]:
    """An API server that keeps its things in ``directory``, ready and with these kinds."""
    built = subprocess.check_output([REPO / "scripts/third-party", "--path", "kubernetes"], text=True).strip()
    etcd_url, peer_url = (f"http://127.0.0.1:{free_port()}" for _ in range(2))
    port = free_port()
    tokens = directory / "tokens.csv"
    users = (NOBODY, READER, *REPLICAS)
    lines = [f'{ADMIN},{ADMIN},1,"system:masters"', *(f"{user},{user},{n}" for n, user in enumerate(users, 2))]
    tokens.write_text("\n".join(lines) + "\n")
    tokens.chmod(0o600)
    audited = directory / "audit-policy.json"
    audited.write_text(json.dumps(_AUDITED))
    key = directory / "sa.key"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    commands = {
        "etcd": [
            ETCD, "--data-dir", directory / "etcd", "--unsafe-no-fsync", "--listen-client-urls", etcd_url,
            "--advertise-client-urls", etcd_url, "--listen-peer-urls", peer_url,
            "--initial-advertise-peer-urls", peer_url, "--initial-cluster", f"default={peer_url}",
        ],
        "kube-apiserver": [
            f"{built}/bin/kube-apiserver", f"--etcd-servers={etcd_url}", f"--secure-port={port}",
            "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1", "--endpoint-reconciler-type=none",
            f"--cert-dir={directory / 'certs'}", f"--token-auth-file={tokens}", "--authorization-mode=RBAC",
            "--service-cluster-ip-range=10.96.0.0/16", "--disable-admission-plugins=ServiceAccount",
            "--allow-privileged=true",
            f"--audit-policy-file={audited}", f"--audit-log-path={directory / 'audit.log'}",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
        ],
    }  # fmt: skip
    running: list[subprocess.Popen[bytes]] = []
    try:
        for name, command in commands.items():
            with (directory / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(["nice", *command], stdout=log, stderr=log))
        server = ApiServer(f"https://127.0.0.1:{port}", directory)
        wait_for(lambda: _is_ready(server, running), f"the API server is ready, see {directory}", STARTED_S)
        for api_version, kinds in kinds_of.items():
            for kind, namespaced in kinds.items():
                server.install(api_version, kind, namespaced=namespaced)
        yield server
    finally:
        for process in reversed(running):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _is_ready(server: ApiServer, running: list[subprocess.Popen[bytes]]) -> bool:
    dead = [process.args for process in running if process.poll() is not None]
    assert not dead, f"ended at its start: {dead}, see {server.directory}"
    try:
        request = urllib.request.Request(f"{server.url}/readyz", headers={"Authorization": f"Bearer {ADMIN}"})
        context = ssl.create_default_context(cafile=str(server.directory / "certs/apiserver.crt"))
        with urllib.request.urlopen(request, timeout=5, context=context):
            return True
    except OSError:
        return False
