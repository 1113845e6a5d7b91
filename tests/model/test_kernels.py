"""The CPU kernels say what the torch path says, to bfloat16's precision, for every mix of adapters,
lengths and positions.

They need a processor with AVX2, AVX-512 or NEON, and a C++ compiler. Without them these tests are skipped by
name, and the torch path, which then serves, is held to PEFT by the others.
"""

from __future__ import annotations

import itertools
import os
import platform
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor
from torch.utils.cpp_extension import include_paths

from service.core.adapter import Adapter, Placement
from service.core.base_info import BLOCK_TOKENS
from service.errors import SettingsError
from service.model import kernels, kv
from service.model.build import build_runner
from service.model.kernels.decoder import FusedDecoderLayer
from service.model.kernels.weights import fits_kernel
from service.model.loading import load_base
from service.model.lora_linear import (
    NO_TOKENS,
    DoraSpan,
    FusedLoraLinear,
    LoraLinear,
    LoraWeights,
    StepAdapters,
    TokenAdapters,
    TokenGroup,
)
from service.model.lora_weights import dense_weight
from service.model.memory import HugePageArena
from service.model.processor import VARIANTS, Vectors, can_run, find_compiler
from service.model.runner import ModelRunner
from service.model.step_layout import SequenceStep, make_layout, running
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver, plan_of
from .test_parity import DELTA, GPT_OSS, LATENT, LFM2, SIZES, prompts, random_base

VECTORS: Any = os.environ.get("ADAPTERD_KERNELS", "auto")
ABLE = kernels.load_kernels(VECTORS)
BF16 = torch.bfloat16
INF = float("inf")
needs_kernels = pytest.mark.skipif(not ABLE, reason="no AVX2, AVX-512 or NEON, or no C++ compiler")


# Layers that an adapter leaves alone must not notice it
SOME = ("all-linear", ("q_proj", "down_proj"), ("k_proj", "o_proj", "up_proj"))


