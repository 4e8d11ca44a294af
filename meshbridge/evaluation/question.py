"""One question about a flow, from the JSON object a person or a program wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import IPv6Address, ip_address
from typing import Any, Final, TypeVar

from meshbridge.errors import MeshBridgeError
from meshbridge.identity.model import IpAddress, ProxyClass
from meshbridge.policy.baseline import UNDECIDED, Principal
from meshbridge.policy.capture import AppProtocol
from meshbridge.policy.parse.ports import LAST_PORT

PROTOCOLS: Final = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPV6": 58}
LAST_ICMP_TYPE: Final = 255
LAST_UID: Final = (1 << 32) - 2
LONGEST_INTERFACE: Final = 15
MAX_TEXT: Final = 65_536

_PROXIES: Final = {"sidecar": ProxyClass.SIDECAR, "ztunnel": ProxyClass.AMBIENT, "none": ProxyClass.NONE}
_Value = TypeVar("_Value")


class QuestionError(MeshBridgeError):
    """A flow that cannot be asked about; ``where`` is its field."""


class Token(StrEnum):
    """The token of a request. What is not said of a request that is described is not in it."""

    ABSENT = "absent"
    VALID = "valid"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class LabelledPod:
    """A pod given by its labels alone."""

    namespace: str
    labels: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class HttpFields:
    """Of a request. A method, path or host that is None is some value nobody has said.

    The headers are all there are; a name that was sent several times stands there with each of its values.
    """

    method: str | None = None
    path: str | None = None
    host: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    @property
    def sent(self) -> dict[str, tuple[str, ...]]:
        """The values of each header."""
        found: dict[str, tuple[str, ...]] = {}
        for name, value in self.headers:
            found[name] = (*found.get(name, ()), value)
        return found

    @property
    def joined(self) -> dict[str, str]:
        """The headers, each once, several values joined by commas."""
        return {name: ",".join(values) for name, values in self.sent.items()}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked; what is None was not said. ``port`` is the type of an ICMP message.

    ``principal`` None is plaintext, UNDECIDED whatever the source may present. ``interface`` is the pods' own that the
    flow leaves and comes in by (eth0), ``src_uid`` the user who sends (none that the redirect rules know).
    """

    destination: str | LabelledPod
    source: str
    protocol: int
    port: int
    source_ip: IpAddress | None = None
    destination_ip: IpAddress | None = None
    remote_ip: IpAddress | None = None
    sni: str | None = None
    principal: Principal | str | None = UNDECIDED
    app_protocol: AppProtocol | None = None
    http: HttpFields | None = None
    token: Token | None = None
    claims: Mapping[str, Any] | None = field(default=None, hash=False)
    proxy: ProxyClass | None = None
    interface: str | None = None
    src_uid: int | None = None


def parse_question(data: Any) -> Question:
    """The question in a JSON object; keys that are not known are nobody's business here.

    Raises:
        QuestionError: a field is missing, has a wrong type or a value that is none.
    """
    if not isinstance(data, Mapping):
        raise QuestionError(f"a {type(data).__name__}, not an object", fix="write one JSON object per line")
    protocol = _choice(data, "protocol", PROTOCOLS)
    number = PROTOCOLS["TCP"] if protocol is None else protocol
    source = _text(data, "src")
    source_ip = _address(data, "src_ip")
    if source is None and source_ip is None:
        raise _error("src", "is missing", 'write "ns/pod", an address, "node/NAME" or "entity:world"')
    return Question(
        destination=_destination(data),
        source=source if source is not None else str(source_ip),
        protocol=number,
        port=_port(data, number),
        source_ip=source_ip,
        destination_ip=_address(data, "dst_ip"),
        remote_ip=_address(data, "remote_ip"),
        sni=_text(data, "sni"),
        principal=_principal(data),
        app_protocol=_choice(data, "app_protocol", {p.value.upper(): p for p in AppProtocol}),
        http=_http(data),
        token=_choice(data, "token", {token.value.upper(): token for token in Token}),
        claims=_claims(data),
        proxy=_choice(data, "proxy", {name.upper(): proxy for name, proxy in _PROXIES.items()}),
        interface=_interface(data),
        src_uid=_uid(data),
    )


def _error(field_name: str, what: str, fix: str) -> QuestionError:
    return QuestionError(what, where=field_name, fix=fix)


