"""The cluster loop: what changed goes to exactly those nodes and sidecars it concerns."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import islice
from typing import Final

import structlog
from prometheus_client import Gauge

from meshbridge.controller.addresses import Distinctions
from meshbridge.controller.cluster import Cluster, LocalEndpoint, Touched, extra_addresses
from meshbridge.controller.meshconfig import NAMESPACE, MeshConfigError, read_mesh_config
from meshbridge.controller.messages import endpoint_message, mesh_message, problem_message, problem_name, resource
from meshbridge.controller.picture import Picture
from meshbridge.controller.policies import shared
from meshbridge.controller.replicas import OwnService
from meshbridge.identity.model import Workload
from meshbridge.kube.manifests import Key
from meshbridge.kube.problems import Problem, ProblemReason
from meshbridge.policy.mesh import DEFAULT_MESH, MeshSettings
from meshbridge.policy.model import Document
from meshbridge.policy.parse.cluster import Service
from meshbridge.policy.policyset import PolicySet
from meshbridge.protos.agent_pb2 import Revision
from meshbridge.xds import types as xds
from meshbridge.xds.auth import Caller, CallerKind
from meshbridge.xds.nodereport import NO_REPORT, NodeReport
from meshbridge.xds.resources import sidecar_resources
from meshbridge.xds.secrets import SecretStore, SpiffeId
from meshbridge.xds.select import build_sidecar, mtls_destinations
from meshbridge.xds.server import Refusals
from meshbridge.xds.sidecar import MtlsDestination, Sidecar
from meshbridge.xds.snapshot import Snapshot
from meshbridge.xds.tables import Resource, Resources, Table

log = structlog.get_logger()

PROBLEMS = Gauge("meshbridge_controller_problems", "Things a person has to mend.", ["reason"])
OBJECTS = Gauge("meshbridge_controller_objects", "Kubernetes objects in force.")
REVISION = Gauge("meshbridge_controller_revision", "The newest revision given to any node.")

MESH_CONFIG: Final[Key] = ("", "ConfigMap", NAMESPACE, "istio")
MAX_PROBLEMS_SENT: Final = 1_000
CERTIFICATE_CHECK_S: Final = 30.0
MAX_NACKS: Final = 20
"""Of one stream; whoever refuses more is in need of the same cure."""
MAX_NACK_TEXT: Final = 300
MAX_VIEWS: Final = 64
"""How many different sights of the addresses nodes may have before all are sent the same."""


@dataclass(slots=True)
class _Client:
    """Everybody who presents the same token: agent and authz of a node, or the Envoy of a pod."""

    caller: Caller
    snapshot: Snapshot | None = None
    refusal: str = ""
    wakes: list[Callable[[], None]] = field(default_factory=list)
    own: Distinctions = Distinctions()  # noqa: RUF009 - frozen
    """What its policies can tell apart; it may be sent more."""
    distinctions: Distinctions = Distinctions()  # noqa: RUF009 - frozen
    endpoints: dict[str, tuple[LocalEndpoint, Resource]] = field(default_factory=dict)
    sidecar: Sidecar | None = None
    replicas: tuple[str, ...] = ()

    def wake(self) -> None:
        for wake in self.wakes:
            wake()


class _Feed:
    """One stream's part of its client."""

    def __init__(self, controller: Controller, client: _Client, wake: Callable[[], None]) -> None:
        self._controller, self._client, self._wake = controller, client, wake
        client.wakes.append(wake)

    @property
    def snapshot(self) -> Snapshot | None:
        return self._client.snapshot

    @property
    def refusal(self) -> str:
        return self._client.refusal

    def refuses(self, refusals: Refusals) -> None:
        self._controller.report_nacks(self, self._client.caller, refusals)

    def close(self) -> None:
        self.refuses({})
        self._client.wakes.remove(self._wake)
        self._controller.forget_if_unused(self._client)


