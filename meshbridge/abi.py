"""What the kernel programs and Python share, read from ``bpf/abi.h``: that header is the only place of any layout.

Every ``struct name`` becomes a ctypes class ``Name``, every ``enum name`` an ``IntEnum`` (``IntFlag`` when it is called
``…_flags``) and every numeric ``#define`` an ``int``. ``abi.pyi`` is generated from the same header for type checkers;
``python -m meshbridge.abi`` rewrites it and a test compares it.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Mapping
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network
from pathlib import Path
from typing import Any

from meshbridge.errors import MeshBridgeError

V4_MAPPED = bytes(10) + b"\xff\xff"
"""The first 12 bytes of every IPv4 address in a map."""


class AbiError(MeshBridgeError):
    """``abi.h`` is missing or says something this parser does not understand."""


class AbiStruct(ctypes.Structure):
    """A kernel structure: fields by keyword (byte arrays take ``bytes``), equal and hashable by their bytes."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._types:
            raise AttributeError(f"{type(self).__name__} has no field {name!r}")
        if isinstance(value, bytes):
            field: Any = self._types[name]
            if len(value) != ctypes.sizeof(field):
                raise ValueError(
                    f"{type(self).__name__}.{name}: {len(value)} bytes given, {ctypes.sizeof(field)} needed"
                )
            value = field.from_buffer_copy(value)
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and bytes(self) == bytes(other)  # type: ignore[call-overload]

    def __hash__(self) -> int:
        return hash(bytes(self))

    def __repr__(self) -> str:
        parts = []
        for name, kind in self._fields_:  # type: ignore[misc]
            if not name.startswith("pad"):
                value = getattr(self, name)
                if issubclass(kind, ctypes.Array):
                    value = bytes(value).hex() if kind._type_ is ctypes.c_uint8 else list(value)
                parts.append(f"{name}={value}")
        return f"{type(self).__name__}({', '.join(parts)})"


def bpf_directory() -> Path:
    """The folder of the kernel sources: ``bpf/`` of the repository, by a link inside the package; a copy in a wheel."""
    directory = Path(__file__).resolve().parent / "_bpf"
    if not (directory / "abi.h").is_file():
        raise AbiError("abi.h not found", where=str(directory), fix="reinstall meshbridge: the package is incomplete")
    return directory


def address_bytes(address: IPv4Address | IPv6Address) -> bytes:
    """The 16 bytes of an address as map keys hold it: IPv4 in its v4-mapped form."""
    return V4_MAPPED + address.packed if isinstance(address, IPv4Address) else address.packed


def parse_address(raw: bytes) -> IPv4Address | IPv6Address:
    """The address that 16 bytes of a map key or event stand for."""
    return IPv4Address(raw[12:]) if raw[:12] == V4_MAPPED else IPv6Address(raw)


def network_bytes(network: IPv4Network | IPv6Network) -> tuple[int, bytes]:
    """``(prefix_bits, address)`` of a CIDR in the v4-mapped form that ``ipcache_cidr_key`` uses."""
    bits = network.prefixlen + 96 if isinstance(network, IPv4Network) else network.prefixlen
    return bits, address_bytes(network.network_address)


_SCALARS: Mapping[str, Any] = {
    "__u8": ctypes.c_uint8,
    "__u16": ctypes.c_uint16,
    "__u32": ctypes.c_uint32,
    "__u64": ctypes.c_uint64,
    "__be16": ctypes.c_uint16.__ctype_be__,
    "__be32": ctypes.c_uint32.__ctype_be__,
}
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_DEFINE = re.compile(r"^#define\s+(\w+)\s+(\d+|0x[0-9a-fA-F]+)\s*$", re.MULTILINE)
_BLOCK = re.compile(r"\b(struct|enum)\s+(\w+)\s*\{([^}]*)\}\s*;")
_MEMBER = re.compile(r"(\w+)\s*=\s*(\d+|0x[0-9a-fA-F]+)")
_FIELD = re.compile(r"(?:struct\s+)?(\w+)\s+(\w+)(?:\[(\d+)\])?")


def class_name(name: str) -> str:
    """``flow_event`` → ``FlowEvent``."""
    return "".join(part.capitalize() for part in name.split("_"))


