"""Where everything of the sample mesh lives: all of it under one directory, every name with one prefix."""

from __future__ import annotations

import hashlib
import os
import sys
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv4Network, IPv6Interface, IPv6Network
from pathlib import Path

RUN = Path("/run/meshbridge")
DEMO = RUN / "demo"
NETNS = Path("/run/netns")
BPFFS = Path("/sys/fs/bpf/meshbridge")

MANIFESTS = DEMO / "manifests"  # what a person applies; watched by the controller
KUBELET = DEMO / "kubelet"  # what the kubelet reports; watched by the controller
PODS = DEMO / "pods"
COMPONENTS = DEMO / "components"
LOGS = DEMO / "logs"
SECRETS = DEMO / "secrets"
CONTROLLER_STATE = DEMO / "controller"
CONTROLLER_SOCKET = RUN / "controller.sock"
HOSTS = DEMO / "hosts"
KUBELET_RECORD = DEMO / "kubelet.json"
KUBELET_STATUS = DEMO / "kubelet-status.json"

PROJECT = Path(__file__).resolve().parents[2]
SAMPLE_MANIFESTS = PROJECT / "manifests" / "demo"
INPUTS = PROJECT / "manifests" / "inputs"
POLICY_INPUTS = ("cilium-l4-policy.yaml", "istio-l7-policy.yaml")

PROXY_UID = 1337
APPLICATION_UID = 1000
GATEWAY_IPV4 = "169.254.1.1"
GATEWAY_IPV6 = "fe80::1"


@dataclass(frozen=True, slots=True)
class NodeLayout:
    """One node: a network namespace with an uplink to the other nodes and a range of pod addresses."""

    name: str
    ipv4: IPv4Interface
    ipv6: IPv6Interface
    pods_ipv4: IPv4Network
    pods_ipv6: IPv6Network

    @property
    def netns(self) -> str:
        return f"mb-{self.name}"

    @property
    def agent_socket(self) -> Path:
        return RUN / self.name / "agent.sock"

    @property
    def authz_socket(self) -> Path:
        return RUN / self.name / "authz.sock"

    @property
    def pins(self) -> Path:
        return BPFFS / self.name


def _node(number: int) -> NodeLayout:
    return NodeLayout(
        name=f"node-{number}",
        ipv4=IPv4Interface(f"172.30.0.{number}/24"),
        ipv6=IPv6Interface(f"fd00:30::{number}/64"),
        pods_ipv4=IPv4Network(f"10.244.{number}.0/24"),
        pods_ipv6=IPv6Network(f"fd00:244:{number}::/64"),
    )


NODES = {node.name: node for node in (_node(1), _node(2))}


def pod_netns(namespace: str, name: str) -> str:
    """Name of the pod's network namespace."""
    return f"mb-pod-{namespace}-{name}"


def pod_interface(uid: str) -> str:
    """Name of the host side of the pod's veth: at most 15 characters, another one for every pod UID."""
    return f"mbv{hashlib.sha256(uid.encode()).hexdigest()[:10]}"


def python() -> str:
    """The interpreter behind the virtual environment, which any user may run."""
    return os.path.realpath(sys.executable)


def meshbridge() -> str:
    """The ``meshbridge`` command of this installation."""
    return str(Path(sys.prefix) / "bin" / "meshbridge")
