"""Asks PEFT, on a skeleton of the base without weights, what an adapter means, and compares that with what its file holds.

Runs in a process of its own. The live base is never touched: names, shapes and scalings come from PEFT, values from the file.
"""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from json import dumps, loads
from pathlib import Path
from typing import Any

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from ..digest import digest
from ..engine.request import Adapter, Digest, Lane, Linear, Patch
from ..errors import AdapterInvalid, AdapterUnsupported, BadRequest
from . import facts, inspection, matching
from .architecture import Node
from .inspection import CONFIG, WEIGHTS, Config, Header
from .reading import Reading

# What PEFT itself runs beside the mixed batch. Add a feature's name (a config key, a peft_type, or one of `features` below) to serve it.
SHADOW_FEATURES: frozenset[str] = frozenset()

OPTIONS = (
    "modules_to_save", "trainable_token_indices", "lora_bias", "target_parameters", "alora_invocation_tokens", "layer_replication",
    "use_qalora", "monteclora_config", "velora_config", "use_bdlora", "arrow_config", "kasa_config", "megatron_config",
)  # fmt: skip
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # initialisations that leave part of the base's weights in the adapter
FLOATS = ("F64", "F32", "F16", "BF16")
PREFIX = "base_model.model."


@dataclass(frozen=True)
class Meaning:
    """What a config asks of the base: every tensor it needs, its pooled layers, and the features that are more than those."""

    expected: dict[str, tuple[int, ...]]
    patches: tuple[Patch, ...]
    features: frozenset[str]


class Skeleton:
    """The base's module tree on the meta device: shapes, names and types, no weights. `folder` holds its config.json, or is that file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        with torch.device("meta"):
            self.model = AutoModelForCausalLM.from_config(config)
        self.model.name_or_path = ""  # PEFT would look for a repository of this name
        self.meaning = lru_cache(maxsize=64)(self._meaning)  # most adapters of a fleet share a recipe

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def linears(self) -> list[Linear]:
        """The linear layers, counted by last name and shape."""
        counts = Counter((facts.leaf(name), found) for name, module in self.model.named_modules() if (found := shape(module)))
        return [Linear(name, inside, outside, count) for (name, (inside, outside)), count in sorted(counts.items())]

    def tree(self) -> Node:
        return node("", self.model)

    def _meaning(self, text: str) -> Meaning:
        """Injects this config (JSON text, without what does not matter here) into a copy of the tree."""
        config = peft_config(loads(text))
        config.inference_mode = True  # else PEFT would compute the prompts it saves, of weights that are not there
        with torch.device("meta"):
            model = get_peft_model(copy.deepcopy(self.model), config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
            state = get_peft_model_state_dict(model, save_embedding_layers=False)
        layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
        kinds = frozenset(kind for layer in layers.values() if (kind := kind_of(layer)))
        patches = tuple(patch(name, layer, expected) for name, layer in layers.items()) if not kinds else ()
        return Meaning(expected, patches, kinds | features(config))


def forecast(config: Path, r: int, modules: Sequence[str], dtype: str = "float32") -> dict[str, Any]:
    """What a LoRA of this rank would weigh on a base of which there is only a config.json (or its folder). Raises BadRequest."""
    if not config.exists():
        raise BadRequest(f"config: there is no file {config}", param="config")
    try:
        skeleton = Skeleton(config)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadRequest(f"config: no model can be made of {config.name}: {' '.join(str(error).split())[:200]}", param="config") from None
    return facts.forecast(skeleton.linears(), skeleton.parameters, r, modules, dtype)


def shape(module: nn.Module) -> tuple[int, int] | None:
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def node(name: str, module: nn.Module) -> Node:
    children = tuple(node(child_name, child) for child_name, child in module.named_children())
    extra = module.extra_repr()
    text = type(module).__name__ if children or "\n" in extra else f"{type(module).__name__}({extra})"
    return Node(name, text, children, shape(module))


def peft_config(config: Config) -> PeftConfig:
    """The config as PEFT's own class, without the keys that it does not know and without nulls, which PEFT does not expect everywhere."""
    made = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    return made(**{key: value for key, value in config.items() if key in known_keys(config["peft_type"]) and value is not None})


def known_keys(peft_type: str) -> frozenset[str]:
    return frozenset(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].__dataclass_fields__) - {"runtime_config"}


