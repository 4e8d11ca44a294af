"""Tokens that a kubelet projects into what it starts: who a pod is, who a node is."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from meshbridge.demo import store
from meshbridge.demo.layout import CONTROLLER_STATE, SECRETS
from meshbridge.demo.records import PodRecord
from meshbridge.xds.auth import Caller, load_or_create_key, mint_token, node_caller, pod_caller

TOKEN_KEY = CONTROLLER_STATE / "token.key"
_LIFETIME = timedelta(days=30)  # nobody rotates them here; the mesh does not live that long


def pod_token(record: PodRecord) -> str:
    """A token that says "this pod"; valid as long as the sample mesh can reasonably be up."""
    return _mint(pod_caller(record.node, record.namespace, record.name, record.service_account, record.uid))


def write_node_token(node: str) -> Path:
    """The path of a file, readable for root alone, with a token that says "this node"."""
    path = SECRETS / f"{node}.token"
    store.write(path, _mint(node_caller(node)).encode(), 0o600)
    return path


def _mint(caller: Caller) -> str:
    return mint_token(load_or_create_key(TOKEN_KEY), caller, now=datetime.now(UTC), lifetime=_LIFETIME)
