"""What a container runtime does for a pod's network: Debian's CNI plugins in a chain, called as specified."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

from agent_harness import NodeHarness, Pod, inside, run

from meshbridge.identity.model import Workload

DEBIAN = Path("/usr/lib/cni")
SHIM = Path(__file__).parents[2] / "build/meshbridge-cni"
VERSION = "1.0.0"


class CniRefused(AssertionError):
    """A plugin of the chain failed; ``error`` is what it printed."""

    def __init__(self, plugin: str, error: Mapping[str, Any]) -> None:
        self.plugin, self.error = plugin, error
        super().__init__(f"{plugin}: {error}")


def missing() -> str:
    """Why no chain can be run here; empty when it can."""
    if not (DEBIAN / "ptp").exists():
        return "needs Debian's containernetworking-plugins: run scripts/setup dev"
    done = subprocess.run(["make", "-s", "cni"], cwd=SHIM.parents[1], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else f"cannot build the plugin: {done.stderr[-300:]}"


@dataclass
class Runtime:
    """Calls ``plugins`` in the node of ``harness`` for each of its pods."""

    harness: NodeHarness
    plugins: Sequence[Mapping[str, Any]]
    name: str = "net"
    shim: Path = SHIM
    pods: dict[str, str] = field(default_factory=dict)
    _results: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    _count: int = 0

    def start_pod(self, namespace: str, name: str, interface: str = "eth0", **labels: str) -> Pod:
        """A pod whose network is set up, told by nobody yet.

        Raises:
            CniRefused: a plugin failed; everything was deleted again, as a runtime does.
        """
        pod = self.sandbox(namespace, name, **labels)
        return self.plug(pod, interface)

    def sandbox(self, namespace: str, name: str, **labels: str) -> Pod:
        """A pod without a network; the harness knows it, as the controller knows one that is scheduled."""
        self._count += 1
        netns = f"{self.harness.prefix}-c{self._count}"
        run("ip", "netns", "add", netns)
        run("ip", "-n", netns, "link", "set", "lo", "up")
        run(*inside(netns, "sysctl", "-qw", "net.ipv6.conf.default.accept_dad=0"))
        workload = Workload(
            namespace, name, f"uid-{name}-{self._count}", self.harness.name, (), labels=labels or {"app": name},
            namespace_labels={"kubernetes.io/metadata.name": namespace}, phase="Pending",
        )  # fmt: skip
        pod = self.harness.pods[workload.key] = Pod(workload, netns, "")
        return pod

    def plug(self, pod: Pod, interface: str = "eth0") -> Pod:
        """ADD; the pod with the addresses that the chain gave it."""
        result: dict[str, Any] | None = None
        try:
            for plugin in self.plugins:
                result = self._call("ADD", plugin, pod, interface, result)
        except CniRefused:
            self.unplug(pod, interface)
            raise
        assert result is not None
        self._results[pod.workload.uid, interface] = result
        addresses = tuple(ip_interface(each["address"]).ip for each in result["ips"])
        known = self.harness.pods.get(pod.key, pod)
        workload = replace(known.workload, addresses=(*known.workload.addresses, *addresses), phase="Running")
        return replace(pod, workload=workload)

    def told(self, pod: Pod) -> Pod:
        """The kubelet has written the pod's addresses to its status."""
        self.harness.pods[pod.key] = pod
        return pod

    def check(self, pod: Pod, interface: str = "eth0") -> None:
        for plugin in self.plugins:
            self._call("CHECK", plugin, pod, interface, self._results[pod.workload.uid, interface])

    def unplug(self, pod: Pod, interface: str = "eth0") -> None:
        """DEL, in the reverse order."""
        result = self._results.pop((pod.workload.uid, interface), None)
        for plugin in reversed(self.plugins):
            self._call("DEL", plugin, pod, interface, result)

    def collect(self, valid: Sequence[Pod]) -> None:
        """GC, of our plugin: Debian's know none."""
        left = [{"containerID": _container(pod), "ifname": "eth0"} for pod in valid]
        self._run("GC", {**self.plugins[-1], "cni.dev/valid-attachments": left}, {"CNI_COMMAND": "GC"})

    def _call(
        self, verb: str, plugin: Mapping[str, Any], pod: Pod, interface: str, result: Mapping[str, Any] | None
    ) -> dict[str, Any] | None:
        workload = pod.workload
        args = {
            "IgnoreUnknown": "1", "K8S_POD_NAMESPACE": workload.namespace, "K8S_POD_NAME": workload.name,
            "K8S_POD_INFRA_CONTAINER_ID": _container(pod), "K8S_POD_UID": workload.uid,
        }  # fmt: skip
        variables = {
            "CNI_COMMAND": verb, "CNI_CONTAINERID": _container(pod), "CNI_NETNS": f"/run/netns/{pod.netns}",
            "CNI_IFNAME": interface, "CNI_ARGS": ";".join(f"{key}={value}" for key, value in args.items()),
        }  # fmt: skip
        config = {**plugin, **({"prevResult": result} if result is not None else {})}
        return self._run(verb, config, variables)

    def _run(self, verb: str, plugin: Mapping[str, Any], variables: Mapping[str, str]) -> dict[str, Any] | None:
        kind = plugin["type"]
        program = self.shim if kind == "meshbridge-cni" else DEBIAN / kind
        config = {"cniVersion": VERSION, "name": self.name, **plugin}
        environment = {"PATH": os.environ["PATH"], "CNI_PATH": f"{DEBIAN}", **variables}
        done = subprocess.run(
            inside(self.harness.netns, str(program)), input=json.dumps(config).encode(), env=environment,
            capture_output=True, timeout=90, check=False,
        )  # fmt: skip
        answer = json.loads(done.stdout) if done.stdout.strip() else None
        if done.returncode != 0:
            raise CniRefused(kind, answer or {"msg": done.stderr.decode()})
        return answer if verb == "ADD" else None


def _container(pod: Pod) -> str:
    return f"container-{pod.workload.uid}"


def chain(directory: Path, kind: str, socket: Path, *, subnet: str = "10.99.0", last: int = 99,
          default_route: bool = True, hooked: bool = True, **more: Any) -> list[dict[str, Any]]:  # fmt: skip
    """A conflist's plugins: Debian's ``kind`` with host-local addresses from .10 on, and ours at the end."""
    ipam = {
        "type": "host-local", "dataDir": str(directory / "ipam"),
        "routes": [{"dst": "0.0.0.0/0"}] if default_route else [],
        "ranges": [[{"subnet": f"{subnet}.0/24", "rangeStart": f"{subnet}.10", "rangeEnd": f"{subnet}.{last}"}]],
    }  # fmt: skip
    ours = [{"type": "meshbridge-cni", "socket": str(socket)}] if hooked else []
    return [{"type": kind, "ipam": ipam, **more}, *ours]
