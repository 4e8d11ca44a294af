"""Real rules, real packets: what capture_state computes from the rules it reads equals who answers a connection."""

from __future__ import annotations

import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from redirect_harness import (
    ADDRESSES,
    NETNS,
    PEER,
    POD,
    ROUTES,
    apply_rules,
    ask,
    check_packets,
    computed_inbound,
    computed_outbound,
    in_pod,
    run,
    workload,
)

from meshbridge.bypass import annotations as a
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.findings import FindingCode
from meshbridge.bypass.initargs import parse_init_args
from meshbridge.bypass.redirect_config import istio_rules
from meshbridge.datapath.links import read_network
from meshbridge.datapath.redirect import NamespaceError, RedirectReader, find_namespaces, generation, in_namespace
from meshbridge.identity.model import IpFamily
from meshbridge.policy.capture import PortClass

pytest_plugins = ("redirect_harness",)
pytestmark = pytest.mark.root


@pytest.mark.parametrize("backend", ["nft", "legacy"])
@pytest.mark.parametrize("annotations", ROUTES.values(), ids=ROUTES.keys())
def test_computed_capture_is_what_packets_meet(
    servers: None, clean: None, annotations: dict[str, str], backend: str
) -> None:
    pod = workload(annotations)
    apply_rules(pod, backend)
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    assert {finding.code for finding in state.findings} <= {
        FindingCode.OCTAL_PORT, FindingCode.EXCLUDE_IGNORED, FindingCode.CAPTURES_ISTIO_PORT
    }  # fmt: skip
    check_packets(state)


def test_tproxy_is_computed_as_packets_meet_it(servers: None, clean: None) -> None:
    pod = workload({a.INTERCEPTION_MODE: "TPROXY", a.EXCLUDE_INBOUND_PORTS: "8080"})
    apply_rules(pod, "nft")
    for version in ("-4", "-6"):
        run("ip", version, "-n", POD, "rule", "add", "fwmark", "1337", "lookup", "133")
        everything = "0.0.0.0/0" if version == "-4" else "::/0"
        run("ip", version, "-n", POD, "route", "add", "local", everything, "dev", "lo", "table", "133")
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    for family, (own, _) in ADDRESSES.items():
        observed = {port: ask(PEER, own, port) for port in (80, 8080, 9090, 15008, 15021)}
        assert observed == {
            port: "envoy 15006" if computed_inbound(state, family, port) else str(port) for port in observed
        }
        assert observed[15008] == "envoy 15006"


def test_ipv6_bypasses_when_only_ipv4_has_rules(servers: None, clean: None) -> None:
    pod = workload({}, dual_stack=False)
    apply_rules(pod, "nft", (IpFamily.IPV4,))
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    assert [ask(PEER, own, 80) for own, _ in ADDRESSES.values()] == ["envoy 15006", "80"]
    classes = state.inbound()
    assert (classes[IpFamily.IPV4].at(80), classes[IpFamily.IPV6].at(80)) == (PortClass.CAPTURED, PortClass.EXCLUDED)
    assert FindingCode.IPV6_BYPASSES in {finding.code for finding in state.findings}


def test_rules_flushed_by_hand_are_noticed(servers: None, clean: None) -> None:
    pod, reader = workload({}), RedirectReader()
    apply_rules(pod, "nft")
    assert capture_state(pod, seen=reader.read(NETNS / POD)).inbound()[IpFamily.IPV4].at(80) is PortClass.CAPTURED
    in_pod("iptables-nft", "-t", "nat", "-F", "ISTIO_INBOUND")
    assert ask(PEER, ADDRESSES[IpFamily.IPV4][0], 80) == "80"
    state = capture_state(pod, seen=reader.read(NETNS / POD))
    assert state.inbound()[IpFamily.IPV4].at(80) is PortClass.EXCLUDED
    assert FindingCode.RULES_MISSING in {finding.code for finding in state.findings}


