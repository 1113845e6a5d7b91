"""A small random model of a base's own class and config:
the same kinds of layers, every threshold within a few tokens.

Runs in the worker process; must not know settings, adapters or requests.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .compat import random_constructor

# The first layers are kept; where a kind of layer first comes behind these, one layer of each kind
MOST_LAYERS = 8
MOST_PARAMETERS = 150_000_000  # a config of which nothing could be shrunk is not to fill the memory
HEADS, EXPERTS, EXPERTS_PER_TOKEN = 4, 8, 2
EXPERT_CHOICES = {
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "n_group",
    "num_expert_group",
    "zero_expert_num",
}
INTERMEDIATE, VOCABULARY, LORA_RANK = 128, 512, 64
SHORT = 8  # stands for a threshold that the served context exceeds

MAMBA_HEADS = ("mamba_n_heads", "n_mamba_heads")

# Fields that speak of layers without being lists of one entry a layer.
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "max_window_layers")
LAST_LAYERS = ("num_kv_shared_layers",)
LAYER_NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attn_idxs")
PERIODS = (
    "decoder_sparse_step",
    "moe_layer_freq",
    "interleave_moe_layer_step",
    "sliding_window_pattern",
    "attn_layer_period",
    "expert_layer_period",
)

THRESHOLD = re.compile(
    r"window|chunk_size|local_attention|original_max_position|floor|index_topk|rel_extent|_n_floor"
)
NO_THRESHOLD = re.compile(r"layers|pattern|mamba|feed_forward")
WIDTH = re.compile(r"size|dim|width|embd|d_model")
NO_WIDTH = re.compile(r"vocab|window|chunk|intermediate|head_dim")
INNER = re.compile(r"intermediate|ffn|d_inner|n_inner|dim_ff|dff")
TOKEN = re.compile(r"token_id$|token_index$|token_ids$")


def small_model(model: Any, context: int, probe: int, seed: int) -> Any:
    """A random float32 model on the CPU; a sequence of `probe` tokens passes what one of `context`
    tokens would pass.

    Raises whatever the class raises for a config that it does not take, and ValueError where the
    config stays large.
    """
    config = shrink_config(model.config, context, probe)
    make = random_constructor(model)
    _check_size(make, copy.deepcopy(config))
    with torch.random.fork_rng(devices=[]):
        small = make(config, dtype=torch.float32, attn_implementation="eager").eval().requires_grad_(False)
        torch.manual_seed(seed)
        stir_weights(small)
    return small


def _check_size(make: Callable[..., Any], config: Any) -> None:
    with torch.device("meta"):
        weights = make(config, dtype=torch.float32).parameters()
        size = sum(weight.numel() for weight in weights)
    if size > MOST_PARAMETERS:
        raise ValueError(f"the smallest has {size} parameters")


def stir_weights(model: nn.Module) -> None:
    """No norm is left at ones, no bias or sink at zeros: they could be taken for each other, or be
    missed by nobody.
    """
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.normal_(0, weight.shape[-1] ** -0.5)
        else:
            factor = torch.empty_like(weight).uniform_(0.5, 1.5)
            offset = torch.empty_like(weight).uniform_(-0.3, 0.3)
            weight.mul_(factor).add_(offset)


def shrink_config(config: Any, context: int, probe: int) -> Any:
    """A copy with few layers, heads, experts and words.

    Sizes of a head stay, for rotary parameters speak of them. A threshold (window, chunk, original
    context) within `context` becomes one within the probe; one that no served sequence passes stays
    as far away.
    """
    small = copy.deepcopy(config)
    if getattr(small, "quantization_config", None) is not None:
        del small.quantization_config
    for name in small.sub_configs:
        part = getattr(small, name, None)
        if part is not None:
            setattr(small, name, shrink_config(part, context, probe))
    _shrink_depth(small)
    _shrink_width(small)
    for name, value in _fields(small):
        setattr(small, name, _shrink_field(name, value, context, probe))
    return small


def _fields(config: Any) -> list[tuple[str, Any]]:
    skipped = {"attribute_map", *config.sub_configs}
    values = vars(config)
    names = [name for name in values if not name.startswith("_") and name not in skipped]
    return [(name, values[name]) for name in names]


def _shrink_depth(config: Any) -> None:
    """Keeps the first layers, as many as show every kind of layer."""
    count = getattr(config, "num_hidden_layers", None)
    if not isinstance(count, int):
        return
    kept = _kept_layers(config, count)
    for name, value in _fields(config):
        setattr(config, name, _keep_layers(name, value, kept, count))
    config.num_hidden_layers = len(kept)


def _keep_layers(name: str, value: Any, kept: Sequence[int], count: int) -> Any:
    """A field's value for the kept layers of `count`."""
    if name in LAYER_NUMBERS:
        return [kept.index(i) for i in value if i in kept] if value else value
    if isinstance(value, list | tuple) and len(value) == count:
        return [value[i] for i in kept]
    if name in FIRST_LAYERS and value is not None:
        return sum(i < value for i in kept)
    if name in LAST_LAYERS and value:
        return sum(i >= count - value for i in kept)
    return value


