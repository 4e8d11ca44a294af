"""One pod from nothing to ready, in a kubelet's order: network, hooks, redirect rules, sidecar, containers."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from meshbridge.demo import istio_init, network, node_agent, sidecar, store
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import APPLICATION_UID, DEMO, HOSTS, KUBELET, LOGS, NETNS, PROJECT, python
from meshbridge.demo.netns import Answer, http_get
from meshbridge.demo.processes import Command, end, in_netns, start
from meshbridge.demo.records import PodRecord, Stage
from meshbridge.demo.waiting import wait_for
from meshbridge.identity.model import IpFamily

IMAGE = DEMO / "image"  # where containers find this project's sample applications
BIN = DEMO / "bin"
PROMETHEUS_CACHE = Path("/var/cache/meshbridge/prometheus/current")  # where scripts/setup unpacks Debian's package
PROMETHEUS_MOUNT = DEMO / "prometheus-package"
STATUS_AGENT = "status-agent"
ENVOY = "envoy"
_READY_TIMEOUT_S = 30.0


def create(record: PodRecord, guarded: bool = True) -> PodRecord:
    """Make the pod and start everything in it; every step is on disk before it happens.

    ``guarded``: the node's agent hooks the interface before anything runs behind it, and knows the pod's policy
    before its containers start.
    """
    record = record.save()
    network.create_pod(record.layout, record.network, record.sysctls)
    if guarded:
        node_agent.add_endpoint(record, wait_ready=False)
    write_status(record, "Pending")
    if record.init_arguments is not None:
        run_istio_init(record)
    if guarded:
        node_agent.add_endpoint(record, wait_ready=True)
    for name in containers(record):
        record = start_container(record, name)
        if name == ENVOY:
            sidecar.wait_ready(record)
    write_status(record, "Running")
    wait_for(lambda: probe(record), _READY_TIMEOUT_S, f"pod {record.key} to be ready", detail=lambda: last_log(record))
    record = replace(record, ready=True, stage=Stage.RUNNING, message="").save()
    write_status(record, "Running")
    return record


def remove(record: PodRecord) -> None:
    """Nothing of the pod is left: its status, its processes, its network, its record. Repeating it is no error."""
    status_path(record).unlink(missing_ok=True)
    end([*record.processes.values(), *in_netns([record.netns])])
    network.delete_pod(record.layout, record.network)
    sidecar.bootstrap_path(record).unlink(missing_ok=True)
    record.path.unlink(missing_ok=True)


def containers(record: PodRecord) -> list[str]:
    """The names of the pod's processes, in the order in which they start."""
    proxy = [ENVOY, *([STATUS_AGENT] if _probers(record) else [])] if record.proxy is not None else []
    return [*proxy, *(container["name"] for container in record.containers)]


def start_container(record: PodRecord, name: str) -> PodRecord:
    """Start one process of the pod and record it."""
    return record.with_process(name, start(_command(record, name))).save()


def ended(record: PodRecord) -> list[str]:
    """The processes that should run and do not."""
    return [name for name in containers(record) if name not in record.processes or not record.processes[name].alive]


def exec_command(
    record: PodRecord, argv: list[str], env: Mapping[str, str] | None = None, uid: int = APPLICATION_UID
) -> Command:
    """The command line that runs ``argv`` beside the pod's application, as its user, with its view of names."""
    return Command(argv, record.netns, LOGS / "exec.log", uid, container_env(env or {}), _mounts())


def container_env(env: Mapping[str, str]) -> dict[str, str]:
    path = f"{BIN}:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"
    return {
        "PATH": path,
        "PYTHONPATH": str(IMAGE),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": "/",
        **env,
    }


def prepare_images() -> None:
    """Make the places that containers find their programs in; the pods' users may not be able to read this checkout."""
    for directory in (IMAGE, BIN, sidecar.ENVOY_MOUNT, PROMETHEUS_MOUNT):
        directory.mkdir(parents=True, exist_ok=True)
    for name in ("python", "python3"):
        (BIN / name).unlink(missing_ok=True)
        (BIN / name).symlink_to(python())
    (BIN / "prometheus").unlink(missing_ok=True)
    (BIN / "prometheus").symlink_to(PROMETHEUS_MOUNT / "usr" / "bin" / "prometheus")
    HOSTS.touch()


