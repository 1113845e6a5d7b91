"""anthropic, as it is: a message, its stream, a tool, an output of a type, tokens counted."""

from __future__ import annotations

import anthropic
from given import BRIEFLY, CACTUS, KEY, SPOKEN_ORDER, URL, Order, as_call, tell

GREEDY = {"temperature": 0}
CHAT = {"model": "pirate", "max_tokens": BRIEFLY, "messages": [{"role": "user", "content": CACTUS}]}
ORDERED = {"model": "caller", "max_tokens": 80, "messages": [{"role": "user", "content": SPOKEN_ORDER}]}
PLACE = {"name": "place_order", "input_schema": Order.model_json_schema()}
CALLS = {**ORDERED, "tools": [PLACE], "tool_choice": {"type": "any"}, "extra_body": GREEDY}
client = anthropic.Anthropic(base_url=URL, api_key=KEY)


def used(message: anthropic.types.Message) -> dict[str, object]:
    (block,) = message.content
    return as_call(block.name, block.input)


with client.messages.stream(**CHAT, extra_body=GREEDY) as stream:
    streamed = "".join(stream.text_stream)
with client.messages.stream(**CALLS) as stream:
    pieces = [event.partial_json for event in stream if event.type == "input_json"]
    streamed_call = used(stream.get_final_message())
tell(
    plain=client.messages.create(**CHAT, extra_body=GREEDY).content[0].text,
    streamed=streamed,
    called=used(client.messages.create(**CALLS)),
    streamed_call=streamed_call,
    pieces=len(pieces),
    structured=client.messages.parse(
        **ORDERED, extra_body=GREEDY, output_format=Order
    ).parsed_output.model_dump(),
    counted=client.messages.count_tokens(model="pirate", messages=CHAT["messages"]).input_tokens,
)
