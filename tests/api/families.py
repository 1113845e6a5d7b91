"""The chat templates of model families, in short: how each is shown tools, calls and results, what it
refuses, and what its model then writes. Written anew from the families' documented forms.
"""

from __future__ import annotations

from dataclasses import dataclass

from service.text.tool_calls import CallFormat

CALL = '{"name": "add", "arguments": {"a": 1}}'
LLAMA_CALL = '{"name": "add", "parameters": {"a": 1}}'
CALLS = "{% for call in message.tool_calls %}{% set f = call.function %}"


@dataclass(frozen=True)
class Family:
    """`said` is a call as the model writes it, `bound` the one that its grammar allows beside a format; a
    family without a `format` takes no tools.
    """

    template: str
    format: CallFormat | None = None
    said: str = ""
    bound: str = ""


def turns(each: str, calls: str, result: str, ends: str) -> str:
    """The rendering of messages: a call's, a result's, and that of all others."""
    return (
        "{% for message in messages %}{% if message.tool_calls %}" + calls
        + "{% elif message.role == 'tool' %}" + result + "{% else %}" + each + "{% endif %}{% endfor %}"
        + "{% if add_generation_prompt %}" + ends + "{% endif %}"
    )  # fmt: skip


CHATML = "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
CHATML_RESULT = "<|im_start|>user\n<tool_response>\n{{ message.content }}\n</tool_response><|im_end|>\n"
CHATML_TOOLS = (
    "{% if tools %}<|im_start|>system\n<tools>{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}"
    "\n</tools>"
)
HERMES_CALLS = (
    CALLS + '<tool_call>\n{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}<|im_end|>\n"
)
QWEN25 = (
    CHATML_TOOLS + '<tool_call>{"name": <function-name>}</tool_call><|im_end|>\n{% endif %}'
    + turns(CHATML, "<|im_start|>assistant\n" + HERMES_CALLS, CHATML_RESULT, "<|im_start|>assistant\n")
)  # fmt: skip
QWEN3 = (
    CHATML_TOOLS + '<tool_call>{"name": <function-name>}</tool_call><|im_end|>\n{% endif %}'
    + turns(
        CHATML,
        "<|im_start|>assistant\n<think>{{ message.reasoning_content }}</think>" + HERMES_CALLS,
        CHATML_RESULT,
        "<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
    )
)  # fmt: skip
QWEN35 = (
    CHATML_TOOLS + "<tool_call><function=name><parameter=x>1</parameter></function></tool_call>{% endif %}"
    + turns(
        CHATML,
        CALLS + "<tool_call>\n<function={{ f.name }}>\n{% for key, value in f.arguments | items %}"
        "<parameter={{ key }}>\n{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}",
        CHATML_RESULT,
        "<|im_start|>assistant\n<think>\n",
    )
)  # fmt: skip
LLAMA_TURN = (
    "<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n{{ message.content | trim }}<|eot_id|>"
)
LLAMA_CALLS = (
    "{% if message.tool_calls | length != 1 %}{{ raise_exception('only single tool-calls') }}{% endif %}"
    '{% set f = message.tool_calls[0].function %}{"name": "{{ f.name }}", '
    '"parameters": {{ f.arguments | tojson }}}<|eot_id|>'
)
LLAMA_RESULT = "<|start_header_id|>ipython<|end_header_id|>\n\n{{ message.content | tojson }}<|eot_id|>"
LLAMA_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
LLAMA_TOOLS = (
    '{% if tools %}Respond in the format {"name": function name, "parameters": dictionary}.'
    "{% for tool in tools %}{{ tool | tojson }}{% endfor %}{% endif %}"
)
LLAMA = LLAMA_TOOLS + turns(LLAMA_TURN, LLAMA_CALLS, LLAMA_RESULT, LLAMA_OPEN)
MISTRAL = (
    "{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}"
    + turns(
        "{% if message.role == 'user' %}[INST]{{ message.content }}[/INST]{% else %}{{ message.content }}</s>"
        "{% endif %}",
        "[TOOL_CALLS][" + CALLS + "{% if call.id is not defined or call.id | length != 9 %}"
        "{{ raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}{% endif %}"
        '{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}, "id": "{{ call.id }}"}'
        "{% endfor %}]</s>",
        "{% if message.tool_call_id | length != 9 %}{{ raise_exception('no such id') }}{% endif %}"
        '[TOOL_RESULTS]{"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}'
        "[/TOOL_RESULTS]",
        "",
    )
)  # fmt: skip
GEMMA3 = (
    "{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
    "<start_of_turn>{{ 'model' if message.role == 'assistant' else message.role }}\n"
    "{{ message.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI4_MINI = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message %}"
    "<|system|>{{ message['content'] }}<|tool|>{{ message['tools'] }}<|/tool|><|end|>"
    "{% else %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
GPT_OSS = (
    "{% if tools %}<|start|>developer<|message|># Tools\nnamespace functions {% for tool in tools %}"
    "type {{ tool.function.name }} = (_: {{ tool.function.parameters | tojson }}) => any;{% endfor %}<|end|>"
    "{% endif %}"
    + turns(
        "<|start|>{{ message.role }}{{ '<|channel|>final' if message.role == 'assistant' }}<|message|>"
        "{{ message.content }}<|end|>",
        "{% if message.content and message.thinking %}{{ raise_exception('Cannot pass both') }}{% endif %}"
        "{% if message.thinking %}<|start|>assistant<|channel|>analysis<|message|>{{ message.thinking }}"
        "<|end|>{% endif %}{% set f = message.tool_calls[0].function %}<|start|>assistant "
        "to=functions.{{ f.name }}<|channel|>commentary json<|message|>{{ f.arguments | tojson }}<|call|>",
        "<|start|>functions.add to=assistant<|channel|>commentary<|message|>{{ message.content }}<|end|>",
        "<|start|>assistant",
    )
)  # fmt: skip
HARMONY_CALL = (
    "<|channel|>analysis<|message|>Well, one.<|end|><|start|>assistant"
    '<|channel|>commentary to=functions.add <|constrain|>json<|message|>{"a": 1}'
)
XML = "<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n</function>\n</tool_call>"
FRAMED = f"<tool_call>\n{CALL}\n</tool_call>"

FAMILIES = {
    "qwen2.5": Family(QWEN25, CallFormat.HERMES, FRAMED, FRAMED),
    "qwen3": Family(QWEN3, CallFormat.HERMES, FRAMED, FRAMED),
    "qwen3.5": Family(QWEN35, CallFormat.QWEN_XML, f"So.</think>\n\n{XML}", FRAMED),
    "llama3.1": Family(LLAMA + "{# <|python_tag|> #}", CallFormat.LLAMA, f"<|python_tag|>{LLAMA_CALL}", CALL),
    "llama3.2": Family(LLAMA, CallFormat.LLAMA, LLAMA_CALL, CALL),
    "mistral": Family(MISTRAL, CallFormat.MISTRAL, f"[TOOL_CALLS][{CALL}]", f"[TOOL_CALLS][{CALL}]"),
    "gemma3": Family(GEMMA3),
    "phi3": Family(PHI3),
    "phi4-mini": Family(
        PHI4_MINI,
        CallFormat.PHI,
        f"<|tool_call|>[{CALL}]<|/tool_call|>",
        f"<|tool_call|>[{CALL}]<|/tool_call|>",
    ),
    "gpt-oss": Family(GPT_OSS, CallFormat.HARMONY, HARMONY_CALL, CALL),
}
