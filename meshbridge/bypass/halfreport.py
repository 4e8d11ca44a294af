"""Beforehand, every server port where what a client's side sends is not what the server's side takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from meshbridge.bypass.ghosts import proxy_uids
from meshbridge.bypass.halves import AUTOMATIC, ClientTls, Delivered, Delivery, Sending, Side, delivery
from meshbridge.bypass.inventory import Inventory, target_port
from meshbridge.bypass.sets import union
from meshbridge.bypass.state import CaptureState
from meshbridge.identity.model import IpAddress, IpFamily, ProxyClass, Workload
from meshbridge.policy.baseline import Flow, Guard, mesh_verdict
from meshbridge.policy.capture import ISTIO_PORTS, AppProtocol, Capture, PortClass
from meshbridge.policy.compile import Compiler
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.lowering import guard_of, own_principal
from meshbridge.policy.mesh import Action, Attribute
from meshbridge.policy.model import Direction, EndpointPolicy, Verdict
from meshbridge.policy.parse.cluster import Service

MAX_SINGLE_PORTS = 16
SCRAPE, SCRAPE_PORT = "prometheus.io/scrape", "prometheus.io/port"
_FIRST_IDENTITY = 256
_TCP = 6


@dataclass(frozen=True, slots=True)
class HalfBypass:
    """Clients that will meet the same outcome at a server's port; ``via`` is the Service they use, or empty.

    ``known_from`` says what tells that they go this way, ``observed_ns`` when one of them was last seen to; 0: never.
    """

    server: str
    port: int
    via: str
    clients: tuple[str, ...]
    delivery: Delivery
    known_from: tuple[Source, ...] = ()
    observed_ns: int = 0


class Source(StrEnum):
    """What says that a client uses a port."""

    SERVICE = "service"
    POLICIES = "policies"
    EXCLUSION = "exclusion"
    SCRAPE = "scrape"
    OBSERVED = "observed"
    POSSIBLE = "possible"


def half_bypasses(inventory: Inventory, *, possible: bool = False, of: str = "") -> list[HalfBypass]:
    """Every server port where a client's side and the server's do not agree, with the clients that will meet it.

    Clients are those of which something says that they use the port: a Service in front of it, a policy that lets them
    in where others are kept out, an exclusion of their own that names it, or a connection that was seen. Where both
    sides go through Envoy and what they say to each other still does not fit, it has to be a Service in front of the
    port that the client knows; or the port's own address, where that was seen, the server asks to be scraped, or a
    policy names the port and no Service leads to it.

    Args:
        possible: Take every client of half a bypass that no policy keeps away.
        of: Only what concerns this workload, as a server, and as a client where it bypasses its own Envoy. The cost is
            then that of one pass over the others.
    """
    found = []
    admits, seen = _Admission(inventory, of), _Seen(inventory)
    only = tuple(workload for workload in inventory.workloads if workload.key == of)
    bypassing: dict[str, bool] = {}
    alone = bool(only) and not _bypasses(inventory, only[0])
    for server in only if alone else inventory.workloads:
        if server.proxy is not ProxyClass.SIDECAR or server.host_network:
            continue
        guard = guard_of(server, inventory.policies.selecting(server))
        classes = inventory.states[server.key].inbound(intended=inventory.predicted)
        for port in sorted({*inventory.declared_ports(server), *seen.ports(server)}):
            if port in ISTIO_PORTS:
                continue  # captured by no sidecar, and called as plaintext by whoever knows them
            captured = any(classes[f].at(port) is PortClass.CAPTURED for f in _families(server))
            mode, _ = guard.mtls.at(port)
            for way in _ways(server, port, inventory):
                meets: dict[Delivery, list[tuple[str, Sequence[Source], int]]] = {}
                for client in inventory.workloads if of in ("", server.key) else only:
                    if client.key == server.key or client.proxy is not ProxyClass.SIDECAR:
                        continue
                    sending = way.sent_by(client)
                    if client.key not in bypassing:
                        bypassing[client.key] = _bypasses(inventory, client)
                    if captured and sending.tls is ClientTls.AUTO and not bypassing[client.key]:
                        continue  # both sides see everything
                    sends = not bypassing[client.key] or client_captures(inventory, client, way.addresses, way.port)
                    if sends and way.service is not None and sending.unknown:
                        continue  # its Sidecar says that it does not call the Service
                    outcome = delivery(Side(True, sends), Side(True, captured), mode, sending)
                    if outcome is None or not (outcome.half or outcome.outcome is Delivered.BROKEN):
                        continue
                    sources = way.sources(client, outcome, guard, admits, possible=possible)
                    last_ns = seen.last_ns(client, way)
                    if last_ns:
                        sources = (*sources, Source.OBSERVED)
                    if sources and admits.may_connect(client, server, guard, port):
                        meets.setdefault(outcome, []).append((client.key, sources, last_ns))
                found += [_half(way, outcome, clients) for outcome, clients in meets.items()]
    return sorted(found, key=lambda h: (h.delivery.outcome is not Delivered.BROKEN, h.server, h.port, h.via, h.clients))


def _half(way: _Way, outcome: Delivery, clients: Sequence[tuple[str, Sequence[Source], int]]) -> HalfBypass:
    sources = dict.fromkeys(source for _, known_from, _ in clients for source in known_from)
    return HalfBypass(
        way.server.key, way.server_port, way.via, tuple(client for client, *_ in clients), outcome,
        tuple(source for source in Source if source in sources), max(last_ns for *_, last_ns in clients),
    )  # fmt: skip


class _Seen:
    """The connections that were seen, by client, server and the server's port.

    Who dialled a Service or an address is seen only of an application that sends past its own Envoy. What an Envoy
    sends goes to pods, whatever it was asked for: it counts for the Services in front of a port, and for the port's own
    address where there is none.
    """

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory
        self._times: dict[tuple[str, str, int], dict[str | None, int]] = {}
        if not inventory.observed:
            return
        pods = {workload.key: workload for workload in inventory.workloads}
        by_address = {address: workload for workload in inventory.workloads for address in workload.addresses}
        services = {address: service for service in inventory.services for address in service.addresses}
        for flow in inventory.observed:
            client, server = pods.get(flow.client), pods.get(flow.server) or by_address.get(flow.address)
            if client is None:
                continue
            if server is not None:
                itself = flow.uid is not None and flow.uid not in proxy_uids(client)
                self._add(client, server, flow.port, "" if itself else None, flow.time_ns)
            elif (service := services.get(flow.address)) is not None:
                for behind in inventory.selected_by(service):
                    for port in (p for p in service.ports if (p.port, p.protocol) == (flow.port, "TCP")):
                        target = target_port(behind, port.target)
                        if target is not None:
                            self._add(client, behind, target, via_service(service, flow.port), flow.time_ns)

    def ports(self, server: Workload) -> Iterable[int]:
        """The ports of a server that somebody was seen to use, whether or not it declares them."""
        return (port for _, key, port in self._times if key == server.key)

    def last_ns(self, client: Workload, way: _Way) -> int:
        """When a client was last seen to go this way; 0: never."""
        times = self._times.get((client.key, way.server.key, way.server_port), {})
        unknown = times.get(None, 0) if way.service is not None or not way.beside_service else 0
        return max(times.get(way.via, 0), unknown)

    def _add(self, client: Workload, server: Workload, port: int, via: str | None, time_ns: int) -> None:
        times = self._times.setdefault((client.key, server.key, port), {})
        times[via] = max(times.get(via, 0), time_ns)


class _Admission:
    """Whether any policy leaves a connection open, as far as it can be known before it is made."""

    def __init__(self, inventory: Inventory, of: str) -> None:
        self._inventory, self._of = inventory, of
        self._peers = {w.key: inventory.peer(w) for w in inventory.workloads}
        self._numbers = {key: _FIRST_IDENTITY + position for position, key in enumerate(self._peers)}
        self._compiler = Compiler({self._numbers[key]: peer for key, peer in self._peers.items()})
        # where all is about one workload, it is the only peer that the policies of others are asked about
        self._of_others = Compiler({self._numbers[of]: self._peers[of]}) if of else self._compiler
        self._compiled: dict[str, EndpointPolicy] = {}

    def may_connect(self, client: Workload, server: Workload, guard: Guard, port: int) -> bool:
        peer = self._peers[client.key]
        flow = Flow(peer.networks & guard.networks, port, own_principal(peer))
        if mesh_verdict(guard, flow, AppProtocol.AUTO).verdict is Verdict.DENY:
            return False
        ends = ((server, client, Direction.INGRESS), (client, server, Direction.EGRESS))
        return any(all(self._network(*end, family, port) for end in ends) for family in IpFamily)

    def lets_in_only_some(self, server: Workload, guard: Guard) -> bool:
        """Whether policies keep anybody away from the port, so that who may connect is meant to."""
        if any(p.action is Action.ALLOW and not p.dry_run for p in guard.policies):
            return True
        policy = self._policy(server)
        return any(policy.map(Direction.INGRESS, f).network_default.verdict is Verdict.DENY for f in IpFamily)

    def _network(self, endpoint: Workload, peer: Workload, direction: Direction, family: IpFamily, port: int) -> bool:
        decision = evaluate(self._policy(endpoint).map(direction, family), self._numbers[peer.key], _TCP, port)
        return decision.network.verdict is not Verdict.DENY

    def _policy(self, endpoint: Workload) -> EndpointPolicy:
        policy = self._compiled.get(endpoint.key)
        if policy is None:
            compiler = self._compiler if endpoint.key == self._of else self._of_others
            policy = compiler.endpoint(endpoint, self._inventory.policies, Capture.none())
            self._compiled[endpoint.key] = policy
        return policy


def _bypasses(inventory: Inventory, client: Workload) -> bool:
    """Whether anything that a client sends is not seen by its own Envoy."""
    state = inventory.states[client.key]
    return any(state.outbound_bypasses(family, intended=inventory.predicted) for family in _families(client))


def _names_port(inventory: Inventory, client: Workload, port: int) -> bool:
    """Whether a client excludes a port by name, not together with thousands of others."""
    spans = (
        span
        for family in IpFamily
        for span in inventory.states[client.key].outbound_bypasses(family, intended=inventory.predicted)
    )
    return any(port in span.box.port and len(span.box.port) <= MAX_SINGLE_PORTS for span in spans)


def _families(workload: Workload) -> list[IpFamily]:
    return sorted({IpFamily.of(address) for address in workload.addresses}) or [IpFamily.IPV4]


@dataclass(frozen=True, slots=True)
class _Way:
    """How a server's port is dialled: by the pod's own address, or by a port of the Service in front of it.

    ``beside_service``: by the address although a Service leads to the port.
    """

    inventory: Inventory
    server: Workload
    server_port: int
    port: int
    addresses: tuple[IpAddress, ...]
    service: Service | None = None
    beside_service: bool = False
    _sent: dict[object, Sending] = field(default_factory=dict, compare=False)

    @property
    def via(self) -> str:
        return via_service(self.service, self.port) if self.service is not None else ""

    def sent_by(self, client: Workload) -> Sending:
        """What a client's Envoy sends this way."""
        registry = self.inventory.registry
        if registry is None:
            return AUTOMATIC
        alike = client.key if registry.tells_clients_apart else client.namespace
        if alike not in self._sent:
            self._sent[alike] = (
                registry.to_service(client, self.service, self.port)
                if self.service is not None
                else registry.to_pod(client, self.server, next(iter(self.addresses), None), self.port)
            )
        return self._sent[alike]

    def sources(
        self, client: Workload, outcome: Delivery, guard: Guard, admits: _Admission, *, possible: bool
    ) -> Sequence[Source]:
        """What says, before anything is seen, that the client goes this way."""
        if self.service is not None:
            return (Source.SERVICE,)
        if possible and outcome.half:
            return (Source.POSSIBLE,)
        policies = (Source.POLICIES,) if admits.lets_in_only_some(self.server, guard) else ()
        if outcome.half:
            named = _names_port(self.inventory, client, self.server_port)
            return (*policies, *((Source.EXCLUSION,) if named else ()))
        if _is_scraped(self.server, self.server_port):
            return (*policies, *((Source.SCRAPE,) if _scrapes(client) else ()))
        named = not self.beside_service and self.server_port in set(ports_of_rules(guard))
        return policies if named else ()


