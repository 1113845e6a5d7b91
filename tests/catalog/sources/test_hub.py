"""Content of the hub, against a stand-in on loopback that speaks as much of its protocol as the
client library needs.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from service.catalog.sources.hub import Hub
from service.catalog.sources.store import Store
from service.catalog.validator.header import CONFIG, WEIGHTS
from service.core.manifest import read_manifest
from service.errors import AdapterInvalid, Forbidden, PayloadTooLarge

pytestmark = pytest.mark.anyio
COMMIT = "c" * 40
LIMIT = 1_000_000
DESCRIBED = (
    "/api/models/org/name",
    "/api/models/org/name/revision/main",
    f"/api/models/org/name/revision/{COMMIT}",
)


class HubServer:
    """One repository, org/name, at one commit; `paths` are those that were asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.paths: list[str] = []
        handler = type("HandlerOfOneHub", (HubRequestHandler,), {"hub_server": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def stop(self) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in sorted(self.folder.rglob("*"))
            if path.is_file()
        }

    def find_file(self, path: str) -> bytes | None:
        """What the repository has under a download's path; None where that is nothing of it."""
        for head in (f"/org/name/resolve/{COMMIT}/", "/org/name/resolve/main/"):
            if path.startswith(head):
                return self.files().get(path.removeprefix(head))
        return None

    def describe_tree(self) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
            for name, data in self.files().items()
        ]

    def describe_repository(self) -> dict[str, Any]:
        siblings = [{"rfilename": name, "size": len(data)} for name, data in self.files().items()]
        return {"id": "org/name", "sha": COMMIT, "siblings": siblings}


class HubRequestHandler(BaseHTTPRequestHandler):
    """Answers one request as the hub of its subclass would."""

    hub_server: HubServer

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path, _, _ = self.path.partition("?")
        self.hub_server.paths.append(path)
        content = self.hub_server.find_file(path)
        if content is not None:
            self._send(200, content, "application/octet-stream")
        elif path.startswith("/api/models/org/name/tree/"):
            self._send_json(self.hub_server.describe_tree())
        elif path in DESCRIBED:
            self._send_json(self.hub_server.describe_repository())
        else:
            self._send(404, b'{"error": "no such repository"}', code="RepoNotFound")

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode())

    def _send(self, status: int, body: bytes, kind: str = "application/json", code: str = "") -> None:
        headers = {"content-type": kind, "content-length": str(len(body)), "x-repo-commit": COMMIT}
        headers["etag"] = f'"{_etag(body)}"'
        if code:
            headers["x-error-code"] = code
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        return None


def _etag(body: bytes) -> str:
    return sha256(body).hexdigest()[:40]


@pytest.fixture
def hub_server(tmp_path: Path, plain: Path) -> Iterator[HubServer]:
    folder = tmp_path / "repository"
    shutil.copytree(plain, folder)
    shutil.copytree(plain, folder / "checkpoint-20")
    (folder / "training_args.bin").write_bytes(b"pickle")
    server = HubServer(folder)
    yield server
    server.stop()


def store(hub_server: HubServer, tmp_path: Path, *allowed: str, limit: int = LIMIT) -> Store:
    return Store(tmp_path / "adapters", Hub(allowed, hub_server.endpoint, tmp_path / "cache"), limit)


TEXTS = ("chat_template.jinja", "generation_config.json", "tokenizer.json", "vocab.txt")


@pytest.fixture
def dressed(hub_server: HubServer) -> HubServer:
    """The same with tokenizer files and a template, in the repository and in its checkpoint's
    folder.
    """
    for folder in (hub_server.folder, hub_server.folder / "checkpoint-20"):
        for name in (*TEXTS, "README.md"):
            (folder / name).write_text(f"{folder.name} {name}")
    return hub_server


async def test_every_file_that_shapes_an_answer_is_fetched_and_no_other(
    dressed: HubServer, tmp_path: Path
) -> None:
    here = store(dressed, tmp_path, "org/*")
    for subfolder in (None, "checkpoint-20"):
        place = await here.find_source("hub:org/name", subfolder=subfolder)
        source = dressed.folder / (subfolder or "")
        names = sorted((CONFIG, WEIGHTS, *TEXTS))
        assert [path.name for path in sorted(place.folder.iterdir()) if path.is_file()] == names
        assert all((place.folder / name).read_bytes() == (source / name).read_bytes() for name in names)
    assert not [path for path in dressed.paths if path.endswith((".bin", ".md"))]


@pytest.fixture
def partly(dressed: HubServer, tmp_path: Path, plain: Path) -> Path:
    """The commit's folder in the cache with its config and weights alone, as a service before this
    one has fetched them.
    """
    folder = tmp_path / "cache" / "models--org--name" / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    for name in (CONFIG, WEIGHTS):
        shutil.copyfile(plain / name, folder / name)
    return folder


