"""A strict cursor over raw YAML or JSON: whatever is not understood is refused with its path, a reason and a fix."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from ipaddress import ip_network
from typing import Any, NoReturn

from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpNetwork

MAX_ITEMS = 20_000
"""No list or mapping of a policy is longer; the API server's own limit is a size of about 1.5 MB."""

_SHOWN = 60
_LONGEST_STEP = 320


class Invalid(MeshBridgeError):
    """A part of an object that is not understood; the object it stands in is refused as a whole."""

    def __init__(self, path: str, reason: str, fix: str = "") -> None:
        super().__init__(reason, where=path, fix=fix)
        self.path, self.reason = path, reason

    @classmethod
    def of(cls, error: Exception) -> Invalid:
        """What refuses an object that trips its parser as well: it may not keep policy from all others."""
        if isinstance(error, Invalid):
            return error
        text = " ".join(str(error).split())[:_LONGEST_STEP]
        fix = "that is a defect of MeshBridge: report it with the object, and write it differently until it is mended"
        return cls("", f"cannot be read: {type(error).__name__}{f': {text}' if text else ''}", fix)


def shown(value: object) -> str:
    """A value as an error quotes it: short, and never with control characters."""
    if isinstance(value, Mapping | list):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


class Reader:
    """A value and the path that leads to it."""

    __slots__ = ("path", "value")

    def __init__(self, value: Any, path: str) -> None:
        self.value, self.path = value, path

    def refuse(self, reason: str, fix: str = "") -> NoReturn:
        raise Invalid(self.path, reason, fix)

    def fields(self, *known: str) -> dict[str, Reader]:
        """The fields of a mapping.

        Raises:
            Invalid: It is no mapping, has a field not in ``known``, or a field without a value.
        """
        fields = self.mapping()
        for name, field in fields.items():
            if name not in known:
                field.refuse(f"unknown field {shown(name)}", f"use: {', '.join(known)}")
        return fields

    def mapping(self) -> dict[str, Reader]:
        """Every entry of a mapping with string keys.

        Raises:
            Invalid: It is no mapping, or an entry has no value.
        """
        if not isinstance(self.value, Mapping):
            self.refuse(f"expected a mapping, found {shown(self.value)}", "see the kind's reference")
        if len(self.value) > MAX_ITEMS:
            self.refuse(f"{len(self.value)} entries are more than {MAX_ITEMS}", "split the object")
        found = {}
        for name, value in self.value.items():
            if not isinstance(name, str):
                self.refuse(f"key {shown(name)} is not a string", "quote it")
            step = name if name.isprintable() and len(name) <= _LONGEST_STEP else shown(name)
            reader = Reader(value, f"{self.path}.{step}" if self.path else step)
            if value is None:
                reader.refuse("has no value", "delete the field, or write {} or [] if that is meant")
            found[name] = reader
        return found

    def items(self, at_least: int = 0) -> list[Reader]:
        """The elements of a list.

        Raises:
            Invalid: It is no list, or has fewer elements than ``at_least``.
        """
        if not isinstance(self.value, list):
            self.refuse(f"expected a list, found {shown(self.value)}", "write it as a YAML list")
        if len(self.value) > MAX_ITEMS:
            self.refuse(f"{len(self.value)} elements are more than {MAX_ITEMS}", "split the object")
        if len(self.value) < at_least:
            self.refuse("the list is empty", "delete the field or add an element")
        return [Reader(value, f"{self.path}[{index}]") for index, value in enumerate(self.value)]

    def text(self, choices: Collection[str] = ()) -> str:
        if not isinstance(self.value, str):
            self.refuse(f"expected a string, found {shown(self.value)}", "quote the value")
        if choices and self.value not in choices:
            self.refuse(f"unknown value {shown(self.value)}", f"use one of: {', '.join(choices)}")
        return self.value

    def texts(self, at_least: int = 0) -> tuple[str, ...]:
        return tuple(item.text() for item in self.items(at_least))

    def integer(self, low: int, high: int) -> int:
        if isinstance(self.value, bool) or not isinstance(self.value, int):
            self.refuse(f"expected a number, found {shown(self.value)}", f"use {low}..{high}")
        if not low <= self.value <= high:
            self.refuse(f"{shown(self.value)} is out of range", f"use {low}..{high}")
        return self.value

    def boolean(self) -> bool:
        if not isinstance(self.value, bool):
            self.refuse(f"expected true or false, found {shown(self.value)}", "do not quote it")
        return self.value

    def network(self, *, bare_address: bool) -> IpNetwork:
        """A CIDR; with ``bare_address`` an address alone means itself. Host bits are cut off, as the API servers do."""
        text = self.text()
        if not bare_address and "/" not in text:
            self.refuse(f"{shown(text)} is no CIDR", "write address/prefix, e.g. 10.0.0.0/8")
        try:
            network = ip_network(text, strict=False)
        except ValueError:
            self.refuse(f"{shown(text)} is no CIDR", "write address/prefix, e.g. 10.0.0.0/8")
        if text.rpartition("/")[2].count(".") and "/" in text:
            self.refuse(f"{shown(text)} has a dotted mask", "write the prefix length as a number")
        if network.version == 6 and network.network_address.ipv4_mapped is not None and network.prefixlen >= 96:
            self.refuse(f"{shown(text)} is an IPv4-mapped address", "write the IPv4 form")
        return network
