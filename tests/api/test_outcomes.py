"""How a request ended, as the log, the failure counter, the series and the traces tell it: once,
and by the same word.
"""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from service.telemetry import metrics
from service.telemetry.traces import Trace
from tests import making
from tests.doubles.registry import DIGEST

from .scripted_app import ScriptedApp, serve_script
from .served_app import serve_app


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("outcomes"), max_body_mb="0.01") as scripted:
        yield scripted


def failures() -> dict[str, float]:
    return {
        s.labels["code"]: s.value
        for family in metrics.FAILURE.collect()
        for s in family.samples
        if s.name.endswith("_total")
    }


@contextmanager
def counting() -> Iterator[dict[str, float]]:
    """How often each code was counted in the block."""
    before, grown = failures(), dict[str, float]()
    yield grown
    grown |= {
        code: value - before.get(code, 0)
        for code, value in failures().items()
        if value != before.get(code, 0)
    }


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "adapterd.access"]


REFUSED: list[tuple[str, str, Any, int, str]] = [
    ("POST", "/generate", {"inputs": "Hi", "parameters": {"adapter_id": "none"}}, 404, "adapter_not_found"),
    ("POST", "/v1/completions", {"model": "none", "prompt": "Hi"}, 404, "adapter_not_found"),
    ("POST", "/generate", {"inputs": "Hi", "no_such": 1}, 422, "validation"),
    ("POST", "/v1/completions", {"model": "base", "prompt": "Hi", "no_such": 1}, 400, "validation"),
    (
        "POST",
        "/generate",
        {"inputs": "Hi", "parameters": {"max_new_tokens": 100_000}},
        422,
        "context_length_exceeded",
    ),
    ("POST", "/generate", {"inputs": "a" * 20_000}, 413, "payload_too_large"),
    ("GET", "/no-such", None, 404, "not_found"),
    ("DELETE", "/info", None, 405, "method_not_allowed"),
    ("POST", "/adapters", {"id": "x", "source": "other"}, 409, "conflict"),
    ("POST", "/adapters", {"id": "new", "source": "bad"}, 422, "adapter_invalid"),
]


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), REFUSED, ids=lambda api: str(api)[:30])
def test_a_refusal_by_the_api_counts_once_by_its_code(
    api: ScriptedApp,
    caplog: pytest.LogCaptureFixture,
    method: str,
    path: str,
    body: Any,
    status: int,
    code: str,
) -> None:
    with counting() as grown, caplog.at_level(logging.INFO, "adapterd.access"):
        assert api.http.request(method, path, json=body).status_code == status
    assert grown == {code: 1}
    (line,) = lines(caplog)
    assert (line["status"], line["outcome"]) == (status, code)


def test_refusals_for_want_of_a_key_count_too() -> None:
    with serve_app(api_keys="sk-user") as served, counting() as grown:
        served.json("GET", "/adapters", status=401)
        served.json("GET", "/metrics", status=401)
        served.json("DELETE", "/adapters/x", status=403, headers={"authorization": "Bearer sk-user"})
    assert grown == {"unauthorized": 2, "forbidden": 1}


def test_a_full_queue_counts_once_and_a_probe_not_at_all(api: ScriptedApp) -> None:
    api.engine.limit = len(api.engine.requests)
    with counting() as grown:
        api.generate(status=429)
    assert grown == {"overloaded": 1}
    api.engine.limit = 10_000
    with serve_app(loading=True) as served, counting() as grown:
        served.json("GET", "/ready", status=503)
        served.json("GET", "/adapters", status=503)
    assert grown == {"not_ready": 1}