def features(config: PeftConfig) -> frozenset[str]:
    """What this config uses beyond low-rank changes of linear layers, by the names users know."""
    kind = str(config.peft_type.value)
    if kind != "LORA":
        return frozenset({kind})
    found = {name for name in OPTIONS if getattr(config, name, None)}
    if config.bias != "none":
        found.add("bias")
    if str(config.init_lora_weights) == "mica":
        found.add("init_lora_weights: mica")
    return frozenset(found)


def kind_of(layer: LoraLayer) -> str:
    """Why the pool cannot run this layer; empty when it can."""
    base = layer.get_base_layer()
    if not isinstance(base, (nn.Linear, Conv1D)):
        return f"LoRA on {type(base).__name__}"
    return "use_dora on Conv1D" if layer.lora_magnitude_vector and isinstance(base, Conv1D) else ""


def patch(name: str, layer: LoraLayer, expected: dict[str, tuple[int, ...]]) -> Patch:
    magnitude = f"{name}.lora_magnitude_vector"
    return Patch(
        module=name.removeprefix(PREFIX),
        rank=layer.r["default"],
        scaling=float(layer.scaling["default"]),
        a=f"{name}.lora_A.weight",
        b=f"{name}.lora_B.weight",
        magnitude=magnitude if magnitude in expected else None,
    )


# ---- reading one adapter


def read(skeleton: Skeleton, folder: Path, max_rank: int, known: Digest | None = None) -> Reading:
    """The adapter in this folder, validated against the base. `known`: its digest, when these very values were looked at before.

    Raises AdapterInvalid with every problem found at the first stage that finds one, AdapterUnsupported naming the feature.
    """
    raw, config = inspection.read_config(folder)
    refuse(inspection.config_problems(config, max_rank) + inspection.missing_weights(folder))
    header = inspection.read_header(folder / WEIGHTS)
    notes = strangers(config)
    meaning = understood(skeleton, config)
    copies = base_copies(skeleton, folder / WEIGHTS, header, meaning)
    own = {key: tensor for key, tensor in header.tensors.items() if key not in copies}
    names = matching.match(meaning.expected, own, skeleton.model.base_model_prefix)
    refuse(
        [f"{key} has the dtype {tensor.dtype}; {', '.join(FLOATS)} are read" for key, tensor in own.items() if tensor.dtype not in FLOATS]
    )
    patches = tuple(renamed(one, names) for one in meaning.patches)
    lane = Lane.SHADOW if meaning.features else Lane.POOL
    if known is None:
        notes += looked_at(folder / WEIGHTS, own, patches, lane)
    notes += spelling_notes(names, lane) + [f"{key} is a copy of the base's own weights and is not used" for key in sorted(copies)]
    adapted = [facts.Adapted(p.module, p.scaling, own[p.a], own[p.b], own[p.magnitude] if p.magnitude else None) for p in patches]
    adapter = Adapter(
        digest=known or digest(raw, folder / WEIGHTS),
        config=str(folder / CONFIG),
        weights=str(folder / WEIGHTS),
        lane=lane,
        rank=max((one.rank for one in patches), default=0) if lane is Lane.POOL else 0,
        size=sum(tensor.size for tensor in own.values()),
        patches=patches if lane is Lane.POOL else (),
    )
    return Reading(adapter, facts.described(config, header, adapted, copies), tuple(notes))


def refuse(problems: list[str]) -> None:
    if problems:
        raise AdapterInvalid(problems)


def strangers(config: Config) -> list[str]:
    """Warnings about keys that this PEFT does not know and that have a value; null, false and empty ones mean nothing."""
    if config["peft_type"] not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterUnsupported([f"`peft_type` {config['peft_type'][:40]!r} is not known"])
    unknown = config.keys() - known_keys(config["peft_type"])
    return [f"`{key[:80]}` in {CONFIG} is not known and is ignored: {dumps(config[key])[:80]}" for key in sorted(unknown) if config[key]]


