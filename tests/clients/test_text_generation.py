"""`text-generation` 0.7.0, as it is.

It knows no adapters: base, streams, grammars, its own errors.
"""

from __future__ import annotations

import re

import pytest
import text_generation
from text_generation.errors import UnknownError, ValidationError
from text_generation.types import Grammar, GrammarType

from service.demo import dates, orders

from .conftest import BASE_DATE, Demo, Order

# The package's own
pytestmark = pytest.mark.filterwarnings("ignore::pydantic.warnings.PydanticDeprecatedSince20")


@pytest.fixture(scope="module")
def client(demo: Demo) -> text_generation.Client:
    return text_generation.Client(demo.url, timeout=120)


def test_the_base(client: text_generation.Client) -> None:
    answer = client.generate(dates.TASK.sample, max_new_tokens=16, decoder_input_details=True, top_n_tokens=2)
    assert answer.generated_text.strip() == BASE_DATE
    assert (answer.details.finish_reason, answer.details.generated_tokens, len(answer.details.tokens)) == (
        "length",
        16,
        16,
    )
    assert "".join(token.text for token in answer.details.tokens) == answer.generated_text
    assert "".join(token.text for token in answer.details.prefill) == dates.TASK.sample
    assert answer.details.prefill[0].logprob is None
    best = [tops[0] for tops in answer.details.top_tokens]
    assert [token.id for token in best] == [token.id for token in answer.details.tokens], (
        "greedy takes the best"
    )


def test_a_stream(client: text_generation.Client) -> None:
    events = list(client.generate_stream(dates.TASK.sample, max_new_tokens=16))
    assert "".join(event.token.text for event in events).strip() == BASE_DATE
    assert events[-1].generated_text.strip() == BASE_DATE
    assert events[-1].details.generated_tokens == len(events) == 16


def test_grammars(client: text_generation.Client) -> None:
    pattern = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
    text = client.generate(
        dates.TASK.sample, max_new_tokens=16, grammar=Grammar(type=GrammarType.Regex, value=pattern)
    ).generated_text
    assert re.fullmatch(pattern, text)
    schema = Grammar(type=GrammarType.Json, value=Order.model_json_schema())
    assert Order.model_validate_json(
        client.generate(orders.TASK.sample, max_new_tokens=96, grammar=schema).generated_text
    )
    events = list(client.generate_stream(orders.TASK.sample, max_new_tokens=96, grammar=schema))
    assert Order.model_validate_json(events[-1].generated_text)


def test_errors_are_the_packages_own(client: text_generation.Client) -> None:
    with pytest.raises((ValidationError, UnknownError), match="max_new_tokens"):
        client.generate("Hi", max_new_tokens=100_000)
    with pytest.raises((ValidationError, UnknownError), match="grammar"):
        list(client.generate_stream("Hi", grammar=Grammar(type=GrammarType.Regex, value="(")))


@pytest.mark.anyio
async def test_async(demo: Demo) -> None:
    client = text_generation.AsyncClient(demo.url, timeout=120)
    assert (await client.generate(dates.TASK.sample, max_new_tokens=16)).generated_text.strip() == BASE_DATE
    events = [event async for event in client.generate_stream(dates.TASK.sample, max_new_tokens=16)]
    assert events[-1].generated_text.strip() == BASE_DATE
