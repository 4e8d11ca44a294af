"""What may stand in the way of an installation: findings about a cluster or a node, from what was read of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Final

from meshbridge.install.manifests import NAMESPACE, Object

OLDEST_API_SERVER: Final = (1, 30)
"""matchConditions of webhooks are for everybody from here on."""
OLDEST_KERNEL: Final = (5, 10)
TCX_KERNEL: Final = (6, 6)
OLDEST_ISTIO: Final = (1, 22)
ARCHITECTURES: Final = ("amd64", "arm64")
OUR_PROVIDER: Final = "meshbridge"
CONFIGURATION: Final = "bypass.meshbridge.io"

_NUMBERS = re.compile(r"v?(\d+)\.(\d+)")


class Outcome(StrEnum):
    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: ``what`` was looked at, what was found, and what to do about it if anything."""

    what: str
    outcome: Outcome
    text: str
    fix: str = ""


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """A cluster before an installation; objects are as the API server has them.

    Args:
        version: Of the API server, as /version has it.
        missing_rights: What the caller may not do and installing needs.
        custom: AuthorizationPolicies with action CUSTOM.
    """

    version: str
    nodes: Sequence[Object] = ()
    missing_rights: Sequence[str] = ()
    istiods: Sequence[Object] = ()
    istio_namespace: str = "istio-system"
    mesh_configured: bool = False
    injector_configured: bool = False
    cilium: Sequence[Object] = ()
    cilium_config: Mapping[str, Any] = field(default_factory=dict)
    custom: Sequence[Object] = ()
    mutating: Sequence[Object] = ()
    validating: Sequence[Object] = ()
    namespace: Object | None = None
    installed: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """The machine this runs on.

    Args:
        mounts: As /proc/mounts has them.
        bpf: Why a map cannot be made; empty: one can.
        conflists: The CNI configurations by name, in order; each with its plugins' types, or why it cannot be read.
    """

    kernel: str
    machine: str
    mounts: Sequence[str] = ()
    bpf: str = ""
    lockdown: str = ""
    jit: str = "1"
    conflists: Mapping[str, Sequence[str] | str] = field(default_factory=dict)
    cni_directory: str = "/etc/cni/net.d"


def cluster_findings(facts: ClusterFacts) -> list[Finding]:
    """What is found of a cluster, in the order in which it should be mended."""
    return [
        _version("API server", facts.version, OLDEST_API_SERVER, "Kubernetes"),
        _rights(facts),
        *_nodes(facts.nodes),
        *_istio(facts),
        *_cilium(facts),
        _providers(facts.custom),
        *_webhooks(facts),
        _namespace(facts.namespace),
        _installed(facts.installed),
    ]


def node_findings(facts: NodeFacts) -> list[Finding]:
    """What is found of a node."""
    return [_kernel(facts.kernel), _architecture(facts.machine), *_filesystems(facts.mounts), _bpf(facts), _cni(facts)]


def failed(findings: Iterable[Finding]) -> bool:
    return any(each.outcome is Outcome.FAIL for each in findings)


def _version(what: str, text: str, oldest: tuple[int, int], product: str) -> Finding:
    found = _numbers(text)
    needed = ".".join(map(str, oldest))
    if found is None:
        return Finding(what, Outcome.WARN, f"the version {text!r} is not understood", f"{product} {needed} is needed")
    if found < oldest:
        return Finding(what, Outcome.FAIL, f"{product} {text} is too old", f"upgrade it to {needed} or newer")
    return Finding(what, Outcome.OK, f"{product} {text}")


def _rights(facts: ClusterFacts) -> Finding:
    if facts.missing_rights:
        return Finding(
            "rights", Outcome.FAIL, f"you may not {', '.join(facts.missing_rights)}",
            "installing needs the rights of a cluster's administrator: choose another --context",
        )  # fmt: skip
    return Finding("rights", Outcome.OK, "you may create what an installation consists of")


