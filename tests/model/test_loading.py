"""A base's files: what is whole is loaded as it is stored, and what is not is refused in one line
that names what is wrong.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from service import durable
from service.errors import SettingsError
from service.model import loading
from service.model.build import build_runner
from service.model.runner import ModelRunner
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver
from .test_parity import SIZES, distance, prompts, random_base

Tensors = dict[str, torch.Tensor]
UP, NORM, FILE = "model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.safetensors"


def start(folder: Path | str, **settings: Any) -> ModelRunner:
    plain = {"device": "cpu", "dtype": "float32", "quantization": "none", "compile": "off", "max_rows": 8}
    made, _ = build_runner(
        Settings.model_validate(plain | {"base": str(folder)} | settings), lambda stage, fraction: None
    )
    return made


def changed(folder: Path, change: Callable[[Tensors], object]) -> Path:
    """The base in this folder, whose tensors are changed in place."""
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(
        {name: tensor.clone() for name, tensor in tensors.items()}, folder / FILE, metadata={"format": "pt"}
    )
    return folder


@pytest.mark.parametrize("quantization", ["none", "nf4", "int8"])
def test_a_base_that_lacks_tensors_is_refused_by_their_names(quantization: str, tmp_path: Path) -> None:
    folder = changed(
        making.tiny(tmp_path / "base"), lambda tensors: [tensors.pop(name) for name in (UP, NORM)]
    )
    with pytest.raises(SettingsError, match=rf"^ADAPTERD_BASE: '.*' lacks 2 tensors: {UP}, {NORM}$"):
        start(folder, quantization=quantization)


def test_only_a_head_of_its_own_is_missed(tmp_path: Path) -> None:
    tied = changed(
        making.tiny(tmp_path / "tied", tie_word_embeddings=True),
        lambda tensors: tensors.pop("lm_head.weight", None),
    )
    start(tied)
    own = changed(
        making.tiny(tmp_path / "own", tie_word_embeddings=False),
        lambda tensors: tensors.pop("lm_head.weight"),
    )
    with pytest.raises(SettingsError, match=r"lacks 1 tensor: lm_head\.weight$"):
        start(own)


def test_a_tensor_of_another_shape_is_refused_with_both_shapes(tmp_path: Path) -> None:
    folder = changed(making.tiny(tmp_path / "base"), lambda tensors: tensors.update({NORM: torch.ones(32)}))
    with pytest.raises(
        SettingsError,
        match=rf"tensors of another shape than its config says: 1 tensor: {NORM} \(32,\) for \(64,\)$",
    ):
        start(folder)


def test_tensors_that_the_architecture_does_not_use_are_named_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    extra = {f"mtp.{i}.weight": torch.ones(2) for i in range(6)}
    start(changed(making.tiny(tmp_path / "base"), lambda tensors: tensors.update(extra)))
    assert (
        "does not use: 6 tensors: mtp.0.weight, mtp.1.weight, mtp.2.weight, mtp.3.weight, ..." in caplog.text
    )


def in_shards(folder: Path) -> None:
    """The index promises two files, of which the second is not there."""
    tensors = load_file(folder / FILE)
    (folder / FILE).unlink()
    names = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    save_file({NORM: tensors[NORM]}, folder / names[0], metadata={"format": "pt"})
    places = {name: names[name != NORM] for name in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda folder: os.truncate(folder / FILE, 100_000), "SafetensorError: "),
    "pointer": (
        lambda folder: (folder / FILE).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "SafetensorError: ",
    ),
    "no weights": (lambda folder: (folder / FILE).unlink(), "no file named model.safetensors"),
    "shard": (in_shards, "model-00002-of-00002.safetensors"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "not a valid JSON file"),
    "type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "x"}'),
        "'hidden_size'",
    ),
    "unknown": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "nonsense"}'),
        "model type `nonsense`",
    ),
    "own code": (
        lambda folder: (folder / "config.json").write_text(
            '{"model_type": "my", "auto_map": {"AutoModelForCausalLM": "m.M"}}'
        ),
        "cannot be loaded: ",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    folder = making.tiny(tmp_path / "base")
    spoil, why = DAMAGES[damage]
    spoil(folder)
    with pytest.raises(SettingsError) as refused:
        start(folder)
    assert str(refused.value).startswith(f"ADAPTERD_BASE: '{folder}' cannot be loaded: ")
    assert why in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TINY as bitsandbytes saves it in 8 bits, with a feature that one token makes large."""
    root = tmp_path_factory.mktemp("stored")
    plain = changed(
        making.tiny(root / "plain"), lambda tensors: tensors["model.embed_tokens.weight"][5, 7].mul_(200)
    )
    with making.quiet():
        how = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0)
        made = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=how, dtype=torch.bfloat16, device_map="cpu"
        )
        made.save_pretrained(root / "base")
    return root / "base"


