"""The NF4 product in Triton's interpreter, against bitsandbytes' own bytes, and the permutes that
dequantize on a device, simulated.
"""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor

from service.model.kernels.triton import nf4, oracles
from service.model.kernels.triton.nf4 import NF4Weight
from service.model.kernels.triton.shapes import ProductShape, product_shape, product_splits

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def quantize(n_out: int, n_in: int, nested: bool = True) -> tuple[NF4Weight, Tensor]:
    """A weight as bitsandbytes makes it, and the float32 values that it makes of it."""
    data, state = quantize_4bit(
        torch.randn(n_out, n_in), blocksize=64, quant_type="nf4", compress_statistics=nested
    )
    return NF4Weight.from_state(data, state), dequantize_4bit(data, state)


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("nested", [True, False])
def test_the_oracle_reads_bitsandbytes_bytes(nested: bool) -> None:
    weight, values = quantize(40, 960, nested)  # 600 scales: more than share one of their own
    assert torch.equal(oracles.dequantize(weight), values)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_three_weights_in_one_launch_are_three_products(nested: bool, dtype: torch.dtype) -> None:
    sizes = (96, 8, 40)
    made = [quantize(n_out, 320, nested) for n_out in sizes]
    x = torch.randn(5, 320, dtype=dtype)
    got = nf4.multiply(x, [weight for weight, _ in made])
    assert [tuple(y.shape) for y in got] == [(5, n_out) for n_out in sizes]
    assert all(y.dtype == dtype for y in got)
    gaps = [gap(y, x.float() @ values.T) for y, (_, values) in zip(got, made, strict=True)]
    assert max(gaps) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_any_split_of_the_inputs_sums_to_the_product(splits: int) -> None:
    weight, values = quantize(48, 640)  # 10 blocks: some splits are shorter, with 8 some are empty
    x = torch.randn(2, 640)
    shape = ProductShape(16, 32, splits, 4, 2)
    assert gap(nf4.multiply(x, [weight], shape)[0], x @ values.T) < 1e-5


def test_rows_of_another_tensor_beside_are_not_read() -> None:
    weight, values = quantize(40, 128)
    wide = torch.full((8, 300), float("nan"))
    x = wide[2:5, 64:192].normal_()
    got = nf4.multiply(x, [weight])[0]
    assert gap(got, x @ values.T) < 1e-5


def test_the_bits_of_a_row_do_not_depend_on_its_company() -> None:
    weight, _ = quantize(40, 256)
    x = torch.randn(7, 256)
    together = nf4.multiply(x, [weight])[0]
    alone = [nf4.multiply(row[None], [weight])[0] for row in x[[0, 3, 6]]]
    assert torch.equal(torch.cat(alone), together[[0, 3, 6]])
    assert torch.equal(nf4.multiply(x.flip(0), [weight])[0].flip(0), together)


@pytest.mark.parametrize(
    ("n_out", "n_in"), [(4096, 4096), (28672, 4096), (4096, 14336), (576, 576), (64, 64)]
)
def test_what_decides_the_order_of_a_sum_is_the_weight_alone(n_out: int, n_in: int) -> None:
    shapes = [product_shape(tokens, n_out, n_in) for tokens in range(1, 65)]
    assert {shape.splits for shape in shapes} == {product_splits(n_out, n_in)}
    assert all(shape.tokens >= tokens for tokens, shape in enumerate(shapes, 1))


def _permute(low: int, high: int, selector: int) -> int:
    """PTX's prmt.b32: a nibble's upper bit replicates the chosen byte's sign."""
    table = [(word >> shift) & 0xFF for word in (low, high) for shift in (0, 8, 16, 24)]
    result = 0
    for i in range(4):
        nibble = selector >> 4 * i & 15
        byte = table[nibble & 7]
        result |= (byte if nibble < 8 else 0xFF * (byte >> 7)) << 8 * i
    return result


OPERATIONS: dict[str, Any] = {
    "mov.b32": lambda a: a,
    "xor.b32": lambda a, b: a ^ b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.b32": lambda a, b: a >> b,
    "prmt.b32": _permute,
}


