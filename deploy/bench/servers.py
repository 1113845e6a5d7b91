"""Starts our server for the benchmark, finds out what any server serves, and weighs its processes.

Knows nothing of load.

A server that runs already is given as NAME=URL, or NAME=URL@PID to be weighed too.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from .load import NUMBERED

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 600, 60


@dataclass(frozen=True)
class Server:
    """Where it listens, and the process whose tree it is (0: not ours to weigh)."""

    name: str
    url: str
    pid: int = 0

    @classmethod
    def parse(cls, text: str) -> Server:
        """Raises ValueError unless it reads NAME=URL or NAME=URL@PID."""
        name, _, rest = text.partition("=")
        url, _, pid = rest.partition("@")
        if not name or not url.startswith("http"):
            raise ValueError(f"{text!r} is not NAME=URL or NAME=URL@PID")
        return cls(name, url.rstrip("/"), int(pid or 0))


def models(server: Server, key: str | None = None) -> tuple[str, list[str]]:
    """The base's id and the adapters' in order; both vLLM and adapterd name an adapter's base as
    its `parent`. llama.cpp's adapters have numbers and are named by them, see `load.address`.
    """
    listed = _get_json(server, "/v1/models", key)["data"]
    base = next(one for one in listed if not one.get("parent"))
    if base.get("owned_by") == "llamacpp":
        return base["id"], [f"{NUMBERED}{one['id']}" for one in _get_json(server, "/lora-adapters", key)]
    return base["id"], sorted(one["id"] for one in listed if one.get("parent"))


def _get_json(server: Server, path: str, key: str | None) -> Any:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    answer = httpx.get(server.url + path, headers=headers, timeout=60, trust_env=False)
    return answer.raise_for_status().json()


def memory_mb(pid: int) -> float:
    """What the process and its children hold, pages shared among them counted once (PSS), in 10^6
    bytes; 0 for no process.
    """
    if not pid:
        return 0.0
    root = psutil.Process(pid)
    return float(sum(one.memory_full_info().pss for one in [root, *root.children(recursive=True)])) / 1e6


def free_port() -> int:
    """A port of loopback that the system gives to nobody who asks for any, for a minute.

    One connection to it is closed from its end, and is remembered that long. A server that asks for
    this port gets it.
    """
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = int(held.getsockname()[1])
        with socket.create_connection(("127.0.0.1", port)):
            held.accept()[0].close()
    return port


def await_ready(server: Server, process: subprocess.Popen[bytes], log: Path) -> None:
    """Raises RuntimeError when the process ends, or is not ready in time."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RuntimeError(f"{server.name} ended with {process.returncode}:\n{_read_end(log)}")
        try:
            if httpx.get(server.url + "/ready", timeout=5, trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise RuntimeError(f"{server.name} is not ready after {START_S} s:\n{_read_end(log)}")


def _read_end(log: Path) -> str:
    return log.read_text(encoding="utf-8")[-2000:]


def stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_cleanly_when_told() -> None:
    """SIGTERM ends the program as an exception does, so that the servers it started are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


@contextmanager
def started(
    settings: Mapping[str, str],
    log: Path,
    name: str = "adapterd",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Our server on a free port of loopback, ready, until the block ends.

    `settings` are named without their prefix.
    """
    port = free_port()
    clean = {key: value for key, value in os.environ.items() if not key.startswith("ADAPTERD_")}
    ours = {f"ADAPTERD_{key.upper()}": value for key, value in {**settings, "port": str(port)}.items()}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as out:
        whole = {**clean, **ours, **(environment or {})}
        process = subprocess.Popen(
            [sys.executable, "-m", "service", "serve"], cwd=ROOT, env=whole, stdout=out, stderr=out
        )
    server = Server(name, f"http://127.0.0.1:{port}", process.pid)
    try:
        await_ready(server, process, log)
        yield server
    finally:
        stop(process)
