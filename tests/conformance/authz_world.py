"""A mesh of Istio's in which our ext_authz server is the provider: real istiod, API server, Envoys, controller, authz.

The tests play the kubelet and the endpoint controller. Envoy is upstream's, so istiod leaves out the filters that only
Istio's has.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Any

import jwt
import yaml
from api_server import ADMIN, ApiServer, path_of, running_api_server, wait_for
from envoy_world import ROOT_NAMESPACE
from istiod_server import custom_resource_definitions, istiod_at
from meshnet import Authority, Pod, envoy_process, in_netns, pod_pair, run, shared_directory, tcp_server, workload
from test_half_bypass_istiod import bootstrap, relayed, serving_secrets
from test_half_bypass_live import redirect
from test_mesh_live import ISSUER, JWT_KEY, killed_afterwards, manifest, process, token, until
from test_sidecar_live import echo_app, http_app

from meshbridge.demo import istio_init
from meshbridge.xds.auth import AUDIENCE
from meshbridge.xds.istio import NAMESPACE, PORT, SERVICE, Authz, provider

__all__ = ["HTTP", "PROCESS", "TCP", "World", "token", "until", "world"]

HTTP, TCP = 8080, 9000
PROCESS = "/api/v1/process"
SERVER = {"app": "transaction-service"}
CLUSTER_IP = "10.96.9.1"
AUTHZ_ACCOUNT = "meshbridge-authz"
OTHER_PORT = 9292
OURS = Authz()

DRAIN = ("--drain-time-s", "1")
"""Connections that are open keep the filters they began with, in Istio for 45 s."""


def meshbridge_pod(name: str, number: int) -> Pod:
    v4, v6 = IPv4Address(f"10.99.0.{number}"), IPv6Address(f"fd99::{number:x}")
    return Pod(f"mbap-{os.getpid()}-{name}", workload(name, AUTHZ_ACCOUNT, v4, v6, NAMESPACE), v4, v6)


@contextlib.contextmanager
def beside(server: Pod, pods: list[Pod]) -> Iterator[None]:
    """Further pods, each on a veth of its own into the server's namespace, which it asks from there directly."""
    try:
        for number, pod in enumerate(pods):
            run("ip", "netns", "add", pod.netns)
            link = f"az{number}"
            run("ip", "-n", server.netns, "link", "add", link, "type", "veth", "peer", "eth0", "netns", pod.netns)
            run("ip", "-n", server.netns, "link", "set", link, "up")
            run("ip", "-n", server.netns, "route", "add", f"{pod.v4}/32", "dev", link, "src", str(server.v4))
            up = ("link set lo up", "link set eth0 up")
            for command in (f"addr add {pod.v4}/32 dev eth0", *up, f"route add {server.v4}/32 dev eth0"):
                run("ip", "-n", pod.netns, *command.split())
        yield
    finally:
        for pod in pods:
            subprocess.run(["ip", "netns", "del", pod.netns], capture_output=True)


def mesh_config(authz: Authz = OURS) -> str:
    other = {"name": "other", "envoyExtAuthzGrpc": {"service": f"other.{NAMESPACE}.svc.cluster.local",
                                                    "port": OTHER_PORT, "timeout": "2s"}}  # fmt: skip
    return yaml.safe_dump({"extensionProviders": [provider(authz), other]})


def key_set() -> str:
    key = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(JWT_KEY.public_key())) | {"kid": "k1"}
    return json.dumps({"keys": [key]})


def policies() -> list[dict[str, Any]]:
    """Who is who, and the inputs' own rule: POST to one path, with a claim."""
    selector = {"matchLabels": SERVER}
    rule = {"to": [{"operation": {"methods": ["POST"], "paths": [PROCESS]}}],
            "when": [{"key": "request.auth.claims[scope]", "values": ["transactions"]}]}  # fmt: skip
    tcp = {"to": [{"operation": {"ports": [str(TCP)]}}]}
    return [
        {"apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
         "metadata": {"name": "issuer", "namespace": "finance"},
         "spec": {"selector": selector, "jwtRules": [{"issuer": ISSUER, "jwks": key_set()}]}},
        {"apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
         "metadata": {"name": "l7-jwt", "namespace": "finance"},
         "spec": {"selector": selector, "action": "ALLOW", "rules": [rule, tcp]}},
    ]  # fmt: skip


def service(name: str, namespace: str, ports: dict[str, int], selector: dict[str, str], **spec: Any) -> dict[str, Any]:
    listed = [{"name": port, "port": number, "targetPort": number} for port, number in ports.items()]
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
            "spec": {"selector": selector, "ports": listed, **spec}}  # fmt: skip


@dataclass(frozen=True)
class Endpoint:
    pod: Pod
    leaving: bool = False


def endpoint_slice(name: str, namespace: str, ports: dict[str, int], endpoints: list[Endpoint]) -> dict[str, Any]:
    """What the endpoint controller would write."""
    return {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": namespace, "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": port, "port": number, "protocol": "TCP"} for port, number in ports.items()],
        "endpoints": [
            {"addresses": [str(each.pod.v4)], "nodeName": each.pod.workload.node,
             "conditions": {"ready": not each.leaving, "serving": True, "terminating": each.leaving},
             "targetRef": {"kind": "Pod", "name": each.pod.workload.name, "namespace": namespace}}
            for each in endpoints
        ],
    }  # fmt: skip


