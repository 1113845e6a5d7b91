"""A request that offers an upgrade is read as if it did not, and no body is ever run as a request.

By raw sockets, by curl, and behind nginx.
"""

from __future__ import annotations

import json
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ..nginx import program, proxying
from ..test_main import server

BODY = b'{"id": "kept", "source": "kept"}'
CHANGE = b'{"pinned": true}'
JSON = {"content-type": "application/json"}
INNER = b"PATCH /adapters/kept HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
INNER += b"content-length: %d\r\n\r\n" % len(CHANGE) + CHANGE
OFFERS = {
    "h2c": b"upgrade: h2c\r\nconnection: Upgrade, HTTP2-Settings\r\nhttp2-settings: AAMAAABkAAQ\r\n",
    "websocket": b"Upgrade: websocket\r\nConnection: keep-alive\r\nConnection: upgrade\r\n",
    "foo/2": b"connection: Upgrade\r\nupgrade: foo/2\r\n",
    "no connection": b"upgrade: h2c\r\n",
}


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with server() as (_, url):
        assert httpx.post(f"{url}/adapters", content=BODY, headers=JSON, trust_env=False).status_code == 201
        yield int(url.rsplit(":", 1)[1])


def pinned(port: int) -> bool:
    """Whether something pinned it since this was last asked."""
    url = f"http://127.0.0.1:{port}/adapters/kept"
    card = httpx.get(url, trust_env=False).json()
    httpx.patch(url, json={"pinned": False}, trust_env=False)
    return bool(card["pinned"])


def posted(offer: bytes, body: bytes, framing: str, version: bytes = b"1.1") -> tuple[bytes, bytes]:
    """Head and body of a registration; in chunks of seven bytes, with a trailer, where that is
    asked for.
    """
    head = b"POST /adapters HTTP/%s\r\nhost: x\r\ncontent-type: application/json\r\n%s" % (version, offer)
    if framing == "content-length":
        return head + b"content-length: %d\r\n\r\n" % len(body), body
    parts = [body[i : i + 7] for i in range(0, len(body), 7)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts)
    return head + b"transfer-encoding: chunked\r\n\r\n", chunks + b"0\r\nx-trailer: 1\r\n\r\n"


def cut(head: bytes, body: bytes, pieces: str) -> list[bytes]:
    if pieces == "bytes":
        return [b"%c" % byte for byte in head + body]
    return [head + body] if pieces == "one" else [head, body]


class Connection:
    """A connection, and the answers that come on it, one after the other."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=20)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.file = self.socket.makefile("rb")

    def send(self, *pieces: bytes) -> None:
        for piece in pieces:
            self.socket.sendall(piece)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of the next answer; 0 when the server has closed."""
        first = self.file.readline()
        if not first:
            return 0, {}, b""
        headers = {}
        while line := self.file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        status = int(first.split()[1])
        return status, headers, b"" if status == 100 else self.file.read(int(headers["content-length"]))

    def close(self) -> None:
        self.file.close()
        self.socket.close()


@contextmanager
def connect(port: int) -> Iterator[Connection]:
    made = Connection(port)
    try:
        yield made
    finally:
        made.close()


LAST = b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"


def statuses(port: int, *pieces: bytes) -> list[int]:
    """The statuses of all answers to these bytes and to one more request, after which the server
    closes.
    """
    with connect(port) as connection:
        connection.send(*pieces)
        found = [connection.answer()[0]]
        try:
            connection.send(LAST)
            while status := connection.answer()[0]:
                found.append(status)
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed
    return found


