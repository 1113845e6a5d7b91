"""Health, readiness, metrics, versions, the base, the pages; and the layers around every route."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from service.api.routes import ops
from service.core.messages import Gauges
from service.errors import AdapterNotFound
from service.telemetry.logs import JsonFormatter, TextFormatter
from tests.doubles.engine import BASE

from .scripted_app import serve_script
from .served_app import ServedApp, serve_app


@pytest.fixture(scope="module")
def served() -> Iterator[ServedApp]:
    with serve_app(max_body_mb="0.001", max_upload_mb="0.002") as app:
        yield app


def test_while_it_loads_it_lives_but_is_not_ready() -> None:
    """C2: liveness and readiness are two things."""
    with serve_app(loading=True) as served:
        served.engine.stage, served.engine.fraction = "reading weights", 0.25
        assert served.json("GET", "/health")["state"] == "loading"
        assert served.json("GET", "/health")["fraction"] == 0.25
        answer = served.http.get("/ready")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
        assert int(answer.headers["retry-after"]) > 0
        assert "reading weights (25%)" in answer.json()["error"]
        for path in ("/adapters", "/base", "/forecast?r=8&target_modules=q_proj"):
            assert served.json("GET", path, status=503)["error_type"] == "not_ready"
        assert served.json("GET", "/info")["base"] is None


@pytest.mark.parametrize(
    ("state", "ready", "health"),
    [("restarting", False, 200), ("ready", False, 200), ("failed", False, 503), ("ready", True, 200)],
)
def test_health_is_503_only_when_nothing_can_help(state: str, ready: bool, health: int) -> None:
    with serve_app() as served:
        served.engine.state, served.engine.ready, served.engine.reason = (
            state,
            ready,
            "the worker does not answer",
        )
        body = served.json("GET", "/health", status=health)
        assert (body["details"] if health == 503 else body)["state"] == state
        answer = served.http.get("/ready")
        assert answer.status_code == (200 if ready else 503)
        assert ready or answer.headers["retry-after"]
        served.json("GET", "/adapters")


def test_why_the_worker_restarts_is_told() -> None:
    with serve_app() as served:
        served.engine.state, served.engine.ready = "restarting", False
        served.engine.reason = "the worker died (memory ran out and the system killed it)"
        assert served.json("GET", "/health")["reason"] == served.engine.reason
        assert served.engine.reason in served.json("GET", "/ready", status=503)["error"]


def test_a_base_that_cannot_be_served_is_told_with_its_reason_but_not_its_place(tmp_path: Path) -> None:
    with serve_app(loading=True, base=str(tmp_path)) as served:
        served.engine.reason = f"the folder {tmp_path} holds no config.json"
        served.engine.loaded.set()
        while not served.services.failure:
            served.http.get("/health")
        assert served.json("GET", "/health", status=503)["details"]["state"] == "failed"
        error = served.json("GET", "/ready", status=503)["error"]
        assert "no config.json" in error
        assert str(tmp_path) not in error


def test_draining_refuses_everything_but_the_probes() -> None:
    with serve_app() as served:
        served.services.draining = True
        assert served.json("GET", "/health")["state"] == "draining"
        assert served.http.get("/metrics").status_code == 200
        answer = served.http.get("/adapters")
        assert (answer.status_code, answer.json()["error_type"]) == (503, "not_ready")
        assert answer.headers["connection"] == "close"
        assert answer.headers["retry-after"]


def test_leaving_closes_the_registry_and_stops_the_engine() -> None:
    with serve_app() as served:
        pass
    assert served.registry.calls == [("close",)]
    assert served.engine.stops == [0]


def test_metrics_speak_both_formats(served: ServedApp) -> None:
    plain = served.http.get("/metrics")
    modern = served.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert plain.headers["content-type"].startswith("text/plain")
    assert modern.headers["content-type"].startswith("application/openmetrics-text")
    assert modern.text.endswith("# EOF\n")


def test_info_has_versions_and_no_place_of_the_host(served: ServedApp) -> None:
    answer = served.http.get("/info")
    assert answer.json()["versions"]["torch"]
    assert answer.json()["settings"]["max_body_mb"] == 0.001
    assert "secret" not in answer.text


def test_the_base_is_described(served: ServedApp) -> None:
    base = served.json("GET", "/base")
    assert (base["id"], base["architecture"], base["context_length"]) == ("tiny", "LlamaForCausalLM", 2048)
    assert base["modules"] == [{"name": "q_proj", "in_features": 64, "out_features": 64, "count": 2}]
    assert base["pool"] == {
        "rank_total": 512,
        "rank_used": 12,
        "placements": [{"digest": "sha256:a", "start": 4, "rank": 12}],
    }
    assert base["host_bytes"] == 4096
    assert base["rope"] is None
    assert base["kv"]["prefix_reuse"] is True
    assert base["states"] is None


def test_a_base_whose_layers_keep_states_says_their_bytes_and_that_no_prefix_is_reused() -> None:
    base, gauges = replace(BASE, rows=3, state_bytes=1000), Gauges()
    assert ops._states_fields(base) == {"bytes_per_sequence": 1000, "bytes": 6000}
    assert ops._kv_fields(base, gauges)["prefix_reuse"] is False


def test_the_root_is_the_console_for_browsers_only(served: ServedApp) -> None:
    page = served.http.get("/", headers={"accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert "script-src 'self'" in page.headers["content-security-policy"]
    assert "unsafe" not in page.headers["content-security-policy"]
    assert served.json("GET", "/", status=404)["error_type"] == "not_found"
    icon = served.http.get("/console/icon.svg")
    assert icon.headers["content-type"].startswith("image/svg+xml")
    for name in ("/no-such.js", "/..%2f..%2fops.py", "/%2e%2e/ops.py", "", "/"):
        assert served.json("GET", f"/console{name}", status=404)["error_type"] == "not_found"


@pytest.mark.parametrize("range", ["bytes=abc", "bytes=99999999-", "bytes=0-1"])
def test_files_go_out_whole(served: ServedApp, range: str) -> None:
    for path in ("/docs", "/console/app.js"):
        part, whole = served.http.get(path, headers={"range": range}), served.http.get(path)
        assert (part.status_code, part.content) == (200, whole.content)


def test_the_pages_of_the_api_ask_no_other_origin(served: ServedApp) -> None:
    page = served.http.get("/docs", headers={"accept": "text/html"})
    assert "http" not in page.text.replace("http-equiv", "")
    for name in ("swagger-ui-bundle.js", "swagger-ui.css", "start.js"):
        assert f"docs/{name}" in page.text
        assert served.http.get(f"/docs/{name}").status_code == 200


def test_the_description_lists_every_route_and_how_it_refuses(served: ServedApp) -> None:
    paths = served.json("GET", "/openapi.json")["paths"]
    assert paths.keys() >= {"/generate", "/generate_stream", "/", "/v1/chat/completions"}
    assert paths.keys() >= {"/adapters", "/adapters/{id}/upload", "/metrics", "/health"}
    for path, operations in paths.items():
        for operation in operations.values():
            assert {"401", "405", "413", "500"} <= operation["responses"].keys()
            assert ("422" in operation["responses"]) <= (not path.startswith("/v1/"))


def test_a_page_that_is_not_installed_is_404(
    served: ServedApp, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr("service.api.routes.ops.PAGES", tmp_path_factory.mktemp("empty"))
    assert served.json("GET", "/", status=404, headers={"accept": "text/html"})["error_type"] == "not_found"


def test_every_answer_has_an_id_and_the_security_headers(served: ServedApp) -> None:
    for path, sent, kept in (
        ("/health", "abc-1.2", True),
        ("/no-such", "x y", False),
        ("/health", "x" * 129, False),
        ("/health", "", False),
    ):
        answer = served.http.get(path, headers={"x-request-id": sent})
        assert (answer.headers["x-request-id"] == sent) is kept
        assert answer.headers["x-request-id"]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "default-src 'none'" in answer.headers["content-security-policy"]


def chunks(size: int) -> Iterator[bytes]:
    for _ in range(size // 100):
        yield b" " * 100


def test_a_body_over_the_limit_is_413_told_or_chunked(served: ServedApp) -> None:
    # Nothing has to be read
    assert served.http.post("/no-such", content=b" " * 1001).json()["error_type"] == "payload_too_large"
    for path, kind in (("/adapters", "error_type"), ("/v1/load_lora_adapter", "code")):
        answer = served.http.post(path, content=chunks(1100), headers={"content-type": "application/json"})
        assert answer.status_code == 413, answer.text
        refusal = answer.json()
        assert (refusal if kind in refusal else refusal["error"])[kind] == "payload_too_large"
    assert (
        served.http.post(
            "/adapters", content=chunks(1000), headers={"content-type": "application/json"}
        ).status_code
        == 422
    )


def test_only_an_upload_may_be_as_large_as_one(served: ServedApp) -> None:
    served.json("POST", "/adapters/x/upload", status=201, content=chunks(1500))
    served.json("PUT", "/adapters/x/upload", status=200, content=chunks(1500))
    headers = {"content-type": "application/json"}
    answer = served.http.patch("/adapters/x/upload", content=chunks(1500), headers=headers)
    assert (answer.status_code, answer.json()["error_type"]) == (413, "payload_too_large")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [record.__dict__["fields"] for record in caplog.records if record.name == "adapterd.access"]


def test_one_line_a_request_without_its_query(served: ServedApp, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "adapterd.access"):
        served.http.get(
            "/adapters?key=sk-secret", headers={"x-request-id": "one", "authorization": "Bearer sk-secret"}
        )
        served.http.get("/health")
    (line,) = lines(caplog)
    assert (line["id"], line["method"], line["path"], line["status"]) == ("one", "GET", "/adapters", 200)
    assert "sk-secret" not in caplog.text + str(line)


def test_the_line_of_a_stream_says_what_its_headers_could_not_yet(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve_script(tmp_path) as api, caplog.at_level(logging.INFO, "adapterd.access"):
        answer = api.http.post("/generate_stream", json={"inputs": "Hi", "parameters": {"max_new_tokens": 3}})
    assert "x-generated-tokens" not in answer.headers
    (line,) = lines(caplog)
    assert (line["prompt_tokens"], line["generated_tokens"]) == (int(answer.headers["x-prompt-tokens"]), 3)


def test_a_defect_is_logged_with_its_trace_and_the_request_id(
    served: ServedApp, caplog: pytest.LogCaptureFixture
) -> None:
    def broken() -> None:
        raise RuntimeError("the reason")

    served.registry.__dict__["list_cards"] = broken
    with caplog.at_level(logging.INFO, "adapterd.access"):
        served.http.get("/adapters", headers={"x-request-id": "two"})
    del served.registry.__dict__["list_cards"]
    trace, line = (record for record in caplog.records if record.name == "adapterd.access")
    assert trace.exc_info is not None
    assert trace.__dict__["fields"] == {"id": "two"}
    assert line.__dict__["fields"]["status"] == 500


def record(message: str, **fields: object) -> logging.LogRecord:
    line = logging.LogRecord("adapterd", logging.INFO, "here.py", 1, message, None, None)
    line.__dict__["fields"] = fields
    return line


def test_a_log_line_cannot_be_forged() -> None:
    forged = record("request", path="/a\nINFO request path=/b", status=200)
    assert "\n" not in TextFormatter().format(forged)
    assert TextFormatter().format(forged).endswith('path="/a\\nINFO request path=/b" status=200')
    assert TextFormatter().format(record("request", path="/a\n")).endswith('path="/a\\n"')
    assert (
        TextFormatter()
        .format(record("the adapter x cannot be used: a\nb\x1b[2J\u2028é"))
        .endswith("used: a\\nb\\x1b[2J\\u2028é")
    )
    assert json.loads(JsonFormatter().format(forged))["path"] == "/a\nINFO request path=/b"


def test_what_an_adapters_files_say_of_it_can_be_told_whatever_it_is(served: ServedApp) -> None:
    """JSON may hold a lone surrogate, which UTF-8 does not have."""
    served.json("POST", "/adapters", {"id": "odd", "source": "odd"}, status=201)
    served.registry.cards["odd"]["claimed"] = "\ud800é"
    for path in ("/adapters", "/adapters/odd", "/adapters/odd/summary"):
        answer = served.http.get(path)
        assert (answer.status_code, "\\ud800é" in answer.text) == (200, True)
        assert answer.json()
    served.registry.cards["odd"]["id"] = "\ud800é"
    assert served.http.get("/adapters/odd/summary?format=text").text == "\\ud800é rank 4"


def test_a_trace_is_part_of_the_line() -> None:
    try:
        raise AdapterNotFound("gone")
    except AdapterNotFound as error:
        line = record("a defect")
        line.exc_info = (type(error), error, error.__traceback__)
    assert "gone" in json.loads(JsonFormatter().format(line))["exception"]
    assert "Traceback" in TextFormatter().format(line)
