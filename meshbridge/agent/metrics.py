"""The agent's figures for Prometheus, read from the kernel when they are asked for."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from meshbridge.agent.node import Published
from meshbridge.errors import SettingsError
from meshbridge.observe.reasons import drop_reason
from meshbridge.policy.model import Direction


class MetricsSource(Protocol):
    """Where the figures come from; called from the metrics server's thread."""

    published: Published

    @property
    def connected(self) -> bool: ...

    @property
    def revision_received(self) -> int: ...

    def counters(self) -> dict[tuple[int, int], tuple[int, int]]: ...

    def events_lost(self) -> int: ...


class AgentCollector(Collector):
    """Everything Prometheus may ask of one agent."""

    def __init__(self, source: MetricsSource, resident_bytes: Callable[[], int]) -> None:
        self._source, self._resident_bytes = source, resident_bytes

    def collect(self) -> Iterator[Metric]:
        yield from self._packets()
        published = self._source.published
        ready = len([state for state in published.endpoints if state.state == "ready"])
        endpoints = GaugeMetricFamily("meshbridge_endpoints", "Pod interfaces by state.", labels=["state"])
        endpoints.add_metric(["ready"], ready)
        endpoints.add_metric(["not-ready"], len(published.endpoints) - ready)
        yield endpoints
        for name, text, value in (
            ("controller_connected", "1 while the controller answers.", int(self._source.connected)),
            ("revision_received", "Newest revision received.", self._source.revision_received),
            ("revision_programmed", "Newest revision in the kernel.", published.revision),
            ("identities", "Classes of peers that policies tell apart.", published.identities),
            ("addresses", "Addresses whose holder is known.", published.addresses),
            ("policies", "Policy objects that concern this node.", published.policies),
            ("problems", "Conditions that somebody should look at.", len(published.problems)),
            ("compile_seconds", "Time the last compilation took.", published.durations.compile_s),
            ("enforced_seconds", "From a change to the kernel, last time.", published.durations.enforced_s),
            ("apply_seconds", "Time the last writing of the kernel's tables took.", published.durations.apply_s),
            ("resident_bytes", "Memory of the agent.", self._resident_bytes()),
        ):
            yield GaugeMetricFamily(f"meshbridge_{name}", text, value=value)
        yield CounterMetricFamily(
            "meshbridge_events_lost", "Events of the kernel that nobody could read.", value=self._source.events_lost()
        )

    def _packets(self) -> Iterator[Metric]:
        labels = ["reason", "direction"]
        packets = CounterMetricFamily("meshbridge_packets", "Packets by outcome and direction.", labels=labels)
        octets = CounterMetricFamily("meshbridge_bytes", "Bytes by outcome and direction.", labels=labels)
        for (number, direction), (count, size) in sorted(self._source.counters().items()):
            reason = drop_reason(number).name if number else "FORWARDED"
            where = [reason, Direction(direction & 1).name.lower()]
            packets.add_metric(where, count)
            octets.add_metric(where, size)
        yield packets
        yield octets


def serve_metrics(source: MetricsSource, listen: str, resident_bytes: Callable[[], int]) -> tuple[Any, Any]:
    """Serve ``/metrics`` on a loopback address; the server and its thread.

    Raises:
        SettingsError: the address is none of loopback, or is taken.
    """
    host, _, port = listen.rpartition(":")
    try:
        if not ipaddress.ip_address(host.strip("[]")).is_loopback or not 0 <= int(port) <= 65535:
            raise ValueError
    except ValueError:
        raise SettingsError(
            f"{listen!r} is no loopback address and port", where="--metrics", fix="use 127.0.0.1:PORT or [::1]:PORT"
        ) from None
    registry = CollectorRegistry()
    registry.register(AgentCollector(source, resident_bytes))
    try:
        return start_http_server(int(port), host.strip("[]"), registry)
    except OSError as error:
        raise SettingsError(
            f"cannot listen: {error.strerror}", where=f"--metrics {listen}", fix="use a free port"
        ) from error
