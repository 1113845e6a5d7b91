"""Embeddings that were saved along count as the base's own however they were cast, and wherever the
base keeps them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma3Config

from service.catalog.validator import base_weights
from service.catalog.validator.base_weights import half_step, unchanged
from service.catalog.validator.check import validate_adapter
from service.catalog.validator.messages import ValidatedAdapter
from service.catalog.validator.skeleton import Skeleton
from service.errors import AdapterUnsupported

from ... import making

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SAVED = {"save_embedding_layers": True}


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    return making.tiny(tmp_path / "untied", tie_word_embeddings=False)


def saved_along(folder: Path, base: Path) -> Path:
    return making.noise(folder, base, 4, save=SAVED)


def copies(reading: ValidatedAdapter) -> int:
    return len([warning for warning in reading.warnings if "copy of the base's own" in warning])


def recast(base: Path, dtype: torch.dtype, scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Casts the base's file in place, its embeddings scaled before; what they were in float32."""
    file = base / "model.safetensors"
    weights = load_file(file)
    whole = {name: weights[name] * scale for name in (EMBEDDING, HEAD) if name in weights}
    save_file(
        {name: (whole.get(name, weight)).to(dtype) for name, weight in weights.items()},
        file,
        {"format": "pt"},
    )
    return whole


def with_embeddings(folder: Path, base: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """An adapter with these embeddings saved along."""
    plain = making.noise(folder, base, 4, save={"save_embedding_layers": False})
    return making.edit(
        plain, plain, weights=lambda own: own | {f"base_model.model.{k}": v for k, v in tensors.items()}
    )


# ---- where the base keeps them


def test_they_are_found_in_bin_shards(untied: Path, tmp_path: Path) -> None:
    adapter = saved_along(tmp_path / "a", untied)
    file = untied / "model.safetensors"
    weights, places = load_file(file), dict[str, str]()
    for number, part in enumerate((weights.keys() - {HEAD}, {HEAD})):
        name = f"pytorch_model-0000{number + 1}-of-00002.bin"
        torch.save({key: weights[key] for key in part}, untied / name)
        places |= dict.fromkeys(part, name)
    file.unlink()
    (untied / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    assert copies(validate_adapter(Skeleton(untied), adapter, 64)) == 2


def test_they_are_found_in_one_bin_file_beside_what_is_not_loaded(tmp_path: Path) -> None:
    base = making.tiny(tmp_path / "base", tie_word_embeddings=True)
    adapter = saved_along(tmp_path / "a", base)
    weights = load_file(base / "model.safetensors")
    torch.save(weights, base / "pytorch_model.bin")
    (base / "model.safetensors").rename(base / "consolidated.safetensors")
    save_file(
        {name: weight + 1 for name, weight in weights.items()},
        base / "consolidated.safetensors",
        {"format": "pt"},
    )
    assert copies(validate_adapter(Skeleton(base), adapter, 64)) == 2


def multimodal_config() -> Gemma3Config:
    text = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    text |= {"max_position_embeddings": 256, "pad_token_id": 0}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    tokens = {"image_token_index": 250, "boi_token_index": 246, "eoi_token_index": 247}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, **tokens)


@pytest.mark.filterwarnings("ignore")
def test_they_are_found_under_the_names_that_a_multimodal_base_has_in_its_files(tmp_path: Path) -> None:
    base = tmp_path / "base"
    with making.quiet():
        torch.manual_seed(4)
        AutoModelForCausalLM.from_config(multimodal_config()).float().save_pretrained(base)
    assert any(key.startswith("language_model.") for key in load_file(base / "model.safetensors")), (
        "names of today: a weak fixture"
    )
    adapter = making.noise(tmp_path / "a", base, 4, r".*language_model.*\.(q_proj|v_proj)", save=SAVED)
    names = {name for name in making.tensors(adapter) if "lora" not in name}
    embedding, head = "model.language_model.embed_tokens.weight", "lm_head.weight"
    assert names == {f"base_model.model.{embedding}", f"base_model.model.{head}"}
    assert copies(validate_adapter(Skeleton(base), adapter, 64)) == 2


def test_a_base_whose_files_hold_it_otherwise_is_said_so(untied: Path, tmp_path: Path) -> None:
    adapter = saved_along(tmp_path / "a", untied)
    file = untied / "model.safetensors"
    weights = load_file(file)
    save_file(weights | {HEAD: torch.zeros(*weights[HEAD].shape, dtype=torch.uint8)}, file, {"format": "pt"})
    with pytest.raises(AdapterUnsupported, match=r"lm_head\.weight cannot be compared with the base's own"):
        validate_adapter(Skeleton(untied), adapter, 64)


# ---- casts


DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("scale", [1.0, 1e-4], ids=["usual", "among float16's subnormals"])
@pytest.mark.parametrize("saved", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("trained", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("held", DTYPES.values(), ids=DTYPES)
def test_no_cast_on_the_way_makes_them_trained(
    untied: Path, tmp_path: Path, held: torch.dtype, trained: torch.dtype, saved: torch.dtype, scale: float
) -> None:
    """Of the base itself, and of a base that was made from it in another dtype."""
    whole = recast(untied, held, scale)
    skeleton = Skeleton(untied)
    sources = {"itself": {name: weight.to(held) for name, weight in whole.items()}}
    if saved != held:
        sources["what it was made from"] = whole
    for source, weights in sources.items():
        cast = {name: weight.to(trained).to(saved) for name, weight in weights.items()}
        assert (
            copies(validate_adapter(skeleton, with_embeddings(tmp_path / source, untied, cast), 64)) == 2
        ), source


def test_what_was_trained_is_refused_with_how_much(
    untied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_weights, "SLICE", 1000)
    adapter = saved_along(tmp_path / "a", untied)
    total = making.tensors(adapter)[f"base_model.model.{EMBEDDING}"].numel()

    def train(tensors: making.Tensors) -> None:
        tensors[f"base_model.model.{EMBEDDING}"][5, 5] += 0.5
        tensors[f"base_model.model.{EMBEDDING}"][-1, -1] -= 0.25

    trained = making.edit(adapter, tmp_path / "b", weights=train)
    with pytest.raises(
        AdapterUnsupported, match=rf"embed_tokens\.weight differs .* in 2 of {total} values, by 0\.5 at most"
    ):
        validate_adapter(Skeleton(untied), trained, 64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_of_one_dtype_the_smallest_step_is_a_difference(dtype: torch.dtype) -> None:
    held = torch.tensor([1.0, 0.001, 300.0]).to(dtype)
    assert unchanged(held, held).all()
    for ours in (
        held.float() + 2 * half_step(held.float(), dtype),
        held.float() - 2 * half_step(held.float(), dtype),
    ):
        assert not unchanged(ours.to(dtype), held).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_a_step_is_what_a_cast_may_change(dtype: torch.dtype) -> None:
    """At each value that the dtype has, subnormal ones too: a little less than half a step is lost
    in a cast, a little more is not.
    """
    bits = torch.arange(1 << 15, dtype=torch.int32).to(torch.int16)
    values = bits.view(dtype)
    values = values[
        values.isfinite() & (values.float() < torch.finfo(dtype).max) & (values.float() > 1e-30)
    ].float()
    step = half_step(values, dtype)
    assert torch.equal((values + step * 0.99).to(dtype).float(), values)
    assert not ((values + step * 1.01).to(dtype).float() == values).any()
    saved, held = values + step * 0.99, values.to(dtype)
    assert unchanged(saved, held).all()
    assert not unchanged(values + step * 1.01, held).any()