@pytest.mark.parametrize("pieces", ["one", "two", "bytes"])
@pytest.mark.parametrize("framing", ["content-length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_an_offered_upgrade_is_ignored_and_the_body_read(
    port: int,
    offer: bytes,
    framing: str,
    pieces: str,
) -> None:
    assert statuses(port, *cut(*posted(offer, BODY, framing), pieces)) == [200, 200]


@pytest.mark.parametrize("pieces", ["one", "two", "bytes"])
@pytest.mark.parametrize("framing", ["content-length", "chunked"])
@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
def test_a_body_that_is_a_request_is_not_run(port: int, offer: bytes, framing: str, pieces: str) -> None:
    for body in (INNER, b"\r\n" * 40 + INNER):
        assert statuses(port, *cut(*posted(offer, body, framing), pieces)) == [422, 200]
    assert not pinned(port)


def test_a_long_body_that_is_a_request_is_not_run(port: int) -> None:
    """Longer than any piece that is read at once."""
    for framing in ("content-length", "chunked"):
        assert statuses(port, *posted(OFFERS["h2c"], b"\r\n" * 200_000 + INNER, framing)) == [422, 200]
    assert not pinned(port)


def test_without_a_body_an_offer_is_ignored_as_well(port: int) -> None:
    for offer in OFFERS.values():
        assert statuses(port, b"GET /adapters/kept HTTP/1.1\r\nhost: x\r\n" + offer + b"\r\n") == [200, 200]


def test_requests_that_follow_at_once_are_answered_in_their_order(port: int) -> None:
    one = b"".join(posted(OFFERS["h2c"], BODY, "content-length"))
    two = b"GET /adapters/none HTTP/1.1\r\nhost: x\r\n" + OFFERS["websocket"] + b"\r\n"
    last = b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n"
    assert statuses(port, one + two + one + last) == [200, 404, 200, 200, 200]


def test_very_many_offers_at_once_are_answered(port: int) -> None:
    """Each is read again, and none within another."""
    many = 1500
    asked = b"GET /health HTTP/1.1\r\nconnection: upgrade\r\nupgrade: a\r\n\r\n" * many
    assert statuses(port, asked) == [200] * (many + 1)


def test_an_offer_by_http_1_0_is_ignored_and_what_follows_is_not_run(port: int) -> None:
    for framing in ("content-length", "chunked"):
        head, body = posted(OFFERS["h2c"], BODY, framing, b"1.0")
        assert statuses(port, head + body + INNER) == [200]
    head, body = posted(OFFERS["h2c"] + b"connection: close\r\n", BODY, "content-length")
    assert statuses(port, head + body + INNER) == [200]
    assert not pinned(port)


def test_who_waits_to_be_told_to_go_on_is_told_so_once(port: int) -> None:
    head, body = posted(OFFERS["h2c"] + b"expect: 100-continue\r\n", BODY, "content-length")
    with connect(port) as connection:
        connection.send(head)
        assert connection.answer()[0] == 100
        connection.send(body, LAST)
        assert [connection.answer()[0] for _ in range(3)] == [200, 200, 0]


@pytest.mark.parametrize("target", [b"/adapters/kept", b"x:443", b"*"])
def test_a_tunnel_is_refused_and_nothing_that_was_meant_for_it_is_run(port: int, target: bytes) -> None:
    with connect(port) as connection:
        connection.send(
            b"CONNECT %s HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (target, len(INNER))
        )
        status, headers, content = connection.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(content)["error_type"] == "validation"
        assert "CONNECT" in json.loads(content)["error"]
        assert connection.answer()[0] == 0
    assert statuses(port, b"CONNECT %s HTTP/1.1\r\nhost: x\r\n\r\n" % target + INNER) == [400]
    assert not pinned(port)


def test_http_2_by_prior_knowledge_is_400_as_json(port: int) -> None:
    with connect(port) as connection:
        connection.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
        status, headers, content = connection.answer()
        assert (status, headers["content-type"], headers["connection"]) == (400, "application/json", "close")
        assert json.loads(content)["error_type"] == "validation"
        assert connection.answer()[0] == 0


UNFRAMED = {
    "two lengths": b"content-length: 2\r\ncontent-length: 3\r\n",
    "both framings": b"content-length: 2\r\ntransfer-encoding: chunked\r\n",
    "chunked is not last": b"transfer-encoding: chunked, gzip\r\n",
    "not chunked": b"transfer-encoding: gzip\r\n",
    "no number": b"content-length: +2\r\n",
    "a folded line": b"x: a\r\n b\r\ncontent-length: 2\r\n",
    "a bare line feed": b"x: a\ncontent-length: 2\r\n",
    "a space before the colon": b"content-length : 2\r\n",
}


@pytest.mark.parametrize("framing", UNFRAMED.values(), ids=UNFRAMED)
@pytest.mark.parametrize("offer", [b"", OFFERS["h2c"]], ids=["plain", "offer"])
def test_a_body_that_cannot_be_framed_is_refused_and_not_run(port: int, offer: bytes, framing: bytes) -> None:
    asked = b"POST /v1/load_lora_adapter HTTP/1.1\r\nhost: x\r\n%s%s\r\n" % (offer, framing)
    with connect(port) as connection:
        connection.send(asked + INNER)
        status, headers, content = connection.answer()
        assert (status, headers["connection"]) == (400, "close")
        assert json.loads(content)["error"]["type"] == "invalid_request_error"
        assert connection.answer()[0] == 0
    assert not pinned(port)


@pytest.mark.parametrize("offer", [b"", OFFERS["h2c"]], ids=["plain", "offer"])
def test_a_chunk_that_cannot_be_read_closes_the_connection(port: int, offer: bytes) -> None:
    head, _ = posted(offer, BODY, "chunked")
    for pieces in ([head + b"zz\r\n" + INNER], [head, b"2\r\n{}" + INNER]):
        assert statuses(port, *pieces) == [400]
    assert not pinned(port)


def test_trailers_are_no_headers(port: int) -> None:
    """Else what a proxy takes out of a head could be sent after the body."""
    head, body = posted(b"", BODY, "chunked")
    trailed = body[:-2] + b"x-request-id: from-a-trailer\r\nsec-fetch-site: cross-site\r\n\r\n"
    for pieces in ([head + trailed], [head, trailed]):
        with connect(port) as connection:
            connection.send(*pieces)
            status, headers, _ = connection.answer()
            assert (status, headers["x-request-id"] == "from-a-trailer") == (200, False)


def test_what_cannot_be_read_after_a_request_does_not_pass_for_its_answer(port: int) -> None:
    offering = b"".join(posted(OFFERS["h2c"], BODY, "chunked"))
    for asked in (b"GET /info HTTP/1.1\r\nhost: x\r\n\r\n", offering):
        with connect(port) as connection:
            connection.send(asked * 2 + b"nonsense\r\n\r\n")
            assert [connection.answer()[0] for _ in range(3)] == [200, 200, 0]


def test_what_cannot_be_read_after_a_request_does_not_stand_in_its_answer(port: int) -> None:
    with connect(port) as connection:
        connection.send(b"GET /dribble HTTP/1.1\r\nhost: x\r\n\r\n")
        begun = connection.socket.recv(1000)
        connection.send(b"nonsense\r\n\r\n")
        told = begun + connection.file.read()
    assert told.count(b"HTTP/1.1 ") == 1
    assert told.endswith(b"\n19\n\r\n0\r\n\r\n")


def test_the_rest_of_a_body_that_nobody_waits_for_is_not_answered(port: int) -> None:
    """The request was answered without it."""
    with connect(port) as connection:
        connection.send(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n")
        assert connection.answer()[0] == 404
        connection.send(b"nonsense\r\n" + INNER)
        assert connection.answer()[0] == 0
    assert not pinned(port)


def test_a_body_that_cannot_be_read_is_not_told_before_the_answers_that_come_first(port: int) -> None:
    head, _ = posted(b"", BODY, "chunked")
    with connect(port) as connection:
        connection.send(b"GET /dribble HTTP/1.1\r\nhost: x\r\n\r\n" + head + b"nonsense\r\n")
        assert b"400" not in connection.file.readline()


# ---- programs that offer it


def curl(url: str, body: str = "") -> int:
    """The status that it is told; it sends a body as JSON."""
    command = [program("curl", "curl"), "--http2", "--silent", "--show-error", "--noproxy", "*"]
    sent = ["--header", "content-type: application/json", "--data-binary", "@-"] if body else []
    command += [*sent, "--write-out", "\n%{http_code}", url]
    ran = subprocess.run(command, input=body, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return int(ran.stdout.splitlines()[-1])


def test_curl_that_would_rather_have_http_2_is_answered(port: int) -> None:
    url = f"http://127.0.0.1:{port}/adapters"
    assert curl(f"{url}/kept") == 200
    assert curl(url, BODY.decode()) == 200
    assert curl(url, BODY.decode() + " " * 1_000_000) == 200


LOCATIONS = """
location /adapters/ {{ return 403; }}
location / {{
  proxy_pass http://127.0.0.1:{behind};
  proxy_http_version 1.1;
  proxy_request_buffering {buffering};
  proxy_set_header Upgrade $http_upgrade;
  proxy_set_header Connection $http_connection;
}}
"""


@pytest.fixture(params=["on", "off"], ids=["buffering", "not buffering"])
def proxy(request: pytest.FixtureRequest, port: int, tmp_path: Path) -> Iterator[int]:
    """nginx, which refuses requests for single adapters and passes on an offered upgrade."""
    locations = LOCATIONS.format(behind=port, buffering=request.param)
    with proxying(locations, tmp_path) as own:
        yield own


def test_behind_a_proxy_no_body_gets_where_the_proxy_lets_nobody(port: int, proxy: int) -> None:
    url = f"http://127.0.0.1:{proxy}"
    refused = httpx.patch(f"{url}/adapters/kept", content=CHANGE, headers=JSON, trust_env=False)
    assert refused.status_code == 403
    for offer in OFFERS.values():
        for framing in ("content-length", "chunked"):
            for pieces in ("one", "two"):
                assert statuses(proxy, *cut(*posted(offer, BODY, framing), pieces)) == [200, 200]
                assert statuses(proxy, *cut(*posted(offer, INNER, framing), pieces)) == [422, 200]
                assert not pinned(port)
    assert curl(f"{url}/adapters", BODY.decode()) == 200
