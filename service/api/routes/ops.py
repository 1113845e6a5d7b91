"""What operators and browsers ask: liveness, readiness, metrics, versions, the served base, the
pages. Changes nothing.
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
from ...errors import NotFound, NotReady
from ...telemetry import gpu, metrics
from ...threads import DEVICE, DISK, run_in
from ..errors import document_errors
from ..generation.sse import JsonAnswer
from ..scopes import KEY_SCOPE, PUBLIC_SCOPE
from ..services import AdapterScope, AnyServices, OpenRegistry, Services, VisibleAdapters

probes = APIRouter(tags=["operations"], dependencies=[PUBLIC_SCOPE])
router = APIRouter(tags=["operations"], dependencies=[KEY_SCOPE])

PAGES = Path(__file__).parents[1] / "static"
LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "llguidance", "fastapi", "uvicorn")
CLOSED = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
SAME_ORIGIN = CLOSED + "script-src 'self'; connect-src 'self'; font-src 'self'; "
CONSOLE = SAME_ORIGIN + "style-src 'self'; img-src 'self' data:"
# It writes style attributes
SWAGGER = SAME_ORIGIN + "style-src 'self' 'unsafe-inline'; img-src 'self' data:"
Told = dict[str, Any]


@probes.get("/health", responses=document_errors(503))
async def show_health(here: AnyServices) -> Told:
    """Liveness: 200 while the process can recover by itself, whatever the worker does."""
    told = {"state": here.state, "reason": here.reason, **load_progress(here)}
    if here.state == "failed":
        raise NotReady(f"failed: {here.reason}", details=told)
    return told


@probes.get("/ready", responses=document_errors(503))
async def show_ready(here: AnyServices) -> Told:
    """200 only when a request would be served now."""
    here.require_ready()
    return {"state": "ready"}


def load_progress(here: Services) -> Told:
    return (
        {"stage": here.client.stage, "fraction": here.client.fraction}
        if here.client.state == "loading"
        else {}
    )


FORMATS: dict[int | str, Told] = {200: {"content": {"text/plain": {}, "application/openmetrics-text": {}}}}


@router.get("/metrics", responses=document_errors() | FORMATS)
async def show_metrics(request: Request, here: AnyServices, seen: VisibleAdapters) -> Response:
    """Prometheus text, or OpenMetrics where `Accept` asks for it.

    A key with a list of adapters gets no series that name adapters.
    """
    metrics.set_gpus(await run_in(DEVICE, gpu.read_gpus))
    if here.settings.lora_requests_info == "on" and here.opened:
        tell_gateway(here)
    content, kind = metrics.render_metrics(request.headers.get("accept", ""), named=seen.whole)
    return Response(content, headers={"content-type": kind})


def tell_gateway(here: Services) -> None:
    """As the protocol between model servers and the endpoint picker says: which adapters would be
    served without a wait for their weights.

    The pool has no fixed number of places: the ones that are taken count, and those that its free
    rows give to the largest rank.
    """
    cards, awaited, base = here.registry.list_cards(), here.client.awaited, here.client.base
    running = {card["id"] for card in cards if card["digest"] and here.client.is_resident(card["digest"])}
    waiting = {card["id"] for card in cards if card["digest"] in awaited} - running
    free = (base.pool_rank if base else 0) - here.client.gauges.pool_used
    largest = max((card["rank"] or 0 for card in cards), default=0)
    metrics.lora_info(len(running) + free // max(1, largest), running, waiting)


@router.get("/info", responses=document_errors())
async def show_info(here: AnyServices, seen: VisibleAdapters) -> Told:
    """Versions, the settings without secrets, and the base where it is loaded."""
    versions = {"adapterd": __version__, "python": platform.python_version()} | {
        name: _package_version(name) for name in LIBRARIES
    }
    return {
        "versions": versions,
        "state": here.state,
        "settings": here.settings.public_values(),
        "base": base_card(here, seen) if here.opened else None,
    }


def _package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@router.get("/base", responses=document_errors(503))
async def show_base(here: OpenRegistry, seen: VisibleAdapters) -> Told:
    """The served base: what it is, what it weighs, what can be adapted, and the rank pool's size
    and use.
    """
    return base_card(here, seen)


def base_card(here: Services, seen: AdapterScope) -> Told:
    """Of the pool's adapters, a key with a list sees its own."""
    card, gauges = here.client.base, here.client.gauges
    assert card is not None, "the registrations open after the base"
    resident = sum(card.resident_bytes.values())
    return {
        "id": here.registry.base_id,
        "architecture": card.architecture,
        "layers": card.layers,
        "hidden_size": card.hidden_size,
        "intermediate_size": card.intermediate_size,
        "vocab_size": card.vocab_size,
        "parameters": card.parameters,
        "quantization": card.quantization,
        "dtype": card.dtype,
        "device": card.device,
        "resident_bytes": resident,
        "resident_bytes_by_dtype": card.resident_bytes,
        "resident_megabytes": round(resident / 1e6, 2),
        "context_length": card.context,
        "rows": card.rows,
        "rope": card.rope,
        "modules": [
            {"name": m.name, "in_features": m.in_features, "out_features": m.out_features, "count": m.count}
            for m in card.linears
        ],
        "host_bytes": gauges.host_bytes,
        "pool": {
            "rank_total": card.pool_rank,
            "rank_used": gauges.pool_used,
            "placements": visible_placements(here, seen),
        },
    }


def visible_placements(here: Services, seen: AdapterScope) -> list[Told]:
    hidden: set[str] = set()
    if not seen.whole:
        hidden = {one.digest for one in here.client.pool} - {
            card["digest"] for card in here.registry.list_cards() if seen.can_see(card["id"])
        }
    return [asdict(one) for one in here.client.pool if one.digest not in hidden]


@router.get("/", include_in_schema=False)
async def show_console(request: Request) -> Response:
    if "text/html" not in request.headers.get("accept", ""):
        raise NotFound("the console is for browsers (accept: text/html); /docs lists the routes")
    return await page("console/index.html", CONSOLE)


@router.get("/docs", include_in_schema=False)
async def show_docs() -> Response:
    return await page("docs/index.html", SWAGGER)


@router.get("/openapi.json", include_in_schema=False)
async def description(request: Request) -> Response:
    return JsonAnswer(request.app.openapi())


async def page(name: str, policy: str) -> Response:
    path = PAGES / name
    if not await run_in(DISK, path.is_file):
        raise NotFound("this page is not part of the installation")
    return FileResponse(
        path, media_type="text/html", headers={"content-security-policy": policy, "cache-control": "no-cache"}
    )


FILES = {name: StaticFiles(directory=PAGES / name, check_dir=False) for name in ("console", "docs")}


@router.get("/console/{path:path}", include_in_schema=False)
async def console_file(path: str, request: Request) -> Response:
    return await page_file("console", path, request)


@router.get("/docs/{path:path}", include_in_schema=False)
async def docs_file(path: str, request: Request) -> Response:
    return await page_file("docs", path, request)


async def page_file(page: str, path: str, request: Request) -> Response:
    """A file of a page's own, revalidated at each use so that an upgrade is seen at once."""
    found = await FILES[page].get_response(path, request.scope)
    found.headers["cache-control"] = "no-cache"
    return found
