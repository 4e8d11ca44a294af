"""The compiler's bench changes what it says it changes."""

from __future__ import annotations

from meshbridge.bench.compile import Size, _Node, measure_size

SMALL = Size(policies=300, label_sets=40, pods=200, endpoints=10)


def test_every_figure_is_measured() -> None:
    figures = measure_size(SMALL, 2)
    assert all(figures[key] for key in ("identities", "entries", "cold", "pod", "policy", "network_worst")), figures


def test_each_change_reaches_the_packed_sets() -> None:
    node = _Node(SMALL)
    node.start()
    assert not any(each.fault for each in node.compilation.compiled.values())
    for changes in (node.new_pods(), node.changed_policies(networks=False), node.changed_policies(networks=True)):
        before = dict(node.compilation.compiled)
        next(changes)()
        assert node.compilation.compiled != before
