"""The worker process: orders in, plan, step, reports out. `python -m service.engine.worker FD MODULE:FACTORY`.

It owns the device and the only sampling clock, and ends when its parent does. Must not know HTTP, text or names.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait

from .. import logs
from ..child_process import be_the_first_to_go, die_with_parent
from ..errors import AdapterdError, AdapterInvalid, SettingsError
from ..settings import Faults, Settings
from .loader import Loader
from .request import (
    BaseCard,
    Broken,
    Cancel,
    Digest,
    Drop,
    Load,
    Notice,
    Offer,
    Order,
    Pin,
    Plan,
    Progress,
    Ready,
    Report,
    Result,
    Runner,
    Shutdown,
    Submit,
    Tier,
)
from .scheduler import Scheduler

log = logging.getLogger(__name__)

Factory = Callable[[Settings, Callable[[str, float], None]], tuple[Runner, BaseCard]]

NOTHING = Plan()
HEARTBEAT_S = 2.0
RAISED_TWICE = 70  # exit code: two steps in a row raised, so the device is not to be trusted
PREFILL = {"cpu": 512}
PREFILL_ELSEWHERE = 4096


class Worker:
    """One loop around a runner; `run` returns the exit code of the process."""

    def __init__(self, connection: Connection, runner: Runner, card: BaseCard, settings: Settings) -> None:
        self.connection, self.runner, self.faults = connection, runner, settings.faults
        self.loader = Loader(runner, settings.faults.slow_load)
        self.given_up: list[Loader] = []
        self.scheduler = Scheduler(
            rows=card.rows,
            context=card.context,
            pool_rank=card.pool_rank,
            prefill_tokens=settings.prefill_tokens or PREFILL.get(card.device, PREFILL_ELSEWHERE),
            host_bytes=settings.host_cache_mb * 10**6,
        )
        self.heartbeat_s = min(HEARTBEAT_S, settings.request_timeout_s / 5)
        self.raised = 0
        self._loads: list[Load] = []
        self._placed: list[tuple[Digest, float]] = []
        self._evicted: list[tuple[Digest, Tier, float]] = []
        self._dropped: list[tuple[Digest, int]] = []

    def run(self) -> int:
        idle = True
        while self._listen(idle):
            idle = self._turn()
            if self.raised > 1:
                return RAISED_TWICE
        return 0

    def _turn(self) -> bool:
        """One step, if there is one to make; whether there was nothing to do."""
        self._feed()
        plan = self.scheduler.plan()
        self._forget()
        told = self._tell()  # before the step, so that who dies in it is known
        if plan != NOTHING:
            self._step(plan)
            self._tell()
        return plan == NOTHING and not told

    def _listen(self, idle: bool) -> bool:
        """Takes in all orders and loads there are, waiting for one if idle; False when it is time to end."""
        late = [loader.results for loader in self.given_up]
        if not wait([self.connection, self.loader.results, *late], self.heartbeat_s if idle else 0) and idle:
            self._send(Report(gauges=self.scheduler.gauges))
        while self.connection.poll():
            order: Order = self.connection.recv()
            if isinstance(order, Shutdown):
                return False
            self._obey(order)
        return True

    def _obey(self, order: Order) -> None:
        match order:
            case Submit(request):
                self.scheduler.submit(request)
            case Cancel(request):
                self.scheduler.cancel(request)
            case Offer(adapter, pinned, preload):
                self.scheduler.offer(adapter, pinned, preload)
                if preload and self.scheduler.adapters.at_hand(adapter.digest):
                    self._loads.append(Load(adapter.digest, 0.0, adapter.size))
            case Pin(digest, pinned):
                self.scheduler.pin(digest, pinned)
            case Drop(digest):
                self.scheduler.drop(digest)

    def _feed(self) -> None:
        """Takes what the loader has read, and gives it the next adapter."""
        while self.loader.results.poll():
            load, code = self.loader.take()
            if load.error:
                self._fail(load, code)
            else:
                self._loads.append(load)
                self.scheduler.hosted(load.digest, load.size)
        self._clear_up()
        if time.monotonic() > self.loader.deadline:
            self._give_up()
        if (wanted := self.scheduler.next_load()) is not None:
            adapter, victims = wanted
            for digest in victims:
                began = time.monotonic()
                self.runner.unload(digest)
                self._evicted.append((digest, Tier.HOST, time.monotonic() - began))
            self.loader.read(adapter)

    def _give_up(self) -> None:
        """A disk that hangs fails the adapter that is on it, and no other."""
        digest = self.scheduler.adapters.loading
        assert digest is not None, "what is overdue is loading"
        self.loader.end()
        self.given_up.append(self.loader)
        self.loader = Loader(self.runner, self.faults.slow_load)
        self._fail(Load(digest, 0.0, 0, "reading the adapter's files took too long"), AdapterInvalid.code)

    def _fail(self, load: Load, code: str) -> None:
        """An earlier reading of the same that came too late may have been kept for this one."""
        self._loads.append(load)
        self.scheduler.load_failed(load.digest, code, load.error)
        self.runner.unload(load.digest)

    def _clear_up(self) -> None:
        """What was given up and has come after all is not kept, unless it was asked for again since."""
        for loader in [late for late in self.given_up if late.results.poll()]:
            self.given_up.remove(loader)
            load, _ = loader.take()
            if not load.error and not self.scheduler.adapters.kept(load.digest):
                self.runner.unload(load.digest)

    def _forget(self) -> None:
        for digest, hosted in self.scheduler.gone():
            self._dropped.append((digest, self.runner.unload(digest) if hosted else 0))

    def _step(self, plan: Plan) -> None:
        placed = False
        try:
            self._place(plan)
            placed = True
            results = self._run(plan)
        except Exception:
            log.exception("a step raised; %d requests fail", len(plan.chunks))
            self.raised += 1
            self.scheduler.abort(plan, placed)
        else:
            self.raised = 0
            self.scheduler.commit(plan, results)

    def _place(self, plan: Plan) -> None:
        """Steps of their own: their times are told, and when the forward raises, the pool is known to be sound."""
        if plan.remove:
            seconds = self._took(Plan(remove=plan.remove)) / len(plan.remove)
            self._evicted += [(digest, Tier.DEVICE, seconds) for digest in plan.remove]
        if plan.place:
            seconds = self._took(Plan(place=plan.place)) / len(plan.place)
            self._placed += [(placement.digest, seconds) for placement in plan.place]

    def _took(self, plan: Plan) -> float:
        began = time.monotonic()
        self.runner.step(plan)
        return time.monotonic() - began

    def _run(self, plan: Plan) -> Sequence[Result]:
        made = {chunk.generated + 1 for chunk in plan.chunks if chunk.sample}
        fail(self.faults, made)
        return self.runner.step(Plan(forks=plan.forks, chunks=plan.chunks)) if plan.chunks else ()

    def _tell(self) -> bool:
        """Sends what happened since the last report; whether there was anything."""
        report = self.scheduler.report()
        for event in report.events:
            if event.finish is not None:
                self.runner.finish(event.request)
        report = replace(
            report,
            loads=tuple(self._loads),
            placed=tuple(self._placed),
            evicted=tuple(self._evicted),
            dropped=tuple(self._dropped),
        )
        self._loads, self._placed, self._evicted, self._dropped = [], [], [], []
        news = report != Report(gauges=report.gauges)
        if news:
            self._send(report)
        return news

    def _send(self, notice: Notice) -> None:
        self.connection.send(notice)


def fail(faults: Faults, made: set[int]) -> None:
    """The injected faults of a step that would make these tokens of their requests."""
    if faults.kill in made:
        os.kill(os.getpid(), signal.SIGKILL)
    while faults.stuck in made:
        time.sleep(3600)
    if faults.step in made:
        raise RuntimeError(f"injected: the step that makes token {faults.step} raises")


def serve(connection: Connection, settings: Settings, factory: Factory) -> int:
    """Builds the runner, then obeys until told to end; the exit code. Raises OSError or EOFError when the parent is gone."""
    try:
        runner, card = factory(settings, lambda stage, fraction: connection.send(Progress(stage, fraction)))
    except (AdapterdError, SettingsError) as error:
        connection.send(Broken(str(error)))
        return 1
    except (OSError, ValueError) as error:
        log.exception("the base cannot be loaded")
        connection.send(Broken(f"the base cannot be loaded ({type(error).__name__}); the log says why"))
        return 1
    connection.send(Ready(card))
    return Worker(connection, runner, card, settings).run()


def main(descriptor: str, factory: str) -> int:
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to end
        signal.signal(ignored, signal.SIG_IGN)
    die_with_parent()
    be_the_first_to_go()
    module, _, function = factory.partition(":")
    with Connection(int(descriptor)) as connection, contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        settings: Settings = connection.recv()
        logs.setup(settings.log_format, settings.log_level)
        return serve(connection, settings, getattr(importlib.import_module(module), function))
    return 0  # the parent is gone


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
