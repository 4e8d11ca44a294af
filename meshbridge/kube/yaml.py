"""YAML as Kubernetes reads it, with the line of every value, from text that anybody may have written.

The events of PyYAML's C parser are put together here, because its composer recurses without a limit, keeps only the
last of two equal keys, expands aliases without counting, and reads ``12:30:45`` as a number.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Final, NoReturn

import yaml
from yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
    StreamStartEvent,
)

from meshbridge.errors import MeshBridgeError

MAX_DEPTH: Final = 64
MAX_NODES: Final = 400_000  # as written and after aliases are expanded; a 1 MB policy has about 100,000
MAX_LINES: Final = 20_000  # values of one document whose line is kept: the outermost, a problem names the nearest
MAX_NUMBER_LENGTH: Final = 40

_STR_TAG = "tag:yaml.org,2002:str"
_TAGS_OF = {"map": "tag:yaml.org,2002:map", "list": "tag:yaml.org,2002:seq"}
_CONSTANTS: Final[Mapping[str, bool | None]] = {
    word: value
    for value, words in {None: ("null",), True: ("true", "yes", "on"), False: ("false", "no", "off")}.items()
    for lower in words
    for word in (lower, lower.capitalize(), lower.upper())
} | {"": None, "~": None}
_MAY_BE_NUMBER = frozenset("+-.0123456789")
_INTEGER = re.compile(r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0o?[0-7_]+|0|[1-9][0-9_]*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF|nan|NaN|NAN)")


class YamlError(MeshBridgeError):
    """Text that cannot be read; ``line`` is where, 1-based."""

    def __init__(self, what: str, line: int, fix: str = "") -> None:
        super().__init__(what, fix=fix)
        self.line = line


@dataclass(frozen=True, slots=True)
class YamlDocument:
    """One document of a stream: plain dicts, lists and scalars, and the 1-based line of each path (``""``: its own)."""

    data: Any
    lines: Mapping[str, int]


def read_documents(content: bytes) -> list[YamlDocument]:
    """Every non-empty document of a YAML or JSON file.

    Raises:
        YamlError: not UTF-8, not YAML, too deep or too big, a duplicate or unusable key, an alias to itself, a tag.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        byte = content[error.start]
        raise YamlError(f"byte 0x{byte:02x} is not UTF-8", line, "save the file as UTF-8") from None
    if (at := text.find("\0")) >= 0:
        raise YamlError("a NUL character", text.count("\n", 0, at) + 1, "remove it")
    try:
        return list(_Builder(yaml.parse(text, Loader=yaml.CSafeLoader)).documents())
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else text.count("\n", 0, getattr(error, "position", 0) or 0) + 1
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or "not YAML"
        raise YamlError(f"not YAML: {problem}", line, "correct the syntax") from None


