"""Trees that share the base's tensors:
the pool's own, and one for each adapter that only PEFT can run.

No weight is copied and the base's own tree is never altered. Runs in the worker process; must not
know requests, rows or scheduling.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..adapter_config import build_peft_config
from ..core.adapter import Adapter
from ..errors import AdapterInvalid, AdapterUnsupported
from .adapter_file import read_files
from .compat import reads_quantized
from .stored_quantization import is_quantized

Tree = TypeVar("Tree", bound=nn.Module)
# Adapters whose own code reads the packed weights, and the layers it misreads: 4-bit weights lie in
# another order on a CPU since their first forward, 8-bit ones lose their scales.
MISREAD = {"HIRA": {"Linear4bit"}, "use_dora": {"Linear4bit", "Linear8bitLt"}}
# Bitsandbytes keeps tensors in these beside the parameters
SHARED_STATES = ("QuantState", "MatmulLtState")


def share_tree(model: Tree) -> Tree:
    """A copy of the module tree whose parameters and buffers are the very same tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    for module in model.modules():
        for value in vars(module).values():
            if type(value).__name__ in SHARED_STATES:
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def build_peft_model(base: Tree, adapter: Adapter) -> Any:
    """PEFT's own model of the adapter on a tree that shares the base's tensors.

    Only PEFT's own tensors are loaded: one of the base's own, which some trainers save along, would
    be written through to the base (the validator has seen that it equals the base's). Raises
    AdapterUnsupported where PEFT cannot, AdapterInvalid when not every tensor lands.
    """
    raw, tensors = read_files(adapter)
    model = _inject_adapter(share_tree(base), build_peft_config(json.loads(raw)))
    _load_tensors(model, tensors, tensor_pointers(base))
    return model.eval().requires_grad_(False)


def _load_tensors(model: nn.Module, tensors: Mapping[str, Tensor], shared: set[int]) -> None:
    """Fills PEFT's own tensors; `shared` are those of the base, which stay as they are."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    _check_apart(model, own, shared)
    if missing := sorted(own.keys() - tensors.keys()):
        raise AdapterInvalid(
            [f"{len(missing)} tensors that PEFT needs are missing: {', '.join(missing[:4])}"]
        )
    needed = {key: tensors[key] for key in own}
    set_peft_model_state_dict(model, needed)
    landed = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = sorted(key for key, tensor in needed.items() if not _is_equal(landed[key], tensor))
    if lost:
        raise AdapterInvalid(
            [f"PEFT did not take {len(lost)} of {len(needed)} tensors: {', '.join(lost[:4])}"]
        )


def _is_equal(landed: Tensor, tensor: Tensor) -> bool:
    return torch.equal(landed.cpu(), tensor.to(landed.dtype))


def _inject_adapter(tree: nn.Module, config: PeftConfig) -> Any:
    kind = f"`{config.peft_type.value}`"
    _check_readable(tree, config)
    try:
        model = get_peft_model(tree, config)
    except Exception as error:  # whatever PEFT makes of this type on these layers
        raise AdapterUnsupported([f"PEFT cannot put {kind} on this base: {error}"[:300]]) from error
    for name, layer in model.named_modules():
        if isinstance(layer, BaseTunerLayer) and _is_misread(layer):
            raise AdapterUnsupported(
                [f"PEFT cannot run {kind} on a quantized base: it would misread the weights of {name}"]
            )
    return model


def _check_readable(tree: nn.Module, config: PeftConfig) -> None:
    """Raises AdapterUnsupported where the adapter's own code would misread packed weights."""
    reader = "use_dora" if getattr(config, "use_dora", False) else config.peft_type.value
    misread = MISREAD.get(reader, set())
    for name, layer in tree.named_modules():
        if type(layer).__name__ in misread and _on_cpu(layer):
            raise AdapterUnsupported(
                [
                    f"PEFT cannot run `{reader}` on a quantized base on a CPU: "
                    f"it would misread the weights of {name}"
                ]
            )


def _on_cpu(layer: nn.Module) -> bool:
    return all(weight.device.type == "cpu" for weight in layer.parameters())


def _is_misread(layer: BaseTunerLayer) -> bool:
    """Whether PEFT has put a layer on a quantized one that it does not know how to read: it takes
    such layers for plain ones.
    """
    return is_quantized(layer.get_base_layer()) and not reads_quantized(layer)


def _check_apart(model: nn.Module, own: Mapping[str, Tensor], shared: set[int]) -> None:
    """Raises AdapterUnsupported where weights would land in the base's own tensors, or tokens in KV
    blocks or states that are not the base's.
    """
    if through := sorted(key for key, tensor in own.items() if tensor.data_ptr() in shared):
        raise AdapterUnsupported([f"PEFT would write {through[0]} into the base's own weights"])
    for name, kept in model.named_buffers():
        is_of_sequences = name.rpartition(".")[2].startswith(("kv_keys", "conv_state_", "recurrent_state_"))
        if is_of_sequences and kept.data_ptr() not in shared:
            raise AdapterUnsupported(
                [f"PEFT has made a copy of a layer and what it keeps of sequences: {name}"]
            )


def tensor_pointers(base: nn.Module) -> set[int]:
    """The addresses of the base's tensors."""
    return {tensor.data_ptr() for tensor in (*base.parameters(), *base.buffers()) if tensor.numel()}


def own_bytes(tree: nn.Module, base: nn.Module) -> int:
    """Bytes of the tensors that the tree does not share with the base."""
    shared = tensor_pointers(base)
    tensors = (*tree.parameters(), *tree.buffers())
    return sum(tensor.nbytes for tensor in tensors if tensor.data_ptr() not in shared)