def _simulate(assembly: str, word: int) -> list[int]:
    """The four results of the PTX for one input word."""
    registers = {"$4": word}
    for line in assembly.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if name in OPERATIONS:
            target, *sources = (operand.strip() for operand in operands.split(","))
            values = [registers[one] if one in registers else int(one, 0) for one in sources]
            registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize(
    ("assembly", "dtype"),
    [(nf4.ASSEMBLY_BFLOAT16, torch.bfloat16), (nf4.ASSEMBLY_FLOAT16, torch.float16)],
    ids=["bfloat16", "float16"],
)
def test_the_permutes_look_every_byte_up(assembly: Any, dtype: torch.dtype) -> None:
    table = torch.tensor(oracles.NF4_VALUES, dtype=dtype)
    codes = list(range(256))
    for shift in (0, 77, 130, 201):  # each byte in each place, beside others
        words = [sum((codes[(i + j * shift) % 256]) << 8 * j for j in range(4)) for i in codes]
        pairs = torch.tensor([_simulate(assembly.value, word) for word in words])
        got = torch.stack((pairs & 0xFFFF, pairs >> 16), 2).to(torch.int32).to(torch.int16).view(dtype)
        each = torch.tensor([[word >> 8 * j & 0xFF for j in range(4)] for word in words])
        assert torch.equal(got, torch.stack((table[each >> 4], table[each & 15]), 2))


def test_a_weight_that_is_held_otherwise_is_refused() -> None:
    data, state = quantize_4bit(torch.randn(8, 128), quant_type="fp4")
    with pytest.raises(ValueError, match="fp4 in blocks of 64"):
        NF4Weight.from_state(data, state)
    data, state = quantize_4bit(torch.randn(8, 128), quant_type="nf4", blocksize=128)
    with pytest.raises(ValueError, match="nf4 in blocks of 128"):
        NF4Weight.from_state(data, state)
    data, state = quantize_4bit(torch.randn(8, 96), quant_type="nf4")
    with pytest.raises(ValueError, match="rows of 96 inputs share blocks of 64"):
        NF4Weight.from_state(data, state)
    data, state = quantize_4bit(torch.randn(8, 128), quant_type="nf4")
    state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="packed the weight for its CPU product"):
        NF4Weight.from_state(data, state)


def test_inputs_that_do_not_fit_are_refused() -> None:
    weight, _ = quantize(8, 128)
    single, _ = quantize(8, 128, nested=False)
    cases: list[tuple[Tensor, list[NF4Weight], str]] = [
        (torch.zeros(1, 128), [], "0 weights in one product"),
        (torch.zeros(1, 128), [weight] * 4, "4 weights in one product"),
        (torch.zeros(65, 128), [weight], "are not 1 to 64 rows"),
        (torch.zeros(0, 128), [weight], "are not 1 to 64 rows"),
        (torch.zeros(128, 2).T, [weight], "are not 1 to 64 rows"),
        (torch.zeros(1, 64), [weight], "weights of \\[128\\] inputs for rows of 64"),
        (torch.zeros(1, 128), [weight, single], "scales of one kind only"),
        (torch.zeros(1, 128), [weight._replace(packed=weight.packed[1:])], "for 512 bytes of NF4"),
        (torch.zeros(1, 128), [weight._replace(scales=weight.scales[1:])], "15 scales"),
        (torch.zeros(1, 128), [weight._replace(scales=weight.scales.float())], "scales of torch.float32"),
        (torch.zeros(1, 128, device="meta"), [weight], "a weight on cpu for inputs on meta"),
    ]
    for x, weights, reason in cases:
        with pytest.raises(ValueError, match=reason):
            nf4.multiply(x, weights)


def test_random_shapes_give_the_product() -> None:
    draw = random.Random(3)
    for _ in range(6):
        n_out, n_in, tokens = draw.randint(1, 90), 64 * draw.randint(1, 6), draw.randint(1, 40)
        weight, values = quantize(n_out, n_in, draw.random() < 0.5)
        x = torch.randn(tokens, n_in)
        assert gap(nf4.multiply(x, [weight])[0], x @ values.T) < 1e-5, SimpleNamespace(**locals())
