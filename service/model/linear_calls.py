"""How the base calls its linear layers, noted in one forward instead of a list of architectures.

That says which of them a mixed batch can adapt. Runs in the worker process; must not know adapters,
requests or settings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.base_info import LayerLimit, name_pattern
from .kv import PROBED_TOKENS
from .loading import iterate_linears


class LinearCalls(NamedTuple):
    """Name patterns: `heads` are the layers that see only the tokens that get logits.

    `limits` are those that no mixed batch can adapt.
    """

    heads: frozenset[str] = frozenset()
    limits: tuple[LayerLimit, ...] = ()

    def limited(self, name: str) -> bool:
        return any(limit.pattern == name_pattern(name) for limit in self.limits)


class CallRecorder:
    """The calls of each kind of linear layer: how many tokens came in.

    None stands for a call that did not give one tensor of the layer's own width.
    """

    def __init__(self, model: nn.Module) -> None:
        self.kinds: dict[str, str] = {}
        self._counts: dict[str, set[int | None]] = defaultdict(set)
        self._hooks = [
            layer.register_forward_hook(self._make_hook(name, layer, n_in, n_out))
            for name, layer, n_in, n_out in iterate_linears(model)
        ]

    def _make_hook(self, name: str, layer: nn.Module, n_in: int, n_out: int) -> Callable[..., None]:
        pattern = name_pattern(name)
        self.kinds[pattern] = type(layer).__name__

        def note_call(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._counts[pattern].add(_count_tokens(args[0], out, n_in, n_out))

        return note_call

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def result(self) -> LinearCalls:
        """The calls of a forward of PROBED_TOKENS tokens, of which all but one got logits.

        A layer that was not called at all is as idle in PEFT.
        """
        counts = self._counts
        heads = frozenset(pattern for pattern in counts if counts[pattern] == {PROBED_TOKENS - 1})
        odd = sorted(pattern for pattern in counts.keys() - heads if counts[pattern] != {PROBED_TOKENS})
        return LinearCalls(heads, tuple(map(self._limit, odd)))

    def _limit(self, pattern: str) -> LayerLimit:
        is_plain = None not in self._counts[pattern]
        reason = (
            "sees a part of a step's tokens only" if is_plain else "gives no single tensor of its own width"
        )
        return LayerLimit(pattern, self.kinds[pattern], reason, by_peft=is_plain)


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[CallRecorder]:
    """Records while it is open."""
    recorder = CallRecorder(model)
    try:
        yield recorder
    finally:
        recorder.remove_hooks()


def _count_tokens(x: Tensor, out: Any, n_in: int, n_out: int) -> int | None:
    if not isinstance(out, Tensor) or x.shape[-1] != n_in or out.shape != (*x.shape[:-1], n_out):
        return None
    return x.numel() // n_in
