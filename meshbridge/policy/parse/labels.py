"""Label selectors as raw data, of both dialects, into requirements."""

from __future__ import annotations

import re

from meshbridge.identity.model import Entity
from meshbridge.policy.parse.reader import Reader, shown
from meshbridge.policy.selectors import LabelSource, Operator, Requirement, is_identity_label

NAMESPACE_KEY = "io.kubernetes.pod.namespace"
NAMESPACE_LABELS_PREFIX = "io.cilium.k8s.namespace.labels."
SERVICE_ACCOUNT_KEY = "io.cilium.k8s.policy.serviceaccount"
CLUSTER_KEY = "io.cilium.k8s.policy.cluster"

_KEY = re.compile(r"([a-z0-9A-Z]([a-z0-9A-Z.-]{0,251}[a-z0-9A-Z])?/)?[a-z0-9A-Z]([a-z0-9A-Z._-]{0,61}[a-z0-9A-Z])?")
_VALUE = re.compile(r"([a-z0-9A-Z]([a-z0-9A-Z._-]{0,61}[a-z0-9A-Z])?)?")
_SOURCES = ("k8s", "any", "reserved", "container", "cidr", "cidrgroup", "fqdn", "node", "unspec")
_OWN_NAMESPACE = f"k8s:{NAMESPACE_KEY}"


def kubernetes_requirements(selector: Reader, source: LabelSource = LabelSource.POD) -> list[Requirement]:
    """A ``metav1.LabelSelector``, looked up in ``source``.

    Raises:
        Invalid: A part of it is not understood.
    """
    return [
        Requirement(source, _key(at, key), operator, values) for at, key, operator, values in _requirements(selector)
    ]


def match_labels_only(selector: Reader) -> list[Requirement]:
    """Istio's ``WorkloadSelector``, which has matchLabels and nothing else.

    Raises:
        Invalid: A part of it is not understood.
    """
    labels = selector.fields("matchLabels").get("matchLabels")
    if labels is None:
        return []
    return [
        Requirement(LabelSource.POD, _key(at, key), Operator.IN, (_value(at),)) for key, at in labels.mapping().items()
    ]


def cilium_requirements(selector: Reader, *, in_own_namespace: bool = False) -> list[Requirement]:
    """A Cilium endpoint selector: keys may carry a source, and some stand for more than a pod label.

    Args:
        in_own_namespace: it is the subject of a namespaced policy, whose namespace replaces one under matchLabels.

    Raises:
        Invalid: A part of it is not understood.
    """
    found = []
    for at, key, operator, values in _requirements(selector):
        if in_own_namespace and key == _OWN_NAMESPACE and ".matchLabels." in at.path:
            continue
        source, name = _cilium_key(at, key)
        found.append(Requirement(source, name, operator, values))
    return found


def node_requirements(selector: Reader) -> list[Requirement]:
    """The selector of fromNodes and toNodes, which looks at labels of nodes.

    Raises:
        Invalid: A part of it is not understood.
    """
    found = []
    for at, key, operator, values in _requirements(selector):
        source, name = _source_of(at, key)
        if source == "reserved":
            found.append(Requirement(LabelSource.RESERVED, _reserved(at, name), operator, values))
            continue
        if name == CLUSTER_KEY:
            at.refuse("nodes of other clusters are not known here", "delete the requirement")
        known = source in ("any", "node") and is_identity_label(_key(at, name))
        found.append(Requirement(LabelSource.NODE if known else LabelSource.ABSENT, name, operator, values))
    return found


def group_requirements(selector: Reader) -> list[Requirement]:
    """A ``cidrGroupSelector``, over the labels of CiliumCIDRGroups.

    Raises:
        Invalid: A part of it is not understood.
    """
    return _plain(selector, ("any", "cidrgroup"))


def service_requirements(selector: Reader) -> list[Requirement]:
    """A ``k8sServiceSelector``, over the labels of Services.

    Raises:
        Invalid: A part of it is not understood.
    """
    return _plain(selector, ("any", "k8s"))


