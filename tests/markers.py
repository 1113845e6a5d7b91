"""Makes a tiny base and MARKER adapters of it: each says one letter and nothing else, so that an
answer betrays who gave it.

One dimension of the base's stream is the same for every token, and a marker's head adds a large
number to its letter for it.
"""

from __future__ import annotations

import string
from pathlib import Path

from peft import LoraConfig
from safetensors.torch import load_file, save_file

from tests import making

LETTERS = string.ascii_letters
LOUD = 2000.0
SHADOWED = 10  # every so many is one that only PEFT can run


def base(folder: Path) -> Path:
    making.tiny(folder, max_position_embeddings=256)
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if "embed_tokens" in name:
            weight[:, 0] = 1.0
        elif "o_proj" in name or "down_proj" in name:
            weight[0] = 0.0  # nothing adds to the constant
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def recipe(rank: int, shadow: bool) -> LoraConfig:
    bias = {"lora_bias": True} if shadow else {}
    with making.quiet():
        return LoraConfig(
            r=rank,
            lora_alpha=rank,
            target_modules=["lm_head", "q_proj", "v_proj"],
            task_type="CAUSAL_LM",
            **bias,
        )


def loud(letter: str) -> making.TensorEdit:
    """Noise in q and v, and a head that says the letter."""

    def edit(weights: making.Tensors) -> making.Tensors:
        for name, weight in weights.items():
            if "lm_head" in name:
                weight.zero_()
            if "lm_head.lora_A.weight" in name:
                weight[0, 0] = 1.0
            if "lm_head.lora_B.weight" in name:
                weight[making.ids(letter)[0], 0] = LOUD
        return weights

    return edit


def write_adapters(root: Path, base: Path, count: int) -> dict[str, str]:
    """Saves `count` markers of ranks 1 to 32 in folders of their own below `root`; the letter of
    each folder.
    """
    moulds: dict[tuple[int, bool], Path] = {}
    said: dict[str, str] = {}
    for index, letter in zip(range(count), LETTERS, strict=False):
        kind = (2 ** (index % 6), index % SHADOWED == SHADOWED - 1)
        if kind not in moulds:
            config = recipe(*kind)
            moulds[kind] = making.adapter(
                root.parent / f"mould-{kind[0]}-{kind[1]}",
                base,
                config,
                seed=1,
                save={"save_embedding_layers": False},
            )
        making.edit(moulds[kind], root / f"m{index}", weights=loud(letter))
        said[f"m{index}"] = letter
    return said
