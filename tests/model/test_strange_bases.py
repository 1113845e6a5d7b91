"""Whatever a base's folder holds, the start ends in one line that names it, or serves: values of other types
and sizes in config.json, files that are missing or cut, and methods of quantization that nobody here has.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service.errors import SettingsError
from service.model import loading
from service.model.build import build_runner
from service.settings import Settings
from tests import making

from . import families

SEEDS = range(60)
STRANGE: tuple[Any, ...] = (None, True, 0, -1, 3, 7.5, 1e300, "x", "", [], [0], [None, "y"], {}, {"a": 1})
METHODS = ("gptq", "awq", "eetq", "hqq", "torchao", "quark", "bitnet", "fbgemm_fp8", "auto-round", "fp8", "x")
FILES = ("config.json", "model.safetensors", "generation_config.json", "tokenizer.json")
TRUSTED = {"AutoConfig": "configuration.C", "AutoModelForCausalLM": "modeling.M"}
Change = Callable[[random.Random, dict[str, Any]], None]


def replace_value(dice: random.Random, config: dict[str, Any]) -> None:
    config[dice.choice(sorted(config))] = dice.choice(STRANGE)


def scale_value(dice: random.Random, config: dict[str, Any]) -> None:
    sizes = [name for name, value in config.items() if type(value) is int]
    config[dice.choice(sizes)] = dice.choice((0, 1, 2, 3, 5, 63, 1 << 20))


def drop_value(dice: random.Random, config: dict[str, Any]) -> None:
    del config[dice.choice(sorted(config))]


def change_type(dice: random.Random, config: dict[str, Any]) -> None:
    kinds = ["gpt2", "mamba", "bert", "llava", "whisper", "gemma3n", "nonsense", "", None]
    config["model_type"] = dice.choice(kinds)


def claim_method(dice: random.Random, config: dict[str, Any]) -> None:
    method = {"quant_method": dice.choice(METHODS), "bits": dice.choice((4, "four", None))}
    config["quantization_config"] = dice.choice((method, method, method, "gptq", [], 3, {"bits": 4}))


def ask_for_trust(dice: random.Random, config: dict[str, Any]) -> None:
    config |= {"model_type": dice.choice(("mine", "llama")), "auto_map": TRUSTED}


CHANGES: tuple[Change, ...] = (
    replace_value, replace_value, scale_value, drop_value, change_type, claim_method, ask_for_trust,
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("strange") / "base")


def damage(folder: Path, dice: random.Random) -> None:
    """Makes one to three changes of the config, and now and then takes or cuts a file."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    for _ in range(dice.randint(1, 3)):
        dice.choice(CHANGES)(dice, config)
    file.write_text(json.dumps(config))
    if dice.random() < 0.2:
        file, kept = folder / dice.choice(FILES), dice.choice((None, 0, 3, 1000))
        content = file.read_bytes()
        file.unlink()
        if kept is not None:
            file.write_bytes(content[:kept])


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.filterwarnings("ignore")
def test_any_folder_is_served_or_refused_in_one_line(
    seed: int, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    damage(folder, random.Random(seed))
    told = refusal_of(folder)
    assert told.startswith("ADAPTERD_") or not told
    assert "\n" not in told
    assert len(told) < 700
    assert "Traceback" not in capfd.readouterr().err


def refusal_of(folder: Path) -> str:
    """Why the base in this folder is not served; empty where it is. Raises whatever is no refusal."""
    chosen = {"device": "cpu", "dtype": "float32", "compile": "off", "max_rows": 4, "threads": 1, "kv_mb": 50}
    try:
        build_runner(Settings.model_validate(chosen | {"base": str(folder)}), loading.no_progress)
    except SettingsError as error:
        return str(error)
    return ""


def test_the_seeds_meet_every_kind_of_change_and_both_ends() -> None:
    """So that nobody takes a fuzz for more than it is."""
    met = set()
    for seed in SEEDS:
        dice = random.Random(seed)
        count = dice.randint(1, 3)
        config = {"model_type": "llama", "hidden_size": 64, "x": "y", "vocab_size": 9}
        for _ in range(count):
            change = dice.choice(CHANGES)
            met.add(change)
            change(dice, config)
    assert met == set(CHANGES)


@pytest.mark.parametrize("kind", ["llava", "qwen3_moe", "gemma3_text"])
@pytest.mark.filterwarnings("ignore")
def test_a_model_of_other_kinds_with_a_strange_part_is_refused_in_one_line(kind: str, tmp_path: Path) -> None:
    families.make_tiny(kind, tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    whole = json.loads(file.read_text())
    for seed in range(6):
        config = json.loads(json.dumps(whole))
        replace_value(random.Random(seed), config.get("text_config", config))
        file.write_text(json.dumps(config))
        told = refusal_of(tmp_path / "base")
        assert told.startswith("ADAPTERD_") or not told
        assert "\n" not in told


def test_a_models_own_code_is_never_run_and_nobody_is_asked(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question on the terminal"))
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    for file in ("configuration.py", "modeling.py"):
        (folder / file).write_text("raise SystemExit('its own code was run')")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": TRUSTED}))
    assert refusal_of(folder) == ""
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", "auto_map": TRUSTED}))
    assert "its own code, which is never run" in refusal_of(folder)
