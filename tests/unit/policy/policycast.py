"""A small cluster that policy tests judge flows in, and the shortest way from YAML to a verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from ipaddress import ip_address

from meshbridge.identity.model import ContainerPort, Entity, IpAddress, IpFamily, Peer, ProxyClass, Workload
from meshbridge.identity.numbering import Numbering, number_peers
from meshbridge.kube.objects import read_objects
from meshbridge.policy.capture import Capture
from meshbridge.policy.compile import compile_endpoint
from meshbridge.policy.evaluate import Decision, evaluate
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Direction, Document, EndpointPolicy, Verdict
from meshbridge.policy.policyset import PolicySet

NAMESPACES = {"shop": {"team": "a"}, "pay": {"team": "b"}, "ops": {}}


def pod(key: str, address: str, labels: Mapping[str, str], **more: object) -> Workload:
    namespace, _, name = key.partition("/")
    made = Workload(
        namespace, name, uid=key, node="one", addresses=(ip_address(address),), labels=dict(labels),
        namespace_labels=NAMESPACES[namespace], proxy=ProxyClass.SIDECAR,
    )  # fmt: skip
    return replace(made, **more)  # type: ignore[arg-type]


WEB = pod("shop/web", "10.1.0.1", {"app": "web", "version": "v1"})
API = pod("shop/api", "10.1.0.2", {"app": "api"}, ports=(ContainerPort("http", 8080), ContainerPort("dns", 53, "UDP")))
LEDGER = pod("pay/ledger", "10.2.0.1", {"app": "ledger", "role": "api"}, ports=(ContainerPort("http", 80),))
AGENT = pod("ops/agent", "10.3.0.1", {"app": "agent"}, service_account="robot")
WEB6 = pod("shop/web6", "fd00:1::1", {"app": "web", "version": "v1"})
PODS = (WEB, API, LEDGER, AGENT, WEB6)

OTHERS: dict[str, Peer] = {
    "192.168.0.1": Peer(labels={"zone": "a"}, entities=frozenset({Entity.HOST})),
    "192.168.0.2": Peer(entities=frozenset({Entity.REMOTE_NODE})),
    "203.0.113.7": Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4})),
    "10.9.9.9": Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4})),
    "2001:db8::7": Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV6})),
    "10.1.0.9": Peer(entities=frozenset({Entity.UNMANAGED})),
}
NODE, REMOTE, WORLD, PRIVATE, WORLD6, CONTESTED = OTHERS

ICMP_ECHO = ("ICMP", 8)
PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}


def documents(text: str) -> list[Document]:
    """The objects of a YAML text, with lines, as if read from ``policy.yaml``."""
    content = read_objects(text.encode(), "policy.yaml")
    assert not content.problems, content.problems
    return list(content.documents)


def policies(text: str, mesh: MeshSettings = DEFAULT_MESH) -> PolicySet:
    return PolicySet.of(documents(text), mesh)


def numbered(policy_set: PolicySet) -> Numbering:
    """Everybody of the cast, numbered against the CIDRs and port names of the policies."""
    names = policy_set.referenced_port_names()
    trim = policy_set.referenced_labels().trim_node
    holders: dict[IpAddress, Peer] = {ip_address(a): replace(o, labels=trim(o.labels)) for a, o in OTHERS.items()}
    for workload in PODS:
        ports = frozenset(port for port in workload.ports if port.name in names)
        holders[workload.addresses[0]] = replace(workload.peer(), ports=ports)
    return number_peers(holders, policy_set.referenced_networks())


def compiled(policy_set: PolicySet, workload: Workload, capture: Capture | None = None) -> EndpointPolicy:
    identities = numbered(policy_set).identities
    return compile_endpoint(workload, policy_set, identities, capture or Capture.none())


def decide(
    policy_set: PolicySet,
    source: Workload | str,
    destination: Workload | str,
    port: tuple[str, int],
    *,
    at: Direction = Direction.INGRESS,
    capture: Capture | None = None,
) -> Decision:
    """The decision on a new flow at one of its ends."""
    ends = [end if isinstance(end, str) else str(end.addresses[0]) for end in (source, destination)]
    endpoint = destination if at is Direction.INGRESS else source
    assert isinstance(endpoint, Workload)
    peer = ip_address(ends[0] if at is Direction.INGRESS else ends[1])
    numbering = numbered(policy_set)
    policy = compile_endpoint(endpoint, policy_set, numbering.identities, capture or Capture.none())
    identity = numbering.addresses[peer].identity
    return evaluate(
        policy.map(at, IpFamily.of(peer)), identity, PROTOCOLS[port[0]], port[1],
        localhost=at is Direction.INGRESS and identity == 1,
    )  # fmt: skip


def allowed(
    policy_set: PolicySet,
    source: Workload | str,
    destination: Workload | str,
    port: tuple[str, int] = ("TCP", 8080),
    *,
    at: Direction = Direction.INGRESS,
) -> bool:
    return decide(policy_set, source, destination, port, at=at).verdict is not Verdict.DENY
