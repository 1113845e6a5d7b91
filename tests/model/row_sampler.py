"""The sampler, written for one row at a time and as plainly as can be: what the batched one is held to.

Of equally likely tokens at the edge of a nucleus the lowest are kept.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from service.core.error_codes import ErrorCode
from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.model.sampler import SamplingError, sampling_error

NO_TOKEN = -1


@dataclass
class RowState:
    """A request's own past, as far as it bears on the next token."""

    request: Request
    generated: list[int] = field(default_factory=list)
    matcher: Any = None


class RowSampler:
    """`matcher_of` makes a grammar matcher from the grammar's text; it is only called for requests
    that have one.
    """

    def __init__(self, matcher_of: Callable[[str], Any]) -> None:
        self._matcher_of = matcher_of
        self._states: dict[int, RowState] = {}

    def finish_request(self, request: int) -> None:
        self._states.pop(request, None)

    def sample_batch(self, logits: Tensor, requests: Sequence[Request]) -> list[Token | SamplingError]:
        """logits [n, vocabulary] → one token a row, or why it has none.

        Log probabilities are those of the unchanged logits, in float32.
        """
        greedy = _choose_greedy(logits, requests)
        tokens: list[Token | SamplingError] = []
        for i, request in enumerate(requests):
            try:
                tokens.append(self._sample_one(logits[i], request, greedy.get(i)))
            except SamplingError as error:
                tokens.append(error)
        self._remember_tokens(requests, tokens)
        return tokens

    def _sample_one(self, logits: Tensor, request: Request, chosen: int | None) -> Token:
        if chosen == NO_TOKEN:
            raise sampling_error(request)
        if chosen is None:
            chosen = self._choose_token(logits.float(), self._state_of(request))
        wanted = request.sampling.logprobs
        return Token(chosen) if wanted is None else with_logprobs(logits, chosen, wanted)

    def _state_of(self, request: Request) -> RowState:
        return self._states.setdefault(request.id, RowState(request))

    def _remember_tokens(self, requests: Sequence[Request], tokens: Sequence[Token | SamplingError]) -> None:
        """Once all are chosen: where that raised, a step that is run again finds no token consumed."""
        for request, token in zip(requests, tokens, strict=True):
            if isinstance(token, Token):
                state = self._state_of(request)
                state.generated.append(token.id)
                if state.matcher is not None and token.id not in request.eos:
                    state.matcher.consume_token(token.id)

    def _choose_token(self, logits: Tensor, state: RowState) -> int:
        sampling = state.request.sampling
        logits = _add_bias(_apply_penalties(logits.clone(), state), sampling)
        if len(state.generated) < sampling.min_tokens:
            logits[list(state.request.eos)] = float("-inf")
        for *before, last in sampling.bad_words:
            if state.generated[len(state.generated) - len(before) :] == before:
                logits[last] = -1e30
        if sampling.grammar is not None:
            logits = self._apply_grammar(logits, state, sampling.grammar)
        if not logits.max().isfinite():
            raise sampling_error(state.request)
        if sampling.temperature == 0:
            return int(logits.argmax())
        uniform = _draw_uniform(sampling.seed, len(state.generated))
        return draw_token(probabilities(logits, sampling), uniform)

    def _apply_grammar(self, logits: Tensor, state: RowState, grammar: str) -> Tensor:
        """Forbids what the grammar does not allow next; where it is complete only eos is left."""
        if state.matcher is None:
            state.matcher = self._matcher_of(grammar)
        if state.matcher.is_error():
            reason = state.matcher.get_error().partition("\n")[0][:200]
            raise SamplingError(f"the grammar cannot be followed any further: {reason}", ErrorCode.VALIDATION)
        if state.matcher.is_stopped():
            allowed = torch.zeros(logits.shape[0], dtype=torch.bool)
        else:
            allowed = _unpack_bits(state.matcher.compute_bitmask(), logits.shape[0])
        ends = list(state.request.eos)
        if ends:  # an eos that is also text would end what is not whole
            allowed[ends] = state.matcher.is_stopped() or state.matcher.is_accepting()
        return logits.masked_fill(~allowed.to(logits.device), float("-inf"))


