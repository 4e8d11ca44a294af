"""The agent's socket for the CNI plugin: one call a connection, for root only."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from pathlib import Path
from typing import Any, Final, Protocol

import structlog

from meshbridge.agent.cnicall import (
    LENGTH,
    MAGIC,
    MAX_PART_BYTES,
    Call,
    CallError,
    Code,
    Verb,
    answer,
    read_call,
    refusal,
)
from meshbridge.agent.observer import claim_socket
from meshbridge.errors import MeshBridgeError

log = structlog.get_logger()

DEFAULT_SOCKET: Final = Path("/run/meshbridge/cni.sock")
READ_S: Final = 10.0
CALL_S: Final = 55.0
"""The plugin gives up after 60."""
MAX_CALLS: Final = 64
_PEER: Final = struct.Struct("=iII")


class CniApi(Protocol):
    """What the plugin's calls come to."""

    async def cni(self, call: Call) -> dict[str, Any] | None:
        """The result to print, None for none.

        Raises:
            CallError, MeshBridgeError: the call cannot be met.
        """


async def start_cni(node: CniApi, path: Path) -> asyncio.Server:
    """Answer the plugin on a Unix socket that only this user may open; the socket of an agent that died is replaced.

    Raises:
        SocketError: another agent answers there, or the path cannot be used.
    """
    claim_socket(path)
    server = _Server(node)
    mask = os.umask(0o177)  # so that it is never open to others, not even between bind and chmod
    try:
        return await asyncio.start_unix_server(server.serve, path, backlog=256)
    finally:
        os.umask(mask)


class _Server:
    def __init__(self, node: CniApi) -> None:
        self._node = node
        self._room = asyncio.Semaphore(MAX_CALLS)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if _peer_uid(writer) not in (0, os.geteuid()):
                return
            async with self._room:
                async with asyncio.timeout(READ_S):
                    parts = await _read_parts(reader)
                writer.write(await self._answered(parts))
                async with asyncio.timeout(READ_S):
                    await writer.drain()
        except (OSError, EOFError, TimeoutError, ValueError) as error:  # gone, too slow, or none of ours
            log.warning("cni.hung_up", reason=str(error) or type(error).__name__)
        finally:
            writer.close()

    async def _answered(self, parts: list[bytes]) -> bytes:
        call: Call | None = None
        try:
            call = read_call(parts)
            async with asyncio.timeout(CALL_S):
                result = await self._node.cni(call)
        except TimeoutError:
            error: CallError | MeshBridgeError = CallError(Code.TRY_LATER, "the agent is busy; see its log")
        except (CallError, MeshBridgeError) as refused:
            error = refused
        except Exception:
            log.exception("cni.failed")
            error = CallError(Code.TRY_LATER, "the agent failed; its log says why")
        else:
            return answer(result)
        version = call.version if call is not None else "1.0.0"
        verb = call.verb if call is not None else ""
        log.warning("cni.refused", verb=verb, pod=call.pod if call is not None else "", reason=str(error))
        return answer(None) if verb is Verb.DEL else refusal(error, version)


async def _read_parts(reader: asyncio.StreamReader) -> list[bytes]:
    if await reader.readexactly(len(MAGIC)) != MAGIC:
        raise ValueError("another protocol is spoken; the plugin and the agent are not of one version")
    parts = []
    for most in MAX_PART_BYTES:
        (size,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        if size > most:
            raise ValueError(f"a part of {size} bytes")
        parts.append(await reader.readexactly(size))
    return parts


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    raw = writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
    return int(_PEER.unpack(raw)[1])
