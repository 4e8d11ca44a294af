"""Bring the kernel programs up: compiled (or from the cache), maps opened, programs loaded and verified."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from meshbridge.datapath import syscall
from meshbridge.datapath.compiler import DEFAULT_CACHE, PROGRAMS, Bytecode, CompiledObject, compile_programs
from meshbridge.datapath.maps import Maps, MapSizes, create_map, open_maps

PRIVATE_MAPS: Final = frozenset({"scratches"})
"""Working memory of a program: made with it, gone with it."""


@dataclass(frozen=True, slots=True)
class Datapath:
    """The maps of a node and the two loaded programs; what is pinned outlives it."""

    maps: Maps
    from_pod: int
    to_pod: int

    def close(self) -> None:
        """Give all descriptors back."""
        self.maps.close()
        os.close(self.from_pod)
        os.close(self.to_pod)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_datapath(pin_dir: Path, *, sizes: MapSizes = MapSizes(), cache: Path = DEFAULT_CACHE) -> Datapath:  # noqa: B008
    """The datapath of a node: its pinned maps (made where missing) and freshly loaded programs that use them.

    Nothing is attached by this; see attach.py. Blocking: up to a few seconds when the programs have to be compiled,
    some 30 ms when the cache has them.

    Args:
        pin_dir: ``/sys/fs/bpf/meshbridge/NODE``.
    """
    compiled = compile_programs(cache)
    maps = open_maps(pin_dir, compiled.maps, sizes)
    loaded: list[int] = []
    try:
        for name in PROGRAMS:
            loaded.append(load_program(compiled, name, maps.descriptors))
    except BaseException:
        for fd in loaded:
            os.close(fd)
        maps.close()
        raise
    return Datapath(maps, *loaded)


def load_program(compiled: CompiledObject, name: str, descriptors: Mapping[str, int]) -> int:
    """Load one program with its map references resolved, and return its descriptor.

    Raises:
        VerifierError: The kernel refuses it.
    """
    program = compiled.programs[name]
    private = {spec.name: create_map(spec) for spec in compiled.maps.values() if spec.name in PRIVATE_MAPS}
    try:
        return syscall.program_load(name, resolve(program, {**descriptors, **private}))
    finally:
        for fd in private.values():
            os.close(fd)  # the program holds them from now on


def resolve(program: Bytecode, descriptors: Mapping[str, int]) -> bytes:
    """The program's code with the descriptor of each map where the code names it."""
    code = bytearray(program.code)
    for index, map_name in program.maps:
        struct.pack_into("<i", code, index * 8 + 4, descriptors[map_name])
    return bytes(code)
