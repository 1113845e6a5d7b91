"""Triton comes with CUDA builds of torch: beside a CPU build its kernels are not tested."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
