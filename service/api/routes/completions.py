"""POST /v1/completions. Knows its own wire shapes only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationAsk, decoded, tokenize_text
from ..generation.answer import Answer, TextPiece
from ..generation.grammar import compile_grammar
from ..generation.logprobs import best_tokens, finite_logprob
from ..generation.openai_objects import FINISH, Told, chosen_adapter, merge_answers, object_fields, usage_of
from ..generation.rendering import made_later, render_answer
from ..generation.sse import EVENTS, stream_events
from ..schemas.openai import CompletionRequest

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter()

DEFAULT_TOKENS = 16


@router.post("/v1/completions", responses=EVENTS | document_errors(404, 422, 429, 503, 504, openai=True))
async def answer_completion(body: CompletionRequest, request: Request, admitted: Admitted) -> Response:
    """Continues one prompt or several; with `stream`, as server-sent events."""
    voice = await admitted.enter_adapter(chosen_adapter(body.model, admitted.rooms))
    ask = await _make_ask(body)
    echoes: list[str] = []
    rulers: list[Ruler] = []
    for prompt in body.prompts:
        ids = await tokenize_text(request, voice, prompt) if isinstance(prompt, str) else tuple(prompt)
        admitted.submit_prompt(voice, ids, ask)
        echo = prompt if isinstance(prompt, str) or not body.echo else await decoded(voice, ids)
        echoes += [str(echo) if body.echo else ""] * ask.count
        start = 0 if body.echo or body.logprobs is None else len(await decoded(voice, ids))
        rulers += [Ruler(start) for _ in range(ask.count)]
    outside = object_fields("cmpl", "text_completion", body.model, admitted)
    if body.stream:
        return stream_events(
            request, _stream_chunks(body, admitted, outside, echoes, rulers), admitted.make_headers()
        )
    await admitted.finish_answers()
    choices = (
        _make_choice(body, i, *one)
        for i, one in enumerate(zip(admitted.answers, echoes, rulers, strict=True))
    )
    told = outside | {"choices": choices, "usage": usage_of(admitted)}
    return await render_answer(told, admitted.make_headers() | admitted.make_times())


async def _make_ask(body: CompletionRequest) -> GenerationAsk:
    return GenerationAsk(
        sampling=body.make_sampling(body.logprobs, await compile_grammar(body.response_format)),
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_TOKENS,
        stop=body.stop or (),
        count=body.n or 1,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _make_choice(body: CompletionRequest, index: int, answer: Answer, echo: str, ruler: Ruler) -> Told:
    tokens = (*(answer.scored if body.echo else ()), *answer.tokens)
    logprobs = None if body.logprobs is None else _logprobs_object(answer.voice, tokens, body.logprobs, ruler)
    return {
        "index": index,
        "text": echo + answer.text,
        "logprobs": logprobs,
        "finish_reason": FINISH[answer.ending],
    }


async def _stream_chunks(
    body: CompletionRequest, admitted: Admission, outside: Told, echoes: list[str], rulers: list[Ruler]
) -> AsyncIterator[Told]:
    usual: dict[str, Any] = {"usage": None} if body.usage_wanted else {}
    async for i, piece in merge_answers(admitted.answers):
        answer = admitted.answers[i]
        first = len(answer.pieces) == 1
        logprobs = None
        if body.logprobs is not None:
            tokens = _scored_tokens(answer, piece, first)
            logprobs = _logprobs_object(answer.voice, tokens, body.logprobs, rulers[i])
        text = (echoes[i] if first else "") + piece.text
        finish = FINISH[piece.ending] if piece.ending else None
        yield (
            outside
            | {"choices": [{"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}]}
            | usual
        )
    if body.usage_wanted:
        yield outside | {"choices": [], "usage": usage_of(admitted)}


def _scored_tokens(answer: Answer, piece: TextPiece, first: bool) -> tuple[Token, ...]:
    return (*(answer.scored if first else ()), *((piece.token,) if piece.token else ()))


class Ruler:
    """Where the next token of an answer begins, in characters of the tokens' own texts."""

    def __init__(self, start: int) -> None:
        self.at = start

    def offsets(self, texts: Iterable[str]) -> Iterator[int]:
        for text in texts:
            yield self.at
            self.at += len(text)


def _logprobs_object(voice: AdapterTokenizer, tokens: Sequence[Token], wanted: int, ruler: Ruler) -> Told:
    """Parallel lists, one entry a token."""
    lists: dict[str, Iterator[Any]] = {
        "tokens": (voice.token_text(token.id) for token in tokens),
        "token_logprobs": (finite_logprob(token.logprob) for token in tokens),
        "top_logprobs": (_top_logprobs(voice, token, wanted) for token in tokens),
        "text_offset": ruler.offsets(voice.token_text(token.id) for token in tokens),
    }
    return {name: made_later(len(tokens), elements) for name, elements in lists.items()}


def _top_logprobs(voice: AdapterTokenizer, token: Token, wanted: int) -> Told | None:
    """The likeliest tokens and the chosen one;

    None for the first of a prompt, which nothing predicts.
    """
    if token.logprob is None:
        return None
    likeliest = [*best_tokens(token, wanted), (token.id, token.logprob)]
    return {voice.token_text(id): finite_logprob(logprob) for id, logprob in likeliest}
