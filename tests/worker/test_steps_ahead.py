"""The worker's loop where steps are launched before the last one is read: their order, what raises, what
ends in between, and random lives.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from service.core.adapter import Adapter
from service.core.messages import AddAdapter, Cancel, Command, RemoveAdapter, Submit
from service.core.request import Finish, Request
from service.engine.plan import Chunk, Launched, Result
from service.settings import Faults
from tests.fakes import FakeLaunched, FakeRunner, adapter, expected

from .test_loop import Steps

WALKS = int(os.environ.get("WALKS", "60"))


class ToldLaunch(FakeLaunched):
    """Tells its runner when it is read, and may raise then."""

    runner: Ahead
    number: int

    def read(self) -> list[Result]:
        self.runner.told.append(f"read {self.number}")
        self.runner.fail_now("read", self.number)
        return super().read()

    def drop(self) -> None:
        self.runner.told.append(f"drop {self.number}")


class Ahead(FakeRunner):
    """Numbers its steps, tells what was done with them in which order, and raises at `wrong`."""

    runs_ahead = True

    def __init__(self, **sizes: int) -> None:
        super().__init__(**sizes)
        self.told: list[str] = []
        self.wrong: set[tuple[str, int]] = set()
        self.count = 0

    def fail_now(self, what: str, number: int) -> None:
        if (what, number) in self.wrong:
            raise RuntimeError("the device said no")

    def launch_chunks(self, chunks: Sequence[Chunk], after: Launched | None = None) -> ToldLaunch:
        made = super().launch_chunks(chunks, after)
        number, self.count = self.count, self.count + 1
        self.told.append(f"launch {number}")
        self.fail_now("launch", number)
        assert made.after is None or isinstance(made.after, FakeLaunched)
        launched = ToldLaunch(made.chunks, made.results, made.after)
        launched.tokens, launched.runner, launched.number = made.tokens, self, number
        return launched


def obey(steps: Steps, *commands: Command) -> None:
    for command in commands:
        if isinstance(command, Submit):
            steps.tokens[command.request.id] = []
        steps.worker._obey_command(command)


def ask(id: int, count: int, **options: Any) -> Submit:
    return Submit(Request(id, (5, id), count, **options))


def test_a_step_is_launched_before_the_one_before_it_is_read() -> None:
    runner = Ahead()
    steps = Steps(runner)
    obey(steps, ask(1, 4))
    steps.step(5)
    assert runner.told == [
        "launch 0", "launch 1", "read 0", "launch 2", "read 1", "launch 3", "read 2", "read 3",
    ]  # fmt: skip
    assert steps.tokens[1] == expected(None, (5, 1), 4)
    assert steps.ends[1].finish is Finish.LENGTH
    runner.runs_ahead, runner.told = False, []
    obey(steps, ask(2, 2))
    steps.step(3)
    assert runner.told == ["launch 4", "read 4", "launch 5", "read 5"]


def test_a_cancelled_request_is_in_one_more_step_at_most() -> None:
    runner = Ahead()
    steps = Steps(runner)
    obey(steps, ask(1, 20), ask(2, 20))
    steps.step(3)
    obey(steps, Cancel(1))
    before = len(steps.tokens[1])
    steps.step()
    assert steps.ends[1].finish is Finish.CANCELLED
    assert len(steps.tokens[1]) == before
    assert steps.worker._ahead is not None
    assert [chunk.request.id for chunk in steps.worker._ahead.plan.chunks] == [2]
    steps.step(30)
    assert steps.tokens[2] == expected(None, (5, 2), 20)
    assert runner.ended == {1, 2}


@pytest.mark.parametrize("what", ["launch", "read"])
@pytest.mark.parametrize("number", range(1, 6))
def test_what_raises_in_a_step_ahead_is_run_again_and_costs_no_request(what: str, number: int) -> None:
    runner = Ahead()
    runner.wrong = {(what, number)}
    steps, each = Steps(runner, adapter("a")), adapter("a")
    obey(steps, ask(1, 8), ask(2, 8, adapter=each.digest))
    steps.step(30)
    assert steps.tokens == {1: expected(None, (5, 1), 8), 2: expected(each.digest, (5, 2), 8)}
    assert {end.finish for end in steps.ends.values()} == {Finish.LENGTH}
    if what == "read":
        assert f"drop {number + 1}" in runner.told


def test_what_the_first_step_raises_drops_the_one_ahead() -> None:
    runner = Ahead()
    runner.wrong = {("read", 0)}
    steps = Steps(runner)
    obey(steps, ask(1, 4), ask(2, 4))
    steps.step(20)
    assert runner.told[:6] == ["launch 0", "launch 1", "read 0", "drop 1", "launch 2", "read 2"]
    assert steps.tokens == {id: expected(None, (5, id), 4) for id in (1, 2)}


def test_an_injected_fault_fails_those_who_get_there_and_nobody_else() -> None:
    each = adapter("a")
    steps = Steps(Ahead(), each, faults=Faults(step=3))
    obey(steps, ask(1, 5), ask(2, 5, adapter=each.digest))
    steps.step()
    obey(steps, ask(3, 2), ask(4, 2, adapter=each.digest))
    steps.step(12)
    assert {id: end.code for id, end in steps.ends.items()} == {
        1: "internal",
        2: "internal",
        3: None,
        4: None,
    }
    whose = {1: None, 2: each.digest, 3: None, 4: each.digest}
    assert steps.tokens == {id: expected(whose[id], (5, id), 2) for id in whose}
    assert steps.worker.raised == 0


class Shaky(Ahead):
    """Raises now and then, in a launch or when a step is read."""

    def __init__(self, chance: random.Random, **sizes: int) -> None:
        super().__init__(**sizes)
        self.chance = chance

    def fail_now(self, what: str, number: int) -> None:
        if self.chance.random() < 0.02:
            raise RuntimeError("the device said no")


def next_command(chance: random.Random, number: int, adapters: Sequence[Adapter]) -> Command:
    each = chance.choice(adapters)
    match chance.choices(("submit", "cancel", "add", "remove"), (6, 2, 2, 1))[0]:
        case "cancel":
            return Cancel(chance.randrange(number + 1))
        case "add":
            return AddAdapter(each, preload=chance.random() < 0.5)
        case "remove":
            return RemoveAdapter(each.digest)
    prompt = tuple(chance.randrange(50) for _ in range(chance.randrange(1, 30)))
    eos = frozenset(range(0, 1000, 9)) if chance.random() < 0.3 else frozenset[int]()
    whose = chance.choice((None, each.digest))
    return Submit(Request(number, prompt, chance.choice((1, 4, 15, 30)), whose, eos=eos))


def settle(steps: Steps, requests: Mapping[int, Request]) -> None:
    """Until all have ended; where nothing runs the loader's thread is waited for."""
    for _ in range(1000):
        steps.step()
        if steps.ends.keys() == requests.keys() and steps.worker._ahead is None:
            return
        if not steps.worker.scheduler.running:
            steps.worker.loader.results.poll(1)


