"""Steps launched before the last one is read, by the worker's loop on a GPU that is only pretended: the same
answers as without, and no launch waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from typing import Any

import pytest
import torch

from service.core.adapter import Adapter
from service.core.base_info import BaseInfo
from service.core.messages import Cancel, Command, RemoveAdapter, Submit
from service.core.request import Event, Finish, Request, Token
from service.core.sampling import Sampling
from service.engine.plan import UNKNOWN, Chunk, Launched, Result
from service.model import sampler
from service.model.build import build_runner
from service.model.runner import ModelRunner
from service.model.sampler import SampledBatch, SamplingError
from service.settings import Settings
from service.worker.loop import Worker
from tests import making, pretended

from .driver import plan_of
from .test_graphs import device
from .test_parity import Folders, overflowing

SHAPES: list[dict[str, Any]] = [
    {"targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "r": 16, "alpha": 32},
    {"targets": "all-linear", "r": 8},
    {"targets": ("q_proj", "up_proj", "down_proj"), "use_dora": True},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """TINY, an adapter of it of each shape, and one whose numbers overflow; None is the base."""
    root = tmp_path_factory.mktemp("ahead")
    base = making.tiny(root / "base", tie_word_embeddings=True)
    made: Folders = {None: base}
    for i, shape in enumerate(SHAPES):
        made[f"a{i}"] = making.noise(root / f"a{i}", base, 500 + i, **shape)
    made["wild"] = overflowing(made["a0"], root / "wild")
    return made


@dataclass
class Answer:
    """What became of a request."""

    tokens: list[Token] = field(default_factory=list)
    prompt: list[Token] = field(default_factory=list)
    ends: list[Event] = field(default_factory=list)

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]


class CountedRunner:
    """A runner whose launches are counted: those before the last one is read, and the faulty ones, which
    raise or wait for the device.
    """

    def __init__(self, runner: ModelRunner) -> None:
        self.runner, self.ahead, self.faulty = runner, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runner, name)

    def launch_chunks(self, chunks: Sequence[Chunk], after: Launched | None = None) -> Launched:
        waits = pretended.GPU.waits
        self.ahead += after is not None
        self.faulty += 1
        launched = self.runner.launch_chunks(chunks, after)
        self.faulty += pretended.GPU.waits - waits - 1
        return launched


class WorkerInThread:
    """A worker's loop in the test's thread, its adapters in host memory, and what it has answered."""

    def __init__(
        self, runner: ModelRunner, card: BaseInfo, settings: Settings, adapters: Mapping[str, Adapter]
    ) -> None:
        self.runner, self.adapters = runner, adapters
        self.watched: Any = CountedRunner(runner)
        self.connection, theirs = Pipe()
        self.worker = Worker(theirs, self.watched, card, settings)
        for each in self.adapters.values():
            runner.remove_adapter(each.digest)
            self.host(each)
        self.answers: dict[int, Answer] = {}

    def host(self, adapter: Adapter) -> None:
        self.worker.scheduler.add_adapter(adapter)
        self.worker.scheduler.mark_hosted(adapter.digest, self.runner.load_adapter(adapter))

    def ask(self, id: int, adapter: str | None = None, count: int = 12, **more: Any) -> None:
        self.answers[id] = Answer()
        prompt = tuple(5 + (i * (id + 3)) % 200 for i in range(3 + 7 * (id % 4)))
        digest = self.adapters[adapter].digest if adapter else None
        self.obey(Submit(Request(id, prompt, count, digest, **more)))

    def obey(self, command: Command) -> None:
        self.worker._obey_command(command)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            self.worker.run_turn()
            while self.connection.poll():
                for event in self.connection.recv().events:
                    answer = self.answers[event.request]
                    answer.tokens += [event.token] if event.token else []
                    answer.prompt += event.prompt
                    answer.ends += [event] if event.finish else []

    def end(self) -> dict[int, Answer]:
        self.step(80)
        gauges = self.worker.scheduler.gauges
        assert (gauges.running, gauges.waiting, gauges.kv_used) == (0, 0, 0)
        assert all(len(answer.ends) == 1 for answer in self.answers.values())
        assert not self.runner.sampler._states
        buffers = [b for layer, *_ in self.runner.attention for b in (layer.kv_keys, layer.kv_values)]
        assert all(bool(buffer.isfinite().all()) for buffer in buffers), "numbers were left behind"
        return self.answers


Scenario = Callable[[WorkerInThread], None]


def ask_of_all_kinds(served: WorkerInThread) -> None:
    """Greedy, drawn, scored and biased ones of the base and of adapters, by and by; more than run at
    once."""
    drawn = Sampling(temperature=1.1, top_k=30, top_p=0.9, seed=4)
    kinds = [
        Sampling(),
        drawn,
        replace(drawn, seed=9, typical_p=0.8, logprobs=2),
        Sampling(logprobs=3, min_tokens=5),
        Sampling(logit_bias=((17, 3.0),)),
    ]
    for id in range(10):
        scored = 1 if id == 6 else None
        adapter = (None, "a0", "a1")[id % 3]
        served.ask(id, adapter, 5 + id, sampling=kinds[id % 5], prompt_logprobs=scored)
        served.step(id % 4)


def ask_with_dora(served: WorkerInThread) -> None:
    """No recording is replayed."""
    for id in range(4):
        served.ask(id, (None, "a2")[id % 2], 14)


def ask_beside_penalties(served: WorkerInThread) -> None:
    """One whose tokens must be known first comes and goes among others."""
    for id in range(3):
        served.ask(id, None, 25)
    served.step(4)
    served.ask(3, None, 6, sampling=Sampling(repetition_penalty=1.3, temperature=0.9, seed=3))


def remove_and_place(served: WorkerInThread) -> None:
    """An adapter is removed while it runs, comes back, and others take its place."""
    served.ask(0, "a0", 20)
    served.ask(1, "a1", 20)
    served.step(5)
    gone = served.adapters["a0"]
    served.obey(RemoveAdapter(gone.digest))
    served.step(30)
    assert gone.digest not in served.runner.pool.places
    served.ask(2, "a1", 8)
    served.step(2)
    served.host(gone)
    served.ask(3, "a0", 8)


SCENARIOS: Mapping[str, Scenario] = {
    scenario.__name__: scenario
    for scenario in (ask_of_all_kinds, ask_with_dora, ask_beside_penalties, remove_and_place)
}


class Gpu:
    """A runner on the pretended GPU, and what it answers in a scenario."""

    def __init__(self, folders: Folders, compile: str) -> None:
        base = {"base": str(folders[None]), "dtype": "float32", "quantization": "none", "compile": compile}
        sizes = {"device": "cuda", "max_rows": 6, "max_context": 128, "prefill_tokens": 16}
        self.settings = Settings.model_validate(base | sizes)
        self.runner, self.card = build_runner(self.settings, lambda stage, fraction: None)
        assert self.runner.runs_ahead
        assert (self.runner.graphs is not None) is (compile == "on")
        self.adapters = {name: plan_of(folder, folders[None]) for name, folder in folders.items() if name}

    def answers_in(
        self, scenario: Scenario, runs_ahead: bool = True, has_faults: bool = False
    ) -> dict[int, Answer]:
        self.runner.runs_ahead = runs_ahead
        served = WorkerInThread(self.runner, self.card, self.settings, self.adapters)
        scenario(served)
        answers = served.end()
        assert (served.watched.ahead > 10) is runs_ahead
        assert (served.watched.faulty > 0) is has_faults
        return answers


@pytest.fixture(scope="module", params=["on", "off"])
def gpu(request: pytest.FixtureRequest, folders: Folders) -> Iterator[Gpu]:
    """With recordings and without."""
    with device():
        yield Gpu(folders, request.param)


def expect_alike(ours: Mapping[int, Answer], theirs: Mapping[int, Answer]) -> None:
    for id, answer in theirs.items():
        assert ours[id].ids == answer.ids, id
        assert ours[id].ends[0].finish == answer.ends[0].finish
        for said, right in ((ours[id].tokens, answer.tokens), (ours[id].prompt, answer.prompt)):
            assert [t.logprob for t in said] == pytest.approx([t.logprob for t in right], abs=1e-4)
            assert [[i for i, _ in t.top] for t in said] == [[i for i, _ in t.top] for t in right]


@pytest.mark.parametrize("name", SCENARIOS)
def test_answers_are_those_of_steps_that_are_read_at_once(gpu: Gpu, name: str) -> None:
    theirs = gpu.answers_in(SCENARIOS[name], runs_ahead=False)
    expect_alike(gpu.answers_in(SCENARIOS[name]), theirs)


def test_so_they_are_where_few_best_tokens_are_looked_at_first(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Most drawn tokens are drawn anew then, and what has gone on from another is void."""
    theirs = gpu.answers_in(ask_of_all_kinds, runs_ahead=False)
    monkeypatch.setattr(sampler, "WIDTHS", (6, 20, None))
    expect_alike(gpu.answers_in(ask_of_all_kinds), theirs)


