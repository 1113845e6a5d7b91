"""Draws a token a row from its logits: temperature, then top-k, top-p, min-p and typical-p, in
transformers' order, for all rows at once that use the same of them.

Each row's arithmetic is its own, whatever the company. Runs in the worker process; must not know
requests or what came before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .sampling_state import SamplingState
from .transfers import send, send_rows, take_rows

FILTERS = frozenset({"top_k", "top_p", "min_p", "typical_p"})
# A mass is looked for among so many best tokens first, for few rows need more; None: among all
WIDTHS = (256, 4096, None)
# Rows whose top-k is at most so many look at twice as many, since in bfloat16 several are as good as the
# last; others look at all tokens
TOP_KS = (64, 256)
NO_TOKEN, TOO_WIDE = -1, -2
# Logits that are worked on at a time: what that takes beside them is up to some 100 MB
MOST_LOGITS = 1 << 21


@dataclass(frozen=True)
class DrawRules:
    """Of rows that use the same filters: which rows (int64 [m]), and each one's numbers, [m, 1].

    Numbers are float32, but `top_k` int64 and the uniforms in [0, 1) float64. `most` is the largest
    top-k, `best` the one of TOP_KS that holds it, or the vocabulary.
    """

    filters: frozenset[str]
    rows: Tensor
    best: int
    most: int
    uniform: Tensor
    top_k: Tensor
    temperature: Tensor
    top_p: Tensor
    min_p: Tensor
    typical_p: Tensor


class Candidates(NamedTuple):
    """Probabilities [m, width] but for a factor, 0 where a token cannot come; their tokens in ascending
    order, or None: the vocabulary; and bool [m, 1], false where the width does not hold all of them.
    """

    probabilities: Tensor
    tokens: Tensor | None
    is_whole: Tensor


def group_draws(states: Sequence[SamplingState], vocabulary: int, device: torch.device) -> list[DrawRules]:
    """Rules of the rows that are not greedy; `states` are in the order of their logits."""
    groups: dict[tuple[frozenset[str], int], list[int]] = {}
    for row, state in enumerate(states):
        if "temperature" in state.uses:
            best = _round_up(state.request.sampling.top_k, vocabulary)
            groups.setdefault((state.uses & FILTERS, best), []).append(row)
    size = max(1, MOST_LOGITS // vocabulary)
    parts = [
        (best, rows[i : i + size]) for (_, best), rows in groups.items() for i in range(0, len(rows), size)
    ]
    return [_make_rules(part, [states[row] for row in part], best, device) for best, part in parts]


def _round_up(top_k: int, vocabulary: int) -> int:
    """The first of TOP_KS that is not less; else the vocabulary."""
    fitting = (best for best in TOP_KS if 0 < top_k <= best < vocabulary)
    return next(fitting, vocabulary)


def _make_rules(
    rows: Sequence[int], states: Sequence[SamplingState], best: int, device: torch.device
) -> DrawRules:
    numbers = []
    for state in states:
        rules = state.request.sampling
        top_k = min(rules.top_k, best) if rules.top_k > 0 else best
        shares = (rules.top_p, rules.min_p, rules.typical_p)
        numbers.append((state.draw_uniform(), top_k, rules.temperature, *shares))
    table = send(torch.tensor(numbers, dtype=torch.float64), device)
    temperature, top_p, min_p, typical_p = torch.split(table[:, 2:].float(), 1, -1)
    return DrawRules(
        filters=states[0].uses & FILTERS,
        rows=send_rows(rows, device),
        best=best,
        most=max(top_k for _, top_k, *_ in numbers),
        uniform=table[:, :1],
        top_k=table[:, 1:2].long(),
        temperature=temperature,
        top_p=top_p,
        min_p=min_p,
        typical_p=typical_p,
    )


def draw_tokens(logits: Tensor, rules: DrawRules, width: int | None) -> Tensor:
    """Logits [n, vocabulary] → int64 [m], a token for each row of the rules.

    NO_TOKEN where numbers are not finite or nothing is allowed; TOO_WIDE where a mass needs more than
    the `width` best tokens (None: never).
    """
    candidates = filter_tokens(take_rows(logits, rules.rows), rules, width)
    cumulated = candidates.probabilities.double().cumsum_(-1)
    total = cumulated[:, -1:].clone()
    # The token at which the cumulated probability passes the uniform's share of the whole
    places = torch.searchsorted(cumulated, rules.uniform * total, right=True)
    tokens = places.clamp_(max=cumulated.shape[-1] - 1)
    if candidates.tokens is not None:
        tokens = candidates.tokens.gather(-1, tokens)
    tokens = torch.where(candidates.is_whole, tokens, TOO_WIDE)
    return torch.where(total.isfinite(), tokens, NO_TOKEN)[:, 0]


def filter_tokens(logits: Tensor, rules: DrawRules, width: int | None) -> Candidates:
    """Logits [m, vocabulary] of the rules' rows → their candidates."""
    scaled = logits.float() / rules.temperature
    candidates = _keep_best(scaled, rules, width) if "top_k" in rules.filters else _keep_all(scaled)
    if "top_p" in rules.filters:
        candidates = _keep_nucleus(candidates, rules.top_p, width)
    if "min_p" in rules.filters:
        probabilities = candidates.probabilities
        least = rules.min_p * probabilities.amax(-1, keepdim=True)
        candidates = candidates._replace(probabilities=probabilities.masked_fill(probabilities < least, 0))
    return _keep_typical(candidates, rules.typical_p, width) if "typical_p" in rules.filters else candidates


