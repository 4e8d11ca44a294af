"""What the controller says of this node: one immutable value per revision, read by request threads without a lock."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final

from meshbridge.identity.model import Entity, IpAddress, Peer, Workload
from meshbridge.identity.networks import NetworkIndex
from meshbridge.policy.l7 import RequestJudge
from meshbridge.policy.mesh import KeySource
from meshbridge.policy.policyset import PolicySet


@dataclass(frozen=True)
class NodeView:
    """One revision: the node's pods by address, who holds the other addresses, and the policies."""

    revision: int
    workloads: Mapping[IpAddress, Workload]
    holders: Mapping[IpAddress, Peer]
    policies: PolicySet

    @classmethod
    def of(
        cls, revision: int, workloads: Iterable[Workload], holders: Mapping[IpAddress, Peer], policies: PolicySet
    ) -> NodeView:
        """The view of a revision. An address of two live pods has no owner: none is judged by the other's policies."""
        owners: dict[IpAddress, Workload] = {}
        contested: set[IpAddress] = set()
        for workload in workloads:
            if workload.host_network or workload.phase in ("Succeeded", "Failed"):
                continue
            for address in workload.addresses:
                if address in owners:
                    contested.add(address)
                owners[address] = workload
        for address in contested:
            del owners[address]
        return cls(revision, owners, dict(holders), policies)

    @cached_property
    def _networks(self) -> NetworkIndex:
        return NetworkIndex(self.policies.referenced_networks())

    @cached_property
    def key_sources(self) -> tuple[KeySource, ...]:
        """The key sets that policies of this node name by address."""
        rules = (rule for policy in self.policies.request_authentication for rule in policy.rules)
        return tuple(dict.fromkeys(source for rule in rules if (source := rule.key_source) is not None))

    @cached_property
    def _judges(self) -> dict[tuple[str, str], RequestJudge]:
        return {}

    def judge_of(self, workload: Workload) -> RequestJudge:
        """Who decides the requests to one pod; made with its first request of the revision."""
        key = (workload.key, workload.uid)
        found = self._judges.get(key)
        if found is None:
            found = self._judges[key] = RequestJudge.of(workload, self.policies)
        return found

    @cached_property
    def _peers(self) -> dict[IpAddress, Peer]:
        return {}

    def peer_at(self, address: IpAddress) -> Peer | None:
        """Who holds ``address`` with the CIDRs that contain it; None when nobody known does."""
        found = self._peers.get(address)
        if found is not None:
            return found
        holder = self.holders.get(address)
        if holder is None and (workload := self.workloads.get(address)) is not None:
            holder = workload.peer(cluster=self.policies.mesh.cluster)
        if holder is None:
            return None
        # Bounded by the addresses the controller has sent: others never get here.
        found = self._peers[address] = replace(holder, networks=self._networks.containing(address))
        return found

    def source_at(self, address: IpAddress) -> Peer:
        """Who network policies take a source for: an address that nobody known holds is the world's."""
        return self.peer_at(address) or replace(_WORLD[address.version], networks=self._networks.containing(address))


_WORLD: Final = {
    4: Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4})),
    6: Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV6})),
}


class CurrentView:
    """The newest view, replaced by one thread and read by all; None until the first revision."""

    def __init__(self) -> None:
        self._view: NodeView | None = None
        self._changed = threading.Condition()

    def get(self) -> NodeView | None:
        return self._view

    def set(self, view: NodeView) -> None:
        """Make ``view`` what every later request sees."""
        with self._changed:
            self._view = view
            self._changed.notify_all()

    def newer_than(self, view: NodeView, timeout_s: float) -> NodeView:
        """The view that replaces ``view``, or ``view`` itself when none has after ``timeout_s``."""
        with self._changed:
            self._changed.wait_for(lambda: self._view is not view, timeout_s)
            return self._view or view
