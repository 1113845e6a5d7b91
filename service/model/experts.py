"""The experts of a mixture under adapters:
each token's own factors of the experts that it is sent to, in the one batch of all.

A mixture keeps the weights of its experts as one parameter [experts, ., .], which PEFT adapts by factors of
each expert. They are as many times larger than a linear layer's, so no pool has rows for them: those of a
placed adapter are the tensors that host memory has. Runs in the worker process, on a CPU; must not know
files, requests or what is placed when.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..core.adapter import Digest, Placement
from . import compat
from .lora_linear import AdapterSpan, LoraWeights, StepAdapters, check_tokens

# What transformers says of an experts class whose forward its own functions can take the place of
TOLD = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "num_experts")


def iterate_experts(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Dotted name and module of each mixture's experts, where both parameters are three-dimensional."""
    for name, module in model.named_modules():
        if all(hasattr(module, told) for told in TOLD):
            weights = [getattr(module, parameter, None) for parameter in list_parameters(module)]
            if all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in weights):
                yield name, module


def list_parameters(experts: Any) -> tuple[str, str]:
    """The names of the parameters that lead into the experts and out of them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


class ExpertPairs(NamedTuple):
    """The S pairs of a token and an expert that it is sent to, expert by expert.

    int64 [S]: `tokens`, `experts`, and in `order` their places token by token. `ends` as `find_ends`.
    """

    tokens: Tensor
    experts: Tensor
    order: Tensor
    ends: Tensor


class OwnPairs(NamedTuple):
    """Pairs whose tokens belong to one adapter: `places` int64 [n] says which, `ends` as `find_ends`."""

    digest: Digest
    places: Tensor
    ends: Tensor


class ExpertFactors:
    """What the placed adapters add to one parameter: a [experts, r, in] and b [experts, r, out] of each."""

    def __init__(self) -> None:
        self.held: dict[Digest, LoraWeights] = {}

    def place_weights(self, at: Placement, factors: LoraWeights) -> None:
        self.held[at.digest] = factors

    def clear_rows(self, at: Placement) -> None:
        self.held.pop(at.digest, None)

    def add_products(self, y: Tensor, x: Tensor, owned: Sequence[OwnPairs]) -> None:
        """Adds to y [S, out], in place, what each adapter makes of its pairs of x [S, in]."""
        for digest, places, ends in owned:
            factors = self.held.get(digest)
            if factors is not None:
                inner = functional.grouped_mm(x[places], factors.a.mT, offs=ends)
                y.index_add_(0, places, functional.grouped_mm(inner, factors.b, offs=ends))


class ExpertsLora(nn.Module):
    """Experts of transformers' uniform kind, each pair with the factors of its token's adapter."""

    def __init__(self, base_layer: Any, step: StepAdapters) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.factors = {name: ExpertFactors() for name in list_parameters(base_layer)}
        self.step = step

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] of hidden_states [tokens, hidden], where each token is sent to the k experts
        of top_k_index [tokens, k] with top_k_weights.
        """
        adapters = self.step.body
        spans = [span for span in adapters.on_experts if self._is_adapted_by(span.digest)]
        if not spans:
            y: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return y
        check_tokens(hidden_states.shape[0], adapters.tokens)
        pairs = sort_pairs(top_k_index, self.base_layer.num_experts)
        owned = [find_own(pairs, span) for span in spans]
        out = self._run_experts(hidden_states[pairs.tokens], pairs, owned)
        weighted = torch.empty_like(out)
        weighted[pairs.order] = out * top_k_weights.reshape(-1)[pairs.order, None]
        return weighted.view(*top_k_index.shape, -1).sum(1).to(hidden_states.dtype)

    def _is_adapted_by(self, digest: Digest) -> bool:
        return any(digest in factors.held for factors in self.factors.values())

    def _run_experts(self, x: Tensor, pairs: ExpertPairs, owned: Sequence[OwnPairs]) -> Tensor:
        """[S, hidden] of x [S, hidden], each pair by its own expert."""
        base = self.base_layer
        into, out_of = self.factors
        inner = self._multiply(into, x, pairs, owned)
        inner = compat.apply_gate(base, inner) if base.has_gate else base.act_fn(inner)
        out = self._multiply(out_of, inner, pairs, owned)
        return base.post_expert_norm(out) if base.has_post_expert_norm else out

    def _multiply(self, name: str, x: Tensor, pairs: ExpertPairs, owned: Sequence[OwnPairs]) -> Tensor:
        """x [S, in] times each pair's expert of this parameter, and what the adapters add: [S, out]."""
        base = self.base_layer
        weight = getattr(base, name)
        y = functional.grouped_mm(x, weight if base.is_transposed else weight.mT, offs=pairs.ends)
        if base.has_bias:
            y += getattr(base, f"{name}_bias")[pairs.experts]
        self.factors[name].add_products(y, x, owned)
        return y


def sort_pairs(top_k_index: Tensor, count: int) -> ExpertPairs:
    """Of those of `count` experts [tokens, k] that each token is sent to."""
    experts, order = torch.sort(top_k_index.reshape(-1), stable=True)
    return ExpertPairs(order // top_k_index.shape[1], experts, order, find_ends(experts, count))


def find_own(pairs: ExpertPairs, span: AdapterSpan) -> OwnPairs:
    """The pairs of the tokens of this span."""
    is_own = (pairs.tokens >= span.start) & (pairs.tokens < span.stop)
    places = is_own.nonzero()[:, 0]
    return OwnPairs(span.digest, places, find_ends(pairs.experts[places], len(pairs.ends)))


def find_ends(experts: Tensor, count: int) -> Tensor:
    """Where the pairs of each of `count` experts end, among sorted ones: int32 [count]."""
    return torch.bincount(experts, minlength=count).cumsum(0).int()
