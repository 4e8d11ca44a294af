"""Sockets here that lead to a cluster's agents: each connection is a program in an agent's pod that joins it on."""

from __future__ import annotations

import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from meshbridge.errors import MeshBridgeError
from meshbridge.observe.client import RUN_DIRECTORY_VARIABLE, SOCKET_NAME

_BYTES: Final = 65536


class Pipe(Protocol):
    """The other end of a connection."""

    @property
    def said(self) -> str: ...

    def read(self) -> bytes: ...

    def write(self, data: bytes) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Exit:
    """A node, and how to get a connection to its agent."""

    node: str
    open: Callable[[], Pipe]


@contextmanager
def tunnels(exits: Sequence[Exit], tell: Callable[[str], None]) -> Iterator[Path]:
    """A run directory like an agent's machine has it, with one socket for each node; verbs find it while this lasts.

    A node whose agent cannot be reached is told of, and its connections end.
    """
    before = os.environ.get(RUN_DIRECTORY_VARIABLE)
    with tempfile.TemporaryDirectory(prefix="meshbridge-") as name:
        directory = Path(name)
        listeners = [_listen(directory / each.node, each, tell) for each in exits]
        os.environ[RUN_DIRECTORY_VARIABLE] = name
        try:
            yield directory
        finally:
            if before is None:
                os.environ.pop(RUN_DIRECTORY_VARIABLE, None)
            else:
                os.environ[RUN_DIRECTORY_VARIABLE] = before
            for listener in listeners:
                listener.close()


def _listen(directory: Path, to: Exit, tell: Callable[[str], None]) -> socket.socket:
    directory.mkdir(mode=0o700)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(directory / SOCKET_NAME))
    listener.listen()
    threading.Thread(target=_accept, args=(listener, to, tell), name=f"tunnel-{to.node}", daemon=True).start()
    return listener


def _accept(listener: socket.socket, to: Exit, tell: Callable[[str], None]) -> None:
    with suppress(OSError):  # closed: no connections any more
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_serve, args=(connection, to, tell), daemon=True).start()


def _serve(connection: socket.socket, to: Exit, tell: Callable[[str], None]) -> None:
    """Join a connection with the agent. Nothing is opened for one that says nothing: such a one only looks."""
    with connection, suppress(OSError):
        first = connection.recv(_BYTES)
        if not first:
            return
        try:
            pipe = to.open()
        except MeshBridgeError as error:
            tell(f"Warning: node {to.node}: {error}")
            return
        try:
            pipe.write(first)
            threading.Thread(target=_send, args=(connection, pipe), daemon=True).start()
            answered = False
            while data := pipe.read():
                answered = True
                connection.sendall(data)
        except MeshBridgeError as error:
            tell(f"Warning: node {to.node}: {error}")
        else:
            if not answered and (said := pipe.said):
                tell(f"Warning: node {to.node}: {said}")
        finally:
            pipe.close()


def _send(connection: socket.socket, pipe: Pipe) -> None:
    with suppress(Exception):  # whatever the library raises when its connection is gone
        while data := connection.recv(_BYTES):
            pipe.write(data)
    with suppress(Exception):
        pipe.close()
