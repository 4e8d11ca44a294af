"""Pods for tests, and how they ask each other."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from images import ANSWER, BASE, LOAD
from kubectl import Kubectl, Object, wait_until

NO_ANSWER = "000"


@dataclass(frozen=True)
class Response:
    """What curl saw; ``code`` is 000 when nobody answered, and ``error`` then says why."""

    code: str
    body: str
    error: str = ""

    @property
    def seen(self) -> dict[str, Any]:
        """What answer.py saw of the request."""
        found: dict[str, Any] = json.loads(self.body)
        return found


def namespace(name: str, *, injected: bool = False, labels: Mapping[str, str] | None = None) -> Object:
    mesh = {"istio-injection": "enabled"} if injected else {}
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": {**mesh, **(labels or {})}}}


def pod(
    name: str, namespace: str, *, command: Iterable[str] = ("sleep", "infinity"),
    labels: Mapping[str, str] | None = None, annotations: Mapping[str, str] | None = None,
    node: str = "", service_account: str = "", ports: Iterable[int] = (),
    image: str = BASE,
) -> Object:  # fmt: skip
    """A pod of one container ``app``; with ``ports`` it answers on them, and is ready when it does."""
    ports = tuple(ports)
    container: Object = {"name": "app", "image": image, "imagePullPolicy": "Never", "command": list(command)}
    if ports:
        container["command"] = ["python3", ANSWER, *(str(port) for port in ports)]
        container["ports"] = [{"containerPort": port} for port in ports]
        container["readinessProbe"] = {"httpGet": {"path": "/", "port": ports[0]}, "periodSeconds": 1}
    spec: Object = {"terminationGracePeriodSeconds": 1, "containers": [container]}
    if node:
        spec["nodeSelector"] = {"kubernetes.io/hostname": node}
    if service_account:
        spec["serviceAccountName"] = service_account
    return {
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {"app": name, **(labels or {})},
                     "annotations": dict(annotations or {})},
        "spec": spec,
    }  # fmt: skip


def service(name: str, namespace: str, ports: Mapping[str, int], **settings: Any) -> Object:
    listed = [{"name": port, "port": number} for port, number in ports.items()]
    return {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": namespace},
        "spec": {"selector": {"app": name}, "ports": listed, **settings},
    }  # fmt: skip


def network_policy(name: str, namespace: str, spec: Object) -> Object:
    return {
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace}, "spec": spec,
    }  # fmt: skip


def service_account(name: str, namespace: str) -> Object:
    return {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": name, "namespace": namespace}}


def address_of(kubectl: Kubectl, pod: str, namespace: str) -> str:
    address: str = kubectl.get("pod", pod, namespace)["status"]["podIP"]
    return address


def ask(
    kubectl: Kubectl, pod: str, namespace: str, url: str, *, method: str = "GET",
    headers: Mapping[str, str] | None = None, timeout_s: float = 5,
) -> Response:  # fmt: skip
    """One request of curl in a pod's container ``app``."""
    sent = [part for name, value in (headers or {}).items() for part in ("-H", f"{name}: {value}")]
    done = kubectl.done(
        "exec", "-n", namespace, pod, "-c", "app", "--", "curl", "-sS", "-m", str(timeout_s), "-X", method, *sent,
        "-w", "\n%{http_code}", url, check=False, timeout_s=timeout_s + 30,
    )  # fmt: skip
    body, _, code = done.stdout.rpartition("\n")
    assert code, f"curl did not run in {namespace}/{pod}: {done.stderr}"
    return Response(code, body, done.stderr.strip())


def wait_for_code(
    kubectl: Kubectl, ns: str, url: str, code: str, client: str = "client", *, timeout_s: float = 30, **asked: Any
) -> None:
    """Return when a pod's requests are answered so: what was applied takes its time to get to sidecars and nodes."""
    seen: list[str] = []

    def answered() -> bool:
        seen.append(ask(kubectl, client, ns, url, **asked).code)
        return seen[-1] == code

    wait_until(answered, f"{url} answers {code} to {ns}/{client}", timeout_s, lambda: f"seen: {seen}")


class Load:
    """Requests without a pause from a pod, in the background, from its making until ``finish``.

    It goes on by itself in the pod, so it needs no API server meanwhile.
    """

    def __init__(self, kubectl: Kubectl, pod: str, namespace: str, host: str, port: int, seconds: float) -> None:
        self._kubectl, self._pod, self._namespace = kubectl, pod, namespace
        asking = f"python3 {LOAD} {host} {port} {seconds} >/tmp/load.new 2>&1; mv /tmp/load.new /tmp/load"
        self._exec(f"rm -f /tmp/load; ({asking}) </dev/null >/dev/null 2>&1 &")
        self._ends = time.monotonic() + seconds

    @property
    def left_s(self) -> float:
        return self._ends - time.monotonic()

    def finish(self) -> Outcome:
        """Wait for its end; what became of the requests."""
        time.sleep(max(self.left_s, 0))
        wait_until(lambda: bool(self._exec("cat /tmp/load 2>/dev/null || true")), f"the load of {self._pod} ends", 30)
        told = self._exec("cat /tmp/load")
        try:
            found = json.loads(told)
        except ValueError as error:
            raise AssertionError(f"the load of {self._pod} failed: {told}") from error
        return Outcome(
            found["new"].get("200", 0), found["new"].get("failed", 0), found["kept"].get("200", 0),
            found["kept"].get("failed", 0), found["kept"]["opened"] - 1, told,
        )  # fmt: skip

    def _exec(self, command: str) -> str:
        return self._kubectl.exec(self._pod, self._namespace, "sh", "-c", command, container="app")


@dataclass(frozen=True)
class Outcome:
    """Of requests on connections of their own, and of those on one that is kept."""

    new_answered: int
    new_failed: int
    kept_answered: int
    kept_failed: int
    reconnected: int
    told: str

    @property
    def answered(self) -> int:
        return self.new_answered + self.kept_answered

    @property
    def failed(self) -> int:
        return self.new_failed + self.kept_failed
