"""The rank pool: which adapter holds which pool rows, and how the tokens of a step meet them.

Works on a tree of its own that shares the base's tensors; the base's tree is not touched. Runs in
the worker process; must not know requests or files.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Digest, Placement
from ..core.base_info import name_pattern
from . import kernels
from .experts import ExpertFactors, ExpertsLora, iterate_experts, list_parameters
from .kernels.triton.shapes import LORA_TOKENS, LoraTiles
from .kernels.weights import fits_kernel
from .linear_calls import LinearCalls
from .loading import iterate_linears
from .lora_linear import (
    AdapterSpan,
    DoraSpan,
    FusedLoraLinear,
    LoraLinear,
    LoraWeights,
    SeenTokens,
    StepAdapters,
    TokenAdapters,
    TokenGroup,
)
from .memory import HugePageArena
from .peft_fallback import share_tree
from .routers import adapt_router, iterate_routers
from .states import StatefulForward
from .step_layout import SequenceStep, count_singles
from .stored_quantization import is_quantized
from .transfers import send

NOT_LIMITED = LinearCalls()


class AdapterRun(NamedTuple):
    """So many consecutive tokens that a layer sees belong to this adapter."""

    tokens: int
    digest: Digest | None


Runs = Sequence[AdapterRun]


class AdapterRows(NamedTuple):
    """Pool rows [low, low + rank) are an adapter's factors, row `gate` has DoRA's gate (-1: none)."""

    low: int = 0
    rank: int = 0
    gate: int = -1


NO_ROWS = AdapterRows()


class LoraPool:
    """The pool of `rank` rows, in all layers that `calls` does not limit and the routers whose weights'
    name patterns `parameters` has; and the factors of the experts that it has.

    The step's thread alone uses it.

    With the kernels' `tables`, layers that the CPU kernel fits use it.
    """

    def __init__(
        self,
        base: Any,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        tables: kernels.StepTables | None = None,
        calls: LinearCalls = NOT_LIMITED,
        parameters: Collection[str] = (),
    ) -> None:
        self.rank, self.dtype, self.device = rank, dtype, device
        self.places: dict[Digest, Placement] = {}
        self.tree: Any = share_tree(base)
        self.layers: dict[str, LoraLinear | FusedLoraLinear] = {}
        self.experts: dict[str, ExpertFactors] = {}
        self.tables = tables
        self.step = StepAdapters()
        self._heads = calls.heads
        self._stateful = tuple(self._follow_parts())
        self._spans: list[tuple[int, ...]] = []
        self._wrap_layers(calls)
        self._wrap_experts(parameters)
        self._wrap_routers(parameters)
        has_plain = any(isinstance(layer, LoraLinear) for layer in self.layers.values())
        self._reads_step = has_plain or bool(self.experts)  # and not the kernels' tables alone
        self._held: dict[Digest, tuple[str, ...]] = {}
        self._gated: set[Digest] = set()
        self._on_experts: set[Digest] = set()
        self._on: Any = torch.get_device_module(device)
        self._copies = self._on.Stream()

    def _follow_parts(self) -> Iterator[str]:
        """What the names of all layers within those with states begin with; these say what they run."""
        for name, module in self.tree.named_modules():
            forward = vars(module).get("forward")
            if isinstance(forward, StatefulForward):
                forward.begin_part = self.begin_part
                yield f"{name}."

    def _wrap_layers(self, calls: LinearCalls) -> None:
        linears = [linear for linear in iterate_linears(self.tree) if not calls.limited(linear[0])]
        weight_bytes = sum(n_in * n_out * 2 for _, _, n_in, n_out in linears)
        arena = HugePageArena(weight_bytes if self.tables else 0)
        for name, layer, n_in, n_out in linears:
            fused = self._fuse_layer(name, layer, arena)
            self.layers[name] = fused or self._wrap_plain(name, layer, n_in, n_out)
            self.tree.set_submodule(name, self.layers[name])

    def _wrap_experts(self, patterns: Collection[str]) -> None:
        for name, module in list(iterate_experts(self.tree)):
            names = [f"{name}.{parameter}" for parameter in list_parameters(module)]
            if all(name_pattern(each) in patterns for each in names):
                experts = ExpertsLora(module, self.step)
                self.experts |= zip(names, experts.factors.values(), strict=True)
                self.tree.set_submodule(name, experts)

    def _wrap_routers(self, patterns: Collection[str]) -> None:
        for name, module in list(iterate_routers(self.tree)):
            weight = f"{name}.weight"
            if name_pattern(weight) in patterns:
                self.layers[weight] = adapt_router(module, self.rank, self.device, self.step)

    def _seen_tokens(self, name: str) -> SeenTokens:
        if name_pattern(name) in self._heads:
            return "head"
        return "part" if name.startswith(self._stateful) else "body"

    def _fuse_layer(self, name: str, layer: nn.Module, arena: HugePageArena) -> FusedLoraLinear | None:
        """The layer on the CPU kernel, where that fits it."""
        if not self.tables or not fits_kernel(layer):
            return None
        return FusedLoraLinear(layer, self.rank, getattr(self.tables, self._seen_tokens(name)), arena)

    def _wrap_plain(self, name: str, layer: nn.Module, n_in: int, n_out: int) -> LoraLinear:
        # Some models keep a few layers in float32; what is quantized computes in the pool's dtype
        weight: Any = layer.weight if not is_quantized(layer) else None
        own = self.dtype if weight is None else weight.dtype
        sees = self._seen_tokens(name)
        return LoraLinear(layer, n_in, n_out, self.rank, own, self.device, self.step, sees)

    def place_adapter(self, at: Placement, factors: Mapping[str, LoraWeights]) -> None:
        """Copies an adapter's factors into pool rows [start, start + rank); on a GPU beside the
        step's work, layer by layer ahead of it.
        """
        self.places[at.digest] = at
        self._held[at.digest] = tuple(factors)
        # There the rows may still be read, or cleared
        self._copies.wait_stream(self._on.current_stream())
        with self._on.stream(self._copies):
            for name, part in factors.items():
                self._adapted(name).place_weights(at, part)
        if any(part.gate is not None for part in factors.values()):
            self._gated.add(at.digest)
        if not self.experts.keys().isdisjoint(factors):
            self._on_experts.add(at.digest)

    def remove_adapter(self, digest: Digest) -> None:
        """Frees the adapter's rows; one whose placing was broken off has left something in some
        layers, or is not known.
        """
        if digest not in self.places:
            return
        at = self.places.pop(digest)
        self.wait_for_copies()  # a copy that is still under way would land on the zeros
        for name in self._held.pop(digest):
            self._adapted(name).clear_rows(at)
        self._gated.discard(digest)
        self._on_experts.discard(digest)

    def _adapted(self, name: str) -> LoraLinear | FusedLoraLinear | ExpertFactors:
        return self.experts.get(name) or self.layers[name]

    def wait_for_copies(self) -> None:
        """The next work on the current stream waits until all that was placed is there."""
        self._on.current_stream().wait_stream(self._copies)

    def rows_of(self, digest: Digest | None) -> AdapterRows:
        """The pool rows of an adapter that is placed; of the base none."""
        if digest is None:
            return NO_ROWS
        at = self.places[digest]
        has_gate = digest in self._gated
        return AdapterRows(at.start, at.rank - has_gate, at.start + at.rank - 1 if has_gate else -1)

    def begin_recording(self, rows: Tensor, has_adapters: bool) -> None:
        """As `begin_step` for tokens that all get logits, one a run, by the kernel for tiles: int32
        `rows` [3, tokens] on the device hold the AdapterRows of each when it runs.

        Nothing here depends on what they hold; without adapters they are not read.
        """
        tiles = _make_tiles(rows, self.rank) if has_adapters else None
        self.step.body = self.step.head = TokenAdapters(rows.shape[1], tiles=tiles, is_recorded=True)

    def begin_step(self, sequences: Sequence[SequenceStep]) -> None:
        """Tells all layers whose tokens come next; sequences of one token come first."""
        runs = [AdapterRun(len(sequence.tokens), sequence.adapter) for sequence in sequences]
        heads = [AdapterRun(sequence.kept, sequence.adapter) for sequence in sequences]
        if self._reads_step:
            singles = count_singles(sequences)
            self.step.body, self.step.head = self._meet_pool(runs, singles), self._meet_pool(heads, singles)
        if self.tables:
            self._fill_tables(self.tables, sequences, heads)

    def begin_part(self, start: int, stop: int) -> None:
        """Tells the layers within one with states that tokens [start, stop) of the step come next."""
        self.step.part = self.step.body.clip(start, stop)
        if self.tables:
            own = [span for span in self._spans if start <= span[0] < stop]
            kernels.fill_table(self.tables.part, [(first - start, *rest) for first, *rest in own])

    def _fill_tables(
        self, tables: kernels.StepTables, sequences: Sequence[SequenceStep], heads: Runs
    ) -> None:
        self._spans, start = [], 0
        for index, sequence in enumerate(sequences):
            length = len(sequence.tokens)
            place = start, length, index, sequence.position
            self._spans.append((*place, *self._rows_of(sequence.adapter)))
            start += length
        kernels.fill_table(tables.body, self._spans)
        kernels.fill_table(tables.head, list(self._head_spans(heads)))
        kernels.fill_blocks(tables.blocks, [sequence.blocks for sequence in sequences])

    def _rows_of(self, digest: Digest | None) -> tuple[int, int, int]:
        """Pool row, rank, and whether a gate applies."""
        low, rank, gate = self.rows_of(digest)
        return low, rank, int(gate >= 0)

    def _head_spans(self, heads: Iterable[AdapterRun]) -> Iterator[tuple[int, ...]]:
        start = 0
        for tokens, digest in heads:
            yield start, tokens, 0, 0, *self._rows_of(digest)
            start += tokens

    def _meet_pool(self, runs: Runs, singles: int) -> TokenAdapters:
        """The tokens of these runs, the first `singles` of which have one token each."""
        tokens = sum(run.tokens for run in runs)
        groups = tuple(self._own_groups(runs[singles:], singles))
        on_experts = tuple(self._expert_spans(runs))
        if self.step.add_tiles is not None:
            gated = tuple(self._gated_spans(runs[singles:], singles))
            return TokenAdapters(tokens, groups, gated, self._tiles_of(runs[:singles]), on_experts)
        groups = (*self._mixed_group(runs[:singles]), *groups)
        return TokenAdapters(tokens, groups, tuple(self._gated_spans(runs, 0)), on_experts=on_experts)

    def _tiles_of(self, runs: Runs) -> LoraTiles | None:
        """Of runs of one token each; None where none has an adapter."""
        rows = [self.rows_of(run.digest) for run in runs]
        most_rank = max((own.rank for own in rows), default=0)
        if not most_rank:
            return None
        columns = torch.tensor(rows, dtype=torch.int32).T.contiguous()
        return _make_tiles(send(columns, self.device), most_rank)

    def _mixed_group(self, runs: Runs) -> Iterator[TokenGroup]:
        """One masked group for tokens of different adapters."""
        rows = [self.rows_of(run.digest) for run in runs]
        used = {own for own in rows if own.rank}
        if not used:
            return
        low, high = min(own.low for own in used), max(own.low + own.rank for own in used)
        has_mask = len(used) > 1 or NO_ROWS in rows
        mask = self._make_mask(rows, low, high) if has_mask else None
        yield TokenGroup(0, len(runs), low, high, mask)

    def _make_mask(self, rows: Sequence[AdapterRows], low: int, high: int) -> Tensor:
        """Bool [tokens, high - low], true where a pool row is not the token's own."""
        mask = torch.ones(len(rows), high - low, dtype=torch.bool)
        for token, own in enumerate(rows):
            mask[token, own.low - low : own.low - low + own.rank] = False
        return send(mask, self.device)

    def _own_groups(self, runs: Iterable[AdapterRun], start: int) -> Iterator[TokenGroup]:
        """A group for each run, of its own adapter's rows only."""
        for tokens, digest in runs:
            if digest is not None:
                low, rank, _ = self.rows_of(digest)
                yield TokenGroup(start, start + tokens, low, low + rank, None)
            start += tokens

    def _gated_spans(self, runs: Iterable[AdapterRun], start: int) -> Iterator[DoraSpan]:
        for tokens, digest in runs:
            gate = self.rows_of(digest).gate
            if gate >= 0:
                yield DoraSpan(start, start + tokens, gate)
            start += tokens

    def _expert_spans(self, runs: Iterable[AdapterRun]) -> Iterator[AdapterSpan]:
        start = 0
        for tokens, digest in runs:
            if digest is not None and digest in self._on_experts:
                yield AdapterSpan(start, start + tokens, digest)
            start += tokens


def _make_tiles(rows: Tensor, most_rank: int) -> LoraTiles:
    """One tile a token, of its AdapterRows: int32 [3, tokens]; unused where there are none."""
    low, rank, gates = rows
    every = torch.arange(len(low), dtype=torch.int32, device=low.device)
    tiles = torch.stack([every, (rank > 0).int(), low, rank], -1)
    return LoraTiles(tiles, torch.ones(len(low), LORA_TOKENS, device=low.device), gates, most_rank)
