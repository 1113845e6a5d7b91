"""What the CPU can do for the kernels; runs in the worker process."""

from __future__ import annotations

import shutil

import torch


def has_vectors() -> bool:
    """Whether the processor has the vectors that the CPU kernels need: AVX2 with FMA, AVX-512, NEON."""
    return name_vectors() not in ("DEFAULT", "NO AVX")


def name_vectors() -> str:
    """The processor's vectors, such as AVX2."""
    return str(torch.backends.cpu.get_cpu_capability())


def find_compiler() -> str | None:
    """The C++ compiler that builds the kernels; None where none is installed."""
    return shutil.which("g++") or shutil.which("c++")