def test_what_fails_in_the_engine_is_not_counted_again_by_the_api(
    api: ScriptedApp, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine counts the requests that it was given; this one is a stand-in, which counts nothing."""
    api.says(" the end of it all")
    api.engine.fails = ("deadline_exceeded", "too long")
    with counting() as grown, caplog.at_level(logging.INFO, "adapterd.access"):
        api.generate(status=504, max_new_tokens=5)
        answer = api.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
        assert "deadline_exceeded" in answer.text
    api.engine.fails = None
    assert grown == {}
    assert [line["status"] for line in lines(caplog)] == [504, 200]
    assert {line["outcome"] for line in lines(caplog)} == {"deadline_exceeded"}


def test_a_defect_in_a_stream_counts_as_internal(
    api: ScriptedApp, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr("service.api.routes.generate._token_object", broken)
    with counting() as grown, caplog.at_level(logging.INFO, "adapterd.access"):
        api.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
    assert grown == {"internal": 1}
    assert lines(caplog)[-1]["outcome"] == "internal"


def test_the_line_of_an_answer_says_who_what_how_much_and_how_long(
    api: ScriptedApp, caplog: pytest.LogCaptureFixture
) -> None:
    api.says(" the end of it all")
    with caplog.at_level(logging.INFO, "adapterd.access"):
        api.generate(adapter_id="x", max_new_tokens=3)
        api.post("/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 3}})
        api.complete(model="x", max_tokens=60, n=2)
        api.http.get("/adapters")
    whole, streamed, several, listing = lines(caplog)
    for line in (whole, streamed):
        assert (line["adapter"], line["digest"], line["outcome"]) == ("x", DIGEST, "length")
        assert (line["prompt_tokens"], line["generated_tokens"]) == (len(making.ids("Hi")), 3)
        assert all(
            isinstance(line[name], float) for name in ("ms", "queue_ms", "inference_ms", "first_token_ms")
        )
        assert line["id"]
    assert several["outcome"] == "eos_token"
    assert listing["outcome"] == "ok"
    assert "adapter" not in listing


def test_what_a_prompt_says_is_in_no_line(api: ScriptedApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        api.generate("my secret word")
        api.generate("my secret word", status=422, max_new_tokens=100_000)
        api.chat("my secret word", no_such=1, status=400)
    assert "secret word" not in "".join(
        str(record.__dict__) for record in caplog.records if record.name.startswith("adapterd")
    )


# ---- series


def series(api: ScriptedApp) -> set[str]:
    return {
        line.rsplit(" ", 1)[0]
        for line in api.http.get("/metrics").text.splitlines()
        if not line.startswith("#")
    }


def test_names_that_nobody_registered_make_no_series(api: ScriptedApp) -> None:
    """C4: a scan of unknown ids and paths leaves `/metrics` as it was."""
    rng = random.Random(5)
    scan_names(api, rng)
    before = series(api)
    scan_names(api, rng)
    assert series(api) == before


def scan_names(api: ScriptedApp, rng: random.Random) -> None:
    for _ in range(60):
        word = "".join(rng.choices("abcdefghij/.%", k=8))
        api.generate(status=404, adapter_id=word)
        api.complete(model=word, status=404)
        for path in (f"/adapters/{word}", f"/{word}", f"/v1/models/{word}"):
            api.http.get(path)
        api.http.delete(f"/adapters/{word}")


def test_no_label_holds_a_list(api: ScriptedApp) -> None:
    """C4: one value a label, as long as nobody asks for the gateway's gauge."""
    api.generate(adapter_id="x")
    values = re.findall(r'="([^"]*)"', api.http.get("/metrics").text)
    assert values
    assert not [value for value in values if "," in value]


def test_the_gateways_gauge_is_off_unless_it_is_asked_for() -> None:
    resident = {"digest": "sha256:a", "rank": 12}
    cards: dict[str, dict[str, Any]] = {
        "here": resident,
        "twin": resident,
        "due": {"digest": "sha256:b", "rank": 100, "residency": "disk"},
        "far": {"digest": "sha256:c", "rank": None, "residency": "disk"},
        "broken": {"digest": None, "rank": None, "residency": "disk"},
    }
    with serve_app(lora_requests_info="on", pool_rank="512") as served:
        shared = {"pinned": False, "residency": "device"}
        served.registry.cards |= {id: {"id": id} | shared | card for id, card in cards.items()}
        served.engine.awaited = {"sha256:b", "sha256:a"}
        lines = served.http.get("/metrics").text.splitlines()
        (line,) = [line for line in lines if line.startswith("adapterd_lora_requests_info")]
        loaded = [line for line in lines if line.startswith("adapterd_lora_adapter_loaded")]
    adapters = 2 + (512 - 12) // 100
    assert line.startswith(
        f'adapterd_lora_requests_info{{max_lora="{adapters}",'
        'running_lora_adapters="here,twin",waiting_lora_adapters="due"} 1.'
    )
    assert (
        'adapterd_lora_adapter_loaded{adapter_name="here",level="gpu",pinned="false",rank="12"} 1.0' in loaded
    )
    metrics.LORA_INFO.clear()
    metrics.LORA_LOADED.clear()
    with serve_app() as served:
        assert not re.search(r"^adapterd_lora_\w+\{", served.http.get("/metrics").text, re.M)


# ---- traces

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def test_finished_requests_are_recorded_with_their_parts(tmp_path: Path) -> None:
    traces: list[Trace] = []
    body = {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 3}}
    with serve_script(tmp_path, record=traces.append) as api:
        api.says(" the end of it all")
        api.http.post("/generate", json=body, headers={"traceparent": PARENT})
        for path in ("/adapters/org/y", "/no-such", "/health"):
            api.http.get(path)
        api.engine.fails = ("internal", "a defect")
        api.post("/generate_stream", {"inputs": "Hi"})
    generate, card, unknown, broken = traces
    assert_whole(generate)
    assert card.whole.name == "GET /adapters/{id:path}"
    assert (unknown.whole.name, unknown.failed) == ("GET", False)
    assert (broken.fields["status"], broken.fields["outcome"], broken.failed) == (200, "internal", True)


def assert_whole(trace: Trace) -> None:
    assert (trace.whole.name, trace.failed) == ("POST /generate", False)
    assert trace.carrier == {"traceparent": PARENT}
    assert [part.name for part in trace.parts] == ["queue", "prefill", "decode"]
    assert (trace.fields["adapter"], trace.fields["outcome"]) == ("x", "length")
    assert trace.fields["generated_tokens"] == 3
    assert trace.whole.start <= trace.parts[0].start <= trace.parts[0].end
