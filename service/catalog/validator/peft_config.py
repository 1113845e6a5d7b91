"""Resolves an adapter's config on a base by PEFT itself: layers, ranks, scalings, tensors.

Runs in the validator process; must not know weights or files.
"""

from __future__ import annotations

import copy
import signal
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from json import dumps, loads

import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.trainable_tokens.layer import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ...adapter_config import ASIDE, build_peft_config, known_keys
from ...core.adapter import ExecutionPath, LoraLayerSpec
from ...core.base_info import LayerLimit
from ...errors import AdapterInvalid, AdapterUnsupported
from .header import CONFIG, Config
from .skeleton import Skeleton, linear_shape

PARAMETERS = "target_parameters"
ACTIVATED = "alora_invocation_tokens"  # runs in the pool, if it is all that a config asks for
# Features that PEFT itself runs beside the mixed batch. Add a feature's name (a config key, a
# peft_type, or one of `features` below) to serve it.
SHADOW_FEATURES = frozenset(
    {
        "modules_to_save", "trainable_token_indices", "lora_bias", PARAMETERS,
        "LoRA on Embedding", "LoRA on some of the tokens",
        "IA3", "VERA", "LOHA", "LOKR", "OFT", "BEFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "GLORA",
        "GRALORA", "HIRA", "HRA", "LN_TUNING", "MISS", "OSF", "PEANUT", "PSOFT", "RANDLORA", "ROAD",
        "TINYLORA", "TRAINABLE_TOKENS", "VBLORA", "WAVEFT",
    }
)  # fmt: skip

OPTIONS = (
    "modules_to_save", "trainable_token_indices", "lora_bias", PARAMETERS,
    ACTIVATED, "layer_replication", "use_qalora", "monteclora_config", "velora_config",
    "use_bdlora", "arrow_config", "kasa_config", "megatron_config",
)  # fmt: skip
# Initialisations that leave part of the base's weights in the adapter
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
PREFIX = "base_model.model."
# Of processor time; usually a tenth of a second. A worker may have to do it again, and its steps
# wait meanwhile
APPLYING_S = 10.0


@dataclass(frozen=True)
class ResolvedConfig:
    """A config resolved on the base: every tensor it needs, its LoRA layers, and its further features.

    `modules` are all layers that it changes; `refused` says which of these not even PEFT can run on
    this base. `adapts_parameters`: the mixed batch adapts every parameter that it names.
    """

    expected: dict[str, tuple[int, ...]]
    patches: tuple[LoraLayerSpec, ...]
    features: frozenset[str]
    modules: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    adapts_parameters: bool = False

    @property
    def lane(self) -> ExecutionPath:
        in_batch = {ACTIVATED, PARAMETERS} if self.adapts_parameters else {ACTIVATED}
        return ExecutionPath.POOL if self.features <= in_batch else ExecutionPath.SHADOW


def resolve_config(skeleton: Skeleton, config: Config) -> ResolvedConfig:
    """The config as PEFT applies it.

    Raises AdapterInvalid with PEFT's reason, AdapterUnsupported for what is not served.
    """
    check_served(config)
    # Of a pattern's own keys the first that matches counts: these stay in their order
    text = dumps({key: config[key] for key in sorted(config) if key not in ASIDE})
    try:
        with warnings.catch_warnings(), limit_time(APPLYING_S):
            warnings.simplefilter("ignore")
            resolved = apply_config(skeleton, text)
    except Exception as error:  # whatever PEFT makes of a stranger's config, it is the config's fault
        raise AdapterInvalid([f"PEFT cannot apply {CONFIG} to the base: {error}"[:600]]) from None
    if unserved := find_unserved(resolved.features):
        others = sorted(resolved.features - {ACTIVATED}) if unserved == {ACTIVATED} else ()
        beside = f" beside {', '.join(others)}" if others else ""
        raise AdapterUnsupported([f"`{name}` is not served{beside}" for name in sorted(unserved)])
    if resolved.refused:
        raise AdapterUnsupported(resolved.refused)
    return resolved


