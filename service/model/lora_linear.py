"""The layers that add adapters to a base layer's output:
in plain torch anywhere, or by the CPU kernel.

Both keep A [R, in] and B [R, out] for R pool rows, of which an adapter holds a range. Runs in the
worker process; must not know digests' meaning, files or requests.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Digest, Placement
from .kernels.triton.shapes import LoraMember, LoraTiles
from .kernels.weights import TILE, pack_weights
from .memory import HugePageArena, lazy_zeros, release_pages


class LoraWeights(NamedTuple):
    """One layer's share of an adapter, ready to copy: a [r, in], b [r, out] with everything folded
    in; for DoRA the gate less 1, [out], in float32 or in the pool's dtype.
    """

    a: Tensor
    b: Tensor
    gate: Tensor | None = None


class TokenGroup(NamedTuple):
    """Tokens [start, stop) use pool rows [low, high); bool `mask` [tokens, high - low] is true
    where a row is another's (None: nowhere).
    """

    start: int
    stop: int
    low: int
    high: int
    mask: Tensor | None


class DoraSpan(NamedTuple):
    """Tokens [start, stop) have a DoRA adapter, whose gate is in this pool row."""

    start: int
    stop: int
    row: int


class AdapterSpan(NamedTuple):
    """Tokens [start, stop) belong to this adapter."""

    start: int
    stop: int
    digest: Digest


class TokenAdapters(NamedTuple):
    """How the tokens that a layer sees in one step meet the pool.

    `on_experts` are the spans of adapters on a mixture's experts, which lie in no layer with states.
    `tiles` has one tile for each token of a sequence that has one alone, in place of a group and a
    span. `is_recorded`: what runs now runs again when layers hold other adapters.
    """

    tokens: int = 0
    groups: tuple[TokenGroup, ...] = ()
    gated: tuple[DoraSpan, ...] = ()
    tiles: LoraTiles | None = None
    on_experts: tuple[AdapterSpan, ...] = ()
    is_recorded: bool = False

    def clip(self, start: int, stop: int) -> TokenAdapters:
        """How tokens [start, stop) alone meet it; no group or span lies on both sides of a border."""
        groups = [
            TokenGroup(group.start - start, group.stop - start, group.low, group.high, group.mask)
            for group in self.groups
            if start <= group.start < stop
        ]
        gated = [
            DoraSpan(span.start - start, span.stop - start, span.row)
            for span in self.gated
            if start <= span.start < stop
        ]
        return TokenAdapters(stop - start, tuple(groups), tuple(gated), None if start else self.tiles)


NO_TOKENS = TokenAdapters()
# Adds to a layer's outputs, in place, what its pool rows of the tiles make of x [tokens, n_in]
AddTiles = Callable[[Tensor, LoraMember, LoraTiles], None]
SeenTokens = Literal["body", "head", "part"]  # which of a step's tokens a layer sees, as StepAdapters says


@dataclass
class StepAdapters:
    """Those of the current step, read by all layers: of all its tokens, of those that get logits,
    and of the part of the step that a layer with states runs now. `add_tiles` is the kernel for
    tiles, where there is one.
    """

    body: TokenAdapters = NO_TOKENS
    head: TokenAdapters = NO_TOKENS
    part: TokenAdapters = NO_TOKENS
    add_tiles: AddTiles | None = None


def register_buffers(module: nn.Module, **buffers: Tensor) -> None:
    """Gives the module buffers that no state dictionary holds."""
    for name, tensor in buffers.items():
        module.register_buffer(name, tensor, persistent=False)


class AdaptedLayer(nn.Module):
    """A layer in place of a base's, whose code may read that one's tensors instead of calling it."""

    base_layer: Any

    @property
    def weight(self) -> Any:
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        return self.base_layer.bias


class LoraLinear(AdaptedLayer):
    """y = base(x), gated where DoRA says so, + ((x · Aᵀ) * M) · B, M [tokens, R] being 1 where a
    pool row is the token's own.

    A DoRA adapter's gate, less 1, is in the last of its rows of B; `ranks` int32 [R] has, at an
    adapter's first row, how many of them this layer multiplies.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        n_in: int,
        n_out: int,
        rank: int,
        dtype: torch.dtype,
        device: torch.device,
        step: StepAdapters,
        sees: SeenTokens = "body",
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._step, self._sees = step, sees
        self.held: set[Digest] = set()
        self._landed: Any = None
        pool_a, pool_b = (lazy_zeros(rank, width, dtype=dtype, device=device) for width in (n_in, n_out))
        ranks = torch.zeros(rank, dtype=torch.int32, device=device)
        register_buffers(self, pool_a=pool_a, pool_b=pool_b, ranks=ranks)

    pool_a: Tensor
    pool_b: Tensor
    ranks: Tensor

    def place_weights(self, at: Placement, factors: LoraWeights) -> None:
        """On a GPU the copies run on the stream that is current; the next forward waits for them."""
        rank = factors.a.shape[0]
        rows = slice(at.start, at.start + rank)
        self.held.add(at.digest)
        self.pool_a[rows].copy_(factors.a, non_blocking=True)
        self.pool_b[rows].copy_(factors.b, non_blocking=True)
        self.ranks[at.start] = rank
        if factors.gate is not None:
            assert rank < at.rank, "no row is left for the gate"
            self.pool_b[at.start + at.rank - 1].copy_(factors.gate, non_blocking=True)
        self._landed = torch.get_device_module(self.pool_a.device).Event()
        self._landed.record()

    def clear_rows(self, at: Placement) -> None:
        """A later adapter of other modules or of lower rank must find zeros here."""
        rows = slice(at.start, at.start + at.rank)
        self.pool_a[rows].zero_()
        self.pool_b[rows].zero_()
        self.ranks[rows].zero_()
        self.held.discard(at.digest)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        adapters: TokenAdapters = getattr(self._step, self._sees)
        is_met = adapters.groups or adapters.gated or adapters.tiles
        if not is_met or not (self.held or adapters.is_recorded):
            return y
        self._wait_for_copies()
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        check_tokens(flat.shape[0], adapters.tokens)
        self._apply_gate(out, adapters.gated)
        if adapters.tiles is not None and self._step.add_tiles is not None:
            member = LoraMember(out, self.pool_a, self.pool_b, self.ranks, self.bias)
            self._step.add_tiles(flat, member, adapters.tiles)
        for group in adapters.groups:
            self._add_group(flat, out, group)
        return y

    def _wait_for_copies(self) -> None:
        if self._landed is not None:
            self._landed.wait()
            self._landed = None

    def _add_group(self, x: Tensor, y: Tensor, group: TokenGroup) -> None:
        """Adds what the pool rows of one group make of its tokens."""
        tokens, rows = slice(group.start, group.stop), slice(group.low, group.high)
        inner = x[tokens].to(self.pool_a.dtype) @ self.pool_a[rows].T
        if group.mask is not None:
            inner = inner.masked_fill(group.mask, 0)
        if y.dtype == inner.dtype:
            y[tokens].addmm_(inner, self.pool_b[rows])
        else:  # a quantized layer that is asked in another precision answers in that
            y[tokens] += inner @ self.pool_b[rows]

    def _apply_gate(self, y: Tensor, gated: Sequence[DoraSpan]) -> None:
        bias = self.bias
        for start, stop, row in gated:
            part = y[start:stop]
            part += (part if bias is None else part - bias) * self.pool_b[row]