def _nodes(nodes: Sequence[Object]) -> list[Finding]:
    if not nodes:
        return [Finding("nodes", Outcome.FAIL, "there are none", "add one: agents run on nodes")]
    infos = {each["metadata"]["name"]: (each.get("status") or {}).get("nodeInfo") or {} for each in nodes}
    linux = {name: info for name, info in infos.items() if info.get("operatingSystem", "linux") == "linux"}
    found = []
    by_kernel: dict[str, list[str]] = {}
    for name, info in linux.items():
        by_kernel.setdefault(str(info.get("kernelVersion") or "unknown"), []).append(name)
    for kernel, names in sorted(by_kernel.items()):
        one = _kernel(kernel)
        found.append(Finding(f"kernel of {_some(names)}", one.outcome, one.text, one.fix))
    others = [name for name, info in linux.items() if info.get("architecture", "amd64") not in ARCHITECTURES]
    if others:
        text = f"{_some(others)}: neither {' nor '.join(ARCHITECTURES)}"
        found.append(Finding("architecture", Outcome.FAIL, text, "build an image for it, or keep agents off it"))
    if windows := [name for name in infos if name not in linux]:
        text = f"{_some(windows)} are not Linux: nothing is enforced there"
        found.append(Finding("operating system", Outcome.WARN, text))
    if len(linux) == 1:
        text = "there is one: the controller's two replicas cannot share it"
        found.append(Finding("nodes", Outcome.WARN, text, "install with --replicas 1"))
    return found


def _istio(facts: ClusterFacts) -> list[Finding]:
    if not facts.istiods:
        text = (
            f"no istiod in {facts.istio_namespace}: network policies are enforced, and no pod has a sidecar to bypass"
        )
        return [Finding("Istio", Outcome.WARN, text, "--istio-namespace names another namespace")]
    images = {c.get("image", "") for each in facts.istiods for c in each["spec"]["template"]["spec"]["containers"]}
    tags = sorted({image.rpartition(":")[2].partition("@")[0] for image in images if ":" in image})
    found = []
    for tag in tags:
        one = _version("Istio", tag, OLDEST_ISTIO, "istiod")
        # a version that nobody can read is no fault: images are tagged as their builders like
        found.append(Finding("Istio", Outcome.OK, f"istiod {tag}") if _numbers(tag) is None else one)
    for there, name, lack in (
        (facts.mesh_configured, "istio", "the mesh's settings are taken for Istio's defaults"),
        (facts.injector_configured, "istio-sidecar-injector", "mesh-wide exclusions of ports are not known"),
    ):
        if not there:
            text = f"no ConfigMap {facts.istio_namespace}/{name}: {lack}"
            fix = "with revisions it has another name" if name != "istio" else "--istio-namespace names another"
            found.append(Finding("Istio", Outcome.WARN, text, fix))
    return found


def _cilium(facts: ClusterFacts) -> list[Finding]:
    if not facts.cilium:
        return []
    mode = str(facts.cilium_config.get("enable-policy", "default"))
    where = f"DaemonSet {facts.cilium[0]['metadata'].get('namespace')}/{facts.cilium[0]['metadata']['name']}"
    if mode == "never":
        return [Finding("Cilium", Outcome.OK, f"{where} enforces no policies (enable-policy: never)")]
    return [
        Finding(
            "Cilium", Outcome.FAIL, f"{where} enforces policies already (enable-policy: {mode}): they would be twice",
            "install with --enforcer cilium, or set enable-policy to never",
        )
    ]  # fmt: skip


def _providers(custom: Sequence[Object]) -> Finding:
    others: dict[str, list[str]] = {}
    for each in custom:
        provider = str(((each.get("spec") or {}).get("provider") or {}).get("name") or "")
        if provider != OUR_PROVIDER:
            metadata = each["metadata"]
            others.setdefault(provider, []).append(f"{metadata.get('namespace')}/{metadata['name']}")
    if not others:
        return Finding("CUSTOM providers", Outcome.OK, "no AuthorizationPolicy names another provider")
    said = "; ".join(f"{provider or 'none'} by {_some(names)}" for provider, names in sorted(others.items()))
    return Finding(
        "CUSTOM providers", Outcome.WARN, f"other providers are named: {said}; of two at one workload Istio denies all",
        "use our EnvoyFilter for these workloads: docs/ext-authz.md",
    )  # fmt: skip


def _webhooks(facts: ClusterFacts) -> list[Finding]:
    foreign = [
        each["metadata"]["name"] for each in (*facts.mutating, *facts.validating)
        if each["metadata"]["name"] == CONFIGURATION
        and (each["metadata"].get("labels") or {}).get("app.kubernetes.io/name") != "meshbridge"
    ]  # fmt: skip
    found = []
    if foreign:
        text = f"{CONFIGURATION} is there and is not labelled as MeshBridge's"
        found.append(Finding("webhooks", Outcome.FAIL, text, "look whose it is, and delete it"))
    after = [
        each["metadata"]["name"] for each in facts.mutating
        if each["metadata"]["name"] > CONFIGURATION and not _is_istios(each) and _mutates_pods(each)
    ]  # fmt: skip
    if after:
        text = f"{_some(after)} change pods after ours: what they add of ports and annotations is not reviewed"
        found.append(Finding("webhooks", Outcome.WARN, text, "look at what they add to pods with bypasses"))
    return found or [Finding("webhooks", Outcome.OK, "no other webhook is in the way")]


