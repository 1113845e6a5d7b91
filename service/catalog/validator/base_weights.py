"""Compares saved weights with the base's own, as its files hold them; in the validator process.

Reads a slice at a time: an embedding may be a gigabyte. Must not know adapters' configs or PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_utils import load_state_dict

SLICE = 1 << 22  # values
# In the order in which transformers looks for them
NAMES = ("model.safetensors", "pytorch_model.bin")
# Dtypes that a trainer may have held the base in, whatever it saved
TRAINED = (torch.float16, torch.bfloat16)


class Difference(NamedTuple):
    """In how many of so many values two tensors differ, and by how much at most."""

    changed: int
    total: int
    largest: float


def compare(model: Any, folder: Path, name: str, saved: Tensor) -> Difference | None:
    """How `saved`, flat, differs from what the base in this folder holds for the model's `name`.

    Casts between dtypes are no difference; see `unchanged`. None where the files hold no such
    tensor as it is.
    """
    location = find_tensor(model, folder, name)
    if location is None:
        return None
    changed, total, largest = 0, 0, 0.0
    for held in slices(*location):
        if not held.is_floating_point() or total + len(held) > len(saved):
            return None
        ours = saved[total : total + len(held)]
        total += len(held)
        odd = ~unchanged(ours, held)
        if odd.any():
            changed += int(odd.sum())
            gaps = (ours[odd].double() - held[odd].double()).abs()
            largest = max(largest, float(gaps.max()))
    return Difference(changed, total, largest) if total == len(saved) else None


def unchanged(saved: Tensor, held: Tensor) -> Tensor:
    """Which values of `saved` are those of `held`, but for casts between dtypes: bool, flat.

    They are `held` cast to its dtype, by way of the one it was trained in; or, where the two dtypes
    differ, both can be roundings of one number: they lie no further apart than half a step of each,
    subnormal steps included. It can only have been trained in a dtype that has all of its values.
    """
    ours = saved.float()
    same = ours == held.to(saved.dtype).float()
    if same.all():
        return same
    trained = [dtype for dtype in TRAINED if torch.equal(ours.to(dtype).float(), ours)]
    ways = [saved.dtype, *trained]
    for dtype in ways:
        same |= ours == held.to(dtype).to(saved.dtype).float()
    if saved.dtype == held.dtype:
        return same
    theirs = held.float()
    step = torch.stack([half_step(ours, dtype) for dtype in ways]).amax(0)
    return same | ((ours - theirs).abs() <= step + half_step(theirs, held.dtype))


def half_step(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours in this dtype at float32 values: what a cast to it may
    change.
    """
    kind = torch.finfo(dtype)
    # Of two, not over the value
    power = (values.abs() / (2 * torch.frexp(values).mantissa.abs())).nan_to_num(0)
    return power.clamp(min=kind.tiny) * (kind.eps / 2)


# ---- the files


def find_tensor(model: Any, folder: Path, name: str) -> tuple[Path, str] | None:
    """The file and key of the tensor that transformers loads as the model's `name`, or as a name that
    is tied to it.
    """
    names = tied_names(model, name)
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, shapes = model.base_model_prefix, model.state_dict()
    for file in weight_files(folder):
        for key in keys(file):
            renamed, converted = rename_source_key(key, renamings, converters, prefix, shapes)
            if renamed not in shapes:  # a name of today's, which may lack the prefix only
                renamed, converted = rename_source_key(key, [], [], prefix, shapes)
            if renamed in names and converted is None:
                return file, key
    return None


def tied_names(model: Any, name: str) -> set[str]:
    """The name itself, its source, and every name that is tied to either."""
    tied: dict[str, str] = model.all_tied_weights_keys
    source = tied.get(name, name)
    return {name, source, *(target for target, origin in tied.items() if origin in (name, source))}


def weight_files(folder: Path) -> list[Path]:
    for name in NAMES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            return [folder / file for file in sorted(set(weight_map.values()))]
    return []


def keys(file: Path) -> list[str]:
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            return sorted(opened.keys())
    return sorted(load_state_dict(file))


def slices(file: Path, key: str) -> Iterator[Tensor]:
    """The tensor, flat, some rows at a time."""
    if file.suffix == ".safetensors":
        with safe_open(file, "pt") as opened:
            yield from _rows(opened.get_slice(key), opened.get_slice(key).get_shape())
    else:
        # Weights only, and mapped: nothing is read before it is asked for
        tensor = load_state_dict(file)[key]
        yield from _rows(tensor, tensor.shape)


def _rows(tensor: Any, shape: Any) -> Iterator[Tensor]:
    step = max(1, SLICE // max(1, shape[-1]))
    for start in range(0, shape[0], step):
        yield tensor[start : start + step].flatten()
