"""The tree shows each adapted layer once, however many there are of it."""

from __future__ import annotations

from pathlib import Path

from service.catalog.architecture import ModuleNode, draw_architecture
from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import LoraLayerSpec

from .. import making


def stack(count: int) -> ModuleNode:
    layer = (
        ModuleNode("q", "Linear(in_features=8, out_features=6)", shape=(8, 6)),
        ModuleNode("norm", "RMSNorm(8)"),
    )
    return ModuleNode(
        "",
        "Model",
        (
            ModuleNode(
                "layers", "ModuleList", tuple(ModuleNode(str(i), "Layer", layer) for i in range(count))
            ),
        ),
    )


def patch(i: int, rank: int = 4, magnitude: str | None = None) -> LoraLayerSpec:
    return LoraLayerSpec(f"layers.{i}.q", rank, 2.0, "a", "b", magnitude)


def test_equal_layers_are_folded_and_others_kept_apart() -> None:
    text = draw_architecture(stack(6), [patch(0), patch(1), patch(2), patch(5)], 0.1)
    assert "(0-2, 5): 4 x Layer" in text
    assert "(3-4): 2 x Layer" in text
    assert text.count("LoRA(rank=4, scaling=2, dropout=0.1)") == 1
    assert "(base_layer): Linear(in_features=8, out_features=6)" in text
    assert "(lora_B): Linear(in_features=4, out_features=6, bias=False)" in text


def test_many_kinds_of_layers_are_counted_after_the_first_few() -> None:
    text = draw_architecture(stack(80), [patch(i, rank=i + 1) for i in range(80)], 0)
    assert "(2-79): as above" in text
    assert len(text.splitlines()) < 30


def test_the_magnitude_of_dora_is_shown() -> None:
    assert "(lora_magnitude_vector): Parameter(6)" in draw_architecture(
        stack(1), [patch(0, magnitude="m")], 0
    )


def test_what_no_layer_shows_is_said() -> None:
    assert (
        draw_architecture(stack(1), [], 0, ["IA3"])
        .splitlines()[-1]
        .startswith("with IA3, which PEFT itself runs")
    )


def test_a_real_base_and_adapter(skeleton: Skeleton, base: Path, tmp_path: Path) -> None:
    adapter = validate_adapter(
        skeleton,
        making.noise(
            tmp_path / "a",
            base,
            1,
            "all-linear",
            use_dora=True,
            rank_pattern={"layers.1.self_attn.q_proj": 16},
        ),
        64,
    ).adapter
    lines = draw_architecture(skeleton.make_tree(), adapter.patches, 0).splitlines()
    assert lines[0] == "LlamaForCausalLM"
    assert len(lines) < 120
    assert sum("DoRA(rank=4" in line for line in lines) == 13
    assert sum("DoRA(rank=16" in line for line in lines) == 1