def _kept_layers(config: Any, count: int) -> Sequence[int]:
    first: dict[tuple[Any, ...], int] = {}
    for i in range(count):
        first.setdefault(tuple(_layer_kind(config, i, count)), i)
    last = max(first.values(), default=0)
    if last >= MOST_LAYERS:
        return sorted(first.values())
    return range(min(count, max(2, last + 1)))


def _layer_kind(config: Any, i: int, count: int) -> list[Any]:
    """Layers whose kinds are equal are made alike."""
    kind: list[Any] = []
    for name, value in _fields(config):
        if name in LAYER_NUMBERS and value:
            kind.append(i in value)
        elif isinstance(value, list | tuple) and len(value) == count:
            kind.append(repr(value[i]))
        elif name in FIRST_LAYERS and value is not None:
            kind.append(i < value)
        elif name in LAST_LAYERS and value:
            kind.append(i >= count - value)
        elif name in PERIODS and isinstance(value, int) and 1 < value <= MOST_LAYERS:
            kind.append(i % value)
    return kind


def _shrink_width(config: Any) -> None:
    """Fewer heads, in groups as before where they share keys, and the hidden size of so many."""
    heads = getattr(config, "num_attention_heads", None)
    hidden = getattr(config, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(hidden, int):
        return
    kv = getattr(config, "num_key_value_heads", None) or heads
    few_kv = min(kv, HEADS // 2 if kv < heads else HEADS)
    few = few_kv * min(heads // kv, HEADS // 2)
    _shrink_mamba(config, hidden, few * (hidden // heads))
    for name, value in _fields(config):
        if re.search(r"heads|n_head$", name) and value in (heads, kv) and not isinstance(value, bool):
            setattr(config, name, few if value == heads else few_kv)
        elif value in (hidden, 2 * hidden) and WIDTH.search(name) and not NO_WIDTH.search(name):
            setattr(config, name, value // hidden * few * (hidden // heads))


def _shrink_mamba(config: Any, hidden: int, small_hidden: int) -> None:
    """Where all heads of mamba layers are a multiple of the hidden size, so are fewer of the small one."""
    inner = getattr(config, "mamba_expand", 0) * hidden
    head = getattr(config, "mamba_d_head", None) or getattr(config, "mamba_headdim", None) or 0
    for name in MAMBA_HEADS:
        count = getattr(config, name, 0)
        if inner and count * head == inner:
            setattr(config, name, count * small_hidden // hidden)


def _shrink_field(name: str, value: Any, context: int, probe: int) -> Any:
    if isinstance(value, dict):
        return {key: _shrink_field(str(key), part, context, probe) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_shrink_field(name, part, context, probe) for part in value]
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if _is_threshold(name):
        return SHORT if probe <= value < context else value
    if TOKEN.search(name):
        return value if value < VOCABULARY else value % VOCABULARY
    return min(value, _most(name))


def _is_threshold(name: str) -> bool:
    return bool(THRESHOLD.search(name) and not NO_THRESHOLD.search(name))


def thresholds(value: Any, context: int, probe: int, name: str = "") -> set[int]:
    """The thresholds of a config that sequences of `context` tokens pass."""
    if isinstance(value, int) and not isinstance(value, bool):
        return {value} if _is_threshold(name) and probe <= value < context else set()
    if isinstance(value, list | tuple):
        return {found for part in value for found in thresholds(part, context, probe, name)}
    parts = value.to_dict() if hasattr(value, "to_dict") else value
    if not isinstance(parts, dict):
        return set()
    return {found for key, part in parts.items() for found in thresholds(part, context, probe, str(key))}


def _most(name: str) -> float:
    """The largest value that a field of this name keeps."""
    if "vocab_size" in name:
        return VOCABULARY
    if INNER.search(name):
        return INTERMEDIATE
    if name.endswith("lora_rank"):
        return LORA_RANK
    if "topk_group" in name:
        return 1
    if "per_tok" in name or name in EXPERT_CHOICES:
        return EXPERTS_PER_TOKEN
    return EXPERTS if "experts" in name else float("inf")
