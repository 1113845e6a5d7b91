"""POST /v1/completions. Knows its own wire shapes only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ..engine.request import Token
from .admission import Admission, Admitted, Ask, tokenized
from .answer import Answer, Piece
from .errors import documented
from .grammar import compiled
from .openai_shapes import FINISH, Told, chosen, merged, shell, usage
from .schemas_openai import CompletionRequest
from .sse import EVENTS, dumped, streamed
from .tops import best, finite

if TYPE_CHECKING:
    from ..engine.text import Voice

router = APIRouter()

DEFAULT_TOKENS = 16


@router.post("/v1/completions", responses=EVENTS | documented(404, 422, 429, 503, 504, openai=True))
async def completions(body: CompletionRequest, request: Request, admitted: Admitted) -> Response:
    """Continues one prompt or several; with `stream`, as server-sent events."""
    voice = await admitted.enter(chosen(body.model, admitted.rooms))
    ask = await _ask(body)
    echoes: list[str] = []
    for prompt in body.prompts:
        ids = await tokenized(request, voice, prompt) if isinstance(prompt, str) else tuple(prompt)
        admitted.submit(voice, ids, ask)
        echo = prompt if isinstance(prompt, str) else voice.decode(ids)
        echoes += [echo if body.echo else ""] * ask.count
    outside = shell("cmpl", "text_completion", body.model, admitted)
    if body.stream:
        return streamed(request, _chunks(body, admitted, outside, echoes), admitted.headers())
    await admitted.finish()
    choices = [_choice(body, i, answer, echo) for i, (answer, echo) in enumerate(zip(admitted.answers, echoes, strict=True))]
    told = outside | {"choices": choices, "usage": usage(admitted)}
    return Response(dumped(told), headers=admitted.headers() | admitted.times(), media_type="application/json")


async def _ask(body: CompletionRequest) -> Ask:
    return Ask(
        sampling=body.sampling(body.logprobs, await compiled(body.response_format)),
        max_tokens=body.max_tokens,
        default_tokens=DEFAULT_TOKENS,
        stop=body.stop or (),
        count=body.n or 1,
        seed=body.seed,
        ignore_eos=bool(body.ignore_eos),
        prompt_logprobs=body.logprobs if body.echo else None,
    )


def _choice(body: CompletionRequest, index: int, answer: Answer, echo: str) -> Told:
    tokens = (*(answer.scored if body.echo else ()), *answer.tokens)
    logprobs = None if body.logprobs is None else _logprobs(answer.voice, tokens, body.logprobs, 0 if body.echo else _start(answer))
    return {"index": index, "text": echo + answer.text, "logprobs": logprobs, "finish_reason": FINISH[answer.ending]}


async def _chunks(body: CompletionRequest, admitted: Admission, outside: Told, echoes: list[str]) -> AsyncIterator[Told]:
    usual: dict[str, Any] = {"usage": None} if body.usage_wanted else {}
    offsets = [0 if body.echo else _start(answer) for answer in admitted.answers] if body.logprobs is not None else []
    async for i, piece in merged(admitted.answers):
        answer = admitted.answers[i]
        first = len(answer.pieces) == 1
        logprobs = None
        if body.logprobs is not None:
            tokens = _scored(answer, piece, first)
            logprobs = _logprobs(answer.voice, tokens, body.logprobs, offsets[i])
            offsets[i] += sum(len(text) for text in logprobs["tokens"])
        text = (echoes[i] if first else "") + piece.text
        finish = FINISH[piece.ending] if piece.ending else None
        yield outside | {"choices": [{"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}]} | usual
    if body.usage_wanted:
        yield outside | {"choices": [], "usage": usage(admitted)}


def _scored(answer: Answer, piece: Piece, first: bool) -> tuple[Token, ...]:
    return (*(answer.scored if first else ()), *((piece.token,) if piece.token else ()))


def _start(answer: Answer) -> int:
    return len(answer.voice.decode(answer.prompt))


def _logprobs(voice: Voice, tokens: Sequence[Token], wanted: int, offset: int) -> Told:
    """Parallel lists, one entry a token; `text_offset` counts characters of the tokens' own texts."""
    texts = [voice.piece(token.id) for token in tokens]
    offsets = []
    for text in texts:
        offsets.append(offset)
        offset += len(text)
    return {
        "tokens": texts,
        "token_logprobs": [finite(token.logprob) for token in tokens],
        "top_logprobs": [_top(voice, token, wanted) for token in tokens],
        "text_offset": offsets,
    }


def _top(voice: Voice, token: Token, wanted: int) -> Told | None:
    """The likeliest tokens and the chosen one; None for the first of a prompt, which nothing predicts."""
    if token.logprob is None:
        return None
    likeliest = [*best(token, wanted), (token.id, token.logprob)]
    return {voice.piece(id): finite(logprob) for id, logprob in likeliest}