def parse_header(text: str) -> dict[str, Any]:
    """Everything a header declares, by Python name, in its order.

    Raises:
        AbiError: A declaration that is not one of the forms abi.h allows itself.
    """
    text = _COMMENT.sub("", text)
    found: dict[str, Any] = {name: int(value, 0) for name, value in _DEFINE.findall(text)}
    for keyword, name, body in _BLOCK.findall(text):
        parse = _enum if keyword == "enum" else _struct
        found[class_name(name)] = parse(name, body, found)
    return found


def _enum(name: str, body: str, _found: Mapping[str, Any]) -> type[IntEnum] | type[IntFlag]:
    members = {}
    for item in filter(None, (part.strip() for part in body.split(","))):
        match = _MEMBER.fullmatch(item)
        if match is None:
            raise AbiError(f"cannot read {item!r}", where=f"enum {name}", fix="write every value as NAME = NUMBER")
        members[match[1]] = int(match[2], 0)
    if name.endswith("_flags"):
        return IntFlag(class_name(name), members, module=__name__)
    return IntEnum(class_name(name), members, module=__name__)


def _struct(name: str, body: str, found: Mapping[str, Any]) -> type[AbiStruct]:
    fields: list[tuple[str, Any]] = []
    for item in filter(None, (part.strip() for part in body.split(";"))):
        match = _FIELD.fullmatch(" ".join(item.split()))
        kind = None if match is None else _SCALARS.get(match[1], found.get(class_name(match[1])))
        if match is None or kind is None:
            raise AbiError(f"cannot read {item!r}", where=f"struct {name}", fix="use a fixed-width type of abi.h")
        fields.append((match[2], kind * int(match[3]) if match[3] else kind))
    return type(class_name(name), (AbiStruct,), {"_types": dict(fields), "_fields_": fields, "__module__": __name__})


def render_stub(declared: Mapping[str, Any]) -> str:
    """The text of ``abi.pyi`` for what a header declares."""
    lines = [
        "# Generated from bpf/abi.h by `python -m meshbridge.abi`; not to be edited.",
        "import ctypes",
        "from collections.abc import Mapping",
        "from enum import IntEnum, IntFlag",
        "from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network",
        "from pathlib import Path",
        "from typing import Any",
        "",
        "from meshbridge.errors import MeshBridgeError",
        "",
        "V4_MAPPED: bytes",
        "",
        "class AbiError(MeshBridgeError): ...",
        "class AbiStruct(ctypes.Structure): ...",
        "",
        "def bpf_directory() -> Path: ...",
        "def address_bytes(address: IPv4Address | IPv6Address) -> bytes: ...",
        "def parse_address(raw: bytes) -> IPv4Address | IPv6Address: ...",
        "def network_bytes(network: IPv4Network | IPv6Network) -> tuple[int, bytes]: ...",
        "def class_name(name: str) -> str: ...",
        "def parse_header(text: str) -> dict[str, Any]: ...",
        "def render_stub(declared: Mapping[str, Any]) -> str: ...",
    ]
    for name, value in declared.items():
        if isinstance(value, int):
            lines.append(f"\n{name}: int")
        elif issubclass(value, IntEnum | IntFlag):
            lines += [f"\nclass {name}({'IntFlag' if issubclass(value, IntFlag) else 'IntEnum'}):"]
            lines += [f"    {member.name} = {member.value}" for member in value]
        else:
            hints = [(field, _hint(kind)) for field, kind in value._fields_]
            lines += [f"\nclass {name}(AbiStruct):", *(f"    {field}: {hint}" for field, hint in hints)]
            arguments = ", ".join(f"{field}: {hint} | bytes = ..." if hint == "ctypes.Array[ctypes.c_uint8]"
                                  else f"{field}: {hint} = ..." for field, hint in hints)  # fmt: skip
            lines.append(f"    def __init__(self, *, {arguments}) -> None: ...")
    return "\n".join(lines) + "\n"


def _hint(kind: Any) -> str:
    if not issubclass(kind, ctypes.Array):
        return "int" if kind in _SCALARS.values() else str(kind.__name__)
    item = kind._type_
    return f"ctypes.Array[{item.__name__ if issubclass(item, AbiStruct) else f'ctypes.{item.__name__}'}]"


_DECLARED = parse_header((bpf_directory() / "abi.h").read_text(encoding="utf-8"))
globals().update(_DECLARED)

if __name__ == "__main__":
    Path(__file__).with_suffix(".pyi").write_text(render_stub(_DECLARED), encoding="utf-8")
    sys.stdout.write("abi.pyi rewritten\n")