def _namespace(namespace: Object | None) -> Finding:
    if namespace is None:
        return Finding("namespace", Outcome.OK, f"{NAMESPACE} is made by the installation")
    level = (namespace["metadata"].get("labels") or {}).get("pod-security.kubernetes.io/enforce", "")
    if level not in ("", "privileged"):
        text = f"{NAMESPACE} enforces PodSecurity {level}: no agent would start"
        return Finding(
            "namespace", Outcome.WARN, text, "the installation sets it to privileged; see that nothing undoes it"
        )
    return Finding("namespace", Outcome.OK, f"{NAMESPACE} is there")


def _installed(images: Sequence[str]) -> Finding:
    if not images:
        return Finding("installed", Outcome.OK, "nothing of MeshBridge yet")
    return Finding("installed", Outcome.OK, f"{', '.join(images)}: 'meshbridge install' changes it to this version")


def _kernel(text: str) -> Finding:
    found = _version("kernel", text, OLDEST_KERNEL, "Linux")
    if found.outcome is Outcome.OK:
        how = "tcx" if (_numbers(text) or (0, 0)) >= TCX_KERNEL else "clsact"
        return Finding("kernel", Outcome.OK, f"Linux {text}: programs are attached by {how}")
    return found


def _architecture(machine: str) -> Finding:
    if machine in ("x86_64", "aarch64", *ARCHITECTURES):
        return Finding("architecture", Outcome.OK, machine)
    return Finding("architecture", Outcome.FAIL, f"{machine} is not built for", f"use {' or '.join(ARCHITECTURES)}")


def _filesystems(mounts: Sequence[str]) -> list[Finding]:
    types = {parts[1]: parts[2] for line in mounts if len(parts := line.split()) > 2}
    found = []
    if types.get("/sys/fs/bpf") == "bpf":
        found.append(Finding("bpffs", Outcome.OK, "mounted at /sys/fs/bpf"))
    else:
        text = "not mounted at /sys/fs/bpf: what is pinned would go with the agent"
        found.append(Finding("bpffs", Outcome.FAIL, text, "mount -t bpf bpf /sys/fs/bpf, and at boot"))
    if "cgroup2" in types.values():
        found.append(Finding("cgroup", Outcome.OK, "cgroup v2"))
    else:
        text = "cgroup v1 alone: the process behind a packet is not always known"
        found.append(Finding("cgroup", Outcome.WARN, text, "boot with systemd.unified_cgroup_hierarchy=1"))
    return found


def _bpf(facts: NodeFacts) -> Finding:
    if facts.bpf:
        lockdown = f" (kernel lockdown: {facts.lockdown})" if facts.lockdown not in ("", "none") else ""
        return Finding("bpf", Outcome.FAIL, f"no map can be made: {facts.bpf}{lockdown}", "run it as root, on the node")
    if facts.jit == "0":
        return Finding("bpf", Outcome.WARN, "programs are interpreted", "sysctl net.core.bpf_jit_enable=1")
    return Finding("bpf", Outcome.OK, "maps can be made, programs are compiled by the kernel")


def _cni(facts: NodeFacts) -> Finding:
    if not facts.conflists:
        text = f"no configuration in {facts.cni_directory}: pods have no network yet"
        return Finding("CNI", Outcome.WARN, text, "install a CNI plugin, or name its directory (agent --cni-conf-dir)")
    name, plugins = next(iter(facts.conflists.items()))
    if isinstance(plugins, str):
        return Finding(
            "CNI", Outcome.FAIL, f"{facts.cni_directory}/{name}: {plugins}", "mend it: the runtime reads it first"
        )
    return Finding("CNI", Outcome.OK, f"{facts.cni_directory}/{name}: {', '.join(plugins)}")


def _is_istios(configuration: Object) -> bool:
    name = str(configuration["metadata"]["name"])
    return name.startswith("istio") or "istio.io/rev" in (configuration["metadata"].get("labels") or {})


def _mutates_pods(configuration: Object) -> bool:
    rules = [rule for hook in configuration.get("webhooks") or [] for rule in hook.get("rules") or []]
    return any({"pods", "*", "*/*"} & set(rule.get("resources") or []) for rule in rules)


def _numbers(text: str) -> tuple[int, int] | None:
    found = _NUMBERS.match(text)
    return (int(found[1]), int(found[2])) if found else None


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
