"""Attention over KV in blocks of 16 positions, found by a block table: decode and prefill.

Decode divides a sequence's KV into splits, whose number and size depend on its own length alone,
and joins them in their order. Prefill takes tiles of query rows (tokens times the query heads of a
KV head) over all KV they see. Both know grouped queries, values of another width than keys, a
sliding window, chunks (Llama 4), a softcap and sinks. Runs in the worker process.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...attention_rules import ScoreRules
from .shapes import (
    ATTENTION_SPLITS,
    FEWEST_POSITIONS,
    KV_BLOCK,
    DecodeShape,
    PrefillShape,
    ceil_div,
    decode_shape,
    power_of_two,
    prefill_shape,
)

LOG2E = tl.constexpr(1.4426950408889634)
STEP_TENSORS = ["sequence_start", "kv_length", "block_table"]  # slices of which start anywhere


@triton.jit
def bend_scores(scores, softcap):
    """softcap * tanh(scores / softcap)."""
    e = tl.exp2(scores * (2.0 * LOG2E / softcap))
    return softcap * (1.0 - 2.0 / (e + 1.0))


@triton.jit
def first_visible(position, window, chunk, WINDOW: tl.constexpr, CHUNK: tl.constexpr):
    """The first position that a token at `position` sees."""
    first = position * 0
    if WINDOW:
        first = tl.maximum(first, position - window + 1)
    if CHUNK:
        first = tl.maximum(first, position - position % chunk)
    return first


@triton.jit
def load_positions(pages, table, at, d, page_step, position_step, keep, is_dim, BLOCK: tl.constexpr):
    """[positions, dim] of one KV head: the positions `at` of a sequence, where `keep` says so."""
    page = tl.load(table + at // BLOCK, mask=keep, other=0).to(tl.int64)
    rows = pages + page * page_step + (at % BLOCK) * position_step
    return tl.load(rows[:, None] + d[None, :], mask=keep[:, None] & is_dim[None, :], other=0.0)


@triton.jit
def attend_positions(query, k, v, top, norm, acc, seen, scale, softcap, CAP: tl.constexpr):
    """One turn of the running softmax over [rows, positions]."""
    scores = tl.dot(query, tl.trans(k), input_precision="ieee")
    if CAP:
        scores = bend_scores(scores * scale, softcap) * LOG2E
    else:
        scores *= scale * LOG2E
    scores = tl.where(seen, scores, float("-inf"))
    new = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new == float("-inf"), 0.0, new)  # a row that has seen nothing yet
    fade = tl.exp2(top - base)
    weights = tl.exp2(scores - base[:, None])
    acc = tl.dot(weights.to(v.dtype), v, acc * fade[:, None], input_precision="ieee")
    return new, norm * fade + tl.sum(weights, 1), acc


@triton.jit
def add_sinks(sinks, head, is_own, top, norm, acc):
    """attend_positions' results with one more score a row, the sink of its head, which has no value."""
    sink = tl.load(sinks + head, mask=is_own, other=0.0).to(tl.float32) * LOG2E
    new = tl.maximum(top, sink)
    fade = tl.exp2(top - new)
    return norm * fade + tl.exp2(sink - new), acc * fade[:, None]


