"""The agent's figures for Prometheus, read from the kernel when they are asked for.

Not by prometheus_client: with the servers and TLS it imports it would be a tenth of the agent's memory (docs/adr/0042).

Spec: Prometheus text exposition format 0.0.4.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

from meshbridge.agent.memory import resident_bytes
from meshbridge.agent.node import Published
from meshbridge.errors import SettingsError
from meshbridge.observe.reasons import drop_reason
from meshbridge.observe.tables import READY
from meshbridge.policy.model import Direction

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
_REQUEST_S: Final = 5.0
_MAX_REQUEST_BYTES: Final = 8192


class MetricsSource(Protocol):
    """Where the figures come from."""

    published: Published

    @property
    def connected(self) -> bool: ...

    @property
    def revision_received(self) -> int: ...

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]: ...

    def events_lost(self) -> int: ...

    def audited(self) -> int: ...

    def ghost_packets(self) -> int: ...

    def probes(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Family:
    """One metric with its samples: label values, figure. Names and labels are ours; no outside text gets in."""

    name: str
    kind: str
    help: str
    samples: Iterable[tuple[Mapping[str, str], float]] = field(default_factory=tuple)

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        for labels, value in self.samples:
            inside = ",".join(f'{key}="{text}"' for key, text in labels.items())
            yield f"{self.name}{{{inside}}} {value:.17g}" if inside else f"{self.name} {value:.17g}"


def exposition(source: MetricsSource) -> str:
    """Every figure of the agent, as Prometheus reads it."""
    return "".join(f"{line}\n" for family in _families(source) for line in family.lines())


async def serve_metrics(source: MetricsSource, listen: str) -> asyncio.Server:
    """Serve ``/metrics`` on a loopback address.

    Raises:
        SettingsError: the address is none of loopback, or is taken.
    """
    host, _, port = listen.rpartition(":")
    host = host.strip("[]")
    try:
        if not ipaddress.ip_address(host).is_loopback or not 0 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise SettingsError(
            f"{listen!r} is no loopback address and port", where="--metrics", fix="use 127.0.0.1:PORT or [::1]:PORT"
        ) from None

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_REQUEST_S):
                request = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(request, source))
                await writer.drain()
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, TimeoutError, ConnectionError):
            pass  # no request that could be answered
        finally:
            writer.close()

    try:
        return await asyncio.start_server(answer, host, int(port), limit=_MAX_REQUEST_BYTES)
    except OSError as error:
        raise SettingsError(
            f"cannot listen: {error.strerror}", where=f"--metrics {listen}", fix="use a free port"
        ) from error


def _response(request: bytes, source: MetricsSource) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in (b"GET", b"HEAD"):
        return _http("405 Method Not Allowed", "")
    if path == b"/healthz":
        return _health(source, head=method == b"HEAD")
    if path != b"/metrics":
        return _http("404 Not Found", "")
    return _http("200 OK", exposition(source), head=method == b"HEAD")


def _health(source: MetricsSource, *, head: bool) -> bytes:
    """200 once the kernel holds a revision of this process; what an earlier one left there is enforced before that."""
    status = "200 OK" if source.published.revision else "503 Service Unavailable"
    body = {"revision": source.published.revision, "connected": source.connected}
    return _http(status, json.dumps(body), head=head, content_type="application/json")


def _http(status: str, body: str, *, head: bool = False, content_type: str = CONTENT_TYPE) -> bytes:
    content = body.encode()
    headers = f"HTTP/1.1 {status}\r\nContent-Type: {content_type}\r\nContent-Length: {len(content)}\r\n"
    return f"{headers}Connection: close\r\n\r\n".encode() + (b"" if head else content)


def _families(source: MetricsSource) -> Iterator[Family]:
    packets: list[tuple[Mapping[str, str], float]] = []
    octets: list[tuple[Mapping[str, str], float]] = []
    for (number, direction), (count, size) in sorted(source.counters().items()):
        reason = drop_reason(number).name if number else "FORWARDED"
        labels = {"reason": reason, "direction": Direction(direction & 1).name.lower()}
        packets.append((labels, count))
        octets.append((labels, size))
    yield Family("meshbridge_packets_total", "counter", "Packets by outcome and direction.", packets)
    yield Family("meshbridge_bytes_total", "counter", "Bytes by outcome and direction.", octets)
    lost: list[tuple[Mapping[str, str], float]] = [({}, source.events_lost())]
    yield Family("meshbridge_events_lost_total", "counter", "Events of the kernel that nobody could read.", lost)
    audited: list[tuple[Mapping[str, str], float]] = [({}, source.audited())]
    yield Family("meshbridge_audited_flows_total", "counter", "Connections let through by an audit alone.", audited)
    published = source.published
    ready = len([state for state in published.endpoints if state.state == READY])
    by_state = [({"state": "ready"}, ready), ({"state": "not-ready"}, len(published.endpoints) - ready)]
    yield Family("meshbridge_endpoints", "gauge", "Pod interfaces by state.", by_state)
    ghosts = [({"direction": d.name.lower()}, float(count)) for d, count in published.ghosts.items()]
    yield Family("meshbridge_ghost_bypasses", "gauge", "Pods with a bypass that nobody asked for.", ghosts)
    found: list[tuple[Mapping[str, str], float]] = [({}, published.ghosts_found)]
    yield Family("meshbridge_ghost_bypasses_found_total", "counter", "Ghost bypasses found.", found)
    given_away: list[tuple[Mapping[str, str], float]] = [({}, source.ghost_packets())]
    yield Family(
        "meshbridge_ghost_bypass_packets_total", "counter", "Ports and users that packets gave away.", given_away
    )
    proofs = [({"status": status.value}, float(count)) for status, count in published.proved.items()]
    yield Family("meshbridge_proofs", "gauge", "Pods whose compensation is to be proved, by what came of it.", proofs)
    for name, text, count in (
        ("proofs_failed_total", "Pods that were not proved, or not any more.", published.proofs_failed),
        ("proof_probes_total", "Probes sent to pods; the figures of packets count them as well.", source.probes()),
    ):
        yield Family(f"meshbridge_{name}", "counter", text, [({}, count)])
    for name, text, value in (
        ("controller_connected", "1 while the controller answers.", int(source.connected)),
        ("revision_received", "Newest revision received.", source.revision_received),
        ("revision_programmed", "Newest revision in the kernel.", published.revision),
        ("identities", "Classes of peers that policies tell apart.", published.identities),
        ("addresses", "Addresses whose holder is known.", published.addresses),
        ("policies", "Policy objects that concern this node.", published.policies),
        ("problems", "Conditions that somebody should look at.", len(published.problems)),
        ("compile_seconds", "Time the last compilation took.", published.durations.compile_s),
        ("enforced_seconds", "From a change to the kernel, last time.", published.durations.enforced_s),
        ("apply_seconds", "Time the last writing of the kernel's tables took.", published.durations.apply_s),
        ("resident_bytes", "Memory of the agent.", resident_bytes()),
    ):
        yield Family(f"meshbridge_{name}", "gauge", text, [({}, value)])
