"""Bringing the sample mesh up, and taking it down until nothing of it is left."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from meshbridge.demo import network, node_agent, pods, records, store, tokens
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import (
    BPFFS,
    COMPONENTS,
    CONTROLLER_SOCKET,
    DEMO,
    INPUTS,
    KUBELET,
    KUBELET_RECORD,
    KUBELET_STATUS,
    LOGS,
    MANIFESTS,
    NETNS,
    NODES,
    PODS,
    POLICY_INPUTS,
    RUN,
    SAMPLE_MANIFESTS,
    SECRETS,
    meshbridge,
)
from meshbridge.demo.processes import ProcessId, end, identify, in_netns
from meshbridge.demo.records import PodRecord
from meshbridge.demo.waiting import wait_for
from meshbridge.demo.workloads import desired_pods

STORE = store.Store(MANIFESTS)
Say = Callable[[str], None]
_LOCK_NAME = "\0meshbridge-demo"
_COMPONENTS_TIMEOUT_S = 60.0
_PODS_TIMEOUT_S = 90.0
_DOWN_TIMEOUT_S = 30.0


@contextmanager
def exclusive() -> Iterator[None]:
    """Hold the one lock of this machine's sample mesh; the kernel releases it when this process ends, however it ends.

    Raises:
        DemoError: Not root, or another command is at work on the mesh.
    """
    if os.geteuid() != 0:
        raise DemoError("network namespaces and BPF need root", where="meshbridge demo", fix="run it with sudo")
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(_LOCK_NAME)
    except OSError as error:
        lock.close()
        raise DemoError("another demo command is at work", where="meshbridge demo", fix="wait for it to end") from error
    try:
        yield
    finally:
        lock.close()


def kubelet() -> ProcessId | None:
    """The running kubelet; None when the mesh is down, or was left behind by a crash."""
    try:
        process = ProcessId(**json.loads(KUBELET_RECORD.read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None
    return process if process.alive else None


def is_up() -> bool:
    return kubelet() is not None


def require_up() -> None:
    if not is_up():
        raise DemoError("the sample mesh is not up", where="meshbridge demo", fix="start it with `meshbridge demo up`")


def up(say: Say, manifests: Path | None = None) -> None:
    """The mesh runs: nodes, controller, agents, authz, and every pod of the manifests is ready.

    ``manifests`` takes the place of the sample; its files are copied, so `apply` and `delete` never touch them.

    Raises:
        DemoError: Remains of an earlier mesh, or something did not come up; what came up stays, to be looked at.
    """
    if DEMO.exists():
        raise DemoError(
            f"{DEMO} is left from an earlier mesh", where="meshbridge demo up", fix="run `meshbridge demo down` first"
        )
    for directory in (DEMO, MANIFESTS, KUBELET, PODS, COMPONENTS, LOGS, SECRETS):
        directory.mkdir(parents=True, exist_ok=True)
    pods.prepare_images()
    say(f"nodes: {', '.join(f'{node.name} ({node.ipv4.ip}, {node.ipv6.ip})' for node in NODES.values())}")
    network.create_nodes(NODES.values())
    sources = _manifest_files(manifests)
    say(f"manifests: {', '.join(path.name for path in sources)}, and a RequestAuthentication with a key made just now")
    for path in sources:
        STORE.apply(path)
    if manifests is None:
        jwks = tokens.create_issuer()
        store.write(MANIFESTS / "request-authentication.yaml", tokens.request_authentication(jwks).encode())
    _start_kubelet()
    say("processes: controller, two agents (compiling the BPF programs when they are not cached), two authz")
    wait_for(components_ready, _COMPONENTS_TIMEOUT_S, "controller, agents and authz", detail=_component_logs)
    wait_pods(say)


def _manifest_files(manifests: Path | None) -> list[Path]:
    directory = manifests or SAMPLE_MANIFESTS
    files = sorted(path for path in directory.glob("*") if path.suffix in (".yaml", ".yml"))
    if not files:
        raise DemoError("holds no YAML files", where=str(directory), fix="name a directory of manifests")
    return files if manifests else [*files, *(INPUTS / name for name in POLICY_INPUTS)]


def _start_kubelet() -> None:
    # A grandchild, so that this process is not its parent: it is to outlive it and leave no zombie.
    code = "import os, sys\nif os.fork(): os._exit(0)\nos.setsid()\nos.execv(sys.argv[1], sys.argv[1:])"
    with (LOGS / "kubelet.log").open("ab") as log:
        subprocess.run(
            [sys.executable, "-c", code, meshbridge(), "demo", "kubelet"],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True,
        )  # fmt: skip
    wait_for(is_up, 20.0, "the kubelet to start", detail=lambda: (LOGS / "kubelet.log").read_text()[-500:])


def record_kubelet() -> None:
    """Called by the kubelet itself: from now on `down` finds it."""
    store.write(KUBELET_RECORD, json.dumps(asdict(identify(os.getpid()))).encode())


def components_ready() -> bool:
    """Whether every agent holds a revision of the controller's in its kernel, and every authz listens."""
    if not CONTROLLER_SOCKET.exists():
        return False
    return all(_node_ready(name) for name in NODES)


def _node_ready(name: str) -> bool:
    node = NODES[name]
    status = node_agent.status(node) if node.agent_socket.exists() else None
    return bool(status and status.controller_connected and status.revision_programmed) and node.authz_socket.exists()


def _component_logs() -> str:
    lines = []
    for path in sorted(LOGS.glob("*.log")):
        tail = path.read_text(errors="replace").splitlines()[-3:]
        lines += [f"{path.stem}: {line[:300]}" for line in tail]
    return "\n  ".join(["the last lines of the logs:", *lines])


