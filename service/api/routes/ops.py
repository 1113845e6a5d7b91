"""The routes of operators and browsers:
liveness, readiness, metrics, versions, the served base, the pages. API process; must not change
anything.
"""

from __future__ import annotations

import platform
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import FileResponse
from starlette.staticfiles import StaticFiles

from ... import __version__
from ...core import capacity
from ...core.base_info import BLOCK_TOKENS, BaseInfo, LinearKind
from ...core.messages import Gauges
from ...errors import NotFound, NotReady
from ...telemetry import gpu, metrics
from ...threads import DEVICE, DISK, run_in
from ..errors import document_errors
from ..generation.sse import JsonAnswer
from ..scopes import KEY_SCOPE, METRICS_SCOPE, PUBLIC_SCOPE
from ..services import AdapterScope, AnyServices, OpenRegistry, Services, VisibleAdapters

probes = APIRouter(tags=["operations"], dependencies=[PUBLIC_SCOPE])
measures = APIRouter(tags=["operations"], dependencies=[METRICS_SCOPE])
router = APIRouter(tags=["operations"], dependencies=[KEY_SCOPE])

PAGES = Path(__file__).parents[1] / "static"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "llguidance", "fastapi", "uvicorn")
CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
SAME_ORIGIN = CLOSED + "script-src 'self'; connect-src 'self'; font-src 'self'; "
CONSOLE = SAME_ORIGIN + "style-src 'self'; img-src 'self' data:"
# Its script writes style attributes
SWAGGER = SAME_ORIGIN + "style-src 'self' 'unsafe-inline'; img-src 'self' data:"
JsonDict = dict[str, Any]


@probes.get("/health", responses=document_errors(503))
async def show_health(services: AnyServices) -> JsonDict:
    """Liveness: 200 while the process can recover by itself, whatever the worker does."""
    health = {"state": services.state, "reason": services.reason, **load_progress(services)}
    if services.state == "failed":
        raise NotReady(f"failed: {services.reason}", details=health)
    return health


@probes.get("/ready", responses=document_errors(503))
async def show_ready(services: AnyServices) -> JsonDict:
    """200 only when a request would be served now."""
    services.require_ready()
    return {"state": "ready"}


def load_progress(services: Services) -> JsonDict:
    client = services.client
    if client.state != "loading":
        return {}
    return {"stage": client.stage, "fraction": client.fraction}


FORMATS: dict[int | str, JsonDict] = {
    200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}
}


@measures.get("/metrics", responses=document_errors() | FORMATS)
async def show_metrics(request: Request, services: AnyServices, scope: VisibleAdapters) -> Response:
    """Prometheus text, or OpenMetrics where `Accept` asks for it.

    A key with a list of adapters gets no series that name adapters.
    """
    metrics.set_gpus(await run_in(DEVICE, gpu.read_gpus))
    if services.settings.lora_requests_info == "on" and services.opened:
        export_lora_info(services)
    content, kind = metrics.render_metrics(request.headers.get("accept", ""), named=scope.whole)
    return Response(content, headers={"content-type": kind})