def check_served(config: Config) -> None:
    """Raises AdapterUnsupported for an initialisation or a task that is not served."""
    start = str(config.get("init_lora_weights", ""))
    if start.lower().startswith(CHANGES_BASE):
        advice = "convert the adapter to a plain LoRA when saving it"
        raise AdapterUnsupported([f"`init_lora_weights` {start!r} changes the base's weights; {advice}"])
    task = config.get("task_type")
    if task not in (None, "CAUSAL_LM"):
        raise AdapterUnsupported([f"`task_type` {task!r} is not served, only CAUSAL_LM is"])
    if task is None and config.get(ACTIVATED):
        refusal = f"`{ACTIVATED}` without the `task_type` CAUSAL_LM: PEFT itself would never wake it"
        raise AdapterUnsupported([refusal])


def apply_config(skeleton: Skeleton, text: str) -> ResolvedConfig:
    """The config on the base; its features alone where one of them is not served."""
    features = list_features(build_peft_config(loads(text)))
    if find_unserved(features):
        return ResolvedConfig({}, (), features)
    return inject_config(skeleton, text)


@contextmanager
def limit_time(seconds: float) -> Iterator[None]:
    """Ends what takes more processor time, also in the midst of matching a regex.

    For a process's main thread only.
    """

    def raise_timeout(*_: object) -> None:
        raise TimeoutError(f"it takes more than {seconds:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, raise_timeout)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def find_unserved(features: frozenset[str]) -> frozenset[str]:
    return frozenset() if features == {ACTIVATED} else features - SHADOW_FEATURES


@lru_cache(maxsize=64)  # most adapters of a fleet share a recipe
def inject_config(skeleton: Skeleton, text: str) -> ResolvedConfig:
    """Injects this config (JSON text, without what does not matter here) into a copy of the tree."""
    config = build_peft_config(loads(text))
    with torch.device("meta"):
        base = copy.deepcopy(skeleton.model)
        model = get_peft_model(base, config, autocast_adapter_dtype=False, low_cpu_mem_usage=True)
        state = get_peft_model_state_dict(model, save_embedding_layers=False)
    check_tokens(model)
    tuned = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    layers = {name: layer for name, layer in tuned.items() if isinstance(layer, LoraLayer)}
    saved = {name: layer for name, layer in model.named_modules() if isinstance(layer, ModulesToSaveWrapper)}
    expected = {key: tuple(tensor.shape) for key, tensor in state.items()}
    limits = limits_of(skeleton, tuned | saved)
    features = list_features(config) | frozenset(filter(None, map(kind_of, layers.values())))
    features |= model_features(skeleton, model, config, limits)
    patches = tuple(make_layer_spec(name, layer, expected) for name, layer in layers.items())
    modules = tuple(patch.module for patch in patches) or tuple(map(_base_name, tuned))
    refused = describe_refused("LoRA" if layers else config.peft_type.value, limits)
    parameters = [name for name, layer in layers.items() if isinstance(layer, ParamWrapper)]
    adapts = all(skeleton.adapts_parameter(_module_of(name, layers[name])) for name in parameters)
    return ResolvedConfig(expected, patches, features, modules, refused, adapts)


def model_features(
    skeleton: Skeleton, model: nn.Module, config: PeftConfig, limits: Iterable[LayerLimit]
) -> frozenset[str]:
    """Features that only the tree with the adapter in it shows."""
    features: set[str] = set()
    if any(limit.by_peft for limit in limits):
        features.add("LoRA on some of the tokens")
    # The copies would have KV blocks of their own, which nobody shares or clears
    if count_attentions(model) > count_attentions(skeleton.model):
        saved = getattr(config, "modules_to_save", None)
        source = "modules_to_save" if saved else config.peft_type.value
        features.add(f"{source} on attention layers")
    return frozenset(features)


def describe_refused(kind: str, limits: Iterable[LayerLimit]) -> tuple[str, ...]:
    refused = [limit for limit in limits if not limit.by_peft]
    return tuple(f"{kind} on {limit.kind} is not served: {limit.pattern} {limit.reason}" for limit in refused)


def limits_of(skeleton: Skeleton, tuned: Mapping[str, nn.Module]) -> list[LayerLimit]:
    """The limits that keep these layers out of the mixed batch, each once.

    An adapted parameter leaves its layer's calls alone, and has none.
    """
    called = (name for name, layer in tuned.items() if not isinstance(layer, ParamWrapper))
    limits = (skeleton.limit(_base_name(name)) for name in called)
    return list(dict.fromkeys(limit for limit in limits if limit))


def unknown_keys(config: Config) -> list[str]:
    """Warnings about keys that this PEFT does not know and that have a value (null, false and empty
    ones mean nothing), and PEFT's own.

    Raises AdapterUnsupported for an unknown type, AdapterInvalid for a config of a version that
    PEFT cannot read any more.
    """
    peft_type = config["peft_type"]
    if peft_type not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise AdapterUnsupported([f"`peft_type` {peft_type[:40]!r} is not known"])
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        try:
            PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].check_kwargs(**config)
        except Exception as error:  # whatever PEFT makes of a stranger's config, it is the config's fault
            raise AdapterInvalid([f"PEFT cannot read {CONFIG}: {error}"[:600]]) from None
    unknown = [key for key in sorted(config.keys() - known_keys(peft_type)) if config[key]]
    notes = [_describe_unknown(key, config[key]) for key in unknown]
    return notes + [f"PEFT warns: {warning.message}" for warning in raised]