def test_rows_of_a_base_that_was_stored_in_8_bits_do_not_change_each_other(
    stored: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Such a checkpoint brings an outlier threshold: a feature that is large in one row would be
    computed apart in all.
    """
    with making.quiet():
        runner = start(stored, dtype="bfloat16", quantization="auto")
    alone, beside = (Job(prompts()[3], 4, prompt_logprobs=0) for _ in range(2))
    RunnerDriver(runner, 1).run([alone])
    RunnerDriver(runner, 2).run([Job([5] * 9, 4), beside])
    want = torch.tensor([token.logprob for token in alone.prompt_tokens[1:]])
    assert distance(beside, want) < 0.02
    assert "proof: rough" not in caplog.text, "its config says how it is stored, which a small model is not"


def test_quantized_weights_of_which_the_config_does_not_speak_are_refused(
    stored: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(stored, tmp_path / "base"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({name: value for name, value in config.items() if name != "quantization_config"})
    )
    with pytest.raises(
        SettingsError,
        match=r"holds quantized weights of which its config does not speak: 14 tensors: .*\.SCB",
    ):
        start(folder)


# ---- GGUF

WORDS = making.tokenizer()
QWEN2 = SIZES | {"vocab_size": len(WORDS), "num_hidden_layers": 2, "tie_word_embeddings": False}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "model.layers.": "blk.",
}
KINDS = gguf.GGMLQuantizationType


def written(
    file: Path,
    kind: gguf.GGMLQuantizationType,
    lacking: str = "",
    family: str = "qwen2",
    head_dim: int | None = None,
) -> Tensors:
    """Writes a random Qwen whose matrices are of this kind; the values that the file then holds, by
    transformers' names.
    """
    source = file.parent / f"source-{kind.name}"
    sizes = QWEN2 if head_dim is None else QWEN2 | {"head_dim": head_dim}
    model = making.load(random_base(source, family, sizes))
    writer = gguf.GGUFWriter(file, family)
    describe(writer, model.config)
    if head_dim is not None:
        writer.add_key_length(head_dim)
    held: Tensors = {}
    for name, weight in model.state_dict().items():
        own = kind if weight.dim() > 1 else KINDS.F32
        data = gguf.quants.quantize(weight.numpy(), own)
        held[name] = torch.from_numpy(np.array(gguf.quants.dequantize(data, own)))
        if name != lacking:
            writer.add_tensor(gguf_name(name), data, raw_dtype=own)
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    return held


def gguf_name(name: str) -> str:
    for long, short in NAMES.items():
        name = name.replace(long, short)
    return name


def describe(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    words = sorted(WORDS.get_vocab(), key=lambda word: WORDS.get_vocab()[word])
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(words)
    writer.add_token_types([3 if word in making.SPECIAL else 1 for word in words])
    writer.add_token_merges(list(making.MERGES))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapterd" / "bases"


def cached(cache: Path) -> list[str]:
    """What is kept there, half made or whole."""
    return sorted(path.name for path in cache.iterdir() if path.name != durable.LOCK)


def loaded(file: Path, dtype: str) -> Tensors:
    settings = Settings.model_validate(
        {"device": "cpu", "dtype": dtype, "quantization": "none", "base": str(file)}
    )
    with making.quiet():
        folder = loading.resolve_folder(settings.base, loading.DTYPES[dtype])
        return dict(loading.load_base(folder, settings, lambda stage, fraction: None).state_dict())


@pytest.mark.parametrize(
    "kind", [KINDS.F32, KINDS.F16, KINDS.BF16, KINDS.Q8_0, KINDS.Q4_1], ids=lambda kind: kind.name
)
def test_a_gguf_file_gives_its_own_values_in_the_dtype_that_is_asked_for(
    kind: gguf.GGMLQuantizationType, tmp_path: Path, cache: Path
) -> None:
    file = tmp_path / "base.gguf"
    held = written(file, kind)
    for name, dtype in loading.DTYPES.items():
        found = loaded(file, name)
        assert {key: tensor.dtype for key, tensor in found.items()} == dict.fromkeys(held, dtype)
        assert [key for key in held if not torch.equal(found[key], held[key].to(dtype))] == []
    assert len(cached(cache)) == 3
    (exact,) = cache.glob("*-float32")
    matrix = load_file(exact / FILE)["model.layers.0.mlp.up_proj.weight"]
    own = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name, torch.float32)
    assert matrix.dtype == own, "no more bits than the file has"


def test_a_gguf_file_that_lacks_a_tensor_is_refused_by_its_name_and_leaves_nothing(
    tmp_path: Path, cache: Path
) -> None:
    written(tmp_path / "base.gguf", KINDS.F32, lacking=UP)
    with (
        making.quiet(),
        pytest.raises(SettingsError, match=rf"ADAPTERD_BASE: '.*base\.gguf' lacks 1 tensor: {UP}$"),
    ):
        start(tmp_path / "base.gguf")
    assert cached(cache) == []


def test_a_gguf_file_that_is_none_is_refused_in_one_line(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "base.gguf").write_text("version https://git-lfs.github.com/spec/v1\n")
    with (
        making.quiet(),
        pytest.raises(SettingsError, match=r"^ADAPTERD_BASE: '.*base\.gguf' cannot be loaded: .*$"),
    ):
        start(tmp_path / "base.gguf")
    assert cached(cache) == []


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def zero_half(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


@pytest.mark.parametrize(
    ("name", "damage"), [(FILE, cut), (FILE, zero_half), ("tokenizer.json", Path.unlink)]
)
def test_a_converted_base_that_is_damaged_is_converted_anew(
    name: str, damage: Callable[[Path], None], tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "base.gguf"
    written(file, KINDS.F32)
    # Copies, for what is loaded is the file itself, mapped, which is damaged below
    before = {key: values.clone() for key, values in loaded(file, "float32").items()}
    (folder,) = (cache / name for name in cached(cache))
    whole = (folder / name).read_bytes()
    assert loaded(file, "float32").keys() == before.keys()
    assert "damaged" not in caplog.text, "a good one is not made again"
    damage(folder / name)
    after = loaded(file, "float32")
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    assert f"{folder} is damaged and is made anew: {name} " in caplog.text
    assert (folder / name).read_bytes() == whole
    assert cached(cache) == [folder.name]


def test_what_a_killed_conversion_left_is_swept_at_the_next_start(tmp_path: Path, cache: Path) -> None:
    written(tmp_path / "base.gguf", KINDS.F32)
    (cache / ".making-abc-base").mkdir(parents=True)
    (cache / ".making-abc-base" / FILE).write_bytes(bytes(1000))
    loaded(tmp_path / "base.gguf", "float32")
    (name,) = cached(cache)
    assert not name.startswith(".")
    (cache / ".making-abc-base").mkdir()
    loaded(tmp_path / "base.gguf", "float32")
    assert cached(cache) == [name], "also where nothing is to be converted"


def test_a_full_cache_is_one_line_that_names_it_and_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any, **named: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    written(tmp_path / "base.gguf", KINDS.F32)
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", refuse)
    said = rf"^XDG_CACHE_HOME: the cache folder {cache.parent} cannot be written: .*No space left on device"
    with making.quiet(), pytest.raises(SettingsError, match=said):
        start(tmp_path / "base.gguf")
    assert cached(cache) == []


@pytest.mark.parametrize(("family", "head_dim"), [("qwen2", None), ("qwen3", 32), ("qwen3", 128)])
def test_a_gguf_file_says_the_same_as_the_model_it_was_made_of(
    family: str, head_dim: int | None, tmp_path: Path, cache: Path
) -> None:
    written(tmp_path / "base.gguf", KINDS.F32, family=family, head_dim=head_dim)
    with making.quiet():
        runner = start(tmp_path / "base.gguf")
    job = Job(prompts()[4], 8)
    RunnerDriver(runner, 1).run([job])
    assert job.ids == making.greedy(tmp_path / "source-F32", None, job.prompt, job.n)
