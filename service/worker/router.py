"""Several devices of one host behind one API process: a worker each, and requests between them.

A request goes where its adapter is, unless others wait there for longer than loading it elsewhere takes.
Lives on the event loop of the API process; must not know HTTP, text or adapter names.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import fields, replace

from ..core.adapter import Adapter, Digest, Placement, Tier
from ..core.base_info import BaseInfo
from ..core.capacity import CPU_SHARE
from ..core.messages import Gauges, Load
from ..core.request import Request
from ..exit_codes import ExitCode
from ..limits import free_memory, usable_processors
from ..settings import Settings
from .client import FACTORY, WorkerClient
from .supervisor import WorkerState
from .ticket import Ticket

# Requests that may wait on the device that holds their adapter before it is loaded on another one
LOADING = 8
# The state of the whole is the first of these that a worker is in; none loads but before it was ready once
STATES = (
    WorkerState.LOADING,
    WorkerState.READY,
    WorkerState.DRAINING,
    WorkerState.RESTARTING,
    WorkerState.FAILED,
)
TIERS = (Tier.DEVICE, Tier.HOST, Tier.DISK)


class DeviceRouter:
    """One worker on each of the settings' devices, as one engine.

    Memory for adapters is divided among them. It is ready while any of them is; each must have become so
    once.
    """

    def __init__(self, settings: Settings, factory: str = FACTORY) -> None:
        ids = itertools.count(1)
        names = name_devices(settings.devices)
        self.clients = [
            WorkerClient(own, factory, name, ids, self._rehome_ticket)
            for own, name in zip(divide_settings(settings), names, strict=True)
        ]
        self._named = ",".join(names)
        self._homes: dict[Digest, WorkerClient] = {}  # where a content was last to be loaded

    # ---- the workers' life

    @property
    def state(self) -> WorkerState:
        return min((client.state for client in self.clients), key=STATES.index)

    @property
    def ready(self) -> bool:
        """Whether a request would be admitted now."""
        return any(client.ready for client in self.clients)

    @property
    def base(self) -> BaseInfo | None:
        """The base, with the sequences and KV blocks of all devices; of the pool it says what one has."""
        bases = [client.base for client in self.clients if client.base]
        if not bases:
            return None
        rows, blocks = sum(base.rows for base in bases), sum(base.kv_blocks for base in bases)
        return replace(bases[0], device=self._named, rows=rows, kv_blocks=blocks)

    @property
    def stage(self) -> str:
        """The stage of the worker that is behind."""
        return self._slowest.stage

    @property
    def fraction(self) -> float:
        """How much of that stage is done, 0 to 1."""
        return self._slowest.fraction

    @property
    def reason(self) -> str:
        """Why no worker is ready, fit for a person; where the reasons differ, by device."""
        reasons = {client.device: client.reason for client in self.clients if client.reason}
        if len(set(reasons.values())) == 1:
            return next(iter(reasons.values()))
        return "; ".join(f"{device}: {reason}" for device, reason in reasons.items())

    @property
    def exit_code(self) -> ExitCode:
        """The code with which the service ends where a worker can never serve: that one's."""
        failed = [client for client in self.clients if client.state is WorkerState.FAILED]
        return failed[0].exit_code if failed else ExitCode.FAILED

    @property
    def _slowest(self) -> WorkerClient:
        return min(self.clients, key=lambda client: (client.ready, client.fraction))

    async def start_worker(self) -> None:
        for client in self.clients:
            await client.start_worker()

    async def wait_ready(self) -> None:
        """Returns once all serve. Raises NotReady where one of them never will."""
        await asyncio.gather(*(client.wait_ready() for client in self.clients))

    async def stop_worker(self, grace_s: float) -> None:
        await asyncio.gather(*(client.stop_worker(grace_s) for client in self.clients))

    # ---- requests

    def submit_request(self, request: Request) -> Ticket:
        """Raises NotReady or Overloaded, both with `retry_after`, and then nothing was admitted."""
        return self._choose_client(request.adapter).submit_request(request)

    def _choose_client(self, adapter: Digest | None) -> WorkerClient:
        """The ready worker where the request is served first; any where none is ready."""

        def count_ahead(client: WorkerClient) -> int:
            is_held = adapter is None or client.holds_adapter(adapter)
            return client.requests + (0 if is_held else LOADING)

        return min(self._list_ready() or self.clients, key=count_ahead)

    def _list_ready(self) -> list[WorkerClient]:
        return [client for client in self.clients if client.ready]

    def _rehome_ticket(self, ticket: Ticket) -> bool:
        """Gives a request whose worker is gone to another; whether there was one."""
        if ticket.leaving or not self.ready:
            return False
        self._choose_client(ticket.request.adapter).adopt_ticket(ticket)
        return True

    # ---- adapters

    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = True) -> None:
        """All devices know the content, one loads it; a pinned one lies on all of them."""
        home = self._choose_home(adapter.digest) if preload else None
        for client in self.clients:
            client.add_adapter(adapter, pinned, pinned or client is home)

    def _choose_home(self, digest: Digest) -> WorkerClient:
        """The device to load a content on: where it is already, else where the fewest are."""
        for client in self.clients:
            if client.tier_of(digest) is not Tier.DISK:
                return client
        able = self._list_ready() or self.clients
        home = self._homes.get(digest)
        if home not in able:
            home = min(able, key=list(self._homes.values()).count)
            self._homes[digest] = home
        return home

    async def wait_until_loaded(self, digest: Digest) -> Load:
        """How the content's load into host memory ended; `Load.error` says why it failed."""
        return await self._choose_home(digest).wait_until_loaded(digest)

    def watch_loads(self, watcher: Callable[[Load], None]) -> None:
        for client in self.clients:
            client.watch_loads(watcher)

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        for client in self.clients:
            client.pin_adapter(digest, pinned)

    async def remove_adapter(self, digest: Digest) -> int:
        """The bytes of host memory freed on all devices."""
        self._homes.pop(digest, None)
        return sum(await asyncio.gather(*(client.remove_adapter(digest) for client in self.clients)))

    def tier_of(self, digest: Digest) -> Tier:
        """The nearest tier on any device."""
        return min((client.tier_of(digest) for client in self.clients), key=TIERS.index)

    def is_resident(self, digest: Digest) -> bool:
        return any(client.is_resident(digest) for client in self.clients)

    @property
    def awaited(self) -> set[Digest]:
        """The contents that requests that have not begun wait for."""
        return set[Digest]().union(*(client.awaited for client in self.clients))

    # ---- what they last reported

    @property
    def pool(self) -> tuple[Placement, ...]:
        """The placements of all pools, one after the other."""
        return tuple(itertools.chain.from_iterable(client.pool for client in self.clients))

    @property
    def gauges(self) -> Gauges:
        """The sums."""
        every = [client.gauges for client in self.clients]
        return Gauges(
            **{field.name: sum(getattr(one, field.name) for one in every) for field in fields(Gauges)}
        )


def divide_settings(settings: Settings) -> list[Settings]:
    """Each device's own: they share the host's memory for adapters, and those on the CPU its threads and
    its memory for KV, too.
    """
    devices, free = settings.devices, free_memory()
    free_mb = free.memory // 10**6 if free else None
    cache_mb = settings.host_cache_mb if free_mb is None else min(settings.host_cache_mb, free_mb // 2)
    every = {"host_cache_mb": max(1, cache_mb // len(devices))}
    on_cpu = {"threads": max(1, (settings.threads or usable_processors()) // max(1, devices.count("cpu")))}
    if settings.kv_mb is None and free_mb is not None:
        on_cpu["kv_mb"] = max(1, int(free_mb * CPU_SHARE) // max(1, devices.count("cpu")))
    own = [every | (on_cpu if device == "cpu" else {}) for device in devices]
    return [
        settings.model_copy(update=each | {"device": device})
        for each, device in zip(own, devices, strict=True)
    ]


def name_devices(devices: Sequence[str]) -> list[str]:
    """The devices as series tell them apart: `cpu,cpu` are `cpu:0` and `cpu:1`."""
    plain = itertools.count()
    return [device if ":" in device else f"{device}:{next(plain)}" for device in devices]
