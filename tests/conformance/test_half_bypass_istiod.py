"""Half bypasses as Istio makes them: a real istiod, two real Envoys, Istio's rules, and the bytes that arrive.

tests/envoy/test_half_bypass_live.py is the same for sidecars that MeshBridge configures. Here every row is a Service of
its own at a port of its own, called by the Service's address or by the pod's, and what ``evaluate`` says of it first is
compared with what happens. Envoy is upstream's, so istiod leaves out the filters that only Istio's has.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from api_server import ADMIN, ApiServer, missing, path_of, running_api_server, wait_for
from envoy.extensions.transport_sockets.tls.v3 import secret_pb2
from envoy.service.discovery.v3 import discovery_pb2
from envoy.service.secret.v3 import sds_pb2_grpc
from envoy_world import ROOT_NAMESPACE
from istiod_server import custom_resource_definitions, istiod_at
from meshnet import Authority, Pod, envoy_process, pod_pair, run, shared_directory, tcp_server
from test_half_bypass_live import (
    ANSWERS,
    BROKEN,
    HELLO,
    MTLS,
    NOTHING,
    PLAINTEXT,
    RAW,
    REQUEST,
    Application,
    Wire,
    documents_of,
    observed,
    redirect,
)
from test_mesh_live import manifest

from meshbridge.bypass.halfreport import half_bypasses
from meshbridge.bypass.halves import Delivered
from meshbridge.bypass.inventory import inventory
from meshbridge.demo import istio_init
from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster
from meshbridge.policy.model import Document

pytestmark = [pytest.mark.root, pytest.mark.timeout(600)]

FIRST_PORT = 9201
NAMESPACE = "finance"


@dataclass(frozen=True)
class Row:
    """Which sides capture the port and its mode; how it is called; what arrives. ``tls`` is a DestinationRule's."""

    client_captures: bool
    server_captures: bool
    mode: str
    how: str
    outcome: Delivered
    arrives: str
    tls: str = ""

    @property
    def headless(self) -> bool:
        return self.how == "headless"


TABLE = {
    "both capture, by the Service": Row(True, True, "STRICT", "service", MTLS, REQUEST),
    "both capture, by the Service, PERMISSIVE": Row(True, True, "PERMISSIVE", "service", MTLS, REQUEST),
    "both capture, by the Service, DISABLE": Row(True, True, "DISABLE", "service", PLAINTEXT, REQUEST),
    "both capture, by the Service, rule DISABLE": Row(True, True, "STRICT", "service", BROKEN, NOTHING, "DISABLE"),
    "both capture, by the Service, rule DISABLE, PERMISSIVE": Row(
        True, True, "PERMISSIVE", "service", PLAINTEXT, REQUEST, "DISABLE"),
    "both capture, by the pod's address": Row(True, True, "STRICT", "address", BROKEN, NOTHING),
    "both capture, by the pod's address, PERMISSIVE": Row(True, True, "PERMISSIVE", "address", PLAINTEXT, REQUEST),
    "both capture, headless": Row(True, True, "STRICT", "headless", MTLS, REQUEST),
    "both capture, headless, DISABLE": Row(True, True, "DISABLE", "headless", BROKEN, HELLO),
    "only the client captures, by the Service": Row(True, False, "STRICT", "service", BROKEN, HELLO),
    "only the client captures, by the Service, PERMISSIVE": Row(True, False, "PERMISSIVE", "service", BROKEN, HELLO),
    "only the client captures, by the Service, DISABLE": Row(True, False, "DISABLE", "service", PLAINTEXT, REQUEST),
    "only the client captures, by the Service, rule DISABLE": Row(
        True, False, "STRICT", "service", PLAINTEXT, REQUEST, "DISABLE"),
    "only the client captures, by the pod's address": Row(True, False, "STRICT", "address", PLAINTEXT, REQUEST),
    "only the client captures, headless": Row(True, False, "STRICT", "headless", BROKEN, HELLO),
    "only the client captures, headless, DISABLE": Row(True, False, "DISABLE", "headless", BROKEN, HELLO),
    "only the client captures, headless, rule DISABLE": Row(
        True, False, "STRICT", "headless", PLAINTEXT, REQUEST, "DISABLE"),
    "only the server captures, by the pod's address": Row(False, True, "STRICT", "address", BROKEN, NOTHING),
    "only the server captures, by the pod's address, PERMISSIVE": Row(
        False, True, "PERMISSIVE", "address", PLAINTEXT, REQUEST),
    "neither captures, by the pod's address": Row(False, False, "STRICT", "address", PLAINTEXT, REQUEST),
}  # fmt: skip
PORTS = {name: FIRST_PORT + number for number, name in enumerate(TABLE)}


