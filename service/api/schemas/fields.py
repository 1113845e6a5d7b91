"""Of which kind each field of the OpenAI dialect is, and what it does: docs/clients.md has these tables.

Any other field is refused by name. API process; must not know a route.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple


class FieldKind(StrEnum):
    HONOURED = "honoured"
    LABEL = "label"  # taken and ignored
    NO_OP = "no-op"  # one value changes nothing and is taken; others are refused


class FieldRow(NamedTuple):
    """A row of a table; `names` are parted by spaces."""

    names: str
    kind: FieldKind
    default: str
    meaning: str


_HONOURED, _LABEL, _NO_OP = FieldKind

BOTH = (
    FieldRow("model", _HONOURED, "required", "see [names](#names)"),
    FieldRow(
        "stream stream_options",
        _HONOURED,
        "false",
        '`{"include_usage": true}` adds a last chunk with `usage`, `{"continuous_usage_stats": true}` '
        'puts it into every chunk; `{"include_obfuscation": false}` is a no-op',
    ),
    FieldRow(
        "temperature top_p top_k min_p",
        _HONOURED,
        "1, off, off, off",
        "0 to 2; a temperature or a `top_p` of 0 is greedy",
    ),
    FieldRow(
        "n",
        _HONOURED,
        "1",
        "up to 128 answers in a request, prompts counted in; the prompt counts once in `usage`",
    ),
    FieldRow(
        "stop seed",
        _HONOURED,
        "none, random",
        "as above; `stop` may be one string, and a `seed` of -1 is none",
    ),
    FieldRow("stop_token_ids", _HONOURED, "none", "up to 128 ids that end the answer as an end token does"),
    FieldRow(
        "include_stop_str_in_output", _HONOURED, "false", "the text ends with the stop string or stop token"
    ),
    FieldRow("skip_special_tokens", _HONOURED, "true", "false: special tokens within the answer are text"),
    FieldRow(
        "bad_words",
        _HONOURED,
        "none",
        "up to 128 words that the answer does not hold, also behind a space, as vLLM bans them; a grammar "
        "that allows nothing else wins",
    ),
    FieldRow("presence_penalty frequency_penalty repetition_penalty", _HONOURED, "off", "as above"),
    FieldRow("logit_bias", _HONOURED, "none", "up to 1,024 token ids, each -100 to 100"),
    FieldRow(
        "response_format structured_outputs guided_json guided_regex guided_choice guided_grammar",
        _HONOURED,
        "none",
        "one of them; see [structured output](#structured-output)",
    ),
    FieldRow(
        "ignore_eos min_tokens",
        _HONOURED,
        "false, 0",
        "go on past an end token; no end token and no stop string before so many tokens",
    ),
    FieldRow(
        "prompt_logprobs",
        _HONOURED,
        "none",
        "a choice carries the prompt's tokens with log probabilities and up to 20 runner-ups, in vLLM's "
        "shape; not in a stream",
    ),
    FieldRow(
        "return_token_ids",
        _HONOURED,
        "false",
        "`token_ids` of each choice, in a stream of each chunk; `prompt_token_ids` in each choice of "
        "completions, on top of a chat, in a stream with the first chunk",
    ),
    FieldRow(
        "priority",
        _HONOURED,
        "0",
        "of the requests that wait the one with the lowest number is next; see [priorities](#priorities)",
    ),
    FieldRow(
        "adapters",
        _HONOURED,
        "none",
        "beside a `model` that is the base; see "
        "[several adapters in one request](#several-adapters-in-one-request)",
    ),
    FieldRow(
        "user",
        _HONOURED,
        "none",
        "the caller, whom an [alias](#aliases) may know again; any value is taken, and only a text is one",
    ),
    FieldRow(
        "store metadata service_tier prompt_cache_key prompt_cache_retention safety_identifier verbosity",
        _LABEL,
        "none",
        "taken and ignored",
    ),
    FieldRow("modalities", _NO_OP, '`["text"]`', "no other"),
    FieldRow("audio prediction suffix", _NO_OP, "null", "no other"),
    FieldRow("best_of", _NO_OP, "1", "no other"),
)
COMPLETIONS = (
    FieldRow(
        "prompt", _HONOURED, "required", "a text, up to 128 texts, token ids, or up to 128 lists of them"
    ),
    FieldRow("max_tokens", _HONOURED, "16", "0 with `echo` scores the prompt; -1 is none"),
    FieldRow(
        "logprobs", _HONOURED, "none", "up to 20 runner-ups of each token; true: of the chosen tokens alone"
    ),
    FieldRow(
        "echo", _HONOURED, "false", "the prompt before the text, and its tokens among the log probabilities"
    ),
    FieldRow("parallel_tool_calls", _NO_OP, "true", "no other"),
)
CHAT = (
    FieldRow("messages", _HONOURED, "required", "see [messages](#messages)"),
    FieldRow(
        "max_tokens max_completion_tokens",
        _HONOURED,
        "what the context leaves",
        "one of them, or both alike; -1 is none",
    ),
    FieldRow("logprobs top_logprobs", _HONOURED, "false, 0", "up to 20 runner-ups"),
    FieldRow("tools tool_choice parallel_tool_calls", _HONOURED, "none, `auto`, true", "see [tools](#tools)"),
    FieldRow(
        "chat_template_kwargs reasoning_effort",
        _HONOURED,
        "none",
        'variables of the template, such as `{"enable_thinking": false}`; never its messages, tools or '
        "special tokens",
    ),
    FieldRow(
        "add_generation_prompt",
        _HONOURED,
        "true",
        "false: the prompt ends with the last message, and no assistant's turn is begun",
    ),
    FieldRow(
        "continue_final_message",
        _HONOURED,
        "false",
        "the answer goes on with the last message, which stays open",
    ),
)
MESSAGE = (
    FieldRow(
        "role",
        _HONOURED,
        "required",
        "`system`, `developer`, `user`, `assistant`, `tool` or `function`",
    ),
    FieldRow(
        "content",
        _HONOURED,
        "required",
        "a text or a list of text parts; an assistant's may be null or left out",
    ),
    FieldRow("name tool_call_id tool_calls", _HONOURED, "none", "see [tools](#tools)"),
    FieldRow(
        "reasoning_content reasoning",
        _HONOURED,
        "none",
        "what the assistant thought, for a template that reads it",
    ),
    FieldRow(
        "id refusal annotations provider_specific_fields cache_control",
        _LABEL,
        "none",
        "taken and ignored; `cache_control` also in a part and in a tool",
    ),
    FieldRow("audio function_call", _NO_OP, "null", "no other"),
)
TABLES = {"both": BOTH, "completions": COMPLETIONS, "chat": CHAT, "a message": MESSAGE}


def render_table(title: str, rows: Sequence[FieldRow]) -> str:
    """The table as Markdown, without a line's end behind the last row."""
    lines = [f"| field of {title} | kind | default | meaning |", "|---|---|---|---|"]
    for row in rows:
        names = ", ".join(f"`{name}`" for name in row.names.split())
        lines.append(f"| {names} | {row.kind} | {row.default} | {row.meaning} |")
    return "\n".join(lines)
