"""pydantic-ai, as it is, over the three dialects: OpenAI's chats and Responses, Anthropic's Messages."""

from __future__ import annotations

import asyncio

from given import BRIEFLY, CACTUS, KEY, SPOKEN_ORDER, URL, V1, Order, tell
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider

OPENAI = OpenAIProvider(base_url=V1, api_key=KEY)
ANTHROPIC = AnthropicProvider(base_url=URL, api_key=KEY)
WAYS = ((OpenAIChatModel, OPENAI), (OpenAIResponsesModel, OPENAI), (AnthropicModel, ANTHROPIC))
BRIEF = {"temperature": 0, "max_tokens": BRIEFLY}


async def stream_text(agent: Agent) -> str:
    async with agent.run_stream(CACTUS, model_settings=BRIEF) as result:
        return "".join([piece async for piece in result.stream_text(delta=True)])


async def tell_all() -> None:
    results = {"plain": [], "streamed": [], "structured": []}
    for kind, provider in WAYS:
        pirate = Agent(kind("pirate", provider=provider))
        results["plain"].append((await pirate.run(CACTUS, model_settings=BRIEF)).output)
        results["streamed"].append(await stream_text(pirate))
        caller = Agent(kind("caller", provider=provider), output_type=Order)
        answer = await caller.run(SPOKEN_ORDER, model_settings={"temperature": 0, "max_tokens": 80})
        results["structured"].append(answer.output.model_dump())
    tell(**results)


asyncio.run(tell_all())