NATIVE = """
table inet istio-proxy-nat {
  chain prerouting { type nat hook prerouting priority -100; meta l4proto tcp counter jump istio-inbound; }
  chain output { type nat hook output priority -100; counter jump istio-output; }
  chain istio-inbound {
    meta l4proto tcp tcp dport 15008 counter return
    meta l4proto tcp tcp dport 15090 counter return
    meta l4proto tcp tcp dport 8080 counter return
    meta l4proto tcp counter jump istio-in-redirect
  }
  chain istio-redirect { meta l4proto tcp counter redirect to :15001; }
  chain istio-in-redirect { meta l4proto tcp counter redirect to :15006; }
  chain istio-output {
    tcp dport 9090 counter return
    udp dport 9090 counter return
    oifname lo ip saddr 127.0.0.6 counter return
    oifname lo meta l4proto tcp ip daddr != 127.0.0.1 tcp dport != 15008 skuid 1337 counter jump istio-in-redirect
    oifname lo skuid != 1337 counter return
    skuid 1337 counter return
    skgid 1337 counter return
    ip daddr 127.0.0.1 counter return
    ip daddr { 10.99.0.0/16, 10.98.1.1 } counter return
    counter jump istio-redirect
  }
}
"""


def test_native_nftables_rules_are_understood(servers: None, clean: None) -> None:
    in_pod("nft", "-f", "-", text=NATIVE)
    seen = RedirectReader().read(NETNS / POD)
    assert not [rule for rules in seen.rule_sets for chain in rules.chains.values() for rule in chain if rule.unknown]
    annotations = {a.EXCLUDE_INBOUND_PORTS: "8080", a.EXCLUDE_OUTBOUND_PORTS: "9090"}
    state = capture_state(workload(annotations), seen=seen)
    for family, (own, peer) in ADDRESSES.items():
        ports = (80, 8080, 9090, 15008, 15020, 15090)
        observed = {port: ask(PEER, own, port) for port in ports}
        assert observed == {
            port: "envoy 15006" if computed_inbound(state, family, port) else str(port) for port in ports
        }
        for owner in ((1000, 1000), (1337, 1000), (1000, 1337)):
            sent = {port: ask(POD, peer, port, *owner) for port in (80, 9090)}
            assert sent == {
                port: "envoy 15001" if computed_outbound(state, family, peer, port, owner) else f"peer {port}"
                for port in sent
            }


def test_an_odd_rule_is_told_and_its_port_counts_as_excluded(servers: None, clean: None) -> None:
    pod = workload({})
    apply_rules(pod, "nft")
    in_pod("iptables-nft", "-t", "nat", "-I", "ISTIO_INBOUND", "1", "-p", "tcp", "--dport", "8080", "-m", "statistic",
           "--mode", "random", "--probability", "0.5", "-j", "RETURN")  # fmt: skip
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    classes = state.inbound()[IpFamily.IPV4]
    assert (classes.at(8080), classes.at(80)) == (PortClass.EXCLUDED, PortClass.CAPTURED)
    assert FindingCode.RULE_NOT_UNDERSTOOD in {finding.code for finding in state.findings}


