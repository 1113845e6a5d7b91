"""Starts the processes below the API process, and makes their first calls.

Runs in the API process and in its children: worker, validator and template processes. Must not know what
they do.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from .process_start import STOP_SIGNALS, open_lossy
from .telemetry import logs

SET_PDEATHSIG = 1
OOM_SCORE = "500"  # of 1000, on top of what it uses
# No library may write a progress bar, or that it would like to have torch
QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
# Nothing is compiled by torch; bitsandbytes would load its compiler for functions that never run here
LIGHT = {"TORCHDYNAMO_DISABLE": "1"}


def start_child(
    module: str, pipe_end: Connection, *arguments: str, environment: Mapping[str, str]
) -> subprocess.Popen[bytes]:
    """Starts a module of ours with its end of a pipe. Raises OSError where the system has no more.

    It finds the modules that this process finds, and none in the working directory. Its main function gets
    the pipe's descriptor, how to log, and the arguments.
    """
    descriptor = pipe_end.fileno()
    program = [sys.executable, "-P", "-X", "utf8", "-m", module]
    command = [*program, str(descriptor), *logs.current_style(), *arguments]
    own = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)} | QUIET | LIGHT
    return subprocess.Popen(
        command,
        pass_fds=(descriptor,),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**environment, **own},
    )


def settle_child(form: str, level: str) -> None:
    """A child's first call: it logs as its parent does, ends when that does, and leaves signals to it."""
    sys.stderr = open_lossy(2)
    logs.set_up_logging(form, level)
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()


def die_with_parent() -> None:
    """On Linux the kernel kills this process when its parent dies, or the parent's thread that started
    it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(SET_PDEATHSIG, signal.SIGKILL)


def be_the_first_to_go() -> None:
    """Where memory runs out Linux kills this process before the API process, which can start another."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(OOM_SCORE, encoding="utf-8")
