"""The cluster itself: what later tests take for granted is so."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from pathlib import Path

import pytest
import topology
from cluster import Cluster
from kubectl import Kubectl, Object
from tokens import Issuer
from workloads import NO_ANSWER, address_of, ask, namespace, pod, service, service_account, wait_for_code

INPUTS = Path(__file__).parent.parent.parent / "manifests/inputs"
SERVER, CLIENT = "server", "client"
NODE_1, NODE_2 = (each.name for each in topology.NODES)


def test_pods_of_both_nodes_reach_each_other_by_address_and_by_name(
    kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    ns = make_namespace()
    kubectl.apply(
        service(SERVER, ns, {"http": 8080}), pod(SERVER, ns, ports=[8080], node=NODE_2),
        *(pod(f"on-{each.name}", ns, node=each.name) for each in topology.NODES),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=60s", timeout_s=70)

    server = address_of(kubectl, SERVER, ns)
    assert ipaddress.ip_address(server) in ipaddress.ip_network(topology.node(NODE_2).pods)
    for node in topology.NODES:
        client = f"on-{node.name}"
        address = address_of(kubectl, client, ns)
        assert ipaddress.ip_address(address) in ipaddress.ip_network(node.pods)
        wait_for_code(kubectl, ns, f"http://{SERVER}:8080/", "200", client)
        for host in (server, f"{SERVER}.{ns}", f"{SERVER}.{ns}.svc.cluster.local"):
            answer = ask(kubectl, client, ns, f"http://{host}:8080/x")
            assert (answer.code, answer.seen["pod"], answer.seen["from"]) == ("200", SERVER, address), answer


def test_nothing_of_the_cluster_is_in_the_machines_own_network(cluster: Cluster) -> None:
    with open("/proc/net/fib_trie") as table:
        assert topology.API_SERVER not in table.read()
    for host in cluster.hosts:
        assert topology.API_SERVER in (host.root / "proc/1/net/fib_trie").read_text() or host.name != "control-plane"


def in_the_mesh(kubectl: Kubectl, ns: str, annotations: dict[str, str] | None = None) -> None:
    """A server on node 2 and a client on node 1, each with a sidecar."""
    kubectl.apply(
        service_account(SERVER, ns), service_account(CLIENT, ns),
        service(SERVER, ns, {"http": 8080, "http-metrics": 9090}),
        pod(SERVER, ns, ports=[8080, 9090], node=NODE_2, service_account=SERVER, annotations=annotations),
        pod(CLIENT, ns, node=NODE_1, service_account=CLIENT),
    )  # fmt: skip
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)


def containers(each: Object) -> set[str]:
    """With native sidecars istio-proxy is an init container that goes on."""
    spec = each["spec"]
    return {c["name"] for kind in ("containers", "initContainers") for c in spec.get(kind, [])}


def test_the_real_webhook_injects_and_mutual_tls_works(kubectl: Kubectl, make_namespace: Callable[..., str]) -> None:
    ns, outside = make_namespace("mesh", injected=True), make_namespace("outside")
    in_the_mesh(kubectl, ns)
    kubectl.apply(pod(CLIENT, outside))
    kubectl.wait_for_pods(outside, f"app={CLIENT}")
    for each in kubectl.items("pods", ns):
        assert {"istio-proxy", "istio-init"} <= containers(each)
    url = f"http://{SERVER}.{ns}:8080/"
    wait_for_code(kubectl, outside, url, "200")

    kubectl.apply({
        "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
        "metadata": {"name": "strict", "namespace": ns}, "spec": {"mtls": {"mode": "STRICT"}},
    })  # fmt: skip
    wait_for_code(kubectl, outside, url, NO_ANSWER)
    answer = ask(kubectl, CLIENT, ns, url)
    assert answer.code == "200"
    assert f"URI=spiffe://cluster.local/ns/{ns}/sa/{CLIENT}" in answer.seen["headers"]["x-forwarded-client-cert"]


def test_istio_judges_by_claims_with_the_users_own_policy(kubectl: Kubectl) -> None:
    """istio-l7-policy.yaml as it is, in the namespace it names.

    It is there before the pods: a sidecar's open connections keep the filters they began with until they have drained.
    """
    kubectl.apply(namespace("finance", injected=True))
    issuer = Issuer.create()
    name = "transaction-service"
    try:
        kubectl.apply(INPUTS / "istio-l7-policy.yaml")
        kubectl.apply(
            service(name, "finance", {"http": 8080}), pod(name, "finance", ports=[8080], node=NODE_2),
            pod(CLIENT, "finance", node=NODE_1),
            {
                "apiVersion": "security.istio.io/v1", "kind": "RequestAuthentication",
                "metadata": {"name": "issuer", "namespace": "finance"},
                "spec": {"jwtRules": [{"issuer": issuer.name, "jwks": issuer.jwks}]},
            },
        )  # fmt: skip
        kubectl("wait", "pod", "--all", "-n", "finance", "--for=condition=Ready", "--timeout=120s", timeout_s=130)
        url = f"http://{name}:8080/api/v1/process"
        good, other = (
            {"authorization": f"Bearer {issuer.token(scope=scope)}"} for scope in ("transactions", "reports")
        )
        wait_for_code(kubectl, "finance", url, "200", method="POST", headers=good)
        assert ask(kubectl, CLIENT, "finance", url, method="POST", headers=other).code == "403"
        assert ask(kubectl, CLIENT, "finance", url, method="POST").code == "403"
        assert ask(kubectl, CLIENT, "finance", url, headers=good).code == "403"
    finally:
        kubectl.delete("namespace", "finance")


def test_an_excluded_inbound_port_is_broken_through_its_service_and_open_by_address(
    kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    """istio/istio#30311: the client's sidecar speaks mTLS to a port that the server's sidecar does not serve."""
    ns = make_namespace("half", injected=True)
    in_the_mesh(kubectl, ns, {"traffic.sidecar.istio.io/excludeInboundPorts": "9090"})
    wait_for_code(kubectl, ns, f"http://{SERVER}:9090/", "503")
    assert ask(kubectl, CLIENT, ns, f"http://{address_of(kubectl, SERVER, ns)}:9090/").code == "200"
    assert ask(kubectl, CLIENT, ns, f"http://{SERVER}:8080/").code == "200"


