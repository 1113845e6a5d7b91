"""Compares the tensors an adapter's config asks for with those its file holds: the two sets must be
equal.

Runs in the validator process; knows names and shapes only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from ...errors import AdapterInvalid
from .header import TensorInfo

HEAD = "base_model.model."
NAMED = re.compile(r"\.(lora_\w+)\.default(?=\.|$)")
# What a model that sees images puts around the names of its language model
WRAPPER = re.compile(r"\b(?:language_model|text_model)\.")
SHOWN = 4  # problems of one kind that are listed before the rest is counted


def match_tensors(
    expected: Mapping[str, tuple[int, ...]], tensors: Mapping[str, TensorInfo], body: str = "model"
) -> dict[str, str]:
    """The file's key of every expected one, in its plain form or in one of the known spellings.

    `body` is the base's own prefix.

    Raises AdapterInvalid with `matched` and `total`, naming keys, when a tensor is missing, has no
    place, or has another shape.
    """
    spellings = [*_iterate_spellings(tensors, body), _without_wrapper(expected, tensors)]
    fitting = (names for names in spellings if names.keys() == expected.keys())
    spelt = next(fitting, {key: key for key in tensors})
    shapes = {plain: tensors[written].shape for plain, written in spelt.items()}
    wanted, present = expected.keys(), shapes.keys()
    missing, strange = sorted(wanted - present), sorted(present - wanted)
    shared = sorted(wanted & present)
    wrong = [key for key in shared if shapes[key] != expected[key]]
    if not (missing or strange or wrong):
        return spelt
    matched, total = len(shared) - len(wrong), len(wanted | present)
    problems = [f"{matched} of {total} tensors matched the base"]
    problems += _list_keys("the file lacks", missing)
    problems += _list_keys("the base has no place for", strange)
    problems += [_describe_shapes(key, shapes[key], expected[key]) for key in wrong[:SHOWN]]
    raise AdapterInvalid(problems, matched=matched, total=total)


def _describe_shapes(key: str, shape: Sequence[int], needed: Sequence[int]) -> str:
    return f"{key} has the shape {list(shape)}, the base needs {list(needed)}"


def _list_keys(what: str, keys: Sequence[str]) -> list[str]:
    """One problem that names the first of the keys; none where there are no keys."""
    if not keys:
        return []
    hidden = len(keys) - SHOWN
    more = f" (and {hidden} more)" if hidden > 0 else ""
    shown = ", ".join(keys[:SHOWN])
    return [f"{what} {shown}{more}"]


def _without_wrapper(expected: Iterable[str], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Plain name → the file's, where one is of the language model alone and the other of a model
    that has it inside; empty where two of the file's names become one.
    """
    short = {WRAPPER.sub("", name): name for name in expected}
    names = {short.get(WRAPPER.sub("", key), key): key for key in tensors}
    return names if len(names) == len(tensors) else {}


def _iterate_spellings(tensors: Iterable[str], body: str) -> Iterable[dict[str, str]]:
    """Plain name → the file's name, for each way in which trainers are known to write the same
    thing; none that makes two names one.
    """
    keys = list(tensors)
    yield {key: key for key in keys}
    unnamed = [NAMED.sub(r".\1", key) for key in keys]
    bare = [key.removeprefix("module.").removeprefix(HEAD) for key in unnamed]
    for head in (HEAD, f"{HEAD}{body}."):
        names = {head + name: key for name, key in zip(bare, keys, strict=True)}
        if len(names) == len(keys):
            yield names
