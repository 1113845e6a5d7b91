"""Defines the messages between the API process and the worker process, over one pipe. Frozen values only."""

from __future__ import annotations

from dataclasses import dataclass

from .adapter import Adapter, Digest, Placement, Tier
from .base_info import BaseInfo
from .error_codes import ErrorCode
from .request import Event, Request


@dataclass(frozen=True, slots=True)
class Submit:
    request: Request


@dataclass(frozen=True, slots=True)
class Cancel:
    request: int


@dataclass(frozen=True, slots=True)
class AddAdapter:
    """This content exists and may be asked for.

    `preload`: read it into host memory now, and place it while there is room.
    """

    adapter: Adapter
    pinned: bool = False
    preload: bool = False


@dataclass(frozen=True, slots=True)
class Pin:
    digest: Digest
    pinned: bool


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """Forget this content everywhere; sequences that still run on it finish first."""

    digest: Digest


@dataclass(frozen=True, slots=True)
class Shutdown:
    pass


Command = Submit | Cancel | AddAdapter | Pin | RemoveAdapter | Shutdown


@dataclass(frozen=True, slots=True)
class Progress:
    """Still loading: what is being done, and how much of it (0 to 1)."""

    stage: str
    fraction: float


@dataclass(frozen=True, slots=True)
class Ready:
    base: BaseInfo


@dataclass(frozen=True, slots=True)
class CannotStart:
    """The worker cannot start and a restart would not help; `reason` is fit for a person."""

    reason: str


@dataclass(frozen=True, slots=True)
class LastWords:
    """The worker has raised, which `reason` tells, and ends; another one may fare better."""

    reason: str


@dataclass(frozen=True, slots=True)
class Load:
    """The end of an adapter's way from disk to host memory; `error` is empty when it went well.

    `error` also says that the base turned out unable to run it. `code` is the kind of error.
    """

    digest: Digest
    seconds: float
    size: int
    error: str = ""
    code: ErrorCode = ErrorCode.ADAPTER_INVALID


@dataclass(frozen=True, slots=True)
class Gauges:
    running: int = 0
    waiting: int = 0
    kv_used: int = 0  # blocks held by running sequences
    kv_cached: int = 0  # blocks that a prompt may find again
    kv_total: int = 0
    preemptions: int = 0  # since the worker started

    @property
    def kv_empty(self) -> int:
        """Blocks that hold nothing worth keeping."""
        return self.kv_total - self.kv_used - self.kv_cached

    pool_used: int = 0
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """One message per step.

    `started` are requests that have begun, with the prompt tokens that were cached; `tiers` are changes of
    residency; `dropped` says the bytes freed.
    """

    events: tuple[Event, ...] = ()
    started: tuple[tuple[int, int], ...] = ()
    tiers: tuple[tuple[Digest, Tier], ...] = ()
    loads: tuple[Load, ...] = ()
    placed: tuple[tuple[Digest, float], ...] = ()  # digest, seconds
    pool: tuple[Placement, ...] | None = None  # the pool's layout, when it changed
    evicted: tuple[tuple[Digest, Tier, float], ...] = ()  # digest, the tier it left, seconds
    dropped: tuple[tuple[Digest, int], ...] = ()
    gauges: Gauges = Gauges()


Message = Progress | Ready | CannotStart | LastWords | Report
