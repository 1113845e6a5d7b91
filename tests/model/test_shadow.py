"""What the pool cannot express says what PEFT says, beside a pool adapter and the base, and leaves the base's tensors as they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, PeftConfig, VeraConfig

from service.digest import digest
from service.engine.request import Adapter, Lane
from service.errors import AdapterInvalid
from service.model.shadow import planted
from tests import making

from .driver import Driver, Job, plan_of
from .test_parity import prompts, runner_on, weights_digest

TARGETS = ["q_proj", "v_proj"]
KINDS: dict[str, Callable[[], PeftConfig]] = {
    "modules_to_save": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    "trainable_token_indices": lambda: LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices=[7, 8, 9], task_type="CAUSAL_LM"),
    "lora_bias": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, lora_bias=True, task_type="CAUSAL_LM"),
    "embedding": lambda: LoraConfig(r=4, lora_alpha=8, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM"),
    "target_parameters": lambda: LoraConfig(r=4, target_modules=[], target_parameters=["mlp.down_proj.weight"], task_type="CAUSAL_LM"),
    "IA3": lambda: IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
    "VERA": lambda: VeraConfig(r=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "LOHA": lambda: LoHaConfig(r=4, alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "LOKR": lambda: LoKrConfig(r=4, alpha=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
    "OFT": lambda: OFTConfig(r=0, oft_block_size=8, target_modules=TARGETS, task_type="CAUSAL_LM"),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("shadow") / "base", tie_word_embeddings=False)


def shadow_plan(folder: Path) -> Adapter:
    config, weights = folder / making.CONFIG, folder / making.WEIGHTS
    return Adapter(digest(config.read_bytes(), weights.read_bytes()), str(config), str(weights), Lane.SHADOW, 0, weights.stat().st_size)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_a_shadow_adapter_says_what_peft_says_and_its_neighbours_do_too(kind: str, base: Path, tmp_path: Path) -> None:
    folder = making.adapter(tmp_path / "shadow", base, KINDS[kind](), seed=3, save={"save_embedding_layers": False})
    plain = making.noise(tmp_path / "plain", base, 4)
    runner = runner_on(base)
    before = weights_digest(runner)
    driver = Driver(runner, 8)
    shadow, pooled = shadow_plan(folder), plan_of(plain, base)
    runner.load(shadow)
    driver.place(pooled)
    whose = {None: None, shadow.digest: folder, pooled.digest: plain}
    jobs = [Job(prompt, 6, name) for prompt in prompts()[2:6] for name in whose]
    driver.run(jobs)
    told = False
    for job in jobs:
        assert job.ids == making.greedy(base, whose[job.adapter], job.prompt, 6), whose[job.adapter]
        told |= job.adapter == shadow.digest and job.ids != making.greedy(base, None, job.prompt, 6)
    assert told, "the shadow adapter changes nothing: a weak fixture"
    runner.unload(shadow.digest)
    assert weights_digest(runner) == before


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_peft_would_drop_is_refused(base: Path, tmp_path: Path) -> None:
    folder = making.adapter(tmp_path / "ia3", base, KINDS["IA3"](), seed=3)
    odd = making.edit(folder, tmp_path / "odd", weights=lambda t: {key.replace("k_proj", "z_proj"): value for key, value in t.items()})
    with pytest.raises(AdapterInvalid, match=r"missing: .*k_proj"):
        planted(making.load(base), shadow_plan(odd))


@pytest.mark.filterwarnings("ignore")
def test_a_saved_embedding_is_not_written_through_to_the_base(base: Path, tmp_path: Path) -> None:
    model = making.load(base)
    before = model.get_input_embeddings().weight.clone()
    folder = making.noise(tmp_path / "embedding", base, 5, modules_to_save=["embed_tokens"])
    planted(model, shadow_plan(folder))
    assert torch.equal(model.get_input_embeddings().weight, before)
