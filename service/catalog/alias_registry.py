"""Sets, lists and removes aliases, and has them remembered beside the registrations; API process.

Must not know files, versions or how a target is chosen.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Protocol, TypeVar

from ..core.adapter import Digest
from ..errors import Conflict, NotFound
from ..telemetry import metrics
from ..telemetry.audit import record_change
from . import ids
from .aliases import Alias, AliasTarget, make_alias
from .versions import current_time

T = TypeVar("T")


class Adapters(Protocol):
    """The registered adapters, as aliases need them.

    `find_digest` is the whole digest that a target names; it raises AdapterNotFound, DigestMismatch.
    """

    base_id: str

    def is_registered(self, id: str) -> bool: ...
    def find_digest(self, target: AliasTarget) -> Digest | None: ...


class InTurn(Protocol):
    """Makes one change at a time of what is registered."""

    def __call__(self, change: Callable[[], Awaitable[T]]) -> Awaitable[T]: ...


class AliasRegistry:
    """The aliases by name; `write` remembers all of them as they will be, or raises StorageFull."""

    def __init__(
        self, adapters: Adapters, in_turn: InTurn, write: Callable[[Mapping[str, Alias]], Awaitable[None]]
    ) -> None:
        self.by_name: dict[str, Alias] = {}
        self._adapters, self._in_turn, self._write = adapters, in_turn, write

    async def put_alias(
        self, name: str, targets: Sequence[AliasTarget], sticky: str | None
    ) -> tuple[Alias, bool]:
        """Sends requests for this name to these adapters from now on; the alias, and whether it is
        new.

        A target's digest may be the beginning of one. Raises BadRequest, Conflict for a name that
        is taken or reserved, AdapterNotFound, DigestMismatch for a version that is not kept,
        StorageFull.
        """
        ids.check_id(name, self._adapters.base_id)
        return await self._in_turn(partial(self._put_alias, name, targets, sticky))

    async def _put_alias(
        self, name: str, targets: Sequence[AliasTarget], sticky: str | None
    ) -> tuple[Alias, bool]:
        if self._adapters.is_registered(name):
            raise Conflict(f"the id {name!r} is an adapter's", param="name")
        found = [replace(target, digest=self._adapters.find_digest(target)) for target in targets]
        alias = make_alias(name, found, sticky, current_time())
        before = self.by_name
        await self._write(before | {name: alias})
        self.by_name = before | {name: alias}
        old = before[name].describe_targets() if name in before else None
        record_change("alias set", name, old, alias.describe_targets())
        return alias, name not in before

    async def remove_alias(self, name: str) -> Alias:
        """Raises NotFound, StorageFull."""
        return await self._in_turn(partial(self._remove_alias, name))

    async def _remove_alias(self, name: str) -> Alias:
        alias = self.by_name.get(name)
        if alias is None:
            raise NotFound(f"there is no alias {name[: ids.LONGEST]!r}", param="name")
        left = {other: kept for other, kept in self.by_name.items() if other != name}
        await self._write(left)
        self.by_name = left
        metrics.alias_removed(name)
        record_change("alias removed", name, alias.describe_targets(), None)
        return alias

    def find_alias(self, name: str) -> Alias | None:
        return self.by_name.get(name)

    def list_aliases(self) -> list[Alias]:
        return [alias for _, alias in sorted(self.by_name.items())]

    def require_no_alias(self, id: str) -> None:
        """Raises Conflict."""
        if id in self.by_name:
            raise Conflict(f"the id {id!r} is an alias", param="id")

    def require_no_target(self, id: str) -> None:
        """Raises Conflict where an alias sends requests to this adapter, whatever its weight."""
        for name, alias in sorted(self.by_name.items()):
            if any(target.id == id for target in alias.targets):
                raise Conflict(f"the alias {name!r} sends requests to {id!r}: change that first", param="id")

    def digests_of(self, id: str) -> set[Digest]:
        """The versions of this adapter that aliases name."""
        targets = [target for alias in self.by_name.values() for target in alias.targets]
        return {target.digest for target in targets if target.id == id and target.digest}
