"""Objects of our own that replicas share: what a Secret holds, what a ConfigMap says, whom webhooks' callers believe.

Whoever comes first writes; whoever is late reads what is there. Everything here blocks.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from typing import Any, Final
from urllib.parse import quote

from meshbridge.kube.api import CONFLICT, NOT_FOUND, Api, ClusterError, RefusedError

ATTEMPTS: Final = 5
LABELS: Final = {"app.kubernetes.io/name": "meshbridge", "app.kubernetes.io/managed-by": "meshbridge"}
WEBHOOK_CONFIGURATIONS: Final = ("validatingwebhookconfigurations", "mutatingwebhookconfigurations")

Change = Callable[[Mapping[str, bytes]], Mapping[str, bytes]]


def keep_secret(api: Api, namespace: str, name: str, change: Change) -> Mapping[str, bytes]:
    """What the Secret holds once ``change`` of what it held is written, or nothing had to be.

    ``change`` may be called again: when another replica wrote meanwhile, it is asked about what that one wrote.

    Raises:
        ClusterError: the server cannot be reached, refuses, or others write faster than we.
    """

    def values(found: Mapping[str, Any]) -> dict[str, bytes]:
        try:
            return {key: base64.b64decode(str(value), validate=True) for key, value in found.items()}
        except (binascii.Error, ValueError):
            raise api.strange(f"Secret {namespace}/{name} with data that is no base64") from None

    def encoded(data: Mapping[str, bytes]) -> dict[str, str]:
        return {key: base64.b64encode(value).decode() for key, value in data.items()}

    body = {"apiVersion": "v1", "kind": "Secret", "type": "Opaque"}
    return values(_keep(api, "secrets", namespace, name, body, lambda found: encoded(change(values(found)))))


def keep_config_map(api: Api, namespace: str, name: str, data: Mapping[str, str]) -> None:
    """The ConfigMap says ``data``; what else it says stays.

    Raises:
        ClusterError: the server cannot be reached, refuses, or others write faster than we.
    """
    body = {"apiVersion": "v1", "kind": "ConfigMap"}
    _keep(api, "configmaps", namespace, name, body, lambda found: {**found, **data})


def _keep(
    api: Api,
    plural: str,
    namespace: str,
    name: str,
    body: Mapping[str, Any],
    change: Callable[[Mapping[str, str]], Mapping[str, str]],
) -> Mapping[str, str]:
    collection = f"/api/v1/namespaces/{quote(namespace, safe='')}/{plural}"
    path = f"{collection}/{quote(name, safe='')}"
    for _ in range(ATTEMPTS):
        try:
            found = _found(api, path)
            held = _strings(found.get("data")) if found else {}
            wanted = dict(change(held))
            if found is None:
                metadata = {"name": name, "namespace": namespace, "labels": LABELS}
                api.post(collection, {**body, "metadata": metadata, "data": wanted})
            elif wanted != held:
                gone = dict.fromkeys(held.keys() - wanted.keys())
                api.patch(path, {"metadata": {"resourceVersion": _version(found)}, "data": {**wanted, **gone}})
            return wanted
        except RefusedError as refused:
            if refused.code != CONFLICT:
                raise _error(api, refused, path) from None
    raise ClusterError(f"{path} changes faster than it can be written", where=api.where, fix="what else writes it?")


def trust_webhook(api: Api, configuration: str, service: tuple[str, str], bundle: bytes) -> bool:
    """Have API servers believe ``bundle`` when they call ``service`` for a webhook of this configuration.

    Other webhooks in it, and whatever else it says, stay. False where neither configuration of that name is there.

    Args:
        configuration: name of a ValidatingWebhookConfiguration, a MutatingWebhookConfiguration, or both.
        service: namespace and name.

    Raises:
        ClusterError: the server cannot be reached, or refuses.
    """
    encoded = base64.b64encode(bundle).decode()
    present = False
    for plural in WEBHOOK_CONFIGURATIONS:
        path = f"/apis/admissionregistration.k8s.io/v1/{plural}/{quote(configuration, safe='')}"
        for _ in range(ATTEMPTS):
            try:
                found = _found(api, path)
                if found is None:
                    break
                present = True
                told = [_told(webhook, service, encoded) for webhook in found.get("webhooks") or []]
                if told != found.get("webhooks"):
                    api.patch(path, {"metadata": {"resourceVersion": _version(found)}, "webhooks": told})
                break
            except RefusedError as refused:
                if refused.code != CONFLICT:
                    raise _error(api, refused, path) from None
    return present


def _told(webhook: Mapping[str, Any], service: tuple[str, str], bundle: str) -> Mapping[str, Any]:
    client = webhook.get("clientConfig")
    named = client.get("service") if isinstance(client, Mapping) else None
    if not isinstance(named, Mapping) or (named.get("namespace"), named.get("name")) != service:
        return webhook
    return {**webhook, "clientConfig": {**client, "caBundle": bundle}}  # type: ignore[dict-item]  # a Mapping, see above


def _found(api: Api, path: str) -> Mapping[str, Any] | None:
    try:
        return api.get(path)
    except RefusedError as refused:
        if refused.code == NOT_FOUND:
            return None
        raise


def _version(found: Mapping[str, Any]) -> str:
    metadata = found.get("metadata")
    return str(metadata.get("resourceVersion") or "") if isinstance(metadata, Mapping) else ""


def _strings(value: Any) -> dict[str, str]:
    return {str(key): str(item) for key, item in value.items()} if isinstance(value, Mapping) else {}


def _error(api: Api, refused: RefusedError, path: str) -> ClusterError:
    error = api.error(refused)
    return ClusterError(f"{error.what} ({path})", where=error.where, fix=error.fix)
