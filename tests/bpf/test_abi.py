"""The layouts Python computes from abi.h are those that clang compiles and BCC sees."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

from meshbridge import abi
from meshbridge.datapath import compiler
from meshbridge.datapath.maps import _LAYOUTS

HEADER = abi.bpf_directory() / "abi.h"
TYPES = "#include <linux/types.h>\n"


def structures() -> dict[str, type[ctypes.Structure]]:
    declared = abi.parse_header(HEADER.read_text())
    return {name: kind for name, kind in declared.items() if isinstance(kind, type) and issubclass(kind, abi.AbiStruct)}


def c_name(name: str) -> str:
    return "".join(f"_{letter.lower()}" if letter.isupper() else letter for letter in name).lstrip("_")


def assertions() -> list[str]:
    lines = []
    for name, kind in structures().items():
        struct = f"struct {c_name(name)}"
        lines.append(f'_Static_assert(sizeof({struct}) == {ctypes.sizeof(kind)}, "size of {struct}");')
        for field, _ in kind._fields_:  # type: ignore[misc]
            offset, size = getattr(kind, field).offset, getattr(kind, field).size
            lines.append(f'_Static_assert(__builtin_offsetof({struct}, {field}) == {offset}, "{struct}.{field}");')
            lines.append(f'_Static_assert(sizeof((({struct} *)0)->{field}) == {size}, "size of {struct}.{field}");')
    for name, kind in abi.parse_header(HEADER.read_text()).items():
        if isinstance(kind, int):
            lines.append(f'_Static_assert({name} == {kind}, "{name}");')
        elif not issubclass(kind, ctypes.Structure):
            lines += [f'_Static_assert({member.name} == {member.value}, "{member.name}");' for member in kind]
    return lines


def compile_with_clang(lines: list[str], directory: Path) -> subprocess.CompletedProcess[str]:
    source = directory / "abi_check.c"
    source.write_text("\n".join([TYPES, f'#include "{HEADER}"', *lines]) + "\n")
    command = ["clang", "-target", "bpf", "-I/usr/include/x86_64-linux-gnu", "-I/usr/include/aarch64-linux-gnu",
               "-Wall", "-Werror", "-fsyntax-only", str(source)]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_clang_agrees_with_every_size_offset_and_number(tmp_path: Path) -> None:
    lines = assertions()
    assert len(lines) > 200
    compiled = compile_with_clang(lines, tmp_path)
    assert compiled.returncode == 0, compiled.stderr


def test_the_check_can_fail(tmp_path: Path) -> None:
    assert compile_with_clang(['_Static_assert(sizeof(struct flow_event) == 1, "x");'], tmp_path).returncode != 0


def test_bcc_sees_keys_and_values_of_the_same_size() -> None:
    compiled = compiler.compile_programs()
    for name, (key, value) in _LAYOUTS.items():
        if value is not None:
            spec = compiled.maps[name]
            assert (spec.key_size, spec.value_size) == (ctypes.sizeof(key), ctypes.sizeof(value)), name


def test_bccs_own_table_classes_have_the_same_fields(tmp_path: Path) -> None:
    """In a process of its own: BCC's table.Key and table.Leaf, field by field."""
    script = f"""
import sys; sys.path.append({compiler.bcc_child.DIST_PACKAGES!r})
from bcc import BPF
b = BPF(src_file={str(HEADER.parent / compiler.SOURCE)!r}, cflags=["-I{HEADER.parent}", "-w"])
for name in {[name for name in _LAYOUTS if name not in ("events", "conntrack")]!r}:
    for kind in (b[name].Key, b[name].Leaf):
        fields = [(f[0], getattr(kind, f[0]).offset) for f in kind._fields_] if hasattr(kind, "_fields_") else []
        print(name, kind.__name__, fields)
"""
    import os
    import sys

    tree = compiler.header_tree(compiler.DEFAULT_CACHE)
    environment = {**os.environ, **({"BCC_KERNEL_SOURCE": str(tree)} if tree else {})}
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True,
                            env=environment).stdout  # fmt: skip
    seen = {}
    for line in output.splitlines():
        name, _, fields = line.split(" ", 2)
        seen.setdefault(name, []).append(eval(fields))
    for name, kinds in _LAYOUTS.items():
        for ours, theirs in zip(kinds, seen.get(name, []), strict=False):
            if theirs:
                assert [(field[0], getattr(ours, field[0]).offset) for field in ours._fields_] == theirs, name
    assert sum(bool(fields) for both in seen.values() for fields in both) > 10
