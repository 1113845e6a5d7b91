"""Behind nginx under a path of its own: the API's page, the console and all that they refer to are found."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urljoin

import httpx
import pytest

from ..nginx import proxying
from .processes import serving

PREFIX = "/teams/llm/"
PAGE = {"accept": "text/html"}
# What scripts and styles name: modules, and files of a style
REFERENCES = {
    "javascript": re.compile(r"""(?:^|;)\s*(?:import|export)[^;"']*["'](\.{1,2}/[^"']+)["']""", re.MULTILINE),
    "css": re.compile(r"""url\(\s*["']?(?!data:|#)([^"')]+)"""),
}


class References(HTMLParser):
    """The addresses that a page loads or links."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if name in ("src", "href") and value]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service behind the proxy, which serves nothing outside the prefix."""
    folder: Path = tmp_path_factory.mktemp("nginx")
    with serving() as started:
        locations = f"location {PREFIX} {{ proxy_pass {started.url}/; }} location / {{ return 418; }}"
        with proxying(locations, folder) as port:
            yield f"http://127.0.0.1:{port}{PREFIX}"


def fetch(url: str) -> httpx.Response:
    return httpx.get(url, headers=PAGE, trust_env=False, timeout=60)


def list_references(answer: httpx.Response) -> list[str]:
    kind = answer.headers["content-type"]
    if "html" in kind:
        page = References()
        page.feed(answer.text)
        return page.found
    return [
        name for word, pattern in REFERENCES.items() if word in kind for name in pattern.findall(answer.text)
    ]


def follow(url: str) -> dict[str, int]:
    """The status of a page, of all that it loads, and of all that these load."""
    statuses: dict[str, int] = {}
    waiting = [url]
    while waiting:
        address = waiting.pop().partition("#")[0]
        if address not in statuses:
            answer = fetch(address)
            statuses[address] = answer.status_code
            waiting += [urljoin(address, name) for name in list_references(answer)]
    return statuses


@pytest.mark.parametrize(
    ("page", "least", "needed"),
    [
        ("docs", 5, {"docs/swagger-ui.css", "docs/swagger-ui-bundle.js", "docs/start.js"}),
        ("", 15, {"console/app.js", "console/style.css", "console/vendor/preact.js"}),
    ],
    ids=["docs", "console"],
)
def test_a_page_and_all_it_refers_to_are_below_the_prefix(
    root: str, page: str, least: int, needed: set[str]
) -> None:
    statuses = follow(root + page)
    assert {address: status for address, status in statuses.items() if status != 200} == {}
    assert {root + name for name in needed} <= statuses.keys()
    assert len(statuses) >= least


def test_what_the_page_tries_out_is_asked_below_the_prefix(root: str) -> None:
    """The page finds the description beside itself, and the routes where that says the server is."""
    (name,) = re.findall(r'url: "([^"]+)"', fetch(f"{root}docs/start.js").text)
    address = urljoin(f"{root}docs", name)
    description = fetch(address).json()
    server = urljoin(address, description["servers"][0]["url"])
    asked = {path: fetch(server.rstrip("/") + path).status_code for path in ("/health", "/adapters", "/info")}
    assert asked.keys() <= description["paths"].keys()
    assert asked == dict.fromkeys(asked, 200)


def test_outside_the_prefix_there_is_nothing(root: str) -> None:
    assert fetch(urljoin(root, "/openapi.json")).status_code == 418
