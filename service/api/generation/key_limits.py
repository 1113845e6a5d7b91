"""Says what a key allows a request to take: its priority, and tokens of the key's budget.

API process; must not know wire shapes or the engine.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from ...errors import Forbidden, Overloaded
from ...keys import Key
from ...settings import Settings
from ...telemetry import metrics

MINUTE_S = 60


def choose_priority(key: Key | None, wanted: int | None) -> int:
    """The priority of a request that wants this one, or says nothing.

    Raises Forbidden for one that is lower than the key's limit.
    """
    lowest = key.max_priority if key else None
    if lowest is None:
        return wanted or 0
    if wanted is None:
        return max(0, lowest)
    if wanted < lowest:
        reason = f"priority: the lowest that this key's requests may have is {lowest}, not {wanted}"
        raise Forbidden(reason, param="priority")
    return wanted


@dataclass
class _Budget:
    """The tokens that are left; fewer than none where requests took more than there were."""

    left: float
    at: float


class TokenBudgets:
    """The tokens a minute of each key, refilled all the time, a minute's worth at most.

    Nobody knows how many tokens an answer will have: a request begins while any are left, and what it takes
    too many of is waited for.
    """

    def __init__(self, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self._default, self._clock = settings.key_tokens, clock
        self._budgets: dict[str, _Budget] = {}  # by the key's hash

    def require_left(self, key: Key | None) -> None:
        """Raises Overloaded, with the seconds until there are tokens again."""
        limit = self._limit_of(key)
        if key is None or limit is None:
            return
        left = self._refill(key, limit).left
        if left <= 0:
            metrics.KEY_REFUSALS.inc()
            wait = max(1, math.ceil(-left * MINUTE_S / limit))
            raise Overloaded(f"this key may use {limit} tokens a minute, and has used them", retry_after=wait)

    def take_tokens(self, key: Key | None, tokens: int) -> None:
        limit = self._limit_of(key)
        if key is not None and limit is not None:
            self._refill(key, limit).left -= tokens

    def _limit_of(self, key: Key | None) -> int | None:
        return None if key is None else key.tokens or self._default

    def _refill(self, key: Key, limit: int) -> _Budget:
        now = self._clock()
        budget = self._budgets.setdefault(key.digest, _Budget(limit, now))
        budget.left = min(limit, budget.left + (now - budget.at) * limit / MINUTE_S)
        budget.at = now
        return budget
