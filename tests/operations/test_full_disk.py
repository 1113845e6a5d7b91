"""A disk that is full under the registrations: whoever asks for a change is told, nothing is half done, and
a restart finds what the answers said.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deploy.bench.servers import started
from service.catalog.sources.hub import Hub
from service.errors import StorageFull
from tests import making
from tests.catalog.sources.test_hub import HubServer

from .places import fill, make_room, mounted

SETTINGS = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off"}
SAID = "changes are refused: the registrations cannot be written: No space left on device"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return making.tiny(tmp_path / "base")


@pytest.fixture
def disk(base: Path) -> Iterator[Path]:
    """An adapters directory of 4 MB with three folders."""
    with mounted("size=4m") as folder:
        for seed in (1, 2, 3):
            making.noise(folder / f"source{seed}", base, seed)
        yield folder


@contextmanager
def serving(base: Path, disk: Path, log: Path) -> Iterator[httpx.Client]:
    """A client of the service, which is killed in the end as a power cut would."""
    settings = SETTINGS | {"base": str(base), "adapters_dir": str(disk)}
    with (
        started(settings, log) as server,
        httpx.Client(base_url=server.url, timeout=300, trust_env=False) as http,
    ):
        yield http
        for process in [*psutil.Process(server.pid).children(recursive=True), psutil.Process(server.pid)]:
            process.kill()


def upload(http: httpx.Client, id: str, folder: Path) -> httpx.Response:
    files = {name: (folder / name).read_bytes() for name in (making.CONFIG, making.WEIGHTS)}
    return http.post(f"/adapters/{id}/upload", files=files)


def cards(http: httpx.Client) -> dict[str, Any]:
    """What must outlive a restart of each adapter."""
    listed = http.get("/adapters").json()["adapters"]
    return {card["id"]: (card["digest"], card["pinned"], card["state"]) for card in listed}


def change_each_way(http: httpx.Client, source: Path) -> list[httpx.Response]:
    return [
        http.post("/adapters", json={"id": "posted", "source": "source3"}),
        http.put("/adapters/source1", json={"source": "source3"}),
        http.post("/v1/load_lora_adapter", json={"lora_name": "aliased", "lora_path": "source3"}),
        http.patch("/adapters/source2", json={"pinned": True}),
        http.delete("/adapters/source1"),
        http.post("/v1/unload_lora_adapter", json={"lora_name": "source1"}),
        upload(http, "sent", source),
    ]


def test_each_change_is_refused_with_507_and_a_restart_finds_what_was_answered(
    base: Path, disk: Path, tmp_path: Path
) -> None:
    mould = making.noise(tmp_path / "mould", base, 4)
    log = tmp_path / "log"
    with serving(base, disk, log) as http:
        assert upload(http, "kept", mould).status_code == 201
        before = cards(http)
        fill(disk)
        answers = change_each_way(http, mould)
        assert [answer.status_code for answer in answers] == [507] * len(answers)
        for answer in answers:
            assert "storage_full" in answer.text
            assert "No space left on device" in answer.text
            assert str(disk) not in answer.text
        assert cards(http) == before
        asked = {"inputs": "Hi", "parameters": {"adapter_id": "kept", "max_new_tokens": 2}}
        assert http.post("/generate", json=asked).status_code == 200
    assert log.read_text().count(SAID) == 1
    with serving(base, disk, log) as http:
        assert cards(http) == before
        make_room(disk)
        assert http.post("/adapters", json={"id": "posted", "source": "source3"}).status_code == 201
        assert http.delete("/adapters/source1").status_code == 200
        before = cards(http)
        fill(disk)
        assert http.patch("/adapters/kept", json={"pinned": True}).status_code == 507
        assert log.read_text().count(SAID) == 2, "at the start, and again after it went well"
    make_room(disk)
    with serving(base, disk, log) as http:
        assert cards(http) == before


@pytest.mark.filterwarnings("ignore:Not enough free disk space")
def test_content_of_the_hub_that_its_cache_has_no_room_for_is_507_too(base: Path, tmp_path: Path) -> None:
    hub_server = HubServer(making.noise(tmp_path / "repository", base))
    try:
        with mounted("size=8k") as cache:
            fill(cache)
            hub = Hub(("org/*",), hub_server.endpoint, cache)
            with pytest.raises(
                StorageFull, match=r"^hub:org/name cannot be stored: No space left on device$"
            ):
                hub.fetch_adapter("org/name", None, None, 1_000_000)
    finally:
        hub_server.stop()
