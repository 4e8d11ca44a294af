"""Tables that many clients hold: what differs is found and encoded once; a client that has all of one costs nothing."""

from __future__ import annotations

import gc
import weakref

from envoy.service.discovery.v3.discovery_pb2 import DeltaDiscoveryRequest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.xds import types as xds
from meshbridge.xds.snapshot import DeltaSession, Snapshot
from meshbridge.xds.tables import NOTHING, Resource, Table, differing

CONTENTS = st.dictionaries(st.sampled_from("abcdef"), st.sampled_from([b"1", b"2"]))


def table(content: dict[str, bytes]) -> Table:
    return Table((name, Resource.of(body)) for name, body in content.items())


@given(CONTENTS, CONTENTS)
def test_what_a_change_differs_in_is_what_a_comparison_finds(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    old, new = table(before), table(after)
    changes = {name: new.get(name) for name in before.keys() | after.keys()}
    changed = old.changed(changes)
    assert changed == new
    assert changed.differing_from(old) == differing(old, new) == new.differing_from(old)


@given(CONTENTS, CONTENTS)
def test_a_transition_leads_from_one_table_to_the_other(before: dict[str, bytes], after: dict[str, bytes]) -> None:
    old, new = table(before), table(after)
    held = {name: resource.version for name, resource in old.items()}
    for step in new.transition_from(old, xds.ADDRESS).steps:
        held |= step.versions
    assert {name: version for name, version in held.items() if version} == {n: r.version for n, r in new.items()}


def subscribed(*types: str) -> DeltaSession:
    session = DeltaSession()
    for type_url in types:
        session.receive(DeltaDiscoveryRequest(type_url=type_url))
    return session


def settle(session: DeltaSession, state: Snapshot) -> list[bytes]:
    sent = []
    while (response := session.next_response(state)) is not None:
        sent.append(response.content)
        nonce = response.decoded().nonce
        session.receive(DeltaDiscoveryRequest(type_url=response.type_url, response_nonce=nonce))
    return sent


def test_a_change_is_compared_and_encoded_once_for_all_who_have_the_same() -> None:
    before = table({str(i): b"1" for i in range(100)})
    after = before.changed({"7": Resource.of(b"2")})
    sessions = [subscribed(xds.ADDRESS) for _ in range(5)]
    for session in sessions:
        settle(session, Snapshot({xds.ADDRESS: before}))
    sent = [settle(session, Snapshot({xds.ADDRESS: after})) for session in sessions]
    assert len({content for (content,) in sent}) == 1
    (step,) = after.transition_from(before, xds.ADDRESS).steps
    assert step is after.transition_from(before, xds.ADDRESS).steps[0]
    assert sent[0][0].startswith(step.content())


def test_a_client_that_has_a_table_holds_it_and_nothing_else() -> None:
    """A thousand clients at one table of 20,000 addresses: no name of it is kept for each of them."""
    session = subscribed(xds.ADDRESS)
    state = table({str(i): b"1" for i in range(1_000)})
    settle(session, Snapshot({xds.ADDRESS: state}))
    held = session._subscriptions[xds.ADDRESS].held
    assert held.base is state
    assert not held.over


def test_a_client_that_comes_back_holds_the_table_as_soon_as_it_was_compared() -> None:
    state = table({str(i): b"1" for i in range(1_000)})
    session = DeltaSession()
    versions = {name: resource.version for name, resource in state.items()} | {"gone": "1"}
    session.receive(DeltaDiscoveryRequest(type_url=xds.ADDRESS, initial_resource_versions=versions))
    (content,) = settle(session, Snapshot({xds.ADDRESS: state}))
    assert b"gone" in content
    held = session._subscriptions[xds.ADDRESS].held
    assert held.base is state
    assert not held.over


def test_a_table_nobody_is_at_any_more_is_let_go() -> None:
    before = table({"a": b"1"})
    after = before.changed({"a": Resource.of(b"2")})
    assert after.differing_from(before) == {"a"}
    session = subscribed(xds.ADDRESS)
    settle(session, Snapshot({xds.ADDRESS: before}))
    settle(session, Snapshot({xds.ADDRESS: after}))
    gone = weakref.ref(before)
    del before
    gc.collect()
    assert gone() is None


def test_nothing_is_never_changed() -> None:
    settle(subscribed(xds.ADDRESS), Snapshot({xds.ADDRESS: table({"a": b"1"})}))
    assert not NOTHING
