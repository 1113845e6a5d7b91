"""POST /v1/chat/completions. API process; must not know another dialect's wire shapes."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...errors import BadRequest
from ...text.template_options import TemplateOptions
from ...text.tool_calls import CallFormat, CallParser, ToolCallText
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions, chat_prompt
from ..generation.answer import Answer, AnswerEnding, TextPiece
from ..generation.grammar import calls_grammar
from ..generation.logprobs import best_tokens, finite_logprob
from ..generation.openai_objects import (
    FINISH,
    JsonDict,
    enter_model,
    merge_answers,
    object_fields,
    usage_chunk,
    usage_fields,
    usage_of,
)
from ..generation.openai_options import bound_grammar, openai_options
from ..generation.rendering import defer_elements, render_answer
from ..generation.sse import EVENTS, stream_events
from ..generation.token_ids import id_list, trainer_fields
from ..schemas.chat import ChatMessage, ChatRequest, ToolCall

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter()

ROLE_OF = {"developer": "system"}  # where a template does not know the one
NO_ARGUMENTS: JsonDict = {"type": "object", "properties": {}}


@router.post("/v1/chat/completions", responses=EVENTS | document_errors(404, 422, 429, 503, 504, openai=True))
async def answer_chat(body: ChatRequest, request: Request, admission: Admitted) -> Response:
    """Answers a conversation, or calls tools; with `stream`, as server-sent events."""
    tokenizer = await enter_model(body, admission)
    tools = _offered_tools(body)
    format = tokenizer.tool_format() if tools else None
    messages = [_template_message(message) for message in body.messages]
    if not tokenizer.names_word("developer", tools=bool(tools)):
        messages = [turn | {"role": ROLE_OF.get(turn["role"], turn["role"])} for turn in messages]
    prompt = await chat_prompt(admission, tokenizer, messages, tools, _template_options(body))
    options = await _make_options(body, tokenizer)
    admission.submit_prompt(tokenizer, prompt, options)
    parsers = [_make_parser(body, format) for _ in admission.answers]
    if body.stream:
        shared_fields = object_fields("chatcmpl", "chat.completion.chunk", body.model, admission)
        chunks = _stream_chunks(body, admission, shared_fields, parsers)
        return stream_events(request, chunks, admission.make_headers())
    await admission.finish_answers()
    answers = zip(admission.answers, parsers, strict=True)
    choices = (_make_choice(body, i, answer, parser) for i, (answer, parser) in enumerate(answers))
    shared_fields = object_fields("chatcmpl", "chat.completion", body.model, admission)
    completion = shared_fields | {"choices": choices, "usage": usage_of(admission)}
    completion |= _whole_prompt_ids(body, admission)
    return await render_answer(completion, admission.make_headers() | admission.make_times())


def _template_options(body: ChatRequest) -> TemplateOptions:
    continues = bool(body.continue_final_message)
    opens_turn = not continues if body.add_generation_prompt is None else body.add_generation_prompt
    return TemplateOptions(body.template_variables, opens_turn, continues)


def _whole_prompt_ids(body: ChatRequest, admission: Admission) -> JsonDict:
    return {"prompt_token_ids": id_list(admission.answers[0].prompt)} if body.return_token_ids else {}


def _offered_tools(body: ChatRequest) -> list[JsonDict]:
    """The tools that the model may know of, as templates get them."""
    if body.tool_choice == "none":
        return []
    return [tool.function.template_form for tool in body.tools or ()]


def _make_parser(body: ChatRequest, format: CallFormat | None) -> CallParser:
    names = [] if body.tool_choice == "none" else body.names
    is_single = body.parallel_tool_calls is False
    return CallParser(format, names, forced=bool(body.forced), single=is_single)


def _template_message(message: ChatMessage) -> JsonDict:
    """A message as templates expect it: its text in one piece, the arguments of calls as objects."""
    turn: JsonDict = {"role": message.role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        turn["reasoning_content"] = reasoning
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return turn


def _template_call(call: ToolCall) -> JsonDict:
    arguments = _parse_arguments(call.function.arguments)
    function = {"name": call.function.name, "arguments": arguments}
    return {"id": call.id, "type": "function", "function": function}


def _parse_arguments(text: str) -> Any:
    """The arguments' JSON; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _make_options(body: ChatRequest, tokenizer: AdapterTokenizer) -> GenerationOptions:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = await openai_options(body, tokenizer, logprobs, await _make_grammar(body))
    return replace(
        options,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
    )


