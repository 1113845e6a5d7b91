"""The worker process: orders in, plan, step, reports out.

`python -m service.worker.loop FD MODULE:FACTORY`.

It owns the device and the only sampling clock, and ends when its parent does. Must not know HTTP,
text or names.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait

from ..child_process import be_the_first_to_go, die_with_parent
from ..core.adapter import Digest, Tier
from ..core.base_info import BaseInfo
from ..core.defaults import defaults_of
from ..core.messages import (
    AddAdapter,
    Cancel,
    CannotStart,
    Command,
    Load,
    Message,
    Pin,
    Progress,
    Ready,
    RemoveAdapter,
    Report,
    Shutdown,
    Submit,
)
from ..core.request import Request
from ..engine.plan import Chunk, Plan, Result, Runner
from ..engine.scheduler import Scheduler
from ..errors import AdapterdError, AdapterInvalid, SettingsError
from ..settings import Faults, Settings
from ..telemetry import logs
from .loader import Loader

log = logging.getLogger(__name__)

Factory = Callable[[Settings, Callable[[str, float], None]], tuple[Runner, BaseInfo]]

NOTHING = Plan()
HEARTBEAT_S = 2.0
# Exit code: two steps in a row raised in all their parts, so the device is not to be trusted
RAISED_TWICE = 70
UNRUNNABLE = "this base cannot run this adapter: its step raised {}"
TRIAL = -1  # the number of a request that nobody made


class Worker:
    """One loop around a runner; `run` returns the exit code of the process."""

    def __init__(self, connection: Connection, runner: Runner, card: BaseInfo, settings: Settings) -> None:
        self.connection, self.runner, self.faults = connection, runner, settings.faults
        self.loader = Loader(runner, settings.faults.slow_load)
        self.given_up: list[Loader] = []
        self.scheduler = Scheduler(
            rows=card.rows,
            context=card.context,
            pool_rank=card.pool_rank,
            prefill_tokens=settings.prefill_tokens or defaults_of(card.device).prefill_tokens,
            host_bytes=settings.host_cache_mb * 10**6,
        )
        self.heartbeat_s = min(HEARTBEAT_S, settings.request_timeout_s / 5)
        self.raised = 0
        self._loads: list[Load] = []
        self._placed: list[tuple[Digest, float]] = []
        self._evicted: list[tuple[Digest, Tier, float]] = []
        self._dropped: list[tuple[Digest, int]] = []

    def run_loop(self) -> int:
        idle = True
        while self._receive_commands(idle):
            idle = self._run_turn()
            if self.raised > 1:
                return RAISED_TWICE
        return 0

    def _run_turn(self) -> bool:
        """One step, if there is one to make; whether there was nothing to do."""
        self._feed_loader()
        plan = self.scheduler.plan_step()
        self._forget_removed()
        told = self._send_news()  # before the step, so that who dies in it is known
        if plan != NOTHING:
            self._run_step(plan)
            self._send_news()
        return plan == NOTHING and not told

    def _receive_commands(self, idle: bool) -> bool:
        """Takes in all orders and loads there are, waiting for one if idle;

        False when it is time to end.
        """
        late = [loader.results for loader in self.given_up]
        if not wait([self.connection, self.loader.results, *late], self.heartbeat_s if idle else 0) and idle:
            self._send_message(Report(gauges=self.scheduler.gauges))
        while self.connection.poll():
            order: Command = self.connection.recv()
            if isinstance(order, Shutdown):
                return False
            self._obey_command(order)
        return True

    def _obey_command(self, order: Command) -> None:
        match order:
            case Submit(request):
                self.scheduler.submit_request(request)
            case Cancel(request):
                self.scheduler.cancel_request(request)
            case AddAdapter(adapter, pinned, preload):
                self.scheduler.add_adapter(adapter, pinned, preload)
                if preload and self.scheduler.adapters.at_hand(adapter.digest):
                    self._loads.append(Load(adapter.digest, 0.0, adapter.size))
            case Pin(digest, pinned):
                self.scheduler.pin_adapter(digest, pinned)
            case RemoveAdapter(digest):
                self.scheduler.remove_adapter(digest)

    def _feed_loader(self) -> None:
        """Takes what the loader has read, and gives it the next adapter."""
        while self.loader.results.poll():
            load, code = self.loader.take_result()
            if load.error:
                self._fail_load(load, code)
            else:
                self._loads.append(load)
                self.scheduler.mark_hosted(load.digest, load.size)
        self._clear_up()
        if time.monotonic() > self.loader.deadline:
            self._give_up()
        if (wanted := self.scheduler.next_load()) is not None:
            adapter, victims = wanted
            for digest in victims:
                began = time.monotonic()
                self.runner.evict_adapter(digest)
                self._evicted.append((digest, Tier.HOST, time.monotonic() - began))
            self.loader.read_adapter(adapter)

    def _give_up(self) -> None:
        """A disk that hangs fails the adapter that is on it, and no other."""
        digest = self.scheduler.adapters.loading
        assert digest is not None, "what is overdue is loading"
        self.loader.end_reading()
        self.given_up.append(self.loader)
        self.loader = Loader(self.runner, self.faults.slow_load)
        self._fail_load(
            Load(digest, 0.0, 0, "reading the adapter's files took too long"), AdapterInvalid.code
        )

    def _fail_load(self, load: Load, code: str) -> None:
        """An earlier reading of the same that came too late may have been kept for this one."""
        self._loads.append(load)
        self.scheduler.load_failed(load.digest, code, load.error)
        self.runner.evict_adapter(load.digest)

    def _clear_up(self) -> None:
        """What was given up and has come after all is not kept, unless it was asked for again
        since.
        """
        for loader in [late for late in self.given_up if late.results.poll()]:
            self.given_up.remove(loader)
            load, _ = loader.take_result()
            if not load.error and not self.scheduler.adapters.is_hosted(load.digest):
                self.runner.evict_adapter(load.digest)

    def _forget_removed(self) -> None:
        for digest, hosted in self.scheduler.take_removed():
            self._dropped.append((digest, self.runner.evict_adapter(digest) if hosted else 0))

    def _run_step(self, plan: Plan) -> None:
        try:
            unplaced = self._prepare(plan)
        except Exception:
            log.exception("a step could not be prepared; %d requests fail", len(plan.chunks))
            self.raised += 1
            self.scheduler.abort_step(plan)
            return
        results: dict[int, Result] = {}
        errors: dict[int, str] = {}
        tried = [chunk for chunk in plan.chunks if chunk.request.adapter not in unplaced]
        self._attempt(tried, results, errors)
        failed = [chunk for chunk in tried if chunk.request.id in errors]
        sound = bool(results) or not (failed or unplaced) or self._is_sound(failed)
        self.raised = 0 if sound else self.raised + 1
        guilty = self._guilty(failed, errors) if sound else {}
        self.scheduler.commit_step(
            plan, [results.get(chunk.request.id) or _failure(chunk, guilty) for chunk in plan.chunks]
        )
        self.scheduler.unplace(at for at in plan.place if at.digest in unplaced)
        for digest, reason in guilty.items():
            self.scheduler.refuse(digest, reason)
            self._loads.append(Load(digest, 0.0, 0, reason))

    def _prepare(self, plan: Plan) -> set[Digest]:
        """Steps of their own: their times are told, and a step that is run again copies nothing
        again.

        The adapters that could not be placed.
        """
        if plan.remove:
            seconds = self._time_step(Plan(remove=plan.remove)) / len(plan.remove)
            self._evicted += [(digest, Tier.DEVICE, seconds) for digest in plan.remove]
        unplaced: set[Digest] = set()
        for placement in plan.place:
            try:
                self._placed.append((placement.digest, self._time_step(Plan(place=(placement,)))))
            except Exception:
                log.exception("an adapter could not be placed")
                unplaced.add(placement.digest)
        if plan.forks:
            self.runner.run_step(Plan(forks=plan.forks))
        return unplaced

    def _attempt(self, chunks: Sequence[Chunk], results: dict[int, Result], errors: dict[int, str]) -> None:
        """Runs these together; where that raises, each adapter's apart, and of those that raise
        each request alone.
        """
        try:
            made = self._run_chunks(chunks)
        except Exception as error:
            parts = split(chunks)
            log.exception("a step raised; its %d requests are told apart", len(chunks))
            if len(parts) == 1:
                errors[chunks[0].request.id] = type(error).__name__
                return
            for part in parts:
                self._attempt(part, results, errors)
        else:
            results.update(zip((chunk.request.id for chunk in chunks), made, strict=True))

    def _is_sound(self, failed: Sequence[Chunk]) -> bool:
        """Whether the base runs where nothing else did; if it was itself what failed, it does not."""
        return bool(failed) and all(chunk.adapter for chunk in failed) and self._runs(failed[0], None)

    def _guilty(self, failed: Sequence[Chunk], errors: Mapping[int, str]) -> dict[Digest, str]:
        """The adapters that raise whatever they are given, and why each is refused."""
        return {
            chunk.adapter: UNRUNNABLE.format(errors[chunk.request.id])
            for chunk in failed
            if chunk.adapter and not self._runs(chunk, chunk.adapter)
        }

    def _runs(self, chunk: Chunk, adapter: Digest | None) -> bool:
        """Whether two tokens can be run in the row of this failed chunk, which nobody reads any
        more.
        """
        tokens = (chunk.request.prompt * 2)[:2]
        try:
            self.runner.run_step(
                Plan(chunks=(Chunk(Request(TRIAL, tokens, 0, adapter), chunk.row, 0, tokens, False),))
            )
        except Exception:
            return False
        return True

    def _time_step(self, plan: Plan) -> float:
        began = time.monotonic()
        self.runner.run_step(plan)
        return time.monotonic() - began

    def _run_chunks(self, chunks: Sequence[Chunk]) -> Sequence[Result]:
        made = {chunk.generated + 1 for chunk in chunks if chunk.sample}
        inject_faults(self.faults, made)
        return self.runner.run_step(Plan(chunks=tuple(chunks))) if chunks else ()

    def _send_news(self) -> bool:
        """Sends what happened since the last report; whether there was anything."""
        report = self.scheduler.take_report()
        for event in report.events:
            if event.finish is not None:
                self.runner.finish_request(event.request)
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
            self._send_message(report)
        return news

    def _send_message(self, notice: Message) -> None:
        self.connection.send(notice)


def split(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Those of each adapter; where all are of one, each by itself."""
    groups: dict[Digest | None, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.adapter, []).append(chunk)
    return list(groups.values()) if len(groups) > 1 else [[chunk] for chunk in chunks]


