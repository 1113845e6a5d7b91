"""litellm, as it is, by each of its ways to a server of one's own: OpenAI's chats, vLLM's, Anthropic's."""

from __future__ import annotations

import litellm
from given import BRIEFLY, CACTUS, KEY, SPOKEN_ORDER, URL, V1, Order, as_call, tell

CHAT = {"messages": [{"role": "user", "content": CACTUS}], "max_tokens": BRIEFLY, "temperature": 0}
ORDERED = [{"role": "user", "content": SPOKEN_ORDER}]
PLACE = {
    "type": "function",
    "function": {"name": "place_order", "parameters": Order.model_json_schema()},
}
OPENAI = {"api_base": V1, "api_key": KEY}
CALLER = {"model": "openai/caller", "messages": ORDERED, "temperature": 0, **OPENAI}


def content(**asked) -> str:
    return litellm.completion(**CHAT, **asked).choices[0].message.content


def joined(**asked) -> str:
    chunks = litellm.completion(**CHAT, **asked, stream=True)
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def too_long() -> str:
    try:
        litellm.completion(**CALLER, max_tokens=100_000)
    except litellm.ContextWindowExceededError as error:
        return type(error).__name__
    return ""


called = litellm.completion(**CALLER, tools=[PLACE], tool_choice="required")
(call,) = called.choices[0].message.tool_calls
structured = litellm.completion(**CALLER, response_format=Order)
tell(
    plain=[
        content(model="openai/pirate", **OPENAI),
        content(model="hosted_vllm/pirate", **OPENAI),
        content(model="anthropic/pirate", api_base=URL, api_key=KEY),
    ],
    streamed=[
        joined(model="openai/pirate", **OPENAI),
        joined(model="hosted_vllm/pirate", **OPENAI),
        joined(model="anthropic/pirate", api_base=URL, api_key=KEY),
    ],
    called=as_call(call.function.name, call.function.arguments),
    structured=Order.model_validate_json(structured.choices[0].message.content).model_dump(),
    too_long=too_long(),
)