def _shown(value: Any) -> str:
    return repr(value)[:80]


def _text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is None:
        return None
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise _error(name, f"{_shown(value)} is no text", "write a string")
    return value


def _address(data: Mapping[str, Any], name: str) -> IpAddress | None:
    value = _text(data, name)
    if value is None:
        return None
    address = address_of(value)
    if address is None:
        raise _error(name, f"{_shown(value)} is no address", "write an IPv4 or IPv6 address")
    return address


def address_of(text: str) -> IpAddress | None:
    """The address in ``text``, a v4-mapped one as IPv4; None when it is none."""
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address


def _interface(data: Mapping[str, Any]) -> str | None:
    name = _text(data, "interface")
    if name is not None and not 0 < len(name.encode("utf-8", "surrogatepass")) <= LONGEST_INTERFACE:
        raise _error("interface", f"{_shown(name)} is no interface", "write its name in the pod, such as eth0")
    return name


def _uid(data: Mapping[str, Any]) -> int | None:
    value = data.get("src_uid")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= LAST_UID:
        raise _error("src_uid", f"{_shown(value)} is no user id", f"write a number from 0 to {LAST_UID}")
    return value


def _choice(data: Mapping[str, Any], name: str, choices: Mapping[str, _Value]) -> _Value | None:
    value = data.get(name)
    if value is None:
        return None
    found = choices.get(value.upper()) if isinstance(value, str) else None
    if found is None:
        raise _error(name, f"{_shown(value)} is not known", f"use one of: {', '.join(choices)}")
    return found


def _port(data: Mapping[str, Any], protocol: int) -> int:
    icmp = protocol in (PROTOCOLS["ICMP"], PROTOCOLS["ICMPV6"])
    value, last = data.get("port"), LAST_ICMP_TYPE if icmp else LAST_PORT
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= last:
        what = "is missing" if value is None else f"{_shown(value)} is no {'ICMP type' if icmp else 'port'}"
        raise _error("port", what, f"write a number from 0 to {last}")
    return value


def _principal(data: Mapping[str, Any]) -> Principal | str | None:
    if "peer_principal" not in data:
        return UNDECIDED
    return _text(data, "peer_principal") or None


def _destination(data: Mapping[str, Any]) -> str | LabelledPod:
    value = data.get("dst")
    if not isinstance(value, Mapping):
        text = _text(data, "dst")
        if text is None:
            raise _error("dst", "is missing", 'write "ns/pod", an address, or {"namespace": …, "labels": {…}}')
        return text
    namespace, labels = value.get("namespace"), value.get("labels", {})
    if not isinstance(namespace, str) or not namespace:
        raise _error("dst.namespace", f"{_shown(namespace)} is no namespace", "write its name")
    return LabelledPod(namespace, _texts(labels, "dst.labels"))


def _texts(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(value, Mapping) or not all(isinstance(text, str) for text in value.values()):
        raise _error(where, f"{_shown(value)} is no mapping of texts", 'write {"name": "value"}')
    return tuple(sorted(value.items()))


def _headers(value: Any) -> tuple[tuple[str, str], ...]:
    where, fix = "http.headers", 'write {"name": "value"}, or {"name": ["value", "another"]} for what is sent twice'
    if not isinstance(value, Mapping):
        raise _error(where, f"{_shown(value)} is no mapping of texts", fix)
    pairs = [(name, each) for name, texts in value.items() for each in (texts if isinstance(texts, list) else [texts])]
    if not all(isinstance(text, str) for _, text in pairs):
        raise _error(where, f"{_shown(value)} is no mapping of texts", fix)
    return tuple(sorted(((name.lower(), text) for name, text in pairs), key=lambda pair: pair[0]))


def _http(data: Mapping[str, Any]) -> HttpFields | None:
    value = data.get("http")
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise _error("http", f"{_shown(value)} is no object", 'write {"method": …, "path": …, "host": …, "headers": …}')
    headers = _headers(value.get("headers") or {})
    try:
        method, path, host = (_text(value, name) for name in ("method", "path", "host"))
    except QuestionError as error:
        raise _error(f"http.{error.where}", error.what, error.fix) from None
    return HttpFields(method, path, host, headers)


def _claims(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    value = data.get("claims")
    if value is not None and not isinstance(value, Mapping):
        raise _error("claims", f"{_shown(value)} is no object", "write the token's payload")
    return value
