"""Reads an adapter: compares what PEFT says its config means with what its file holds, and looks at
every value once.

Runs in a process of its own. The live base is never touched: names, shapes and scalings come from
PEFT, values from the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ...core.adapter import Adapter, ExecutionPath, LoraLayerSpec
from ...core.defaults import FLOAT_CODES
from ...core.manifest import CHANGED, Manifest, compute_digest, hash_file, read_manifest
from ...errors import AdapterInvalid, AdapterUnsupported
from .. import facts
from . import base_weights, match, text_files
from . import header as inspection
from .header import CONFIG, WEIGHTS, Header
from .messages import ValidatedAdapter
from .peft_config import ACTIVATED, PREFIX, ResolvedConfig, resolve_config, unknown_keys
from .skeleton import Skeleton

FLOATS = {code: getattr(torch, name) for name, code in FLOAT_CODES.items()}


def validate_adapter(
    skeleton: Skeleton, folder: Path, max_rank: int, known: Manifest = ()
) -> ValidatedAdapter:
    """The adapter in this folder, validated against the base.

    `known`: its manifest, when these very files were looked at before.

    Raises AdapterInvalid with every problem found at the first stage that finds one,
    AdapterUnsupported naming the feature.
    """
    config = inspection.read_config(folder)
    refuse_adapter(inspection.config_problems(config, max_rank) + inspection.missing_weights(folder))
    refuse_adapter(inspection.pattern_problems(config))
    header = inspection.read_header(folder / WEIGHTS)
    check_openable(folder / WEIGHTS)
    notes = unknown_keys(config)
    meaning = resolve_config(skeleton, config)
    copies = base_copies(skeleton, folder / WEIGHTS, header, meaning)
    own = {key: tensor for key, tensor in header.tensors.items() if key not in copies}
    names = match.match_tensors(meaning.expected, own, skeleton.model.base_model_prefix)
    refuse_adapter(
        [
            f"{key} has the dtype {tensor.dtype}; {', '.join(FLOATS)} are read"
            for key, tensor in own.items()
            if tensor.dtype not in FLOATS
        ]
    )
    patches = tuple(rename_tensors(one, names) for one in meaning.patches)
    lane = meaning.lane
    if not known:
        check_finite(folder / WEIGHTS, header, own)
        refuse_adapter(text_files.find_problems(folder))
    if lane is ExecutionPath.POOL and changes_nothing(folder / WEIGHTS, header, patches):
        notes.append(
            "each of its layers has zeros for lora_A, lora_B or alpha: this adapter says what the base says"
        )
    notes += spelling_notes(names, lane) + [
        f"{key} is a copy of the base's own weights and is not used" for key in sorted(copies)
    ]
    adapted = [
        facts.LoraModuleInfo(
            p.module, p.scaling, own[p.a], own[p.b], own[p.magnitude] if p.magnitude else None
        )
        for p in patches
    ]
    files = known or read_manifest(folder)
    adapter = Adapter(
        digest=compute_digest(files),
        config=str(folder / CONFIG),
        weights=str(folder / WEIGHTS),
        lane=lane,
        rank=max((one.rank for one in patches), default=0) if lane is ExecutionPath.POOL else 0,
        size=sum(tensor.size for tensor in own.values()),
        patches=patches if lane is ExecutionPath.POOL else (),
        invocation=tuple(config.get(ACTIVATED) or ()),
        files=files,
    )
    told = facts.describe_content(config, header, adapted, copies, meaning.modules) | {
        "features": sorted(meaning.features)
    }
    return ValidatedAdapter(adapter, told, tuple(notes), patches)


def measure_norms(adapter: Adapter, layers: Sequence[LoraLayerSpec]) -> dict[str, float]:
    """Module → Frobenius norm of scaling · B · A [out, in]; of a DoRA layer too, whose trained
    magnitudes are not in it.

    Raises AdapterInvalid when the files are not those that were read any more, OSError when they
    are gone.
    """
    weights = Path(adapter.weights)
    if not {hash_file(Path(adapter.config)), hash_file(weights)} <= set(adapter.files):
        raise AdapterInvalid([CHANGED])
    with safe_open(weights, "pt") as file:
        return {
            one.module: abs(one.scaling) * product_norm(file.get_tensor(one.a), file.get_tensor(one.b))
            for one in layers
        }


def product_norm(a: torch.Tensor, b: torch.Tensor) -> float:
    """The Frobenius norm of B [out, rank] · A [rank, in] by two matrices [rank, rank]: it is the
    root of the trace of AAᵀ · BᵀB.
    """
    a, b = a.double(), b.double()
    return float(((a @ a.T) * (b.T @ b)).sum().clamp(min=0).sqrt())


def refuse_adapter(problems: list[str]) -> None:
    if problems:
        raise AdapterInvalid(problems)


def check_openable(weights: Path) -> None:
    """Raises AdapterInvalid where the library would not open the file, for the worker reads it so."""
    try:
        with safe_open(weights, "pt"):
            pass
    except SafetensorError as error:
        refuse_adapter([f"{WEIGHTS} is damaged: {error}"])


def base_copies(skeleton: Skeleton, weights: Path, header: Header, meaning: ResolvedConfig) -> set[str]:
    """Keys of embedding and head weights that were saved along, unchanged but for casts.

    Raises AdapterInvalid when they are resized, AdapterUnsupported when they are trained.
    """
    shapes = skeleton.embedding_shapes()
    found = {
        key: key.removeprefix(PREFIX).replace(".base_layer.", ".")
        for key in header.tensors.keys() - meaning.expected.keys()
    }
    copies = {
        key: name for key, name in found.items() if name in shapes and header.tensors[key].dtype in FLOATS
    }
    for key, name in copies.items():
        ours, theirs = shapes[name], header.tensors[key].shape
        if ours != theirs:
            was = f"the vocabulary was resized from {ours[0]} to {theirs[0]}"
            refuse_adapter([f"{key} has the shape {list(theirs)}, the base's is {list(ours)}: {was}"])
    for (key, saved), name in zip(iterate_values(weights, header, copies), copies.values(), strict=True):
        if told := trained(skeleton, name, saved):
            raise AdapterUnsupported([f"{key} {told}: saved and trained embedding weights are not served"])
    return set(copies)


def trained(skeleton: Skeleton, name: str, saved: torch.Tensor) -> str:
    """How this tensor differs from the base's of this name; empty where only its dtype may."""
    found = base_weights.compare(skeleton.model, skeleton.folder, name, saved)
    if found is None:
        return "cannot be compared with the base's own, which lies otherwise in its files"
    told = f"differs from the base's own in {found.changed} of {found.total} values, by {found.largest:.2g} at most"
    return told if found.changed else ""


