"""The composition root: settings → rooms → FastAPI. Starts and stops the rooms; knows no route's meaning and no tensor."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.middleware import Middleware

from . import __version__
from .api import errors
from .api.generation.sse import Json
from .api.middleware.access_log import Access
from .api.middleware.authentication import Keys
from .api.middleware.body_limit import Bodies
from .api.middleware.cors import Origins
from .api.middleware.drain import Gate
from .api.middleware.rate_limit import Quotas
from .api.routes import adapters, generate, models, ops
from .api.services import Rooms
from .settings import Settings
from .telemetry import metrics
from .threads import DISK, run_in

if TYPE_CHECKING:
    from .catalog.registry import Registry
    from .telemetry.traces import Trace
    from .text.tokenizers import Text
    from .worker.client import Client

log = logging.getLogger("adapterd")

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
EXPOSED = ("x-request-id", "x-adapter-id", "x-adapter-digest", "x-prompt-tokens", "x-generated-tokens", "retry-after")


def _text(folder: str) -> Text:
    from .text.tokenizers import Text

    return Text(folder)


def create_app(
    settings: Settings,
    client: Client | None = None,
    registry: Registry | None = None,
    *,
    text: Callable[[str], Text] = _text,
    on_failure: Callable[[str], None] = log.error,
    record: Callable[[Trace], None] | None = None,
) -> FastAPI:
    """The service as an ASGI application; a room that is not handed in is made.

    `on_failure` is told why the base can never be served, `record` of every finished request.
    """
    rooms = _rooms(settings, client, registry)
    metrics.NAMES.most = settings.metrics_adapters
    app = Service(
        title="adapterd",
        version=__version__,
        description="One quantized base model, hundreds of LoRA adapters, mixed freely in every batch.",
        lifespan=_lifespan(rooms, text, on_failure),
        middleware=_layers(rooms, record),
        redirect_slashes=False,
        default_response_class=Json,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.rooms = rooms
    errors.install(app)
    for part in (ops.probes, generate.router, models.router, adapters.reading, adapters.changing, ops.router):
        app.include_router(part)
    return app


def _layers(rooms: Rooms, record: Callable[[Trace], None] | None) -> list[Middleware]:
    """The outermost first. Other sites' pages are let in before keys are asked for, since a browser asks without one whether it may ask."""
    settings = rooms.settings
    cors = Middleware(
        Origins,
        allow_origins=settings.cors_origins,
        allow_methods=METHODS,
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=EXPOSED,
    )
    return [
        Middleware(Access, record=record),
        *([cors] if settings.cors_origins else []),
        Middleware(Gate, rooms=rooms),
        Middleware(Keys, settings=settings),
        Middleware(Quotas, settings=settings),
        Middleware(Bodies, body_mb=settings.max_body_mb, upload_mb=settings.max_upload_mb),
    ]


class Service(FastAPI):
    """FastAPI, but its description of itself says what is so: how a key is sent, and that OpenAI's dialect has no 422."""

    def openapi(self) -> dict[str, Any]:
        told = super().openapi()
        told["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"key": []}, {}]
        for path in filter(errors.openai_dialect, told["paths"]):
            for operation in told["paths"][path].values():
                operation["responses"].pop("422", None)
        return told


def _rooms(settings: Settings, client: Client | None, registry: Registry | None) -> Rooms:
    if client is None:
        from .worker.client import Client

        client = Client(settings)
    if registry is None:
        from .catalog.registry import Registry

        registry = Registry(settings, device=client)
        client.watch(registry.note)
    return Rooms(settings, client, registry)


def _lifespan(rooms: Rooms, text: Callable[[str], Text], on_failure: Callable[[str], None]) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await rooms.client.start()
        opening = asyncio.create_task(_open(rooms, text, on_failure))
        yield
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
        rooms.draining = True
        renderers = [rooms.reader.close()] if rooms.reader else []
        for outcome in await asyncio.gather(rooms.registry.close(), rooms.client.stop(0), *renderers, return_exceptions=True):
            if isinstance(outcome, BaseException):
                log.error("a room did not close", exc_info=outcome)

    return lifespan


async def _open(rooms: Rooms, text: Callable[[str], Text], on_failure: Callable[[str], None]) -> None:
    """Waits for the base, then opens what needs it. Listening goes on meanwhile."""
    try:
        await asyncio.gather(rooms.client.wait_ready(), rooms.registry.warm())
        assert rooms.client.base is not None, "a ready client has the base's card"
        rooms.reader, _ = await asyncio.gather(run_in(DISK, text, rooms.client.base.folder), rooms.registry.open())
        rooms.opened = True
        log.info("ready", extra={"fields": {"base": rooms.registry.base_id, "adapters": len(rooms.registry.cards())}})
    except Exception as error:
        rooms.failure = rooms.client.reason or str(error) or type(error).__name__
        log.debug("the base cannot be served", exc_info=True)
        on_failure(rooms.failure)
