"""Limits the requests of one key, a second and at once, as plain ASGI.

API process; must not know a route's meaning. One key's limit never touches another's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.types import ASGIApp, Receive, Scope, Send

from ...errors import Overloaded
from ...keys import Key
from ...settings import Settings
from ...telemetry import metrics
from ..errors import PROBES
from .refusal import refuse_request

PAGES = ("/console/", "/docs/")


@dataclass
class KeyUsage:
    """The share of one key that is used.

    `left` are requests that may come at once, refilled at its rate, a second's worth at most.
    """

    left: float
    at: float
    running: int = 0

    def seconds_to_wait(self, rate: float, now: float) -> float:
        """Seconds until the next request may come; 0 takes one now."""
        most = max(1.0, rate)
        self.left, self.at = min(most, self.left + (now - self.at) * rate), now
        if self.left < 1:
            return (1 - self.left) / rate
        self.left -= 1
        return 0.0


class RateLimit:
    """Refuses with 429 a request that the key has no share for any more.

    Requests for probes and pages are free, and so are those without keys.
    """

    def __init__(self, app: ASGIApp, settings: Settings, clock: Callable[[], float] = time.monotonic) -> None:
        self.app, self.settings, self.clock = app, settings, clock
        self._usages: dict[str, KeyUsage] = {}  # by the key's hash; only known keys come here

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        key: Key | None = scope.get("state", {}).get("key")
        if key is None or _is_free(scope):
            return await self.app(scope, receive, send)
        usage = self._usages.setdefault(key.digest, KeyUsage(math.inf, self.clock()))
        refusal = self._refuse_request(key, usage)
        if refusal is not None:
            metrics.KEY_REFUSALS.inc()
            return await refuse_request(refusal, scope, receive, send)
        usage.running += 1
        try:
            return await self.app(scope, receive, send)
        finally:
            usage.running -= 1

    def _refuse_request(self, key: Key, usage: KeyUsage) -> Overloaded | None:
        most = key.concurrency or self.settings.key_concurrency
        if most is not None and usage.running >= most:
            return Overloaded(
                f"this key may run {most} requests at once, and they run: wait for one to end", retry_after=1
            )
        rate = key.rate or self.settings.key_rate
        wait = usage.seconds_to_wait(rate, self.clock()) if rate is not None else 0.0
        if wait > 0:
            return Overloaded(f"this key may send {rate:g} requests a second", retry_after=math.ceil(wait))
        return None


def _is_free(scope: Scope) -> bool:
    path = scope["path"]
    return (
        path in (*PROBES, "/docs", "/openapi.json")
        or path.startswith(PAGES)
        or (path == "/" and scope["method"] in ("GET", "HEAD"))
    )
