"""What the reader's process is asked, and what it answers.

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
    """A validated adapter: what the engine needs, what people ask (see facts.describe_content),
    what they should know, and its LoRA layers.
    """

    adapter: Adapter
    facts: dict[str, Any]
    warnings: tuple[str, ...] = ()
    layers: tuple[LoraLayerSpec, ...] = ()

    def move_to(self, folder: Path) -> ValidatedAdapter:
        """The same content in another folder."""
        return replace(
            self, adapter=replace(self.adapter, config=str(folder / CONFIG), weights=str(folder / WEIGHTS))
        )


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """Read this folder.

    `known` is the manifest of what was read there before, when it is unchanged: no value is looked
    at again.
    """

    folder: Path
    known: Manifest = ()


@dataclass(frozen=True, slots=True)
class NormsRequest:
    """Say how much each of these layers changes, by the weights of this adapter, if they are still
    those that were read.
    """

    adapter: Adapter
    layers: tuple[LoraLayerSpec, ...]


@dataclass(frozen=True, slots=True)
class Refusal:
    problems: tuple[str, ...]
    extra: dict[str, Any]
    supported: bool

    def to_error(self) -> AdapterInvalid:
        return (AdapterInvalid if self.supported else AdapterUnsupported)(self.problems, **self.extra)