def made(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def table(*spans: tuple[int, ...]) -> Tensor:
    body = kernels.make_tables(32, 64).body
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
    two = [(0, half, 0, 0, 5, 8, 1), (half, tokens - half, 1, 0, 19, 3, 0)]
    spans = two if half else [(0, tokens, 0, 0, 5, 8, 1)]
    body = table(*spans)
    fused = FusedLoraLinear(layer, 32, body, HugePageArena(n_in * n_out * 2))
    step = StepAdapters()
    plain = LoraLinear(layer, n_in, n_out, 32, BF16, torch.device("cpu"), step)
    place_two(fused, n_in, n_out)
    place_two(plain, n_in, n_out)
    place_overflowing(fused, n_in, n_out)
    step.body = TokenAdapters(
        tokens, tuple(group_of(span) for span in spans), (DoraSpan(0, half or tokens, GATE),)
    )
    x = made(1, tokens, n_in, seed=9)
    with torch.inference_mode():
        close(fused(x), plain(x))
        for lora in (fused, plain):
            lora.clear_rows(Placement("lora", 19, 3))
            lora.clear_rows(Placement("dora", 5, GATE - 5 + 1))
        kernels.fill_table(body, [])
        step.body = NO_TOKENS
        close(fused(x), plain(x))


GATE = 25  # the pool row of the torch layer's gate, behind the others


def place_two(layer: FusedLoraLinear | LoraLinear, n_in: int, n_out: int) -> None:
    for digest, start, rank, gated in (("dora", 5, 8, True), ("lora", 19, 3, False)):
        gate = made(n_out, seed=rank).float().abs() if gated else None
        a, b = made(rank, n_in, seed=rank, scale=0.2), made(rank, n_out, seed=rank + 1, scale=0.2)
        at = Placement(digest, start, GATE - start + 1 if gated else rank)
        layer.place_weights(at, LoraWeights(a, b, gate))


def place_overflowing(layer: FusedLoraLinear, n_in: int, n_out: int) -> None:
    """Around the others, adapters whose numbers overflow: no pair of rows may bring them there."""
    for start, rank in ((0, 5), (13, 6), (22, 10)):
        a, b = (torch.full((rank, size), INF, dtype=BF16) for size in (n_in, n_out))
        layer.place_weights(Placement("wild", start, rank), LoraWeights(a, b))


def group_of(span: tuple[int, ...]) -> TokenGroup:
    start, length, _, _, low, rank, _ = span
    return TokenGroup(start, start + length, low, low + rank, None)


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
def test_what_reads_a_fused_layers_tensors_finds_the_base_layers(bias: bool) -> None:
    layer = torch.nn.Linear(64, 32, bias=bias, dtype=BF16)
    fused = FusedLoraLinear(layer, 32, table(), HugePageArena(64 * 32 * 2))
    assert fused.weight is layer.weight
    assert fused.bias is layer.bias


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
    layer = torch.nn.Linear(64, 64, bias=False, dtype=BF16)
    fused = FusedLoraLinear(layer, 32, body, HugePageArena(64 * 64 * 2))
    x, at = made(1, 2, 64, seed=1), Placement("a", 0, 8)
    factors = LoraWeights(made(8, 64, seed=2), made(8, 64, seed=3))
    with torch.inference_mode():
        fused.place_weights(at, factors)
        plain = fused(x)
        fused.clear_rows(at)
        fused.place_weights(at, factors._replace(gate=torch.full((64,), 2.0)))
        assert not torch.equal(fused(x), plain)
        fused.clear_rows(at)
        fused.place_weights(at, factors)
        assert torch.equal(fused(x), plain)


def nf4_layer(n_in: int, n_out: int, bias: bool = False) -> torch.nn.Module:
    layer: torch.nn.Module = Linear4bit(n_in, n_out, bias=bias, compute_dtype=BF16, quant_type="nf4")
    layer.weight = Params4bit(made(n_out, n_in), requires_grad=False, quant_type="nf4").to("cpu")
    return layer.to(BF16).eval()


def int8_layer(n_in: int, n_out: int, bias: bool = False) -> torch.nn.Module:
    layer: torch.nn.Module = Linear8bitLt(n_in, n_out, bias=bias, has_fp16_weights=False)
    layer.weight = Int8Params(made(n_out, n_in), requires_grad=False).to("cpu")
    return layer.eval()


QUANTIZED: dict[str, Callable[..., torch.nn.Module]] = {"nf4": nf4_layer, "int8": int8_layer}
# A row of many pieces, one that ends in a part of a piece, and one that is less than a piece
WIDTHS = [(1024, 64), (320, 32), (64, 96)]


@needs_kernels
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 8, 9, 40])
@pytest.mark.parametrize(("n_in", "n_out"), WIDTHS)
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_layer_multiplies_with_the_values_that_bitsandbytes_dequantizes(
    kind: str, n_in: int, n_out: int, tokens: int, bias: bool
) -> None:
    layer: Any = QUANTIZED[kind](n_in, n_out, bias)
    assert fits_kernel(layer)
    x = made(1, tokens, n_in, seed=9)
    with torch.inference_mode():
        want = torch.nn.functional.linear(x.float(), dense_weight(layer))
        want += layer.bias.float() if bias else 0
        for _ in range(2):
            fused = FusedLoraLinear(layer, 32, table(), HugePageArena(n_in * n_out * 2))
            error = (fused(x).float() - want).norm() / want.norm()
            assert error < 0.004, "more than rounding weights and sums to bfloat16 does"
            layer(x)  # the first forward packs 4-bit weights anew for some processors


@needs_kernels
@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_quantized_row_is_the_same_to_the_bit_in_any_company(kind: str) -> None:
    fused = FusedLoraLinear(QUANTIZED[kind](320, 64), 32, table(), HugePageArena(320 * 64 * 2))
    x = made(1, 37, 320, seed=3)
    with torch.inference_mode():
        together = fused(x)
        for count in (1, 3, 8, 16):
            assert torch.equal(fused(x[:, :count]), together[:, :count])


@pytest.mark.parametrize("layer", [nf4_layer(96, 32), nf4_layer(64, 48), int8_layer(64, 40)])
def test_a_quantized_layer_of_other_sizes_is_left_to_bitsandbytes(layer: torch.nn.Module) -> None:
    assert not fits_kernel(layer)


