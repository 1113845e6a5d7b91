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

from .fakes import DIGEST, Stage, stage
from .house import house


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(tmp_path_factory.mktemp("outcomes"), max_body_mb="0.01") as found:
        yield found


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


@pytest.mark.parametrize(("method", "path", "body", "status", "code"), REFUSED, ids=lambda one: str(one)[:30])
def test_a_refusal_at_the_door_counts_once_by_its_code(
    one: Stage, caplog: pytest.LogCaptureFixture, method: str, path: str, body: Any, status: int, code: str
) -> None:
    with counting() as grown, caplog.at_level(logging.INFO, "adapterd.access"):
        assert one.knock.request(method, path, json=body).status_code == status
    assert grown == {code: 1}
    (line,) = lines(caplog)
    assert (line["status"], line["outcome"]) == (status, code)


def test_refusals_for_want_of_a_key_count_too() -> None:
    with house(api_keys="sk-user") as home, counting() as grown:
        home.json("GET", "/adapters", status=401)
        home.json("GET", "/metrics", status=401)
        home.json("DELETE", "/adapters/x", status=403, headers={"authorization": "Bearer sk-user"})
    assert grown == {"unauthorized": 2, "forbidden": 1}


def test_a_full_queue_counts_once_and_a_probe_not_at_all(one: Stage) -> None:
    one.engine.limit = len(one.engine.asked)
    with counting() as grown:
        one.generate(status=429)
    assert grown == {"overloaded": 1}
    one.engine.limit = 10_000
    with house(loading=True) as home, counting() as grown:
        home.json("GET", "/ready", status=503)
        home.json("GET", "/adapters", status=503)
    assert grown == {"not_ready": 1}


def test_what_fails_in_the_engine_is_not_counted_again_at_the_door(
    one: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine counts the requests that it was given: it is a stand-in here, so nothing is
    counted at all.
    """
    one.says(" the end of it all")
    one.engine.fails = ("deadline_exceeded", "too long")
    with counting() as grown, caplog.at_level(logging.INFO, "adapterd.access"):
        one.generate(status=504, max_new_tokens=5)
        answer = one.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
        assert "deadline_exceeded" in answer.text
    one.engine.fails = None
    assert grown == {}
    assert [(line["status"], line["outcome"]) for line in lines(caplog)] == [
        (504, "deadline_exceeded"),
        (200, "deadline_exceeded"),
    ]


def test_a_defect_in_a_stream_counts_as_internal(
    one: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*given: Any) -> None:
        raise RuntimeError("the reason")

    monkeypatch.setattr("service.api.routes.generate._token_object", broken)
    with counting() as grown, caplog.at_level(logging.INFO, "adapterd.access"):
        one.post("/generate_stream", {"inputs": "Hi", "parameters": {"max_new_tokens": 5}})
    assert grown == {"internal": 1}
    assert lines(caplog)[-1]["outcome"] == "internal"


def test_the_line_of_an_answer_says_who_what_how_much_and_how_long(
    one: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    one.says(" the end of it all")
    with caplog.at_level(logging.INFO, "adapterd.access"):
        one.generate(adapter_id="x", max_new_tokens=3)
        one.post("/generate_stream", {"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 3}})
        one.complete(model="x", max_tokens=60, n=2)
        one.knock.get("/adapters")
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


def test_what_a_prompt_says_is_in_no_line(one: Stage, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        one.generate("my secret word")
        one.generate("my secret word", status=422, max_new_tokens=100_000)
        one.chat("my secret word", no_such=1, status=400)
    assert "secret word" not in "".join(
        str(record.__dict__) for record in caplog.records if record.name.startswith("adapterd")
    )


# ---- series


def series(one: Stage) -> set[str]:
    return {
        line.rsplit(" ", 1)[0]
        for line in one.knock.get("/metrics").text.splitlines()
        if not line.startswith("#")
    }


def test_names_that_nobody_registered_make_no_series(one: Stage) -> None:
    """C4: a scan of unknown ids and paths leaves `/metrics` as it was."""
    rng = random.Random(5)

    def scan() -> None:
        for _ in range(60):
            word = "".join(rng.choices("abcdefghij/.%", k=8))
            one.generate(status=404, adapter_id=word)
            one.complete(model=word, status=404)
            for path in (f"/adapters/{word}", f"/{word}", f"/v1/models/{word}"):
                one.knock.get(path)
            one.knock.delete(f"/adapters/{word}")

    scan()
    before = series(one)
    scan()
    assert series(one) == before


def test_no_label_holds_a_list(one: Stage) -> None:
    """C4: one value a label, as long as nobody asks for the gateway's gauge."""
    one.generate(adapter_id="x")
    values = re.findall(r'="([^"]*)"', one.knock.get("/metrics").text)
    assert values
    assert not [value for value in values if "," in value]


def test_the_gateways_gauge_is_off_unless_it_is_asked_for() -> None:
    resident = {"digest": "sha256:a", "rank": 12}
    with house(lora_requests_info="on", pool_rank="512") as home:
        home.shelf.names |= {
            "here": {"id": "here"} | resident,
            "twin": {"id": "twin"} | resident,
            "due": {"id": "due", "digest": "sha256:b", "rank": 100},
            "far": {"id": "far", "digest": "sha256:c", "rank": None},
            "broken": {"id": "broken", "digest": None, "rank": None},
        }
        home.client.awaited = {"sha256:b", "sha256:a"}
        (line,) = [
            line for line in home.knock.get("/metrics").text.splitlines() if line.startswith("adapterd_lora")
        ]
    places = 2 + (512 - 12) // 100
    assert line.startswith(
        f'adapterd_lora_requests_info{{max_lora="{places}",running_lora_adapters="here,twin",waiting_lora_adapters="due"}} 1.'
    )
    metrics.LORA_INFO.clear()
    with house() as home:
        assert "adapterd_lora_requests_info{" not in home.knock.get("/metrics").text


# ---- traces


def test_a_finished_request_is_recorded_with_its_stretches(tmp_path: Path) -> None:
    seen: list[Trace] = []
    parent = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    with stage(tmp_path, record=seen.append) as one:
        one.says(" the end of it all")
        one.knock.post(
            "/generate",
            json={"inputs": "Hi", "parameters": {"adapter_id": "x", "max_new_tokens": 3}},
            headers={"traceparent": parent},
        )
        one.knock.get("/adapters/org/y")
        one.knock.get("/no-such")
        one.knock.get("/health")
        one.engine.fails = ("internal", "a defect")
        one.post("/generate_stream", {"inputs": "Hi"})
    whole, card, unknown, broken = seen
    assert (whole.whole.name, whole.carrier, whole.failed) == (
        "POST /generate",
        {"traceparent": parent},
        False,
    )
    assert [part.name for part in whole.parts] == ["queue", "prefill", "decode"]
    assert (whole.fields["adapter"], whole.fields["outcome"], whole.fields["generated_tokens"]) == (
        "x",
        "length",
        3,
    )
    assert whole.whole.start <= whole.parts[0].start <= whole.parts[0].end
    assert card.whole.name == "GET /adapters/{id:path}"
    assert (unknown.whole.name, unknown.failed) == ("GET", False)
    assert (broken.fields["status"], broken.fields["outcome"], broken.failed) == (200, "internal", True)