def cluster_ip(port: int) -> str:
    return f"10.96.7.{port - FIRST_PORT + 1}"


def objects_of(server: Pod, client: Pod) -> list[dict[str, Any]]:
    """All of the cluster, as kubelet, injector and endpoint controller would leave it."""
    found: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}} for name in (NAMESPACE, ROOT_NAMESPACE)
    ]
    found.append(
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "istio", "namespace": ROOT_NAMESPACE},
         "data": {"mesh": ""}}
    )  # fmt: skip
    excluded = {
        server: ("excludeInboundPorts", [n for n, row in TABLE.items() if not row.server_captures]),
        client: ("excludeOutboundPorts", [n for n, row in TABLE.items() if not row.client_captures]),
    }
    for pod, (annotation, names) in excluded.items():
        extra = {istio_init.TRAFFIC + annotation: ",".join(str(PORTS[name]) for name in names)}
        each = manifest(pod, pod.workload.name)
        each["metadata"]["annotations"] |= extra
        each["metadata"]["labels"]["security.istio.io/tlsMode"] = "istio"
        each["spec"]["initContainers"][0] |= {"image": "i", "args": list(istio_init.render(extra, pod.workload.key))}
        each["status"]["podIPs"] = [{"ip": str(pod.v4)}]
        for container in each["spec"]["containers"]:
            container["image"] = "i"
        each["spec"]["containers"][0]["ports"] = [{"containerPort": port} for port in PORTS.values()]
        found.append(each)
    modes = {str(PORTS[name]): {"mode": row.mode} for name, row in TABLE.items() if row.mode != "STRICT"}
    found.append(
        {"apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
         "metadata": {"name": "modes", "namespace": NAMESPACE},
         "spec": {"selector": {"matchLabels": {"app": "server"}}, "mtls": {"mode": "STRICT"}, "portLevelMtls": modes}}
    )  # fmt: skip
    for name, row in TABLE.items():
        if row.how != "address":
            found += _service(PORTS[name], row, server)
    return found


