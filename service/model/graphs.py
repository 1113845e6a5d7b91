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

from ..core.adapter import Digest
from .kv import KVSpan, KVTable
from .lora_pool import LoraPool

log = logging.getLogger(__name__)

Digests = Sequence[Digest | None]

# Recordings kept; each costs a few megabytes of the device, beside the memory that all work in
LIMIT = 64
POSITIONS, POOL_ROWS = 256, 64  # the smallest buckets
# A step's inputs for each slot: the pool rows are [low, high)
FIELDS = ("token", "position", "row", "low", "high")


class GraphShape(NamedTuple):
    """The steps that a recording is good for.

    They have `slots` tokens that look at `longest` positions and meet `pool` pool rows in `layers`
    (0: no adapters).

    `dense`: slot i is KV row i, so that KV is read where it lies; else it is gathered.
    """

    slots: int
    longest: int
    pool: int
    dense: bool
    layers: frozenset[str]


class CudaGraphs:
    """The recordings of one pool's tree.

    KV row `rows`, behind those that sequences use, takes what the unused slots write.
    """

    def __init__(self, pool: LoraPool, rows: int, context: int, vocabulary: int) -> None:
        self.pool, self.rows, self.context = pool, rows, context
        self.able = True
        device = pool.device
        self.staged = torch.zeros(len(FIELDS), rows, dtype=torch.long, pin_memory=device.type == "cuda")
        self.inputs = torch.zeros_like(self.staged, device=device)
        self.logits = torch.zeros(rows, vocabulary, dtype=pool.dtype, device=device)
        self._memory: Any = torch.cuda.graph_pool_handle()
        self._recorded: dict[GraphShape, Any] = {}

    def run_step(self, tokens: Sequence[int], spans: Sequence[KVSpan], digests: Digests) -> Tensor:
        """One token each of so many sequences: logits [tokens, vocabulary], good until the next
        step.
        """
        shape = self._choose_shape(spans, digests)
        slots = [span.row if shape.dense else i for i, span in enumerate(spans)]
        self._fill_inputs(self._make_columns(tokens, spans, digests), slots)
        self.pool.wait_for_copies()
        graph = self._recorded.pop(shape, None)
        if graph is not None:
            self._recorded[shape] = graph  # the last in use is the last to go
            graph.replay()
        else:
            self._run_and_record(shape)
        return self.logits[slots]

    def _run_and_record(self, shape: GraphShape) -> None:
        """The forward is for this step; it also makes the libraries ready, which a recording must
        not.
        """
        self._run_forward(shape)
        if self.able:
            self._record_shape(shape)

    def _choose_shape(self, spans: Sequence[KVSpan], digests: Digests) -> GraphShape:
        last = max(span.row for span in spans) + 1
        dense = last < 2 * len(spans)  # gathering KV costs thrice its reading
        slots = min(round_up(last if dense else len(spans)), self.rows)
        end = max(span.position for span in spans) + 1
        longest = min(round_up(end, POSITIONS), self.context)
        high = max(sum(self.pool.placement_of(digest)) for digest in digests)
        if not high:
            return GraphShape(slots, longest, 0, dense, frozenset())
        pool_rows = min(round_up(high, POOL_ROWS), self.pool.rank)
        return GraphShape(slots, longest, pool_rows, dense, self.pool.used)

    def _make_columns(
        self, tokens: Sequence[int], spans: Sequence[KVSpan], digests: Digests
    ) -> list[tuple[int, ...]]:
        """FIELDS of each token."""
        columns: list[tuple[int, ...]] = []
        for token, span, digest in zip(tokens, spans, digests, strict=True):
            start, rank = self.pool.placement_of(digest)
            columns.append((token, span.position, span.row, start, start + rank))
        return columns

    def _fill_inputs(self, columns: Sequence[tuple[int, ...]], slots: Sequence[int]) -> None:
        """Unused slots hold token 0 at position 0 of the spare row, and no pool rows."""
        self.staged.zero_()
        self.staged[FIELDS.index("row")] = self.rows
        self.staged[:, slots] = torch.tensor(columns).T
        self.inputs.copy_(self.staged, non_blocking=True)

    def _run_forward(self, shape: GraphShape) -> None:
        tokens, positions, rows, low, high = self.inputs[:, : shape.slots]
        self.pool.set_range(low, high, shape.pool)
        table = KVTable(rows, positions, shape.slots, shape.longest, shape.dense)
        output = self.pool.tree(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, table=table
        )
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
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._memory)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._memory)
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
