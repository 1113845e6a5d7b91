"""openai-agents, as it is, over its default, OpenAI's Responses: an agent, its stream, a tool's whole round,
an output of a type.
"""

from __future__ import annotations

import asyncio

from agents import Agent, ModelSettings, Runner, function_tool, set_default_openai_client
from given import BRIEFLY, CACTUS, KEY, SPOKEN_ORDER, V1, Order, as_call, tell
from openai import AsyncOpenAI

BRIEF = ModelSettings(temperature=0, max_tokens=BRIEFLY)
CALLS = ModelSettings(temperature=0, max_tokens=80, tool_choice="required")
placed = []


@function_tool
def place_order(name: str, item: str, quantity: int, city: str) -> str:
    """Places an order."""
    placed.append(Order(name=name, item=item, quantity=quantity, city=city).model_dump())
    return "The order is placed."


async def stream_text(agent: Agent) -> str:
    events = Runner.run_streamed(agent, CACTUS).stream_events()
    raw = [event.data async for event in events if event.type == "raw_response_event"]
    return "".join(event.delta for event in raw if event.type == "response.output_text.delta")


async def tell_all() -> None:
    set_default_openai_client(AsyncOpenAI(base_url=V1, api_key=KEY), use_for_tracing=False)
    pirate = Agent(name="pirate", model="pirate", model_settings=BRIEF)
    caller = Agent(
        name="caller",
        model="caller",
        tools=[place_order],
        tool_use_behavior="stop_on_first_tool",
        model_settings=CALLS,
    )
    typed = Agent(
        name="typed", model="caller", output_type=Order, model_settings=ModelSettings(temperature=0)
    )
    round = await Runner.run(caller, SPOKEN_ORDER)
    thanks = [*round.to_input_list(), {"role": "user", "content": "Thanks."}]
    async for _ in Runner.run_streamed(caller, SPOKEN_ORDER).stream_events():
        pass
    tell(
        plain=(await Runner.run(pirate, CACTUS)).final_output,
        streamed=await stream_text(pirate),
        called=as_call("place_order", placed[0]),
        streamed_call=as_call("place_order", placed[1]),
        result=round.final_output,
        after=(await Runner.run(pirate, thanks)).final_output,
        structured=(await Runner.run(typed, SPOKEN_ORDER)).final_output.model_dump(),
    )


asyncio.run(tell_all())
