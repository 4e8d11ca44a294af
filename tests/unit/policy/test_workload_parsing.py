"""Pods, pod templates and the objects around them: what policies and capture read of them."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from policycast import documents

from meshbridge.identity.model import ContainerPort, ProxyClass, ProxyContainer, Workload
from meshbridge.policy.parse import Namespace, Node, Service, ServiceAccount, ServicePort, parse

POD = """
apiVersion: v1
kind: Pod
metadata:
  name: api
  namespace: shop
  uid: u1
  labels: {app: api}
  annotations: {traffic.sidecar.istio.io/excludeInboundPorts: "9090"}
spec:
  nodeName: one
  serviceAccountName: robot
  initContainers:
  - name: istio-init
    args: [istio-iptables, -p, "15001"]
    env: [{name: ISTIO_DUAL_STACK, value: "true"}, {name: SECRET, valueFrom: {fieldRef: {fieldPath: x}}}]
  - name: istio-proxy
    restartPolicy: Always
    args: [proxy, sidecar]
    securityContext: {runAsUser: 1337, runAsGroup: 1337}
  containers:
  - name: app
    ports: [{name: http, containerPort: 8080}, {containerPort: 53, protocol: UDP}]
    livenessProbe: {httpGet: {port: http}}
    readinessProbe: {tcpSocket: {port: 9090}}
    startupProbe: {grpc: {port: 8080}}
status: {phase: Running, podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}, {ip: "fd00::1"}]}
"""


def workload(text: str) -> Workload:
    (document,) = documents(text)
    (found,) = parse(document).objects
    assert isinstance(found, Workload)
    return found


@pytest.mark.parametrize("name", ["x/ns/finance/sa/client", "client\\n", "Client", "a/b", "*"])
def test_a_service_account_cannot_write_another_name_into_certificates(name: str) -> None:
    (document,) = documents(POD.replace("robot", f'"{name}"'))
    parsed = parse(document)
    assert not parsed.objects
    assert "is no service account" in str(parsed.refusals[0])


def test_an_address_has_one_form() -> None:
    text = POD.replace("podIP: 10.0.0.1, podIPs: [{ip: 10.0.0.1}", 'podIP: "::ffff:10.0.0.1", podIPs: [{ip: 10.0.0.1}')
    assert workload(text).addresses == (ip_address("10.0.0.1"), ip_address("fd00::1"))
    (document,) = documents(POD.replace("fd00::1", "fe80::1%eth0"))
    assert "has a zone" in str(parse(document).refusals[0])


@pytest.mark.parametrize("port", ["0", "-5", "65536", f'"{"9" * 5000}"', str(10**30), "true", '"65536"', '"²"'])
def test_a_probe_port_that_is_none_is_refused(port: str) -> None:
    (document,) = documents(POD.replace("tcpSocket: {port: 9090}", f"tcpSocket: {{port: {port}}}"))
    assert "is no port" in str(parse(document).refusals[0])


def test_a_probe_port_in_quotes_is_a_number() -> None:
    assert workload(POD.replace("tcpSocket: {port: 9090}", 'tcpSocket: {port: "9090"}')).probe_ports[1] == 9090


def test_a_pod() -> None:
    assert workload(POD) == Workload(
        namespace="shop", name="api", uid="u1", node="one",
        addresses=(ip_address("10.0.0.1"), ip_address("fd00::1")),
        labels={"app": "api"}, annotations={"traffic.sidecar.istio.io/excludeInboundPorts": "9090"},
        service_account="robot", ports=(ContainerPort("http", 8080), ContainerPort("", 53, "UDP")),
        probe_ports=("http", 9090, 8080), proxy=ProxyClass.SIDECAR, init_args=("istio-iptables", "-p", "15001"),
        init_env={"ISTIO_DUAL_STACK": "true"}, proxy_container=ProxyContainer("sidecar", {}, 1337, 1337, True),
        init_containers=("istio-init", "istio-proxy"),
    )  # fmt: skip


def test_a_pod_that_has_no_status_is_pending_and_holds_no_address() -> None:
    found = workload("apiVersion: v1\nkind: Pod\nmetadata: {name: a, namespace: b}\nspec: {containers: [{name: c}]}\n")
    assert (found.phase, found.addresses, found.service_account, found.proxy) == (
        "Pending",
        (),
        "default",
        ProxyClass.NONE,
    )


PROXIES = {
    "a gateway": ("labels: {gateway.networking.k8s.io/gateway-name: g}", ProxyClass.GATEWAY),
    "a waypoint": (
        "labels: {gateway.networking.k8s.io/gateway-name: g, gateway.istio.io/managed: istio.io-mesh-controller}",
        ProxyClass.WAYPOINT,
    ),
    "ambient": ("annotations: {ambient.istio.io/redirection: enabled}", ProxyClass.AMBIENT),
    "proxyless gRPC": ("annotations: {inject.istio.io/templates: grpc-agent}", ProxyClass.PROXYLESS),
    "nothing": ("labels: {}", ProxyClass.NONE),
}


@pytest.mark.parametrize(("metadata", "proxy"), PROXIES.values(), ids=PROXIES.keys())
def test_what_proxy_a_pod_has(metadata: str, proxy: ProxyClass) -> None:
    text = f"""
apiVersion: v1
kind: Pod
metadata: {{name: a, namespace: b, {metadata}}}
spec: {{containers: [{{name: c}}]}}
"""
    assert workload(text).proxy is proxy


def test_the_objects_around_pods() -> None:
    text = """
apiVersion: v1
kind: Namespace
metadata: {name: shop, labels: {team: a}}
---
apiVersion: v1
kind: Node
metadata: {name: one}
status: {addresses: [{type: InternalIP, address: 192.168.0.1}, {type: Hostname, address: one}]}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: robot, namespace: shop}
---
apiVersion: v1
kind: Service
metadata: {name: api, namespace: shop}
spec:
  clusterIP: 10.96.0.1
  clusterIPs: [10.96.0.1, "fd00:96::1"]
  selector: {app: api}
  ports: [{name: http-web, port: 80, targetPort: http, appProtocol: http}, {port: 53, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: headless, namespace: shop}
spec: {clusterIP: None, ports: [{port: 80}]}
"""
    assert [found for document in documents(text) for found in parse(document).objects] == [
        Namespace("shop", {"team": "a"}),
        Node("one", (ip_address("192.168.0.1"),)),
        ServiceAccount("shop", "robot"),
        Service(
            "shop", "api", (ip_address("10.96.0.1"), ip_address("fd00:96::1")),
            (ServicePort("http-web", 80, "http", "TCP", "http"), ServicePort("", 53, 53, "UDP")), {"app": "api"},
        ),
        Service("shop", "headless", (), (ServicePort("", 80, 80),), None, headless=True),
    ]  # fmt: skip
