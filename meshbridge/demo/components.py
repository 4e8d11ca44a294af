"""The product's own processes, started by its own commands: one controller, and an agent and an authz on every node."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from meshbridge.demo import credentials, records
from meshbridge.demo.layout import (
    CONTROLLER_SOCKET,
    CONTROLLER_STATE,
    KUBELET,
    LOGS,
    MANIFESTS,
    NODES,
    NodeLayout,
    meshbridge,
)
from meshbridge.demo.processes import Command, ProcessId, start

# Loopback of the node the process runs on.
CONTROLLER_METRICS = "127.0.0.1:9401"
AUTHZ_METRICS = "127.0.0.1:9402"
AGENT_METRICS = "127.0.0.1:9403"


@dataclass(frozen=True, slots=True)
class Component:
    """One process of the product. ``can_start`` says whether what it needs is there."""

    name: str
    command: Callable[[], Command]
    can_start: Callable[[], bool] = lambda: True


def all_components() -> list[Component]:
    """Every component, in the order in which they start."""
    nodes = list(NODES.values())
    found = [Component("controller", _controller)]
    for node in nodes:
        found.append(Component(f"agent-{node.name}", partial(_agent, node), CONTROLLER_SOCKET.exists))
        found.append(Component(f"authz-{node.name}", partial(_authz, node), CONTROLLER_SOCKET.exists))
    return found


def start_component(component: Component) -> ProcessId:
    """Start it and record it."""
    process = start(component.command())
    records.save_component(component.name, process)
    return process


def _controller() -> Command:
    argv = [meshbridge(), "controller", "--manifests", str(MANIFESTS), "--manifests", str(KUBELET)]
    argv += ["--state-dir", str(CONTROLLER_STATE), "--listen", f"unix:{CONTROLLER_SOCKET}"]
    argv += ["--metrics", CONTROLLER_METRICS]
    first_node = next(iter(NODES.values()))
    return Command(argv, first_node.netns, LOGS / "controller.log", env=_settings())


def _agent(node: NodeLayout) -> Command:
    argv = [meshbridge(), "agent", "--node", node.name, "--controller", f"unix:{CONTROLLER_SOCKET}"]
    argv += ["--token-file", str(credentials.write_node_token(node.name)), "--metrics", AGENT_METRICS]
    return Command(argv, node.netns, LOGS / f"agent-{node.name}.log", env=_settings())


def _authz(node: NodeLayout) -> Command:
    argv = [meshbridge(), "authz", "--node", node.name, "--controller", f"unix:{CONTROLLER_SOCKET}"]
    argv += ["--token-file", str(credentials.write_node_token(node.name)), "--metrics", AUTHZ_METRICS]
    return Command(argv, node.netns, LOGS / f"authz-{node.name}.log", env=_settings())


def _settings() -> dict[str, str]:
    """Options set by environment (``MESHBRIDGE_AGENT_ATTACH=clsact``) reach the processes they are meant for."""
    return {name: value for name, value in os.environ.items() if name.startswith("MESHBRIDGE_")}
