"""Every Triton kernel builds for the cards that people have, without spilling a register."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
# Bytes of shared memory that a block may have: A100, L4 and RTX 4090, H100
# Prompts go by torch's attention, which was faster on an H200
SPILLING: dict[int, set[str]] = {80: {"prefill"}, 89: {"prefill"}, 90: set()}
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10}


@pytest.mark.parametrize("architecture", SHARED)
def test_no_kernel_spills(
    architecture: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.model.kernels.triton.builds", str(architecture)]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    built: dict[str, dict[str, int]] = json.loads(ran.stdout)
    record_property("needs", built)
    print("\n".join(f"sm_{architecture} {name}: {needs}" for name, needs in built.items()))
    assert len(built) == 17
    assert {name for name, needs in built.items() if needs["stack"]} <= SPILLING[architecture]
    assert [name for name, needs in built.items() if needs["shared"] > SHARED[architecture]] == []
