"""LoRA on the experts of a mixture, beside plain adapters and the base: each says what PEFT says alone, in
the batch where their parameters are of transformers' uniform kind, by PEFT where they are not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.catalog.validator.check import measure_norms, validate_adapter
from service.catalog.validator.messages import ValidatedAdapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import Adapter, ExecutionPath, WeightedPart
from service.model import lora_pool, mixture_check
from service.model.build import build_runner
from service.model.experts import ExpertsLora
from service.model.lora_linear import FusedLoraLinear, LoraLinear
from service.model.runner import ModelRunner
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver
from .test_kernels import needs_kernels
from .test_linear_calls import SCORED, check_parity, logprobs, runner_on
from .test_parity import GPT_OSS, SIZES, prompts, random_base, weights_digest

EXPERTS = {
    "qwen3_moe": SIZES | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": SIZES | {"num_local_experts": 4},
    "gpt_oss": SIZES | GPT_OSS,  # with biases, gates between the ups, and the weights the other way round
}
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


class MixtureBase:
    """A served mixture of experts, and what the validator knows of it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.router = "mlp.router.weight" if kind == "gpt_oss" else "mlp.gate.weight"
        self.folder = random_base(folder, kind, EXPERTS[kind] | {"moe_intermediate_size": 32})
        self.runner: ModelRunner
        self.runner, card = runner_on(self.folder)
        self.skeleton = Skeleton(self.folder, card.limits, card.adapted_parameters)

    def validate(self, folder: Path, **recipe: Any) -> ValidatedAdapter:
        """Makes this adapter; dropout is none, which PEFT cannot apply to a parameter."""
        making.noise(folder, self.folder, **recipe)
        return validate_adapter(self.skeleton, folder, 64)


@pytest.fixture(scope="module", params=EXPERTS)
def mixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> MixtureBase:
    return MixtureBase(tmp_path_factory.mktemp("experts") / "base", request.param)


@pytest.mark.filterwarnings("ignore")
def test_experts_a_plain_adapter_and_the_base_say_what_peft_says_in_one_run(
    mixture: MixtureBase, tmp_path: Path
) -> None:
    before = weights_digest(mixture.runner)
    recipes: dict[str, dict[str, Any]] = {
        "experts": {"targets": ("q_proj",), "target_parameters": BOTH, "r": 3},
        "wider": {"targets": (), "target_parameters": BOTH[:1], "r": 16, "use_rslora": True},
        "routed": {"targets": (), "target_parameters": [mixture.router]},
        "plain": {},
    }
    adapters = {
        tmp_path / name: mixture.validate(tmp_path / name, seed=seed, **recipe).adapter
        for seed, (name, recipe) in enumerate(recipes.items())
    }
    assert {adapter.lane for adapter in adapters.values()} == {ExecutionPath.POOL}
    driver = RunnerDriver(mixture.runner, 8)
    check_parity(driver, mixture.folder, adapters)
    for adapter in adapters.values():
        driver.remove(adapter.digest)
    assert not any(factors.held for factors in mixture.runner.pool.experts.values())
    check_parity(driver, mixture.folder, {})
    assert weights_digest(mixture.runner) == before


