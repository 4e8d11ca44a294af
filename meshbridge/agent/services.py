"""The Services whose addresses this node's pods may send to, before kube-proxy puts a pod's address in their place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

from meshbridge.abi import address_bytes, parse_address
from meshbridge.identity.model import Entity, IpFamily, Peer
from meshbridge.policy.frontends import Backend, FrontendPort
from meshbridge.xds.messages import ServiceFrontends

_WORLD = {
    IpFamily.IPV4: Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV4})),
    IpFamily.IPV6: Peer(entities=frozenset({Entity.WORLD, Entity.WORLD_IPV6})),
}


@dataclass(frozen=True, slots=True)
class _Port:
    protocol: int
    port: int
    backends: Mapping[IpFamily, tuple[tuple[bytes, int], ...]]


@dataclass(frozen=True, slots=True)
class _Service:
    """With addresses in the ipcache's form, as they are looked up after every change."""

    addresses: tuple[bytes, ...]
    ports: tuple[_Port, ...]
    outside: frozenset[bytes]


@dataclass(slots=True)
class Services:
    """By ``namespace/name``, and by address in the ipcache's form; external IPs may serve several."""

    _services: dict[str, _Service] = field(default_factory=dict)
    _at: dict[bytes, set[str]] = field(default_factory=dict)

    def put(self, name: str, service: ServiceFrontends | None) -> None:
        """This is the Service now, or, with None, there is none."""
        before = self._services.pop(name, None)
        for address in before.addresses if before is not None else ():
            self._at[address].discard(name)
            if not self._at[address]:
                del self._at[address]
        if service is not None:
            self._services[name] = _packed(service)
            for address in self._services[name].addresses:
                self._at.setdefault(address, set()).add(name)

    def addresses(self, names: Iterable[str] | None = None) -> Iterator[bytes]:
        """The addresses of these Services, as far as they exist; without ``names``, of all."""
        for name in self._services if names is None else names:
            service = self._services.get(name)
            yield from service.addresses if service is not None else ()

    def backends(self, names: Iterable[str] | None = None) -> Iterator[bytes]:
        """Who answers behind these Services; without ``names``, behind any."""
        for name in list(self._services) if names is None else names:
            service = self._services.get(name)
            for port in service.ports if service is not None else ():
                for backends in port.backends.values():
                    yield from (address for address, _ in backends)

    def peer(self, address: bytes, holder: Peer | None) -> Peer | None:
        """Who a Service's address is: its holder, else the world, set apart from all others by the Service's name.

        An outside address is apart from the Service's own as well, since denies count for it.
        """
        names = self._at.get(address)
        if not names:
            return holder
        held = holder or _WORLD[IpFamily.of(parse_address(address))]
        said = (f"{name} (outside)" if address in self._services[name].outside else name for name in sorted(names))
        return replace(held, service=", ".join(said))

    def frontends(self, number: Callable[[bytes], int | None]) -> Mapping[int, tuple[FrontendPort, ...]]:
        """The ports of Services by the identity of their addresses.

        A port with a backend that has no number counts as one without known backends.

        Args:
            number: the identity of an address whose holder is known.
        """
        found: dict[int, dict[tuple[int, int], set[Backend] | None]] = {}
        outside: set[int] = set()
        for address, names in self._at.items():
            identity = number(address)
            if identity is None:
                continue
            family = IpFamily.of(parse_address(address))
            ports = found.setdefault(identity, {})
            if any(address in self._services[name].outside for name in names):
                outside.add(identity)
            for name in sorted(names):
                for port in self._services[name].ports:
                    key = (port.protocol, port.port)
                    backends = _numbered(port.backends.get(family, ()), number)
                    ports[key] = _joined(ports[key], backends) if key in ports else backends
        return {
            identity: tuple(
                FrontendPort(protocol, port, tuple(sorted(backends or ())), identity in outside)
                for (protocol, port), backends in sorted(ports.items())
            )
            for identity, ports in sorted(found.items())
        }


def _packed(service: ServiceFrontends) -> _Service:
    ports = []
    for port in service.ports:
        backends: dict[IpFamily, list[tuple[bytes, int]]] = {}
        for address, target in port.backends:
            backends.setdefault(IpFamily.of(address), []).append((address_bytes(address), target))
        ports.append(_Port(port.protocol, port.port, {family: tuple(known) for family, known in backends.items()}))
    outside = tuple(map(address_bytes, service.outside_addresses))
    addresses = dict.fromkeys((*map(address_bytes, service.addresses), *outside))
    return _Service(tuple(addresses), tuple(ports), frozenset(outside))


def _numbered(backends: Iterable[tuple[bytes, int]], number: Callable[[bytes], int | None]) -> set[Backend] | None:
    """None: somebody unknown is among them, or there are none."""
    found = set()
    for address, target in backends:
        identity = number(address)
        if identity is None:
            return None
        found.add(Backend(identity, target))
    return found or None


def _joined(one: set[Backend] | None, other: set[Backend] | None) -> set[Backend] | None:
    return None if one is None or other is None else one | other
