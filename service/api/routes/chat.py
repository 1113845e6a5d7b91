"""POST /v1/chat/completions. API process; must not know another dialect's wire shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...errors import BadRequest
from ...text.tool_calls import AnswerParser, CallDelta, ToolCallText
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions
from ..generation.answer import Answer, AnswerEnding, TextPiece
from ..generation.conversation import Conversation, new_call_id, submit_conversation
from ..generation.logprobs import best_tokens, finite_logprob
from ..generation.openai_conversation import end_turns, offer_functions, read_turns
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
from ..schemas.chat import ChatRequest

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter()


@router.post(
    "/v1/chat/completions", responses=EVENTS | document_errors(403, 404, 409, 422, 429, 503, 504, openai=True)
)
async def answer_chat(body: ChatRequest, request: Request, admission: Admitted) -> Response:
    """Answers a conversation, or calls tools; with `stream`, as server-sent events."""
    tokenizer = await enter_model(body, admission)
    options, param = await _make_options(body, tokenizer)
    readers = await submit_conversation(admission, tokenizer, _make_conversation(body), options, param)
    parsers = [reader.parser for reader in readers]
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


def _make_conversation(body: ChatRequest) -> Conversation:
    is_offered = body.tool_choice != "none"
    return Conversation(
        read_turns(body.messages),
        offer_functions(body.functions) if is_offered else (),
        [function.name for function in body.forced],
        single=body.parallel_tool_calls is False,
        template=end_turns(body.template_variables, body.add_generation_prompt, body.continue_final_message),
    )


def _whole_prompt_ids(body: ChatRequest, admission: Admission) -> JsonDict:
    return {"prompt_token_ids": id_list(admission.answers[0].prompt)} if body.return_token_ids else {}


async def _make_options(body: ChatRequest, tokenizer: AdapterTokenizer) -> tuple[GenerationOptions, str]:
    """The options, and the name of the field that binds the answer; a forced call goes before it."""
    if body.forced and (body.ignore_eos or body.min_tokens):
        refusal = "tool_choice: a forced call cannot go with ignore_eos or min_tokens"
        raise BadRequest(refusal, param="tool_choice")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    bound = None if body.forced else await bound_grammar(body)
    options = await openai_options(body, tokenizer, logprobs, bound)
    options = replace(
        options,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
    )
    return options, body.bound[0] if body.bound else ""


# ---- the answer


def _make_choice(body: ChatRequest, index: int, answer: Answer, parser: AnswerParser) -> JsonDict:
    content = parser.push_text(answer.text)
    rest, calls = parser.finish_calls()
    content += rest
    has_content = bool(content) or not calls
    message: JsonDict = {"role": "assistant", "content": content if has_content else None, "refusal": None}
    if thoughts := parser.take_thoughts():
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = [_call_object(call) for call in calls]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs_object(body, answer.tokenizer, answer.tokens),
        "finish_reason": _finish_reason(answer.ending, calls),
    } | trainer_fields(body, answer)


async def _stream_chunks(
    body: ChatRequest, admission: Admission, shared_fields: JsonDict, parsers: list[AnswerParser]
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
    body: ChatRequest, index: int, answer: Answer, piece: TextPiece, parser: AnswerParser
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
    body: ChatRequest, index: int, answer: Answer, piece: TextPiece, parser: AnswerParser
) -> Iterator[JsonDict]:
    logprobs = _logprobs_object(body, answer.tokenizer, [piece.token]) if piece.token else None
    text, calls = parser.push_text(piece.text), list[ToolCallText]()
    if piece.ending:
        rest, calls = parser.finish_calls()
        text += rest
    thoughts, deltas = parser.take_thoughts(), parser.take_deltas()
    if thoughts:
        yield _make_delta(index, {"reasoning_content": thoughts})
    if text or logprobs or not (thoughts or deltas or piece.ending is AnswerEnding.EOS):
        yield _make_delta(index, {"content": text}, logprobs=logprobs)
    for delta in deltas:
        yield _make_delta(index, {"tool_calls": [_call_delta(delta)]})
    if piece.ending:
        yield _make_delta(index, {}, _finish_reason(piece.ending, calls))


def _call_delta(delta: CallDelta) -> JsonDict:
    """The first piece of a call has all its fields, the others have arguments alone."""
    if delta.name is None:
        return {"index": delta.index, "function": {"arguments": delta.arguments}}
    return {"index": delta.index, **_call_object(ToolCallText(delta.name, delta.arguments))}


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
        "id": new_call_id(),
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
