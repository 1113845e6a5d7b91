"""LoRA on the experts of a mixture, beside a plain adapter and the base: PEFT runs it, and says what it says
alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from service.catalog.validator.check import measure_norms, validate_adapter
from service.catalog.validator.messages import ValidatedAdapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import ExecutionPath
from service.model.runner import ModelRunner
from tests import making

from .driver import RunnerDriver
from .test_linear_calls import check_parity, runner_on
from .test_parity import SIZES, random_base, weights_digest

EXPERTS = {
    "qwen3_moe": SIZES | {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": SIZES | {"num_local_experts": 4},
}
BOTH = ["experts.down_proj", "experts.gate_up_proj"]


class MixtureBase:
    """A served mixture of experts, and what the validator knows of it."""

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = random_base(folder, kind, EXPERTS[kind] | {"moe_intermediate_size": 32})
        self.runner: ModelRunner
        self.runner, card = runner_on(self.folder)
        self.skeleton = Skeleton(self.folder, card.limits)

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
    experts, routed, plain = (tmp_path / name for name in ("experts", "routed", "plain"))
    adapters = {
        experts: mixture.validate(experts, seed=1, targets=("q_proj",), target_parameters=BOTH).adapter,
        routed: mixture.validate(routed, seed=2, targets=(), target_parameters=["mlp.gate.weight"]).adapter,
        plain: mixture.validate(plain, seed=3).adapter,
    }
    paths = [adapter.lane for adapter in adapters.values()]
    assert paths == [ExecutionPath.SHADOW, ExecutionPath.SHADOW, ExecutionPath.POOL]
    check_parity(RunnerDriver(mixture.runner, 8), mixture.folder, adapters)
    assert weights_digest(mixture.runner) == before


@pytest.mark.filterwarnings("ignore")
def test_all_linear_of_a_mixture_runs_by_peft(mixture: MixtureBase, tmp_path: Path) -> None:
    """PEFT takes the experts and the routers for linear layers, as they were once."""
    folder = tmp_path / "all"
    adapter = mixture.validate(folder, seed=4, targets="all-linear").adapter
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