def rename_tensors(patch: LoraLayerSpec, names: dict[str, str]) -> LoraLayerSpec:
    return replace(
        patch,
        a=names[patch.a],
        b=names[patch.b],
        magnitude=names[patch.magnitude] if patch.magnitude else None,
    )


def check_finite(weights: Path, header: Header, own: Collection[str]) -> None:
    """Reads every value once.

    Raises AdapterInvalid naming the first tensor that is not finite, in float32 at the latest.
    """
    for key, tensor in iterate_values(weights, header, own):
        if not (fine := torch.isfinite(tensor.float() if tensor.dtype is torch.float64 else tensor)).all():
            refuse_adapter([f"{key} holds {int((~fine).sum())} values that are NaN or infinite"])


def changes_nothing(weights: Path, header: Header, patches: tuple[LoraLayerSpec, ...]) -> bool:
    """Whether no layer changes anything; no more is read than the first one that does."""

    def zero(key: str) -> bool:
        return not any(tensor.any() for _, tensor in iterate_values(weights, header, [key]))

    return all(one.magnitude is None and (not one.scaling or zero(one.b) or zero(one.a)) for one in patches)


def iterate_values(
    weights: Path, header: Header, keys: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """These tensors, one by one, flat, over the file's own pages. safe_open would lose 64 bytes
    with each tensor.
    """
    with weights.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for key in keys:
        found = header.tensors[key]
        if found.count:
            yield (
                key,
                torch.frombuffer(
                    memory,
                    dtype=FLOATS[found.dtype],
                    count=found.count,
                    offset=header.header_bytes + found.start,
                ),
            )


def spelling_notes(names: dict[str, str], lane: ExecutionPath) -> list[str]:
    """Warns of keys in another trainer's spelling.

    Raises AdapterInvalid where PEFT itself would have to read them.
    """
    plain, written = next(
        ((plain, written) for plain, written in names.items() if plain != written), ("", "")
    )
    if plain and lane is ExecutionPath.SHADOW:
        refuse_adapter([f"{written} must be named {plain}"])
    return [f"the file's keys were read as PEFT spells them: {written} as {plain}"] if plain else []
