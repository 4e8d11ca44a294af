"""The figures Prometheus reads, over a real socket."""

from __future__ import annotations

import asyncio

import pytest
from prometheus_client.parser import text_string_to_metric_families

from meshbridge.agent.metrics import _response, exposition, serve_metrics
from meshbridge.agent.node import Published
from meshbridge.bypass.proof import Status
from meshbridge.errors import SettingsError
from meshbridge.policy.model import Direction
from meshbridge.protos import observer_pb2 as pb


class Source:
    published = Published(
        revision=7, endpoints=(pb.EndpointState(state="ready"), pb.EndpointState(state="not-hooked")), problems=("p",),
        ghosts={Direction.INGRESS: 2, Direction.EGRESS: 0}, ghosts_found=5, proved={Status.TRUE: 3, Status.FALSE: 1},
        proofs_failed=4,
    )  # fmt: skip
    connected = True
    revision_received = 8

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]:
        return {(0, 0): (10, 1000), (133, 0): (2, 148), (251, 1): (1, 74)}

    def events_lost(self) -> int:
        return 5

    def ghost_packets(self) -> int:
        return 2

    def probes(self) -> int:
        return 12

    def audited(self) -> int:
        return 3


def test_figures_are_what_the_sources_say() -> None:
    found = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition(Source()))
        for sample in family.samples
    }
    assert found["meshbridge_packets_total", (("direction", "ingress"), ("reason", "POLICY_DENIED"))] == 2
    assert found["meshbridge_bytes_total", (("direction", "ingress"), ("reason", "FORWARDED"))] == 1000
    assert found["meshbridge_packets_total", (("direction", "egress"), ("reason", "REASON_251"))] == 1
    assert found["meshbridge_endpoints", (("state", "not-ready"),)] == 1
    assert found["meshbridge_revision_programmed", ()] == 7
    assert found["meshbridge_revision_received", ()] == 8
    assert found["meshbridge_events_lost_total", ()] == 5
    assert found["meshbridge_audited_flows_total", ()] == 3
    assert found["meshbridge_ghost_bypass_packets_total", ()] == 2
    assert found["meshbridge_ghost_bypasses", (("direction", "ingress"),)] == 2
    assert found["meshbridge_ghost_bypasses_found_total", ()] == 5
    assert found["meshbridge_proofs", (("status", "True"),)] == 3
    assert found["meshbridge_proofs_failed_total", ()] == 4
    assert found["meshbridge_proof_probes_total", ()] == 12
    assert found["meshbridge_resident_bytes", ()] > 1e6


REQUESTS = {
    "metrics": (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"HTTP/1.1 200 OK"),
    "health, with a revision in the kernel": (b"GET /healthz HTTP/1.1\r\n\r\n", b"HTTP/1.1 200 OK"),
    "another path": (b"GET / HTTP/1.1\r\n\r\n", b"HTTP/1.1 404"),
    "another method": (b"POST /metrics HTTP/1.1\r\n\r\n", b"HTTP/1.1 405"),
    "no http": (b"\x00\xff\r\n\r\n", b"HTTP/1.1 405"),
    "a header without end": (b"GET /" + b"a" * 100_000, b""),
}


@pytest.mark.parametrize(("request_bytes", "expected"), REQUESTS.values(), ids=REQUESTS.keys())
def test_requests(request_bytes: bytes, expected: bytes) -> None:
    async def body() -> bytes:
        server = await serve_metrics(Source(), "127.0.0.1:0")
        async with server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request_bytes)
            try:
                return await asyncio.wait_for(reader.read(65536), 5)
            except ConnectionError:
                return b""
            finally:
                writer.close()

    answer = asyncio.run(body())
    assert answer.startswith(expected)
    assert expected or not answer


def test_an_agent_without_a_revision_is_not_healthy_yet() -> None:
    class Starting(Source):
        published = Published()

    assert _response(b"GET /healthz HTTP/1.1\r\n\r\n", Starting()).startswith(b"HTTP/1.1 503")


@pytest.mark.parametrize("listen", ["0.0.0.0:9400", "192.0.2.1:1", "localhost:1", "127.0.0.1:x", "127.0.0.1:99999", ""])
def test_only_loopback_is_served(listen: str) -> None:
    with pytest.raises(SettingsError, match=r"127\.0\.0\.1:PORT"):
        asyncio.run(serve_metrics(Source(), listen))
