"""A manifest with ``mode: audit`` turned into ``mode: enforce``, and every other byte as it was."""

from __future__ import annotations

import re
from typing import Final

from meshbridge.errors import MeshBridgeError
from meshbridge.policy.model import Document

_MODE: Final = re.compile(rb"""(?<![\w-])(["']?)mode\1\s*:\s*(["']?)(audit)\2(?![\w-])""")


class PromotionError(MeshBridgeError):
    """A policy cannot be promoted where it stands."""


def promoted(content: bytes, policy: Document) -> bytes:
    """The file's content with the mode of ``policy``, which was read from it and audits, as ``enforce``.

    What else the change might mean is for the caller to find out by reading the result.

    Raises:
        PromotionError: its line does not say ``mode: audit`` just once.
    """
    line = policy.source.lines.get("spec.mode", 0)
    lines = content.split(b"\n")
    found = list(_MODE.finditer(lines[line - 1])) if 1 <= line <= len(lines) else []
    if len(found) != 1:
        raise PromotionError(
            "the mode is not written as 'mode: audit' there, or not only once",
            where=f"{policy.source.file}:{line}", fix="write mode: enforce by hand",
        )  # fmt: skip
    first, last = found[0].span(3)
    lines[line - 1] = lines[line - 1][:first] + b"enforce" + lines[line - 1][last:]
    return b"\n".join(lines)