def _describe_unknown(key: str, value: object) -> str:
    return f"`{key[:80]}` in {CONFIG} is not known and is ignored: {dumps(value)[:80]}"


def list_features(config: PeftConfig) -> frozenset[str]:
    """The features of this config beyond low-rank changes of linear layers, by the names users know."""
    kind = str(config.peft_type.value)
    features = {kind}
    if kind == "LORA":
        features = {name for name in OPTIONS if getattr(config, name, None)}
    if getattr(config, "bias", "none") != "none":
        features.add("bias")
    if str(getattr(config, "init_lora_weights", "")) == "mica":
        features.add("init_lora_weights: mica")
    return frozenset(features)


def check_tokens(model: nn.Module) -> None:
    """Raises ValueError for trained tokens that the base does not have: weights that are not there,
    as here, have no such limit.
    """
    for name, layer in model.named_modules():
        if not isinstance(layer, TrainableTokensLayer):
            continue
        count = layer.get_base_layer().weight.shape[0]
        for token in layer.token_indices["default"]:
            if type(token) is not int or not 0 <= token < count:
                module = name.removeprefix(PREFIX).removesuffix(".token_adapter")
                raise ValueError(f"token {token!r} of {module} is none of its {count}")


def count_attentions(model: nn.Module) -> int:
    """How many attention layers there are, by the name that transformers gives all of their
    classes.
    """
    return sum("Attention" in type(module).__name__ for module in model.modules())


def kind_of(layer: LoraLayer) -> str:
    """What this layer is beside a linear layer that the pool can run; empty where it is just that."""
    if isinstance(layer, ParamWrapper):
        return PARAMETERS
    base = layer.get_base_layer()
    if linear_shape(base) is None:
        return f"LoRA on {type(base).__name__}"
    plain = isinstance(base, nn.Linear) or not layer.lora_magnitude_vector
    return "" if plain else f"use_dora on {type(base).__name__}"


def make_layer_spec(name: str, layer: LoraLayer, expected: dict[str, tuple[int, ...]]) -> LoraLayerSpec:
    magnitude = f"{name}.lora_magnitude_vector"
    prefix = f"{name}.lora_embedding_" if layer.lora_embedding_A else f"{name}.lora_"
    a, b = f"{prefix}A", f"{prefix}B"
    return LoraLayerSpec(
        module=_module_of(name, layer),
        rank=layer.r["default"],
        scaling=float(layer.scaling["default"]),
        a=a if a in expected else f"{a}.weight",
        b=b if b in expected else f"{b}.weight",
        magnitude=magnitude if magnitude in expected else None,
        experts=getattr(layer, "num_experts", 1),
    )


def _module_of(name: str, layer: LoraLayer) -> str:
    """The layer's name in the base; of a parameter that is no linear layer's weight, the parameter's own."""
    if not isinstance(layer, ParamWrapper) or linear_shape(layer.get_base_layer()):
        return _base_name(name)
    # PEFT nests the wrappers of the parameters of one module
    return f"{_base_name(name.replace('.base_layer', ''))}.{layer.parameter_name}"


def _base_name(name: str) -> str:
    return name.removeprefix(PREFIX)
