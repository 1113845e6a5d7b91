"""POST /v1/chat/completions. API process; must not know another dialect's wire shapes."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...errors import BadRequest
from ...text.template_options import TemplateOptions
from ...text.tool_calls import CallDelta, CallFormat, CallParser, ToolCallText
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions, chat_prompt
from ..generation.answer import Answer, AnswerEnding, TextPiece
from ..generation.call_grammars import bound_or_call
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
from ..schemas.chat import ChatMessage, ChatRequest, FunctionSpec, ToolCall

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
    format = _choose_format(body, tokenizer) if tools else None
    knows_calls = tokenizer.names_word("tool_calls", tools=bool(tools))
    messages = [_template_message(message, knows_calls) for message in body.messages]
    if not tokenizer.names_word("developer", tools=bool(tools)):
        messages = [turn | {"role": ROLE_OF.get(turn["role"], turn["role"])} for turn in messages]
    shown = list(_list_shown(body.messages))
    prompt = await chat_prompt(admission, tokenizer, messages, tools, _template_options(body), shown)
    options = await _make_options(body, tokenizer, format)
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


def _choose_format(body: ChatRequest, tokenizer: AdapterTokenizer) -> CallFormat | None:
    """The form of the calls; a forced one has the grammar's own, and works where no other is known."""
    return tokenizer.find_call_format() if body.forced else tokenizer.tool_format()


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
    return CallParser(format, names, bool(body.forced), is_single, _schemas_of(body.functions))


def _schemas_of(functions: Sequence[FunctionSpec]) -> dict[str, JsonDict]:
    return {function.name: function.parameters or NO_ARGUMENTS for function in functions}


def _list_shown(messages: Sequence[ChatMessage]) -> Iterator[tuple[str, str]]:
    """The places of past calls and results, each with a word that the prompt has unless it drops them."""
    for at, message in enumerate(messages):
        for call in message.tool_calls or ():
            yield f"messages.{at}.tool_calls", call.function.name
        if message.role in ("tool", "function"):
            words = re.findall("[A-Za-z0-9]+", message.text)
            yield f"messages.{at}", max(words, key=len, default="")


def _template_message(message: ChatMessage, knows_calls: bool) -> JsonDict:
    """A message as templates expect it: its text in one piece, the arguments of calls as objects.

    Where a template knows no calls, they are text, in the form that a forced call has.
    """
    turn: JsonDict = {"role": message.role, "content": message.text}
    if message.name is not None:
        turn["name"] = message.name
    reasoning = message.reasoning_content or message.reasoning
    if reasoning:
        turn["reasoning_content"] = reasoning
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    if message.tool_calls and not knows_calls:
        turn["content"] = "\n".join(filter(None, [message.text, *map(_write_call, message.tool_calls)]))
    elif message.tool_calls:
        turn["tool_calls"] = [_template_call(call) for call in message.tool_calls]
    return turn


def _write_call(call: ToolCall) -> str:
    return f'{{"name": {json.dumps(call.function.name)}, "arguments": {call.function.arguments}}}'


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


async def _make_options(
    body: ChatRequest, tokenizer: AdapterTokenizer, format: CallFormat | None
) -> GenerationOptions:
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    options = await openai_options(body, tokenizer, logprobs, await _make_grammar(body, format))
    marks = tokenizer.call_marks if format else frozenset()
    return replace(
        options,
        kept_special=options.kept_special | marks,
        max_tokens=body.max_completion_tokens if body.max_tokens is None else body.max_tokens,
        param="max_tokens" if body.max_completion_tokens is None else "max_completion_tokens",
        prompt_param="messages",
    )


async def _make_grammar(body: ChatRequest, format: CallFormat | None) -> str | None:
    """The grammar of a call that the client insists on; else of what the answer must be, or a call where
    tools are offered.
    """
    if body.forced:
        if body.ignore_eos or body.min_tokens:
            refusal = "tool_choice: a forced call cannot go with ignore_eos or min_tokens"
            raise BadRequest(refusal, param="tool_choice")
        return await calls_grammar(_schemas_of(body.forced), "tools")
    bound = await bound_grammar(body)
    if bound is None or body.bound is None or not _offered_tools(body):
        return bound
    return await bound_or_call(bound, _schemas_of(body.functions), format, body.bound[0])


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
    deltas = parser.take_deltas()
    if text or logprobs or not (deltas or piece.ending is AnswerEnding.EOS):
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
        "id": uuid4().hex[:9],  # nine alphanumerics: Mistral's templates take no other
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
