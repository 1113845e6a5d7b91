"""Refuses new requests while the service drains, and counts those that run, as plain ASGI.

API process; must not know a route's meaning.
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
    """Counts what runs in `services.running`; once the service drains, only the probes are still
    answered.
    """

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self.app, self.services = app, services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in PROBES:
            return await self.app(scope, receive, send)
        if self.services.draining:
            closing = NotReady("the service is shutting down; ask another one", retry_after=5)
            return await refuse_request(closing, scope, receive, send, {"connection": "close"})
        with self._count_request():
            return await self.app(scope, receive, send)

    @contextmanager
    def _count_request(self) -> Iterator[None]:
        self.services.running += 1
        try:
            yield
        finally:
            self.services.running -= 1