def mentions(requirements: list[Requirement], source: LabelSource) -> bool:
    """Whether some requirement looks a label up in ``source``."""
    return any(requirement.source is source for requirement in requirements)


def mentions_unknown_source(requirements: list[Requirement]) -> bool:
    """Whether some requirement is on a label of a source whose labels pods do not have."""
    return any(":" in requirement.key for requirement in requirements)


def _plain(selector: Reader, sources: tuple[str, ...]) -> list[Requirement]:
    found = []
    for at, key, operator, values in _requirements(selector):
        source, name = _source_of(at, key)
        if source not in sources:
            at.refuse(f"labels of source {source!r} are never there", f"write {shown(name)} alone")
        found.append(Requirement(LabelSource.POD, _key(at, name), operator, values))
    return found


def _requirements(selector: Reader) -> list[tuple[Reader, str, Operator, tuple[str, ...]]]:
    fields = selector.fields("matchLabels", "matchExpressions")
    found: list[tuple[Reader, str, Operator, tuple[str, ...]]] = []
    if "matchLabels" in fields:
        for key, at in fields["matchLabels"].mapping().items():
            found.append((at, key, Operator.IN, (_value(at),)))
    if "matchExpressions" in fields:
        for expression in fields["matchExpressions"].items():
            parts = expression.fields("key", "operator", "values")
            for required in ("key", "operator"):
                if required not in parts:
                    expression.refuse(f"has no {required}", "write key, operator and, for In and NotIn, values")
            operator = Operator(parts["operator"].text([str(operator) for operator in Operator]))
            values = tuple(_value(item) for item in parts["values"].items()) if "values" in parts else ()
            if operator in (Operator.IN, Operator.NOT_IN) and not values:
                expression.refuse(f"{operator} has no values", "add a value")
            if operator in (Operator.EXISTS, Operator.DOES_NOT_EXIST) and values:
                parts["values"].refuse(f"{operator} takes no values", "delete values")
            found.append((parts["key"], parts["key"].text(), operator, tuple(sorted(set(values)))))
    return found


def _key(at: Reader, key: str) -> str:
    if not _KEY.fullmatch(key):
        at.refuse(f"{shown(key)} is no label key", "use [prefix/]name of letters, digits, '-', '_' and '.'")
    return key


def _value(at: Reader) -> str:
    value = at.text()
    if not _VALUE.fullmatch(value):
        at.refuse(f"{shown(value)} is no label value", "use at most 63 letters, digits, '-', '_' and '.'")
    return value


def _source_of(at: Reader, key: str) -> tuple[str, str]:
    source, colon, name = key.partition(":")
    if not colon:
        return "any", key
    if source not in _SOURCES:
        at.refuse(f"unknown label source {shown(source)}", f"use one of: {', '.join(_SOURCES)}")
    return source, name


def _reserved(at: Reader, name: str) -> str:
    if name not in list(Entity):
        at.refuse(f"unknown reserved label {shown(name)}", f"use one of: {', '.join(Entity)}")
    return name


def _cilium_key(at: Reader, key: str) -> tuple[LabelSource, str]:
    source, name = _source_of(at, key)
    if source == "reserved":
        return LabelSource.RESERVED, _reserved(at, name)
    if source not in ("k8s", "any"):
        return LabelSource.ABSENT, key
    if name == NAMESPACE_KEY:
        return LabelSource.NAMESPACE, ""
    if name == SERVICE_ACCOUNT_KEY:
        return LabelSource.SERVICE_ACCOUNT, ""
    if name == CLUSTER_KEY:
        return LabelSource.CLUSTER, ""
    if name.startswith(NAMESPACE_LABELS_PREFIX):
        return LabelSource.NAMESPACE_LABEL, _key(at, name.removeprefix(NAMESPACE_LABELS_PREFIX))
    _key(at, name)
    return (LabelSource.POD if is_identity_label(name) else LabelSource.ABSENT), name
