"""Layers that do not see every token of a step: served as PEFT serves them, or refused at
registration by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import Adapter, ExecutionPath
from service.core.base_info import BaseInfo, LayerLimit
from service.core.sampling import Sampling
from service.errors import AdapterUnsupported
from service.model.build import build_runner
from service.model.kv import PROBED_TOKENS
from service.model.linear_calls import LinearCalls, recorded_calls
from service.model.runner import ModelRunner
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver
from .test_parity import SIZES, prompts, random_base

BERT = SIZES | {"is_decoder": True}
ATTENTION = ("q_proj", "v_proj")
WHISPER: dict[str, Any] = {
    "vocab_size": 256,
    "d_model": 64,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 128,
}
WHISPER |= {
    "encoder_layers": 2,
    "max_target_positions": 256,
    "init_std": 0.2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, str], str]] = {
    "bert": (BERT, ("query", "value"), "cls.predictions.transform.dense"),
    "electra": (BERT | {"embedding_size": 64}, ("query", "value"), "generator_predictions.dense"),
    "roc_bert": (BERT, ("query", "value"), "cls.predictions.transform.dense"),
    "modernbert-decoder": (
        SIZES | {"num_hidden_layers": 2, "local_attention": 16},
        ATTENTION,
        "lm_head.dense",
    ),
    "whisper": (WHISPER, ATTENTION, "proj_out"),
}
SCORED = Sampling(logprobs=0)
PHIMOE = SIZES | {"num_local_experts": 4, "num_experts_per_tok": 2}


def runner_on(base: Path) -> tuple[ModelRunner, BaseInfo]:
    chosen = {
        "device": "cpu",
        "dtype": "float32",
        "quantization": "none",
        "compile": "off",
        "max_rows": 8,
        "base": str(base),
    }
    return build_runner(Settings.model_validate(chosen), lambda stage, fraction: None)


def load_adapter(driver: RunnerDriver, adapter: Adapter) -> None:
    if adapter.lane is ExecutionPath.SHADOW:
        driver.runner.load_adapter(adapter)
    else:
        driver.place(adapter)


def check_parity(driver: RunnerDriver, base: Path, adapters: dict[Path, Adapter]) -> None:
    """The base and these adapters, mixed, say what PEFT says of each alone, and each something of
    its own.
    """
    jobs: list[tuple[Path | None, Job]] = [(None, Job(prompt, 5, None, SCORED)) for prompt in prompts()[3:6]]
    for folder, adapter in adapters.items():
        load_adapter(driver, adapter)
        jobs += [(folder, Job(prompt, 5, adapter.digest, SCORED)) for prompt in prompts()[3:6]]
    driver.run([job for _, job in jobs])
    plain = making.served(base)
    for name in (None, *adapters):
        model = making.served(base, name)
        for job in (job for folder, job in jobs if folder == name):
            told = torch.tensor([token.logprob for token in job.tokens])
            assert torch.allclose(told, logprobs(model, job), atol=1e-3), name
            assert name is None or not torch.allclose(told, logprobs(plain, job), atol=1e-2), "a weak fixture"


@torch.no_grad()
def logprobs(model: Any, job: Job) -> torch.Tensor:
    """The model's own log probabilities of the tokens that the job was given."""
    ids = torch.tensor([*job.prompt, *job.ids])
    told: torch.Tensor = model(input_ids=ids[None]).logits[0].log_softmax(-1)
    return told[len(job.prompt) - 1 : -1].gather(1, ids[len(job.prompt) :, None])[:, 0]


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.filterwarnings("ignore")
def test_layers_behind_the_choice_of_logits_are_adapted_as_peft_adapts_them(
    kind: str, tmp_path: Path
) -> None:
    sizes, attention, behind = FAMILIES[kind]
    base = random_base(tmp_path / "base", kind, sizes)
    runner, card = runner_on(base)
    skeleton = Skeleton(base, card.limits)
    alone: dict[str, Any] = {"save": {"save_embedding_layers": False}}
    folders = [
        making.noise(tmp_path / "attention", base, 1, attention),
        making.noise(tmp_path / "behind", base, 2, (behind,), std=1.0, **alone),
        making.noise(tmp_path / "dora", base, 3, (behind, *attention), r=8, use_dora=True, **alone),
    ]
    adapters = {folder: validate_adapter(skeleton, folder, 64).adapter for folder in folders}
    assert {adapter.lane for adapter in adapters.values()} == {ExecutionPath.POOL}
    check_parity(RunnerDriver(runner, 8), base, adapters)


