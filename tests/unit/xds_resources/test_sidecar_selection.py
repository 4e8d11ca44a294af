"""From the cluster's objects to one sidecar's inputs, and to the addresses that take mTLS."""

from __future__ import annotations

import dataclasses
from ipaddress import ip_address
from typing import Any

import pytest
import yaml

from meshbridge.identity.model import ContainerPort, ProxyClass, Workload
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.mesh import MeshSettings, MtlsMode, PathNormalization
from meshbridge.policy.model import Document
from meshbridge.policy.parse.cluster import Service, ServicePort
from meshbridge.policy.policyset import PolicySet
from meshbridge.xds.select import build_sidecar, mtls_destinations
from meshbridge.xds.sidecar import MtlsDestination


def pod(name: str, address: str, proxy: ProxyClass = ProxyClass.SIDECAR, **changes: Any) -> Workload:
    return Workload(
        "finance", name, f"uid-{name}", "node-a", (ip_address(address),), labels={"app": name}, proxy=proxy, **changes
    )


def service(app: str, *ports: ServicePort, address: str = "10.96.0.1") -> Service:
    return Service("finance", app, (ip_address(address),), ports, {"app": app})


def policies(text: str = "") -> PolicySet:
    documents = [
        Document(d["kind"], d["apiVersion"], d["metadata"]["namespace"], d["metadata"]["name"], d)
        for d in yaml.safe_load_all(text)
        if d
    ]
    found = PolicySet.of(documents)
    assert not found.refusals
    return found


def peer_authentication(mode: str, ports: str = "{}", selector: str = "{matchLabels: {app: server}}") -> str:
    return f"""
apiVersion: security.istio.io/v1
kind: PeerAuthentication
metadata: {{name: modes, namespace: finance}}
spec: {{selector: {selector}, mtls: {{mode: {mode}}}, portLevelMtls: {ports}}}
"""


SERVER = pod("server", "10.0.0.1", ports=(ContainerPort("web", 8080),))

PROTOCOLS = {
    "appProtocol": (ServicePort("x", 80, 8080, app_protocol="http"), AppProtocol.HTTP),
    "appProtocol beats the name": (ServicePort("http-x", 80, 8080, app_protocol="tcp"), AppProtocol.TCP),
    "h2c of Kubernetes": (ServicePort("", 80, 8080, app_protocol="kubernetes.io/h2c"), AppProtocol.HTTP),
    "a port name": (ServicePort("http", 80, 8080), AppProtocol.HTTP),
    "a port name with a suffix": (ServicePort("grpc-api", 80, 8080), AppProtocol.HTTP),
    "grpc-web": (ServicePort("grpc-web-x", 80, 8080), AppProtocol.HTTP),
    "upper case": (ServicePort("HTTP2-x", 80, 8080), AppProtocol.HTTP),
    "HTTPS is opaque": (ServicePort("https", 80, 8080), AppProtocol.TCP),
    "mysql": (ServicePort("mysql", 80, 8080), AppProtocol.TCP),
    "no name": (ServicePort("", 80, 8080), None),
    "a name that says nothing": (ServicePort("web", 80, 8080), None),
    "a name that only begins like one": (ServicePort("httpx", 80, 8080), None),
    "UDP": (ServicePort("http", 80, 8080, protocol="UDP"), None),
    "a container port's name": (ServicePort("http", 80, "web"), AppProtocol.HTTP),
}


@pytest.mark.parametrize(("port", "expected"), PROTOCOLS.values(), ids=PROTOCOLS.keys())
def test_protocol_of_a_pod_port(port: ServicePort, expected: AppProtocol | None) -> None:
    sidecar = build_sidecar(SERVER, policies(), [service("server", port)], ())
    assert sidecar.protocols == ({8080: expected} if expected else {})
    assert sidecar.server_first_ports == (frozenset({8080}) if port.name == "mysql" else frozenset())


def test_services_that_disagree_leave_the_port_to_be_sniffed() -> None:
    http, tcp = ServicePort("http", 80, 8080), ServicePort("tcp", 81, 8080)
    for ports in ((http, tcp), (tcp, http)):
        assert build_sidecar(SERVER, policies(), [service("server", *ports)], ()).protocols == {}


def test_services_of_others_do_not_count() -> None:
    port = ServicePort("http", 80, 8080)
    others = [
        service("client", port),
        dataclasses.replace(service("server", port), namespace="other"),
        dataclasses.replace(service("server", port), selector=None),
        dataclasses.replace(service("server", port), selector={}),
    ]
    assert build_sidecar(SERVER, policies(), others, ()).protocols == {}