class _Builder:
    def __init__(self, events: Iterator[Event]) -> None:
        self._events = events
        self._anchors: dict[str, tuple[Any, int]] = {}
        self._nodes = 0
        self._lines: dict[str, tuple[int, int]] = {}

    def documents(self) -> Iterator[YamlDocument]:
        for event in self._events:
            if isinstance(event, DocumentStartEvent):
                self._anchors, self._lines = {}, {}
                data = self._value(next(self._events), "", 0)
                if data is not None:
                    yield YamlDocument(data, self._kept_lines())
            elif not isinstance(event, StreamStartEvent | StreamEndEvent | DocumentEndEvent):
                _refuse(event, "unexpected content", "separate documents by '---'")

    def _kept_lines(self) -> dict[str, int]:
        at_depth = Counter(depth for _, depth in self._lines.values())
        counts = accumulate(at_depth[depth] for depth in range(MAX_DEPTH + 1))
        deepest = max((depth for depth, count in enumerate(counts) if count <= MAX_LINES), default=0)
        return {path: line for path, (line, depth) in self._lines.items() if depth <= deepest}

    def _value(self, event: Event, path: str, depth: int, line: int = 0) -> Any:
        self._count(event, 1)
        if depth > MAX_DEPTH:
            _refuse(event, f"nested deeper than {MAX_DEPTH} levels", "flatten it")
        self._lines[path] = (line or _line(event), depth)
        if isinstance(event, AliasEvent):
            return self._alias(event)
        before = self._nodes
        value: Any
        match event:
            case ScalarEvent():
                value = _scalar(event)
            case MappingStartEvent():
                _check_tag(event, "map")
                value = self._mapping(path, depth)
            case SequenceStartEvent():
                _check_tag(event, "list")
                value = self._sequence(path, depth)
            case _:
                _refuse(event, "unexpected content", "correct the syntax")
        if event.anchor is not None:
            self._anchors[event.anchor] = (value, self._nodes - before)
        return value

    def _mapping(self, path: str, depth: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for event in self._events:
            if isinstance(event, MappingEndEvent):
                break
            key = _key(event)
            if key in found:
                _refuse(event, f"duplicate key {key[:80]!r}", "keep one of them")
            line = _line(event)  # people look for the key, not for where its block begins
            found[key] = self._value(next(self._events), f"{path}.{key}" if path else key, depth + 1, line)
        return found

    def _sequence(self, path: str, depth: int) -> list[Any]:
        found: list[Any] = []
        for event in self._events:
            if isinstance(event, SequenceEndEvent):
                break
            found.append(self._value(event, f"{path}[{len(found)}]", depth + 1))
        return found

    def _alias(self, event: AliasEvent) -> Any:
        if event.anchor not in self._anchors:
            _refuse(event, f"alias *{event.anchor} to nothing, or to itself", "write the value out")
        value, size = self._anchors[event.anchor]
        self._count(event, size)
        return value

    def _count(self, event: Event, nodes: int) -> None:
        self._nodes += nodes
        if self._nodes > MAX_NODES:
            _refuse(event, f"more than {MAX_NODES} values", "split the file, and write aliases out")


def _key(event: Event) -> str:
    if not isinstance(event, ScalarEvent):
        _refuse(event, "a key that is no string", "use plain strings as keys")
    value = _scalar(event)
    if event.value == "<<" and event.implicit[0]:
        _refuse(event, "a merge key", "write the fields out")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if not isinstance(value, str):
        _refuse(event, f"the key {event.value[:80]!r}", "quote it")
    return value


def _scalar(event: ScalarEvent) -> str | int | float | bool | None:
    text = event.value
    if event.tag not in (None, _STR_TAG):
        _refuse(event, f"the tag {event.tag[:80]}", "write the value without a tag")
    if event.tag is not None or not event.implicit[0]:
        return text
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if text[0] not in _MAY_BE_NUMBER:
        return text
    if len(text) > MAX_NUMBER_LENGTH:
        if _INTEGER.fullmatch(text) or _FLOAT.fullmatch(text):
            _refuse(event, f"a number of {len(text)} digits", "quote it, or shorten it")
        return text
    if _INTEGER.fullmatch(text):
        return _integer(text.replace("_", ""))
    if _FLOAT.fullmatch(text):
        number = float(text.replace("_", ""))
        if math.isfinite(number):
            return number
    elif not _NOT_FINITE.fullmatch(text):
        return text
    return _refuse(event, f"the number {text!r}", "use a finite number, or quote it")


def _integer(text: str) -> int:
    sign = -1 if text.startswith("-") else 1
    digits = text.lstrip("+-")
    if digits.startswith("0") and digits[1:2].isdigit():
        return sign * int(digits, 8)  # YAML 1.1, as kubectl reads it
    return sign * int(digits, 0)


def _check_tag(event: MappingStartEvent | SequenceStartEvent, name: str) -> None:
    if event.tag not in (None, _TAGS_OF[name]):
        _refuse(event, f"the tag {event.tag[:80]}", "write the value without a tag")


def _line(event: Event) -> int:
    return event.start_mark.line + 1 if event.start_mark is not None else 0


def _refuse(event: Event, what: str, fix: str) -> NoReturn:
    raise YamlError(what, _line(event), fix)
