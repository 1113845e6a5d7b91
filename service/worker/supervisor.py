"""Keeps one worker alive: starts it, starts it again when it dies, kills it when it is stuck, ends
it.

Lives on the event loop; must not know requests or adapters, only whether somebody waits for the
worker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
from collections.abc import Callable
from enum import StrEnum
from typing import Protocol, TypeVar

from ..core.base_info import BaseInfo
from ..core.messages import CannotStart, Command, Message, Progress, Ready, Report, Shutdown
from ..settings import Settings
from ..telemetry import metrics
from ..threads import PROCESS, run_in
from .loop import RAISED_TWICE
from .process import WorkerProcess

log = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE_S = 30.0  # a worker that somebody waits for and that says nothing for this long is stuck
# One that loads and uses no processor for this long waits for what will not come: a disk, a lock
STANDSTILL_S = 300.0
PATIENCE_S = 1.5  # for a worker that was told to end
STILLBORN = 3  # deaths in a row before it was ready: then it is not started again
STABLE_S = 60.0
BACKOFF_S = (0.1, 10.0)
DOUBLINGS = 10  # of the first pause, which then is over the longest


class WorkerState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


class WorkerListener(Protocol):
    """Whom the supervisor serves."""

    @property
    def waits(self) -> bool:
        """Whether the worker owes an answer."""

    def on_worker_ready(self) -> None:
        """A worker is ready and takes orders."""

    def on_report(self, report: Report) -> None: ...

    def on_worker_lost(self, why: str, for_good: bool) -> None:
        """The worker is gone, and with it all it held; `for_good`: no other will come."""


class Supervisor:
    """`stage` and `fraction` (0 to 1) tell how far a loading worker is;

    `reason` why there is none; `base` is the last one served.
    """

    def __init__(self, settings: Settings, factory: str, ward: WorkerListener) -> None:
        self.settings, self.factory, self.ward = settings, factory, ward
        self.state = WorkerState.LOADING
        self.stage, self.fraction, self.reason = "", 0.0, ""
        self.base: BaseInfo | None = None
        self.settled = asyncio.Event()  # ready, or never to be
        self.heard = 0.0
        self._process: WorkerProcess | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._born = 0.0  # when this worker became ready
        self._spent: int | None = None
        self._lives = self._stillborn = self._shortlived = 0

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def start_worker(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._watcher = asyncio.create_task(self._watch_worker())
        self._spawn_worker()

    def stop_restarting(self, reason: str) -> None:
        """From now on no worker is started any more."""
        self._set_state(WorkerState.DRAINING, reason)
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
            self.ward.on_worker_lost(reason, for_good=True)

    async def end_worker(self) -> None:
        """Ends the worker; no process and no thread remains."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._process is None:
            return
        process = self._process
        if not self.send_command(Shutdown()):
            process.kill_worker()  # one that loads reads no orders
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._gone.wait()
        process.kill_worker()
        await self._gone.wait()
        await run_in(PROCESS, process.wait_until_gone)

    def send_command(self, order: Command) -> bool:
        """Whether there was a ready worker to send it to."""
        if self._process is None or not self._born:
            return False
        self._process.send_command(order)
        return True

    def _set_state(self, state: WorkerState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state in (WorkerState.READY, WorkerState.DRAINING, WorkerState.FAILED):
            self.settled.set()
        else:
            self.settled.clear()

    def _spawn_worker(self) -> None:
        self._restart, settings = None, self.settings
        if self._lives:  # injected deaths come once
            settings = settings.model_copy(
                update={"faults": settings.faults.model_copy(update={"kill": None, "stuck": None})}
            )
        self._lives, self._born, self._spent = self._lives + 1, 0.0, None
        self._gone.clear()
        try:
            self._process = WorkerProcess(
                settings, self.factory, self._from_thread(self._on_message), self._from_thread(self._on_exit)
            )
        except OSError:  # no file or no process is to be had now
            log.exception("no worker can be started; it is tried again")
            self._restart = self._loop.call_later(BACKOFF_S[1], self._spawn_worker)

    def _from_thread(self, call: Callable[[T], None]) -> Callable[[T], None]:
        def post(value: T) -> None:
            # The loop was closed: nobody is left to be told
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, value)

        return post

    def _on_message(self, notice: Message) -> None:
        self.heard = self._loop.time()
        match notice:
            case Progress(stage, fraction):
                self.stage, self.fraction = stage, fraction
            case CannotStart(reason):
                log.error("the worker cannot start: %s", reason)
                if self.state is not WorkerState.DRAINING:
                    self._set_state(WorkerState.FAILED, reason)
            case Ready(base):
                self.base, self.stage, self.fraction = base, "", 1.0
                self._born, self._stillborn = self.heard, 0
                if self.state is not WorkerState.DRAINING:
                    self._set_state(WorkerState.READY)
                    self.ward.on_worker_ready()
            case Report():
                self.ward.on_report(notice)

    def _on_exit(self, code: int) -> None:
        self._process = None
        self._gone.set()
        why = f"the worker died ({describe_exit(code)})"
        if self.state not in (WorkerState.DRAINING, WorkerState.FAILED):
            self._restart_later(why)
        self.ward.on_worker_lost(why, for_good=self.state in (WorkerState.DRAINING, WorkerState.FAILED))

    def _restart_later(self, why: str) -> None:
        self._stillborn += not self._born
        lasted = bool(self._born) and self._loop.time() - self._born > STABLE_S
        self._shortlived = 0 if lasted else self._shortlived + 1
        if self._stillborn >= STILLBORN:
            self._set_state(WorkerState.FAILED, f"{why} {self._stillborn} times in a row while loading")
            log.error(self.reason)
            return
        log.error("%s and is started again", why)
        metrics.RESTARTS.inc()
        self._set_state(WorkerState.RESTARTING, why)
        first, most = BACKOFF_S
        self._restart = self._loop.call_later(
            min(most, first * 2 ** min(self._shortlived, DOUBLINGS)), self._spawn_worker
        )

    async def _watch_worker(self) -> None:
        limit = min(SILENCE_S, self.settings.request_timeout_s)
        while True:
            await asyncio.sleep(min(limit, STANDSTILL_S) / 20)
            process = self._process
            if process is None:
                continue
            if not self._born:
                await self._check_progress(process)
            silent = self._loop.time() - self.heard
            if process is not self._process:
                continue
            if silent > (limit if self._born else STANDSTILL_S) and (self.ward.waits or not self._born):
                log.error(
                    "the worker has %s for %.0f s and is killed",
                    "said nothing" if self._born else "stood still",
                    silent,
                )
                process.kill_worker()

    async def _check_progress(self, process: WorkerProcess) -> None:
        """One that loads a large base says nothing for minutes; while it works, or nobody can know,
        that is well.
        """
        spent = await run_in(PROCESS, process.processor_ticks)
        if spent is None or spent != self._spent:
            self._spent, self.heard = spent, self._loop.time()


def describe_exit(code: int) -> str:
    """What an exit code says, fit for a person."""
    if code < 0:
        return signal.Signals(-code).name
    return "two steps in a row raised" if code == RAISED_TWICE else f"exit code {code}"
