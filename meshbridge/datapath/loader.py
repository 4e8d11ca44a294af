"""Bring the kernel programs up: compiled (or from the cache), maps opened, programs loaded and verified."""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from meshbridge.datapath import syscall
from meshbridge.datapath.compiler import DEFAULT_CACHE, PROGRAMS, Bytecode, CompiledObject, compile_programs
from meshbridge.datapath.maps import Maps, MapSizes, create_map, open_maps
from meshbridge.datapath.syscall import BpfExistsError, BpfNotFoundError

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
    """The datapath of a node: its pinned maps (made where missing) and the programs that use them.

    Nothing is attached by this; see attach.py. Programs are pinned as well: a later caller with the same code gets them
    in milliseconds. Blocking: else some 0.3 s for the verifier, and a second or two where they have to be compiled.

    Args:
        pin_dir: ``/sys/fs/bpf/meshbridge/NODE``.
    """
    compiled = compile_programs(cache)
    maps = open_maps(pin_dir, compiled.maps, sizes)
    try:
        return Datapath(maps, **_open_programs(compiled, maps, pin_dir / "programs"))
    except BaseException:
        maps.close()
        raise


def _open_programs(compiled: CompiledObject, maps: Maps, directory: Path) -> dict[str, int]:
    """Every program, pinned or newly loaded (side by side, the verifier is slow); pins of other code are removed."""
    directory.mkdir(mode=0o700, exist_ok=True)
    pins = {name: directory / f"{name}-{_identity(compiled.programs[name], maps)}" for name in PROGRAMS}
    with ThreadPoolExecutor(len(PROGRAMS)) as pool:
        opened = {name: pool.submit(_open_program, compiled, name, maps, pin) for name, pin in pins.items()}
    try:
        programs = {name: future.result() for name, future in opened.items()}
    except BaseException:
        for future in opened.values():
            if future.exception() is None:
                os.close(future.result())
        raise
    for stale in set(directory.iterdir()) - set(pins.values()):
        stale.unlink(missing_ok=True)
    return programs


def _open_program(compiled: CompiledObject, name: str, maps: Maps, pin: Path) -> int:
    with contextlib.suppress(BpfNotFoundError):
        return syscall.get_pinned(str(pin))
    fd = load_program(compiled, name, maps.descriptors)
    try:
        with contextlib.suppress(BpfExistsError):  # another process loaded the same meanwhile
            syscall.pin(fd, str(pin))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _identity(program: Bytecode, maps: Maps) -> str:
    """What makes a loaded program the one wanted: its code, and which very maps it uses."""
    digest = hashlib.sha256(program.code)
    for index, name in program.maps:
        number = 0 if name in PRIVATE_MAPS else syscall.map_info(maps.descriptors[name]).id
        digest.update(f"{index}:{name}:{number};".encode())
    return digest.hexdigest()[:16]


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
