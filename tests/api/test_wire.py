"""The bytes before any route: heads without end, what is no HTTP, and that both are told as JSON; over a real socket."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from service.api.wire import HEAD_BYTES

from ..test_main import server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with server() as (_, url):
        yield int(url.rsplit(":", 1)[1])


def talk(port: int, *pieces: bytes) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer; sending goes on until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass  # it has seen enough
        file = connection.makefile("rb")
        status = int(file.readline().split()[1])
        headers = {}
        while line := file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, file.read(int(headers["content-length"]))


GET = b"GET /adapters HTTP/1.1\r\nhost: x\r\n"


def test_a_head_within_the_limit_is_read(port: int) -> None:
    assert talk(port, GET, b"x-long: " + b"a" * (HEAD_BYTES - 1000) + b"\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        [GET, b"x-long: " + b"a" * HEAD_BYTES + b"\r\n\r\n"],
        [GET, *[b"x-%d: %s\r\n" % (i, b"a" * 500) for i in range(200)], b"\r\n"],
        [b"GET /adapters?q=" + b"a" * HEAD_BYTES + b" HTTP/1.1\r\nhost: x\r\n\r\n"],
    ],
    ids=["one", "many", "url"],
)
def test_a_head_over_the_limit_is_413_as_json(port: int, head: list[bytes]) -> None:
    status, headers, content = talk(port, *head)
    assert (status, headers["content-type"], headers["connection"]) == (413, "application/json", "close")
    assert json.loads(content)["error_type"] == "payload_too_large"
    assert talk(port, GET, b"\r\n")[0] == 200


def test_a_head_that_never_ends_is_cut_off(port: int) -> None:
    """Nothing of it is ever whole, so nobody but the connection can see it grow."""
    status, _, content = talk(port, GET, b"x-long: ", *[b"a" * 10_000] * 1000)
    assert (status, json.loads(content)["error_type"]) == (413, "payload_too_large")


def test_a_long_body_is_no_head(port: int) -> None:
    body = b'{"id": "a", "source": "' + b"a" * (4 * HEAD_BYTES) + b'"}'
    head = b"POST /adapters HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    assert talk(port, head + b"content-length: %d\r\n\r\n" % len(body), *[body[i : i + 5000] for i in range(0, len(body), 5000)])[0] == 201
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in (body[i : i + 5000] for i in range(0, len(body), 5000))]
    status, _, _ = talk(port, head + b"transfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
    assert status in (200, 201)


def test_what_is_no_http_is_told_as_json(port: int) -> None:
    for nonsense in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        status, _, content = talk(port, nonsense)
        assert (status, json.loads(content)["error_type"]) == (400, "validation")


def test_refused_heads_count_as_failures(port: int) -> None:
    talk(port, b"hello\r\n\r\n")
    _, _, content = talk(port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    counted = [line for line in content.decode().splitlines() if line.startswith("adapterd_request_failure_total")]
    assert any('code="validation"' in line for line in counted)
