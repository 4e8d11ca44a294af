"""Paths as ``policy.paths`` makes them against what a real Envoy makes of them, for every setting of the mesh."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
from meshnet import ENVOY

from meshbridge.policy.mesh import PathNormalization
from meshbridge.policy.paths import normalized

pytestmark = [pytest.mark.root, pytest.mark.xdist_group("envoy")]

PIECES = (
    "/", "//", "a", "B", "..", ".", "%2e", "%2E%2e", "%2f", "%2F", "%5c", "\\", "%41", "%7e", "%7B", "%zz", "%", "%2",
    "!$&'()*+,;:@=-_~", "[", "]", "^", "`", "{", "|", "}", '"', "<", ">", "%20", "%3F", "%3f", "%00", "...", ".a", "a.",
)  # fmt: skip
TYPES = "type.googleapis.com/envoy.extensions.filters"
FIXED = ("/", "//", "///", "/..", "/a/..", "/a/../", "/a//../b", "/a/./b", "/a/b/.", "/.a/..b", "/a%2Fb", "/a%00b")
SETTINGS: dict[PathNormalization, dict[str, Any]] = {
    PathNormalization.NONE: {"normalize_path": False},
    PathNormalization.BASE: {"normalize_path": True},
    PathNormalization.MERGE_SLASHES: {"normalize_path": True, "merge_slashes": True},
    PathNormalization.DECODE_AND_MERGE_SLASHES: {
        "normalize_path": True,
        "merge_slashes": True,
        "path_with_escaped_slashes_action": "UNESCAPE_AND_FORWARD",
    },
}


def listener(name: str, port: int, setting: dict[str, Any]) -> dict[str, Any]:
    route = {
        "match": {"prefix": ""},
        "direct_response": {"status": 200},
        "response_headers_to_add": [{"header": {"key": "x-path", "value": "%REQ(:PATH)%"}}],
    }
    manager = {
        "@type": f"{TYPES}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": name,
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [route]}]},
        "http_filters": [
            {
                "name": "router",
                "typed_config": {"@type": f"{TYPES}.http.router.v3.Router"},
            }
        ],
        **setting,
    }
    return {
        "name": name,
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [held.getsockname()[1] for held in sockets]
    for held in sockets:
        held.close()
    return ports


@contextmanager
def envoy(directory: Path) -> Iterator[dict[PathNormalization, int]]:
    ports = dict(zip(SETTINGS, free_ports(len(SETTINGS)), strict=True))
    listeners = [listener(how.value, ports[how], setting) for how, setting in SETTINGS.items()]
    config = directory / "envoy.json"
    config.write_text(json.dumps({"static_resources": {"listeners": listeners}}))
    command = [str(ENVOY), "-c", str(config), "--disable-hot-restart", "--concurrency", "1", "-l", "error"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 20
            while True:
                try:
                    socket.create_connection(("127.0.0.1", max(ports.values())), 1).close()
                    break
                except OSError:
                    assert process.poll() is None, "Envoy does not start"
                    assert time.monotonic() < deadline
                    time.sleep(0.05)
            yield ports
        finally:
            process.terminate()


def seen(port: int, path: str) -> str | None:
    """The path as Envoy judges it; None: it refuses the request."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=5)) as connection:
        connection.putrequest("GET", path, skip_accept_encoding=True)
        connection.endheaders()
        response = connection.getresponse()
        response.read()
        return response.headers["x-path"] if response.status == 200 else None


def random_paths(rng: random.Random, count: int) -> list[str]:
    made = ("/" + "".join(rng.choice(PIECES) for _ in range(rng.randint(1, 7))) for _ in range(count))
    return [path + rng.choice(("", "", "?q=//%2f..")) for path in made]


def test_paths_are_normalized_as_envoy_does(tmp_path: Path) -> None:
    rng = random.Random(20261124)
    with envoy(tmp_path) as ports:
        for path in (*FIXED, *random_paths(rng, 400)):
            for how, port in ports.items():
                assert normalized(path, how) == seen(port, path), (how, path)
