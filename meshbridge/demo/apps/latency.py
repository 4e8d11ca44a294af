"""How long each of many GETs takes, in seconds, as one JSON list: on one open connection, which a scraper keeps.

Started once per round, so that rounds of two routes can be interleaved.
"""

from __future__ import annotations

import argparse
import http.client
import json
import time
from urllib.parse import urlsplit


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--warm-up", type=int, default=10)
    args = parser.parse_args()
    url = urlsplit(args.url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port or 80, timeout=5)
    took_s = []
    for _ in range(args.warm_up + args.count):
        started = time.perf_counter()
        connection.request("GET", url.path)
        response = connection.getresponse()
        response.read()
        took_s.append(time.perf_counter() - started)
        if response.status != 200:
            raise SystemExit(f"HTTP {response.status}")
    print(json.dumps(took_s[args.warm_up :]))


if __name__ == "__main__":
    main()
