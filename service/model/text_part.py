"""The text part of a base that sees images or hears sounds as well: the rest is found by a forward
of text, let go of, and kept from adapters.

Runs in the worker process; must not know adapters, requests or settings.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..core.base_info import LayerLimit, name_pattern


@contextmanager
def recorded_modules(model: nn.Module) -> Iterator[set[nn.Module]]:
    """The modules that are called while it is open."""
    called: set[nn.Module] = set()
    modules = list(model.modules())
    hooks = [module.register_forward_pre_hook(lambda module, _: called.add(module)) for module in modules]
    try:
        yield called
    finally:
        for hook in hooks:
            hook.remove()


def release_other_parts(model: Any, called: set[nn.Module]) -> tuple[LayerLimit, ...]:
    """Empties the modules beside the language model of which a forward of text has called none.

    Returns the reasons not to adapt what was in them. A model of text only is left alone.
    """
    if model.config.get_text_config() is model.config:
        return ()
    text = {model.get_decoder(), model.get_output_embeddings()}
    limits: dict[str, LayerLimit] = {}
    for name, part in list(_idle_parts("", model, text, called)):
        for inner, module in part.named_modules():
            pattern = name_pattern(f"{name}.{inner}".removesuffix("."))
            reason = f"is in {name}, beside the language model, which alone is served"
            limits[pattern] = LayerLimit(pattern, type(module).__name__, reason, by_peft=False)
        _empty(part)
    return tuple(limits.values())


def _idle_parts(
    prefix: str, module: nn.Module, text: set[nn.Module], called: set[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The outermost modules, by name, that hold nothing of the text part and were not called."""
    for name, child in module.named_children():
        inner = set(child.modules())
        if child in text:
            continue
        if not inner.isdisjoint(text):
            yield from _idle_parts(f"{prefix}{name}.", child, text, called)
        elif inner.isdisjoint(called):
            yield f"{prefix}{name}", child


def _empty(module: nn.Module) -> None:
    """The module itself stays, for code that asks whether it is there."""
    children, tensors = module.named_children(), module.named_parameters(recurse=False)
    buffers = module.named_buffers(recurse=False)
    for name, _ in [*children, *tensors, *buffers]:
        delattr(module, name)
