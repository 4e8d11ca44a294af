"""Acting inside another network namespace than this process's: how the harness sets up and measures a pod."""

from __future__ import annotations

import ctypes
import http.client
import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from meshbridge.demo.layout import NETNS

T = TypeVar("T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer; ``status`` 0 means that none came, ``error`` why."""

    status: int
    body: bytes = b""
    error: str = ""


def inside(netns: str, act: Callable[[], T]) -> T:
    """What ``act`` returns when called inside ``netns``; a socket stays in the namespace it was made in.

    A thread of its own enters the namespace, so this process never leaves its own.
    """

    def enter_and_act() -> T:
        handle = os.open(NETNS / netns, os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.setns(handle, _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns {netns}")
        finally:
            os.close(handle)
        return act()

    with ThreadPoolExecutor(1, thread_name_prefix=f"netns-{netns}") as thread:
        return thread.submit(enter_and_act).result()


def http_get(netns: str, host: str, port: int, path: str, timeout_s: float = 3.0, method: str = "GET") -> Answer:
    """One HTTP request from inside ``netns``."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.sock = inside(netns, lambda: socket.socket(family, socket.SOCK_STREAM))
        connection.sock.settimeout(timeout_s)
        connection.sock.connect((host, port))
        connection.request(method, path)
        response = connection.getresponse()
        return Answer(response.status, response.read())
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()
