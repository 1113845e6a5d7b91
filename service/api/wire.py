"""The HTTP/1.1 protocol with an end to its headers: uvicorn's own lets them grow for ever. What cannot be read is told as JSON, too.

Knows bytes and one connection; no route, no key.
"""

from __future__ import annotations

import json

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from .. import metrics
from ..errors import AdapterdError, BadRequest, PayloadTooLarge
from .errors import body, openai_dialect

HEAD_BYTES = 64 * 1024  # of a request line and its headers
UNREADABLE = BadRequest("this is no HTTP/1.1 request")


class Protocol(HttpToolsProtocol):
    """Refuses a head over `HEAD_BYTES` with 413, also one that never ends, and closes the connection."""

    head = 0  # bytes of a head that has not ended yet
    reading = False
    refusal: AdapterdError | None = None

    def data_received(self, data: bytes) -> None:
        self.reading = True
        super().data_received(data)
        self.head = self.head + len(data) if self.reading else 0
        if self.head > HEAD_BYTES and not self.transport.is_closing():
            self._refuse(_over())

    def on_headers_complete(self) -> None:
        """Raises PayloadTooLarge, which the parser passes on as an error of its own."""
        self.reading = False
        if len(self.url) + sum(len(name) + len(value) for name, value in self.headers) > HEAD_BYTES:
            self.refusal = _over()
            raise self.refusal
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self.reading = False
        super().on_body(body)

    def on_message_complete(self) -> None:
        self.reading = False
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(self.refusal or UNREADABLE)

    def _refuse(self, error: AdapterdError) -> None:
        metrics.FAILURE.labels(error.code).inc()
        url = getattr(self, "url", b"").decode("latin-1")
        content = json.dumps(body(error, openai_dialect(url))).encode()
        status = 413 if isinstance(error, PayloadTooLarge) else 400
        head = [STATUS_LINE[status], b"content-type: application/json\r\n", b"content-length: %d\r\n" % len(content)]
        self.transport.write(b"".join([*head, b"x-content-type-options: nosniff\r\nconnection: close\r\n\r\n", content]))
        self.transport.close()


def _over() -> PayloadTooLarge:
    return PayloadTooLarge(f"the request's headers are over the limit of {HEAD_BYTES} bytes", details={"limit_bytes": HEAD_BYTES})
