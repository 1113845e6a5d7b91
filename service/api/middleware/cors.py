"""Admits requests of other sites' pages by their origin, as plain ASGI.

API process; must not know a route.
"""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from ...errors import Forbidden
from .refusal import refuse_request

CROSS_SITE = Forbidden("a page of another site may not ask for this")


class CorsOrigins(CORSMiddleware):
    """Lets pages of the named origins send requests, and answers the browsers of all others with the
    error body that every refusal has.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_options = scope["type"] == "http" and scope["method"] == "OPTIONS"
        if is_options and self._is_refused_preflight(Headers(scope=scope)):
            return await refuse_request(CROSS_SITE, scope, receive, send)
        return await super().__call__(scope, receive, send)

    def _is_refused_preflight(self, headers: Headers) -> bool:
        is_preflight = "origin" in headers and "access-control-request-method" in headers
        return is_preflight and self.preflight_response(headers).status_code != 200
