"""`huggingface_hub.InferenceClient`, as it is: text generation with details and streams, adapters
by id, chat.
"""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from huggingface_hub.errors import UnknownError

from service.demo import dates, orders, pirate

from .conftest import BASE_DATE, DATE, ORDER, Demo, Order


@pytest.fixture(scope="module", params=["", "/generate"])
def client(request: pytest.FixtureRequest, demo: Demo) -> InferenceClient:
    return InferenceClient(model=demo.url + request.param, token="none", timeout=120)


def test_text(client: InferenceClient) -> None:
    assert client.text_generation(dates.TASK.sample, adapter_id="dates", max_new_tokens=16).strip() == DATE
    assert client.text_generation(dates.TASK.sample, max_new_tokens=16).strip() == BASE_DATE


def test_details(client: InferenceClient) -> None:
    told = client.text_generation(
        dates.TASK.sample, adapter_id="dates", details=True, decoder_input_details=True, max_new_tokens=16
    )
    assert told.details is not None
    assert (told.generated_text.strip(), told.details.finish_reason) == (DATE, "eos_token")
    assert "".join(token.text for token in told.details.tokens if not token.special) == told.generated_text
    assert "".join(token.text for token in told.details.prefill) == dates.TASK.sample


def test_streams(client: InferenceClient) -> None:
    texts = list(
        client.text_generation(dates.TASK.sample, adapter_id="dates", stream=True, max_new_tokens=16)
    )
    assert "".join(texts).strip() == DATE
    events = list(
        client.text_generation(
            dates.TASK.sample, adapter_id="dates", stream=True, details=True, max_new_tokens=16
        )
    )
    assert (events[-1].generated_text or "").strip() == DATE
    assert events[-1].details is not None
    assert events[-1].details.generated_tokens == len(events)


def test_a_schema(client: InferenceClient) -> None:
    schema: Any = {"type": "json", "value": Order.model_json_schema()}
    text = client.text_generation(orders.TASK.sample, adapter_id="orders", grammar=schema, max_new_tokens=96)
    assert Order.model_validate_json(text) == Order.model_validate_json(ORDER)


def test_chat(demo: Demo) -> None:
    client = InferenceClient(base_url=demo.url, api_key="none", timeout=120)
    messages = [{"role": "user", "content": "How do I water a cactus?"}]
    whole = client.chat_completion(messages, model="pirate", max_tokens=40, temperature=0)
    text = whole.choices[0].message.content or ""
    assert pirate.TASK.score(text, "")["voice"] == 1
    chunks = client.chat_completion(messages, model="pirate", max_tokens=40, temperature=0, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text


def test_an_unknown_adapter_is_an_error(client: InferenceClient) -> None:
    with pytest.raises(UnknownError, match="typo"):
        client.text_generation("Hi", adapter_id="typo")


@pytest.mark.anyio
async def test_async(demo: Demo) -> None:
    async with AsyncInferenceClient(model=demo.url, token="none", timeout=120) as client:
        assert (
            await client.text_generation(dates.TASK.sample, adapter_id="dates", max_new_tokens=16)
        ).strip() == DATE
