"""What clients of a tormented service know to be true: who says what, which errors may come, and
what became of each request.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

PROMPTS = ("Hello there", "What is the time? ", "the an in", "x" * 70)
LENGTHS = (1, 5, 17)
LATE = (504, "deadline_exceeded")  # only where a worker was long in coming back
BUSY = {(429, "overloaded"), (503, "not_ready"), LATE}  # what any request may be told
CAUGHT = {"not_ready", LATE[1]}  # what a stream may end with
DIED = "the worker died"
GONE = (404, "adapter_not_found")
NO_VERSION = (404, "not_found")
OTHER_DIGEST = (409, "digest_mismatch")
SHAKY = 4  # of the markers, the last so many come and go
TWO_FACED = "two-faced"
ALIAS = "either"
Body = dict[str, Any]

BAD: tuple[tuple[str, Body | str, int], ...] = (
    ("/generate", "{no json", 422),
    ("/generate", {"inputs": "Hi", "parameters": {"max_new_tokens": 0}}, 422),
    ("/generate", {"inputs": "Hi", "parameters": {"temperature": -1}}, 422),
    ("/generate", {"inputs": ""}, 422),
    ("/generate", {"inputs": "Hi", "surprise": 1}, 422),
    ("/generate", {"inputs": "word " * 300}, 422),
    ("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 100_000}}, 422),
    ("/v1/completions", {"model": "m0", "prompt": "Hi", "n": 0}, 400),
    ("/v1/chat/completions", {"model": "m0", "messages": []}, 400),
    ("/adapters", {"id": "../x", "source": "m0"}, 422),
    ("/adapters", {"id": "x", "source": "/etc"}, 403),
    ("/adapters", {"id": "x", "source": "nowhere"}, 422),
    ("/adapters", {"id": "m0", "source": "m1"}, 409),
)


class WrongError(Exception):
    """An answer that must not be."""


@dataclass
class Tally:
    """What became of every request sent, by its request id, and what must not be.

    answered, done: a right answer, with tokens or of another kind; error: the right error; refused:
    nobody could have had an answer then; caught: the worker died with it; broken: it died in
    mid-stream; late: it waited too long for another; cut: the service was ending; left, unheard:
    the client went, in mid-stream or before any answer.
    """

    outcomes: dict[str, str] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    letters: Counter[str] = field(default_factory=Counter)

    def counted(self) -> Counter[str]:
        return Counter(self.outcomes.values())


@dataclass
class Truth:
    """What is true: the letter that each folder says, and what the base answers.

    `ending`: the service was told to end.
    """

    letters: dict[str, str]
    base: dict[tuple[str, int], str] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    ending: bool = False

    @property
    def steady(self) -> list[str]:
        return list(self.letters)[:-SHAKY]

    @property
    def shaky(self) -> list[str]:
        return list(self.letters)[-SHAKY:]

    async def learn(self, http: httpx.AsyncClient) -> None:
        """What the base says while nothing else runs, and the digest of every folder."""
        for prompt, length in itertools.product(PROMPTS, LENGTHS):
            answer = await http.post("/generate", json=native(prompt, None, length))
            self.base[prompt, length] = answer.raise_for_status().json()["generated_text"]
        listed = (await http.get("/adapters")).json()["adapters"]
        self.digests = {card["digest"]: self.letters[card["id"]] for card in listed}

    def answer(self, digest: str | None, prompt: str, length: int) -> str:
        return self.base[prompt, length] if digest is None else self.digests[digest] * length


def native(prompt: str, adapter: str | None, length: int, **more: Any) -> Body:
    return {
        "inputs": prompt,
        "parameters": {"adapter_id": adapter, "max_new_tokens": length, "ignore_eos_token": True, **more},
    }


def openai(prompt: str, adapter: str | None, length: int, **more: Any) -> Body:
    asked = {"model": adapter or "base", "max_tokens": length, "ignore_eos": True, "temperature": 0}
    return asked | {"prompt": prompt} | more


def code(error: Body) -> str:
    """The code of an error body of either dialect."""
    inner = error["error"]
    told = inner["code"] if isinstance(inner, dict) else error["error_type"]
    return GONE[1] if told == "model_not_found" else str(told)


def events(text: str) -> list[Body]:
    return [
        json.loads(line[5:])
        for line in text.splitlines()
        if line.startswith("data:") and not line.endswith("[DONE]")
    ]
