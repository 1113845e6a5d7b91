"""The known ways to write calls, and which of them a chat template teaches its model; API process."""

from __future__ import annotations

from enum import StrEnum


class CallFormat(StrEnum):
    """The value is what `tool_call_format` in a tokenizer_config.json says."""

    HERMES = "hermes"  # Hermes, Qwen: <tool_call>{"name", "arguments"}</tool_call>, any number
    QWEN_XML = (
        "qwen_xml"  # Qwen3-Coder: <tool_call><function=NAME><parameter=KEY>VALUE</parameter></function>
    )
    MISTRAL = "mistral"  # [TOOL_CALLS][{"name", "arguments"}, ...], or [TOOL_CALLS]NAME[ARGS]{...}
    LLAMA = "llama"  # Llama 3: {"name", "parameters"}, also behind <|python_tag|>, or as PYTHONIC
    PYTHONIC = "pythonic"  # [NAME(KEY="VALUE"), ...]
    PHI = "phi"  # Phi-4-mini: <|tool_call|>[{"name", "arguments"}, ...]<|/tool_call|>, or functools[...]
    HARMONY = "harmony"  # gpt-oss: channels of thought, calls and content; see harmony.py


# What begins calls within a text
MARKERS: dict[CallFormat, tuple[str, ...]] = {
    CallFormat.HERMES: ("<tool_call>",),
    CallFormat.QWEN_XML: ("<tool_call>", "<function="),
    CallFormat.MISTRAL: ("[TOOL_CALLS]",),
    CallFormat.LLAMA: ("<|python_tag|>",),
    CallFormat.PYTHONIC: ("<|python_tag|>",),
    CallFormat.PHI: ("<|tool_call|>", "functools["),
    CallFormat.HARMONY: (),
}
ARGUMENTS, CALL_ID = "[ARGS]", "[CALL_ID]"
# What may stand between calls, and is no content
SEPARATORS = (
    "<tool_call>",
    "</tool_call>",
    "[TOOL_CALLS]",
    "<|python_tag|>",
    "<|tool_call|>",
    "<|/tool_call|>",
    "functools[",
)
START, CHANNEL, CONSTRAIN, MESSAGE = "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")  # of a message in one of harmony's channels
HARMONY_TEXTS = (START, CHANNEL, CONSTRAIN, MESSAGE, *ENDS)
# Texts that a tokenizer may have as special tokens, and that must stay in the text to be found there
SPECIAL_TEXTS = (*SEPARATORS, ARGUMENTS, CALL_ID)
# A format, and words that a template has which teaches it; the first that fits counts
TAUGHT = (
    (CallFormat.QWEN_XML, ("<function=", "<parameter=")),
    (CallFormat.HERMES, ("<tool_call>",)),
    (CallFormat.HARMONY, (CHANNEL, MESSAGE)),
    (CallFormat.PHI, ("<|tool|>",)),
    (CallFormat.PHI, ("<|tool_call|>",)),
    (CallFormat.MISTRAL, ("[TOOL_CALLS]",)),
    (CallFormat.LLAMA, ("<|python_tag|>",)),
    (CallFormat.PYTHONIC, ("func_name1(",)),
    (CallFormat.LLAMA, ('{"name": ', '"parameters": ')),
)


def special_texts(format: CallFormat) -> tuple[str, ...]:
    """The texts of this form that may be special tokens."""
    return HARMONY_TEXTS if format is CallFormat.HARMONY else SPECIAL_TEXTS


def declared_format(template: str) -> CallFormat | None:
    """The format of calls that a chat template teaches its model, if it is a known one."""
    fits = (format for format, words in TAUGHT if all(word in template for word in words))
    return next(fits, None)
