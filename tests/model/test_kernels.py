"""The CPU kernels say what the torch path says, to bfloat16's precision, for every mix of adapters,
lengths and positions.

They need a processor with AVX512-BF16 and a C++ compiler. Without them these tests are skipped by
name, and the torch path, which then serves, is held to PEFT by the others.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from service.core.adapter import Adapter, Placement
from service.errors import SettingsError
from service.model import kernels, kv
from service.model.build import build_runner
from service.model.kernels.decoder import FusedDecoderLayer
from service.model.lora_linear import (
    DoraSpan,
    FusedLoraLinear,
    LoraLinear,
    LoraWeights,
    StepArrangement,
    TokenGroup,
)
from service.model.memory import HugePageArena
from service.settings import Settings
from tests import making

from .driver import Driver, Job, plan_of
from .test_parity import SIZES, prompts, random_base

ABLE = kernels.load_kernels()
BF16 = torch.bfloat16
INF = float("inf")
needs_kernels = pytest.mark.skipif(not ABLE, reason="no AVX512-BF16, or no C++ compiler")


# Layers that an adapter leaves alone must not notice it
SOME = ("all-linear", ("q_proj", "down_proj"), ("k_proj", "o_proj", "up_proj"))


def made(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def table(*spans: tuple[int, ...]) -> Tensor:
    body = kernels.make_tables(32).body
    kernels.fill_table(body, spans)
    return body


def close(ours: Tensor, want: Tensor) -> None:
    error = (ours.float() - want.float()).norm() / want.float().norm()
    assert float(error) < 0.01, float(error)


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 7, 8, 16, 17, 40])
@pytest.mark.parametrize(("n_in", "n_out"), [(64, 32), (96, 128), (50, 64)])
def test_a_fused_layer_equals_the_torch_layer(tokens: int, n_in: int, n_out: int, bias: bool) -> None:
    layer = torch.nn.Linear(n_in, n_out, bias=bias, dtype=BF16)
    half = tokens // 2
    spans = (
        [(0, half, 0, 0, 5, 8, 1), (half, tokens - half, 1, 0, 19, 3, 0)]
        if half
        else [(0, tokens, 0, 0, 5, 8, 1)]
    )
    body = table(*spans)
    fused = FusedLoraLinear(layer, 32, body, HugePageArena(n_in * n_out * 2))
    plain = LoraLinear(layer, n_in, n_out, 32, BF16, torch.device("cpu"))
    for digest, start, rank, gated in (("dora", 5, 8, True), ("lora", 19, 3, False)):
        gate = made(n_out, seed=rank).float().abs() if gated else None
        factors = LoraWeights(
            made(rank, n_in, seed=rank, scale=0.2), made(rank, n_out, seed=rank + 1, scale=0.2), gate
        )
        for one in (fused, plain):
            one.place_weights(Placement(digest, start, rank), factors)
    # Whose numbers overflow: no pair of rows may bring them to others
    for start, rank in ((0, 5), (13, 6), (22, 10)):
        fused.place_weights(
            Placement("wild", start, rank),
            LoraWeights(*(torch.full((rank, size), INF, dtype=BF16) for size in (n_in, n_out))),
        )
    groups = tuple(
        TokenGroup(s, s + length, low, low + rank, None) for s, length, _, _, low, rank, _ in spans
    )
    plain.arrangement = StepArrangement(tokens, groups, (DoraSpan(0, half or tokens, "dora"),))
    x = made(1, tokens, n_in, seed=9)
    with torch.inference_mode():
        close(fused(x), plain(x))
        for one in (fused, plain):
            one.clear_rows(Placement("lora", 19, 3))
            one.clear_rows(Placement("dora", 5, 8))
        kernels.fill_table(body, [])
        plain.arrangement = StepArrangement()
        close(fused(x), plain(x))


@needs_kernels
def test_an_adapter_that_leaves_a_layer_alone_meets_nothing_there_of_others_before_or_beside_it() -> None:
    layer = torch.nn.Linear(64, 64, bias=False, dtype=BF16)
    body = table((0, 2, 0, 0, 0, 8, 0))
    fused = FusedLoraLinear(layer, 32, body, HugePageArena(64 * 64 * 2))
    x = made(1, 2, 64, seed=1)

    def some(rank: int) -> LoraWeights:
        return LoraWeights(made(rank, 64, seed=rank), made(rank, 64, seed=rank + 1))

    with torch.inference_mode():
        bare = fused(x)
        fused.place_weights(Placement("before", 0, 8), some(8))
        assert not torch.equal(fused(x), bare)
        fused.clear_rows(Placement("before", 0, 8))
        kernels.fill_table(body, [(0, 2, 0, 0, 0, 3, 0)])
        fused.place_weights(Placement("beside", 3, 5), some(5))
        assert torch.equal(fused(x), bare)


@needs_kernels
def test_the_gate_of_one_that_is_gone_is_not_left_for_the_next() -> None:
    body = table((0, 2, 0, 0, 0, 8, 1))
    fused = FusedLoraLinear(
        torch.nn.Linear(64, 64, bias=False, dtype=BF16), 32, body, HugePageArena(64 * 64 * 2)
    )
    x, at, factors = (
        made(1, 2, 64, seed=1),
        Placement("a", 0, 8),
        LoraWeights(made(8, 64, seed=2), made(8, 64, seed=3)),
    )
    with torch.inference_mode():
        fused.place_weights(at, factors)
        plain = fused(x)
        fused.clear_rows(at)
        fused.place_weights(at, factors._replace(gate=torch.full((64,), 2.0)))
        assert not torch.equal(fused(x), plain)
        fused.clear_rows(at)
        fused.place_weights(at, factors)
        assert torch.equal(fused(x), plain)


class Layer:
    """An attention layer's buffers."""

    def __init__(self, rows: int, heads: int, context: int, dim: int, body: Tensor) -> None:
        self.kv_keys = torch.zeros(rows, heads, context, dim, dtype=BF16)
        self.kv_values = torch.zeros(rows, heads, context, dim, dtype=BF16)
        self.kv_table = body


