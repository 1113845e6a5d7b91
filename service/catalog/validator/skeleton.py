"""Builds the base without its weights, from its config.json alone: module tree, shapes and types.

Runs in the validator process and the command line; must not know PEFT, whose import takes seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ...base_config import auto_class, read_base_config
from ...core.base_info import LayerLimit, LinearKind, name_pattern
from .. import facts
from ..architecture import ModuleNode


class Skeleton:
    """The module tree on the meta device. `folder` holds the base's config.json, or is that file.

    `limits` are the worker's reasons not to adapt some of the layers, `parameters` the name patterns
    of those that it adapts in the batch. Raises OSError, ValueError.
    """

    def __init__(
        self, folder: Path, limits: Iterable[LayerLimit] = (), parameters: Collection[str] = ()
    ) -> None:
        self.folder = folder
        self._parameters = frozenset(parameters)
        self._limits = {limit.pattern: limit for limit in limits}
        config = read_base_config(folder)
        with torch.device("meta"):
            self.model = auto_class(config).from_config(config, trust_remote_code=False)
        self.model.name_or_path = ""  # PEFT would look for a repository of this name

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def list_linears(self) -> list[LinearKind]:
        """The linear layers, counted by last name and shape."""
        counts: Counter[tuple[str, tuple[int, int]]] = Counter()
        for name, module in self.model.named_modules():
            if shape := linear_shape(module):
                counts[facts.last_name(name), shape] += 1
        return [LinearKind(name, *shape, count) for (name, shape), count in sorted(counts.items())]

    def limit(self, module: str) -> LayerLimit | None:
        """The reason that keeps this layer out of the mixed batch."""
        return self._limits.get(name_pattern(module))

    def adapts_parameter(self, parameter: str) -> bool:
        """Whether the mixed batch adapts this parameter."""
        return name_pattern(parameter) in self._parameters

    def make_tree(self) -> ModuleNode:
        return make_node("", self.model)

    def embedding_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the embedding's and the head's weights, by name, the embedding's first."""
        layers = [self.model.get_input_embeddings(), self.model.get_output_embeddings()]
        names = {id(module): f"{name}.weight" for name, module in self.model.named_modules()}
        return {names[id(layer)]: tuple(layer.weight.shape) for layer in layers if layer is not None}


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, Conv1D):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def make_node(name: str, module: nn.Module) -> ModuleNode:
    children = tuple(make_node(child_name, child) for child_name, child in module.named_children())
    text, extra = type(module).__name__, module.extra_repr()
    if not children and "\n" not in extra:
        text += f"({extra})"
    return ModuleNode(name, text, children, linear_shape(module))
