"""The rank pool: all resident adapters' factors in shared buffers, and the layers that add them to the base's output.

For every adaptable layer the bank keeps A [R, in] and B [R, out], R pool rows shared by all adapters; an adapter of rank r holds r of
them. Scaling (and DoRA's gate) is folded into B. Must not know requests or files; the base's own tree is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..engine.request import Digest, Placement
from .base import linears
from .shadow import share


class Factors(NamedTuple):
    """One layer's share of an adapter, ready to copy: a [r, in], b [r, out] with everything folded in; gate [out] for DoRA."""

    a: Tensor
    b: Tensor
    gate: Tensor | None = None


class Run(NamedTuple):
    """So many consecutive tokens of the flat step belong to this adapter."""

    tokens: int
    digest: Digest | None


class Group(NamedTuple):
    """Tokens [start, stop) use pool rows [low, high); bool `mask` [tokens, high - low] is true where a row is
    another's (None: nowhere)."""

    start: int
    stop: int
    low: int
    high: int
    mask: Tensor | None


class Gated(NamedTuple):
    """Tokens [start, stop) belong to this DoRA adapter."""

    start: int
    stop: int
    digest: Digest


class Arrangement(NamedTuple):
    """How the tokens of one step meet the pool."""

    tokens: int = 0
    groups: tuple[Group, ...] = ()
    gated: tuple[Gated, ...] = ()


class Adapted(nn.Module):
    """A base layer with the pool beside it: y = base(x), gated where DoRA says so, + ((x · Aᵀ) * M) · B.

    M [tokens, R] is 1 where a pool row is the token's own.
    """

    def __init__(self, base_layer: nn.Module, bank: Bank, n_in: int, n_out: int, head: bool) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.head = head
        self.gates: dict[Digest, Tensor] = {}
        object.__setattr__(self, "bank", bank)
        for name, width in (("pool_a", n_in), ("pool_b", n_out)):
            self.register_buffer(name, torch.zeros(bank.rank, width, dtype=bank.dtype, device=bank.device), persistent=False)

    bank: Bank
    pool_a: Tensor
    pool_b: Tensor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        now = self.bank.head if self.head else self.bank.body
        if not now.groups and not now.gated:
            return y
        flat, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        if flat.shape[0] != now.tokens:
            raise RuntimeError(f"a layer sees {flat.shape[0]} of the step's {now.tokens} tokens: it cannot be adapted row by row")
        self._gate(out, now.gated)
        for group in now.groups:
            tokens, rows = slice(group.start, group.stop), slice(group.low, group.high)
            inner = flat[tokens].to(self.pool_a.dtype) @ self.pool_a[rows].T
            inner = inner if group.mask is None else inner.masked_fill(group.mask, 0)
            out[tokens] += inner @ self.pool_b[rows]
        return y

    def _gate(self, y: Tensor, gated: Sequence[Gated]) -> None:
        bias = getattr(self.base_layer, "bias", None)
        for start, stop, digest in gated:
            gate = self.gates.get(digest)
            if gate is not None:
                part = y[start:stop]
                y[start:stop] = part * gate if bias is None else (part - bias) * gate + bias


class Bank:
    """The pool over a tree of its own that shares the base's tensors. Not thread-safe: the step's thread owns it."""

    def __init__(self, base: Any, rank: int, dtype: torch.dtype, device: torch.device) -> None:
        self.rank, self.dtype, self.device = rank, dtype, device
        self.body = self.head = Arrangement()
        self.places: dict[Digest, Placement] = {}
        self.tree: Any = share(base)
        self.layers: dict[str, Adapted] = {}
        head = self.tree.get_output_embeddings()
        for name, layer, n_in, n_out in list(linears(self.tree)):
            adapted = Adapted(layer, self, n_in, n_out, layer is head)
            self.tree.set_submodule(name, adapted)
            self.layers[name] = adapted
        self._held: dict[Digest, tuple[str, ...]] = {}

    def place(self, placement: Placement, factors: Mapping[str, Factors]) -> None:
        """Copies an adapter's factors into pool rows [start, start + rank)."""
        for name, (a, b, gate) in factors.items():
            layer, rows = self.layers[name], slice(placement.start, placement.start + a.shape[0])
            layer.pool_a[rows].copy_(a, non_blocking=True)
            layer.pool_b[rows].copy_(b, non_blocking=True)
            if gate is not None:
                layer.gates[placement.digest] = gate.to(self.device, non_blocking=True)
        self.places[placement.digest] = placement
        self._held[placement.digest] = tuple(factors)

    def remove(self, digest: Digest) -> None:
        """Clears the adapter's rows: a later adapter of other modules must find zeros there."""
        place = self.places.pop(digest)
        rows = slice(place.start, place.start + place.rank)
        for name in self._held.pop(digest):
            layer = self.layers[name]
            layer.pool_a[rows].zero_()
            layer.pool_b[rows].zero_()
            layer.gates.pop(digest, None)

    def arrange(self, runs: Sequence[Run], mixed: int) -> Arrangement:
        """The first `mixed` tokens form one masked group; every later run uses its own adapter's rows only."""
        groups = [*self._mixed(runs[:mixed]), *self._own(runs[mixed:], mixed)]
        return Arrangement(sum(run.tokens for run in runs), tuple(groups), tuple(self._gated(runs)))

    def _mixed(self, runs: Sequence[Run]) -> Iterator[Group]:
        places = [self.places[run.digest] if run.digest else None for run in runs]
        used = {place for place in places if place}
        if not used:
            return
        low = min(place.start for place in used)
        high = max(place.start + place.rank for place in used)
        if len(used) == 1 and None not in places:
            yield Group(0, len(runs), low, high, None)
            return
        mask = torch.ones(len(runs), high - low, dtype=torch.bool)
        for i, place in enumerate(places):
            if place:
                mask[i, place.start - low : place.start - low + place.rank] = False
        yield Group(0, len(runs), low, high, mask.to(self.device, non_blocking=True))

    def _own(self, runs: Iterable[Run], start: int) -> Iterator[Group]:
        for tokens, digest in runs:
            if digest is not None:
                place = self.places[digest]
                yield Group(start, start + tokens, place.start, place.start + place.rank, None)
            start += tokens

    def _gated(self, runs: Iterable[Run]) -> Iterator[Gated]:
        start = 0
        for tokens, digest in runs:
            if digest is not None and any(digest in self.layers[name].gates for name in self._held[digest][:1]):
                yield Gated(start, start + tokens, digest)
            start += tokens
