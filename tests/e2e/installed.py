"""MeshBridge in the cluster: its image, its installation by its own command, and how to ask it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trees
from cluster import Cluster
from host import run
from kubectl import Object

REPO = Path(__file__).parent.parent.parent
COMMAND = Path(sys.executable).parent / "meshbridge"
NAMESPACE = "meshbridge-system"
CRDS = ("cilium.io", "policy.networking.k8s.io")
AGENT_METRICS = "127.0.0.1:9402"
BUILT_S, INSTALLED_S = 900, 180
_BUILT_FROM = ("meshbridge", "bpf", "Dockerfile", "pyproject.toml", "constraints.txt", "scripts/image", "cni")


@dataclass(frozen=True)
class Installed:
    """MeshBridge as it runs in the cluster."""

    cluster: Cluster

    def meshbridge(self, *arguments: str, timeout_s: float = 60, check: bool = True) -> str:
        """What a command prints, run beside the cluster by its administrator."""
        environment = {
            "KUBECONFIG": str(self.cluster.kubeconfig), "HOME": str(self.cluster.directory),
            "PATH": f"{COMMAND.parent}:/usr/sbin:/usr/bin:/sbin:/bin",
        }  # fmt: skip
        command = self.cluster.control_plane.in_network(COMMAND, *arguments)
        return run(command, where="meshbridge", timeout_s=timeout_s, check=check, env=environment).stdout

    def install(self, image: str, *arguments: str) -> None:
        """As a platform team does; everything serves when this returns."""
        crds = [part for group in CRDS for part in ("--with-crds", group)]
        try:
            self.meshbridge(
                "install", "--image", image, *crds, *arguments, "--wait", "--timeout", str(INSTALLED_S),
                timeout_s=INSTALLED_S + 30,
            )  # fmt: skip
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.cluster.kubectl.state(NAMESPACE)}") from error

    def agent(self, node: str) -> str:
        """The name of the agent's pod on a node."""
        return self._pod(node, "agent")

    def on_node(self, node: str, *arguments: str, check: bool = True) -> str:
        """What a command prints that asks the node's agent."""
        return self.cluster.kubectl.exec(self.agent(node), NAMESPACE, "meshbridge", *arguments, check=check)

    def json_on_node(self, node: str, *arguments: str) -> Any:
        return json.loads(self.on_node(node, *arguments, "-o", "json"))

    def metrics(self, node: str) -> Mapping[str, float]:
        """The agent's, by name and labels as they are written."""
        text = self.cluster.nodes[node].run("curl", "-fsS", f"http://{AGENT_METRICS}/metrics").stdout
        lines = (line.rpartition(" ") for line in text.splitlines() if line and not line.startswith("#"))
        return {name: float(value) for name, _, value in lines}

    def dropped(self, node: str) -> float:
        """Packets that policy denied on a node, so far."""
        return sum(
            value for name, value in self.metrics(node).items()
            if name.startswith("meshbridge_packets_total") and "FORWARDED" not in name
        )  # fmt: skip

    def drops(self, node: str, *arguments: str) -> list[Object]:
        """The flows that were dropped on a node, as the agent remembers them."""
        text = self.on_node(node, "observe", "--verdict", "DROPPED", *arguments, "-o", "json")
        told = [json.loads(line) for line in text.splitlines() if line]
        return [each for each in told if "flow" in each]  # beside them: how many events were lost

    def _pod(self, node: str, component: str) -> str:
        selector = f"app.kubernetes.io/name=meshbridge,app.kubernetes.io/component={component}"
        found: list[str] = [
            each["metadata"]["name"] for each in self.cluster.kubectl.items("pods", NAMESPACE, selector)
            if each["spec"].get("nodeName") == node and "deletionTimestamp" not in each["metadata"]
        ]  # fmt: skip
        assert len(found) == 1, f"{component} on {node}: {found}\n{self.cluster.kubectl.state(NAMESPACE)}"
        return found[0]


def image() -> tuple[str, Path]:
    """The image of this source, built when it is not there yet: its name and an archive."""
    name = f"localhost/meshbridge:e2e-{_version()}"
    archive = trees.CACHE / "meshbridge" / f"{name.rpartition('-')[2]}.tar"
    with trees.alone("meshbridge"):
        if not archive.exists():
            print("e2e: building MeshBridge's image", flush=True)
            archive.parent.mkdir(exist_ok=True)
            making = archive.with_suffix(".making")
            run([REPO / "scripts/image", "--tag", name, "-o", making], timeout_s=BUILT_S, where="image")
            making.rename(archive)
        os.utime(archive)
        trees.forget_old(archive.parent, "*.tar")
    return name, archive


def _version() -> str:
    """What tells one source from another."""
    files = run(["git", "-C", REPO, "ls-files", "-co", "--exclude-standard", "--", *_BUILT_FROM]).stdout.split()
    digest = hashlib.sha256()
    for each in sorted(files):
        if (REPO / each).is_file():
            digest.update(each.encode())
            digest.update((REPO / each).read_bytes())
    return digest.hexdigest()[:12]
