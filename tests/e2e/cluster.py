"""A Kubernetes of two nodes on this machine, with CoreDNS and Istio, and the handles a test has on it."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import control_plane as plane
import dns
import images
import istio
import topology
import trees
from host import NAME, Host, remove_cgroups, remove_directory
from kubectl import Kubectl, Object, is_ready, starts, wait_until
from node import boot_node, import_images, start_containerd, start_node
from pki import Authority

DIRECTORY = trees.CACHE / NAME
STATE = DIRECTORY / "cluster.json"
READY_S = 120


@dataclass
class Cluster:
    """All of it. ``nodes`` and ``control_plane`` are hosts, to run things on and to stop and start services of."""

    directory: Path
    control_plane: Host
    nodes: dict[str, Host]
    authority: Authority
    lives_on: bool = False

    @property
    def kubeconfig(self) -> Path:
        """The administrator's. Its address is only to be reached from the control plane's network."""
        return self.directory / "admin.conf"

    @property
    def kubectl(self) -> Kubectl:
        return Kubectl(self.control_plane, self.kubeconfig)

    @property
    def hosts(self) -> tuple[Host, ...]:
        return (self.control_plane, *self.nodes.values())

    def import_images(self, archive: Path) -> None:
        """Load images made elsewhere, as a Docker or OCI archive, into every node."""
        for each in self.nodes.values():
            import_images(each, archive)

    @contextlib.contextmanager
    def without(self, host: Host, service: str) -> Iterator[None]:
        """A service is away while this lasts, as if it had crashed: the API server, a kubelet."""
        host.stop(service, signal.SIGKILL)
        try:
            yield
        finally:
            host.start_again(service)
            if service == "kube-apiserver":
                plane.wait_for_api_server(host)

    def reboot(self, name: str) -> None:
        """A node loses power and comes back: processes, mounts, BPF objects and network are gone, its disk stays.

        When this returns, those of its pods that were ready are so again.
        """
        mine = {each["metadata"]["uid"] for each in self._pods_on(name) if is_ready(each)}
        began = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
        self.nodes[name].shut_down()
        self.nodes[name] = _boot(self, name)
        _start(self, self.nodes[name])
        self._save()

        def runs_anew() -> bool:
            # Until the kubelet has looked, the API server believes what was so before.
            pods = [each for each in self._pods_on(name) if each["metadata"]["uid"] in mine]
            return all(map(is_ready, pods)) and all(started >= began for each in pods for started in starts(each))

        wait_until(runs_anew, f"{name} runs its pods anew", READY_S, self.troubles)
        self.wait_ready()

    def _pods_on(self, node: str) -> list[Object]:
        return [each for each in self.kubectl.items("pods") if each["spec"].get("nodeName") == node]

    def wait_ready(self) -> None:
        """Return when the API server calls both nodes ready."""

        def ready() -> bool:
            found = self.kubectl.items("nodes")
            return len(found) == len(topology.NODES) and all(map(is_ready, found))

        wait_until(ready, "both nodes are ready", READY_S, self.troubles)

    def troubles(self) -> str:
        """The last words of each service, those that ended first."""
        told = []
        for host in self.hosts:
            for log in sorted(host.logs.glob("*.log")):
                ended = "" if host.pid_of(log.stem) else "ENDED "
                told.append(f"{ended}{host.name} {log.stem}:\n{host.log(log.stem, 8)}")
        return "\n".join(sorted(told, key=lambda each: not each.startswith("ENDED")))

    def collect(self, target: Path) -> None:
        """Write what one needs to find out why: services' logs, objects, events, and pods' logs."""
        target.mkdir(parents=True, exist_ok=True)
        for host in self.hosts:
            for log in host.logs.glob("*.log"):
                shutil.copy(log, target / f"{host.name}-{log.name}")
        kinds = "nodes,pods,services,endpoints"
        ask: dict[str, Callable[[], str]] = {
            "objects.txt": lambda: self.kubectl("get", kinds, "-A", "-o", "wide", check=False),
            "pods.yaml": lambda: self.kubectl("get", "pods", "-A", "-o", "yaml", check=False),
            "events.txt": lambda: self.kubectl("get", "events", "-A", "--sort-by=.lastTimestamp", check=False),
        }
        for file, asked in ask.items():
            with contextlib.suppress(AssertionError):
                (target / file).write_text(asked())
        for host in self.nodes.values():
            pods = host.root / "var/log/pods"
            with contextlib.suppress(OSError, shutil.Error):
                shutil.copytree(pods, target / f"{host.name}-pods", dirs_exist_ok=True)

    def shut_down(self) -> None:
        """End it all; nothing of it is left on the machine but caches."""
        for host in reversed(self.hosts):
            host.shut_down()
        remove_directory(self.directory)

    def _save(self) -> None:
        state = {"control_plane": self.control_plane.pid, "nodes": {n: h.pid for n, h in self.nodes.items()}}
        STATE.write_text(json.dumps(state))


@contextlib.contextmanager
def only_one() -> Iterator[None]:
    """Wait for the end of another process's cluster of this name."""
    with trees.alone(NAME):
        yield


