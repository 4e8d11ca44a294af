"""MeshBridge out of a cluster: webhooks first, then what it left on the nodes, then the rest; what others own stays."""

from __future__ import annotations

import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Final

from meshbridge.install.cluster import KINDS, POLL_S, Cluster, InstallError
from meshbridge.install.manifests import INSTALLER, MANAGED_BY, NAMESPACE, Object, is_definition, is_foreign, name_of
from meshbridge.install.rollout import rollout_of, waits_for

OURS: Final = "app.kubernetes.io/part-of=meshbridge"
GENERATED: Final = f"{MANAGED_BY}=meshbridge"
GENERATED_KINDS: Final = (
    ("networking.istio.io", "DestinationRule"),
    ("networking.istio.io", "EnvoyFilter"),
    ("security.istio.io", "PeerAuthentication"),
)
CLEANUP: Final = "meshbridge-cleanup"
GONE_S: Final = 120.0
_NO_NODE: Final = "meshbridge.io/no-node"


@dataclass(frozen=True, slots=True)
class Removal:
    """What an uninstall finds.

    Args:
        installed: What goes, in the order in which it came.
        lost: Objects of our own kinds that go with their definitions.
        kept: Sentences about what stays, and what to do about it.
        generated: What we made for sidecars: it stays unless asked for, since calls to bypassed ports need it.
    """

    installed: tuple[Object, ...]
    lost: tuple[Object, ...] = ()
    kept: tuple[str, ...] = ()
    generated: tuple[Object, ...] = ()


def plan_removal(cluster: Cluster, *, keep_definitions: bool = False) -> Removal:
    """What there is of MeshBridge in the cluster, however it was installed.

    Raises:
        InstallError: it may not be read.
    """
    found = [each for group, kind in KINDS for each in cluster.labelled(group, kind, OURS)]
    installed: list[Object] = []
    lost: list[Object] = []
    kept: list[str] = []
    for each in found:
        if not is_definition(each):
            installed.append(each)
            continue
        group, kind = each["spec"]["group"], each["spec"]["names"]["kind"]
        objects = cluster.labelled(group, kind)
        if keep_definitions:
            kept.append(f"{name_of(each)}: stays, as asked, with {len(objects)} objects")
        elif not is_foreign(each):
            installed.append(each)
            lost += objects
        elif (each["metadata"].get("labels") or {}).get(MANAGED_BY) != INSTALLER:
            kept.append(f"{name_of(each)}: stays: it was not installed by 'meshbridge install'")
        elif objects:
            kept.append(f"{name_of(each)}: stays: {len(objects)} objects of users are of this kind")
        else:
            installed.append(each)
    generated = [each for group, kind in GENERATED_KINDS for each in cluster.labelled(group, kind, GENERATED)]
    return Removal(tuple(installed), tuple(lost), tuple(kept), tuple(generated))


@dataclass(slots=True)
class Remover:
    """Carries a removal out. It may be repeated: after an error, or a break, what is left is removed."""

    cluster: Cluster
    timeout_s: float = 300.0

    def remove(self, removal: Removal, *, without_nodes: bool = False, generated: bool = False) -> None:
        """Nothing of it is there any more: no webhook, nothing on the nodes, no right, no definition of ours.

        Args:
            without_nodes: Go on although a node cannot be cleaned up; what is programmed there stays in force.
            generated: Also what was made for sidecars.

        Raises:
            InstallError: a step does not succeed; those before it have.
        """
        webhooks = [each for each in removal.installed if each["kind"].endswith("WebhookConfiguration")]
        workloads = [each for each in removal.installed if each["kind"] in ("DaemonSet", "Deployment")]
        definitions = [each for each in removal.installed if is_definition(each)]
        namespaces = [each for each in removal.installed if each["kind"] == "Namespace"]
        early = [*webhooks, *workloads, *definitions, *namespaces]
        rest = [each for each in removal.installed if each not in early]
        self._delete(webhooks)
        try:
            self.clean_nodes([each for each in workloads if each["kind"] == "DaemonSet"])
        except InstallError as error:
            if not without_nodes:
                raise
            self.cluster.tell(f"Warning: {error}; going on, as asked")
            self.cluster.delete(_named(CLEANUP))
        self._delete([each for each in workloads if each["metadata"]["name"] != CLEANUP])
        if generated:
            self._delete(removal.generated)
        self._delete(definitions, wait=True)
        self._delete(rest)
        for each in namespaces:
            if strangers := self._strangers(each["metadata"]["name"]):
                self.cluster.tell(f"{name_of(each)}: stays: {', '.join(strangers[:3])} in it are not MeshBridge's")
            else:
                self._delete([each], wait=True)

    def clean_nodes(self, sets: Sequence[Object]) -> None:
        """No node has programs, pinned maps or a CNI plugin of ours any more; the agents are gone.

        A set of pods like the agents', on the same nodes, has each one clean its node up as its first container.

        Raises:
            InstallError: not every node did within the time.
        """
        agents = next((each for each in sets if each["metadata"]["name"] == "meshbridge-agent"), None)
        cleaning = next((each for each in sets if each["metadata"]["name"] == CLEANUP), None)
        if agents is not None:
            # before the agents go: what cleans up is known even if this process ends now
            cleaning = cleanup_of(agents)
            self.cluster.apply([{**cleaning, "spec": _nowhere(cleaning["spec"])}], force=True)
            self.cluster.delete(agents)
            self._wait_pods_gone("agent")
            self.cluster.apply([cleaning], force=True)
        elif cleaning is not None:
            self.cluster.tell(f"{name_of(cleaning)}: is there already, from an uninstall before")
            self._wait_pods_gone("agent")
            self.cluster.apply([_everywhere(cleaning)], force=True)
        else:
            self.cluster.tell("no agents: nothing to clean up on nodes")
            return
        self._wait_cleaned()
        self.cluster.delete(_named(CLEANUP))
        self._wait_pods_gone("cleanup")

    def _wait_cleaned(self) -> None:
        until, told = time.monotonic() + self.timeout_s, ""
        while True:
            current = self.cluster.find(_named(CLEANUP))
            pods = self.cluster.labelled("", "Pod", "app.kubernetes.io/component=cleanup", NAMESPACE)
            if current is not None:
                state = rollout_of(current, pods)
                text = f"nodes cleaned up: {state.ready} of {state.wanted}"
                if text != told:
                    self.cluster.tell(text)
                    told = text
                if state.complete:
                    return
            if time.monotonic() >= until:
                raise InstallError(
                    f"not cleaned up after {self.timeout_s:.0f} s: {', '.join(_uncleaned(pods)) or told}",
                    fix="bring the nodes up and run it again; --without-nodes leaves there what is programmed",
                )
            time.sleep(POLL_S)

    def _wait_pods_gone(self, component: str) -> None:
        until = time.monotonic() + self.timeout_s
        selector = f"app.kubernetes.io/name=meshbridge,app.kubernetes.io/component={component}"
        while pods := self.cluster.labelled("", "Pod", selector, NAMESPACE):
            if time.monotonic() >= until:
                names = ", ".join(f"{p['metadata']['name']} on {p['spec'].get('nodeName') or 'no node'}" for p in pods)
                raise InstallError(
                    f"pods are still there after {self.timeout_s:.0f} s: {names}",
                    fix="a node that is gone for good has to be deleted from the cluster first",
                )
            time.sleep(POLL_S)

    def _delete(self, objects: Sequence[Object], *, wait: bool = False) -> None:
        for each in reversed(objects):
            self.cluster.delete(each)
        if wait:
            self.cluster.wait_gone(objects, GONE_S)

    def _strangers(self, namespace: str) -> list[str]:
        pods = self.cluster.labelled("", "Pod", "app.kubernetes.io/name!=meshbridge", namespace)
        return [f"pod {each['metadata']['name']}" for each in pods]


