"""The delta protocol's state machine against a literal model of a client."""

from __future__ import annotations

from dataclasses import dataclass, field
from unittest.mock import patch

import pytest
from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbridge.xds import snapshot as xds
from meshbridge.xds import tables
from meshbridge.xds.snapshot import DeltaSession, ProtocolError, Resource, Response, Snapshot
from meshbridge.xds.tables import Table

TYPES = (xds.CLUSTER, xds.LISTENER, xds.SECRET, xds.REVISION)
BAD = b"bad"


@dataclass
class Client:
    """Applies what it is sent; refuses every response that contains a resource with the body ``bad``."""

    held: dict[str, dict[str, Resource]] = field(default_factory=dict)
    names: dict[str, set[str] | None] = field(default_factory=dict)  # None: wildcard
    received: list[tuple[str, list[str], list[str]]] = field(default_factory=list)

    def subscribe(self, type_url: str, names: set[str] | None) -> DeltaDiscoveryRequest:
        first = type_url not in self.names
        previous = self.names.get(type_url)
        self.names[type_url] = names
        held = self.held.setdefault(type_url, {})
        request = DeltaDiscoveryRequest(type_url=type_url)
        if first:
            request.resource_names_subscribe.extend(sorted(names or ()))
            for name, resource in held.items():
                if names is None or name in names:
                    request.initial_resource_versions[name] = resource.version
        else:
            old = {"*"} if previous is None else previous
            new = {"*"} if names is None else names
            request.resource_names_subscribe.extend(sorted(new - old))
            request.resource_names_unsubscribe.extend(sorted(old - new))
        if names is not None:
            self.held[type_url] = {n: r for n, r in held.items() if n in names}
        return request

    def take(self, sent: Response) -> DeltaDiscoveryRequest:
        response = sent.decoded()
        upserts = {r.name: Resource(r.version, r.resource.value) for r in response.resources}
        self.received.append((response.type_url, sorted(upserts), sorted(response.removed_resources)))
        answer = DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=response.nonce)
        if any(resource.body == BAD for resource in upserts.values()):
            answer.error_detail.message = "cannot use it"
            return answer
        names = self.names[response.type_url]
        held = self.held[response.type_url]
        held.update({n: r for n, r in upserts.items() if names is None or n in names})
        for name in response.removed_resources:
            held.pop(name, None)
        return answer


def snapshot(content: dict[str, dict[str, bytes]]) -> Snapshot:
    """Tables, but for one type: sessions go other ways with what only one client has."""
    made = {t: {n: Resource.of(body) for n, body in names.items()} for t, names in content.items()}
    return Snapshot({t: names if t == xds.SECRET else Table(names) for t, names in made.items()})


def settle(session: DeltaSession, client: Client, state: Snapshot) -> int:
    """Exchange messages until nothing is left to say; the number of responses it took."""
    for count in range(200):
        response = session.next_response(state)
        if response is None:
            return count
        session.receive(client.take(response))
    raise AssertionError("the server keeps sending")


def connect(client: Client, *types: str) -> DeltaSession:
    session = DeltaSession()
    for type_url in types or TYPES:
        wanted = client.names.pop(type_url, None)
        session.receive(client.subscribe(type_url, wanted))
    return session


NAMES = st.sampled_from("abcd")
BODIES = st.sampled_from([b"1", b"2", b"3", BAD])
CONTENTS = st.fixed_dictionaries({t: st.dictionaries(NAMES, BODIES, max_size=4) for t in TYPES})
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("state"), CONTENTS),
        st.tuples(st.just("subscribe"), st.sampled_from(TYPES), st.none() | st.sets(NAMES, min_size=1)),
        st.tuples(st.just("exchange"), st.integers(1, 3)),
        st.tuples(st.just("send"), st.none()),
        st.tuples(st.just("answer"), st.none()),
        st.tuples(st.just("reconnect"), st.none()),
    ),
    max_size=30,
)


@pytest.mark.parametrize("max_bytes", [1 << 20, 1], ids=["one response", "a response for each resource"])
@settings(max_examples=500, deadline=None)
@given(steps=STEPS, last=CONTENTS)
def test_any_sequence_ends_with_the_client_at_the_snapshot(
    max_bytes: int, steps: list[tuple[object, ...]], last: dict[str, dict[str, bytes]]
) -> None:
    with patch.object(xds, "MAX_RESPONSE_BYTES", max_bytes), patch.object(tables, "MAX_RESPONSE_BYTES", max_bytes):
        play(steps, last)


