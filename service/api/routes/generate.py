"""The TGI and LoRAX dialect: /generate, /generate_stream and POST /.

API process; must not know another dialect's wire shapes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter, Request, Response

from ...core.request import Token
from ...core.sampling import Sampling
from ...errors import BadRequest
from ..errors import document_errors
from ..generation.admission import Admission, Admitted, GenerationOptions, tokenize_text
from ..generation.answer import Answer, TextPiece
from ..generation.grammar import compile_grammar
from ..generation.logprobs import best_tokens, finite_logprob
from ..generation.rendering import render_answer
from ..generation.sse import EVENTS, stream_events
from ..schemas.generate import GenerateRequest, Parameters
from ..schemas.shared import COLD, one_unless
from ..scopes import KEY_SCOPE

if TYPE_CHECKING:
    from ...text.tokenizers import AdapterTokenizer

router = APIRouter(tags=["generation"], dependencies=[KEY_SCOPE])

DEFAULT_TOKENS = 128
RESPONSES = EVENTS | document_errors(403, 404, 409, 422, 429, 503, 504)
JsonDict = dict[str, Any]


@router.post("/generate", responses=RESPONSES)
async def answer_generate(body: GenerateRequest, request: Request, admission: Admitted) -> Response:
    """Continues a text; with `stream`, as server-sent events."""
    if body.stream:
        return await _answer_stream(body, request, admission)
    return await _answer_whole(body, admission)


@router.post("/generate_stream", responses=RESPONSES)
async def generate_stream(body: GenerateRequest, request: Request, admission: Admitted) -> Response:
    """Continues a text as server-sent events: one a token, the last with the whole text, the
    details and the adapter.
    """
    parameters = body.parameters or Parameters()
    if (parameters.best_of or 1) > 1:
        raise BadRequest("best_of over 1 cannot be streamed", param="best_of")
    return await _answer_stream(body, request, admission)


@router.post("/", responses=RESPONSES)
async def answer_root(body: GenerateRequest, request: Request, admission: Admitted) -> Response:
    """The same for clients that post to the root; a whole answer is a list of one."""
    if body.stream:
        return await _answer_stream(body, request, admission)
    return await _answer_whole(body, admission, listed=True)


async def _answer_whole(body: GenerateRequest, admission: Admission, listed: bool = False) -> Response:
    parameters = body.parameters or Parameters()
    is_ranked = (parameters.best_of or 1) > 1
    logprobs = bool(parameters.details) or is_ranked
    await _admit_prompt(body, parameters, admission, logprobs)
    await admission.finish_answers()
    answers = sorted(admission.answers, key=lambda answer: answer.likelihood, reverse=True)
    whole = _make_whole(body, parameters, answers, admission)
    headers = admission.make_headers() | admission.make_times()
    headers["x-generated-tokens"] = str(len(answers[0].tokens))
    return await render_answer([whole] if listed else whole, headers)


def _make_whole(
    body: GenerateRequest, parameters: Parameters, answers: list[Answer], admission: Admission
) -> JsonDict:
    """The best answer, which is the first, and in its details the others."""
    best, *others = answers
    text = _answer_text(body, parameters, best)
    whole: JsonDict = {"generated_text": text, "adapter": admission.adapter}
    if parameters.details:
        details = _make_details(parameters, best)
        if others:
            details["best_of_sequences"] = _describe_others(body, parameters, others)
        whole["details"] = details
    return whole


def _describe_others(
    body: GenerateRequest, parameters: Parameters, others: list[Answer]
) -> Iterator[JsonDict]:
    for answer in others:
        text = _answer_text(body, parameters, answer)
        yield {"generated_text": text, **_make_details(parameters, answer)}


async def _answer_stream(body: GenerateRequest, request: Request, admission: Admission) -> Response:
    parameters = body.parameters or Parameters()
    (answer,) = await _admit_prompt(body, parameters, admission, logprobs=True)
    events = _iterate_events(body, parameters, admission, answer)
    return stream_events(request, events, admission.make_headers())


async def _iterate_events(
    body: GenerateRequest, parameters: Parameters, admission: Admission, answer: Answer
) -> AsyncIterator[JsonDict]:
    async for piece in answer.read_pieces():
        token = _token_object(answer, piece, named=False)
        event: JsonDict = {"token": token, "generated_text": None, "details": None}
        if parameters.top_n_tokens:
            event["top_tokens"] = _top_tokens(answer, piece.token, parameters.top_n_tokens)
        if piece.ending is not None:
            event["generated_text"] = _answer_text(body, parameters, answer)
            event["details"] = _count_tokens(parameters, answer)
            if parameters.decoder_input_details:
                event["details"]["prefill"] = _make_prefill(answer)
            event["adapter"] = admission.adapter
        yield event


# ---- the request


async def _admit_prompt(
    body: GenerateRequest, parameters: Parameters, admission: Admission, logprobs: bool
) -> list[Answer]:
    tokenizer = await _enter_adapters(parameters, admission)
    _check_source(parameters, admission)
    prompt = await tokenize_text(admission.http_request, tokenizer, body.inputs)
    if parameters.grammar:
        constraint = await compile_grammar(parameters.grammar, "grammar")
    else:
        constraint = await compile_grammar(parameters.response_format)
    if parameters.truncate:
        prompt = prompt[-parameters.truncate :]
    options = _make_options(parameters, constraint, logprobs)
    return admission.submit_prompt(tokenizer, prompt, options)


async def _enter_adapters(parameters: Parameters, admission: Admission) -> AdapterTokenizer:
    if parameters.weights:
        return await admission.enter_mix(parameters.weights)
    is_base = parameters.adapter_id in admission.services.bases
    return await admission.enter_adapter(None if is_base else parameters.adapter_id)


def _make_options(parameters: Parameters, constraint: str | None, logprobs: bool) -> GenerationOptions:
    top_tokens = (parameters.top_n_tokens or 0) if logprobs else None
    return GenerationOptions(
        sampling=_make_sampling(parameters, constraint, top_tokens),
        max_tokens=parameters.max_new_tokens,
        default_tokens=DEFAULT_TOKENS,
        stop=parameters.stop or (),
        count=parameters.best_of or 1,
        seed=parameters.seed,
        ignore_eos=bool(parameters.ignore_eos_token),
        prompt_logprobs=0 if parameters.decoder_input_details else None,
        priority=parameters.priority,
        param="max_new_tokens",
        prompt_param="inputs",
    )


def _check_source(parameters: Parameters, admission: Admission) -> None:
    """Checks that `adapter_source` is true of the adapter; it chooses nothing, for an id names one
    registered content.
    """
    if not parameters.adapter_source:
        return
    if admission.version is None:
        raise BadRequest("adapter_source: goes only with an adapter_id", param="adapter_source")
    source = admission.version.place.source
    is_from_hub, is_hub_wanted = source.startswith("hub:"), parameters.adapter_source == "hub"
    if is_from_hub != is_hub_wanted:
        refusal = f"adapter_source: {parameters.adapter_id} does not come from there"
        raise BadRequest(refusal, param="adapter_source")


def _make_sampling(parameters: Parameters, constraint: str | None, logprobs: int | None) -> Sampling:
    temperature = one_unless(parameters.temperature)
    if not parameters.sampled or temperature < COLD:
        temperature = 0.0
    return Sampling(
        temperature=temperature,
        top_k=max(parameters.top_k or 0, 0),
        top_p=one_unless(parameters.top_p),
        typical_p=one_unless(parameters.typical_p),
        repetition_penalty=one_unless(parameters.repetition_penalty),
        frequency_penalty=parameters.frequency_penalty or 0.0,
        presence_penalty=parameters.presence_penalty or 0.0,
        logprobs=logprobs,
        grammar=constraint,
    )


# ---- the answer


def _answer_text(body: GenerateRequest, parameters: Parameters, answer: Answer) -> str:
    return body.inputs + answer.text if parameters.return_full_text else answer.text


def _count_tokens(parameters: Parameters, answer: Answer) -> JsonDict:
    is_seed_told = parameters.sampled or parameters.seed is not None
    return {
        "finish_reason": answer.ending,
        "prompt_tokens": len(answer.prompt),
        "generated_tokens": len(answer.tokens),
        "seed": answer.seed if is_seed_told else None,
    }


def _make_details(parameters: Parameters, answer: Answer) -> JsonDict:
    details = _count_tokens(parameters, answer)
    details["prefill"] = _make_prefill(answer) if parameters.decoder_input_details else []
    details["tokens"] = (_token_object(answer, piece, named=True) for piece in answer.pieces)
    wanted = parameters.top_n_tokens
    if wanted:
        details["top_tokens"] = (_top_tokens(answer, piece.token, wanted) for piece in answer.pieces)
    return details


def _make_prefill(answer: Answer) -> Iterator[JsonDict]:
    for token in answer.scored or map(Token, answer.prompt):
        yield {
            "id": token.id,
            "text": answer.tokenizer.token_text(token.id),
            "logprob": finite_logprob(token.logprob),
        }


def _token_object(answer: Answer, piece: TextPiece, named: bool) -> JsonDict:
    """`named`: a special token shows its name; in a stream it adds nothing, so that joined texts
    are the whole one.
    """
    token = piece.token
    assert token is not None, "an answer of at least one token has one in every piece"
    text = answer.tokenizer.token_text(token.id) if piece.special and named else piece.text
    return {
        "id": token.id,
        "text": text,
        "logprob": finite_logprob(token.logprob),
        "special": piece.special,
    }


def _top_tokens(answer: Answer, token: Token | None, wanted: int) -> list[JsonDict]:
    if token is None:
        return []
    tokenizer = answer.tokenizer
    return [
        {
            "id": id,
            "text": tokenizer.token_text(id),
            "logprob": finite_logprob(logprob),
            "special": id in tokenizer.special,
        }
        for id, logprob in best_tokens(token, wanted)
    ]
