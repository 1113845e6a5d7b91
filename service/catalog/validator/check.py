"""Validates an adapter: compares PEFT's reading of its config with its file, and looks at every
value once.

Runs in the validator process. The live base is never touched: names, shapes and scalings come from
PEFT, values from the file.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from . import header as header_reader
from .header import CONFIG, WEIGHTS, Config, Header, TensorInfo
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
    config = read_config(folder, max_rank)
    weights = folder / WEIGHTS
    header = header_reader.read_header(weights)
    check_openable(weights)
    notes = unknown_keys(config)
    resolved = resolve_config(skeleton, config)
    copies = base_copies(skeleton, weights, header, resolved)
    own = {key: tensor for key, tensor in header.tensors.items() if key not in copies}
    names = match.match_tensors(resolved.expected, own, skeleton.model.base_model_prefix)
    check_dtypes(own)
    layers = tuple(rename_tensors(layer, names) for layer in resolved.patches)
    if not known:
        check_finite(weights, header, own)
        refuse_adapter(text_files.find_problems(folder))
    if resolved.lane is ExecutionPath.POOL and changes_nothing(weights, header, layers):
        notes.append(
            "each of its layers has zeros for lora_A, lora_B or alpha: this adapter says what the base says"
        )
    notes += spelling_notes(names, resolved.lane)
    notes += [f"{key} is a copy of the base's own weights and is not used" for key in sorted(copies)]
    adapter = make_adapter(folder, config, resolved.lane, layers, own, known)
    modules = [describe_layer(layer, own) for layer in layers]
    content = facts.describe_content(config, header, modules, copies, resolved.modules)
    content["features"] = sorted(resolved.features)
    return ValidatedAdapter(adapter, content, tuple(notes), layers)


def read_config(folder: Path, max_rank: int) -> Config:
    """The config, which is right as such. Raises AdapterInvalid, also where there are no weights."""
    config = header_reader.read_config(folder)
    problems = header_reader.config_problems(config, max_rank)
    refuse_adapter(problems + header_reader.missing_weights(folder))
    refuse_adapter(header_reader.pattern_problems(config))
    return config


def make_adapter(
    folder: Path,
    config: Config,
    path: ExecutionPath,
    layers: tuple[LoraLayerSpec, ...],
    own: Mapping[str, TensorInfo],
    known: Manifest,
) -> Adapter:
    """The engine's part of the validated content."""
    files = known or read_manifest(folder)
    patches = layers if path is ExecutionPath.POOL else ()
    return Adapter(
        digest=compute_digest(files),
        config=str(folder / CONFIG),
        weights=str(folder / WEIGHTS),
        lane=path,
        rank=max((layer.rank for layer in patches), default=0),
        size=sum(tensor.size for tensor in own.values()),
        patches=patches,
        invocation=tuple(config.get(ACTIVATED) or ()),
        files=files,
    )


def describe_layer(layer: LoraLayerSpec, own: Mapping[str, TensorInfo]) -> facts.LoraModuleInfo:
    magnitude = own[layer.magnitude] if layer.magnitude else None
    factors = own[layer.a], own[layer.b]
    return facts.LoraModuleInfo(layer.module, layer.scaling, *factors, magnitude, layer.experts)


def check_dtypes(own: Mapping[str, TensorInfo]) -> None:
    """Raises AdapterInvalid naming every tensor of a dtype that is not read."""
    readable = ", ".join(FLOATS)
    odd = [(key, tensor.dtype) for key, tensor in own.items() if tensor.dtype not in FLOATS]
    refuse_adapter([f"{key} has the dtype {dtype}; {readable} are read" for key, dtype in odd])


def measure_norms(adapter: Adapter, layers: Sequence[LoraLayerSpec]) -> dict[str, float]:
    """Module → Frobenius norm of scaling · B · A [out, in]; of a DoRA layer too, whose trained
    magnitudes are not in it.

    Raises AdapterInvalid when the files have changed since they were validated, OSError when they
    are gone.
    """
    weights = Path(adapter.weights)
    present = {hash_file(Path(adapter.config)), hash_file(weights)}
    if not present <= set(adapter.files):
        raise AdapterInvalid([CHANGED])
    with safe_open(weights, "pt") as file:
        norms = {}
        for layer in layers:
            norm = product_norm(file.get_tensor(layer.a), file.get_tensor(layer.b), layer.experts)
            norms[layer.module] = abs(layer.scaling) * norm
        return norms


