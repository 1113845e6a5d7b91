"""Lets no new request in while the service drains, and counts those inside.

Plain ASGI; knows no route's meaning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import NotReady
from ..errors import PROBES
from ..services import Services
from .refusal import refuse_request


class DrainGate:
    """Counts what runs in `rooms.running`; once the service drains, only the probes are still
    answered.
    """

    def __init__(self, app: ASGIApp, rooms: Services) -> None:
        self.app, self.rooms = app, rooms

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self.app(scope, receive, send)
        if self.rooms.draining:
            closing = NotReady("the service is shutting down; ask another one", retry_after=5)
            return await refuse_request(closing, scope, receive, send, {"connection": "close"})
        with self._count_request():
            return await self.app(scope, receive, send)

    @contextmanager
    def _count_request(self) -> Iterator[None]:
        self.rooms.running += 1
        try:
            yield
        finally:
            self.rooms.running -= 1
