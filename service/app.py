"""The composition root: settings → rooms → FastAPI.

Starts and stops the rooms; knows no route's meaning and no tensor.
"""

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
from .api.generation.sse import JsonAnswer
from .api.middleware.access_log import AccessLog
from .api.middleware.authentication import Authentication
from .api.middleware.body_limit import BodyLimit
from .api.middleware.cors import CorsOrigins
from .api.middleware.drain import DrainGate
from .api.middleware.rate_limit import RateLimit
from .api.routes import adapters, generate, models, ops
from .api.services import Services
from .settings import Settings
from .telemetry import metrics
from .threads import DISK, run_in

if TYPE_CHECKING:
    from .catalog.registry import Registry
    from .telemetry.traces import Trace
    from .text.tokenizers import Tokenizers
    from .worker.client import WorkerClient

log = logging.getLogger("adapterd")

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
EXPOSED = (
    "x-request-id",
    "x-adapter-id",
    "x-adapter-digest",
    "x-prompt-tokens",
    "x-generated-tokens",
    "retry-after",
)


def _load_tokenizers(folder: str) -> Tokenizers:
    from .text.tokenizers import Tokenizers

    return Tokenizers(folder)


def create_app(
    settings: Settings,
    client: WorkerClient | None = None,
    registry: Registry | None = None,
    *,
    text: Callable[[str], Tokenizers] = _load_tokenizers,
    on_failure: Callable[[str], None] = log.error,
    record: Callable[[Trace], None] | None = None,
) -> FastAPI:
    """The service as an ASGI application; a room that is not handed in is made.

    `on_failure` is told why the base can never be served, `record` of every finished request.
    """
    rooms = _make_services(settings, client, registry)
    metrics.NAMES.most = settings.metrics_adapters
    app = Service(
        title="adapterd",
        version=__version__,
        description="One quantized base model, hundreds of LoRA adapters, mixed freely in every batch.",
        lifespan=_make_lifespan(rooms, text, on_failure),
        middleware=_make_middleware(rooms, record),
        redirect_slashes=False,
        default_response_class=JsonAnswer,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.rooms = rooms
    errors.install_handlers(app)
    for part in (ops.probes, generate.router, models.router, adapters.reading, adapters.changing, ops.router):
        app.include_router(part)
    return app


def _make_middleware(rooms: Services, record: Callable[[Trace], None] | None) -> list[Middleware]:
    """The outermost first.

    Other sites' pages are let in before keys are asked for, since a browser asks without one
    whether it may ask.
    """
    settings = rooms.settings
    cors = Middleware(
        CorsOrigins,
        allow_origins=settings.cors_origins,
        allow_methods=METHODS,
        allow_headers=["authorization", "content-type", "x-request-id"],
        expose_headers=EXPOSED,
    )
    return [
        Middleware(AccessLog, record=record),
        *([cors] if settings.cors_origins else []),
        Middleware(DrainGate, rooms=rooms),
        Middleware(Authentication, settings=settings),
        Middleware(RateLimit, settings=settings),
        Middleware(BodyLimit, body_mb=settings.max_body_mb, upload_mb=settings.max_upload_mb),
    ]


class Service(FastAPI):
    """FastAPI, but its description of itself says what is so: how a key is sent, and that OpenAI's
    dialect has no 422.
    """

    def openapi(self) -> dict[str, Any]:
        told = super().openapi()
        told["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        told["security"] = [{"key": []}, {}]
        for path in filter(errors.openai_dialect, told["paths"]):
            for operation in told["paths"][path].values():
                operation["responses"].pop("422", None)
        return told


def _make_services(settings: Settings, client: WorkerClient | None, registry: Registry | None) -> Services:
    if client is None:
        from .worker.client import WorkerClient

        client = WorkerClient(settings)
    if registry is None:
        from .catalog.registry import Registry

        registry = Registry(settings, device=client)
        client.watch_loads(registry.note_load)
    return Services(settings, client, registry)


def _make_lifespan(
    rooms: Services, text: Callable[[str], Tokenizers], on_failure: Callable[[str], None]
) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await rooms.client.start_worker()
        opening = asyncio.create_task(_open_services(rooms, text, on_failure))
        yield
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
        rooms.draining = True
        renderers = [rooms.reader.close()] if rooms.reader else []
        for outcome in await asyncio.gather(
            rooms.registry.close(), rooms.client.stop_worker(0), *renderers, return_exceptions=True
        ):
            if isinstance(outcome, BaseException):
                log.error("a room did not close", exc_info=outcome)

    return lifespan


async def _open_services(
    rooms: Services, text: Callable[[str], Tokenizers], on_failure: Callable[[str], None]
) -> None:
    """Waits for the base, then opens what needs it. Listening goes on meanwhile."""
    try:
        await asyncio.gather(rooms.client.wait_ready(), rooms.registry.start_validator())
        assert rooms.client.base is not None, "a ready client has the base's card"
        rooms.reader, _ = await asyncio.gather(
            run_in(DISK, text, rooms.client.base.folder), rooms.registry.open_catalog()
        )
        rooms.opened = True
        log.info(
            "ready",
            extra={"fields": {"base": rooms.registry.base_id, "adapters": len(rooms.registry.list_cards())}},
        )
    except Exception as error:
        rooms.failure = rooms.client.reason or str(error) or type(error).__name__
        log.debug("the base cannot be served", exc_info=True)
        on_failure(rooms.failure)
