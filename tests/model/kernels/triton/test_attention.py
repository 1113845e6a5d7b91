"""Attention over blocks of KV in Triton's interpreter, against the oracle in torch."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from service.model.attention_rules import ScoreRules
from service.model.kernels.triton import attention, oracles
from service.model.kernels.triton.attention import PagedKV
from service.model.kernels.triton.shapes import FEWEST_POSITIONS, DecodeShape, PrefillShape, decode_shape

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3}
DECODE, PREFILL = DecodeShape(32, 2, 4, 1), PrefillShape(16, 32, 4, 1)
RULES = [
    ScoreRules(0.2),
    ScoreRules(0.2, window=20),
    ScoreRules(0.2, chunk=24),
    ScoreRules(0.3, softcap=2.0),
    ScoreRules(0.2, window=37, softcap=5.0),
]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def make_kv(
    lengths: Sequence[int],
    tokens: Sequence[int],
    kv_heads: int = 2,
    dim: int = 32,
    dtype: torch.dtype = torch.float32,
    value_dim: int | None = None,
) -> PagedKV:
    """Sequences in blocks that lie in any order; all that is none of theirs is not a number."""
    per = max(1, -(-max(lengths) // 16))
    widths = dim, value_dim or dim
    keys, values = (
        torch.full((len(lengths) * per + 2, 16, kv_heads, width), float("nan"), dtype=dtype)
        for width in widths
    )
    table = torch.randperm(len(keys))[: len(lengths) * per].view(len(lengths), per)
    for row, length in zip(table, lengths, strict=True):
        for position in range(length):
            for part in (keys, values):
                part[row[position // 16], position % 16] = torch.randn(kv_heads, part.shape[3])
    starts = [sum(tokens[:i]) for i in range(len(tokens) + 1)]
    begin, end = (torch.tensor(part, dtype=torch.int32) for part in (starts, lengths))
    return PagedKV(keys, values, begin, end, table.int())


def ask_oracle(query: Tensor, kv: PagedKV, rules: ScoreRules) -> Tensor:
    clean = kv._replace(keys=kv.keys.nan_to_num(), values=kv.values.nan_to_num())
    return oracles.attend(query, *clean, **rules._asdict())


def gap(got: Tensor, want: Tensor) -> float:
    return float((got.float() - want).norm() / want.norm())


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_decode(rules: ScoreRules, has_sinks: bool) -> None:
    lengths = [1, 16, 17, 70]
    kv, query = make_kv(lengths, [1] * 4), torch.randn(4, 4, 32)
    rules = rules._replace(sinks=torch.randn(4) if has_sinks else None)
    got = attention.attend_decode(query, kv, rules, DECODE)
    assert gap(got, ask_oracle(query, kv, rules)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rules", RULES, ids=str)
def test_prefill(rules: ScoreRules, has_sinks: bool) -> None:
    tokens, lengths = [1, 5, 20, 3], [1, 5, 70, 36]  # a first token, a prompt, a later chunk, a short one
    kv, query = make_kv(lengths, tokens), torch.randn(29, 4, 32)
    rules = rules._replace(sinks=torch.randn(4) if has_sinks else None)
    out = torch.empty_like(query)
    attention.attend_prefill(query, kv, rules, 20, out, PREFILL)
    assert gap(out, ask_oracle(query, kv, rules)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(2, 2, 64), (9, 3, 64), (4, 1, 48), (20, 1, 16)])
def test_heads_and_dimensions(heads: int, kv_heads: int, dim: int) -> None:
    """Also three and twenty queries a KV head, and a dimension that is no power of two."""
    kv = make_kv([33, 18], [1, 1], kv_heads, dim)
    query, rules = torch.randn(2, heads, dim), ScoreRules(0.2)
    want = ask_oracle(query, kv, rules)
    out = torch.empty_like(query)
    attention.attend_prefill(query, kv, rules, 1, out, shape=PREFILL._replace(rows=32))
    assert gap(attention.attend_decode(query, kv, rules, shape=DECODE), want) < TOLERANCE[torch.float32]
    assert gap(out, want) < TOLERANCE[torch.float32]


@pytest.mark.parametrize(("dim", "value_dim"), [(24, 16), (48, 80), (192, 128)])
def test_values_of_another_width(dim: int, value_dim: int) -> None:
    kv = make_kv([33, 18], [1, 1], 2, dim, value_dim=value_dim)
    query, rules = torch.randn(2, 4, dim), ScoreRules(0.2, sinks=torch.randn(4))
    want = ask_oracle(query, kv, rules)
    out = query.new_empty(2, 4, value_dim)
    attention.attend_prefill(query, kv, rules, 1, out, PREFILL)
    got = attention.attend_decode(query, kv, rules, DECODE)
    assert gap(got, want) < TOLERANCE[torch.float32]
    assert gap(out, want) < TOLERANCE[torch.float32]


def test_half_precision_and_the_own_shapes() -> None:
    kv, query = make_kv([40, 3], [2, 3], dtype=torch.float16), torch.randn(5, 4, 32, dtype=torch.float16)
    out = torch.empty_like(query)
    attention.attend_prefill(query, kv, ScoreRules(0.2), 3, out)
    assert gap(out, ask_oracle(query, kv, ScoreRules(0.2))) < TOLERANCE[torch.float16]
    kv = kv._replace(sequence_start=torch.tensor([0, 1, 2], dtype=torch.int32))
    got = attention.attend_decode(query[:2], kv, ScoreRules(0.2))
    assert gap(got, ask_oracle(query[:2], kv, ScoreRules(0.2))) < TOLERANCE[torch.float16]


LONG = 2 * FEWEST_POSITIONS + 40  # three splits


def test_a_long_sequence_is_joined_from_its_splits_in_any_number_of_programs() -> None:
    kv, query = make_kv([LONG, 20], [1, 1], 1), torch.randn(2, 2, 32)
    rules = ScoreRules(0.5, sinks=torch.randn(2))
    shapes = [DECODE._replace(positions=64, programs=programs) for programs in (1, 2, 5)]
    got = [attention.attend_decode(query, kv, rules, shape) for shape in shapes]
    assert gap(got[0], ask_oracle(query, kv, rules)) < TOLERANCE[torch.float32]
    assert torch.equal(got[0], got[1])
    assert torch.equal(got[0], got[2])


def test_the_bits_of_a_sequence_do_not_depend_on_its_company() -> None:
    kv, query = make_kv([30, LONG, 5], [1, 1, 1], 1), torch.randn(3, 2, 32)
    together = attention.attend_decode(query, kv, ScoreRules(0.5))
    for i in range(3):
        own = kv._replace(
            sequence_start=kv.sequence_start[:2],
            kv_length=kv.kv_length[i : i + 1],
            block_table=kv.block_table[i : i + 1],
        )
        assert torch.equal(attention.attend_decode(query[i : i + 1], own, ScoreRules(0.5))[0], together[i])


def test_of_a_wide_table_no_more_is_read_than_a_sequence_has() -> None:
    """A recording's table is as wide as the context, and what was there before lies behind its blocks."""
    kv, query = make_kv([30, LONG, 16], [1, 1, 1], 1), torch.randn(3, 2, 32)
    tight = attention.attend_decode(query, kv, ScoreRules(0.5))
    not_a_number = int(kv.keys.isnan().flatten(1).all(1).nonzero()[0])
    held = -(-kv.kv_length[:, None] // 16)
    wide = torch.full((3, 4 * kv.block_table.shape[1]), not_a_number, dtype=torch.int32)
    wide[:, : kv.block_table.shape[1]] = kv.block_table
    wide = torch.where(torch.arange(wide.shape[1]) < held, wide, not_a_number).int()
    assert torch.equal(attention.attend_decode(query, kv._replace(block_table=wide), ScoreRules(0.5)), tight)


def test_a_step_of_both_kinds_is_two_calls_on_slices_of_one_layout() -> None:
    tokens, lengths = [1, 1, 6, 4], [20, 3, 6, 21]
    kv, query = make_kv(lengths, tokens), torch.randn(12, 4, 32)
    out = torch.full_like(query, 7.0)
    decoding = kv._replace(
        sequence_start=kv.sequence_start[:3], kv_length=kv.kv_length[:2], block_table=kv.block_table[:2]
    )
    prompts = kv._replace(
        sequence_start=kv.sequence_start[2:], kv_length=kv.kv_length[2:], block_table=kv.block_table[2:]
    )
    attention.attend_prefill(query, prompts, ScoreRules(0.2), 6, out, shape=PREFILL)
    assert torch.equal(out[:2], torch.full_like(out[:2], 7.0))
    out[:2] = attention.attend_decode(query[:2], decoding, ScoreRules(0.2), shape=DECODE)
    assert gap(out, ask_oracle(query, kv, ScoreRules(0.2))) < TOLERANCE[torch.float32]


def test_a_sequence_of_no_tokens_yields_zeros() -> None:
    """A recorded graph has such rows."""
    kv = make_kv([0, 9], [1, 1])
    got = attention.attend_decode(torch.randn(2, 4, 32), kv, ScoreRules(0.2), shape=DECODE)
    assert torch.equal(got[0], torch.zeros(4, 32))
    assert bool(got.isfinite().all())


def test_any_strides_will_do() -> None:
    kv, query = make_kv([20, 33], [1, 1]), torch.randn(2, 4, 64)[:, :, :32]
    keys, values = (part.transpose(1, 2).contiguous().transpose(1, 2) for part in (kv.keys, kv.values))
    want = attention.attend_decode(query.contiguous(), kv, ScoreRules(0.2), shape=DECODE)
    got = attention.attend_decode(query, kv._replace(keys=keys, values=values), ScoreRules(0.2), shape=DECODE)
    assert torch.equal(got, want)


def test_random_steps() -> None:
    draw = random.Random(2)
    for _ in range(4):
        tokens = [draw.randint(1, 12) for _ in range(3)]
        lengths = [count + draw.choice([0, 0, draw.randint(1, 50)]) for count in tokens]
        rules = draw.choice(RULES)
        kv, query = make_kv(lengths, tokens), torch.randn(sum(tokens), 4, 32)
        out = torch.empty_like(query)
        attention.attend_prefill(query, kv, rules, max(tokens), out, shape=PREFILL)
        assert gap(out, ask_oracle(query, kv, rules)) < TOLERANCE[torch.float32], (
            tokens,
            lengths,
            rules,
        )


def test_more_sequences_share_fewer_programs_each() -> None:
    assert decode_shape(1, 8, 4096).programs == 32
    assert decode_shape(64, 8, 4096).programs == 4
    assert decode_shape(1, 8, 2).programs == 1


def test_what_does_not_fit_is_refused() -> None:
    kv, query = make_kv([20, 3], [1, 1]), torch.randn(2, 4, 32)
    cases: list[tuple[Tensor, PagedKV, Tensor | None, str]] = [
        (query[0], kv, None, "do not fit blocks of 16"),
        (query, kv._replace(values=kv.values[1:]), None, "do not fit blocks of 16"),
        (query, kv._replace(keys=kv.keys[:, :8], values=kv.values[:, :8]), None, "do not fit blocks of 16"),
        (query[:, :3], kv, None, "heads and dimensions"),
        (query[..., :16], kv, None, "heads and dimensions"),
        (query.transpose(1, 2).contiguous().transpose(1, 2), kv, None, "not contiguous"),
        (query, kv._replace(sequence_start=kv.sequence_start[1:]), None, "2 starts and 2 tables for 2"),
        (query, kv._replace(kv_length=kv.kv_length.long()), None, "not int32"),
        (query, kv, torch.zeros(3), "sinks for 4 heads"),
    ]
    for asked, step, sinks, reason in cases:
        with pytest.raises(ValueError, match=reason):
            attention.attend_decode(asked, step, ScoreRules(0.2, sinks=sinks))
    with pytest.raises(ValueError, match="1 queries for 2 sequences"):
        attention.attend_decode(query[:1], kv, ScoreRules(0.2))
    with pytest.raises(ValueError, match="an output"):
        attention.attend_prefill(query, kv, ScoreRules(0.2), 1, query[:1])
