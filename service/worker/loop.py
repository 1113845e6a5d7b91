"""The worker process: commands in, plan, step, reports out.

`python -m service.worker.loop FD FORM LEVEL MODULE:FACTORY`; FORM and LEVEL are those of the log.

It owns the device, runs every step, and ends when its parent does. Must not know HTTP, text or adapter
names.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection, wait
from typing import NamedTuple

from ..child_process import be_the_first_to_go, settle_child
from ..core.adapter import Digest, Placement, Tier
from ..core.base_info import BaseInfo
from ..core.defaults import defaults_of
from ..core.error_codes import ErrorCode
from ..core.messages import (
    AddAdapter,
    Cancel,
    CannotStart,
    Command,
    LastWords,
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
from ..engine.plan import Chunk, Launched, Plan, Result, Runner
from ..engine.scheduler import Scheduler
from ..errors import AdapterdError, DoesNotFit, SettingsError
from ..exit_codes import ExitCode
from ..limits import free_memory, megabytes
from ..settings import Faults, Settings
from ..telemetry import logs
from .loader import Loader

log = logging.getLogger(__name__)

Factory = Callable[[Settings, Callable[[str, float], None]], tuple[Runner, BaseInfo]]

NOTHING = Plan()
HEARTBEAT_S = 2.0
# Exit code: two steps in a row raised in all their parts, so the device is not to be trusted
RAISED_TWICE = 70
PARENT_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
# Folders, and the last name below them
ABSOLUTE_PATH = re.compile(r"(?<![\w./])(?:/[^\s/'\"]+)*/([^\s/'\"]+)")
MOST_WORDS = 300  # characters of an exception's
UNRUNNABLE = "this base cannot run this adapter: its step raised {}"
TRIAL = -1  # the id of a request that no client made


class StepAhead(NamedTuple):
    """A step that runs while the one before it is read."""

    plan: Plan
    launched: Launched


class Worker:
    """One loop around a runner; `run` returns the exit code of the process."""

    def __init__(self, connection: Connection, runner: Runner, base: BaseInfo, settings: Settings) -> None:
        self.connection, self.runner, self.faults = connection, runner, settings.faults
        self.loader = Loader(runner, settings.faults.slow_load)
        self.given_up: list[Loader] = []
        self.scheduler = make_scheduler(base, settings)
        self.heartbeat_s = min(HEARTBEAT_S, settings.request_timeout_s / 5)
        self.raised = 0
        self._ahead: StepAhead | None = None
        self._loads: list[Load] = []
        self._placed: list[tuple[Digest, float]] = []
        self._evicted: list[tuple[Digest, Tier, float]] = []
        self._dropped: list[tuple[Digest, int]] = []

    def run_loop(self) -> int:
        idle = True
        while self._receive_commands(idle):
            idle = self.run_turn()
            if self.raised > 1:
                return RAISED_TWICE
        return 0

    def run_turn(self) -> bool:
        """One step to its end, if there is one to make; whether there was nothing to do."""
        self._feed_loader()
        if self._ahead is not None:
            self._finish_ahead(*self._ahead)
            self._send_news(has_run=True)
            return False
        plan = self.scheduler.plan_step()
        self._forget_removed()
        sent = self._send_news()  # before the step, so that the API knows which requests die in it
        if plan != NOTHING:
            self._run_step(plan)
            self._send_news(has_run=True)
        return plan == NOTHING and not sent

    def _receive_commands(self, idle: bool) -> bool:
        """Obeys all commands there are; if idle, waits for one or for a load first.

        False when it is time to end.
        """
        if idle and not self._wait_for_work():
            self._send_message(Report(gauges=self.scheduler.gauges))
        while self.connection.poll():
            command: Command = self.connection.recv()
            if isinstance(command, Shutdown):
                return False
            self._obey_command(command)
        return True

    def _wait_for_work(self) -> bool:
        """Whether a command or a load came before the next heartbeat was due."""
        late = [loader.results for loader in self.given_up]
        return bool(wait([self.connection, self.loader.results, *late], self.heartbeat_s))

    def _obey_command(self, command: Command) -> None:
        match command:
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
        """Takes the loader's results, and gives it the next adapter."""
        self._take_results()
        self._clear_up()
        if time.monotonic() > self.loader.deadline:
            self._give_up()
        wanted = self.scheduler.next_load()
        if wanted is not None:
            adapter, victims = wanted
            for digest in victims:
                self._evict_from_host(digest)
            self.loader.read_adapter(adapter)

    def _take_results(self) -> None:
        while self.loader.results.poll():
            load = self.loader.take_result()
            if load.error:
                self._fail_load(load)
            else:
                self._loads.append(load)
                self.scheduler.mark_hosted(load.digest, load.size)

    def _evict_from_host(self, digest: Digest) -> None:
        began = time.monotonic()
        self.runner.evict_adapter(digest)
        self._evicted.append((digest, Tier.HOST, time.monotonic() - began))

    def _give_up(self) -> None:
        """A disk that hangs fails the adapter that is on it, and no other."""
        digest = self.scheduler.adapters.loading
        assert digest is not None, "an overdue adapter is the one that loads"
        self.loader.end_reading()
        self.given_up.append(self.loader)
        self.loader = Loader(self.runner, self.faults.slow_load)
        overdue = Load(digest, 0.0, 0, "reading the adapter's files took too long")
        self._fail_load(overdue)

    def _fail_load(self, load: Load) -> None:
        """Reports the failed load; also forgets a late result of an earlier load of the same adapter."""
        self._loads.append(load)
        self.scheduler.load_failed(load.digest, load.code, load.error)
        self.runner.evict_adapter(load.digest)

    def _clear_up(self) -> None:
        """Forgets each load that was given up and has ended after all, unless its adapter is wanted
        again since.
        """
        for loader in [late for late in self.given_up if late.results.poll()]:
            self.given_up.remove(loader)
            load = loader.take_result()
            is_wanted = self.scheduler.adapters.is_hosted(load.digest)
            if not load.error and not is_wanted:
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
        guilty = self._run_prepared(plan, unplaced)
        if unplaced:
            self.scheduler.unplace(at for at in plan.place if at.digest in unplaced)
        for digest, reason in guilty.items():
            self.scheduler.refuse(digest, reason)
            self._loads.append(Load(digest, 0.0, 0, reason))

    def _run_prepared(self, plan: Plan, unplaced: set[Digest]) -> dict[Digest, str]:
        """Runs and commits the chunks whose adapters are placed; the adapters that the base cannot
        run, and why.
        """
        results: dict[int, Result] = {}
        errors: dict[int, str] = {}
        tried = [chunk for chunk in plan.chunks if chunk.request.adapter not in unplaced]
        self._attempt(tried, results, errors, None if unplaced else plan)
        failed = [chunk for chunk in tried if chunk.request.id in errors]
        sound = bool(results) or not (failed or unplaced) or self._is_sound(failed)
        self.raised = 0 if sound else self.raised + 1
        guilty = self._guilty(failed, errors) if sound else {}
        made = [results.get(chunk.request.id) or _make_failure(chunk, guilty) for chunk in plan.chunks]
        self.scheduler.commit_step(plan, made)
        return guilty

    def _prepare(self, plan: Plan) -> set[Digest]:
        """Removes and places; the adapters that could not be placed."""
        for digest in plan.remove:
            began = time.monotonic()
            self.runner.remove_adapter(digest)
            self._evicted.append((digest, Tier.DEVICE, time.monotonic() - began))
        return {placement.digest for placement in plan.place if not self._place_adapter(placement)}

    def _place_adapter(self, placement: Placement) -> bool:
        began = time.monotonic()
        try:
            self.runner.place_adapter(placement)
        except Exception:
            log.exception("an adapter could not be placed")
            return False
        self._placed.append((placement.digest, time.monotonic() - began))
        return True

    def _attempt(
        self,
        chunks: Sequence[Chunk],
        results: dict[int, Result],
        errors: dict[int, str],
        plan: Plan | None = None,
    ) -> None:
        """Runs the chunks together; where that raises, each adapter's apart, and of those that
        raise each request alone. After all chunks of `plan` the next step may be launched ahead.
        """
        ids = [chunk.request.id for chunk in chunks]
        try:
            made = self._run_chunks(chunks, plan)
        except Exception as error:
            self._drop_ahead()
            log.exception("a step raised; its %d requests are told apart", len(chunks))
            parts = split_chunks(chunks)
            if len(parts) == 1:
                errors[ids[0]] = type(error).__name__
                return
            for part in parts:
                self._attempt(part, results, errors)
        else:
            results.update(zip(ids, made, strict=True))

    def _is_sound(self, failed: Sequence[Chunk]) -> bool:
        """Whether the base still runs where every chunk failed; False if a chunk of the base failed."""
        if not failed or not all(chunk.adapter for chunk in failed):
            return False
        return self._can_run(failed[0], None)

    def _guilty(self, failed: Sequence[Chunk], errors: Mapping[int, str]) -> dict[Digest, str]:
        """The adapters that raise whatever their tokens, and why each is refused."""
        guilty: dict[Digest, str] = {}
        for chunk in failed:
            if chunk.adapter and not self._can_run(chunk, chunk.adapter):
                guilty[chunk.adapter] = UNRUNNABLE.format(errors[chunk.request.id])
        return guilty

    def _can_run(self, chunk: Chunk, adapter: Digest | None) -> bool:
        """Whether two tokens can be run in a block that this failed chunk wrote and in its slot,
        which no sequence reads any more.
        """
        tokens = (chunk.request.prompt * 2)[:2]
        request, blocks = Request(TRIAL, tokens, 0, adapter), chunk.written_blocks[:1]
        trial = Chunk(request, blocks, 0, tokens, sample=False, slot=chunk.slot)
        try:
            self.runner.run_chunks((trial,))
        except Exception:
            return False
        return True

    def _run_chunks(self, chunks: Sequence[Chunk], plan: Plan | None) -> Sequence[Result]:
        if not chunks:
            return ()
        launched = self._launch_chunks(chunks)
        if plan is not None:
            self._launch_ahead(plan, launched)
        return launched.read()

    def _launch_chunks(self, chunks: Sequence[Chunk], after: Launched | None = None) -> Launched:
        inject_faults(self.faults, {chunk.generated + 1 for chunk in chunks if chunk.sample})
        return self.runner.launch_chunks(chunks, after)

    def _launch_ahead(self, plan: Plan, launched: Launched) -> None:
        """Has the device go on with the step after this one before this one is read, if that is sure
        to be the next.
        """
        ahead = self.scheduler.plan_ahead(plan) if self.runner.runs_ahead else None
        if ahead is None:
            return
        try:
            self._ahead = StepAhead(ahead, self._launch_chunks(ahead.chunks, launched))
        except Exception:
            log.exception("a step could not be launched ahead; it is planned anew")
            self.scheduler.drop_step(ahead)

    def _finish_ahead(self, plan: Plan, launched: Launched) -> None:
        """Reads and commits the step that was launched ahead; one that raises is planned anew, and what
        it raises then tells its requests apart.
        """
        self._ahead = None
        self._launch_ahead(plan, launched)
        try:
            results = launched.read()
        except Exception:
            log.exception("a step that was launched ahead raised; it is planned anew")
            self._drop_ahead()
            self.scheduler.drop_step(plan)
        else:
            self.raised = 0
            self.scheduler.commit_step(plan, results)

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            (plan, launched), self._ahead = self._ahead, None
            self.scheduler.drop_step(plan)
            try:
                launched.drop()
            except Exception:  # so will the next step
                log.exception("what a dropped step wrote could not be cleared")

    def _send_news(self, has_run: bool = False) -> bool:
        """Sends a report of everything since the last one; whether there was anything. A step that
        has run is news by itself: those of a long prompt have no other for a minute, and silence is
        taken for death.
        """
        report = self._take_report()
        for event in report.events:
            if event.finish is not None:
                self.runner.finish_request(event.request)
        is_news = has_run or report != Report(gauges=report.gauges)
        if is_news:
            self._send_message(report)
        return is_news

    def _take_report(self) -> Report:
        report = replace(
            self.scheduler.take_report(),
            loads=tuple(self._loads),
            placed=tuple(self._placed),
            evicted=tuple(self._evicted),
            dropped=tuple(self._dropped),
        )
        self._loads, self._placed, self._evicted, self._dropped = [], [], [], []
        return report

    def _send_message(self, message: Message) -> None:
        self.connection.send(message)


