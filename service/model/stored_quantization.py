"""Says how a base is quantized: what a checkpoint that comes quantized names as its method, whether
that can be run here, and what the loaded layers hold.

Runs in the worker process. Reads configs and layers; must not know files, adapters or requests.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from ..errors import SettingsError

# Importable packages without which transformers cannot run a method, and the names they are installed by.
# Of a method that is not here transformers says itself what it lacks
PACKAGES: dict[str, Mapping[str, str]] = {
    "gptq": {"optimum": "optimum", "gptqmodel": "gptqmodel"},
    "awq": {"gptqmodel": "gptqmodel"},
    "compressed-tensors": {"compressed_tensors": "compressed-tensors"},
    "auto-round": {"auto_round": "auto-round"},
    "aqlm": {"aqlm": "aqlm"},
    "eetq": {"kernels": "kernels"},
    "fbgemm_fp8": {"fbgemm_gpu": "fbgemm-gpu"},
    "fp_quant": {"fp_quant": "fp_quant"},
    "higgs": {"flute": "flute-kernel"},
    "hqq": {"hqq": "hqq"},
    "nvfp4": {"kernels": "kernels"},
    "quanto": {"optimum.quanto": "optimum-quanto"},
    "quark": {"quark": "amd-quark"},
    "sinq": {"sinq": "sinq"},
    "spqr": {"spqr_quant": "spqr_quant"},
    "torchao": {"torchao": "torchao"},
    "vptq": {"vptq": "vptq"},
}
# The methods whose packages come with an extra of ours
EXTRAS = {"gptq": "gptq", "awq": "gptq", "compressed-tensors": "compressed-tensors"}
# What transformers makes plain weights of where there is no GPU that multiplies them as they are
PLAIN_ON_CPU = frozenset({"fp8", "mxfp8", "mxfp4", "compressed-tensors"})
# Bits of bitsandbytes' own, by the switch that a stored config sets
SWITCHES = {"load_in_8bit": "int8", "load_in_4bit": "nf4"}
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)  # dtypes that a product is made in


def stored_config(config: Any) -> Mapping[str, Any] | None:
    """What a model's config says of how its weights are stored; None where they are not quantized.

    Raises SettingsError where that is no object with a method.
    """
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored:
            if isinstance(stored, Mapping) and (stored.get("quant_method") or _switch(stored)):
                return stored
            raise SettingsError("its `quantization_config` names no `quant_method`")
    return None


def stored_method(stored: Mapping[str, Any]) -> str:
    """The method as `/base` names it: nf4, fp4 or int8 of bitsandbytes, else transformers' name."""
    switch = _switch(stored)
    if switch is None:
        method = stored["quant_method"]
        return str(getattr(method, "value", method))
    is_4bit = switch == "load_in_4bit"
    return str(stored.get("bnb_4bit_quant_type", "fp4")) if is_4bit else SWITCHES[switch]


def _switch(stored: Mapping[str, Any]) -> str | None:
    return next((switch for switch in SWITCHES if stored.get(switch)), None)


def check_stored(stored: Mapping[str, Any], setting: str) -> None:
    """Raises SettingsError where the setting asks for another method, transformers does not know
    the stored one, or its package is not there.
    """
    method = stored_method(stored)
    if _switch(stored) is None and method not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        raise SettingsError(f"it is quantized by {method[:40]!r}, a method that transformers does not know")
    if setting not in ("auto", method):
        raise SettingsError(
            f"it is stored in {method}, which ADAPTERD_QUANTIZATION={setting} cannot change; `auto` serves it"
        )
    if lacking := [name for name in PACKAGES.get(method, {}) if not _is_installed(name)]:
        packages = " ".join(PACKAGES[method][name] for name in lacking)
        extra = f"'adapterd[{EXTRAS[method]}]'" if method in EXTRAS else packages
        raise SettingsError(f"it is quantized by {method}, which needs {packages}: pip install {extra}")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # of a part, where the whole is not there
        return False


def is_packed(module: nn.Module) -> bool:
    """Whether it is a linear layer of a class of its own, which holds packed values: GPTQ's and AWQ's are no
    `nn.Linear`.
    """
    widths = (getattr(module, name, None) for name in ("in_features", "out_features"))
    if not all(isinstance(width, int) for width in widths):
        return False
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    return any(not tensor.is_floating_point() for tensor in own)


def is_quantized(layer: nn.Module) -> bool:
    """Whether a linear layer's weight is held in a form that only its own class reads."""
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, Tensor):
        return is_packed(layer)
    has_own_class = type(weight).__module__.partition(".")[0] in ("bitsandbytes", "torchao")
    return has_own_class or weight.dtype not in COMPUTED


def held_method(layers: Iterable[nn.Module], stored: Mapping[str, Any] | None) -> str:
    """How these linear layers are quantized now; `none` where all were made plain while they were loaded."""
    quantized = next(filter(is_quantized, layers), None)
    if quantized is None:
        return "none"
    weight: Any = getattr(quantized, "weight", None)
    if hasattr(weight, "quant_state"):
        return str(weight.quant_state.quant_type)
    if hasattr(weight, "SCB"):
        return "int8"
    return stored_method(stored) if stored else type(quantized).__name__


def expert_parameters(model: nn.Module) -> Iterator[Tensor]:
    """The weights that a mixture keeps as one [experts, ., .]: no method quantizes them that works
    layer by layer.
    """
    for module in model.modules():
        if not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            own = module.parameters(recurse=False)
            yield from (weight for weight in own if weight.dim() == 3 and weight.dtype in COMPUTED)
