"""Steady traffic until stdin closes, then every attempt with its time and outcome as one JSON document.

``http`` sends requests (TOKEN in the environment is presented), each on a new connection or all on one; ``connect``
only opens connections, with nothing sent on them. Times are CLOCK_MONOTONIC, the same for all processes of the machine.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import select
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

Attempt = dict[str, Any]


def stopped(wait_s: float) -> bool:
    """Whether stdin was closed; waits ``wait_s`` for that."""
    return bool(select.select([sys.stdin], [], [], max(0.0, wait_s))[0])


def send_requests(args: argparse.Namespace) -> list[Attempt]:
    url = urlsplit(args.target)
    headers = {"x-demo-mark": args.mark, "authorization": f"Bearer {os.environ.get('TOKEN', '')}"}
    attempts: list[Attempt] = []
    connection: http.client.HTTPConnection | None = None
    while not stopped(args.interval):
        started = time.monotonic()
        error, status = "", 0
        try:
            if connection is None:
                connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=args.timeout)
            connection.request("POST", url.path, body='{"amount": 1}', headers=headers)
            response = connection.getresponse()
            response.read()
            status = response.status
        except (OSError, http.client.HTTPException) as caught:
            error = f"{type(caught).__name__}: {caught}"
        if connection is not None and (error or not args.keep_alive):
            connection.close()
            connection = None
        ended = time.monotonic()
        attempts.append(
            {"at": started, "took_s": ended - started, "ok": status == 200, "status": status, "error": error}
        )
    return attempts


def open_connections(args: argparse.Namespace) -> list[Attempt]:
    """One attempt per interval; each has ``timeout`` to be answered, and the next does not wait for it."""
    host, _colon, port = args.target.rpartition(":")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    open_now: list[tuple[socket.socket, Attempt]] = []
    attempts: list[Attempt] = []
    while not stopped(args.interval):
        now = time.monotonic()
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)
        made.connect_ex((host.strip("[]"), int(port)))
        attempt: Attempt = {"at": now, "took_s": 0.0, "ok": False, "status": 0, "error": "no answer"}
        attempts.append(attempt)
        open_now.append((made, attempt))
        _readable, answered, _failed = select.select([], [s for s, _ in open_now], [], 0)
        for connecting, its_attempt in open_now:
            if connecting in answered:
                failure = connecting.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                its_attempt.update(
                    ok=not failure, took_s=now - its_attempt["at"], error=os.strerror(failure) if failure else ""
                )
        still = [(s, a) for s, a in open_now if s not in answered and now - a["at"] < args.timeout]
        for connecting, _attempt in open_now:
            if all(connecting is not s for s, _ in still):
                connecting.close()
        open_now = still
    return attempts


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["http", "connect"])
    parser.add_argument("target", help="a URL, or HOST:PORT")
    parser.add_argument("--interval", type=float, default=0.01)
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--keep-alive", action="store_true")
    parser.add_argument("--mark", default="traffic")
    args = parser.parse_args()
    print("started", flush=True)
    print(json.dumps(send_requests(args) if args.kind == "http" else open_connections(args)), flush=True)


if __name__ == "__main__":
    main()
