"""A manifest completed with what it leaves out, and nothing that it says changed."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from meshbridge.demo.errors import DemoError


def completed(manifest: Mapping[str, Any], additions: Mapping[str, Any]) -> dict[str, Any]:
    """``manifest`` with ``additions`` merged in: mappings by key, lists of named items by name.

    Raises:
        DemoError: The additions say something else than the manifest, or would extend a list that it has.
    """
    merged = _merged(manifest, additions, "")
    assert isinstance(merged, dict)
    return merged


def _merged(value: Any, addition: Any, path: str) -> Any:
    if value is None:
        return copy.deepcopy(addition)
    if isinstance(value, Mapping) and isinstance(addition, Mapping):
        keys = dict.fromkeys([*value, *addition])
        return {key: _merged(value.get(key), addition.get(key), f"{path}.{key}".lstrip(".")) for key in keys}
    if _named(value) and _named(addition):
        by_name = {item["name"]: item for item in addition}
        if extra := by_name.keys() - {item["name"] for item in value}:
            raise DemoError(f"would add {', '.join(sorted(extra))}", where=path, fix="leave it to the manifest")
        return [_merged(item, by_name.get(item["name"]), f"{path}[{item['name']}]") for item in value]
    if addition is None or addition == value:
        return copy.deepcopy(value)
    raise DemoError(f"would change {value!r} to {addition!r}", where=path, fix="leave it to the manifest")


def _named(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, Mapping) and "name" in item for item in value)
