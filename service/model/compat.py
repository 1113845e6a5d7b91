"""The private parts of torch, transformers, PEFT and bitsandbytes that the worker leans on, each
under a name that says what it means.

Runs in the worker process. The upper bounds in pyproject.toml keep them as they are;
tests/model/test_compat.py shows it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn
from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

# PEFT's modules for layers that it does not take for plain ones
QUANTIZED_MODULES = frozenset({"bnb", "gptq", "awq", "aqlm", "eetq", "hqq", "torchao"})


def attention_name(model: Any) -> str:
    """The name of the attention that the model runs by, as `set_attn_implementation` takes it."""
    name: str = model.config._attn_implementation
    return name


def random_constructor(model: Any) -> Callable[..., Any]:
    """Makes a model of this one's class with random weights: (config, dtype, attn_implementation) →
    model.

    The public constructor of a class takes neither dtype nor attention.
    """
    make: Callable[..., Any] = type(model)._from_config
    return make


def unpack_for_cpu(packed: Tensor, state: Any) -> tuple[Tensor, Any]:
    """The 4-bit weight and its QuantState as `functional.dequantize_4bit` reads them: uint8, two
    values a byte, and float32 scales in one row.

    bitsandbytes has packed them for its CPU kernel in the layer's first forward (`packed`: [out, in
    / 2]). The state that is given is changed; its scales are not nested any more, and stay so.
    """
    state.original_nested = False
    unpacked, state = functional._convert_weight_packed_for_cpu_inverse(packed, state)
    state.absmax = state.absmax.T.reshape(-1).float()
    return unpacked, state


def keep_unpacked(layer: Any) -> None:
    """Keeps a Linear4bit whose scales are not nested as it is on a CPU.

    bitsandbytes would pack it for its CPU kernel in the first forward, and unpack it whenever
    anybody asks for a state dictionary, with the scales of a row of several blocks in another
    order.
    """
    layer.support_avx512bf16_for_cpu = False


def plain_4bit(weight: Any) -> tuple[Tensor, Any]:
    """A Params4bit's values, uint8, two a byte, and a QuantState of its own for them, however
    bitsandbytes holds them now.
    """
    data, state = weight.data, copy.copy(weight.quant_state)
    is_packed = getattr(state, "packing_format_for_cpu", False)
    return unpack_for_cpu(data, state) if is_packed else (data, state)


def reads_quantized(layer: nn.Module) -> bool:
    """Whether PEFT made this layer for a quantized one: in a module of the type named for the
    method, or with a backend that dequantizes.
    """
    in_own_module = type(layer).__module__.rpartition(".")[2] in QUANTIZED_MODULES
    return in_own_module or getattr(layer, "quantization_backend", None) is not None


def read_gguf_head_sizes() -> None:
    """Lets transformers read the size of a head from a GGUF file of Qwen 3, which it leaves out:
    128, its default, is not that of every model.
    """
    GGUF_CONFIG_MAPPING["qwen3"].setdefault("attention.key_length", "head_dim")


def apply_gate(experts: Any, projected: Tensor) -> Tensor:
    """What a mixture's experts lead out [S, inner], of what leads into them [S, 2 * inner]: each class halves
    and joins it in a way of its own.
    """
    inner: Tensor = experts._apply_gate(projected)
    return inner


def release_pinned_memory() -> None:
    """Gives the system back what torch keeps of pinned memory that was freed, for the next of that
    very size.
    """
    torch._C._host_emptyCache()


def close_graph_memory(memory: Any) -> None:
    """Ends allocation to a graph memory pool that a broken recording has left open, as torch 2.11
    does, and lets go of it. Raises AttributeError or RuntimeError where this torch has closed it.
    """
    device = torch.cuda.current_device()
    torch._C._cuda_endAllocateToPool(device, memory)
    torch._C._cuda_releasePool(device, memory)