def ask_four(served: WorkerInThread) -> None:
    for id in range(4):
        served.ask(id, None, 20)


def test_an_eos_in_mid_batch_and_a_cancelled_request_stop_there(gpu: Gpu) -> None:
    plain = gpu.answers_in(ask_four)
    ends = frozenset(plain[1].ids[6:7])
    length = plain[1].ids.index(plain[1].ids[6]) + 1

    def ask(served: WorkerInThread) -> None:
        for id in range(4):
            served.ask(id, None, 20, eos=ends if id == 1 else frozenset())
        served.step(4)
        served.obey(Cancel(2))
        served.step()
        assert served.answers[2].ends[0].finish is Finish.CANCELLED
        assert served.worker._ahead is not None
        assert 2 not in {chunk.request.id for chunk in served.worker._ahead.plan.chunks}

    answers = gpu.answers_in(ask)
    assert answers[1].ids == plain[1].ids[:length]
    assert answers[1].ends[0].finish is Finish.EOS
    assert answers[2].ids == plain[2].ids[: len(answers[2].ids)]
    assert (answers[0].ids, answers[3].ids) == (plain[0].ids, plain[3].ids)


def test_one_whose_numbers_overflow_in_mid_answer_fails_alone(gpu: Gpu) -> None:
    """Its adapter's rows become those of one that overflows, while it runs."""

    def ask(served: WorkerInThread) -> None:
        served.ask(0, None, 30)
        served.ask(1, "a0", 30)
        served.step(10)
        place = served.runner.pool.places[served.adapters["a0"].digest]
        factors = served.runner.hosted[served.adapters["wild"].digest].factors
        with torch.inference_mode():
            for name, part in factors.items():
                served.runner.pool.layers[name].place_weights(place, part)
        served.step(3)
        served.ask(4, None, 5)  # so few that they write over a part of its blocks only
        served.ask(8, "a1", 5)

    theirs, answers = gpu.answers_in(ask, runs_ahead=False), gpu.answers_in(ask)
    for id in (0, 4, 8):
        assert answers[id].ids == theirs[id].ids
    (end,) = answers[1].ends
    assert (end.finish, end.code) == (Finish.FAILED, "adapter_invalid")
    assert 8 <= len(answers[1].ids) < 30