def understood(skeleton: Skeleton, config: Config) -> Meaning:
    """What PEFT makes of the config. Raises AdapterInvalid with its reason, AdapterUnsupported for what is not served."""
    start = str(config.get("init_lora_weights", ""))
    if start.startswith(CHANGES_BASE):
        raise AdapterUnsupported(
            [f"`init_lora_weights` {start!r} changes the base's weights; convert the adapter to a plain LoRA when saving it"]
        )
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterUnsupported([f"`task_type` {config['task_type']!r} is not served, only CAUSAL_LM is"])
    aside = {"base_model_name_or_path", "revision", "peft_version", "auto_mapping", "lora_dropout", "inference_mode"}
    text = dumps({key: value for key, value in config.items() if key not in aside}, sort_keys=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            unserved = features(peft_config(loads(text))) - SHADOW_FEATURES
            meaning = Meaning({}, (), unserved) if unserved else skeleton.meaning(text)
    except Exception as error:  # whatever PEFT makes of a stranger's config, it is the config's fault
        raise AdapterInvalid([f"PEFT cannot apply {CONFIG} to the base: {error}"[:600]]) from None
    refused = sorted(meaning.features - SHADOW_FEATURES)
    if refused:
        raise AdapterUnsupported([f"`{name}` is not served" for name in refused])
    return meaning


def base_copies(skeleton: Skeleton, weights: Path, header: Header, meaning: Meaning) -> set[str]:
    """Keys of embedding and head weights that were saved along, unchanged. Raises AdapterInvalid when they are resized or trained."""
    layers = {id(skeleton.model.get_input_embeddings()), id(skeleton.model.get_output_embeddings())}
    names = {f"{name}.weight": module.weight.shape for name, module in skeleton.model.named_modules() if id(module) in layers}
    found: set[str] = set()
    for key in header.tensors.keys() - meaning.expected.keys():
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if name in names:
            ours, theirs = names[name], header.tensors[key].shape
            if ours != theirs:
                was = f"the vocabulary was resized from {ours[0]} to {theirs[0]}"
                refuse([f"{key} has the shape {list(theirs)}, the base's is {list(ours)}: {was}"])
            if not same(skeleton, name, weights, key):
                raise AdapterUnsupported([f"{key} differs from the base's own: saved and trained embedding weights are not served"])
            found.add(key)
    return found


def same(skeleton: Skeleton, name: str, weights: Path, key: str) -> bool:
    """Whether the base's weights of this name equal the adapter's tensor, in the adapter's dtype."""
    tied = skeleton.model.config.tie_word_embeddings
    embedding = next(f"{n}.weight" for n, m in skeleton.model.named_modules() if m is skeleton.model.get_input_embeddings())
    for file in sorted(skeleton.folder.glob("*.safetensors")):
        with safe_open(file, "pt") as ours, safe_open(weights, "pt") as theirs:
            for candidate in (name, *([embedding] if tied else [])):
                if candidate in ours.keys():  # noqa: SIM118 (not a mapping)
                    saved = theirs.get_tensor(key)
                    return torch.equal(ours.get_tensor(candidate).to(saved.dtype), saved)
    return False


def renamed(patch: Patch, names: dict[str, str]) -> Patch:
    return replace(patch, a=names[patch.a], b=names[patch.b], magnitude=names[patch.magnitude] if patch.magnitude else None)


def looked_at(weights: Path, own: dict[str, inspection.Tensor], patches: tuple[Patch, ...], lane: Lane) -> list[str]:
    """Reads every value once. Raises AdapterInvalid naming the first tensor that is not finite; warns when nothing would change."""
    idle = lane is Lane.POOL and all(patch.magnitude is None for patch in patches)
    outer = {patch.b for patch in patches if patch.scaling}
    with safe_open(weights, "pt") as file:
        for key in own:
            tensor = file.get_tensor(key)
            if not (fine := torch.isfinite(tensor)).all():
                refuse([f"{key} holds {int((~fine).sum())} values that are NaN or infinite"])
            idle = idle and not (key in outer and tensor.any())
    return ["every lora_B is zero: this adapter says what the base says"] if idle else []


def spelling_notes(names: dict[str, str], lane: Lane) -> list[str]:
    """Warns of keys in another trainer's spelling. Raises AdapterInvalid where PEFT itself would have to read them."""
    plain, written = next(((plain, written) for plain, written in names.items() if plain != written), ("", ""))
    if plain and lane is Lane.SHADOW:
        refuse([f"{written} must be named {plain}"])
    return [f"the file's keys were read as PEFT spells them: {written} as {plain}"] if plain else []
