"""The API process's end of the engine: requests become tickets, adapters are offered.

Survives its worker.

Everything here runs on the event loop; must not know HTTP, text or adapter names.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable

from ..core.adapter import Adapter, Digest, Placement, Tier
from ..core.base_info import BaseInfo
from ..core.messages import Cancel, Gauges, Load, Report, Submit
from ..core.request import Event, Finish, Request
from ..core.sampling import Sampling
from ..errors import Cancelled, DeadlineExceeded, NotReady, Overloaded
from ..settings import Settings
from ..telemetry import metrics
from .adapter_mirror import AdapterMirror
from .supervisor import Supervisor, WorkerState
from .ticket import Ticket

FACTORY = "service.model.build:build_runner"
CLOSING = "the service is shutting down"


class WorkerClient:
    """One worker and what it was asked for.

    Every admitted request gets exactly one terminal event, whatever happens to the worker.

    `pool` and `gauges` are the worker's last words on them. `factory` is the `module:function` that
    builds the worker's runner.
    """

    def __init__(self, settings: Settings, factory: str = FACTORY) -> None:
        self.settings = settings
        self.pool: tuple[Placement, ...] = ()
        self.gauges = Gauges()
        self._worker = Supervisor(settings, factory, self)
        self._offers = AdapterMirror(self._worker.send_command)
        self._ids = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._sent: set[int] = set()  # requests that the worker has and did not end
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def state(self) -> WorkerState:
        return self._worker.state

    @property
    def ready(self) -> bool:
        """Whether a request would be taken now."""
        return self.state is WorkerState.READY

    @property
    def stage(self) -> str:
        """What a loading worker is doing."""
        return self._worker.stage

    @property
    def fraction(self) -> float:
        """How much of the stage is done, 0 to 1."""
        return self._worker.fraction

    @property
    def reason(self) -> str:
        """Why it is not ready, fit for a person; empty while it loads."""
        return self._worker.reason

    @property
    def base(self) -> BaseInfo | None:
        """The base that is or was last served; None until the first worker is ready."""
        return self._worker.base

    @property
    def worker_pid(self) -> int | None:
        return self._worker.pid

    async def start_worker(self) -> None:
        """Starts the worker; does not wait for it."""
        self._worker.start_worker()

    async def wait_ready(self) -> None:
        """Returns once requests are taken. Raises NotReady where that will not be."""
        await self._worker.settled.wait()
        if not self.ready:
            raise NotReady(self.reason)

    async def stop_worker(self, grace_s: float) -> None:
        """Takes no more requests, lets the admitted ones finish within the grace, ends the rest and
        the worker. No process remains.
        """
        self._worker.stop_restarting(CLOSING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        self._fail_all(CLOSING, self._tickets.values())
        self._offers.end_waiting()
        await self._worker.end_worker()

    # ---- requests

    def submit_request(
        self,
        prompt: tuple[int, ...],
        max_tokens: int,
        adapter: Digest | None = None,
        sampling: Sampling | None = None,
        eos: frozenset[int] = frozenset(),
        prompt_logprobs: int | None = None,
    ) -> Ticket:
        """Admits a request.

        Raises NotReady or Overloaded, both with `retry_after`, and then nothing was admitted.
        """
        self._check_admission()
        request = Request(
            next(self._ids), prompt, max_tokens, adapter, sampling or Sampling(), eos, prompt_logprobs
        )
        ticket = Ticket(request, self._cancel_request)
        self._tickets[request.id] = ticket
        self._empty.clear()
        limit = self.settings.request_timeout_s
        self._deadlines[request.id] = asyncio.get_running_loop().call_later(
            limit, self._expire_request, ticket
        )
        if adapter is not None:
            self._offers.count_request(adapter)
        self._pass_on(ticket)
        self._count_requests()
        return ticket

    def _check_admission(self) -> None:
        if not self.ready or self.base is None:
            raise NotReady(f"not ready: {self.reason or self.state}", retry_after=2)
        if len(self._tickets) >= self.base.rows + self.settings.queue_limit:
            raise Overloaded(f"the queue is full: {self.settings.queue_limit} requests wait", retry_after=1)

    def _pass_on(self, ticket: Ticket) -> None:
        self._sent.add(ticket.request.id)
        self._worker.send_command(Submit(ticket.request))

    def _cancel_request(self, ticket: Ticket) -> None:
        if ticket.request.id in self._sent:
            self._worker.send_command(Cancel(ticket.request.id))
        else:
            self._end_request(ticket, Event(ticket.request.id, finish=Finish.CANCELLED))

    def _expire_request(self, ticket: Ticket) -> None:
        self._worker.send_command(Cancel(ticket.request.id))
        self._fail_request(
            ticket,
            DeadlineExceeded.code,
            f"the request took longer than its limit of {self.settings.request_timeout_s:g} s",
        )

    def _fail_request(self, ticket: Ticket, code: str, message: str) -> None:
        """A caller that has cancelled is told of that and nothing else."""
        id = ticket.request.id
        cancelled = Event(id, finish=Finish.CANCELLED)
        self._end_request(
            ticket,
            cancelled if ticket.leaving else Event(id, finish=Finish.FAILED, code=code, message=message),
        )

    def _fail_all(self, why: str, tickets: Iterable[Ticket]) -> None:
        for ticket in list(tickets):
            self._fail_request(ticket, NotReady.code, why)

    def _end_request(self, ticket: Ticket, event: Event) -> None:
        del self._tickets[ticket.request.id]
        self._deadlines.pop(ticket.request.id).cancel()
        now = time.monotonic()
        ticket.deliver_event(event, now)
        metrics.END_TO_END.observe(now - ticket.submitted)
        if event.finish is Finish.FAILED or (event.finish is Finish.CANCELLED and not ticket.stopped):
            metrics.FAILURE.labels(event.code or Cancelled.code).inc()
        else:
            metrics.SUCCESS.labels("stop_sequence" if ticket.stopped else str(event.finish)).inc()
        if not self._tickets:
            self._empty.set()

    # ---- adapters

    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = True) -> None:
        """This content may be asked for from now on, over restarts too; a pin it already has stays.

        `preload`: read it now.
        """
        self._offers.add_adapter(adapter, pinned, preload)

    async def wait_until_loaded(self, digest: Digest) -> Load:
        """How the adapter's way into host memory ended;

        `Load.error` says why it did not get there. Sets out for it if nobody has.
        """
        return await self._offers.wait_until_loaded(digest)

    def watch_loads(self, watcher: Callable[[Load], None]) -> None:
        """`watcher` is told how every load into host memory ended."""
        self._offers.watcher = watcher

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        self._offers.pin_adapter(digest, pinned)

    async def remove_adapter(self, digest: Digest) -> int:
        """Forgets the content once the requests that were admitted for it have ended; the bytes of
        host memory freed.
        """
        return await self._offers.remove_adapter(digest)

    def tier_of(self, digest: Digest) -> Tier:
        return self._offers.tier_of(digest)

    def is_resident(self, digest: Digest) -> bool:
        """Whether a request for this content could run in the next step."""
        return self._offers.is_resident(digest)

    @property
    def awaited(self) -> set[Digest]:
        """The contents that requests without a row wait for."""
        waiting = (ticket.request.adapter for ticket in self._tickets.values() if ticket.started is None)
        return {digest for digest in waiting if digest is not None}

    # ---- what the worker's supervisor says

    @property
    def waits(self) -> bool:
        return bool(self._sent) or self._offers.waits

    def on_worker_ready(self) -> None:
        self._offers.repeat_all()
        for ticket in self._tickets.values():
            self._pass_on(ticket)
        self._measure_device(base=True)

    def on_worker_lost(self, why: str, for_good: bool) -> None:
        """What had started fails; what waits is kept for the next worker, if there will be one."""
        self._sent.clear()
        self.pool, self.gauges = (), Gauges()
        self._measure_device(base=False)
        self._fail_all(
            why, (t for t in self._tickets.values() if for_good or t.started is not None or t.leaving)
        )
        self._offers.on_worker_lost()
        if for_good:
            self._offers.end_waiting()
        self._count_requests()

    def on_report(self, report: Report) -> None:
        now = time.monotonic()
        self._offers.on_report(report)
        for id in report.started:
            self._on_started(id, now)
        for event in report.events:
            self._on_event(event, now)
        if report.pool is not None:
            self.pool = report.pool
            self._measure_device(base=True)
        self.gauges = report.gauges
        self._count_requests()

    def _on_started(self, id: int, now: float) -> None:
        ticket = self._tickets.get(id)
        if ticket is not None:
            ticket.started = now
            metrics.QUEUED.observe(now - ticket.submitted)
            metrics.PROMPT_TOKENS.inc(len(ticket.request.prompt))

    def _on_event(self, event: Event, now: float) -> None:
        if event.finish is not None:
            self._sent.discard(event.request)
        ticket = self._tickets.get(event.request)
        if event.token is not None:
            metrics.GENERATED_TOKENS.inc()
            if ticket is not None:
                since, seen = (
                    (ticket.submitted, metrics.FIRST_TOKEN)
                    if ticket.last is None
                    else (ticket.last, metrics.INTER_TOKEN)
                )
                seen.observe(now - since)
        if ticket is not None and event.finish is not None:
            self._end_request(ticket, event)
        elif ticket is not None:
            ticket.deliver_event(event, now)

    def _count_requests(self) -> None:
        running = sum(ticket.started is not None for ticket in self._tickets.values())
        metrics.RUNNING.set(running)
        metrics.WAITING.set(len(self._tickets) - running)
        metrics.KV_USAGE.set(self.gauges.kv_used / max(1, self.gauges.kv_total))
        metrics.POOL_USED.set(self.gauges.pool_used)
        metrics.POOL_TOTAL.set(self.base.pool_rank if self.base else 0)
        metrics.HOST_BYTES.set(self.gauges.host_bytes)

    def _measure_device(self, base: bool) -> None:
        """What is on the device; `base`: whether the base is."""
        metrics.BASE_BYTES.set(sum(self.base.resident_bytes.values()) if base and self.base else 0)
        metrics.DEVICE_BYTES.set(self._offers.bytes_of(placement.digest for placement in self.pool))
