"""The worker's loop, in a thread of the test: its reports, their order, and how it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from service.core.adapter import Adapter, Placement, Tier
from service.core.messages import (
    AddAdapter,
    CannotStart,
    Command,
    Load,
    Message,
    RemoveAdapter,
    Report,
    Shutdown,
    Submit,
)
from service.core.request import Event, Finish, Request
from service.engine.plan import Chunk, Result
from service.errors import SettingsError
from service.limits import FreeMemory
from service.settings import Faults, Settings
from service.worker import loader
from service.worker.loop import RAISED_TWICE, Factory, Worker, serve_worker
from tests.fakes import FakeRunner, adapter, card, expected


class Desk:
    """The parent's side of a worker that runs in a thread."""

    def __init__(self, serve: Callable[[Connection], int]) -> None:
        self.connection, theirs = Pipe()
        self.codes: list[int] = []

        def work() -> None:
            with theirs, suppress(EOFError, OSError):
                self.codes.append(serve(theirs))

        self.thread = threading.Thread(target=work)
        self.thread.start()

    def send(self, *orders: Command) -> None:
        for order in orders:
            self.connection.send(order)

    def hear(self) -> Message:
        assert self.connection.poll(20), "the worker says nothing"
        notice: Message = self.connection.recv()
        return notice

    def report(self, of: Callable[[Report], object]) -> Report:
        """The next report of such."""
        while True:
            notice = self.hear()
            assert isinstance(notice, Report)
            if of(notice):
                return notice

    def event(self) -> Event:
        return self.report(lambda report: report.events).events[0]

    def end(self) -> list[int]:
        self.thread.join(20)
        assert not self.thread.is_alive()
        return self.codes


class Balky(FakeRunner):
    """A runner that fails where it is told to."""

    wrong: str = ""

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.released, self.arrived = threading.Event(), threading.Event()
        self.lengths: list[int] = []

    def load_adapter(self, adapter: Any) -> int:
        if self.wrong == "disk":
            raise FileNotFoundError(2, "No such file or directory", "/secret/place")
        if self.wrong == "memory":
            raise MemoryError
        if self.wrong == "hang":
            self.wrong = ""
            self.released.wait()
        elif self.wrong == "late":
            self.arrived.wait()
            time.sleep(0.3)  # so that what has arrived is taken first
            raise FileNotFoundError(2, "No such file or directory")
        size = super().load_adapter(adapter)
        self.arrived.set()
        return size

    def place_adapter(self, placement: Placement) -> None:
        if self.wrong == "place":
            raise RuntimeError("the device said no")
        super().place_adapter(placement)

    def run_chunks(self, chunks: Sequence[Chunk]) -> list[Result]:
        if self.wrong == "step":
            raise RuntimeError("the device said no")
        self.lengths += [len(chunk.tokens) for chunk in chunks]
        return super().run_chunks(chunks)


@contextmanager
def desk(serve: Callable[[Connection], int]) -> Iterator[Desk]:
    made = Desk(serve)
    with made.connection:
        yield made
    made.end()


def worker(runner: FakeRunner | None = None, **chosen: Any) -> AbstractContextManager[Desk]:
    settings = Settings(**({"pool_rank": 16, "max_rank": 16} | chosen))
    fake = card(settings)
    made = runner or FakeRunner(fake.kv_blocks, fake.context, fake.pool_rank)
    return desk(lambda connection: Worker(connection, made, fake, settings).run_loop())


def test_it_says_who_starts_before_the_step_that_may_kill_it() -> None:
    with worker() as desk:
        desk.send(Submit(Request(1, (5,), 2)))
        starts = desk.report(lambda report: True)
        assert (starts.started, starts.events) == (((1, 0),), ())
        assert starts.gauges.running == 1
        tokens = [desk.event().token for _ in range(2)]
        assert [token.id for token in tokens if token] == expected(None, (5,), 2)


