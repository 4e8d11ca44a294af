"""The node agent: the controller's revisions into the kernel, the kernel's events to whoever asks.

The event loop talks (controller, Unix socket, events); one worker thread decides and writes. Killing the process at any
point leaves enforcement as it is, and the next one takes over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import structlog

from meshbridge import __version__
from meshbridge.agent import memory
from meshbridge.agent.audits import AuditCounts
from meshbridge.agent.chain import CHECK_S, Chain
from meshbridge.agent.cnicall import Call, Verb, network_of, valid_containers
from meshbridge.agent.cniserver import start_cni
from meshbridge.agent.enforcer import Enforcer
from meshbridge.agent.evidence import Evidence
from meshbridge.agent.metrics import serve_metrics
from meshbridge.agent.names import Names
from meshbridge.agent.node import EndpointError, Node, Published
from meshbridge.agent.observer import ObserverService, start_observer, stop_observer
from meshbridge.agent.processes import Processes
from meshbridge.agent.proofs import Schedule
from meshbridge.agent.prover import PAUSE_S, Proving
from meshbridge.agent.redirects import Redirects, Seen
from meshbridge.agent.ring import FlowRing
from meshbridge.agent.view import Announced
from meshbridge.bypass.owners import ProxyOwner
from meshbridge.bypass.proof import Status
from meshbridge.datapath.attach import AttachMode
from meshbridge.datapath.events import EventReader
from meshbridge.datapath.links import Link, NetworkWatch
from meshbridge.datapath.maps import MapSizes
from meshbridge.datapath.redirect import host_path
from meshbridge.errors import MeshBridgeError
from meshbridge.observe.flow import FlowKind
from meshbridge.observe.tables import READY
from meshbridge.protos import observer_pb2 as pb
from meshbridge.xds.client import ControllerClient

log = structlog.get_logger()
T = TypeVar("T")

RETRY_S: Final = 1.0
SETTLE_S: Final = 0.05  # a burst of changes to links and routes is looked at once
FIRST_LOOK_S: Final = 2.0
REDIRECT_TURN_S: Final = 0.1
REDIRECT_TURNS: Final = 20
EVENTS_PER_TURN: Final = 512
MOST_EVENTS: Final = 8192
MAX_WAIT_S: Final = 60.0
ADD_WAIT_S: Final = 5.0
MAX_INTERFACES: Final = 16
MAX_TOKEN_BYTES: Final = 8192


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What the command line says. ``metrics`` is a loopback address and port, empty for none.

    ``controller_ca`` is who vouches for a controller that is reached over TCP, ``controller_name`` what its certificate
    is for where that is not the host.
    """

    node: str
    controller: str
    token_file: Path
    pin_dir: Path
    socket: Path
    metrics: str = ""
    controller_ca: Path | None = None
    controller_name: str = ""
    cni: Path | None = None
    """Where the CNI plugin asks; None: nowhere."""
    chain: Chain | None = None
    """The CNI chain of the node, for our plugin to be kept in."""
    attach: AttachMode | None = None
    sizes: MapSizes | None = None


