"""Ask a server without a pause, run in pods: load.py HOST PORT SECONDS [PATH]. Prints as JSON what became of it.

``new`` are requests each on a connection of its own, ``kept`` those on one that stays open as long as it can.
"""

from __future__ import annotations

import collections
import http.client
import json
import sys
import threading
import time

PAUSE_S, ANSWERED_WITHIN_S = 0.02, 3


def outcomes(host: str, port: int, path: str, until: float, *, keep: bool) -> dict[str, object]:
    seen: collections.Counter[str] = collections.Counter()
    opened = 0
    connection: http.client.HTTPConnection | None = None
    first_failure = ""
    while time.monotonic() < until:
        try:
            if connection is None:
                connection = http.client.HTTPConnection(host, port, timeout=ANSWERED_WITHIN_S)
                connection.connect()
                opened += 1
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            seen[str(response.status)] += 1
        except (OSError, http.client.HTTPException) as error:
            seen["failed"] += 1
            first_failure = first_failure or f"{time.time():.3f} {type(error).__name__}: {error}"
            connection = closed(connection)
        if not keep:
            connection = closed(connection)
        time.sleep(PAUSE_S)
    return {**seen, "opened": opened, "first_failure": first_failure}


def closed(connection: http.client.HTTPConnection | None) -> http.client.HTTPConnection | None:
    if connection is not None:
        connection.close()
    return None


def main(host: str, port: int, seconds: float, path: str = "/") -> None:
    until = time.monotonic() + seconds
    found: dict[str, dict[str, object]] = {}

    def work(name: str) -> None:
        found[name] = outcomes(host, port, path, until, keep=name == "kept")

    threads = [threading.Thread(target=work, args=(name,)) for name in ("new", "kept")]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *sys.argv[4:5])
