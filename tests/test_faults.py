"""What a disk can do to the real program: files that go before they are read, a replacement that is
not there, no room for an upload.
"""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from deploy.bench.servers import started
from tests import making

# Bytes that a file may have while the disk is full: a log and the registrations fit, an adapter
# does not
ROOM = 300_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, int, Path]]:
    """A client of it, its process id, and its adapters directory, where `kept` is registered."""
    folder = tmp_path_factory.mktemp("faults")
    base = making.tiny(folder / "base")
    making.noise(folder / "adapters" / "kept", base, 1)
    making.noise(folder / "mould", base, 2)
    settings = {
        "base": str(base),
        "dtype": "float32",
        "quantization": "none",
        "device": "cpu",
        "compile": "off",
    }
    more = {"adapters_dir": str(folder / "adapters"), "max_rank": "512"}
    with (
        started(settings | more, folder / "log") as server,
        httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http,
    ):
        yield http, server.pid, folder / "adapters"


def ask(http: httpx.Client, adapter: str) -> httpx.Response:
    return http.post(
        "/generate", json={"inputs": "Hi", "parameters": {"adapter_id": adapter, "max_new_tokens": 3}}
    )


def refused(answer: httpx.Response, root: Path) -> dict[str, Any]:
    assert str(root.parent) not in answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_folder_that_goes_before_it_is_read_fails_its_adapter_until_it_is_back(
    place: tuple[httpx.Client, int, Path],
) -> None:
    http, _, root = place
    shutil.copytree(root.parent / "mould", root / "lazy")
    assert http.post("/adapters", json={"id": "lazy", "source": "lazy", "preload": False}).status_code == 201
    (root / "lazy").rename(root / ".aside")
    failed = ask(http, "lazy")
    assert (failed.status_code, refused(failed, root)["error_type"]) == (422, "adapter_invalid")
    card = http.get("/adapters/lazy").json()
    assert (card["state"], "cannot be read" in card["reason"]) == ("failed", True)
    assert ask(http, "kept").status_code == 200
    (root / ".aside").rename(root / "lazy")
    assert ask(http, "lazy").status_code == 200
    assert http.get("/adapters/lazy").json()["state"] == "ready"


def test_what_was_there_serves_on_when_its_replacement_cannot_be_read(
    place: tuple[httpx.Client, int, Path],
) -> None:
    http, _, root = place
    before = ask(http, "kept").json()
    answer = http.put("/adapters/kept", json={"source": "nowhere"})
    assert (answer.status_code, refused(answer, root)["error_type"]) == (422, "adapter_invalid")
    assert ask(http, "kept").json() == before


def test_a_full_disk_refuses_an_upload_and_nothing_else(place: tuple[httpx.Client, int, Path]) -> None:
    http, pid, root = place
    large = making.noise(root.parent / "large", root.parent / "base", 3, r=512)
    files = {name: (large / name).read_bytes() for name in (making.CONFIG, making.WEIGHTS)}
    assert len(files[making.WEIGHTS]) > 2 * ROOM
    whole = psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE)
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))
    full = http.post("/adapters/large/upload", files=files)
    assert (full.status_code, refused(full, root)["error_type"]) == (507, "storage_full")
    assert "stored" in full.json()["error"]
    assert [
        http.get("/adapters/large").status_code,
        http.get("/health").status_code,
        ask(http, "kept").status_code,
    ] == [404, 200, 200]
    assert [path.name for path in (root / ".uploads").iterdir()] == [], "half an upload is not left"
    psutil.Process(pid).rlimit(psutil.RLIMIT_FSIZE, whole)
    assert http.post("/adapters/large/upload", files=files).status_code == 201
