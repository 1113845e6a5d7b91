"""Plan → tokens: the one place where a step runs on the device.

Must not know names, text, HTTP or why a plan is what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.adapter import Adapter, Digest, ExecutionPath
from ..core.request import Token
from ..engine.plan import Chunk, Plan, Result
from . import kernels, kv
from .graphs import CudaGraphs
from .lora_linear import LoraWeights
from .lora_pool import AdapterRun, LoraPool
from .lora_weights import read_weights
from .peft_fallback import build_peft_model, own_bytes
from .sampler import NOT_FINITE, Sampler, SamplingError, with_logprobs


class HostAdapter(NamedTuple):
    """An adapter in host memory: factors for the pool, or PEFT's own model. `size` in bytes."""

    size: int
    factors: dict[str, LoraWeights]
    tree: Any = None


class ModelRunner:
    """The base, the pool, the KV rows and the sampler, behind `engine.plan.Runner`.

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
        self.model, self.pool, self.attention, self.sampler, self.graphs = (
            model,
            pool,
            attention,
            sampler,
            graphs,
        )
        self.hosted: dict[Digest, HostAdapter] = {}

    def load_adapter(self, adapter: Adapter) -> int:
        if adapter.lane is ExecutionPath.SHADOW:
            tree = build_peft_model(self.model, adapter)
            hosted = HostAdapter(own_bytes(tree, self.model), {}, tree)
        else:
            made = read_weights(adapter, self.pool)
            size = sum(t.nbytes for part in made.values() for t in part if t is not None)
            pinned = self.pool.device.type == "cuda"  # torch pins memory by powers of two
            hosted = HostAdapter(1 << (size - 1).bit_length() if pinned else size, made)
        self.hosted[adapter.digest] = hosted
        return hosted.size

    def evict_adapter(self, digest: Digest) -> int:
        hosted = self.hosted.pop(digest, None)
        size = hosted.size if hosted else 0
        if self.pool.device.type == "cuda":
            del hosted
            # Torch keeps pinned memory that was freed, for whatever comes next of that very size
            torch._C._host_emptyCache()
        return size

    def finish_request(self, request: int) -> None:
        self.sampler.finish_request(request)

    @torch.inference_mode()
    def run_step(self, plan: Plan) -> Sequence[Result]:
        for digest in plan.remove:
            self.pool.remove_adapter(digest)
        for placement in plan.place:
            self.pool.place_adapter(placement, self.hosted[placement.digest].factors)
        for fork in plan.forks:
            kv.fork_row(self.attention, fork.source, fork.target, fork.length)
        try:
            return self._run_batch(plan.chunks)
        except Exception:
            # What is masked is still multiplied: not-a-number would reach the row's next tenant
            if len(plan.chunks) == 1:
                kv.clear_row(self.attention, plan.chunks[0].row)
            raise

    def _split_batches(self, chunks: Sequence[Chunk]) -> list[tuple[Any, list[Chunk]]]:
        """The mixed batch on the pool's tree, and one batch for each shadow adapter on its own."""
        batches: dict[int, tuple[Any, list[Chunk]]] = {}
        for chunk in chunks:
            # A resident adapter may have left host memory
            hosted = self.hosted.get(chunk.request.adapter or "")
            tree = self.pool.tree if hosted is None or hosted.tree is None else hosted.tree
            batches.setdefault(id(tree), (tree, []))[1].append(chunk)
        return list(batches.values())

    def _run_batch(self, chunks: Sequence[Chunk]) -> list[Result]:
        """All forwards first: where one raises no token has been chosen, and the step can be run
        again.
        """
        parts: dict[int, Tensor] = {}
        for tree, batch in self._split_batches(chunks):
            logits = torch.split(self._forward_chunks(tree, batch), [_count_kept(chunk) for chunk in batch])
            parts.update(zip((chunk.request.id for chunk in batch), logits, strict=True))
        sampled = [chunk.request for chunk in chunks if chunk.sample]
        tokens = (
            self.sampler.sample_batch(torch.stack([parts[r.id][-1] for r in sampled]), sampled)
            if sampled
            else []
        )
        chosen = dict(zip((request.id for request in sampled), tokens, strict=True))
        return [
            self._make_result(chunk, chosen.get(chunk.request.id), parts[chunk.request.id])
            for chunk in chunks
        ]

    def _make_result(self, chunk: Chunk, token: Token | SamplingError | None, logits: Tensor) -> Result:
        if token is None and not logits.max().isfinite():
            # One that is left now, or has all it wants, would leave its row so
            token = SamplingError(NOT_FINITE)
        if isinstance(token, SamplingError):
            kv.clear_row(self.attention, chunk.row)  # as where a step raises
            return Result(error=str(token), code=token.code)
        return Result(token, _prompt_logprobs(chunk, logits))

    def _forward_chunks(self, tree: Any, chunks: Sequence[Chunk]) -> Tensor:
        """The logits [kept, vocabulary] of the chunks: their last token's, or all of them where
        prompt logprobs are asked for.
        """
        spans: list[kv.KVSpan] = []
        heads: list[AdapterRun] = []
        kept: list[int] = []
        at = 0
        for chunk in chunks:
            length = len(chunk.tokens)
            spans.append(kv.KVSpan(at, length, chunk.row, chunk.position))
            kept += range(at + length - _count_kept(chunk), at + length)
            heads.append(AdapterRun(_count_kept(chunk), chunk.adapter))
            at += length
        decode = sum(chunk.generated > 0 for chunk in chunks)
        tokens = [token for chunk in chunks for token in chunk.tokens]
        if tree is self.pool.tree:
            digests = [chunk.adapter for chunk in chunks]
            if self.graphs and self.graphs.able and decode == len(chunks) and not self.pool.has_gate(digests):
                return self.graphs.run_step(tokens, spans, digests)
            self.pool.begin_step([AdapterRun(len(c.tokens), c.adapter) for c in chunks], heads, decode, spans)
        return forward_step(tree, self.pool.device, tokens, spans, decode, kept)


def forward_step(
    tree: Any,
    device: torch.device,
    tokens: Sequence[int],
    spans: Sequence[kv.KVSpan],
    decode: int,
    kept: Sequence[int],
) -> Tensor:
    """Runs a tree on the flat tokens of a step: logits [kept, vocabulary]."""
    table = kv.KVTable.make_table(spans, decode, device)
    keep = torch.tensor(kept, dtype=torch.long, device=device)
    ids = torch.tensor([tokens], device=device)
    rows = {} if tree.config._attn_implementation == kernels.NAME else {"table": table}
    out = tree(
        input_ids=ids, position_ids=table.positions[None], use_cache=False, logits_to_keep=keep, **rows
    )
    logits: Tensor = out.logits[0]
    return logits if len(logits) == len(kept) else logits[keep]  # some models keep them all


def _count_kept(chunk: Chunk) -> int:
    """How many of the chunk's tokens need logits."""
    return len(chunk.tokens) if chunk.request.prompt_logprobs is not None and not chunk.generated else 1


def _prompt_logprobs(chunk: Chunk, logits: Tensor) -> tuple[Token, ...]:
    """The prompt's tokens that this chunk's logits speak of: the first of all has no log
    probability, the next follow from them.
    """
    wanted, prompt = chunk.request.prompt_logprobs, chunk.request.prompt
    if wanted is None or chunk.generated:
        return ()
    first = (Token(prompt[0]),) if chunk.position == 0 else ()
    following = prompt[chunk.position + 1 : chunk.position + 1 + len(chunk.tokens)]
    return first + tuple(
        with_logprobs(row, token, wanted) for row, token in zip(logits, following, strict=False)
    )
