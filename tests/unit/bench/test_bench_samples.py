"""The statistics behind every figure: a wrong ratio would be believed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.bench.samples import collect, paired_ratio, percentile, rounds

PERCENTILES = {
    "one value is every percentile": ([7], 99, 7),
    "p50 of an even count is the lower middle": ([1, 2, 3, 4], 50, 2),
    "p99 of a hundred is the ninety-ninth": (list(range(1, 101)), 99, 99),
    "p99 of fewer than a hundred is the worst": (list(range(1, 51)), 99, 50),
    "order of the values does not matter": ([9, 1, 5], 50, 5),
    "p100 is the worst": ([3, 8, 2], 100, 8),
}


@pytest.mark.parametrize(("values", "percent", "expected"), PERCENTILES.values(), ids=PERCENTILES.keys())
def test_percentile(values: list[float], percent: float, expected: float) -> None:
    assert percentile(values, percent) == expected


def test_percentile_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        percentile([], 50)


@given(st.lists(st.integers(), min_size=1), st.floats(min_value=0.1, max_value=100))
def test_at_least_the_percentage_does_not_exceed_the_percentile(values: list[int], percent: float) -> None:
    bound = percentile(values, percent)
    assert bound in values
    assert sum(value <= bound for value in values) >= len(values) * percent / 100


def test_rounds_interleave_and_turn_around() -> None:
    assert list(rounds("ABC", 3)) == ["A", "B", "C", "C", "B", "A", "A", "B", "C"]


def test_collected_samples_keep_the_order_of_the_rounds() -> None:
    counter = iter(range(100))
    assert collect(["a", "b"], 3, lambda _variant: next(counter)) == {"a": [0, 3, 4], "b": [1, 2, 5]}


def test_ratio_is_of_the_same_round_so_that_drift_cancels() -> None:
    baseline = [10.0, 20.0, 40.0]  # the machine slows down by four during the run
    ratio = paired_ratio([11.0, 22.0, 44.0], baseline)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.1, 1.1))


def test_one_disturbed_round_moves_neither_the_ratio_nor_its_range() -> None:
    values = [1.1, 1.1, 1.1, 1.1, 9.0, 1.1, 1.1, 1.1]
    ratio = paired_ratio(values, [1.0] * 8)
    assert (ratio.low, ratio.median, ratio.high) == pytest.approx((1.1, 1.1, 1.1))


def test_ratio_needs_as_many_rounds_on_both_sides() -> None:
    with pytest.raises(ValueError, match="longer"):
        paired_ratio([1.0], [1.0, 2.0])
