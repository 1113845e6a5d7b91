"""Proves in the worker process, before serving, that a mixed batch adapts a mixture's experts and routers
as PEFT does: by merging the change into their weights.

It stands instead of a list of architectures. On a small random model of the base's config in float32, as
`selfcheck` does. Must not know adapters, requests or settings.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Placement
from ..core.base_info import name_pattern
from .experts import ExpertsLora, iterate_experts, list_parameters
from .loading import describe_error
from .lora_linear import AdapterSpan, LoraWeights, StepAdapters, TokenAdapters, TokenGroup
from .routers import adapt_router, iterate_routers
from .selfcheck import EXACT, PROBE, RANK, SEEDS
from .small_model import small_model

log = logging.getLogger(__name__)

BY_PEFT = "experts: adapters on %s run by PEFT, apart from the batch: %s"
CPU = torch.device("cpu")
TRIED = Placement("tried", 0, RANK)  # of an adapter that nobody registered
OWN = slice(PROBE // 3, PROBE // 2)  # its tokens, in the midst of the base's


def prove_mixtures(model: Any, context: int) -> tuple[str, ...]:
    """The name patterns of the parameters that are adapted right; the log says which are not, and why."""
    if next(iterate_experts(model), None) is None:
        return ()
    try:
        small = small_model(model, context, PROBE, SEEDS[0])
    except Exception as cause:  # whatever the class makes of a config that its author never tried
        log.warning(BY_PEFT, "the experts", describe_error(cause))
        return ()
    reasons: dict[str, str] = {}
    for parameter, reason in _try_parameters(small):
        pattern = name_pattern(parameter)
        reasons[pattern] = reasons.get(pattern) or reason
    for pattern, reason in reasons.items():
        if reason:
            log.warning(BY_PEFT, pattern, reason)
    return tuple(pattern for pattern, reason in reasons.items() if not reason)


@torch.inference_mode()
def _try_parameters(small: nn.Module) -> Iterator[tuple[str, str]]:
    """Each parameter's name, and why it is not adapted right; empty where it is."""
    for name, experts in iterate_experts(small):
        reason = _try_experts(experts)
        yield from ((f"{name}.{parameter}", reason) for parameter in list_parameters(experts))
    for name, router in iterate_routers(small):
        yield f"{name}.weight", _try_router(router)


def _try_experts(experts: Any) -> str:
    adapted, merged = ExpertsLora(experts, StepAdapters()), copy.deepcopy(experts)
    widths = []
    for name, placed in adapted.factors.items():
        weight = getattr(merged, name)
        weight = weight.mT if experts.is_transposed else weight
        factors = _make_factors(weight)
        placed.place_weights(TRIED, factors)
        weight += factors.b.mT @ factors.a
        widths.append(weight.shape[-1])
    adapted.step.body = TokenAdapters(PROBE, on_experts=(AdapterSpan(OWN.start, OWN.stop, TRIED.digest),))
    chosen = torch.rand(PROBE, experts.num_experts).topk(min(2, experts.num_experts))
    inputs = torch.randn(PROBE, widths[0]), chosen.indices, chosen.values
    return _find_difference((adapted, experts, merged), inputs)


def _try_router(router: Any) -> str:
    step = StepAdapters()
    adapted, merged = copy.deepcopy(router), copy.deepcopy(router)
    factors = _make_factors(merged.weight)
    merged.weight += factors.b.mT @ factors.a
    adapt_router(adapted, RANK, CPU, step).place_weights(TRIED, factors)
    step.body = TokenAdapters(PROBE, (TokenGroup(OWN.start, OWN.stop, 0, RANK, None),))
    return _find_difference((adapted, router, merged), (torch.randn(PROBE, factors.a.shape[-1]),))


def _make_factors(weight: Tensor) -> LoraWeights:
    """Random ones for a weight [..., out, in]."""
    *experts, n_out, n_in = weight.shape
    return LoraWeights(torch.randn(*experts, RANK, n_in) / n_in, torch.randn(*experts, RANK, n_out))


def _find_difference(modules: Sequence[Callable[..., Any]], inputs: Sequence[Tensor]) -> str:
    """Of an adapted, a plain and a merged module: empty where from the first the tokens in OWN get what
    the last makes of them, and all others what the second does.
    """
    try:
        outputs = [_list_tensors(module(*inputs)) for module in modules]
        for made, expected, changed in zip(*outputs, strict=True):
            expected[OWN] = changed[OWN]
            error = float((made - expected).float().norm() / expected.float().norm())
            if not error < EXACT:
                return f"they differ from PEFT's by {error:.2g}"
    except Exception as cause:  # whatever the class makes of being called so
        return f"a step raises {describe_error(cause)}"
    return ""


def _list_tensors(output: Any) -> list[Tensor]:
    return [output.clone()] if isinstance(output, Tensor) else [tensor.clone() for tensor in output]