@needs_kernels
@pytest.mark.parametrize("dim", [16, 64, 80])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 20.0), (5, 20.0)])
def test_attention_over_rows_equals_the_torch_attention(
    dim: int, window: int | None, softcap: float | None
) -> None:
    spans = [kv.KVSpan(0, 1, 2, 9), kv.KVSpan(1, 1, 0, 3), kv.KVSpan(2, 6, 1, 0), kv.KVSpan(8, 4, 3, 7)]
    ours, plain = Layer(4, 2, 32, dim, table(*spans)), Layer(4, 2, 32, dim, table(*spans))
    for name in ("kv_keys", "kv_values"):
        before = made(4, 2, 32, dim, seed=1)
        for one in (ours, plain):
            getattr(one, name).copy_(before)
    query, key, value = made(1, 6, 12, dim, seed=2), made(1, 2, 12, dim, seed=3), made(1, 2, 12, dim, seed=4)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    with torch.inference_mode():
        got, _ = kernels.attend_rows(ours, query, key, value, None, **options)
        want, _ = kv.attend_rows(
            plain,
            query,
            key,
            value,
            None,
            table=kv.KVTable.make_table(spans, 2, torch.device("cpu")),
            **options,
        )
    close(got, want)
    assert torch.equal(ours.kv_keys, plain.kv_keys)
    assert torch.equal(ours.kv_values, plain.kv_values)


WIDE: dict[str, Any] = SIZES | {"hidden_size": 128, "intermediate_size": 96}  # heads of 32
KINDS: dict[str, tuple[dict[str, Any], bool]] = {  # and whether its layers are Llama's in kind
    "llama": (WIDE | {"attention_bias": True}, True),
    "mistral": (WIDE | {"sliding_window": 8}, True),
    "qwen2": (WIDE, True),
    "qwen3": (WIDE | {"head_dim": 64}, True),
    "gemma2": (WIDE | {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}, False),
    "olmo": (SIZES, False),
}


