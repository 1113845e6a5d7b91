"""Two services over one directory, one of which is killed while it registers: the other goes on at once, and
a third finds what the answers said.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deploy.bench.servers import started
from tests import making

SETTINGS = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off", "shared": "on"}
FOLLOWED_S = 2.0


class SharingService:
    def __init__(self, http: httpx.Client, pid: int) -> None:
        self.http, self.pid = http, pid

    def register(self, id: str, source: str) -> int:
        return self.http.post("/adapters", json={"id": id, "source": source, "preload": False}).status_code

    def list_digests(self) -> dict[str, str]:
        return {card["id"]: card["digest"] for card in self.http.get("/adapters").json()["adapters"]}

    def kill(self) -> None:
        with suppress(psutil.NoSuchProcess):
            process = psutil.Process(self.pid)
            for each in [*process.children(recursive=True), process]:
                each.kill()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("shared") / "base")


@contextmanager
def serving(base: Path, folder: Path, log: Path) -> Iterator[SharingService]:
    settings = SETTINGS | {"base": str(base), "adapters_dir": str(folder)}
    with (
        started(settings, log) as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http,
    ):
        service = SharingService(http, server.pid)
        yield service
        service.kill()


def until_listed(service: SharingService, id: str) -> None:
    end = time.monotonic() + FOLLOWED_S
    while id not in service.list_digests():
        assert time.monotonic() < end
        time.sleep(0.02)


def register_on_and_on(service: SharingService, codes: dict[str, int]) -> None:
    with suppress(httpx.HTTPError):
        for i in range(10_000):
            codes[f"on{i}"] = service.register(f"on{i}", "one")


def test_a_service_that_is_killed_while_it_registers_blocks_nobody(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "adapters"
    for seed, name in ((1, "one"), (2, "two")):
        making.noise(folder / name, base, seed)
    codes: dict[str, int] = {}
    with serving(base, folder, tmp_path / "b.log") as second:
        with serving(base, folder, tmp_path / "a.log") as first:
            assert first.register("a", "one") == 201
            until_listed(second, "a")
            assert second.register("a", "two") == 409
            assert second.http.delete("/adapters/a").status_code == 200
            busy = threading.Thread(target=register_on_and_on, args=(first, codes))
            busy.start()
            until_listed(second, "on5")
            first.kill()
            busy.join()
        began = time.monotonic()
        assert second.register("b", "two") == 201
        assert time.monotonic() - began < FOLLOWED_S
        known: Any = second.list_digests()
        made = {id for id, code in codes.items() if code == 201}
        assert made <= known.keys(), "what was answered is kept"
        with serving(base, folder, tmp_path / "c.log") as third:
            assert third.list_digests() == known
