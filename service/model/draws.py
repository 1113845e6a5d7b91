"""Draws a token a row from its logits: temperature, then top-k, top-p, min-p and typical-p, in
transformers' order, for all rows at once that use the same of them.

Each row's arithmetic is its own, whatever the company. On a CPU a kernel does the same
(kernels/draw.h), but for typical-p. Runs in the worker process; must not know requests or what came
before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .logit_edits import Row
from .transfers import send, send_rows, take_rows

FILTERS = frozenset({"top_k", "top_p", "min_p", "typical_p"})
# A mass is looked for among so many best tokens first, for few rows need more; None: among all
WIDTHS = (256, 4096, None)
NO_TOKEN, TOO_WIDE = -1, -2
# Logits that are worked on at a time: what that takes beside them is up to some 100 MB
MOST_LOGITS = 1 << 21

# As `draw_tokens`
Draw: TypeAlias = Callable[[Tensor, "DrawRules", int | None], Tensor]


@dataclass(frozen=True)
class DrawRules:
    """Of m rows that use the same filters: which (int64 [m]), and their numbers.

    `table` is float64 [m, 6]: the uniform in [0, 1), top-k (the vocabulary's size for none),
    temperature, top-p, min-p, typical-p. `most` is the largest top-k.
    """

    filters: frozenset[str]
    rows: Tensor
    most: int
    table: Tensor

    @property
    def uniform(self) -> Tensor:
        """float64 [m, 1]."""
        return self.table[:, :1]

    @property
    def top_k(self) -> Tensor:
        """int64 [m, 1]."""
        return self.table[:, 1:2].long()

    @property
    def shares(self) -> Sequence[Tensor]:
        """Temperature, top-p, min-p and typical-p, float32 [m, 1] each."""
        return torch.split(self.table[:, 2:].float(), 1, -1)


class Candidates(NamedTuple):
    """Probabilities [m, vocabulary] but for a factor, 0 where a token cannot come; and bool [m, 1],
    false where the width does not hold all that can.
    """

    probabilities: Tensor
    is_whole: Tensor


def group_draws(rows: Sequence[Row], vocabulary: int, device: torch.device) -> list[DrawRules]:
    """Rules of the rows that are not greedy; `rows` are in the order of their logits."""
    groups: dict[frozenset[str], list[int]] = {}
    for i, row in enumerate(rows):
        if "temperature" in row.state.uses:
            groups.setdefault(row.state.uses & FILTERS, []).append(i)
    size = max(1, MOST_LOGITS // vocabulary)
    parts = [group[i : i + size] for group in groups.values() for i in range(0, len(group), size)]
    return [_make_rules(part, [rows[i] for i in part], vocabulary, device) for part in parts]


def _make_rules(rows: Sequence[int], own: Sequence[Row], vocabulary: int, device: torch.device) -> DrawRules:
    numbers = []
    for row in own:
        rules = row.state.request.sampling
        top_k = min(rules.top_k, vocabulary) if rules.top_k > 0 else vocabulary
        shares = (rules.top_p, rules.min_p, rules.typical_p)
        numbers.append((row.state.draw_uniform(row.place), top_k, rules.temperature, *shares))
    return DrawRules(
        filters=own[0].state.uses & FILTERS,
        rows=send_rows(rows, device),
        most=max(top_k for _, top_k, *_ in numbers),
        table=send(torch.tensor(numbers, dtype=torch.float64), device),
    )


def draw_tokens(logits: Tensor, rules: DrawRules, width: int | None) -> Tensor:
    """Logits [n, vocabulary] → int64 [m], a token for each row of the rules.

    NO_TOKEN where numbers are not finite or nothing is allowed; TOO_WIDE where a mass needs more
    than the `width` best tokens (None: never).
    """
    candidates = filter_tokens(take_rows(logits, rules.rows), rules, width)
    cumulated = candidates.probabilities.double().cumsum_(-1)
    total = cumulated[:, -1:].clone()
    # The token at which the cumulated probability passes the uniform's share of the whole
    tokens = torch.searchsorted(cumulated, rules.uniform * total, right=True)
    tokens = torch.where(candidates.is_whole, tokens.clamp_(max=cumulated.shape[-1] - 1), TOO_WIDE)
    return torch.where(total.isfinite(), tokens, NO_TOKEN)[:, 0]


def filter_tokens(logits: Tensor, rules: DrawRules, width: int | None) -> Candidates:
    """Logits [m, vocabulary] of the rules' rows → their candidates."""
    temperature, top_p, min_p, typical_p = rules.shares
    scaled = logits.float() / temperature
    if "top_k" in rules.filters:
        scaled = _keep_best(scaled, rules)
    candidates = Candidates(scaled.softmax(-1), torch.ones_like(temperature, dtype=torch.bool))
    if "top_p" in rules.filters:
        candidates = _keep_nucleus(candidates, top_p, width)
    if "min_p" in rules.filters:
        probabilities = candidates.probabilities
        least = min_p * probabilities.amax(-1, keepdim=True)
        candidates = candidates._replace(probabilities=probabilities.masked_fill(probabilities < least, 0))
    return _keep_typical(candidates, typical_p, width) if "typical_p" in rules.filters else candidates


def _keep_best(scaled: Tensor, rules: DrawRules) -> Tensor:
    """Keeps the top-k best tokens and those as good as the last of them."""
    least = scaled.topk(rules.most).values.gather(-1, rules.top_k - 1)
    return scaled.masked_fill_(scaled < least, float("-inf"))


def _keep_nucleus(candidates: Candidates, top_p: Tensor, width: int | None) -> Candidates:
    """Keeps the fewest best tokens whose mass reaches top_p; always the best one."""
    probabilities, _ = candidates
    is_kept, is_whole = _find_best(probabilities, probabilities, top_p * sum_rows(probabilities), width)
    return Candidates(probabilities * is_kept, is_whole)


def _keep_typical(candidates: Candidates, mass: Tensor, width: int | None) -> Candidates:
    """Keeps the tokens whose surprise is nearest to the entropy until their mass is reached
    (arXiv:2202.00666).
    """
    probabilities, was_whole = candidates
    normed = probabilities / sum_rows(probabilities)
    surprise = -normed.log()
    entropy = sum_rows((surprise * normed).nan_to_num(nan=0.0))
    nearness = -(surprise - entropy).abs().nan_to_num(nan=float("inf"))
    is_kept, is_whole = _find_best(nearness, normed, mass, width)
    return Candidates(probabilities * is_kept, is_whole & was_whole)


def _find_best(keys: Tensor, weights: Tensor, mass: Tensor, width: int | None) -> tuple[Tensor, Tensor]:
    """The fewest tokens of the greatest keys whose weights reach the mass, bool [m, vocabulary],
    and whether `width` of them are enough, bool [m, 1]. Of equal keys the lowest tokens come first.
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
    """[m, n] → [m, 1]. One row alone would be split among the threads, and rounded otherwise than
    in company: so it comes twice.
    """
    rows = numbers.expand(2, -1) if len(numbers) == 1 else numbers
    return rows.sum(-1, keepdim=True)[: len(numbers)]
