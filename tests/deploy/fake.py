"""A stand-in for an OpenAI-compatible server: streams numbered words with pauses that the test
chooses, and remembers what it was asked.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from typing import Any

from tests.loopback import listening


@dataclass
class Fake:
    """`first` and `gap` are seconds before the first and between further tokens; a `gate` opens
    when as many as it counts wait.

    The model `broken` answers 500, `torn` ends in an error event. One that `is_llama` lists its adapters as
    llama.cpp does.
    """

    adapters: list[str] = field(default_factory=lambda: ["a", "b"])
    first: float = 0.0
    gap: float = 0.0
    gate: threading.Barrier | None = None
    asked: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most: int = 0
    is_llama: bool = False
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def listed(self, path: str) -> Any:
        if path == "/lora-adapters":
            return [{"id": i, "path": name, "scale": 0.0} for i, name in enumerate(self.adapters)]
        if self.is_llama:
            return {"object": "list", "data": [{"id": "base", "object": "model", "owned_by": "llamacpp"}]}
        base = {"id": "base", "object": "model", "parent": None}
        return {
            "object": "list",
            "data": [{"id": name, "object": "model", "parent": "base"} for name in self.adapters] + [base],
        }

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        if self.gate:
            self.gate.wait(timeout=10)
        time.sleep(self.first)
        for i in range(body["max_tokens"]):
            if body.get("model") == "torn" and i:
                yield json.dumps({"error": {"message": "the worker died"}})
                return
            time.sleep(self.gap if i else 0)
            yield json.dumps({"choices": [{"index": 0, "text": f" {i}"}]})
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": body["max_tokens"]}
        yield json.dumps({"choices": [], "usage": usage})
        yield "[DONE]"

    def enter(self, body: dict[str, Any]) -> None:
        with self.lock:
            self.asked.append(body)
            self.running += 1
            self.most = max(self.most, self.running)

    def leave(self) -> None:
        with self.lock:
            self.running -= 1


class FakeHandler(BaseHTTPRequestHandler):
    """Answers one request as the fake of its subclass would."""

    fake: Fake

    def do_GET(self) -> None:
        self.start_answer(200, "application/json")
        self.wfile.write(json.dumps(self.fake.listed(self.path)).encode())

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if body.get("model") == "broken":
            self.start_answer(500, "application/json")
            self.wfile.write(b'{"error": {"message": "no"}}')
            return
        self.fake.enter(body)
        self.start_answer(200, "text/event-stream")
        for data in self.fake.stream(body):
            self.send_event(data)

    def send_event(self, data: str) -> None:
        # Counted out before the last bytes go: the client's next request must not meet this one.
        if data == "[DONE]":
            self.fake.leave()
        self.wfile.write(f"data: {data}\n\n".encode())
        self.wfile.flush()

    def start_answer(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


@contextmanager
def serving(fake: Fake) -> Iterator[Fake]:
    """Listens on loopback until the block ends; `fake.url` says where."""
    handler = type("HandlerOfOneFake", (FakeHandler,), {"fake": fake})
    with listening(handler) as fake.url:
        yield fake
