"""Long answers as JSON: whole and right, and all but their beginning made where nobody waits for
it.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.api.generation import rendering
from service.api.generation.logprobs import finite_logprob
from service.api.routes import chat, completions, generate
from service.text.tokenizers import AdapterTokenizer
from tests import making
from tests.test_event_loop import on_a_loop

from .scripted_app import ScriptedApp, serve_script

LONG = " ".join(["the end of it all"] * 30)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(
        tmp_path_factory.mktemp("rendering"), template="{% for m in messages %}{{ m.content }}{% endfor %}"
    ) as scripted:
        scripted.engine.limit = 10_000
        yield scripted


def rendered(value: Any) -> bytes:
    return b"".join(asyncio.run(rendering.render_pieces(value)))


def made(*values: Any) -> Iterator[Any]:
    """As a generator, whose elements are made when they are asked for."""
    yield from values


@pytest.mark.parametrize(
    ("later", "now"),
    [
        ({"a": made()}, {"a": []}),
        ({"a": made(1, None, "x"), "b": 2.5}, {"a": [1, None, "x"], "b": 2.5}),
        (
            [{"b": made({"c": made("\ud800", '"')}, {"c": made()})}],
            [{"b": [{"c": ["\ud800", '"']}, {"c": []}]}],
        ),
        ({"a": {"b": [1, 2], "c": made(made(1), made(2))}}, {"a": {"b": [1, 2], "c": [[1], [2]]}}),
        ({"plain": [1, {"two": "é"}]}, {"plain": [1, {"two": "é"}]}),
        (made(), []),
    ],
)
def test_it_is_the_json_of_the_whole(later: Any, now: Any) -> None:
    text = rendered(later)
    assert json.loads(text) == now
    assert not set(text) & set(b" \n")


@pytest.mark.parametrize("size", [1, 7, rendering.PIECE - 1, rendering.PIECE, 3 * rendering.PIECE])
def test_pieces_make_the_whole_wherever_they_end(size: int) -> None:
    parts = ["x" * size, "y", "z" * size]
    assert json.loads(rendered({"a": made(*parts * 3)})) == {"a": parts * 3}


def test_what_json_does_not_have_is_a_defect_and_no_half_answer() -> None:
    with pytest.raises(ValueError, match="JSON compliant"):
        rendered({"a": made(*[1.0] * 10_000, float("nan"))})


def test_only_the_beginning_is_made_on_the_event_loop() -> None:
    where: list[bool] = []

    def numbers() -> Iterator[str]:
        for _ in range(20):
            where.append(on_a_loop())
            yield "x" * (rendering.PIECE // 4)

    rendered({"a": numbers()})
    assert where == [True] * 4 + [False] * 16


CHAT = {"model": "base", "messages": [{"role": "user", "content": "Hi"}], "logprobs": True, "top_logprobs": 4}
TEXT = {"model": "base", "prompt": "Hi", "logprobs": 4}
ECHO = {"model": "base", "prompt": LONG, "logprobs": 4, "echo": True, "max_tokens": 1}
PREFILL = {
    "inputs": LONG,
    "parameters": {"decoder_input_details": True, "details": True, "max_new_tokens": 1},
}
DETAILS = {"details": True, "top_n_tokens": 4, "max_new_tokens": 60, "ignore_eos_token": True, "seed": 1}
LARGE: dict[str, tuple[str, dict[str, Any]]] = {
    "chat": ("/v1/chat/completions", CHAT | {"n": 4, "max_tokens": 60, "ignore_eos": True}),
    "completions": ("/v1/completions", TEXT | {"n": 4, "max_tokens": 60, "ignore_eos": True}),
    "echo": ("/v1/completions", ECHO),
    "a streamed echo": ("/v1/completions", ECHO | {"stream": True}),
    "details": ("/generate", {"inputs": "Hi", "parameters": DETAILS}),
    "best of": ("/", {"inputs": "Hi", "parameters": DETAILS | {"best_of": 4, "do_sample": True}}),
    "prefill": ("/generate", PREFILL),
    "a streamed prefill": ("/generate_stream", PREFILL),
}


def told(api: ScriptedApp, path: str, body: dict[str, Any]) -> list[Any]:
    """The answer's objects, without what differs from one request to the next."""
    answer = api.post(path, body)
    texts = answer.text.replace("data: [DONE]", "").split("data: ")
    objects = [json.loads(text) for text in texts if text.strip()]
    for object in objects:
        if isinstance(object, dict):
            object |= {"id": "", "created": 0}
    return objects


@pytest.mark.parametrize("what", LARGE)
def test_a_large_answer_is_made_off_the_event_loop(
    api: ScriptedApp, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Every stream and `/health` wait for what is made on it: n = 128 with 20 runner-ups took 12 s."""
    path, body = LARGE[what]
    whole = told(api, path, body)
    where: list[bool] = []

    def watched(logprob: float | None) -> float | None:
        where.append(on_a_loop())
        return finite_logprob(logprob)

    for module in (chat, completions, generate):
        monkeypatch.setattr(module, "finite_logprob", watched)
    monkeypatch.setattr(rendering, "PIECE", 500)
    assert told(api, path, body) == whole
    assert where.count(True) < 40
    assert where.count(False) > 100


@pytest.mark.parametrize(
    "fields",
    [
        {"logprobs": 1, "n": 16},
        {"echo": True},
        {"echo": True, "logprobs": 1},
        {"logprobs": 1, "stream": True},
    ],
)
def test_a_long_prompt_of_ids_is_read_off_the_event_loop_and_once(
    api: ScriptedApp, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> None:
    read: list[bool] = []
    decode: Callable[..., str] = AdapterTokenizer.decode

    def watched(*arguments: Any) -> str:
        read.append(on_a_loop())
        return decode(*arguments)

    monkeypatch.setattr(AdapterTokenizer, "decode", watched)
    monkeypatch.setattr("service.api.generation.admission.MANY_IDS", 100)
    api.post(
        "/v1/completions", {"model": "base", "prompt": list(making.ids(LONG)), "max_tokens": 1, **fields}
    )
    assert read == [False]


def test_a_short_answer_needs_no_thread(api: ScriptedApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "run_in", pytest.fail)
    for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", TEXT | {"stream": True})):
        api.post(path, body | {"max_tokens": 4})


def test_tokens_texts_are_read_once(api: ScriptedApp) -> None:
    """Beside each token twenty likely ones are told, nearly always the same."""
    piece = api.app.state.services.tokenizers.base.words.piece
    piece.cache_clear()
    api.complete(max_tokens=60, logprobs=4, ignore_eos=True, n=8)
    info = piece.cache_info()
    assert info.hits > 20 * info.misses
