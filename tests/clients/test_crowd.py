"""The whole product as it starts by default, under a mixed crowd: every adapter is right beside
every other, and the base stays itself.
"""

from __future__ import annotations

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass

import httpx
import pytest

from service.demo import dates, labels, orders, pirate
from service.demo.task import Item, Task

from .conftest import Demo

TASKS = (dates.TASK, labels.TASK, orders.TASK, pirate.TASK)
ITEMS = 6

pytestmark = pytest.mark.anyio


@dataclass(frozen=True)
class Question:
    task: Task
    item: Item
    adapted: bool
    streamed: bool

    @property
    def model(self) -> str:
        return self.task.name if self.adapted else "base"

    def score(self, answer: str) -> float:
        """By the measure that counts."""
        scores = self.task.score(answer.strip(), self.item.answer)
        return scores[next(iter(self.task.measures))]

    async def ask(self, http: httpx.AsyncClient) -> str:
        body = {"model": self.model, "max_tokens": self.task.limit, "temperature": 0, "stream": self.streamed}
        if self.item.chat:
            messages = [{"role": "user", "content": self.item.prompt}]
            answer = await http.post("/v1/chat/completions", json=body | {"messages": messages})
        else:
            answer = await http.post("/v1/completions", json=body | {"prompt": self.item.prompt})
        if not self.streamed:
            return read_text(answer.raise_for_status().json(), "message")
        *frames, done, end = answer.raise_for_status().text.split("\n\n")
        assert (done, end) == ("data: [DONE]", "")
        events = [json.loads(frame.removeprefix("data: ")) for frame in frames if frame[0] != ":"]
        return "".join(read_text(event, "delta") for event in events)


def read_text(event: dict[str, list[dict[str, dict[str, str]]]], where: str) -> str:
    (choice,) = event["choices"]
    return str(choice.get("text", "")) or choice.get(where, {}).get("content") or ""


async def test_every_adapter_is_right_beside_all_others_and_the_base_stays_itself(demo: Demo) -> None:
    """B1: four adapters of different kinds and the base, all at once, half of them streaming, in
    the default dtype and compilation.
    """
    questions = [
        Question(task, task.items("test", ITEMS)[number], adapted, (number + adapted) % 2 == 0)
        for number in range(ITEMS)
        for task in TASKS
        for adapted in (True, False)
    ]
    async with httpx.AsyncClient(base_url=demo.url, timeout=300, trust_env=False) as http:
        answers = await asyncio.gather(*(question.ask(http) for question in questions))
    right: defaultdict[tuple[str, bool], float] = defaultdict(float)
    for question, answer in zip(questions, answers, strict=True):
        right[question.task.name, question.adapted] += question.score(answer)
    for task in TASKS:
        assert right[task.name, True] >= ITEMS - 1, (task.name, right)
        assert right[task.name, False] <= ITEMS / 2, (task.name, right)


def test_nothing_is_set_but_the_adapters_folder(demo: Demo) -> None:
    settings = demo.http.get("/info").json()["settings"]
    assert (settings["dtype"], settings["compile"], settings["device"], settings["quantization"]) == (
        "auto",
    ) * 4
