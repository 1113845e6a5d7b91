"""Decode steps as CUDA graphs: recorded when a shape first comes, replayed for every later step of
that shape.

A step of one token a sequence is thousands of small kernels, and launching them from Python takes
longer than running them. A recording reads what changes between steps from buffers that stay where
they are. Must not know requests, sampling or what is placed when.
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

# Recordings kept; each costs a few megabytes of the device, beside the memory that all of them work
# in
LIMIT = 64
POSITIONS, POOL_ROWS = 256, 64  # the smallest buckets
# What changes between steps, for each slot: the pool rows are [low, high)
FIELDS = ("token", "position", "row", "low", "high")


class GraphShape(NamedTuple):
    """What a recording is good for:

    `slots` tokens that look at `longest` positions and meet `pool` pool rows in `layers` (0: no
    adapters).

    `dense`: slot i is KV row i, so that KV is read where it lies; else it is gathered.
    """

    slots: int
    longest: int
    pool: int
    dense: bool
    layers: frozenset[str]


class CudaGraphs:
    """The recordings of one bank's tree.

    KV row `rows`, behind those that sequences use, takes what the unused slots write.
    """

    def __init__(self, bank: LoraPool, rows: int, context: int, vocabulary: int) -> None:
        self.bank, self.rows, self.context = bank, rows, context
        self.able = True
        on = bank.device
        self.told = torch.zeros(len(FIELDS), rows, dtype=torch.long, pin_memory=on.type == "cuda")
        self.inputs = torch.zeros_like(self.told, device=on)
        self.logits = torch.zeros(rows, vocabulary, dtype=bank.dtype, device=on)
        self._memory: Any = torch.cuda.graph_pool_handle()
        self._recorded: dict[GraphShape, Any] = {}

    def run_step(
        self, tokens: Sequence[int], spans: Sequence[KVSpan], digests: Sequence[Digest | None]
    ) -> Tensor:
        """One token each of so many sequences: logits [tokens, vocabulary], good until the next
        step.
        """
        shape = self._choose_shape(spans, digests)
        slots = [span.row if shape.dense else i for i, span in enumerate(spans)]
        self._fill_inputs(tokens, spans, digests, slots)
        self.bank.wait_for_copies()
        if (graph := self._recorded.pop(shape, None)) is not None:
            self._recorded[shape] = graph  # the last in use is the last to go
            graph.replay()
        else:
            # For this step; it also makes the libraries ready, which a recording must not
            self._run_forward(shape)
            if self.able:
                self._record_shape(shape)
        return self.logits[slots]

    def _choose_shape(self, spans: Sequence[KVSpan], digests: Sequence[Digest | None]) -> GraphShape:
        last = max(span.row for span in spans) + 1
        dense = last < 2 * len(spans)  # gathering KV costs thrice its reading
        slots = min(round_up(last if dense else len(spans)), self.rows)
        longest = min(round_up(max(span.position for span in spans) + 1, POSITIONS), self.context)
        high = max(sum(self.bank.placement_of(digest)) for digest in digests)
        pool = min(round_up(high, POOL_ROWS), self.bank.rank) if high else 0
        return GraphShape(slots, longest, pool, dense, self.bank.used if pool else frozenset())

    def _fill_inputs(
        self,
        tokens: Sequence[int],
        spans: Sequence[KVSpan],
        digests: Sequence[Digest | None],
        slots: Sequence[int],
    ) -> None:
        """Unused slots hold token 0 at position 0 of the spare row, and no pool rows."""
        self.told.zero_()
        self.told[FIELDS.index("row")] = self.rows
        columns = [
            (token, span.position, span.row, at[0], sum(at))
            for token, span, at in zip(tokens, spans, map(self.bank.placement_of, digests), strict=True)
        ]
        self.told[:, slots] = torch.tensor(columns).T
        self.inputs.copy_(self.told, non_blocking=True)

    def _run_forward(self, shape: GraphShape) -> None:
        tokens, positions, rows, low, high = self.inputs[:, : shape.slots]
        self.bank.set_range(low, high, shape.pool)
        table = KVTable(rows, positions, shape.slots, shape.longest, shape.dense)
        out = self.bank.tree(
            input_ids=tokens[None], position_ids=positions[None], use_cache=False, table=table
        )
        self.logits[: shape.slots] = out.logits[0]

    def _record_shape(self, shape: GraphShape) -> None:
        """Where a base's own code asks the device something in mid-step, no recording can be made,
        and none is tried again.
        """
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # other threads read adapters meanwhile, which may allocate
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._run_forward(shape)
        except Exception as error:
            # One that breaks off leaves its own behind, and in torch 2.11 its memory pool, open and
            # kept
            torch.cuda.set_stream(stream)
            with suppress(AttributeError, RuntimeError):
                torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._memory)
                torch._C._cuda_releasePool(torch.cuda.current_device(), self._memory)
            self.able = False
            self._recorded.clear()
            # Ending a broken recording raises once more
            why = str(error.__context__ or error).partition("\n")[0]
            log.warning("graphs: off, decode steps of this base cannot be recorded: %s", why)
            return
        self._recorded[shape] = graph
        if len(self._recorded) > LIMIT:
            del self._recorded[next(iter(self._recorded))]


def round_up(count: int, least: int = 1) -> int:
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, 24, ... that is at least `count` and `least`."""
    power = 1 << (max(count, least) - 1).bit_length()
    return power * 3 // 4 if max(count, least) <= power * 3 // 4 else power
