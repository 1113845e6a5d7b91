"""`lorax-client` 0.6.3, as it is: generate, streams, async, adapters by id, schemas, its own
errors.
"""

from __future__ import annotations

from typing import Any

import lorax
import pytest
from lorax.errors import NotFoundError, ValidationError
from lorax.types import MergedAdapters, ResponseFormat, ResponseFormatType

from service.demo import dates, labels, orders

from .conftest import BASE_DATE, DATE, LABEL, ORDER, Demo, Order

# The package's own
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")

FORMAT = ResponseFormat(type=ResponseFormatType.json_object, schema=Order.model_json_schema())


@pytest.fixture(scope="module")
def client(demo: Demo) -> lorax.Client:
    return lorax.Client(demo.url, timeout=120)


def test_an_adapter_by_its_id(client: lorax.Client) -> None:
    answer = client.generate(dates.TASK.sample, adapter_id="dates", adapter_source="local", max_new_tokens=16)
    assert answer.generated_text.strip() == DATE
    assert answer.details.finish_reason == "eos_token"
    assert answer.details.generated_tokens == len(answer.details.tokens)
    assert (
        "".join(token.text for token in answer.details.tokens if not token.special) == answer.generated_text
    )
    assert all(token.logprob <= 0 for token in answer.details.tokens)
    assert client.generate(dates.TASK.sample, max_new_tokens=16).generated_text.strip() == BASE_DATE


def test_a_stream(client: lorax.Client) -> None:
    events = list(client.generate_stream(labels.TASK.sample, adapter_id="labels", max_new_tokens=12))
    assert "".join(event.token.text for event in events if not event.token.special).strip() == LABEL
    assert events[-1].generated_text.strip() == LABEL
    assert events[-1].details.generated_tokens == len(events)
    assert {event.generated_text for event in events[:-1]} == {None}


def test_a_schema(client: lorax.Client) -> None:
    text = client.generate(
        orders.TASK.sample, adapter_id="orders", response_format=FORMAT, max_new_tokens=96
    ).generated_text
    assert Order.model_validate_json(text) == Order.model_validate_json(ORDER)
    assert Order.model_validate_json(
        client.generate(orders.TASK.sample, response_format=FORMAT, max_new_tokens=96).generated_text
    )


def test_a_seed_gives_the_same_again(client: lorax.Client) -> None:
    sampling: dict[str, Any] = {"do_sample": True, "temperature": 0.9, "top_p": 0.9, "seed": 3}
    first, second = (client.generate("Once", max_new_tokens=8, **sampling) for _ in range(2))
    assert first.generated_text == second.generated_text


def test_parameters_of_the_dialect(client: lorax.Client) -> None:
    details = {"return_full_text": True, "decoder_input_details": True, "details": True}
    full = client.generate(dates.TASK.sample, adapter_id="dates", **details)
    assert full.generated_text.strip() == f"{dates.TASK.sample} {DATE}"
    assert "".join(token.text for token in full.details.prefill) == dates.TASK.sample
    stopped = client.generate(
        dates.TASK.sample, adapter_id="dates", stop_sequences=["-03"], max_new_tokens=16
    )
    assert stopped.generated_text.strip() == DATE.split("-")[0]
    assert stopped.details.finish_reason == "stop_sequence"
    sampling: dict[str, Any] = {"best_of": 2, "do_sample": True, "temperature": 0.1}
    best = client.generate(labels.TASK.sample, adapter_id="labels", max_new_tokens=4, **sampling)
    assert best.generated_text.strip() == LABEL
    assert len(best.details.best_of_sequences) == 1


def test_errors_are_the_packages_own(client: lorax.Client) -> None:
    with pytest.raises(NotFoundError, match="typo"):
        client.generate("Hi", adapter_id="typo")
    with pytest.raises(NotFoundError, match="typo"):
        list(client.generate_stream("Hi", adapter_id="typo"))
    with pytest.raises(ValidationError, match="merged_adapters"):
        client.generate("Hi", merged_adapters=MergedAdapters(ids=["dates"], weights=[1.0], density=1.0))


def test_a_mix_of_two_adapters(client: lorax.Client) -> None:
    """One that counts in full beside one that does not count at all says what it says alone."""
    merged = MergedAdapters(ids=["labels", "orders"], weights=[1.0, 0.0], density=1.0)
    answer = client.generate(labels.TASK.sample, merged_adapters=merged, max_new_tokens=4)
    assert answer.generated_text.strip() == LABEL


@pytest.mark.anyio
async def test_async(demo: Demo) -> None:
    client = lorax.AsyncClient(demo.url, timeout=120)
    answer = await client.generate(dates.TASK.sample, adapter_id="dates", max_new_tokens=16)
    assert answer.generated_text.strip() == DATE
    events = [
        event
        async for event in client.generate_stream(labels.TASK.sample, adapter_id="labels", max_new_tokens=12)
    ]
    assert events[-1].generated_text.strip() == LABEL
