"""Answers with an error from within a layer, before any route. Knows no route."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from ...errors import AdapterdError
from ..errors import response


async def refuse(error: AdapterdError, scope: Scope, receive: Receive, send: Send, headers: dict[str, str] | None = None) -> None:
    await response(error, scope, headers)(scope, receive, send)