def test_4bit_values_of_another_kind_are_left_to_bitsandbytes() -> None:
    layer = Linear4bit(64, 32, bias=False, compute_dtype=BF16, quant_type="fp4")
    layer.weight = Params4bit(made(32, 64), requires_grad=False, quant_type="fp4").to("cpu")
    assert not fits_kernel(layer)


class AttentionBuffers:
    """An attention layer's buffers, in which others have written."""

    def __init__(self, heads: int, dim: int, value_dim: int, tables: kernels.StepTables) -> None:
        self.kv_keys = made(12, heads, BLOCK_TOKENS, dim, seed=1)
        self.kv_values = made(12, heads, BLOCK_TOKENS, value_dim, seed=1)
        self.kv_table, self.kv_block_table = tables.body, tables.blocks


SEQUENCES = [
    SequenceStep([1], 9, [7]),
    SequenceStep([1], 37, [3, 11, 0]),
    SequenceStep([1], 16, [6, 2]),
    SequenceStep([1] * 20, 0, [9, 1]),
    SequenceStep([1] * 4, 30, [5, 4, 8]),
]


@needs_kernels
@pytest.mark.parametrize(("dim", "value_dim"), [(16, 16), (64, 64), (80, 80), (48, 32), (32, 80)])
@pytest.mark.parametrize(
    ("window", "softcap", "has_sinks"),
    [
        (None, None, False),
        (5, None, False),
        (18, None, False),
        (None, 20.0, False),
        (5, 20.0, False),
        (None, None, True),
        (18, None, True),
    ],
)
def test_attention_over_blocks_equals_the_torch_attention(
    dim: int, value_dim: int, window: int | None, softcap: float | None, has_sinks: bool
) -> None:
    tables = kernels.make_tables(8, 64)
    starts = itertools.accumulate((len(s.tokens) for s in SEQUENCES), initial=0)
    spans = [
        (start, len(s.tokens), i, s.position)
        for i, (s, start) in enumerate(zip(SEQUENCES, starts, strict=False))
    ]
    kernels.fill_table(tables.body, spans)
    kernels.fill_blocks(tables.blocks, [s.blocks for s in SEQUENCES])
    ours, plain = (AttentionBuffers(2, dim, value_dim, tables) for _ in range(2))
    tokens = sum(len(s.tokens) for s in SEQUENCES)
    query, key = (made(1, heads, tokens, dim, seed=heads) for heads in (6, 2))
    value = made(1, 2, tokens, value_dim, seed=3)
    options: dict[str, Any] = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    options["s_aux"] = made(6, seed=4) * 3 if has_sinks else None
    layout = make_layout(SEQUENCES, torch.device("cpu"))
    with torch.inference_mode():
        got, _ = kernels.attend_blocks(ours, query, key, value, None, **options)
        with running(layout):
            want, _ = kv.attend_blocks(plain, query, key, value, None, **options)
    close(got, want)
    assert torch.equal(ours.kv_keys, plain.kv_keys)
    assert torch.equal(ours.kv_values, plain.kv_values)


