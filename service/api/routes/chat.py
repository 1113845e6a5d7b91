"""POST /v1/chat/completions. Knows its own wire shapes only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...errors import BadRequest
from ...text.tool_calls import Call, Calls
from ..errors import documented
from ..generation.admission import Admission, Admitted, Ask, chat_prompt
from ..generation.answer import Answer, Ending
from ..generation.grammar import compiled, of_calls
from ..generation.logprobs import best, finite
from ..generation.openai_objects import FINISH, Told, chosen, merged, shell, usage
from ..generation.rendering import made_later, render_answer
from ..generation.sse import EVENTS, streamed
from ..schemas.chat import ChatRequest, Message

if TYPE_CHECKING:
    from ...text.tokenizers import Voice

router = APIRouter()


@router.post("/v1/chat/completions", responses=EVENTS | documented(404, 422, 429, 503, 504, openai=True))
async def chat(body: ChatRequest, request: Request, admitted: Admitted) -> Response:
    """Answers a conversation, or calls tools; with `stream`, as server-sent events."""
    voice = await admitted.enter(chosen(body.model, admitted.rooms))
    tools = [tool.function.told for tool in body.tools or ()] if body.tool_choice != "none" else []
    format = voice.format() if tools else None
    prompt = await chat_prompt(admitted, voice, [_turn(m) for m in body.messages], tools)
    admitted.submit(voice, prompt, await _ask(body))
    single = body.parallel_tool_calls is False
    calls = [Calls(format, body.names if tools else (), bool(body.forced), single) for _ in admitted.answers]
    if body.stream:
        outside = shell("chatcmpl", "chat.completion.chunk", body.model, admitted)
        return streamed(request, _chunks(body, admitted, outside, calls), admitted.headers())
    await admitted.finish()
    choices = (_choice(body, i, answer, calls[i]) for i, answer in enumerate(admitted.answers))
    told = shell("chatcmpl", "chat.completion", body.model, admitted) | {"choices": choices, "usage": usage(admitted)}
    return await render_answer(told, admitted.headers() | admitted.times())


def _turn(message: Message) -> Told:
    """A message as templates expect it: its text in one piece, the arguments of calls as objects."""
    turn: Told = {"role": message.role, "content": message.text}
    turn |= {key: value for key in ("name", "tool_call_id") if (value := getattr(message, key)) is not None}
    if message.tool_calls:
        turn["tool_calls"] = [
            {"id": c.id, "type": "function", "function": {"name": c.function.name, "arguments": _arguments(c.function.arguments)}}
            for c in message.tool_calls
        ]
    return turn


def _arguments(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


async def _ask(body: ChatRequest) -> Ask:
    return Ask(
        sampling=body.sampling(body.top_logprobs or 0 if body.logprobs else None, await _grammar(body)),
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        default_tokens=None,
        stop=body.stop or (),
        count=body.n or 1,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
    )


async def _grammar(body: ChatRequest) -> str | None:
    """The grammar of the response format, or of a call that the client insists on."""
    constraint = await compiled(body.response_format)
    if not body.forced:
        return constraint
    if constraint is not None or body.ignore_eos or body.min_tokens:
        raise BadRequest("tool_choice: a forced call cannot go with response_format, ignore_eos or min_tokens", param="tool_choice")
    return await of_calls({function.name: function.parameters or {"type": "object"} for function in body.forced}, "tools")


# ---- telling


def _choice(body: ChatRequest, index: int, answer: Answer, calls: Calls) -> Told:
    content = calls.push(answer.text)
    rest, found = calls.finish()
    message: Told = {"role": "assistant", "content": content + rest if content + rest or not found else None, "refusal": None}
    if found:
        message["tool_calls"] = [_call(call) for call in found]
    logprobs = _logprobs(answer.voice, answer.tokens, body.top_logprobs or 0) if body.logprobs else None
    return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": _finish(answer.ending, found)}


async def _chunks(body: ChatRequest, admitted: Admission, outside: Told, calls: list[Calls]) -> AsyncIterator[Told]:
    """A chunk for every token, also one that adds no text yet, so that a client sees the work go on."""
    outside |= {"usage": None} if body.usage_wanted else {}
    async for i, piece in merged(admitted.answers):
        answer = admitted.answers[i]
        logprobs = _logprobs(answer.voice, [piece.token], body.top_logprobs or 0) if body.logprobs and piece.token else None
        if len(answer.pieces) == 1:
            yield outside | _delta(i, {"role": "assistant", "content": ""})
        text, found = calls[i].push(piece.text), list[Call]()
        if piece.ending:
            rest, found = calls[i].finish()
            text += rest
        if text or logprobs or piece.ending is not Ending.EOS:
            yield outside | _delta(i, {"content": text}, logprobs=logprobs)
        for at, call in enumerate(found):
            yield outside | _delta(i, {"tool_calls": [{"index": at, **_call(call)}]})
        if piece.ending:
            yield outside | _delta(i, {}, _finish(piece.ending, found))
    if body.usage_wanted:
        yield outside | {"choices": [], "usage": usage(admitted)}


def _delta(index: int, delta: Told, finish: str | None = None, logprobs: Told | None = None) -> Told:
    return {"choices": [{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}]}


def _finish(ending: Ending, calls: Sequence[Call]) -> str:
    return "tool_calls" if calls and ending is not Ending.LENGTH else FINISH[ending]


def _call(call: Call) -> Told:
    return {"id": f"call_{uuid4().hex[:24]}", "type": "function", "function": {"name": call.name, "arguments": call.arguments}}


def _logprobs(voice: Voice, tokens: Sequence[Token], wanted: int) -> Told:
    return {"content": made_later(len(tokens), _tokens(voice, tokens, wanted)), "refusal": None}


def _tokens(voice: Voice, tokens: Sequence[Token], wanted: int) -> Iterator[Told]:
    for token in tokens:
        tops = [_spelled(voice, *pair) for pair in best(token, wanted)]
        yield {**_spelled(voice, token.id, token.logprob), "top_logprobs": tops}


def _spelled(voice: Voice, id: int, logprob: float | None) -> Told:
    return {"token": voice.piece(id), "logprob": finite(logprob), "bytes": list(voice.piece_bytes(id))}
