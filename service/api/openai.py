"""The OpenAI dialect's routes that generate nothing, and its others put together. Knows no request's body."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from . import openai_chat, openai_completions
from .errors import documented
from .openai_shapes import known_model, models
from .rooms import Seen, Shelf
from .scopes import KEY_SCOPE

router = APIRouter(tags=["OpenAI"], dependencies=[KEY_SCOPE])
router.include_router(openai_completions.router)
router.include_router(openai_chat.router)


@router.get("/v1/models", responses=documented(503, openai=True))
async def list_models(here: Shelf, seen: Seen) -> dict[str, Any]:
    """The base and every registered adapter; an adapter's parent is the base."""
    return {"object": "list", "data": models(here, seen)}


@router.get("/v1/models/{id:path}", responses=documented(404, 503, openai=True))
async def get_model(id: str, here: Shelf, seen: Seen) -> dict[str, Any]:
    """One of them."""
    return known_model(id, here, seen)
