"""Attention over blocks of KV on the device: right, the same to the bit in any company, and how fast
beside the floor and, for prompts, torch's own.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from service.model.attention_rules import ScoreRules
from service.model.kernels.triton import attention, oracles
from service.model.kernels.triton.attention import PagedKV
from service.model.kernels.triton.shapes import decode_shape, prefill_shape

from .measure import DEVICE, DRY, Report, gap, random, ring, took

HEADS, KV_HEADS, DIM = (4, 2, 32) if DRY else (32, 8, 128)
GENERATION = 0 if DRY else torch.cuda.get_device_capability()[0]
ERROR = 5e-3
PLAIN, LIMITED = ScoreRules(DIM**-0.5), ScoreRules(DIM**-0.5, window=40, softcap=20.0)
DECODES = [(2, 40)] if DRY else [(1, 512), (32, 512), (64, 512), (32, 4096), (1, 32768)]
PREFILLS = [(1, 20, 40)] if DRY else [(1, 2048, 2048), (4, 512, 4096)]  # sequences, tokens, length
# Positions and stages of decode, rows and warps of prefill that are tried
DECODE_VARIANTS = [(32, 2)] if DRY else [(64, 2), (64, 3), (128, 2)]
PREFILL_VARIANTS = [(16, 4)] if DRY else [(64, 4), (64, 8)]


def make_kv(lengths: list[int], starts: list[int]) -> PagedKV:
    """Sequences of these lengths in blocks that lie in any order."""
    per = -(-max(lengths) // 16)
    keys, values = (random(len(lengths) * per, 16, KV_HEADS, DIM) for _ in range(2))
    table = torch.randperm(len(lengths) * per, device=DEVICE).view(len(lengths), per)
    integers = [torch.tensor(part, dtype=torch.int32, device=DEVICE) for part in (starts, lengths)]
    return PagedKV(keys, values, *integers, table.int())


def compile_all(part: int, of: int) -> None:
    kv, query = make_kv([200, 3], [0, 1, 2]), random(2, HEADS, DIM)
    for i, (positions, stages) in enumerate(DECODE_VARIANTS):
        if i % of == part:
            shape = decode_shape(2, KV_HEADS, 13)._replace(positions=positions, stages=stages)
            attention.attend_decode(query, kv, PLAIN, shape=shape)
    for i, (rows, warps) in enumerate(PREFILL_VARIANTS, 3):
        if i % of == part:
            wide = prefill_shape(HEADS // KV_HEADS, DIM, GENERATION)._replace(rows=rows, warps=warps)
            attention.attend_prefill(query, kv, PLAIN, 1, torch.empty_like(query), shape=wide)
    if part == of - 1:
        rules = LIMITED._replace(sinks=random(HEADS))
        attention.attend_decode(query, kv, rules)
        attention.attend_prefill(query, kv, rules, 1, torch.empty_like(query))


def check_attention(report: Report) -> None:
    lengths = [1, 17, 40] if DRY else [1, 17, 300, 2500, 64, 9000]
    tokens = [1, 5, 17] if DRY else [1, 5, 300, 700, 64, 33]
    starts = [sum(tokens[:i]) for i in range(len(tokens) + 1)]
    for rules in (PLAIN, LIMITED._replace(sinks=random(HEADS))):
        kv = make_kv(lengths, list(range(len(lengths) + 1)))
        query = random(len(lengths), HEADS, DIM)
        one = attention.attend_decode(query, kv, rules)
        many = random(starts[-1], HEADS, DIM)
        out, longer = torch.empty_like(many), kv._replace(sequence_start=kv.kv_length.new_tensor(starts))
        attention.attend_prefill(many, longer, rules, max(tokens), out)
        errors = [
            gap(got, oracles.attend(asked, *step, **rules._asdict()))
            for got, asked, step in ((one, query, kv), (out, many, longer))
        ]
        name = "plain" if rules.sinks is None else "window, softcap and sinks"
        report.expect(max(errors) < ERROR, f"attention, {name}: errors {errors}")
        same = _is_same(query, kv, rules, one)
        report.expect(same, f"attention, {name}: bits depend on the company")
        report.add("attention", f"{name}, right", decode=errors[0], prefill=errors[1], same_in_company=same)


def _is_same(query: Tensor, kv: PagedKV, rules: ScoreRules, got: Tensor) -> bool:
    """Whether each sequence decodes as alone."""
    alone = []
    for i in range(len(query)):
        own = kv._replace(
            sequence_start=kv.sequence_start[:2],
            kv_length=kv.kv_length[i : i + 1],
            block_table=kv.block_table[i : i + 1],
        )
        alone.append(attention.attend_decode(query[i : i + 1], own, rules))
    return torch.equal(torch.cat(alone), got)


def time_attention(report: Report, bandwidth: float) -> None:
    for sequences, length in DECODES:
        size = sequences * length * KV_HEADS * DIM * 2 * 2
        copies = [make_kv([length] * sequences, [*range(sequences + 1)]) for _ in range(ring(size))]
        query = random(sequences, HEADS, DIM)
        own = decode_shape(sequences, KV_HEADS, copies[0].block_table.shape[1])
        shapes = [own._replace(positions=p, stages=s) for p, s in DECODE_VARIANTS]
        shapes += [] if DRY else [own._replace(programs=max(1, own.programs // 2))]
        times = {
            f"P{shape.positions} s{shape.stages} programs {shape.programs}": took(
                [partial(attention.attend_decode, query, kv, PLAIN, shape) for kv in copies]
            )
            for shape in shapes
        }
        best = min(times, key=lambda shape: times[shape])
        figures = {"us": times[best], "own_us": next(iter(times.values()))}
        figures |= {"of_floor": size / bandwidth / times[best]}
        report.add("attention", f"decode, {sequences} of {length}", **figures, best=best, all=times)


def time_prefill(report: Report) -> None:
    for sequences, tokens, length in PREFILLS:
        starts = [tokens * i for i in range(sequences + 1)]
        kv, query = make_kv([length] * sequences, starts), random(tokens * sequences, HEADS, DIM)
        out, own = torch.empty_like(query), prefill_shape(HEADS // KV_HEADS, DIM, GENERATION)
        times = {}
        for rows, warps in PREFILL_VARIANTS:
            shape = own._replace(rows=rows, warps=warps)
            call = partial(attention.attend_prefill, query, kv, PLAIN, tokens, out, shape)
            times[f"rows {rows} w{warps}"] = took([call])
        torch_us = _time_torch(sequences, tokens) if tokens == length else float("nan")
        name = f"prefill, {sequences} of {tokens} tokens at {length}"
        report.add("attention", name, us=min(times.values()), torch_us=torch_us, all=times)


def _time_torch(sequences: int, tokens: int) -> float:
    """torch's own causal attention, KV laid out for it."""
    query = random(sequences, HEADS, tokens, DIM)
    keys, values = (random(sequences, KV_HEADS, tokens, DIM) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return took([lambda: attend(query, keys, values, is_causal=True, enable_gqa=True)])
