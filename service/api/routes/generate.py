"""The TGI and LoRAX dialect: /generate, /generate_stream and POST /.

Knows its own wire shapes only.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...core.sampling import Sampling
from ...errors import BadRequest
from ..errors import document_errors
from ..generation import grammar
from ..generation.admission import Admission, Admitted, GenerationAsk, tokenize_text
from ..generation.answer import Answer, TextPiece
from ..generation.logprobs import best_tokens, finite_logprob
from ..generation.rendering import render_answer
from ..generation.sse import EVENTS, stream_events
from ..schemas.generate import GenerateRequest, Parameters
from ..schemas.shared import COLD
from ..scopes import KEY_SCOPE

router = APIRouter(tags=["generation"], dependencies=[KEY_SCOPE])

DEFAULT_TOKENS = 128
TOLD = EVENTS | document_errors(404, 422, 429, 503, 504)
Told = dict[str, Any]


@router.post("/generate", responses=TOLD)
async def answer_generate(body: GenerateRequest, request: Request, admitted: Admitted) -> Response:
    """Continues a text; with `stream`, as server-sent events."""
    return await (_answer_stream if body.stream else _answer_whole)(body, request, admitted)


@router.post("/generate_stream", responses=TOLD)
async def generate_stream(body: GenerateRequest, request: Request, admitted: Admitted) -> Response:
    """Continues a text as server-sent events: one a token, the last with the whole text, the
    details and the adapter.
    """
    if body.parameters and (body.parameters.best_of or 1) > 1:
        raise BadRequest("best_of over 1 cannot be streamed", param="best_of")
    return await _answer_stream(body, request, admitted)


@router.post("/", responses=TOLD)
async def answer_root(body: GenerateRequest, request: Request, admitted: Admitted) -> Response:
    """The same for clients that post to the root; a whole answer is a list of one."""
    return await (
        _answer_stream(body, request, admitted)
        if body.stream
        else _answer_whole(body, request, admitted, listed=True)
    )


async def _answer_whole(
    body: GenerateRequest, request: Request, admitted: Admitted, listed: bool = False
) -> Response:
    asked = body.parameters or Parameters()
    await _admit_prompt(body, asked, admitted, logprobs=bool(asked.details) or (asked.best_of or 1) > 1)
    await admitted.finish_answers()
    answers = sorted(admitted.answers, key=lambda answer: answer.likelihood, reverse=True)
    told: Told = {"generated_text": _answer_text(body, asked, answers[0]), "adapter": admitted.adapter}
    if asked.details:
        told["details"] = _make_details(asked, answers[0])
        if len(answers) > 1:
            others = (
                {"generated_text": _answer_text(body, asked, a), **_make_details(asked, a)}
                for a in answers[1:]
            )
            told["details"]["best_of_sequences"] = others
    headers = (
        admitted.make_headers() | admitted.make_times() | {"x-generated-tokens": str(len(answers[0].tokens))}
    )
    return await render_answer([told] if listed else told, headers)


async def _answer_stream(body: GenerateRequest, request: Request, admitted: Admitted) -> Response:
    asked = body.parameters or Parameters()
    (answer,) = await _admit_prompt(body, asked, admitted, logprobs=True)
    return stream_events(request, _stream_events(body, asked, admitted, answer), admitted.make_headers())


async def _stream_events(
    body: GenerateRequest, asked: Parameters, admitted: Admission, answer: Answer
) -> AsyncIterator[Told]:
    async for piece in answer.read_pieces():
        event: Told = {
            "token": _token_object(answer, piece, named=False),
            "generated_text": None,
            "details": None,
        }
        if asked.top_n_tokens:
            event["top_tokens"] = _top_tokens(answer, piece.token, asked.top_n_tokens)
        if piece.ending is not None:
            details = _count_tokens(asked, answer) | (
                {"prefill": _make_prefill(answer)} if asked.decoder_input_details else {}
            )
            event |= {
                "generated_text": _answer_text(body, asked, answer),
                "details": details,
                "adapter": admitted.adapter,
            }
        yield event


# ---- getting in


async def _admit_prompt(
    body: GenerateRequest, asked: Parameters, admitted: Admission, logprobs: bool
) -> list[Answer]:
    voice = await admitted.enter_adapter(
        None if asked.adapter_id in admitted.rooms.bases else asked.adapter_id
    )
    _check_source(asked, admitted)
    prompt = await tokenize_text(admitted.request, voice, body.inputs)
    constraint = await (
        grammar.compile_grammar(asked.grammar, "grammar")
        if asked.grammar
        else grammar.compile_grammar(asked.response_format)
    )
    ask = GenerationAsk(
        sampling=_make_sampling(asked, constraint, asked.top_n_tokens or 0 if logprobs else None),
        max_tokens=asked.max_new_tokens,
        default_tokens=DEFAULT_TOKENS,
        stop=asked.stop or (),
        count=asked.best_of or 1,
        seed=asked.seed,
        ignore_eos=bool(asked.ignore_eos_token),
        prompt_logprobs=0 if asked.decoder_input_details else None,
        param="max_new_tokens",
        prompt_param="inputs",
    )
    return admitted.submit_prompt(voice, prompt[-asked.truncate :] if asked.truncate else prompt, ask)


def _check_source(asked: Parameters, admitted: Admission) -> None:
    """`adapter_source` chooses nothing here, for an id names one registered content; but what it
    says must be true.
    """
    if asked.adapter_source:
        if admitted.generation is None:
            raise BadRequest("adapter_source: goes only with an adapter_id", param="adapter_source")
        hub = admitted.generation.place.source.startswith("hub:")
        if hub != (asked.adapter_source == "hub"):
            raise BadRequest(
                f"adapter_source: {asked.adapter_id} does not come from there", param="adapter_source"
            )


def _make_sampling(asked: Parameters, constraint: str | None, logprobs: int | None) -> Sampling:
    temperature = (1.0 if asked.temperature is None else asked.temperature) if asked.sampled else 0.0
    return Sampling(
        temperature=temperature if temperature >= COLD else 0.0,
        top_k=max(asked.top_k or 0, 0),
        top_p=1.0 if asked.top_p is None else asked.top_p,
        typical_p=1.0 if asked.typical_p is None else asked.typical_p,
        repetition_penalty=1.0 if asked.repetition_penalty is None else asked.repetition_penalty,
        frequency_penalty=asked.frequency_penalty or 0.0,
        presence_penalty=asked.presence_penalty or 0.0,
        logprobs=logprobs,
        grammar=constraint,
    )


# ---- telling


def _answer_text(body: GenerateRequest, asked: Parameters, answer: Answer) -> str:
    return body.inputs + answer.text if asked.return_full_text else answer.text


def _count_tokens(asked: Parameters, answer: Answer) -> Told:
    return {
        "finish_reason": answer.ending,
        "prompt_tokens": len(answer.prompt),
        "generated_tokens": len(answer.tokens),
        "seed": answer.seed if asked.sampled or asked.seed is not None else None,
    }


def _make_details(asked: Parameters, answer: Answer) -> Told:
    told = _count_tokens(asked, answer) | {
        "prefill": _make_prefill(answer) if asked.decoder_input_details else [],
        "tokens": (_token_object(answer, piece, named=True) for piece in answer.pieces),
    }
    if asked.top_n_tokens:
        told["top_tokens"] = (
            _top_tokens(answer, piece.token, asked.top_n_tokens or 0) for piece in answer.pieces
        )
    return told


def _make_prefill(answer: Answer) -> Iterator[Told]:
    for token in answer.scored or map(Token, answer.prompt):
        yield {
            "id": token.id,
            "text": answer.voice.token_text(token.id),
            "logprob": finite_logprob(token.logprob),
        }


def _token_object(answer: Answer, piece: TextPiece, named: bool) -> Told:
    """`named`: a special token shows its name; in a stream it adds nothing, so that joined texts
    are the whole one.
    """
    assert piece.token is not None, "an answer of at least one token has one in every piece"
    text = answer.voice.token_text(piece.token.id) if piece.special and named else piece.text
    return {
        "id": piece.token.id,
        "text": text,
        "logprob": finite_logprob(piece.token.logprob),
        "special": piece.special,
    }


def _top_tokens(answer: Answer, token: Token | None, wanted: int) -> list[Told]:
    special = answer.voice.special
    found = best_tokens(token, wanted) if token else []
    return [
        {
            "id": id,
            "text": answer.voice.token_text(id),
            "logprob": finite_logprob(lp),
            "special": id in special,
        }
        for id, lp in found
    ]
