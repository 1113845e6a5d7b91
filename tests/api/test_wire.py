"""The bytes before any route: heads without end, what is no HTTP, and that both are told as JSON;
over a real socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.wire import HEAD_BYTES

from ..test_main import server


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with server() as (_, url):
        yield int(url.rsplit(":", 1)[1])


def talk(port: int, *pieces: bytes, pause: float = 0.0) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the first answer; sending goes on until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
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
    assert (
        talk(
            port,
            head + b"content-length: %d\r\n\r\n" % len(body),
            *[body[i : i + 5000] for i in range(0, len(body), 5000)],
        )[0]
        == 201
    )
    chunks = [
        b"%x\r\n%s\r\n" % (len(part), part)
        for part in (body[i : i + 5000] for i in range(0, len(body), 5000))
    ]
    status, _, _ = talk(port, head + b"transfer-encoding: chunked\r\n\r\n", *chunks, b"0\r\n\r\n")
    assert status in (200, 201)


@pytest.fixture(scope="module")
def hasty() -> Iterator[int]:
    """One that waits less than a second."""
    with server("--hasty") as (_, url):
        yield int(url.rsplit(":", 1)[1])


def failures(port: int, label: str = "") -> float:
    _, _, content = talk(port, b"GET /metrics HTTP/1.1\r\nhost: x\r\n\r\n")
    lines = [
        line
        for line in content.decode().splitlines()
        if line.startswith("adapterd_request_failure_total") and label in line
    ]
    return sum(float(line.split()[-1]) for line in lines)


POST = b"POST /adapters HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def test_a_head_that_comes_too_slowly_is_408_however_steadily(hasty: int) -> None:
    status, headers, content = talk(hasty, GET, *[b"x-%d: a\r\n" % i for i in range(20)], pause=0.2)
    assert (status, headers["connection"], json.loads(content)["error_type"]) == (408, "close", "validation")
    assert "did not come within 0.8 s" in json.loads(content)["error"]


def test_a_body_that_stops_is_408_and_one_that_is_only_slow_is_read(hasty: int) -> None:
    body = json.dumps({"id": "slow", "source": "x"}).encode()
    head = POST + b"content-length: %d\r\n\r\n" % len(body)
    before = failures(hasty)
    assert talk(hasty, head, body[:5])[0] == 408
    assert failures(hasty) == before + 1
    assert talk(hasty, head, *[body[i : i + 4] for i in range(0, len(body), 4)], pause=0.2)[0] == 201
    assert talk(hasty, head[:9], head[9:], body, pause=0.45)[0] in (200, 201), (
        "the head's time is not the body's"
    )


def test_who_connects_and_says_nothing_is_left_and_one_who_waits_for_an_answer_is_not(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as connection:
        assert connection.recv(1) == b""
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as connection:
        # Takes a second
        connection.sendall(b"GET /dribble HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert b"".join(iter(lambda: connection.recv(1000), b"")).endswith(b"19\n\r\n0\r\n\r\n")


@pytest.mark.parametrize("more", [b"\r\n", b"GET /hea"], ids=["nothing", "half"])
def test_what_follows_a_request_that_is_still_answered_may_wait(hasty: int, more: bytes) -> None:
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as connection:
        connection.sendall(b"GET /dribble HTTP/1.1\r\nhost: x\r\n\r\n")
        begun = connection.recv(1000)  # else both would be one piece
        connection.sendall(more)
        received = begun + b"".join(iter(lambda: connection.recv(1000), b""))
    answer, end, rest = received.partition(b"\n19\n\r\n0\r\n\r\n")
    assert end
    assert answer.count(b"HTTP/1.1 ") == 1  # "408" alone can be in the request's id
    assert rest.startswith(b"HTTP/1.1 408") == (more != b"\r\n")


def test_a_body_whose_chunks_come_apart_from_their_sizes_is_only_slow(hasty: int) -> None:
    body = json.dumps({"id": "apart", "source": "x"}).encode()
    pieces = [b"%x\r\n" % len(body), body, b"\r\n", b"0\r\n", b"\r\n"]
    assert talk(hasty, POST + b"transfer-encoding: chunked\r\n\r\n", *pieces, pause=0.2)[0] == 201


def test_who_was_refused_cannot_stay_by_sending_on(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        assert connection.recv(1000).startswith(b"HTTP/1.1 404")
        sent = 0
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            while sent < 1000:
                sent += connection.send(b"a")
                time.sleep(0.1)
    assert sent < 1000


def test_who_sends_a_body_after_the_answer_and_nothing_more_is_left(hasty: int) -> None:
    with socket.create_connection(("127.0.0.1", hasty), timeout=20) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n")
        assert connection.recv(12) == b"HTTP/1.1 404"
        connection.sendall(b"hello")
        assert b"".join(iter(lambda: connection.recv(1000), b"")).endswith(b"}")


def test_what_is_no_http_is_told_as_json(port: int) -> None:
    for nonsense in (b"hello\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"):
        status, _, content = talk(port, nonsense)
        assert (status, json.loads(content)["error_type"]) == (400, "validation")


def test_refused_heads_count_as_failures(port: int) -> None:
    talk(port, b"hello\r\n\r\n")
    assert failures(port, 'code="validation"') > 0


def access(out: str) -> dict[str, str]:
    """The last line that the log has of a request to register."""
    line = [line for line in out.splitlines() if "path=/adapters " in line][-1]
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def test_a_request_that_was_told_408_counts_as_that_and_not_as_one_whose_client_left() -> None:
    with server("--hasty") as (process, url):
        port = int(url.rsplit(":", 1)[1])
        assert talk(port, POST + b"content-length: 50\r\n\r\n", b"{")[0] == 408
        assert (failures(port, 'code="validation"'), failures(port, 'code="cancelled"')) == (1, 0)
        process.terminate()
        line = access(process.communicate(timeout=20)[0])
    assert (line["status"], line["outcome"]) == ("408", "validation")


def test_a_body_that_drips_is_408_however_steadily(hasty: int) -> None:
    body = b'{"id": "drip", "source": "x"}'
    assert (
        talk(
            hasty,
            POST + b"content-length: %d\r\n\r\n" % len(body),
            *[body[i : i + 1] for i in range(len(body))],
            pause=0.3,
        )[0]
        == 408
    )


def deaf(port: int, path: str) -> socket.socket:
    """One who asks and takes as little of the answer as can be."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.settimeout(20)
    connection.connect(("127.0.0.1", port))
    connection.sendall(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
    return connection


def gone(connection: socket.socket) -> bool:
    """Whether the server has cut this endless answer off: only what was on its way still comes."""
    left = 50_000_000
    with contextlib.suppress(ConnectionResetError):
        while left > 0 and (data := connection.recv(100_000)):
            left -= len(data)
    return left > 0


def test_who_reads_nothing_of_an_answer_is_left_and_who_reads_slowly_is_not(hasty: int) -> None:
    with deaf(hasty, "/flood") as never:
        time.sleep(3)
        assert gone(never)
    with deaf(hasty, "/flood") as slow:
        for _ in range(30):
            slow.recv(300_000)
            time.sleep(0.1)
        assert slow.recv(1)


def test_connections_that_ask_for_nothing_keep_nobody_out() -> None:
    """Neither from connecting, nor from the files that the service needs itself."""
    with server("--poor", "--log-level", "error") as (_, url), contextlib.ExitStack() as held:
        port = int(url.rsplit(":", 1)[1])
        for _ in range(700):
            held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            assert talk(port, b"GET /console/style.css HTTP/1.1\r\nhost: x\r\n\r\n")[0] == 200


# ---- what the protocol leans on, of uvicorn's and the parser's own


class FakeTransport(asyncio.Transport):
    """A connection that keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written, self.closed = b"", asyncio.Event()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def close(self) -> None:
        self.closed.set()

    def is_closing(self) -> bool:
        return self.closed.is_set()

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


class Waiting:
    """An application that answers each request once `go` is set."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self.go.wait()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body"})


