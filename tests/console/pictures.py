"""Takes the pictures of README and docs/ of a server that runs with the demo:

`python -m tests.console.pictures URL FOLDER [NAME ...]`.

Without names it takes every view at both widths in both themes, to be looked at.
"""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from playwright.sync_api import Browser, Page, sync_playwright

from .conftest import CHROMIUM, FLAGS

PROMPT = "Message: Hello, the umbrella I ordered on the 4th of March 2031 is still not here.\nLabel:"
COMPARED = ("dates", "labels", "pirate")
SHOWN = "orders"  # the adapter whose own page is taken
HEIGHTS = {1280: 900, 390: 844}  # pixels, by width
VIEWS = {
    "compare": "compare",
    "adapters": "adapters",
    "adapter": f"adapters/{SHOWN}",
    "live": "live",
    "forecast": "forecast",
    "usage": "usage",
}
ROUNDS = 20  # seconds of work before the live view is taken


def compare(page: Page) -> None:
    for id in COMPARED:
        page.get_by_role("button", name=id, exact=True).click()
    page.get_by_label("Prompt").last.fill(PROMPT)
    page.get_by_label("New tokens").fill("48")
    page.get_by_role("button", name="Run").click()
    page.wait_for_function("() => !document.querySelector('[aria-busy=true]')", timeout=120_000)


def work(url: str, id: str) -> None:
    asked = {"adapter_id": id, "max_new_tokens": 60, "ignore_eos_token": True}
    httpx.post(f"{url}generate", json={"inputs": PROMPT, "parameters": asked}, timeout=120)


def take(page: Page, url: str, view: str, file: Path) -> None:
    page.goto(f"{url}#/{VIEWS[view]}")
    page.get_by_role("heading", level=1).wait_for()
    if view == "compare":
        compare(page)
    if view != "live":
        page.wait_for_timeout(2500)  # data comes once a second or two
        page.screenshot(path=file, full_page=True)
        return
    ids = [card["id"] for card in httpx.get(f"{url}adapters").json()["adapters"]]
    with ThreadPoolExecutor(64) as pool:
        for turn in range(ROUNDS):
            for id in ids[: 1 + turn % len(ids)]:
                pool.submit(work, url, id)
            page.wait_for_timeout(1000)
        page.screenshot(path=file, full_page=True)


def all_names() -> list[str]:
    return [f"{view}-{width}-{theme}" for width in HEIGHTS for theme in ("light", "dark") for view in VIEWS]


def one(browser: Browser, url: str, folder: Path, name: str) -> None:
    view, width, theme = name.split("-")
    context = browser.new_context(
        viewport={"width": int(width), "height": HEIGHTS[int(width)]},
        color_scheme="dark" if theme == "dark" else "light",
    )
    take(context.new_page(), url, view, folder / f"{name}.png")
    context.close()


def main(url: str, folder: Path, names: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=next(filter(None, map(shutil.which, CHROMIUM)), None), args=FLAGS
        )
        for name in names or all_names():
            one(browser, url, folder, name)
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") + "/", Path(sys.argv[2]), sys.argv[3:])
