"""Triton comes with CUDA builds of torch: where the lock's CPU build is installed, its kernels are not tested."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]