@dataclass
class World:
    api: ApiServer
    server: Pod
    client: Pod
    authz_pods: list[Pod]
    directory: Path
    certificates: dict[str, Path]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def ask(self, *arguments: str, path: str = PROCESS, method: str = "POST", scope: str = "") -> tuple[int, str]:
        """One request to the Service: its status, and the whole answer."""
        if scope:
            arguments = (*arguments, "-H", f"authorization: Bearer {token(scope)}")
        found = self.client.curl(f"http://{CLUSTER_IP}:{HTTP}{path}", "-X", method, *arguments)
        return int(found.stdout.split()[1]) if found.stdout else 0, found.stdout

    def start_authz(self, pod: Pod, *listening: str) -> subprocess.Popen[bytes]:
        """Our server in its pod, as its DaemonSet would start it; returns when health says that it decides."""
        where = f"{pod.v4}:{PORT}"
        if not listening:
            listening = tuple(f"--{option}={path}" for option, path in self.certificates.items())
        code = "from meshbridge.cli import main; main()"
        inside = ["nsenter", f"--net=/run/netns/{pod.netns}"]
        token_file = self.directory / f"{pod.workload.name}.token"
        arguments = ["authz", "--node", pod.workload.node, "--controller", f"unix:{self.directory}/xds.sock",
                     "--token-file", str(token_file), "--listen", where, *listening]  # fmt: skip
        with (self.directory / f"{pod.workload.name}.log").open("ab") as log:
            running = subprocess.Popen([*inside, sys.executable, "-c", code, *arguments], stdout=log, stderr=log)
        self.started.append(running)
        until(lambda: self._serves(pod, running, where), f"{pod.workload.name} serves", 40)
        return running

    def _serves(self, pod: Pod, running: subprocess.Popen[bytes], where: str) -> bool:
        assert running.poll() is None, (self.directory / f"{pod.workload.name}.log").read_text()[-3000:]
        if not self.authz_log(pod):
            return False
        lines = self.authz_log(pod)
        started = max(number for number, line in enumerate(lines) if line["event"] == "authz.started")
        return any(line["event"] == "revision.applied" for line in lines[started:]) and _connects(pod, where)

    def authz_log(self, pod: Pod) -> list[dict[str, Any]]:
        text = (self.directory / f"{pod.workload.name}.log").read_text()
        return [json.loads(line) for line in text.splitlines() if line.startswith("{")]

    def put(self, *objects: dict[str, Any]) -> None:
        """Create or replace."""
        for each in objects:
            path = f"{path_of(each)}/{each['metadata']['name']}"
            code, current = self.api.call("GET", path)
            if code == 200:
                version = {"resourceVersion": current["metadata"]["resourceVersion"]}
                each = {**each, "metadata": {**each["metadata"], **version}}
                code, answer = self.api.call("PUT", path, each)
            else:
                code, answer = self.api.call("POST", path_of(each), each)
            assert code in (200, 201), answer

    def endpoints(self, *endpoints: Endpoint) -> None:
        """Who stands behind our Service now."""
        self.put(endpoint_slice(SERVICE, NAMESPACE, {"grpc": PORT}, list(endpoints)))

    def mesh(self, authz: Authz) -> None:
        self.put(config_map(mesh_config(authz)))

    def config_dump(self, pod: Pod) -> str:
        url = "http://127.0.0.1:15000/config_dump?include_eds"
        return run("nsenter", f"--net=/run/netns/{pod.netns}", "curl", "-sS", url)


def config_map(text: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": ROOT_NAMESPACE},
            "data": {"mesh": text}}  # fmt: skip


def _connects(pod: Pod, where: str) -> bool:
    host, _, port = where.rpartition(":")

    def connect() -> bool:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), 1):
            return True
        return False

    return in_netns(pod.netns, connect)


