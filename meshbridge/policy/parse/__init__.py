"""Kubernetes objects into the typed model, one module per kind; what is not understood is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from meshbridge.policy.cilium import CNI_KINDS, CONFIG_NAME, CONFIG_NAMESPACE
from meshbridge.policy.model import Document, Notice, Severity
from meshbridge.policy.parse.authorizationpolicy import parse_authorization_policy
from meshbridge.policy.parse.ciliumcidrgroup import parse_cilium_cidr_group
from meshbridge.policy.parse.ciliumconfig import parse_cilium_config
from meshbridge.policy.parse.ciliumnetworkpolicy import CLUSTERWIDE, parse_cilium_network_policy
from meshbridge.policy.parse.cluster import Namespace, Node, Service, ServiceAccount, ServicePort
from meshbridge.policy.parse.clusternetworkpolicy import CLUSTER_POLICY_KINDS, parse_cluster_network_policy
from meshbridge.policy.parse.networkpolicy import parse_network_policy
from meshbridge.policy.parse.parsed import Parsed, refused_by_source, refused_unread
from meshbridge.policy.parse.peerauthentication import parse_peer_authentication
from meshbridge.policy.parse.reader import Invalid
from meshbridge.policy.parse.registry import REGISTRY_KINDS, parse_registry_object
from meshbridge.policy.parse.requestauthentication import parse_request_authentication
from meshbridge.policy.parse.workloads import TEMPLATE_KINDS, parse_cluster_object

POLICY_KINDS: Final[Mapping[tuple[str, str], Callable[[Document], Parsed]]] = {
    ("cilium.io", "CiliumNetworkPolicy"): parse_cilium_network_policy,
    ("cilium.io", CLUSTERWIDE): parse_cilium_network_policy,
    ("cilium.io", "CiliumCIDRGroup"): parse_cilium_cidr_group,
    ("networking.k8s.io", "NetworkPolicy"): parse_network_policy,
    **{("policy.networking.k8s.io", kind): parse_cluster_network_policy for kind in CLUSTER_POLICY_KINDS},
    ("security.istio.io", "AuthorizationPolicy"): parse_authorization_policy,
    ("security.istio.io", "PeerAuthentication"): parse_peer_authentication,
    ("security.istio.io", "RequestAuthentication"): parse_request_authentication,
}
"""API group and kind of every policy that is read; all versions of a group are read alike."""

CLUSTER_KINDS: Final = frozenset(
    {("", kind) for kind in ("Pod", "Namespace", "Node", "Service", "ServiceAccount")}
    | {("discovery.k8s.io", "EndpointSlice")}
    | {("batch" if kind == "Job" else "apps", kind) for kind in TEMPLATE_KINDS}
)

CILIUM_CONFIG: Final = ("", "ConfigMap", CONFIG_NAMESPACE, CONFIG_NAME)
"""``Document.key`` of the one ConfigMap that says what Cilium's policies mean."""

_GUARDING_GROUPS = frozenset(group for group, _ in POLICY_KINDS)


def parse(document: Document) -> Parsed:
    """What one object says: policies, a workload, a refusal; never an exception for any content.

    An object of a kind that is not read yields a notice when its API group is one of policies, else nothing.
    """
    try:
        return _parse(document)
    except Exception as error:
        return refused_unread(document, Invalid.of(error))


def _parse(document: Document) -> Parsed:
    group = document.api_version.rpartition("/")[0]
    parser = POLICY_KINDS.get((group, document.kind))
    if parser is not None:
        parsed = parser(document)
        return refused_by_source(parsed) if document.fault else parsed
    if document.key == CILIUM_CONFIG:
        return parse_cilium_config(document)
    if (group, document.kind) in CLUSTER_KINDS:
        return parse_cluster_object(document)
    if (group, document.kind) in REGISTRY_KINDS:
        return parse_registry_object(document)
    if (group, document.kind) in CNI_KINDS:
        return Parsed(document)
    if group in _GUARDING_GROUPS:
        text = f"{document.api_version} {document.kind} is not read and has no effect here"
        return Parsed(document, notices=(Notice(document, text, severity=Severity.ERROR, code="MB0004"),))
    return Parsed(document)


__all__ = [
    "CILIUM_CONFIG", "CLUSTER_KINDS", "POLICY_KINDS", "Namespace", "Node", "Parsed", "Service", "ServiceAccount",
    "ServicePort", "parse",
]  # fmt: skip
