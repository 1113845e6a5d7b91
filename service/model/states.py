"""Layers that keep a state of their own in place of keys and values: mamba, gated delta rule, short
convolutions.

Such a layer has one buffer for each of its states, [slot, ...], and each sequence that runs has a
slot. A state exists only at its sequence's end, so none is ever shared. transformers asks all of
these layers' states of its cache by one interface; here it is asked of a part of a step. Runs in
the worker process; must not know adapters, requests or scheduling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from .kv import PROBED_TOKENS, refuse_base
from .memory import lazy_zeros
from .step_layout import StatePart, StepLayout, running_step


class StateShape(NamedTuple):
    """One state of a sequence in a layer: the name of its buffer there."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class StateSpec(NamedTuple):
    """A layer and the states that it keeps of each sequence."""

    layer: Any
    states: tuple[StateShape, ...]


def probe_states(model: Any) -> list[StateSpec]:
    """The layers that keep states, found by running a few tokens with transformers' own cache.

    Raises SettingsError where the model cannot.
    """
    try:
        probe = StateProbe(config=model.config)
    except (AttributeError, KeyError):  # transformers has no such cache for it
        return []
    if not any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in probe.layers):
        return []
    positions = torch.arange(PROBED_TOKENS, device=model.device)
    tokens = positions * 11 % model.config.get_text_config().vocab_size
    inputs = {"input_ids": tokens[None], "position_ids": positions[None], "logits_to_keep": 1}
    hooks = probe.follow_modules(model)
    try:
        model(**inputs, cache=probe, use_cache=True)
    except torch.OutOfMemoryError:
        raise
    except (TypeError, ValueError, AttributeError, LookupError, RuntimeError) as error:
        raise refuse_base(model, f"{type(error).__name__} when it runs with a cache") from error
    finally:
        for hook in hooks:
            hook.remove()
    return [StateSpec(layer, _list_shapes(probe.layers[i])) for i, layer in probe.owners.items()]


class StateProbe(DynamicCache):  # type: ignore[misc]
    """transformers' cache, which notes the module that keeps the states of each of its layers."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.owners: dict[int, nn.Module] = {}
        self._entered: list[nn.Module] = []

    def follow_modules(self, model: nn.Module) -> list[Any]:
        """Hooks that tell which modules' forwards are under way."""

        def enter(module: nn.Module, _: Any) -> None:
            self._entered.append(module)

        def leave(*_: Any) -> None:
            self._entered.pop()

        modules = list(model.modules())
        entering = [module.register_forward_pre_hook(enter) for module in modules]
        return entering + [module.register_forward_hook(leave) for module in modules]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *rest: Any, **options: Any) -> Tensor:
        self.owners[layer_idx] = self._entered[-1]
        full: Tensor = super().update_conv_state(conv_states, layer_idx, *rest, **options)
        return full

    def update_recurrent_state(
        self, recurrent_states: Tensor, layer_idx: int, *rest: Any, **options: Any
    ) -> Tensor:
        self.owners[layer_idx] = self._entered[-1]
        kept: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *rest, **options)
        return kept


def _list_shapes(layer: Any) -> tuple[StateShape, ...]:
    """Of the states that a layer of transformers' cache holds."""
    states = {f"conv_state_{i}": state for i, state in layer.conv_states.items()}
    states |= {f"recurrent_state_{i}": state for i, state in layer.recurrent_states.items()}
    return tuple(
        StateShape(name, tuple(state.shape[1:]), state.dtype)
        for name, state in states.items()
        if state is not None
    )


def bytes_per_sequence(specs: Sequence[StateSpec]) -> int:
    """The memory of one sequence's states in all layers."""
    shapes = [shape for spec in specs for shape in spec.states]
    return sum(torch.Size(shape.shape).numel() * shape.dtype.itemsize for shape in shapes)


def install_states(specs: Sequence[StateSpec], slots: int, device: torch.device) -> None:
    """Gives every layer its buffers for so many sequences, and a forward that reads them in a step."""
    for layer, states in specs:
        for name, shape, dtype in states:
            zeros = lazy_zeros(slots, *shape, dtype=dtype, device=device)
            layer.register_buffer(name, zeros, persistent=False)
        layer.forward = StatefulForward(layer, [state.name for state in states])


class StatefulForward:
    """Stands in for the forward of one layer: in a step the layer runs on one part after another, each
    with the states of its own sequences.

    `begin_part` is told the first token of a part and the one behind the last.
    """

    def __init__(self, layer: Any, names: Sequence[str]) -> None:
        self.layer, self.names = layer, names
        self.begin_part: Callable[[int, int], None] | None = None

    def __call__(self, hidden_states: Tensor, **other: Any) -> Tensor:
        """hidden_states [1, T, hidden] → [1, T, hidden]; outside of a step as the layer has it."""
        step = running_step()
        if not isinstance(step, StepLayout):
            plain: Tensor = type(self.layer).forward(self.layer, hidden_states, **other)
            return plain
        return torch.cat([self._run_part(hidden_states[0], part, step) for part in step.state_parts])[None]

    def _run_part(self, hidden_states: Tensor, part: StatePart, step: StepLayout) -> Tensor:
        """The part's own tokens of [T, hidden], one layer on."""
        if self.begin_part is not None:
            self.begin_part(part.start, part.stop)
        tokens = hidden_states[part.start : part.stop].view(len(part.slots), -1, hidden_states.shape[-1])
        states = PartStates(self.layer, self.names, part)
        out: Tensor = type(self.layer).forward(self.layer, tokens, cache=states)
        step.new_states.extend(
            (self.layer.get_buffer(name), part.slots, states.now[name]) for name in self.names
        )
        return out.reshape(part.stop - part.start, -1)


class PartStates:
    """What a layer takes for transformers' cache in one part of a step: its sequences' states,
    which the layer writes to or gives anew. Those of a sequence that begins are zeros.
    """

    def __init__(self, layer: nn.Module, names: Sequence[str], part: StatePart) -> None:
        self.now = {name: layer.get_buffer(name).index_select(0, part.slots) for name in names}
        for state in self.now.values():
            state[part.beginning] = 0

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.now[f"conv_state_{state_idx}"]

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor:
        return self.now[f"recurrent_state_{state_idx}"]

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        """The old state and the new inputs behind it, [sequences, channels, positions]."""
        name = f"conv_state_{state_idx}"
        full = torch.cat((self.now[name], conv_states), -1)
        self.now[name] = full[..., -self.now[name].shape[-1] :]
        return full

    def update_recurrent_state(self, state: Tensor, layer_idx: int, state_idx: int = 0, **_: Any) -> Tensor:
        self.now[f"recurrent_state_{state_idx}"] = state
        return state

    def is_recording_past(self, layer_idx: int) -> bool:
        return False