def _unpack_bits(bitmask: bytes, count: int) -> Tensor:
    """Bool [count], one for each bit from the lowest on; false where the mask has ended."""
    packed = torch.frombuffer(bytearray(bitmask), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1
    allowed = bits.bool().flatten()
    return torch.nn.functional.pad(allowed, (0, max(0, count - len(allowed))))[:count]


def _choose_greedy(logits: Tensor, requests: Sequence[Request]) -> dict[int, int]:
    """Row: its best token, of the rows that need no more than that; NO_TOKEN where it is not finite."""
    rows = [i for i, request in enumerate(requests) if _is_greedy(request.sampling)]
    best = logits[rows].max(-1) if len(rows) < len(requests) else logits.max(-1)
    tokens = best.indices.tolist()
    is_finite = best.values.isfinite().tolist()
    return {
        row: token if finite else NO_TOKEN for row, token, finite in zip(rows, tokens, is_finite, strict=True)
    }


def _is_greedy(sampling: Sampling) -> bool:
    """Greedy with nothing that changes the logits."""
    changes = (
        sampling.repetition_penalty != 1,
        sampling.frequency_penalty != 0,
        sampling.presence_penalty != 0,
        sampling.logit_bias,
        sampling.grammar is not None,
        sampling.min_tokens != 0,
        sampling.bad_words,
    )
    return sampling.temperature == 0 and not any(changes)


def _add_bias(logits: Tensor, sampling: Sampling) -> Tensor:
    """In place and all at once: one by one a thousand would take longer than a step."""
    if sampling.logit_bias:
        parts = zip(*sampling.logit_bias, strict=True)
        ids, values = (torch.tensor(part, device=logits.device) for part in parts)
        logits.index_add_(0, ids, values.to(logits.dtype))
    return logits


def _draw_uniform(seed: int, index: int) -> float:
    return random.Random((seed << 32) + index).random()


def _apply_penalties(logits: Tensor, state: RowState) -> Tensor:
    """Repetition penalty over prompt and answer (CTRL, arXiv:1909.05858); frequency and presence
    over the answer, as OpenAI's.
    """
    sampling = state.request.sampling
    if sampling.repetition_penalty != 1:
        known = torch.tensor(sorted({*state.request.prompt, *state.generated}), device=logits.device)
        scores, penalty = logits[known], sampling.repetition_penalty
        logits[known] = torch.where(scores < 0, scores * penalty, scores / penalty)
    if state.generated and (sampling.frequency_penalty or sampling.presence_penalty):
        counts = Counter(state.generated)
        ids = torch.tensor(list(counts), device=logits.device)
        times = torch.tensor(list(counts.values()), device=logits.device, dtype=logits.dtype)
        logits[ids] -= sampling.frequency_penalty * times + sampling.presence_penalty
    return logits


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """Temperature, then top-k, top-p, min-p and typical-p, in transformers' order.

    Logits [vocabulary] → probabilities [vocabulary].
    """
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[0]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[-1], float("-inf"))
    probabilities = logits.softmax(-1)
    if sampling.top_p < 1:
        probabilities = _keep_nucleus(probabilities, sampling.top_p)
    if sampling.min_p > 0:
        probabilities = probabilities.masked_fill(probabilities < sampling.min_p * probabilities.max(), 0)
    return _keep_typical(probabilities, sampling.typical_p) if sampling.typical_p < 1 else probabilities


def _keep_nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keeps the fewest best tokens whose mass reaches top_p; always the best one."""
    best = probabilities.sort(descending=True, stable=True)
    before = best.values.cumsum(-1) - best.values
    # A mass that is 0 in float32 still has the best one
    kept = best.indices[: max(1, int((before < top_p * probabilities.sum()).sum()))]
    return torch.zeros_like(probabilities).scatter(0, kept, probabilities[kept])


def _keep_typical(probabilities: Tensor, mass: float) -> Tensor:
    """Keeps the tokens whose surprise is nearest to the entropy until their mass reaches `mass`
    (arXiv:2202.00666).
    """
    normed = probabilities / probabilities.sum()
    surprise = -normed.log()
    entropy = torch.nansum(surprise * normed)
    order = (surprise - entropy).abs().nan_to_num(nan=float("inf")).argsort(stable=True)
    before = normed[order].cumsum(-1) - normed[order]
    kept = order[: max(1, int((before < mass).sum()))]
    return torch.zeros_like(probabilities).scatter(0, kept, probabilities[kept])


def draw_token(probabilities: Tensor, uniform: float) -> int:
    """The token at which the cumulated probability passes `uniform` of the whole."""
    cumulated = probabilities.double().cumsum(-1)
    at = int(torch.searchsorted(cumulated, uniform * cumulated[-1], right=True))
    return min(at, int(probabilities.nonzero()[-1]))


def with_logprobs(logits: Tensor, chosen: int, wanted: int) -> Token:
    """The chosen token with its log probability and those of the `wanted` best."""
    logprobs = logits.float().log_softmax(-1)
    top: tuple[tuple[int, float], ...] = ()
    if wanted:
        values, ids = logprobs.topk(wanted)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return Token(chosen, float(logprobs[chosen]), top)