class Controller:
    """Turns documents into one snapshot per connected client; streams are woken when theirs changed.

    Cost: a change of policies touches the nodes with an endpoint it selects before or after; their policies are
    gathered anew, and an equal result is the same snapshot and no revision. Sidecars are looked at afterwards, in
    ``maintain_sidecars``, so that no node waits for them; a change of pods, Services or PeerAuthentications there
    costs a look at every pod, in a thread, any other a look at every connected sidecar.
    """

    def __init__(
        self,
        secrets: SecretStore,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        own_service: OwnService | None = None,
    ) -> None:
        self.cluster = Cluster()
        self.sidecars_stale = asyncio.Event()
        self.node_reports: dict[str, NodeReport] = {}
        self._own_service = own_service
        self._replicas: tuple[str, ...] = ()
        self._write_problems: dict[str, frozenset[Problem]] = {}
        self.picture_stale = asyncio.Event()
        self._secrets, self._now = secrets, now
        self._documents: dict[Key, tuple[Document, ...]] = {}
        self._mesh_problems: tuple[Problem, ...] = ()
        self._read_problems: frozenset[Problem] = frozenset()
        self._problems: frozenset[Problem] = frozenset()
        self._nacked: dict[object, frozenset[Problem]] = {}
        self._nack_problems: frozenset[Problem] = frozenset()
        self._problem_resources = Table()
        self._mesh_resources = _mesh_resources(self.cluster.mesh)
        self._clients: dict[Caller, _Client] = {}
        self._destinations: tuple[MtlsDestination, ...] | None = None
        self._destinations_stale = True
        self._revision = 0
        self._synced = False
        self._alike = False

    @property
    def synced(self) -> bool:
        """Whether the documents have been read; before that nobody is told anything."""
        return self._synced

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Everything a person has to mend, in order of file and line."""
        found = self._problems | self._nack_problems
        return tuple(sorted(found, key=lambda problem: (problem.file, problem.line, problem.text)))

    def _count_problems(self) -> None:
        problems = self.problems
        for reason in ProblemReason:
            PROBLEMS.labels(reason.value).set(sum(problem.reason is reason for problem in problems))

    def open(self, caller: Caller, wake: Callable[[], None]) -> _Feed:
        """A feed for ``caller``, with its snapshot when there can be one already."""
        client = self._clients.get(caller)
        if client is None:
            client = self._clients[caller] = _Client(caller)
            self._update(client)
        return _Feed(self, client, wake)

    def forget_if_unused(self, client: _Client) -> None:
        """Stop computing for a client no stream is left of."""
        if not client.wakes and self._clients.get(client.caller) is client:
            del self._clients[client.caller]
            identities = {self._spiffe_id(c.sidecar.workload) for c in self._clients.values() if c.sidecar is not None}
            self._secrets.keep_only(identities)

    def apply(self, changes: Mapping[Key, tuple[Document, ...]], read_problems: frozenset[Problem]) -> None:
        """Take in what changed and what could not be read; every client it concerns has its new snapshot afterwards."""
        first, self._synced = not self._synced, True
        self._documents.update(changes)
        for key in [key for key, documents in changes.items() if not documents]:
            self._documents.pop(key, None)
        if self._own_service is not None and self._own_service.may_change(changes):
            replicas = self._own_service.replicas(self._documents)
            self._replicas = self._replicas if replicas == self._replicas else replicas
        touched = self._apply(changes)
        self._read_problems = read_problems
        self._report_problems()
        OBJECTS.set(len(self._documents))
        self._tell_nodes(None if first or touched is None else touched.nodes)
        self._destinations_stale |= touched is None or touched.destinations
        if touched is None or touched.sidecars or first:
            self.sidecars_stale.set()
        self.picture_stale.set()

    def cannot_read_yet(self, read_problems: frozenset[Problem]) -> None:
        """Say why nobody is told anything: not all objects could be read once."""
        self._read_problems = read_problems
        self._report_problems()

    def _tell_nodes(self, touched: Set[str] | None) -> None:
        """Every node has what holds now. First those touched (None: all), of which policies or endpoints may differ."""
        nodes = [client for client in self._clients.values() if client.caller.kind is CallerKind.NODE]
        parts = {id(c): self._look_at(c) for c in nodes if touched is None or c.caller.node in touched}
        if parts:
            self._compare_nodes()
        for client in sorted(self._refreshed_nodes(), key=lambda client: id(client) not in parts):
            self._assemble(client, parts.get(id(client), {}))

    def report(self, node: str, report: NodeReport) -> None:
        """All that a node says of its own pods from now on; nodes that compensate towards them are told."""
        before = self.node_reports.pop(node, NO_REPORT)
        if report != NO_REPORT:
            self.node_reports[node] = report
        if report != before:
            self.picture_stale.set()
        self.cluster.report(node, report.exclusions)
        if self._synced and report.exclusions != before.exclusions:
            self._tell_nodes(frozenset())

    def report_nacks(self, stream: object, caller: Caller, refusals: Refusals) -> None:
        """All that the client of one stream does not take, from now on: problems, of which other nodes are not told."""
        problems = frozenset(_nacked(caller, *about, why) for about, why in islice(refusals.items(), MAX_NACKS))
        known = self._nacked.pop(stream, frozenset())
        if problems:
            self._nacked[stream] = problems
        if problems != known:
            self._nack_problems = frozenset[Problem]().union(*self._nacked.values())
            self._count_problems()

    def picture(self) -> Picture | None:
        """All there is to say about the cluster's objects, for another thread to look at; None: not known yet."""
        cluster = self.cluster
        if not self._synced:
            return None
        return Picture(
            dict(self._documents),
            dict(cluster.problems_of_objects),
            tuple(item.bypass for item in cluster.policies.values() if item.bypass is not None),
            tuple(cluster.workloads),
            dict(self.node_reports),
            (*(item.parsed for item in cluster.policies.values()), *cluster.registry.values()),
            tuple(cluster.services.values()),
            cluster.mesh,
            self._now(),
        )

    def report_write_problems(self, whose: str, problems: frozenset[Problem]) -> None:
        """What keeps this replica from writing into the cluster; named among the problems until it is mended.

        Args:
            whose: the part of it that says so; each speaks for itself.
        """
        if problems != self._write_problems.get(whose, frozenset()):
            self._write_problems[whose] = problems
            self._report_problems()
            if self._synced:  # before, a revision would say that there are no policies
                self._tell_nodes(frozenset())

    def _refreshed_nodes(self) -> list[_Client]:
        """The clients that are nodes, after the addresses as they see them are up to date."""
        nodes = [client for client in self._clients.values() if client.caller.kind is CallerKind.NODE]
        for client in nodes:
            client.distinctions = self._sent(client.own)
        self.cluster.addresses.refresh(frozenset(client.distinctions for client in nodes))
        return nodes

    def _sent(self, own: Distinctions) -> Distinctions:
        """What a node is told of addresses: what its policies tell apart; where nodes differ much, what any does."""
        return own | self.cluster.distinctions if self._alike else own

    def _compare_nodes(self) -> None:
        """Views of the addresses stay few, however much the policies of nodes differ."""
        own = {id(client.own) for client in self._clients.values() if client.caller.kind is CallerKind.NODE}
        self._alike = len(own) > (MAX_VIEWS // 2 if self._alike else MAX_VIEWS)

    async def maintain_sidecars(self) -> None:
        """Refresh sidecars whenever something they depend on changed or a certificate is due."""
        while True:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CERTIFICATE_CHECK_S):
                    await self.sidecars_stale.wait()
            due = self._secrets.next_rotation()
            if self.sidecars_stale.is_set() or (due is not None and due <= self._now()):
                await self.refresh_sidecars()

    async def refresh_sidecars(self) -> None:
        """Give every connected sidecar what it should have now, certificates included."""
        self.sidecars_stale.clear()
        if self._destinations_stale and any(c.caller.kind is CallerKind.POD for c in self._clients.values()):
            self._destinations_stale = False  # what changes from here on is looked at the next time
            self._destinations = await asyncio.to_thread(mtls_destinations, *self._destination_inputs())
        for client in list(self._clients.values()):
            if client.caller.kind is not CallerKind.POD:
                continue
            try:
                self._update_pod(client)
            except Exception:  # one pod's configuration may not keep policy from all others; its Envoy keeps the last
                log.exception("sidecar.failed", pod=client.caller.node_id)

    def _destination_inputs(self) -> tuple[tuple[Workload, ...], tuple[Service, ...], PolicySet]:
        """Copies, so that a thread may read them."""
        cluster = self.cluster
        return tuple(cluster.workloads), tuple(cluster.services.values()), cluster.peer_authentications()

    def _apply(self, changes: Mapping[Key, tuple[Document, ...]]) -> Touched | None:
        """What was touched; None: everything, as the mesh's own settings changed."""
        mesh = self.cluster.mesh
        if MESH_CONFIG in changes:
            mesh = self._read_mesh(changes[MESH_CONFIG])
        if mesh == self.cluster.mesh:
            return self.cluster.apply(changes)
        log.info("mesh.changed", trust_domain=mesh.trust_domain, root_namespace=mesh.root_namespace)
        self.cluster = Cluster(mesh, self.cluster.reports)
        self.cluster.apply(self._documents)
        self._mesh_resources = _mesh_resources(mesh)
        return None

    def _read_mesh(self, documents: tuple[Document, ...]) -> MeshSettings:
        self._mesh_problems = ()
        if not documents:
            return DEFAULT_MESH
        try:
            return read_mesh_config(documents[0])
        except MeshConfigError as error:
            source = documents[0].source
            self._mesh_problems = (Problem(ProblemReason.REFUSED, str(error), source.file, source.line("")),)
            return self.cluster.mesh

    def _report_problems(self) -> None:
        """Log every problem once when it comes and once when it goes, and keep them for the nodes."""
        unwritable = self._write_problems.values()
        problems = self._read_problems.union(self.cluster.problems, self._mesh_problems, *unwritable)
        if problems == self._problems:
            return
        for problem in sorted(problems - self._problems):
            log.warning("problem.found", reason=problem.reason, text=problem.text, file=problem.file, line=problem.line)
        for problem in sorted(self._problems - problems):
            log.info("problem.mended", reason=problem.reason, text=problem.text)
        self._problems = problems
        self._count_problems()
        sent = sorted(problems, key=lambda problem: (problem.file, problem.line, problem.text))[:MAX_PROBLEMS_SENT]
        self._problem_resources = Table((problem_name(problem), resource(problem_message(problem))) for problem in sent)

    def _update(self, client: _Client) -> None:
        if not self._synced:
            return
        if client.caller.kind is CallerKind.NODE:
            self._update_node(client)
        else:
            self._update_pod(client)

    def _update_node(self, client: _Client) -> None:
        parts = self._look_at(client)
        self._compare_nodes()
        client.distinctions = self._sent(client.own)
        self._assemble(client, parts)

    def _look_at(self, client: _Client) -> dict[str, Resources]:
        """A node's policies, which say what it can tell apart, and its endpoints."""
        node = client.caller.node
        items = self.cluster.policies_on(node)
        own = Distinctions(exclusions=self.cluster.needs_all_mesh_policies(node))
        for one in {id(item.distinctions): item.distinctions for item in items}.values():
            own |= one
        client.own = shared(own)
        known, client.endpoints = client.endpoints, {}
        found = self.cluster.endpoints(node)
        for local in sorted(found, key=lambda local: bool(local.fault)):  # of one name, a fault has the last word
            before = known.get(local.uid)
            client.endpoints[local.uid] = before if before and before[0] == local else (local, _endpoint(local))
        return {
            xds.POLICY: Table((item.name, item.resource) for item in items),
            xds.ENDPOINT: Table((uid, made) for uid, (_, made) in client.endpoints.items()),
        }

    def _assemble(self, client: _Client, parts: Mapping[str, Resources]) -> None:
        """A new revision for a node when anything differs from its last one; parts not given stay as they were."""
        last = client.snapshot.types if client.snapshot is not None else {}
        types = {
            xds.POLICY: last.get(xds.POLICY, {}),
            xds.SERVICE: self.cluster.service_book.resources,
            xds.ADDRESS: self.cluster.addresses.view(client.distinctions),
            xds.MESH: self._mesh_resources[self.cluster.needs_all_mesh_policies(client.caller.node)],
            xds.ENDPOINT: last.get(xds.ENDPOINT, {}),
            xds.PROBLEM: self._problem_resources,
            **parts,
        }
        for type_url in (xds.POLICY, xds.ENDPOINT):
            types[type_url] = _same(last.get(type_url), types[type_url])
        same = all(resources is last.get(type_url) for type_url, resources in types.items())
        if last and same and client.replicas is self._replicas:
            return
        number, client.replicas = self._next_revision(), self._replicas
        types[xds.REVISION] = {"revision": resource(Revision(number=number, controllers=self._replicas))}
        client.snapshot = Snapshot(types)
        log.debug("revision.made", node=client.caller.node, revision=number)
        client.wake()

    def _next_revision(self) -> int:
        self._revision = max(self._revision + 1, int(self._now().timestamp() * 1000))
        REVISION.set(self._revision)
        return self._revision

    def _update_pod(self, client: _Client) -> None:
        caller = client.caller
        pod = self.cluster.pod(caller.namespace, caller.pod) if self._synced else None
        if pod is None or pod.uid != caller.uid:
            if client.snapshot is not None:
                self._refuse(client, f"pod {caller.node_id} with UID {caller.uid} is gone")
            return  # else its Envoy may have started before the kubelet's report of it came in
        if pod.service_account != caller.service_account:
            self._refuse(client, f"pod {caller.node_id} does not run as {caller.service_account!r}")
            return
        if self._destinations is None:
            self.sidecars_stale.set()  # the first sidecar: it takes a look at every pod
            return
        services = [service for service in self.cluster.services.values() if service.namespace == pod.namespace]
        sidecar = build_sidecar(pod, self.cluster.policies_of(pod), services, self._destinations)
        last = client.snapshot.types if client.snapshot is not None else {}
        if sidecar != client.sidecar:
            client.sidecar = sidecar
            made = sidecar_resources(sidecar)
        else:
            made = {}
        types: dict[str, Resources] = dict(last)
        secrets = self._secrets.secrets(self._spiffe_id(pod), self._now())
        for type_url, bodies in {**made, xds.SECRET: secrets}.items():
            types[type_url] = _same(last.get(type_url), {name: Resource.of(body) for name, body in bodies.items()})
        if any(resources is not last.get(type_url) for type_url, resources in types.items()):
            client.snapshot = Snapshot(types)
            client.wake()

    def _refuse(self, client: _Client, why: str) -> None:
        client.refusal, client.sidecar = why, None
        client.wake()

    def _spiffe_id(self, pod: Workload) -> SpiffeId:
        return SpiffeId(self.cluster.mesh.trust_domain, pod.namespace, pod.service_account)


