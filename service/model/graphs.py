"""Decode steps as CUDA graphs:
recorded when a shape first comes, replayed for every later step of that shape.

A step of one token a sequence is thousands of small kernels, and launching them from Python takes
longer than running them. A recording reads what changes between steps from buffers that stay where
they are. Runs in the worker process; must not know requests, sampling or what is placed when.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.base_info import BLOCK_TOKENS
from . import compat
from .lora_pool import LoraPool
from .step_layout import SequenceStep, StepLayout, make_block_table, running

log = logging.getLogger(__name__)

# Recordings kept; each costs a few megabytes of the device, beside the memory that all work in
LIMIT = 64
BLOCKS, POOL_ROWS = 16, 16  # the smallest buckets
# A step's inputs for each slot: the place of its KV, and its pool rows [low, high)
FIELDS = ("token", "position", "block", "offset", "low", "high")


class GraphShape(NamedTuple):
    """The steps that a recording is good for.

    They have `slots` tokens of sequences with at most `blocks` KV blocks, and meet pool rows in
    `layers` that `pool` bounds, as `LoraPool.find_limit` says (0: no adapters).
    """

    slots: int
    blocks: int
    pool: int
    layers: frozenset[str]


class CudaGraphs:
    """The recordings of one pool's tree, for at most `rows` sequences.

    The KV block `spare`, behind those that sequences use, takes what the unused slots write.
    """

    def __init__(self, pool: LoraPool, rows: int, context: int, vocabulary: int, spare: int) -> None:
        self.pool, self.rows, self.spare = pool, rows, spare
        self.most_blocks = -(-context // BLOCK_TOKENS)
        self.able = True
        device = pool.device
        pinned = device.type == "cuda"
        self.staged = torch.zeros(len(FIELDS), rows, dtype=torch.int32, pin_memory=pinned)
        self.staged_table = torch.zeros(rows, self.most_blocks, dtype=torch.int32, pin_memory=pinned)
        self.inputs = torch.zeros_like(self.staged, device=device)
        self.block_table = torch.zeros_like(self.staged_table, device=device)
        self.logits = torch.zeros(rows, vocabulary, dtype=pool.dtype, device=device)
        self._memory: Any = torch.cuda.graph_pool_handle()
        self._recorded: dict[GraphShape, Any] = {}

    def run_step(self, sequences: Sequence[SequenceStep]) -> Tensor:
        """One token each of so many sequences: logits [tokens, vocabulary], good until the next
        step.
        """
        shape = self._choose_shape(sequences)
        self._fill_inputs(sequences, shape)
        self.pool.wait_for_copies()
        graph = self._recorded.pop(shape, None)
        if graph is not None:
            self._recorded[shape] = graph  # the last in use is the last to go
            graph.replay()
        else:
            self._run_and_record(shape)
        return self.logits[: len(sequences)]

    def _run_and_record(self, shape: GraphShape) -> None:
        """The forward is for this step; it also makes the libraries ready, which a recording must
        not.
        """
        self._run_forward(shape)
        if self.able:
            self._record_shape(shape)

    def _choose_shape(self, sequences: Sequence[SequenceStep]) -> GraphShape:
        slots = min(round_up(len(sequences)), self.rows)
        most = max(len(sequence.blocks) for sequence in sequences)
        blocks = min(round_up(most, BLOCKS), self.most_blocks)
        limit = self.pool.find_limit(sequence.adapter for sequence in sequences)
        if not limit:
            return GraphShape(slots, blocks, 0, frozenset())
        return GraphShape(slots, blocks, min(round_up(limit, POOL_ROWS), self.pool.rank), self.pool.used)

    def _fill_inputs(self, sequences: Sequence[SequenceStep], shape: GraphShape) -> None:
        """Unused slots hold token 0 at position 0 of the spare block, and no pool rows."""
        count = len(sequences)
        self.staged.zero_()
        self.staged[FIELDS.index("block")] = self.spare
        columns = [self._make_column(sequence) for sequence in sequences]
        self.staged[:, :count] = torch.tensor(columns, dtype=torch.int32).T
        table = self.staged_table[:, : shape.blocks]
        table.fill_(self.spare)
        own = make_block_table([sequence.blocks for sequence in sequences])
        table[:count] = own[:, :1]  # behind its end each sequence looks at itself
        table[:count, : own.shape[1]] = own
        self.inputs.copy_(self.staged, non_blocking=True)
        self.block_table[: shape.slots, : shape.blocks].copy_(table[: shape.slots], non_blocking=True)

    def _make_column(self, sequence: SequenceStep) -> tuple[int, ...]:
        """FIELDS of one sequence."""
        block, offset = divmod(sequence.position, BLOCK_TOKENS)
        start, rank, _ = self.pool.rows_of(sequence.adapter)
        return sequence.tokens[0], sequence.position, sequence.blocks[block], offset, start, start + rank

    def _run_forward(self, shape: GraphShape) -> None:
        tokens, positions, write_block, write_offset, low, high = self.inputs[:, : shape.slots]
        self.pool.set_range(low, high, shape.pool)
        table = self.block_table[: shape.slots, : shape.blocks]
        every = torch.arange(shape.slots, device=self.pool.device)
        layout = StepLayout(tokens, positions, write_block, write_offset, table, every, shape.slots)
        with running(layout):
            output = self.pool.tree(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        self.logits[: shape.slots] = output.logits[0]

    def _record_shape(self, shape: GraphShape) -> None:
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads read adapters meanwhile, which may allocate
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._run_forward(shape)
        except Exception as error:
            self._give_up(stream, error)
            return
        self._recorded[shape] = graph
        if len(self._recorded) > LIMIT:
            del self._recorded[next(iter(self._recorded))]

    def _give_up(self, stream: Any, error: Exception) -> None:
        """Where a base's own code asks the device something in mid-step, no recording can be made,
        and none is tried again.

        A recording that breaks off leaves its own stream behind, and in torch 2.11 its memory pool,
        open and kept.
        """
        torch.cuda.set_stream(stream)
        with suppress(AttributeError, RuntimeError):
            compat.close_graph_memory(self._memory)
        self.able = False
        self._recorded.clear()
        # Ending a broken recording raises once more
        cause = str(error.__context__ or error).partition("\n")[0]
        log.warning("graphs: off, decode steps of this base cannot be recorded: %s", cause)


def round_up(count: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `count` and `least`."""
    wanted = max(count, least)
    power = 1 << (wanted - 1).bit_length()
    three_quarters = power * 3 // 4
    return three_quarters if wanted <= three_quarters else power