def _keep_all(scaled: Tensor) -> Candidates:
    return Candidates(scaled.softmax(-1), None, torch.ones_like(scaled[:, :1], dtype=torch.bool))


def _keep_best(scaled: Tensor, rules: DrawRules, width: int | None) -> Candidates:
    """Keeps the top-k best tokens and those as good as the last of them."""
    if width != WIDTHS[0] or rules.best >= scaled.shape[-1]:
        least = scaled.topk(rules.most).values.gather(-1, rules.top_k - 1)
        weights = _weigh_against_best(scaled.masked_fill_(scaled < least, float("-inf")))
        return Candidates(weights, None, torch.ones_like(least, dtype=torch.bool))
    best = scaled.topk(min(2 * rules.best, scaled.shape[-1]))
    least, last = best.values.gather(-1, rules.top_k - 1), best.values[:, -1:]
    tokens, order = best.indices.sort(-1)
    weights = _weigh_against_best(best.values.masked_fill(best.values < least, float("-inf")))
    return Candidates(weights.gather(-1, order), tokens, (last < least) | (last == float("-inf")))


def _weigh_against_best(scaled: Tensor) -> Tensor:
    """Probabilities divided by the greatest, which are the same however many tokens stand beside."""
    return (scaled - scaled.amax(-1, keepdim=True)).exp_()


def _keep_nucleus(candidates: Candidates, top_p: Tensor, width: int | None) -> Candidates:
    """Keeps the fewest best tokens whose mass reaches top_p; always the best one."""
    probabilities, among, was_whole = candidates
    mass = top_p * sum_rows(probabilities)
    if width != WIDTHS[0]:
        is_kept, is_whole = _find_best(probabilities, probabilities, mass, width)
        return Candidates(probabilities * is_kept, among, is_whole & was_whole)
    if among is None:
        ordered, places = probabilities.topk(min(width, probabilities.shape[-1]))
    else:  # few, so that of equal ones the lowest tokens can come first
        ordered, places = probabilities.sort(dim=-1, descending=True, stable=True)
    is_kept = torch.arange(ordered.shape[-1], device=mass.device) < _count_tokens(ordered, mass)
    places, order = places.sort(-1)
    kept = (ordered * is_kept).gather(-1, order)
    is_whole = (ordered.sum(-1, keepdim=True) >= mass) & was_whole
    return Candidates(kept, places if among is None else among.gather(-1, places), is_whole)


def _keep_typical(candidates: Candidates, mass: Tensor, width: int | None) -> Candidates:
    """Keeps the tokens whose surprise is nearest to the entropy until their mass is reached
    (arXiv:2202.00666).
    """
    probabilities, tokens, was_whole = candidates
    normed = probabilities / sum_rows(probabilities)
    surprise = -normed.log()
    entropy = sum_rows((surprise * normed).nan_to_num(nan=0.0))
    nearness = -(surprise - entropy).abs().nan_to_num(nan=float("inf"))
    is_kept, is_whole = _find_best(nearness, normed, mass, width)
    return Candidates(probabilities * is_kept, tokens, is_whole & was_whole)


def _find_best(keys: Tensor, weights: Tensor, mass: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """The fewest tokens of the greatest keys whose weights reach the mass, bool [m, vocabulary], and
    whether `width` of them are enough, bool [m, 1]. Of equal keys the lowest tokens come first.
    """
    size = keys.shape[-1]
    best = keys.topk(min(width or size, size))
    of_best = weights.gather(-1, best.indices)
    count = _count_tokens(of_best, mass)
    bound = best.values.gather(-1, count - 1)
    is_above, is_bound = keys > bound, keys == bound
    room = count - is_above.sum(-1, keepdim=True)
    is_kept = is_above | (is_bound & (is_bound.cumsum(-1, dtype=torch.int32) <= room))
    is_enough = of_best.sum(-1, keepdim=True) >= mass
    return is_kept, is_enough if best.values.shape[-1] < size else torch.ones_like(is_enough)


def _count_tokens(ordered: Tensor, mass: Tensor) -> Tensor:
    """The tokens it takes, in their order, to reach the mass; at least one, for a mass may be 0 in
    float32. [m, width] → [m, 1].
    """
    before = ordered.cumsum(-1) - ordered
    return (before < mass).sum(-1, keepdim=True).clamp_(min=1)


def sum_rows(numbers: Tensor) -> Tensor:
    """[m, n] → [m, 1]. One row alone would be split among the threads, and rounded otherwise than in
    company: so it comes twice.
    """
    rows = numbers.expand(2, -1) if len(numbers) == 1 else numbers
    return rows.sum(-1, keepdim=True)[: len(numbers)]
