"""Exports finished requests as OpenTelemetry traces; runs in the API process.

Only where the exporter's own OTEL_* variables ask for them; else no package of it is imported. Must not
know HTTP frameworks: a request comes here as names, times and values.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .. import __version__
from ..errors import SettingsError

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
# How long the last spans may take to leave; a collector that is gone does not hold the exit
CLOSING_S = 2.0
NAMES = {
    "method": "http.request.method",
    "path": "url.path",
    "status": "http.response.status_code",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "generated_tokens": "gen_ai.usage.output_tokens",
}


@dataclass(frozen=True, slots=True)
class TracePart:
    """A stretch of a request, in `time.monotonic` seconds."""

    name: str
    start: float
    end: float


@dataclass(frozen=True, slots=True)
class Trace:
    """A finished request: `whole` and its parts, the fields of its log line, and its W3C headers.

    `failed`: by our fault.
    """

    whole: TracePart
    parts: Sequence[TracePart]
    fields: Mapping[str, Any]
    carrier: Mapping[str, str]
    failed: bool


class Tracer:
    """Exports in the background.

    Raises ImportError where the packages of the extra `traces` are not installed.
    """

    def __init__(self) -> None:
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._api, self._parents = trace, TraceContextTextMapPropagator()
        # With what OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES say
        resource = Resource.create({"service.version": __version__})
        if str(resource.attributes["service.name"]).startswith("unknown_service"):
            resource = resource.merge(Resource({"service.name": "adapterd"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("adapterd", __version__)

    def record_request(self, done: Trace) -> None:
        late = time.time_ns() - time.monotonic_ns()
        parent = self._parents.extract(done.carrier)
        kind, attributes = self._api.SpanKind.SERVER, trace_attributes(done.fields)
        start = _to_nanoseconds(done.whole.start) + late
        whole = self._tracer.start_span(done.whole.name, parent, kind, attributes, start_time=start)
        inside = self._api.set_span_in_context(whole, parent)
        for part in done.parts:
            span = self._tracer.start_span(part.name, inside, start_time=_to_nanoseconds(part.start) + late)
            span.end(_to_nanoseconds(part.end) + late)
        if done.failed:
            whole.set_status(self._api.StatusCode.ERROR, str(done.fields.get("outcome", "")))
        whole.end(_to_nanoseconds(done.whole.end) + late)

    def flush_and_close(self) -> None:
        """Sends what is left, within `CLOSING_S`."""
        closing = threading.Thread(target=self._provider.shutdown, daemon=True)
        closing.start()
        closing.join(CLOSING_S)


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether the exporter's variables ask for traces.

    Raises SettingsError for a protocol other than OTLP over HTTP.
    """
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environment.get("OTEL_TRACES_EXPORTER", "") == "none":
        return False
    if not any(environment.get(name) for name in ENDPOINTS):
        return False
    for name in PROTOCOLS:
        if environment.get(name, "http/protobuf") not in ("", "http/protobuf"):
            raise SettingsError(f"{name}: only http/protobuf is spoken")
    return True


def make_tracer(environment: Mapping[str, str]) -> Tracer | None:
    """The exporter that the environment asks for; None where it asks for none.

    Raises SettingsError where its packages are missing.
    """
    if not is_wanted(environment):
        return None
    try:
        return Tracer()
    except ImportError as error:
        name = next(name for name in ENDPOINTS if environment.get(name))
        raise SettingsError(
            f"{name}: traces need the packages of the extra: pip install 'adapterd[traces]' ({error.name})"
        ) from None


def trace_attributes(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A log line's fields by the names that traces use; a field without a name in the conventions is
    under `adapterd.`.
    """
    return {NAMES.get(name, f"adapterd.{name}"): value for name, value in fields.items()}


def _to_nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
