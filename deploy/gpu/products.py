"""The NF4 product on the device: right, the same to the bit in any company, and how fast beside
bfloat16 and bitsandbytes.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from service.model.kernels.triton import nf4, oracles
from service.model.kernels.triton.nf4 import NF4Weight
from service.model.kernels.triton.shapes import ProductShape, product_shape

from .measure import DEVICE, DRY, DTYPE, Call, Report, gap, random, ring, took


class Group(NamedTuple):
    """Weights that share their input, by outputs."""

    name: str
    outputs: tuple[int, ...]
    n_in: int

    @property
    def floor_bytes(self) -> int:
        weights = sum(self.outputs) * self.n_in
        return weights // 2 + weights // 64


GROUPS = (
    [Group("small", (96, 40), 256)]
    if DRY
    else [
        Group("gate, up", (14336, 14336), 4096),
        Group("q, k, v", (4096, 1024, 1024), 4096),
        Group("o", (4096,), 4096),
        Group("down", (4096,), 14336),
    ]
)
TOKENS = (3,) if DRY else (1, 16, 32, 64)
COMPANY = ((0, 1), (2, 4)) if DRY else ((0, 1), (5, 6), (7, 23), (20, 45), (1, 34))
# Columns, warps and stages that are tried, by padded tokens
VARIANTS = (
    {16: [(64, 4, 2)]}
    if DRY
    else {
        16: [(128, 4, 6), (128, 4, 4), (128, 4, 3)],
        32: [(128, 4, 6), (128, 4, 4), (128, 4, 3)],
        64: [(128, 4, 4), (128, 4, 3), (64, 4, 4)],
    }
)
ERROR = 5e-3


def make_weight(n_out: int, n_in: int) -> NF4Weight:
    """Random bytes and scales of the sizes that bitsandbytes' have."""
    blocks = n_out * n_in // 64
    packed, scales = (
        torch.randint(0, 256, (size,), device=DEVICE, dtype=torch.uint8) for size in (32 * blocks, blocks)
    )
    outer = torch.rand(-(-blocks // 256), device=DEVICE) * 0.01 + 0.01
    code, offset = torch.linspace(-1, 1, 256, device=DEVICE), torch.full((1,), 0.05, device=DEVICE)
    return NF4Weight(packed, scales, code, outer, offset, n_out, n_in)


def make_weights(group: Group) -> list[NF4Weight]:
    return [make_weight(n_out, group.n_in) for n_out in group.outputs]


def shapes_of(group: Group, tokens: int) -> list[ProductShape]:
    """The variants for this many tokens, and for the first of them other splits."""
    own = product_shape(tokens, sum(group.outputs), group.n_in)
    tried = [
        own._replace(columns=columns, warps=warps, stages=stages)
        for columns, warps, stages in VARIANTS[own.tokens]
    ]
    others = {max(1, own.splits // 2), own.splits * 2} - {own.splits}
    return tried + [tried[0]._replace(splits=splits) for splits in sorted(others)]


def compile_all(part: int, of: int) -> None:
    """Every `of`-th binary, by a small product: the cache on disk then has it for all processes."""
    weights = [make_weight(256, 512)]
    kinds = [(tokens, variant) for tokens, variants in VARIANTS.items() for variant in variants]
    for i, (tokens, (columns, warps, stages)) in enumerate(kinds):
        for j, splits in enumerate((2, 1)):
            if (2 * i + j) % of == part:
                shape = ProductShape(tokens, columns, splits, warps, stages)
                nf4.multiply(random(tokens, 512), weights, shape)


def check_products(report: Report) -> None:
    """Errors, and whether a row's bits depend on its company."""
    for group in GROUPS:
        weights = make_weights(group)
        x = random(4 if DRY else 64, group.n_in)
        got = nf4.multiply(x, weights)
        error = max(gap(y, oracles.multiply(x, w)) for y, w in zip(got, weights, strict=True))
        report.expect(error < ERROR, f"NF4 {group.name}: error {error:.2g}")
        alone = [rows for rows in COMPANY if not _is_same(x, weights, got, *rows)]
        report.expect(not alone, f"NF4 {group.name}: the bits of rows {alone} depend on their company")
        report.add("NF4", f"{group.name}, right", error=error, same_in_company=not alone)


def _is_same(x: Tensor, weights: list[NF4Weight], got: tuple[Tensor, ...], start: int, stop: int) -> bool:
    parts = nf4.multiply(x[start:stop], weights)
    return all(torch.equal(part, whole[start:stop]) for part, whole in zip(parts, got, strict=True))


def time_products(report: Report, bandwidth: float) -> None:
    for group in GROUPS:
        copies = [make_weights(group) for _ in range(ring(group.floor_bytes))]
        dense = [random(sum(group.outputs), group.n_in) for _ in range(ring(4 * group.floor_bytes))]
        quantized = _quantized(group)
        for tokens in TOKENS:
            x = random(tokens, group.n_in)
            times = _time_shapes(report, group, x, copies)
            linear = took([partial(torch.nn.functional.linear, x, weight) for weight in dense])
            library = float("nan")
            with report.trying(f"bitsandbytes, {group.name}, {tokens} tokens"):
                library = _time_library(x, quantized)
            floor = group.floor_bytes / bandwidth
            best = min(times, key=lambda name: times[name])
            figures = {"us": times[best], "own_us": next(iter(times.values()))}
            figures |= {"of_floor": floor / times[best], "bf16_us": linear, "bitsandbytes_us": library}
            report.add("NF4", f"{group.name}, {tokens} tokens", **figures, best=best, all=times)


def _time_shapes(report: Report, group: Group, x: Tensor, copies: list[list[NF4Weight]]) -> dict[str, float]:
    """Microseconds by shape, our own choice first."""
    times = {}
    for shape in shapes_of(group, len(x)):
        name = f"N{shape.columns} w{shape.warps} s{shape.stages} splits {shape.splits}"
        with report.trying(f"NF4 {group.name} {name}"):
            times[name] = took([partial(nf4.multiply, x, weights, shape) for weights in copies])
    return times


def _quantized(group: Group) -> list[list[tuple[Tensor, Any]]]:
    """As bitsandbytes quantizes, for its own product; empty where it is not here."""
    try:
        from bitsandbytes.functional import quantize_4bit
    except ImportError:
        return []
    return [
        [
            quantize_4bit(random(n, group.n_in), blocksize=64, quant_type="nf4", compress_statistics=True)
            for n in group.outputs
        ]
        for _ in range(ring(group.floor_bytes))
    ]


def _time_library(x: Tensor, copies: list[list[tuple[Tensor, Any]]]) -> float:
    if not copies:
        return float("nan")
    from bitsandbytes import matmul_4bit

    def multiply_all(copy: list[tuple[Tensor, Any]]) -> None:
        for data, state in copy:
            matmul_4bit(x, data, quant_state=state)

    calls: list[Call] = [partial(multiply_all, copy) for copy in copies]
    return took(calls)


def check_library_bytes(report: Report) -> None:
    """The bytes of bitsandbytes itself, as its own dequantization reads them."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    data, state = quantize_4bit(random(256, 512).to(DTYPE), quant_type="nf4", compress_statistics=True)
    weight = NF4Weight.from_state(data, state)
    x = random(5, 512)
    error = gap(nf4.multiply(x, [weight])[0], x.float() @ dequantize_4bit(data, state).float().T)
    report.expect(error < ERROR, f"NF4 of bitsandbytes: error {error:.2g}")
    report.add("NF4", "bitsandbytes' bytes", error=error)
