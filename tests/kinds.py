"""Every kind of adapter of a tiny Llama that there is a test for: those that are served, by lane,
and the refused, with a word of why.

Knows PEFT and how to damage a file; nothing of the service.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import peft
from safetensors.torch import save_file

from tests import making

Maker = Callable[[Path, Path], Path]
TARGETS = ["q_proj", "v_proj"]
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj"]
Q0 = "layers.0.self_attn.q_proj"
CALL = [40, 41]  # wakes an activated LoRA
SKETCH = {"save_embedding_layers": False}


def lora(seed: int, **recipe: Any) -> Maker:
    return lambda folder, base: making.noise(folder, base, seed, **recipe)


def other(kind: str, std: float = 0.3, **config: Any) -> Maker:
    """An adapter of any PEFT type. Fields that the type does not have are not passed."""
    made = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    fields = {"target_modules": TARGETS, **config}
    wanted = {name: value for name, value in fields.items() if name in made.__dataclass_fields__}
    return lambda folder, base: making.adapter(
        folder, base, made(**wanted, task_type="CAUSAL_LM"), seed=3, std=std, save=SKETCH
    )


POOL: dict[str, Maker] = {
    "plain": lora(1),
    "rslora": lora(2, r=16, use_rslora=True),
    "patterns": lora(3, rank_pattern={Q0: 16}, alpha_pattern={Q0: 64}),
    "all-linear": lora(4, targets="all-linear", r=8),
    "regex": lora(5, targets=r".*layers\.1\..*(q_proj|v_proj)"),
    "one layer": lora(6, layers_to_transform=[1]),
    "dora": lora(7, targets=("q_proj", "up_proj", "down_proj"), use_dora=True),
    "head": lora(8, targets=("lm_head", "q_proj"), save=SKETCH),
    "embeddings saved along": lora(9, save={"save_embedding_layers": True}),
    "bfloat16": lambda folder, base: halved(lora(10)(folder, base)),
    "dropout": lora(11, lora_dropout=0.5),
    "activated": lora(12, alora_invocation_tokens=CALL),
}
SHADOW: dict[str, Maker] = {
    "modules_to_save": lora(20, modules_to_save=["lm_head"], save=SKETCH),
    "DoRA beside a saved head": lora(27, use_dora=True, modules_to_save=["lm_head"], save=SKETCH),
    "embedding saved": lora(21, modules_to_save=["embed_tokens"], save=SKETCH),
    "trainable_token_indices": lora(22, trainable_token_indices=[7, 8, 9], save=SKETCH),
    "lora_bias": lora(23, lora_bias=True),
    "embedding": lora(24, targets=("embed_tokens", "q_proj"), save=SKETCH),
    "target_parameters": lora(25, targets=(), target_parameters=["mlp.down_proj.weight"]),
    "IA3": other("IA3", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "VERA": other("VERA", r=8),
    "VERA without its projection": other("VERA", r=8, save_projection=False),
    "LOHA": other("LOHA", r=4, alpha=8),
    "LOKR": other("LOKR", r=4, alpha=8),
    "OFT": other("OFT", r=0, oft_block_size=8),
    "BEFT": other("BEFT"),
    "C3A": other("C3A", std=3, block_size=8),
    "DEFT": other("DEFT"),
    "DELORA": other("DELORA"),
    "FOURIERFT": other("FOURIERFT", n_frequency=20),
    "GLORA": other("GLORA"),
    "GRALORA": other("GRALORA"),
    "HIRA": other("HIRA"),
    "HRA": other("HRA"),
    "LN_TUNING": other("LN_TUNING", target_modules=["input_layernorm"]),
    "MISS": other("MISS", r=8),
    "OSF": other("OSF"),
    "PEANUT": other("PEANUT"),
    "PSOFT": other("PSOFT"),
    "RANDLORA": other("RANDLORA", r=4),
    "ROAD": other("ROAD", group_size=16),
    "TINYLORA": other("TINYLORA"),
    "TRAINABLE_TOKENS": other(
        "TRAINABLE_TOKENS", target_modules=["embed_tokens"], token_indices=list(range(3, 60))
    ),
    "VBLORA": other("VBLORA", num_vectors=16, vector_length=16),
    "WAVEFT": other("WAVEFT", n_frequency=20),
}


def halved(folder: Path) -> Path:
    weights = {name: tensor.bfloat16() for name, tensor in making.tensors(folder).items()}
    save_file(weights, folder / making.WEIGHTS, metadata={"format": "pt"})
    return folder


# ---- refused

Damage = Callable[[Path], None]


@cache
def mould(base: Path) -> Path:
    return POOL["plain"](base.parent / f".{base.name}-mould", base)


def plain(folder: Path, base: Path) -> Path:
    return making.edit(mould(base), folder)


def damaged(damage: Damage) -> Maker:
    def make(folder: Path, base: Path) -> Path:
        damage(plain(folder, base))
        return folder

    return make


def edited(config: making.ConfigEdit | None = None, weights: making.TensorEdit | None = None) -> Maker:
    return damaged(lambda folder: void(making.edit(folder, folder, config, weights)))


def void(_: object) -> None:
    return None


def spoil(folder: Path, part: str, value: float) -> None:
    """Changes one value of the tensor whose name has this part."""

    def edit(tensors: making.Tensors) -> None:
        (name,) = [key for key in tensors if part in key]
        tensors[name].view(-1)[3] = value

    making.edit(folder, folder, weights=edit)


def spoilt(part: str, value: float) -> Maker:
    return damaged(lambda folder: spoil(folder, part, value))


def keeping(keep: Callable[[str], bool]) -> Maker:
    return edited(weights=lambda tensors: {key: value for key, value in tensors.items() if keep(key)})


def without(key: str) -> Maker:
    return edited(lambda config: {name: value for name, value in config.items() if name != key})


def on_another(**changes: Any) -> Maker:
    """An adapter of a base of other sizes."""

    def make(folder: Path, base: Path) -> Path:
        return making.noise(folder, making.tiny(folder.parent / f".{folder.name}-base", **changes), 4)

    return make


def grown(folder: Path, base: Path) -> Path:
    """Of a base whose vocabulary was resized by four tokens, with embeddings and tokenizer."""
    size = json.loads((base / "config.json").read_text())["vocab_size"]
    larger = making.tiny(folder.parent / f".{folder.name}-base", vocab_size=size + 4)
    making.noise(folder, larger, 4, save={"save_embedding_layers": True})
    making.tokenizer().save_pretrained(folder)
    return folder


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch '{self.path}'",)


CANARY = "canary"


def pickled(folder: Path) -> None:
    (folder / making.WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Touch(folder.parent / CANARY)))


def mlx(folder: Path) -> None:
    (folder / making.WEIGHTS).rename(folder / "adapters.safetensors")
    (folder / making.CONFIG).write_text(
        json.dumps({"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": {"rank": 4, "scale": 2}})
    )


def a_run(folder: Path) -> None:
    """The folder of a training run: two checkpoints and nothing else."""
    for step in ("checkpoint-10", "checkpoint-20"):
        (folder / step).mkdir()
        for name in (making.CONFIG, making.WEIGHTS):
            shutil.copyfile(folder / name, folder / step / name)
    for name in (making.CONFIG, making.WEIGHTS):
        (folder / name).unlink()


def cut(folder: Path, size: int | None = None) -> None:
    file = folder / making.WEIGHTS
    os.truncate(file, file.stat().st_size // 2 if size is None else size)


def pointing(folder: Path) -> None:
    (folder / making.WEIGHTS).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 16777216\n"
    )


def trained_embedding(tensors: making.Tensors) -> None:
    tensors["base_model.model.model.embed_tokens.weight"][5, 5] += 0.5


def huge_config(folder: Path) -> None:
    with (folder / making.CONFIG).open("w") as file:
        file.write('{"peft_type": "LORA", "junk": "')
        for _ in range(100):
            file.write("x" * 1_000_000)
        file.write('"}')


A, B = "layers.0.self_attn.q_proj.lora_A", "layers.1.self_attn.v_proj.lora_B"

REFUSED: dict[str, tuple[Maker, str]] = {
    "A2 a model's config": (
        edited(lambda _: {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
        "model's config.json",
    ),
    "A2 mlx": (damaged(mlx), "MLX"),
    "A4 deeper": (on_another(num_hidden_layers=4), "layers.2"),
    "A4 without B": (keeping(lambda key: "lora_B" not in key), "lora_B"),
    "A4 half": (keeping(lambda key: "layers.1" not in key), "layers.1"),
    "A4 a target without tensors": (edited({"target_modules": ["q_proj", "v_proj", "k_proj"]}), "k_proj"),
    "A5 empty": (edited(weights=making.Tensors.clear), "empty"),
    "A5 pointer": (damaged(pointing), "git lfs pull"),
    "A5 cut": (damaged(cut), "truncated"),
    "A5 nothing": (damaged(partial(cut, size=0)), "truncated"),
    "A5 missing": (damaged(lambda folder: (folder / making.WEIGHTS).unlink()), "is missing"),
    "A6 nan in A": (spoilt(A, float("nan")), A),
    "A6 nan in B": (spoilt(B, float("nan")), B),
    "A6 infinite": (spoilt(B, float("inf")), B),
    "A8 bad regex": (edited({"target_modules": "(.*q_proj"}), "not a valid regex"),
    "A11 grown": (grown, "the vocabulary was resized from"),
    "A12 activated with a shadow feature": (
        lora(15, alora_invocation_tokens=CALL, lora_bias=True),
        "alora_invocation_tokens",
    ),
    "A13 a run": (damaged(a_run), "checkpoint-10, checkpoint-20"),
    "A14 narrow": (on_another(hidden_size=32, intermediate_size=64), "[4, 32]"),
    "A15 pickle": (damaged(pickled), "pickle"),
    "A16 a huge rank": (edited({"r": 50000}), "50000 is over the limit"),
    "A16 rank 0": (edited({"r": 0}), "`r`"),
    "A16 a negative rank": (edited({"r": -4}), "`r`"),
    "A16 half a rank": (edited({"r": 4.5}), "`r`"),
    "A16 no rank": (without("r"), "`r` is missing"),
    "A16 no alpha": (without("lora_alpha"), "`lora_alpha` is missing"),
    "A16 alpha a text": (edited({"lora_alpha": "16"}), "`lora_alpha`"),
    "A16 alpha not a number": (edited({"lora_alpha": float("nan")}), "`lora_alpha`"),
    "A16 100 MB of config": (damaged(huge_config), "the limit is"),
    "embeddings trained": (
        lambda folder, base: making.edit(
            POOL["embeddings saved along"](folder, base), folder, weights=trained_embedding
        ),
        "embed_tokens",
    ),
    "trained biases": (lora(16, bias="lora_only"), "`bias`"),
    "trained biases of another type": (other("OFT", r=0, oft_block_size=8, bias="oft_only"), "`bias`"),
    "attention saved whole": (
        lora(17, targets=("down_proj",), modules_to_save=["self_attn"]),
        "`modules_to_save on attention layers`",
    ),
    "activated without a task": (edited({"alora_invocation_tokens": CALL, "task_type": None}), "`task_type`"),
    "pissa": (edited({"init_lora_weights": "pissa"}), "pissa"),
    "olora in capitals": (edited({"init_lora_weights": "OLoRA"}), "OLoRA"),
    "another task": (edited({"task_type": "SEQ_CLS"}), "SEQ_CLS"),
    "an unknown type": (edited({"peft_type": "NEWLORA"}), "NEWLORA"),
    "PROMPT_TUNING": (other("PROMPT_TUNING", num_virtual_tokens=4), "PROMPT_TUNING"),
    "PREFIX_TUNING": (other("PREFIX_TUNING", num_virtual_tokens=4), "PREFIX_TUNING"),
    "P_TUNING": (other("P_TUNING", num_virtual_tokens=4), "P_TUNING"),
}


def make(root: Path, base: Path, makers: Mapping[str, Maker]) -> dict[str, Path]:
    """Saves one of each kind below root, in folders without spaces; the folder of each."""
    with making.quiet():
        return {kind: maker(root / kind.replace(" ", "-"), base) for kind, maker in makers.items()}
