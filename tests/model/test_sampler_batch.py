"""The batched sampler chooses what one row at a time would, whatever the company, with one wait for
the device and in little memory.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.model import kernels
from service.model.draws import (
    MOST_LOGITS,
    Candidates,
    Draw,
    draw_tokens,
    filter_tokens,
    group_draws,
    sum_rows,
)
from service.model.logit_edits import Row
from service.model.logprobs import PromptScores
from service.model.sampler import Outcome, Sampler
from service.model.sampling_state import SamplingState
from tests import pretended

from .driver import sample
from .row_sampler import RowSampler, draw_token, probabilities, with_logprobs

EOS = frozenset({2, 9})
ROWS = 16
VECTORS: Any = os.environ.get("ADAPTERD_KERNELS", "auto")
DRAWS = [draw_tokens, *([kernels.draw_tokens] if kernels.load_kernels(VECTORS) else [])]


class RandomMatcher:
    """Allows some tokens, which depend on those taken; ends after a few, where it does not fail."""

    def __init__(self, seed: int) -> None:
        self.seed, self.taken = seed, 0

    def _chance(self) -> random.Random:
        return random.Random(f"{self.seed} {self.taken}")

    def is_error(self) -> bool:
        return self.seed % 5 == 0 and self.taken > 1

    def get_error(self) -> str:
        return "too complex\nwith more lines"

    def is_stopped(self) -> bool:
        return self.seed % 7 == 0 and self.taken > 0

    def is_accepting(self) -> bool:
        return self._chance().random() < 0.5

    def compute_bitmask(self) -> bytes:
        return self._chance().randbytes(40)  # of a few tokens only: beyond it nothing is allowed

    def consume_token(self, token: int) -> None:
        self.taken += 1 + token % 3


def matcher_of(grammar: str) -> RandomMatcher:
    return RandomMatcher(int(grammar))


def random_sampling(chance: random.Random) -> Sampling:
    """Mostly what people ask for, and every option now and then."""
    one_of = chance.choice
    biases = tuple((chance.randrange(300), chance.uniform(-5, 5)) for _ in range(chance.choice((1, 40))))
    return Sampling(
        temperature=one_of((0.0, 0.3, 0.8, 0.8, 1.0, 1.5, 3.0)),
        top_k=one_of((0, 0, 0, 1, 7, 40, 300, 10**9)),
        top_p=one_of((1.0, 1.0, 0.1, 0.5, 0.9, 0.9, 0.95, 0.999)),
        min_p=one_of((0.0, 0.0, 0.0, 0.05, 0.3)),
        typical_p=one_of((1.0, 1.0, 1.0, 1.0, 0.3, 0.9)),
        repetition_penalty=one_of((1.0, 1.0, 1.2, 0.7)),
        frequency_penalty=one_of((0.0, 0.0, 0.5, -1.0)),
        presence_penalty=one_of((0.0, 0.0, 0.3)),
        seed=chance.getrandbits(64),
        logit_bias=one_of(((), (), biases)),
        logprobs=one_of((None, None, 0, 1, 5, 20)),
        grammar=one_of((None, None, None, None, str(chance.randrange(100)))),
        min_tokens=one_of((0, 0, 3)),
        bad_words=one_of(((), (), ((2,), (5, 5)))),
    )


def random_requests(chance: random.Random, vocabulary: int) -> list[Request]:
    prompts = [tuple(chance.randrange(vocabulary) for _ in range(20)) for _ in range(ROWS)]
    return [Request(i, prompts[i], 50, None, random_sampling(chance), EOS) for i in range(ROWS)]


def random_logits(chance: random.Random, vocabulary: int, dtype: torch.dtype) -> Tensor:
    """Flat and steep ones; in some rows numbers that are not finite."""
    drawn = torch.Generator().manual_seed(chance.getrandbits(60))
    logits = torch.randn(ROWS, vocabulary, generator=drawn)
    logits *= torch.tensor([chance.choice((0.5, 1.0, 2.0, 3.0, 4.0)) for _ in range(ROWS)])[:, None]
    logits[:, 2] += 3
    if chance.random() < 0.2:
        logits[chance.randrange(ROWS), chance.randrange(vocabulary)] = chance.choice((torch.nan, torch.inf))
    return logits.to(dtype)


def told(outcome: Outcome) -> object:
    """What can be compared of an outcome, not-a-number too."""
    return repr(outcome) if isinstance(outcome, Token) else (str(outcome), outcome.code)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """One row at a time is a thousand small operations, for which threads would wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "batches"), [(300, 20), (6000, 10)])
