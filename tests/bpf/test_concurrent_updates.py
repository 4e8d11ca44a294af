"""Packets judged while user space replaces entries: nobody is judged by an entry that has become another pod's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from conftest import ALLOW, DENY, PEER4, PEER_IDENTITY, POD4
from harness import DENY_ALL, FROM_POD, TO_POD, Harness, tcp

from meshbridge import abi

OTHER4 = "10.0.0.6"


@contextmanager
def _replacing(write: Callable[[], None]) -> Iterator[None]:
    """Write again and again, on another CPU when there is one."""
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            write()

    writer = threading.Thread(target=work)
    writer.start()
    try:
        yield
    finally:
        stop.set()
        writer.join()


def _passed(kernel: Harness) -> int:
    return sum(packets for (reason, _), (packets, _) in kernel.maps.counters().items() if not reason)


@pytest.fixture
def pods(kernel: Harness) -> tuple[int, int]:
    """A pod that denies everything, and one that allows everything."""
    denied, allowed = kernel.interfaces[:2]
    kernel.policy_set(ALLOW)
    kernel.policy_set(DENY, DENY_ALL)
    kernel.endpoint(denied, [POD4], sets=(DENY,) * 4, identity=300)
    kernel.endpoint(allowed, [OTHER4], sets=(ALLOW,) * 4, identity=301)
    kernel.peer(PEER4, PEER_IDENTITY)
    return denied, allowed


def test_an_entry_that_speaks_of_another_interface_is_never_used(kernel: Harness, pods: tuple[int, int]) -> None:
    denied, allowed = pods
    kernel.change(allowed, ifindex=denied)
    outcome = kernel.run(allowed, FROM_POD, tcp(OTHER4, PEER4, 40000, 80))
    assert outcome.reason is abi.DropReason.DROP_ENDPOINT_NOT_READY
    kernel.change(allowed, ifindex=allowed, ifindex_again=denied)
    outcome = kernel.run(allowed, FROM_POD, tcp(OTHER4, PEER4, 40000, 80))
    assert outcome.reason is abi.DropReason.DROP_ENDPOINT_NOT_READY


def test_endpoints_replaced_under_traffic_never_lend_each_other_their_policy(
    kernel: Harness, pods: tuple[int, int]
) -> None:
    before = _passed(kernel)
    keys = [abi.EndpointKey(ifindex=ifindex) for ifindex in pods]
    values = [(key, value) for key in keys if (value := kernel.maps.endpoints.get(key))]
    with _replacing(lambda: kernel.maps.endpoints.put_many(values * 100)):
        for hook, packet in ((TO_POD, tcp(PEER4, POD4, 40000, 80)), (FROM_POD, tcp(POD4, PEER4, 40000, 80))):
            kernel.measure(pods[0], hook, packet, repeat=300_000)
    assert _passed(kernel) == before
