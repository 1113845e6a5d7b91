"""The Triton kernels as the service puts them in place, in Triton's interpreter: what a GPU runs, said by
torch and bitsandbytes too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor

pytest.importorskip(
    "triton", reason="no Triton, which comes with CUDA builds of torch: no kernel of a GPU is tested"
)

from service.core.adapter import Placement
from service.core.base_info import BLOCK_TOKENS
from service.model import gpu_kernels, kv
from service.model.lora_linear import AddTiles, LoraWeights
from service.model.lora_pool import LoraPool
from service.model.runner import forward_step
from service.model.step_layout import SequenceStep, make_layout, running
from tests import making

CPU = torch.device("cpu")
SEQUENCES = [
    SequenceStep([1], 9, [7]),
    SequenceStep([1], 37, [3, 11, 0]),
    SequenceStep([1], 16, [6, 2]),
    SequenceStep([1] * 20, 0, [9, 1]),
]


class PagedLayer:
    """An attention layer's buffers, in which others have written."""

    def __init__(self) -> None:
        torch.manual_seed(1)
        self.kv_keys, self.kv_values = (torch.randn(12, 2, BLOCK_TOKENS, width) for width in (32, 24))


@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [(None, None, False), (18, None, False), (None, 20.0, False), (18, None, True)],
)
def test_attention_by_the_kernel_is_torchs_own(
    window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    ours, plain = PagedLayer(), PagedLayer()
    tokens = sum(len(sequence.tokens) for sequence in SEQUENCES)
    query, key = (torch.randn(1, heads, tokens, 32) for heads in (6, 2))
    value = torch.randn(1, 2, tokens, 24)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    options["s_aux"] = torch.randn(6) if has_sinks else None
    with torch.inference_mode(), running(make_layout(SEQUENCES, CPU)):
        want, _ = kv.attend_blocks(plain, query, key, value, None, **options)
        options["attend_singles"] = gpu_kernels.attend_singles
        got, _ = kv.attend_blocks(ours, query, key, value, None, **options)
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.equal(ours.kv_keys, plain.kv_keys)


class QuantizedLayer(torch.nn.Module):
    """bitsandbytes' 4-bit layer as a GPU holds it."""

    def __init__(self, dense: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        data, state = functional.quantize_4bit(dense, quant_type="nf4", compress_statistics=True)
        weight: Any = torch.nn.Parameter(data, requires_grad=False)
        weight.quant_state = state
        self.weight = weight
        self.bias = bias
        self.dense = functional.dequantize_4bit(data, state)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.dense, self.bias)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("tokens", [1, 3, 65])
def test_a_4_bit_layer_answers_as_bitsandbytes_holds_its_weights(tokens: int, biased: bool) -> None:
    torch.manual_seed(0)
    layer = QuantizedLayer(torch.randn(96, 128), torch.randn(96) if biased else None)
    ours, x = gpu_kernels.NF4Linear(layer), torch.randn(1, tokens, 128)
    assert torch.allclose(ours(x), layer(x), atol=1e-4)
    assert ours.weight is layer.weight


def test_where_torch_has_no_cuda_the_reason_is_said() -> None:
    assert gpu_kernels.explain_absence(CPU) == "torch has no CUDA here"


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> LoraPool:
    """Two adapters in a pool of a tiny model: rows [0, 4) of all layers, and [4, 13) of every third."""
    base = making.load(making.tiny(tmp_path_factory.mktemp("pool") / "base"))
    pool = LoraPool(base, 16, torch.float32, CPU)
    kv.allocate_blocks(kv.probe_attention(base), 12, torch.float32, CPU)
    torch.manual_seed(2)
    for digest, start, rank, every in (("one", 0, 4, 1), ("two", 4, 9, 3)):
        layers: Any = list(pool.layers.items())[::every]
        shapes = {name: (layer.pool_a.shape[1], layer.pool_b.shape[1]) for name, layer in layers}
        factors = {n: LoraWeights(*(torch.randn(rank, size) / 8 for size in shapes[n])) for n in shapes}
        pool.place_adapter(Placement(digest, start, rank), factors)
    return pool


STEPS = {
    "a token each, and a prompt": [*SEQUENCES[:2], SequenceStep([5] * 20, 0, [9, 1], "one", kept=20)],
    "all of different adapters": [
        SequenceStep([i], 3 * i, [i], digest) for i, digest in enumerate(("two", None, "one", "two"), 1)
    ],
    "all of the base": list(SEQUENCES[:3]),
    "a prompt alone": [SequenceStep([7] * 18, 0, [2, 3], "two", kept=18)],
}


@pytest.mark.parametrize("step", STEPS)
def test_adapters_by_the_kernel_are_those_of_the_masked_product(pool: LoraPool, step: str) -> None:
    def run_step(add_tiles: AddTiles | None) -> Tensor:
        pool.step.add_tiles = add_tiles
        with torch.inference_mode():
            pool.begin_step(STEPS[step])
            return forward_step(pool.tree, make_layout(STEPS[step], CPU))

    assert torch.allclose(run_step(gpu_kernels.add_tiles), run_step(None), atol=1e-4)


def test_a_product_that_is_not_torchs_is_not_put_in_place(
    pool: LoraPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers: Any = list(pool.layers.values())
    assert gpu_kernels._explain_difference(layers) == ""
    monkeypatch.setattr(gpu_kernels, "add_tiles", lambda x, member, tiles: member.y.mul_(1.1))
    assert gpu_kernels._explain_difference(layers).startswith("differs by ")
    monkeypatch.setattr(gpu_kernels, "add_tiles", lambda x: x)
    assert gpu_kernels._explain_difference(layers).startswith("raises TypeError: ")
