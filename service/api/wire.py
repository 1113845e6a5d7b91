"""The HTTP/1.1 protocol with an end to what a client may take, in bytes, time and connections; what
cannot be read is told as JSON, too.

Knows bytes and one connection; no route, no key.
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
from .errors import error_body, openai_dialect, status_of

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

    So it does with who reads nothing. Over `most` connections, the oldest that waits for no answer
    goes for each that comes. An offered upgrade is ignored, and no tunnel is made: what follows a
    head is its body, and never the next request.
    """

    most: ClassVar[int] = CONNECTIONS
    everyone: ClassVar[OrderedDict[HttpProtocol, None]] = OrderedDict()
    begun = False  # a request that is not whole yet
    clock: asyncio.TimerHandle | None = None
    unread: asyncio.TimerHandle | None = None
    head = 0  # bytes of a head that has not ended yet
    piece = 0  # bytes since the clock was set
    reading = False
    refusal: AdapterdError = UNREADABLE  # of what the parser cannot read

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # So that it is known of each byte that waits for the client
        transport.set_write_buffer_limits(0)
        self._start_clock()
        if len(self.everyone) >= self.most:
            gone = next((one for one in self.everyone if not one._owing), self)
            self.everyone.pop(gone, None)
            gone.transport.abort()
        self.everyone[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_clock()
        self.everyone.pop(self, None)
        super().connection_lost(exc)  # tells that writing may go on

    def pause_writing(self) -> None:
        super().pause_writing()
        self.unread = self.loop.call_later(
            PATIENCE_S, self._on_unread, self.transport.get_write_buffer_size()
        )

    def resume_writing(self) -> None:
        if self.unread is not None:
            self.unread.cancel()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        self.piece += len(data)
        if self.clock is None or (self._owed and self.piece >= PIECE_BYTES):
            self._start_clock()
        self.reading = True
        self._unset_keepalive_if_required()
        try:
            rest = self._parse(data)
            while rest:
                rest = self._parse(rest)
        except HttpParserError:
            self._refuse_request(self.refusal)
        self.head = self.head + len(data) if self.reading else 0
        if self.head > HEAD_BYTES and not self.transport.is_closing():
            self._refuse_request(_head_too_large())

    def _parse(self, data: bytes) -> bytes:
        """What is left of the data where the parser stops: behind a head that offers an upgrade.

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
        self.begun = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Raises `refusal`, which the parser passes on as an error of its own."""
        self.reading = False
        self._start_clock()
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self.refusal = _head_too_large()
            raise self.refusal
        if self.parser.get_method() == b"CONNECT":
            self.refusal = TUNNEL
            raise self.refusal
        if not self.parser.should_upgrade():
            super().on_headers_complete()
            # What comes behind the body are trailers, and no headers of the request
            self.headers = []

    def on_body(self, body: bytes) -> None:
        self.reading = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        self.begun = self.reading = False
        # Else uvicorn starts its own clock no more
        if self.cycle is None or not self.cycle.response_complete:
            self._stop_clock()
        super().on_message_complete()

    @property
    def _owed(self) -> bool:
        """Whether the rest of a body is still of use: that of a request which was answered without
        it is not.
        """
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    @property
    def _owing(self) -> bool:
        """Whether a whole request waits for its answer, so that the client is waited for by nobody."""
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _start_clock(self) -> None:
        self._stop_clock()
        self.piece = 0
        self.clock = self.loop.call_later(PATIENCE_S, self._on_expired)

    def _stop_clock(self) -> None:
        if self.clock is not None:
            self.clock.cancel()
            self.clock = None

    def _on_expired(self) -> None:
        """While the service reads nothing, or owes an answer, nobody is late.

        Who asks for nothing, or was answered, is told nothing.
        """
        answered = self.cycle is not None and self.cycle.response_started
        if self.flow.read_paused or self._owing:
            self._start_clock()
        elif self.begun and (self.head or not answered):
            rest = f"the rest of the request, or the next {PIECE_BYTES} bytes of it,"
            self._refuse_request(TooSlow(f"{rest} did not come within {PATIENCE_S:g} s"))
        else:
            self.transport.close()

    def _on_unread(self, before: int) -> None:
        """Who has taken nothing since then holds an answer, and the adapter that it is of, for
        ever.
        """
        left = self.transport.get_write_buffer_size()
        if left == before:
            self.transport.abort()
        else:
            self.unread = self.loop.call_later(PATIENCE_S, self._on_unread, left)

    def _refuse_request(self, error: AdapterdError) -> None:
        """Closes, and says why where that cannot pass for another request's answer, or stand within
        one.
        """
        cycle = self.cycle
        if self._owing:
            cycle.keep_alive = False  # the answer that is owed is the last
            return
        if cycle is None or cycle.response_complete:
            metrics.FAILURE.labels(error.code).inc()
        else:  # the layers behind only see the client leave
            cycle.scope["state"]["refused"] = error
        if cycle is None or not (self.pipeline or (cycle.more_body and cycle.response_started)):
            self._tell(error)
        self.transport.close()

    def _tell(self, error: AdapterdError) -> None:
        url = getattr(self, "url", b"").decode("latin-1")
        content = json.dumps(error_body(error, openai_dialect(url))).encode()
        # For what is no request, 400 in either dialect
        line = STATUS_LINE[status_of(error, openai=True)]
        kind = b"content-type: application/json\r\nx-content-type-options: nosniff\r\n"
        end = b"content-length: %d\r\nconnection: close\r\n\r\n" % len(content)
        self.transport.write(b"".join([line, kind, end, content]))


def _head_too_large() -> PayloadTooLarge:
    return PayloadTooLarge(
        f"the request's headers are over the limit of {HEAD_BYTES} bytes", details={"limit_bytes": HEAD_BYTES}
    )
