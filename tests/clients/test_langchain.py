"""`langchain-openai`, as it is: chat, streams, completions, structured output, tools."""

from __future__ import annotations

from typing import Literal

import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from service.demo import dates, pirate

from .conftest import DATE, ORDER, SPOKEN_ORDER, Demo, Order

KEY = SecretStr("none")


def chat(demo: Demo, model: str) -> ChatOpenAI:
    return ChatOpenAI(
        model=model, base_url=f"{demo.url}/v1", api_key=KEY, temperature=0, max_retries=0, timeout=120
    )


def test_chat_whole_and_streamed(demo: Demo) -> None:
    model = chat(demo, "pirate").bind(max_tokens=40)
    whole = model.invoke("How do I water a cactus?")
    assert pirate.TASK.score(str(whole.content), "")["voice"] == 1
    assert "".join(str(chunk.content) for chunk in model.stream("How do I water a cactus?")) == whole.content


def test_completions(demo: Demo) -> None:
    model = OpenAI(
        model="dates", base_url=f"{demo.url}/v1", api_key=KEY, temperature=0, max_tokens=16, max_retries=0
    )
    assert model.invoke(dates.TASK.sample).strip() == DATE


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output(demo: Demo, method: Literal["json_schema", "function_calling"]) -> None:
    model = chat(demo, "caller").with_structured_output(Order, method=method)
    answer = model.invoke(SPOKEN_ORDER)
    assert isinstance(answer, Order)
    assert (answer.quantity, answer.city) == (7, Order.model_validate_json(ORDER).city)


@pytest.mark.anyio
async def test_async(demo: Demo) -> None:
    model = chat(demo, "pirate").bind(max_tokens=40)
    whole = await model.ainvoke("How do I water a cactus?")
    assert (
        "".join([str(chunk.content) async for chunk in model.astream("How do I water a cactus?")])
        == whole.content
    )
