"""Starts the service, or with nothing behind its door, in odd places: streams, folders, locales."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.bench.servers import free_port

ROOT = Path(__file__).parents[2]
LIMIT_S = 300  # against hangs only
STANDING = (sys.executable, "-m", "tests.standing")
REAL = (sys.executable, "-m", "service")
NEW_PIDS = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc")


def environment(**more: str) -> dict[str, str]:
    """This process's variables, without settings but a base that nobody loads; our modules are found."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ADAPTERD_")}
    return kept | {"ADAPTERD_BASE": "org/none", "PYTHONPATH": str(ROOT)} | more


def run(
    *words: str, program: Sequence[str] = REAL, variables: Mapping[str, str] | None = None, **more: Any
) -> subprocess.CompletedProcess[bytes]:
    """A command to its end, with its output in bytes."""
    return subprocess.run(
        [*program, *words],
        env=environment(**(variables or {})),
        timeout=LIMIT_S,
        check=False,
        **{"cwd": ROOT, "capture_output": True, **more},
    )


def require_command(*words: str) -> None:
    """Skips the test where the system does not let us run this."""
    with suppress(OSError, subprocess.TimeoutExpired):
        if subprocess.run([*words, "true"], capture_output=True, timeout=60, check=False).returncode == 0:
            return
    pytest.skip(f"this system does not let us use {words[0]}")


@dataclass(frozen=True)
class Started:
    process: subprocess.Popen[bytes]
    url: str

    def get(self, path: str, **headers: str) -> httpx.Response:
        return httpx.get(self.url + path, headers=headers, trust_env=False, timeout=60)

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def end(self) -> int:
        """The exit code; a process that does not end is a failure of the test."""
        return self.process.wait(LIMIT_S)


@contextmanager
def serving(
    *flags: str,
    program: Sequence[str] = STANDING,
    variables: Mapping[str, str] | None = None,
    **streams: Any,
) -> Iterator[Started]:
    """A serving process, once it is ready; it is killed at the end of the block."""
    port = free_port()
    options: dict[str, Any] = {
        "cwd": ROOT, "stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL
    } | streams  # fmt: skip
    process = subprocess.Popen(
        [*program, "serve", "--port", str(port), *flags], env=environment(**(variables or {})), **options
    )
    started = Started(process, f"http://127.0.0.1:{port}")
    with process:
        try:
            await_ready(started)
            yield started
        finally:
            process.kill()


def await_ready(started: Started) -> None:
    """Fails where the process ends before it is ready."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        assert started.process.poll() is None, f"it ended with {started.process.returncode}"
        with suppress(httpx.TransportError):
            if started.get("/ready").is_success:
                return
    raise AssertionError("it is not ready")
