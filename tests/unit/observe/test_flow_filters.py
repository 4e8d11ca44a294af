"""What a filter lets through, option by option."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from ipaddress import ip_address

import pytest

from meshbridge.observe.filters import FilterError, FlowFilter, PodFilter, parse_since, protocol_numbers
from meshbridge.observe.flow import Flow, FlowKind, FlowPeer, FlowVerdict, LostBy

NOW = datetime(2026, 11, 24, 7, 0, 0, tzinfo=UTC)
WEB = FlowPeer(ip_address("10.0.1.10"), 41112, 4711, "shop", "web-7f9c")
API = FlowPeer(ip_address("10.0.2.11"), 80, 4712, "pay", "api")
DROP = Flow(10**18, "n", FlowKind.DROP, FlowVerdict.DROPPED, endpoint_id=7, source=WEB, destination=API, protocol=6)
LOST = Flow(10**18, "n", FlowKind.LOST, FlowVerdict.DROPPED, lost=3, lost_by=LostBy.KERNEL)

CASES = {
    "nothing asked": (FlowFilter(), True),
    "namespace of the source": (FlowFilter(namespaces=frozenset({"shop"})), True),
    "namespace of the destination": (FlowFilter(namespaces=frozenset({"pay"})), True),
    "another namespace": (FlowFilter(namespaces=frozenset({"other"})), False),
    "verdict": (FlowFilter(verdicts=frozenset({"DROPPED"})), True),
    "another verdict": (FlowFilter(verdicts=frozenset({"FORWARDED", "AUDIT"})), False),
    "DENIED is only policy's word": (FlowFilter(verdicts=frozenset({"DENIED"})), False),
    "sender by prefix of its name": (FlowFilter(from_pods=(PodFilter.parse("shop/web"),)), True),
    "sender without namespace": (FlowFilter(from_pods=(PodFilter.parse("web-7f9c"),)), True),
    "sender of another namespace": (FlowFilter(from_pods=(PodFilter.parse("pay/web"),)), False),
    "the receiver is not the sender": (FlowFilter(from_pods=(PodFilter.parse("pay/api"),)), False),
    "receiver": (FlowFilter(to_pods=(PodFilter.parse("pay/"),)), True),
    "either end": (FlowFilter(pods=(PodFilter.parse("pay/api"),)), True),
    "protocol": (FlowFilter(protocols=protocol_numbers("tcp")), True),
    "another protocol": (FlowFilter(protocols=protocol_numbers("icmp")), False),
    "port of the destination": (FlowFilter(ports=frozenset({80})), True),
    "port of the source": (FlowFilter(ports=frozenset({41112})), True),
    "another port": (FlowFilter(ports=frozenset({8080})), False),
    "endpoint": (FlowFilter(endpoint_ids=frozenset({7})), True),
    "another endpoint": (FlowFilter(endpoint_ids=frozenset({8})), False),
    "kind": (FlowFilter(kinds=frozenset({FlowKind.VERDICT})), False),
    "since it": (FlowFilter(since_ns=10**18), True),
    "since later": (FlowFilter(since_ns=10**18 + 1), False),
    "all that is set has to hold": (FlowFilter(ports=frozenset({80}), namespaces=frozenset({"other"})), False),
}


@pytest.mark.parametrize(("wanted", "expected"), CASES.values(), ids=CASES.keys())
def test_filter(wanted: FlowFilter, expected: bool) -> None:
    assert wanted.matches(DROP) is expected


def test_dropped_includes_what_policy_denied() -> None:
    assert FlowFilter(verdicts=frozenset({"DROPPED"})).matches(
        replace(DROP, kind=FlowKind.VERDICT, verdict=FlowVerdict.DENIED)
    )


def test_lost_events_pass_every_filter_but_time() -> None:
    assert FlowFilter(ports=frozenset({1}), namespaces=frozenset({"x"}), kinds=frozenset({FlowKind.DROP})).matches(LOST)
    assert not FlowFilter(since_ns=LOST.time_ns + 1).matches(LOST)


def test_icmp_means_both_families() -> None:
    assert protocol_numbers("icmp") == {1, 58}
    assert protocol_numbers("icmpv6") == {58}


SINCE = {
    "seconds": ("90s", NOW.timestamp() - 90),
    "hours and minutes": ("1h30m", NOW.timestamp() - 5400),
    "fractions": ("1.5s", NOW.timestamp() - 1.5),
    "a time": ("2026-11-24T06:00:00Z", NOW.timestamp() - 3600),
    "a time elsewhere": ("2026-11-24T08:00:00+02:00", NOW.timestamp() - 3600),
    "before 1970": ("999999h", 0.0),
}


@pytest.mark.parametrize(("text", "seconds"), SINCE.values(), ids=SINCE.keys())
def test_since(text: str, seconds: float) -> None:
    assert parse_since(text, NOW) == int(seconds * 1000) * 10**6


@pytest.mark.parametrize("text", ["", "5", "m", "yesterday", "5m1h", "٣s", "9" * 400 + "h", "-5m"])
def test_what_is_no_time_is_refused_with_examples(text: str) -> None:
    with pytest.raises(FilterError, match="1h30m"):
        parse_since(text, NOW)


@pytest.mark.parametrize("text", ["", "/", "a/b/c"])
def test_what_is_no_pod_is_refused(text: str) -> None:
    with pytest.raises(FilterError, match="NAMESPACE/POD"):
        PodFilter.parse(text)
