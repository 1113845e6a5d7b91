"""The self-check refuses at the start a way to run that is wrong for a kind of model, in whatever dtype
it is served, and no other.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from service.errors import SettingsError
from service.model import kernels, kv, selfcheck, small_model
from service.model.attention_rules import Reach, ScoreRules
from service.model.build import build_runner
from service.model.lora_linear import LoraLinear
from service.model.runner import ModelRunner
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver
from .test_kernels import WIDE, needs_kernels
from .test_parity import FAMILIES, SIZES, STATEFUL, prompts, random_base

GEMMA2 = SIZES | {
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4096,
    "max_position_embeddings": 8192,
}
OLMOE = SIZES | {
    "intermediate_size": 32,
    "num_experts": 16,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 24,
    "initializer_range": 0.5,
}
LLAMA4 = SIZES | {
    "intermediate_size": 32,
    "intermediate_size_mlp": 64,
    "head_dim": 16,
    # The last of them without rotary positions, and over all that came before
    "num_hidden_layers": 4,
    "num_local_experts": 2,
    "initializer_range": 0.2,
    "attention_chunk_size": 28,
}


def runner_on(base: Path, **settings: Any) -> ModelRunner:
    plain = {"device": "cpu", "dtype": "bfloat16", "quantization": "none", "compile": "off", "max_rows": 4}
    made, _ = build_runner(
        Settings.model_validate(plain | {"base": str(base)} | settings), lambda stage, fraction: None
    )
    return made


def without_windows(positions: Tensor, end: int, reach: Reach) -> Tensor:
    return torch.arange(end)[None] <= positions[:, None]


def without_caps(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, rules: ScoreRules, sinks: None
) -> Tensor:
    return WEIGHTED(query, keys, values, mask, rules._replace(softcap=0.0), sinks)


WEIGHTED = kv._weigh_values


@pytest.mark.parametrize(
    ("kind", "sizes", "lost", "stand_in"),
    [
        (
            "mistral",
            SIZES | {"sliding_window": 4096, "max_position_embeddings": 8192},
            "_visible_mask",
            without_windows,
        ),
        ("gemma2", GEMMA2, "_visible_mask", without_windows),
        ("gemma2", GEMMA2, "_weigh_values", without_caps),
        ("llama4_text", LLAMA4, "_visible_mask", without_windows),
    ],
    ids=["window", "window of some layers", "cap", "chunk"],
)
def test_an_attention_that_leaves_something_out_is_refused_in_bfloat16(
    kind: str,
    sizes: dict[str, Any],
    lost: str,
    stand_in: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base = random_base(tmp_path / "base", kind, sizes)
    monkeypatch.setattr(kv, lost, stand_in)
    with pytest.raises(
        SettingsError, match=r"ForCausalLM is not supported: its logits .* differ from its own"
    ):
        runner_on(base)


@pytest.mark.filterwarnings("ignore")
def test_attention_sinks_that_are_left_out_are_missed_in_bfloat16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However small they are in the base itself, whose logits hardly change."""
    base = random_base(
        tmp_path / "base",
        "gpt_oss",
        SIZES | {"intermediate_size": 32, "head_dim": 16, "num_local_experts": 4},
    )
    model = making.load(base)
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            weight.data.fill_(-8.0)
    model.save_pretrained(base)
    monkeypatch.setattr(
        kv, "_add_sinks", lambda query, keys, values, mask, sinks: (query, keys, values, mask)
    )
    with pytest.raises(SettingsError, match="GptOssForCausalLM is not supported: its logits"):
        runner_on(base)


@pytest.mark.filterwarnings("ignore")
def test_routers_that_rounding_tips_over_are_no_reason_to_refuse_a_base(tmp_path: Path) -> None:
    runner = runner_on(random_base(tmp_path / "base", "olmoe", OLMOE))
    with torch.inference_mode():
        error = selfcheck._relative_error(
            selfcheck.logits_of(runner.model), selfcheck.plain_logits(runner.model)
        )
    assert error > selfcheck.ROUGH[torch.bfloat16], "a weak fixture"


