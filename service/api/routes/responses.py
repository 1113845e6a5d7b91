"""POST /v1/responses, in the shapes of OpenAI's Responses; nothing is stored. API process; must not
know another dialect's wire shapes.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from ...text.template_options import TemplateOptions
from ...text.tool_calls import ToolCallText
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions
from ..generation.answer import AnswerEnding
from ..generation.conversation import (
    AnswerPart,
    AnswerReader,
    Conversation,
    OfferedTool,
    PastCall,
    Turn,
    new_call_id,
    plain_sampling,
    submit_conversation,
)
from ..generation.grammar import compile_grammar
from ..generation.names import enter_named
from ..generation.rendering import render_answer
from ..generation.sse import EVENTS, stream_events
from ..schemas.responses import (
    CallItem,
    CallOutputItem,
    Item,
    MessageItem,
    ReasoningItem,
    ResponseRequest,
)
from ..scopes import KEY_SCOPE

router = APIRouter(tags=["OpenAI"], dependencies=[KEY_SCOPE])

JsonDict = dict[str, Any]
PlacedItem = tuple[str, Item]  # its place in the request
BOUND = "text.format"


@router.post("/v1/responses", responses=EVENTS | document_errors(404, 409, 422, 429, 503, 504, openai=True))
async def answer_response(body: ResponseRequest, request: Request, admission: Admitted) -> Response:
    """Answers a conversation, or calls functions; with `stream`, as server-sent events."""
    tokenizer = await enter_named(body.model, admission, body.user)
    options = await _make_options(body)
    conversation = _make_conversation(body)
    (reader,) = await submit_conversation(admission, tokenizer, conversation, options, BOUND)
    shared_fields = _response_fields(body, admission)
    if body.stream:
        events = _stream_response(shared_fields, admission, reader)
        return stream_events(request, events, admission.make_headers())
    await admission.finish_answers()
    text, calls = reader.split_text()
    status = _status_of(reader)
    output = [_message_item(text, status)] if text or not calls else []
    output += [_call_item(call, status) for call in calls]
    response = shared_fields | _ending_fields(admission, reader, output)
    return await render_answer(response, admission.make_headers() | admission.make_times())


# ---- the conversation


def _make_conversation(body: ResponseRequest) -> Conversation:
    system = [] if body.instructions is None else [Turn("system", body.instructions, "instructions")]
    return Conversation(
        [*system, *_read_turns(body.input)],
        [OfferedTool(tool.name, tool.description, tool.parameters, tool.strict) for tool in body.offered],
        body.forced,
        body.parallel_tool_calls is False,
        TemplateOptions(body.template_variables),
        "input",
    )


def _read_turns(items: Iterable[Item]) -> Iterator[Turn]:
    placed = [(f"input.{at}", item) for at, item in enumerate(items)]
    for is_said, group in groupby(placed, _is_said):
        if is_said:
            yield from map(_said_turn, _split_said(group))
        else:
            yield from (_given_turn(place, item) for place, item in group)


def _is_said(placed: PlacedItem) -> bool:
    """Whether the assistant said it."""
    _, item = placed
    if isinstance(item, MessageItem):
        return item.role == "assistant"
    return isinstance(item, CallItem | ReasoningItem)


def _split_said(items: Iterable[PlacedItem]) -> list[list[PlacedItem]]:
    """The items of each turn: thoughts, then a text, then calls."""
    turns: list[list[PlacedItem]] = [[]]
    for place, item in items:
        is_begun = any(not isinstance(each, ReasoningItem) for _, each in turns[-1])
        if is_begun and not isinstance(item, CallItem):
            turns.append([])
        turns[-1].append((place, item))
    return turns


def _said_turn(placed: Sequence[PlacedItem]) -> Turn:
    items = [item for _, item in placed]
    texts = [item.text for item in items if isinstance(item, MessageItem)]
    thoughts = [item.text for item in items if isinstance(item, ReasoningItem)]
    calls = [
        PastCall(item.call_id, item.name, item.arguments, place)
        for place, item in placed
        if isinstance(item, CallItem)
    ]
    place, _ = placed[0]
    return Turn("assistant", "".join(texts), place, calls, {"reasoning_content": "".join(thoughts)})


def _given_turn(place: str, item: Item) -> Turn:
    if isinstance(item, CallOutputItem):
        return Turn("tool", item.text, place, named={"tool_call_id": item.call_id})
    assert isinstance(item, MessageItem), "all else is the assistant's"
    return Turn(item.role, item.text, place)


async def _make_options(body: ResponseRequest) -> GenerationOptions:
    grammar = None if body.forced else await compile_grammar(body.bound, BOUND)
    return GenerationOptions(
        sampling=replace(plain_sampling(body.temperature, body.top_p), grammar=grammar),
        max_tokens=body.max_output_tokens,
        default_tokens=None,
        param="max_output_tokens",
    )


# ---- the answer


def _response_fields(body: ResponseRequest, admission: Admission) -> JsonDict:
    """The fields of the response that are known at its start."""
    return {
        "id": f"resp_{uuid4().hex}",
        "object": "response",
        "created_at": int(time.time()),
        "model": body.model,
        "adapter": admission.adapter,
        "store": False,
        "background": False,
        "error": None,
        "metadata": {},
        "previous_response_id": None,
        "truncation": "disabled",
        "user": None,
    } | _asked_fields(body)


def _asked_fields(body: ResponseRequest) -> JsonDict:
    """What was asked for, told again."""
    wanted = (
        body.text.format.model_dump(by_alias=True) if body.text and body.text.format else {"type": "text"}
    )
    choice = body.tool_choice or "auto"
    return {
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "reasoning": {"effort": body.reasoning.effort if body.reasoning else None, "summary": None},
        "temperature": 1.0 if body.temperature is None else body.temperature,
        "text": {"format": wanted},
        "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
        "tools": [tool.model_dump() for tool in body.tools or ()],
        "top_p": 1.0 if body.top_p is None else body.top_p,
    }


def _status_of(reader: AnswerReader) -> str:
    return "incomplete" if reader.answer.ending is AnswerEnding.LENGTH else "completed"


def _ending_fields(admission: Admission, reader: AnswerReader, output: list[JsonDict]) -> JsonDict:
    status = _status_of(reader)
    return {
        "status": status,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": output,
        "usage": _input_usage(admission),
    }


def _input_usage(admission: Admission) -> JsonDict:
    given, generated = admission.prompt_tokens, admission.generated_tokens
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": admission.cached_tokens},
        "output_tokens": generated,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": given + generated,
    }


def _message_item(text: str, status: str) -> JsonDict:
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "status": status,
        "content": [_text_part(text)],
    }


def _text_part(text: str) -> JsonDict:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _call_item(call: ToolCallText, status: str) -> JsonDict:
    return {
        "id": f"fc_{uuid4().hex}",
        "type": "function_call",
        "call_id": new_call_id(),
        "name": call.name,
        "arguments": call.arguments,
        "status": status,
    }


# ---- the events


@dataclass
class ItemEvents:
    """The events of an answer's items, which follow each other by index; `output` are those that ended."""

    output: list[JsonDict] = field(default_factory=list)
    _open: JsonDict | None = None  # the item that goes on
    _pieces: list[str] = field(default_factory=list)  # of its text or its arguments

    def add_part(self, part: AnswerPart) -> Iterator[JsonDict]:
        if isinstance(part, str):
            yield from self.add_text(part)
            return
        if part.name is not None:
            yield from self.end_item("completed")
            yield self._begin_item(_call_item(ToolCallText(part.name, ""), "in_progress"))
        if part.arguments:
            self._pieces.append(part.arguments)
            yield self._place_event("function_call_arguments.delta", delta=part.arguments)

    def add_text(self, text: str) -> Iterator[JsonDict]:
        if self._open is None or self._open["type"] != "message":
            yield from self.end_item("completed")
            yield self._begin_item(_message_item("", "in_progress") | {"content": []})
            yield self._part_event("content_part.added", part=_text_part(""))
        if text:
            self._pieces.append(text)
            yield self._part_event("output_text.delta", delta=text, logprobs=[])

    def end_item(self, status: str) -> Iterator[JsonDict]:
        """Ends the item that goes on, if one does."""
        if self._open is None:
            return
        whole = "".join(self._pieces)
        if self._open["type"] == "message":
            yield self._part_event("output_text.done", text=whole, logprobs=[])
            yield self._part_event("content_part.done", part=_text_part(whole))
            item = self._open | {"status": status, "content": [_text_part(whole)]}
        else:
            name = self._open["name"]
            yield self._place_event("function_call_arguments.done", name=name, arguments=whole)
            item = self._open | {"status": status, "arguments": whole}
        yield self._item_event("done", item)
        self.output.append(item)
        self._open = None

    def end_answer(self, status: str) -> Iterator[JsonDict]:
        """An answer that says nothing has one message of no text."""
        if not self.output and self._open is None:
            yield from self.add_text("")
        yield from self.end_item(status)

    def _begin_item(self, item: JsonDict) -> JsonDict:
        self._open, self._pieces = item, []
        return self._item_event("added", item)

    def _item_event(self, step: str, item: JsonDict) -> JsonDict:
        return {"type": f"response.output_item.{step}", "output_index": len(self.output), "item": item}

    def _place_event(self, kind: str, **fields: Any) -> JsonDict:
        assert self._open is not None, "it tells of the item that goes on"
        place = {"item_id": self._open["id"], "output_index": len(self.output)}
        return {"type": f"response.{kind}", **place, **fields}

    def _part_event(self, kind: str, **fields: Any) -> JsonDict:
        return self._place_event(kind, content_index=0, **fields)


async def _stream_response(
    shared_fields: JsonDict, admission: Admission, reader: AnswerReader
) -> AsyncIterator[JsonDict]:
    """The response's start comes with its first token: until then the stream says that it waits."""
    items, begun = ItemEvents(), False
    async for parts in reader.read_parts():
        if not begun:
            begun = True
            for event in _start_events(shared_fields):
                yield event
        for part in parts:
            for event in items.add_part(part):
                yield event
    for event in items.end_answer(_status_of(reader)):
        yield event
    response = shared_fields | _ending_fields(admission, reader, items.output)
    yield {"type": f"response.{response['status']}", "response": response}


def _start_events(shared_fields: JsonDict) -> Iterator[JsonDict]:
    nothing: JsonDict = {"status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
    for kind in ("created", "in_progress"):
        yield {"type": f"response.{kind}", "response": shared_fields | nothing}