class Agent:
    """One running agent. ``run`` returns when it is cancelled; what it programmed stays."""

    def __init__(self, settings: AgentSettings) -> None:
        self._settings = settings
        self._names = Names(settings.node)
        self._ring = FlowRing(settings.node)
        self._audits = AuditCounts()
        self._evidence = Evidence(settings.node)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="node")
        self._onlooker = ThreadPoolExecutor(1, thread_name_prefix="redirects")
        self._redirects = Redirects()
        self._processes = Processes()
        self._proving = Proving(lambda: self._node, self._in_worker, self._read_waiting, self.events_lost)
        self._client = ControllerClient(
            settings.controller, settings.node, self._token, settings.controller_ca, settings.controller_name
        )
        self._started = time.monotonic()
        self._changed = asyncio.Event()
        self._retry = asyncio.Event()
        self._enforcer: Enforcer
        self._reader: EventReader
        self._node: Node
        self.published = Published()

    async def run(self) -> None:
        """Take over the node and keep it as the controller says, until cancelled.

        Raises:
            MeshBridgeError: the datapath, the socket or the metrics address cannot be used.
        """
        loop = asyncio.get_running_loop()
        watch = NetworkWatch()  # before the first look, so that no change falls between the two
        try:
            await self._in_worker(lambda: self._start(loop))
            server = await start_observer(ObserverService(self, self._ring), self._settings.socket)
            plugin = await start_cni(self, self._settings.cni) if self._settings.cni else None
            metrics = await serve_metrics(self, self._settings.metrics) if self._settings.metrics else None
            log.info("agent.started", node=self._settings.node, duration_ms=self._uptime_ms())
            reader = self._reader = self._enforcer.reader()
            loop.add_reader(reader.fileno(), self._read_events, reader)
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._follow_controller(), name="follow-controller")
                    tasks.create_task(self._follow_network(loop, watch), name="follow-network")
                    tasks.create_task(self._try_again(), name="try-again")
                    tasks.create_task(self._follow_redirects(), name="follow-redirects")
                    tasks.create_task(self._follow_proofs(), name="follow-proofs")
                    if self._settings.chain is not None:
                        tasks.create_task(self._keep_chain(self._settings.chain), name="keep-chain")
            finally:
                loop.remove_reader(reader.fileno())
                for listening in (metrics, plugin):
                    if listening is not None:
                        listening.close()
                await stop_observer(server)
                reader.close()
        finally:
            watch.close()
            self._worker.shutdown(wait=True)
            self._onlooker.shutdown(wait=True)
            self._proving.close()
            log.info("agent.stopped", node=self._settings.node)

    def _start(self, loop: asyncio.AbstractEventLoop) -> None:
        def publish(published: Published) -> None:
            loop.call_soon_threadsafe(self._take_published, published)

        self._enforcer = Enforcer(self._settings.pin_dir, self._settings.attach, self._settings.sizes)
        self._node = Node(self._settings.node, self._enforcer, self._names, publish, self._first_look)
        self._node.start()

    def _look(self, sidecars: Mapping[str, tuple[Link, ...]], owners: Mapping[str, ProxyOwner]) -> Seen:
        seen = self._redirects.look(sidecars)
        pods = {uid: (seen.namespaces[uid], owner) for uid, owner in owners.items() if uid in seen.namespaces}
        return replace(seen, processes=self._processes.look(pods))

    def _first_look(self, sidecars: Mapping[str, tuple[Link, ...]]) -> Seen:
        """The redirect rules of all pods, read before the first revision is acted on; none when it takes too long."""
        try:
            return self._onlooker.submit(self._redirects.look, sidecars).result(FIRST_LOOK_S)
        except TimeoutError:
            log.error("redirects.not_read", within_s=FIRST_LOOK_S, pods=len(sidecars))
            return Seen()

    def _take_published(self, published: Published) -> None:
        self.published = published
        if published.report is not None:
            self._client.report(published.report)
        self._evidence.watched = published.watched
        for event in published.events:
            self._ring.add(event)
        self._changed.set()
        self._changed = asyncio.Event()
        if self._node.failed:
            self._retry.set()

    def _in_worker(self, act: Callable[[], T]) -> asyncio.Future[T]:
        return asyncio.get_running_loop().run_in_executor(self._worker, act)

    async def _follow_controller(self) -> None:
        async for update in self._client.updates():
            # Nothing here may hold on to an update: the first one is larger than all that is kept of it.
            taken = self._in_worker(partial(self._node.take, update))
            del update
            await taken
            del taken
            await self._in_worker(memory.give_back)

    async def _follow_network(self, loop: asyncio.AbstractEventLoop, watch: NetworkWatch) -> None:
        told = asyncio.Event()
        loop.add_reader(watch.fileno(), told.set)
        try:
            while True:
                await told.wait()
                await asyncio.sleep(SETTLE_S)
                watch.drain()
                told.clear()
                try:
                    await self._in_worker(self._node.look_at_network)
                except MeshBridgeError as error:
                    log.error("network.not_read", reason=str(error))
                    await asyncio.sleep(RETRY_S)
                    told.set()
        finally:
            loop.remove_reader(watch.fileno())

    async def _follow_redirects(self) -> None:
        """Read the redirect rules in the pods' namespaces again and again, and whenever there are other pods.

        They are read by a thread of their own: a pod can make that slow, and no other pod may wait for it. So are the
        pods' processes.
        """
        loop = asyncio.get_running_loop()
        while True:
            sidecars, owners = self.published.sidecars, self.published.owners
            seen = await loop.run_in_executor(self._onlooker, self._look, sidecars, owners)
            await self._in_worker(partial(self._node.take_seen, seen))
            for evidence in self._evidence.looked(seen.processes, self._processes.looked_ns):
                self._ring.add(evidence)
            for _ in range(REDIRECT_TURNS):
                await asyncio.sleep(REDIRECT_TURN_S)
                if self.published.sidecars.keys() != sidecars.keys():
                    break

    async def _keep_chain(self, chain: Chain) -> None:
        while True:
            await asyncio.to_thread(chain.keep)
            await asyncio.sleep(CHECK_S)

    async def _try_again(self) -> None:
        while True:
            await self._retry.wait()
            await asyncio.sleep(RETRY_S)
            self._retry.clear()
            await self._in_worker(self._node.step)

    async def _follow_proofs(self) -> None:
        """Prove what policies want proved, one pod after the other, and again after a while."""
        schedule = Schedule()
        while True:
            changed = self._changed
            schedule.update(self.published.proofs, time.monotonic())
            due = schedule.first(time.monotonic())
            wait_s = due.at_s - time.monotonic() if due is not None else None
            if due is None or (wait_s is not None and wait_s > 0):
                with suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await changed.wait()
                continue
            outcome = await self._proving.prove(due.uid, due.wanted, due.turn)
            if outcome is not None:
                await self._in_worker(partial(self._node.take_outcome, due.uid, due.wanted, outcome))
            proved = outcome is not None and outcome.status is Status.TRUE
            schedule.done(due.uid, due.wanted, proved=proved, now_s=time.monotonic())
            await asyncio.sleep(PAUSE_S)

    def _read_waiting(self) -> None:
        """Take in every event that waits."""
        self._read_events(self._reader, MOST_EVENTS)

    def _read_events(self, reader: EventReader, most: int = EVENTS_PER_TURN) -> None:
        for event in reader.read(most):
            of_probe = self._proving.expected.take(event)
            for flow in self._names.flows(event):
                if of_probe and flow.kind is not FlowKind.LOST:
                    continue  # nobody sent it
                self._ring.add(flow)
                self._audits.add(flow)
                evidence = self._evidence.of(flow)
                if evidence is not None:
                    self._ring.add(evidence)

    def _token(self) -> str:
        with self._settings.token_file.open("rb") as file:
            return file.read(MAX_TOKEN_BYTES).decode("ascii", "ignore").strip()  # the controller refuses what is none

    def _uptime_ms(self) -> int:
        return round((time.monotonic() - self._started) * 1e3)

    # What the Observer service and the metrics ask

    @property
    def connected(self) -> bool:
        return self._client.connected

    @property
    def revision_received(self) -> int:
        return self._client.revision_received

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]:
        return self._enforcer.counters()

    def ghost_packets(self) -> int:
        return self._evidence.count

    def probes(self) -> int:
        return self._proving.expected.probes

    def audited(self) -> int:
        return self._audits.total

    def events_lost(self) -> int:
        return self._ring.lost + self._enforcer.lost_events()

    def endpoints(self) -> tuple[pb.EndpointState, ...]:
        return self.published.endpoints

    def status(self) -> pb.Status:
        published, chain = self.published, self._settings.chain
        return pb.Status(
            node=self._settings.node,
            version=__version__,
            revision_programmed=published.revision,
            revision_received=self.revision_received,
            controller_connected=self.connected,
            endpoints_ready=len([state for state in published.endpoints if state.state == READY]),
            endpoints_total=len(published.endpoints),
            identities=published.identities,
            addresses=published.addresses,
            policies=published.policies,
            events_lost=self.events_lost(),
            problems=[*published.problems, *([chain.problem] if chain is not None and chain.problem else [])],
            attach_mode=self._enforcer.mode.value,
            memory_resident_bytes=memory.resident_bytes(),
            uptime_s=time.monotonic() - self._started,
        )

    async def bypasses(self) -> pb.Bypasses:
        make = await self._in_worker(
            partial(self._node.bypasses, self._audits.records(self._settings.node), self._ring.past(0))
        )
        found = await asyncio.get_running_loop().run_in_executor(self._onlooker, make)
        return pb.Bypasses(node=self._settings.node, json=found)

    async def add_endpoint(self, request: pb.AddEndpointRequest) -> pb.AddEndpointResponse:
        pod = f"{request.namespace}/{request.pod}"
        if not request.uid or not 1 <= len(request.interfaces) <= MAX_INTERFACES:
            raise EndpointError(
                f"uid {request.uid!r}, {len(request.interfaces)} interfaces", where=f"AddEndpoint of pod {pod!r}",
                fix=f"give the pod's UID and 1 to {MAX_INTERFACES} interfaces",
            )  # fmt: skip
        hooked = await self._in_worker(lambda: self._node.add_endpoint(pod, request.uid, list(request.interfaces)))
        if request.netns:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._onlooker, self._redirects.announce, request.uid, request.netns)
        ready = request.uid in self.published.ready
        if request.wait_ready:
            ready = await self._wait_ready(request.uid, min(max(request.timeout_s, 0.0), MAX_WAIT_S))
        return pb.AddEndpointResponse(endpoint_id=hooked[0].id, ready=ready)

    async def _wait_ready(self, uid: str, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while uid not in self.published.ready:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def cni(self, call: Call) -> dict[str, Any] | None:
        """What a CNI plugin asks.

        ADD returns with the pod's interfaces hooked and, if the controller tells of the pod within ``ADD_WAIT_S``, its
        policy in force; else they are closed to everything until it does (docs/adr/0242).
        """
        match call.verb:
            case Verb.ADD:
                return await self._cni_add(call)
            case Verb.CHECK:
                await self._in_worker(partial(self._node.check_pod, host_path(call.netns), call.pod))
            case Verb.DEL:
                await self._in_worker(partial(self._node.release_pod, call.uid, call.container))
            case Verb.GC:
                await self._in_worker(partial(self._node.keep_pods, valid_containers(call)))
            case Verb.STATUS:
                pass  # who answers is there
        return None

    async def _cni_add(self, call: Call) -> dict[str, Any]:
        started = time.monotonic()
        network, netns = network_of(call), host_path(call.netns)
        announced = Announced(call.pod, call.container, network.addresses)
        await self._in_worker(partial(self._node.add_pod, call.uid, announced, netns, network.interfaces))
        self._onlooker.submit(
            self._redirects.announce, call.uid, netns
        )  # a slow pod may hold that thread, and no other
        ready = await self._wait_ready(call.uid, ADD_WAIT_S if self.connected else 0.0)
        took_ms = round((time.monotonic() - started) * 1e3)
        log.info("cni.added", pod=call.pod, uid=call.uid, ready=ready, duration_ms=took_ms)
        result = call.config["prevResult"]
        assert isinstance(result, dict)
        return result