def play(steps: list[tuple[object, ...]], last: dict[str, dict[str, bytes]]) -> None:
    client, state = Client(), snapshot({})
    session = connect(client)
    in_flight: list[Response] = []
    for step in steps:
        match step:
            case ("state", content):
                state = snapshot(content)
            case ("subscribe", type_url, names):
                session.receive(client.subscribe(type_url, names))
            case ("exchange", count):
                for _ in range(0 if in_flight else count):
                    if (response := session.next_response(state)) is not None:
                        session.receive(client.take(response))
            case ("send", _):
                if (response := session.next_response(state)) is not None:
                    in_flight.append(response)
            case ("answer", _) if in_flight:
                session.receive(client.take(in_flight.pop(0)))
            case ("reconnect", _):
                session = connect(client)  # what was in flight is lost with its stream
                in_flight.clear()
    for response in in_flight:
        session.receive(client.take(response))
    final = snapshot(last)
    settle(session, client, final)
    for type_url in TYPES:
        names = client.names[type_url]
        for name, resource in final.of(type_url).items():
            if resource.body != BAD and (names is None or name in names):
                assert client.held[type_url].get(name) == resource
        for name in client.held[type_url]:
            assert name in final.of(type_url), "a resource that is gone must not stay"
    assert session.next_response(final) is None, "a settled stream is quiet"


def test_a_bad_resource_keeps_no_good_one_away_and_is_not_sent_again() -> None:
    client = Client()
    session = connect(client, xds.CLUSTER)
    content = {"good": b"1", "bad": BAD, "fine": b"2"}
    state = snapshot({xds.CLUSTER: content})
    assert settle(session, client, state) == 4  # together, then one by one
    assert set(client.held[xds.CLUSTER]) == {"good", "fine"}
    assert session.next_response(snapshot({xds.CLUSTER: content})) is None
    settle(session, client, snapshot({xds.CLUSTER: content | {"bad": b"mended"}}))
    assert client.held[xds.CLUSTER]["bad"].body == b"mended"


def test_a_refused_change_leaves_the_last_good_version_and_its_return_costs_nothing() -> None:
    client = Client()
    session = connect(client, xds.LISTENER)
    good = snapshot({xds.LISTENER: {"inbound": b"1"}})
    settle(session, client, good)
    assert settle(session, client, snapshot({xds.LISTENER: {"inbound": BAD}})) == 1
    assert client.held[xds.LISTENER]["inbound"].body == b"1"
    assert settle(session, client, good) == 0


def test_what_was_refused_is_sent_again_after_something_else_was_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    session = connect(client, xds.LISTENER)
    bad = snapshot({xds.LISTENER: {"inbound": BAD}})
    settle(session, client, bad)
    settle(session, client, snapshot({xds.LISTENER: {"inbound": b"1"}}))
    monkeypatch.setattr(f"{__name__}.BAD", b"nothing is bad any more")
    settle(session, client, bad)
    assert client.held[xds.LISTENER]["inbound"] == bad.of(xds.LISTENER)["inbound"]


def test_a_refusal_that_comes_after_the_server_was_done_is_heeded() -> None:
    client = Client()
    session = connect(client, xds.LISTENER)
    state = snapshot({xds.LISTENER: {"inbound": BAD, "outbound": b"1"}})
    response = session.next_response(state)
    assert response is not None
    assert session.next_response(state) is None
    session.receive(client.take(response))
    settle(session, client, state)
    assert set(client.held[xds.LISTENER]) == {"outbound"}


def test_what_a_client_refuses_is_known_until_it_changes_or_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    client = Client()
    session = connect(client, xds.LISTENER)
    bad = snapshot({xds.LISTENER: {"inbound": BAD, "outbound": b"1"}})
    settle(session, client, bad)
    assert session.refusals(bad) == {(xds.LISTENER, "inbound"): "cannot use it"}
    changed = snapshot({xds.LISTENER: {"inbound": b"2", "outbound": b"1"}})
    assert not session.refusals(changed), "it may be taken as it is now"
    settle(session, client, changed)
    assert not session.refusals(changed)
    monkeypatch.setattr(f"{__name__}.BAD", b"nothing is bad any more")
    settle(session, client, bad)
    assert not session.refusals(bad)


def test_clusters_come_before_and_go_after_the_listeners_that_name_them() -> None:
    client = Client()
    session = connect(client, xds.CLUSTER, xds.LISTENER)
    settle(session, client, snapshot({xds.CLUSTER: {"old": b"1"}, xds.LISTENER: {"l": b"uses old"}}))
    client.received.clear()
    settle(session, client, snapshot({xds.CLUSTER: {"new": b"2"}, xds.LISTENER: {"l": b"uses new"}}))
    assert client.received == [
        (xds.CLUSTER, ["new"], []),
        (xds.LISTENER, ["l"], []),
        (xds.CLUSTER, [], ["old"]),
    ]


