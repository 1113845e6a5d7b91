"""Each row is sampled by its own rules: against transformers' own warpers, whatever the company,
and loudly where it cannot be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.model.draws import WIDTHS, DrawRules, draw_tokens, filter_tokens, group_draws
from service.model.logit_edits import Row
from service.model.sampler import Sampler, SamplingError
from service.model.sampling_state import SamplingState

from .driver import sample

VOCABULARY = 400


def no_grammar(grammar: str) -> Any:
    raise AssertionError(grammar)


def logits(seed: int, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed)) * 3


def request(id: int, **sampling: Any) -> Request:
    return Request(id, (5, 6, 7), 50, sampling=Sampling(**sampling), eos=frozenset({2}))


def one(sampler: Sampler, row: Tensor, asked: Request, index: int = 0) -> int:
    (token,) = sample(sampler, row[None], [asked], index)
    assert isinstance(token, Token)
    return token.id


def draw_rules(vocabulary: int = VOCABULARY, **sampling: Any) -> DrawRules:
    (rules,) = group_draws([Row(SamplingState(request(1, **sampling)))], vocabulary, torch.device("cpu"))
    return rules


def kept(row: Tensor, **sampling: Any) -> Tensor:
    """What may be drawn, probabilities [vocabulary]; however many best tokens are looked at."""
    rules = draw_rules(**sampling)
    spread = []
    for width in WIDTHS:
        probabilities, is_whole = filter_tokens(row[None], rules, width)
        spread += [probabilities[0]] if is_whole else []
    for one_of_them in spread:
        assert torch.equal(one_of_them, spread[-1])
    return spread[-1]


WARPERS: list[tuple[dict[str, Any], Callable[[], LogitsProcessor]]] = [
    ({"top_k": 7}, lambda: TopKLogitsWarper(7)),
    ({"top_p": 0.3}, lambda: TopPLogitsWarper(0.3)),
    ({"top_p": 0.999}, lambda: TopPLogitsWarper(0.999)),
    ({"min_p": 0.2}, lambda: MinPLogitsWarper(0.2)),
    ({"typical_p": 0.5}, lambda: TypicalLogitsWarper(0.5)),
]


@pytest.mark.parametrize(("options", "theirs"), WARPERS)
@pytest.mark.parametrize("seed", range(5))
def test_what_may_be_drawn_is_what_transformers_would_draw_from(
    options: dict[str, Any], theirs: Callable[[], LogitsProcessor], seed: int
) -> None:
    row = logits(seed)[0]
    ours = kept(row, temperature=0.7, **options)
    want = theirs()(torch.zeros(1, 1, dtype=torch.long), row[None] / 0.7)[0].softmax(-1)
    torch.testing.assert_close(ours / ours.sum(), want, rtol=1e-4, atol=1e-7)


def test_the_repetition_penalty_is_transformers_own() -> None:
    row = logits(9)[0]
    want = RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([[5, 6, 7]]), row[None].clone())[0]
    assert one(Sampler(no_grammar), row, request(1, repetition_penalty=1.7)) == int(want.argmax())
    best = int(row.argmax())
    asked = Request(2, (best,), 5, sampling=Sampling(repetition_penalty=50.0))
    assert one(Sampler(no_grammar), row, asked) != best


def test_frequency_and_presence_speak_of_the_answer_only() -> None:
    row = torch.zeros(VOCABULARY)
    row[5], row[9], row[11] = 3.0, 2.5, 1.0  # 5 stands in the prompt, which does not count
    sampler, asked = Sampler(no_grammar), request(1, frequency_penalty=1.0)
    assert [one(sampler, row, asked) for _ in range(4)] == [5, 9, 5, 9]
    sampler, asked = Sampler(no_grammar), request(1, presence_penalty=2.2)
    assert [one(sampler, row, asked) for _ in range(4)] == [5, 9, 11, 5]


def test_bias_forces_and_bans_and_no_eos_comes_before_its_time() -> None:
    row = logits(3)[0]
    best = int(row.argmax())
    assert one(Sampler(no_grammar), row, request(1, logit_bias=((17, 100.0),))) == 17
    assert one(Sampler(no_grammar), row, request(1, logit_bias=((best, -100.0),))) != best
    row[2] = 99.0
    sampler, asked = Sampler(no_grammar), request(1, min_tokens=2)
    assert [one(sampler, row, asked, i) == 2 for i in range(3)] == [False, False, True]


def test_a_seeded_row_draws_the_same_alone_and_among_neighbours() -> None:
    rows = logits(4, 16)
    asked = [request(i, temperature=1.0, seed=i, top_p=0.9 if i % 2 else 1.0) for i in range(16)]
    together = Sampler(no_grammar)
    apart = [Sampler(no_grammar) for _ in rows]
    for i in range(3):
        for alone, (token, row) in enumerate(zip(sample(together, rows, asked, i), rows, strict=True)):
            assert isinstance(token, Token)
            assert one(apart[alone], row, asked[alone], i) == token.id


def test_draws_follow_the_probabilities() -> None:
    probabilities = torch.tensor([0.5, 0.0, 0.3, 0.2])
    rules = replace(draw_rules(4, temperature=1.0), rows=torch.arange(1000))
    rules = replace(rules, table=rules.table.repeat(1000, 1))
    rules.table[:, 0] = (torch.arange(1000) + 0.5) / 1000
    drawn = draw_tokens(probabilities.log().expand(1000, -1), rules, None)
    assert Counter(drawn.tolist()) == {0: 500, 2: 300, 3: 200}
    sampler = Sampler(no_grammar)
    seen = Counter(
        one(sampler, probabilities.log(), request(i, temperature=1.0, seed=i)) for i in range(3000)
    )
    assert abs(seen[0] / 3000 - 0.5) < 0.03
    assert seen[1] == 0


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}])
def test_numbers_that_are_not_finite_fail_their_own_row_only(options: dict[str, Any]) -> None:
    rows = logits(5, 2)
    rows[0, 3] = float("nan")
    bad, good = sample(Sampler(no_grammar), rows, [request(1, **options), request(2, **options)])
    assert isinstance(bad, SamplingError)
    assert isinstance(good, Token)


def test_an_eos_that_is_also_text_cannot_end_what_is_not_whole() -> None:
    row = torch.zeros(VOCABULARY)
    row[8] = 9.0  # the grammar would take it as text
    asked = Request(1, (5,), 5, sampling=Sampling(grammar="g"), eos=frozenset({8}))
    (failed,) = sample(Sampler(lambda grammar: Matcher()), row[None], [asked])
    assert isinstance(failed, SamplingError)
    both = Request(2, (5,), 5, sampling=Sampling(grammar="g"), eos=frozenset({8}))
    sampler = Sampler(lambda grammar: Matcher(allowed=bytes([0, 3])))
    assert [one(sampler, row, both) for _ in range(2)] == [9, 8], "the other one, and then the end"


@pytest.mark.parametrize(
    "options", [{"top_p": 5e-324}, {"top_p": 1e-300}, {"typical_p": 5e-324}, {"min_p": 1.0}]
)
def test_the_least_mass_still_holds_one_token(options: dict[str, Any]) -> None:
    """B13: it is 0 as a float32; an empty choice once ended the step, and with it everybody else's
    request.
    """
    row = logits(8)[0]
    only = kept(row, temperature=1.0, **options)
    assert int(only.count_nonzero()) == 1
    chosen = one(Sampler(no_grammar), row, request(1, temperature=1.0, **options))
    assert chosen == int(only.argmax())
    assert chosen == int(row.argmax()) or "typical_p" in options


class Matcher:
    """Allows token 8, or those of the bits given, then has ended."""

    def __init__(self, error: bool = False, allowed: bytes = bytes([0, 1])) -> None:
        self.taken: list[int] = []
        self.error = error
        self.allowed = allowed

    def is_error(self) -> bool:
        return self.error

    def get_error(self) -> str:
        return "too complex"

    def is_stopped(self) -> bool:
        return bool(self.taken)

    def is_accepting(self) -> bool:
        return bool(self.taken)

    def compute_bitmask(self) -> bytes:
        return self.allowed.ljust(50, b"\0")

    def consume_token(self, token: int) -> None:
        self.taken.append(token)


def test_a_grammar_allows_only_its_own_tokens_and_ends_with_eos() -> None:
    sampler, asked = Sampler(lambda grammar: Matcher()), request(1, grammar="g", temperature=1.0)
    assert [one(sampler, logits(6)[0], asked) for _ in range(2)] == [8, 2]
    endless = Request(2, (5,), 5, sampling=Sampling(grammar="g"))
    sampler = Sampler(lambda grammar: Matcher())
    assert one(sampler, logits(6)[0], endless) == 8
    assert isinstance(sample(sampler, logits(6), [endless])[0], SamplingError)
    (failed,) = sample(Sampler(lambda grammar: Matcher(error=True)), logits(6), [asked])
    assert isinstance(failed, SamplingError)
    assert failed.code == "validation", "the grammar is the client's"


def test_where_a_choice_raises_no_token_of_that_step_is_remembered() -> None:
    """The step is run again, in parts: what was consumed already would be consumed twice."""
    taken: list[int] = []

    class Noting(Matcher):
        def consume_token(self, token: int) -> None:
            taken.append(token)

    def matcher_of(grammar: str) -> Any:
        if grammar == "broken":
            raise RuntimeError("no such grammar")
        return Noting()

    sampler, row = Sampler(matcher_of), logits(6)
    good, bad = request(1, grammar="fine", frequency_penalty=2.0), request(2, grammar="broken")
    with pytest.raises(RuntimeError):
        sample(sampler, torch.cat([row, row]), [good, bad])
    assert taken == []
    token = one(sampler, row[0], good)
    assert taken == [token]
    assert token == one(Sampler(matcher_of), row[0], good)


def test_a_thousand_biases_cost_no_more_than_one() -> None:
    """One operation for each would make a step of the neighbours' too take ten times as long."""
    biases = tuple((i % VOCABULARY, i / 100) for i in range(1000))
    row = torch.zeros(VOCABULARY)
    for id, bias in biases:
        row[id] += bias
    counted = Counted()
    with counted:
        chosen = one(Sampler(no_grammar), torch.zeros(VOCABULARY), request(1, logit_bias=biases))
    assert chosen == int(row.argmax())
    assert counted.calls < 100


class Counted(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("adapter", "code"), [(None, "internal"), ("sha256:a", "adapter_invalid")])
@pytest.mark.parametrize("temperature", [0, 1])
def test_numbers_that_are_not_finite_are_the_adapters_fault_where_there_is_one(
    adapter: str | None, code: str, temperature: float
) -> None:
    asked = Request(1, (5,), 5, adapter, Sampling(temperature=temperature))
    (unfit,) = sample(Sampler(no_grammar), torch.full((1, VOCABULARY), float("nan")), [asked])
    assert isinstance(unfit, SamplingError)
    assert unfit.code == code
