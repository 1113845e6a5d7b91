"""A browser and the console it opens. Every page that a test opens must end without console errors or requests to other origins."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

from .stub import Stub, build

CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]


@dataclass(frozen=True)
class Keyed:
    url: str
    key: str


@contextmanager
def listening(stub: Stub) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(build(stub), host="127.0.0.1", port=0, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = server.force_exit = True
    thread.join()


@pytest.fixture(scope="session")
def live() -> Iterator[str]:
    with listening(Stub()) as url:
        yield url


@pytest.fixture(scope="session")
def keyed() -> Iterator[Keyed]:
    with listening(Stub(key="sk-console")) as url:
        yield Keyed(url, "sk-console")


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for these tests; its event loop ends with them, so that other tests can run their own."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """`open_page(url, width=, scheme=, expect=)`; `expect` is a part of the one console error that the test provokes."""
    watched: list[Watched] = []

    def open_one(url: str, width: int = 1280, scheme: str = "light", expect: str = "") -> Page:
        height = 900 if width > 600 else 844
        context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if scheme == "dark" else "light")
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        page = context.new_page()
        page.set_default_timeout(10_000)
        watched.append(Watched(page, url, expect))
        page.goto(url)
        return page

    yield open_one
    for one in watched:
        one.page.context.close()
    assert [said for one in watched for said in one.complaints] == []


class Watched:
    def __init__(self, page: Page, url: str, expect: str) -> None:
        self.page, self.origin, self.expect = page, url.split("/#")[0], expect
        self.complaints: list[str] = []
        page.on("console", self.heard)
        page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        page.on("request", lambda request: self.asked(request.url))

    def heard(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not (self.expect and self.expect in message.text):
            self.complaints.append(f"{message.type}: {message.text}")

    def asked(self, url: str) -> None:
        if not url.startswith((self.origin, "data:", "blob:")):
            self.complaints.append(f"left the origin: {url}")


@pytest.fixture
def adapter_files(tmp_path: Path) -> list[Path]:
    """An adapter's two files, as PEFT saves them."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(3_000_000))
    return [tmp_path / "adapter_config.json", tmp_path / "adapter_model.safetensors"]
