"""Log probabilities as JSON can carry them. API process; must not know wire shapes."""

from __future__ import annotations

import math
from operator import itemgetter

from ...core.request import Token

LOWEST = -9999.0  # stands for minus infinity, which JSON does not have


def finite_logprob(logprob: float | None) -> float | None:
    if logprob is None or math.isnan(logprob):
        return None
    return max(logprob, LOWEST)


def best_tokens(token: Token, wanted: int) -> list[tuple[int, float]]:
    """The `wanted` likeliest tokens at this position, best first, the chosen one where it belongs."""
    chosen = {token.id: token.logprob} if token.logprob is not None else {}
    known = chosen | dict(token.top)  # of equals the chosen one is the first
    return sorted(known.items(), key=itemgetter(1), reverse=True)[:wanted]
