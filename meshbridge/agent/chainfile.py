"""A node's CNI configuration with our plugin at its end, and without: texts in, texts out, no system calls.

Spec: CNI 1.1.0, section 1 (configuration format).
"""

from __future__ import annotations

import json
from typing import Any, Final

from meshbridge.agent.cnicall import VERSIONS
from meshbridge.errors import MeshBridgeError

PLUGIN: Final = "meshbridge-cni"


class ChainError(MeshBridgeError):
    """A configuration that is left as it is."""


class UnreadableChainError(ChainError):
    """No configuration at all: a runtime passes over it, and takes the next."""


def chained(content: bytes, entry: dict[str, Any], *, is_list: bool) -> bytes | None:
    """The configuration with ``entry`` as its last plugin; None where it has it already.

    Where others chained themselves behind it, it stays: what comes later finds the same interfaces.

    Args:
        is_list: Whether the file is a list of plugins, or one plugin that is to become one.

    Raises:
        UnreadableChainError: the content is no configuration.
        ChainError: nothing can be chained to it.
    """
    config = _read(content)
    plugins = _plugins(config) if is_list else [config]
    if not is_list and not isinstance(config.get("type"), str):
        raise UnreadableChainError("has no 'type'")
    version = config.get("cniVersion")
    if version not in VERSIONS:
        raise ChainError(
            f"cniVersion {str(version)[:20]!r} has no chains, so no pod can be guarded from its start",
            fix="use 0.3.0 or newer",
        )
    others = [plugin for plugin in plugins if plugin.get("type") != PLUGIN]
    if not others:
        raise ChainError("has no plugin that makes interfaces", fix="restore it")
    if entry in plugins[1:] and len(others) == len(plugins) - 1:
        return None
    whole = config if is_list else {"cniVersion": version, "name": config.get("name")}
    return _written({**whole, "plugins": [*others, entry]})


def unchained(content: bytes) -> bytes | None:
    """The configuration without our plugin; None where it is not in it.

    Raises:
        UnreadableChainError: the content is no list of plugins.
    """
    config = _read(content)
    plugins = _plugins(config)
    others = [plugin for plugin in plugins if plugin.get("type") != PLUGIN]
    return _written({**config, "plugins": others}) if len(others) < len(plugins) else None


def _read(content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError):
        raise UnreadableChainError("is no JSON") from None
    if not isinstance(config, dict) or not isinstance(config.get("name"), str):
        raise UnreadableChainError("is no object with a name")
    return config


def _plugins(config: dict[str, Any]) -> list[dict[str, Any]]:
    plugins = config.get("plugins")
    if not isinstance(plugins, list) or not plugins:
        raise UnreadableChainError("'plugins' is no list with anything in it")
    if not all(isinstance(plugin, dict) and isinstance(plugin.get("type"), str) for plugin in plugins):
        raise UnreadableChainError("a plugin has no 'type'")
    return plugins


def _written(config: dict[str, Any]) -> bytes:
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