@pytest.fixture(scope="module")
def phimoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_base(tmp_path_factory.mktemp("calls") / "phimoe", "phimoe", PHIMOE)


@pytest.mark.filterwarnings("ignore")
def test_a_layer_that_gives_a_tuple_is_refused_by_name_and_its_base_serves_others(
    phimoe: Path, tmp_path: Path
) -> None:
    runner, card = runner_on(phimoe)
    skeleton = Skeleton(phimoe, card.limits)
    assert "router" not in {linear.name for linear in card.linears}
    plain = making.noise(tmp_path / "plain", phimoe, 1, ATTENTION)
    for name, targets in {"all": "all-linear", "router": ("router",)}.items():
        whole = making.noise(tmp_path / name, phimoe, 2, targets)
        with pytest.raises(
            AdapterUnsupported,
            match=r"LoRA on PhimoeTopKRouter is not served: model\.layers\.\*\.mlp\.router gives",
        ):
            validate_adapter(skeleton, whole, 64)
    check_parity(RunnerDriver(runner, 8), phimoe, {plain: validate_adapter(skeleton, plain, 64).adapter})


@pytest.mark.filterwarnings("ignore")
def test_a_parameter_of_such_a_layer_is_adapted_by_peft(phimoe: Path, tmp_path: Path) -> None:
    runner, card = runner_on(phimoe)
    folder = making.noise(tmp_path / "weight", phimoe, 1, (), target_parameters=["mlp.router.weight"])
    adapter = validate_adapter(Skeleton(phimoe, card.limits), folder, 64).adapter
    assert adapter.lane is ExecutionPath.SHADOW
    check_parity(RunnerDriver(runner, 8), phimoe, {folder: adapter})


@pytest.mark.filterwarnings("ignore")
def test_layers_that_see_some_of_the_tokens_run_by_peft(tmp_path: Path) -> None:
    base = making.tiny(tmp_path / "base")
    runner, _ = runner_on(base)
    limit = LayerLimit(
        "model.layers.*.mlp.down_proj", "Linear", "sees a part of a step's tokens only", by_peft=True
    )
    folder = making.noise(tmp_path / "a", base, 1, ("down_proj", "q_proj"))
    adapter = validate_adapter(Skeleton(base, [limit]), folder, 64).adapter
    assert adapter.lane is ExecutionPath.SHADOW
    check_parity(RunnerDriver(runner, 8), base, {folder: adapter})


# ---- what is noted


class Tuple(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Transposed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).transpose(-1, -2)


class Routed(nn.Module):
    """Every way in which a model may call a linear layer; of two experts each token meets one."""

    def __init__(self) -> None:
        super().__init__()
        self.whole, self.behind, self.idle = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.shared, self.tuple, self.transposed = nn.Linear(4, 4), Tuple(4, 4), Transposed(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.whole(self.whole(x))
        self.tuple(x)
        self.transposed(x)
        x[..., ::2, :] = self.experts[0](x[..., ::2, :])
        x[..., 1::2, :] = self.experts[1](x[..., 1::2, :])
        logits: Tensor = self.behind(self.shared(x)[..., 1:, :])
        self.shared(logits)
        return logits


def test_how_each_layer_is_called_is_noted_once_and_no_hook_is_left() -> None:
    model = Routed()
    with torch.no_grad(), recorded_calls(model) as recorder:
        model(torch.randn(1, PROBED_TOKENS, 4))
    found = recorder.result()
    assert found.heads == {"behind"}
    assert {limit.pattern: (limit.kind, limit.by_peft) for limit in found.limits} == {
        "experts.*": ("Linear", True),
        "shared": ("Linear", True),
        "tuple": ("Tuple", False),
        "transposed": ("Transposed", False),
    }
    assert found.limited("experts.7")
    assert not any(map(found.limited, ("whole", "idle", "behind")))
    assert not any(module._forward_hooks for module in model.modules())
    assert not LinearCalls().limited("experts.7")
