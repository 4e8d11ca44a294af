"""The conditions of BypassPolicies and ClusterBypassPolicies, written into their status."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from functools import partial
from typing import Any, Final

from meshbridge.bypass.bypasspolicy import CLUSTERWIDE, GROUP, NAMESPACED, BypassPolicy
from meshbridge.controller.conditions import Condition, Selected, condition_records, policy_conditions
from meshbridge.controller.picture import Picture
from meshbridge.controller.writer import Outbox
from meshbridge.kube.api import Api, Resource
from meshbridge.kube.manifests import Key

VERSION: Final = "v1alpha1"
RESOURCES: Final[Mapping[str, Resource]] = {
    NAMESPACED: Resource(GROUP, VERSION, "bypasspolicies", NAMESPACED, True),
    CLUSTERWIDE: Resource(GROUP, VERSION, "clusterbypasspolicies", CLUSTERWIDE, False),
}
MANAGER: Final = "meshbridge-controller"


class PolicyStatus:
    """Writes a status when it says something else than the object does.

    Cost: one write for each change of a policy's conditions, none for a look that finds the same.
    """

    def __init__(self, api: Api, unfixed: Callable[[BypassPolicy], Iterable[str]] = lambda _: ()) -> None:
        """
        Args:
            unfixed: why what a policy asks to be applied is not.
        """
        self._api, self._unfixed = api, unfixed
        self._written: dict[Key, tuple[str, object]] = {}
        """The version we wrote to, and what it says since: until the follower has seen that."""

    def write(self, picture: Picture, out: Outbox, now: datetime) -> None:
        """Every policy of the API server says what holds of it."""
        found: dict[Key, tuple[str, object]] = {}
        for policy in picture.policies:
            key: Key = (GROUP, policy.origin.kind, policy.origin.namespace, policy.origin.name)
            documents = picture.documents.get(key, ())
            if not documents or not policy.uid:
                continue  # from a file: there is nowhere to write it
            version = str(documents[0].data.get("metadata", {}).get("resourceVersion", ""))
            written = self._written.get(key)
            newer = written is not None and written[0] == version
            observed = written[1] if written is not None and newer else _conditions_in(documents[0].data)
            conditions = self._conditions(policy, picture, now)
            records = condition_records(conditions, observed, now)
            if records is None:
                if written is not None and newer:
                    found[key] = written
                continue
            body = _status(policy, records)
            act = partial(
                self._api.apply, RESOURCES[policy.origin.kind], body, status=True, force=True, manager=MANAGER
            )
            plural = RESOURCES[policy.origin.kind].plural
            answer = out.write(f"patch {plural}/status", act, str(policy.origin))
            if answer is not None:
                found[key] = (version, _conditions_in(answer))
        self._written = found

    def _conditions(self, policy: BypassPolicy, picture: Picture, now: datetime) -> tuple[Condition, ...]:
        selected = Selected(picture.selected(policy), picture.bypassing)
        return policy_conditions(policy, selected, picture.reports, now, self._unfixed(policy))


def _status(policy: BypassPolicy, records: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    """With the UID: another object of its name is told nothing of this one."""
    metadata: dict[str, Any] = {"name": policy.origin.name, "uid": policy.uid}
    if policy.origin.namespace:
        metadata["namespace"] = policy.origin.namespace
    return {"kind": policy.origin.kind, "metadata": metadata, "status": {"conditions": list(records)}}


def _conditions_in(data: Mapping[str, Any]) -> object:
    status = data.get("status")
    return status.get("conditions") if isinstance(status, Mapping) else None
