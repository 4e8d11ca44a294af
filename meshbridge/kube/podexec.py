"""A program in a pod with its standard input and output here, as ``kubectl exec`` has it."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from meshbridge.kube.api import ClusterError

if TYPE_CHECKING:
    from kubernetes.client import ApiClient

_POLL_S: Final = 1
_SAID_BYTES: Final = 4096


@dataclass(slots=True)
class PodProcess:
    """The running program. One thread may read while another writes."""

    where: str
    _channels: Any
    _said: bytearray = field(default_factory=bytearray)
    _closed: threading.Event = field(default_factory=threading.Event)

    def read(self) -> bytes:
        """What it writes next; empty when it has ended, or was closed by another thread.

        Raises:
            ClusterError: the connection broke.
        """
        try:
            while self._channels.is_open() and not self._closed.is_set():
                self._channels.update(timeout=_POLL_S)
                if self._channels.peek_stderr():
                    self._said += self._channels.read_stderr()[:_SAID_BYTES]
                if self._channels.peek_stdout():
                    return bytes(self._channels.read_stdout())
        except Exception as error:  # the library raises anything when its connection is closed under it
            if not self._closed.is_set():
                raise ClusterError(f"the connection broke: {error}", where=self.where) from error
        return b""

    def write(self, data: bytes) -> None:
        """Give it more input."""
        self._channels.write_stdin(data)

    def close(self) -> None:
        """Its input and output end, and with them the program."""
        self._closed.set()
        with suppress(Exception):  # another thread may be reading
            self._channels.close()

    @property
    def said(self) -> str:
        """What it wrote to standard error, on one line."""
        return " ".join(self._said[:_SAID_BYTES].decode(errors="replace").split())


def run_in_pod(
    client: ApiClient, namespace: str, pod: str, container: str, command: Sequence[str], connect_s: float = 10
) -> PodProcess:
    """Start a program in a pod.

    Raises:
        ClusterError: the API server or the pod's kubelet refuses, or cannot be reached.
    """
    from kubernetes.client import ApiClient, CoreV1Api
    from kubernetes.client.exceptions import ApiException, ApiValueError
    from kubernetes.stream import stream
    from websocket import WebSocketException

    where = f"pod {namespace}/{pod}"
    core = CoreV1Api(ApiClient(client.configuration))  # one's own: the library changes it while it opens a stream
    try:
        channels = stream(
            core.connect_get_namespaced_pod_exec, pod, namespace, container=container, command=list(command),
            stdin=True, stdout=True, stderr=True, tty=False, binary=True,
            _preload_content=False, _request_timeout=connect_s,
        )  # fmt: skip
    except (ApiException, ApiValueError, WebSocketException, OSError) as error:
        text = " ".join(str(getattr(error, "reason", None) or error).split())[:300]
        fix = "you need 'create' on pods/exec there" if "403" in text or "orbidden" in text else ""
        raise ClusterError(f"no program can be run in it: {text}", where=where, fix=fix) from error
    return PodProcess(where, channels)