@pytest.mark.usefixtures("one_thread")
def test_tokens_and_their_numbers_are_those_of_one_row_at_a_time(
    vocabulary: int, batches: int, dtype: torch.dtype, draw: Draw
) -> None:
    chance = random.Random(f"{vocabulary} {dtype}")
    for _ in range(batches):
        requests = random_requests(chance, vocabulary)
        sampler, by_row = Sampler(matcher_of, draw), RowSampler(matcher_of)
        counts = [0] * len(requests)
        for _ in range(3):
            logits = random_logits(chance, vocabulary, dtype)
            given = logits.clone()
            ours = sampler.launch_batch(logits, requests, counts).read()
            counts = [count + isinstance(our, Token) for count, our in zip(counts, ours, strict=True)]
            assert torch.equal(logits.nan_to_num(), given.nan_to_num()), "the logits are not ours"
            theirs = by_row.sample_batch(logits, requests)
            for request, our, their in zip(requests, ours, theirs, strict=True):
                assert told(our) == told(their), request.sampling


def test_few_rows_at_a_time_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = random.Random(1)
    requests, logits = random_requests(chance, 300), random_logits(chance, 300, torch.float32)
    whole = sample(Sampler(matcher_of), logits, requests)
    for module in ("draws", "logprobs"):
        monkeypatch.setattr(f"service.model.{module}.MOST_LOGITS", 700)
    parts = sample(Sampler(matcher_of), logits, requests)
    assert [told(outcome) for outcome in parts] == [told(outcome) for outcome in whole]


LARGE = 40_000  # one row of so many is split among threads where torch reduces it


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_alone_is_the_row_in_company(dtype: torch.dtype, draw: Draw) -> None:
    chance = random.Random(str(dtype))
    requests, logits = random_requests(chance, LARGE), random_logits(chance, LARGE, dtype)
    together = sample(Sampler(matcher_of, draw), logits, requests)
    for i, request in enumerate(requests):
        (alone,) = sample(Sampler(matcher_of, draw), logits[i : i + 1], [request])
        assert told(alone) == told(together[i]), request.sampling


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_k": 300, "top_p": 0.9, "min_p": 0.01},
        {"typical_p": 0.7},
        {"top_p": 0.95, "typical_p": 0.7},
    ],
)
@pytest.mark.parametrize("width", [256, 4096])
def test_what_may_be_drawn_alone_is_bitwise_that_in_company(options: dict[str, Any], width: int) -> None:
    logits = random_logits(random.Random(2), LARGE, torch.float32).nan_to_num()
    sampling = Sampling(temperature=0.8, **options)
    states = [SamplingState(Request(i, (1,), 5, None, sampling)) for i in range(ROWS)]
    together = kept_of(states, logits, width)
    for i, state in enumerate(states):
        alone = kept_of([state], logits[i : i + 1], width)
        assert torch.equal(alone.probabilities[0], together.probabilities[i])
        assert torch.equal(alone.is_whole[0], together.is_whole[i])


def kept_of(states: Sequence[SamplingState], logits: Tensor, width: int) -> Candidates:
    (rules,) = group_draws([Row(state) for state in states], logits.shape[-1], logits.device)
    return filter_tokens(logits, rules, width)


