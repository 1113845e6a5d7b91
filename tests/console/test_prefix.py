"""The API's page behind a proxy that serves it under a prefix: what is tried out there is asked under it."""

from __future__ import annotations

from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler

import httpx
import pytest
from playwright.sync_api import expect

from tests.loopback import listening

from .conftest import Open, serving

PREFIX = "/llm"
PASSED = ("content-type", "content-security-policy")


def make_proxy(url: str) -> type[BaseHTTPRequestHandler]:
    """Passes on what is asked under the prefix, without it, and nothing else."""

    class Proxy(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            within = self.path.startswith(f"{PREFIX}/")
            answer = httpx.get(url + self.path.removeprefix(f"{PREFIX}/")) if within else httpx.Response(404)
            self.send_response(answer.status_code)
            for name in PASSED:
                if name in answer.headers:
                    self.send_header(name, answer.headers[name])
            self.send_header("content-length", str(len(answer.content)))
            self.end_headers()
            self.wfile.write(answer.content)

        def log_message(self, format: str, *words: object) -> None:
            return None

    return Proxy


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The proxy's address, over a service with nothing behind its door."""
    log = tmp_path_factory.mktemp("proxied") / "log"
    with serving(log, "tests.standing", base="org/none") as url, listening(make_proxy(url)) as outside:
        yield outside


def test_what_is_tried_out_is_asked_under_the_prefix(proxied: str, open_page: Open) -> None:
    page = open_page(f"{proxied}{PREFIX}/docs")
    block = page.locator(".opblock", has=page.locator("[data-path='/health']"))
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    block.get_by_role("button", name="Execute").click()
    expect(block.locator(".request-url pre")).to_have_text(f"{proxied}{PREFIX}/health")
    expect(block.locator(".live-responses-table .response-col_status").last).to_contain_text("200")