def _ways(server: Workload, port: int, inventory: Inventory) -> list[_Way]:
    """The pod's own address, and each Service in front of it."""
    found = inventory.frontends(server, port)
    beside = any(not service.headless for service, _ in found)
    ways = [_Way(inventory, server, port, port, server.addresses, beside_service=beside)]
    for service, number in found:
        # a headless Service's name stands for its pods' addresses
        addresses = server.addresses if service.headless else service.addresses
        ways.append(_Way(inventory, server, port, number, addresses, service))
    return ways


def via_service(service: Service, port: int) -> str:
    """How reports name a Service's port."""
    return f"Service {service.namespace}/{service.name}:{port}"


def _is_scraped(server: Workload, port: int) -> bool:
    """Whether a pod asks to be scraped on a port, by its own address."""
    return server.annotations.get(SCRAPE) == "true" and server.annotations.get(SCRAPE_PORT) == str(port)


def _scrapes(client: Workload) -> bool:
    """Whether a pod is a Prometheus, by the labels that its charts, its operator and Istio's own addon give it."""
    return any(client.labels.get(key) == "prometheus" for key in ("app.kubernetes.io/name", "app"))


def client_captures(inventory: Inventory, client: Workload, addresses: Sequence[IpAddress], port: int) -> bool:
    """Whether the client's Envoy sees a connection of its application to an address and port.

    Without a known address every destination has to be captured.
    """
    state: CaptureState = inventory.states[client.key]
    bypassed = {
        family: [s for s in state.outbound_bypasses(family, intended=inventory.predicted) if port in s.box.port]
        for family in IpFamily
    }
    reachable = [address for address in addresses if IpFamily.of(address) in _families(client)]
    for address in reachable:
        if any(int(address) in span.box.destination for span in bypassed[IpFamily.of(address)]):
            return False
    return bool(reachable) or not union(span.box.destination for span in bypassed[IpFamily.IPV4])


def ports_of_rules(guard: Guard) -> Iterable[int]:
    yield from guard.mtls.ports
    for rule in guard.rules:
        for condition in rule.all_conditions:
            if condition.attribute is Attribute.PORTS:
                yield from (int(value) for value in (*condition.values, *condition.not_values))