def _nacked(caller: Caller, type_url: str, name: str, why: str) -> Problem:
    what = f"{type_url.rpartition('.')[2]} {_printable(name)}"
    follows = "it acts on nothing newer until it takes it" if caller.kind is CallerKind.NODE else "it keeps what it had"
    fix = "bring that client and this controller to one version, or change the object"
    return Problem(ProblemReason.NACKED, f"{caller} does not take {what}: {_printable(why)}; {follows}; {fix}")


def _printable(text: str) -> str:
    """A client's own words, on one line."""
    return "".join(character if character.isprintable() else " " for character in text[:MAX_NACK_TEXT])


def _endpoint(local: LocalEndpoint) -> Resource:
    pod = replace(local.workload, uid=local.uid)
    return resource(endpoint_message(pod, extra_addresses(pod), fault=local.fault))


def _mesh_resources(mesh: MeshSettings) -> dict[bool, Resources]:
    """The mesh's settings for nodes that are sent all of its policies, and for the others."""
    return {every: Table({"mesh": resource(mesh_message(mesh, all_policies=every))}) for every in (False, True)}


def _same(last: Resources | None, resources: Resources) -> Resources:
    """The last mapping when the new one is equal: sessions skip what is the same mapping."""
    return last if last is not None and last == resources else resources
