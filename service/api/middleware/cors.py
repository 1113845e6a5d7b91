"""Which pages of other sites may ask. Plain ASGI; knows no route."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from ...errors import Forbidden
from .refusal import refuse_request

ELSEWHERE = Forbidden("a page of another site may not ask for this")


class CorsOrigins(CORSMiddleware):
    """Lets pages of the named origins ask, and tells the browsers of all others as every refusal is
    told.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (
            scope["type"] == "http"
            and scope["method"] == "OPTIONS"
            and self._is_unwelcome(Headers(scope=scope))
        ):
            return await refuse_request(ELSEWHERE, scope, receive, send)
        return await super().__call__(scope, receive, send)

    def _is_unwelcome(self, headers: Headers) -> bool:
        asks = "origin" in headers and "access-control-request-method" in headers
        return asks and self.preflight_response(headers).status_code != 200