@pytest.mark.anyio
async def test_uvicorns_own_parts_are_there_and_mean_what_they_meant() -> None:
    pipe, app = FakeTransport(), Waiting()
    config = uvicorn.Config(app, ws="none", log_config=None, lifespan="off")
    protocol = HttpToolsProtocol(config, ServerState(), {"a": 1})
    protocol.connection_made(pipe)
    assert not any((protocol.cycle, protocol.pipeline, protocol.flow.read_paused))
    protocol.data_received(b"POST /a?b HTTP/1.1\r\nX: y\r\ncontent-length: 2\r\n\r\n{")
    first = protocol.cycle
    assert (first.more_body, first.response_started) == (True, False)
    assert (first.response_complete, first.keep_alive) == (False, True)
    assert (protocol.url, first.scope["state"]) == (b"/a?b", {"a": 1})
    assert first.scope["headers"] is protocol.headers
    assert protocol.headers == [(b"x", b"y"), (b"content-length", b"2")]
    protocol.data_received(b"}")
    assert (first.more_body, len(protocol.pipeline)) == (False, 0)
    protocol.data_received(b"GET /c HTTP/1.1\r\n\r\n")
    second = protocol.cycle
    assert (second is first, second.more_body) == (False, False)
    assert (len(protocol.pipeline), protocol.flow.read_paused) == (1, True)
    second.keep_alive = False
    app.go.set()
    await pipe.closed.wait()
    assert (first.response_started, first.response_complete, second.response_complete) == (True, True, True)
    assert pipe.written.count(STATUS_LINE[200]) == 2
    assert STATUS_LINE[413].startswith(b"HTTP/1.1 413 ")


class ParserRecord:
    """Records the callbacks of a parser that is fed bytes."""

    def __init__(self) -> None:
        self.parser, self.said = httptools.HttpRequestParser(self), list[Any]()

    def on_headers_complete(self) -> None:
        parser = self.parser
        self.said.append((parser.get_method(), parser.get_http_version(), parser.should_upgrade()))

    def on_body(self, body: bytes) -> None:
        self.said.append(body)

    def on_message_complete(self) -> None:
        self.said.append(self.parser.should_upgrade())


def test_the_parser_stops_behind_a_head_that_offers_an_upgrade_and_says_where() -> None:
    record, head = ParserRecord(), POST + b"upgrade: a\r\nconnection: upgrade\r\ncontent-length: 2\r\n\r\n"
    with pytest.raises(httptools.HttpParserUpgrade) as stop:
        record.parser.feed_data(head + b"{}")
    assert stop.value.args == (len(head),)
    assert record.said == [(b"POST", "1.1", True), True]
    assert not issubclass(httptools.HttpParserUpgrade, httptools.HttpParserError)
    plain = ParserRecord()
    plain.parser.feed_data(head.replace(b"upgrade: a", b"other: a") + b"{}")
    assert plain.said == [(b"POST", "1.1", False), b"{}", False]


def test_what_a_callback_raises_ends_the_reading() -> None:
    record = ParserRecord()
    with pytest.raises(httptools.HttpParserError):
        record.parser.feed_data(b"nonsense\r\n\r\n")
    vars(record)["said"] = None  # so that the callbacks raise
    record.parser = httptools.HttpRequestParser(record)
    for _ in range(2):
        with pytest.raises(httptools.HttpParserError):
            record.parser.feed_data(GET + b"\r\n")
