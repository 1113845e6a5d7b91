"""How the base calls its linear layers, noted in one forward instead of a list of architectures.

That says which of them a mixed batch can adapt. Must not know adapters, requests or settings.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..core.base_info import LayerLimit, name_pattern
from .kv import SCOUTED
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
        self._hooks = [one[1].register_forward_hook(self._hook(*one)) for one in iterate_linears(model)]

    def _hook(self, name: str, layer: nn.Module, n_in: int, n_out: int) -> Callable[..., None]:
        pattern = name_pattern(name)
        self.kinds[pattern] = type(layer).__name__

        def note(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            self._counts[pattern].add(_tokens(args[0], out, n_in, n_out))

        return note

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def result(self) -> LinearCalls:
        """Of a forward of SCOUTED tokens, of which all but one got logits.

        What was not called at all is as idle in PEFT.
        """
        counts = self._counts
        heads = frozenset(pattern for pattern in counts if counts[pattern] == {SCOUTED - 1})
        odd = sorted(pattern for pattern in counts.keys() - heads if counts[pattern] != {SCOUTED})
        return LinearCalls(heads, tuple(map(self._limit, odd)))

    def _limit(self, pattern: str) -> LayerLimit:
        plain = None not in self._counts[pattern]
        reason = "sees a part of a step's tokens only" if plain else "gives no single tensor of its own width"
        return LayerLimit(pattern, self.kinds[pattern], reason, by_peft=plain)


@contextmanager
def recorded_calls(model: nn.Module) -> Iterator[CallRecorder]:
    """Records while it is open."""
    recorder = CallRecorder(model)
    try:
        yield recorder
    finally:
        recorder.remove_hooks()


def _tokens(x: Tensor, out: Any, n_in: int, n_out: int) -> int | None:
    plain = isinstance(out, Tensor) and x.shape[-1] == n_in and out.shape == (*x.shape[:-1], n_out)
    return x.numel() // n_in if plain else None
