"""The rules of a step's rows as tensors beside their logits, and the tokens that they give.

Runs in the worker process; must not know what a request remembers or how errors are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..core.request import Token
from .draws import NO_TOKEN, Draw, DrawRules, group_draws
from .logit_edits import LogitEdits, Row, collect_edits
from .logprobs import read_token, score_tokens
from .transfers import Fetched, send_rows, take_rows


@dataclass(frozen=True)
class SamplingBatch:
    """Of n rows: what changes their logits, which are greedy (int64 [m]), how the others draw, and
    by the number of best tokens wanted which want log probabilities (int64 [m]). `wanted` has that
    number for each row.
    """

    edits: LogitEdits
    greedy: Tensor
    draws: Sequence[DrawRules]
    scored: dict[int, Tensor]
    wanted: Sequence[int | None]


def make_batch(rows: Sequence[Row], logits: Tensor) -> SamplingBatch:
    states, device = [row.state for row in rows], logits.device
    greedy = [i for i, state in enumerate(states) if "temperature" not in state.uses]
    logprobs = [state.request.sampling.logprobs for state in states]
    wanted = [None if count is None else min(count, logits.shape[-1]) for count in logprobs]
    counts = {count for count in wanted if count is not None}
    scored = {count: [i for i, other in enumerate(wanted) if other == count] for count in counts}
    return SamplingBatch(
        collect_edits(rows, device),
        send_rows(greedy, device),
        group_draws(rows, logits.shape[-1], device),
        {count: send_rows(chosen, device) for count, chosen in scored.items()},
        wanted,
    )


def choose_tokens(logits: Tensor, batch: SamplingBatch, draw: Draw, width: int | None) -> Tensor:
    """Logits [n, vocabulary] → int64 [n]; below 0 where there is no token, as `draw_tokens` says."""
    edited = batch.edits.apply(logits)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    if len(batch.greedy):
        best = take_rows(edited, batch.greedy).max(-1)
        tokens[batch.greedy] = torch.where(best.values.isfinite(), best.indices, NO_TOKEN)
    for rules in batch.draws:
        tokens[rules.rows] = draw(edited, rules, width)
    return tokens


def fetch_tokens(logits: Tensor, tokens: Tensor, batch: SamplingBatch) -> Fetched:
    """The tokens int64 [n], with their log probabilities of `logits` where wanted, for `read_tokens`."""
    most = max(batch.scored, default=0)
    packed = torch.zeros(len(tokens), 2 + 2 * most, dtype=torch.float64, device=tokens.device)
    packed[:, 0] = tokens
    for wanted, rows in batch.scored.items():
        chosen = take_rows(tokens, rows).clamp(min=0)
        packed[rows, 1 : 2 + 2 * wanted] = score_tokens(take_rows(logits, rows), chosen, wanted)
    return Fetched(packed)


def read_tokens(fetched: Fetched, batch: SamplingBatch) -> list[Token]:
    """The tokens on the host; here alone it waits for the device, once."""
    return [
        Token(int(token)) if wanted is None else read_token(int(token), numbers[: 1 + 2 * wanted])
        for wanted, (token, *numbers) in zip(batch.wanted, fetched.read().tolist(), strict=True)
    ]
