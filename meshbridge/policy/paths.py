"""What Envoy makes of a path before policies see it.

Spec: Istio, ``meshConfig.pathNormalization``; Envoy, path_utility.cc; googleurl, url_canon_path.cc.
"""

from __future__ import annotations

import re
from functools import lru_cache
from string import ascii_letters, digits
from typing import Final

from meshbridge.policy.mesh import PathNormalization

_UNESCAPED: Final = frozenset(f"{ascii_letters}{digits}-_~")
"""What is written plainly even where it was sent escaped; a dot is, too, but may be part of a dot segment."""

_ESCAPED: Final = frozenset('"#<>?^`{|}\x7f').union(map(chr, range(0x01, 0x21)))
_ESCAPE = re.compile(r"%[0-9A-Fa-f]{2}")
_DOT = re.compile(r"%2e", re.IGNORECASE)
_SLASH = re.compile(r"%2f", re.IGNORECASE)
_BACKSLASH = re.compile(r"%5c", re.IGNORECASE)


@lru_cache(maxsize=8192)
def normalized(path: str, how: PathNormalization) -> str | None:
    """The path as policies see it, its query untouched; None where Envoy answers 400 instead."""
    if how is PathNormalization.NONE:
        return path
    plain, mark, query = path.partition("?")
    if how is PathNormalization.DECODE_AND_MERGE_SLASHES:
        plain = _BACKSLASH.sub(r"\\", _SLASH.sub("/", plain))
    canonical = _canonical(plain)
    if canonical is None:
        return None
    if how is not PathNormalization.BASE and "//" in canonical:
        canonical = _merged(canonical)
    return f"{canonical}{mark}{query}"


def _canonical(path: str) -> str | None:
    if "\x00" in path or "%00" in path:
        return None
    text = _unescaped(_DOT.sub(".", path.replace("\\", "/")))
    text = "".join(f"%{ord(c):02X}" if c in _ESCAPED else _encoded(c) for c in text)
    return _without_dots(text if text.startswith("/") else f"/{text}")


def _unescaped(path: str) -> str:
    """Escapes of plain characters undone; a lone percent sign that would begin one by that is escaped itself."""
    found: list[str] = []
    position = 0
    while position < len(path):
        escape = _ESCAPE.match(path, position)
        text = path[position] if escape is None else escape[0]
        position += len(text)
        if escape is not None and (character := chr(int(text[1:], 16))) in _UNESCAPED:
            text = character
            for back in (1, 2):
                begun = [*found[-back:], text, *path[position : position + 2 - back]]
                if len(found) >= back and found[-back] == "%" and _ESCAPE.fullmatch("".join(begun)):
                    found[-back] = "%25"
        found.append(text)
    return "".join(found)


def _encoded(character: str) -> str:
    if character.isascii():
        return character
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "replace"))


def _without_dots(path: str) -> str:
    """Dot segments resolved; a trailing one leaves its slash. Empty segments are segments."""
    first, *segments = path.split("/")
    kept: list[str] = []
    for position, segment in enumerate(segments):
        last = position == len(segments) - 1
        if segment == "..":
            if kept:
                kept.pop()
        elif segment != ".":
            kept.append(segment)
            continue
        if last:
            kept.append("")
    return "/".join([first, *kept])


def _merged(path: str) -> str:
    inner = "/".join(part for part in path.split("/") if part)
    return f"{'/' if path.startswith('/') else ''}{inner}{'/' if path.endswith('/') else ''}"


__all__ = ["normalized"]
