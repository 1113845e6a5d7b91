"""The ingress of the cluster: reads each request whole, finds an engine that knows its adapter, and
passes the answer on as it comes.

Engines refuse and answer; what is said here is only that there is none, or that one died in the
middle.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from fastapi import FastAPI, Request, Response
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api import errors
from service.api.generation.sse import end_frames
from service.api.middleware.access_log import AccessLog
from service.api.middleware.body_limit import BodyLimit
from service.errors import NotReady
from service.settings import Settings
from service.telemetry import logs

from .call import Call, call
from .exposition import merged

ENGINE = "engine"
PROBES = ("/health", "/ready")
PROBE_S = 5.0
ATTEMPTS = 2
LOST = (RayError, RayServeException)
METRICS = {"content-type": "text/plain; version=0.0.4; charset=utf-8"}


class Answer(Response):
    """An engine's answer, message by message; ends the work there when the client leaves."""

    def __init__(self, engines: DeploymentHandle[Any], asked: Call, settings: Settings) -> None:
        self.engines, self.asked, self.settings = engines, asked, settings
        self.background = None
        self.started: Message | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        passing = asyncio.create_task(self._pass_on(scope, send))
        leaving = asyncio.create_task(_left(receive))
        try:
            await asyncio.wait((passing, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not passing.done():
                passing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await passing

    async def _pass_on(self, scope: Scope, send: Send) -> None:
        """Asks another engine when one dies before it has said anything, where that does no harm."""
        for _ in range(ATTEMPTS):
            try:
                return await self._once(send)
            except TimeoutError:
                break
            except LOST:
                if self.started is not None or not self.asked.repeatable:
                    break
        return await self._end(scope, send)

    async def _once(self, send: Send) -> None:
        async with contextlib.aclosing(self._messages()) as messages:
            async for message in messages:
                self.started = self.started or message
                await send(message)

    async def _messages(self) -> AsyncGenerator[Message, None]:
        """The engine's messages."""
        messages = self._changed() if self.asked.changes else self._exchanged()
        async with contextlib.aclosing(messages):
            async for message in messages:
                yield message

    async def _changed(self) -> AsyncGenerator[Message, None]:
        """The messages of a change: all engines have followed it before its answer begins."""
        async for message in self._exchanged():
            if message is None or message["type"] == "http.response.start":
                await self.engines.broadcast("follow").results_async(return_exceptions=True)
            if message is not None:
                yield message

    async def _exchanged(self) -> AsyncGenerator[Any, None]:
        handle = self.engines.options(stream=True, multiplexed_model_id=self.asked.adapter)
        stream: DeploymentResponseGenerator[Any] = handle.exchange.remote(self.asked)
        try:
            limit = PROBE_S if self.asked.scope["path"] in PROBES else None
            async with asyncio.timeout(limit):
                first = await anext(stream)
            yield first
            async for message in stream:
                yield message
        finally:
            stream.cancel()

    async def _end(self, scope: Scope, send: Send) -> None:
        """The engine is gone: an error, or where the answer had begun, an error event; a body that
        is cut cannot be mended.
        """
        error = NotReady("the engine that ran this request is gone; ask again", retry_after=1)
        if self.started is None:
            await errors.error_response(error, scope)(scope, _nothing, send)
        elif b"text/event-stream" in dict(self.started["headers"]).get(b"content-type", b""):
            errors.note_error(error, scope)
            last = end_frames(error, scope["path"])
            await send({"type": "http.response.body", "body": last, "more_body": False})


class Named:
    """Serve puts the request's id on every answer; without this there would be two."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def once(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self.app(scope, receive, once)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nothing() -> Message:
    return {"type": "http.disconnect"}


@serve.ingress()
class Ingress:
    """Serve starts the engines first, for they are bound to it."""

    def __init__(self, engines: DeploymentHandle[Any], settings: Settings) -> None:
        self.engines, self.settings = engines, settings

    def __serve_build_asgi_app__(self) -> FastAPI:
        logs.set_up_logging(self.settings.log_format, self.settings.log_level)
        limits = {"body_mb": self.settings.max_body_mb, "upload_mb": self.settings.max_upload_mb}
        middleware = [Middleware(Named), Middleware(AccessLog), Middleware(BodyLimit, **limits)]
        no_pages: dict[str, Any] = {"docs_url": None, "redoc_url": None, "openapi_url": None}
        app = FastAPI(middleware=middleware, redirect_slashes=False, **no_pages)
        errors.install_handlers(app)
        app.add_route("/metrics", self.metrics, methods=["GET"])
        app.add_route("/{path:path}", self.any_other, methods=list(errors.METHODS))
        return app

    async def any_other(self, request: Request) -> Response:
        return Answer(self.engines, call(request.scope, await request.body(), self.settings), self.settings)

    async def metrics(self, request: Request) -> Response:
        """All engines' metrics, each sample with its replica; one engine is asked first, for it
        knows the keys.
        """
        asked = call(request.scope, b"", self.settings)
        stream = self.engines.options(stream=True).exchange.remote(asked)
        first = await anext(stream)
        stream.cancel()
        if first["status"] != 200:
            return Answer(self.engines, asked, self.settings)
        texts = await self.engines.broadcast("exposition").results_async(return_exceptions=True)
        by_replica = dict(text for text in texts if not isinstance(text, BaseException))
        return Response(merged(by_replica), headers=METRICS)
