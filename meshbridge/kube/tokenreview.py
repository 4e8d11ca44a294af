"""What the API server says of a service account's token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from meshbridge.kube.api import Api, RefusedError

PATH: Final = "/apis/authentication.k8s.io/v1/tokenreviews"
NODE_NAME: Final = "authentication.kubernetes.io/node-name"
ANSWER_S: Final = 10.0
_MAX_REASON: Final = 200


@dataclass(frozen=True, slots=True)
class TokenReview:
    """``node`` is where the pod runs that the token was issued to; empty for a token that is bound to none."""

    authenticated: bool
    user: str = ""
    node: str = ""
    audiences: tuple[str, ...] = ()
    reason: str = ""


def review_token(api: Api, token: str, audience: str) -> TokenReview:
    """Whether the API server accepts ``token`` for ``audience``, and whose it is. Blocking.

    Raises:
        ClusterError: the server cannot be reached, does not let us ask, or answers something else.

    Spec: authentication.k8s.io/v1 TokenReview; KEP-4193 for the node's name.
    """
    body = {
        "apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview",
        "spec": {"token": token, "audiences": [audience]},
    }  # fmt: skip
    try:
        status = api.post(PATH, body, ANSWER_S).get("status")
    except RefusedError as refused:
        raise api.error(refused) from None
    if not isinstance(status, Mapping):
        raise api.strange("a TokenReview without status")
    user = status.get("user")
    user = user if isinstance(user, Mapping) else {}
    extra = user.get("extra")
    nodes = _strings(extra.get(NODE_NAME)) if isinstance(extra, Mapping) else ()
    return TokenReview(
        authenticated=status.get("authenticated") is True,
        user=str(user.get("username") or ""),
        node=nodes[0] if len(nodes) == 1 else "",
        audiences=_strings(status.get("audiences")),
        reason=str(status.get("error") or "")[:_MAX_REASON],
    )


def _strings(value: Any) -> tuple[str, ...]:
    return tuple(map(str, value)) if isinstance(value, list) else ()
