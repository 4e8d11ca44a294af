"""How an installation is: its components, and what keeps one from working although its pods run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from meshbridge.install.cluster import Cluster
from meshbridge.install.manifests import NAMESPACE, Enforcer, Object
from meshbridge.install.rollout import Rollout

_CONFIGURATION: Final = "bypass.meshbridge.io"
_ADMISSION: Final = "admissionregistration.k8s.io"
_LEASE: Final = "meshbridge-controller"


@dataclass(frozen=True, slots=True)
class Overview:
    """``problems`` are sentences; ``well``: every component serves and there are none."""

    rollouts: tuple[Rollout, ...]
    problems: tuple[str, ...] = ()
    leader: str = ""

    @property
    def enforcer(self) -> Enforcer:
        """Who drops packets here: without agents it is not us."""
        ours = any(each.component == "agent" for each in self.rollouts)
        return Enforcer.EBPF if ours else Enforcer.CILIUM

    @property
    def well(self) -> bool:
        return bool(self.rollouts) and not self.problems and all(each.complete for each in self.rollouts)


def overview(cluster: Cluster) -> Overview:
    """What the cluster says of the installation now.

    Raises:
        InstallError: it may not be read.
    """
    rollouts = sorted(cluster.rollouts(), key=lambda each: each.component)
    if not rollouts:
        return Overview(())
    problems = [f"{each}: {text}" for each in rollouts for text in each.waits_for]
    problems += [f"{each}: a rollout is under way" for each in rollouts if not each.complete and not each.waits_for]
    for kind in ("ValidatingWebhookConfiguration", "MutatingWebhookConfiguration"):
        found = cluster.find(_object(f"{_ADMISSION}/v1", kind, _CONFIGURATION))
        problems += _unasked(kind, found)
    lease = cluster.find({**_object("coordination.k8s.io/v1", "Lease", _LEASE, NAMESPACE)})
    leader = str(((lease or {}).get("spec") or {}).get("holderIdentity") or "")
    if not leader:
        problems.append(f"no controller leads (Lease {NAMESPACE}/{_LEASE}): nobody writes status, Events and reports")
    return Overview(tuple(rollouts), tuple(problems), leader)


def overview_record(found: Overview) -> dict[str, Any]:
    """As ``-o json`` prints it."""
    return {
        "well": found.well,
        "leader": found.leader,
        "enforcer": found.enforcer.value,
        "components": [
            {
                "component": each.component, "kind": each.kind, "name": each.name, "image": each.image,
                "wanted": each.wanted, "ready": each.ready, "complete": each.complete, "waitsFor": list(each.waits_for),
            }
            for each in found.rollouts
        ],
        "problems": list(found.problems),
    }  # fmt: skip


def _unasked(kind: str, configuration: Object | None) -> list[str]:
    """Why the API server does not ask the webhook, or does not believe its answers."""
    if configuration is None:
        return [f"there is no {kind} {_CONFIGURATION}: the webhook is not asked"]
    unbelieved = [
        str(hook.get("name"))
        for hook in configuration.get("webhooks") or []
        if not (hook.get("clientConfig") or {}).get("caBundle")
    ]
    if not unbelieved:
        return []
    names = ", ".join(unbelieved)
    return [f"{kind} {_CONFIGURATION}: no caBundle for {names}: the API server does not believe the webhook yet"]


def _object(api_version: str, kind: str, name: str, namespace: str = "") -> Object:
    metadata = {"name": name, **({"namespace": namespace} if namespace else {})}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata}