def test_a_revision_waits_until_everything_before_it_was_sent() -> None:
    client = Client()
    session = connect(client, xds.POLICY, xds.REVISION)
    first = snapshot({xds.POLICY: {"a": b"1"}, xds.REVISION: {"revision": b"1"}})
    second = snapshot({xds.POLICY: {"a": b"1", "b": b"2"}, xds.REVISION: {"revision": b"2"}})
    response = session.next_response(first)
    assert response is not None
    assert session.next_response(second) is None, "policy a is unacknowledged, so b and the revision wait"
    session.receive(client.take(response))
    settle(session, client, second)
    assert [(t, names) for t, names, _ in client.received] == [
        (xds.POLICY, ["a"]),
        (xds.POLICY, ["b"]),
        (xds.REVISION, ["revision"]),
    ]


def test_a_slow_client_gets_the_latest_state_only() -> None:
    client = Client()
    session = connect(client, xds.POLICY)
    response = session.next_response(snapshot({xds.POLICY: {"a": b"1"}}))
    assert response is not None
    for body in (b"2", b"3", b"4"):
        assert session.next_response(snapshot({xds.POLICY: {"a": body}})) is None
    session.receive(client.take(response))
    assert settle(session, client, snapshot({xds.POLICY: {"a": b"5"}})) == 1


def test_a_reconnected_client_is_sent_only_what_differs() -> None:
    client = Client()
    before = {xds.POLICY: {"a": b"1", "b": b"2", "c": b"3"}}
    settle(connect(client, xds.POLICY), client, snapshot(before))
    client.received.clear()
    settle(connect(client, xds.POLICY), client, snapshot({xds.POLICY: {"a": b"1", "b": b"changed"}}))
    assert client.received == [(xds.POLICY, ["b"], ["c"])]


def test_a_name_that_does_not_exist_is_answered_as_removed() -> None:
    client = Client()
    session = DeltaSession()
    session.receive(client.subscribe(xds.SECRET, {"missing"}))
    settle(session, client, snapshot({}))
    assert client.received == [(xds.SECRET, [], ["missing"])]
    settle(session, client, snapshot({xds.SECRET: {"missing": b"1"}}))
    assert client.held[xds.SECRET]["missing"].body == b"1"


def test_a_wildcard_without_resources_is_answered_so_that_the_client_need_not_wait() -> None:
    client = Client()
    assert settle(connect(client, xds.LISTENER), client, snapshot({})) == 1
    assert client.received == [(xds.LISTENER, [], [])]


def test_who_subscribes_again_is_sent_again() -> None:
    client, session = Client(), DeltaSession()
    state = snapshot({xds.SECRET: {"default": b"1"}})
    session.receive(client.subscribe(xds.SECRET, {"default"}))
    settle(session, client, state)
    session.receive(DeltaDiscoveryRequest(type_url=xds.SECRET, resource_names_subscribe=["default"]))
    assert settle(session, client, state) == 1


def test_big_snapshots_go_in_responses_below_grpc_limits() -> None:
    client = Client()
    session = connect(client, xds.ADDRESS)
    state = Snapshot(
        {xds.ADDRESS: {f"10.0.{i >> 8}.{i & 255}": Resource.of(b"x" * 1000 + str(i).encode()) for i in range(10_000)}}
    )
    sizes = []
    while (response := session.next_response(state)) is not None:
        sizes.append(len(response.content))
        session.receive(client.take(response))
    assert len(client.held[xds.ADDRESS]) == 10_000
    assert max(sizes) < 4 << 20
    assert len(sizes) > 3


HOSTILE = {
    "a type nobody serves": DeltaDiscoveryRequest(type_url="type.googleapis.com/envoy.config.Nothing"),
    "no type": DeltaDiscoveryRequest(),
    "a name of 5,000 characters": DeltaDiscoveryRequest(type_url=xds.SECRET, resource_names_subscribe=["x" * 5_000]),
    "more names than anyone needs": DeltaDiscoveryRequest(
        type_url=xds.SECRET, resource_names_subscribe=[str(i) for i in range(xds.MAX_NAMES + 1)]
    ),
}


@pytest.mark.parametrize("request_", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_broken_request_ends_the_stream_with_a_reason(request_: DeltaDiscoveryRequest) -> None:
    with pytest.raises(ProtocolError):
        DeltaSession().receive(request_)


def test_an_answer_to_an_unknown_nonce_changes_nothing() -> None:
    client = Client()
    session = connect(client, xds.POLICY)
    state = snapshot({xds.POLICY: {"a": b"1"}})
    assert session.next_response(state) is not None
    stale = DeltaDiscoveryRequest(type_url=xds.POLICY, response_nonce="of another stream")
    stale.error_detail.message = "no"
    assert session.receive(stale) is None
    assert session.next_response(state) is None, "the real response is still unacknowledged"