def test_port_modes_and_trust_domains_reach_the_sidecar() -> None:
    sidecar = build_sidecar(SERVER, policies(peer_authentication("STRICT", "{9000: {mode: DISABLE}}")), [], ())
    assert sidecar.mtls.mode is MtlsMode.STRICT
    assert sidecar.mtls.at(9000)[0] is MtlsMode.DISABLE
    assert sidecar.trust_domains == ("cluster.local",)


RESTRICTING = {
    "no policy": ("", False),
    "an ALLOW policy": ("spec: {action: ALLOW}", True),
    "a DENY policy": ("spec: {action: DENY, rules: [{}]}", True),
    "an AUDIT policy": ("spec: {action: AUDIT, rules: [{}]}", False),
    "a policy of another workload": ("spec: {selector: {matchLabels: {app: x}}}", False),
}


def test_the_meshs_path_normalization_reaches_the_sidecar() -> None:
    mesh = MeshSettings(path_normalization=PathNormalization.MERGE_SLASHES)
    sidecar = build_sidecar(SERVER, PolicySet.of([], mesh), [], ())
    assert sidecar.path_normalization is PathNormalization.MERGE_SLASHES


@pytest.mark.parametrize(("spec", "restricted"), RESTRICTING.values(), ids=RESTRICTING.keys())
def test_a_server_may_speak_first_only_where_nothing_can_refuse(spec: str, restricted: bool) -> None:
    head = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: a, namespace: finance}\n"
    assert build_sidecar(SERVER, policies(head + spec if spec else ""), [], ()).restricted is restricted


NOT_TAKING = {
    "no sidecar": pod("x", "10.0.0.2", ProxyClass.NONE),
    "ambient": pod("x", "10.0.0.2", ProxyClass.AMBIENT),
    "host network": pod("x", "10.0.0.2", host_network=True),
    "finished": pod("x", "10.0.0.2", phase="Failed"),
    "no address yet": dataclasses.replace(SERVER, addresses=()),
}


@pytest.mark.parametrize("workload", NOT_TAKING.values(), ids=NOT_TAKING.keys())
def test_who_takes_no_mtls(workload: Workload) -> None:
    assert mtls_destinations([workload], [], policies()) == ()


def test_pod_with_a_sidecar_takes_mtls_but_on_its_own_ports() -> None:
    [entry] = mtls_destinations([SERVER], [], policies())
    assert entry == MtlsDestination(ip_address("10.0.0.1"))
    assert entry.accepts_mtls(8080)
    assert not entry.accepts_mtls(15020)


def test_disabled_modes_are_exceptions() -> None:
    [entry] = mtls_destinations([SERVER], [], policies(peer_authentication("PERMISSIVE", "{9000: {mode: DISABLE}}")))
    assert (entry.accepts_mtls(8080), entry.accepts_mtls(9000)) == (True, False)
    [entry] = mtls_destinations([SERVER], [], policies(peer_authentication("DISABLE", "{9000: {mode: STRICT}}")))
    assert (entry.accepts_mtls(8080), entry.accepts_mtls(9000)) == (False, True)


def test_service_takes_mtls_when_every_endpoint_does() -> None:
    web = service("server", ServicePort("http", 80, "web"), ServicePort("tcp", 81, 9000))
    second = dataclasses.replace(SERVER, uid="uid-2", addresses=(ip_address("10.0.0.2"),))
    entries = mtls_destinations([SERVER, second], [web], policies())
    assert MtlsDestination(ip_address("10.96.0.1"), mtls=False, except_ports=frozenset({80, 81})) in entries
    bare = dataclasses.replace(second, proxy=ProxyClass.NONE)
    assert [entry.address for entry in mtls_destinations([SERVER, bare], [web], policies())] == [ip_address("10.0.0.1")]


def test_service_without_endpoints_takes_none() -> None:
    assert mtls_destinations([], [service("server", ServicePort("http", 80, 8080))], policies()) == ()


def test_order_of_objects_never_matters() -> None:
    pods = [SERVER, pod("a", "10.0.0.9"), dataclasses.replace(SERVER, uid="6", addresses=(ip_address("fd00::1"),))]
    services = [
        service("server", ServicePort("http", 80, 8080)),
        service("a", ServicePort("", 1, 1), address="10.96.0.2"),
    ]
    found = mtls_destinations(pods, services, policies())
    assert found == mtls_destinations(reversed(pods), reversed(services), policies())