@contextlib.contextmanager
def world(istio: Path, tmp: Callable[[str], Path], plaintext: tuple[str, ...] = ()) -> Iterator[World]:
    """Everything but our authz server, which tests start, and who stands behind its Service.

    Args:
        plaintext: which of its pods, by name, do not say that they serve the mesh's TLS.
    """
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(shared_directory())
        server, client = stack.enter_context(pod_pair("mbap"))
        authz_pods = [meshbridge_pod(f"authz-{n}", 10 + n) for n in (1, 2)]
        stack.enter_context(beside(server, authz_pods))
        pods = [pod_object(server, SERVER), pod_object(client, {"app": "client"})]
        kinds = {"cilium.io/v2": {"CiliumNetworkPolicy": True}}
        api = stack.enter_context(running_api_server(tmp("api"), kinds))
        api.create(*custom_resource_definitions(istio / "share"))
        base = [
            *({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}
              for name in ("finance", NAMESPACE, ROOT_NAMESPACE)),
            {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-a"}},
            {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": AUTHZ_ACCOUNT, "namespace": NAMESPACE}},
            config_map(mesh_config()), *pods,
            *(authz_object(pod, mtls=pod.workload.name not in plaintext) for pod in authz_pods),
            service("transactions", "finance", {"http": HTTP, "tcp": TCP}, SERVER, clusterIP=CLUSTER_IP),
            endpoint_slice("transactions", "finance", {"http": HTTP, "tcp": TCP}, [Endpoint(server)]),
            service(SERVICE, NAMESPACE, {"grpc": PORT}, {"app": "authz"}, internalTrafficPolicy="Local"),
        ]  # fmt: skip
        listed = {path_of(each) for each in (*base, *policies())}
        wait_for(lambda: all(api.call("GET", path)[0] == 200 for path in listed), "kinds are served")
        api.create(*base, *policies())
        port = stack.enter_context(
            istiod_at(
                istio / "bin/pilot-discovery", api.kubeconfig(ADMIN), tmp("istiod"),
                PILOT_ENABLE_METADATA_EXCHANGE="false", PILOT_ENABLE_ALPN_FILTER="false",
            )
        )  # fmt: skip
        stack.enter_context(relayed(directory / "istiod.sock", port))
        state = directory / "state"
        state.mkdir(mode=0o700)
        for pod in authz_pods:
            (directory / f"{pod.workload.name}.token").write_text(projected_token(api, pod))
        authority = Authority()
        found = World(api, server, client, authz_pods, directory, certificates(authority, directory))
        stack.enter_context(killed_afterwards(found.started))
        found.started.append(
            process(
                directory, "controller", "controller", "--kubernetes", "--kubeconfig", str(api.kubeconfig(ADMIN)),
                "--listen", f"unix:{directory}/xds.sock", "--state-dir", str(state), "--read-only",
            )
        )  # fmt: skip
        until((directory / "xds.sock").exists, "controller listens", 40)
        run("ip", "-n", client.netns, "route", "add", "10.96.0.0/16", "dev", "eth0")
        for pod, each in zip((server, client), pods, strict=True):
            redirect(pod, each)
            sds = directory / f"{pod.workload.name}-sds.sock"
            stack.enter_context(serving_secrets(authority, pod, sds))
            text = bootstrap(pod, each, directory / "istiod.sock", sds)
            config = json.loads(text)
            config["node"]["metadata"]["NODE_NAME"] = pod.workload.node
            stack.enter_context(envoy_process(pod, json.dumps(config), directory, *DRAIN))
        stack.enter_context(tcp_server(server, str(server.v4), HTTP, http_app))
        stack.enter_context(tcp_server(server, str(server.v4), TCP, echo_app))
        yield found


def projected_token(api: ApiServer, pod: Pod) -> str:
    """What the kubelet would put into the pod; the controller has the API server review it."""
    _, found = api.call("GET", f"/api/v1/namespaces/{NAMESPACE}/pods/{pod.workload.name}")
    bound = {"apiVersion": "v1", "kind": "Pod", "name": pod.workload.name, "uid": found["metadata"]["uid"]}
    spec = {"audiences": [AUDIENCE], "expirationSeconds": 3600, "boundObjectRef": bound}
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
    code, answer = api.call("POST", f"/api/v1/namespaces/{NAMESPACE}/serviceaccounts/{AUTHZ_ACCOUNT}/token", request)
    assert code == 201, answer
    return str(answer["status"]["token"])


def certificates(authority: Authority, directory: Path) -> dict[str, Path]:
    """Those that Istio's agent would keep for the server's pod, by the option that names them."""
    chain, key = authority.issue(NAMESPACE, AUTHZ_ACCOUNT)
    found = {}
    for option, content in (("tls-cert", chain), ("tls-key", key), ("client-ca", authority.root_pem)):
        found[option] = directory / f"authz-{option}.pem"
        found[option].write_bytes(content)
    return found


def pod_object(pod: Pod, labels: dict[str, str]) -> dict[str, Any]:
    each = manifest(pod, pod.workload.name)
    each["metadata"]["labels"] = {**labels, "security.istio.io/tlsMode": "istio"}
    each["spec"]["initContainers"][0] |= {"image": "i", "args": list(istio_init.render({}, pod.workload.key))}
    each["status"]["podIPs"] = [{"ip": str(pod.v4)}]
    for container in each["spec"]["containers"]:
        container["image"] = "i"
    return each


def authz_object(pod: Pod, *, mtls: bool) -> dict[str, Any]:
    """A pod of our DaemonSet; with ``mtls`` it serves with the mesh's certificates and no Envoy before it."""
    labels = {"app": "authz", "sidecar.istio.io/inject": "false"}
    if mtls:
        labels["security.istio.io/tlsMode"] = "istio"
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod.workload.name, "namespace": NAMESPACE, "labels": labels},
        "spec": {"nodeName": pod.workload.node, "serviceAccountName": AUTHZ_ACCOUNT,
                 "containers": [{"name": "authz", "image": "i"}]},
        "status": {"phase": "Running", "podIP": str(pod.v4), "podIPs": [{"ip": str(pod.v4)}]},
    }  # fmt: skip
