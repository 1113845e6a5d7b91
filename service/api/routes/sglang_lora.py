"""SGLang's names for registering and deleting adapters, with its answers. API process; must not read an
adapter file itself.
"""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

from fastapi import APIRouter, Request, Response

from ...errors import AdapterdError
from ..errors import document_errors, error_body, note_error
from ..generation.sse import JsonAnswer
from ..schemas.shared import OnlyNull, StrictModel
from ..scopes import ADMIN_SCOPE
from ..services import OpenRegistry, Services

router = APIRouter(tags=["adapters"], dependencies=[ADMIN_SCOPE])

JsonDict = dict[str, Any]
REFUSED = 400  # SGLang's for whatever is wrong with the request
REFUSALS: dict[int | str, JsonDict] = {REFUSED: {"description": "refused; `error_message` says why"}}
RESPONSES = document_errors(403, 422, 429, 503, 507) | REFUSALS


class LoadAdapter(StrictModel):
    lora_name: str
    lora_path: str
    pinned: bool = False
    lora_id: OnlyNull = None
    added_tokens_config: OnlyNull = None


class UnloadAdapter(StrictModel):
    lora_name: str
    lora_id: OnlyNull = None


@router.post("/load_lora_adapter", responses=RESPONSES)
async def load_adapter(body: LoadAdapter, services: OpenRegistry, request: Request) -> Response:
    """SGLang's name for registering."""
    registry = services.registry
    change = registry.register_adapter(body.lora_name, body.lora_path, pinned=body.pinned)
    return await _make_change(change, services, request)


@router.post("/unload_lora_adapter", responses=RESPONSES)
async def unload_adapter(body: UnloadAdapter, services: OpenRegistry, request: Request) -> Response:
    """SGLang's name for deleting."""
    return await _make_change(services.registry.remove_adapter(body.lora_name, False), services, request)


async def _make_change(change: Awaitable[Any], services: Services, request: Request) -> Response:
    """SGLang's answer to a change; what the service itself is short of keeps its own status."""
    try:
        await change
    except AdapterdError as error:
        if error.status == 429 or error.status >= 500:
            raise
        note_error(error, request.scope)
        refusal = {"success": False, "error_message": error.message} | error_body(error, openai=False)
        return JsonAnswer(refusal | _list_loaded(services), REFUSED)
    return JsonAnswer({"success": True, "error_message": ""} | _list_loaded(services))


def _list_loaded(services: Services) -> JsonDict:
    """Every adapter with its source, as SGLang lists them."""
    versions = services.registry.list_versions()
    return {"loaded_adapters": {version.id: version.place.source for version in versions}}
