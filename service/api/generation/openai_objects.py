"""The parts that all objects of the OpenAI dialect share:
ids, usage, finish reasons, and the pieces of several answers merged. API process; must not know a
route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ... import __version__
from ...errors import AdapterNotFound, BadRequest
from ..schemas.openai import OpenAIRequest
from ..services import AdapterScope, Services
from .admission import Admission
from .answer import Answer, AnswerEnding, TextPiece
from .names import chosen_adapter

if TYPE_CHECKING:
    from ...catalog.aliases import Alias
    from ...catalog.registry import AdapterVersion
    from ...text.tokenizers import AdapterTokenizer

JsonDict = dict[str, Any]
STARTED = int(time.time())
FINISH = {AnswerEnding.LENGTH: "length", AnswerEnding.EOS: "stop", AnswerEnding.STOP: "stop"}


async def enter_model(body: OpenAIRequest, admission: Admission) -> AdapterTokenizer:
    """Leases the adapters that a request names, and returns their tokenizer.

    Raises AdapterNotFound, AdapterUnsupported, BadRequest, DigestMismatch, NotReady.
    """
    admission.user = body.user
    adapter_id = chosen_adapter(body.model, admission.services)
    if not body.weights:
        return await admission.enter_adapter(adapter_id)
    if adapter_id is not None:
        raise BadRequest("adapters: goes only with the base as the model", param="adapters")
    return await admission.enter_mix(body.weights)


def object_fields(kind: str, object: str, model: str, admission: Admission) -> JsonDict:
    """The fields that every object of one response repeats; `model` is the request's name for it."""
    return {
        "id": f"{kind}-{uuid4().hex}",
        "object": object,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"adapterd-{__version__}",
        "adapter": admission.adapter,
    }


def usage_of(admission: Admission) -> JsonDict:
    prompt, completion = admission.prompt_tokens, admission.generated_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": admission.cached_tokens},
    }


def usage_fields(body: OpenAIRequest, admission: Admission) -> JsonDict:
    """The usage that a chunk carries beside its choice."""
    if body.usage_everywhere:
        return {"usage": usage_of(admission)}
    return {"usage": None} if body.usage_wanted else {}


def usage_chunk(admission: Admission) -> JsonDict:
    """The fields of the last chunk, where the usage is wanted."""
    return {"choices": [], "usage": usage_of(admission)}


async def merge_answers(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, TextPiece]]:
    """The pieces of all answers as they come, each with its answer's index."""
    if len(answers) == 1:
        async for piece in answers[0].read_pieces():
            yield 0, piece
        return
    iterators = [answer.read_pieces() for answer in answers]
    waiting = {asyncio.ensure_future(anext(pieces)): i for i, pieces in enumerate(iterators)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                piece = task.result()
                if piece.ending is None:
                    waiting[asyncio.ensure_future(anext(iterators[i]))] = i
                yield i, piece
    finally:
        _cancel_tasks(waiting)


def _cancel_tasks(tasks: Iterable[asyncio.Future[TextPiece]]) -> None:
    for task in tasks:
        if not task.cancel() and not task.cancelled():
            task.exception()  # retrieved: another answer's error is raised


def known_model(id: str, services: Services, scope: AdapterScope) -> JsonDict:
    """The model of this name, as /v1/models lists it. Raises AdapterNotFound."""
    name = chosen_adapter(id, services)
    base, *adapters = model_objects(services, scope)
    if name is None:
        return base
    for model in adapters:
        if model["id"] == name:
            return model
    raise AdapterNotFound(f"no model named {id[:200]!r}; GET /v1/models lists them", param="model")


def model_objects(services: Services, scope: AdapterScope) -> list[JsonDict]:
    """The base, then every registered adapter and every alias that may be seen."""
    base = services.registry.base_id
    visible = [version for version in services.registry.list_versions() if scope.can_see(version.id)]
    aliases = [alias for alias in services.registry.aliases.list_aliases() if scope.can_see(alias.name)]
    return [
        _model_object(base, STARTED),
        *(_adapter_object(version, base) for version in visible),
        *(_alias_object(alias, base) for alias in aliases),
    ]


def _adapter_object(version: AdapterVersion, base: str) -> JsonDict:
    registered = datetime.fromisoformat(version.registered_at)
    return _model_object(version.id, int(registered.timestamp())) | {
        "parent": base,
        "adapter": {"id": version.id, "digest": version.digest or None},
    }


def _alias_object(alias: Alias, base: str) -> JsonDict:
    changed = datetime.fromisoformat(alias.changed_at)
    targets = [asdict(target) for target in alias.targets]
    return _model_object(alias.name, int(changed.timestamp())) | {"parent": base, "targets": targets}


def _model_object(id: str, created: int) -> JsonDict:
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "adapterd",
        "root": id,
        "parent": None,
        "adapter": None,
    }
