"""A call of the CNI plugin, and its answers: values and decisions, no system calls.

Spec: CNI 1.1.0; the frame around it is described in cni/meshbridge-cni.c.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from ipaddress import ip_interface
from typing import Any, Final

from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpAddress

MAGIC: Final = b"MBCNI1\n"
LENGTH: Final = struct.Struct("<I")
MAX_PART_BYTES: Final = (4096,) * 6 + (1 << 20,)
"""Of the six variables, and of the configuration."""
VERSIONS: Final = frozenset({"0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"})
MAX_ADDRESSES: Final = 32
MAX_TEXT: Final = 2_000
_FALLBACK_VERSION: Final = "1.0.0"


class Verb(StrEnum):
    ADD = "ADD"
    DEL = "DEL"
    CHECK = "CHECK"
    GC = "GC"
    STATUS = "STATUS"


class Code(IntEnum):
    """Of the specification; from 100 on our own."""

    VERSION = 1
    VARIABLE = 4
    DECODE = 6
    CONFIG = 7
    TRY_LATER = 11
    NOT_ENFORCED = 100


class CallError(Exception):
    """A call that cannot be met, as the runtime is told."""

    def __init__(self, code: Code, message: str) -> None:
        self.code, self.message = code, message
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class Call:
    """What a runtime asks. ``args`` are those of CNI_ARGS, ``config`` is the network configuration."""

    verb: Verb
    container: str
    netns: str
    interface: str
    args: Mapping[str, str]
    config: Mapping[str, Any]
    version: str

    @property
    def pod(self) -> str:
        return f"{self.args.get('K8S_POD_NAMESPACE', '')}/{self.args.get('K8S_POD_NAME', '')}"

    @property
    def uid(self) -> str:
        return self.args.get("K8S_POD_UID", "")


@dataclass(frozen=True, slots=True)
class Network:
    """What the plugins before made: addresses of the pod, and the names of its interfaces inside it."""

    addresses: tuple[IpAddress, ...] = ()
    interfaces: frozenset[str] = field(default_factory=frozenset)


def read_call(parts: Sequence[bytes]) -> Call:
    """
    Raises:
        CallError: not what a runtime sends.
    """
    try:
        command, container, netns, interface, args, _path = (part.decode() for part in parts[:6])
    except UnicodeDecodeError:
        raise CallError(Code.VARIABLE, "a variable is no UTF-8") from None
    if command not in set(Verb):
        raise CallError(Code.VARIABLE, f"CNI_COMMAND {command[:20]!r} is not known")
    try:
        config = json.loads(parts[6])
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise CallError(Code.DECODE, "the network configuration is no JSON object")
    version = config.get("cniVersion")
    if version not in VERSIONS:
        raise CallError(Code.VERSION, f"cniVersion {str(version)[:20]!r} is not one of {', '.join(sorted(VERSIONS))}")
    call = Call(Verb(command), container, netns, interface, dict(_pairs(args)), config, version)
    if call.verb in (Verb.ADD, Verb.CHECK) and not (container and netns.startswith("/") and interface):
        raise CallError(Code.VARIABLE, "CNI_CONTAINERID, CNI_NETNS and CNI_IFNAME are needed")
    if call.verb is Verb.ADD and not (call.uid and all(call.pod.partition("/")[::2])):
        raise CallError(
            Code.VARIABLE,
            "CNI_ARGS lacks K8S_POD_NAMESPACE, K8S_POD_NAME or K8S_POD_UID, which Kubernetes' runtimes set",
        )
    return call


def _pairs(args: str) -> Iterator[tuple[str, str]]:
    for pair in args.split(";"):
        key, _, value = pair.partition("=")
        if key:
            yield key, value


def network_of(call: Call) -> Network:
    """What ``prevResult`` says of the pod.

    Raises:
        CallError: there is none, as this is the first plugin of the chain; or it is no result.
    """
    result = call.config.get("prevResult")
    if result is None:
        raise CallError(Code.CONFIG, "there is no prevResult: meshbridge-cni follows the plugin that makes interfaces")
    if not isinstance(result, dict):
        raise CallError(Code.DECODE, "prevResult is no object")
    interfaces, ips = result.get("interfaces") or [], result.get("ips") or []
    if not isinstance(interfaces, list) or not isinstance(ips, list) or len(ips) > MAX_ADDRESSES:
        raise CallError(Code.DECODE, f"prevResult: interfaces and at most {MAX_ADDRESSES} ips are lists")
    return Network(
        tuple(dict.fromkeys(_addresses(ips, interfaces))),
        frozenset(str(each.get("name")) for each in interfaces if _is_inside(each)) | {call.interface},
    )


def _addresses(ips: Sequence[Any], interfaces: Sequence[Any]) -> Iterator[IpAddress]:
    """The pod's; one of an interface of the node is not."""
    for each in ips:
        index = each.get("interface") if isinstance(each, dict) else None
        if isinstance(index, int) and 0 <= index < len(interfaces) and not _is_inside(interfaces[index]):
            continue
        try:
            yield ip_interface(each["address"]).ip
        except (KeyError, TypeError, ValueError):
            raise CallError(Code.DECODE, "prevResult: an entry of ips has no address") from None


def _is_inside(interface: Any) -> bool:
    return isinstance(interface, dict) and bool(interface.get("sandbox"))


def valid_containers(call: Call) -> frozenset[str]:
    """The containers that GC says are left.

    Raises:
        CallError: it does not say.
    """
    valid = call.config.get("cni.dev/valid-attachments")
    if not isinstance(valid, list) or not all(isinstance(each, dict) for each in valid):
        raise CallError(Code.CONFIG, "'cni.dev/valid-attachments' is no list of attachments")
    return frozenset(str(each.get("containerID")) for each in valid)


def answer(result: Mapping[str, Any] | None) -> bytes:
    """The frame of a success."""
    body = b"" if result is None else json.dumps(result).encode() + b"\n"
    return LENGTH.pack(0) + LENGTH.pack(len(body)) + body


def refusal(error: CallError | MeshBridgeError, version: str = _FALLBACK_VERSION) -> bytes:
    """The frame of a failure: whatever is wrong with the pod's network is ours to enforce, and was not."""
    code = error.code if isinstance(error, CallError) else Code.NOT_ENFORCED
    message = f"meshbridge: {error}"[:MAX_TEXT]
    body = json.dumps({"cniVersion": version, "code": int(code), "msg": message}).encode() + b"\n"
    return LENGTH.pack(1) + LENGTH.pack(len(body)) + body
