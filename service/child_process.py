"""The first calls of every process that the API process starts.

Runs in the worker and the template process; must not know the rest of them.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import sys
from pathlib import Path

SET_PDEATHSIG = 1
OOM_SCORE = "500"  # of 1000, on top of what it uses


def die_with_parent() -> None:
    """On Linux the kernel kills this process when its parent dies, or the parent's thread that started
    it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)


def be_the_first_to_go() -> None:
    """Where memory runs out Linux kills this process before the API process, which can start another."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE)
