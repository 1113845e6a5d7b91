"""The event loop never asks the disk: a slow share of files would hold every stream, `/health` and
`/metrics` meanwhile.
"""

from __future__ import annotations

import asyncio
import builtins
import io
import os
import shutil
import sys
import threading
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from service.app import create_app
from service.catalog.registry import Registry
from service.catalog.sources.hub import Hub
from service.errors import SourceMissing
from service.settings import Settings, read_settings
from service.text.tokenizers import Tokenizers

from . import making
from .catalog.conftest import card
from .doubles.engine import FakeEngine

LOOKS_AT = ("stat", "lstat", "open", "listdir", "scandir", "readlink", "access")
CHANGES = ("mkdir", "rmdir", "unlink", "remove", "rename", "replace", "fsync", "truncate")
WRITES = ("write", "flush", "close", "truncate")


def on_a_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


class Watch:
    """What was asked of the disk on the thread of a running event loop:

    `seen` are the calls with the frames that made them.
    """

    def __init__(self) -> None:
        self.seen: list[str] = []

    def watched(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(*given: Any, **named: Any) -> Any:
            self.note(name)
            return call(*given, **named)

        return asked

    def opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def asked(file: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            self.note("open")
            made = call(file, mode, *given, **named)
            return WrittenFile(made, self) if set(mode) & set("wxa") else made

        return asked

    def note(self, name: str) -> None:
        if on_a_loop():
            frames = [frame for frame, _ in traceback.walk_stack(sys._getframe(2))][:6]
            told = [f"{frame.f_code.co_filename}:{frame.f_lineno}" for frame in frames]
            # Else a library's own, which reads its source to tell of an error
            if any("/service/" in place for place in told):
                self.seen.append(f"{name} at {', '.join(told)}")


class WrittenFile:
    """A file whose writing is watched, for the library's own cannot be."""

    def __init__(self, file: Any, watch: Watch) -> None:
        self._file, self._watch = file, watch

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._file, name)
        return self._watch.watched(name, found) if name in WRITES else found

    def __enter__(self) -> WrittenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    made = Watch()
    for name in LOOKS_AT + CHANGES:
        monkeypatch.setattr(os, name, made.watched(name, getattr(os, name)))
    opened = made.opened(io.open)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(builtins, "open", opened)
    return made


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = making.tiny(tmp_path_factory.mktemp("bases") / "tiny")
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Two adapters, the second one with words of its own; and both files of the first one in an
    archive.
    """
    root = tmp_path_factory.mktemp("sources")
    making.noise(root / "one", base, 1)
    making.noise(root / "two", base, 2, r=8)
    making.tokenizer().save_pretrained(root / "two")
    shutil.make_archive(str(root / "packed"), "zip", root / "one")
    return root


@contextmanager
def serving(base: Path, root: Path, hub: Hub | None = None) -> Iterator[TestClient]:
    settings: Settings = read_settings({}, {"base": str(base), "adapters_dir": str(root), "max_rank": "64"})
    engine = FakeEngine(card(base))
    engine.script = lambda request: making.ids(" the end of it all")
    registry = Registry(settings, device=engine, hub=hub)
    app = create_app(settings, engine, registry, text=lambda _: Tokenizers(base))
    with TestClient(app, raise_server_exceptions=False) as http:
        while not app.state.services.opened:
            assert not app.state.services.failure
            http.get("/health")
        yield http


@pytest.fixture
def root(tmp_path: Path, sources: Path) -> Path:
    folder = tmp_path / "adapters"
    for name in ("one", "two", "gone"):
        shutil.copytree(sources / name.replace("gone", "one"), folder / name)
    return folder


def change(http: TestClient, sources: Path) -> set[int]:
    """One of everything that changes what is registered, with what is refused; the statuses."""
    files = {
        name: (sources / "one" / name).read_bytes()
        for name in ("adapter_config.json", "adapter_model.safetensors")
    }
    packed = {"file": (sources / "packed.zip").read_bytes()}
    answers = [
        http.post("/adapters", json={"id": "a", "source": "one"}),
        http.post("/adapters", json={"id": "a", "source": "one"}),
        http.post("/adapters", json={"id": "a", "source": "two"}),
        http.post("/adapters", json={"id": "b", "source": "none"}),
        http.post("/adapters", json={"id": "b", "source": "../one"}),
        http.post("/adapters/check", json={"id": "b", "source": "two"}),
        http.put("/adapters/a", json={"source": "two"}),
        http.patch("/adapters/a", json={"pinned": True}),
        http.post("/adapters/sent/upload", files=files),
        http.post("/adapters/packed/upload", files=packed),
        http.post("/adapters/torn/upload", files={"file": b"no archive"}),
        http.post("/adapters/odd/upload", files={"other": b"no archive"}),
        http.delete("/adapters/sent", params={"purge": True}),
        http.delete("/adapters/packed", params={"purge": True}),
        http.post("/v1/load_lora_adapter", json={"lora_name": "c", "lora_path": "one"}),
        http.post("/v1/unload_lora_adapter", json={"lora_name": "c"}),
    ]
    return {answer.status_code for answer in answers}


LOOKS = (
    "",
    "/one",
    "/two/summary",
    "/two/summary?format=text",
    "/two/architecture",
    "/two/architecture/norms",
)
PAGES = (
    "/health",
    "/ready",
    "/metrics",
    "/info",
    "/base",
    "/v1/models",
    "/v1/models/two",
    "/docs",
    "/openapi.json",
    "/console/app.js",
)


def test_no_route_asks_the_disk_on_the_event_loop(
    base: Path, root: Path, sources: Path, watch: Watch
) -> None:
    with serving(base, root) as http:
        assert change(http, sources) == {200, 201, 403, 409, 422}
        assert {http.get(f"/adapters{look}").status_code for look in LOOKS} == {200}
        assert {http.get(page).status_code for page in PAGES} <= {200, 404}
        assert http.get("/", headers={"accept": "text/html"}).status_code == 200
        assert http.get("/forecast", params={"r": 8, "target_modules": "q_proj"}).status_code == 200
        for model in ("one", "two"):
            native = {"inputs": "Hi", "parameters": {"adapter_id": model}}
            chat = {"model": model, "messages": [{"role": "user", "content": "Hi"}], "stream": True}
            completion = {"model": model, "prompt": "Hi", "echo": True}
            assert http.post("/generate", json=native).status_code == 200
            assert http.post("/v1/chat/completions", json=chat).status_code == 200
            assert http.post("/v1/completions", json=completion).status_code == 200
    assert not watch.seen, "\n".join(watch.seen)


def test_no_start_asks_the_disk_on_the_event_loop(base: Path, root: Path, watch: Watch) -> None:
    """What was registered before is there, changed, gone or broken."""
    with serving(base, root):
        pass
    (root / "one" / "adapter_config.json").write_text("{}")
    shutil.rmtree(root / "gone")
    with serving(base, root) as http:
        assert {card["id"]: card["state"] for card in http.get("/adapters").json()["adapters"]} == {
            "one": "failed",
            "two": "ready",
        }
    assert not watch.seen, "\n".join(watch.seen)


def test_no_thread_is_needed_for_what_is_at_hand(
    base: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever holds the threads, what is known already is told."""

    async def held(*_: Any, **__: Any) -> Any:
        raise AssertionError("a thread was asked for")

    # The end needs threads: a validator that cannot be waited for would be found by some later test
    with serving(base, root) as http, monkeypatch.context() as patch:
        patch.setattr("anyio.to_thread.run_sync", held)
        patch.setattr("starlette.concurrency.run_in_threadpool", held)
        patch.setattr("fastapi.dependencies.utils.run_in_threadpool", held)
        patch.setattr("fastapi.routing.run_in_threadpool", held)
        patch.setattr(asyncio.BaseEventLoop, "run_in_executor", held)
        adapters = [f"/adapters{look}" for look in LOOKS[1:4]]
        for path in ("/health", "/ready", "/info", "/base", "/v1/models", "/adapters", *adapters):
            assert http.get(path).status_code == 200, path
        native = {"inputs": "Hi", "parameters": {"details": True, "top_n_tokens": 3}}
        completion = {"model": "base", "prompt": "Hi", "logprobs": 5, "stream": True}
        assert http.post("/generate", json=native).status_code == 200
        assert http.post("/v1/completions", json=completion).status_code == 200


class SilentHub(Hub):
    """Does not answer until it is `let`; `asked` counts who waits."""

    def __init__(self, root: Path) -> None:
        super().__init__(("org/*",), cache=root)
        self.asked = threading.Semaphore(0)
        self.let = threading.Event()

    def fetch_adapter(
        self, name: str, revision: str | None, subfolder: str | None, limit: int, held: Collection[str] = ()
    ) -> tuple[Path, str]:
        self.asked.release()
        self.let.wait()
        raise SourceMissing(["it had nothing to say"])


def test_sources_that_do_not_answer_hold_nothing_else_up(
    base: Path, root: Path, sources: Path, tmp_path: Path
) -> None:
    """Six of them took all threads there were, and `/metrics` 20 s."""
    hub = SilentHub(tmp_path)
    with serving(base, root, hub) as http, waiting_for_hub(http, hub) as statuses:
        for look in (*(f"/adapters{look}" for look in LOOKS), "/metrics", "/info", "/docs"):
            assert http.get(look).status_code == 200
        assert change(http, sources) == {200, 201, 403, 409, 422}
        schema = {"type": "json_object", "schema": {"type": "integer"}}
        parameters = {"adapter_id": "two", "truncate": 9, "response_format": schema}
        body = {"inputs": "Hi " * 10_000, "parameters": parameters}
        assert http.post("/generate", json=body).status_code == 200
        assert not statuses
    assert statuses == [422] * 24


@contextmanager
def waiting_for_hub(http: TestClient, hub: SilentHub) -> Iterator[list[int]]:
    """24 registrations from a hub that does not answer while the block runs; their statuses."""
    statuses: list[int] = []

    def register(number: int) -> None:
        body = {"id": f"h{number}", "source": f"hub:org/{number}"}
        statuses.append(http.post("/adapters", json=body).status_code)

    threads = [threading.Thread(target=register, args=(number,)) for number in range(24)]
    try:
        for thread in threads:
            thread.start()
        for _ in range(6):
            hub.asked.acquire()
        yield statuses
    finally:
        hub.let.set()
        for thread in threads:
            thread.join()