@pytest.mark.parametrize("node", [NODE_1, NODE_2])
def test_a_rebooted_node_comes_back_with_its_pods(
    cluster: Cluster, kubectl: Kubectl, make_namespace: Callable[..., str], node: str
) -> None:
    ns = make_namespace()
    kubectl.apply(service(SERVER, ns, {"http": 8080}), pod(SERVER, ns, ports=[8080], node=node), pod(CLIENT, ns))
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=60s", timeout_s=70)
    wait_for_code(kubectl, ns, f"http://{SERVER}:8080/", "200")
    before = cluster.nodes[node].pid
    cluster.reboot(node)
    assert cluster.nodes[node].pid != before
    kubectl("wait", "pod", "--all", "-n", ns, "--for=condition=Ready", "--timeout=120s", timeout_s=130)
    wait_for_code(kubectl, ns, f"http://{SERVER}:8080/", "200")


def test_pods_live_on_without_the_api_server(
    cluster: Cluster, kubectl: Kubectl, make_namespace: Callable[..., str]
) -> None:
    ns = make_namespace()
    kubectl.apply(service(SERVER, ns, {"http": 8080}), pod(SERVER, ns, ports=[8080], node=NODE_2))
    kubectl.wait_for_pods(ns, f"app={SERVER}")
    address = address_of(kubectl, SERVER, ns)
    with cluster.without(cluster.control_plane, "kube-apiserver"):
        assert kubectl.done("get", "nodes", "--request-timeout=5s", check=False).returncode != 0
        assert f'"pod": "{SERVER}"' in cluster.nodes[NODE_1].run("curl", "-fsS", f"http://{address}:8080/").stdout
    assert kubectl.items("nodes")
