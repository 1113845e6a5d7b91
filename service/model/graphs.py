"""Decode steps as CUDA graphs:
recorded at the start, for some numbers of sequences, and replayed for every step of one token each.

A step of one token a sequence is thousands of small kernels, and launching them from Python takes
longer than running them. A recording reads what changes between steps from buffers that stay where
they are; the kernels of attention and adapters read no more of these than a step's own sequences
have. Runs in the worker process; must not know requests, sampling or what is placed when.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.base_info import BLOCK_TOKENS
from ..engine.kv_blocks import count_blocks
from . import compat
from .lora_pool import LoraPool
from .step_layout import FedTokens, SequenceStep, StepLayout, make_block_table, running
from .transfers import send

log = logging.getLogger(__name__)

# A step's inputs for each sequence: the place of its KV, and its adapter's rows of the pool
FIELDS = ("token", "position", "block", "offset", "low", "rank", "gate")


class Recording(NamedTuple):
    """The steps of at most `slots` sequences: of the base alone, or with any adapters."""

    slots: int
    has_adapters: bool


class CudaGraphs:
    """The recordings of one pool's tree, which has the GPU's kernels, for at most `rows` sequences.

    The KV block `spare`, behind those that sequences use, takes what the unused slots write. `tokens`
    int32 [rows] on the device are what the next replay reads.
    """

    def __init__(self, pool: LoraPool, rows: int, context: int, vocabulary: int, spare: int) -> None:
        self.pool, self.spare, self.device = pool, spare, pool.device
        self.counts = list_counts(rows)
        self.inputs = torch.zeros(len(FIELDS), rows, dtype=torch.int32, device=self.device)
        self.tokens = self.inputs[0]
        self.block_table = torch.zeros(rows, count_blocks(context), dtype=torch.int32, device=self.device)
        self.logits = torch.zeros(rows, vocabulary, dtype=pool.dtype, device=self.device)
        self.recorded: dict[Recording, Any] = {}
        self._tabled: list[tuple[int, ...]] = [()] * rows  # what the block table has of each slot
        self._memory: Any = torch.cuda.graph_pool_handle()

    def record_all(self, progress: Callable[[float], None]) -> bool:
        """Makes all recordings, the largest first: the others work in its memory. Whether they could
        be made; the log says why not.

        `progress` is told which share is there.
        """
        began, free = time.monotonic(), self._free_bytes()
        wanted = [Recording(slots, adapted) for slots in reversed(self.counts) for adapted in (True, False)]
        for i, recording in enumerate(wanted):
            progress(i / len(wanted))
            self._fill_inputs([], recording.slots)
            self._run_forward(recording)  # makes the libraries ready, which a recording must not
            if not self._record_steps(recording):
                return False
        facts = len(wanted), self.counts[-1], time.monotonic() - began, (free - self._free_bytes()) / 1e6
        log.info("graphs: %d recordings for up to %d sequences, in %.1f s and %.0f MB", *facts)
        return True

    def _free_bytes(self) -> int:
        torch.cuda.empty_cache()
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return free

    def run_step(self, sequences: Sequence[SequenceStep], fed: FedTokens | None = None) -> Tensor:
        """One token each of so many sequences: logits [tokens, vocabulary], good until the next
        step; `fed` are tokens that only the device knows.
        """
        slots = next(count for count in self.counts if count >= len(sequences))
        has_adapters = any(sequence.adapter is not None for sequence in sequences)
        return self.replay(Recording(slots, has_adapters), sequences, fed)

    def replay(
        self, recording: Recording, sequences: Sequence[SequenceStep], fed: FedTokens | None = None
    ) -> Tensor:
        """As `run_step`, by one of those that are right for these sequences."""
        self._fill_inputs(sequences, recording.slots)
        if fed is not None:
            fed.fill(self.tokens)
        self.pool.wait_for_copies()
        self.recorded[recording].replay()
        return self.logits[: len(sequences)]

    def _fill_inputs(self, sequences: Sequence[SequenceStep], slots: int) -> None:
        """Unused slots hold token 0 at position 0 of the spare block, and no pool rows."""
        unused = SequenceStep((0,), 0, (self.spare,))
        filled = [*sequences, *[unused] * (slots - len(sequences))]
        columns = zip(*map(self._make_column, filled), strict=True)
        self.inputs[:, :slots] = send(torch.tensor(list(columns), dtype=torch.int32), self.device)
        self._fill_table([tuple(sequence.blocks) for sequence in filled])

    def _make_column(self, sequence: SequenceStep) -> tuple[int, ...]:
        """FIELDS of one sequence."""
        block, offset = divmod(sequence.position, BLOCK_TOKENS)
        place = sequence.position, sequence.blocks[block], offset
        return sequence.tokens[0], *place, *self.pool.rows_of(sequence.adapter)

    def _fill_table(self, blocks: Sequence[tuple[int, ...]]) -> None:
        """Sends the slots whose blocks are not those of the step before: of a sequence that goes on,
        every so many steps. What lies behind them is not read.
        """
        changed = [slot for slot, own in enumerate(blocks) if own != self._tabled[slot]]
        if not changed:
            return
        lines = [(slot, *blocks[slot]) for slot in changed]
        sent = send(make_block_table(lines), self.device)
        self.block_table[sent[:, 0], : sent.shape[1] - 1] = sent[:, 1:]
        for slot in changed:
            self._tabled[slot] = blocks[slot]

    def _run_forward(self, recording: Recording) -> None:
        slots = recording.slots
        tokens, positions, write_block, write_offset = self.inputs[:4, :slots]
        self.pool.begin_recording(self.inputs[4:, :slots], recording.has_adapters)
        every = torch.arange(slots, device=self.device)
        layout = StepLayout(
            tokens, positions, write_block, write_offset, self.block_table[:slots], every, slots
        )
        with running(layout):
            output = self.pool.tree(input_ids=tokens[None], position_ids=positions[None], use_cache=False)
        self.logits[:slots] = output.logits[0]

    def _record_steps(self, recording: Recording) -> bool:
        """Whether they could be recorded; the log says why not."""
        graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                self._run_forward(recording)
        except Exception as error:
            self._give_up(stream, error)
            return False
        self.recorded[recording] = graph
        return True

    def _give_up(self, stream: Any, error: Exception) -> None:
        """Where a base's own code asks the device something in mid-step, no recording can be made,
        and none is tried again.

        A recording that breaks off leaves its own stream behind, and in torch 2.11 its memory pool,
        open and kept.
        """
        torch.cuda.set_stream(stream)
        with suppress(AttributeError, RuntimeError):
            compat.close_graph_memory(self._memory)
        self.recorded.clear()
        # Ending a broken recording raises once more
        cause = str(error.__context__ or error).partition("\n")[0]
        log.warning("graphs: off, decode steps of this base cannot be recorded: %s", cause)


def list_counts(rows: int) -> list[int]:
    """The numbers of sequences that steps are recorded for: 1, 2, 4, 8, 16, 24, 32, 48, ... and `rows`."""
    counts = [1, 2, 4, 8, 16, 24]
    while counts[-1] < rows:
        counts.append(2 * counts[-2])
    return [count for count in counts if count < rows] + [rows]
