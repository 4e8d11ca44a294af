"""Names for addresses: one hosts file, seen by every container, in place of a cluster's DNS."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from socket import gethostname
from typing import Any

from meshbridge.demo.layout import HOSTS
from meshbridge.demo.records import PodRecord


def hosts(objects: Iterable[Mapping[str, Any]], pods: Iterable[PodRecord]) -> str:
    """A hosts file: a Service's names are the addresses of its ready pods, as a headless Service's are in DNS."""
    pods = sorted(pods, key=lambda record: record.key)
    # the machine's own name too, as in every container's file: who looks it up would wait for a DNS that is not there
    lines = ["127.0.0.1 localhost", "::1 localhost", f"127.0.0.1 {gethostname()}"]
    for record in pods:
        name = f"{record.name}.{record.namespace}.pod"
        lines += [f"{record.ipv4} {name}", f"{record.ipv6} {name}"]
    for service in objects:
        selector = (service.get("spec") or {}).get("selector") if service.get("kind") == "Service" else None
        if not selector:
            continue
        namespace, name = service["metadata"].get("namespace", "default"), service["metadata"]["name"]
        aliases = f"{name}.{namespace} {name}.{namespace}.svc {name}.{namespace}.svc.cluster.local"
        for record in pods:
            labels = record.pod["metadata"].get("labels") or {}
            if record.namespace == namespace and record.ready and selector.items() <= labels.items():
                lines += [f"{record.ipv4} {aliases}", f"{record.ipv6} {aliases}"]
    return "\n".join([*lines, ""])


def write_hosts(objects: Iterable[Mapping[str, Any]], pods: Iterable[PodRecord]) -> None:
    """Update the hosts file in place: containers have this very inode mounted."""
    text = hosts(objects, pods)
    if not HOSTS.exists() or HOSTS.read_text() != text:
        with HOSTS.open("r+" if HOSTS.exists() else "w") as file:
            file.write(text)
            file.truncate()