@pytest.mark.filterwarnings("ignore")
def test_a_mix_of_adapters_on_experts_says_what_peft_s_says(mixture: MixtureBase, tmp_path: Path) -> None:
    folders = [(tmp_path / str(seed), weight) for seed, weight in enumerate((0.75, -1.5))]
    parts = tuple(
        WeightedPart(mixture.validate(folder, seed=seed, targets=(), target_parameters=BOTH).adapter, weight)
        for seed, (folder, weight) in enumerate(folders)
    )
    mix = Adapter("mix", "", "", ExecutionPath.POOL, 8, 0, parts=parts)
    assert mix.is_on_experts
    driver = RunnerDriver(mixture.runner, 8)
    driver.place(mix)
    job = Job(prompts()[3], 5, "mix", SCORED)
    driver.run([Job(prompts()[4], 5), job])
    driver.remove("mix")
    merged = making.load(mixture.folder)
    for folder, weight in folders:
        for name, parameter in making.served(mixture.folder, folder).merge_and_unload().named_parameters():
            merged.get_parameter(name).data += weight * (
                parameter - making.load(mixture.folder).get_parameter(name)
            )
    told = torch.tensor([token.logprob for token in job.tokens])
    assert torch.allclose(told, logprobs(merged, job), atol=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_all_linear_of_a_mixture_runs_in_the_batch(mixture: MixtureBase, tmp_path: Path) -> None:
    """PEFT takes the experts and the routers for linear layers, as they were once."""
    folder = tmp_path / "all"
    adapter = mixture.validate(folder, seed=4, targets="all-linear").adapter
    assert adapter.lane is ExecutionPath.POOL
    check_parity(RunnerDriver(mixture.runner, 8), mixture.folder, {folder: adapter})


@pytest.mark.filterwarnings("ignore")
def test_experts_are_told_by_their_parameters_with_the_rank_and_the_norm_of_each(
    mixture: MixtureBase, tmp_path: Path
) -> None:
    folder = tmp_path / "experts"
    validated = mixture.validate(folder, seed=1, targets=("q_proj",), target_parameters=BOTH)
    told = validated.facts
    assert told["target_modules"] == ["down_proj", "gate_up_proj", "q_proj"]
    assert (told["rank"], told["modules"], told["layers"]) == ({"min": 4, "max": 4}, 12, 4)
    assert "target_parameters" in told["features"]
    ranks = {row["name"]: (row["rank"], row["lora_A"][0]) for row in told["by_module"]}
    assert ranks == {"q_proj": (4, 4), "down_proj": (4, 16), "gate_up_proj": (4, 16)}
    (spec,) = (each for each in validated.layers if each.module.endswith("0.mlp.experts.down_proj"))
    norms = measure_norms(validated.adapter, validated.layers)
    assert norms[spec.module] == pytest.approx(merged_change(mixture.folder, folder), rel=1e-4)


def merged_change(base: Path, adapter: Path) -> float:
    """The norm of what PEFT adds to the experts' down_proj of layer 0 when it merges."""
    with making.quiet():
        merged = making.served(base, adapter).merge_and_unload()
    name = "model.layers.0.mlp.experts.down_proj"
    change: torch.Tensor = merged.get_parameter(name) - making.load(base).get_parameter(name)
    return float(change.norm())


WRONG: dict[str, tuple[Any, str, Any, str]] = {
    "experts": (ExpertsLora, "_is_adapted_by", lambda self, digest: False, "mlp.experts."),
    "router": (LoraLinear, "_add_group", lambda self, x, y, group: None, "mlp.gate.weight"),
}


@pytest.mark.parametrize("part", WRONG)
@pytest.mark.filterwarnings("ignore")
def test_what_the_batch_would_adapt_wrongly_is_left_to_peft_and_the_log_says_so(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    owner, name, wrong, parameter = WRONG[part]
    monkeypatch.setattr(owner, name, wrong)
    base = MixtureBase(tmp_path / "base", "qwen3_moe")
    said = [record.getMessage() for record in caplog.records if "run by PEFT" in record.getMessage()]
    assert said
    assert all(parameter in line and "differ" in line for line in said)
    adapter = base.validate(tmp_path / "all", seed=4, targets="all-linear").adapter
    assert adapter.lane is ExecutionPath.SHADOW


@needs_kernels
@pytest.mark.parametrize("with_routers", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_experts_are_adapted_beside_linear_layers_on_the_kernels(
    with_routers: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a step tell the experts less where no layer in torch would read it."""
    if not with_routers:
        for user in (lora_pool, mixture_check):
            monkeypatch.setattr(user, "iterate_routers", lambda model: ())
    sizes = EXPERTS["qwen3_moe"] | {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 32}
    base = random_base(tmp_path / "base", "qwen3_moe", sizes)
    told = {}
    for switch in ("off", "on"):
        chosen = {
            "device": "cpu",
            "dtype": "bfloat16",
            "quantization": "none",
            "compile": switch,
            "max_rows": 4,
        }
        settings = Settings.model_validate(chosen | {"base": str(base)})
        runner, card = build_runner(settings, lambda stage, fraction: None)
        assert all(isinstance(layer, FusedLoraLinear) for layer in runner.pool.layers.values()) is (
            switch == "on" and not with_routers
        )
        folder = making.noise(tmp_path / switch, base, 1, ("q_proj",), r=3, target_parameters=BOTH)
        skeleton = Skeleton(base, card.limits, card.adapted_parameters)
        adapter = validate_adapter(skeleton, folder, 64).adapter
        driver = RunnerDriver(runner, 4)
        driver.place(adapter)
        jobs = [
            Job(prompts()[i], 1, name, SCORED, prompt_logprobs=0)
            for i in (3, 4)
            for name in (None, adapter.digest)
        ]
        driver.run(jobs)
        told[switch] = [torch.tensor([t.logprob for t in job.prompt_tokens[1:]]) for job in jobs]
    for i, (one, other) in enumerate(zip(told["off"], told["on"], strict=True)):
        assert (one - other).abs().median() < 0.1, i
    assert (told["on"][0] - told["on"][1]).abs().median() > 0.2, "a weak fixture"
