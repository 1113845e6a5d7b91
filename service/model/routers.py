"""A mixture's router under adapters:
its code multiplies the tokens with its weight by itself, where others call a linear layer.

Runs in the worker process; must not know files, requests or what is placed when.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from .lora_linear import LoraLinear, StepAdapters
from .stored_quantization import is_packed


def iterate_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Dotted name and module of all that have a weight [out, in] of their own and are no kind of layer
    that is known otherwise.
    """
    known = nn.Linear, nn.Embedding, Conv1D, LoraLinear
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        is_own = weight is not None and weight.dim() == 2 and weight.is_floating_point()
        if is_own and not isinstance(module, known) and not is_packed(module):
            yield name, module


class AdaptedWeight:
    """Stands in for a weight: `functional.linear` with it runs the adapted layer, and nothing else can be
    done with it.
    """

    def __init__(self, layer: LoraLinear) -> None:
        self.layer = layer

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.layer.weight.dtype
        return dtype

    @classmethod
    def __torch_function__(
        cls,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is not functional.linear or kwargs or not isinstance(args[1], cls):
            return NotImplemented
        x, weight, *bias = args
        y: Tensor = weight.layer(x)
        return y + bias[0] if bias and bias[0] is not None else y


def adapt_router(router: Any, rank: int, device: torch.device, step: StepAdapters) -> LoraLinear:
    """Puts an AdaptedWeight into the router; the layer that it runs, with `rank` pool rows."""
    weight = router.weight
    n_out, n_in = weight.shape
    product = nn.Linear(n_in, n_out, bias=False, device="meta")
    product.weight = weight
    layer = LoraLinear(product, n_in, n_out, rank, weight.dtype, device, step)
    del router.weight
    router.weight = AdaptedWeight(layer)
    return layer
