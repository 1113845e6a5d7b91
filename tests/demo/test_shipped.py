"""The shipped demo adapters: small, whole, unlike each other, better than the base, and described
by the figures that were measured.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from service.demo import card
from service.demo.task import Task
from service.settings import DEMO_ADAPTERS

from .test_tasks import EACH, TASKS

DEMO = DEMO_ADAPTERS.parent
SMALL = 2_000_000
SHAPES = {
    "q_proj": (576, 576),
    "k_proj": (576, 192),
    "v_proj": (576, 192),
    "o_proj": (576, 576),
    "gate_proj": (576, 1536),
    "up_proj": (576, 1536),
    "down_proj": (1536, 576),
}


def folder(task: Task) -> Path:
    return DEMO_ADAPTERS / task.name


def config(task: Task) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder(task) / "adapter_config.json").read_text())
    return found


def tensors(task: Task) -> dict[str, tuple[str, list[int]]]:
    """Type and shape of every tensor, from the header."""
    with safe_open(str(folder(task) / "adapter_model.safetensors"), framework="np") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (part.get_dtype(), part.get_shape()) for key, part in slices.items()}


def expected(task: Task) -> dict[str, tuple[str, list[int]]]:
    """What PEFT writes for the recipe on the base's thirty layers."""
    found: dict[str, tuple[str, list[int]]] = {}
    for layer in range(30):
        for target in task.recipe.targets:
            block = "self_attn" if target in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
            stem = f"base_model.model.model.layers.{layer}.{block}.{target}."
            width, height = SHAPES[target]
            found[stem + "lora_A.weight"] = ("BF16", [task.recipe.rank, width])
            found[stem + "lora_B.weight"] = ("BF16", [height, task.recipe.rank])
            if task.recipe.dora:
                found[stem + "lora_magnitude_vector"] = ("BF16", [height])
    return found


def test_every_task_ships_and_nothing_else_does() -> None:
    assert (
        {path.name for path in DEMO_ADAPTERS.iterdir() if path.is_dir()}
        == {task.name for task in TASKS}
        == set(card.read_results(DEMO))
    )
    for task in TASKS:
        assert {path.name for path in folder(task).iterdir()} == {
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
        }


@EACH
def test_an_adapter_is_small_and_has_every_tensor_in_bfloat16(task: Task) -> None:
    assert (folder(task) / "adapter_model.safetensors").stat().st_size <= SMALL
    assert tensors(task) == expected(task)


@EACH
def test_the_config_is_the_recipe_on_the_public_base(task: Task) -> None:
    found, recipe = config(task), task.recipe
    assert found["base_model_name_or_path"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert found["target_modules"] == sorted(recipe.targets)
    assert (found["r"], found["lora_alpha"]) == (recipe.rank, recipe.alpha)
    assert (found["use_rslora"], found["use_dora"]) == (recipe.rslora, recipe.dora)


@EACH
def test_no_file_names_a_place_on_the_machine_that_made_it(task: Task) -> None:
    for path in folder(task).glob("[aR]*.[jm]*"):
        text = path.read_text()
        assert not [place for place in ("/home", "/tmp", "/root", "/work", "\\Users") if place in text]


def test_the_adapters_are_of_different_kinds() -> None:
    recipes = [task.recipe for task in TASKS]
    assert len(TASKS) >= 4
    assert (
        len({recipe.rank for recipe in recipes})
        == len({recipe.targets for recipe in recipes})
        == len(recipes)
    )
    assert [recipe.rslora for recipe in recipes].count(True) == 1
    assert [recipe.dora for recipe in recipes].count(True) == 1


@EACH
def test_an_adapter_clearly_beats_the_base_even_when_that_is_told_in_words(task: Task) -> None:
    result = card.read_results(DEMO)[task.name]
    measure = next(iter(task.measures))
    assert result["items"] == task.tests >= 100
    assert result["adapter"][measure] >= 0.8
    assert (
        result["adapter"][measure] >= max(result["base"][measure], result["base_instructed"][measure]) + 0.4
    )
    assert all(
        result["adapter"][one] >= result[base][one]
        for one in task.measures
        for base in ("base", "base_instructed")
    )


@EACH
def test_the_sample_shows_a_change(task: Task) -> None:
    sample = card.read_results(DEMO)[task.name]["sample"]
    measure = next(iter(task.measures))
    assert sample["base"] != sample["adapter"]
    assert task.score(sample["adapter"], sample["adapter"])[measure] == 1


@EACH
def test_the_readme_gives_the_measured_figures(task: Task) -> None:
    text = (folder(task) / "README.md").read_text()
    result = card.read_results(DEMO)[task.name]
    assert text == card.make_readme(task, result)
    for measure in task.measures:
        assert f"| {round(100 * result['adapter'][measure])} % |" in text
    assert f"{result['items']} held-out items" in text
    assert f"Trained in {result['seconds']} s" in text


@pytest.mark.parametrize("apostrophes", ["It's here", "'' '"])
def test_the_example_survives_a_shell(apostrophes: str) -> None:
    """A prompt with an apostrophe once ended the quoted body of the curl line early."""
    body = shlex.split(card.curl_command(replace(TASKS[0], sample=apostrophes)).replace("\\\n", " "))[-1]
    assert json.loads(body)["inputs"] == apostrophes


def test_results_are_kept_beside_those_of_other_tasks(tmp_path: Path) -> None:
    assert card.read_results(tmp_path) == {}
    one, other = TASKS[0], TASKS[1]
    for task in (one, other, one):
        (tmp_path / "adapters" / task.name).mkdir(parents=True, exist_ok=True)
        result = card.read_results(DEMO)[task.name]
        card.keep_result(tmp_path, task.name, {"seconds": result["seconds"]})
        card.keep_result(tmp_path, task.name, result)
        card.write_readme(tmp_path, task)
        assert (tmp_path / "adapters" / task.name / "README.md").read_text() == card.make_readme(task, result)
    assert card.read_results(tmp_path) == {
        task.name: card.read_results(DEMO)[task.name] for task in (one, other)
    }
