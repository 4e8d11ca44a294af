"""What there is to know before an installation, of a cluster and of the machine this runs on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from meshbridge.datapath import syscall
from meshbridge.install.cluster import Cluster
from meshbridge.install.manifests import NAMESPACE, Object
from meshbridge.install.preflight import ClusterFacts, NodeFacts
from meshbridge.kube.api import RefusedError

_NEEDED: Final = (
    ("rbac.authorization.k8s.io", "clusterroles", "create"),
    ("rbac.authorization.k8s.io", "clusterrolebindings", "create"),
    ("apiextensions.k8s.io", "customresourcedefinitions", "create"),
    ("admissionregistration.k8s.io", "validatingwebhookconfigurations", "create"),
    ("apps", "daemonsets", "create"),
    ("", "namespaces", "create"),
)
_ADMISSION: Final = "admissionregistration.k8s.io"
_REVIEWS: Final = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews"
_CONFLISTS: Final = (".conf", ".conflist", ".json")


def cluster_facts(cluster: Cluster, istio_namespace: str) -> ClusterFacts:
    """
    Raises:
        InstallError: something of it may not be read.
        ClusterError: the API server cannot be reached.
    """
    api = cluster.api
    try:
        version = str(api.get("/version").get("gitVersion") or "")
    except RefusedError as refused:
        raise api.error(refused) from None

    def named(kind: str, name: str, namespace: str) -> Object | None:
        return cluster.find({"apiVersion": "v1", "kind": kind, "metadata": {"name": name, "namespace": namespace}})

    custom = [
        each for each in cluster.labelled("security.istio.io", "AuthorizationPolicy")
        if (each.get("spec") or {}).get("action") == "CUSTOM"
    ]  # fmt: skip
    return ClusterFacts(
        version=version,
        nodes=cluster.labelled("", "Node"),
        missing_rights=[
            f"{verb} {plural}" for group, plural, verb in _NEEDED if not _may(cluster, group, plural, verb)
        ],
        istiods=cluster.labelled("apps", "Deployment", "app=istiod", istio_namespace),
        istio_namespace=istio_namespace,
        mesh_configured=named("ConfigMap", "istio", istio_namespace) is not None,
        injector_configured=named("ConfigMap", "istio-sidecar-injector", istio_namespace) is not None,
        cilium=cluster.labelled("apps", "DaemonSet", "k8s-app=cilium"),
        cilium_config=(named("ConfigMap", "cilium-config", "kube-system") or {}).get("data") or {},
        custom=custom,
        mutating=cluster.labelled(_ADMISSION, "MutatingWebhookConfiguration"),
        validating=cluster.labelled(_ADMISSION, "ValidatingWebhookConfiguration"),
        namespace=named("Namespace", NAMESPACE, ""),
        installed=sorted({each.image for each in cluster.rollouts()}),
    )


def node_facts(cni_directory: Path = Path("/etc/cni/net.d")) -> NodeFacts:
    """The machine this runs on, as far as it may be read."""
    system = os.uname()
    return NodeFacts(
        kernel=system.release,
        machine=system.machine,
        # of the machine: a pod has mounts of its own, and sees the machine's first process
        mounts=(_text(Path("/proc/1/mounts")) or _text(Path("/proc/mounts"))).splitlines(),
        bpf=_no_map(),
        lockdown=_text(Path("/sys/kernel/security/lockdown")).partition("[")[2].partition("]")[0],
        jit=_text(Path("/proc/sys/net/core/bpf_jit_enable")).strip() or "1",
        conflists=_conflists(cni_directory),
        cni_directory=str(cni_directory),
    )


def _may(cluster: Cluster, group: str, plural: str, verb: str) -> bool:
    wanted = {"group": group, "resource": plural, "verb": verb}
    body = {
        "apiVersion": "authorization.k8s.io/v1", "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": wanted},
    }  # fmt: skip
    try:
        status: Any = cluster.api.post(_REVIEWS, body).get("status") or {}
    except RefusedError:
        return False
    return status.get("allowed") is True


def _no_map() -> str:
    """Why the kernel makes no map for us; empty when it does."""
    try:
        os.close(syscall.map_create(syscall.MapType.HASH, name="check", key_size=4, value_size=4, max_entries=1))
    except syscall.BpfError as error:
        return error.what
    return ""


def _conflists(directory: Path) -> dict[str, Sequence[str] | str]:
    found: dict[str, Sequence[str] | str] = {}
    with suppress(OSError):
        for path in sorted(directory.iterdir()):
            if path.suffix in _CONFLISTS:
                found[path.name] = _plugins(path)
    return found


def _plugins(path: Path) -> Sequence[str] | str:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        plugins = data.get("plugins", [data])
        return [str(plugin["type"]) for plugin in plugins]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"is no CNI configuration: {error}"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