def pod_states() -> dict[str, dict[str, object]]:
    """What the kubelet last said of each wanted pod."""
    try:
        states: dict[str, dict[str, object]] = json.loads(KUBELET_STATUS.read_text())
    except FileNotFoundError:
        return {}
    return states


def wait_pods(say: Say, timeout_s: float = _PODS_TIMEOUT_S) -> None:
    """Every wanted pod is ready and every other is gone; those that were not so before are told as it happens.

    Raises:
        DemoError: A pod that is refused, or not ready in time, with the reason.
    """
    # The kubelet may not have read the newest manifests yet: what is wanted is computed here as well.
    desired, refused = desired_pods(STORE.objects(), tuple(NODES))
    if refused:
        raise DemoError("; ".join(f"pod {key}: {reason}" for key, reason in refused.items()), where="manifests")
    wanted = {key: pod.digest for key, pod in desired.items()}
    waiting = _unsettled({*wanted, *pod_states()}, wanted)

    def settled() -> bool:
        if not is_up():
            raise DemoError("the kubelet has ended", where="demo", fix=f"look into {LOGS / 'kubelet.log'}")
        unsettled = _unsettled(waiting, wanted)
        for key in sorted(waiting - unsettled):
            record = records.load_pods().get(key)
            say(f"  pod {key} ready on {record.node} ({record.ipv4}, {record.ipv6})" if record else f"  pod {key} gone")
        waiting.intersection_update(unsettled)
        return not waiting

    def reasons() -> str:
        states = pod_states()
        return "; ".join(f"{key}: {states.get(key, {}).get('message') or 'no report'}" for key in sorted(waiting))

    wait_for(settled, timeout_s, "all pods to be ready", detail=reasons)


def _unsettled(keys: set[str], wanted: Mapping[str, str]) -> set[str]:
    """Those pods of ``keys`` that are wanted and not ready with their digest, or not wanted and still there."""
    ready = {key: state["digest"] for key, state in pod_states().items() if state["ready"]}
    return {key for key in keys if (ready.get(key) != wanted[key] if key in wanted else key in pod_states())}


def find_pod(name: str) -> PodRecord:
    """The pod called NAMESPACE/NAME, where NAME may also be that of a Deployment.

    Raises:
        DemoError: There is none, or several.
    """
    found = records.load_pods()
    if name in found:
        return found[name]
    matches = [record for key, record in found.items() if key.startswith(f"{name}-")]
    if len(matches) == 1:
        return matches[0]
    fix = f"pods are {', '.join(sorted(found)) or 'none'}"
    raise DemoError(
        f"{'several pods are' if matches else 'no pod is'} called {name!r}", where="meshbridge demo", fix=fix
    )


@dataclass(frozen=True, slots=True)
class Remains:
    """What of the mesh is still there; all empty after `down`."""

    processes: tuple[int, ...]
    namespaces: tuple[str, ...]
    pins: tuple[str, ...]
    directories: tuple[str, ...]

    def __bool__(self) -> bool:
        return bool(self.processes or self.namespaces or self.pins or self.directories)


def remains() -> Remains:
    """Look for everything the mesh could have left."""
    recorded = [process for record in records.load_pods().values() for process in record.processes.values()]
    recorded += records.load_components().values()
    recorded += [process for process in (kubelet(),) if process]
    namespaces = our_namespaces()
    alive = {process.pid for process in [*recorded, *in_netns(namespaces)] if process.alive}
    pins = [str(path) for node in NODES.values() if node.pins.exists() for path in (node.pins, *node.pins.rglob("*"))]
    places = [DEMO, CONTROLLER_SOCKET, *(RUN / name for name in NODES)]
    return Remains(
        tuple(sorted(alive)), tuple(namespaces), tuple(pins), tuple(str(path) for path in places if path.exists())
    )


def our_namespaces() -> list[str]:
    """Every network namespace of this mesh: its nodes', and those that carry the name of a pod's."""
    nodes = {node.netns for node in NODES.values()}
    return sorted(path.name for path in NETNS.glob("mb-*") if path.name in nodes or path.name.startswith("mb-pod-"))


def down(say: Say) -> None:
    """Nothing of the mesh is left: no process, namespace, link, pin or directory; also after a crash or half an `up`.

    Raises:
        DemoError: Something could not be removed; it is named.
    """
    running = kubelet()
    if running:
        end([running])  # first, so that it makes no more
    deadline = time.monotonic() + _DOWN_TIMEOUT_S
    while left := remains():
        if time.monotonic() > deadline:
            raise DemoError(f"could not be removed: {left}", where="meshbridge demo down")
        counts = f"{len(left.processes)} processes, {len(left.namespaces)} network namespaces, {len(left.pins)} pins"
        say(f"removing {counts}")
        _remove(left)


def _remove(left: Remains) -> None:
    recorded = records.load_pods().values()
    processes = [process for record in recorded for process in record.processes.values()]
    end([*processes, *records.load_components().values(), *in_netns(left.namespaces)])
    for record in recorded:
        network.delete_pod(record.layout, record.network)
    for netns in left.namespaces:
        network.delete_namespace(netns)
    for directory in (*(node.pins for node in NODES.values()), *(RUN / name for name in NODES), DEMO):
        shutil.rmtree(directory, ignore_errors=True)
    CONTROLLER_SOCKET.unlink(missing_ok=True)
    for shared in (RUN, BPFFS):
        with suppress(OSError):  # somebody else's things may be in it, or it is not there
            shared.rmdir()