def test_prompts_are_cut_as_the_settings_say_and_nothing_waits_between_their_parts() -> None:
    runner = Balky()
    with worker(runner, prefill_tokens=4) as desk:
        desk.send(Submit(Request(1, tuple(range(10)), 1)))
        told = [desk.report(lambda report: report.started)]
        while not told[-1].events:
            told.append(desk.report(lambda report: True))
        assert len(told) == 1 + 3, "one after each step: between two it waits for nothing, and says no more"
    assert runner.lengths == [4, 4, 2]
    assert runner.ended == {1}


def test_it_tells_what_it_read_placed_and_dropped() -> None:
    each = adapter("a", size=321)
    with worker() as desk:
        desk.send(AddAdapter(each, preload=True))
        read = desk.report(lambda report: report.loads)
        (load,) = read.loads
        assert (load.digest, load.size, load.error) == (each.digest, 321, "")
        assert (read.pool, read.tiers) == ((Placement(each.digest, 0, 4),), ((each.digest, Tier.DEVICE),))
        assert [digest for digest, _ in desk.report(lambda report: report.placed).placed] == [each.digest]
        desk.send(AddAdapter(each, preload=True))
        assert desk.report(lambda report: report.loads).loads == (Load(each.digest, 0.0, 321),)
        desk.send(RemoveAdapter(each.digest))
        assert desk.report(lambda report: report.dropped).dropped == ((each.digest, 321),)


def test_it_shows_signs_of_life_while_it_waits_for_a_disk() -> None:
    each = adapter("a")
    with worker(faults=Faults(slow_load=1.0), request_timeout_s=0.5) as desk:
        desk.send(AddAdapter(each), Submit(Request(1, (5,), 1, each.digest)))
        for _ in range(3):
            desk.report(lambda report: report == Report(gauges=report.gauges) and report.gauges.waiting == 1)


@pytest.mark.parametrize(
    ("wrong", "code", "words"),
    [
        ("disk", "adapter_invalid", "No such file or directory"),
        ("memory", "overloaded", "not enough memory"),
        ("place", "internal", "step"),
    ],
)
def test_an_adapter_that_fails_says_why_shows_no_path_and_may_be_tried_again(
    wrong: str, code: str, words: str
) -> None:
    runner, each = Balky(), adapter("a")
    runner.wrong = wrong
    with worker(runner) as desk:
        desk.send(AddAdapter(each, preload=True, pinned=True), Submit(Request(1, (5,), 1, each.digest)))
        event = desk.event()
        assert (event.finish, event.code) == (Finish.FAILED, code)
        assert words in event.message
        assert "/secret" not in event.message
        runner.wrong = ""
        desk.send(Submit(Request(2, (5,), 1, each.digest)))
        token = desk.event().token
        assert token
        assert token.id == expected(each.digest, (5,), 1)[0]


def test_a_disk_that_hangs_fails_its_adapter_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "READ_S", 1.0)
    runner, stuck, fine = Balky(), adapter("stuck"), adapter("fine")
    runner.wrong = "hang"
    with worker(runner, request_timeout_s=0.5) as desk:
        desk.send(AddAdapter(stuck, preload=True))
        while runner.wrong:  # until it hangs
            time.sleep(0.01)
        desk.send(AddAdapter(fine), Submit(Request(1, (5,), 1, fine.digest)))
        (load,) = desk.report(lambda report: report.loads).loads
        assert (load.digest, load.error) == (stuck.digest, "reading the adapter's files took too long")
        token = desk.event().token
        assert token
        assert token.id == expected(fine.digest, (5,), 1)[0]


