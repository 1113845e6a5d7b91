"""The numbers: log probabilities and every rule of choosing, held to a plain float32 forward of
transformers.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests import making

from .conftest import ROWS, SILENT, Asking, LiveService

pytestmark = pytest.mark.anyio

PROMPT = "Hello there, the an in"
NEAR = 1e-4
Rule = Callable[[torch.Tensor, list[int]], torch.Tensor]


def near(told: float | None, wanted: torch.Tensor) -> bool:
    return told is not None and abs(told - float(wanted)) < NEAR


def by_hand(live: LiveService, adapter: str | None, n: int, rule: Rule) -> list[int]:
    """Greedy choice from the logits as the rule changes them, given the tokens so far."""
    made: list[int] = []
    for _ in range(n):
        logits = live.logits(adapter, [*making.ids(PROMPT), *made])[-1]
        made.append(int(rule(logits.clone(), made).argmax()))
    return made


@pytest.mark.parametrize("adapter", [None, "n1", "n3"])
async def test_logprobs_are_those_of_a_plain_forward(
    live: LiveService, asking: Asking, adapter: str | None
) -> None:
    """Of the prompt and of the answer, and of the runners-up, among neighbours; to 1e-4, in both
    dialects.
    """
    more = {"details": True, "decoder_input_details": True, "top_n_tokens": 4, "ignore_eos_token": True}
    told, _ = await asyncio.gather(asking.generate(PROMPT, adapter, 8, **more), asking.crowd(8))
    details, prompt = told["details"], making.ids(PROMPT)
    made = [token["id"] for token in details["tokens"]]
    wanted = live.logits(adapter, [*prompt, *made]).log_softmax(-1)
    assert [token["id"] for token in details["prefill"]] == prompt
    assert details["prefill"][0]["logprob"] is None
    check_logprobs(details["prefill"][1:], wanted)
    answered = wanted[len(prompt) - 1 :]
    check_logprobs(details["tokens"], answered)
    for top, scores in zip(details["top_tokens"], answered, strict=False):
        assert [token["id"] for token in top] == scores.topk(4).indices.tolist()
        check_logprobs(top, scores.expand(4, -1))
    assert len(details["top_tokens"]) == len(made)
    told = await asking.complete(PROMPT, adapter or "tiny", 8, echo=True, logprobs=3, ignore_eos=True)
    first, *others = told["choices"][0]["logprobs"]["token_logprobs"]
    assert first is None
    pairs = zip([*prompt, *made][1:], others, strict=True)
    check_logprobs([{"id": id, "logprob": logprob} for id, logprob in pairs], wanted)


def check_logprobs(tokens: list[dict[str, Any]], wanted: torch.Tensor) -> None:
    """Of each token, by its row of log probabilities; there may be more rows."""
    for token, scores in zip(tokens, wanted, strict=False):
        assert near(token["logprob"], scores[token["id"]])
    assert len(tokens) <= len(wanted)


async def test_chat_logprobs_too(live: LiveService, asking: Asking) -> None:
    body = {"model": "n1", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    body |= {"temperature": 0, "logprobs": True, "top_logprobs": 2, "ignore_eos": True}
    (choice,) = (await asking.post("/v1/chat/completions", body))["choices"]
    rendered = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    prompt, made = making.ids(rendered), live.greedy("n1", rendered, 5)
    wanted = live.logits("n1", [*prompt, *made]).log_softmax(-1)[len(prompt) - 1 : -1]
    for token, id, scores in zip(choice["logprobs"]["content"], made, wanted, strict=True):
        assert near(token["logprob"], scores[id])
        best = [round(float(value), 3) for value in scores.topk(2).values]
        assert [round(top["logprob"], 3) for top in token["top_logprobs"]] == best


@pytest.mark.parametrize("adapter", [None, "n1"])
async def test_a_seed_gives_the_same_alone_and_among_fifteen_neighbours(
    asking: Asking, adapter: str | None
) -> None:
    warm = {"do_sample": True, "temperature": 1.0, "seed": 12345, "top_p": 0.95}
    alone = await asking.ids(PROMPT, adapter, 24, **warm)
    together, _ = await asyncio.gather(asking.ids(PROMPT, adapter, 24, **warm), asking.crowd(ROWS - 1))
    assert together == alone
    assert await asking.ids(PROMPT, adapter, 24, **{**warm, "seed": 12346}) != alone


async def test_several_answers_differ_and_are_the_same_next_time(asking: Asking) -> None:
    told = [
        await asking.complete(PROMPT, "n1", 12, n=3, temperature=1, seed=5, ignore_eos=True) for _ in range(2)
    ]
    texts = [[choice["text"] for choice in one["choices"]] for one in told]
    assert texts[0] == texts[1]
    assert len(set(texts[0])) == 3


async def test_the_best_of_several_is_the_likeliest(asking: Asking) -> None:
    more: dict[str, Any] = {"best_of": 4, "do_sample": True, "temperature": 1.5}
    more |= {"details": True, "ignore_eos_token": True}
    for seed in range(5):  # not with every one is the first the best
        details = (await asking.generate(PROMPT, "n1", 6, seed=seed, **more))["details"]
        sequences = [details, *details["best_of_sequences"]]
        best, *others = (sum(token["logprob"] for token in answer["tokens"]) for answer in sequences)
        assert best >= max(others)
        assert len(set(others)) == 3, "they are of different seeds"


async def test_echo_gives_the_prompt_back_and_can_give_nothing_else(
    live: LiveService, asking: Asking
) -> None:
    (whole,) = (await asking.complete(PROMPT, "n1", 6, echo=True, ignore_eos=True))["choices"]
    assert whole["text"] == PROMPT + making.tokenizer().decode(
        live.greedy("n1", PROMPT, 6), skip_special_tokens=True
    )
    told = await asking.complete(making.ids(PROMPT), "n1", 0, echo=True, logprobs=0)
    assert (told["choices"][0]["text"], told["usage"]["completion_tokens"]) == (PROMPT, 0)
    assert len(told["choices"][0]["logprobs"]["tokens"]) == len(making.ids(PROMPT))
    (nothing,) = (await asking.complete(PROMPT, "n1", 0))["choices"]
    assert (nothing["text"], nothing["finish_reason"]) == ("", "length")


async def made_by(asking: Asking, **fields: Any) -> list[int]:
    """The ids that a completion made, told by its text of one token a character or by its logprobs."""
    (choice,) = (await asking.complete(PROMPT, "n1", 12, ignore_eos=True, logprobs=0, **fields))["choices"]
    vocabulary = {making.tokenizer().decode([id]): id for id in range(len(making.tokenizer()))}
    return [vocabulary[text] for text in choice["logprobs"]["tokens"]]


def in_words(ids: list[int]) -> list[str]:
    """Tokens as the service spells them: several bytes alone are spelt alike."""
    return [making.tokenizer().decode([id]) for id in ids]


async def test_a_bias_is_added(live: LiveService, asking: Asking) -> None:
    free = live.greedy("n1", PROMPT, 12)
    bias = {free[0]: -100.0, free[3]: -3.0, 70: 2.5, 71: 4.0}

    def biased(logits: torch.Tensor, made: list[int]) -> torch.Tensor:
        for id, value in bias.items():
            logits[id] += value
        return logits

    told = await made_by(asking, logit_bias={str(id): value for id, value in bias.items()})
    assert in_words(told) == in_words(by_hand(live, "n1", 12, biased)) != in_words(free)
    assert in_words(await made_by(asking, logit_bias={"70": 100})) == in_words([70] * 12)


async def test_penalties_are_taken_off(live: LiveService, asking: Asking) -> None:
    """Frequency and presence of the answer's own tokens; repetition of the prompt's too."""

    def spent(logits: torch.Tensor, made: list[int]) -> torch.Tensor:
        for id, count in Counter(made).items():
            logits[id] -= 1.5 * count - 1.5  # nothing for the first time, so that the count shows
        return logits

    def repeated(logits: torch.Tensor, made: list[int]) -> torch.Tensor:
        for id in {*making.ids(PROMPT), *made}:
            logits[id] = logits[id] * 1.5 if logits[id] < 0 else logits[id] / 1.5
        return logits

    free = live.greedy("n1", PROMPT, 12)
    assert len(set(free)) < 12, "nothing comes twice, so nothing is shown"
    native = await asking.ids(PROMPT, "n1", 12, frequency_penalty=1.5, presence_penalty=-1.5)
    assert native == by_hand(live, "n1", 12, spent) != free
    assert in_words(await made_by(asking, frequency_penalty=1.5, presence_penalty=-1.5)) == in_words(native)
    native = await asking.ids(PROMPT, "n1", 12, repetition_penalty=1.5)
    assert native == by_hand(live, "n1", 12, repeated) != free
    assert in_words(await made_by(asking, repetition_penalty=1.5)) == in_words(native)


async def test_no_end_comes_before_min_tokens(live: LiveService, asking: Asking) -> None:
    """The marker says eos at once; until it may, it says other things."""
    for fewest in (0, 1, 5):
        told = await asking.complete("Hi", SILENT, 12, min_tokens=fewest)
        assert (told["choices"][0]["finish_reason"], told["usage"]["completion_tokens"]) == (
            "stop",
            fewest + 1,
        )
        assert live.letters[SILENT] not in told["choices"][0]["text"]


@pytest.mark.parametrize(
    "cold", [{"temperature": 0}, {"temperature": 1e-9}, {"top_k": 1}, {"top_p": 1e-9}, {"typical_p": None}]
)
async def test_what_leaves_one_token_is_greedy(
    live: LiveService, asking: Asking, cold: dict[str, Any]
) -> None:
    """B13: documented meanings of odd numbers; without sampling asked for, nothing is sampled."""
    warm = {"do_sample": True, "temperature": 1.0} if cold.keys() & {"top_k", "top_p"} else {}
    assert await asking.ids(PROMPT, "n1", 12, **{**warm, **cold}) == live.greedy("n1", PROMPT, 12)
