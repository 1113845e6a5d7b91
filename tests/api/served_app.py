"""The app over the stand-ins of engine and registry, which do what the test sets, for tests of the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from starlette.testclient import TestClient

from service.app import create_app
from service.settings import read_settings
from tests.doubles.engine import FakeEngine
from tests.doubles.registry import FakeRegistry


class ServedApp:
    """The app over the stand-ins, and an HTTP client for it."""

    def __init__(self, http: TestClient, engine: FakeEngine, registry: FakeRegistry) -> None:
        self.http, self.engine, self.registry = http, engine, registry
        self.services = cast(Any, http.app).state.services

    def json(self, method: str, path: str, body: Any = None, status: int = 200, **more: Any) -> Any:
        if body is not None:
            more["json"] = body
        answer = self.http.request(method, path, **more)
        assert answer.status_code == status, answer.text
        return answer.json()


class NoTokenizers:
    """Tokenizers that nothing uses."""

    async def close(self) -> None:
        return None


@contextmanager
def serve_app(loading: bool = False, **settings: str) -> Iterator[ServedApp]:
    engine, registry = FakeEngine.loading() if loading else FakeEngine(), FakeRegistry()
    app = create_app(
        read_settings({}, {"base": "org/none"} | settings),
        engine,
        registry,
        text=lambda folder: cast(Any, NoTokenizers()),
    )
    with TestClient(app, raise_server_exceptions=False) as http:
        served = ServedApp(http, engine, registry)
        while not loading and not served.services.opened:
            http.get("/health")
        yield served