def make_scheduler(base: BaseInfo, settings: Settings) -> Scheduler:
    """The scheduler, whose cache of adapters leaves half of the host's memory to KV blocks and others."""
    host_bytes, free = settings.host_cache_mb * 10**6, free_memory()
    if free is not None and host_bytes > free.memory // 2:
        host_bytes = free.memory // 2
        log.warning("adapters get %s of host memory, for %s", megabytes(host_bytes), free.limit)
    return Scheduler(
        rows=base.rows,
        context=base.context,
        kv_blocks=base.kv_blocks,
        pool_rank=base.pool_rank,
        prefill_tokens=settings.prefill_tokens or defaults_of(base.device).prefill_tokens,
        host_bytes=host_bytes,
        reuses_prefixes=not base.state_bytes,
    )


def split_chunks(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """The chunks of each adapter; where all are of one adapter, each chunk by itself."""
    groups: dict[Digest | None, list[Chunk]] = {}
    for chunk in chunks:
        groups.setdefault(chunk.adapter, []).append(chunk)
    return list(groups.values()) if len(groups) > 1 else [[chunk] for chunk in chunks]


def _make_failure(chunk: Chunk, guilty: Mapping[Digest, str]) -> Result:
    """The result of a chunk that raised alone, or whose adapter could not be placed."""
    reason = guilty.get(chunk.request.adapter or "")
    if reason:
        return Result(error=reason, code=ErrorCode.ADAPTER_INVALID)
    return Result(error="the step that ran this request failed")


def inject_faults(faults: Faults, counts: set[int]) -> None:
    """The injected faults of a step that samples the tokens of these numbers in their requests."""
    if faults.kill in counts:
        os.kill(os.getpid(), signal.SIGKILL)
    while faults.stuck in counts:
        time.sleep(3600)
    if faults.step in counts:
        raise RuntimeError(f"injected: the step that makes token {faults.step} raises")


def serve_worker(connection: Connection, settings: Settings, factory: Factory) -> int:
    """Builds the runner, then obeys until the command to end; the exit code.

    Raises OSError or EOFError when the parent is gone, and what the runner raises.
    """

    def send_progress(stage: str, fraction: float) -> None:
        connection.send(Progress(stage, fraction))

    try:
        runner, base = factory(settings, send_progress)
    except DoesNotFit as error:
        return _refuse_start(connection, CannotStart(str(error), ExitCode.REFUSED))
    except (AdapterdError, SettingsError) as error:
        return _refuse_start(connection, CannotStart(str(error)))
    except (EOFError, OSError, ValueError) as error:
        log.exception("the base cannot be loaded")
        reason = f"the base cannot be loaded: {describe_error(error)}"
        return _refuse_start(connection, CannotStart(reason))
    connection.send(Ready(base))
    return Worker(connection, runner, base, settings).run_loop()


def _refuse_start(connection: Connection, refusal: CannotStart) -> int:
    connection.send(refusal)
    return 1


def describe_error(error: Exception) -> str:
    """The exception's kind and its first line, without the host's folders: only the log names them."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    first = next(iter(text.strip().splitlines()), "")
    line = ABSOLUTE_PATH.sub(lambda match: match[1], first)[:MOST_WORDS]
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def run_process(descriptor: str, form: str, level: str, factory: str) -> int:
    settle_child(form, level)
    be_the_first_to_go()
    module, _, function = factory.partition(":")
    with (
        Connection(int(descriptor)) as connection,
        contextlib.suppress(*PARENT_GONE),
    ):
        settings: Settings = connection.recv()
        logs.set_up_logging(settings.log_format, settings.log_level)
        try:
            return serve_worker(connection, settings, getattr(importlib.import_module(module), function))
        except PARENT_GONE:
            raise
        except Exception as error:  # the parent would see an exit code, or nothing for a while
            log.exception("the worker raised")
            connection.send(LastWords(describe_error(error)))
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(run_process(*sys.argv[1:]))