def test_chunks_are_attended_to_as_transformers_does(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", "llama4_text", LLAMA4)
    runner = runner_on(base, dtype="float32")
    assert [one.chunk for one in runner.attention] == [28, 28, 28, 0]
    jobs = [Job(prompt, 20) for prompt in prompts()[3:7]]
    RunnerDriver(runner, 4).run(jobs)
    for job in jobs:
        assert job.ids == making.greedy(base, None, job.prompt, job.n)


def test_a_scale_by_the_place_in_the_step_is_refused_where_it_would_act(tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", "llama4_text", LLAMA4 | {"floor_scale": 64})
    with pytest.raises(
        SettingsError,
        match=r"Llama4ForCausalLM is not supported: .*; with ADAPTERD_MAX_CONTEXT of at most 64 it is$",
    ):
        runner_on(base)
    runner_on(base, max_context=64)


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    base = making.tiny(tmp_path / "base")
    model = making.load(base)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = float("inf")
    model.save_pretrained(base)
    with pytest.raises(
        SettingsError, match="ADAPTERD_BASE: LlamaForCausalLM is not supported: its logits are not finite"
    ):
        runner_on(base)


@pytest.mark.parametrize("right", [True, False])
def test_a_base_of_which_no_small_model_can_be_made_is_compared_with_itself(
    right: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: object) -> Any:
        raise ValueError("sizes that do not fit")

    base = making.tiny(tmp_path / "base")
    monkeypatch.setattr(selfcheck, "small_model", none)
    if right:
        runner_on(base, dtype="float32")
    else:
        monkeypatch.setattr(kv, "_weigh_values", lambda query, keys, values, *_: torch.zeros_like(query))
        with pytest.raises(SettingsError, match="its logits through the block attention differ from its own"):
            runner_on(base, dtype="float32")
    assert "no small model of the base could be made to prove it by: sizes that do not fit" in caplog.text


def test_a_small_model_that_lacks_a_kind_of_layer_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = random_base(tmp_path / "base", "gemma2", GEMMA2)
    monkeypatch.setattr(small_model, "_kept_layers", lambda config, count: [1])
    runner_on(base)
    assert "to prove it by: it lacks ('Gemma2Attention', True, False, True, False)" in caplog.text


# Sizes as they are published; what of them stays or becomes
REAL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": (
        {
            "hidden_size": 8192,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "intermediate_size": 28672,
        },
        {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 512},
    ),
    "gemma3_text": (
        {
            "hidden_size": 5376,
            "num_hidden_layers": 62,
            "num_attention_heads": 32,
            "num_key_value_heads": 16,
            "sliding_window": 1024,
        },
        {
            "num_hidden_layers": 6,
            "sliding_window": small_model.SHORT,
            "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        },
    ),
    "qwen3_moe": (
        {
            "hidden_size": 2048,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "num_experts": 128,
        },
        {"num_experts": 8, "num_experts_per_tok": 2, "hidden_size": 256},
    ),
    "qwen2": (
        {
            "num_hidden_layers": 32,
            "use_sliding_window": True,
            "sliding_window": 32768,
            "max_window_layers": 21,
        },
        {
            "num_hidden_layers": 2,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 32768,
        },
    ),
    "gpt2": (
        {"n_embd": 1600, "n_layer": 48, "n_head": 25},
        {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 256},
    ),
    "gemma3n_text": (
        {"num_hidden_layers": 35, "num_kv_shared_layers": 15},
        {"num_kv_shared_layers": 2, "layer_types": ["sliding_attention", "full_attention"] * 3},
    ),
    "granitemoehybrid": (
        {
            "hidden_size": 1536,
            "num_hidden_layers": 40,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "mamba_n_heads": 48,
            "mamba_d_head": 64,
            "layer_types": (["linear_attention"] * 5 + ["full_attention"] + ["linear_attention"] * 4) * 4,
        },
        {"hidden_size": 512, "mamba_n_heads": 16, "num_hidden_layers": 6},
    ),
    "llama4_text": (
        {"num_hidden_layers": 48, "intermediate_size": 8192, "num_local_experts": 16},
        {
            "attention_chunk_size": small_model.SHORT,
            "num_hidden_layers": 4,
            "floor_scale": small_model.SHORT,
            "moe_layers": [0, 1, 2, 3],
        },
    ),
}


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_any_size_has_a_small_one_of_its_kinds_of_layers(kind: str) -> None:
    sizes, wanted = REAL[kind]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), dtype=torch.bfloat16)
    with torch.inference_mode():
        small = small_model.small_model(model, 16384, selfcheck.PROBE, 0)
        logits = selfcheck.plain_logits(small)
    assert {name: getattr(small.config, name) for name in wanted} == wanted
    assert sum(weight.numel() for weight in small.parameters()) < 70_000_000
    assert {type(module) for module in model.modules()} == {type(module) for module in small.modules()}
    assert logits.isfinite().all()
    assert not any(
        (weight == weight.flatten()[0]).all() for weight in small.parameters() if weight.numel() > 1
    )


@pytest.mark.parametrize("kind", FAMILIES | STATEFUL)
@pytest.mark.filterwarnings("ignore")
def test_every_family_is_proven_by_a_small_model(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sizes, _ = (FAMILIES | STATEFUL)[kind]
    runner_on(random_base(tmp_path / "base", kind, sizes), dtype="float32")
    assert "proof: rough" not in caplog.text


def test_making_the_small_model_leaves_the_random_numbers_of_the_process_alone(tmp_path: Path) -> None:
    model = making.load(making.tiny(tmp_path / "base"))
    before = torch.random.get_rng_state()
    with torch.inference_mode():
        first, again = (
            small_model.small_model(model, 512, selfcheck.PROBE, 0).state_dict() for _ in range(2)
        )
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)


def wrong(*_: object, **__: object) -> tuple[Tensor, None]:
    query = _[1]
    assert isinstance(query, Tensor)
    return torch.zeros_like(query).transpose(1, 2), None


def broken(*_: object, **__: object) -> tuple[Tensor, None]:
    raise RuntimeError("Expected dim to be a multiple of 16")


@needs_kernels
@pytest.mark.parametrize(
    ("stand_in", "why"), [(wrong, "differ from torch's by"), (broken, "they raise: Expected dim to be")]
)
def test_kernels_that_say_something_else_than_torch_are_left_off(
    stand_in: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    base = random_base(
        tmp_path / "base", "gemma2", WIDE | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
    )
    right = Job(prompts()[5], 6, prompt_logprobs=0)
    RunnerDriver(runner_on(base, compile="off"), 4).run([right])
    monkeypatch.setitem(AttentionInterface._global_mapping, kernels.NAME, stand_in)
    with caplog.at_level(logging.WARNING):
        runner = runner_on(base, compile="auto")
    assert "kernels: off; " in caplog.text
    assert why in caplog.text
    assert all(isinstance(layer, LoraLinear) for layer in runner.pool.layers.values())
    job = Job(right.prompt, 6, prompt_logprobs=0)
    RunnerDriver(runner, 4).run([job])
    assert (job.tokens, job.prompt_tokens) == (right.tokens, right.prompt_tokens)
    with pytest.raises(SettingsError, match=f"ADAPTERD_COMPILE: on, but .*{why}"):
        runner_on(base, compile="on")