def start(*, lives_on: bool = False, say: Callable[[str], None] = lambda _: None) -> Cluster:
    """Start everything; nodes, DNS and Istio are ready when this returns. What a dead one left is removed first.

    The cluster ends with this process unless it ``lives_on``.
    """
    if attach():
        raise AssertionError(
            f"a cluster {NAME!r} is running: end it with tests/e2e/up.py down, use it with MESHBRIDGE_E2E_REUSE=1, "
            "or name another with MESHBRIDGE_E2E_NAME"
        )
    began = time.monotonic()
    disk, tree = images.disk(), trees.node()
    remove_left_over()
    say(f"images and trees are there after {time.monotonic() - began:.1f} s")
    began = time.monotonic()
    DIRECTORY.mkdir(parents=True, mode=0o700)
    kubernetes = plane.built("kubernetes") / "bin"
    authority = plane.create_pki(DIRECTORY / "pki")
    control = plane.boot_control_plane(DIRECTORY / topology.CONTROL_PLANE, tree, kubernetes, lives_on=lives_on)
    cluster = Cluster(DIRECTORY, control, {}, authority, lives_on)
    try:
        plane.start_control_plane(control, authority)
        cluster.kubeconfig.touch(mode=0o600)
        server = f"https://{topology.API_SERVER}:6443"
        cluster.kubeconfig.write_text(authority.kubeconfig("admin", server, ["system:masters"]))
        say(f"the API server is ready after {time.monotonic() - began:.1f} s")
        for each in topology.NODES:
            images.copy_disk(disk, DIRECTORY / each.name / "containerd")
            cluster.nodes[each.name] = _boot(cluster, each.name)
            _start(cluster, cluster.nodes[each.name])
        cluster._save()
        dns.install(cluster.kubectl)
        istio.install(cluster.kubectl)
        cluster.wait_ready()
        say(f"both nodes are ready after {time.monotonic() - began:.1f} s")
        cluster.kubectl.roll_out("deployment/coredns", "kube-system")
        istio.wait_ready(cluster.kubectl)
        say(f"DNS and Istio are ready after {time.monotonic() - began:.1f} s")
    except BaseException:
        if kept := os.environ.get("MESHBRIDGE_E2E_LOGS"):
            cluster.collect(Path(kept))
        cluster.shut_down()
        raise
    return cluster


def attach() -> Cluster | None:
    """The cluster that an earlier process left running, if there is one."""
    if not STATE.exists():
        return None
    state = json.loads(STATE.read_text())
    control = Host(topology.CONTROL_PLANE, DIRECTORY / topology.CONTROL_PLANE, state["control_plane"])
    nodes = {name: Host(name, DIRECTORY / name, pid) for name, pid in state["nodes"].items()}
    cluster = Cluster(DIRECTORY, control, nodes, Authority(DIRECTORY / "pki"), lives_on=True)
    return cluster if all(each.is_up() for each in cluster.hosts) else None


def remove_left_over() -> None:
    """End and remove what is left of an earlier cluster."""
    if left := attach():
        left.shut_down()
    for name in (topology.CONTROL_PLANE, "images", *(each.name for each in topology.NODES)):
        remove_cgroups(name)
    remove_directory(DIRECTORY)


def _boot(cluster: Cluster, name: str) -> Host:
    kubernetes = plane.built("kubernetes") / "bin"
    host = boot_node(name, cluster.directory / name, trees.node(), kubernetes, lives_on=cluster.lives_on)
    plane.plug_in(cluster.control_plane, host)
    return host


def _start(cluster: Cluster, host: Host) -> None:
    start_containerd(host)
    start_node(host, cluster.authority)
