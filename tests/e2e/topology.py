"""The cluster's names and addresses. All of them are inside the hosts' own network namespaces."""

from __future__ import annotations

from dataclasses import dataclass

CONTROL_PLANE = "control-plane"
BRIDGE = "nodes"
PREFIX = 24
API_SERVER = "172.31.250.1"
PODS = "10.244.0.0/16"
SERVICES = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
DNS_SERVICE = "10.96.0.10"


@dataclass(frozen=True)
class NodeAddresses:
    name: str
    address: str
    pods: str


NODES = (
    NodeAddresses("node-1", "172.31.250.11", "10.244.1.0/24"),
    NodeAddresses("node-2", "172.31.250.12", "10.244.2.0/24"),
)


def node(name: str) -> NodeAddresses:
    return next(each for each in NODES if each.name == name)


def hosts_file() -> str:
    return "".join(f"{each.address} {each.name}\n" for each in NODES) + f"{API_SERVER} {CONTROL_PLANE}\n"
