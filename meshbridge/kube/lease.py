"""Who of several replicas writes: the one that holds a Lease.

Whether another's lease has run out is judged by this process's own clock, since it saw the lease change last; the times
written in it are for people. So clocks of machines may differ, and only their speed has to agree.

A holder stops writing some time before others may take over: ``held_for_s`` counts from before its last renewal was
sent, and the server gives up writes of ours that take longer than that time (``kube.api.WRITE_S``).

Spec: coordination.k8s.io/v1 Lease, as client-go's leaderelection uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

import structlog

from meshbridge.errors import MeshBridgeError
from meshbridge.kube.api import CONFLICT, FORBIDDEN, WRITE_S, Api, RefusedError, Resource

log = structlog.get_logger()

LEASES: Final = Resource("coordination.k8s.io", "v1", "leases", "Lease", True)
LONGEST_S: Final = 3_600
"""A lease that says it lasts longer is taken to last this long."""


@dataclass(frozen=True, slots=True)
class Timing:
    """``duration_s``: how long others wait for a holder that is silent; ``retry_s``: how often is tried or renewed."""

    duration_s: int = 15
    retry_s: float = 2.0

    @property
    def write_s(self) -> float:
        """How long after a renewal its holder may write."""
        return self.duration_s - WRITE_S


@dataclass(slots=True)
class Election:
    """One replica's part. ``identity`` is its own alone, also after a restart: a lease is never taken for one's own."""

    api: Api
    namespace: str
    name: str
    identity: str
    timing: Timing = Timing()
    clock: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    problem: str = ""
    """Why the last attempt failed; empty when it did not."""
    _seen: Mapping[str, Any] = field(default_factory=dict)
    _seen_at: float = 0.0
    _until: float = 0.0

    @property
    def held_for_s(self) -> float:
        """For how long this replica may still write without asking again; 0: it may not."""
        return max(self._until - self.clock(), 0.0)

    @property
    def look_again_s(self) -> float:
        """When to attempt next: soon, and not later than another's lease runs out."""
        lasts_s = self._lasts_s()
        left_s = self._seen_at + lasts_s - self.clock() if lasts_s else 0.0
        return min(self.timing.retry_s, left_s) if left_s > 0 else self.timing.retry_s

    def attempt(self) -> None:
        """Acquire the lease, or renew it, or see that it is another's. Blocks for a few seconds at most."""
        try:
            self._attempt()
            self._tell("")
        except RefusedError as refused:
            if refused.code == CONFLICT:
                return  # another was faster; the next look shows who
            fix = "give the controller's role the verbs get and update on it, or create where it is missing"
            error = MeshBridgeError(
                f"answers {refused.code}: {refused.message}", where=str(self),
                fix=fix if refused.code == FORBIDDEN else "try again",
            )  # fmt: skip
            self._tell(str(error))
        except MeshBridgeError as error:
            self._tell(str(error))

    def release(self) -> None:
        """Let the next one have it at once. Nothing may be written any more when this is called."""
        if not self._until:
            return
        self._until = 0.0
        try:
            self._write({**self._spec(), "holderIdentity": "", "leaseDurationSeconds": 1})
            log.info("lease.released", lease=str(self))
        except (MeshBridgeError, RefusedError) as error:
            log.warning("lease.not_released", lease=str(self), reason=str(error))  # it runs out

    def __str__(self) -> str:
        return f"Lease {self.namespace}/{self.name}"

    def _attempt(self) -> None:
        found = self.api.read(LEASES, self.namespace, self.name)
        self._look(found or {})
        if found is not None and not self._may_take():
            self._until = 0.0
            return
        sent_at = self.clock()
        self._write(self._spec(), create=found is None)
        if not self._until:
            log.info("lease.acquired", lease=str(self), identity=self.identity)
        self._until = sent_at + self.timing.write_s

    def _look(self, lease: Mapping[str, Any]) -> None:
        """Every change of the lease begins its time anew."""
        if lease != self._seen or not lease:
            self._seen, self._seen_at = lease, self.clock()

    def _may_take(self) -> bool:
        return self.clock() >= self._seen_at + self._lasts_s()

    def _lasts_s(self) -> float:
        """How long another's lease lasts; 0 where it is nobody else's."""
        spec = _spec_of(self._seen)
        holder, duration = spec.get("holderIdentity"), spec.get("leaseDurationSeconds")
        if not holder or holder == self.identity:
            return 0.0
        return min(duration, LONGEST_S) if isinstance(duration, int) and duration > 0 else self.timing.duration_s

    def _spec(self) -> dict[str, Any]:
        before = _spec_of(self._seen)
        now = self.now().strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {**before, "leaseDurationSeconds": self.timing.duration_s, "renewTime": now}
        if before.get("holderIdentity") != self.identity:
            transitions = before.get("leaseTransitions")
            count = transitions + 1 if isinstance(transitions, int) else 0
            spec |= {"holderIdentity": self.identity, "acquireTime": now, "leaseTransitions": count}
        return spec

    def _write(self, spec: Mapping[str, Any], *, create: bool = False) -> None:
        if create:
            metadata: Mapping[str, Any] = {"namespace": self.namespace, "name": self.name}
            written = self.api.create(LEASES, {"kind": "Lease", "metadata": metadata, "spec": spec})
        else:
            written = self.api.replace(LEASES, {**self._seen, "kind": "Lease", "spec": spec})
        self._look(written)

    def _tell(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("lease.failed", lease=str(self), reason=problem)
        self.problem = problem


def _spec_of(lease: Mapping[str, Any]) -> Mapping[str, Any]:
    spec = lease.get("spec")
    return spec if isinstance(spec, Mapping) else {}