@needs_kernels
@pytest.mark.parametrize("kind", KINDS)
def test_a_base_on_the_kernels_says_what_the_plain_one_says(kind: str, tmp_path: Path) -> None:
    sizes, alike = KINDS[kind]
    base = random_base(tmp_path / "base", kind, sizes)
    folders = [
        making.noise(tmp_path / f"a{i}", base, i, r=3 + 4 * i, use_dora=i == 1, targets=SOME[i])
        for i in range(3)
    ]
    plans = [plan_of(folder, base) for folder in folders]
    exact, plain, ours = (
        logprobs(base, plans, dtype, switch, alike)
        for dtype, switch in (("float32", "off"), ("bfloat16", "off"), ("bfloat16", "auto"))
    )
    for adapter, want in exact.items():
        assert (ours[adapter] - want).abs().mean() < 1.2 * (plain[adapter] - want).abs().mean(), adapter


def logprobs(
    base: Path, plans: list[Adapter], dtype: str, switch: str, alike: bool
) -> dict[str | None, Tensor]:
    """Of all prompts' tokens under each adapter and the base, which share one changing batch."""
    settings = {"device": "cpu", "dtype": dtype, "compile": switch, "max_rows": 6, "base": str(base)}
    runner, _ = build_runner(Settings.model_validate(settings), lambda stage, fraction: None)
    assert all(isinstance(layer, FusedLoraLinear) for layer in runner.pool.layers.values()) == (
        switch == "auto"
    )
    whole = [
        isinstance(vars(module).get("forward"), FusedDecoderLayer) for module in runner.pool.tree.model.layers
    ]
    assert whole == [alike and switch == "auto"] * SIZES["num_hidden_layers"]
    driver = Driver(runner, 6)
    for plan in plans:
        driver.place(plan)
    long = [3 + i * 7 % 240 for i in range(200)]
    jobs = [
        Job(p, 3, plan.digest if plan else None, prompt_logprobs=0)
        for p in (*prompts()[3:6], long)
        for plan in (None, *plans)
    ]
    random.Random(1).shuffle(jobs)
    driver.run(jobs, chunk=170)
    told: dict[str | None, list[float | None]] = {}
    for job in jobs:
        told.setdefault(job.adapter, []).extend(token.logprob for token in job.prompt_tokens[1:])
    return {adapter: torch.tensor(found) for adapter, found in told.items()}


@needs_kernels
def test_a_row_says_the_same_whatever_its_neighbours(tmp_path: Path) -> None:
    """Bit for bit: no sum's order may depend on how many tokens, or whose, share the step."""
    base = random_base(tmp_path / "base", "llama", WIDE)
    folders = [making.noise(tmp_path / f"a{i}", base, i, r=3 + i, targets=SOME[i]) for i in range(3)]
    plans = [plan_of(folder, base) for folder in folders]
    settings = {"device": "cpu", "dtype": "bfloat16", "compile": "on", "max_rows": 16, "base": str(base)}
    runner, _ = build_runner(Settings.model_validate(settings), lambda stage, fraction: None)
    driver = Driver(runner, 16)
    for plan in plans:
        driver.place(plan)

    def job(i: int) -> Job:
        return Job(
            [5 + i, *prompts()[3][1:]], 8, plans[i % 4 - 1].digest if i % 4 else None, prompt_logprobs=0
        )

    alone = [job(i) for i in range(16)]
    for one in alone:
        driver.run([one])
    together = [job(i) for i in range(16)]
    driver.run(together)
    assert [(j.tokens, j.prompt_tokens) for j in together] == [(j.tokens, j.prompt_tokens) for j in alone]


def test_kernels_that_are_demanded_where_they_cannot_run_stop_the_start(tmp_path: Path) -> None:
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "compile": "on",
        "base": str(making.tiny(tmp_path / "base")),
    }
    with pytest.raises(SettingsError, match="ADAPTERD_COMPILE"):
        build_runner(Settings.model_validate(settings), lambda stage, fraction: None)