def test_a_poll_of_an_unchanged_namespace_runs_no_tool(clean: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, pod = RedirectReader(), workload({})
    apply_rules(pod, "nft")
    first = reader.read(NETNS / POD)
    # other tests have made legacy tables here, and those are read every time
    monkeypatch.setattr("meshbridge.datapath.redirect._legacy_tables", lambda name: "")
    monkeypatch.setattr(RedirectReader, "_run", lambda *_: pytest.fail("a tool was run"))
    started = time.perf_counter()
    assert {rules.backend for rules in reader.read(NETNS / POD).rule_sets} <= {r.backend for r in first.rule_sets}
    assert time.perf_counter() - started < 0.05
    in_pod("iptables-nft", "-t", "nat", "-F")
    with pytest.raises(BaseException, match="a tool was run"):
        reader.read(NETNS / POD)


def test_generation_grows_with_every_change(clean: None) -> None:
    before = in_namespace(str(NETNS / POD), generation)
    in_pod("nft", "add", "table", "inet", "mbbyp")
    after = in_namespace(str(NETNS / POD), generation)
    assert before is not None
    assert after is not None
    assert after > before


def test_a_slow_tool_is_a_problem_and_nothing_counts_as_captured(
    pair: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "iptables-nft-save"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr("meshbridge.datapath.redirect.shutil.which", lambda tool, path: str(slow))
    started = time.monotonic()
    seen = RedirectReader(timeout_s=0.1).read(NETNS / POD)
    assert time.monotonic() - started < 5
    assert any("did not end within" in problem for problem in seen.problems)
    state = capture_state(workload({}), seen=seen)
    assert state.inbound()[IpFamily.IPV4].at(80) is PortClass.EXCLUDED


NOT_NAMESPACES = {"a path that is not there": "/run/netns/mbbyp-none", "another kind of file": "/etc/hostname"}


@pytest.mark.parametrize("path", NOT_NAMESPACES.values(), ids=NOT_NAMESPACES.keys())
def test_what_is_no_network_namespace_is_refused(path: str) -> None:
    with pytest.raises(NamespaceError):
        RedirectReader().read(path)


def test_a_namespace_of_another_kind_is_refused() -> None:
    with pytest.raises(NamespaceError, match="not a network namespace"):
        RedirectReader().read("/proc/self/ns/uts")


def test_rules_as_the_tools_print_them_are_those_that_were_written(pair: None, clean: None) -> None:
    """iptables-save rewrites numbers, marks and order of options; the meaning must survive."""
    pod = workload({a.EXCLUDE_INBOUND_PORTS: "8080", a.EXCLUDE_OUTBOUND_RANGES: "10.1.2.3/8"})
    apply_rules(pod, "nft")
    config, _ = parse_init_args(pod.init_args or (), pod.init_env)
    for rules in RedirectReader().read(NETNS / POD).rule_sets:
        written = istio_rules(config, rules.family)
        for name, chain in written.chains.items():
            plain = [replace(rule, text="", origin="") for rule in chain]
            assert [replace(rule, text="", origin="") for rule in rules.chains[name]] == plain


def test_the_namespace_behind_a_veth_is_found_by_its_number(pair: None) -> None:
    links = in_namespace(str(NETNS / PEER), read_network).links.values()
    (number,) = {link.peer_netns for link in links if link.name == "eth0"}
    assert number is not None
    assert in_namespace(str(NETNS / PEER), lambda: find_namespaces({number})) == {number: str(NETNS / POD)}
    assert in_namespace(str(NETNS / PEER), lambda: find_namespaces({number + 1000})) == {}


def test_a_namespace_without_a_name_is_found_through_a_process_in_it(pair: None, tmp_path: Path) -> None:
    with subprocess.Popen(["nsenter", f"--net={NETNS / POD}", "sleep", "60"]) as process:
        try:
            links = in_namespace(str(NETNS / PEER), read_network).links.values()
            (number,) = {link.peer_netns for link in links if link.name == "eth0"}
            assert number is not None
            found = in_namespace(str(NETNS / PEER), lambda: find_namespaces({number}, [tmp_path]))
            assert found[number].startswith("/proc/")
            assert RedirectReader().read(found[number]).problems == ()
        finally:
            process.kill()


def test_a_native_table_with_a_name_of_iptables_is_read_as_well(servers: None, clean: None) -> None:
    """Debian's own nftables examples call their table ``ip nat``; iptables-save does not show such a one."""
    rules = "table ip nat { chain pre { type nat hook prerouting priority -100; tcp dport 80 redirect to :15006; }; }"
    in_pod("nft", "-f", "-", text=rules)
    seen = RedirectReader().read(NETNS / POD)
    state = capture_state(workload({}), seen=seen)
    classes = state.inbound()[IpFamily.IPV4]
    assert (classes.at(80), classes.at(8080)) == (PortClass.CAPTURED, PortClass.EXCLUDED)
    own = ADDRESSES[IpFamily.IPV4][0]
    assert [ask(PEER, own, port) for port in (80, 8080)] == ["envoy 15006", "8080"]


def test_a_new_namespace_is_read_though_it_has_name_inode_and_generation_of_one_that_is_gone() -> None:
    name, reader = "mbbyp-again", RedirectReader()

    def made(port: int) -> int:
        run("ip", "netns", "add", name)
        chain = "add chain ip nat P { type nat hook prerouting priority -100; }"
        rule = f"add rule ip nat P tcp dport {port} redirect to :15006"
        run("ip", "netns", "exec", name, "nft", "-f", "-", text=f"add table ip nat; {chain}; {rule}")
        return (NETNS / name).stat().st_ino

    try:
        inode = made(80)
        first = reader.read(NETNS / name)
        for _ in range(50):
            run("ip", "netns", "del", name)
            if made(9090) == inode:
                break
        else:
            pytest.skip("no inode of a namespace is used again here")
        assert reader.read(NETNS / name) == RedirectReader().read(NETNS / name)
        assert reader.read(NETNS / name) != first
    finally:
        run("ip", "netns", "del", name, check=False)