@contextmanager
def given_up(runner: Balky, late: Adapter, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    """A worker that has stopped waiting for the reading of this adapter."""
    monkeypatch.setattr(loader, "READ_S", 0.2)
    runner.wrong = "hang"
    with worker(runner, request_timeout_s=0.5) as desk:
        desk.send(AddAdapter(late, preload=True))
        assert desk.report(lambda report: report.loads).loads[0].error
        yield desk


def test_what_comes_from_the_disk_after_it_was_given_up_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, late = Balky(), adapter("late")
    with given_up(runner, late, monkeypatch) as desk:
        runner.released.set()
        assert runner.arrived.wait(20)
        tries = iter(range(1000))
        while runner.host and next(tries, None) is not None:
            time.sleep(0.01)
        assert not runner.host
        desk.send(Submit(Request(2, (5,), 1, late.digest)))
        assert desk.event().finish is Finish.LENGTH
        assert list(runner.host) == [late.digest]


def test_what_comes_late_is_not_kept_for_a_second_reading_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    runner, late = Balky(), adapter("late")
    with given_up(runner, late, monkeypatch) as desk:
        monkeypatch.setattr(loader, "READ_S", 60.0)
        runner.wrong = "late"
        desk.send(Submit(Request(1, (5,), 1, late.digest)))
        desk.report(lambda report: report.gauges.waiting)
        runner.released.set()
        assert desk.event().code == "adapter_invalid"
        assert not runner.host


def test_what_does_not_fit_the_memory_that_is_left_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "free_memory", lambda: FreeMemory(12_000_000, 0, "the limit is 99 MB"))
    large, small = adapter("large", size=6_500_000), adapter("small", size=6_000_000)
    with worker() as desk:
        desk.send(
            AddAdapter(large),
            AddAdapter(small),
            Submit(Request(1, (5,), 1, large.digest)),
            Submit(Request(2, (5,), 1, small.digest)),
        )
        event = desk.event()
        assert (event.request, event.finish, event.code) == (1, Finish.FAILED, "overloaded")
        assert "it takes 13 MB to be read, 12 MB are free, for the limit is 99 MB" in event.message
        assert desk.event().finish is Finish.LENGTH


def test_a_placement_that_raises_is_taken_back() -> None:
    runner, each = Balky(), adapter("a")
    runner.wrong = "place"
    with worker(runner) as desk:
        desk.send(AddAdapter(each, preload=True))
        done = desk.report(lambda report: (each.digest, Tier.DEVICE) in report.tiers)
        undone = desk.report(lambda report: report.tiers)
        assert (done.pool, undone.pool, undone.tiers) == (
            (Placement(each.digest, 0, 4),),
            (),
            ((each.digest, Tier.HOST),),
        )


def test_a_forward_that_raises_leaves_the_pool_as_it_was() -> None:
    runner, each = Balky(), adapter("a")
    runner.wrong = "step"
    with worker(runner) as desk:
        desk.send(AddAdapter(each), Submit(Request(1, (5,), 1, each.digest)))
        assert desk.event().code == "internal"
        runner.wrong = ""
        desk.send(Submit(Request(2, (5,), 1, each.digest)))
        after = desk.report(lambda report: True)
        assert (after.started, after.pool, after.tiers) == (((2, 0),), None, ())
        assert desk.event().finish is Finish.LENGTH


class Unrunnable(FakeRunner):
    """Raises in the middle of every step in which `bad` acts, after those before it have been run."""

    def __init__(self, bad: Adapter, **sizes: int) -> None:
        super().__init__(**sizes)
        self.bad, self.raised = bad, 0

    def run_chunks(self, chunks: Sequence[Chunk]) -> list[Result]:
        at = next((i for i, chunk in enumerate(chunks) if chunk.adapter == self.bad.digest), None)
        if at is None:
            return super().run_chunks(chunks)
        super().run_chunks(chunks[:at])
        self.raised += 1
        raise TypeError("a tuple has no shape")


def tokens_of(desk: Desk, requests: set[int]) -> tuple[dict[int, list[int]], dict[int, Event], list[Load]]:
    """What these requests got until all have ended, how each ended, and the loads that were told
    meanwhile.
    """
    tokens: dict[int, list[int]] = {id: [] for id in requests}
    ends: dict[int, Event] = {}
    loads: list[Load] = []
    while ends.keys() != requests:
        report = desk.report(lambda report: report.events or report.loads)
        loads += report.loads
        for event in report.events:
            tokens[event.request] += [event.token.id] if event.token else []
            ends |= {event.request: event} if event.finish else {}
    return tokens, ends, loads


