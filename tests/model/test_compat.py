"""The private parts of the libraries that the worker leans on are there and mean what their names say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes import functional
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from service.model import compat
from tests import making


def make_llama() -> Any:
    return LlamaForCausalLM(LlamaConfig(**making.TINY, vocab_size=16))


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_models_attention_is_named_as_it_was_set(name: str) -> None:
    model = make_llama()
    model.set_attn_implementation(name)
    assert compat.attention_name(model) == name


def test_a_random_model_is_made_in_the_wanted_dtype_with_the_wanted_attention() -> None:
    config = LlamaConfig(**making.TINY | {"num_hidden_layers": 1}, vocab_size=16)
    make = compat.random_constructor(make_llama())
    model = make(config, dtype=torch.bfloat16, attn_implementation="eager")
    assert (type(model), model.dtype, len(model.model.layers)) == (LlamaForCausalLM, torch.bfloat16, 1)
    assert compat.attention_name(model) == "eager"
    assert model.lm_head.weight.detach().std() > 0


def make_4bit(weight: torch.Tensor) -> Linear4bit:
    """A frozen NF4 layer of this weight, its scales nested, as a base is quantized."""
    out, in_ = weight.shape
    layer = Linear4bit(in_, out, bias=False, compute_dtype=torch.float32, quant_type="nf4")
    layer.load_state_dict({"weight": weight})
    return layer.to("cpu").eval().requires_grad_(False)


@torch.inference_mode()
def test_a_4bit_weight_that_was_packed_for_a_cpu_is_unpacked_to_what_it_was() -> None:
    torch.manual_seed(0)
    layer = make_4bit(torch.randn(64, 128))
    before = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    packed, state = functional._convert_weight_packed_for_cpu(layer.weight.data, layer.weight.quant_state)
    assert state.packing_format_for_cpu
    unpacked, state = compat.unpack_for_cpu(packed, state)
    after = functional.dequantize_4bit(unpacked, state)
    assert (after.shape, after.dtype) == (before.shape, before.dtype)
    assert float((after - before).abs().max()) < 0.02


@torch.inference_mode()
def test_a_4bit_layer_that_is_kept_unpacked_says_the_same_after_its_state_was_asked_for() -> None:
    torch.manual_seed(0)
    layer = Linear4bit(256, 64, bias=False, compute_dtype=torch.float32, compress_statistics=False)
    layer.load_state_dict({"weight": torch.randn(64, 256) * torch.arange(1, 257)})
    layer = layer.to("cpu").eval().requires_grad_(False)
    compat.keep_unpacked(layer)
    x = torch.randn(3, 256)
    before = layer(x)
    layer.state_dict()
    assert torch.equal(layer(x), before)


def adapt_layer(layer: nn.Module, config: PeftConfig) -> Any:
    """PEFT's layer around this one."""
    net: Any = nn.Sequential(layer)
    net.is_loaded_in_4bit = isinstance(layer, Linear4bit)
    return get_peft_model(net, config).base_model.model[0]


@pytest.mark.parametrize("kind", [LoraConfig, ShiraConfig])
def test_pefts_layer_for_a_quantized_one_is_told_from_its_plain_one(kind: type[PeftConfig]) -> None:
    config = kind(r=2, target_modules=["0"])
    assert compat.reads_quantized(adapt_layer(make_4bit(torch.randn(64, 128)), config))
    assert not compat.reads_quantized(adapt_layer(nn.Linear(128, 64), config))


def test_what_closes_a_broken_recordings_memory_is_there_and_pinned_memorys_in_cuda_builds() -> None:
    """Where no GPU is, tests/pretended.py stands in for them."""
    assert callable(torch._C._cuda_endAllocateToPool)
    assert callable(torch._C._cuda_releasePool)
    assert hasattr(torch._C, "_host_emptyCache") == (torch.version.cuda is not None)


def test_experts_join_what_leads_into_them_as_their_own_forward_does() -> None:
    experts = MixtralExperts(MixtralConfig(hidden_size=8, intermediate_size=4, num_local_experts=1))
    for parameter in experts.parameters():
        parameter.data.normal_()
    x, only = torch.randn(3, 8), torch.zeros(3, 1, dtype=torch.int64)
    joined = compat.apply_gate(experts, x @ experts.gate_up_proj[0].T)
    assert torch.allclose(joined @ experts.down_proj[0].T, experts(x, only, torch.ones(3, 1)), atol=1e-5)
