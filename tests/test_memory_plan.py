"""`plan` says what the start will find, from a config alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from service import memory_plan
from service.commands import run_command
from service.core import capacity
from service.core.base_info import BLOCK_TOKENS
from service.model import kv
from service.model.build import build_runner
from service.settings import Settings
from tests import making
from tests.model.test_parity import DELTA, FAMILIES, STATEFUL, random_base

LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def config_file(folder: Path, **changes: object) -> str:
    (folder / "config.json").write_text(json.dumps(LLAMA_8B | changes), encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize(("memory", "tokens"), [("24GB", 90_000), ("48GB", 250_000), ("80GB", 460_000)])
def test_an_8b_base_in_nf4_leaves_room_for_so_many_tokens(
    memory: str, tokens: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["plan", "--base", config_file(tmp_path), "--memory", memory, "--pool-rank", "512"]
    assert run_command([*arguments, "--format", "json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["kv_tokens"] > tokens
    assert plan["kv_bytes_per_token"] == 131_072
    assert plan["weights_bytes"] == pytest.approx(5.70e9, rel=0.01)
    longest = plan["sequences"][-1]
    assert longest["context"] == min(131_072, plan["kv_tokens"])
    assert longest["count"] == plan["kv_tokens"] // longest["context"]
    assert run_command(arguments) == 0
    assert f"KV holds {plan['kv_tokens']:,} tokens" in capsys.readouterr().out


def test_a_base_that_does_not_fit_has_no_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["plan", "--base", config_file(tmp_path), "--memory", "2GB", "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["kv_tokens"] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("--memory", "banana"), ("--base", "no/such/config.json"), ("--context", "999999")],
)
def test_a_wrong_option_is_one_line_that_names_it(
    option: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"--base": config_file(tmp_path), "--memory": "24GB"} | {option: value}
    assert run_command(["plan", *(part for pair in given.items() for part in pair)]) == 2
    error = capsys.readouterr().err
    assert option in error
    assert error.count("\n") == 1


def test_a_family_that_is_not_served_is_refused_by_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = config_file(tmp_path, model_type="mamba", num_hidden_layers=2)
    assert run_command(["plan", "--base", base, "--memory", "24GB"]) == 2
    assert "MambaForCausalLM is not supported" in capsys.readouterr().err


def test_states_are_no_room_for_tokens(tmp_path: Path) -> None:
    sizes = DELTA | {"linear_conv_kernel_dim": 4, "num_hidden_layers": 4}
    shape = memory_plan.read_shape(config_file(tmp_path, **sizes, model_type="qwen3_5_text"), "none")
    few, many = (memory_plan.plan_memory(shape, 40 * 10**9, 8, rows, None) for rows in (1, 33))
    lost = 32 * 2 * shape.state_bytes
    assert many["states_bytes"] - few["states_bytes"] == lost > 0
    assert few["kv_bytes"] - many["kv_bytes"] == pytest.approx(0.9 * lost, rel=0.01)
    assert "states" in memory_plan.format_plan(many)


def make_base(folder: Path, kind: str) -> Path:
    if kind == "llama":
        return making.tiny(folder)
    sizes, _ = (FAMILIES | STATEFUL)[kind]
    return random_base(folder, kind, sizes)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["llama", "deepseek_v3", "gpt_oss", "qwen3_5_text", "bamba", "mamba2"])
def test_the_plan_and_the_start_have_the_same_numbers(kind: str, tmp_path: Path) -> None:
    """Of a base in bfloat16: its layers, its pool, the bytes of a token and of states, and the blocks for
    some memory.
    """
    base = make_base(tmp_path / "base", kind)
    settings = Settings(base=str(base), device="cpu", dtype="bfloat16", kv_mb=3, max_rows=2, compile="off")
    runner, card = build_runner(settings, lambda stage, fraction: None)
    shape = memory_plan.read_shape(str(base), "none")
    assert shape.linears == card.linears
    assert shape.kv_bytes_per_token == kv.bytes_per_position(runner.attention, runner.model.dtype)
    assert shape.weights_bytes == pytest.approx(card.resident_bytes["bfloat16"], rel=0.005)
    assert shape.state_bytes == card.state_bytes
    blocks = capacity.count_kv_blocks(3 * 10**6, shape.kv_bytes_per_token, 2, shape.context)
    assert card.kv_blocks == blocks
    assert card.context == min(shape.context, card.kv_blocks * BLOCK_TOKENS)