EDGES: dict[str, tuple[list[float], dict[str, Any]]] = {
    "all alike": ([0.0] * 1000, {"top_p": 0.5}),
    "alike at the edge of a nucleus": ([9.0, *[1.0] * 3000, *[0.5] * 40], {"top_p": 0.9}),
    "alike at the edge of the best": ([2.0, *[1.0] * 300, 3.0, *[0.5] * 300], {"top_k": 3}),
    "the best of few that are allowed": ([-torch.inf] * 33 + [1.0, 2.0, 0.5], {"top_k": 7, "top_p": 0.8}),
    "only what is allowed": ([-torch.inf] * 33 + [1.0, 2.0, 0.5], {}),
    "more best than tokens": ([1.0, 2.0, 3.0], {"top_k": 17, "min_p": 0.2}),
    "nearly all of a nucleus": ([i / 100 for i in range(777)], {"top_p": 1 - 1e-9}),
    "hardly any": ([i / 100 for i in range(777)], {"top_p": 1e-30}),
    "far apart": ([0.0, -200.0, 200.0, 199.0, -1e30], {}),
    "a wide nucleus": ([i / 5000 for i in range(9000)], {"top_p": 0.95}),
    "a wide nucleus of the best": ([i / 5000 for i in range(9000)], {"top_k": 5000, "top_p": 0.97}),
}


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("edge", EDGES)
def test_each_edge_of_what_may_be_drawn_is_that_of_one_row(edge: str, dtype: torch.dtype, draw: Draw) -> None:
    """Of each row 60 draws, from the first token on that can come to the last."""
    numbers, options = EDGES[edge]
    logits = torch.tensor(numbers, dtype=dtype)[None]
    sampling = Sampling(temperature=0.9, **options)
    state = SamplingState(Request(1, (1,), 5, None, sampling))
    (rules,) = group_draws([Row(state)], logits.shape[-1], logits.device)
    kept = probabilities(logits[0].float(), sampling)
    for uniform in (0.0, *(i / 59 for i in range(1, 59)), 1 - 1e-9):
        rules.table[0, 0] = uniform
        assert int(draw(logits, rules, None)) == draw_token(kept, uniform), uniform


def test_the_sum_of_a_row_alone_is_rounded_as_in_company() -> None:
    rows = torch.rand(200, LARGE, generator=torch.Generator().manual_seed(3))
    together = sum_rows(rows)
    assert all(torch.equal(sum_rows(rows[i : i + 1])[0], together[i]) for i in range(len(rows)))


def test_prompts_are_scored_as_one_row_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = random_logits(random.Random(4), 300, torch.bfloat16)
    tokens = [(7 * i) % 300 for i in range(ROWS - 1)]  # the last row has the answer's first token
    monkeypatch.setattr("service.model.logprobs.MOST_LOGITS", 700)
    for wanted in (0, 3):
        alone = (with_logprobs(row, token, wanted) for row, token in zip(logits, tokens, strict=False))
        assert PromptScores(logits, tokens, wanted).read() == tuple(alone)
    assert PromptScores(logits, (), 3).read() == ()


# What each option changes, against a row that has only the ones named second
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "temperature": ({"temperature": 4.0}, {}),
    "top_k": ({"top_k": 1}, {"temperature": 4.0}),
    "top_p": ({"top_p": 0.01}, {"temperature": 4.0}),
    "min_p": ({"min_p": 0.9}, {"temperature": 4.0}),
    "typical_p": ({"typical_p": 0.01}, {"temperature": 4.0}),
    "repetition_penalty": ({"repetition_penalty": 50.0}, {}),
    "frequency_penalty": ({"frequency_penalty": 50.0}, {}),
    "presence_penalty": ({"presence_penalty": 50.0}, {}),
    "seed": ({"seed": 1}, {"temperature": 4.0}),
    "logit_bias": ({"logit_bias": ((17, 100.0),)}, {}),
    "logprobs": ({"logprobs": 2}, {}),
    "grammar": ({"grammar": "3"}, {}),
    "min_tokens": ({"min_tokens": 1}, {}),
    "bad_words": ({"bad_words": ((2,), (0, 0), (1, 1))}, {}),
}


def choose_four(sampling: Sampling) -> list[Outcome]:
    """Four tokens after a prompt of the best one, from logits whose best is an eos."""
    logits = torch.arange(300.0).flip(0)[None] / 50
    logits[0, 2] = 7
    sampler, request = Sampler(matcher_of), Request(1, (2,), 9, None, sampling, EOS)
    return [token for i in range(4) for token in sample(sampler, logits, [request], i)]


@pytest.mark.parametrize("field", [field.name for field in fields(Sampling)])
def test_no_option_is_forgotten(field: str) -> None:
    """A new one stands here, and does something; a row is greedy only where none is in use."""
    change, others = CHANGES[field]
    plain = Sampling(**others)
    changed = replace(plain, **change)
    assert choose_four(changed) != choose_four(plain)
    assert SamplingState(Request(1, (1,), 1, None, changed)).uses == {*change, *others}
    assert choose_four(replace(plain, **{field: getattr(Sampling(), field)})) == choose_four(plain)


