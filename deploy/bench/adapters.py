"""Makes random LoRA adapters for the benchmark, as PEFT would save them.

Knows the shapes of the demo base; needs neither torch nor PEFT.

python -m deploy.bench.adapters FOLDER [--count 16] [--ranks 16,32]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

LAYERS, HIDDEN, KV = 30, 576, 192
SHAPES = {
    "q_proj": (HIDDEN, HIDDEN),
    "k_proj": (HIDDEN, KV),
    "v_proj": (HIDDEN, KV),
    "o_proj": (HIDDEN, HIDDEN),
}
STD = 0.02


Floats = NDArray[np.float64]


def factors(rank: int, seed: int, shapes: Mapping[str, tuple[int, int]], layers: int) -> dict[str, Floats]:
    """A as PEFT initialises it, uniform within ±1/√in; B, which starts as zero there, normal."""
    random = np.random.default_rng(seed)
    found = {}
    for layer in range(layers):
        for module, (width, out) in shapes.items():
            name = f"base_model.model.model.layers.{layer}.self_attn.{module}"
            found[f"{name}.lora_A.weight"] = random.uniform(-(width**-0.5), width**-0.5, (rank, width))
            found[f"{name}.lora_B.weight"] = random.normal(0, STD, (out, rank))
    return found


def bfloat16(values: Floats) -> bytes:
    """float32 cut to its upper half, little-endian: what bfloat16 is."""
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def safetensors(tensors: Mapping[str, Floats]) -> bytes:
    """The file format: the header's length in 8 bytes, the header in JSON, the data.

    NumPy has no bfloat16 to hand to the library.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, values in tensors.items():
        start, end = end, end + 2 * values.size
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": (start, end)}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(bfloat16(values) for values in tensors.values())


def write(
    folder: Path, rank: int, seed: int, shapes: Mapping[str, tuple[int, int]] = SHAPES, layers: int = LAYERS
) -> None:
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(shapes),
        "inference_mode": True,
    }
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / "adapter_model.safetensors").write_bytes(safetensors(factors(rank, seed, shapes, layers)))


def make(folder: Path, count: int, ranks: Sequence[int] = (16,)) -> list[str]:
    """`count` adapters named rank16-000 and so on, taking the ranks in turn.

    Those that are there already stay. Their names.
    """
    names = [f"rank{ranks[i % len(ranks)]}-{i:03}" for i in range(count)]
    for i, name in enumerate(names):
        if not (folder / name / "adapter_model.safetensors").exists():
            write(folder / name, ranks[i % len(ranks)], seed=i)
    return names


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=16)
    parser.add_argument("--ranks", default="16", help="comma-separated, taken in turn")
    asked = parser.parse_args()
    make(asked.folder, asked.count, [int(rank) for rank in asked.ranks.split(",")])


if __name__ == "__main__":
    main()
