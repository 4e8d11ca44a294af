"""One replica writes into the cluster, as long as the Lease is its own; the others wait, and serve all the same."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Protocol

import structlog
from prometheus_client import Gauge

from meshbridge.kube.lease import Election
from meshbridge.kube.problems import Problem, ProblemReason

log = structlog.get_logger()

LEADER = Gauge("meshbridge_controller_leader", "Whether this replica is the one that writes into the cluster.")


class Writer(Protocol):
    async def write_until(self, stop: asyncio.Event) -> None:
        """Write what is to be written, until ``stop``; nothing is under way any more when it returns."""


async def lead(election: Election, writer: Writer, report: Callable[[frozenset[Problem]], None]) -> None:
    """Have ``writer`` write whenever the lease is this replica's; let it go when cancelled.

    Args:
        report: is told what keeps the lease from being acquired or renewed.
    """
    stop, writing = asyncio.Event(), None
    try:
        while True:
            await asyncio.to_thread(election.attempt)
            leading = election.held_for_s > 0
            LEADER.set(leading)
            failing = frozenset([Problem(ProblemReason.UNWRITABLE, election.problem)] if election.problem else [])
            report(failing)
            if writing is not None and writing.done():
                _tell_why(writing)
                writing = None
            if leading and writing is None:
                log.info("writer.started", lease=str(election), identity=election.identity)
                stop = asyncio.Event()
                writing = asyncio.create_task(writer.write_until(stop), name="write")
            elif not leading and writing is not None:
                log.warning("writer.stopped", lease=str(election), identity=election.identity)
                stop.set()
                await writing
                writing = None
            await asyncio.sleep(election.look_again_s * random.uniform(1.0, 1.1))
    finally:
        stop.set()
        if writing is not None:
            await asyncio.gather(writing, return_exceptions=True)
        LEADER.set(0)
        await asyncio.to_thread(election.release)


def _tell_why(writing: asyncio.Task[None]) -> None:
    """It never should: a writer that trips must not keep policy from any node, so it is only begun anew."""
    error = writing.exception()
    log.error("writer.failed", reason=repr(error), exc_info=error)
