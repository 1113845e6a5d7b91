"""The layout of one step: which tokens run, where their KV and states lie, which pool rows are
theirs.

One object of int32 tensors, made once a step, that the torch layers, the CPU kernels and the
recorded graphs read alike. Runs in the worker process; must not know requests, sampling or
scheduling.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Digest
from ..core.base_info import BLOCK_TOKENS
from .transfers import send, send_rows


class SequenceStep(NamedTuple):
    """The tokens of one sequence in a step, from `position` on; `blocks` are its KV blocks up to the last,
    and `slot` is that of its states.

    `adapter` acts on them. The last `kept` of them get logits.
    """

    tokens: Sequence[int]
    position: int
    blocks: Sequence[int]
    adapter: Digest | None = None
    kept: int = 1
    slot: int = 0

    @property
    def end(self) -> int:
        """The positions that the sequence has after the step."""
        return self.position + len(self.tokens)


class FedTokens(NamedTuple):
    """Tokens that the step before has chosen, and the flat indices of this step where they belong.

    int64 [m] each, on the device.
    """

    rows: Tensor
    tokens: Tensor

    def fill(self, target: Tensor) -> None:
        """Puts them among a step's tokens, int32 [T]."""
        target.index_copy_(0, self.rows, self.tokens.to(target.dtype))


class Prefill(NamedTuple):
    """Tokens [start, start + length) of the flat step are those of one sequence, from `position` on."""

    start: int
    length: int
    position: int
    blocks: Tensor


class StatePart(NamedTuple):
    """Tokens [start, stop) of the flat step that layers with states take at once: one each of as
    many sequences, or those of one.

    int64 on the device: `slots` has their states, `beginning` says which of these sequences have
    none yet.
    """

    start: int
    stop: int
    slots: Tensor
    beginning: Tensor


@dataclass(frozen=True)
class StepLayout:
    """T flat tokens of S sequences, the first `singles` of which have one token each.

    int32 on the device: `tokens`, `positions`, `write_block` and `write_offset` [T], the place of
    each token's KV; `block_table` [singles, B]; `logits_index` [K], the tokens that get logits.
    `prefills` are the other sequences. `masks` are those that layers have made of it. `new_states`
    are what the states of this step's `sequences` become, in slots of a buffer: `keep_states`
    writes them there, once the step is known not to be run again.
    """

    tokens: Tensor
    positions: Tensor
    write_block: Tensor
    write_offset: Tensor
    block_table: Tensor
    logits_index: Tensor
    singles: int
    prefills: tuple[Prefill, ...] = ()
    masks: dict[Hashable, Tensor] = field(default_factory=dict)
    sequences: Sequence[SequenceStep] = ()
    new_states: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    @cached_property
    def state_parts(self) -> tuple[StatePart, ...]:
        """All tokens in their order, the single ones together."""
        parts, start = [], 0
        singles = [self.sequences[: self.singles]] if self.singles else []
        for part in (*singles, *([sequence] for sequence in self.sequences[self.singles :])):
            stop = start + sum(len(sequence.tokens) for sequence in part)
            beginning = [i for i, sequence in enumerate(part) if not sequence.position]
            slots = [sequence.slot for sequence in part]
            numbers = (send_rows(each, self.tokens.device) for each in (slots, beginning))
            parts.append(StatePart(start, stop, *numbers))
            start = stop
        return tuple(parts)

    def keep_states(self) -> None:
        for buffer, slots, states in self.new_states:
            buffer[slots] = states.to(buffer.dtype)


# Layers ask for it here, and get no argument: some models drop what their layers are called with
_RUNNING: ContextVar[object] = ContextVar("running step", default=None)


@contextmanager
def running(step: object) -> Iterator[None]:
    """Runs a forward of this step: a StepLayout, or what stands in for one."""
    token = _RUNNING.set(step)
    try:
        yield
    finally:
        _RUNNING.reset(token)


def running_step() -> object:
    """The step that runs in this thread; None where a model runs by itself."""
    return _RUNNING.get()


def make_layout(
    sequences: Sequence[SequenceStep], device: torch.device, fed: FedTokens | None = None
) -> StepLayout:
    """Of sequences in the order of their tokens, those of one token first; `fed` are tokens that only the
    device knows.
    """
    singles = count_singles(sequences)
    columns = list(chain.from_iterable(map(_token_columns, sequences)))
    flat = torch.tensor(columns, dtype=torch.int32).view(len(columns), 4).T
    tokens, positions, write_block, write_offset = send(flat.contiguous(), device)
    if fed is not None:
        fed.fill(tokens)
    return StepLayout(
        tokens,
        positions,
        write_block,
        write_offset,
        send(make_block_table([sequence.blocks for sequence in sequences[:singles]]), device),
        send(torch.tensor(list_kept(sequences), dtype=torch.int32), device),
        singles,
        tuple(_list_prefills(sequences, device)),
        sequences=sequences,
    )


def count_singles(sequences: Sequence[SequenceStep]) -> int:
    return sum(len(sequence.tokens) == 1 for sequence in sequences)


def list_kept(sequences: Sequence[SequenceStep]) -> list[int]:
    """The flat indices of the tokens that get logits."""
    kept: list[int] = []
    end = 0
    for sequence in sequences:
        end += len(sequence.tokens)
        kept += range(end - sequence.kept, end)
    return kept


def make_block_table(blocks: Sequence[Sequence[int]]) -> Tensor:
    """int32 [sequences, the most blocks of one]. One that has fewer is filled up with its own
    first: what is masked is still multiplied, and another's may not be finite.
    """
    width = max(map(len, blocks), default=0)
    rows = [[*own, *own[:1] * (width - len(own))] for own in map(list, blocks)]
    return torch.tensor(rows, dtype=torch.int32).view(len(blocks), width)


def _token_columns(sequence: SequenceStep) -> Iterator[tuple[int, int, int, int]]:
    """Token, position, block and offset in it, of each token."""
    for position, token in enumerate(sequence.tokens, sequence.position):
        block, offset = divmod(position, BLOCK_TOKENS)
        yield token, position, sequence.blocks[block], offset


def _list_prefills(sequences: Sequence[SequenceStep], device: torch.device) -> list[Prefill]:
    prefills, start = [], 0
    for sequence in sequences:
        length = len(sequence.tokens)
        if length > 1:
            blocks = send(torch.tensor(sequence.blocks, dtype=torch.int32), device)
            prefills.append(Prefill(start, length, sequence.position, blocks))
        start += length
    return prefills
