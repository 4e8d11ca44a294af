"""Every finding there is: its stable code, how much attention it wants, what it says, why that matters, what to do.

``docs/analysis`` has a page for each, made of this table and of the files under ``tests/unit/analysis/cases``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from meshbridge.policy.model import Severity

DOCUMENTATION: Final = "https://meshbridge.io/docs/analysis"
"""Where docs/analysis is published."""

_INFO, _WARNING, _ERROR = Severity.INFO, Severity.WARNING, Severity.ERROR


@dataclass(frozen=True, slots=True)
class Code:
    """One kind of finding. ``severity`` is the usual one: a finding may want less attention, and then says why."""

    code: str
    name: str
    severity: Severity
    summary: str
    why: str
    fix: str

    @property
    def url(self) -> str:
        return f"{DOCUMENTATION}/{self.code}"


_CODES: Final = (
    Code(
        "MB0001", "FileUnreadable", _ERROR,
        "A file is not YAML, or holds something that no API server would take.",
        "Nothing of the file is in force, and nothing of it was analysed: a deny rule in it does not deny.",
        "Correct the line that is named.",
    ),
    Code(
        "MB0002", "DuplicateObject", _ERROR,
        "An object is defined more than once.",
        "Which definition holds depends on who reads them: `kubectl apply` leaves the last, a directory of "
        "manifests refuses a policy that is defined twice in different words. Equal definitions are only told.",
        "Keep one definition.",
    ),
    Code(
        "MB0003", "ObjectRefused", _ERROR,
        "An object is not understood, so it is not in force as it was written.",
        "A refused network policy isolates the pods it selects in the directions it names; a refused mesh policy "
        "leaves captured ports to Envoy and closes excluded ones. What it was meant to allow stops working.",
        "Correct the field that is named.",
    ),
    Code(
        "MB0004", "KindNotRead", _INFO,
        "An object is of a kind that has no meaning to MeshBridge.",
        "It is passed over. Nothing is wrong unless you count on it.",
        "Nothing, unless you count on it.",
    ),
    Code(
        "MB0005", "MeshConfigUnreadable", _ERROR,
        "The MeshConfig in ConfigMap `istio` cannot be read.",
        "Root namespace, trust domain and its aliases are taken as Istio's defaults, so policies may select other "
        "pods and match other names than in the cluster.",
        "Correct the setting that is named.",
    ),
    Code(
        "MB0101", "UnknownWhenKey", _ERROR,
        "A rule of an AuthorizationPolicy has a `when` key that Istio does not know.",
        "Istio's webhook refuses it; where the webhook is off, Istio skips the whole rule whatever its action: a "
        "DENY silently disappears.",
        "Use a key that Istio knows.",
    ),
    Code(
        "MB0102", "HttpDenyOnTcp", _ERROR,
        "A DENY rule with HTTP fields applies to a TCP port, where it denies more than it says.",
        "On a port that is not HTTP Istio drops the HTTP fields of a DENY rule and keeps the rest, so the rule gets "
        "wider; one with HTTP fields only denies every connection. On a port whose protocol is sniffed this holds "
        "for whatever turns out not to be HTTP, which is only told.",
        "Limit the rule to HTTP ports with `to.operation.ports`, or declare the port's protocol in its Service.",
    ),
    Code(
        "MB0103", "HttpAllowOnTcp", _WARNING,
        "An ALLOW rule with HTTP fields applies to a TCP port, where it never matches.",
        "On a port that is not HTTP Istio drops an ALLOW rule that has an HTTP field. The policy still switches "
        "default deny on, so the port is closed unless another rule allows it.",
        "Declare the port as HTTP in its Service (`appProtocol: http` or a name like `http-api`), or add a rule "
        "without HTTP fields for it.",
    ),
    Code(
        "MB0104", "HttpProviderOnTcp", _ERROR,
        "A CUSTOM policy whose provider speaks HTTP applies to a TCP port, where it is not asked.",
        "`envoyExtAuthzHttp` has no form for TCP, so Istio adds no filter and the check is silently skipped.",
        "Use an `envoyExtAuthzGrpc` provider, or limit the policy to HTTP ports.",
    ),
    Code(
        "MB0105", "SeveralProviders", _ERROR,
        "A workload has CUSTOM policies of more than one provider.",
        "Istio turns every CUSTOM rule of such a workload into a plain DENY: what should be asked about is refused.",
        "Use one provider for a workload. Where one of them is MeshBridge, delete its CUSTOM policy and have it asked "
        "by a filter of its own: `meshbridge ext-authz envoyfilter` ([ext-authz](../ext-authz.md)).",
    ),
    Code(
        "MB0106", "UnknownProvider", _ERROR,
        "A CUSTOM policy names a provider that MeshConfig does not define.",
        "Istio turns its rules into a plain DENY: every request they match is refused.",
        "Define it under `extensionProviders` in MeshConfig, or correct the name.",
    ),
    Code(
        "MB0107", "ForeignTrustDomain", _WARNING,
        "A principal is of a trust domain that is neither the mesh's own nor one of its aliases.",
        "No workload of this mesh has such a name. An ALLOW rule matches nobody, a DENY rule denies nobody. It is "
        "right only where another mesh's root certificate is trusted here.",
        "Use the mesh's trust domain or `cluster.local`, or add the domain to `trustDomainAliases`.",
    ),
    Code(
        "MB0108", "IdentityNeverPresented", _ERROR,
        "A rule asks for the caller's identity on a port where mutual TLS is off.",
        "Under DISABLE nobody presents a certificate: an ALLOW rule never matches, a DENY rule never fires.",
        "Make the port STRICT or PERMISSIVE, or write the rule without identity.",
    ),
    Code(
        "MB0109", "IdentityNotRequired", _WARNING,
        "A rule that is meant to keep some callers out lets them in over plaintext.",
        "Under PERMISSIVE a caller that presents no certificate has no identity: a DENY by principal or namespace "
        "does not match it, and an ALLOW of everybody but some does.",
        'Make the workload STRICT, or deny who has no principal: `notPrincipals: ["*"]`.',
    ),
    Code(
        "MB0110", "ClaimsWithoutAuthentication", _ERROR,
        "A rule asks for a token's claims, and no RequestAuthentication selects the workload.",
        "Istio verifies no token there, so no request has claims: an ALLOW rule never matches, a DENY rule by "
        "positive claims never fires.",
        "Add a RequestAuthentication for the workload.",
    ),
    Code(
        "MB0111", "SelectorAndTargetRefs", _ERROR,
        "A policy has both a selector and targetRefs.",
        "Istio's webhook refuses it, and each of the two would mean another workload.",
        "Keep one of them.",
    ),
    Code(
        "MB0112", "TargetNotFound", _WARNING,
        "A policy is attached to something that does not exist.",
        "It has no effect: targetRefs name objects of the policy's own namespace.",
        "Correct kind and name, or create the target.",
    ),
    Code(
        "MB0114", "KeysNotFound", _ERROR,
        "A RequestAuthentication says nowhere where the keys of an issuer are.",
        "No token of that issuer can be verified, so every request that carries one is refused.",
        "Write the key set under `jwks`, or its address under `jwksUri`.",
    ),
    Code(
        "MB0115", "DryRunDenies", _ERROR,
        "A CUSTOM policy is marked as a dry run, and denies.",
        "Istio has Envoy enforce the rules of a CUSTOM policy in dry-run as a plain DENY: what was to be tried out "
        "refuses requests.",
        "Remove the annotation `istio.io/dry-run`.",
    ),
    Code(
        "MB0116", "DryRunUnreadable", _ERROR,
        "The annotation `istio.io/dry-run` is neither true nor false.",
        "The policy is enforced, though somebody meant to try it out.",
        'Write `"true"`, or remove the annotation.',
    ),
    Code(
        "MB0117", "LeftOutByZtunnel", _ERROR,
        "A rule for ambient pods needs what only a waypoint sees.",
        "ztunnel judges connections. Istio leaves out an ALLOW rule with HTTP fields, sends a DENY rule without "
        "them as one that never matches, and asks no CUSTOM provider: what the rule was to deny passes.",
        "Attach the policy to a waypoint with targetRefs, or write the rule without HTTP fields.",
    ),
    Code(
        "MB0118", "AsksItself", _ERROR,
        "MeshBridge's own ext_authz server has a sidecar that asks it before it is asked.",
        "A CUSTOM policy of provider `meshbridge`, most often a mesh-wide one, selects the server's pod. Each check is "
        "then a request that has to be checked first, until the timeout: what the policy covers is refused everywhere.",
        "Give the server's pods no sidecar: label `sidecar.istio.io/inject: \"false\"`, as MeshBridge's own "
        "manifests do.",
    ),
    Code(
        "MB0119", "CannotAsk", _ERROR,
        "Pods have to ask MeshBridge's ext_authz server, and a Sidecar hides it from them.",
        "Their Envoys do not know the Service, so nobody answers: every request that the CUSTOM policy covers gets "
        "503, or with `failOpen: true` passes unjudged.",
        "List `meshbridge-system/*` among the Sidecar's egress hosts.",
    ),
    Code(
        "MB0201", "SeveralOfOneScope", _WARNING,
        "Two PeerAuthentications of one scope select the same workload.",
        "Only the oldest counts. Which that is cannot be seen in the files, and changes when one is created anew.",
        "Merge them into one.",
    ),
    Code(
        "MB0202", "NoSuchPort", _WARNING,
        "`portLevelMtls` names a port that no container of the selected pods declares.",
        "It goes by the pod's port, not by the Service's; an exception for a port nobody listens on has no effect, "
        "and the port it was meant for keeps the other mode.",
        "Name the container's port.",
    ),
    Code(
        "MB0203", "StrictOnExcludedPort", _WARNING,
        "STRICT mutual TLS is demanded of a port that is excluded from the sidecar.",
        "Envoy does not see the port, so nobody asks for a certificate there. MeshBridge lets in pods of the mesh "
        "only, by address, which is weaker and not encrypted.",
        "Remove the port from `excludeInboundPorts`, or say `portLevelMtls: DISABLE` for it so that clients know.",
    ),
    Code(
        "MB0204", "TlsDisabledAgainstStrict", _ERROR,
        "A DestinationRule switches TLS off towards a workload that demands it.",
        "Clients' sidecars send plaintext and the server's closes the connection: nothing gets through.",
        "Use `mode: ISTIO_MUTUAL`, or remove `tls` from the DestinationRule.",
    ),
    Code(
        "MB0205", "RootSelectorIgnored", _ERROR,
        "A PeerAuthentication in the root namespace has a selector.",
        "Istio ignores it: workloads are selected from their own namespace, and the mesh's default has no selector.",
        "Move it to the workload's namespace, or remove the selector.",
    ),
    Code(
        "MB0301", "PodsIsolated", _WARNING,
        "A policy switches default deny on, and ports of the pods it selects stop working.",
        "Whoever is not named by some rule is dropped. An allow rule for one port closes all others of the same "
        "pods; that is the common way to cut an application off while opening it for a scraper. Where every "
        "declared port stays open to somebody, or the policy allows nothing at all, it is only told.",
        "Add rules for the ports that are named, or select fewer pods.",
    ),
    Code(
        "MB0302", "DenyIsolates", _ERROR,
        "A policy with deny rules only switches default deny on.",
        "In Cilium a deny rule counts as a rule: as soon as one selects a pod, whatever nobody allows is dropped. "
        "The policy denies far more than it says.",
        "Set `enableDefaultDeny: {ingress: false}` (or egress), or add a rule that allows the rest.",
    ),
    Code(
        "MB0303", "CutOffFromIstiod", _ERROR,
        "Egress isolation keeps a sidecar from istiod.",
        "Without port 15012 the sidecar gets no certificate and no configuration: it never becomes ready, and a "
        "running one goes on with what it has until its certificate expires.",
        "Allow egress to istiod, TCP 15012.",
    ),
    Code(
        "MB0304", "CutOffFromDns", _WARNING,
        "Egress isolation keeps pods from DNS.",
        "Every name lookup times out, which looks like a slow or dead destination.",
        "Allow egress to kube-dns, UDP and TCP 53.",
    ),
    Code(
        "MB0305", "TunnelBlocked", _ERROR,
        "A network policy opens a port of an ambient pod, but not port 15008, which carries it.",
        "Between ambient pods everything travels as HBONE to port 15008: a rule for the application's port alone "
        "matches nothing, and the connection is dropped.",
        "Allow TCP 15008 for the same peers.",
    ),
    Code(
        "MB0306", "AmbientProbesBlocked", _ERROR,
        "Default deny keeps kubelet's probes from an ambient pod.",
        "Probes of ambient pods come from 169.254.7.127, not from the node's address, so the exception for the own "
        "node does not cover them: the pod is restarted.",
        "Allow ingress from 169.254.7.127/32.",
    ),
    Code(
        "MB0307", "ProbesDenied", _ERROR,
        "A deny rule refuses the pod's own node, and with it kubelet's probes.",
        "The own node is let in through default deny, but not past a deny rule: liveness probes fail and the pod is "
        "restarted.",
        "Leave `host` and the probes' ports out of the deny rule.",
    ),
    Code(
        "MB0308", "ScrapeBlocked", _WARNING,
        "Prometheus may not reach port 15020 of a pod that asks to be scraped.",
        "In a pod with a sidecar, metrics of application and proxy are merged and served on 15020; Istio rewrites "
        "`prometheus.io/port` to it.",
        "Allow TCP 15020 from Prometheus.",
    ),
    Code(
        "MB0401", "SelectsNothing", _WARNING,
        "A policy selects no pod.",
        "It has no effect; mostly a label is misspelt, or the policy stands in another namespace. Where the files "
        "hold no pod of that namespace at all it is only told.",
        "Correct the selector.",
    ),
    Code(
        "MB0402", "PeersSelectNothing", _WARNING,
        "A rule names peers that no pod is.",
        "It allows, or denies, nobody that is there. Where the files hold no pod of that namespace it is only told.",
        "Correct the selector.",
    ),
    Code(
        "MB0403", "NoSuchNamespace", _WARNING,
        "A rule or a policy names a namespace that does not exist.",
        "It concerns nobody. Where the files hold no Namespaces it is only told.",
        "Correct the name.",
    ),
    Code(
        "MB0404", "NoSuchPortName", _WARNING,
        "A rule names a port that none of the pods it concerns has.",
        "A named port is looked up in the destination pod, with its protocol; without one of that name the rule "
        "matches nothing.",
        "Use the container port's name, or its number.",
    ),
    Code(
        "MB0405", "ContradictorySelector", _ERROR,
        "A selector contradicts itself.",
        "No pod can ever satisfy it.",
        "Change one of the requirements that are named.",
    ),
    Code(
        "MB0406", "NamespaceIgnored", _WARNING,
        "The endpointSelector of a CiliumNetworkPolicy names a namespace.",
        "It is overwritten by the policy's own: the policy applies to pods of another namespace than it says.",
        "Move the policy to that namespace, or use a CiliumClusterwideNetworkPolicy.",
    ),
    Code(
        "MB0407", "LabelNotInIdentities", _WARNING,
        "A Cilium selector asks for a label that Cilium leaves out of identities.",
        "No endpoint ever has it, so the selector matches nothing (or, negated, everything).",
        "Use a label that describes the application.",
    ),
    Code(
        "MB0408", "HashInSelector", _WARNING,
        "A selector asks for a label that changes with every rollout.",
        "With the next version of the workload it selects nothing, without anybody having changed it.",
        "Use a label that describes the application.",
    ),
    Code(
        "MB0501", "RuleNeverMatches", _WARNING,
        "A rule can never match.",
        "Its conditions exclude each other, or it has an empty list of peers, which means nobody. An ALLOW rule "
        "allows nothing, a DENY rule denies nothing.",
        "Correct the condition that is named, or remove the rule.",
    ),
    Code(
        "MB0502", "RuleShadowed", _WARNING,
        "Everything an allow rule allows is denied by others.",
        "A deny beats every allow of its tier: the rule has no effect.",
        "Narrow the deny rule, or remove the allow rule.",
    ),
    Code(
        "MB0503", "RuleRedundant", _INFO,
        "Everything an allow rule allows is allowed by others too.",
        "Removing it changes no verdict. It is harmless, and misleads who reads it.",
        "Remove it, unless it is there for pods to come.",
    ),
    Code(
        "MB0504", "CidrMissesPods", _WARNING,
        "A CIDR in a Cilium policy covers addresses of pods, which it does not match.",
        "In Cilium a CIDR means what is outside of the cluster: pods and nodes in it are not matched. For the whole "
        "world (`0.0.0.0/0`) this is mostly meant, and only told.",
        "Select pods by label, in a rule of their own.",
    ),
    Code(
        "MB0505", "IpBlockOfService", _WARNING,
        "A CIDR names the address of a Service.",
        "Policies see a packet after the Service's address was replaced by a backend's: the rule never matches.",
        "Select the pods behind the Service by label.",
    ),
    Code(
        "MB0506", "NoEffect", _WARNING,
        "Something in a policy or a setting has no effect as it is written.",
        "Rules for a direction that `policyTypes` leaves out are ignored, what is about nodes selects no pod, and "
        "while Cilium's `enable-policy` is `never` no policy of any kind is enforced.",
        "Add the direction to policyTypes, or remove what has no effect.",
    ),
    Code(
        "MB0507", "EndPortIgnored", _WARNING,
        "A rule has an endPort beside a named port.",
        "A range starts at a number: the endPort has no effect here, and opens more than it says in Cilium itself.",
        "Write the port as a number, or remove endPort.",
    ),
    Code(
        "MB0508", "EqualPriority", _WARNING,
        "Two cluster network policies of one tier have the same priority.",
        "Where both match, which one decides is undefined and may change at any time.",
        "Give each its own priority.",
    ),
    Code(
        "MB0509", "RequiresRemoved", _ERROR,
        "A Cilium policy uses fromRequires or toRequires.",
        "Cilium 1.19 removed them: without them the policy is wider than it was. It is refused here.",
        "Repeat the requirement in every fromEndpoints or toEndpoints.",
    ),
    Code(
        "MB0510", "FqdnsWithoutDns", _ERROR,
        "A Cilium policy has toFQDNs, and no rule lets it see DNS.",
        "Addresses are learned from DNS answers that pass through a proxy; without `rules.dns` to the DNS server "
        "none is learned and everything is dropped. There is no such proxy here: the policy is refused.",
        "Allow the addresses with toCIDR, or go through an egress gateway.",
    ),
    Code(
        "MB0511", "UnknownPeerKind", _ERROR,
        "A rule of a cluster network policy has a kind of peer that is not known.",
        "Its owner says what holds then: an Accept matches nothing, a Deny or a Pass denies everybody.",
        "Use one of the kinds that are named.",
    ),
    Code(
        "MB0512", "DomainNamesNotEnforced", _ERROR,
        "A rule of a cluster network policy has domain names.",
        "They are learned by a DNS proxy, which does not exist here: the rule accepts nothing.",
        "Write the addresses under `networks`.",
    ),
    Code(
        "MB0601", "GuaranteesLost", _WARNING,
        "A port is excluded from the sidecar, and what the mesh guaranteed there is lost.",
        "Envoy does not see the port: no mutual TLS, no request checks, no telemetry. MeshBridge enforces by "
        "address what can be enforced without Envoy; what is named here nobody does.",
        "Remove the exclusion, or accept the loss in a BypassPolicy.",
    ),
    Code(
        "MB0602", "HalfBypassBreaks", _ERROR,
        "One side of a connection goes through its sidecar, the other does not, and the connection breaks.",
        "Istio does not know of exclusions: a client's sidecar sends TLS to an application that expects none, or a "
        "server's sidecar demands a certificate of a client that bypasses its own.",
        "Exclude the port on both sides or on none, or switch TLS off for it in a DestinationRule.",
    ),
    Code(
        "MB0603", "HalfBypassPlaintext", _INFO,
        "One side of a connection goes through its sidecar, the other does not, and it goes on as plaintext.",
        "It works, but without an identity: rules that ask for one refuse it.",
        "Exclude the port on both sides or on none.",
    ),
    Code(
        "MB0604", "PodNeverStarts", _ERROR,
        "A redirection setting is one with which the pod is refused or never starts.",
        "The injector refuses the pod, or istio-init or the CNI plugin fails on it.",
        "Correct the value.",
    ),
    Code(
        "MB0605", "OctalPort", _WARNING,
        "A port is written with a leading zero.",
        "The injector reads it as decimal, iptables as octal: another port is excluded than the one that is "
        "written.",
        "Write it without leading zeros.",
    ),
    Code(
        "MB0606", "PortListMisread", _WARNING,
        "A port list holds something else than port numbers.",
        "Ranges and service names mean something to one reader and nothing to another.",
        "Write the ports as numbers, separated by commas.",
    ),
    Code(
        "MB0607", "UnknownPort", _WARNING,
        "An annotation names a port that no container of the pod declares.",
        "Perhaps it is misspelt: then the port that was meant is captured, and one that nobody uses is not.",
        "Correct the number, or declare the port.",
    ),
    Code(
        "MB0608", "SettingIgnored", _WARNING,
        "A redirection setting has no effect, or not the effect it looks like.",
        "Another setting overrides it, or the mode of the pod ignores it.",
        "Remove it, or correct the setting that overrides it.",
    ),
    Code(
        "MB0609", "ContradictsInit", _WARNING,
        "The arguments of istio-init say something else than the pod's annotations.",
        "The arguments decide. The annotations mislead who reads them.",
        "Restart the pod, so that the arguments are rendered again.",
    ),
    Code(
        "MB0610", "MoreThanItLooks", _WARNING,
        "More bypasses the sidecar, or less, than the pod's settings look like.",
        "Defaults of the mesh, the address family, the order of init containers or the user ids of processes open "
        "routes that no annotation names.",
        "See the text of the finding.",
    ),
)  # fmt: skip

CODES: Final[Mapping[str, Code]] = {code.code: code for code in _CODES}
"""By code, in order."""
