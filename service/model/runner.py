"""Loads and places adapters and runs steps: the one place that uses the device of the worker
process.

Must not know names, text, HTTP or why a step is what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Adapter, Digest, ExecutionPath, Placement
from ..engine.plan import Chunk, Launched, Result
from . import compat, kv
from .graphs import CudaGraphs
from .launched_step import LaunchedStep, clear_written
from .lora_linear import LoraWeights
from .lora_pool import LoraPool
from .lora_weights import read_weights
from .peft_fallback import build_peft_model, own_bytes
from .sampler import Sampler
from .step_layout import FedTokens, SequenceStep, StepLayout, count_singles, make_layout, running


class HostAdapter(NamedTuple):
    """An adapter in host memory: factors for the pool, or PEFT's own model. `size` in bytes."""

    size: int
    factors: dict[str, LoraWeights]
    tree: Any = None


class ModelRunner:
    """The base, the pool, the KV blocks and the sampler, behind `engine.plan.Runner`.

    `model` is the base's own tree.
    """

    def __init__(
        self,
        model: Any,
        pool: LoraPool,
        attention: Sequence[kv.AttentionSpec],
        sampler: Sampler,
        graphs: CudaGraphs | None = None,
    ) -> None:
        self.model, self.pool, self.attention = model, pool, attention
        self.sampler, self.graphs = sampler, graphs
        self.runs_ahead = pool.device.type == "cuda"
        self.hosted: dict[Digest, HostAdapter] = {}

    def load_adapter(self, adapter: Adapter) -> int:
        if adapter.lane is ExecutionPath.SHADOW:
            hosted = self._build_tree(adapter)
        else:
            hosted = self._read_factors(adapter)
        self.hosted[adapter.digest] = hosted
        return hosted.size

    def _build_tree(self, adapter: Adapter) -> HostAdapter:
        tree = build_peft_model(self.model, adapter)
        return HostAdapter(own_bytes(tree, self.model), {}, tree)

    def _read_factors(self, adapter: Adapter) -> HostAdapter:
        factors = read_weights(adapter, self.pool)
        size = sum(tensor.nbytes for part in factors.values() for tensor in part if tensor is not None)
        if self.pool.device.type == "cuda":  # torch pins memory by powers of two
            size = 1 << (size - 1).bit_length()
        return HostAdapter(size, factors)

    def evict_adapter(self, digest: Digest) -> int:
        hosted = self.hosted.pop(digest, None)
        size = hosted.size if hosted else 0
        if self.pool.device.type == "cuda":
            del hosted
            compat.release_pinned_memory()
        return size

    def finish_request(self, request: int) -> None:
        self.sampler.finish_request(request)

    @torch.inference_mode()
    def place_adapter(self, placement: Placement) -> None:
        self.pool.place_adapter(placement, self.hosted[placement.digest].factors)

    @torch.inference_mode()
    def remove_adapter(self, digest: Digest) -> None:
        self.pool.remove_adapter(digest)

    def run_chunks(self, chunks: Sequence[Chunk]) -> Sequence[Result]:
        return self.launch_chunks(chunks).read()

    @torch.inference_mode()
    def launch_chunks(self, chunks: Sequence[Chunk], after: Launched | None = None) -> LaunchedStep:
        assert after is None or isinstance(after, LaunchedStep)
        try:
            return self._launch_batches(chunks, after)
        except Exception:
            clear_written(self.attention, chunks)
            raise

    def _split_batches(self, chunks: Sequence[Chunk]) -> list[tuple[Any, list[Chunk]]]:
        """The mixed batch on the pool's tree, and one batch for each adapter that PEFT runs, on its
        own.
        """
        batches: dict[int, tuple[Any, list[Chunk]]] = {}
        for chunk in chunks:
            # A resident adapter may have left host memory
            hosted = self.hosted.get(chunk.request.adapter or "")
            tree = self.pool.tree if hosted is None or hosted.tree is None else hosted.tree
            batches.setdefault(id(tree), (tree, []))[1].append(chunk)
        return list(batches.values())

    def _launch_batches(self, chunks: Sequence[Chunk], after: LaunchedStep | None) -> LaunchedStep:
        """All forwards first: where one raises no token has been chosen and no state has moved on,
        and the step can be run again.
        """
        logits_of: dict[int, Tensor] = {}
        layouts: list[StepLayout] = []
        for tree, batch in self._split_batches(chunks):
            fed = after.feed_tokens(batch) if after is not None else None
            made = self._forward_chunks(tree, batch, layouts, fed)
            logits = torch.split(made, [_count_kept(chunk) for chunk in batch])
            logits_of.update(zip((chunk.request.id for chunk in batch), logits, strict=True))
        logits_in_order = [logits_of[chunk.request.id] for chunk in chunks]
        return LaunchedStep(chunks, logits_in_order, self.sampler, self.attention, layouts, after)

    def _forward_chunks(
        self, tree: Any, chunks: Sequence[Chunk], layouts: list[StepLayout], fed: FedTokens | None
    ) -> Tensor:
        """The logits [kept, vocabulary] of the chunks: their last token's, or all of them where
        prompt logprobs are asked for. `layouts` gets the layout that ran; `fed` are tokens that only
        the device knows.
        """
        sequences = [_sequence_step(chunk) for chunk in chunks]
        if tree is self.pool.tree:
            if self.graphs is not None and count_singles(sequences) == len(sequences):
                return self.graphs.run_step(sequences, fed)
            self.pool.begin_step(sequences)
        layouts.append(make_layout(sequences, self.pool.device, fed))
        return forward_step(tree, layouts[-1])


def _sequence_step(chunk: Chunk) -> SequenceStep:
    where = chunk.position, chunk.blocks, chunk.adapter
    return SequenceStep(chunk.tokens, *where, _count_kept(chunk), chunk.slot)


def forward_step(tree: Any, layout: StepLayout) -> Tensor:
    """Runs a tree on the tokens of a step: logits [kept, vocabulary]."""
    inputs: dict[str, Any] = {"input_ids": layout.tokens[None], "position_ids": layout.positions[None]}
    with running(layout):
        output = tree(**inputs, use_cache=False, logits_to_keep=layout.logits_index)
    logits: Tensor = output.logits[0]
    # Some models keep them all
    return logits if len(logits) == len(layout.logits_index) else logits[layout.logits_index]


def _count_kept(chunk: Chunk) -> int:
    """How many of the chunk's tokens need logits."""
    has_prompt_logprobs = chunk.request.prompt_logprobs is not None and not chunk.generated
    return len(chunk.tokens) if has_prompt_logprobs else 1