def _service(port: int, row: Row, server: Pod) -> Iterator[dict[str, Any]]:
    name = f"r{port}"
    metadata = {"name": name, "namespace": NAMESPACE}
    spec = {"selector": {"app": "server"}, "ports": [{"name": "tcp", "port": port}],
            "clusterIP": "None" if row.headless else cluster_ip(port)}  # fmt: skip
    yield {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": spec}
    target = {"kind": "Pod", "name": server.workload.name, "namespace": NAMESPACE}
    yield {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {**metadata, "labels": {"kubernetes.io/service-name": name}},
        "ports": [{"name": "tcp", "port": port, "protocol": "TCP"}],
        "endpoints": [{"addresses": [str(server.v4)], "conditions": {"ready": True}, "targetRef": target}],
    }  # fmt: skip
    if row.tls:
        settings = [{"port": {"number": port}, "tls": {"mode": row.tls}}]
        yield {"apiVersion": "networking.istio.io/v1", "kind": "DestinationRule", "metadata": metadata,
               "spec": {"host": f"{name}.{NAMESPACE}.svc.cluster.local",
                        "trafficPolicy": {"portLevelSettings": settings}}}  # fmt: skip


class Secrets(sds_pb2_grpc.SecretDiscoveryServiceServicer):
    """The part of Istio's agent that hands an Envoy its certificate and the mesh's root."""

    def __init__(self, authority: Authority, pod: Pod) -> None:
        chain, key = authority.issue(pod.workload.namespace, pod.workload.service_account)
        own = secret_pb2.Secret(name="default")
        own.tls_certificate.certificate_chain.inline_bytes = chain
        own.tls_certificate.private_key.inline_bytes = key
        root = secret_pb2.Secret(name="ROOTCA")
        root.validation_context.trusted_ca.inline_bytes = authority.root_pem
        self._secrets = {secret.name: secret for secret in (own, root)}

    def StreamSecrets(self, requests: Any, context: Any) -> Iterator[discovery_pb2.DiscoveryResponse]:
        for request in requests:
            if request.response_nonce:
                continue
            response = discovery_pb2.DiscoveryResponse(version_info="1", nonce="1", type_url=request.type_url)
            for name in request.resource_names:
                response.resources.add().Pack(self._secrets[name])
            yield response


@contextlib.contextmanager
def serving_secrets(authority: Authority, pod: Pod, path: Path) -> Iterator[None]:
    with ThreadPoolExecutor(64) as pool:
        server = grpc.server(pool)
        sds_pb2_grpc.add_SecretDiscoveryServiceServicer_to_server(Secrets(authority, pod), server)
        server.add_insecure_port(f"unix:{path}")
        server.start()
        path.chmod(0o777)
        try:
            yield
        finally:
            server.stop(0).wait()


@contextlib.contextmanager
def relayed(path: Path, port: int) -> Iterator[None]:
    """A socket in the file system that leads to a port of this machine's loopback, from every network namespace."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o777)
        listener.listen()

        def copy(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := source.recv(65536):
                    sink.sendall(data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    far = socket.create_connection(("127.0.0.1", port))
                    for pair in ((near, far), (far, near)):
                        threading.Thread(target=copy, args=pair, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def bootstrap(pod: Pod, pod_object: dict[str, Any], xds: Path, sds: Path) -> str:
    """What Istio's agent would start Envoy with, as far as it matters here."""
    workload = pod.workload
    metadata = {
        "NAMESPACE": workload.namespace, "NAME": workload.name, "LABELS": pod_object["metadata"]["labels"],
        "CLUSTER_ID": "Kubernetes", "INSTANCE_IPS": str(pod.v4), "SERVICE_ACCOUNT": workload.service_account,
        "ISTIO_VERSION": "1.31.0", "INTERCEPTION_MODE": "REDIRECT", "MESH_ID": "cluster.local",
    }  # fmt: skip
    http2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    clusters = [
        {"name": name, "type": "STATIC", "connect_timeout": "2s", "typed_extension_protocol_options": http2,
         "load_assignment": {"cluster_name": name, "endpoints": [
             {"lb_endpoints": [{"endpoint": {"address": {"pipe": {"path": str(path)}}}}]}]}}
        for name, path in (("xds-grpc", xds), ("sds-grpc", sds))
    ]  # fmt: skip
    from_ads = {"ads": {}, "resource_api_version": "V3"}
    return json.dumps(
        {
            "node": {
                "id": f"sidecar~{pod.v4}~{workload.name}.{workload.namespace}~{workload.namespace}.svc.cluster.local",
                "cluster": f"{workload.name}.{workload.namespace}", "metadata": metadata,
            },
            "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 15000}}},
            "dynamic_resources": {
                "lds_config": from_ads, "cds_config": from_ads,
                "ads_config": {"api_type": "GRPC", "transport_api_version": "V3",
                               "grpc_services": [{"envoy_grpc": {"cluster_name": "xds-grpc"}}]},
            },
            "static_resources": {"clusters": clusters},
        }
    )  # fmt: skip


@dataclass
class Mesh:
    server: Pod
    client: Pod
    application: Application
    wire: Wire
    documents: list[Document]

    def address(self, name: str) -> str:
        return cluster_ip(PORTS[name]) if TABLE[name].how == "service" else str(self.server.v4)

    def evaluated(self, name: str) -> str | None:
        """The delivery that is computed of a connection before anybody makes it."""
        flow = {"src": self.client.workload.key, "dst": self.address(name), "port": PORTS[name]}
        (line,) = answer_lines(Cluster(self.documents), [json.dumps(flow).encode()])
        assert line.answered, line.record
        found: str | None = line.record["delivery"]
        return found

    def ask(self, name: str) -> tuple[bytes, list[bytes], list[bytes]]:
        """What came back to the client, what connections carried on the wire, what the application's were sent."""
        port = PORTS[name]
        self.application.received.pop(port, None)
        self.wire.read(port)
        answer = b""
        with self.client.connect(self.address(name), port) as sock:
            sock.settimeout(10)
            with contextlib.suppress(ConnectionError):
                sock.sendall(RAW)
                while part := sock.recv(4096):
                    answer += part
        return answer, self.wire.read(port), self.application.received.get(port, [])


@pytest.fixture(scope="module")
def mesh(third_party: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mesh]:
    istio = third_party("istio")
    if reason := missing():
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(shared_directory())
        server, client = stack.enter_context(pod_pair("mbisd"))
        objects = objects_of(server, client)
        api = stack.enter_context(running_api_server(tmp_path_factory.mktemp("api"), {}))
        _create(api, istio, objects)
        port = stack.enter_context(
            istiod_at(
                istio / "bin/pilot-discovery", api.kubeconfig(ADMIN), tmp_path_factory.mktemp("istiod"),
                PILOT_ENABLE_METADATA_EXCHANGE="false", PILOT_ENABLE_ALPN_FILTER="false",
            )
        )  # fmt: skip
        stack.enter_context(relayed(directory / "xds.sock", port))
        authority = Authority()
        run("ip", "-n", client.netns, "route", "add", "10.96.0.0/16", "dev", "eth0")
        for pod in (server, client):
            (pod_object,) = (o for o in objects if o["kind"] == "Pod" and o["metadata"]["name"] == pod.workload.name)
            redirect(pod, pod_object)
            sds = directory / f"{pod.workload.name}-sds.sock"
            stack.enter_context(serving_secrets(authority, pod, sds))
            text = bootstrap(pod, pod_object, directory / "xds.sock", sds)
            stack.enter_context(envoy_process(pod, text, directory))
        application = Application()
        for number in PORTS.values():
            stack.enter_context(tcp_server(server, str(server.v4), number, application.serve))
        wire = stack.enter_context(Wire(server))
        yield Mesh(server, client, application, wire, documents_of(objects))


def _create(api: ApiServer, istio: Path, objects: list[dict[str, Any]]) -> None:
    api.create(*custom_resource_definitions(istio / "share"))
    listed = {path_of(each) for each in objects}
    wait_for(lambda: all(api.call("GET", path)[0] == 200 for path in listed), "kinds are served")
    api.create(*objects)


@pytest.mark.parametrize("name", TABLE)
def test_what_arrives_from_an_istio_sidecar_is_what_evaluate_says(mesh: Mesh, name: str) -> None:
    row = TABLE[name]
    answer, wire, received = mesh.ask(name)
    assert observed(wire, received) == (row.outcome, row.arrives), (answer, [data[:16] for data in wire], received)
    assert (answer == ANSWERS[RAW]) == (row.outcome is not BROKEN), answer
    assert mesh.evaluated(name) == row.outcome.value


def test_every_half_is_reported_beforehand_as_it_arrives(mesh: Mesh) -> None:
    """Also what breaks although both sides capture it, but by a pod's address: nothing says that anybody calls that."""
    found = half_bypasses(inventory(mesh.documents), possible=True)
    reported = {(half.port, bool(half.via)): half.delivery.outcome for half in found}
    expected = {
        (PORTS[name], row.how != "address"): row.outcome
        for name, row in TABLE.items()
        if row.client_captures != row.server_captures or (row.outcome is BROKEN and row.how != "address")
    }
    assert expected.items() <= reported.items()
    both_see = {PORTS[name] for name, row in TABLE.items() if row.client_captures == row.server_captures}
    assert {key for key in reported if key[0] in both_see} <= expected.keys()