WIDE: dict[str, Any] = SIZES | {"hidden_size": 128, "intermediate_size": 96}  # heads of 32
WIDE_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 24, "qk_nope_head_dim": 24}  # keys of 32, values of 16
KINDS: dict[str, tuple[dict[str, Any], bool]] = {  # and whether its layers are Llama's in kind
    "llama": (WIDE | {"attention_bias": True}, True),
    "mistral": (WIDE | {"sliding_window": 8}, True),
    "qwen2": (WIDE, True),
    "qwen3": (WIDE | {"head_dim": 64}, True),
    "gemma2": (WIDE | {"head_dim": 32, "sliding_window": 8, "query_pre_attn_scalar": 32}, False),
    "olmo": (SIZES, False),
    "gpt_oss": (WIDE | GPT_OSS | {"head_dim": 32}, False),
    "minicpm3": (WIDE | LATENT | WIDE_LATENT, False),
    "qwen3_5_text": (WIDE | DELTA | {"head_dim": 32, "linear_num_value_heads": 32}, False),
    "lfm2": (WIDE | LFM2, False),
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
        # Of so few tokens, two ways to round are up to 1.2 apart
        assert (ours[adapter] - want).abs().mean() < 1.5 * (plain[adapter] - want).abs().mean(), adapter


def logprobs(
    base: Path, plans: list[Adapter], dtype: str, switch: str, alike: bool, quantization: str = "none"
) -> dict[str | None, Tensor]:
    """Of all prompts' tokens under each adapter and the base, which share one changing batch."""
    settings = {"device": "cpu", "dtype": dtype, "compile": switch, "max_rows": 6, "base": str(base)}
    settings |= {"quantization": quantization, "kernels": VECTORS}
    runner, _ = build_runner(Settings.model_validate(settings), lambda stage, fraction: None)
    check_kernels(runner, switch != "off", alike)
    driver = RunnerDriver(runner, 6)
    for plan in plans:
        driver.place(plan)
    digests = (None, *(plan.digest for plan in plans))
    long = [3 + i * 7 % 240 for i in range(200)]
    texts = (*prompts()[3:6], long)
    jobs = [Job(prompt, 3, digest, prompt_logprobs=0) for prompt in texts for digest in digests]
    random.Random(1).shuffle(jobs)
    driver.run(jobs, chunk=170)
    scores: dict[str | None, list[float | None]] = {}
    for job in jobs:
        scores.setdefault(job.adapter, []).extend(token.logprob for token in job.prompt_tokens[1:])
    return {adapter: torch.tensor(found) for adapter, found in scores.items()}


@needs_kernels
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantized_base_on_the_kernels_says_what_its_dequantized_weights_say(
    quantization: str, tmp_path: Path
) -> None:
    base = random_base(tmp_path / "base", "llama", WIDE | {"intermediate_size": 128})
    folders = [
        making.noise(tmp_path / f"a{i}", base, i, r=3 + 4 * i, use_dora=i == 1, targets=SOME[i])
        for i in range(3)
    ]
    plans = [plan_of(folder, base) for folder in folders]
    dense = save_dense(base, quantization, tmp_path / "dense")
    exact, plain = (logprobs(dense, plans, dtype, "off", alike=True) for dtype in ("float32", "bfloat16"))
    ours = logprobs(base, plans, "bfloat16", "on", alike=True, quantization=quantization)
    for adapter, want in exact.items():
        # Of so few tokens, two ways to round are up to 1.2 apart
        assert (ours[adapter] - want).abs().mean() < 1.5 * (plain[adapter] - want).abs().mean(), adapter


def save_dense(base: Path, quantization: str, folder: Path) -> Path:
    """The base with the weights that bitsandbytes makes of it."""
    settings = {"device": "cpu", "dtype": "bfloat16", "quantization": quantization, "base": str(base)}
    model: Any = load_base(base, Settings.model_validate(settings), lambda stage, fraction: None)
    names = [name for name, layer in model.named_modules() if isinstance(layer, Linear4bit | Linear8bitLt)]
    dense = making.load(base)
    for name in names:
        dense.get_submodule(name).weight.data = dense_weight(model.get_submodule(name))
    dense.save_pretrained(folder)
    return folder


RUNNABLE: list[Vectors] = [name for name in VARIANTS if name != "auto" and can_run(name)]


@pytest.mark.skipif(not ABLE or VECTORS != "auto", reason="no kernels, or those for other vectors")
@pytest.mark.parametrize("vectors", RUNNABLE[:-1])  # the last is what the processor gets by itself
def test_the_kernels_for_fewer_vectors_than_this_processor_has_are_right_too(vectors: Vectors) -> None:
    chosen = "fused_layer or over_blocks or quantized or whatever_its_neighbours or each_edge"
    files = [__file__, str(Path(__file__).with_name("test_sampler_batch.py"))]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n0", *files, "-k", chosen]
    ended = subprocess.run(
        command, env=os.environ | {"ADAPTERD_KERNELS": vectors}, capture_output=True, encoding="utf-8"
    )
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert "passed" in ended.stdout
    assert "skipped" not in ended.stdout


IS_X86 = platform.machine() == "x86_64"
LACKING: list[Vectors] = [name for name in VARIANTS if IS_X86 and name != "auto" and not can_run(name)]


@pytest.mark.skipif(not ABLE or VECTORS != "auto", reason="no kernels, or those for other vectors")
@pytest.mark.parametrize("vectors", LACKING)
def test_the_kernels_compile_for_vectors_that_this_processor_lacks(vectors: Vectors) -> None:
    includes = [f"-I{path}" for path in include_paths()]
    flags = [*kernels.FLAGS, *VARIANTS[vectors][0], *includes, "-fsyntax-only"]
    command = [str(find_compiler()), *flags, str(kernels.SOURCES[0])]
    ended = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert ended.returncode == 0, ended.stderr[-3000:]


def check_kernels(runner: ModelRunner, is_on: bool, alike: bool) -> None:
    """All linear layers run on the kernels, or none, a mixture's router never; whole decoder layers where
    they are alike.
    """
    linears = {name: layer for name, layer in runner.pool.layers.items() if not name.endswith(".weight")}
    assert all(isinstance(layer, FusedLoraLinear) for layer in linears.values()) == is_on
    forwards = [vars(module).get("forward") for module in runner.pool.tree.model.layers]
    whole = [isinstance(forward, FusedDecoderLayer) for forward in forwards]
    assert whole == [alike and is_on] * SIZES["num_hidden_layers"]


@needs_kernels
def test_a_row_says_the_same_whatever_its_neighbours(tmp_path: Path) -> None:
    """Bit for bit: no sum's order may depend on how many tokens, or whose, share the step."""
    base = random_base(tmp_path / "base", "llama", WIDE)
    folders = [making.noise(tmp_path / f"a{i}", base, i, r=3 + i, targets=SOME[i]) for i in range(3)]
    plans = [plan_of(folder, base) for folder in folders]
    settings = {
        "device": "cpu",
        "dtype": "bfloat16",
        "compile": "on",
        "max_rows": 16,
        "base": str(base),
        "kernels": VECTORS,
    }
    runner, _ = build_runner(Settings.model_validate(settings), lambda stage, fraction: None)
    driver = RunnerDriver(runner, 16)
    for plan in plans:
        driver.place(plan)

    alone, together = mixed_jobs(plans), mixed_jobs(plans)
    for job in alone:
        driver.run([job])
    driver.run(together)
    for ours, right in zip(together, alone, strict=True):
        assert (ours.tokens, ours.prompt_tokens) == (right.tokens, right.prompt_tokens)


@needs_kernels
def test_a_long_prompt_says_the_same_in_any_chunks(tmp_path: Path) -> None:
    """Bit for bit where bfloat16 pairs are multiplied; elsewhere torch's tiles round by the chunk."""
    base = random_base(tmp_path / "base", "llama", {**WIDE, "max_position_embeddings": 1024})
    settings = {"device": "cpu", "dtype": "bfloat16", "compile": "on", "max_rows": 2, "base": str(base)}
    chosen = Settings.model_validate(settings | {"kernels": VECTORS})
    runner, _ = build_runner(chosen, lambda stage, fraction: None)
    prompt = [5 + 7 * i % 240 for i in range(700)]
    answers = []
    for size in (700, 333, 16):
        job = Job(prompt, 4, None, prompt_logprobs=0)
        RunnerDriver(runner, 1).run([job], chunk=size)
        answers.append([token.logprob for token in job.prompt_tokens[1:]])
    if can_run("avx512_bf16") and VECTORS in ("auto", "avx512_bf16"):
        assert answers[0] == answers[1] == answers[2]
    close(*(torch.tensor(answers[i]) for i in (0, 2)))


def mixed_jobs(plans: list[Adapter]) -> list[Job]:
    """Sixteen jobs of the base and these three adapters by turns."""
    digests = (None, *(plan.digest for plan in plans))
    return [Job([5 + i, *prompts()[3][1:]], 8, digests[i % 4], prompt_logprobs=0) for i in range(16)]


def test_kernels_that_are_demanded_where_they_cannot_run_stop_the_start(tmp_path: Path) -> None:
    settings = {
        "device": "cpu",
        "dtype": "float32",
        "compile": "on",
        "base": str(making.tiny(tmp_path / "base")),
    }
    with pytest.raises(SettingsError, match="ADAPTERD_COMPILE"):
        build_runner(Settings.model_validate(settings), lambda stage, fraction: None)
