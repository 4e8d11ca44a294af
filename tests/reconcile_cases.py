"""Random states of a node for tests of reconciliation: in memory, and in the real kernel."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from hypothesis import strategies as st

from meshbridge.datapath.ipcache import WORLD_IPV4, WORLD_IPV6, Identities, Ipcache, ipcache_key, ipcache_prefix
from meshbridge.datapath.policysets import PackedSet, RuleIds, pack_map
from meshbridge.datapath.reconcile import DesiredEndpoint, DesiredState
from meshbridge.policy.model import Layer, LayerDefault, Origin, PolicyEntry, PolicyKey, PolicyMap, Verdict

NODE, WEB, API, NEW = 1, 300, 301, 302
IDENTITIES = (WORLD_IPV4, WORLD_IPV6, NODE, WEB, API, NEW)
ADDRESSES: tuple[IPv4Address | IPv6Address, ...] = tuple(
    map(ip_address, ("10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "fd00::1"))
)
PREFIXES: tuple[IPv4Network | IPv6Network, ...] = tuple(
    map(ip_network, ("0.0.0.0/0", "10.0.0.0/8", "10.0.0.0/24", "10.0.0.0/30", "10.0.0.4/32", "::/0", "fd00::/64"))
)
PORTS = (80, 443)
PEERS = (*ADDRESSES, *map(ip_address, ("10.9.9.9", "192.0.2.1", "fd00::9", "2001:db8::1")))
RULES = RuleIds()


@st.composite
def policy_maps(draw: st.DrawFn) -> PolicyMap:
    entries: dict[PolicyKey, PolicyEntry] = {}
    for _ in range(draw(st.integers(0, 6))):
        prefix = draw(st.sampled_from((0, 16, 17)))
        key = PolicyKey(
            draw(st.sampled_from((0, *IDENTITIES))),
            draw(st.sampled_from(Layer)),
            0 if prefix == 17 else 6,
            draw(st.sampled_from(PORTS)) if prefix == 16 else 0,
            prefix,
        )
        origin = Origin("CiliumNetworkPolicy", "shop", draw(st.sampled_from("abc")))
        entries[key] = PolicyEntry(draw(st.sampled_from(Verdict)), draw(st.integers(0, 3)), (origin,))
    defaults = st.builds(LayerDefault, st.sampled_from((Verdict.ALLOW, Verdict.DENY)))
    return PolicyMap(entries, draw(defaults), draw(defaults))


SETS = policy_maps().map(lambda policy: pack_map(policy, RULES))
OTHERS = tuple(identity for identity in IDENTITIES if identity != NODE)
HOLDERS = st.one_of(
    st.builds(Identities, st.sampled_from(OTHERS), st.sampled_from((0, *OTHERS))),
    st.builds(Identities, st.just(NODE), st.sampled_from(OTHERS)),  # forwarded, it is never the node itself
)
CACHES = st.builds(
    Ipcache,
    st.dictionaries(st.sampled_from(ADDRESSES).map(ipcache_key), HOLDERS, max_size=4),
    st.dictionaries(st.sampled_from(PREFIXES).map(ipcache_prefix), HOLDERS, max_size=5),
)


@st.composite
def states(draw: st.DrawFn, pool: Sequence[PackedSet]) -> DesiredState:
    """A state of interfaces 7 and 8, whose policies come from ``pool``."""
    endpoints: dict[int, DesiredEndpoint] = {}
    for ifindex in draw(st.sets(st.sampled_from((7, 8)))):
        slots = st.tuples(*[st.sampled_from(pool)] * 4)
        endpoints[ifindex] = DesiredEndpoint(
            ifindex=ifindex,
            id=ifindex,
            # mostly the same pod, so that most transitions are between two policies
            incarnation=draw(st.sampled_from((1, 1, 1, 2))),
            identity=draw(st.sampled_from(IDENTITIES)),
            sets=draw(st.one_of(slots, slots, slots, st.none())),
            addresses=frozenset(draw(st.sets(st.sampled_from(ADDRESSES), max_size=2))),
        )
    return DesiredState(endpoints, draw(CACHES))


TRANSITIONS = st.lists(SETS, min_size=1, max_size=3).flatmap(lambda pool: st.tuples(states(pool), states(pool)))
