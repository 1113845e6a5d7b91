"""Request ids, the log line and security headers, as plain ASGI.

API process; must not know a route's meaning.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Mapping
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import Cancelled
from ...telemetry.traces import Trace, TracePart
from ..errors import PROBES, error_response, internal_error, note_error

log = logging.getLogger("adapterd.access")

SANE_ID = re.compile(r"^[A-Za-z0-9._:/+=@-]{1,128}$")

LONGEST_CLIENT = 64  # characters; an address has fewer

SECURITY = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}

# Response headers that the log line repeats
LOGGED_HEADERS: dict[str, tuple[str, Callable[[str], str | int | float]]] = {
    "x-adapter-id": ("adapter", str),
    "x-adapter-digest": ("digest", str),
    "x-prompt-tokens": ("prompt_tokens", int),
    "x-generated-tokens": ("generated_tokens", int),
    "x-queue-time": ("queue_ms", float),
    "x-inference-time": ("inference_ms", float),
}


def logged_headers(headers: Mapping[str, str]) -> dict[str, str | int | float]:
    """The log line's fields that repeat these headers."""
    return {word: kind(headers[name]) for name, (word, kind) in LOGGED_HEADERS.items() if name in headers}


class AccessLog:
    """The outermost layer: gives the request an id, the answer its headers, the log a line, and
    turns a defect into a 500.

    A route may add to the line by `request.state.log`, a dict of named values; where a header says
    the same, the dict's value counts. `request.state.parts` are the parts of the request's trace.
    `record` gets each finished request, but those of the probes.
    """

    def __init__(self, app: ASGIApp, record: Callable[[Trace], None] | None = None) -> None:
        self.app, self.record = app, record

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        exchange = _Exchange(scope, send)
        # Files go out whole, so that none is refused by text
        scope["headers"] = [pair for pair in scope["headers"] if pair[0] != b"range"]
        # The server leaves a HEAD's body out by itself
        inner = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope
        try:
            await self._answer_request(exchange, inner, receive)
        finally:
            exchange.log_request()
            if self.record and scope["path"] not in PROBES:
                self.record(exchange.make_trace())
        return None

    async def _answer_request(self, exchange: _Exchange, inner: Scope, receive: Receive) -> None:
        try:
            await self.app(inner, receive, exchange.send_message)
        except asyncio.CancelledError:
            # By the hard stop: the task ends here, and no trace is wanted
            log.debug("cut off", extra={"fields": {"id": exchange.id}})
        except Exception:
            log.exception("a defect", extra={"fields": {"id": exchange.id}})
            defect = internal_error(exchange.scope)
            if exchange.status == 0:
                await error_response(defect, exchange.scope)(inner, receive, exchange.send_message)
            else:
                note_error(defect, exchange.scope)


class _Exchange:
    """One request and its answer, as they pass by."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self.scope, self._send = scope, send
        client_id = Headers(scope=scope).get("x-request-id", "")
        self.id = client_id if SANE_ID.match(client_id) else uuid4().hex
        self.state: dict[str, Any] = scope.setdefault("state", {})
        self.state |= {"request_id": self.id, "log": {}, "parts": ()}
        # The peer, or what a proxy that may do so has told of it
        self.client = str((scope.get("client") or ("",))[0])[:LONGEST_CLIENT]
        self.began = time.monotonic()
        self.ended = 0.0
        self.fields: dict[str, Any] = {}
        self.status = 0
        self.whole = False
        self.headers: dict[str, str | int | float] = {}

    async def send_message(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["x-request-id"] = self.id
            for name, value in SECURITY.items():
                headers.setdefault(name, value)
            self.headers = logged_headers(headers)
        await self._send(message)
        self.whole = message["type"] == "http.response.body" and not message.get("more_body", False)

    def log_request(self) -> None:
        self.ended = time.monotonic()
        self.fields = self._make_fields() | self.headers | self.state["log"]
        probe = self.scope["path"] in PROBES and self.fields["status"] in (200, 503)
        log.log(logging.DEBUG if probe else logging.INFO, "request", extra={"fields": self.fields})

    def _make_fields(self) -> dict[str, Any]:
        """The fields that every line has."""
        return {
            "id": self.id,
            "client": self.client,
            "method": self.scope["method"],
            "path": self.scope["path"],
            "status": self.status if self.whole else 499,
            "outcome": "ok" if self.whole else Cancelled.code,
            "ms": round((self.ended - self.began) * 1000, 1),
        }

    def make_trace(self) -> Trace:
        """The request as a trace; named by its route, for an id in the name would make a name of its
        own.
        """
        route = getattr(self.scope.get("route"), "path", "")
        whole = TracePart(f"{self.scope['method']} {route}".strip(), self.began, self.ended)
        headers = Headers(scope=self.scope)
        carrier = {name: headers[name] for name in ("traceparent", "tracestate") if name in headers}
        failed = self.fields["status"] >= 500 or self.state.get("failed", False)
        return Trace(whole, self.state["parts"], self.fields, carrier, failed)