def run_istio_init(record: PodRecord) -> None:
    """The pod's namespace has the nat rules that its istio-init arguments ask for, in both address families.

    It also has ::6 on its loopback, from which Envoy reaches the application past these rules; 127.0.0.6 needs none.
    """
    assert record.init_arguments is not None
    network.add_loopback_address(record.netns, istio_init.PASSTHROUGH_IPV6)
    arguments = istio_init.parse(record.init_arguments)
    for family, tool in ((IpFamily.IPV4, "iptables-restore"), (IpFamily.IPV6, "ip6tables-restore")):
        rules = istio_init.rules(arguments, family)
        argv = ["nsenter", f"--net={NETNS / record.netns}", tool, "--noflush"]
        done = subprocess.run(argv, input=rules, text=True, capture_output=True, check=False)
        if done.returncode:
            raise DemoError(f"{tool} refuses the rules of istio-init: {done.stderr.strip()}", where=f"pod {record.key}")


def probe(record: PodRecord) -> bool:
    """Whether every readiness probe of the pod is answered, asked from the node's own address as a kubelet does."""
    return not ended(record) and all(200 <= answer.status < 400 for answer in probe_answers(record))


def probe_answers(record: PodRecord) -> list[Answer]:
    """The answers to the pod's readiness probes now."""
    answers = []
    for container in record.containers:
        http = (container.get("readinessProbe") or {}).get("httpGet")
        if http:
            ports = {port.get("name"): port["containerPort"] for port in container.get("ports", ())}
            port = int(ports.get(http["port"], http["port"]))
            answers.append(http_get(record.layout.netns, record.ipv4, port, http.get("path", "/"), timeout_s=2.0))
    return answers


def status_path(record: PodRecord) -> Path:
    return KUBELET / f"pod_{record.namespace}_{record.name}.yaml"


def write_status(record: PodRecord, phase: str) -> None:
    """Report the pod as a kubelet does: the final spec, and a status with its addresses, phase and readiness."""
    pod: dict[str, Any] = {"apiVersion": "v1", "kind": "Pod", **record.pod}
    pod["metadata"] = {**record.pod["metadata"], "uid": record.uid}
    pod["status"] = {
        "phase": phase,
        "hostIP": str(record.layout.ipv4.ip),
        "podIP": record.ipv4,
        "podIPs": [{"ip": record.ipv4}, {"ip": record.ipv6}],
        "conditions": [{"type": "Ready", "status": "True" if record.ready else "False"}],
    }
    store.write(status_path(record), yaml.safe_dump(pod, sort_keys=False).encode())


def last_log(record: PodRecord) -> str:
    """The last lines that the pod's processes wrote: what a person needs when it does not become ready."""
    lines = []
    for name in containers(record):
        path = _log(record, name)
        if path.exists():
            lines += [f"{name}: {line}" for line in path.read_text(errors="replace").splitlines()[-3:]]
    return "; ".join(lines[-6:])


def _command(record: PodRecord, name: str) -> Command:
    if name == ENVOY:
        return sidecar.command(record, _log(record, name), _mounts())
    if name == STATUS_AGENT:
        env = container_env({"ISTIO_KUBE_APP_PROBERS": _probers(record)})
        argv = ["python3", "-m", "meshbridge.demo.apps.status_agent"]
        # Istio's runs as Envoy's user, in its container. Here are no containers, so nobody but Envoy may be that user.
        return Command(argv, record.netns, _log(record, name), APPLICATION_UID, env, _mounts())
    container = next(container for container in record.containers if container["name"] == name)
    env = container_env({item["name"]: str(item.get("value", "")) for item in container.get("env", ())})
    argv = [*map(str, container.get("command", ())), *map(str, container.get("args", ()))]
    if not argv:
        raise DemoError(
            f"container {name} names no command",
            where=f"pod {record.key}",
            fix="give it `command`: images are not pulled here",
        )
    return Command(argv, record.netns, _log(record, name), APPLICATION_UID, env, _mounts())


def _probers(record: PodRecord) -> str:
    for item in (record.proxy or {}).get("env", ()):
        if item["name"] == "ISTIO_KUBE_APP_PROBERS":
            return str(item["value"])
    return ""


def _mounts() -> list[tuple[Path, Path]]:
    unpacked = [(PROMETHEUS_CACHE, PROMETHEUS_MOUNT)] if PROMETHEUS_CACHE.is_dir() else []
    return [(HOSTS, Path("/etc/hosts")), (PROJECT, IMAGE), *unpacked]


def _log(record: PodRecord, name: str) -> Path:
    return LOGS / f"{record.namespace}_{record.name}_{name}.log"
