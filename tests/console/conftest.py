"""A browser, and the servers whose console it opens.

Every page must end without console errors or requests to other origins.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import pytest
from playwright.sync_api import Browser, BrowserContext, ConsoleMessage, Page, sync_playwright

from deploy.bench.servers import free_port
from service.core.defaults import DEMO_BASE
from tests import making

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "service" / "api" / "static" / "console"
CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
FLAGS += ["--disable-background-networking", "--disable-component-update"]
SHAPES: dict[str, tuple[str | list[str], int]] = {
    "dates": (["q_proj", "v_proj"], 16),
    "labels": (["q_proj", "k_proj", "v_proj", "o_proj"], 8),
    "orders": (["q_proj", "k_proj", "v_proj", "o_proj"], 8),
    "redact": ("all-linear", 32),
    "team/pirate": (["gate_proj", "up_proj", "down_proj"], 2),
}
BROKEN = "broken"

# ---- servers


@contextmanager
def serving(log: Path, module: str, **settings: str) -> Iterator[str]:
    """A serving process of its own, once it is ready; its address ends with a slash."""
    port = free_port()
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ADAPTERD_")}
    line = [sys.executable, "-m", module, "serve", "--port", str(port)]
    own = {f"ADAPTERD_{name.upper()}": text for name, text in settings.items()}
    env = kept | own | {"OMP_NUM_THREADS": "1"}
    with (
        log.open("w", encoding="utf-8") as out,
        subprocess.Popen(line, cwd=ROOT, env=env, stdout=out, stderr=out) as process,
    ):
        url = f"http://127.0.0.1:{port}/"
        while not ready(url):
            assert process.poll() is None, log.read_text(encoding="utf-8")
        yield url
        process.terminate()
        assert process.wait(60) == 0, log.read_text(encoding="utf-8")


def ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}ready").is_success
    except httpx.TransportError:
        return False


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("console") / "tiny-llama", max_position_embeddings=8192)


@pytest.fixture(scope="session")
def live(base: Path) -> Iterator[str]:
    """The address of a server with five adapters, and a folder that is none."""
    for seed, (name, (targets, rank)) in enumerate(SHAPES.items()):
        making.noise(base.parent / "adapters" / name, base, seed, targets, rank)
    broken = making.edit(base.parent / "adapters" / "dates", base.parent / "adapters" / BROKEN)
    (broken / making.WEIGHTS).write_bytes(b"cut short")
    settings = {"base": str(base), "base_id": DEMO_BASE, "compile": "off", "dtype": "float32"}
    settings["adapters_dir"] = str(base.parent / "adapters")
    with serving(base.parent / "log", "service", **settings) as url:
        yield url


@dataclass(frozen=True)
class Keyed:
    url: str
    key: str


@pytest.fixture(scope="session")
def keyed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    """A server that asks for keys, with nothing behind its door."""
    with serving(
        tmp_path_factory.mktemp("keyed") / "log", "tests.standing", base="org/none", admin_keys="sk-console"
    ) as url:
        yield Keyed(url, "sk-console")


@pytest.fixture(scope="session")
def adapter_source(base: Path) -> Path:
    return making.noise(base.parent / "spare", base, seed=77)


@pytest.fixture
def adapter_files(adapter_source: Path, tmp_path: Path) -> list[Path]:
    """An adapter's two files, as PEFT saves them."""
    shutil.copytree(adapter_source, tmp_path, dirs_exist_ok=True)
    return [tmp_path / making.CONFIG, tmp_path / making.WEIGHTS]


# ---- the browser


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    """One browser for these tests; its event loop ends with them, so that other tests can run their
    own.
    """
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=found, args=FLAGS)
        yield opened
        opened.close()


Open = Callable[..., Page]


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Open]:
    """`open_page(url, width=, scheme=, expect=)`;

    `expect` is a part of the console errors that the test provokes.
    """
    watched: list[Watched] = []

    def open_one(
        url: str, width: int = 1280, scheme: str = "light", expect: str = "", files: bool = False
    ) -> Page:
        context = new_context(browser, width, dark=scheme == "dark")
        context.grant_permissions(["clipboard-read", "clipboard-write"])
        if files:
            hand_out(context, url)
        page = context.new_page()
        page.set_default_timeout(20_000)
        watched.append(Watched(page, url, expect))
        page.goto(url)
        return page

    yield open_one
    for one in watched:
        one.page.context.close()
    assert [said for one in watched for said in one.complaints] == []


def new_context(browser: Browser, width: int, dark: bool) -> BrowserContext:
    height = 900 if width > 600 else 844
    colours: Literal["dark", "light"] = "dark" if dark else "light"
    return browser.new_context(viewport={"width": width, "height": height}, color_scheme=colours)


def hand_out(context: BrowserContext, url: str) -> None:
    """Gives the browser the page's files, which a server with keys hands only to who has one; all
    the rest goes to the server.
    """
    origin = url.split("/#")[0].removesuffix("/")
    context.route(f"{origin}/", lambda route: route.fulfill(path=PAGE / "index.html"))
    context.route(
        f"{origin}/console/**",
        lambda route: route.fulfill(path=PAGE / route.request.url.partition("/console/")[2]),
    )


class Watched:
    def __init__(self, page: Page, url: str, expect: str) -> None:
        self.page, self.origin, self.expect = page, url.split("#")[0], expect
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
