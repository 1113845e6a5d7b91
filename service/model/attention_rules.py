"""How a layer's queries weigh what they see: what the attention in torch and the one in Triton are
given.

Runs in the worker process; must not know KV, blocks or steps.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Reach(NamedTuple):
    """What a query sees at most: the last `window` positions, and none before its own `chunk`; 0:
    no limit.
    """

    window: int = 0
    chunk: int = 0


class ScoreRules(NamedTuple):
    """Scores times `scale`, bent by `softcap` (0: not), within the reach of `window` and `chunk`, beside the
    `sinks` [query heads], logits that take their share of the weights and give nothing.
    """

    scale: float
    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Tensor | None = None

    @property
    def reach(self) -> Reach:
        return Reach(self.window, self.chunk)
