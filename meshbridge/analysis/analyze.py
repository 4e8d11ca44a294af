"""All findings about some documents: every analyzer, one after the other, over one scene."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from meshbridge.analysis import (
    addresses,
    authorization,
    bypasses,
    isolation,
    meshrules,
    mtls,
    networkrules,
    objects,
    selection,
)
from meshbridge.analysis.finding import Finding, in_order
from meshbridge.analysis.scene import Scene
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document


@dataclass(frozen=True, slots=True)
class Analyzer:
    """One question asked of a scene."""

    description: str
    findings: Callable[[Scene], Iterator[Finding]]


ANALYZERS: Final[Mapping[str, Analyzer]] = {
    "object.Refused": Analyzer("Objects that are not understood", objects.refusals),
    "object.Duplicate": Analyzer("Objects that are defined twice", objects.duplicates),
    "object.Notices": Analyzer("What was noticed while objects were read", objects.notices),
    "selection.Policies": Analyzer("Policies that select no pod", selection.selecting_nothing),
    "selection.Peers": Analyzer("Rules whose peers are nobody", selection.peers_that_are_nobody),
    "selection.Namespaces": Analyzer("Namespaces that do not exist", selection.absent_namespaces),
    "selection.PortNames": Analyzer("Named ports that no pod has", selection.absent_port_names),
    "selection.Hashes": Analyzer("Selectors that the next rollout changes", selection.hashes),
    "rules.NeverMatching": Analyzer("Rules of network policies that name nobody", networkrules.never_matching),
    "rules.WithoutInfluence": Analyzer("Allow rules that decide no flow", networkrules.without_influence),
    "rules.Addresses": Analyzer("CIDRs that cover pods and do not match them", addresses.missing_pods),
    "rules.ServiceAddresses": Analyzer("CIDRs with the address of a Service", addresses.of_services),
    "isolation.DefaultDeny": Analyzer("Ports that default deny closes", isolation.default_deny),
    "isolation.DenyOnly": Analyzer("Deny rules that isolate by themselves", isolation.denying_isolates),
    "isolation.Istiod": Analyzer("Sidecars cut off from istiod", isolation.without_istiod),
    "isolation.Dns": Analyzer("Pods cut off from DNS", isolation.without_dns),
    "isolation.Tunnel": Analyzer("Ambient ports that are open without their tunnel", isolation.tunnels),
    "isolation.Probes": Analyzer("Probes of kubelet that are dropped", isolation.probes),
    "isolation.Scrapes": Analyzer("Merged metrics that Prometheus cannot reach", isolation.scrapes),
    "authorization.HttpOnTcp": Analyzer("HTTP fields on TCP ports", authorization.http_fields_on_tcp),
    "authorization.Providers": Analyzer("CUSTOM policies that nobody answers", authorization.providers),
    "authorization.Ztunnel": Analyzer("Rules that ztunnel leaves out", authorization.left_out_by_ztunnel),
    "authorization.TrustDomains": Analyzer("Trust domains of nobody", authorization.foreign_trust_domains),
    "authorization.Identity": Analyzer("Rules by identity and plaintext", authorization.identity_over_plaintext),
    "authorization.Claims": Analyzer("Claims that nobody verifies", authorization.claims_without_authentication),
    "authorization.Targets": Analyzer("Policies attached to nothing", authorization.absent_targets),
    "authorization.NeverMatching": Analyzer("Rules whose conditions exclude each other", meshrules.never_matching),
    "authorization.Pointless": Analyzer("Rules that others cover", meshrules.made_pointless),
    "mtls.Scopes": Analyzer("PeerAuthentications beside an older one", mtls.several_of_one_scope),
    "mtls.RootSelector": Analyzer("Selectors in the root namespace", mtls.ignored_in_root),
    "mtls.Ports": Analyzer("Port-level modes for ports nobody listens on", mtls.absent_ports),
    "mtls.Excluded": Analyzer("STRICT ports that are excluded", mtls.strict_on_excluded),
    "mtls.DestinationRules": Analyzer("TLS switched off where it is demanded", mtls.disabled_against_strict),
    "bypass.Settings": Analyzer("Redirection settings that mislead", bypasses.settings),
    "bypass.Guarantees": Analyzer("What excluded ports lose", bypasses.lost_guarantees),
    "bypass.Halves": Analyzer("Connections of which one side is excluded", bypasses.halves),
}


def analyze(
    documents: Iterable[Document], mesh: MeshSettings = DEFAULT_MESH, now: datetime | None = None
) -> tuple[Finding, ...]:
    """Every finding, the worst first; the order of the documents does not matter.

    Args:
        now: When it is, for what BypassPolicies accept until some time; without it they are not read.
    """
    scene = Scene(documents, mesh, now)
    return in_order(found for analyzer in ANALYZERS.values() for found in analyzer.findings(scene))
