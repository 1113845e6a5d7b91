"""Decodes request bodies in gzip and deflate, as plain ASGI. API process; must not know a route's meaning.

It stands between two limits: of the bytes that come, and of those that they decode to.
"""

from __future__ import annotations

import zlib
from collections import deque

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import BadRequest, UnsupportedEncoding
from .refusal import refuse_request

PIECE_BYTES = 256 * 1024  # decoded at a time
PLAIN = ("", "identity")
ZIPPED = ("gzip", "x-gzip", "deflate")
BROKEN = "the body is not what its content-encoding says: it is broken, or goes on behind its end"
GZIP, ZLIB, RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS


class BodyEncoding:
    """Lets the layers behind it see a body as if it had come without an encoding."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        encoding = Headers(scope=scope).get("content-encoding", "") if scope["type"] == "http" else ""
        encoding = encoding.strip().lower()
        if encoding in PLAIN:
            return await self.app(scope, receive, send)
        if encoding not in ZIPPED:
            message = f"content-encoding: {encoding[:40]!r} is not served; gzip, deflate and identity are"
            return await refuse_request(UnsupportedEncoding(message), scope, receive, send)
        scope = {**scope, "headers": list(scope["headers"])}
        headers = MutableHeaders(scope=scope)
        del headers["content-encoding"]
        del headers["content-length"]
        return await self.app(scope, BodyDecoder(receive, encoding == "deflate").receive, send)


class BodyDecoder:
    """The messages of one request, its body decoded."""

    def __init__(self, receive: Receive, is_deflate: bool) -> None:
        self._receive, self._is_deflate = receive, is_deflate
        self._decoder = None if is_deflate else zlib.decompressobj(GZIP)
        self._waiting: deque[bytes] = deque()  # what came and is not decoded yet
        self._has_more = True

    async def receive(self) -> Message:
        """The next message. Raises BadRequest where the body is broken."""
        if not self._waiting:
            message = await self._receive()
            if message["type"] != "http.request":
                return message
            self._has_more = message.get("more_body", False)
            self._waiting.append(message.get("body", b""))
        piece = self._decode_piece(self._waiting.popleft())
        if not self._has_more and not self._waiting:
            self._check_end()
        return {"type": "http.request", "body": piece, "more_body": self._has_more or bool(self._waiting)}

    def _decode_piece(self, data: bytes) -> bytes:
        if not data and self._decoder is None:
            return b""
        if self._decoder is None:
            self._decoder = zlib.decompressobj(ZLIB if _begins_zlib(data) else RAW)
        try:
            piece = self._decoder.decompress(data, PIECE_BYTES)
        except zlib.error:
            raise BadRequest(BROKEN) from None
        if self._decoder.unused_data:
            raise BadRequest(BROKEN)
        if self._decoder.unconsumed_tail:
            self._waiting.appendleft(self._decoder.unconsumed_tail)
        return piece

    def _check_end(self) -> None:
        if self._decoder is None or not self._decoder.eof:
            raise BadRequest(BROKEN)


def _begins_zlib(data: bytes) -> bool:
    """Whether the data has zlib's header, which deflate has by its standard; some send it without."""
    return data[0] & 0x0F == 8 and (len(data) < 2 or (data[0] << 8 | data[1]) % 31 == 0)
