"""What is read equals what PEFT would load, and whatever differs from it is refused by name."""

from __future__ import annotations

import json
import math
import socket
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora.layer import LoraLayer

from service.catalog import facts
from service.catalog.validator import peft_config
from service.catalog.validator.check import validate_adapter
from service.catalog.validator.header import WEIGHTS
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import ExecutionPath
from service.core.manifest import File, Manifest, compute_digest, read_manifest
from service.errors import AdapterInvalid, AdapterUnsupported

from ... import kinds, making

HEAD = "base_model.model."
KNOWN: Manifest = (File(making.CONFIG, 1, "1"), File(making.WEIGHTS, 1, "2"))
Q0 = "layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def problems(skeleton: Skeleton, folder: Path, kind: type[AdapterInvalid] = AdapterInvalid) -> str:
    with pytest.raises(kind) as caught:
        validate_adapter(skeleton, folder, 64)
    assert str(folder) not in str(caught.value.details)
    return "\n".join(caught.value.problems)


# ---- equal to PEFT

RECIPES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"r": 16, "use_rslora": True},
    "alpha pattern": {"alpha_pattern": {Q0: 64}},
    "rank pattern": {"rank_pattern": {Q0: 16}},
    "all-linear": {"targets": "all-linear"},
    "regex": {"targets": r".*layers\.1\..*(q_proj|v_proj)"},
    "one layer": {"layers_to_transform": [1]},
    "excluded": {"exclude_modules": ["layers.0.self_attn.v_proj"]},
    "dora": {"use_dora": True},
    "head": {"targets": ("lm_head", "q_proj")},
    "eva": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_patches_are_the_layers_that_peft_makes(
    skeleton: Skeleton, base: Path, tmp_path: Path, recipe: dict[str, Any]
) -> None:
    folder = making.noise(tmp_path / "a", base, 3, **recipe)
    adapter = validate_adapter(skeleton, folder, 64).adapter
    layers = {
        name.removeprefix(HEAD): one
        for name, one in making.served(base, folder).named_modules()
        if isinstance(one, LoraLayer)
    }
    assert {(p.module, p.rank, p.scaling) for p in adapter.patches} == {
        (n, one.r["default"], one.scaling["default"]) for n, one in layers.items()
    }
    weights = making.tensors(folder)
    for patch in adapter.patches:
        layer = layers[patch.module]
        assert torch.equal(weights[patch.a], layer.lora_A["default"].weight)
        assert torch.equal(weights[patch.b], layer.lora_B["default"].weight)
        assert (patch.magnitude is not None) == bool(layer.lora_magnitude_vector)
        if patch.magnitude:
            assert torch.equal(weights[patch.magnitude], layer.lora_magnitude_vector["default"].weight)
    assert adapter.lane is ExecutionPath.POOL
    assert adapter.rank == max(patch.rank for patch in adapter.patches)


def test_the_first_pattern_that_matches_counts_in_the_order_of_the_file(
    skeleton: Skeleton, base: Path, plain: Path, tmp_path: Path
) -> None:
    for i, order in enumerate(
        ([("q_proj", 2), (r"layers\.0\..*", 64)], [(r"layers\.0\..*", 64), ("q_proj", 2)])
    ):
        folder = making.edit(plain, tmp_path / str(i), {"alpha_pattern": dict(order)})
        layers = {
            name.removeprefix(HEAD): one
            for name, one in making.served(base, folder).named_modules()
            if isinstance(one, LoraLayer)
        }
        assert {p.module: p.scaling for p in validate_adapter(skeleton, folder, 64).adapter.patches} == {
            name: one.scaling["default"] for name, one in layers.items()
        }


def test_null_targets_are_what_peft_takes_for_the_architecture(
    skeleton: Skeleton, plain: Path, tmp_path: Path
) -> None:
    reading = validate_adapter(skeleton, making.edit(plain, tmp_path / "a", {"target_modules": None}), 64)
    assert reading.facts["target_modules"] == ["q_proj", "v_proj"]


