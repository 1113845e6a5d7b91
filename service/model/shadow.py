"""Trees that share the base's tensors: the bank's own, and one for each adapter that only PEFT can run.

No weight is copied and the base's own tree is never altered. Must not know requests, rows or scheduling.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from ..engine.request import Adapter
from ..errors import AdapterInvalid
from .contents import contents

Tree = TypeVar("Tree", bound=nn.Module)
SHARED_STATES = ("QuantState", "MatmulLtState")  # bitsandbytes keeps tensors in these beside the parameters


def share(model: Tree) -> Tree:
    """A copy of the module tree whose parameters and buffers are the very same tensors."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        memo[id(tensor)] = tensor
    for module in model.modules():
        for value in vars(module).values():
            if type(value).__name__ in SHARED_STATES:
                memo[id(value)] = value
    return copy.deepcopy(model, memo)


def planted(base: Tree, adapter: Adapter) -> Any:
    """PEFT's own model of the adapter on a tree that shares the base's tensors. Raises AdapterInvalid when not every tensor lands.

    Only PEFT's own tensors are loaded: one of the base's own, which some trainers save along, would be written through to the base (the
    reader has seen that it equals the base's).
    """
    tensors = contents(adapter)
    config = PeftConfig.from_pretrained(str(Path(adapter.config).parent), local_files_only=True)
    config.inference_mode = True
    model = get_peft_model(share(base), config)
    places = get_peft_model_state_dict(model, save_embedding_layers=False)
    if missing := sorted(places.keys() - tensors.keys()):
        raise AdapterInvalid([f"{len(missing)} tensors that PEFT needs are missing: {', '.join(missing[:4])}"])
    tensors = {key: tensors[key] for key in places}
    set_peft_model_state_dict(model, tensors)
    landed = get_peft_model_state_dict(model, save_embedding_layers=False)
    lost = [key for key, tensor in tensors.items() if not torch.equal(landed[key].cpu(), tensor.to(landed[key].dtype))]
    if lost:
        raise AdapterInvalid([f"PEFT did not take {len(lost)} of {len(tensors)} tensors: {', '.join(sorted(lost)[:4])}"])
    return model.eval().requires_grad_(False)


def own_bytes(tree: nn.Module, base: nn.Module) -> int:
    """Bytes of the tensors that the tree does not share with the base."""
    shared = {tensor.data_ptr() for tensor in (*base.parameters(), *base.buffers())}
    return sum(tensor.nbytes for tensor in (*tree.parameters(), *tree.buffers()) if tensor.data_ptr() not in shared)