async def _make_grammar(body: ChatRequest) -> str | None:
    """The grammar of the response format, or of a call that the client insists on."""
    constraint = await bound_grammar(body)
    if not body.forced:
        return constraint
    if constraint is not None or body.ignore_eos or body.min_tokens:
        raise BadRequest(
            "tool_choice: a forced call cannot go with response_format, ignore_eos or min_tokens",
            param="tool_choice",
        )
    functions = {function.name: function.parameters or NO_ARGUMENTS for function in body.forced}
    return await calls_grammar(functions, "tools")


# ---- the answer


def _make_choice(body: ChatRequest, index: int, answer: Answer, parser: CallParser) -> JsonDict:
    content = parser.push_text(answer.text)
    rest, calls = parser.finish_calls()
    content += rest
    has_content = bool(content) or not calls
    message: JsonDict = {"role": "assistant", "content": content if has_content else None, "refusal": None}
    if calls:
        message["tool_calls"] = [_call_object(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs_object(body, answer.tokenizer, answer.tokens),
        "finish_reason": _finish_reason(answer.ending, calls),
    } | trainer_fields(body, answer)


async def _stream_chunks(
    body: ChatRequest, admission: Admission, shared_fields: JsonDict, parsers: list[CallParser]
) -> AsyncIterator[JsonDict]:
    """A chunk for every token, also one that adds no text yet, so that a client sees the work go
    on.
    """
    first_fields = _whole_prompt_ids(body, admission)
    async for i, piece in merge_answers(admission.answers):
        for choice in _make_choices(body, i, admission.answers[i], piece, parsers[i]):
            yield shared_fields | {"choices": [choice]} | usage_fields(body, admission) | first_fields
            first_fields = {}
    if body.usage_wanted:
        yield shared_fields | usage_chunk(admission)


def _make_choices(
    body: ChatRequest, index: int, answer: Answer, piece: TextPiece, parser: CallParser
) -> Iterator[JsonDict]:
    """The choices, one a chunk, that a piece adds to its answer; the first of them has its token's id."""
    deltas = _make_deltas(body, index, answer, piece, parser)
    if len(answer.pieces) == 1:
        yield _make_delta(index, {"role": "assistant", "content": ""})
    ids: JsonDict = {"token_ids": [piece.token.id] if piece.token else []} if body.return_token_ids else {}
    for choice in deltas:
        yield choice | ids
        ids = {name: [] for name in ids}


def _make_deltas(
    body: ChatRequest, index: int, answer: Answer, piece: TextPiece, parser: CallParser
) -> Iterator[JsonDict]:
    logprobs = _logprobs_object(body, answer.tokenizer, [piece.token]) if piece.token else None
    text, calls = parser.push_text(piece.text), list[ToolCallText]()
    if piece.ending:
        rest, calls = parser.finish_calls()
        text += rest
    if text or logprobs or piece.ending is not AnswerEnding.EOS:
        yield _make_delta(index, {"content": text}, logprobs=logprobs)
    for at, call in enumerate(calls):
        call_delta = {"index": at, **_call_object(call)}
        yield _make_delta(index, {"tool_calls": [call_delta]})
    if piece.ending:
        yield _make_delta(index, {}, _finish_reason(piece.ending, calls))


def _make_delta(
    index: int, delta: JsonDict, finish: str | None = None, logprobs: JsonDict | None = None
) -> JsonDict:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def _finish_reason(ending: AnswerEnding, parsers: Sequence[ToolCallText]) -> str:
    if parsers and ending is not AnswerEnding.LENGTH:
        return "tool_calls"
    return FINISH[ending]


def _call_object(call: ToolCallText) -> JsonDict:
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs_object(
    body: ChatRequest, tokenizer: AdapterTokenizer, tokens: Sequence[Token]
) -> JsonDict | None:
    if not body.logprobs:
        return None
    entries = _token_entries(tokenizer, tokens, body.top_logprobs or 0)
    return {"content": defer_elements(len(tokens), entries), "refusal": None}


def _token_entries(tokenizer: AdapterTokenizer, tokens: Sequence[Token], wanted: int) -> Iterator[JsonDict]:
    for token in tokens:
        chosen = _logprob_entry(tokenizer, token.id, token.logprob)
        best = best_tokens(token, wanted)
        chosen["top_logprobs"] = [_logprob_entry(tokenizer, id, logprob) for id, logprob in best]
        yield chosen


def _logprob_entry(tokenizer: AdapterTokenizer, id: int, logprob: float | None) -> JsonDict:
    return {
        "token": tokenizer.token_text(id),
        "logprob": finite_logprob(logprob),
        "bytes": list(tokenizer.piece_bytes(id)),
    }
