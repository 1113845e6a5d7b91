"""Checks the files by which an adapter reads and writes text:
at its registration, not at the first request.

Runs in the validator process and the command line. A chat template is parsed as transformers would,
never compiled and never run. Must not know a base.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from ...core.manifest import is_text_name, list_names
from ...engine.lru import LRU
from .header import pointer_hint

LIMIT = 100_000_000  # bytes of a file; the largest vocabularies of today take a third of it
# Names and hashes of files without problems: most of a fleet bring the base's own files
FINE: LRU[tuple[str, str]] = LRU(1024)


def find_problems(folder: Path) -> list[str]:
    """The problems of the tokenizer's files, chat templates and generation_config.json of a folder.

    Raises OSError.
    """
    problems: list[str] = []
    for name in filter(is_text_name, list_names(folder)):
        problems += _file_problems(folder / name)
    return problems


def _file_problems(path: Path) -> list[str]:
    if (size := path.stat().st_size) > LIMIT:
        return [f"{path.name} is {size} bytes; the limit is {LIMIT}"]
    content = path.read_bytes()
    key = (path.name, sha256(content).hexdigest())
    if key in FINE:
        return []
    problems = [f"{path.name} {problem}" for problem in _check_content(path.name, content)]
    if not problems:
        for old in FINE.choose_victims(1) or ():
            FINE.remove_key(old)
        FINE.add_key(key, 1)
    return problems


def _check_content(name: str, content: bytes) -> Iterator[str]:
    if hint := pointer_hint(content):
        yield hint
    elif name == "chat_template.jinja":
        yield from _check_text_template(content)
    elif name.endswith(".json"):
        yield from _check_json(name, content)


def _check_text_template(content: bytes) -> Iterator[str]:
    try:
        yield from check_template(content.decode())
    except UnicodeDecodeError:
        yield "is not UTF-8 text"


def _check_json(name: str, content: bytes) -> Iterator[str]:
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        yield f"is not JSON: {error}"[:200]
        return
    if not isinstance(value, dict):
        yield "is not a JSON object"
    elif name == "tokenizer.json":
        yield from _check_tokenizer(content)
    elif name == "generation_config.json":
        yield from _check_eos(value.get("eos_token_id"))
    else:
        yield from _check_templates(value.get("chat_template"))


def _check_tokenizer(content: bytes) -> Iterator[str]:
    try:
        Tokenizer.from_str(content.decode())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises plain Exceptions, and its panics are not even those
        yield f"is no tokenizer that the tokenizers library can read: {error}"[:300]


def _check_eos(eos: Any) -> Iterator[str]:
    ids = eos if isinstance(eos, list) else [eos]
    if eos is not None and not all(type(id) is int for id in ids):
        yield f"has an `eos_token_id` that is neither a token id nor a list of them: {json.dumps(eos)[:80]}"


def _check_templates(value: Any) -> Iterator[str]:
    """The problems of a chat template, or of a list of named ones."""
    if value is None:
        return
    named = value if isinstance(value, list) else [{"name": "default", "template": value}]
    for entry in named:
        texts = (entry.get("name"), entry.get("template")) if isinstance(entry, dict) else (None,)
        if not all(isinstance(text, str) for text in texts):
            yield (
                "has a `chat_template` that is neither a text nor a list of objects "
                "with the texts `name` and `template`"
            )
            return
        yield from check_template(entry["template"])


class Generation(Extension):
    """The block by which templates mark a model's own text; transformers knows it, Jinja does not."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja has it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
)


def check_template(source: str) -> Iterator[str]:
    """Why Jinja cannot parse it, if it cannot."""
    try:
        ENVIRONMENT.parse(source)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        where = f" (line {line})" if line else ""
        reason = error.message or type(error).__name__
        yield f"has a chat template that cannot be parsed: {reason}{where}"[:300]
    except (RecursionError, ValueError) as error:  # Python reads no number with very many digits
        yield f"has a chat template that cannot be parsed: {type(error).__name__}"
