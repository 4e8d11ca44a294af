"""Root tests of the kernel programs: one set of maps and programs for the session, empty for each test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from harness import DENY_ALL, FROM_POD, POD_MAC, TO_POD, Harness, Outcome

POD4, POD6, PEER4, PEER6, NODE4, NODE6 = "10.0.0.5", "fd00::5", "10.0.0.9", "fd00::9", "10.0.0.1", "fd00::1"
POD_IDENTITY, PEER_IDENTITY, MASQUERADED = 300, 500, 600
ALLOW, DENY = 1, 2


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.root)


@pytest.fixture(scope="session")
def loaded() -> Iterator[Harness]:
    with Harness.open() as harness:
        yield harness


@pytest.fixture
def kernel(loaded: Harness) -> Iterator[Harness]:
    """The real programs with empty maps."""
    loaded.clear()
    yield loaded
    loaded.clear()


@dataclass
class Pod:
    """A pod with both addresses, set ALLOW everywhere; set DENY exists. PEER and NODE are known addresses."""

    kernel: Harness
    ifindex: int
    incarnation: int
    revision: int = 1

    def receive(self, packet: bytes, **extra: Any) -> Outcome:
        return self.kernel.run(self.ifindex, TO_POD, packet, **extra)

    def send(self, packet: bytes, **extra: Any) -> Outcome:
        return self.kernel.run(self.ifindex, FROM_POD, packet, **extra)

    def change(self, *, ingress: int | None = None, egress: int | None = None, **fields: Any) -> None:
        """Another policy, and with it another revision; or other fields."""
        if ingress is not None or egress is not None:
            self.revision += 1
            fields["sets"] = (ingress or ALLOW, ingress or ALLOW, egress or ALLOW, egress or ALLOW)
            fields["revision"] = self.revision
        self.kernel.change(self.ifindex, **fields)

    def flows(self) -> int:
        return len(self.kernel.flows(self.incarnation))


@pytest.fixture
def pod(kernel: Harness) -> Pod:
    kernel.policy_set(ALLOW)
    kernel.policy_set(DENY, network=DENY_ALL)
    for address in (PEER4, PEER6):
        kernel.peer(address, PEER_IDENTITY)
    for address in (NODE4, NODE6):
        kernel.peer(address, 1, forwarded=MASQUERADED)
    ifindex = kernel.interfaces[0]
    incarnation = kernel.endpoint(ifindex, [POD4, POD6], sets=(ALLOW,) * 4, identity=POD_IDENTITY, mac=POD_MAC)
    return Pod(kernel, ifindex, incarnation)
