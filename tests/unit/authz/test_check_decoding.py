"""CheckRequests as bytes: what is read, and that nothing odd becomes more than a refusal."""

from __future__ import annotations

import contextlib
from ipaddress import ip_address

import pytest
from envoy.service.auth.v3.external_auth_pb2 import CheckRequest
from hypothesis import given
from hypothesis import strategies as st

from meshbridge.authz.request import MAX_CHECK_BYTES, MAX_HEADERS, Check, UnusableCheckError, decode_check


def check_request(**changes: str) -> CheckRequest:
    """A request of 10.0.0.2 to 10.0.0.1:8080."""
    request = CheckRequest()
    attributes = request.attributes
    attributes.source.address.socket_address.address = changes.get("source", "10.0.0.2")
    attributes.source.address.socket_address.port_value = 40000
    attributes.destination.address.socket_address.address = changes.get("destination", "10.0.0.1")
    attributes.destination.address.socket_address.port_value = 8080
    return request


def with_http(request: CheckRequest) -> CheckRequest:
    http = request.attributes.request.http
    http.method, http.path, http.host, http.id = "POST", "/api?x=1", "server:8080", "id-1"
    http.headers["x-a"] = "1"
    return request


def decode(request: CheckRequest) -> Check:
    return decode_check(request.SerializeToString())


def test_http_request_is_read_whole() -> None:
    request = with_http(check_request())
    request.attributes.source.principal = "spiffe://cluster.local/ns/a/sa/b"
    request.attributes.tls_session.sni = "name"
    check = decode(request)
    assert (check.source, check.destination, check.destination_port) == (
        ip_address("10.0.0.2"),
        ip_address("10.0.0.1"),
        8080,
    )
    assert check.principal == "spiffe://cluster.local/ns/a/sa/b"
    assert check.sni == "name"
    assert check.http is not None
    assert (check.http.method, check.http.path, check.http.host) == ("POST", "/api?x=1", "server:8080")
    assert check.http.headers == {"x-a": "1"}
    assert check.claims is None


def test_headers_that_came_more_than_once_are_told_apart_and_joined() -> None:
    request = with_http(check_request())
    request.attributes.request.http.headers.clear()
    for name, value in (("x-a", b"1"), ("X-A", b"2"), ("x-b", b"\xff"), ("x-c", b"")):
        request.attributes.request.http.header_map.headers.add(key=name, raw_value=value)
    check = decode(request)
    assert check.http is not None
    assert check.http.headers == {"x-a": "1,2", "x-b": "\ufffd", "x-c": ""}
    assert check.http.repeated == {"x-a": ("1", "2")}


def test_tcp_connection_has_no_http() -> None:
    assert decode(check_request()).http is None


ADDRESSES = {
    "v4-mapped": ("::ffff:10.0.0.2", "10.0.0.2"),
    "IPv6 with a zone": ("fe80::1%eth0", "fe80::1"),
    "IPv6 written long": ("2001:db8:0:0:0:0:0:1", "2001:db8::1"),
}


@pytest.mark.parametrize(("written", "meant"), ADDRESSES.values(), ids=ADDRESSES.keys())
def test_one_address_has_one_form(written: str, meant: str) -> None:
    assert decode(check_request(source=written)).source == ip_address(meant)


def no_addresses() -> bytes:
    return b""


def no_source() -> bytes:
    request = check_request()
    request.attributes.source.Clear()
    return request.SerializeToString()


def pipe_source() -> bytes:
    request = check_request()
    request.attributes.source.address.pipe.path = "/tmp/x"
    return request.SerializeToString()


def named_port() -> bytes:
    request = check_request()
    request.attributes.destination.address.socket_address.named_port = "http"
    return request.SerializeToString()


def port_too_large() -> bytes:
    request = check_request()
    request.attributes.destination.address.socket_address.port_value = 70000
    return request.SerializeToString()


def many_header_lines() -> bytes:
    request = with_http(check_request())
    for _ in range(1001):
        request.attributes.request.http.header_map.headers.add(key="h", raw_value=b"")
    return request.SerializeToString()


