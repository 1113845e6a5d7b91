"""Traces: sent to a stand-in for a collector on loopback where the exporter's variables ask for it,
and not even imported where not.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from service import __version__
from service.errors import SettingsError
from service.telemetry import traces
from service.telemetry.traces import Trace, TracePart, Tracer

from ..loopback import listening
from ..test_main import ROOT, ended, environment, run, server

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Collector:
    """What came: each export's headers and message."""

    def __init__(self) -> None:
        self.got: list[tuple[dict[str, str], ExportTraceServiceRequest]] = []
        self.url = ""

    @property
    def spans(self) -> list[Span]:
        return [
            span
            for _, one in self.got
            for resource in one.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]

    @property
    def resource(self) -> dict[str, str]:
        return {
            one.key: one.value.string_value for one in self.got[0][1].resource_spans[0].resource.attributes
        }


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["content-length"]))
            assert self.path == "/v1/traces"
            found.got.append((dict(self.headers), ExportTraceServiceRequest.FromString(content)))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            return

    with listening(Handler) as found.url:
        yield found


@contextmanager
def asked(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Iterator[Tracer]:
    """The tracer of these variables, which has sent everything when the block ends."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made = traces.make_tracer(os.environ)
    assert made is not None
    yield made
    made.flush_and_close()


def done(now: float, failed: bool = False) -> Trace:
    parts = [TracePart("queue", now - 3, now - 2.5), TracePart("decode", now - 2, now - 1)]
    fields = {
        "id": "abc",
        "method": "POST",
        "status": 200,
        "adapter": "x",
        "prompt_tokens": 4,
        "ms": 3000.0,
        "outcome": "length",
    }
    return Trace(TracePart("POST /generate", now - 3, now), parts, fields, {"traceparent": PARENT}, failed)


def values(span: Span) -> dict[str, Any]:
    return {one.key: getattr(one.value, str(one.value.WhichOneof("value"))) for one in span.attributes}


def test_a_request_arrives_as_a_span_under_its_caller_with_its_parts_below(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    with asked(monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT=collector.url) as tracer:
        tracer.record_request(done(time.monotonic()))
    queue, decode, whole = sorted(
        collector.spans,
        key=lambda span: (span.parent_span_id.hex() == "b7ad6b7169203331", span.name != "queue"),
    )
    assert whole.trace_id.hex() == "0af7651916cd43dd8448eb211c80319c"
    assert (whole.name, whole.kind, whole.status.code) == (
        "POST /generate",
        Span.SPAN_KIND_SERVER,
        Status.STATUS_CODE_UNSET,
    )
    assert values(whole) == {
        "adapterd.id": "abc",
        "http.request.method": "POST",
        "http.response.status_code": 200,
        "adapterd.adapter": "x",
        "gen_ai.usage.input_tokens": 4,
        "adapterd.ms": 3000.0,
        "adapterd.outcome": "length",
    }
    assert [(part.name, part.parent_span_id, part.trace_id) for part in (queue, decode)] == [
        ("queue", whole.span_id, whole.trace_id),
        ("decode", whole.span_id, whole.trace_id),
    ]
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == pytest.approx(0.5e9, abs=1e3)
    assert abs(whole.end_time_unix_nano - time.time_ns()) < 60e9
    assert (collector.resource["service.name"], collector.resource["service.version"]) == (
        "adapterd",
        __version__,
    )


def test_what_failed_on_our_side_is_an_error_and_the_variables_name_the_service(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables = {
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": f"{collector.url}/v1/traces",
        "OTEL_SERVICE_NAME": "mine",
    }
    with asked(monkeypatch, **variables, OTEL_EXPORTER_OTLP_HEADERS="x-token=abc") as tracer:
        tracer.record_request(done(time.monotonic(), failed=True))
    assert [span.status.code for span in collector.spans if span.name == "POST /generate"] == [
        Status.STATUS_CODE_ERROR
    ]
    assert collector.resource["service.name"] == "mine"
    assert collector.got[0][0]["x-token"] == "abc"


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_SERVICE_NAME": "x"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://x", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_without_an_endpoint_there_are_no_traces(variables: dict[str, str]) -> None:
    assert traces.make_tracer(variables) is None


def test_a_protocol_that_is_not_spoken_stops_the_start() -> None:
    ran = run(
        "service",
        "serve",
        OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1",
        OTEL_EXPORTER_OTLP_PROTOCOL="grpc",
    )
    assert (ran.returncode, ran.stderr) == (2, "OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is spoken\n")


def test_without_the_packages_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"^OTEL_EXPORTER_OTLP_ENDPOINT: .*adapterd\[traces\]"):
        traces.make_tracer({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"})


def test_nothing_of_it_is_imported_unless_it_is_asked_for() -> None:
    """But for the API, which FastAPI brings along and imports itself."""
    code = """
import os, sys
from service import commands
from service.telemetry import traces
import service.server, service.app
assert traces.make_tracer({}) is None
sys.exit(any(name.startswith(("opentelemetry.sdk", "opentelemetry.exporter")) for name in sys.modules))
"""
    assert (
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=False).returncode == 0
    )


def test_the_program_sends_what_it_served_before_it_ends_and_no_key(
    collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    with server("--api-keys", "sk-secret") as (process, url):
        for key in ("sk-secret", "sk-wrong"):
            sent = {"authorization": f"Bearer {key}", "traceparent": PARENT}
            httpx.get(f"{url}/adapters?q=sk-secret", headers=sent, trust_env=False)
        process.send_signal(signal.SIGTERM)
        code, out = ended(process)
    assert code == 0, out
    assert sorted(values(span)["http.response.status_code"] for span in collector.spans) == [200, 401]
    assert "sk-" not in str(collector.got) + out


def test_a_collector_that_is_not_there_does_not_hold_the_exit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traces, "CLOSING_S", 0.1)
    came = threading.Event()
    with asked(
        monkeypatch, OTEL_EXPORTER_OTLP_ENDPOINT="http://127.0.0.1:1", OTEL_EXPORTER_OTLP_TIMEOUT="1"
    ) as tracer:
        with monkeypatch.context() as patch:
            # As long as a collector that never answers may take
            patch.setattr(tracer._provider, "shutdown", came.wait)
            closing = threading.Thread(target=tracer.flush_and_close, daemon=True)
            closing.start()
            closing.join(20)
            assert not closing.is_alive()
        came.set()
