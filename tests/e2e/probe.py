"""Connect to many servers at once, run in pods: probe.py < targets ([[HOST, PORT], …]); prints those that took it."""

from __future__ import annotations

import json
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

WAITED_S, TRIES, AT_ONCE = 1.5, 2, 64


def connects(target: list[object]) -> bool:
    for _ in range(TRIES):
        try:
            with socket.create_connection((str(target[0]), int(str(target[1]))), WAITED_S):
                return True
        except OSError:
            continue
    return False


if __name__ == "__main__":
    targets = json.load(sys.stdin)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        print(
            json.dumps(
                [target for target, reached in zip(targets, pool.map(connects, targets), strict=True) if reached]
            )
        )
