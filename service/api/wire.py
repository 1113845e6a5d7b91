"""The HTTP/1.1 protocol with limits on what a client may take, in bytes, time and connections;
it answers a request that it cannot read with JSON, too. API process; must not know a route or a
key.
"""

from __future__ import annotations

import asyncio
import json
from collections import OrderedDict
from typing import Any, ClassVar

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from ..errors import AdapterdError, BadRequest, PayloadTooLarge, TooSlow
from ..telemetry import metrics
from .compat import stop_keepalive_timer
from .errors import body_at, status_of

HEAD_BYTES = 64 * 1024  # of a request line and its headers
PIECE_BYTES = 64 * 1024  # of a body
# For a whole head, for each next piece of a body, and for a client to take something of an answer
PATIENCE_S = 60.0
CONNECTIONS = 10_000
UNREADABLE = BadRequest("this is no HTTP/1.1 request")
TUNNEL = BadRequest("CONNECT is not served here: this is no proxy")


class HttpProtocol(HttpToolsProtocol):
    """Refuses a head over `HEAD_BYTES` with 413, also one that never ends, and a request that comes
    too slowly with 408; then it closes.

    It also closes on a client that reads nothing. Over `max_connections`, each new connection ends
    the oldest that waits for no answer. An offered upgrade is ignored, and no tunnel is made: the
    bytes after a head are its body, and never the next request.
    """

    max_connections: ClassVar[int] = CONNECTIONS
    open_connections: ClassVar[OrderedDict[HttpProtocol, None]] = OrderedDict()
    in_request = False  # within a request that is not whole yet
    timer: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None
    head = 0  # bytes of a head that has not ended yet
    piece = 0  # bytes since the timer was set
    in_head = False
    refusal: AdapterdError = UNREADABLE  # of a request that the parser cannot read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        if self.client:
            # As a socket of both families spells an address of IPv4; others know it without
            self.client = (self.client[0].removeprefix("::ffff:"), self.client[1])
        # So that it is known of each byte that waits for the client
        transport.set_write_buffer_limits(0)
        self._start_timer()
        if len(self.open_connections) >= self.max_connections:
            idle = (connection for connection in self.open_connections if not connection._owes_answer)
            victim = next(idle, self)
            self.open_connections.pop(victim, None)
            victim.transport.abort()
        self.open_connections[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        self.open_connections.pop(self, None)
        super().connection_lost(exc)  # tells that writing may go on

    def pause_writing(self) -> None:
        super().pause_writing()
        size = self.transport.get_write_buffer_size()
        self.unread = self.loop.call_later(PATIENCE_S, self._on_unread, size)

    def resume_writing(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self.piece += len(data)
        if self.timer is None or (self._expects_body and self.piece >= PIECE_BYTES):
            self._start_timer()
        self.in_head = True
        stop_keepalive_timer(self)
        try:
            rest = self._parse(data)
            while rest:
                rest = self._parse(rest)
        except HttpParserError:
            self._refuse_request(self.refusal)
        self.head = self.head + len(data) if self.in_head else 0
        if self.head > HEAD_BYTES and not self.transport.is_closing():
            self._refuse_request(_head_too_large())

    def _parse(self, data: bytes) -> bytes:
        """The data that is left where the parser stops: behind a head that offers an upgrade.

        The parser has taken that for the end of the request, and would read the body as the next
        one. So a new parser reads the head once more, without the offer. Raises HttpParserError.
        """
        try:
            self.parser.feed_data(data)
            return b""
        except HttpParserUpgrade as stop:
            head = self._head_without_offer()
            self.parser = HttpRequestParser(self)
            self.parser.feed_data(head)
            return data[stop.args[0] :]

    def _head_without_offer(self) -> bytes:
        version = self.parser.get_http_version().encode()
        line = b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)
        headers = [name + b": " + value for name, value in self.headers if name != b"upgrade"]
        return b"\r\n".join([line, *headers, b"", b""])

    def on_message_begin(self) -> None:
        self.in_request = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Raises `refusal`, which the parser passes on as an error of its own."""
        self.in_head = False
        self._start_timer()
        header_bytes = sum(len(name) + len(value) for name, value in self.headers)
        if len(self.url) + header_bytes > HEAD_BYTES:
            self.refusal = _head_too_large()
            raise self.refusal
        if self.parser.get_method() == b"CONNECT":
            self.refusal = TUNNEL
            raise self.refusal
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            # Behind the body come trailers, which are no headers of the request
            self.headers = []

    def on_body(self, body: bytes) -> None:
        self.in_head = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self.in_request = self.in_head = False
        # Else uvicorn starts its own timer no more
        if self.cycle is None or not self.cycle.response_complete:
            self._stop_timer()
        super().on_message_complete()

    @property
    def _expects_body(self) -> bool:
        """Whether the rest of a body is still of use: that of a request which was answered without
        it is not.
        """
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    @property
    def _owes_answer(self) -> bool:
        """Whether a whole request waits for its answer, so that nothing waits for the client."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _start_timer(self) -> None:
        self._stop_timer()
        self.piece = 0
        self.timer = self.loop.call_later(PATIENCE_S, self._on_expired)

    def _stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _on_expired(self) -> None:
        """Refuses a request that is late; a client is not while the service reads nothing or owes it an
        answer.

        A connection without a request, or with an answer begun, is closed without an error.
        """
        answered = self.cycle is not None and self.cycle.response_started
        if self.flow.read_paused or self._owes_answer:
            self._start_timer()
        elif self.in_request and (self.head or not answered):
            rest = f"the rest of the request, or the next {PIECE_BYTES} bytes of it,"
            self._refuse_request(TooSlow(f"{rest} did not come within {PATIENCE_S:g} s"))
        else:
            self.transport.close()

    def _on_unread(self, before: int) -> None:
        """Ends the connection if the client has taken nothing since: it would hold an answer, and the
        answer's adapter, for ever.
        """
        left = self.transport.get_write_buffer_size()
        if left == before:
            self.transport.abort()
        else:
            self.unread = self.loop.call_later(PATIENCE_S, self._on_unread, left)

    def _refuse_request(self, error: AdapterdError) -> None:
        """Closes, and sends the error where it cannot pass for another request's answer, or stand
        within one.
        """
        cycle = self.cycle
        if self._owes_answer:
            cycle.keep_alive = False  # the answer that is owed is the last
            return
        if cycle is None or cycle.response_complete:
            metrics.FAILURE.labels(error.code).inc()
        else:  # the layers behind only see the client leave
            cycle.scope["state"]["refused"] = error
        within_answer = cycle is not None and cycle.more_body and cycle.response_started
        if cycle is None or not (self.pipeline or within_answer):
            self._send_error(error)
        self.transport.close()

    def _send_error(self, error: AdapterdError) -> None:
        url = getattr(self, "url", b"").decode("latin-1")
        content = json.dumps(body_at(error, url.partition("?")[0])).encode()
        # A 400 in either dialect where there is no request
        line = STATUS_LINE[status_of(error, openai=True)]
        kind = b"content-type: application/json\r\nx-content-type-options: nosniff\r\n"
        end = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(b"".join([line, kind, end, content]))


def _head_too_large() -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the request's headers are over the limit of {HEAD_BYTES} bytes", details={"limit_bytes": HEAD_BYTES}
    )
