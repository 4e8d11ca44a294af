"""Answers of ``evaluate`` beside those of an Envoy; of what differs, the smallest case that still does."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import yaml
from envoy_world import Point, World, lines

from meshbridge.evaluation.batch import answer_lines
from meshbridge.evaluation.cluster import Cluster

MAX_STEPS = 200
_KEPT = frozenset({"action", "selector", "issuer", "jwks", "key", "mode"})
Policies = list[dict[str, Any]]


def evaluated(cluster: Cluster, points: Sequence[Point]) -> list[bool]:
    """What ``meshbridge evaluate`` says of points; of a point that is told in full it has to be certain.

    Nothing but the mesh's policies is in a ``World``, so the whole verdict is the mesh's.
    """
    records = [line.record for line in answer_lines(cluster, lines(list(points)))]
    for record in records:
        assert record["verdict"] == record["mesh"], f"verdict and mesh differ: {record}"
        assert record["verdict"] in ("ALLOW", "DENY"), f"not certain: {record}"
    return [record["verdict"] == "ALLOW" for record in records]


def compare(
    world: World,
    points: Sequence[Point],
    expected: Sequence[bool],
    seen: Sequence[bool],
    envoy_allows: Callable[[Policies, Point], bool] | None = None,
) -> None:
    """Fail where the two differ, with a case as small as can be; print what was compared where they do not.

    Args:
        envoy_allows: what the Envoy does with a point when it holds other policies; None where that takes too long.
    """  # fmt: skip
    counts = Counter(
        ("HTTP" if point.is_http else "TCP", "ALLOW" if answer else "DENY")
        for point, answer in zip(points, expected, strict=True)
    )
    told = ", ".join(f"{form} {verdict} {count}" for (form, verdict), count in sorted(counts.items()))
    print(f"seed {world.seed}, {world.options}: {len(points)} points: {told}")
    different = [p for p, ours, envoys in zip(points, expected, seen, strict=True) if ours is not envoys]
    if different:
        pytest.fail(_told(world, different, envoy_allows), pytrace=False)
    for form in ("HTTP", "TCP"):
        for verdict in ("ALLOW", "DENY"):
            assert counts[form, verdict] > len(points) // 20, f"too few to mean anything: {told}"


def _told(world: World, different: Sequence[Point], envoy_allows: Callable[[Policies, Point], bool] | None) -> str:
    point = different[0]
    policies = [each for each in world.policies if _may_select(each, point)]
    if envoy_allows is not None:
        policies = smallest(policies, partial(_differs, world, point, envoy_allows))
    ours = "ALLOW" if evaluated(world.cluster(policies), [point])[0] else "DENY"
    parts = (
        f"CONFORMANCE_SEED={world.seed} with {world.options}: {len(different)} points differ. Of the first one,"
        f" evaluate says {ours} and Envoy the opposite.",
        json.dumps(point.flow, indent=1),
        f"asked with a token with {point.claims}, well signed: {point.signed}",
        "with these policies:\n" + yaml.safe_dump_all(policies, sort_keys=False),
    )
    return "\n".join(parts)


def _may_select(policy: dict[str, Any], point: Point) -> bool:
    labels = policy["spec"].get("selector", {"matchLabels": {}})["matchLabels"]
    return labels.items() <= point.server.labels.items()


def _differs(world: World, point: Point, envoy_allows: Callable[[Policies, Point], bool], policies: Policies) -> bool:
    cluster = world.cluster(policies)
    return not cluster.policies.refusals and evaluated(cluster, [point]) != [envoy_allows(policies, point)]


def smallest(policies: Policies, differs: Callable[[Policies], bool]) -> Policies:
    """The policies without whatever can go while ``differs`` holds; as they are where it does not hold at all."""
    steps = 0
    if not differs(policies):
        return policies
    shrunk = True
    while shrunk:
        shrunk = False
        for candidate in _smaller(policies):
            steps += 1
            if steps > MAX_STEPS:
                return policies
            if differs(candidate):
                policies, shrunk = candidate, True
                break
    return policies


def _smaller(policies: Policies) -> Iterator[Policies]:
    """The policies with half of them gone, one of them, or one thing less in one of them."""
    if len(policies) > 2:
        middle = len(policies) // 2
        yield policies[:middle]
        yield policies[middle:]
    for index in range(len(policies)):
        yield policies[:index] + policies[index + 1 :]
    for index, policy in enumerate(policies):
        for path in _parts(policy["spec"]):
            candidate = copy.deepcopy(policies)
            holder: Any = candidate[index]["spec"]
            for step in path[:-1]:
                holder = holder[step]
            del holder[path[-1]]
            yield candidate


def _parts(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where something can be taken away, outermost first."""
    children = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    children = [(name, child) for name, child in children if name not in _KEPT]
    yield from ((*path, name) for name, _ in children)
    for name, child in children:
        yield from _parts(child, (*path, name))
