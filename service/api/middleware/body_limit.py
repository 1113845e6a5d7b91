"""Limits on body sizes, as plain ASGI. API process; must not know a route's meaning."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import PayloadTooLarge
from .refusal import refuse_request


class BodyLimit:
    """Refuses a body over its limit: at once where its length is declared, else when the limit is
    passed. Uploads have their own.
    """

    def __init__(self, app: ASGIApp, body_mb: float, upload_mb: float) -> None:
        self.app, self.body_mb, self.upload_mb = app, body_mb, upload_mb

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit_mb = self.upload_mb if _is_upload(scope) else self.body_mb
        limit = int(limit_mb * 1e6)
        message = f"the body is over the limit of {limit_mb:g} MB"
        over = PayloadTooLarge(message, details={"limit_bytes": limit})
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > limit:
            return await refuse_request(over, scope, receive, send)
        return await self.app(scope, _meter_body(receive, limit, over), send)


def _is_upload(scope: Scope) -> bool:
    path: str = scope["path"]
    is_upload_path = path.startswith("/adapters/") and path.endswith("/upload")
    return is_upload_path and scope["method"] in ("POST", "PUT")


def _meter_body(receive: Receive, limit: int, over: PayloadTooLarge) -> Receive:
    left = limit

    async def metered() -> Message:
        nonlocal left
        message = await receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise over
        return message

    return metered
