"""Real controllers against a real API server, each as a user who may do what is installed for it and no more."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from api_server import REPLICAS, REPO, ApiServer, free_port, wait_for

from meshbridge.xds.auth import mint_token, node_caller
from meshbridge.xds.client import ControllerClient

NAMESPACE = "meshbridge-system"
KEY = b"k" * 32
RBAC = "rbac.authorization.k8s.io"
LEASE = {
    "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
    "metadata": {"name": "meshbridge-controller", "namespace": NAMESPACE},
}  # fmt: skip
"""As it is installed: nobody's."""


def crds() -> list[dict[str, Any]]:
    return [yaml.safe_load(path.read_text()) for path in sorted((REPO / "deploy/crds").glob("*.yaml"))]


def roles(users: tuple[str, ...] = REPLICAS) -> list[dict[str, Any]]:
    """The roles as they are installed, bound to the replicas' users."""
    base = REPO / "deploy/kustomize/base"
    found = [
        each for file in ("controller", "fixes") for each in yaml.safe_load_all((base / f"{file}.yaml").read_text())
    ]
    found = [each for each in found if each["kind"] in ("Role", "ClusterRole")]
    subjects = [{"kind": "User", "name": user, "apiGroup": RBAC} for user in users]
    for role in list(found):
        binding = {
            "apiVersion": role["apiVersion"], "kind": f"{role['kind']}Binding", "metadata": dict(role["metadata"]),
            "roleRef": {"apiGroup": RBAC, "kind": role["kind"], "name": role["metadata"]["name"]},
            "subjects": subjects,
        }  # fmt: skip
        found.append(binding)
    return found


def installed() -> list[dict[str, Any]]:
    """Everything a controller needs to find."""
    namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": NAMESPACE}}
    return [namespace, LEASE, *crds(), *roles()]


@contextmanager
def installation(server: ApiServer, *more: dict[str, Any]) -> Iterator[ApiServer]:
    """The server with MeshBridge's objects, and ``more``; all of them are gone afterwards."""
    objects = installed()
    server.create(*objects)
    for definition in crds():
        listed = f"/apis/meshbridge.io/v1alpha1/{definition['spec']['names']['plural']}"
        wait_for(lambda listed=listed: server.call("GET", listed)[0] == 200, f"{listed} is served")
    try:
        server.create(*more)
        yield server
        server.delete(*reversed(more))
    finally:
        server.delete(*reversed(objects))
        for definition in crds():
            listed = f"/apis/meshbridge.io/v1alpha1/{definition['spec']['names']['plural']}"
            wait_for(lambda listed=listed: server.call("GET", listed)[0] == 404, f"{listed} is gone")


@dataclass
class Process:
    """One running controller."""

    user: str
    process: subprocess.Popen[bytes]
    directory: Path
    http: int

    @property
    def target(self) -> str:
        return f"unix:{self.directory / 's'}"

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def get(self, path: str) -> str:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.http}{path}", timeout=5) as response:
                found: str = response.read().decode()
                return found
        except urllib.error.HTTPError as error:
            return error.read().decode()

    @property
    def leads(self) -> bool:
        return "meshbridge_controller_leader 1.0" in self.get("/metrics")

    @property
    def answers(self) -> bool:
        with suppress(OSError):
            return bool(self.get("/healthz"))
        return False

    @property
    def problems(self) -> list[str]:
        return [problem["text"] for problem in json.loads(self.get("/problems"))]

    @property
    def serves(self) -> bool:
        with suppress(OSError):
            return '"synced": true' in self.get("/healthz")
        return False


@contextmanager
def controller(
    server: ApiServer, directory: Path, user: str = REPLICAS[0], *options: str, can_serve: bool = True
) -> Iterator[Process]:
    """One that serves when this returns, or at least answers where it cannot, and is gone afterwards."""
    directory.mkdir()
    key, http = directory / "token.key", free_port()
    key.write_bytes(KEY)
    key.chmod(0o600)
    command = [
        Path(sys.executable).with_name("meshbridge"), "controller", "--kubernetes",
        "--kubeconfig", server.kubeconfig(user), "--listen", f"unix:{directory / 's'}",
        "--state-dir", directory / "state", "--token-key", key,
        "--namespace", NAMESPACE, "--metrics", f"127.0.0.1:{http}", "--log-level", "debug", *options,
    ]  # fmt: skip
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    found = Process(user, process, directory, http)
    try:
        ready = (lambda: found.serves) if can_serve else (lambda: found.answers)
        wait_for(lambda: ready() or process.poll() is not None, f"it serves, see {directory}/log", 60)
        assert process.poll() is None, found.log
        yield found
    finally:
        with suppress(ProcessLookupError):
            found.signal(signal.SIGCONT)
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@asynccontextmanager
async def agent(target: str, node: str) -> AsyncIterator[ControllerClient]:
    """A node's connection to a controller, which reports what the test says; its revisions are not acted on."""
    client = ControllerClient(target, node, lambda: mint_token(KEY, node_caller(node), now=datetime.now(UTC)))

    async def follow() -> None:
        async for _ in client.updates():
            pass

    task = asyncio.create_task(follow())
    try:
        yield client
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