@triton.jit(do_not_specialize=["window", "chunk", "table_row"], do_not_specialize_on_alignment=STEP_TENSORS)
def attend_splits(
    query, keys, values, kv_length, block_table, parts, weights,
    scale, softcap, window, chunk,
    query_row, query_head, key_page, key_position, key_head, value_page, value_position, value_head,
    table_row, heads,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr, SPLITS: tl.constexpr, FEWEST: tl.constexpr, STAGES: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """parts[sequence, head, split] float32 [VALUE_DIM] and weights[sequence, head, split], the
    logarithm to base 2 of what the split's softmax sums to; a program takes every so many-th split.
    """
    row, kv_head, program = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(kv_length + row)
    start = first_visible(length - 1, window, chunk, WINDOW, CHUNK) // POSITIONS * POSITIONS
    size = tl.maximum(tl.cdiv(tl.cdiv(length - start, SPLITS), POSITIONS) * POSITIONS, FEWEST)
    g, d, p = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, POSITIONS)
    e = tl.arange(0, VALUE_WIDTH)
    head, is_group, is_dim, is_value = kv_head * GROUPS + g, g < GROUPS, d < DIM, e < VALUE_DIM
    where = query + row * query_row + head[:, None] * query_head + d[None, :]
    q = tl.load(where, mask=is_group[:, None] & is_dim[None, :], other=0.0)
    table = block_table + row * table_row
    keys_of_head, values_of_head = keys + kv_head * key_head, values + kv_head * value_head
    first = first_visible(length - 1, window, chunk, WINDOW, CHUNK)
    for split in range(program, tl.cdiv(length - start, size), tl.num_programs(2)):
        top = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
        begin = start + split * size
        for i in tl.range(begin, tl.minimum(begin + size, length), POSITIONS, num_stages=STAGES):
            at = i + p
            seen = (at < length) & (at >= first)
            k = load_positions(keys_of_head, table, at, d, key_page, key_position, seen, is_dim, BLOCK)
            v = load_positions(
                values_of_head, table, at, e, value_page, value_position, seen, is_value, BLOCK
            )
            top, norm, acc = attend_positions(q, k, v, top, norm, acc, seen[None, :], scale, softcap, CAP)
        place = (row * heads + head) * SPLITS + split
        tl.store(weights + place, top + tl.log2(norm), mask=is_group)
        keep = is_group[:, None] & is_value[None, :]
        tl.store(parts + place[:, None] * VALUE_DIM + e[None, :], acc / norm[:, None], mask=keep)


