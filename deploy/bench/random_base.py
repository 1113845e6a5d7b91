"""Makes a base of random weights in any shape, on a GPU in seconds, and random adapters of it, as
the service reads them. Times nothing.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import Adapter

from . import adapters

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": ROPE,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
}
RANK = 16


@contextmanager
def whole(folder: Path) -> Iterator[Path]:
    """A folder to write to, which gets its name when all of it is there: what was broken off is
    made anew.
    """
    aside = folder.with_name(f"{folder.name}.making")
    shutil.rmtree(aside, ignore_errors=True)
    yield aside
    aside.rename(folder)


def made(shape: str, folder: Path, device: torch.device) -> Path:
    """A random base of this shape in bfloat16, with its embeddings and its head apart; one that is
    there already stays.
    """
    if not folder.exists():
        with device:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
        with whole(folder) as aside:
            model.save_pretrained(aside, max_shard_size="4GB")
    return folder


def config_of(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True).get_text_config()


def trained(folder: Path, root: Path, count: int) -> list[Adapter]:
    """So many random adapters of rank RANK on q, k, v and o, read and checked as the service does;
    those that are there already stay.
    """
    config = config_of(folder)
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    inner, kv = heads * width, config.num_key_value_heads * width
    shapes = {
        "q_proj": (hidden, inner),
        "k_proj": (hidden, kv),
        "v_proj": (hidden, kv),
        "o_proj": (inner, hidden),
    }
    places = [root / f"a{seed}" for seed in range(count)]
    for seed, place in enumerate(places):
        if not place.exists():
            with whole(place) as aside:
                adapters.write(aside, RANK, seed, shapes, config.num_hidden_layers)
    skeleton = Skeleton(folder)
    return [validate_adapter(skeleton, place, RANK).adapter for place in places]
