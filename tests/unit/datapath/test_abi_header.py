"""abi.h is read the same way everywhere: enums, structures, and the stub type checkers see."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from pathlib import Path

import pytest

from meshbridge import abi


def test_structures_take_bytes_for_byte_arrays_and_compare_by_content() -> None:
    one = abi.IpcacheKey(address=abi.address_bytes(IPv4Address("10.0.0.1")))
    two = abi.IpcacheKey(address=bytes(10) + b"\xff\xff\x0a\x00\x00\x01")
    assert one == two
    assert len({one, two}) == 1


def test_a_field_that_the_header_does_not_have_is_an_error() -> None:
    with pytest.raises(AttributeError, match="no field 'addres'"):
        abi.IpcacheKey(addres=bytes(16))  # type: ignore[call-arg]


def test_big_endian_fields_read_as_numbers_and_lie_in_network_order() -> None:
    key = abi.ConntrackKey(source_port=0x1234)
    offset = abi.ConntrackKey.source_port.offset  # type: ignore[attr-defined]
    assert key.source_port == 0x1234
    assert bytes(key)[offset : offset + 2] == b"\x12\x34"


def test_the_header_leaves_no_hole_that_a_compiler_could_fill() -> None:
    declared = abi.parse_header((abi.bpf_directory() / "abi.h").read_text())
    for name, kind in declared.items():
        if isinstance(kind, type) and issubclass(kind, ctypes.Structure):
            fields = sum(ctypes.sizeof(field[1]) for field in kind._fields_)
            assert fields == ctypes.sizeof(kind), f"{name} has padding that is not written out"


def test_the_stub_is_what_the_header_says() -> None:
    rendered = abi.render_stub(abi.parse_header((abi.bpf_directory() / "abi.h").read_text()))
    ruff = [sys.executable, "-m", "ruff", "format", "--stdin-filename", "abi.pyi", "-"]
    formatted = subprocess.run(ruff, input=rendered, capture_output=True, text=True, check=True).stdout
    assert Path(abi.__file__).with_suffix(".pyi").read_text() == formatted, "run: python -m meshbridge.abi"


@pytest.mark.parametrize("address", [IPv4Address("10.1.2.3"), IPv6Address("fd00::1")])
def test_addresses_survive_the_trip_through_a_key(address: IPv4Address | IPv6Address) -> None:
    assert abi.parse_address(abi.address_bytes(address)) == address


def test_an_ipv4_cidr_is_counted_over_the_mapped_form() -> None:
    assert abi.network_bytes(IPv4Network("10.0.0.0/24"))[0] == 120


BROKEN = {
    "enum without a number": ("enum a { X };", "NAME = NUMBER"),
    "field of an unknown type": ("struct a { int x; };", "fixed-width"),
    "bit field": ("struct a { __u8 x : 3; };", "fixed-width"),
}


@pytest.mark.parametrize(("text", "fix"), BROKEN.values(), ids=BROKEN.keys())
def test_a_header_outside_the_rules_is_refused(text: str, fix: str) -> None:
    with pytest.raises(abi.AbiError, match=fix):
        abi.parse_header(text)
