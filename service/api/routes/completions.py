"""POST /v1/completions. API process; must not know another dialect's wire shapes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions, decode_ids, tokenize_text
from ..generation.answer import Answer, TextPiece
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
from ..schemas.openai import CompletionRequest

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter()

DEFAULT_TOKENS = 16


@router.post(
    "/v1/completions", responses=EVENTS | document_errors(403, 404, 409, 422, 429, 503, 504, openai=True)
)
async def answer_completion(body: CompletionRequest, request: Request, admission: Admitted) -> Response:
    """Continues one prompt or several; with `stream`, as server-sent events."""
    tokenizer = await enter_model(body, admission)
    options = await _make_options(body, tokenizer)
    layouts: list[TextLayout] = []
    for prompt in body.prompts:
        ids = await tokenize_text(request, tokenizer, prompt) if isinstance(prompt, str) else tuple(prompt)
        admission.submit_prompt(tokenizer, ids, options)
        echo, start = await _make_layout(body, tokenizer, prompt, ids)
        layouts += [TextLayout(echo, start) for _ in range(options.count)]
    shared_fields = object_fields("cmpl", "text_completion", body.model, admission)
    if body.stream:
        chunks = _stream_chunks(body, admission, shared_fields, layouts)
        return stream_events(request, chunks, admission.make_headers())
    await admission.finish_answers()
    answers = zip(admission.answers, layouts, strict=True)
    choices = (_make_choice(body, i, answer, layout) for i, (answer, layout) in enumerate(answers))
    completion = shared_fields | {"choices": choices, "usage": usage_of(admission)}
    return await render_answer(completion, admission.make_headers() | admission.make_times())


async def _make_layout(
    body: CompletionRequest, tokenizer: AdapterTokenizer, prompt: str | list[int], ids: tuple[int, ...]
) -> tuple[str, int]:
    """The text that goes before an answer, and where the answer's first token begins."""
    if body.echo:
        echo = prompt if isinstance(prompt, str) else await decode_ids(tokenizer, ids)
        return echo, 0
    if body.logprobs is None:
        return "", 0
    text = await decode_ids(tokenizer, ids)
    return "", len(text)


class TextLayout:
    """The echo that goes before an answer's text, and where its next token begins, in characters of
    the tokens' own texts.
    """

    def __init__(self, echo: str, start: int) -> None:
        self.echo = echo
        self._next = start

    def take_offsets(self, texts: Iterable[str]) -> Iterator[int]:
        for text in texts:
            yield self._next
            self._next += len(text)


async def _make_options(body: CompletionRequest, tokenizer: AdapterTokenizer) -> GenerationOptions:
    options = await openai_options(body, tokenizer, body.logprobs, await bound_grammar(body))
    scored = [
        count for count in (body.prompt_logprobs, body.logprobs if body.echo else None) if count is not None
    ]
    return replace(
        options,
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_TOKENS,
        prompt_logprobs=max(scored, default=None),
    )


def _make_choice(body: CompletionRequest, index: int, answer: Answer, layout: TextLayout) -> JsonDict:
    echoed = answer.scored if body.echo else ()
    tokens = (*echoed, *answer.tokens)
    return (
        {
            "index": index,
            "text": layout.echo + answer.text,
            "logprobs": _logprobs_object(body, answer.tokenizer, tokens, layout),
            "finish_reason": FINISH[answer.ending],
        }
        | _prompt_ids(body, answer)
        | trainer_fields(body, answer)
    )


def _prompt_ids(body: CompletionRequest, answer: Answer) -> JsonDict:
    return {"prompt_token_ids": id_list(answer.prompt)} if body.return_token_ids else {}


async def _stream_chunks(
    body: CompletionRequest, admission: Admission, shared_fields: JsonDict, layouts: list[TextLayout]
) -> AsyncIterator[JsonDict]:
    async for i, piece in merge_answers(admission.answers):
        choice = _make_delta(body, i, admission.answers[i], piece, layouts[i])
        yield shared_fields | {"choices": [choice]} | usage_fields(body, admission)
    if body.usage_wanted:
        yield shared_fields | usage_chunk(admission)


def _make_delta(
    body: CompletionRequest, index: int, answer: Answer, piece: TextPiece, layout: TextLayout
) -> JsonDict:
    is_first = len(answer.pieces) == 1
    tokens = _scored_tokens(answer, piece, is_first)
    echo = layout.echo if is_first else ""
    return {
        "index": index,
        "text": echo + piece.text,
        "logprobs": _logprobs_object(body, answer.tokenizer, tokens, layout),
        "finish_reason": FINISH[piece.ending] if piece.ending else None,
    } | _delta_ids(body, answer, piece, is_first)


def _delta_ids(body: CompletionRequest, answer: Answer, piece: TextPiece, is_first: bool) -> JsonDict:
    if not body.return_token_ids:
        return {}
    ids = [] if piece.token is None else [piece.token.id]
    return (_prompt_ids(body, answer) if is_first else {}) | {"token_ids": ids}


def _scored_tokens(answer: Answer, piece: TextPiece, is_first: bool) -> tuple[Token, ...]:
    """The piece's token, if it has one; before the first one the prompt's."""
    echoed = answer.scored if is_first else ()
    if piece.token is None:
        return echoed
    return (*echoed, piece.token)


def _logprobs_object(
    body: CompletionRequest, tokenizer: AdapterTokenizer, tokens: Sequence[Token], layout: TextLayout
) -> JsonDict | None:
    """Parallel lists, one entry a token."""
    wanted = body.logprobs
    if wanted is None:
        return None
    texts = (tokenizer.token_text(token.id) for token in tokens)
    lists: dict[str, Iterator[Any]] = {
        "tokens": (tokenizer.token_text(token.id) for token in tokens),
        "token_logprobs": (finite_logprob(token.logprob) for token in tokens),
        "top_logprobs": (_top_logprobs(tokenizer, token, wanted) for token in tokens),
        "text_offset": layout.take_offsets(texts),
    }
    return {name: defer_elements(len(tokens), elements) for name, elements in lists.items()}


def _top_logprobs(tokenizer: AdapterTokenizer, token: Token, wanted: int) -> JsonDict | None:
    """The likeliest tokens and the chosen one; None for the first of a prompt, which nothing
    predicts.
    """
    if token.logprob is None:
        return None
    likeliest = [*best_tokens(token, wanted), (token.id, token.logprob)]
    return {tokenizer.token_text(id): finite_logprob(logprob) for id, logprob in likeliest}