async def test_what_a_cache_holds_of_a_commit_is_completed_when_the_hub_can_be_asked(
    dressed: HubServer, tmp_path: Path, partly: Path
) -> None:
    place = await store(dressed, tmp_path, "org/*").find_source("hub:org/name", revision=COMMIT)
    assert place.folder == partly
    assert read_manifest(partly) == read_manifest(dressed.folder)


async def test_what_a_cache_holds_is_taken_and_said_when_the_hub_cannot_be_asked(
    dressed: HubServer, tmp_path: Path, partly: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dressed.stop()
    place = await store(dressed, tmp_path, "org/*").find_source("hub:org/name", revision=COMMIT)
    assert place.folder == partly
    assert "org/name cannot be asked which files it has" in caplog.text


async def test_a_file_that_was_there_and_is_gone_from_the_cache_is_fetched_again(
    dressed: HubServer, tmp_path: Path
) -> None:
    here = store(dressed, tmp_path, "org/*")
    place = await here.find_source("hub:org/name", revision=COMMIT)
    names = [file.name for file in read_manifest(place.folder)]
    before = len(dressed.paths)
    assert await here.find_source("hub:org/name", revision=COMMIT, held=names) == place
    assert len(dressed.paths) == before
    (place.folder / "chat_template.jinja").unlink()
    assert await here.find_source("hub:org/name", revision=COMMIT, held=names) == place
    assert [file.name for file in read_manifest(place.folder)] == names


async def test_signs_in_a_subfolder_choose_nothing_else(dressed: HubServer, tmp_path: Path) -> None:
    with pytest.raises(AdapterInvalid):
        await store(dressed, tmp_path, "org/*").find_source("hub:org/name", subfolder="checkpoint-*")
    assert not [path for path in dressed.paths if "resolve" in path]


async def test_only_the_two_files_of_the_commit_are_fetched(hub_server: HubServer, tmp_path: Path) -> None:
    place = await store(hub_server, tmp_path, "org/*").find_source("hub:org/name")
    assert place.revision == COMMIT
    assert sorted(path.name for path in place.folder.iterdir()) == [CONFIG, WEIGHTS, "checkpoint-20"][:2]
    assert (place.folder / WEIGHTS).read_bytes() == (hub_server.folder / WEIGHTS).read_bytes()
    assert not [path for path in hub_server.paths if "training_args" in path]


async def test_a_subfolder_is_fetched_alone(hub_server: HubServer, tmp_path: Path) -> None:
    place = await store(hub_server, tmp_path, "org/name").find_source(
        "hub:org/name", subfolder="checkpoint-20", revision="main"
    )
    assert place.folder.name == "checkpoint-20"
    assert sorted(path.name for path in place.folder.parent.iterdir()) == ["checkpoint-20"]


@pytest.mark.parametrize("allowed", [(), ("other/*",), ("org/name2", "org/nam")])
async def test_what_no_pattern_allows_is_forbidden_and_not_asked_for(
    hub_server: HubServer, tmp_path: Path, allowed: tuple[str, ...]
) -> None:
    with pytest.raises(Forbidden, match="ADAPTERD_HUB"):
        await store(hub_server, tmp_path, *allowed).find_source("hub:org/name")
    assert hub_server.paths == []


@pytest.mark.parametrize("name", ["org/none", "org/../x", "org/a/b", "org/"])
async def test_what_the_hub_does_not_have_is_invalid(
    hub_server: HubServer, tmp_path: Path, name: str
) -> None:
    with pytest.raises(AdapterInvalid, match="hub:"):
        await store(hub_server, tmp_path, "org/*").find_source(f"hub:{name}")


async def test_what_was_fetched_is_there_when_the_hub_is_not(hub_server: HubServer, tmp_path: Path) -> None:
    here = store(hub_server, tmp_path, "org/*")
    place = await here.find_source("hub:org/name", revision="main")
    before = len(hub_server.paths)
    assert await here.find_source("hub:org/name", revision=COMMIT, held=[CONFIG, WEIGHTS]) == place
    assert len(hub_server.paths) == before, "a commit whose files are all there needs no asking"
    hub_server.stop()
    assert (await here.find_source("hub:org/name", revision="main")).folder == place.folder
    with pytest.raises(AdapterInvalid, match="cannot be reached"):
        await store(hub_server, tmp_path / "elsewhere", "org/*").find_source("hub:org/name")


async def test_what_is_over_the_limit_is_not_fetched(hub_server: HubServer, tmp_path: Path) -> None:
    with pytest.raises(PayloadTooLarge):
        await store(hub_server, tmp_path, "org/*", limit=5000).find_source("hub:org/name")
    (hub_server.folder / "tokenizer.json").write_bytes(bytes(LIMIT))
    with pytest.raises(PayloadTooLarge):
        await store(hub_server, tmp_path, "org/*").find_source("hub:org/name")
    assert not [path for path in hub_server.paths if "resolve" in path]
