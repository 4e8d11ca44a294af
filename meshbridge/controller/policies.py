"""Policies as the controller needs them: whom they may concern, what they tell apart, and the bytes that travel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from meshbridge.bypass.bypasspolicy import BypassPolicy, is_bypass_policy, parse_bypass_policy
from meshbridge.controller.addresses import Distinctions
from meshbridge.controller.messages import policy_message, resource
from meshbridge.identity.model import Peer
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.policy.anchors import Anchor, anchors_of
from meshbridge.policy.egressregistry import REGISTRY_ONLY_KINDS
from meshbridge.policy.mesh import MeshSettings
from meshbridge.policy.model import Document, Layer, Notice, Refusal
from meshbridge.policy.parse import Parsed, parse
from meshbridge.policy.parse.cluster import CidrGroup, Service
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.references import requirements_of
from meshbridge.policy.selectors import Selector, ServiceReference, label_keys
from meshbridge.xds.snapshot import Resource

KNOWN_VERSIONS: Final = {
    "cilium.io": ("v2", "v2alpha1"),
    "meshbridge.io": ("v1alpha1",),
    "networking.k8s.io": ("v1",),
    "policy.networking.k8s.io": ("v1alpha2", "v1alpha1"),
    "security.istio.io": ("v1", "v1beta1"),
}
"""The versions of each group whose meaning was looked at; the first is the one others are read as."""


@dataclass(frozen=True, slots=True)
class PolicyItem:
    """One policy object, parsed once. Whom it concerns stands at one of ``anchors``.

    ``bypass`` is set where it is a BypassPolicy, of which ``parsed`` and ``alone`` know nothing.
    """

    name: str
    parsed: Parsed
    alone: PolicySet
    distinctions: Distinctions
    anchors: frozenset[Anchor]
    resource: Resource
    bypass: BypassPolicy | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """What its author has to know."""
        refusal = self.bypass.refusal if self.bypass is not None else None
        found = (*problems_of(self.parsed), *_of_version(self.parsed.document))
        return found if refusal is None else (*found, _refused(refusal))

    @property
    def is_of_mesh(self) -> bool:
        """Whether it may restrict what a sidecar lets in, or says what one may send to under REGISTRY_ONLY."""
        alone = self.alone
        if alone.mesh.registry_only and self.parsed.document.key[:2] in REGISTRY_ONLY_KINDS:
            return True
        refused = any(refusal.layer is Layer.MESH for refusal in alone.refusals)
        return bool(alone.authorization or alone.peer_authentication or refused)

    @property
    def is_for_all(self) -> bool:
        """Whether it says what others' policies mean, so that every node has to know it."""
        return self.parsed.cilium is not None or any(isinstance(found, CidrGroup) for found in self.parsed.objects)

    @property
    def service_references(self) -> frozenset[ServiceReference]:
        """The Services its rules name, which a node with it has to know as well."""
        found = (reference for rule in self.parsed.network for reference in rule.references)
        return frozenset(reference for reference in found if isinstance(reference, ServiceReference))

    def concerns(self, peer: Peer) -> bool:
        """Whether it selects ``peer``, or was refused and may select it."""
        if self.bypass is not None:
            return self.bypass.subject.matches(peer)
        return self.alone.concerns(peer)


def read_policy(document: Document, mesh: MeshSettings, number: int = 1) -> PolicyItem:
    """The item of a document; ``number`` counts further definitions of the same object."""
    parsed = parse(document)
    alone = PolicySet.of_parsed([parsed], mesh)
    backends = label_keys(Selector.of(requirements_of(found)) for found in parsed.objects if isinstance(found, Service))
    bypass = parse_bypass_policy(document) if is_bypass_policy(document) else None
    group, kind, namespace, name = document.key
    suffix = f"#{number}" if number > 1 else ""
    return PolicyItem(
        name=f"{group}/{kind}/{namespace}/{name}{suffix}",
        parsed=parsed,
        alone=alone,
        distinctions=shared(Distinctions(alone.referenced_labels() | backends, alone.referenced_port_names())),
        anchors=alone.anchors() if bypass is None else frozenset(anchors_of(bypass.subject, None)),
        resource=resource(policy_message(document)),
        bypass=bypass,
    )


@lru_cache(maxsize=4096)
def shared(distinctions: Distinctions) -> Distinctions:
    """One object for equal ones: thousands of policies look at the same few labels, and a change unites a node's."""
    return distinctions


def problems_of(parsed: Parsed) -> tuple[Problem, ...]:
    """What the author of an object has to know: why it is refused, what of it is hardly meant."""
    return (*map(_refused, parsed.refusals), *map(problem_of, parsed.notices))


def _of_version(document: Document) -> tuple[Problem, ...]:
    """A version that came after this program: what it has in common with the others is read, all else refused."""
    group, _, version = document.api_version.rpartition("/")
    known = KNOWN_VERSIONS.get(group, (version,))
    if version in known:
        return ()
    text = (
        f"{document.kind} {document.namespace}/{document.name}: {document.api_version} is not known to this "
        f"version: read as {known[0]}, and refused where a field is not understood; update MeshBridge"
    )
    return (Problem(ProblemReason.NOTICE, text, document.source.file, document.source.line("")),)


def _refused(refusal: Refusal) -> Problem:
    source = refusal.document.source
    return Problem(ProblemReason.REFUSED, str(refusal), source.file, source.line(refusal.path))


def problem_of(notice: Notice) -> Problem:
    """A notice, for whoever looks at the cluster's problems."""
    source = notice.document.source
    return Problem(ProblemReason.NOTICE, str(notice), source.file, source.line(notice.path))
