"""One Check from bytes to bytes: who asks whom, is the certificate the address's, what does policy say."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import structlog

from meshbridge.authz import metrics
from meshbridge.authz.answer import UNAUTHORIZED, UNAVAILABLE, Answer, Reason, refuse
from meshbridge.authz.binding import Binding, compare
from meshbridge.authz.caller import LOCAL, Caller, why_not
from meshbridge.authz.keysets import KeySets
from meshbridge.authz.outputs import Headers, outputs_of
from meshbridge.authz.request import Check, HttpRequest, UnusableCheckError, decode_check, forwarded_for
from meshbridge.authz.response import encode_answer
from meshbridge.authz.tokens import BadToken, TokenVerifier, Verified
from meshbridge.authz.view import CurrentView, NodeView
from meshbridge.identity.model import IpAddress, Peer, Workload
from meshbridge.policy.l7 import Request, RequestDecision
from meshbridge.policy.mesh import Claims, JwtRule

log = structlog.get_logger()

REREAD_S: Final = 0.05
"""How long a decision waits for a newer revision where the one at hand speaks against a request that may be right."""

REREAD_MEMORY_S: Final = 1.0
MAX_REREADS: Final = 4096
MAX_WAITING: Final = 4
"""Decisions that wait at once: whoever reaches the socket can raise doubts, and may not hold every thread by them."""

MAX_NAMED_POLICIES: Final = 3
MAX_LOGGED: Final = 512
"""Characters of anything a caller wrote."""
REFUSED_RULE: Final = "refused"
NOT_HTTP: Final = HttpRequest("", "", "", {})


@dataclass(slots=True)
class _Rereads:
    """What was waited for lately: the same doubt does not hold a thread twice, and all of them only a few."""

    clock: Callable[[], float] = time.monotonic
    _seen: OrderedDict[object, float] = field(default_factory=OrderedDict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _waiting: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(MAX_WAITING))

    def newer(self, current: CurrentView, view: NodeView, doubt: object) -> NodeView:
        """The view that replaces ``view`` within REREAD_S, or ``view`` where none does or nobody may wait."""
        if not self._waiting.acquire(blocking=False):
            return view
        try:
            return current.newer_than(view, REREAD_S) if self._first_time(doubt) else view
        finally:
            self._waiting.release()

    def _first_time(self, doubt: object) -> bool:
        now = self.clock()
        with self._lock:
            fresh = now - self._seen.pop(doubt, -REREAD_MEMORY_S) >= REREAD_MEMORY_S
            self._seen[doubt] = now
            while len(self._seen) > MAX_REREADS:
                self._seen.popitem(last=False)
        return fresh


@dataclass(slots=True)
class _Trail:
    """What the log line says besides the answer."""

    check: Check | None = None
    workload: Workload | None = None
    binding: Binding | None = None


class Judge:
    """Answers Checks from the newest view. Whatever goes wrong is a refusal, a log line and a count."""

    def __init__(self, current: CurrentView, key_sets: KeySets | None = None) -> None:
        self._current = current
        self._tokens = TokenVerifier(key_sets)
        self._rereads = _Rereads()

    def check(self, data: bytes, caller: Caller = LOCAL) -> bytes:
        """Answer one serialised CheckRequest of ``caller``; never raises."""
        started = time.perf_counter()
        trail = _Trail()
        try:
            answer = self._answer(data, caller, trail)
        except UnusableCheckError as error:
            answer = refuse(Reason.BAD_REQUEST, str(error))
        except Exception:
            metrics.FAILURES.inc()
            log.exception("check.failed")
            answer = refuse(Reason.FAILURE, "the authorization server failed; see its log", status=UNAVAILABLE)
        took_s = time.perf_counter() - started
        metrics.LATENCY.observe(took_s)
        metrics.DECISIONS.labels("allow" if answer.allowed else "deny", answer.reason, answer.policy).inc()
        _log(answer, trail, took_s)
        return encode_answer(answer)

    def _answer(self, data: bytes, caller: Caller, trail: _Trail) -> Answer:
        view = self._current.get()
        if view is None:
            return refuse(Reason.NOT_READY, "this node has no policies from the controller yet", status=UNAVAILABLE)
        check = trail.check = decode_check(data)
        view, workload = self._destination(view, check.destination)
        if workload is None:
            text = f"{check.destination} is no pod of this node that the controller knows"
            return refuse(Reason.UNKNOWN_WORKLOAD, text, status=UNAVAILABLE)
        trail.workload = workload
        if strange := why_not(caller, workload, view.policies.mesh):
            return refuse(Reason.CALLER, f"{strange}: an Envoy is told about its own pod alone")
        view, trail.binding = self._bind(view, check)
        metrics.BINDINGS.labels(trail.binding).inc()
        if trail.binding is Binding.DIFFERS:
            return _refuse_identity(check, view)
        judge = view.judge_of(workload)
        token = self._token(check, judge.jwt_rules)
        claims = token.claims if isinstance(token, Verified) else token
        sets: Headers = ()
        removes: tuple[str, ...] = ()
        if check.claims is None and check.http is not None:
            sets, removes = outputs_of(judge.jwt_rules, token if isinstance(token, Verified) else None)
            # As jwt_authn does before Istio judges: what a client writes where claims go counts for nothing.
            check = replace(check, http=_rewritten(check.http, sets, removes))
        answer = _answer_of(judge.decide(_request_of(check, claims, view.source_at(check.source))))
        if not answer.allowed or not check.owns_tokens:
            return answer
        return replace(answer, sets=sets, removes=removes)

    def _destination(self, view: NodeView, address: IpAddress) -> tuple[NodeView, Workload | None]:
        """The pod at ``address``; one that has just been created may be in the next revision."""
        workload = view.workloads.get(address)
        if workload is None:
            view = self._rereads.newer(self._current, view, address)
            workload = view.workloads.get(address)
        return view, workload

    def _bind(self, view: NodeView, check: Check) -> tuple[NodeView, Binding]:
        """Compare certificate and address; where they differ the address may have just found its new owner."""
        binding = compare(check.principal, view.peer_at(check.source), view.policies.mesh)
        if binding is Binding.DIFFERS:
            view = self._rereads.newer(self._current, view, (check.source, check.principal))
            binding = compare(check.principal, view.peer_at(check.source), view.policies.mesh)
        return view, binding

    def _token(self, check: Check, rules: Sequence[JwtRule]) -> Claims | Verified | BadToken | None:
        """What jwt_authn has verified, else what we verify ourselves."""
        if check.claims is not None or check.http is None or not rules:
            return check.claims
        return self._tokens.token_of(rules, check.http.headers, check.http.path)


def _rewritten(http: HttpRequest, sets: Headers, removes: Sequence[str]) -> HttpRequest:
    """The request with these headers set and those removed."""
    if not sets and not removes:
        return http
    gone = {*dict(sets), *removes}
    kept = {name: value for name, value in http.headers.items() if name not in gone}
    repeated = {name: values for name, values in http.repeated.items() if name not in gone}
    return replace(http, headers=kept | dict(sets), repeated=repeated)


def _request_of(check: Check, token: Claims | BadToken | None, peer: Peer) -> Request:
    """The request as policies see it."""
    http = check.http or NOT_HTTP
    return Request(
        source=check.source,
        port=check.destination_port,
        destination=check.destination,
        principal=check.principal or None,
        sni=check.sni,
        http=check.http is not None,
        method=http.method,
        path=http.path,
        host=http.host,
        headers=http.headers,
        repeated=http.repeated,
        remote=forwarded_for(http.headers.get("x-forwarded-for", "")) or check.source,
        claims=() if token is None or isinstance(token, BadToken) else (token,),
        token_error=token.reason if isinstance(token, BadToken) else "",
        peer=peer,
    )


def _answer_of(decision: RequestDecision) -> Answer:
    # A default deny comes from every ALLOW policy there is; a few of them tell enough.
    origins = decision.origins[:MAX_NAMED_POLICIES]
    policy = ", ".join(dict.fromkeys(origin.policy for origin in origins))
    rule = "; ".join(str(origin) for origin in origins)
    if decision.allowed:
        reason = Reason.ALLOWED if origins else Reason.NO_POLICY
        return Answer(True, reason, decision.reason, policy, rule)
    text = decision.reason
    for origin in origins:
        # The file and line are for the log; a client is told the object.
        text = text.replace(str(origin), f"{origin.kind} {origin.policy}")
        if origin.rule == REFUSED_RULE:
            text = f"{origin.kind} {origin.policy} is refused and may deny this; see meshbridge status"
    if decision.unauthenticated:
        return Answer(False, Reason.BAD_TOKEN, text, policy, rule, UNAUTHORIZED)
    return Answer(False, Reason.POLICY, text, policy, rule)


def _refuse_identity(check: Check, view: NodeView) -> Answer:
    holder = view.peer_at(check.source)
    owner = f"{holder.namespace}/{holder.service_account}" if holder else "nobody"
    text = f"the certificate names {check.principal}, but {check.source} is a pod of service account {owner}"
    return refuse(Reason.IDENTITY, text)


def _log(answer: Answer, trail: _Trail, took_s: float) -> None:
    """One line per decision. Query strings may carry tokens and are left out; what a caller writes is cut."""
    fields: dict[str, Any] = {
        "verdict": "allow" if answer.allowed else "deny",
        "reason": str(answer.reason),
        "policy": answer.policy,
        "rule": answer.rule,
        "duration_us": round(took_s * 1e6),
    }
    if not answer.allowed:
        fields["detail"] = answer.text[:MAX_LOGGED]
    if trail.workload is not None:
        fields["pod"] = trail.workload.key
    if trail.binding is not None:
        fields["identity"] = str(trail.binding)
    if (check := trail.check) is not None:
        principal = check.principal[:MAX_LOGGED]
        fields |= {"source": str(check.source), "principal": principal, "port": check.destination_port}
        if check.http is not None:
            fields |= {
                "method": check.http.method[:MAX_LOGGED],
                "path": check.http.path.partition("?")[0][:MAX_LOGGED],
                "request_id": check.http.request_id[:MAX_LOGGED],
            }
    log.info("check.decided", **fields)
