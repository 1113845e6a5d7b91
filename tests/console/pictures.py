"""Takes the README's pictures of a server that runs with the demo: `python -m tests.console.pictures URL FOLDER`."""

from __future__ import annotations

import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
from playwright.sync_api import Page, sync_playwright

from .conftest import CHROMIUM, FLAGS

PROMPT = "Hi, Emma here. I would like seven green umbrellas, delivered to Berlin on the 4th of March 2031.\nJSON:"


def compare(page: Page, ids: list[str]) -> None:
    for id in ids[:3]:
        page.get_by_role("button", name=id, exact=True).click()
    page.get_by_label("Prompt").last.fill(PROMPT)
    page.get_by_label("New tokens").fill("48")
    page.get_by_role("button", name="Run").click()
    page.wait_for_function("() => !document.querySelector('[aria-busy=true]')", timeout=120_000)


def work(url: str, id: str) -> None:
    asked = {"adapter_id": id, "max_new_tokens": 48, "ignore_eos_token": True}
    httpx.post(f"{url}generate", json={"inputs": PROMPT, "parameters": asked}, timeout=120)


def live(page: Page, url: str, ids: list[str]) -> None:
    """Lets the charts see a request to each adapter, one second after another."""
    with ThreadPoolExecutor() as pool:
        started = []
        for id in ids:
            started.append(pool.submit(work, url, id))
            page.wait_for_timeout(1000)
        while not all(one.done() for one in started):
            page.wait_for_timeout(500)


def take(page: Page, url: str, folder: Path, end: str) -> None:
    ids = [card["id"] for card in httpx.get(f"{url}adapters").json()["adapters"]]
    views = {"compare": "compare", "adapters": "adapters", "adapter": f"adapters/{ids[0]}", "live": "live", "forecast": "forecast"}
    for name, view in views.items():
        page.goto(f"{url}#/{view}")
        page.get_by_role("heading", level=1).wait_for()
        if name == "compare":
            compare(page, ids)
        if name == "live":
            live(page, url, ids)
        page.wait_for_timeout(2500)  # data comes once a second or two
        page.screenshot(path=folder / f"{name}-{end}.png", full_page=True)


def main(url: str, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=next(filter(None, map(shutil.which, CHROMIUM)), None), args=FLAGS)
        for width, height in ((1280, 900), (390, 844)):
            for dark in (False, True):
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="dark" if dark else "light")
                take(context.new_page(), url, folder, f"{width}-{'dark' if dark else 'light'}")
                context.close()
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") + "/", Path(sys.argv[2]))
