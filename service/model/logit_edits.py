"""Changes of logits before a token is chosen: penalties, bias, tokens that may not come yet, and
grammars, for all rows at once.

Runs in the worker process; must not know how a token is chosen from them.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .grammar_masks import unpack_masks
from .sampling_state import SamplingState
from .transfers import send, send_rows

# Under every logit, and finite: where a grammar allows nothing else the token comes, and no request fails
BANNED = -1e30


class Row(NamedTuple):
    """A request's past, the place in its answer of the token that is to be chosen, and the tokens that its
    grammar allows there, a bit each.
    """

    state: SamplingState
    place: int = 0
    mask: bytes | None = None


class Entries(NamedTuple):
    """Single logits by row and token (int64 [k]), with a float32 number for each."""

    rows: Tensor
    tokens: Tensor
    values: Tensor


@dataclass(frozen=True)
class LogitEdits:
    """In the order in which they act: penalties that scale, numbers added, numbers put instead, and
    rows [m] with the masks of what is allowed there, uint8 [m, bytes].
    """

    scaled: Entries | None
    added: tuple[Entries, ...]
    replaced: Entries | None
    allowed: tuple[Tensor, Tensor] | None

    def apply(self, logits: Tensor) -> Tensor:
        """Logits [n, vocabulary], changed, in float32 and memory of their own; or untouched where
        there is nothing to change.
        """
        if not (self.scaled or self.added or self.replaced or self.allowed):
            return logits
        logits = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        if self.scaled:
            rows, tokens, penalties = self.scaled
            scores = logits[rows, tokens]
            logits[rows, tokens] = torch.where(scores < 0, scores * penalties, scores / penalties)
        for rows, tokens, values in self.added:
            logits.index_put_((rows, tokens), values, accumulate=True)
        if self.replaced:
            rows, tokens, values = self.replaced
            logits[rows, tokens] = values
        if self.allowed:
            rows, packed = self.allowed
            is_allowed = unpack_masks(packed, logits.shape[-1])
            logits[rows] = logits[rows].masked_fill(~is_allowed, float("-inf"))
        return logits


def collect_edits(rows: Sequence[Row], device: torch.device) -> LogitEdits:
    """`rows` are in the order of their logits."""
    states = [(i, row.state) for i, row in enumerate(rows) if row.state.uses]
    early = [
        (i, row.state) for i, row in enumerate(rows) if row.place < row.state.request.sampling.min_tokens
    ]
    added = (_join_entries(change(states), device) for change in (_lower_counted, _add_bias))
    return LogitEdits(
        _join_entries(_scale_known(states), device),
        tuple(entries for entries in added if entries),
        _join_entries(chain(_ban_ends(early), _ban_words(states)), device),
        _join_masks(rows, device),
    )


States = Sequence[tuple[int, SamplingState]]
Change = Iterator[tuple[int, Tensor, Tensor]]  # of one row: tokens and their numbers


def _scale_known(states: States) -> Change:
    """Repetition penalty over prompt and answer (CTRL, arXiv:1909.05858)."""
    for row, state in states:
        if "repetition_penalty" in state.uses:
            tokens = _read_array(state.known + state.generated, torch.int64)
            yield row, tokens, torch.full((len(tokens),), state.request.sampling.repetition_penalty)


def _lower_counted(states: States) -> Change:
    """Frequency and presence penalty over the answer, as OpenAI's."""
    for row, state in states:
        if not state.uses.isdisjoint({"frequency_penalty", "presence_penalty"}):
            sampling, times = state.request.sampling, _read_array(state.times, torch.float32)
            lowered = sampling.frequency_penalty * times + sampling.presence_penalty
            yield row, _read_array(state.generated, torch.int64), -lowered


def _add_bias(states: States) -> Change:
    for row, state in states:
        if "logit_bias" in state.uses:
            yield (
                row,
                _read_array(state.bias_ids, torch.int64),
                _read_array(state.bias_values, torch.float32),
            )


def _ban_ends(states: States) -> Change:
    """No eos before its time."""
    for row, state in states:
        ends = torch.tensor(list(state.request.eos), dtype=torch.int64)
        yield row, ends, torch.full((len(ends),), float("-inf"))


def _ban_words(states: States) -> Change:
    """No last token of a bad word behind its others."""
    for row, state in states:
        if "bad_words" in state.uses and (banned := state.list_banned()):
            yield row, torch.tensor(banned, dtype=torch.int64), torch.full((len(banned),), BANNED)


def _read_array(numbers: array[int] | array[float], dtype: torch.dtype) -> Tensor:
    """A copy: an array that a tensor reads cannot grow."""
    return torch.frombuffer(bytearray(numbers), dtype=dtype) if numbers else torch.empty(0, dtype=dtype)


def _join_entries(changes: Iterable[tuple[int, Tensor, Tensor]], device: torch.device) -> Entries | None:
    found = [change for change in changes if len(change[1])]
    if not found:
        return None
    rows, tokens, values = zip(*found, strict=True)
    lengths = torch.tensor([len(part) for part in tokens])
    joined = Entries(torch.tensor(rows).repeat_interleave(lengths), torch.cat(tokens), torch.cat(values))
    return Entries(*(send(part, device) for part in joined))


def _join_masks(rows: Sequence[Row], device: torch.device) -> tuple[Tensor, Tensor] | None:
    masks = [(i, row.mask) for i, row in enumerate(rows) if row.mask is not None]
    if not masks:
        return None
    packed = torch.frombuffer(bytearray(b"".join(mask for _, mask in masks)), dtype=torch.uint8)
    return send_rows([i for i, _ in masks], device), send(packed.view(len(masks), -1), device)