def test_an_adapter_that_raises_fails_alone_and_is_refused_until_it_is_offered_again() -> None:
    bad, good = adapter("bad"), adapter("good")
    runner = Unrunnable(bad)
    reason = "this base cannot run this adapter: its step raised TypeError"
    with worker(runner) as desk:
        desk.send(
            AddAdapter(bad),
            AddAdapter(good),
            Submit(Request(1, (5,), 6)),
            Submit(Request(2, (6,), 6, good.digest)),
        )
        desk.send(Submit(Request(3, (7, 8), 6, bad.digest)), Submit(Request(4, (7,), 6, bad.digest)))
        tokens, ends, loads = tokens_of(desk, {1, 2, 3, 4})
        assert tokens == {1: expected(None, (5,), 6), 2: expected(good.digest, (6,), 6), 3: [], 4: []}
        assert {ends[id].finish for id in (1, 2)} == {Finish.LENGTH}
        assert {(ends[id].code, ends[id].message) for id in (3, 4)} == {("adapter_invalid", reason)}
        assert Load(bad.digest, 0.0, 0, reason) in loads
        before = runner.raised
        desk.send(Submit(Request(5, (7,), 6, bad.digest)))
        _, ends, _ = tokens_of(desk, {5})
        assert (ends[5].code, ends[5].message, runner.raised) == ("adapter_invalid", reason, before)
        runner.bad = adapter("another")
        desk.send(AddAdapter(bad), Submit(Request(6, (7,), 6, bad.digest)))
        assert tokens_of(desk, {6})[0][6] == expected(bad.digest, (7,), 6)


def test_an_adapter_that_raises_with_nobody_beside_it_does_not_end_the_worker() -> None:
    runner = Unrunnable(adapter("bad"))
    with worker(runner, max_rows=1) as desk:
        for id in range(4):
            desk.send(AddAdapter(runner.bad), Submit(Request(id, (5,), 3, runner.bad.digest)))
            assert tokens_of(desk, {id})[1][id].code == "adapter_invalid"
        desk.send(Submit(Request(9, (5,), 3)), Shutdown())
        assert desk.end() == [0]


class Short(FakeRunner):
    """Has no memory for long chunks."""

    def run_chunks(self, chunks: Sequence[Chunk]) -> list[Result]:
        if any(len(chunk.tokens) > 8 for chunk in chunks):
            raise MemoryError
        return super().run_chunks(chunks)


def test_a_request_that_raises_fails_alone_and_is_not_its_adapters_fault() -> None:
    each = adapter("a")
    with worker(Short()) as desk:
        desk.send(
            AddAdapter(each),
            Submit(Request(1, (5,), 6, each.digest)),
            Submit(Request(2, tuple(range(12)), 6, each.digest)),
        )
        tokens, ends, loads = tokens_of(desk, {1, 2})
        assert (tokens[1], ends[2].code) == (expected(each.digest, (5,), 6), "internal")
        assert not [load for load in loads if load.error]
        desk.send(Submit(Request(3, (7,), 2, each.digest)))
        assert tokens_of(desk, {3})[0][3] == expected(each.digest, (7,), 2)


class Steps:
    """A worker in the test's own thread, a step at a time, with these adapters in host memory."""

    def __init__(self, runner: FakeRunner, *adapters: Adapter, **chosen: Any) -> None:
        settings = Settings(pool_rank=16, max_rank=16, **chosen)
        self.connection, theirs = Pipe()
        self.worker = Worker(theirs, runner, card(settings), settings)
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, Event] = {}
        for one in adapters:
            self.worker.scheduler.add_adapter(one)
            self.worker.scheduler.mark_hosted(one.digest, runner.load_adapter(one))

    def submit(self, id: int, count: int, digest: str | None = None) -> None:
        self.tokens[id] = []
        self.worker.scheduler.submit_request(Request(id, (5, id), count, digest))

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.worker.run_turn()
            while self.connection.poll():
                for event in self.connection.recv().events:
                    self.tokens[event.request] += [event.token.id] if event.token else []
                    self.ends |= {event.request: event} if event.finish else {}