def cleanup_of(agents: Object) -> dict[str, Any]:
    """The set of pods that cleans up after those of ``agents``: with their volumes, rights, image and arguments."""
    labels = {**agents["metadata"].get("labels", {}), "app.kubernetes.io/component": "cleanup", MANAGED_BY: INSTALLER}
    template = deepcopy(dict(agents["spec"]["template"]))
    template["metadata"] = {**template["metadata"], "labels": {**labels, MANAGED_BY: INSTALLER}}
    pod = template["spec"]
    (agent,) = [c for c in pod["containers"] if c["name"] == "agent"]
    for probe in ("startupProbe", "readinessProbe", "livenessProbe", "lifecycle"):
        agent.pop(probe, None)
    rest = {key: agent[key] for key in ("image", "imagePullPolicy") if key in agent}
    pod["initContainers"] = [{**agent, "name": "cleanup", "args": [*agent["args"], "--cleanup"]}]
    pod["containers"] = [
        {
            **rest, "name": "done", "command": ["sleep", "infinity"],
            "resources": {"requests": {"cpu": "1m", "memory": "8Mi"}, "limits": {"memory": "32Mi"}},
            "securityContext": {"runAsNonRoot": True, "runAsUser": 65532, "allowPrivilegeEscalation": False,
                                "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}},
        }
    ]  # fmt: skip
    pod["terminationGracePeriodSeconds"] = 1
    return {
        "apiVersion": "apps/v1", "kind": "DaemonSet",
        "metadata": {"name": CLEANUP, "namespace": agents["metadata"]["namespace"], "labels": labels},
        "spec": {
            "selector": {"matchLabels": {"app.kubernetes.io/name": "meshbridge",
                                         "app.kubernetes.io/component": "cleanup"}},
            # a node that cannot be reached keeps none of the others waiting
            "updateStrategy": {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}},
            "template": template,
        },
    }  # fmt: skip


def _nowhere(spec: Object) -> dict[str, Any]:
    """The same, for no node."""
    held = deepcopy(dict(spec))
    pod = held["template"]["spec"]
    pod["nodeSelector"] = {**pod.get("nodeSelector", {}), _NO_NODE: "true"}
    return held


def _everywhere(cleaning: Object) -> dict[str, Any]:
    """A set as the cluster has it, for the agents' nodes, as it may be applied."""
    spec = deepcopy(dict(cleaning["spec"]))
    pod = spec["template"]["spec"]
    pod["nodeSelector"] = {key: value for key, value in pod.get("nodeSelector", {}).items() if key != _NO_NODE}
    metadata = {key: cleaning["metadata"][key] for key in ("name", "namespace", "labels")}
    return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": metadata, "spec": spec}


def _uncleaned(pods: Sequence[Object]) -> list[str]:
    said = []
    for pod in pods:
        conditions = (pod.get("status") or {}).get("conditions") or []
        if not any(c.get("type") == "Ready" and c.get("status") == "True" for c in conditions):
            node = (pod.get("spec") or {}).get("nodeName") or "no node"
            said.append("; ".join([f"node {node}", *waits_for(pod)]))
    return said


def _named(name: str) -> Object:
    return {"apiVersion": "apps/v1", "kind": "DaemonSet", "metadata": {"name": name, "namespace": NAMESPACE}}