def test_reading_does_not_depend_on_what_was_read_before(
    base: Path, plain: Path, other: Path, tmp_path: Path
) -> None:
    used = Skeleton(base)
    dora = making.noise(tmp_path / "dora", base, 4, "all-linear", use_dora=True)
    for folder in (dora, other, plain):
        validate_adapter(used, folder, 64)
    assert validate_adapter(used, plain, 64) == validate_adapter(Skeleton(base), plain, 64)
    assert not any(isinstance(module, LoraLayer) for module in used.model.modules())


def test_the_digest_is_that_of_the_folder(skeleton: Skeleton, plain: Path) -> None:
    adapter = validate_adapter(skeleton, plain, 64).adapter
    assert (adapter.digest, adapter.files) == (compute_digest(read_manifest(plain)), read_manifest(plain))


def test_conv1d_layers_are_read_too(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    with making.quiet():
        GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    made = peft.LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True, task_type="CAUSAL_LM")
    folder = making.adapter(tmp_path / "a", tmp_path / "gpt2", made, seed=1)
    row = validate_adapter(Skeleton(tmp_path / "gpt2"), folder, 64).facts["by_module"][0]
    assert (row["name"], row["in_features"], row["out_features"], row["count"]) == ("c_attn", 32, 96, 2)


@pytest.mark.parametrize("kind", ["trainable_token_indices", "TRAINABLE_TOKENS"])
@pytest.mark.parametrize("token", [269, -1, 10**12])
@pytest.mark.filterwarnings("ignore")
def test_trained_tokens_that_the_base_does_not_have_are_named(
    skeleton: Skeleton, base: Path, tmp_path: Path, kind: str, token: int
) -> None:
    key = "token_indices" if kind.isupper() else kind
    folder = kinds.SHADOW[kind](tmp_path / "a", base)
    held = json.loads((folder / making.CONFIG).read_text())[key]
    odd = making.edit(folder, tmp_path / "odd", {key: [*held[:-1], token]})
    assert f"token {token} of model.embed_tokens is none of its 269" in problems(skeleton, odd)


@pytest.mark.parametrize("value", ["x", 1.5, [1], True])
@pytest.mark.parametrize("key", ["rank_pattern", "alpha_pattern"])
def test_patterns_of_any_type_that_are_no_objects_are_named(
    skeleton: Skeleton, base: Path, tmp_path: Path, key: str, value: Any
) -> None:
    folder = making.edit(kinds.SHADOW["LOHA"](tmp_path / "a", base), tmp_path / "odd", {key: value})
    assert f"`{key}` must be an object or null" in problems(skeleton, folder)


# ---- spellings

