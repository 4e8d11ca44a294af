"""A packed set asked directly answers as ``evaluate`` does on the map it was packed from."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshbridge.datapath.answers import SetAnswers
from meshbridge.datapath.policysets import RuleIds, pack_map
from meshbridge.policy.evaluate import evaluate
from meshbridge.policy.model import Layer, LayerDefault, PolicyEntry, PolicyKey, PolicyMap, Verdict
from meshbridge.policy.ports import PREFIX_ANY, masked

PEERS = (0, 256, 257, 0x10000)
PORTS = (80, 81, 8080, 9090, 65535)
REASONS = {Layer.NETWORK: (133, 181), Layer.MESH: (220, 221, 229)}


@st.composite
def maps(draw: st.DrawFn) -> PolicyMap:
    entries: dict[PolicyKey, PolicyEntry] = {}
    for _ in range(draw(st.integers(0, 14))):
        layer, prefix = draw(st.sampled_from(Layer)), draw(st.sampled_from((0, 3, 12, 15, 16, PREFIX_ANY)))
        at = (6, masked(draw(st.sampled_from(PORTS)), prefix)) if prefix != PREFIX_ANY else (0, 0)
        verdict = draw(st.sampled_from(Verdict))
        reason = draw(st.sampled_from(REASONS[layer])) if verdict is Verdict.DENY else 0
        audit = verdict is Verdict.DENY and draw(st.booleans())
        entry = PolicyEntry(verdict, draw(st.integers(1, 4)), (), deny_reason=reason, audit=audit)
        entries[PolicyKey(draw(st.sampled_from(PEERS)), layer, *at, prefix)] = entry
    defaults = {}
    for layer in Layer:
        verdict = draw(st.sampled_from(Verdict))
        reason = draw(st.sampled_from((0, *REASONS[layer]))) if verdict is Verdict.DENY else 0
        defaults[layer] = LayerDefault(verdict, (), reason)
    return PolicyMap(entries, defaults[Layer.NETWORK], defaults[Layer.MESH])


@given(maps(), st.sampled_from(PEERS[1:]), st.sampled_from((6, 17)), st.sampled_from(PORTS))
def test_a_packed_set_answers_as_its_map(policy: PolicyMap, identity: int, protocol: int, port: int) -> None:
    expected = evaluate(policy, identity, protocol, port).deny_reason
    assert SetAnswers(pack_map(policy, RuleIds())).drop_reason(identity, protocol, port) == expected
