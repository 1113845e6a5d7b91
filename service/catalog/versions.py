"""Holds a registered adapter: its unchanging content, and its changing use; in the API process.

Decides nothing.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from ..core.adapter import Adapter, Digest
from ..core.manifest import Manifest
from .sources.base import SourceLocation
from .state_file import Record
from .validator.messages import ValidatedAdapter


@dataclass(frozen=True, slots=True)
class AdapterVersion:
    """A version of a name.

    `validated` is None for a folder that could not be validated at start; `reason` says why.
    """

    id: str
    place: SourceLocation
    fingerprint: str
    registered_at: str
    validated: ValidatedAdapter | None
    reason: str = ""

    @property
    def digest(self) -> Digest:
        return self.validated.adapter.digest if self.validated else ""

    @property
    def files(self) -> Manifest:
        return self.validated.adapter.files if self.validated else ()

    @property
    def folder(self) -> Path:
        return self.place.folder

    @property
    def adapter(self) -> Adapter | None:
        return self.validated.adapter if self.validated else None


@dataclass(eq=False)
class RegisteredAdapter:
    """A version and its use. `idle` is set while no request runs on it."""

    version: AdapterVersion
    pinned: bool = False
    failure: str = ""
    in_flight: int = 0
    last_used: datetime | None = None
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.failure = self.failure or self.version.reason
        self.idle.set()

    def take_lease(self) -> None:
        self.in_flight += 1
        self.last_used = datetime.now(UTC)
        self.idle.clear()

    def give_back_lease(self) -> None:
        self.in_flight -= 1
        if not self.in_flight:
            self.idle.set()

    @property
    def digest(self) -> Digest:
        return self.version.digest

    def to_record(self) -> Record:
        version, location = self.version, self.version.place
        return Record(
            source=location.source,
            subfolder=location.subfolder,
            revision=location.revision,
            digest=version.digest,
            fingerprint=version.fingerprint,
            pinned=self.pinned,
            registered_at=version.registered_at,
            files=version.files,
        )


def current_time() -> str:
    return format_time(datetime.now(UTC)) or ""


def format_time(when: datetime | None) -> str | None:
    if when is None:
        return None
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")
