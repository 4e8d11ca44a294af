"""One HTTP request, its outcome as one JSON line: what `demo exec` and the walk use as a client.

Example: python -m meshbridge.demo.apps.request --method POST --token-file T http://transaction-service.finance:8080/
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import ssl
import sys
import time
from typing import Any
from urllib.parse import urlsplit


def tls_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    """Present the given certificate and trust the given root; the names in certificates are SPIFFE's, so unchecked."""
    if not args.cert:
        return None
    context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=args.root)
    context.check_hostname = False
    context.load_cert_chain(args.cert, args.key)
    context.set_alpn_protocols(["istio-http/1.1"])
    return context


def connect(host: str, port: int, args: argparse.Namespace) -> socket.socket:
    """A connected socket, with TLS when asked for."""
    family = {"4": socket.AF_INET, "6": socket.AF_INET6}.get(args.family, socket.AF_UNSPEC)
    error: OSError = OSError("no address")
    for found, kind, proto, _name, address in socket.getaddrinfo(host, port, family, socket.SOCK_STREAM):
        raw = socket.socket(found, kind, proto)
        raw.settimeout(args.timeout)
        try:
            raw.connect(address)
            context = tls_context(args)
            return context.wrap_socket(raw, server_hostname=host) if context else raw
        except OSError as caught:
            raw.close()
            error = caught
    raise error


def exchange(connection: http.client.HTTPConnection, args: argparse.Namespace, path: str, token: str) -> dict[str, Any]:
    """Send the request on the open connection and read the answer."""
    headers = {"x-demo-mark": args.mark}
    if token:
        headers["authorization"] = f"Bearer {token}"
    started = time.monotonic()
    try:
        connection.request(
            args.method, path, body=args.body.encode() if args.method == "POST" else None, headers=headers
        )
        response = connection.getresponse()
        body = response.read().decode("utf-8", "replace")
        answer = {"status": response.status, "headers": dict(response.getheaders()), "body": body, "error": ""}
    except (OSError, http.client.HTTPException) as error:
        answer = {"status": 0, "headers": {}, "body": "", "error": f"{type(error).__name__}: {error}"}
    return {**answer, "elapsed_s": round(time.monotonic() - started, 4)}


def main() -> None:
    """Print the outcome as JSON; with --keep-open, one request for every line read, all on one connection."""
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("--method", default="POST")
    parser.add_argument("--body", default='{"amount": 1}')
    parser.add_argument("--mark", default="unmarked", help="counted by the server")
    parser.add_argument("--timeout", type=float, default=3.0)
    parser.add_argument("--family", choices=["4", "6", "any"], default="any")
    parser.add_argument("--cert")
    parser.add_argument("--key")
    parser.add_argument("--root")
    parser.add_argument("--keep-open", action="store_true")
    args = parser.parse_args()
    token = os.environ.get("TOKEN", "")  # not an argument: those are visible to every user of the machine
    url = urlsplit(args.url)
    host, port, path = url.hostname or "", url.port or 80, url.path or "/"
    connection = http.client.HTTPConnection(host, port, timeout=args.timeout)
    connection.auto_open = False  # a closed connection must be told, not replaced
    try:
        connection.sock = connect(host, port, args)
    except OSError as error:
        print(
            json.dumps({"status": 0, "headers": {}, "body": "", "error": f"connect: {error}", "elapsed_s": 0}),
            flush=True,
        )
        return
    if not args.keep_open:
        print(json.dumps(exchange(connection, args, path, token)), flush=True)
        return
    for _line in sys.stdin:
        print(json.dumps(exchange(connection, args, path, token)), flush=True)


if __name__ == "__main__":
    main()
