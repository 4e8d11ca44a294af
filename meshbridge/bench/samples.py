"""Statistics of repeated measurements: percentiles, paired ratios, growth. Pure functions over values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

Variant = TypeVar("Variant", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Sample:
    """One repeat of one variant. Times are per operation; ``cpu_ns`` is what each kind of process took.

    ``generator_ns`` is the time that the load generator spent in user space, on itself.
    """

    p50_ns: float
    p99_ns: float
    per_second: float
    cpu_ns: Mapping[str, float] = field(default_factory=dict)
    generator_ns: float = 0

    @property
    def total_cpu_ns(self) -> float:
        return sum(self.cpu_ns.values())


@dataclass(frozen=True, slots=True)
class Ratio:
    """The median of the rounds' ratios to the baseline of the same round; half of them are in ``low``..``high``."""

    median: float
    low: float
    high: float


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest of ``values`` that at least ``percent`` of them do not exceed (nearest rank); never interpolated."""
    if not values:
        raise ValueError("percentile of nothing")
    rank = max(1, math.ceil(len(values) * percent / 100))
    return sorted(values)[rank - 1]


def rounds(variants: Sequence[Variant], repeats: int) -> Iterator[Variant]:
    """A B C A B C …: each round measures every variant once, so that drift of the machine meets all of them alike.

    Every other round runs backwards: a variant is not always measured after the same neighbour.
    """
    for number in range(repeats):
        yield from variants if number % 2 == 0 else reversed(variants)


def collect(
    variants: Sequence[Variant], repeats: int, measure: Callable[[Variant], Sample]
) -> dict[Variant, list[Sample]]:
    """Measure in interleaved rounds; list position = round, for every variant."""
    samples: dict[Variant, list[Sample]] = {variant: [] for variant in variants}
    for variant in rounds(variants, repeats):
        samples[variant].append(measure(variant))
    return samples


def paired_ratio(values: Sequence[float], baseline: Sequence[float]) -> Ratio:
    """Compare two variants round by round; both sequences are in the order of the rounds."""
    ratios = [value / base for value, base in zip(values, baseline, strict=True)]
    return Ratio(statistics.median(ratios), percentile(ratios, 25), percentile(ratios, 75))