def many_headers() -> bytes:
    request = with_http(check_request())
    for number in range(MAX_HEADERS + 1):
        request.attributes.request.http.headers[f"h{number}"] = ""
    return request.SerializeToString()


def deep_claims() -> bytes:
    request = with_http(check_request())
    struct = request.attributes.metadata_context.filter_metadata["envoy.filters.http.jwt_authn"]
    value = struct.fields["payload"]
    for _ in range(20):
        value = value.struct_value.fields["a"]
    value.string_value = "x"
    return request.SerializeToString()


def invalid_utf8() -> bytes:
    return with_http(check_request()).SerializeToString().replace(b"POST", b"P\xff\xfeT")


def too_large() -> bytes:
    return with_http(check_request()).SerializeToString() + b"\0" * MAX_CHECK_BYTES


UNUSABLE = {
    "empty message": (no_addresses, "source address is missing"),
    "no source": (no_source, "source address is missing"),
    "a pipe as source": (pipe_source, "source address is pipe"),
    "a name as port": (named_port, "destination port is not a port number"),
    "port 70000": (port_too_large, "destination port is not a port number"),
    "an address that is none": (
        lambda: check_request(source="10.0.0.999").SerializeToString(),
        "'10.0.0.999' is not an IP address",
    ),
    "a host name as address": (
        lambda: check_request(destination="server").SerializeToString(),
        "'server' is not an IP address",
    ),
    "too many headers": (many_headers, "headers"),
    "a header too many times": (many_header_lines, "headers"),
    "claims nested too deep": (deep_claims, "nested too deep"),
    "invalid UTF-8": (invalid_utf8, "cannot be decoded"),
    "too large": (too_large, "bytes"),
    "a wrong wire type": (lambda: b"\x08\x01\xff\xff\xff", "cannot be decoded"),
}


@pytest.mark.parametrize(("make", "says"), UNUSABLE.values(), ids=UNUSABLE.keys())
def test_unusable_request_says_why(make: object, says: str) -> None:
    assert callable(make)
    with pytest.raises(UnusableCheckError) as raised:
        decode_check(make())
    assert says in str(raised.value)


def test_message_cut_anywhere_is_whole_or_refused() -> None:
    whole = with_http(check_request()).SerializeToString()
    for size in range(len(whole)):
        try:
            check = decode_check(whole[:size])
        except UnusableCheckError:
            continue
        # A cut at a field's end is a shorter message; what is left of it is what was sent.
        assert check.source == ip_address("10.0.0.2")


@given(st.binary(max_size=400))
def test_any_bytes_are_a_check_or_unusable(data: bytes) -> None:
    with contextlib.suppress(UnusableCheckError):
        assert isinstance(decode_check(data), Check)


@given(st.data())
def test_any_flipped_byte_is_a_check_or_unusable(data: st.DataObject) -> None:
    whole = bytearray(with_http(check_request()).SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UnusableCheckError):
        assert isinstance(decode_check(bytes(whole)), Check)


def test_claims_of_jwt_authn_are_plain_values() -> None:
    request = with_http(check_request())
    struct = request.attributes.metadata_context.filter_metadata["envoy.filters.http.jwt_authn"]
    struct.update({"payload": {"iss": "me", "groups": ["a", "b"], "n": 1, "deep": {"ok": True}, "no": None}})
    assert decode(request).claims == {
        "iss": "me",
        "groups": ["a", "b"],
        "n": 1.0,
        "deep": {"ok": True},
        "no": None,
    }


def test_metadata_of_another_filter_is_no_token() -> None:
    request = with_http(check_request())
    request.attributes.metadata_context.filter_metadata["envoy.filters.http.lua"].update({"payload": {"iss": "me"}})
    assert decode(request).claims is None


def test_payload_that_is_no_object_is_no_token() -> None:
    request = with_http(check_request())
    request.attributes.metadata_context.filter_metadata["envoy.filters.http.jwt_authn"].update({"payload": "x"})
    assert decode(request).claims is None
