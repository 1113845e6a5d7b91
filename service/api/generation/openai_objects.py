"""What all objects of the OpenAI dialect share: ids, usage, finish reasons, answers as they come
from several sequences.

Knows no route.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from ... import __version__
from ...errors import AdapterNotFound
from ..services import AdapterScope, Services
from .admission import Admission
from .answer import Answer, AnswerEnding, TextPiece

if TYPE_CHECKING:
    from ...catalog.registry import AdapterVersion

Told = dict[str, Any]
STARTED = int(time.time())
FINISH = {AnswerEnding.LENGTH: "length", AnswerEnding.EOS: "stop", AnswerEnding.STOP: "stop"}


def chosen_adapter(model: str, rooms: Services) -> str | None:
    """The adapter's id that a model name means;

    None for the base. `base:adapter` is the adapter.
    """
    if model in rooms.bases:
        return None
    return next(
        (model.removeprefix(base + ":") for base in rooms.bases if model.startswith(base + ":")), model
    )


def object_fields(kind: str, object: str, model: str, admitted: Admission) -> Told:
    """The fields that every object of one response repeats; `model` is what was asked for."""
    return {
        "id": f"{kind}-{uuid4().hex}",
        "object": object,
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"adapterd-{__version__}",
        "adapter": admitted.adapter,
    }


def usage_of(admitted: Admission) -> Told:
    prompt, completion = admitted.prompt_tokens, admitted.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def merge_answers(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, TextPiece]]:
    """The pieces of all answers as they come, each with its answer's index."""
    if len(answers) == 1:
        async for piece in answers[0].read_pieces():
            yield 0, piece
        return
    readers = [answer.read_pieces() for answer in answers]
    waiting = {asyncio.ensure_future(anext(reader)): i for i, reader in enumerate(readers)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                i = waiting.pop(task)
                piece = task.result()
                if piece.ending is None:
                    waiting[asyncio.ensure_future(anext(readers[i]))] = i
                yield i, piece
    finally:
        for task in waiting:
            if not task.cancel() and not task.cancelled():
                task.exception()  # seen: another one's error is told


def known_model(id: str, rooms: Services, seen: AdapterScope) -> Told:
    """The model of this name, as /v1/models lists it. Raises AdapterNotFound."""
    name = chosen_adapter(id, rooms)
    listed = model_objects(rooms, seen)
    found = listed[0] if name is None else next((m for m in listed[1:] if m["id"] == name), None)
    if found is None:
        raise AdapterNotFound(f"no model named {id[:200]!r}; GET /v1/models lists them", param="model")
    return found


def model_objects(rooms: Services, seen: AdapterScope) -> list[Told]:
    """The base, then every registered adapter that may be seen."""
    base = rooms.registry.base_id
    return [_model_object(base, STARTED)] + [
        _adapter_object(one, base) for one in rooms.registry.list_versions() if seen.can_see(one.id)
    ]


def _adapter_object(one: AdapterVersion, base: str) -> Told:
    registered = datetime.fromisoformat(one.registered_at)
    return _model_object(one.id, int(registered.timestamp())) | {
        "parent": base,
        "adapter": {"id": one.id, "digest": one.digest or None},
    }


def _model_object(id: str, created: int) -> Told:
    return {
        "id": id,
        "object": "model",
        "created": created,
        "owned_by": "adapterd",
        "root": id,
        "parent": None,
        "adapter": None,
    }
