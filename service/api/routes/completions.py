"""POST /v1/completions. Knows its own wire shapes only."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ..errors import documented
from ..generation.admission import Admission, Admitted, Ask, decoded, tokenized
from ..generation.answer import Answer, Piece
from ..generation.grammar import compiled
from ..generation.logprobs import best, finite
from ..generation.openai_objects import FINISH, Told, chosen, merged, shell, usage
from ..generation.rendering import made_later, render_answer
from ..generation.sse import EVENTS, streamed
from ..schemas.openai import CompletionRequest

if TYPE_CHECKING:
    from ...text.tokenizers import Voice

router = APIRouter()

DEFAULT_TOKENS = 16


@router.post("/v1/completions", responses=EVENTS | documented(404, 422, 429, 503, 504, openai=True))
async def completions(body: CompletionRequest, request: Request, admitted: Admitted) -> Response:
    """Continues one prompt or several; with `stream`, as server-sent events."""
    voice = await admitted.enter(chosen(body.model, admitted.rooms))
    ask = await _ask(body)
    echoes: list[str] = []
    rulers: list[Ruler] = []
    for prompt in body.prompts:
        ids = await tokenized(request, voice, prompt) if isinstance(prompt, str) else tuple(prompt)
        admitted.submit(voice, ids, ask)
        echo = prompt if isinstance(prompt, str) or not body.echo else await decoded(voice, ids)
        echoes += [str(echo) if body.echo else ""] * ask.count
        start = 0 if body.echo or body.logprobs is None else len(await decoded(voice, ids))
        rulers += [Ruler(start) for _ in range(ask.count)]
    outside = shell("cmpl", "text_completion", body.model, admitted)
    if body.stream:
        return streamed(request, _chunks(body, admitted, outside, echoes, rulers), admitted.headers())
    await admitted.finish()
    choices = (_choice(body, i, *one) for i, one in enumerate(zip(admitted.answers, echoes, rulers, strict=True)))
    told = outside | {"choices": choices, "usage": usage(admitted)}
    return await render_answer(told, admitted.headers() | admitted.times())


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


def _choice(body: CompletionRequest, index: int, answer: Answer, echo: str, ruler: Ruler) -> Told:
    tokens = (*(answer.scored if body.echo else ()), *answer.tokens)
    logprobs = None if body.logprobs is None else _logprobs(answer.voice, tokens, body.logprobs, ruler)
    return {"index": index, "text": echo + answer.text, "logprobs": logprobs, "finish_reason": FINISH[answer.ending]}


async def _chunks(
    body: CompletionRequest, admitted: Admission, outside: Told, echoes: list[str], rulers: list[Ruler]
) -> AsyncIterator[Told]:
    usual: dict[str, Any] = {"usage": None} if body.usage_wanted else {}
    async for i, piece in merged(admitted.answers):
        answer = admitted.answers[i]
        first = len(answer.pieces) == 1
        logprobs = None
        if body.logprobs is not None:
            tokens = _scored(answer, piece, first)
            logprobs = _logprobs(answer.voice, tokens, body.logprobs, rulers[i])
        text = (echoes[i] if first else "") + piece.text
        finish = FINISH[piece.ending] if piece.ending else None
        yield outside | {"choices": [{"index": i, "text": text, "logprobs": logprobs, "finish_reason": finish}]} | usual
    if body.usage_wanted:
        yield outside | {"choices": [], "usage": usage(admitted)}


def _scored(answer: Answer, piece: Piece, first: bool) -> tuple[Token, ...]:
    return (*(answer.scored if first else ()), *((piece.token,) if piece.token else ()))


class Ruler:
    """Where the next token of an answer begins, in characters of the tokens' own texts."""

    def __init__(self, start: int) -> None:
        self.at = start

    def offsets(self, texts: Iterable[str]) -> Iterator[int]:
        for text in texts:
            yield self.at
            self.at += len(text)


def _logprobs(voice: Voice, tokens: Sequence[Token], wanted: int, ruler: Ruler) -> Told:
    """Parallel lists, one entry a token."""
    lists: dict[str, Iterator[Any]] = {
        "tokens": (voice.piece(token.id) for token in tokens),
        "token_logprobs": (finite(token.logprob) for token in tokens),
        "top_logprobs": (_top(voice, token, wanted) for token in tokens),
        "text_offset": ruler.offsets(voice.piece(token.id) for token in tokens),
    }
    return {name: made_later(len(tokens), elements) for name, elements in lists.items()}


def _top(voice: Voice, token: Token, wanted: int) -> Told | None:
    """The likeliest tokens and the chosen one; None for the first of a prompt, which nothing predicts."""
    if token.logprob is None:
        return None
    likeliest = [*best(token, wanted), (token.id, token.logprob)]
    return {voice.piece(id): finite(logprob) for id, logprob in likeliest}
