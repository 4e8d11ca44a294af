"""What the agent sees of its pods' redirect rules: found by the veth, believed only there, lost rules noticed."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from meshbridge.agent.bypasses import bypasses_json
from meshbridge.agent.redirects import Redirects, Seen
from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.bypasspolicy import NO_BYPASS_POLICIES
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.redirect_config import restore_text
from meshbridge.datapath.links import Link, read_network
from meshbridge.datapath.redirect import in_namespace
from meshbridge.identity.model import ContainerPort, IpFamily, Peer, ProxyClass, Workload
from meshbridge.policy.policyset import PolicySet

pytestmark = pytest.mark.root
PREFIX = f"mbbyp{os.getpid() % 100000}"
NODE, POD, OTHER = f"{PREFIX}-node", f"{PREFIX}-pod", f"{PREFIX}-other"
NETNS = Path("/run/netns")
ANNOTATIONS = {a.EXCLUDE_INBOUND_PORTS: "8080"}
WORKLOAD = Workload(
    "shop", "web", "pod-uid", "n", (ip_address("10.0.0.1"),), annotations=ANNOTATIONS, proxy=ProxyClass.SIDECAR,
    init_args=a.render_init_args(ANNOTATIONS, MeshDefaults()), ports=(ContainerPort("http", 8080),),
)  # fmt: skip


def run(*command: str, text: str | None = None, check: bool = True) -> None:
    subprocess.run(command, check=check, input=text, text=True, capture_output=True, timeout=20)


@pytest.fixture
def node() -> Iterator[None]:
    for name in (NODE, POD, OTHER):
        run("ip", "netns", "add", name)
    try:
        run("ip", "-n", NODE, "link", "add", "vpod", "type", "veth", "peer", "name", "eth0", "netns", POD)
        run("ip", "-n", NODE, "link", "add", "vother", "type", "veth", "peer", "name", "eth0", "netns", OTHER)
        yield
    finally:
        for name in (NODE, POD, OTHER):
            run("ip", "netns", "del", name, check=False)


def link(name: str = "vpod") -> Link:
    found = in_namespace(str(NETNS / NODE), read_network).by_name(name)
    assert found is not None
    return found


def look(redirects: Redirects, *links: Link) -> Seen:
    return in_namespace(str(NETNS / NODE), lambda: redirects.look({"pod-uid": links}))


def write_rules(netns: str = POD) -> None:
    config, _ = parse_init_args(WORKLOAD.init_args or (), {})
    run("nsenter", f"--net={NETNS / netns}", "iptables-nft-restore", text=restore_text(config, IpFamily.IPV4))


def test_rules_are_found_behind_the_veth_and_changes_are_seen(node: None) -> None:
    redirects = Redirects()
    assert look(redirects, link()).rules["pod-uid"].rule_sets == ()
    write_rules()
    seen = look(redirects, link())
    assert seen.rules["pod-uid"].rule_sets
    assert look(redirects, link()) == seen
    assert seen.problems == {}
    run("nsenter", f"--net={NETNS / POD}", "iptables-nft", "-t", "nat", "-F")
    assert look(redirects, link()) != seen


def test_an_announced_namespace_is_believed_only_if_the_interface_leads_there(node: None) -> None:
    write_rules(OTHER)
    for path in (NETNS / OTHER, "/etc/passwd", "/no/such/file"):
        redirects = Redirects()
        redirects.announce("pod-uid", str(path))
        assert look(redirects, link()).rules["pod-uid"].rule_sets == ()
    redirects.announce("pod-uid", str(NETNS / POD))
    assert look(redirects, link()).rules["pod-uid"].rule_sets == ()


def test_a_pod_without_a_known_namespace_has_no_rules_that_were_seen(node: None) -> None:
    write_rules()
    redirects = Redirects()
    assert look(redirects, link()).rules
    for links in ((), (link(), link("vother"))):
        seen = look(redirects, *links)
        assert seen.rules == {}
        assert "not found" in seen.problems["pod-uid"]


def test_a_pod_that_is_gone_is_forgotten(node: None) -> None:
    redirects = Redirects()
    look(redirects, link())
    assert in_namespace(str(NETNS / NODE), lambda: redirects.look({})) == Seen()


def test_the_report_follows_the_rules_that_were_seen(node: None) -> None:
    redirects = Redirects()
    write_rules()
    look(redirects, link())
    others = {"shop/client": Peer(namespace="shop", proxy=ProxyClass.SIDECAR)}
    record = json.loads(bypasses_json([WORKLOAD], PolicySet(), NO_BYPASS_POLICIES, Seen(redirects.seen), others))
    ports = [row["ports"] for row in record["bypasses"] if row["class"] == "excluded"]
    assert ports == [[[8080, 8080]]]
    assert record["findings"] == []
    run("nsenter", f"--net={NETNS / POD}", "iptables-nft", "-t", "nat", "-F")
    look(redirects, link())
    record = json.loads(bypasses_json([WORKLOAD], PolicySet(), NO_BYPASS_POLICIES, Seen(redirects.seen), others))
    assert "rules-missing" in {finding["code"] for finding in record["findings"]}
    assert [[8080, 8080]] in [row["ports"] for row in record["bypasses"] if row["class"] == "excluded"]
