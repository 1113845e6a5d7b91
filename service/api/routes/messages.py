"""POST /v1/messages and /v1/messages/count_tokens, in Anthropic's shapes. API process; must not
know another dialect's wire shapes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from itertools import chain, groupby
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from ...text.template_options import TemplateOptions
from ...text.tool_calls import ToolCallText
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions
from ..generation.answer import Answer, AnswerEnding
from ..generation.conversation import (
    AnswerPart,
    AnswerReader,
    Conversation,
    OfferedTool,
    PastCall,
    Turn,
    arguments_object,
    new_call_id,
    plain_sampling,
    render_conversation,
    submit_conversation,
)
from ..generation.grammar import compile_grammar
from ..generation.names import enter_named
from ..generation.rendering import render_answer
from ..generation.sse import EVENTS, stream_events
from ..schemas.messages import (
    ClaudeMessage,
    ClaudeTool,
    CountTokensRequest,
    MessagesRequest,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
)
from ..scopes import KEY_SCOPE

router = APIRouter(tags=["Messages"], dependencies=[KEY_SCOPE])

JsonDict = dict[str, Any]
BOUND = "output_config.format"
REFUSALS = document_errors(404, 409, 422, 429, 503, 504, anthropic=True)
REASONS = {
    AnswerEnding.LENGTH: "max_tokens",
    AnswerEnding.EOS: "end_turn",
    AnswerEnding.STOP: "stop_sequence",
}


@router.post("/v1/messages", responses=EVENTS | REFUSALS)
async def answer_message(body: MessagesRequest, request: Request, admission: Admitted) -> Response:
    """Answers a conversation, or calls tools; with `stream`, as server-sent events."""
    tokenizer = await enter_named(body.model, admission, body.user)
    options = await _make_options(body)
    (reader,) = await submit_conversation(admission, tokenizer, _make_conversation(body), options, BOUND)
    if body.stream:
        return stream_events(request, _stream_message(body, admission, reader), admission.make_headers())
    await admission.finish_answers()
    text, calls = reader.split_text()
    message = _message_object(body, admission) | {
        "content": _make_blocks(text, calls),
        **_stop_fields(reader.answer, bool(calls)),
        "usage": _usage_object(admission),
    }
    return await render_answer(message, admission.make_headers() | admission.make_times())


@router.post("/v1/messages/count_tokens", responses=REFUSALS)
async def count_message_tokens(body: CountTokensRequest, admission: Admitted) -> Response:
    """Counts the tokens of the prompt that a conversation makes."""
    tokenizer = await enter_named(body.model, admission)
    ids = await render_conversation(admission, tokenizer, _make_conversation(body))
    return await render_answer({"input_tokens": len(ids)}, admission.adapter_headers())


# ---- the conversation


def _make_conversation(body: CountTokensRequest) -> Conversation:
    system = [] if body.system_text is None else [Turn("system", body.system_text, "system")]
    said = [_read_turns(message, f"messages.{at}") for at, message in enumerate(body.messages)]
    return Conversation(
        [*system, *chain.from_iterable(said)],
        [_offer_tool(tool) for tool in body.offered],
        [tool.name for tool in body.forced],
        body.takes_one_call,
        _end_turns(body),
        "messages",
    )


def _end_turns(body: CountTokensRequest) -> TemplateOptions:
    """How the prompt ends: an assistant's text at the end is the answer's beginning."""
    last = body.messages[-1]
    continues = last.role == "assistant" and not any(isinstance(b, ToolUseBlock) for b in last.content)
    return TemplateOptions(body.template_variables, opens_turn=not continues, continues=continues)


def _offer_tool(tool: ClaudeTool) -> OfferedTool:
    return OfferedTool(tool.name, tool.description, tool.input_schema, tool.strict)


def _read_turns(message: ClaudeMessage, place: str) -> Iterator[Turn]:
    if message.role == "assistant":
        yield _said_by_assistant(message, place)
    else:
        yield from _said_by_user(message, place)


def _said_by_assistant(message: ClaudeMessage, place: str) -> Turn:
    uses = [block for block in message.content if isinstance(block, ToolUseBlock)]
    thoughts = [block.thinking for block in message.content if isinstance(block, ThinkingBlock)]
    calls = [PastCall(use.id, use.name, use.input, f"{place}.content") for use in uses]
    return Turn("assistant", message.text, place, calls, {"reasoning_content": "".join(thoughts)})


def _said_by_user(message: ClaudeMessage, place: str) -> Iterator[Turn]:
    """A turn of its own for each result, and one for the text between them."""
    if not message.content:
        yield Turn("user", "", place)
    for is_result, blocks in groupby(message.content, lambda block: isinstance(block, ToolResultBlock)):
        if is_result:
            results = (block for block in blocks if isinstance(block, ToolResultBlock))
            for each in results:
                yield Turn("tool", each.text, place, named={"tool_call_id": each.tool_use_id})
        else:
            texts = [block.text for block in blocks if isinstance(block, TextBlock)]
            yield Turn("user", "".join(texts), place)


async def _make_options(body: MessagesRequest) -> GenerationOptions:
    grammar = await compile_grammar(body.bound, BOUND)
    sampling = plain_sampling(body.temperature, body.top_p, body.top_k)
    return GenerationOptions(
        sampling=replace(sampling, grammar=grammar),
        max_tokens=body.max_tokens,
        default_tokens=None,
        stop=body.stop_sequences or (),
    )


# ---- the answer


def _message_object(body: MessagesRequest, admission: Admission) -> JsonDict:
    return {
        "id": f"msg_{uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": body.model,
        "adapter": admission.adapter,
    }


def _usage_object(admission: Admission) -> JsonDict:
    return {
        "input_tokens": admission.prompt_tokens - admission.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": admission.cached_tokens,
        "output_tokens": admission.generated_tokens,
    }


def _stop_fields(answer: Answer, has_calls: bool) -> JsonDict:
    reason = REASONS[answer.ending]
    if has_calls and answer.ending is not AnswerEnding.LENGTH:
        reason = "tool_use"
    return {
        "stop_reason": reason,
        "stop_sequence": answer.stops.found if reason == "stop_sequence" else None,
    }


def _make_blocks(text: str, calls: list[ToolCallText]) -> list[JsonDict]:
    blocks = [_text_block(text)] if text or not calls else []
    return blocks + [_use_block(call, arguments_object(call)) for call in calls]


def _text_block(text: str) -> JsonDict:
    return {"type": "text", "text": text}


def _use_block(call: ToolCallText, arguments: JsonDict) -> JsonDict:
    return {"type": "tool_use", "id": new_call_id(), "name": call.name, "input": arguments}


class BlockEvents:
    """The events of an answer's blocks, which follow each other by index."""

    def __init__(self) -> None:
        self.index = 0
        self.has_calls = False
        self._open: str | None = None  # the type of the block that goes on

    def add_part(self, part: AnswerPart) -> Iterator[JsonDict]:
        if isinstance(part, str):
            yield from self.add_text(part)
            return
        if part.name is not None:
            self.has_calls = True
            yield from self._start_block(_use_block(ToolCallText(part.name, ""), {}))
        if part.arguments:
            yield self._add_delta({"type": "input_json_delta", "partial_json": part.arguments})

    def add_text(self, text: str) -> Iterator[JsonDict]:
        if self._open != "text":
            yield from self._start_block(_text_block(""))
        if text:
            yield self._add_delta({"type": "text_delta", "text": text})

    def close_block(self) -> Iterator[JsonDict]:
        if self._open is not None:
            self._open = None
            yield {"type": "content_block_stop", "index": self.index}
            self.index += 1

    def close_answer(self) -> Iterator[JsonDict]:
        """An answer that says nothing has one block of no text."""
        if not self.index and self._open is None:
            yield from self.add_text("")
        yield from self.close_block()

    def _start_block(self, block: JsonDict) -> Iterator[JsonDict]:
        yield from self.close_block()
        self._open = block["type"]
        yield {"type": "content_block_start", "index": self.index, "content_block": block}

    def _add_delta(self, delta: JsonDict) -> JsonDict:
        return {"type": "content_block_delta", "index": self.index, "delta": delta}


async def _stream_message(
    body: MessagesRequest, admission: Admission, reader: AnswerReader
) -> AsyncIterator[JsonDict]:
    """The message's start once its first token is there, for only then it is known how much of the
    prompt was reused.
    """
    blocks, begun = BlockEvents(), False
    async for parts in reader.read_parts():
        if not begun:
            begun = True
            yield _start_message(body, admission)
        for part in parts:
            for event in blocks.add_part(part):
                yield event
    for event in blocks.close_answer():
        yield event
    ending = {"type": "message_delta", "delta": _stop_fields(reader.answer, blocks.has_calls)}
    yield ending | {"usage": _usage_object(admission)}
    yield {"type": "message_stop"}


def _start_message(body: MessagesRequest, admission: Admission) -> JsonDict:
    nothing: JsonDict = {
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": _usage_object(admission),
    }
    return {"type": "message_start", "message": _message_object(body, admission) | nothing}