@triton.jit(do_not_specialize=["window", "chunk"], do_not_specialize_on_alignment=STEP_TENSORS)
def join_splits(
    parts, weights, sinks, kv_length, out, window, chunk, out_row, out_head,
    DIM: tl.constexpr, WIDTH: tl.constexpr, POSITIONS: tl.constexpr, SPLITS: tl.constexpr,
    FEWEST: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """out[sequence, head] of the splits that the sequence's length makes."""
    row, head = tl.program_id(0), tl.program_id(1)
    length = tl.load(kv_length + row)
    start = first_visible(length - 1, window, chunk, WINDOW, CHUNK) // POSITIONS * POSITIONS
    size = tl.maximum(tl.cdiv(tl.cdiv(length - start, SPLITS), POSITIONS) * POSITIONS, FEWEST)
    s, d = tl.arange(0, SPLITS), tl.arange(0, WIDTH)
    is_split = s < tl.cdiv(length - start, size)
    place = (row * tl.num_programs(1) + head) * SPLITS + s
    weight = tl.load(weights + place, mask=is_split, other=float("-inf"))
    top = tl.max(weight, 0)
    if SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    top = tl.where(top == float("-inf"), 0.0, top)  # a sequence of no tokens yields zeros
    share = tl.exp2(weight - top)
    total = tl.sum(share, 0)
    if SINKS:
        total += tl.exp2(sink - top)
    keep = is_split[:, None] & (d < DIM)[None, :]
    part = tl.load(parts + place[:, None] * DIM + d[None, :], mask=keep, other=0.0)
    joined = tl.sum(part * share[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + row * out_row + head * out_head + d, joined.to(out.dtype.element_ty), mask=d < DIM)


@triton.jit(do_not_specialize=["window", "chunk", "table_row"], do_not_specialize_on_alignment=STEP_TENSORS)
def attend_chunks(
    query, keys, values, sequence_start, kv_length, block_table, sinks, out,
    scale, softcap, window, chunk,
    query_row, query_head, key_page, key_position, key_head, value_page, value_position, value_head,
    table_row, out_row, out_head,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, DIM: tl.constexpr, WIDTH: tl.constexpr,
    VALUE_DIM: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr, STAGES: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr, SINKS: tl.constexpr,
):  # fmt: skip
    """out of ROWS // GROUPS consecutive tokens of one sequence, of one KV head's query heads."""
    sequence, kv_head = tl.program_id(1), tl.program_id(2)
    begin, end = tl.load(sequence_start + sequence), tl.load(sequence_start + sequence + 1)
    length = tl.load(kv_length + sequence)
    TOKENS: tl.constexpr = ROWS // GROUPS
    token = begin + tl.program_id(0) * TOKENS
    if token >= end:
        return
    r, d, p = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, POSITIONS)
    own, head = token + r // GROUPS, kv_head * GROUPS + r % GROUPS
    position = length - end + own
    is_own = (own < end) & (r < TOKENS * GROUPS)
    keep = is_own[:, None] & (d < DIM)[None, :]
    where = query + own[:, None] * query_row + head[:, None] * query_head + d[None, :]
    q = tl.load(where, mask=keep, other=0.0)
    first = first_visible(position, window, chunk, WINDOW, CHUNK)
    table = block_table + sequence * table_row
    keys_of_head, values_of_head = keys + kv_head * key_head, values + kv_head * value_head
    e = tl.arange(0, VALUE_WIDTH)
    is_dim, is_value = d < DIM, e < VALUE_DIM
    top = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    last = tl.minimum(length - end + token + TOKENS, length)
    earliest = first_visible(length - end + token, window, chunk, WINDOW, CHUNK) // POSITIONS * POSITIONS
    for i in tl.range(earliest, last, POSITIONS, num_stages=STAGES):
        at = i + p
        is_there = at < last
        k = load_positions(keys_of_head, table, at, d, key_page, key_position, is_there, is_dim, BLOCK)
        v = load_positions(
            values_of_head, table, at, e, value_page, value_position, is_there, is_value, BLOCK
        )
        seen = (at[None, :] <= position[:, None]) & (at[None, :] >= first[:, None])
        top, norm, acc = attend_positions(q, k, v, top, norm, acc, seen, scale, softcap, CAP)
    if SINKS:
        norm, acc = add_sinks(sinks, head, is_own, top, norm, acc)
    where = out + own[:, None] * out_row + head[:, None] * out_head + e[None, :]
    keep = is_own[:, None] & is_value[None, :]
    tl.store(where, (acc / norm[:, None]).to(out.dtype.element_ty), mask=keep)


class PagedKV(NamedTuple):
    """One layer's keys [blocks, 16, kv heads, dim] and values [blocks, 16, kv heads, value dim] of
    any strides but the last, and where a step's sequences lie: int32 sequence_start [S + 1] in the
    flat query, kv_length [S] with the step's own tokens, block_table [S, blocks of a sequence].
    """

    keys: Tensor
    values: Tensor
    sequence_start: Tensor
    kv_length: Tensor
    block_table: Tensor


def attend_decode(query: Tensor, kv: PagedKV, rules: ScoreRules, shape: DecodeShape | None = None) -> Tensor:
    """Attention of one token a sequence: query [S, heads, dim] → [S, heads, value dim].

    Raises ValueError for what does not fit.
    """
    _check_attention(query, kv, rules.sinks)
    (sequences, heads, _), value_dim = query.shape, kv.values.shape[3]
    if sequences != len(kv.kv_length):
        raise ValueError(f"{sequences} queries for {len(kv.kv_length)} sequences")
    shape = shape or decode_shape(sequences, kv.keys.shape[2], kv.block_table.shape[1])
    parts = query.new_empty(sequences, heads, ATTENTION_SPLITS, value_dim, dtype=torch.float32)
    weights = parts.new_empty(sequences, heads, ATTENTION_SPLITS)
    _launch_splits(query, kv, rules, parts, weights, shape)
    out = query.new_empty(sequences, heads, value_dim)
    join_splits[sequences, heads](
        parts,
        weights,
        weights if rules.sinks is None else rules.sinks,
        kv.kv_length,
        out,
        *rules.reach,
        *out.stride()[:2],
        DIM=value_dim,
        WIDTH=power_of_two(value_dim),
        POSITIONS=shape.positions,
        SPLITS=ATTENTION_SPLITS,
        FEWEST=FEWEST_POSITIONS,
        SINKS=rules.sinks is not None,
        WINDOW=rules.window > 0,
        CHUNK=rules.chunk > 0,
    )
    return out


def _launch_splits(
    query: Tensor, kv: PagedKV, rules: ScoreRules, parts: Tensor, weights: Tensor, shape: DecodeShape
) -> None:
    heads, kv_heads = query.shape[1], kv.keys.shape[2]
    attend_splits[len(query), kv_heads, shape.programs](
        query,
        kv.keys,
        kv.values,
        kv.kv_length,
        kv.block_table,
        parts,
        weights,
        *_list_numbers(query, kv, rules),
        heads,
        **_list_constants(query, kv, rules),
        ROWS=max(16, power_of_two(heads // kv_heads)),
        POSITIONS=shape.positions,
        SPLITS=ATTENTION_SPLITS,
        FEWEST=FEWEST_POSITIONS,
        STAGES=shape.stages,
        num_warps=shape.warps,
    )


def attend_prefill(
    query: Tensor,
    kv: PagedKV,
    rules: ScoreRules,
    longest: int,
    out: Tensor,
    shape: PrefillShape | None = None,
) -> None:
    """Causal attention of each sequence's own tokens, at most `longest` a sequence, the last of
    which is at its kv_length: query [T, heads, dim] → `out` [T, heads, value dim], of which only
    their rows are written.

    Raises ValueError for what does not fit.
    """
    _check_attention(query, kv, rules.sinks)
    if out.shape != (*query.shape[:2], kv.values.shape[3]) or out.stride(2) != 1:
        raise ValueError(f"an output {tuple(out.shape)} for queries {tuple(query.shape)}")
    kv_heads, groups = kv.keys.shape[2], query.shape[1] // kv.keys.shape[2]
    shape = shape or prefill_shape(groups, query.shape[2], _generation_of(query.device))
    attend_chunks[ceil_div(longest, shape.rows // groups), len(kv.kv_length), kv_heads](
        query,
        kv.keys,
        kv.values,
        kv.sequence_start,
        kv.kv_length,
        kv.block_table,
        kv.kv_length if rules.sinks is None else rules.sinks,
        out,
        *_list_numbers(query, kv, rules),
        *out.stride()[:2],
        **_list_constants(query, kv, rules),
        ROWS=shape.rows,
        POSITIONS=shape.positions,
        STAGES=shape.stages,
        SINKS=rules.sinks is not None,
        num_warps=shape.warps,
    )


def _list_numbers(query: Tensor, kv: PagedKV, rules: ScoreRules) -> tuple[float, ...]:
    """What both kernels are given of the rules and the strides, in their order."""
    strides = (*query.stride()[:2], *kv.keys.stride()[:3], *kv.values.stride()[:3], kv.block_table.stride(0))
    return rules.scale, rules.softcap, *rules.reach, *strides


def _list_constants(query: Tensor, kv: PagedKV, rules: ScoreRules) -> dict[str, Any]:
    """What both kernels are compiled for."""
    dim, value_dim = query.shape[2], kv.values.shape[3]
    return {
        "GROUPS": query.shape[1] // kv.keys.shape[2],
        "DIM": dim,
        "WIDTH": power_of_two(dim),
        "VALUE_DIM": value_dim,
        "VALUE_WIDTH": power_of_two(value_dim),
        "BLOCK": KV_BLOCK,
        "CAP": rules.softcap > 0,
        "WINDOW": rules.window > 0,
        "CHUNK": rules.chunk > 0,
    }


def _generation_of(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _check_attention(query: Tensor, kv: PagedKV, sinks: Tensor | None) -> None:
    keys, values = kv.keys, kv.values
    if query.dim() != 3 or keys.dim() != 4 or keys.shape[1] != KV_BLOCK or keys.shape[:3] != values.shape[:3]:
        shapes = [tuple(part.shape) for part in (query, keys, values)]
        raise ValueError(f"queries, keys and values of {shapes} do not fit blocks of {KV_BLOCK}")
    if query.shape[2] != keys.shape[3] or query.shape[1] % keys.shape[2]:
        raise ValueError(f"{query.shape[1:]} heads and dimensions for {keys.shape[2:]} of the keys")
    if any(part.stride(-1) != 1 for part in (query, keys, values, kv.block_table)):
        raise ValueError("the last axis of queries, keys, values and table is not contiguous")
    sequences, starts = len(kv.kv_length), len(kv.sequence_start)
    if starts != sequences + 1 or kv.block_table.shape[0] != sequences:
        raise ValueError(f"{starts} starts and {kv.block_table.shape[0]} tables for {sequences} sequences")
    if any(part.dtype != torch.int32 for part in kv[2:]):
        raise ValueError("starts, lengths and table are not int32")
    if sinks is not None and sinks.shape != (query.shape[1],):
        raise ValueError(f"{tuple(sinks.shape)} sinks for {query.shape[1]} heads")
