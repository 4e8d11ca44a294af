"""Which interface belongs to which pod, under which numbers: values and decisions, no system calls.

An interface gets a new incarnation whenever it, or the pod behind it, is not surely the one known before; so no flow,
policy or address of an earlier pod is ever inherited.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Final

from meshbridge.agent.view import LocalPod
from meshbridge.datapath.links import Link, NodeNetwork
from meshbridge.identity.model import IpAddress

UNKNOWN_POD: Final = ""


@dataclass(frozen=True, slots=True)
class Hooked:
    """An interface under our programs. ``uid`` is empty for one found after a restart and not yet claimed by a pod.

    ``late``: found when its pod may have been running already, rather than announced before.
    """

    ifindex: int
    name: str
    id: int
    incarnation: int
    uid: str = UNKNOWN_POD
    mac: bytes | None = None
    late: bool = False


@dataclass(slots=True)
class Endpoints:
    """The interfaces of this node's pods.

    Args:
        highest_id: the highest endpoint number ever seen; numbers go up, so that events name one pod only.
        highest_incarnation: likewise; the clock at start keeps it above those of agents before.
    """

    highest_id: int = 0
    highest_incarnation: int = 0
    hooked: dict[int, Hooked] = field(default_factory=dict)
    _known: frozenset[str] = frozenset()

    def take(self, link: Link, uid: str, mac: bytes | None, *, late: bool = False) -> Hooked:
        """The interface is the pod's from now on; the same again when it was already."""
        known = self.hooked.get(link.ifindex)
        if known is not None and known.uid == uid and known.name == link.name:
            self.hooked[link.ifindex] = replace(known, mac=mac or known.mac)
            return self.hooked[link.ifindex]
        self.highest_id += 1
        self.highest_incarnation += 1
        found = Hooked(link.ifindex, link.name, self.highest_id, self.highest_incarnation, uid, mac, late)
        self.hooked[link.ifindex] = found
        return found

    def resume(self, ifindex: int, uid: str, mac: bytes | None) -> None:
        """An interface that outlived the agent before belongs to this pod, as it did: its flows stay."""
        self.hooked[ifindex] = replace(self.hooked[ifindex], uid=uid, mac=mac)

    def release(self, ifindexes: Iterable[int]) -> None:
        """These interfaces are gone, or their pods are."""
        for ifindex in ifindexes:
            self.hooked.pop(ifindex, None)

    def of_pod(self, uid: str) -> list[Hooked]:
        return [hooked for hooked in self.hooked.values() if hooked.uid == uid]

    def abandoned(self, pods: Set[str]) -> frozenset[int]:
        """Interfaces whose pod was among ``pods``, all UIDs there are, at an earlier call and is no longer.

        One that was announced for a pod nobody has told of yet is not abandoned.
        """
        held = {hooked.uid for hooked in self.hooked.values()}
        self._known = frozenset((self._known & held) | pods)
        return frozenset(i for i, hooked in self.hooked.items() if hooked.uid in self._known - pods)

    def unclaimed(self) -> dict[int, Hooked]:
        """Interfaces found after a restart that no pod has claimed yet."""
        return {ifindex: hooked for ifindex, hooked in self.hooked.items() if hooked.uid == UNKNOWN_POD}


def sources_of(pod: LocalPod, is_held: Callable[[IpAddress], bool]) -> frozenset[IpAddress]:
    """The source addresses a pod may use: its own, and those extra ones that nobody holds.

    Whoever may annotate a pod could otherwise have it send with another pod's or the node's identity.
    """
    return frozenset((*pod.workload.addresses, *(a for a in pod.extra_addresses if not is_held(a))))


def find_interfaces(
    pods: Mapping[str, LocalPod],
    endpoints: Endpoints,
    network: NodeNetwork,
    pinned_addresses: Mapping[int, frozenset[IpAddress]],
    abandoned: Set[int] = frozenset(),
) -> Iterator[tuple[str, Link, bool]]:
    """(pod UID, interface, whether it is resumed) for every pod that has none yet.

    An interface that was hooked before a restart and carried one of the pod's addresses is the pod's still: hooks die
    with their device, and a device serves one pod. Else the route to one of its addresses shows the interface, which
    may be ``abandoned``: what was taken for the pod that had the address before, as its end was told late.

    So is every further interface that leads into the network namespace of one that is known.
    """
    unclaimed = endpoints.unclaimed()
    claimed: set[int] = set()
    for uid, pod in sorted(pods.items()):
        if not pod.is_hooked or endpoints.of_pod(uid):
            continue
        addresses = pod.workload.addresses
        for ifindex in sorted(unclaimed.keys() - claimed):
            link = network.links.get(ifindex)
            if link is not None and not pinned_addresses.get(ifindex, frozenset()).isdisjoint(addresses):
                claimed.add(ifindex)
                yield uid, link, True
        for ifindex in sorted({network.pod_routes[address] for address in addresses if address in network.pod_routes}):
            link = network.links.get(ifindex)
            free = ifindex not in endpoints.hooked or ifindex in unclaimed or ifindex in abandoned
            if link is not None and free and ifindex not in claimed:
                claimed.add(ifindex)
                yield uid, link, False
    namespaces = {
        link.peer_netns: hooked.uid
        for hooked in endpoints.hooked.values()
        if hooked.uid in pods and pods[hooked.uid].is_hooked
        and (link := network.links.get(hooked.ifindex)) is not None and link.peer_netns is not None
    }  # fmt: skip
    for ifindex, link in sorted(network.links.items()):
        if link.peer_netns in namespaces and ifindex not in endpoints.hooked and ifindex not in claimed:
            claimed.add(ifindex)
            yield namespaces[link.peer_netns], link, False
