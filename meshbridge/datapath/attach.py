"""Hook the two programs onto the host side of pod interfaces, so that they stay when this process dies.

*from-pod* runs at tc ingress of the host side, *to-pod* at its tc egress. With TCX both are links pinned under
``PIN_DIR/links/``; before kernel 6.6 they are filters of a clsact qdisc. A program in force is only ever swapped for
another, never taken off and put on again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

from meshbridge.datapath import clsact, syscall
from meshbridge.datapath.syscall import AttachType, BpfError, BpfNotFoundError

_PROBE_IFINDEX: Final = 0x7FFFFFFF


class AttachMode(StrEnum):
    """How programs are attached."""

    TCX = "tcx"
    CLSACT = "clsact"


class Hook(StrEnum):
    """Which way packets go, seen from the host's side of the interface."""

    FROM_POD = "from_pod"
    TO_POD = "to_pod"


_ATTACH_TYPES: Final = {Hook.FROM_POD: AttachType.TCX_INGRESS, Hook.TO_POD: AttachType.TCX_EGRESS}
_PARENTS: Final = {Hook.FROM_POD: clsact.Parent.INGRESS, Hook.TO_POD: clsact.Parent.EGRESS}


class Attacher:
    """Keeps one pair of programs on interfaces of the calling thread's network namespace.

    Every call blocks (a new TCX hook takes some 8 ms): call it from a worker thread.
    """

    def __init__(self, pin_dir: Path, *, from_pod: int, to_pod: int, mode: AttachMode | None = None) -> None:
        self._links = pin_dir / "links"
        self._programs = {Hook.TO_POD: to_pod, Hook.FROM_POD: from_pod}
        self.mode = mode or detect_mode(from_pod)

    def attach(self, ifindex: int) -> None:
        """Both programs are in force on the interface from now on, whatever was there before; twice is as once.

        Raises:
            BpfNotFoundError: There is no such interface.
        """
        for hook in self._programs:
            self._attach_hook(ifindex, hook)

    def detach(self, ifindex: int) -> None:
        """Neither program is in force on the interface any more: its packets are no longer judged."""
        for hook in self._programs:
            if self.mode is AttachMode.CLSACT:
                clsact.remove(ifindex, _PARENTS[hook])
            else:
                self._drop_link(self._pin(ifindex, hook))

    def attached(self) -> set[int]:
        """Interfaces on which both programs (of this or an earlier process) are in force."""
        if self.mode is AttachMode.CLSACT:
            return {
                ifindex
                for ifindex, _ in socket.if_nameindex()
                if all(clsact.attached_program(ifindex, parent) is not None for parent in _PARENTS.values())
            }
        hooks: dict[int, set[Hook]] = {}
        for pin in self._pins():
            ifindex, hook = _parse_pin(pin)
            if self._link_ifindex(pin) == ifindex:
                hooks.setdefault(ifindex, set()).add(hook)
        return {ifindex for ifindex, found in hooks.items() if len(found) == len(Hook)}

    def update_all(self) -> set[int]:
        """Swap every attached hook to this process's programs; returns the interfaces. For start-up and upgrades."""
        if self.mode is AttachMode.CLSACT:
            found = self.attached()
            for ifindex in found:
                self.attach(ifindex)
            return found
        updated = set()
        for pin in self._pins():
            ifindex, hook = _parse_pin(pin)
            if self._link_ifindex(pin) == ifindex:
                self._attach_hook(ifindex, hook)
                updated.add(ifindex)
        return updated

    def sweep(self) -> set[int]:
        """Unpin the links whose interface is gone; returns the numbers those interfaces had."""
        if self.mode is AttachMode.CLSACT:
            return set()  # a filter goes with its interface
        swept = set()
        for pin in self._pins():
            ifindex, _ = _parse_pin(pin)
            if self._link_ifindex(pin) != ifindex:
                pin.unlink(missing_ok=True)
                swept.add(ifindex)
        return swept

    def _attach_hook(self, ifindex: int, hook: Hook) -> None:
        program = self._programs[hook]
        if self.mode is AttachMode.CLSACT:
            clsact.replace(ifindex, _PARENTS[hook], program, f"meshbridge_{hook}")
            return
        pin = self._pin(ifindex, hook)
        if self._with_link(pin, lambda fd: _swap(fd, ifindex, program)):
            return
        pin.unlink(missing_ok=True)  # a link whose interface is gone, its number now another's
        self._links.mkdir(mode=0o700, parents=True, exist_ok=True)
        link = syscall.link_create(program, ifindex, _ATTACH_TYPES[hook])
        try:
            syscall.pin(link, str(pin))
        finally:
            os.close(link)

    def _pin(self, ifindex: int, hook: Hook) -> Path:
        return self._links / f"{ifindex}-{hook}"

    def _pins(self) -> list[Path]:
        return sorted(self._links.iterdir()) if self._links.is_dir() else []

    def _link_ifindex(self, pin: Path) -> int:
        """The interface a pinned link is on, 0 when that is gone."""
        found = 0

        def look(fd: int) -> bool:
            nonlocal found
            found = syscall.link_info(fd).ifindex
            return True

        self._with_link(pin, look)
        return found

    def _drop_link(self, pin: Path) -> None:
        def act(fd: int) -> bool:
            syscall.link_detach(fd)
            return True

        with contextlib.suppress(BpfError):  # the interface may be gone already
            self._with_link(pin, act)
        pin.unlink(missing_ok=True)

    def _with_link(self, pin: Path, act: Callable[[int], bool]) -> bool:
        """What ``act`` says about the pinned link; False when nothing is pinned."""
        try:
            fd = syscall.get_pinned(str(pin))
        except BpfNotFoundError:
            return False
        try:
            return act(fd)
        finally:
            os.close(fd)


def detect_mode(program_fd: int) -> AttachMode:
    """TCX where this kernel has it: asked by attaching to an interface that cannot exist."""
    try:
        os.close(syscall.link_create(program_fd, _PROBE_IFINDEX, AttachType.TCX_INGRESS))
    except BpfNotFoundError:
        return AttachMode.TCX
    except BpfError as refusal:
        if refusal.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return AttachMode.CLSACT
        raise
    return AttachMode.TCX


def _parse_pin(pin: Path) -> tuple[int, Hook]:
    number, _, hook = pin.name.partition("-")
    return int(number), Hook(hook)


def _swap(link_fd: int, ifindex: int, program_fd: int) -> bool:
    """Make a living link run the program; False when the link's interface is gone."""
    info = syscall.link_info(link_fd)
    if info.ifindex != ifindex:
        return False
    if info.program_id != syscall.program_id(program_fd):
        syscall.link_update(link_fd, program_fd)
    return True