def _failure(chunk: Chunk, guilty: Mapping[Digest, str]) -> Result:
    """What becomes of a request whose own part of a step raised."""
    reason = guilty.get(chunk.request.adapter or "")
    return (
        Result(error=reason, code=AdapterInvalid.code)
        if reason
        else Result(error="the step that ran this request failed")
    )


def inject_faults(faults: Faults, made: set[int]) -> None:
    """The injected faults of a step that would make these tokens of their requests."""
    if faults.kill in made:
        os.kill(os.getpid(), signal.SIGKILL)
    while faults.stuck in made:
        time.sleep(3600)
    if faults.step in made:
        raise RuntimeError(f"injected: the step that makes token {faults.step} raises")


def serve_worker(connection: Connection, settings: Settings, factory: Factory) -> int:
    """Builds the runner, then obeys until told to end; the exit code.

    Raises OSError or EOFError when the parent is gone.
    """
    try:
        runner, card = factory(settings, lambda stage, fraction: connection.send(Progress(stage, fraction)))
    except (AdapterdError, SettingsError) as error:
        connection.send(CannotStart(str(error)))
        return 1
    except (OSError, ValueError) as error:
        log.exception("the base cannot be loaded")
        connection.send(CannotStart(f"the base cannot be loaded ({type(error).__name__}); the log says why"))
        return 1
    connection.send(Ready(card))
    return Worker(connection, runner, card, settings).run_loop()


def run_process(descriptor: str, factory: str) -> int:
    for ignored in (signal.SIGINT, signal.SIGTERM):  # the parent decides when to end
        signal.signal(ignored, signal.SIG_IGN)
    die_with_parent()
    be_the_first_to_go()
    module, _, function = factory.partition(":")
    with (
        Connection(int(descriptor)) as connection,
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
    ):
        settings: Settings = connection.recv()
        logs.set_up_logging(settings.log_format, settings.log_level)
        return serve_worker(connection, settings, getattr(importlib.import_module(module), function))
    return 0  # the parent is gone


if __name__ == "__main__":
    sys.exit(run_process(*sys.argv[1:]))
