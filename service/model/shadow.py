"""Trees that share the base's tensors: the bank's own, and one for each adapter that only PEFT can run.

No weight is copied and the base's own tree is never altered. Must not know requests, rows or scheduling.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import nn

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
