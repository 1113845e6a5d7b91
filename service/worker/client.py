"""The API process's end of the worker: requests become tickets, and adapters are added and removed.

Survives its worker. Everything here runs on the event loop; must not know HTTP, text or adapter names.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import replace

from ..core.adapter import Adapter, Digest, Placement, Tier
from ..core.base_info import BaseInfo
from ..core.error_codes import ErrorCode
from ..core.messages import Cancel, Gauges, Load, Report, Submit
from ..core.request import Event, Finish, Request
from ..errors import NotReady, Overloaded
from ..settings import Settings
from ..telemetry import metrics
from .adapter_mirror import AdapterMirror
from .supervisor import Supervisor, WorkerState
from .ticket import Ticket

FACTORY = "service.model.build:build_runner"
CLOSING = "the service is shutting down"


class WorkerClient:
    """One worker, its requests and its adapters.

    Every admitted request gets exactly one terminal event, whatever happens to the worker.
    `pool` and `gauges` are as the worker last reported them. `factory` is the `module:function` that
    builds the worker's runner.
    """

    def __init__(self, settings: Settings, factory: str = FACTORY) -> None:
        self.settings = settings
        self.pool: tuple[Placement, ...] = ()
        self.gauges = Gauges()
        self._worker = Supervisor(settings, factory, self)
        self._adapters = AdapterMirror(self._worker.send_command)
        self._ids = itertools.count(1)
        self._tickets: dict[int, Ticket] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._sent: set[int] = set()  # requests that the worker got and has not ended
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def state(self) -> WorkerState:
        return self._worker.state

    @property
    def ready(self) -> bool:
        """Whether a request would be admitted now."""
        return self.state is WorkerState.READY

    @property
    def stage(self) -> str:
        """The stage of a loading worker."""
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
        """Returns once requests are admitted. Raises NotReady where that will never be."""
        await self._worker.settled.wait()
        if not self.ready:
            raise NotReady(self.reason)

    async def stop_worker(self, grace_s: float) -> None:
        """Admits no more requests, lets the admitted ones finish within the grace, ends the rest and
        the worker. No process remains.
        """
        self._worker.stop_restarting(CLOSING)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                await self._empty.wait()
        self._fail_all(CLOSING, self._tickets.values())
        self._adapters.end_waiting()
        await self._worker.end_worker()

    # ---- requests

    def submit_request(self, request: Request) -> Ticket:
        """Admits a request, and numbers it.

        Raises NotReady or Overloaded, both with `retry_after`, and then nothing was admitted.
        """
        self._check_admission()
        ticket = self._open_ticket(replace(request, id=next(self._ids)))
        if request.adapter is not None:
            self._adapters.count_request(request.adapter)
        self._send_request(ticket)
        self._count_requests()
        return ticket

    def _check_admission(self) -> None:
        if not self.ready or self.base is None:
            raise NotReady(f"not ready: {self.reason or self.state}", retry_after=2)
        if len(self._tickets) >= self.base.rows + self.settings.queue_limit:
            raise Overloaded(f"the queue is full: {self.settings.queue_limit} requests wait", retry_after=1)

    def _open_ticket(self, request: Request) -> Ticket:
        ticket = Ticket(request, self._cancel_request)
        self._tickets[request.id] = ticket
        self._empty.clear()
        limit, loop = self.settings.request_timeout_s, asyncio.get_running_loop()
        self._deadlines[request.id] = loop.call_later(limit, self._expire_request, ticket)
        return ticket

    def _send_request(self, ticket: Ticket) -> None:
        self._sent.add(ticket.request.id)
        self._worker.send_command(Submit(ticket.request))

    def _cancel_request(self, ticket: Ticket) -> None:
        if ticket.request.id in self._sent:
            self._worker.send_command(Cancel(ticket.request.id))
        else:
            self._end_request(ticket, Event(ticket.request.id, finish=Finish.CANCELLED))

    def _expire_request(self, ticket: Ticket) -> None:
        self._worker.send_command(Cancel(ticket.request.id))
        message = f"the request took longer than its limit of {self.settings.request_timeout_s:g} s"
        self._fail_request(ticket, ErrorCode.DEADLINE_EXCEEDED, message)

    def _fail_request(self, ticket: Ticket, code: ErrorCode, message: str) -> None:
        """Ends the request with this error; one that its caller has cancelled ends as cancelled."""
        event = Event(ticket.request.id, finish=Finish.FAILED, code=code, message=message)
        if ticket.leaving:
            event = Event(ticket.request.id, finish=Finish.CANCELLED)
        self._end_request(ticket, event)

    def _fail_all(self, why: str, tickets: Iterable[Ticket]) -> None:
        for ticket in list(tickets):
            self._fail_request(ticket, ErrorCode.NOT_READY, why)

    def _end_request(self, ticket: Ticket, event: Event) -> None:
        del self._tickets[ticket.request.id]
        self._deadlines.pop(ticket.request.id).cancel()
        now = time.monotonic()
        ticket.deliver_event(event, now)
        metrics.END_TO_END.observe(now - ticket.submitted)
        count_ending(event, ticket.stopped)
        if not self._tickets:
            self._empty.set()

    # ---- adapters

    def add_adapter(self, adapter: Adapter, pinned: bool = False, preload: bool = True) -> None:
        """Requests may name this content from now on, over restarts too; a pin that it has stays.

        `preload`: read it now.
        """
        self._adapters.add_adapter(adapter, pinned, preload)

    async def wait_until_loaded(self, digest: Digest) -> Load:
        """How the adapter's load into host memory ended; `Load.error` says why it failed.

        Starts the load where there was none yet.
        """
        return await self._adapters.wait_until_loaded(digest)

    def watch_loads(self, watcher: Callable[[Load], None]) -> None:
        """`watcher` is called with every load into host memory that ended."""
        self._adapters.watcher = watcher

    def pin_adapter(self, digest: Digest, pinned: bool) -> None:
        self._adapters.pin_adapter(digest, pinned)

    async def remove_adapter(self, digest: Digest) -> int:
        """Forgets the content once the requests that were admitted for it have ended; the bytes of
        host memory freed.
        """
        return await self._adapters.remove_adapter(digest)

    def tier_of(self, digest: Digest) -> Tier:
        return self._adapters.tier_of(digest)

    def is_resident(self, digest: Digest) -> bool:
        """Whether a request for this content could run in the next step."""
        return self._adapters.is_resident(digest)

    @property
    def awaited(self) -> set[Digest]:
        """The contents that requests that have not begun wait for."""
        waiting = (ticket.request.adapter for ticket in self._tickets.values() if ticket.started is None)
        return {digest for digest in waiting if digest is not None}

    # ---- what the worker's supervisor reports

    @property
    def waits(self) -> bool:
        return bool(self._sent) or self._adapters.waits

    def on_worker_ready(self) -> None:
        self._adapters.repeat_all()
        for ticket in self._tickets.values():
            self._send_request(ticket)
        self._measure_device(base=True)

    def on_worker_lost(self, why: str, for_good: bool, out_of_memory: bool) -> None:
        """Requests that had started fail; the others wait for the next worker, if there will be one.

        Where memory ran out so do those whose adapter was still to be read: the next worker would die of
        it, too.
        """
        self._sent.clear()
        self.pool, self.gauges = (), Gauges()
        self._measure_device(base=False)
        tickets = self._tickets.values()
        lost = [ticket for ticket in tickets if for_good or ticket.started is not None or ticket.leaving]
        if out_of_memory:
            lost += [ticket for ticket in tickets if ticket not in lost and self._waits_for_disk(ticket)]
        self._fail_all(why, lost)
        self._adapters.on_worker_lost(why, out_of_memory)
        if for_good:
            self._adapters.end_waiting()
        self._count_requests()

    def _waits_for_disk(self, ticket: Ticket) -> bool:
        adapter = ticket.request.adapter
        return adapter is not None and self.tier_of(adapter) is Tier.DISK

    def on_report(self, report: Report) -> None:
        now = time.monotonic()
        self._adapters.on_report(report)
        for id, cached in report.started:
            self._on_started(id, cached, now)
        for event in report.events:
            self._on_event(event, now)
        if report.pool is not None:
            self.pool = report.pool
            self._measure_device(base=True)
        metrics.PREEMPTIONS.inc(report.gauges.preemptions - self.gauges.preemptions)
        self.gauges = report.gauges
        self._count_requests()

    def _on_started(self, id: int, cached: int, now: float) -> None:
        """`cached` tokens of its prompt need not be computed."""
        ticket = self._tickets.get(id)
        if ticket is not None:
            ticket.started, ticket.cached_tokens = now, cached
            metrics.QUEUED.observe(now - ticket.submitted)
            metrics.PROMPT_TOKENS.inc(len(ticket.request.prompt))
            metrics.PREFIX_QUERIES.inc(len(ticket.request.prompt))
            metrics.PREFIX_HITS.inc(cached)

    def _on_event(self, event: Event, now: float) -> None:
        if event.finish is not None:
            self._sent.discard(event.request)
        if event.token is not None:
            metrics.GENERATED_TOKENS.inc()
        ticket = self._tickets.get(event.request)
        if ticket is None:
            return
        if event.token is not None:
            measure_token(ticket, now)
        if event.finish is not None:
            self._end_request(ticket, event)
        else:
            ticket.deliver_event(event, now)

    def _count_requests(self) -> None:
        running = sum(ticket.started is not None for ticket in self._tickets.values())
        metrics.RUNNING.set(running)
        metrics.WAITING.set(len(self._tickets) - running)
        metrics.KV_USAGE.set(self.gauges.kv_used / max(1, self.gauges.kv_total))
        metrics.KV_BLOCKS.labels("used").set(self.gauges.kv_used)
        metrics.KV_BLOCKS.labels("cached").set(self.gauges.kv_cached)
        metrics.KV_BLOCKS.labels("empty").set(self.gauges.kv_empty)
        metrics.POOL_USED.set(self.gauges.pool_used)
        metrics.POOL_TOTAL.set(self.base.pool_rank if self.base else 0)
        metrics.HOST_BYTES.set(self.gauges.host_bytes)

    def _measure_device(self, base: bool) -> None:
        """Sets the bytes on the device; `base`: whether the base is there."""
        resident = self.base.resident_bytes.values() if base and self.base else ()
        metrics.BASE_BYTES.set(sum(resident))
        metrics.DEVICE_BYTES.set(self._adapters.bytes_of(placement.digest for placement in self.pool))


def measure_token(ticket: Ticket, now: float) -> None:
    """Observes the time to a token, from admission or from the token before it."""
    if ticket.last is None:
        metrics.FIRST_TOKEN.observe(now - ticket.submitted)
    else:
        metrics.INTER_TOKEN.observe(now - ticket.last)


def count_ending(event: Event, stopped: bool) -> None:
    """Counts a request by its terminal event; `stopped`: its caller ended it at a stop string."""
    cancelled = event.finish is Finish.CANCELLED and not stopped
    if event.finish is Finish.FAILED or cancelled:
        metrics.FAILURE.labels(event.code or ErrorCode.CANCELLED).inc()
    else:
        metrics.SUCCESS.labels("stop_sequence" if stopped else str(event.finish)).inc()
