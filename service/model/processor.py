"""What the CPU can do for the kernels; runs in the worker process."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch

from ..errors import SettingsError

Vectors = Literal["auto", "avx2", "avx512", "avx512_bf16"]
# Flags of the compiler, and the features that the processor must name
VARIANTS: Mapping[Vectors, tuple[tuple[str, ...], frozenset[str]]] = {
    "auto": (("-march=native",), frozenset()),
    "avx2": (("-march=x86-64-v3",), frozenset({"avx2", "fma", "f16c"})),
    "avx512": (("-march=x86-64-v4",), frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})),
    "avx512_bf16": (("-march=x86-64-v4", "-mavx512bf16"), frozenset({"avx512_bf16"})),
}


def has_vectors() -> bool:
    """Whether the processor has the vectors that the CPU kernels need: AVX2 with FMA, AVX-512, NEON."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def name_vectors(chosen: Vectors = "auto") -> str:
    """The vectors that are used, such as AVX2."""
    if chosen != "auto":
        return chosen.upper()
    able = [name for name in VARIANTS if name != "auto" and can_run(name)]
    return able[-1].upper() if able else str(torch.backends.cpu.get_cpu_capability())


def can_run(vectors: Vectors) -> bool:
    """Whether the processor names all features that the kernels for these vectors use."""
    return VARIANTS[vectors][1] <= list_features()


def list_features() -> frozenset[str]:
    """What an x86 processor says it can do; nothing where the system does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


def list_vector_flags(vectors: Vectors) -> tuple[str, ...]:
    """The compiler's flags for these vectors.

    Raises SettingsError where the processor lacks them.
    """
    if not can_run(vectors):
        raise SettingsError(f"ADAPTERD_KERNELS: this processor has no {vectors}")
    return VARIANTS[vectors][0]


def find_compiler() -> str | None:
    """The C++ compiler that builds the kernels; None where none is installed."""
    return shutil.which("g++") or shutil.which("c++")