def test_an_injected_fault_fails_those_who_get_there_and_nobody_else() -> None:
    each = adapter("a")
    steps = Steps(FakeRunner(), each, faults=Faults(step=3))
    whose = {1: None, 2: each.digest, 3: None, 4: each.digest}
    for ids, count in (((1, 2), 5), ((3, 4), 2)):
        for id in ids:
            steps.submit(id, count, whose[id])
        steps.step()
    steps.step()  # the third token of the first two, and the second of the others
    assert {id: steps.ends[id].code for id in whose} == {1: "internal", 2: "internal", 3: None, 4: None}
    assert steps.tokens == {id: expected(whose[id], (5, id), 2) for id in whose}
    steps.submit(5, 2, each.digest)
    steps.step(2)
    assert steps.tokens[5] == expected(each.digest, (5, 5), 2), "it is not the adapter that cannot be run"


class Picky(FakeRunner):
    """Cannot place the adapter whose digest is `bad`."""

    bad = ""

    def place_adapter(self, placement: Placement) -> None:
        if placement.digest == self.bad:
            raise RuntimeError("no such rows")
        super().place_adapter(placement)


def test_an_adapter_that_cannot_be_placed_fails_alone() -> None:
    bad, good = adapter("bad"), adapter("good")
    runner = Picky()
    runner.bad = bad.digest
    steps = Steps(runner, bad, good)
    for _ in range(3):
        for id, digest in {1: None, 2: bad.digest, 3: good.digest}.items():
            steps.submit(id, 3, digest)
        steps.step(3)
        assert {id: steps.ends[id].code for id in (1, 2, 3)} == {1: None, 2: "internal", 3: None}
        assert steps.tokens == {1: expected(None, (5, 1), 3), 2: [], 3: expected(good.digest, (5, 3), 3)}
        assert steps.worker.raised == 0
        runner.ended.clear()
    runner.bad = ""
    steps.submit(4, 3, bad.digest)
    steps.step(3)
    assert steps.tokens[4] == expected(bad.digest, (5, 4), 3)


def test_two_raising_steps_in_a_row_end_it() -> None:
    runner = Balky()
    runner.wrong = "step"
    with worker(runner, max_rows=1) as desk:
        desk.send(Submit(Request(1, (5,), 1)), Submit(Request(2, (5,), 1)))
        assert desk.end() == [RAISED_TWICE]


def test_a_good_step_between_two_raising_ones_keeps_it() -> None:
    with worker(faults=Faults(step=2)) as desk:
        for id in range(6):
            desk.send(Submit(Request(id, (5,), 1 + id % 2)))
            report = desk.report(lambda report: report.events and report.events[0].finish)
            assert report.events[0].code == ("internal" if id % 2 else None)
        desk.send(Shutdown())
        assert desk.end() == [0]


def unfit(settings: Settings, progress: Any) -> Any:
    raise SettingsError("ADAPTERD_BASE: no such base")


def unreadable(settings: Settings, progress: Any) -> Any:
    raise OSError("/secret/place/config.json is not there")


def denied(settings: Settings, progress: Any) -> Any:
    raise PermissionError(13, "Permission denied", "/secret/place")


def cut(settings: Settings, progress: Any) -> Any:
    raise EOFError


@pytest.mark.parametrize(
    ("factory", "reason"),
    [
        (unfit, "ADAPTERD_BASE: no such base"),
        (unreadable, "the base cannot be loaded: OSError: config.json is not there"),
        (denied, "the base cannot be loaded: PermissionError: Permission denied"),
        (cut, "the base cannot be loaded: EOFError"),
    ],
)
def test_what_no_restart_would_help_is_told(factory: Factory, reason: str) -> None:
    with desk(lambda connection: serve_worker(connection, Settings(), factory)) as parent:
        assert parent.hear() == CannotStart(reason)
        assert parent.end() == [1]


def test_it_ends_when_its_parent_is_gone() -> None:
    with worker() as desk:
        desk.connection.close()
        assert desk.end() == []