class CountingDevice:
    """Calls to a pretended GPU while it is watched."""

    def __init__(self) -> None:
        self.calls = 0

    @property
    def waits(self) -> int:
        """Those for whose results the host has waited."""
        return pretended.GPU.waits

    def watch(self, run: Callable[..., Any]) -> Callable[..., Any]:
        def watched(function: Any, args: Any, kwargs: Any) -> Any:
            values, _ = tree_flatten((args, kwargs))
            self.calls += any(isinstance(value, pretended.PretendedTensor) for value in values)
            return run(function, args, kwargs)

        return watched


@contextmanager
def watched_gpu() -> Iterator[CountingDevice]:
    device = CountingDevice()
    with pretended.gpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretended, "run", device.watch(pretended.run))
        yield device


EVERYTHING: dict[str, Any] = {
    "repetition_penalty": 1.2,
    "frequency_penalty": 0.5,
    "logit_bias": ((3, 1.0), (4, 2.0)),
    "min_tokens": 2,
    "logprobs": 5,
}
USES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 40, "min_p": 0.01},
    {"temperature": 0.8, "top_p": 0.9, "typical_p": 0.9},
    {"grammar": "3"},
    EVERYTHING,
    {**EVERYTHING, "temperature": 0.8, "top_p": 0.9, "grammar": "3"},
]


def watch_steps(sampling: Sequence[Sampling], steep: float = 4.0) -> CountingDevice:
    """Two steps of rows with these options on a pretended GPU, which must choose what a CPU does."""
    requests = [Request(i, (5, 6), 9, None, one, EOS) for i, one in enumerate(sampling)]
    logits = torch.randn(len(requests), 6000, generator=torch.Generator().manual_seed(5)) * steep
    here, there = Sampler(matcher_of), Sampler(matcher_of)
    expected = [sample(here, logits, requests, i) for i in range(2)]
    with watched_gpu() as device:
        on_device = pretended.PretendedTensor(logits)
        assert [sample(there, on_device, requests, i) for i in range(2)] == expected
    return device


@pytest.mark.parametrize("options", USES)
def test_a_step_waits_for_the_device_once_and_no_row_costs_calls(options: dict[str, Any]) -> None:
    few, many = (watch_steps([Sampling(**options, seed=i) for i in range(count)]) for count in (2, 24))
    assert few.waits == many.waits == 2, "one a step"
    assert few.calls == many.calls < 2 * 90


def test_all_options_together_wait_once_and_a_wide_mass_at_most_thrice() -> None:
    mixed = [Sampling(**options, seed=i) for i, options in enumerate(USES * 3)]
    assert watch_steps(mixed).waits == 2
    assert watch_steps([*mixed, Sampling(temperature=3.0, top_p=0.9)], steep=2.0).waits == 2 * 3


def test_prompt_scores_are_waited_for_once() -> None:
    with watched_gpu() as device:
        logits = pretended.PretendedTensor(torch.randn(40, 300))
        assert len(PromptScores(logits, range(39), 2).read()) == 39
    assert device.waits == 1


class Memory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The bytes of the largest tensor made."""

    largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_flatten(made)[0]:
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.nbytes)
        return made


@pytest.mark.parametrize("options", [{"top_p": 0.9}, {}, {"top_p": 0.9, "logprobs": 5}])
def test_a_large_vocabulary_takes_little_memory_beside_its_logits(options: dict[str, Any]) -> None:
    logits = torch.zeros(32, 1 << 18, dtype=torch.bfloat16)
    logits[:, :40] = 20
    requests = [
        Request(i, (1,), 5, None, Sampling(temperature=1.0, seed=i, **options)) for i in range(len(logits))
    ]
    with Memory() as memory:  # type: ignore[no-untyped-call]
        tokens = sample(Sampler(matcher_of), logits, requests)
    assert all(isinstance(token, Token) and token.id < 40 for token in tokens)
    assert memory.largest <= 8 * MOST_LOGITS == logits.nbytes