@pytest.mark.parametrize("seed", range(WALKS))
def test_whatever_comes_and_raises_every_request_ends_once_with_its_own_tokens(seed: int) -> None:
    chance = random.Random(seed)
    runner = Shaky(chance, blocks=16, context=64, pool_rank=16)
    adapters = [adapter(name, rank=8) for name in "abc"]
    steps = Steps(runner, *adapters)
    requests: dict[int, Request] = {}
    for _ in range(150):
        for _ in range(chance.choice((0, 0, 0, 1, 3))):
            command = next_command(chance, len(requests), adapters)
            obey(steps, command)
            if isinstance(command, Submit):
                requests[command.request.id] = command.request
        steps.step()
    runner.chance = random.Random()
    runner.chance.random = lambda: 1.0  # type: ignore[method-assign]
    settle(steps, requests)
    assert steps.ends.keys() == requests.keys()
    for id, request in requests.items():
        tokens = expected(request.adapter, request.prompt, request.max_tokens)
        assert steps.tokens[id] == tokens[: len(steps.tokens[id])], request
        if steps.ends[id].finish is Finish.LENGTH:
            assert len(steps.tokens[id]) == min(request.max_tokens, 64 - len(request.prompt))
    gauges = steps.worker.scheduler.gauges
    assert (gauges.running, gauges.waiting, gauges.kv_used) == (0, 0, 0)
    assert runner.ended == requests.keys()
    assert steps.worker._ahead is None
