"""Compile one BPF source with BCC and print what came out; run as a process of its own, since LLVM may abort it.

Usage: ``python -m meshbridge.datapath.bcc_child SOURCE PROGRAM… -- FLAG…``; JSON on standard output (see compiler.py).
"""

from __future__ import annotations

import base64
import ctypes
import json
import os
import struct
import sys
from typing import Any

DIST_PACKAGES = "/usr/lib/python3/dist-packages"  # where Debian puts bcc; not on the path of a virtual environment
LD_IMM64 = 0x18
PSEUDO_MAP_FD = 1


def relocations(code: bytes, names: dict[int, str]) -> list[tuple[int, str]]:
    """Which instructions load which map: ``(index, map name)``."""
    found = []
    for index in range(len(code) // 8):
        opcode, registers, _offset, immediate = struct.unpack_from("<BBhi", code, index * 8)
        if opcode == LD_IMM64 and registers >> 4 == PSEUDO_MAP_FD:
            found.append((index, names[immediate]))
    return found


def describe(lib: Any, module: Any) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """The maps a module declares, and their names by descriptor."""
    lib.bpf_num_tables.argtypes = [ctypes.c_void_p]
    lib.bpf_table_name.restype = ctypes.c_char_p
    for function in (lib.bpf_table_name, lib.bpf_table_fd_id, lib.bpf_table_key_size_id, lib.bpf_table_leaf_size_id):
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    maps, names = [], {}
    for number in range(lib.bpf_num_tables(module)):
        name = lib.bpf_table_name(module, number).decode()
        names[lib.bpf_table_fd_id(module, number)] = name
        maps.append(
            {
                "name": name,
                "type": lib.bpf_table_type_id(module, number),
                "key_size": lib.bpf_table_key_size_id(module, number),
                "value_size": lib.bpf_table_leaf_size_id(module, number),
                "max_entries": lib.bpf_table_max_entries_id(module, number),
                "flags": lib.bpf_table_flags_id(module, number),
            }
        )
    return maps, names


def main(arguments: list[str]) -> None:
    split = arguments.index("--")
    source, programs, flags = arguments[0], arguments[1:split], arguments[split + 1 :]
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever LLVM prints is not our answer
    sys.path.append(DIST_PACKAGES)
    from bcc import BPF
    from bcc.libbcc import lib

    module = BPF(src_file=source, cflags=flags)
    maps, names = describe(lib, module.module)
    compiled = {}
    for program in programs:
        code = module.dump_func(program)
        compiled[program] = {"code": base64.b64encode(code).decode(), "maps": relocations(code, names)}
    json.dump({"maps": maps, "programs": compiled}, output)
    output.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
