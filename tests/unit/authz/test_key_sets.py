"""Key sets named by address: when they are fetched, what holds meanwhile, what is never asked for."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from test_token_verifier import EC_KEY, ISSUER, NOW, ORIGIN, OTHER_KEY, jwk, token

from meshbridge.authz import keysets
from meshbridge.authz.keysets import (
    KEEP_S,
    MAX_BYTES,
    MAX_RETRY_S,
    MISS_S,
    REFRESH_S,
    RETRY_S,
    KeySetError,
    KeySets,
    fetch_key_set,
)
from meshbridge.authz.tokens import BadToken, TokenVerifier
from meshbridge.policy.mesh import JwtRule, KeySource

SOURCE = KeySource("https://keys.example/set", False, 5.0)
RULE = JwtRule(ISSUER, ORIGIN, jwks_uri=SOURCE.uri)
OLD = json.dumps({"keys": [jwk(EC_KEY, "a")]})
NEW = json.dumps({"keys": [jwk(OTHER_KEY, "b")]})


@dataclass
class World:
    """A server of key sets, and the time."""

    answer: str | KeySetError = OLD
    now_s: float = 1000.0
    asked: list[KeySource] = field(default_factory=list)
    wanted: list[KeySource] = field(default_factory=lambda: [SOURCE])

    def fetch(self, source: KeySource) -> str:
        self.asked.append(source)
        if isinstance(self.answer, KeySetError):
            raise self.answer
        return self.answer

    def key_sets(self) -> KeySets:
        return KeySets(lambda: self.wanted, self.fetch, lambda: self.now_s)


def claims(key_sets: KeySets | None, text: str) -> Any:
    return TokenVerifier(key_sets).claims_of([RULE], {"authorization": f"Bearer {text}"}, "/", NOW)


def test_before_the_first_fetch_a_token_is_refused_and_said_why() -> None:
    found = claims(World().key_sets(), token())
    assert isinstance(found, BadToken)
    assert found.reason == f"no usable key is known for issuer {ISSUER!r}: it has not been fetched yet"


def test_where_nothing_is_fetched_a_token_is_refused() -> None:
    assert isinstance(claims(None, token()), BadToken)


def test_a_fetched_set_verifies() -> None:
    key_sets = World().key_sets()
    assert key_sets.refresh() == REFRESH_S
    assert claims(key_sets, token())["sub"] == "me"


def test_only_what_policies_name_is_asked_for_and_what_they_no_longer_name_is_forgotten() -> None:
    world = World(wanted=[])
    key_sets = world.key_sets()
    key_sets.refresh()
    assert world.asked == []
    world.wanted = [SOURCE]
    key_sets.refresh()
    assert world.asked == [SOURCE]
    world.wanted = []
    key_sets.refresh()
    assert key_sets.text(SOURCE) == ""


def test_it_is_asked_again_only_when_due() -> None:
    world = World()
    key_sets = world.key_sets()
    key_sets.refresh()
    key_sets.refresh()
    assert len(world.asked) == 1
    world.now_s += REFRESH_S
    key_sets.refresh()
    assert len(world.asked) == 2


def test_while_the_server_is_away_the_last_good_keys_verify() -> None:
    world = World()
    key_sets = world.key_sets()
    key_sets.refresh()
    world.answer = KeySetError("away")
    world.now_s += REFRESH_S
    assert key_sets.refresh() == RETRY_S
    assert claims(key_sets, token())["sub"] == "me"
    world.now_s += KEEP_S
    key_sets.refresh()
    refused = claims(key_sets, token())
    assert isinstance(refused, BadToken)
    assert refused.reason.endswith(": away")


def test_pauses_grow_to_a_bound() -> None:
    world = World(KeySetError("away"))
    key_sets = world.key_sets()
    pauses = []
    for _ in range(12):
        pauses.append(key_sets.refresh())
        world.now_s += pauses[-1]
    assert pauses[:3] == [RETRY_S, 2 * RETRY_S, 4 * RETRY_S]
    assert pauses[-1] == MAX_RETRY_S


def test_a_token_of_an_unknown_key_makes_rotated_keys_known_soon_but_not_at_every_request() -> None:
    world = World()
    key_sets = world.key_sets()
    verifier = TokenVerifier(key_sets)
    rotated = {"authorization": f"Bearer {token(OTHER_KEY, kid='b')}"}
    key_sets.refresh()
    world.answer = NEW
    assert isinstance(verifier.claims_of([RULE], rotated, "/", NOW), BadToken)
    key_sets.refresh()
    assert len(world.asked) == 1, "it has only just been asked"
    world.now_s += MISS_S
    for _ in range(5):
        verifier.claims_of([RULE], rotated, "/", NOW)
        key_sets.refresh()
    assert len(world.asked) == 2
    found = verifier.claims_of([RULE], rotated, "/", NOW)
    assert not isinstance(found, BadToken)
    assert found is not None


def test_a_remembered_token_does_not_outlive_the_key_that_signed_it() -> None:
    world = World()
    key_sets = world.key_sets()
    key_sets.refresh()
    verifier = TokenVerifier(key_sets)
    asked = {"authorization": f"Bearer {token()}"}
    assert not isinstance(verifier.claims_of([RULE], asked, "/", NOW), BadToken)
    world.answer = NEW
    world.now_s += REFRESH_S
    key_sets.refresh()
    assert isinstance(verifier.claims_of([RULE], asked, "/", NOW), BadToken)


def test_it_fetches_in_the_background_and_ends() -> None:
    world = World()
    fetched = threading.Event()

    def fetch(source: KeySource) -> str:
        fetched.set()
        return world.fetch(source)

    key_sets = KeySets(lambda: world.wanted, fetch)
    key_sets.start()
    assert fetched.wait(5)
    key_sets.stop()
    assert key_sets._thread is not None
    key_sets._thread.join(5)
    assert not key_sets._thread.is_alive()


Pages = dict[str, tuple[int, dict[str, str], bytes]]


@contextmanager
def server(pages: Pages) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, body = pages.get(self.path, (404, {}, b""))
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}"
    finally:
        httpd.shutdown()
        thread.join()
        httpd.server_close()


def fetched(base: str, path: str, *, discovers: bool = False, timeout_s: float = 5.0) -> str:
    return fetch_key_set(KeySource(f"{base}{path}", discovers, timeout_s))


PAGES: Pages = {
    "/set": (200, {}, OLD.encode()),
    "/moved": (302, {"location": "/set"}, b""),
    "/loop": (302, {"location": "/loop"}, b""),
    "/to-file": (302, {"location": "file:///etc/passwd"}, b""),
    "/large": (200, {}, b" " * (MAX_BYTES + 1)),
    "/text": (200, {}, b"hello"),
    "/latin": (200, {}, b'"\xff"'),
    "/list": (200, {}, b"[]"),
    "/empty": (200, {}, b'{"keys": []}'),
    "/deep": (200, {}, b"[" * 100_000),
    "/error": (500, {}, OLD.encode()),
    "/nowhere": (200, {}, b"{}"),
}
REFUSED = {
    "/loop": "redirect", "/to-file": "not allowed", "/large": "larger than", "/text": "no JSON", "/latin": "no text",
    "/list": "no JSON object", "/empty": "no key set", "/deep": "no JSON", "/error": "does not give it",
    "/none": "does not give it",
}  # fmt: skip


def test_a_key_set_is_fetched_also_where_it_has_moved() -> None:
    with server(PAGES) as base:
        assert fetched(base, "/set") == OLD
        assert fetched(base, "/moved") == OLD


@pytest.mark.parametrize(("path", "says"), REFUSED.items(), ids=REFUSED.keys())
def test_what_is_no_key_set_is_refused(path: str, says: str) -> None:
    with server(PAGES) as base, pytest.raises(KeySetError) as error:
        fetched(base, path)
    assert says in str(error.value)


def test_an_issuer_says_where_its_keys_are() -> None:
    pages = dict(PAGES)
    with server(pages) as base:
        pages["/.well-known/openid-configuration"] = (200, {}, json.dumps({"jwks_uri": f"{base}/set"}).encode())
        source = JwtRule(f"{base}/", ORIGIN).key_source
        assert source is not None
        assert fetch_key_set(source) == OLD
        with pytest.raises(KeySetError):
            fetched(base, "/nowhere", discovers=True)


@pytest.mark.parametrize("address", ["httpx://keys.example/set", "http:", "http://keys.example:99999/set", 7])
def test_an_issuer_that_says_nonsense_is_one_that_gives_no_keys(address: object) -> None:
    pages: Pages = {"/": (200, {}, json.dumps({"jwks_uri": address}).encode())}
    with server(pages) as base, pytest.raises(KeySetError):
        fetched(base, "/", discovers=True)


def test_an_address_that_nobody_can_ask_keeps_no_other_from_being_asked() -> None:
    nobody = JwtRule("http://keys.example:99999", ORIGIN).key_source
    assert nobody is not None
    with server(PAGES) as base:
        good = KeySource(f"{base}/set", False, 5.0)
        key_sets = KeySets(lambda: [nobody, good])
        key_sets.refresh()
        assert key_sets.text(good) == OLD


def test_what_a_server_says_of_itself_is_told_short_and_printable() -> None:
    status = b"HTTP/1.1 500 \x1b[31m" + b"x" * 5000 + b"\r\n\r\n"
    with trickling(status, b" ") as base, pytest.raises(KeySetError) as error:
        fetched(base, "/set")
    assert len(error.value.what) < 600
    assert error.value.what.isprintable()


def test_a_server_that_is_slow_does_not_hold_us_longer_than_the_rule_says() -> None:
    with pytest.raises(KeySetError), _silent() as base:
        fetched(base, "/set", timeout_s=0.2)


@contextmanager
def trickling(beginning: bytes, drop: bytes) -> Iterator[str]:
    """A server that answers with ``beginning`` and then with ``drop`` again and again, until it is hung up on."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as held:

        def serve() -> None:
            client, _ = held.accept()
            with client, suppress(OSError):
                client.sendall(beginning)
                while not ended.wait(0 if len(drop) > 1 else 0.05):
                    client.sendall(drop)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"http://127.0.0.1:{held.getsockname()[1]}"
        finally:
            ended.set()
            thread.join()


