"""y = x Wᵀ for 1 to 64 rows, W in NF4 as bitsandbytes holds it and dequantized in registers.

Each program reads `COLUMNS` rows of one W, [COLUMNS, inputs], as the first operand of the tensor
cores (yᵀ = W xᵀ), so that few tokens waste none of it; the scale of a block of 64 weights is applied
after its products, in float32. The inputs are split, and the parts are summed in order: the bits of a
row do not depend on the other rows. Runs in the worker process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .oracles import NF4_VALUES
from .shapes import MEMBERS, MOST_TOKENS, OUTER_BLOCK, SCALE_BLOCK, ProductShape, product_shape


class NF4Weight(NamedTuple):
    """A weight [n_out, n_in] in NF4.

    packed uint8 [n_out * n_in / 2], the even input in a byte's high half. A block of 64 weights has a
    scale: with `code`, uint8 `scales` [n_out * n_in / 64] mean code[scales] * outer + offset, where
    256 blocks share a float32 `outer`; without, float32 `scales`.
    """

    packed: Tensor
    scales: Tensor
    code: Tensor | None
    outer: Tensor | None
    offset: Tensor | None
    n_out: int
    n_in: int

    @classmethod
    def from_state(cls, packed: Tensor, state: Any) -> NF4Weight:
        """Of the data and the `quant_state` of a bitsandbytes parameter; copies nothing.

        Raises ValueError for another type of 4 bits, another block size or rows that share a block.
        """
        n_out, n_in = state.shape
        nested = state.state2 if state.nested else None
        outer_block = nested.blocksize if nested else OUTER_BLOCK
        if (state.quant_type, state.blocksize, outer_block) != ("nf4", SCALE_BLOCK, OUTER_BLOCK):
            raise ValueError(f"{state.quant_type} in blocks of {state.blocksize} and {outer_block}")
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError("bitsandbytes has packed the weight for its CPU product")
        if n_in % SCALE_BLOCK:
            raise ValueError(f"rows of {n_in} inputs share blocks of {SCALE_BLOCK}")
        data, scales = packed.view(-1), state.absmax
        if nested is None:
            return cls(data, scales, None, None, None, n_out, n_in)
        return cls(data, scales, nested.code, nested.absmax, state.offset.reshape(1), n_out, n_in)


def _bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype).view(torch.int16).item()) & 0xFFFF


def _permutes(word: str, flipped: str, choice: str, low: str, high: str) -> str:
    """PTX for four nibbles: permutes look their high and low bytes up in both halves of the table,
    then choose by the nibble's uppermost bit; the even input ends in the lower half of a result.
    """
    return (
        f"prmt.b32 r, h0, h1, {word}; prmt.b32 t, h2, h3, {flipped}; prmt.b32 h, r, t, {choice}; "
        f"prmt.b32 r, l0, l1, {word}; prmt.b32 t, l2, l3, {flipped}; prmt.b32 l, r, t, {choice}; "
        f"prmt.b32 {low}, l, h, 0x4051; prmt.b32 {high}, l, h, 0x6273; "
    )


def _dequantization(dtype: torch.dtype) -> str:
    """PTX from 4 bytes to 4 pairs of 16-bit floats: 16 permutes for 8 values."""
    bits = [_bits(value, dtype) for value in NF4_VALUES]
    tables = "".join(
        f"mov.b32 {name}{i}, {sum(((bits[4 * i + j] >> shift) & 0xFF) << (8 * j) for j in range(4)):#010x}; "
        for name, shift in (("l", 0), ("h", 8))
        for i in range(4)
    )
    # A set upper bit makes a permute replicate a sign, so each half of the table sees its own cleared
    choices = "xor.b32 f, $4, 0x88888888; shr.b32 c, $4, 1; "
    choices += "and.b32 c, c, 0x44444444; or.b32 c, c, 0x32103210; "
    upper = "shr.b32 uw, $4, 16; shr.b32 uf, f, 16; shr.b32 uc, c, 16; "
    halves = _permutes("$4", "f", "c", "$0", "$1") + _permutes("uw", "uf", "uc", "$2", "$3")
    registers = ".reg .b32 f, c, uw, uf, uc, r, t, h, l, h0, h1, h2, h3, l0, l1, l2, l3; "
    return f"{{ {registers}{tables}{choices}{upper}{halves}}}"


PLAIN, BFLOAT16, FLOAT16 = 0, 1, 2  # dequantization: by selection, which any dtype and the interpreter know
ASSEMBLY_BFLOAT16 = tl.constexpr(_dequantization(torch.bfloat16))
ASSEMBLY_FLOAT16 = tl.constexpr(_dequantization(torch.float16))


@triton.jit
def select_value(code):
    """NF4's values by four rounds of selection: no table in memory."""
    odd = (code & 1) != 0
    a0 = tl.where(odd, -0.6961928009986877, -1.0)
    a1 = tl.where(odd, -0.39491748809814453, -0.5250730514526367)
    a2 = tl.where(odd, -0.18477343022823334, -0.28444138169288635)
    a3 = tl.where(odd, 0.0, -0.09105003625154495)
    a4 = tl.where(odd, 0.16093020141124725, 0.07958029955625534)
    a5 = tl.where(odd, 0.33791524171829224, 0.24611230194568634)
    a6 = tl.where(odd, 0.5626170039176941, 0.44070982933044434)
    a7 = tl.where(odd, 1.0, 0.7229568362236023)
    second, third = (code & 2) != 0, (code & 4) != 0
    low = tl.where(third, tl.where(second, a3, a2), tl.where(second, a1, a0))
    high = tl.where(third, tl.where(second, a7, a6), tl.where(second, a5, a4))
    return tl.where((code & 8) != 0, high, low)