@pytest.mark.parametrize("where", ["launch", "read"])
def test_what_raises_ahead_leaves_nothing_and_is_run_again(
    gpu: Gpu, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = gpu.answers_in(ask_with_dora, runs_ahead=False)
    count = 0

    def fail_sometimes(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count % 4 == 0:
                raise MemoryError
            return plain(*arguments)

        return call

    def ask(served: WorkerInThread) -> None:
        if where == "launch":
            patched = fail_sometimes(served.runner.sampler.launch_batch)
            monkeypatch.setattr(served.runner.sampler, "launch_batch", patched)
        else:
            monkeypatch.setattr(SampledBatch, "read", fail_sometimes(SampledBatch.read))
        ask_with_dora(served)

    expect_alike(gpu.answers_in(ask, has_faults=where == "launch"), theirs)
    assert count > 10


def test_what_is_void_clears_nothing_of_a_sequence_that_goes_on(
    gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right token has been written there since."""
    runner, prompt = gpu.runner, (5, 6, 7)
    monkeypatch.setattr(sampler, "WIDTHS", (1, None))
    request = Request(901, prompt, 9, sampling=Sampling(temperature=3.0, top_p=0.99, seed=3))
    first = runner.launch_chunks([Chunk(request, (4,), 0, prompt, True)])
    then = Chunk(request, (4,), 3, (UNKNOWN,), True, 1, follows=0)
    second = runner.launch_chunks([then], first)
    (result,) = first.read()
    assert result.redrawn
    assert result.token is not None
    third = runner.launch_chunks([replace(then, tokens=(result.token.id,), follows=None)])
    with monkeypatch.context() as patch:
        patch.setattr(SampledBatch, "read", lambda self: [SamplingError("not finite")])
        assert second.read() == [Result()]
    written = [layer.kv_keys[4][:, 3] for layer, *_ in runner.attention]
    assert all(bool(part.any()) for part in written)
    third.read()
    runner.finish_request(request.id)


def test_a_random_number_is_that_of_the_place_in_the_answer(gpu: Gpu) -> None:
    """So a preempted sequence goes on as it would have."""
    prompt = (5, 6, 7)
    request = Request(902, prompt, 9, sampling=Sampling(temperature=5.0, seed=3))
    chunks = [Chunk(request, (4,), 0, prompt, True, place) for place in (0, 1, 2, 3, 1)]
    tokens = [gpu.runner.run_chunks([chunk])[0].token for chunk in chunks]
    gpu.runner.finish_request(request.id)
    assert tokens[1] == tokens[4]
    assert len(set(tokens)) == 4


def test_a_step_that_is_dropped_leaves_nothing_where_it_wrote_and_all_else(gpu: Gpu) -> None:
    runner, prompt = gpu.runner, (5, 6, 7)
    request = Request(903, prompt, 9)
    first = runner.launch_chunks([Chunk(request, (4,), 0, prompt, True)])
    second = runner.launch_chunks([Chunk(request, (4,), 3, (UNKNOWN,), True, 1, follows=0)], first)
    keys = [layer.kv_keys for layer, *_ in runner.attention]
    assert all(bool(each[4][:, 3].any()) for each in keys)
    second.drop()
    assert [bool(each[4][:, 3].any()) for each in keys] == [False] * len(keys)
    assert all(bool(each[4][:, :3].any(-1).all()) for each in keys)
    assert first.read()[0].token is not None
    runner.finish_request(request.id)
