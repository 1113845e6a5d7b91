"""Finds a base's attention, its layers with states and how it calls its linear layers, by running a few
tokens instead of knowing its architecture.

In the worker process, and on the meta device in that of `plan`. Must not know settings or adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from . import kv, states
from .linear_calls import LinearCalls, recorded_calls
from .text_part import recorded_modules, release_other_parts


class ProbedLayers(NamedTuple):
    """What forwards through a base have shown."""

    attention: Sequence[kv.AttentionSpec]
    stateful: Sequence[states.StateSpec]
    calls: LinearCalls


def probe_layers(model: Any) -> ProbedLayers:
    """Also lets go of what is beside its text part. Raises SettingsError where it cannot be served."""
    stateful = states.probe_states(model)
    with recorded_calls(model) as recorder, recorded_modules(model) as called:
        attention = kv.probe_attention(model, has_states=bool(stateful))
    heads, limits = recorder.result()
    limits += release_other_parts(model, called)
    return ProbedLayers(attention, stateful, LinearCalls(heads, limits))
