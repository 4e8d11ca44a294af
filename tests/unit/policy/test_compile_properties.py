"""The compiled map as a value: order never matters, work is shared, the inputs compile, the cost is bounded."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from ipaddress import ip_address
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st
from policycast import API, LEDGER, WEB, allowed, documents, pod, policies

from meshbridge.identity.model import Peer, Workload
from meshbridge.identity.numbering import number_peers
from meshbridge.kube.objects import read_objects
from meshbridge.policy.capture import Capture, PortClass, PortClasses
from meshbridge.policy.compile import Compiler, compile_endpoint
from meshbridge.policy.model import Direction, Document, Verdict
from meshbridge.policy.policyset import PolicySet
from meshbridge.policy.ports import PREFIX_PORT, masked, range_prefixes
from meshbridge.policy.precedence import DropReason

INPUTS = Path(__file__).parents[3] / "manifests" / "inputs"
MIXED = """
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: a, namespace: shop}
spec:
  endpointSelector: {}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}, {}]
    toPorts: [{ports: [{port: "80", endPort: 1000}]}]
  - fromCIDRSet: [{cidr: 10.0.0.0/8, except: [10.9.0.0/16]}]
  ingressDeny:
  - fromEntities: [remote-node]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: b, namespace: shop}
spec:
  podSelector: {matchLabels: {app: api}}
  policyTypes: [Ingress, Egress]
  ingress: [{from: [{ipBlock: {cidr: 10.0.0.0/8}}], ports: [{port: http}, {port: 80, endPort: 99}]}]
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: c, namespace: shop}
spec: {rules: [{from: [{source: {ipBlocks: [10.1.0.0/16]}}]}, {to: [{operation: {ports: ["80"]}}]}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: d, namespace: istio-system}
spec: {action: DENY, rules: [{to: [{operation: {ports: ["81"], methods: [GET]}}]}]}
---
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: refused, namespace: pay}
spec: {endpointSelector: {}, ingress: [{toFQDNs: []}]}
"""


def mirrored(document: Document, rng: random.Random) -> Document:
    """The same object with every list of alternatives in another order."""

    def shuffle(value: object, key: str = "") -> object:
        if isinstance(value, dict):
            items = list(value.items())
            rng.shuffle(items)
            return {name: shuffle(child, name) for name, child in items}
        if isinstance(value, list):
            children = [shuffle(child) for child in value]
            # Rules stay in place: their index is part of their name.
            return children if key in ("ingress", "egress", "rules") else rng.sample(children, len(children))
        return value

    return replace(document, data=shuffle(dict(document.data)))  # type: ignore[arg-type]


@settings(max_examples=25, deadline=None)
@given(st.randoms(use_true_random=False))
def test_order_of_objects_and_of_alternatives_never_matters(rng: random.Random) -> None:
    straight = documents(MIXED)
    shuffled = [mirrored(document, rng) for document in rng.sample(straight, len(straight))]
    capture = Capture.sidecar()
    for workload in (API, WEB, LEDGER):
        maps = []
        for source in (straight, shuffled):
            found = PolicySet.of(source)
            holders = {w.addresses[0]: w.peer() for w in rng.sample([API, WEB, LEDGER], 3)}
            identities = number_peers(holders, found.referenced_networks()).identities
            maps.append(compile_endpoint(workload, found, identities, capture).maps)
        assert maps[0] == maps[1]


def test_the_users_files_parse_and_mean_what_they_say() -> None:
    found = PolicySet.of(d for path in sorted(INPUTS.glob("*.yaml")) for d in
                         read_objects(path.read_bytes(), path.name).documents)  # fmt: skip
    assert (found.refusals, found.notices) == ((), ())
    server = replace(pod("shop/ts", "10.0.0.1", {"app": "transaction-service"}), namespace="finance")
    peers = {300: Peer(namespace="finance"), 301: Peer(namespace="marketing"),
             302: Peer(namespace="monitoring", labels={"app": "prometheus"})}  # fmt: skip
    entries = compile_endpoint(server, found, peers, Capture.sidecar()).maps[Direction.INGRESS, 0].entries
    network = [key for key in entries if key.layer == 0]
    assert [(key.identity, key.protocol, key.port, key.prefix) for key in network] == [(300, 6, 8080, 16)]
    scraped = replace(server, labels={"prometheus.io/scrape": "true"})
    entries = compile_endpoint(scraped, found, peers, Capture.none()).maps[Direction.INGRESS, 0].entries
    assert [(key.identity, key.port) for key in entries] == [(302, 8080)]


@settings(deadline=None)
@given(st.integers(0, 65535), st.integers(0, 65535))
def test_prefixes_cover_a_range_exactly(one: int, other: int) -> None:
    first, last = min(one, other), max(one, other)
    covered = []
    for port, prefix in range_prefixes(first, last):
        assert port == masked(port, prefix)
        covered.append((port, port + (1 << (PREFIX_PORT - prefix)) - 1))
    covered.sort()
    assert covered[0][0] == first
    assert covered[-1][1] == last
    assert all(before[1] + 1 == after[0] for before, after in itertools.pairwise(covered))


def test_endpoints_with_equal_policies_share_one_map() -> None:
    found = policies(MIXED)
    compiler = Compiler(number_peers({}, found.referenced_networks()).identities)
    twin = replace(WEB, name="twin", uid="twin")
    for capture in (Capture.none(), Capture.sidecar()):
        first, second = compiler.endpoint(WEB, found, capture), compiler.endpoint(twin, found, capture)
        assert all(first.maps[key] is second.maps[key] for key in first.maps)


def test_a_pod_that_no_policy_selects_is_open() -> None:
    assert allowed(policies(""), LEDGER, API)
    assert allowed(policies(""), API, LEDGER, at=Direction.EGRESS)


def cluster(policy_count: int) -> tuple[PolicySet, list[Workload], dict[int, Peer]]:
    """300 classes on 10,000 addresses, and policies of which each namespace has its share."""
    texts = []
    for n in range(policy_count):
        texts.append(f"""
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: p{n}, namespace: ns{n % 20}}}
spec:
  endpointSelector: {{matchLabels: {{app: a{n % 300}}}}}
  ingress:
  - fromEndpoints:
    - {{matchLabels: {{app: a{(n + 1) % 300}}}}}
    - {{matchLabels: {{"k8s:io.kubernetes.pod.namespace": ns{(n + 3) % 20}}}}}
    toPorts: [{{ports: [{{port: "8080", protocol: TCP}}, {{port: "9000", endPort: 9100, protocol: TCP}}]}}]
