"""A model that sees images: its language model is served alone, with the adapters of that, however their
trainer spelt them; the rest is let go of, and an adapter of the rest is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LNTuningConfig
from torch import nn
from transformers import Gemma3Config, LlamaConfig, LlamaForCausalLM

from service.catalog.validator.check import validate_adapter
from service.catalog.validator.header import TensorInfo
from service.catalog.validator.match import match_tensors
from service.catalog.validator.skeleton import Skeleton
from service.core.base_info import BaseInfo
from service.errors import AdapterInvalid, AdapterUnsupported
from service.model.runner import ModelRunner
from service.model.text_part import recorded_modules, release_other_parts
from tests import making

from . import families
from .driver import RunnerDriver
from .test_linear_calls import check_parity

TEXT = r".*language_model\..*\.(q_proj|down_proj)"


class WrapperBase:
    """A served LLaVA, whose images CLIP looks at, with layers named as those of the language model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        families.make_tiny("llava", folder)
        self.runner: ModelRunner
        self.card: BaseInfo
        self.runner, self.card = families.start(folder)
        self.skeleton = Skeleton(folder, self.card.limits)

    def refusal(self, folder: Path, **recipe: Any) -> str:
        """Why an adapter made so is refused."""
        making.noise(folder, self.folder, 1, save={"save_embedding_layers": False}, **recipe)
        with pytest.raises(AdapterUnsupported) as refused:
            validate_adapter(self.skeleton, folder, 64)
        return "; ".join(refused.value.problems)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> WrapperBase:
    return WrapperBase(tmp_path_factory.mktemp("wrapper") / "base")


def test_only_the_language_model_stays_in_memory(llava: WrapperBase) -> None:
    whole = families.load(llava.folder)
    kept = [*whole.model.language_model.parameters(), *whole.lm_head.parameters()]
    size = sum(weight.nbytes for weight in kept)
    assert size <= sum(llava.card.resident_bytes.values()) < 1.01 * size
    assert llava.card.architecture == "LlavaForConditionalGeneration"
    assert not any("vision" in name for name, _ in llava.runner.pool.tree.named_parameters())


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_the_language_model_say_what_peft_says_of_the_whole(
    llava: WrapperBase, tmp_path: Path
) -> None:
    pooled = making.noise(tmp_path / "pooled", llava.folder, 1, TEXT)
    beside = making.noise(tmp_path / "beside", llava.folder, 2, TEXT, lora_bias=True)
    adapters = {folder: validate_adapter(llava.skeleton, folder, 64).adapter for folder in (pooled, beside)}
    assert (adapters[pooled].lane.value, adapters[beside].lane.value) == ("pool", "shadow")
    check_parity(RunnerDriver(llava.runner, 8), llava.folder, adapters)


# What stands for `model.language_model.`
SPELLINGS = {"of the language model alone": "model.", "of transformers until 4.51": "language_model.model."}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_is_read_however_its_trainer_named_the_language_model(
    spelling: str, llava: WrapperBase, tmp_path: Path
) -> None:
    written = SPELLINGS[spelling]
    plain = making.noise(tmp_path / "plain", llava.folder, 1, TEXT)

    def rename(held: making.Tensors) -> making.Tensors:
        return {key.replace("model.language_model.", written): value for key, value in held.items()}

    other = validate_adapter(llava.skeleton, making.edit(plain, tmp_path / "other", weights=rename), 64)
    right = validate_adapter(llava.skeleton, plain, 64)
    assert [spec.module for spec in other.layers] == [spec.module for spec in right.layers]
    assert all(f"base_model.model.{written}layers." in spec.a for spec in other.layers)


def test_two_tensors_are_not_taken_for_one_in_two_spellings() -> None:
    expected = {"base_model.model.model.language_model.x": (1,)}
    held = [f"base_model.model.{body}.x" for body in ("model", "language_model.model")]
    with pytest.raises(AdapterInvalid, match="0 of 3 tensors matched"):
        match_tensors(expected, {key: TensorInfo("F32", (1,), 4) for key in held})


@pytest.mark.filterwarnings("ignore")
def test_what_acts_on_the_other_parts_is_refused_by_their_names(llava: WrapperBase, tmp_path: Path) -> None:
    said = "LoRA on Linear is not served: model.vision_tower.encoder.layers.*.self_attn.q_proj is in "
    said += "model.vision_tower, beside the language model, which alone is served"
    assert said in llava.refusal(tmp_path / "list", targets=("q_proj",))
    everywhere = llava.refusal(tmp_path / "all", targets="all-linear")
    assert "model.multi_modal_projector.linear_1 is in" in everywhere
    saved = llava.refusal(tmp_path / "saved", targets=TEXT, modules_to_save=["multi_modal_projector"])
    assert "model.multi_modal_projector is in model.multi_modal_projector" in saved
    tuning = LNTuningConfig(task_type="CAUSAL_LM", target_modules=["layer_norm1"])
    norms = making.adapter(tmp_path / "norms", llava.folder, tuning, seed=1)
    with pytest.raises(AdapterUnsupported, match=r"LN_TUNING on LayerNorm is not served: model\.vision_"):
        validate_adapter(llava.skeleton, norms, 64)


class SmallWrapper(nn.Module):
    """A language model, a part that text passes, and one that it does not."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Gemma3Config()
        self.text, self.head = nn.Linear(2, 2), nn.Linear(2, 2)
        self.passed, self.idle = nn.Linear(2, 2), nn.ModuleDict({"inner": nn.Linear(2, 2)})

    def get_decoder(self) -> nn.Module:
        return self.text

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.passed(self.text(x))
        return y


def test_a_part_that_text_passes_stays_and_no_hook_is_left() -> None:
    model = SmallWrapper()
    with recorded_modules(model) as called:
        model(torch.ones(2))
    limits = release_other_parts(model, called)
    assert [limit.pattern for limit in limits] == ["idle", "idle.inner"]
    assert not any(limit.by_peft for limit in limits)
    assert {name for name, _ in model.named_parameters()} == {
        f"{part}.{name}" for part in ("text", "head", "passed") for name in ("weight", "bias")
    }
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_of_text_only_is_left_alone() -> None:
    model = LlamaForCausalLM(LlamaConfig(**making.TINY, vocab_size=16))
    weights = list(model.parameters())
    assert release_other_parts(model, set()) == ()
    assert list(map(id, model.parameters())) == list(map(id, weights))