SPELLINGS: dict[str, Callable[[str], str]] = {
    "one model short": lambda key: key.replace(HEAD + "model.", HEAD),
    "bare": lambda key: key.removeprefix(HEAD),
    "named": lambda key: key.replace(".weight", ".default.weight"),
    "ddp": lambda key: "module." + key,
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_known_spellings_of_keys_land_on_the_same_layers(
    skeleton: Skeleton, plain: Path, tmp_path: Path, spell: Callable[[str], str]
) -> None:
    folder = making.edit(
        plain, tmp_path / "a", weights=lambda t: {spell(key): value for key, value in t.items()}
    )
    adapter, want = validate_adapter(skeleton, folder, 64), validate_adapter(skeleton, plain, 64).adapter
    ours, theirs = making.tensors(folder), making.tensors(plain)
    for patch, wanted in zip(adapter.adapter.patches, want.patches, strict=True):
        assert (patch.module, patch.scaling) == (wanted.module, wanted.scaling)
        assert torch.equal(ours[patch.a], theirs[wanted.a])
        assert torch.equal(ours[patch.b], theirs[wanted.b])
    assert "keys were read as" in adapter.warnings[0]


def test_an_unknown_spelling_is_refused_with_counts(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    folder = making.edit(
        plain, tmp_path / "a", weights=lambda t: {"x." + key: value for key, value in t.items()}
    )
    with pytest.raises(AdapterInvalid) as caught:
        validate_adapter(skeleton, folder, 64)
    assert caught.value.details is not None
    assert (caught.value.details["matched"], caught.value.details["total"]) == (0, 16)


# ---- what the file lacks, or has too much of


def test_a_deeper_siblings_adapter_is_refused(skeleton: Skeleton, tmp_path: Path) -> None:
    deep = making.noise(tmp_path / "a", making.tiny(tmp_path / "deep", num_hidden_layers=4), 4)
    told = problems(skeleton, deep)
    assert "8 of 16" in told
    assert "layers.2" in told


@pytest.mark.parametrize(
    ("config", "drop", "word"),
    [
        (None, "lora_B", "lora_B"),
        (None, "layers.1", "layers.1"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, None, "k_proj"),
    ],
)
def test_a_part_that_is_missing_is_named(
    skeleton: Skeleton, plain: Path, tmp_path: Path, config: Any, drop: str | None, word: str
) -> None:
    keep = None if drop is None else (lambda t: {key: value for key, value in t.items() if drop not in key})
    assert word in problems(skeleton, making.edit(plain, tmp_path / "a", config, keep))


def test_another_base_s_shapes_are_refused_with_both_numbers(skeleton: Skeleton, tmp_path: Path) -> None:
    narrow = making.noise(
        tmp_path / "a", making.tiny(tmp_path / "narrow", hidden_size=32, intermediate_size=64), 4
    )
    told = problems(skeleton, narrow)
    assert "[4, 32]" in told
    assert "[4, 64]" in told


def test_a_resized_vocabulary_is_refused_with_both_sizes(
    skeleton: Skeleton, base: Path, tmp_path: Path
) -> None:
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    grown = making.noise(
        tmp_path / "a",
        making.tiny(tmp_path / "grown", vocab_size=size + 4),
        4,
        save={"save_embedding_layers": True},
    )
    assert f"from {size} to {size + 4}" in problems(skeleton, grown)


def test_embeddings_saved_along_are_let_pass_only_when_they_are_the_base_s_own(
    skeleton: Skeleton, base: Path, tmp_path: Path
) -> None:
    saved = making.noise(tmp_path / "a", base, 4, save={"save_embedding_layers": True})
    reading = validate_adapter(skeleton, saved, 64)
    assert reading.facts["parameters"] == 1792
    assert len([warning for warning in reading.warnings if "copy of the base's own" in warning]) == 2

    def train(tensors: making.Tensors) -> None:
        tensors[HEAD + "model.embed_tokens.weight"][5, 5] += 0.5

    assert "embed_tokens" in problems(
        skeleton, making.edit(saved, tmp_path / "b", weights=train), AdapterUnsupported
    )


# ---- values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("part", ["layers.0.self_attn.q_proj.lora_A", "layers.1.self_attn.v_proj.lora_B"])
def test_the_first_tensor_that_is_not_finite_is_named(
    skeleton: Skeleton, plain: Path, tmp_path: Path, part: str, value: float
) -> None:
    def spoil(tensors: making.Tensors) -> None:
        (name,) = [key for key in tensors if part in key]
        tensors[name].view(-1)[3] = value

    assert part in problems(skeleton, making.edit(plain, tmp_path / "a", weights=spoil))


def test_values_of_unchanged_files_are_not_looked_at_again(
    skeleton: Skeleton, plain: Path, tmp_path: Path
) -> None:
    folder = making.edit(
        plain, tmp_path / "a", weights=lambda t: {key: value * math.nan for key, value in t.items()}
    )
    assert validate_adapter(skeleton, folder, 64, known=KNOWN).adapter.digest == compute_digest(KNOWN)


def test_dtypes_that_are_no_floats_are_refused(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    folder = making.edit(
        plain, tmp_path / "a", weights=lambda t: {key: value.to(torch.int8) for key, value in t.items()}
    )
    assert "I8" in problems(skeleton, folder)


def zeros(part: str) -> making.TensorEdit:
    return lambda tensors: {key: value * 0 if part in key else value for key, value in tensors.items()}


IDLE: dict[str, tuple[making.ConfigEdit | None, making.TensorEdit | None]] = {
    "no B": (None, zeros("lora_B")),
    "no A": (None, zeros("lora_A")),
    "no alpha": ({"lora_alpha": 0}, None),
    "one of them each": ({"alpha_pattern": {"v_proj": 0}}, zeros("q_proj.lora_A")),
}


@pytest.mark.parametrize("known", [(), KNOWN])
@pytest.mark.parametrize(("config", "weights"), IDLE.values(), ids=IDLE)
def test_an_adapter_that_changes_nothing_is_a_warning_after_a_restart_too(
    skeleton: Skeleton, plain: Path, tmp_path: Path, config: Any, weights: Any, known: Manifest
) -> None:
    folder = making.edit(plain, tmp_path / "a", config, weights)
    assert "says what the base says" in validate_adapter(skeleton, folder, 64, known).warnings[0]


@pytest.mark.parametrize(
    ("config", "weights"), [(None, zeros("layers.0")), ({"alpha_pattern": {"v_proj": 0}}, None)]
)
def test_one_layer_that_changes_something_is_enough(
    skeleton: Skeleton, plain: Path, tmp_path: Path, config: Any, weights: Any
) -> None:
    assert validate_adapter(skeleton, making.edit(plain, tmp_path / "a", config, weights), 64).warnings == ()


def test_values_beyond_float32_are_refused(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    folder = making.edit(
        plain, tmp_path / "a", weights=lambda t: {key: value.double() * 1e300 for key, value in t.items()}
    )
    assert "infinite" in problems(skeleton, folder)


HEADERS: dict[str, Callable[[str], bytes]] = {
    "metadata that is no object": lambda text: f'{{"__metadata__": 5, {text[1:]}'.encode(),
    "metadata that is no text": lambda text: f'{{"__metadata__": {{"a": {{}}}}, {text[1:]}'.encode(),
    "half a character": lambda text: text.replace("base_model", r"\ud800", 1).encode(),
    "bytes that are no character": lambda text: text.replace("base_model", "\ud800", 1).encode(
        "utf-8", "surrogatepass"
    ),
    "UTF-16": lambda text: text.encode("utf-16"),
}


@pytest.mark.parametrize("made", HEADERS.values(), ids=HEADERS)
def test_a_header_that_the_worker_could_not_read_is_refused(
    skeleton: Skeleton, plain: Path, tmp_path: Path, made: Callable[[str], bytes]
) -> None:
    file = making.edit(plain, tmp_path / "a") / WEIGHTS
    length = int.from_bytes(file.read_bytes()[:8], "little")
    told = json.loads(file.read_bytes()[8 : 8 + length])
    told.pop("__metadata__")
    header = made(json.dumps(told))
    file.write_bytes(len(header).to_bytes(8, "little") + header + file.read_bytes()[8 + length :])
    problems(skeleton, tmp_path / "a").encode()


# ---- configs


@pytest.mark.parametrize(
    "keys",
    [
        {"future_cfg": None},
        {"enable_lora": None, "merge_weights": False},
        {"x": []},
        {"rank_pattern": None, "use_dora": None},
    ],
)
def test_unknown_keys_without_a_value_mean_nothing(
    skeleton: Skeleton, plain: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    assert validate_adapter(skeleton, making.edit(plain, tmp_path / "a", keys), 64).warnings == ()


def test_an_unknown_key_with_a_value_is_a_warning_that_names_it(
    skeleton: Skeleton, plain: Path, tmp_path: Path
) -> None:
    assert (
        "use_superlora"
        in validate_adapter(
            skeleton, making.edit(plain, tmp_path / "a", {"use_superlora": True}), 64
        ).warnings[0]
    )


def test_what_peft_says_of_a_type_that_it_has_changed_since_is_said(
    skeleton: Skeleton, base: Path, tmp_path: Path
) -> None:
    """OFT before 0.18, and before 0.14."""
    folder = kinds.SHADOW["OFT"](tmp_path / "a", base)
    assert validate_adapter(skeleton, folder, 64).warnings == ()
    old = making.edit(folder, tmp_path / "b", {"peft_version": "0.17.1"})
    assert "slightly changed" in validate_adapter(skeleton, old, 64).warnings[0]
    older = making.edit(
        folder,
        tmp_path / "c",
        lambda config: {key: value for key, value in config.items() if key != "oft_block_size"},
    )
    assert "0.14.0" in problems(skeleton, older)


def test_a_config_of_2023_is_read(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    old = (
        "peft_type",
        "base_model_name_or_path",
        "r",
        "lora_alpha",
        "lora_dropout",
        "target_modules",
        "task_type",
        "bias",
    )
    folder = making.edit(plain, tmp_path / "a", lambda config: {key: config[key] for key in old})
    assert (
        validate_adapter(skeleton, folder, 64).adapter.patches
        == validate_adapter(skeleton, plain, 64).adapter.patches
    )


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"target_modules": ["no_such_proj"]}, "no_such_proj"),
        ({"init_lora_weights": "nonsense"}, "nonsense"),
        ({"eva_config": 5}, "EvaConfig"),
        ({"layers_to_transform": [7]}, "adapter_config.json"),
        ({"lora_dropout": "much"}, "lora_dropout"),
    ],
)
def test_what_peft_refuses_is_refused_with_its_reason(
    skeleton: Skeleton, plain: Path, tmp_path: Path, config: dict[str, Any], word: str
) -> None:
    assert word in problems(skeleton, making.edit(plain, tmp_path / "a", config))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga"])
def test_initialisations_that_change_the_base_are_refused(
    skeleton: Skeleton, plain: Path, tmp_path: Path, start: str
) -> None:
    assert start in problems(
        skeleton, making.edit(plain, tmp_path / "a", {"init_lora_weights": start}), AdapterUnsupported
    )


FEATURES: dict[str, dict[str, Any]] = {
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [7, 8, 9]},
    "target_parameters": {"targets": (), "target_parameters": ["mlp.down_proj.weight"]},
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "LoRA on Embedding": {"targets": ("embed_tokens", "q_proj")},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_features_beyond_the_pool_run_in_the_shadow_lane_or_are_refused_by_name(
    skeleton: Skeleton, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, feature: str
) -> None:
    folder = making.noise(tmp_path / "a", base, 3, **FEATURES[feature], save={"save_embedding_layers": False})
    monkeypatch.setattr(peft_config, "SHADOW_FEATURES", frozenset())
    assert f"`{feature}`" in problems(skeleton, folder, AdapterUnsupported)
    monkeypatch.setattr(peft_config, "SHADOW_FEATURES", frozenset({feature}))
    adapter = validate_adapter(skeleton, folder, 64).adapter
    assert (adapter.lane, adapter.rank, adapter.patches) == (ExecutionPath.SHADOW, 0, ())


SHOWN: dict[str, tuple[dict[str, float] | None, list[str], int, int]] = {
    "embedding": ({"min": 4, "max": 4}, ["embed_tokens", "q_proj"], 3, 2),
    "DoRA beside a saved head": ({"min": 4, "max": 4}, ["q_proj", "v_proj"], 4, 2),
    "target_parameters": ({"min": 4, "max": 4}, ["down_proj"], 2, 2),
    "IA3": (None, ["down_proj", "k_proj", "v_proj"], 6, 2),
    "LN_TUNING": (None, ["input_layernorm"], 2, 2),
    "OFT": (None, ["q_proj", "v_proj"], 4, 2),
    "TRAINABLE_TOKENS": (None, ["embed_tokens", "lm_head"], 2, 0),  # tied
}


@pytest.mark.parametrize("kind", SHOWN)
def test_what_runs_beside_the_batch_is_told_by_its_layers_too(
    skeleton: Skeleton, base: Path, tmp_path: Path, kind: str
) -> None:
    told = validate_adapter(skeleton, kinds.SHADOW[kind](tmp_path / "a", base), 64).facts
    assert (told["rank"], told["target_modules"], told["modules"], told["layers"]) == SHOWN[kind]
    rows = sum(row["count"] for row in told["by_module"])
    assert rows == (told["modules"] if told["rank"] else 0)


def test_an_activated_adapter_runs_in_the_pool_if_that_is_all_it_asks_for(
    skeleton: Skeleton, base: Path, tmp_path: Path
) -> None:
    adapter = validate_adapter(skeleton, kinds.POOL["activated"](tmp_path / "a", base), 64).adapter
    assert (adapter.lane, adapter.rank, adapter.invocation) == (ExecutionPath.POOL, 4, tuple(kinds.CALL))
    told = problems(
        skeleton,
        kinds.REFUSED["A12 activated with a shadow feature"][0](tmp_path / "b", base),
        AdapterUnsupported,
    )
    assert told == "`alora_invocation_tokens` is not served beside lora_bias"


OTHERS: dict[str, Callable[[], peft.PeftConfig]] = {
    "IA3": lambda: peft.IA3Config(task_type="CAUSAL_LM"),
    "VERA": lambda: peft.VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "o_proj"]),
    "LOHA": lambda: peft.LoHaConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "LOKR": lambda: peft.LoKrConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"]),
    "PROMPT_TUNING": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
    "PREFIX_TUNING": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_peft_types_are_validated_against_the_base_too(
    skeleton: Skeleton, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    folder = making.adapter(tmp_path / "a", base, OTHERS[kind](), seed=1)
    monkeypatch.setattr(peft_config, "SHADOW_FEATURES", frozenset())
    assert kind in problems(skeleton, folder, AdapterUnsupported)
    monkeypatch.setattr(peft_config, "SHADOW_FEATURES", frozenset({kind}))
    peft_config.inject_config.cache_clear()
    assert validate_adapter(skeleton, folder, 64).adapter.lane is ExecutionPath.SHADOW
    first = next(iter(making.tensors(folder)))
    cut = making.edit(folder, tmp_path / "b", weights=lambda t: {**t, first: t[first][..., :-1]})
    assert first in problems(skeleton, cut)


@pytest.mark.parametrize(
    ("config", "word"), [({"task_type": "SEQ_CLS"}, "SEQ_CLS"), ({"peft_type": "NEWLORA"}, "NEWLORA")]
)
def test_what_is_no_causal_language_model_or_unknown_is_unsupported(
    skeleton: Skeleton, plain: Path, tmp_path: Path, config: Any, word: str
) -> None:
    assert word in problems(skeleton, making.edit(plain, tmp_path / "a", config), AdapterUnsupported)


def test_a_huge_rank_allocates_nothing(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    folder = making.edit(plain, tmp_path / "a", {"r": 50_000_000})
    with pytest.raises(AdapterInvalid, match=r"shape \[4, 64\]"):
        validate_adapter(skeleton, folder, 1 << 60)
    assert "over the limit of 64" in problems(skeleton, folder)


# ---- forecasts


def test_a_forecast_from_a_config_alone(tmp_path: Path) -> None:
    llama = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
    }
    llama |= {
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    (tmp_path / "llama.json").write_text(json.dumps(llama))
    bare = Skeleton(tmp_path / "llama.json")
    told = facts.forecast_size(
        bare.list_linears(), bare.parameters, 32, ["q_proj", "k_proj", "v_proj", "o_proj"]
    )
    assert (told["parameters"], told["megabytes"], told["percent_of_base"]) == (27_262_976, 109.05, 0.34)
    assert told["base"] == {"parameters": 8_030_261_248, "float32_megabytes": 32121.04}
    assert {row["name"]: row["lora_B"] for row in told["by_module"]}["k_proj"] == [1024, 32]


def test_reading_warns_nobody(skeleton: Skeleton, plain: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        peft_config.inject_config.cache_clear()
        validate_adapter(skeleton, making.edit(plain, tmp_path / "a", {"init_lora_weights": "eva"}), 64)


ENDLESS = "(" + "(.*)*" * 12 + ")x"


@pytest.mark.parametrize(
    "config",
    [{"target_modules": ENDLESS}, {"exclude_modules": ENDLESS}, {"rank_pattern": {ENDLESS: 4}}],
    ids=list,
)
def test_patterns_that_take_long_to_match_are_given_up(
    skeleton: Skeleton, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any]
) -> None:
    """Where PEFT itself runs an adapter, the worker would have to match them again, beside its
    steps.
    """
    monkeypatch.setattr(peft_config, "APPLYING_S", 0.3)
    assert "more than 0.3 s of processor time" in problems(
        skeleton, making.edit(plain, tmp_path / "endless", config)
    )