@pytest.mark.parametrize(
    ("beginning", "drop"),
    [
        (b"HTTP/1.1 200 OK\r\nx-long: ", b"x"),
        (b"HTTP/1.1 200 OK\r\n\r\n", b" "),
        (b"HTTP/1.1 302 Found\r\nlocation: /set\r\n\r\n", b"x" * 65536),
    ],
    ids=["a header without end", "a body without end", "a redirect with a body without end"],
)
def test_a_server_that_never_ends_does_not_hold_us_longer_than_the_rule_says(beginning: bytes, drop: bytes) -> None:
    found: list[BaseException] = []

    def fetch() -> None:
        try:
            fetched(base, "/set", timeout_s=0.3)
        except KeySetError as error:
            found.append(error)

    with trickling(beginning, drop) as base:
        thread = threading.Thread(target=fetch, daemon=True)
        thread.start()
        thread.join(3)
        assert not thread.is_alive()
    assert found


@contextmanager
def _silent() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield f"http://127.0.0.1:{held.getsockname()[1]}"


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "fd00:ec2::254", "224.0.0.1"],
)
def test_no_link_local_and_no_metadata_service_is_ever_asked(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def resolved(*_: Any, **__: Any) -> list[Any]:
        return [(2, 1, 6, "", (address, 80))]

    monkeypatch.setattr(keysets.socket, "getaddrinfo", resolved)
    with pytest.raises(KeySetError) as error:
        fetched("http://keys.example", "/latest/meta-data")
    assert "link-local or a cloud's metadata service" in str(error.value)


def test_a_proxy_of_the_environment_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    with server(PAGES) as base:
        assert fetched(base, "/set") == OLD


def test_what_is_logged_of_an_address_holds_no_secret() -> None:
    assert keysets._server("https://user:word@keys.example:8443/set?token=x") == "https://keys.example:8443"
