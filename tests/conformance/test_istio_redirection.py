"""The rules that Istio's own tools write, in both forms, and real packets: they do what capture_state computes.

The init form is ``pilot-agent istio-iptables`` with the injector's arguments, the CNI form the plugin ``istio-cni``;
that one reads its pod from an API server, of which only this answer is played here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, ClassVar

import pytest
from redirect_harness import (
    ADDRESSES,
    NETNS,
    PEER,
    POD,
    ROUTES,
    ask,
    check_packets,
    computed_inbound,
    in_pod,
    run,
    workload,
)

from meshbridge.bypass import annotations as a
from meshbridge.bypass.annotations import MeshDefaults
from meshbridge.bypass.capture import capture_state
from meshbridge.bypass.findings import FindingCode
from meshbridge.bypass.state import CaptureState
from meshbridge.datapath.redirect import RedirectReader
from meshbridge.identity.model import IpFamily, ProxyClass, ProxyContainer, Workload
from meshbridge.policy.model import Direction

pytest_plugins = ("redirect_harness",)
pytestmark = pytest.mark.root
REPO = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def istio() -> Path:
    """The folder of Istio's programs."""
    asked = subprocess.run(
        [REPO / "scripts/third-party", "--path", "istio"], capture_output=True, text=True, check=False, timeout=60
    )
    if asked.returncode == 0:
        return Path(asked.stdout.strip()) / "bin"
    reason = "Istio's programs are not built: run scripts/third-party istio"
    if os.environ.get("CI"):
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


def with_init(istio: Path, pod: Workload) -> subprocess.CompletedProcess[str]:
    assert pod.init_args is not None
    environment = {**os.environ, **pod.init_env}
    return subprocess.run(
        ["nsenter", f"--net={NETNS / POD}", istio / "pilot-agent", *pod.init_args],
        capture_output=True, text=True, env=environment, timeout=60, check=False,
    )  # fmt: skip


class OnePod(BaseHTTPRequestHandler):
    """As much of an API server as the plugin asks."""

    pod: ClassVar[dict[str, Any]] = {}

    def do_GET(self) -> None:
        body = json.dumps(self.pod).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), OnePod)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()
    thread.join()


def cni_workload(annotations: dict[str, str]) -> Workload:
    return Workload(
        "shop", "web", "u", "n", tuple(ip_address(pair_of[0]) for pair_of in ADDRESSES.values()),
        annotations=a.render_cni_annotations(annotations, MeshDefaults()), proxy=ProxyClass.SIDECAR,
        proxy_container=ProxyContainer("sidecar", {"ISTIO_DUAL_STACK": "true"}), init_containers=("istio-validation",),
    )  # fmt: skip