def product_norm(a: torch.Tensor, b: torch.Tensor, experts: int = 1) -> float:
    """The Frobenius norm of B [out, rank] · A [rank, in] by two matrices [rank, rank]: it is the
    root of the trace of AAᵀ · BᵀB; of several experts' products together.
    """
    a = a.double().reshape(experts, -1, a.shape[1])
    b = b.double().reshape(b.shape[0], -1, experts).permute(2, 0, 1)
    trace = ((a @ a.mT) * (b.mT @ b)).sum()
    return float(trace.clamp(min=0).sqrt())


def refuse_adapter(problems: list[str]) -> None:
    """Raises AdapterInvalid where there are problems."""
    if problems:
        raise AdapterInvalid(problems)


def check_openable(weights: Path) -> None:
    """Raises AdapterInvalid where the library would not open the file, for the worker reads it so."""
    try:
        with safe_open(weights, "pt"):
            pass
    except SafetensorError as error:
        refuse_adapter([f"{WEIGHTS} is damaged: {error}"])


def base_copies(skeleton: Skeleton, weights: Path, header: Header, resolved: ResolvedConfig) -> set[str]:
    """Keys of embedding and head weights that were saved along, unchanged but for casts.

    Raises AdapterInvalid when they are resized, AdapterUnsupported when they are trained.
    """
    shapes = skeleton.embedding_shapes()
    copies: dict[str, str] = {}
    for key in header.tensors.keys() - resolved.expected.keys():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name in shapes and header.tensors[key].dtype in FLOATS:
            copies[key] = name
    for key, name in copies.items():
        ours, theirs = shapes[name], header.tensors[key].shape
        if ours != theirs:
            shape = f"{key} has the shape {list(theirs)}, the base's is {list(ours)}"
            refuse_adapter([f"{shape}: the vocabulary was resized from {ours[0]} to {theirs[0]}"])
    for key, saved in iterate_values(weights, header, copies):
        change = describe_change(skeleton, copies[key], saved)
        if change:
            raise AdapterUnsupported([f"{key} {change}: saved and trained embedding weights are not served"])
    return set(copies)


def describe_change(skeleton: Skeleton, name: str, saved: torch.Tensor) -> str:
    """How this tensor differs from the base's of this name; empty where only its dtype may."""
    difference = base_weights.compare(skeleton.model, skeleton.folder, name, saved)
    if difference is None:
        return "cannot be compared with the base's own, which lies otherwise in its files"
    if not difference.changed:
        return ""
    share = f"{difference.changed} of {difference.total} values"
    return f"differs from the base's own in {share}, by {difference.largest:.2g} at most"


def rename_tensors(patch: LoraLayerSpec, names: dict[str, str]) -> LoraLayerSpec:
    """The layer with its tensors under the names that the file has for them."""
    magnitude = names[patch.magnitude] if patch.magnitude else None
    return replace(patch, a=names[patch.a], b=names[patch.b], magnitude=magnitude)


def check_finite(weights: Path, header: Header, own: Collection[str]) -> None:
    """Reads every value once.

    Raises AdapterInvalid naming the first tensor that is not finite, in float32 at the latest.
    """
    for key, tensor in iterate_values(weights, header, own):
        values = tensor.float() if tensor.dtype is torch.float64 else tensor
        finite = torch.isfinite(values)
        if not finite.all():
            count = int((~finite).sum())
            refuse_adapter([f"{key} holds {count} values that are NaN or infinite"])


def changes_nothing(weights: Path, header: Header, patches: tuple[LoraLayerSpec, ...]) -> bool:
    """Whether no layer changes anything; no more is read than the first one that does."""

    def is_zero(key: str) -> bool:
        return not any(tensor.any() for _, tensor in iterate_values(weights, header, [key]))

    for patch in patches:
        if patch.magnitude is not None:
            return False
        if patch.scaling and not is_zero(patch.b) and not is_zero(patch.a):
            return False
    return True


def iterate_values(
    weights: Path, header: Header, keys: Collection[str]
) -> Iterator[tuple[str, torch.Tensor]]:
    """These tensors, flat, over the file's own pages. safe_open would lose 64 bytes with each tensor."""
    with weights.open("rb") as file:
        memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    for key in keys:
        info = header.tensors[key]
        offset = header.header_bytes + info.start
        if info.count:
            dtype = FLOATS[info.dtype]
            yield key, torch.frombuffer(memory, dtype=dtype, count=info.count, offset=offset)


def spelling_notes(names: dict[str, str], path: ExecutionPath) -> list[str]:
    """Warns of keys in another trainer's spelling.

    Raises AdapterInvalid where PEFT itself would have to read them.
    """
    for plain, written in names.items():
        if plain != written:
            if path is ExecutionPath.SHADOW:
                refuse_adapter([f"{written} must be named {plain}"])
            return [f"the file's keys were read as PEFT spells them: {written} as {plain}"]
    return []
