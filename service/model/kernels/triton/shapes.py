"""Block sizes of the Triton kernels, chosen by shape: all of them are here.

What decides the order in which a row's products are summed (SCALE_BLOCK, splits, the share of a
split) depends on the weight's shape or on the sequence's own length alone, never on the number of
rows: a row's result is the same to the bit in any company. What a program covers besides may depend
on the step. Imports no Triton.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

MEMBERS = 3  # weights that share their input and one launch: q, k and v, or gate and up

# NF4 product
SCALE_BLOCK = 64  # weights that share a scale in bitsandbytes' layout
OUTER_BLOCK = 256  # scales that share a scale of their own
MOST_TOKENS = 64
PRODUCT_PROGRAMS = 224  # what the splits of a weight make at least: some 1.7 for each multiprocessor
MOST_SPLITS = 16
FEWEST_BLOCKS = 4  # scale blocks of a split

# Grouped LoRA
LORA_TOKENS = 16  # of a tile at most
LORA_RANK = 16  # rank rows that a program takes at a time
LORA_SHARE = 512  # inputs that a split of the shrink sums
LORA_MOST_SPLITS = 8
LORA_PROGRAMS = 4  # of the shrink of one tile's split, which share its rank rows

# Attention
KV_BLOCK = 16  # positions of a block of KV
FEWEST_POSITIONS = 256  # of a split of one sequence's KV
ATTENTION_SPLITS = 32  # of one sequence at most
ATTENTION_PROGRAMS = 2048  # of a decode step, about


class ProductShape(NamedTuple):
    """How the programs of the NF4 product divide a weight: `columns` outputs each, and the inputs in
    `splits`; `tokens` is what the rows are padded to.
    """

    tokens: int
    columns: int
    splits: int
    warps: int
    stages: int


# By tokens: columns, warps and stages, the fastest of those that `deploy/gpu/products.py` tries
PRODUCT_SHAPES = {16: (128, 4, 6), 32: (128, 4, 6), 64: (128, 4, 4)}


def product_shape(tokens: int, n_out: int, n_in: int) -> ProductShape:
    """Of 1 to 64 rows and a weight, or several side by side, of [n_out, n_in]."""
    padded = next(size for size in PRODUCT_SHAPES if tokens <= size)
    columns, warps, stages = PRODUCT_SHAPES[padded]
    return ProductShape(padded, columns, product_splits(n_out, n_in), warps, stages)


def product_splits(n_out: int, n_in: int) -> int:
    """Into how many parts the inputs are summed apart: a power of two."""
    splits = 1
    while (
        splits < MOST_SPLITS
        and splits * ceil_div(n_out, 128) < PRODUCT_PROGRAMS
        and n_in // SCALE_BLOCK >= 2 * splits * FEWEST_BLOCKS
    ):
        splits *= 2
    return splits


class LoraTiles(NamedTuple):
    """Which rank rows which tokens meet: tiles int32 [n, 4], weights float32 [n, LORA_TOKENS] of
    their tokens, gates int32 [n]; `most_rank` is no less than any tile's rank.

    A tile is (first token, tokens, first rank row, rank), of one adapter. Its gate is the row of B
    that says by how much of itself the tile's output grows before anything is added, or -1.
    """

    tiles: Tensor
    weights: Tensor
    gates: Tensor
    most_rank: int


class LoraMember(NamedTuple):
    """One linear's output y [tokens, n_out], its pools a [rank rows, n_in] and b [rank rows, n_out],
    and the bias [n_out] that y has already, which no gate changes.

    ranks int32 [rank rows]: how many rows the adapter whose first row this is has in this layer; a
    tile has no more than that.
    """

    y: Tensor
    a: Tensor
    b: Tensor
    ranks: Tensor
    bias: Tensor | None = None


class LoraShape(NamedTuple):
    """`inputs` at a time and `splits` of the shrink; `columns` outputs of a program of the expand, and
    `ranks` at a time there, 16 or a multiple.
    """

    inputs: int
    splits: int
    columns: int
    ranks: int


def lora_shape(n_in: int) -> LoraShape:
    splits = min(ceil_div(n_in, LORA_SHARE), LORA_MOST_SPLITS)
    return LoraShape(128, splits, 256, 16)


class DecodeShape(NamedTuple):
    """`positions` of KV at a time; `programs` of one sequence and KV head, which share its splits."""

    positions: int
    programs: int
    warps: int
    stages: int


def decode_shape(sequences: int, kv_heads: int, blocks: int) -> DecodeShape:
    """`blocks`: how many the longest sequence may hold."""
    most = min(ATTENTION_SPLITS, ceil_div(blocks * KV_BLOCK, FEWEST_POSITIONS))
    wanted = ceil_div(ATTENTION_PROGRAMS, sequences * kv_heads)
    return DecodeShape(64, max(1, min(most, wanted)), 4, 2)


class PrefillShape(NamedTuple):
    """`rows` query rows (tokens times the query heads of a KV head) and `positions` of KV at a time."""

    rows: int
    positions: int
    warps: int
    stages: int


def prefill_shape(groups: int, dim: int, generation: int) -> PrefillShape:
    """`generation` is the major number of the device's compute capability: before 9 (Hopper) the
    products take more registers.
    """
    rows = max(64, power_of_two(groups))
    if dim > 128:
        return PrefillShape(rows, 32, 8, 2)
    return PrefillShape(rows, 64 if generation >= 9 else 32, 4, 2)


def ceil_div(number: int, by: int) -> int:
    return -(-number // by)


def power_of_two(number: int) -> int:
    """The least that is not below."""
    return 1 << (number - 1).bit_length()
