"""The app over an engine with a script: real tokenizer, real tickets, scripted tokens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from starlette.testclient import TestClient

from service.app import create_app
from service.core.error_codes import ErrorCode
from service.core.manifest import Manifest, compute_digest, read_manifest
from service.core.request import Event, Finish, Request, Token
from service.errors import AdapterNotFound, Overloaded
from service.settings import read_settings
from service.telemetry import metrics
from service.telemetry.traces import Trace
from service.text.tokenizers import Tokenizers
from service.worker.ticket import Ticket
from tests import making

from .served_app import BASE, FakeClient, FakeRegistry

Script = Callable[[Request], Sequence[int]]
DIGEST = "sha256:" + "a" * 64


class FakeEngine(FakeClient):
    """Sends the script's tokens, then eos for ever.

    `asked` are all requests, `cancelled` those whose caller left before the end.

    With `gate` closed nothing comes after the first `early` tokens of a request. `fails` is (code,
    message) instead of the third token.
    """

    def __init__(self) -> None:
        super().__init__()
        self.base = replace(BASE, vocab_size=len(making.tokenizer()), context=512)
        self.script: Script = lambda request: making.ids(" the end of it all")
        self.asked: list[Request] = []
        self.tickets: list[Ticket] = []
        self.cancelled: list[int] = []
        self.limit = 100
        self.early = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.fails: tuple[str, str] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def submit_request(self, request: Request) -> Ticket:
        if len(self.asked) >= self.limit:
            raise Overloaded("the queue is full", retry_after=1)
        request = replace(request, id=len(self.asked))
        ticket = Ticket(request, self._cancel_request)
        self.asked.append(request)
        self.tickets.append(ticket)
        task = asyncio.get_running_loop().create_task(self._run(ticket))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return ticket

    def _cancel_request(self, ticket: Ticket) -> None:
        if not ticket.stopped:
            self.cancelled.append(ticket.request.id)
        ticket.deliver_event(Event(ticket.request.id, finish=Finish.CANCELLED), 2.0)

    async def _run(self, ticket: Ticket) -> None:
        ticket.started = ticket.submitted
        for i, event in enumerate(make_events(ticket.request, self.script(ticket.request))):
            if i >= self.early:
                await self.gate.wait()
            await asyncio.sleep(0)
            if i == 2 and self.fails:
                code, message = ErrorCode(self.fails[0]), self.fails[1]
                event = Event(ticket.request.id, finish=Finish.FAILED, code=code, message=message)
            if ticket.ended is None:
                ticket.deliver_event(event, ticket.submitted + i)


def make_events(request: Request, script: Sequence[int]) -> Iterator[Event]:
    scored = make_scored(request)
    if request.max_tokens == 0:
        yield Event(request.id, finish=Finish.LENGTH, prompt=scored)
    wanted = request.sampling.logprobs
    for i in range(request.max_tokens):
        id = script[i] if i < len(script) else 2
        finish = Finish.LENGTH if i + 1 == request.max_tokens else None
        if id in request.eos:
            finish = Finish.EOS
        token = Token(id) if wanted is None else make_token(id, wanted, -0.5 - i)
        yield Event(request.id, token, finish, scored if i == 0 else ())
        if finish:
            return


def make_scored(request: Request) -> tuple[Token, ...]:
    """The prompt's tokens with log probabilities, where the request wants them."""
    wanted = request.prompt_logprobs
    if wanted is None:
        return ()
    return tuple(make_token(id, wanted, -1.0 if i else None) for i, id in enumerate(request.prompt))


def make_token(id: int, wanted: int | None, logprob: float | None) -> Token:
    """A token that is the second likeliest."""
    others = ((70, -0.1), (id, logprob or 0.0), (71, -20.0), (72, float("-inf")))
    return Token(id, logprob, () if logprob is None else others[:wanted])


@dataclass
class FakeVersion:
    id: str
    digest: str
    folder: Path
    files: Manifest = ()
    place: Any = None


class LeasingRegistry(FakeRegistry):
    """The ids `x` and `org/y`, and what is leased."""

    def __init__(self, root: Path) -> None:
        super().__init__()
        self.leased: list[str] = []
        for id in ("x", "org/y"):
            self.names[id] = {"id": id, "digest": DIGEST, "source": id}
            metrics.adapter_registered(id)
        self.root = root

    @contextmanager
    def lease_adapter(self, id: str) -> Iterator[FakeVersion]:
        if id not in self.names:
            raise AdapterNotFound(f"no adapter {id!r}", param="model")
        self.leased.append(id)
        try:
            folder = self.root / id
            folder.mkdir(parents=True, exist_ok=True)
            files = read_manifest(folder)
            digest = compute_digest(files) if files else DIGEST
            yield FakeVersion(id, digest, folder, files, FakeLocation(f"hub:{id}" if "/" in id else id))
        finally:
            self.leased.remove(id)


@dataclass
class FakeLocation:
    source: str


@dataclass
class ScriptedApp:
    """The app, the fakes that it runs over, and short calls of its routes."""

    app: Any
    http: TestClient
    engine: FakeEngine
    names: LeasingRegistry

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

    @property
    def request(self) -> Request:
        """The last request that the engine got."""
        return self.engine.asked[-1]

    def says(self, text: str) -> None:
        self.engine.script = lambda request: making.ids(text)

    @property
    def quiet(self) -> bool:
        """Nothing is leased and no ticket is left running."""
        return not self.names.leased and all(ticket.ended is not None for ticket in self.engine.tickets)


@contextmanager
def serve_script(
    root: Path, template: str | None = None, record: Callable[[Trace], None] | None = None, **settings: str
) -> Iterator[ScriptedApp]:
    base = root / "base"
    making.tokenizer().save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    if template:
        (base / "chat_template.jinja").write_text(template)
    engine, names = FakeEngine(), LeasingRegistry(root)
    chosen = read_settings({}, {"base": "org/none", **settings})
    app = create_app(
        chosen, cast(Any, engine), cast(Any, names), text=lambda _: Tokenizers(base), record=record
    )
    with TestClient(app, raise_server_exceptions=False) as http:
        while not app.state.services.opened:
            http.get("/health")
        yield ScriptedApp(app, http, engine, names)
