"""Who holds each address, and the same as resources with labels trimmed to what a reader's policies can tell apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from meshbridge.controller.messages import address_message, resource
from meshbridge.identity.model import Entity, IpAddress, Peer
from meshbridge.policy.selectors import LabelKeys
from meshbridge.xds.tables import Resource, Table


@dataclass(frozen=True, slots=True)
class Holder:
    """A pod, or a node when ``name`` is empty; ``peer`` with all its labels and ports.

    ``guessed``: nobody says so; it counts for nothing beside a claim that somebody makes.
    """

    peer: Peer
    name: str = ""
    uid: str = ""
    node: str = ""
    guessed: bool = False

    def __str__(self) -> str:
        return f"pod {self.peer.namespace}/{self.name}" if self.name else f"node {self.node}"


CONTESTED: Final = Holder(Peer(entities=frozenset({Entity.UNMANAGED})))
"""Nobody's labels and not the world either: no allow that names pods, nodes or CIDRs of the world lets it in."""


@dataclass(frozen=True, slots=True)
class Distinctions:
    """What some policies can tell apart: label keys, and the container ports they name.

    ``exclusions``: also where pods' Envoys are passed by, for a node that compensates what it sends past its own.
    """

    labels: LabelKeys = LabelKeys()  # noqa: RUF009 - frozen
    port_names: frozenset[str] = frozenset()
    exclusions: bool = False

    def difference(self, other: Distinctions) -> int:
        """How many things only one of the two can tell apart."""
        one, two = self.labels, other.labels
        parts = ((one.pod, two.pod), (one.namespace, two.namespace), (one.node, two.node))
        return sum(len(mine ^ theirs) for mine, theirs in (*parts, (self.port_names, other.port_names))) + (
            self.exclusions is not other.exclusions
        )

    def __or__(self, other: Distinctions) -> Distinctions:
        return Distinctions(
            self.labels | other.labels, self.port_names | other.port_names, self.exclusions or other.exclusions
        )


class AddressBook:
    """Holders by address, with a view for each set of distinctions in use.

    An address that several claim is contested until one is left: it then has nobody's labels.

    Cost: a claim touches one entry of each view; a view is copied once per change, and a view for other distinctions
    is made from the most similar one by making anew those entries whose labels differ under the two.
    """

    def __init__(self) -> None:
        self._claims: dict[IpAddress, dict[str, Holder]] = {}
        self._views: dict[Distinctions, Table] = {}
        self._stale: set[IpAddress] = set()
        self._marks: dict[IpAddress, frozenset[Entity]] = {}

    def mark(self, address: IpAddress, entities: frozenset[Entity]) -> None:
        """Say what else an address is, whoever holds it; of a pod it says nothing. None at all: it is that no more."""
        if self._marks.get(address, frozenset()) != entities:
            self._marks[address] = entities
            if not entities:
                del self._marks[address]
            self._stale.add(address)

    def claim(self, address: IpAddress, claimant: str, holder: Holder | None) -> bool:
        """Say that ``claimant`` holds ``address``, or, with None, no longer does; whether that is news."""
        claims = self._claims.setdefault(address, {})
        if claims.get(claimant) == holder:
            return False
        if holder is None:
            del claims[claimant]
        else:
            claims[claimant] = holder
        if not claims:
            del self._claims[address]
        self._stale.add(address)
        return True

    def holder(self, address: IpAddress) -> Holder | None:
        """Who holds ``address`` now."""
        claims = self._claimants(address)
        if not claims:
            return None
        holder = next(iter(claims.values())) if len(claims) == 1 else CONTESTED
        marks = self._marks.get(address)
        if marks is None or holder.peer.is_pod or holder is CONTESTED:
            return holder
        return replace(holder, peer=replace(holder.peer, entities=holder.peer.entities | marks))

    def contested(self, address: IpAddress) -> tuple[Holder, ...]:
        """All who claim ``address``, when it is more than one."""
        claims = self._claimants(address)
        return tuple(claims[claimant] for claimant in sorted(claims)) if len(claims) > 1 else ()

    def _claimants(self, address: IpAddress) -> dict[str, Holder]:
        claims = self._claims.get(address, {})
        return {claimant: holder for claimant, holder in claims.items() if not holder.guessed} or claims

    @property
    def stale(self) -> frozenset[IpAddress]:
        """The addresses whose claims changed since ``refresh``."""
        return frozenset(self._stale)

    def refresh(self, in_use: frozenset[Distinctions]) -> None:
        """Bring the views of ``in_use`` up to date and forget all others."""
        self._views = {distinctions: view for distinctions, view in self._views.items() if distinctions in in_use}
        stale, self._stale = frozenset(self._stale), set()
        if not stale:
            return
        for distinctions, view in self._views.items():
            renewed = {str(address): self._seen(address, distinctions) for address in stale}
            if any(view.get(name) != resource for name, resource in renewed.items()):
                self._views[distinctions] = view.changed(renewed)

    def view(self, distinctions: Distinctions) -> Table:
        """Every address with what ``distinctions`` leave of its holder; the same mapping until something changes."""
        view = self._views.get(distinctions)
        if view is None:
            like = min(self._views, key=distinctions.difference, default=None)
            if like is not None:
                view = self._views[like].changed(self._derived(distinctions, like))
            else:
                seen = ((str(address), self._seen(address, distinctions)) for address in self._claims)
                view = Table((name, resource) for name, resource in seen if resource is not None)
            self._views[distinctions] = view
        return view

    def _derived(self, to: Distinctions, like: Distinctions) -> dict[str, Resource | None]:
        """Those addresses whose holders may differ under the two."""
        found: dict[str, Resource | None] = {}
        pod_keys, node_keys = to.labels.pod ^ like.labels.pod, to.labels.node ^ like.labels.node
        namespace_keys = to.labels.namespace ^ like.labels.namespace
        port_names = to.port_names ^ like.port_names
        exclusions = to.exclusions is not like.exclusions
        for address in self._claims:
            holder = self.holder(address)
            if holder is None:
                continue
            peer = holder.peer
            if (
                not (pod_keys if peer.is_pod else node_keys).isdisjoint(peer.labels)
                or not namespace_keys.isdisjoint(peer.namespace_labels)
                or any(port.name in port_names for port in peer.ports)
                or (exclusions and peer.excluded)
            ):
                found[str(address)] = self._seen(address, to)
        return found

    def _seen(self, address: IpAddress, distinctions: Distinctions) -> Resource | None:
        holder = self.holder(address)
        if holder is None:
            return None
        keys = distinctions.labels
        peer = replace(
            holder.peer,
            labels=(keys.trim if holder.peer.is_pod else keys.trim_node)(holder.peer.labels),
            namespace_labels=keys.trim_namespace(holder.peer.namespace_labels),
            ports=frozenset(port for port in holder.peer.ports if port.name in distinctions.port_names),
            excluded=holder.peer.excluded if distinctions.exclusions else (),
        )
        message = address_message(address, peer, name=holder.name, uid=holder.uid, node=holder.node)
        return resource(message)
