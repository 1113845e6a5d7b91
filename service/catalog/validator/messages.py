"""Defines the messages between the API process and the validator process.

Values only; must not know processes, PEFT or torch.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...core.adapter import Adapter, LoraLayerSpec
from ...core.manifest import Manifest
from ...errors import AdapterInvalid, AdapterUnsupported
from .header import CONFIG, WEIGHTS


@dataclass(frozen=True, slots=True)
class ValidatedAdapter:
    """A validated adapter: the engine's part, its facts (see facts.describe_content), warnings for
    people, and its LoRA layers.
    """

    adapter: Adapter
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()
    layers: tuple[LoraLayerSpec, ...] = ()

    def move_to(self, folder: Path) -> ValidatedAdapter:
        """The same content in another folder."""
        config, weights = str(folder / CONFIG), str(folder / WEIGHTS)
        return replace(self, adapter=replace(self.adapter, config=config, weights=weights))


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Validate the adapter in this folder.

    `known` is the manifest of the files that were validated there before, when they are unchanged: no
    value is looked at again.
    """

    folder: Path
    known: Manifest = ()


@dataclass(frozen=True, slots=True)
class NormsRequest:
    """Measure how much each of these layers changes, by the weights of this adapter, if they are still
    those that were validated.
    """

    adapter: Adapter
    layers: tuple[LoraLayerSpec, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    problems: tuple[str, ...]
    extra: dict[str, Any]
    supported: bool

    def to_error(self) -> AdapterInvalid:
        kind = AdapterInvalid if self.supported else AdapterUnsupported
        return kind(self.problems, **self.extra)
