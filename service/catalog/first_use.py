"""Registers a folder when a request first names it, once however many do; in the API process.

Must not know files or requests.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from weakref import WeakValueDictionary

from ..errors import AdapterInvalid, BadRequest, Conflict, Forbidden, NotReady, StorageFull

log = logging.getLogger("adapterd.adapters")

RETRY_S = 60.0  # after which a name that was in vain is tried again
MOST = 1000  # names in vain that are remembered: clients may name anything
VAIN = (AdapterInvalid, BadRequest, Conflict, Forbidden)


class FirstUse:
    """`register` registers the folder of a name and tells whether there is one that may be; `is_registered`
    says whether that is done.
    """

    def __init__(
        self, register: Callable[[str], Awaitable[bool]], is_registered: Callable[[str], bool]
    ) -> None:
        self._register, self._is_registered = register, is_registered
        self._vain: dict[str, tuple[float, AdapterInvalid | None]] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def register_folder(self, name: str) -> None:
        """Registers the folder, if there is one; an unknown name stays unknown.

        Raises AdapterInvalid where it holds nothing that can be served, also for a minute after that was
        found; Overloaded, NotReady, also where the disk is full.
        """
        lock = self._turns.setdefault(name, asyncio.Lock())
        async with lock:
            if not self._is_registered(name) and not self._was_in_vain(name):
                await self._try_once(name)

    def _was_in_vain(self, name: str) -> bool:
        """Raises AdapterInvalid, as it was found."""
        end, error = self._vain.get(name, (0.0, None))
        if end < time.monotonic():
            return False
        if error is not None:
            raise type(error)(error.problems)
        return True

    async def _try_once(self, name: str) -> None:
        try:
            if not await self._register(name):
                self._remember(name, None)
        except AdapterInvalid as error:
            self._remember(name, error)
            raise
        except StorageFull as error:
            raise NotReady(
                f"the folder {name} is not registered yet: {error.message}", retry_after=2
            ) from None
        except VAIN as error:
            log.warning("the folder %s is not registered: %s", name, error.message)
            self._remember(name, None)

    def _remember(self, name: str, error: AdapterInvalid | None) -> None:
        self._vain.pop(name, None)
        self._vain[name] = time.monotonic() + RETRY_S, error
        if len(self._vain) > MOST:
            del self._vain[next(iter(self._vain))]
