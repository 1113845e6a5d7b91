"""The whole product as it starts by default, under a mixed crowd: every adapter is right beside
every other, and the base stays itself.
"""

from __future__ import annotations

import asyncio
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

    async def ask(self, http: httpx.AsyncClient) -> str:
        body = {"model": self.model, "max_tokens": self.task.limit, "temperature": 0, "stream": self.streamed}
        what = (
            {"messages": [{"role": "user", "content": self.item.prompt}]}
            if self.item.chat
            else {"prompt": self.item.prompt}
        )
        answer = await http.post(
            "/v1/chat/completions" if self.item.chat else "/v1/completions", json=body | what
        )
        if not self.streamed:
            return told(answer.raise_for_status().json(), "message")
        frames = answer.raise_for_status().text.split("\n\n")
        assert frames[-2:] == ["data: [DONE]", ""]
        return "".join(
            told(httpx.Response(200, text=frame.removeprefix("data: ")).json(), "delta")
            for frame in frames[:-2]
        )


def told(event: dict[str, list[dict[str, dict[str, str]]]], where: str) -> str:
    (choice,) = event["choices"]
    return str(choice.get("text", "")) or choice.get(where, {}).get("content") or ""


async def test_every_adapter_is_right_beside_all_others_and_the_base_stays_itself(demo: Demo) -> None:
    """B1: four adapters of different kinds and the base, all at once, half of them streaming, in
    the default dtype and compilation.
    """
    questions = [
        Question(task, item, adapted, (at + adapted) % 2 == 0)
        for at in range(ITEMS)
        for task in TASKS
        for item in (task.items("test", ITEMS)[at],)
        for adapted in (True, False)
    ]
    async with httpx.AsyncClient(base_url=demo.url, timeout=300, trust_env=False) as http:
        answers = await asyncio.gather(*(question.ask(http) for question in questions))
    for task in TASKS:
        measure = next(iter(task.measures))
        right = {
            adapted: sum(
                task.score(answer.strip(), asked.item.answer)[measure]
                for asked, answer in zip(questions, answers, strict=True)
                if asked.task is task and asked.adapted is adapted
            )
            for adapted in (True, False)
        }
        assert right[True] >= ITEMS - 1, (task.name, right)
        assert right[False] <= ITEMS / 2, (task.name, right)


def test_nothing_is_set_but_the_adapters_folder(demo: Demo) -> None:
    settings = demo.http.get("/info").json()["settings"]
    assert (settings["dtype"], settings["compile"], settings["device"], settings["quantization"]) == (
        "auto",
    ) * 4
