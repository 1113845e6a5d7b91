"""One request's own past, as far as it bears on the next token.

Plain numbers, kept as tensors can read them at once. Runs in the worker process; must not know
tensors or other requests.
"""

from __future__ import annotations

import random
from array import array
from collections import deque
from dataclasses import fields
from typing import Any

from ..core.request import Request
from ..core.sampling import Sampling

DEFAULTS = Sampling()


class SamplingState:
    """`uses` names the options that differ from their defaults: a row that uses none is greedy.

    `known` are the prompt's ids where they are penalized; `generated` the answer's, each once, and
    `times` how often each. `last` are the answer's latest ids, as many as a bad word has before its end.
    """

    def __init__(self, request: Request) -> None:
        sampling = request.sampling
        self.request = request
        self.uses = frozenset(
            field.name
            for field in fields(sampling)
            if getattr(sampling, field.name) != getattr(DEFAULTS, field.name)
        )
        self.matcher: Any = None
        self.known = array("q", set(request.prompt) if "repetition_penalty" in self.uses else ())
        self.generated, self.times = array("q"), array("f")
        self._place_of: dict[int, int] = {}
        longest = max((len(word) for word in sampling.bad_words), default=1)
        self.last: deque[int] = deque(maxlen=longest - 1)
        self.bias_ids = array("q", (id for id, _ in sampling.logit_bias))
        self.bias_values = array("f", (value for _, value in sampling.logit_bias))

    def add_token(self, token: int) -> None:
        self.last.append(token)
        place = self._place_of.setdefault(token, len(self.generated))
        if place == len(self.generated):
            self.generated.append(token)
            self.times.append(0)
        self.times[place] += 1

    def list_banned(self) -> list[int]:
        """The ids that would end a bad word now."""
        last = tuple(self.last)
        return sorted({word[-1] for word in self.request.sampling.bad_words if _ends_with(last, word[:-1])})

    def draw_uniform(self, place: int) -> float:
        """A number in [0, 1) that is a function of the seed and the token's place in the answer."""
        return random.Random((self.request.sampling.seed << 32) + place).random()


def _ends_with(ids: tuple[int, ...], end: tuple[int, ...]) -> bool:
    return not end or ids[-len(end) :] == end
