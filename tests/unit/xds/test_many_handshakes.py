"""Hundreds of agents may come at once: a server process, and TLS connections from many threads."""

from __future__ import annotations

import socket
import ssl
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from test_controller_over_tls import Authority

CONNECTIONS = 1_500
SERVER = """
import asyncio, sys
from pathlib import Path
from meshbridge.xds.auth import TokenKey
from meshbridge.xds.server import DeltaServer, ServerCertificate, start_server

async def main():
    chain, key = (Path(name).read_bytes() for name in sys.argv[1:3])
    certificate = ServerCertificate(chain, key, "test")
    server = await start_server(DeltaServer(TokenKey(b"k" * 32), None), sys.argv[3], certificate)
    print("ready", flush=True)
    while True:
        await asyncio.sleep(0.2)
        certificate.use(chain, key, "test")

asyncio.run(main())
"""


def test_many_connections_at_once_while_the_certificate_is_read_again(tmp_path: Path) -> None:
    authority = Authority("ours")
    chain, key = authority.pair("127.0.0.1")
    (tmp_path / "chain").write_bytes(chain)
    (tmp_path / "key").write_bytes(key)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    argv = [sys.executable, "-c", SERVER, str(tmp_path / "chain"), str(tmp_path / "key"), f"127.0.0.1:{port}"]
    context = ssl.create_default_context(cadata=authority.certificate.decode())
    context.set_alpn_protocols(["h2"])

    def connect(_: int) -> str | None:
        with (
            socket.create_connection(("127.0.0.1", port), timeout=20) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as connection,
        ):
            return connection.selected_alpn_protocol()

    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            with ThreadPoolExecutor(32) as threads:
                spoken = list(threads.map(connect, range(CONNECTIONS)))
            assert server.poll() is None
            assert spoken == ["h2"] * CONNECTIONS
        finally:
            server.kill()
