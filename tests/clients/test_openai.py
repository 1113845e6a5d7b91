"""The `openai` package, as it is: sync, async, streams, several answers, log probabilities,
structured output, tools, its own errors.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import openai
import pytest
from openai.types.chat import (
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionMessageParam,
    ChatCompletionToolParam,
)

from service.demo import dates, labels, orders, pirate

from .conftest import BASE, BASE_DATE, DATE, LABEL, ORDER, SPOKEN_ORDER, Demo, Order

CACTUS: list[ChatCompletionMessageParam] = [{"role": "user", "content": "How do I water a cactus?"}]
ORDERED: list[ChatCompletionMessageParam] = [{"role": "user", "content": SPOKEN_ORDER}]
PLACE: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "place_order", "parameters": Order.model_json_schema()},
}


@pytest.fixture(scope="module")
def client(demo: Demo) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def test_a_completion_is_the_adapters_and_names_it(client: openai.OpenAI) -> None:
    adapted = client.completions.create(model="dates", prompt=dates.TASK.sample, temperature=0)
    assert (adapted.choices[0].text.strip(), adapted.choices[0].finish_reason) == (DATE, "stop")
    assert (adapted.model_extra or {})["adapter"]["id"] == "dates"
    base = client.completions.create(model=BASE, prompt=dates.TASK.sample, temperature=0, max_tokens=16)
    assert (base.choices[0].text.strip(), base.choices[0].finish_reason) == (BASE_DATE, "length")
    assert base.usage is not None
    assert base.usage.completion_tokens == 16


def test_a_chat_whole_and_streamed_is_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="pirate", messages=CACTUS, temperature=0, max_tokens=40)
    text = whole.choices[0].message.content or ""
    assert pirate.TASK.score(text, "")["voice"] == 1
    streaming: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    asked: dict[str, Any] = {"model": "pirate", "messages": CACTUS, "temperature": 0, "max_tokens": 40}
    chunks = list(client.chat.completions.create(**asked, **streaming))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert chunks[-1].usage == whole.usage
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == whole.choices[0].finish_reason


def test_several_answers_are_seeded_and_count_the_prompt_once(client: openai.OpenAI) -> None:
    """B17."""
    asked: dict[str, Any] = {"model": "labels", "prompt": labels.TASK.sample, "max_tokens": 4}
    told = client.completions.create(**asked, n=3, temperature=0.2, seed=7)
    one = client.completions.create(**asked)
    assert [choice.index for choice in told.choices] == [0, 1, 2]
    assert {choice.text.strip() for choice in told.choices} == {LABEL}
    assert told.usage is not None
    assert one.usage is not None
    assert told.usage.prompt_tokens == one.usage.prompt_tokens


def test_prompts_in_a_batch_each_get_their_answer(client: openai.OpenAI) -> None:
    items = dates.TASK.items("test", 4)
    told = client.completions.create(model="dates", prompt=[item.prompt for item in items], temperature=0)
    right = [
        dates.TASK.score(c.text, item.answer)["exact"] for c, item in zip(told.choices, items, strict=True)
    ]
    assert sum(right) >= 3


def test_logprobs_describe_the_text(client: openai.OpenAI) -> None:
    told = client.chat.completions.create(
        model="pirate", messages=CACTUS, temperature=0, max_tokens=12, logprobs=True, top_logprobs=3
    )
    logprobs = told.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(token.token for token in logprobs.content) == told.choices[0].message.content
    for token in logprobs.content:
        assert len(token.top_logprobs) == 3
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob), (
            "greedy takes the best"
        )
        assert bytes(token.bytes or ()).decode() == token.token
    old = client.completions.create(
        model="dates", prompt=dates.TASK.sample, temperature=0, logprobs=2
    ).choices[0]
    assert old.logprobs is not None
    assert old.logprobs.tokens is not None
    assert "".join(old.logprobs.tokens[:-1]) == old.text, "the last is the end of the text"


def test_a_pydantic_model_comes_back(client: openai.OpenAI) -> None:
    told = client.chat.completions.parse(
        model="caller", messages=ORDERED, response_format=Order, temperature=0
    )
    assert told.choices[0].message.parsed == Order.model_validate_json(ORDER)
    base = client.chat.completions.parse(
        model="base", messages=ORDERED, response_format=Order, temperature=0, max_tokens=80
    )
    assert isinstance(base.choices[0].message.parsed, Order), (
        "also from a model that was trained for nothing of the kind"
    )


def called(message: ChatCompletionMessage) -> ChatCompletionMessageFunctionToolCall:
    assert message.tool_calls is not None
    (call,) = message.tool_calls
    assert isinstance(call, ChatCompletionMessageFunctionToolCall)
    return call


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    told = client.chat.completions.create(
        model="caller", messages=ORDERED, tools=[PLACE], tool_choice="required", temperature=0
    )
    call = called(told.choices[0].message)
    assert (call.function.name, told.choices[0].finish_reason) == ("place_order", "tool_calls")
    assert Order.model_validate_json(call.function.arguments).city == "Berlin"
    with client.chat.completions.stream(
        model="caller", messages=ORDERED, tools=[PLACE], tool_choice="required", temperature=0
    ) as stream:
        streamed = called(stream.get_final_completion().choices[0].message)
    assert json.loads(streamed.function.arguments) == json.loads(call.function.arguments)


def test_models_are_the_base_and_the_adapters(client: openai.OpenAI, demo: Demo) -> None:
    models = {model.id: model for model in client.models.list()}
    assert set(models) >= {BASE, "dates", "labels", "orders", "pirate"}
    registered = demo.http.get("/adapters/dates/summary").json()["registered_at"]
    assert client.models.retrieve("dates").created == int(datetime.fromisoformat(registered).timestamp())
    assert models[BASE].created <= time.time()


def test_errors_are_the_packages_own(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="typo", prompt="Hi")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as bad:
        client.chat.completions.create(model="dates", messages=CACTUS, temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="dates", prompt="Hi", max_tokens=100_000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="takes none"):
        client.chat.completions.create(model="dates", messages=CACTUS, tools=[PLACE])
    format: Any = {"type": "json_schema", "json_schema": {"name": "none", "schema": {"type": "no-such-type"}}}
    with pytest.raises(openai.BadRequestError, match="response_format"):
        client.chat.completions.create(model="dates", messages=CACTUS, response_format=format, stream=True)


def test_a_closed_stream_ends_the_work(client: openai.OpenAI, demo: Demo) -> None:
    """B12: the gauge falls to 0 well before 4000 tokens could have been made."""
    stream = client.completions.create(
        model="base", prompt="Once", max_tokens=4000, stream=True, extra_body={"ignore_eos": True}
    )
    for _ in zip(range(3), stream, strict=False):
        pass
    stream.close()
    while "adapterd_num_requests_running 0.0" not in demo.http.get("/metrics").text:
        time.sleep(0.05)


@pytest.mark.anyio
async def test_many_at_once(demo: Demo) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{demo.url}/v1", api_key="none", max_retries=0, timeout=120
    ) as client:

        async def ask(model: str, prompt: str, tokens: int) -> str:
            told = await client.completions.create(
                model=model, prompt=prompt, temperature=0, max_tokens=tokens
            )
            return told.choices[0].text.strip()

        async def stream(model: str, prompt: str, tokens: int) -> str:
            chunks = await client.completions.create(
                model=model, prompt=prompt, temperature=0, max_tokens=tokens, stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in chunks]).strip()

        prompts = ((task.name, task.sample, task.limit) for task in (dates.TASK, labels.TASK, orders.TASK))
        asked = [(one, way) for one in (*prompts, ("base", dates.TASK.sample, 16)) for way in (ask, stream)]
        answers = await asyncio.gather(*(way(*one) for one, way in asked))
    assert answers == [answer for answer in (DATE, LABEL, ORDER, BASE_DATE) for _ in range(2)]
