"""POST /v1/chat/completions. Knows its own wire shapes only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...errors import BadRequest
from ...text.tool_calls import CallParser, ToolCallText
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationAsk, chat_prompt
from ..generation.answer import Answer, AnswerEnding
from ..generation.grammar import calls_grammar, compile_grammar
from ..generation.logprobs import best_tokens, finite_logprob
from ..generation.openai_objects import FINISH, Told, chosen_adapter, merge_answers, object_fields, usage_of
from ..generation.rendering import made_later, render_answer
from ..generation.sse import EVENTS, stream_events
from ..schemas.chat import ChatMessage, ChatRequest

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter()


@router.post("/v1/chat/completions", responses=EVENTS | document_errors(404, 422, 429, 503, 504, openai=True))
async def answer_chat(body: ChatRequest, request: Request, admitted: Admitted) -> Response:
    """Answers a conversation, or calls tools; with `stream`, as server-sent events."""
    voice = await admitted.enter_adapter(chosen_adapter(body.model, admitted.rooms))
    tools = [tool.function.told for tool in body.tools or ()] if body.tool_choice != "none" else []
    format = voice.tool_format() if tools else None
    prompt = await chat_prompt(admitted, voice, [_template_message(m) for m in body.messages], tools)
    admitted.submit_prompt(voice, prompt, await _make_ask(body))
    single = body.parallel_tool_calls is False
    calls = [
        CallParser(format, body.names if tools else (), bool(body.forced), single) for _ in admitted.answers
    ]
    if body.stream:
        outside = object_fields("chatcmpl", "chat.completion.chunk", body.model, admitted)
        return stream_events(request, _stream_chunks(body, admitted, outside, calls), admitted.make_headers())
    await admitted.finish_answers()
    choices = (_make_choice(body, i, answer, calls[i]) for i, answer in enumerate(admitted.answers))
    told = object_fields("chatcmpl", "chat.completion", body.model, admitted) | {
        "choices": choices,
        "usage": usage_of(admitted),
    }
    return await render_answer(told, admitted.make_headers() | admitted.make_times())


def _template_message(message: ChatMessage) -> Told:
    """A message as templates expect it: its text in one piece, the arguments of calls as objects."""
    turn: Told = {"role": message.role, "content": message.text}
    turn |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
    if message.tool_calls:
        turn["tool_calls"] = [
            {
                "id": c.id,
                "type": "function",
                "function": {"name": c.function.name, "arguments": _parse_arguments(c.function.arguments)},
            }
            for c in message.tool_calls
        ]
    return turn


def _parse_arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _make_ask(body: ChatRequest) -> GenerationAsk:
    return GenerationAsk(
        sampling=body.make_sampling(
            body.top_logprobs or 0 if body.logprobs else None, await _make_grammar(body)
        ),
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        default_tokens=None,
        stop=body.stop or (),
        count=body.n or 1,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
    )


async def _make_grammar(body: ChatRequest) -> str | None:
    """The grammar of the response format, or of a call that the client insists on."""
    constraint = await compile_grammar(body.response_format)
    if not body.forced:
        return constraint
    if constraint is not None or body.ignore_eos or body.min_tokens:
        raise BadRequest(
            "tool_choice: a forced call cannot go with response_format, ignore_eos or min_tokens",
            param="tool_choice",
        )
    return await calls_grammar(
        {function.name: function.parameters or {"type": "object"} for function in body.forced}, "tools"
    )


# ---- telling


def _make_choice(body: ChatRequest, index: int, answer: Answer, calls: CallParser) -> Told:
    content = calls.push_text(answer.text)
    rest, found = calls.finish_calls()
    message: Told = {
        "role": "assistant",
        "content": content + rest if content + rest or not found else None,
        "refusal": None,
    }
    if found:
        message["tool_calls"] = [_call_object(call) for call in found]
    logprobs = (
        _logprobs_object(answer.voice, answer.tokens, body.top_logprobs or 0) if body.logprobs else None
    )
    return {
        "index": index,
        "message": message,
        "logprobs": logprobs,
        "finish_reason": _finish_reason(answer.ending, found),
    }


async def _stream_chunks(
    body: ChatRequest, admitted: Admission, outside: Told, calls: list[CallParser]
) -> AsyncIterator[Told]:
    """A chunk for every token, also one that adds no text yet, so that a client sees the work go
    on.
    """
    outside |= {"usage": None} if body.usage_wanted else {}
    async for i, piece in merge_answers(admitted.answers):
        answer = admitted.answers[i]
        logprobs = (
            _logprobs_object(answer.voice, [piece.token], body.top_logprobs or 0)
            if body.logprobs and piece.token
            else None
        )
        if len(answer.pieces) == 1:
            yield outside | _make_delta(i, {"role": "assistant", "content": ""})
        text, found = calls[i].push_text(piece.text), list[ToolCallText]()
        if piece.ending:
            rest, found = calls[i].finish_calls()
            text += rest
        if text or logprobs or piece.ending is not AnswerEnding.EOS:
            yield outside | _make_delta(i, {"content": text}, logprobs=logprobs)
        for at, call in enumerate(found):
            yield outside | _make_delta(i, {"tool_calls": [{"index": at, **_call_object(call)}]})
        if piece.ending:
            yield outside | _make_delta(i, {}, _finish_reason(piece.ending, found))
    if body.usage_wanted:
        yield outside | {"choices": [], "usage": usage_of(admitted)}


def _make_delta(index: int, delta: Told, finish: str | None = None, logprobs: Told | None = None) -> Told:
    return {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]}


def _finish_reason(ending: AnswerEnding, calls: Sequence[ToolCallText]) -> str:
    return "tool_calls" if calls and ending is not AnswerEnding.LENGTH else FINISH[ending]


def _call_object(call: ToolCallText) -> Told:
    return {
        "id": f"call_{uuid4().hex[:24]}",
        "type": "function",
        "function": {"name": call.name, "arguments": call.arguments},
    }


def _logprobs_object(voice: AdapterTokenizer, tokens: Sequence[Token], wanted: int) -> Told:
    return {"content": made_later(len(tokens), _tokens(voice, tokens, wanted)), "refusal": None}


def _tokens(voice: AdapterTokenizer, tokens: Sequence[Token], wanted: int) -> Iterator[Told]:
    for token in tokens:
        tops = [_logprob_entry(voice, *pair) for pair in best_tokens(token, wanted)]
        yield {**_logprob_entry(voice, token.id, token.logprob), "top_logprobs": tops}


def _logprob_entry(voice: AdapterTokenizer, id: int, logprob: float | None) -> Told:
    return {
        "token": voice.token_text(id),
        "logprob": finite_logprob(logprob),
        "bytes": list(voice.piece_bytes(id)),
    }