""")
    found = PolicySet.of(documents("---".join(texts)))
    holders = {}
    workloads = []
    peers = {}
    for n in range(10_000):
        address = ip_address(f"10.{n // 65536}.{n // 256 % 256}.{n % 256}")
        kind = n % 300
        peer = peers.setdefault(kind, Peer(namespace=f"ns{kind % 20}", labels={"app": f"a{kind}"}))
        holders[address] = peer
        if n < 100:
            workloads.append(Workload(f"ns{kind % 20}", f"w{n}", f"u{n}", "one", (address,), {"app": f"a{kind}"}))
    return found, workloads, dict(number_peers(holders, found.referenced_networks()).identities)


def test_a_thousand_policies_compile_for_a_node_in_well_under_a_second() -> None:
    found, workloads, identities = cluster(1000)
    started = time.process_time()
    compiler = Compiler(identities)
    compiled = [compiler.endpoint(workload, found, Capture.sidecar()) for workload in workloads]
    assert time.process_time() - started < 1
    assert sum(len(policy.map(Direction.INGRESS, family).entries) for policy in compiled for family in (0, 1)) > 10_000


def test_classes_of_ports_are_one_value_however_they_are_written() -> None:
    one = PortClasses.of(PortClass.CAPTURED, {80: PortClass.EXCLUDED, 81: PortClass.EXCLUDED, 9: PortClass.CAPTURED})
    assert [(r.first, r.last, r.port_class) for r in one.ranges] == [
        (0, 79, PortClass.CAPTURED), (80, 81, PortClass.EXCLUDED), (82, 65535, PortClass.CAPTURED),
    ]  # fmt: skip
    assert one == PortClasses.of(PortClass.CAPTURED, {81: PortClass.EXCLUDED, 80: PortClass.EXCLUDED})


def test_drop_reasons_are_those_of_the_abi() -> None:
    header = (Path(__file__).parents[3] / "bpf" / "abi.h").read_text()
    for reason in DropReason:
        assert f"DROP_{reason.name} = {reason.value}," in header


def test_kleene_operators() -> None:
    assert [~verdict for verdict in Verdict] == [Verdict.ALLOW, Verdict.NEEDS_L7, Verdict.DENY]
