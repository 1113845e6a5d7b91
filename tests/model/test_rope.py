"""Rotary factors that transformers would choose by the longest sequence of a batch: each sequence
says what it says alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from peft import IA3Config

from service.core.base_info import BaseInfo
from service.model.build import build_runner
from service.model.runner import ModelRunner
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver
from .test_graphs import device
from .test_parity import SIZES, random_base
from .test_peft_fallback import fallback_plan

ORIGINAL, CONTEXT, LENGTH = 40, 128, 10
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1 + 0.05 * i for i in range(8)],
    "long_factor": [1.5 + 0.6 * i for i in range(8)],
    "original_max_position_embeddings": ORIGINAL,
    "factor": 4.0,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
BASES: dict[str, dict[str, Any]] = {
    "phi3": {"original_max_position_embeddings": ORIGINAL, "rope_parameters": LONGROPE},
    "gemma3_text": {
        "head_dim": 16,
        "sliding_window": 8,
        "query_pre_attn_scalar": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"full_attention": LONGROPE, "sliding_attention": PLAIN},
    },
    "phimoe": {  # chooses a scale too, by its own code
        "num_local_experts": 4,
        "original_max_position_embeddings": ORIGINAL,
        "rope_parameters": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.6},
    },
}
SHORT = [5 + 3 * i for i in range(9)]
# Passes the original context while it is continued
CROSSING = [200 - 5 * i for i in range(ORIGINAL - 4)]
LONG = [7 + 2 * i for i in range(ORIGINAL + 20)]


def longrope_base(folder: Path, kind: str) -> Path:
    return random_base(
        folder,
        kind,
        SIZES | {"initializer_range": 0.2, "max_position_embeddings": 4 * ORIGINAL} | BASES[kind],
    )


def start(base: Path, **settings: Any) -> tuple[ModelRunner, BaseInfo]:
    plain = {
        "device": "cpu",
        "dtype": "float32",
        "quantization": "none",
        "compile": "off",
        "max_rows": 8,
        "max_context": CONTEXT,
    }
    return build_runner(
        Settings.model_validate(plain | {"base": str(base)} | settings), lambda stage, fraction: None
    )


def said(
    runner: ModelRunner, *prompts: Sequence[int], adapter: str | None = None, chunk: int = 64
) -> list[list[int]]:
    jobs = [Job(prompt, LENGTH, adapter) for prompt in prompts]
    RunnerDriver(runner, 8).run(jobs, chunk)
    return [job.ids for job in jobs]


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.filterwarnings("ignore")
def test_a_sequence_says_the_same_alone_and_beside_one_past_the_original_context(
    kind: str, tmp_path: Path
) -> None:
    base = longrope_base(tmp_path / "base", kind)
    runner, card = start(base)
    alone = [said(runner, prompt)[0] for prompt in (SHORT, CROSSING, LONG)]
    assert said(runner, LONG, SHORT, CROSSING, SHORT) == [alone[2], alone[0], alone[1], alone[0]]
    assert said(runner, CROSSING, LONG, chunk=7) == alone[1:], "its prompt in chunks"
    assert alone[2] == making.greedy(base, None, LONG, LENGTH), (
        "transformers' rule is clear for what is long from its start"
    )
    assert card.rope == {"type": "longrope", "factors": "long", "original_context": ORIGINAL}


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.filterwarnings("ignore")
def test_where_no_sequence_can_pass_the_original_context_the_short_factors_serve(
    kind: str, tmp_path: Path
) -> None:
    base = longrope_base(tmp_path / "base", kind)
    runner, card = start(base, max_context=ORIGINAL)
    for prompt in (SHORT, LONG[: ORIGINAL - LENGTH]):
        assert said(runner, prompt) == [making.greedy(base, None, prompt, LENGTH)]
    assert card.rope == {"type": "longrope", "factors": "short", "original_context": ORIGINAL}


@pytest.mark.filterwarnings("ignore")
def test_an_adapter_that_only_peft_can_run_has_the_factors_of_its_base(tmp_path: Path) -> None:
    base = longrope_base(tmp_path / "base", "phi3")
    config = IA3Config(
        task_type="CAUSAL_LM", target_modules=["qkv_proj", "down_proj"], feedforward_modules=["down_proj"]
    )
    plan = fallback_plan(making.adapter(tmp_path / "ia3", base, config, seed=2))
    runner, _ = start(base)
    runner.load_adapter(plan)
    (alone,) = said(runner, SHORT, adapter=plan.digest)
    assert said(runner, LONG, SHORT, adapter=plan.digest)[1] == alone
    assert said(runner, LONG, adapter=plan.digest) == [making.greedy(base, tmp_path / "ia3", LONG, LENGTH)]


def test_dynamic_scaling_is_what_transformers_makes_of_it_and_asks_the_device_nothing(tmp_path: Path) -> None:
    """Its rule compares the batch's largest position with the trained one in every step, which no
    recording can hold.
    """
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    base = making.tiny(tmp_path / "base", max_position_embeddings=64, rope_parameters=rope)
    want = [making.greedy(base, None, prompt, LENGTH) for prompt in (LONG[:54], SHORT)]
    with device():
        runner, card = start(base, device="cuda", compile="on", max_context=64)
        assert said(runner, LONG[:54], SHORT) == want
    assert card.rope is None
