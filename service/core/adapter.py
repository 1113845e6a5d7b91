"""Describes validated adapter content, the tier it is in and the rank rows it holds; in every
process.

Frozen values only; must not know files' meaning or names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

from .manifest import Manifest

Digest = str


@dataclass(frozen=True, slots=True)
class LoraLayerSpec:
    """One adapted linear layer: y += scaling · (x Aᵀ) Bᵀ with A [rank, in], B [out, rank]; with
    `magnitude` [out], DoRA's gate on top.

    `module` is the layer's dotted name in the base; `a`, `b`, `magnitude` are tensor names in the
    weights file. A parameter of `experts` experts has the factors of each: A [experts · rank, in], expert
    by expert, B [out, rank · experts], rank by rank.
    """

    module: str
    rank: int
    scaling: float
    a: str
    b: str
    magnitude: str | None = None
    experts: int = 1


@lru_cache(maxsize=64)
def share_specs(patches: tuple[LoraLayerSpec, ...]) -> tuple[LoraLayerSpec, ...]:
    """The first equal tuple: a thousand adapters of one recipe keep one list of layers."""
    return patches


class ExecutionPath(StrEnum):
    POOL = "pool"  # runs in the mixed batch, from the rank pool
    SHADOW = "shadow"  # runs by PEFT itself, on a tree that shares the base's tensors


@dataclass(frozen=True, slots=True)
class Adapter:
    """Validated content, as the worker needs it.

    `rank` is its largest; 0 on the PEFT path.

    `config` and `weights` are the paths of the two files that the worker reads, `files` all that
    the digest covers; `size` is the bytes of its tensors in host memory. `invocation`: the tokens
    that wake an activated LoRA; what comes before their last occurrence in a prompt runs as the
    base, and all of it where they do not occur. A mix has `parts`, and no files of its own.
    """

    digest: Digest
    config: str
    weights: str
    lane: ExecutionPath
    rank: int
    size: int
    patches: tuple[LoraLayerSpec, ...] = ()
    invocation: tuple[int, ...] = ()
    files: Manifest = ()
    parts: tuple[WeightedPart, ...] = ()

    @property
    def pool_rows(self) -> int:
        """The pool rows it takes: as many as its rank, and with DoRA a last one, for the gate."""
        return self.rank + any(spec.magnitude for spec in self.patches)

    @property
    def is_on_experts(self) -> bool:
        """Whether a mixture's experts are adapted, by factors that steps read where the host has them."""
        own = any(spec.experts > 1 for spec in self.patches)
        return own or any(part.adapter.is_on_experts for part in self.parts)


@dataclass(frozen=True, slots=True)
class WeightedPart:
    """One adapter of a mix: its change of every layer counts `weight` times."""

    adapter: Adapter
    weight: float


@dataclass(frozen=True, slots=True)
class Placement:
    """Pool rows [start, start + rank) now hold this adapter."""

    digest: Digest
    start: int
    rank: int


class Tier(StrEnum):
    DEVICE = "device"
    HOST = "host"
    DISK = "disk"