def check_tokens(seen: int, expected: int) -> None:
    if seen != expected:
        raise RuntimeError(
            f"a layer sees {seen} of the step's {expected} tokens: it cannot be adapted row by row"
        )


class FusedLoraLinear(AdaptedLayer):
    """The same by one kernel call: each token meets its own adapter's rows only.

    `table` has the pool rows of each token; see kernels/linear.h.
    """

    def __init__(self, base_layer: Any, rank: int, table: Tensor, arena: HugePageArena) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.gated: set[int] = set()
        n_out, n_in, bias = base_layer.out_features, base_layer.in_features, base_layer.bias
        tiles = n_out // TILE, -(-rank // 2), TILE, 2
        weights = pack_weights(base_layer)
        register_buffers(
            self,
            packed=arena.copy_in(weights.packed),
            scales=weights.scales,
            table=table,
            pool_a=lazy_zeros(rank, n_in, dtype=torch.bfloat16, huge=True),
            pool_b=lazy_zeros(*tiles, dtype=torch.bfloat16, huge=True),
            added_bias=torch.empty(0, dtype=torch.bfloat16) if bias is None else bias.detach().bfloat16(),
            gate=lazy_zeros(rank, n_out, dtype=torch.float32),
            ranks=torch.zeros(rank, dtype=torch.int32),
        )
        release_pages(base_layer.weight)  # only a DoRA gate and PEFT's own models read it

    packed: Tensor
    scales: Tensor
    table: Tensor
    pool_a: Tensor
    pool_b: Tensor
    added_bias: Tensor
    gate: Tensor
    ranks: Tensor

    def place_weights(self, at: Placement, factors: LoraWeights) -> None:
        torch.ops.adapterd.place(factors.a, factors.b, self.pool_a, self.pool_b, at.start)
        self.ranks[at.start] = factors.a.shape[0]
        if factors.gate is not None:
            self.gate[at.start] = factors.gate
            self.gated.add(at.start)

    def clear_rows(self, at: Placement) -> None:
        """The kernel reads no more rows than `ranks` says, so what lies in them may stay until it
        is written over; a gate may not.
        """
        self.ranks[at.start] = 0
        if at.start in self.gated:
            self.gate[at.start] = 0
            self.gated.discard(at.start)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = torch.ops.adapterd.linear(x, *self.kernel_tensors(), self.table)
        return y

    def kernel_tensors(self) -> tuple[Tensor, ...]:
        """The tensors of a layer in the kernel's order."""
        return self.packed, self.scales, self.added_bias, self.pool_a, self.pool_b, self.gate, self.ranks
