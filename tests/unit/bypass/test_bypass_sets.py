"""Sets and boxes of packets behave like sets of numbers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshbridge.bypass.sets import Box, IntSet, NameSet, coalesced, networks
from meshbridge.identity.model import IpFamily

LIMIT = 40
SPANS = st.lists(st.tuples(st.integers(0, LIMIT), st.integers(0, LIMIT)), max_size=5)
NAMES = st.builds(NameSet, st.frozensets(st.sampled_from(["eth0", "lo", "tap0"])), st.booleans())


def numbers(members: IntSet) -> set[int]:
    return {number for first, last in members for number in range(first, last + 1)}


@given(SPANS, SPANS)
def test_interval_sets_agree_with_python_sets(left: list[tuple[int, int]], right: list[tuple[int, int]]) -> None:
    one, other = IntSet.of(*left), IntSet.of(*right)
    assert numbers(one & other) == numbers(one) & numbers(other)
    assert numbers(one | other) == numbers(one) | numbers(other)
    assert numbers(one - other) == numbers(one) - numbers(other)
    assert len(one) == len(numbers(one))
    assert all(last + 1 < following for (_, last), (following, _) in zip(one.spans, one.spans[1:], strict=False))


@given(NAMES, NAMES, st.sampled_from(["eth0", "lo", "tap0", "eth1"]))
def test_name_sets_agree_with_membership(left: NameSet, right: NameSet, name: str) -> None:
    assert (name in left & right) == (name in left and name in right)
    assert (name in left | right) == (name in left or name in right)
    assert (name in left - right) == (name in left and name not in right)


def boxes() -> st.SearchStrategy[Box]:
    members = st.builds(lambda spans: IntSet.of(*spans), SPANS)
    return st.builds(
        lambda source, destination, port, name: Box(source, destination, port=port, input=name),
        members, members, members, NAMES,
    )  # fmt: skip


@given(boxes(), boxes(), st.tuples(*[st.integers(0, LIMIT)] * 3), st.sampled_from(["eth0", "lo", "eth9"]))
def test_what_a_box_leaves_over_is_disjoint_and_complete(
    left: Box, right: Box, point: tuple[int, int, int], name: str
) -> None:
    def holds(box: Box) -> bool:
        source, destination, port = point
        return source in box.source and destination in box.destination and port in box.port and name in box.input

    rest = left.without(right)
    assert sum(holds(box) for box in rest) == (holds(left) and not holds(right) if not left.empty else 0)
    assert sum(holds(box) for box in coalesced(rest)) == sum(holds(box) for box in rest)
    common = left.both(right)
    assert (common is not None and holds(common)) == (holds(left) and holds(right))


def test_networks_are_the_fewest_prefixes() -> None:
    members = IntSet.of((0x0A000000, 0x0A0000FF), 0x0A000100)
    assert [str(network) for network in networks(members, IpFamily.IPV4)] == ["10.0.0.0/24", "10.0.1.0/32"]
