"""Usage of the whole program: exact over workers that die, a restart and a full disk."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.bench.servers import started
from service.telemetry.usage import FILE
from tests import making

from .places import fill, make_room, mounted

SETTINGS = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off", "kv_mb": "50"}
SAID = "usage stays in memory until it can be written"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.tiny(tmp_path / "base")


@contextmanager
def serving(base: Path, folder: Path, log: Path, **more: str) -> Iterator[httpx.Client]:
    settings = SETTINGS | {"base": str(base), "adapters_dir": str(folder)} | more
    with (
        started(settings, log) as server,
        httpx.Client(base_url=server.url, timeout=300, trust_env=False) as http,
    ):
        yield http


def generate(http: httpx.Client, tokens: int) -> int:
    """The status, once the service serves again."""
    parameters = {"max_new_tokens": tokens, "ignore_eos_token": True}
    while True:
        answer = http.post("/generate", json={"inputs": "Hi", "parameters": parameters})
        if answer.status_code != 503 or "not ready" not in answer.text:
            return answer.status_code
        time.sleep(0.1)


def used(http: httpx.Client) -> dict[str, Any]:
    (row,) = http.get("/usage").json()["usage"]
    return {name: row[name] for name in ("requests", "generated_tokens", "failures")}


def test_usage_is_exact_over_a_worker_that_dies_and_a_restart(base: Path, tmp_path: Path) -> None:
    (tmp_path / "adapters").mkdir()
    with serving(base, tmp_path / "adapters", tmp_path / "log", faults="kill:4") as http:
        assert [generate(http, tokens) for tokens in (2, 6, 3)] == [200, 503, 200], (
            "the second meets the fault"
        )
        wanted = {"requests": 3, "generated_tokens": 2 + 3 + 3, "failures": 1}
        assert used(http) == wanted
    with serving(base, tmp_path / "adapters", tmp_path / "log") as http:
        assert used(http) == wanted
        assert generate(http, 5) == 200
        assert used(http) == {"requests": 4, "generated_tokens": 13, "failures": 1}


def test_on_a_full_disk_requests_are_served_and_their_usage_waits_in_memory(
    base: Path, tmp_path: Path
) -> None:
    with mounted("size=1m") as disk:
        with serving(base, disk, tmp_path / "log") as http:
            fill(disk)
            assert [generate(http, 2) for _ in range(3)] == [200] * 3
            assert used(http) == {"requests": 3, "generated_tokens": 6, "failures": 0}
            time.sleep(1.5)
            assert (tmp_path / "log").read_text().count(SAID) == 1
            make_room(disk)
        assert (disk / FILE).exists()
        with serving(base, disk, tmp_path / "log") as http:
            assert used(http) == {"requests": 3, "generated_tokens": 6, "failures": 0}
