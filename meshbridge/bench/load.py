"""The load: a server that echoes bytes or answers HTTP, and clients that time what they do. Standard library only.

Run as ``python -m meshbridge.bench.load serve|pingpong|… HOST PORT`` inside a namespace, pinned by the caller. A client
prints one JSON object. One connection at a time: what is measured is latency, not how deep queues become.
"""

from __future__ import annotations

import argparse
import errno
import json
import resource
import select
import socket
import struct
import sys
import time
from array import array
from collections.abc import Callable

HTTP_REQUEST = b"GET /pay HTTP/1.1\r\nhost: server.bench\r\n\r\n"
HTTP_BODY = b"served!"
HTTP_ANSWER = b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\ncontent-type: text/plain\r\n\r\n" + HTTP_BODY
# A reset instead of FIN: no TIME_WAIT, so that ports do not run out.
RESET_ON_CLOSE = struct.pack("ii", 1, 0)
WARM_UP_SHARE = 0.2


def serve(host: str, port: int) -> None:
    """Echo whatever comes; what looks like HTTP (GET, POST) gets a 200 for every request head that is complete."""
    listener = socket.create_server((host, port), family=_family(host), backlog=512)
    epoll = select.epoll()
    epoll.register(listener.fileno(), select.EPOLLIN)
    connections: dict[int, socket.socket] = {}
    while True:
        for descriptor, _events in epoll.poll():
            connection = connections.get(descriptor)
            if connection is None:
                accepted, _peer = listener.accept()
                accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connections[accepted.fileno()] = accepted
                epoll.register(accepted.fileno(), select.EPOLLIN)
                continue
            try:
                data = connection.recv(65536)
                if data[:4] in (b"GET ", b"POST"):
                    data = HTTP_ANSWER * data.count(b"\r\n\r\n")
                if data:
                    connection.send(data)
                    continue
            except OSError:
                pass  # the client's reset: the connection is gone, like an empty read
            epoll.unregister(descriptor)
            connections.pop(descriptor).close()


def pingpong(host: str, port: int, seconds: float) -> dict[str, float]:
    """Round trips of one byte over one open connection."""
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)  # a timeout would add a poll(2) to every call
        send, receive = connection.send, connection.recv

        def once() -> None:
            send(b"x")
            receive(1)

        return timed(once, seconds)


def connect(host: str, port: int, seconds: float) -> dict[str, float]:
    """Connect, exchange one byte, close: what a new flow costs."""
    family = _family(host)

    def once() -> None:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            connection.connect((host, port))
            connection.send(b"x")
            connection.recv(1)

    return timed(once, seconds)


def http(host: str, port: int, seconds: float) -> dict[str, float]:
    """GET requests over one kept connection; an answer that is not 200 ends the run."""
    with socket.create_connection((host, port), timeout=5) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(None)
        return timed(lambda: _get(connection, HTTP_REQUEST), seconds)


def syn(host: str, port: int, seconds: float) -> dict[str, float]:
    """Attempts to connect that nobody answers, each given up at once; one that is answered at once ends the run."""
    family = _family(host)

    def once() -> None:
        with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as connection:
            code = connection.connect_ex((host, port))
            if code != errno.EINPROGRESS or select.select([], [connection], [], 0)[1]:
                raise SystemExit(f"answered, with {code}: {errno.errorcode.get(code, '')}")

    return timed(once, seconds)


def refused(host: str, port: int, seconds: float) -> dict[str, float]:
    """One GET request per connection, each answered with 403."""
    family = _family(host)

    def once() -> None:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            connection.connect((host, port))
            connection.send(HTTP_REQUEST)
            answer = connection.recv(4096)
            if not answer.startswith(b"HTTP/1.1 403 "):
                raise SystemExit(f"not refused: {answer[:300]!r}")

    return timed(once, seconds)


def http_connect(host: str, port: int, seconds: float) -> dict[str, float]:
    """One GET request per connection; Envoys keep those between them."""
    family = _family(host)

    def once() -> None:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            connection.connect((host, port))
            _get(connection, HTTP_REQUEST)

    return timed(once, seconds)


def _get(connection: socket.socket, request: bytes) -> None:
    connection.send(request)
    answer = connection.recv(4096)
    while not answer.endswith(HTTP_BODY):
        more = connection.recv(4096)
        if not more:
            break
        answer += more
    if not answer.startswith(b"HTTP/1.1 200 "):
        raise SystemExit(f"not answered with 200: {answer[:300]!r}")


def timed(once: Callable[[], None], seconds: float) -> dict[str, float]:
    """Call ``once`` for the time given, after a warm-up; CPU times and ``operations_total`` include the warm-up."""
    clock = time.perf_counter_ns
    cpu_before, user_before = time.process_time_ns(), _user_ns()
    warm_up_until = clock() + int(seconds * WARM_UP_SHARE * 1e9)
    warm_up = 0
    while clock() < warm_up_until:
        once()
        warm_up += 1
    latencies = array("Q")
    record = latencies.append
    started = before = clock()
    until = started + int(seconds * 1e9)
    while before < until:
        once()
        after = clock()
        record(after - before)
        before = after
    elapsed = before - started
    cpu, user = time.process_time_ns() - cpu_before, _user_ns() - user_before
    ordered = sorted(latencies)
    return {
        "operations": len(ordered),
        "operations_total": len(ordered) + warm_up,
        "elapsed_ns": elapsed,
        "p50_ns": ordered[len(ordered) // 2],
        "p99_ns": ordered[len(ordered) * 99 // 100],
        "cpu_ns": cpu,
        "user_ns": user,
    }


def _user_ns() -> int:
    return int(resource.getrusage(resource.RUSAGE_SELF).ru_utime * 1e9)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET


CLIENTS = {
    "pingpong": pingpong,
    "connect": connect,
    "syn": syn,
    "http": http,
    "http-connect": http_connect,
    "refused": refused,
}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="meshbridge.bench.load")
    parser.add_argument("what", choices=["serve", *CLIENTS])
    parser.add_argument("host")
    parser.add_argument("port", type=int)
    parser.add_argument("--seconds", type=float, default=1.0)
    options = parser.parse_args(arguments)
    if options.what == "serve":
        serve(options.host, options.port)
        return
    print(json.dumps(CLIENTS[options.what](options.host, options.port, options.seconds)))


if __name__ == "__main__":
    main(sys.argv[1:])