def with_cni(istio: Path, api: str, pod: Workload, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = pod.proxy_container.env if pod.proxy_container else {}
    env = [{"name": key, "value": value} for key, value in environment.items()]
    OnePod.pod = {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": pod.name, "namespace": pod.namespace, "annotations": dict(pod.annotations)},
        "spec": {
            "initContainers": [{"name": name} for name in pod.init_containers],
            "containers": [{"name": "istio-proxy", "args": ["proxy", "sidecar"], "env": env}],
        },
    }  # fmt: skip
    kubeconfig = {
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": api}}],
        "users": [{"name": "u", "user": {}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    }  # fmt: skip
    (folder / "istio-cni-kubeconfig").write_text(json.dumps(kubeconfig))
    config = {"cniVersion": "0.3.1", "name": "istio-cni", "type": "istio-cni", "cni_agent_run_dir": str(folder)}
    variables = {
        "CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": str(NETNS / POD), "CNI_IFNAME": "eth0",
        "CNI_PATH": str(istio), "CNI_ARGS": f"K8S_POD_NAMESPACE={pod.namespace};K8S_POD_NAME={pod.name}",
    }  # fmt: skip
    return subprocess.run(
        [istio / "istio-cni"], input=json.dumps(config), capture_output=True, text=True,
        env={**os.environ, **variables}, timeout=60, check=False,
    )  # fmt: skip


MORE_ROUTES = {
    **ROUTES,
    "all outbound off": {a.INCLUDE_OUTBOUND_RANGES: ""},
    "both directions": {a.EXCLUDE_INBOUND_PORTS: "80,9090", a.EXCLUDE_OUTBOUND_PORTS: "80"},
    "a rerouted interface": {a.REROUTE_INTERFACES: "net1", a.EXCLUDE_OUTBOUND_PORTS: "8080"},
    "loopback in the included ranges": {a.INCLUDE_OUTBOUND_RANGES: "127.0.0.1/32,10.231.7.0/24,fd00:231:7::/64"},
}


def seen(pod: Workload) -> CaptureState:
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    odd = {FindingCode.RULES_MISSING, FindingCode.RULES_CONTRADICT, FindingCode.RULE_NOT_UNDERSTOOD}
    assert not odd & {finding.code for finding in state.findings}, state.findings
    return state


@pytest.mark.parametrize("annotations", MORE_ROUTES.values(), ids=MORE_ROUTES.keys())
def test_init_form(istio: Path, servers: None, clean: None, annotations: dict[str, str]) -> None:
    pod = workload(annotations)
    done = with_init(istio, pod)
    assert done.returncode == 0, done.stdout + done.stderr
    check_packets(seen(pod))


@pytest.mark.parametrize("annotations", MORE_ROUTES.values(), ids=MORE_ROUTES.keys())
def test_cni_form(
    istio: Path, api: str, tmp_path: Path, servers: None, clean: None, annotations: dict[str, str]
) -> None:
    pod = cni_workload(annotations)
    done = with_cni(istio, api, pod, tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    check_packets(seen(pod))


@pytest.mark.parametrize("native", [False, True], ids=["iptables", "nftables"])
def test_the_tools_other_backend(istio: Path, servers: None, clean: None, native: bool) -> None:
    pod = workload({a.EXCLUDE_INBOUND_PORTS: "8080", a.EXCLUDE_OUTBOUND_PORTS: "9090"})
    assert pod.init_args is not None
    arguments = (*pod.init_args, *(["--native-nftables"] if native else []))
    done = subprocess.run(
        ["nsenter", f"--net={NETNS / POD}", istio / "pilot-agent", *arguments],
        capture_output=True, text=True, env={**os.environ, **pod.init_env}, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    check_packets(seen(pod))


def test_tproxy(istio: Path, servers: None, clean: None) -> None:
    pod = workload({a.INTERCEPTION_MODE: "TPROXY", a.EXCLUDE_INBOUND_PORTS: "8080"})
    done = with_init(istio, pod)
    assert done.returncode == 0, done.stdout + done.stderr
    state = seen(pod)
    for family, (own, _) in ADDRESSES.items():
        observed = {port: ask(PEER, own, port) for port in (80, 8080, 9090, 15008, 15021)}
        assert observed == {
            port: "envoy 15006" if computed_inbound(state, family, port) else str(port) for port in observed
        }


def test_without_dual_stack_ipv6_goes_past_envoy(istio: Path, servers: None, clean: None) -> None:
    pod = workload({}, dual_stack=False)
    done = with_init(istio, pod)
    assert done.returncode == 0, done.stdout + done.stderr
    state = seen(pod)
    assert [computed_inbound(state, family, 80) for family in IpFamily] == [True, False]
    assert [ask(PEER, own, 80) for own, _ in ADDRESSES.values()] == ["envoy 15006", "80"]


NEVER_STARTS = {
    "an octal port that is none": {a.EXCLUDE_INBOUND_PORTS: "090"},
    "a range of outbound ports": {a.INCLUDE_OUTBOUND_PORTS: "443-445"},
    "a star of outbound ports": {a.INCLUDE_OUTBOUND_PORTS: "*"},
}


@pytest.mark.parametrize("annotations", NEVER_STARTS.values(), ids=NEVER_STARTS.keys())
def test_what_is_said_never_to_start_fails_in_istios_tool(
    istio: Path, pair: None, clean: None, annotations: dict[str, str]
) -> None:
    pod = workload(annotations)
    assert not capture_state(pod).starts
    assert with_init(istio, pod).returncode != 0


@pytest.mark.parametrize(
    "annotations",
    [*NEVER_STARTS.values(), {a.INTERCEPTION_MODE: "NONE"}],
    ids=[*NEVER_STARTS.keys(), "mode NONE"],
)
def test_what_is_said_never_to_start_fails_in_istios_plugin(
    istio: Path, api: str, tmp_path: Path, pair: None, clean: None, annotations: dict[str, str]
) -> None:
    pod = cni_workload(annotations)
    assert not capture_state(pod).starts
    assert with_cni(istio, api, pod, tmp_path).returncode != 0


def test_rules_of_another_pod_are_followed_and_named(istio: Path, servers: None, clean: None) -> None:
    other = workload({a.EXCLUDE_INBOUND_PORTS: "9090"})
    assert with_init(istio, other).returncode == 0
    pod = workload({a.EXCLUDE_INBOUND_PORTS: "8080"})
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    codes = {finding.code for finding in state.findings}
    assert {FindingCode.RULES_MISSING, FindingCode.RULES_CONTRADICT} <= codes
    check_packets(state)


RECEIVER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.socket(family, socket.SOCK_DGRAM) as sock:
    sock.bind((sys.argv[1], int(sys.argv[2])))
    sock.settimeout(5)
    print("bound", flush=True)
    print(sock.recv(9).decode())
"""
SENDER = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
socket.socket(family, socket.SOCK_DGRAM).sendto(b"hello", (sys.argv[1], int(sys.argv[2])))
"""


def test_udp_goes_past_envoy_and_is_said_to(istio: Path, servers: None, clean: None) -> None:
    pod = workload({})
    assert with_init(istio, pod).returncode == 0
    state = seen(pod)
    for family, (own, _) in ADDRESSES.items():
        spans = [span for span in state.of(Direction.INGRESS, family) if 17 in span.box.protocol]
        assert spans
        assert all(span.listener == 0 for span in spans)
        command = ["nsenter", f"--net={NETNS / POD}", sys.executable, "-c", RECEIVER, own, "8080"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as receiver:
            assert receiver.stdout is not None
            assert receiver.stdout.readline() == "bound\n"
            run("nsenter", f"--net={NETNS / PEER}", sys.executable, "-c", SENDER, own, "8080")
            assert receiver.stdout.read() == "hello\n"


def test_a_rule_added_by_hand_is_followed(istio: Path, servers: None, clean: None) -> None:
    pod = workload({})
    assert with_init(istio, pod).returncode == 0
    for tool in ("iptables-nft", "iptables-legacy"):
        in_pod(tool, "-t", "nat", "-I", "PREROUTING", "-p", "tcp", "--dport", "9090", "-j", "ACCEPT")
    state = capture_state(pod, seen=RedirectReader().read(NETNS / POD))
    assert FindingCode.RULES_MISSING in {finding.code for finding in state.findings}
    check_packets(state)
