"""The composition root: settings → services → FastAPI; starts and stops the services.

API process; must not know a route's meaning or a tensor.
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
from .api.middleware.body_encoding import BodyEncoding
from .api.middleware.body_limit import BodyLimit
from .api.middleware.cors import CorsOrigins
from .api.middleware.drain import DrainGate
from .api.middleware.rate_limit import RateLimit
from .api.routes import (
    adapters,
    aliases,
    generate,
    messages,
    models,
    ops,
    responses,
    sglang_lora,
    tokens,
    usage,
)
from .api.services import Services
from .settings import Settings
from .telemetry import metrics
from .threads import DISK, run_in

if TYPE_CHECKING:
    from .api.protocols import AdapterRegistry, EngineClient
    from .telemetry.traces import Trace
    from .text.tokenizers import Tokenizers

log = logging.getLogger("adapterd")

ROUTERS = (
    ops.probes,
    ops.measures,
    generate.router,
    models.router,
    responses.router,
    messages.router,
    tokens.router,
    adapters.reading,
    adapters.changing,
    aliases.router,
    sglang_lora.router,
    usage.router,
    ops.router,
)
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
    client: EngineClient | None = None,
    registry: AdapterRegistry | None = None,
    *,
    text: Callable[[str], Tokenizers] = _load_tokenizers,
    on_failure: Callable[[str], None] = log.error,
    record: Callable[[Trace], None] | None = None,
) -> FastAPI:
    """The service as an ASGI application; a client or registry that is not given is made.

    `on_failure` gets the reason why the base can never be served, `record` every finished request.
    """
    services = _make_services(settings, client, registry)
    metrics.NAMES.most = metrics.ALIASES.most = settings.metrics_adapters
    app = Service(
        title="adapterd",
        version=__version__,
        description="One quantized base model, hundreds of LoRA adapters, mixed freely in every batch.",
        lifespan=_make_lifespan(services, text, on_failure),
        middleware=_make_middleware(services, record),
        redirect_slashes=False,
        default_response_class=JsonAnswer,
        servers=[{"url": "."}],  # beside the description, so that it holds behind a proxy's prefix, too
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    errors.install_handlers(app)
    for router in ROUTERS:
        app.include_router(router)
    return app


def _make_middleware(services: Services, record: Callable[[Trace], None] | None) -> list[Middleware]:
    """The outermost first.

    Other sites' pages are let in before keys are checked, since a browser sends its preflight
    without one.
    """
    settings = services.settings
    limit = Middleware(BodyLimit, body_mb=settings.max_body_mb, upload_mb=settings.max_upload_mb)
    return [
        Middleware(AccessLog, record=record),
        *_make_cors(settings),
        Middleware(DrainGate, services=services),
        Middleware(Authentication, settings=settings),
        Middleware(RateLimit, settings=settings),
        limit,
        Middleware(BodyEncoding),
        limit,
    ]


def _make_cors(settings: Settings) -> list[Middleware]:
    if not settings.cors_origins:
        return []
    cors = Middleware(
        CorsOrigins,
        allow_origins=settings.cors_origins,
        allow_methods=METHODS,
        allow_headers=["*"],  # whichever an origin that may ask asks for
        expose_headers=EXPOSED,
    )
    return [cors]


class Service(FastAPI):
    """FastAPI with an OpenAPI description that also says how a key is sent, and that OpenAI's dialect
    has no 422.
    """

    def openapi(self) -> dict[str, Any]:
        description = super().openapi()
        description["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        description["security"] = [{"key": []}, {}]
        for path in filter(errors.openai_dialect, description["paths"]):
            for operation in description["paths"][path].values():
                operation["responses"].pop("422", None)
        return description


def _make_services(
    settings: Settings, client: EngineClient | None, registry: AdapterRegistry | None
) -> Services:
    if client is None:
        client = _make_client(settings)
    if registry is None:
        from .catalog.registry import Registry

        adapters = Registry(settings, device=client)
        client.watch_loads(adapters.note_load)
        registry = adapters
    return Services(settings, client, registry)


def _make_client(settings: Settings) -> EngineClient:
    if len(settings.devices) > 1:
        from .worker.router import DeviceRouter

        return DeviceRouter(settings)
    from .worker.client import WorkerClient

    return WorkerClient(settings)


def _make_lifespan(
    services: Services, text: Callable[[str], Tokenizers], on_failure: Callable[[str], None]
) -> Callable[[FastAPI], Any]:
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await services.client.start_worker()
        opening = asyncio.create_task(_open_services(services, text, on_failure))
        yield
        opening.cancel()
        with suppress(asyncio.CancelledError):
            await opening
        services.draining = True
        await _close_services(services)

    return lifespan


async def _close_services(services: Services) -> None:
    closing = [services.registry.close(), services.client.stop_worker(0)]
    if services.loaded_tokenizers is not None:
        closing.append(services.loaded_tokenizers.close())
    for outcome in await asyncio.gather(*closing, return_exceptions=True):
        if isinstance(outcome, BaseException):
            log.error("a room did not close", exc_info=outcome)
    await services.usage.close()  # once all requests have ended


async def _open_services(
    services: Services, text: Callable[[str], Tokenizers], on_failure: Callable[[str], None]
) -> None:
    """Waits for the base, then opens what needs it. Listening goes on meanwhile."""
    try:
        await asyncio.gather(services.client.wait_ready(), services.registry.start_validator())
        base = services.client.base
        assert base is not None, "a ready client has the base's card"
        opening = services.registry.open_catalog()
        services.loaded_tokenizers, _ = await asyncio.gather(run_in(DISK, text, base.folder), opening)
        services.opened = True
        fields = {"base": services.registry.base_id, "adapters": len(services.registry.list_cards())}
        log.info("ready", extra={"fields": fields})
    except Exception as error:
        services.failure = services.client.reason or str(error) or type(error).__name__
        log.debug("the base cannot be served", exc_info=True)
        on_failure(services.failure)