def export_lora_info(services: Services) -> None:
    """Exports the adapters that would be served without a wait for their weights, as the protocol
    between model servers and the endpoint picker says.

    The pool has no fixed number of adapters: those in it count, and as many as its free ranks hold
    of the largest one.
    """
    cards, client = services.registry.list_cards(), services.client
    running = {card["id"] for card in cards if card["digest"] and client.is_resident(card["digest"])}
    waiting = {card["id"] for card in cards if card["digest"] in client.awaited} - running
    free = (_count_pool_rows(services, client.base) if client.base else 0) - client.gauges.pool_used
    largest = max((card["rank"] or 0 for card in cards), default=0)
    loaded = ((card["id"], card["residency"], card["pinned"], card["rank"] or 0) for card in cards)
    metrics.show_loaded(loaded)
    metrics.lora_info(len(running) + free // max(1, largest), running, waiting)


@router.get("/info", responses=document_errors())
async def show_info(services: AnyServices, scope: VisibleAdapters) -> JsonDict:
    """Versions, the settings without secrets, and the base where it is loaded."""
    versions = {"adapterd": __version__, "python": platform.python_version()}
    libraries = {name: _package_version(name) for name in LIBRARIES}
    return {
        "versions": versions | libraries,
        "state": services.state,
        "settings": services.settings.public_values(),
        "base": base_card(services, scope) if services.opened else None,
    }


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@router.get("/base", responses=document_errors(503))
async def show_base(services: OpenRegistry, scope: VisibleAdapters) -> JsonDict:
    """The served base: what it is, what it weighs, what can be adapted, and the rank pool's size
    and use.
    """
    return base_card(services, scope)


def base_card(services: Services, scope: AdapterScope) -> JsonDict:
    """The base and the rank pool; of the pool's adapters, a key with a list sees its own."""
    base, gauges = services.client.base, services.client.gauges
    assert base is not None, "the registrations open after the base"
    pool = {
        "rank_total": _count_pool_rows(services, base),
        "rank_used": gauges.pool_used,
        "placements": visible_placements(services, scope),
    }
    return {
        "id": services.registry.base_id,
        **_architecture_fields(base),
        **_memory_fields(base),
        "context_length": base.context,
        "rows": base.rows,
        "rope": base.rope,
        "modules": [_module_object(linear) for linear in base.linears],
        "kv": _kv_fields(base, gauges),
        "states": _states_fields(base),
        "host_bytes": gauges.host_bytes,
        "pool": pool,
    }


def _count_pool_rows(services: Services, base: BaseInfo) -> int:
    """The rank rows of all devices."""
    return base.pool_rank * len(services.settings.devices)


def _kv_fields(base: BaseInfo, gauges: Gauges) -> JsonDict:
    """The memory of keys and values that all sequences share."""
    return {
        "block_tokens": BLOCK_TOKENS,
        "blocks": base.kv_blocks,
        "tokens": base.kv_blocks * BLOCK_TOKENS,
        "used": gauges.kv_used,
        "cached": gauges.kv_cached,
        "preemptions": gauges.preemptions,
        "prefix_reuse": not base.state_bytes,
    }


def _states_fields(base: BaseInfo) -> JsonDict | None:
    """The memory of what layers keep of a sequence in place of keys and values."""
    if not base.state_bytes:
        return None
    return {
        "bytes_per_sequence": base.state_bytes,
        "bytes": capacity.states_bytes(base.state_bytes, base.rows),
    }


def _architecture_fields(base: BaseInfo) -> JsonDict:
    return {
        "architecture": base.architecture,
        "layers": base.layers,
        "hidden_size": base.hidden_size,
        "intermediate_size": base.intermediate_size,
        "vocab_size": base.vocab_size,
        "parameters": base.parameters,
        "quantization": base.quantization,
        "dtype": base.dtype,
        "device": base.device,
    }


def _memory_fields(base: BaseInfo) -> JsonDict:
    resident = sum(base.resident_bytes.values())
    return {
        "resident_bytes": resident,
        "resident_bytes_by_dtype": base.resident_bytes,
        "resident_megabytes": round(resident / 1e6, 2),
        "quantized_bytes": base.quantized_bytes,
        "plain_expert_bytes": base.plain_expert_bytes,
    }


def _module_object(linear: LinearKind) -> JsonDict:
    return {
        "name": linear.name,
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "count": linear.count,
    }


def visible_placements(services: Services, scope: AdapterScope) -> list[JsonDict]:
    placements = services.client.pool
    if not scope.whole:
        cards = services.registry.list_cards()
        visible = {card["digest"] for card in cards if scope.can_see(card["id"])}
        placements = tuple(placement for placement in placements if placement.digest in visible)
    return [asdict(placement) for placement in placements]


@router.get("/", include_in_schema=False)
async def show_console(request: Request) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        raise NotFound("the console is for browsers (accept: text/html); /docs lists the routes")
    return await send_page("console/index.html", CONSOLE)


@router.get("/docs", include_in_schema=False)
async def show_docs() -> Response:
    return await send_page("docs/index.html", SWAGGER)


@router.get("/openapi.json", include_in_schema=False)
async def show_description(request: Request) -> Response:
    return JsonAnswer(request.app.openapi())


async def send_page(name: str, policy: str) -> Response:
    path = PAGES / name
    if not await run_in(DISK, path.is_file):
        raise NotFound("this page is not part of the installation")
    headers = {"content-security-policy": policy, "cache-control": "no-cache"}
    return FileResponse(path, media_type="text/html", headers=headers)


FILES = {name: StaticFiles(directory=PAGES / name, check_dir=False) for name in ("console", "docs")}


@router.get("/console/{path:path}", include_in_schema=False)
async def console_file(path: str, request: Request) -> Response:
    return await send_page_file("console", path, request)


@router.get("/docs/{path:path}", include_in_schema=False)
async def docs_file(path: str, request: Request) -> Response:
    return await send_page_file("docs", path, request)


async def send_page_file(page: str, path: str, request: Request) -> Response:
    """A file that belongs to a page, revalidated at each use so that an upgrade is seen at once."""
    response = await FILES[page].get_response(path, request.scope)
    response.headers["cache-control"] = "no-cache"
    return response
