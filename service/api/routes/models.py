"""The OpenAI dialect's routes that generate nothing, and its others put together.

API process; must not know a request's body.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from ..errors import document_errors
from ..generation.openai_objects import known_model, model_objects
from ..scopes import KEY_SCOPE
from ..services import OpenRegistry, VisibleAdapters
from . import chat, completions

router = APIRouter(tags=["OpenAI"], dependencies=[KEY_SCOPE])
router.include_router(completions.router)
router.include_router(chat.router)


@router.get("/v1/models", responses=document_errors(503, openai=True))
async def list_models(services: OpenRegistry, scope: VisibleAdapters) -> dict[str, Any]:
    """The base and every registered adapter; an adapter's parent is the base."""
    return {"object": "list", "data": model_objects(services, scope)}


@router.get("/v1/models/{id:path}", responses=document_errors(404, 503, openai=True))
async def get_model(id: str, services: OpenRegistry, scope: VisibleAdapters) -> dict[str, Any]:
    """One of them; without an id, behind the slash, all."""
    return known_model(id, services, scope) if id else await list_models(services, scope)
