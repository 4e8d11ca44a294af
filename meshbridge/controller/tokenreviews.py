"""Who calls the controller of a cluster: service account tokens of our node pods, as the API server reviews them.

A token counts for the node that its pod runs on. An answer is kept for some minutes, so that a reconnect costs nothing,
and asked for again after that; while the API server is away, a token it has accepted before is good until it expires,
and any other is refused.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import jwt
import structlog
from prometheus_client import Counter

from meshbridge.kube.api import ClusterError
from meshbridge.kube.tokenreview import TokenReview
from meshbridge.xds.auth import (
    AUDIENCE,
    AuthenticationError,
    Caller,
    Metadata,
    UnavailableError,
    bearer_token,
    node_caller,
)

log = structlog.get_logger()
T = TypeVar("T")

REVIEWS = Counter("meshbridge_controller_token_reviews", "Tokens the API server was asked about.", ["outcome"])

SERVICE_ACCOUNTS: Final = ("meshbridge-agent", "meshbridge-authz")
FRESH_S: Final = 300.0
"""How long an answer is not asked for again: within it a token outlives the pod it was issued to."""
EXPIRY_MARGIN_S: Final = 10.0
REFUSED_S: Final = 10.0
MAX_KEPT: Final = 8_192
MAX_UNDER_WAY: Final = 256
_THREADS: Final = 4


@dataclass(frozen=True, slots=True)
class _Accepted:
    caller: Caller
    fresh_until: float
    expires: float


@dataclass(frozen=True, slots=True)
class _Refused:
    what: str
    fix: str
    fresh_until: float


class TokenReviews:
    """Accepts tokens for the audience ``meshbridge`` of the service accounts that our node pods have.

    Args:
        review: asks the API server about a token; blocks.
        namespace: where our service accounts are.
        now: seconds since the epoch.
    """

    def __init__(
        self, review: Callable[[str], TokenReview], namespace: str, now: Callable[[], float] = time.time
    ) -> None:
        self._review, self._namespace, self._now = review, namespace, now
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="token-review")
        self._accepted: dict[bytes, _Accepted] = {}
        self._refused: dict[bytes, _Refused] = {}
        self._under_way: dict[bytes, asyncio.Task[_Accepted | _Refused]] = {}

    async def authenticate(self, metadata: Metadata) -> tuple[Caller, float]:
        token = bearer_token(metadata)
        digest = hashlib.sha256(token.encode()).digest()
        known: _Accepted | _Refused | None = self._accepted.get(digest) or self._refused.get(digest)
        if known is None or self._now() >= known.fresh_until:
            known = await self._ask(token, digest)
        if isinstance(known, _Refused):
            raise _refused(known.what, known.fix)
        left_s = known.expires - self._now()
        if left_s <= 0:
            raise _refused("the token has expired")
        return known.caller, left_s

    async def _ask(self, token: str, digest: bytes) -> _Accepted | _Refused:
        """What the API server says now; several callers with one token wait for one answer."""
        expires = _expiry(token, self._now())
        asking = self._under_way.get(digest)
        if asking is None:
            if len(self._under_way) >= MAX_UNDER_WAY:
                REVIEWS.labels("too-many").inc()
                raise UnavailableError("too many tokens are being reviewed", where="authorization", fix="try again")
            asking = asyncio.create_task(self._reviewed(token, digest, expires), name="review-token")
            self._under_way[digest] = asking
            asking.add_done_callback(lambda task: self._done(digest, task))
        try:
            return await asyncio.shield(asking)
        except ClusterError as error:
            before = self._accepted.get(digest)
            if before is not None and before.expires > self._now():
                return before
            raise UnavailableError(
                f"the API server cannot be asked about the token: {error}", where="authorization", fix="try again"
            ) from None

    async def _reviewed(self, token: str, digest: bytes, expires: float) -> _Accepted | _Refused:
        review = await asyncio.get_running_loop().run_in_executor(self._threads, self._review, token)
        now = self._now()
        self._accepted.pop(digest, None)
        try:
            caller = self._caller(review)
        except AuthenticationError as error:
            REVIEWS.labels("refused").inc()
            refused = _Refused(error.what, error.fix, now + REFUSED_S)
            _keep(self._refused, digest, refused)
            return refused
        REVIEWS.labels("accepted").inc()
        self._refused.pop(digest, None)
        accepted = _Accepted(caller, min(now + FRESH_S, expires - EXPIRY_MARGIN_S), expires)
        _keep(self._accepted, digest, accepted)
        return accepted

    def _done(self, digest: bytes, task: asyncio.Task[_Accepted | _Refused]) -> None:
        self._under_way.pop(digest, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            REVIEWS.labels("failed").inc()
            log.error("token.not_reviewed", reason=str(error))

    def _caller(self, review: TokenReview) -> Caller:
        if not review.authenticated:
            raise _refused(f"the API server does not accept the token: {review.reason or 'no reason given'}")
        if AUDIENCE not in review.audiences:
            raise _refused(f"the token is not for the audience {AUDIENCE!r}")
        ours = [f"system:serviceaccount:{self._namespace}:{name}" for name in SERVICE_ACCOUNTS]
        if review.user not in ours:
            raise _refused(f"{review.user[:200]!r} is no node: only {' and '.join(ours)} are")
        if not review.node:
            raise _refused(
                "the token is bound to no pod on a node", "mount a projected token; Kubernetes 1.30 or newer"
            )
        return node_caller(review.node)


def _keep(kept: dict[bytes, T], digest: bytes, value: T) -> None:
    """``value`` is the newest; the oldest go where there are too many."""
    kept.pop(digest, None)
    while len(kept) >= MAX_KEPT:
        del kept[next(iter(kept))]
    kept[digest] = value


def _expiry(token: str, now: float) -> float:
    """When the token expires, by its own words: they count only once the API server has verified them.

    What cannot be accepted costs no review.

    Raises:
        AuthenticationError: no JWT, one for somebody else, or one that never expires or has.
    """
    try:
        claims: dict[str, Any] = jwt.decode(token, options={"verify_signature": False})
    except (jwt.PyJWTError, ValueError, RecursionError):
        raise _refused("no service account token") from None
    audience, expires = claims.get("aud"), claims.get("exp")
    if AUDIENCE not in (audience if isinstance(audience, list) else [audience]):
        raise _refused(f"the token is not for the audience {AUDIENCE!r}")
    if isinstance(expires, bool) or not isinstance(expires, int | float):
        raise _refused("the token never expires")
    if expires <= now:
        raise _refused("the token has expired")
    return float(expires)


def _refused(
    what: str, fix: str = "present the projected token of a meshbridge-agent or meshbridge-authz pod"
) -> AuthenticationError:
    return AuthenticationError(what, where="authorization", fix=fix)
