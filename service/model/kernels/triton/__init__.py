"""The GPU kernels, written in Triton: attention over blocks of KV, grouped LoRA and the NF4 product.

Triton comes with every CUDA build of torch and with no CPU build: nothing here imports it until a
kernel is asked for. Runs in the worker process; must not know adapters' files, requests or
scheduling.
"""

from __future__ import annotations

import importlib

OLDEST = 3, 6  # what CUDA builds of torch 2.11 bring


def explain_absence() -> str | None:
    """Why the kernels cannot be used here; None where they can."""
    try:
        triton = importlib.import_module("triton")
    except ImportError as error:
        return f"Triton cannot be imported ({error}); it comes with CUDA builds of torch"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton {triton.__version__} is older than {'.'.join(map(str, OLDEST))}"
    return None
