"""The app over an engine with a script: real tokenizer, real tickets, scripted tokens."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from service.app import create_app
from service.core.request import Request
from service.settings import read_settings
from service.telemetry.traces import Trace
from service.text.tokenizers import Tokenizers
from tests import making
from tests.doubles.engine import BASE, FakeEngine
from tests.doubles.registry import FakeRegistry


@dataclass
class ScriptedApp:
    """The app, the stand-ins that it runs over, and short calls of its routes."""

    app: Any
    http: TestClient
    engine: FakeEngine
    registry: FakeRegistry

    def post(self, path: str, body: Any, status: int = 200) -> Any:
        """A value that JSON does not have is given as bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = self.http.post(path, content=content, headers={"content-type": "application/json"})
        assert answer.status_code == status, answer.text
        return answer

    def generate(self, inputs: str = "Hi", status: int = 200, **parameters: Any) -> Any:
        return self.post("/generate", {"inputs": inputs, "parameters": parameters}, status).json()

    def complete(self, prompt: Any = "Hi", status: int = 200, **fields: Any) -> Any:
        return self.post("/v1/completions", {"model": "tiny", "prompt": prompt, **fields}, status).json()

    def chat(self, messages: Any = "Hi", status: int = 200, **fields: Any) -> Any:
        messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.post(
            "/v1/chat/completions", {"model": "tiny", "messages": messages, **fields}, status
        ).json()

    def stream(self, path: str, body: Any) -> list[Any]:
        """The events; under /v1 without the [DONE] that must end them."""
        answer = self.post(path, body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert (answer.headers["cache-control"], answer.headers["x-accel-buffering"]) == ("no-cache", "no")
        frames = answer.text.split("\n\n")
        assert frames.pop() == ""
        assert all(frame.startswith("data: ") and "\n" not in frame for frame in frames)
        if path.startswith("/v1/"):
            assert frames.pop() == "data: [DONE]"
        return [json.loads(frame.removeprefix("data: ")) for frame in frames]

    def named_events(self, path: str, body: Any) -> list[Any]:
        """The events of a dialect that names each in a line before it and has no [DONE]."""
        answer = self.post(path, body)
        assert answer.headers["content-type"].startswith("text/event-stream")
        frames = answer.text.split("\n\n")
        assert frames.pop() == ""
        events = []
        for name, data in (frame.split("\n") for frame in frames):
            events.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {events[-1]['type']}"
        return events

    @property
    def request(self) -> Request:
        """The last request that the engine got."""
        return self.engine.requests[-1]

    def says(self, text: str) -> None:
        self.engine.script = lambda request: making.ids(text)

    @property
    def quiet(self) -> bool:
        """Nothing is leased and no ticket is left running."""
        return not self.registry.leased and all(ticket.ended is not None for ticket in self.engine.tickets)


@contextmanager
def serve_script(
    root: Path, template: str | None = None, record: Callable[[Trace], None] | None = None, **settings: str
) -> Iterator[ScriptedApp]:
    base = root / "base"
    making.tokenizer().save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    if template:
        (base / "chat_template.jinja").write_text(template)
    engine = FakeEngine(replace(BASE, vocab_size=len(making.tokenizer()), context=512))
    registry = FakeRegistry(root, ids=("x", "org/y"))
    chosen = read_settings({}, {"base": "org/none", **settings})
    app = create_app(chosen, engine, registry, text=lambda _: Tokenizers(base), record=record)
    with TestClient(app, raise_server_exceptions=False) as http:
        while not app.state.services.opened:
            http.get("/health")
        scripted = ScriptedApp(app, http, engine, registry)
        scripted.says(" the end of it all")
        yield scripted
