"""The process that renders adapters' chat templates: `python -m service.text.template_process FD FORM LEVEL`.

The API process imports it too, for the messages between the two and to render the base's own
template by the same code. An adapter's template is a program that nobody here wrote: this process limits
its processor time, memory and characters. Must not know tokenizers or HTTP.
"""

from __future__ import annotations

import contextlib
import gc
import json
import resource
import signal
import sys
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from ..child_process import be_the_first_to_go, settle_child

CPU_S = 2.0  # of processor time, so that a busy machine refuses nobody
MEMORY_MB = 512
WORN_MB = 64  # that may stay taken after a rendering
REASON = 500  # characters of a template's own words that are passed on


@dataclass(frozen=True, slots=True)
class RenderRequest:
    """A conversation to render, as plain data.

    `variables` are the special tokens' texts and a request's own; `limit` is the most characters that the
    text may have; the others are as in TemplateOptions.
    """

    template: str
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]
    limit: int
    opens_turn: bool = True
    continues: bool = False


@dataclass(frozen=True, slots=True)
class Rendering:
    """The text, or None and why there is none.

    `seconds` is the processor time it took; `worn`: the process has grown and should be replaced.
    """

    text: str | None
    reason: str = ""
    seconds: float = 0.0
    worn: bool = False


def render_template(request: RenderRequest) -> str:
    """The text that transformers' `apply_chat_template` gives.

    Raises whatever the template raises.
    """
    if not request.messages:
        raise ValueError("the conversation is empty")
    rendered, _ = render_jinja_template(
        conversations=[[_drop_nulls(message) for message in request.messages]],
        tools=request.tools,
        chat_template=request.template,
        add_generation_prompt=request.opens_turn,
        continue_final_message=request.continues,
        **request.variables,
    )
    text: str = rendered[0]
    return text


def _drop_nulls(message: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in message.items() if value is not None}


def describe_refusal(error: Exception) -> str:
    """Why there is no text, in the template's own words as far as they are few."""
    return f"refuses them: {str(error)[:REASON]}"


def main(descriptor: str, form: str, level: str) -> None:
    settle_child(form, level)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process
    be_the_first_to_go()
    fresh = _address_space()
    if fresh:
        resource.setrlimit(resource.RLIMIT_AS, (fresh + MEMORY_MB * 10**6,) * 2)
    with (
        Connection(int(descriptor)) as pipe,
        contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError),
    ):
        pipe.send_bytes(b"")  # it has begun
        while True:
            pipe.send_bytes(_answer_request(pipe.recv(), fresh + WORN_MB * 10**6))


def _answer_request(request: RenderRequest, roomy: int) -> bytes:
    """A Rendering as JSON, since the parent must not unpickle what comes from here."""
    began = time.process_time()
    signal.setitimer(signal.ITIMER_PROF, CPU_S)
    text, reason = _try_render(request)
    signal.setitimer(signal.ITIMER_PROF, 0)
    seconds = time.process_time() - began
    if _address_space() > roomy:
        gc.collect()
    rendering = Rendering(text, reason, seconds, worn=_address_space() > roomy)
    return json.dumps(asdict(rendering)).encode()


def _try_render(request: RenderRequest) -> tuple[str | None, str]:
    try:
        text = render_template(request)
    except MemoryError:
        return None, f"needs more than {MEMORY_MB} MB of memory"
    except Exception as error:  # a template may raise anything
        return None, describe_refusal(error)
    if len(text) > request.limit:
        return None, f"makes {len(text)} characters of them; {request.limit} are the most"
    return text, ""


def _address_space() -> int:
    """Its size in bytes, 0 where the system does not have it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    except OSError:
        return 0


if __name__ == "__main__":
    main(*sys.argv[1:])