@triton.jit
def join_four(a, b, c, d):
    """[..., 2, 2] of which [..., i, j] is the tensor of number 2 i + j."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def unpack_words(word, dtype: tl.constexpr, DEQUANT: tl.constexpr):
    """int32 [N, words], 4 bytes each → the even and the odd inputs, two tensors [N, words, 2, 2] of
    which [..., i, j] comes from byte 2 i + j.
    """
    if DEQUANT == 0:
        evens = join_four(word >> 4 & 15, word >> 12 & 15, word >> 20 & 15, word >> 28 & 15)
        odds = join_four(word & 15, word >> 8 & 15, word >> 16 & 15, word >> 24 & 15)
        return select_value(evens).to(dtype), select_value(odds).to(dtype)
    else:  # noqa: RET505 - a branch that the compiler must not see
        assembly: tl.constexpr = ASSEMBLY_BFLOAT16 if DEQUANT == 1 else ASSEMBLY_FLOAT16
        a, b, c, d = tl.inline_asm_elementwise(
            assembly, "=r,=r,=r,=r,r", [word], dtype=(tl.int32,) * 4, is_pure=True, pack=1
        )
        pairs = join_four(a, b, c, d)
        even = (pairs & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        odd = (pairs >> 16 & 0xFFFF).to(tl.uint16).to(dtype, bitcast=True)
        return even, odd


@triton.jit
def order_inputs(values, ROWS: tl.constexpr):
    """[ROWS, ...] of 64 inputs → [ROWS, 64], in an order in which the words that a thread has read are
    its part of the tensor cores' operand: of [thread 4, word 2, byte 4, even or odd 2] the thread
    moves next to the end.
    """
    parts = tl.reshape(values, [ROWS, 4, 2, 2, 2, 2])
    return tl.reshape(tl.permute(parts, (0, 2, 3, 4, 1, 5)), [ROWS, 64])


@triton.jit(do_not_specialize=["tokens"])  # one binary for any number of rows
def multiply_nf4(
    x, y,
    packed0, scales0, code0, outer0, offset0,
    packed1, scales1, code1, outer1, offset1,
    packed2, scales2, code2, outer2, offset2,
    tokens, n_in, n_out0, n_out1, n_out2, x_row, y_split, y_row,
    T: tl.constexpr, N: tl.constexpr, STAGES: tl.constexpr,
    NESTED: tl.constexpr, DEQUANT: tl.constexpr,
):  # fmt: skip
    """y[split, token, column] = the split's part of x Wᵀ for the weights W of up to three members,
    whose columns lie side by side.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    first1 = tl.cdiv(n_out0, N)
    first2 = first1 + tl.cdiv(n_out1, N)
    if tile < first1:
        packed, scales, code, outer, offset = packed0, scales0, code0, outer0, offset0
        n_out, column = n_out0, n_out0 * 0
    elif tile < first2:
        packed, scales, code, outer, offset = packed1, scales1, code1, outer1, offset1
        n_out, column, tile = n_out1, n_out0, tile - first1
    else:
        packed, scales, code, outer, offset = packed2, scales2, code2, outer2, offset2
        n_out, column, tile = n_out2, n_out0 + n_out1, tile - first2
    t, n = tl.arange(0, T), tile * N + tl.arange(0, N)
    w, k = tl.arange(0, 8), tl.arange(0, 64)
    row = tl.minimum(n, n_out - 1)  # past the end the last one again, which nothing stores
    words = packed + row[:, None] * (n_in // 8) + w[None, :]
    inputs = x + t[:, None] * x_row + k[None, :]
    is_row = (t < tokens)[:, None]
    blocks = n_in // 64
    share = tl.cdiv(blocks, tl.num_programs(1))
    shift = 0.0
    if NESTED:
        shift = tl.load(offset)
    acc = tl.zeros([N, T], tl.float32)
    for block in tl.range(split * share, tl.minimum((split + 1) * share, blocks), num_stages=STAGES):
        even, odd = unpack_words(tl.load(words + block * 8), x.dtype.element_ty, DEQUANT)
        place = row * blocks + block
        if NESTED:
            named = tl.load(code + tl.load(scales + place).to(tl.int32))
            scale = named * tl.load(outer + place // 256) + shift
        else:
            scale = tl.load(scales + place)
        values = order_inputs(tl.load(inputs + block * 64, mask=is_row, other=0.0), T)
        weights = order_inputs(tl.join(even, odd), N)
        products = tl.dot(weights, tl.trans(values), input_precision="ieee")
        acc = tl.fma(products, tl.broadcast_to(scale[:, None], [N, T]), acc)
    where = y + split * y_split + t[None, :] * y_row + (column + n)[:, None]
    tl.store(where, acc.to(y.dtype.element_ty), mask=(t < tokens)[None, :] & (n < n_out)[:, None])


@triton.jit
def sum_splits(parts, y, n_out, part_split, part_row, y_row, N: tl.constexpr, SPLITS: tl.constexpr):
    """y[token, column] = the sum of the splits' parts, in their order."""
    token, n = tl.program_id(1), tl.program_id(0) * N + tl.arange(0, N)
    total = tl.zeros([N], tl.float32)
    for split in tl.static_range(SPLITS):
        total += tl.load(parts + split * part_split + token * part_row + n, mask=n < n_out, other=0.0)
    tl.store(y + token * y_row + n, total.to(y.dtype.element_ty), mask=n < n_out)


def multiply(
    x: Tensor, weights: Sequence[NF4Weight], shape: ProductShape | None = None
) -> tuple[Tensor, ...]:
    """x [tokens, n_in] times each weight, transposed: [tokens, n_out] of x's dtype, views of one
    tensor. At most 64 tokens and three weights of the same n_in.

    Raises ValueError for what does not fit.
    """
    _check_product(x, weights)
    sizes = [weight.n_out for weight in weights]
    shape = shape or product_shape(x.shape[0], sum(sizes), x.shape[1])
    y = x.new_empty(x.shape[0], sum(sizes))
    parts = y[None] if shape.splits == 1 else y.new_empty(shape.splits, *y.shape, dtype=torch.float32)
    _launch_product(x, weights, parts, shape, _dequantization_of(x.dtype))
    if shape.splits > 1:
        grid = (triton.cdiv(y.shape[1], SUM_COLUMNS), y.shape[0])
        rows = parts.stride(0), parts.stride(1), y.stride(0)
        sum_splits[grid](parts, y, y.shape[1], *rows, N=SUM_COLUMNS, SPLITS=shape.splits)
    members: tuple[Tensor, ...] = y.split(sizes, 1)
    return members


SUM_COLUMNS = 512


def _dequantization_of(dtype: torch.dtype) -> int:
    if triton.knobs.runtime.interpret:
        return PLAIN
    return {torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}.get(dtype, PLAIN)


def _launch_product(
    x: Tensor, weights: Sequence[NF4Weight], parts: Tensor, shape: ProductShape, dequantization: int
) -> None:
    members = [_arguments_of(weight) for weight in weights]
    members += [members[0]] * (MEMBERS - len(members))
    sizes = [weight.n_out for weight in weights] + [0] * (MEMBERS - len(weights))
    tiles = sum(triton.cdiv(size, shape.columns) for size in sizes)
    multiply_nf4[tiles, shape.splits](
        x,
        parts,
        *(tensor for member in members for tensor in member),
        *x.shape,
        *sizes,
        x.stride(0),
        parts.stride(0),
        parts.stride(1),
        T=shape.tokens,
        N=shape.columns,
        STAGES=shape.stages,
        NESTED=weights[0].code is not None,
        DEQUANT=dequantization,
        num_warps=shape.warps,
    )


def _arguments_of(weight: NF4Weight) -> tuple[Tensor, ...]:
    """packed as int32, scales, code, outer, offset; where there are none, the scales again."""
    words, scales = weight.packed.view(torch.int32), weight.scales
    parts = (weight.code, weight.outer, weight.offset)
    return words, scales, *(scales if part is None else part for part in parts)


def _check_product(x: Tensor, weights: Sequence[NF4Weight]) -> None:
    if not 1 <= len(weights) <= MEMBERS:
        raise ValueError(f"{len(weights)} weights in one product, not 1 to {MEMBERS}")
    if x.dim() != 2 or not 1 <= x.shape[0] <= MOST_TOKENS or x.stride(1) != 1:
        raise ValueError(f"inputs {tuple(x.shape)} are not 1 to {MOST_TOKENS} rows")
    if any(weight.n_in != x.shape[1] for weight in weights) or x.shape[1] % SCALE_BLOCK:
        raise ValueError(f"weights of {[weight.n_in for weight in weights]} inputs for rows of {x.shape[1]}")
    if len({weight.code is None for weight in weights}) > 1:
        raise ValueError("scales of one kind only in one product")
    for weight in weights:
        _check_weight(weight, x.device)


def _check_weight(weight: NF4Weight, device: torch.device) -> None:
    size, blocks = weight.n_out * weight.n_in // 2, weight.n_out * weight.n_in // SCALE_BLOCK
    if weight.packed.dtype != torch.uint8 or weight.packed.shape != (size,):
        raise ValueError(f"{tuple(weight.packed.shape)} {weight.packed.dtype} for {size} bytes of NF4")
    expected = torch.float32 if weight.code is None else torch.uint8
    if weight.scales.dtype != expected or weight.scales.numel() != blocks:
        found = f"{weight.scales.numel()} scales of {weight.scales.dtype}"
        raise ValueError(f"{found} for {blocks} of {expected}")
    if weight.packed.device != device or weight.scales.device != device:
        raise ValueError(f"a weight on {weight.packed.device} for inputs on {device}")
