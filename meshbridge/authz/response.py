"""Answer → CheckResponse: the policy's name and the reason travel in headers, a sentence in the body."""

from __future__ import annotations

from typing import Final

from envoy.config.core.v3.base_pb2 import HeaderValue, HeaderValueOption
from envoy.service.auth.v3.external_auth_pb2 import CheckResponse
from google.rpc.code_pb2 import OK, PERMISSION_DENIED

from meshbridge.authz.answer import Answer

POLICY_HEADER: Final = "x-meshbridge-policy"
REASON_HEADER: Final = "x-meshbridge-reason"

_OVERWRITE: Final = HeaderValueOption.HeaderAppendAction.OVERWRITE_IF_EXISTS_OR_ADD
_MAX_HEADER_LENGTH: Final = 512


def encode_answer(answer: Answer) -> bytes:
    """The serialised CheckResponse. TCP connections see the status alone."""
    response = CheckResponse()
    if answer.allowed:
        response.status.code = OK
        headers = response.ok_response.response_headers_to_add
        response.ok_response.headers.extend(
            HeaderValueOption(header=HeaderValue(key=name, value=value), append_action=_OVERWRITE)
            for name, value in answer.sets
        )
        response.ok_response.headers_to_remove.extend(answer.removes)
    else:
        response.status.code = PERMISSION_DENIED
        response.denied_response.status.code = answer.status
        response.denied_response.body = f"meshbridge: {answer.text}\n"
        headers = response.denied_response.headers
    headers.append(_header(REASON_HEADER, answer.reason))
    if answer.policy:
        headers.append(_header(POLICY_HEADER, answer.policy))
    encoded: bytes = response.SerializeToString()
    return encoded


def _header(name: str, value: str) -> HeaderValueOption:
    return HeaderValueOption(header=HeaderValue(key=name, value=header_value(value)), append_action=_OVERWRITE)


def header_value(text: str) -> str:
    """``text`` as a header can carry it: printable ASCII, of bounded length."""
    text = text[:_MAX_HEADER_LENGTH]
    if text.isascii() and text.isprintable():
        return text
    return "".join(char if " " <= char <= "~" else "?" for char in text)
