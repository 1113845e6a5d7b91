"""What the CPU can do for the kernels; runs in the worker process."""

from __future__ import annotations

import shutil

import torch


def has_vectors() -> bool:
    """Whether the processor has the vectors that the CPU kernels need: AVX2 with FMA, AVX-512, NEON."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX")


def find_compiler() -> str | None:
    """The C++ compiler that builds the kernels; None where none is installed."""
    return shutil.which("g++") or shutil.which("c++")
