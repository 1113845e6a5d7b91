"""The tokens of prompts and answers by their ids, as vLLM's objects have them for trainers.

API process; must not know a route.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ..schemas.openai import OpenAIRequest
from .answer import Answer
from .logprobs import best_tokens, finite_logprob
from .rendering import defer_elements

JsonDict = dict[str, Any]


def id_list(ids: Sequence[int]) -> Any:
    """The ids as a list for `render_pieces`."""
    return defer_elements(len(ids), (id for id in ids))


def trainer_fields(body: OpenAIRequest, answer: Answer) -> JsonDict:
    """The fields of a finished choice that a trainer asks for."""
    fields: JsonDict = {}
    if body.return_token_ids:
        fields["token_ids"] = id_list([token.id for token in answer.tokens])
    if body.prompt_logprobs is not None:
        entries = _score_entries(answer, body.prompt_logprobs)
        fields["prompt_logprobs"] = defer_elements(len(answer.scored), entries)
    return fields


def _score_entries(answer: Answer, wanted: int) -> Iterator[JsonDict | None]:
    """An entry for each token of the prompt; none for the first, which nothing predicts."""
    for token in answer.scored:
        if token.logprob is None:
            yield None
            continue
        best = best_tokens(token, wanted)
        entry = {
            str(id): _score_entry(answer, id, logprob, rank) for rank, (id, logprob) in enumerate(best, 1)
        }
        yield {str(token.id): _score_entry(answer, token.id, token.logprob, None)} | entry


def _score_entry(answer: Answer, id: int, logprob: float, rank: int | None) -> JsonDict:
    """`rank` is known of the likeliest tokens only."""
    text = answer.tokenizer.token_text(id)
    return {"logprob": finite_logprob(logprob), "rank": rank, "decoded_token": text}
