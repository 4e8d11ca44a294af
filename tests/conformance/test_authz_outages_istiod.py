"""What a rollout and a crash of our ext_authz server do to traffic in Istio, counted request by request.

Real istiod, Envoys and server; the test is the kubelet and the endpoint controller. The figures are printed, and stand
in docs/ext-authz.md.
"""

from __future__ import annotations

import http.client
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from api_server import missing
from authz_world import CLUSTER_IP, HTTP, PROCESS, Endpoint, World, token, until, world
from meshnet import enter_netns

from meshbridge.xds.istio import Authz, custom_policy

pytestmark = [pytest.mark.root, pytest.mark.timeout(900)]

SERVER = {"app": "transaction-service"}
INTERVAL_S = 0.01
CALM_S = 2.0
RESTART_S = 1.0
DRAINED_S = 3.0
"""Connections that began under an earlier configuration are closed by then, see ``authz_world.DRAIN``."""

ALLOWED, OURS, BOTH = "allowed", "refused by us alone", "refused by Istio too"

HEADER_RULE = {
    "apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "with-header", "namespace": "finance"},
    "spec": {
        "endpointSelector": {"matchLabels": SERVER},
        "ingress": [{
            "fromEndpoints": [{"matchLabels": {"app": "client"}}],
            "toPorts": [{"ports": [{"port": str(HTTP), "protocol": "TCP"}],
                         "rules": {"http": [{"method": "POST", "headers": ["x-allowed"]}]}}],
        }],
    },
}  # fmt: skip
"""A rule that only our server knows: without the header, Istio lets the request pass."""


@pytest.fixture(scope="module")
def mesh(third_party: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    istio = third_party("istio")
    if reason := missing():
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    with world(istio, tmp_path_factory.mktemp) as made:
        made.put(custom_policy("finance", SERVER), HEADER_RULE)
        yield made


@dataclass
class Load:
    """Three kinds of requests in turn, one every INTERVAL_S, over connections that stay."""

    netns: str
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        enter_netns(self.netns)
        good, other = token("transactions"), token("other")
        kinds = {
            ALLOWED: {"authorization": f"Bearer {good}", "x-allowed": "1"},
            OURS: {"authorization": f"Bearer {good}"},
            BOTH: {"authorization": f"Bearer {other}", "x-allowed": "1"},
        }
        connection = http.client.HTTPConnection(CLUSTER_IP, HTTP, timeout=10)
        while not self.stop.is_set():
            for kind, headers in kinds.items():
                try:
                    connection.request("POST", PROCESS, headers=headers)
                    with connection.getresponse() as answer:
                        answer.read()
                        self.counts[kind, answer.status] += 1
                except (OSError, http.client.HTTPException):
                    self.counts[kind, 0] += 1
                    connection.close()
                time.sleep(INTERVAL_S)

    def of(self, kind: str) -> dict[int, int]:
        return {status: count for (each, status), count in self.counts.items() if each == kind}


@contextmanager
def load(mesh: World) -> Iterator[Load]:
    found = Load(mesh.client.netns)
    thread = threading.Thread(target=found.run)
    thread.start()
    try:
        time.sleep(CALM_S)
        yield found
        time.sleep(CALM_S)
    finally:
        found.stop.set()
        thread.join()


def report(what: str, found: Load) -> None:
    text = "; ".join(f"{kind}: {dict(sorted(found.of(kind).items()))}" for kind in (ALLOWED, OURS, BOTH))
    print(f"\n{what}: {text}")


def settled(mesh: World, authz: Authz) -> None:
    """Istio's configuration says so, and our server is asked."""
    mesh.mesh(authz)
    wanted = '"failure_mode_allow": true'
    until(lambda: (wanted in mesh.config_dump(mesh.server)) is authz.fail_open, f"failOpen is {authz.fail_open}", 60)
    until(lambda: mesh.ask("-H", "x-allowed: 1", scope="transactions")[0] == 200, "our server allows", 60)
    # With failOpen a request is let in as long as nobody answers, and one answer does not make the next.
    until(lambda: mesh.ask(scope="transactions")[0] == 403, "our server refuses", 60)
    time.sleep(DRAINED_S)


@pytest.mark.parametrize("linger_s", [5.0, 0.0])
@pytest.mark.parametrize("fail_open", [False, True], ids=["failOpen false", "failOpen true"])
def test_a_rollout(mesh: World, fail_open: bool, linger_s: float) -> None:
    """The new pod is ready, then the old one is told to go, at the same time as everybody else hears of that."""
    files = [f"--{option}={path}" for option, path in mesh.certificates.items()]
    old, new = mesh.authz_pods
    running = mesh.start_authz(old, *files, "--linger", str(linger_s))
    mesh.endpoints(Endpoint(old))
    settled(mesh, Authz(fail_open=fail_open))
    with load(mesh) as found:
        replacement = mesh.start_authz(new, *files)
        mesh.endpoints(Endpoint(old), Endpoint(new))
        time.sleep(1)
        mesh.endpoints(Endpoint(old, leaving=True), Endpoint(new))
        running.send_signal(signal.SIGTERM)
        running.wait(30)
        mesh.endpoints(Endpoint(new))
    report(f"rollout, linger {linger_s:g} s, failOpen {fail_open}", found)
    replacement.kill()
    replacement.wait()
    assert running.returncode == 0
    assert set(found.of(BOTH)) <= {403, 503}  # whatever happens, Istio judges behind us
    if linger_s:
        assert found.of(ALLOWED).keys() == {200}
        assert found.of(OURS).keys() == {403}


@pytest.mark.parametrize("fail_open", [False, True], ids=["failOpen false", "failOpen true"])
def test_a_crash(mesh: World, fail_open: bool) -> None:
    """kill -9, and the kubelet starts it anew a second later, at the same address."""
    pod = mesh.authz_pods[0]
    running = mesh.start_authz(pod)
    mesh.endpoints(Endpoint(pod))
    settled(mesh, Authz(fail_open=fail_open))
    with load(mesh) as found:
        started = time.monotonic()
        running.kill()
        running.wait()
        time.sleep(RESTART_S)
        again = mesh.start_authz(pod)
        until(lambda: mesh.ask(scope="transactions")[0] == 403, "it decides again", 30)
        away_s = time.monotonic() - started
    report(f"crash, failOpen {fail_open}, away {away_s:.1f} s", found)
    again.kill()
    again.wait()
    assert set(found.of(BOTH)) <= {403, 503}
    if fail_open:
        assert found.of(ALLOWED).keys() == {200}
        assert found.of(OURS)[200] > 0  # what it costs
    else:
        assert found.of(ALLOWED)[503] > 0  # what it costs
        assert 200 not in found.of(OURS)
