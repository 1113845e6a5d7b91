"""Every view, light and dark, wide and narrow: nothing serious for axe-core, nothing wider than the
screen.
"""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect

from .conftest import BROKEN, Open
from .test_console import ask, generate, set_alias, some_ids

AXE = (Path(__file__).parent / "vendor" / "axe.min.js").read_text()
SERIOUS = """axe.run().then(found => found.violations
  .filter(one => ['serious', 'critical'].includes(one.impact))
  .map(one => one.id + ': ' + one.nodes[0].html))"""


@pytest.fixture(params=["light", "dark"])
def scheme(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[1280, 390])
def width(request: pytest.FixtureRequest) -> int:
    return int(request.param)


def examine(page: Page, width: int) -> None:
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate(AXE)
    assert page.evaluate(SERIOUS) == []


def test_adapters(live: str, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(live, width, scheme)
    expect(page.get_by_role("table", name="Adapters").get_by_role("img").last).to_be_attached()
    examine(page, width)


def test_the_delete_dialog(live: str, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(live, width, scheme)
    page.get_by_role("button", name="Delete", exact=False).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    examine(page, width)


def test_an_adapter(live: str, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(f"{live}#/adapters/{some_ids(live)[0]}", width, scheme)
    expect(page.get_by_label("Module tree with the adapter in place")).to_be_visible()
    expect(page.get_by_role("img", name="norm")).not_to_have_count(0)
    examine(page, width)


def test_a_failed_adapter(live: str, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(f"{live}#/adapters/{BROKEN}", width, scheme)
    expect(page.get_by_role("alert")).to_be_visible()
    examine(page, width)


def test_aliases(live: str, open_page: Open, width: int, scheme: str) -> None:
    set_alias(live, (90, 10))
    page = open_page(f"{live}#/aliases", width, scheme)
    expect(page.get_by_role("table", name="Targets of team/prod").get_by_role("img").last).to_be_attached()
    examine(page, width)
    httpx.delete(f"{live}aliases/team/prod")


def test_compare(live: str, open_page: Open, width: int, scheme: str) -> None:
    ids = some_ids(live)[:3]
    page = open_page(f"{live}#/compare", width, scheme)
    for id in ids:
        page.get_by_role("button", name=id, exact=True).click()
    ask(page, "The meeting is on the third of May 2026.", 32, "chat")
    for id in ids:
        expect(page.get_by_role("article", name=id)).to_have_attribute("aria-busy", "false")
    examine(page, width)


def test_live(live: str, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(f"{live}#/live", width, scheme)
    expect(page.get_by_role("img", name="rank rows held")).to_be_visible()
    examine(page, width)


def test_forecast(live: str, open_page: Open, width: int, scheme: str) -> None:
    page = open_page(f"{live}#/forecast", width, scheme)
    expect(page.get_by_role("region", name="Modules of the adapter")).to_be_visible()
    examine(page, width)


def test_usage(live: str, open_page: Open, width: int, scheme: str) -> None:
    generate(live, some_ids(live)[0])
    page = open_page(f"{live}#/usage", width, scheme)
    expect(page.get_by_role("table", name="Usage").get_by_role("link")).not_to_have_count(0)
    examine(page, width)
