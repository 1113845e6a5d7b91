"""Answers with an error from within a middleware, before any route.

API process; must not know a route.
"""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from ...errors import AdapterdError
from ..errors import error_response


async def refuse_request(
    error: AdapterdError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None
) -> None:
    await error_response(error, scope, headers)(scope, receive, send)
