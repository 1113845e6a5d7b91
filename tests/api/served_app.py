"""The app over a fake client and a fake registry, for tests of the API alone. They do what the test
sets.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

from starlette.testclient import TestClient

from service.app import create_app
from service.core.adapter import Placement
from service.core.base_info import BaseInfo, LinearKind
from service.core.messages import Gauges
from service.errors import AdapterInvalid, AdapterNotFound, Conflict, Forbidden, SourceMissing
from service.settings import Settings, read_settings

if TYPE_CHECKING:
    from service.catalog.registry import Registry
    from service.worker.client import WorkerClient

REGISTERED = "2026-11-25T12:00:00.500Z"
BASE = BaseInfo(
    folder="/secret/place/tiny",
    architecture="LlamaForCausalLM",
    layers=2,
    hidden_size=64,
    intermediate_size=128,
    vocab_size=300,
    parameters=123_456,
    context=2048,
    quantization="none",
    dtype="float32",
    device="cpu",
    resident_bytes={"float32": 493_824},
    linears=(LinearKind("q_proj", 64, 64, 2),),
    pool_rank=512,
    rows=16,
)


class FakeClient:
    """A worker's client whose state is whatever the test sets."""

    def __init__(self) -> None:
        self.state, self.stage, self.fraction, self.reason = "ready", "", 1.0, ""
        self.ready, self.base, self.gauges = True, BASE, Gauges(pool_used=12, host_bytes=4096)
        self.pool = (Placement("sha256:a", 4, 12),)
        self.loaded = asyncio.Event()
        self.loaded.set()
        self.stops: list[float] = []
        self.awaited: set[str] = set()

    def is_resident(self, digest: str) -> bool:
        return any(placement.digest == digest for placement in self.pool)

    async def start_worker(self) -> None:
        return None

    async def wait_ready(self) -> None:
        await self.loaded.wait()

    async def stop_worker(self, grace_s: float) -> None:
        self.stops.append(grace_s)


def check_source(source: str) -> None:
    """Raises the error that the source is named after."""
    if source == "bad":
        raise AdapterInvalid(["lora_A of q_proj has no lora_B", "r is 0"])
    if source == "gone":
        raise SourceMissing(["source 'gone': there is no such folder"])
    if source == "outside":
        raise Forbidden("the source is outside the adapters directory")


class FakeRegistry:
    """A registry of names; `calls` are the calls that it got."""

    base_id = "tiny"

    def __init__(self) -> None:
        self.names: dict[str, dict[str, Any]] = {}
        self.calls: list[tuple[Any, ...]] = []

    def claim_state(self) -> None:
        return None

    async def start_validator(self) -> None:
        return None

    async def open_catalog(self) -> None:
        return None

    async def close(self) -> None:
        self.calls.append(("close",))

    async def register_adapter(
        self, id: str, source: str, replace: bool = False, **rest: Any
    ) -> tuple[dict[str, Any], bool]:
        self.calls.append(("register", id, source, replace, rest))
        check_source(source)
        held = self.names.get(id)
        if held and held["source"] == source:
            return held, False
        if held and not replace:
            raise Conflict(f"{id} is taken by other content", param="id")
        pinned = rest.get("pinned", False)
        self.names[id] = {"id": id, "source": source, "digest": "sha256:" + source, "pinned": pinned}
        return self.names[id], held is None

    async def check_adapter(self, **registration: Any) -> dict[str, Any]:
        return {"ok": True, "summary": registration, "problems": []}

    async def upload_adapter(self, id: str, files: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
        self.calls.append(("upload", id, {name: await part.read() for name, part in files.items()}))
        return await self.register_adapter(id, ".uploads/x")

    async def remove_adapter(self, id: str, purge: bool) -> dict[str, Any]:
        held = self.card_of(id)
        del self.names[id]
        return {"id": id, "digest": held["digest"], "drained_requests": 0, "freed_bytes": 7, "purge": purge}

    async def pin_adapter(self, id: str, pinned: bool) -> dict[str, Any]:
        self.card_of(id)["pinned"] = pinned
        return self.card_of(id)

    def card_of(self, id: str) -> dict[str, Any]:
        if id not in self.names:
            raise AdapterNotFound(f"no adapter {id!r} is registered", param="model")
        return self.names[id]

    def list_cards(self) -> list[dict[str, Any]]:
        return list(self.names.values())

    def list_versions(self) -> list[Any]:
        return [
            SimpleNamespace(id=id, digest=held["digest"], registered_at=REGISTERED)
            for id, held in self.names.items()
        ]

    def summary_of(self, id: str) -> dict[str, Any]:
        return self.card_of(id) | {"rank": 4}

    def summary_text(self, id: str) -> str:
        return f"{self.card_of(id)['id']} rank 4"

    def draw_architecture(self, id: str) -> str:
        return f"{self.card_of(id)['id']}: base_layer"

    async def measure_norms(self, id: str) -> dict[str, Any]:
        return {"id": self.card_of(id)["id"], "modules": [{"name": "q_proj", "norms": [0.5, None]}]}

    def forecast_size(self, r: int, modules: list[str], dtype: str) -> dict[str, Any]:
        return {"r": r, "target_modules": modules, "dtype": dtype}


class ServedApp:
    """The app over the fakes, and an HTTP client for it."""

    def __init__(self, http: TestClient, client: FakeClient, registry: FakeRegistry) -> None:
        self.http, self.client, self.registry = http, client, registry
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
    client, registry = FakeClient(), FakeRegistry()
    if loading:
        client.state, client.ready, client.base = "loading", False, cast(BaseInfo, None)
        client.loaded.clear()
    chosen: Settings = read_settings({}, {"base": "org/none"} | settings)
    app = create_app(
        chosen,
        cast("WorkerClient", client),
        cast("Registry", registry),
        text=lambda folder: cast(Any, NoTokenizers()),
    )
    with TestClient(app, raise_server_exceptions=False) as http:
        found = ServedApp(http, client, registry)
        while not loading and not found.services.opened:
            http.get("/health")
        yield found
