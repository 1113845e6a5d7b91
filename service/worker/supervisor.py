"""Keeps one worker alive: starts, restarts, kills and ends it; runs in the API process.

A worker that dies is started again; one that is stuck is killed. Lives on the event loop; must not
know requests or adapters, only whether a caller waits for the worker.
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
from ..core.messages import CannotStart, Command, LastWords, Message, Progress, Ready, Report, Shutdown
from ..exit_codes import ExitCode
from ..limits import free_memory
from ..settings import Settings
from ..telemetry.metrics import WorkerMetrics
from ..threads import PROCESS, run_in
from .loop import RAISED_TWICE
from .process import WorkerExit, WorkerProcess

log = logging.getLogger(__name__)

T = TypeVar("T")

SILENCE_S = 30.0  # a worker that a caller waits for and that sends nothing for this long is stuck
# A worker that loads and uses no processor for this long waits in vain: for a disk, for a lock
STANDSTILL_S = 300.0
PATIENCE_S = 1.5  # for a worker that got the command to end
STILLBORN = 3  # deaths in a row before it was ready: then it is not started again
STABLE_S = 60.0
BACKOFF_S = (0.1, 10.0)
UNWANTED = "the service ends"
DOUBLINGS = 10  # of the first pause, which then is over the longest


class WorkerState(StrEnum):
    LOADING = "loading"
    READY = "ready"
    RESTARTING = "restarting"
    DRAINING = "draining"
    FAILED = "failed"


FINAL = (WorkerState.DRAINING, WorkerState.FAILED)  # states that no worker is started in


class WorkerListener(Protocol):
    """The client as the supervisor sees it."""

    @property
    def waits(self) -> bool:
        """Whether the worker owes an answer."""

    def on_worker_ready(self) -> None:
        """A worker is ready and takes commands."""

    def on_report(self, report: Report) -> None: ...

    def on_worker_lost(self, why: str, for_good: bool, out_of_memory: bool) -> None:
        """The worker is gone with all its state; `for_good`: no other will come. `out_of_memory`:
        the system killed it for want of memory.
        """


class Supervisor:
    """`stage` and `fraction` (0 to 1) are the progress of a loading worker.

    `reason` says why there is no ready worker; `base` is the last one served. `exit_code` is the one that
    the service is to end with where the base can never be served.
    """

    def __init__(
        self, settings: Settings, factory: str, listener: WorkerListener, metrics: WorkerMetrics
    ) -> None:
        self.settings, self.factory, self.listener = settings, factory, listener
        self._metrics = metrics
        self.state = WorkerState.LOADING
        self.stage, self.fraction, self.reason = "", 0.0, ""
        self.exit_code = ExitCode.FAILED
        self.base: BaseInfo | None = None
        self.settled = asyncio.Event()  # ready, or never to be
        self.heard = 0.0
        self._process: WorkerProcess | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._gone = asyncio.Event()
        self._born = 0.0  # when this worker became ready
        self._spent: int | None = None
        self._last_words = ""  # of this worker, if it raised
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
            self.listener.on_worker_lost(reason, for_good=True, out_of_memory=False)

    async def end_worker(self) -> None:
        """Ends the worker; no process and no thread remains."""
        if self._watcher is not None:
            self._watcher.cancel()
        if self._process is None:
            return
        process = self._process
        if not self.send_command(Shutdown()):
            process.kill_worker(UNWANTED)  # a worker that loads reads no commands
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                await self._gone.wait()
        process.kill_worker(UNWANTED)
        await self._gone.wait()
        await run_in(PROCESS, process.wait_until_gone)

    def send_command(self, command: Command) -> bool:
        """Whether there was a ready worker to send it to."""
        if self._process is None or not self._born:
            return False
        self._process.send_command(command)
        return True

    def _set_state(self, state: WorkerState, reason: str = "") -> None:
        self.state, self.reason = state, reason
        if state in (WorkerState.READY, WorkerState.DRAINING, WorkerState.FAILED):
            self.settled.set()
        else:
            self.settled.clear()

    def _spawn_worker(self) -> None:
        settings = spare_worker(self.settings) if self._lives else self.settings
        self._restart = None
        self._lives, self._born, self._spent, self._last_words = self._lives + 1, 0.0, None, ""
        self._gone.clear()
        on_message, on_exit = self._from_thread(self._on_message), self._from_thread(self._on_exit)
        try:
            self._process = WorkerProcess(settings, self.factory, on_message, on_exit)
        except OSError:  # the system has no file or no process left
            log.exception("no worker can be started; it is tried again")
            self._restart = self._loop.call_later(BACKOFF_S[1], self._spawn_worker)

    def _from_thread(self, call: Callable[[T], None]) -> Callable[[T], None]:
        def post(value: T) -> None:
            # The loop was closed: no caller is left
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(call, value)

        return post

    def _on_message(self, message: Message) -> None:
        self.heard = self._loop.time()
        match message:
            case Progress(stage, fraction):
                if stage != self.stage:
                    log.info("loading", extra={"fields": {"stage": stage}})
                self.stage, self.fraction = stage, fraction
            case CannotStart(reason, exit_code):
                log.error("the worker cannot start: %s", reason)
                if self.state is not WorkerState.DRAINING:
                    self.exit_code = exit_code
                    self._set_state(WorkerState.FAILED, reason)
            case LastWords(reason):
                self._last_words = reason
            case Ready(base):
                self._on_ready(base)
            case Report():
                self.listener.on_report(message)

    def _on_ready(self, base: BaseInfo) -> None:
        self.base, self.stage, self.fraction = base, "", 1.0
        self._born, self._stillborn = self.heard, 0
        if self.state is not WorkerState.DRAINING:
            self._set_state(WorkerState.READY)
            self.listener.on_worker_ready()

    def _on_exit(self, ending: WorkerExit) -> None:
        self._process = None
        self._gone.set()
        why = f"the worker died ({self._last_words or describe_exit(ending)})"
        if self.state not in FINAL:
            self._restart_later(why)
        self.listener.on_worker_lost(why, self.state in FINAL, ending.out_of_memory)

    def _restart_later(self, why: str) -> None:
        self._stillborn += not self._born
        lasted = bool(self._born) and self._loop.time() - self._born > STABLE_S
        self._shortlived = 0 if lasted else self._shortlived + 1
        if self._stillborn >= STILLBORN:
            self._set_state(WorkerState.FAILED, f"{why} {self._stillborn} times in a row while loading")
            log.error(self.reason)
            return
        log.error("%s and is started again", why)
        self._metrics.restarts.inc()
        self._set_state(WorkerState.RESTARTING, why)
        first, most = BACKOFF_S
        pause = first * 2 ** min(self._shortlived, DOUBLINGS)
        self._restart = self._loop.call_later(min(most, pause), self._spawn_worker)

    async def _watch_worker(self) -> None:
        limit = min(SILENCE_S, self.settings.request_timeout_s)
        while True:
            await asyncio.sleep(min(limit, STANDSTILL_S) / 20)
            process = self._process
            if process is not None and not self._born:
                await self._check_progress(process)
            if process is not None and process is self._process:
                self._kill_if_stuck(process, limit)

    def _kill_if_stuck(self, process: WorkerProcess, limit: float) -> None:
        """`limit`: the seconds for which a ready worker may be silent while a caller waits."""
        silent = self._loop.time() - self.heard
        if self._born:
            is_stuck, fault = silent > limit and self.listener.waits, "said nothing"
        else:
            is_stuck, fault = silent > STANDSTILL_S, "stood still"
        if is_stuck:
            log.error("the worker has %s for %.0f s and is killed", fault, silent)
            process.kill_worker(f"it had {fault} for {silent:.0f} s and was killed")

    async def _check_progress(self, process: WorkerProcess) -> None:
        """A worker that loads a large base sends nothing for minutes: while it uses the processor,
        or the system does not say whether it does, that counts as a message.
        """
        spent = await run_in(PROCESS, process.processor_ticks)
        if spent is None or spent != self._spent:
            self._spent, self.heard = spent, self._loop.time()


def spare_worker(settings: Settings) -> Settings:
    """The settings without the injected faults that end a worker, for they come once."""
    faults = settings.faults.model_copy(update={"kill": None, "stuck": None})
    return settings.model_copy(update={"faults": faults})


def describe_exit(ending: WorkerExit) -> str:
    """How a worker ended in words, fit for a person."""
    if ending.killed:
        return ending.killed
    if ending.out_of_memory:
        free = free_memory()
        return "memory ran out and the system killed it" + (f"; {free.limit}" if free else "")
    if ending.code < 0:
        return signal.Signals(-ending.code).name
    return "two steps in a row raised" if ending.code == RAISED_TWICE else f"exit code {ending.code}"
