"""Why a schema, an expression or a grammar cannot be compiled, in our words, and at which place of it.

API process; must not know HTTP.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from .schema_edits import Place, Schema, child_schemas

Steps = tuple[Place, ...]  # from a schema to one within it

SEARCH_S = 1.0  # of processor time, to find the place
MAX_COMPLAINT = 300  # characters of the compiler's complaint
TOO_LONG = "it takes too long to compile"
TOO_LARGE = "it is too large to be followed, or never ends"
CANNOT = "it cannot be compiled"
# The compiler's complaints, each with ours
REASONS: tuple[tuple[str, str], ...] = (
    (r'Unimplemented keys: \["([^"]+)"', r"`\1` is not served in a schema"),
    (r"Invalid type: (.+)", r"there is no type \1"),
    (
        r"oneOf constraints are not supported",
        "its `oneOf` is served only where no value fits two of its parts",
    ),
    (r"Unsatisfiable schema: (.+)", r"nothing can meet it: \1"),
    (r"(?:parser|lexer) error", TOO_LARGE),
    (TOO_LONG, TOO_LONG),
    (r"too deeply nested", "it is nested too deep"),
)


def describe_complaint(complaint: str) -> str:
    """The complaint on one line, without the library's own words."""
    if "regex parse error" in complaint:
        return f"the expression cannot be read: {_last_error(complaint)}"[:MAX_COMPLAINT]
    for pattern, reason in REASONS:
        found = re.search(pattern, complaint)
        if found:
            return " ".join(found.expand(reason).split())[:MAX_COMPLAINT]
    return CANNOT


def _last_error(complaint: str) -> str:
    """The line that says what the picture above it shows."""
    errors = re.findall(r"^error: (.+)$", complaint, re.M)
    return errors[-1].strip() if errors else "it is no regular expression"


def find_fault(schema: Schema, complaint: str, complain: Callable[[Schema], str]) -> Steps:
    """The place of the smallest part that is complained of as the whole schema is."""
    steps: Steps = ()
    until = time.thread_time() + SEARCH_S
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
    part = schema
    while True:
        inner = _find_inner(part, complaint, lambda child: complain(child | shared), until)
        if inner is None:
            return steps
        steps, part = (*steps, inner[0]), inner[1]


def _find_inner(
    schema: Schema, complaint: str, complain: Callable[[Schema], str], until: float
) -> tuple[Place, Schema] | None:
    for place, inner in child_schemas(schema):
        if time.thread_time() > until:
            return None
        if _drop_place(complain(inner)) == _drop_place(complaint):
            return place, inner
    return None


def _drop_place(complaint: str) -> str:
    """The complaint without the references on the way to what it is about."""
    return re.sub(r"\n\s*while processing .*", "", complaint)


def name_place(steps: Steps) -> str:
    """The place as a reader of the schema names it: properties by their names alone."""
    parts = [part for key, *name in steps for part in (name if key == "properties" else (key, *name))]
    return ".".join(map(str, parts))[:MAX_COMPLAINT]
