"""Errors as responses, counted and noted for the log: the native envelope, and OpenAI's under /v1.

Shows no path of the host, no token, no stack trace.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.types import Scope

from ..errors import (
    AdapterdError,
    AdapterNotFound,
    BadRequest,
    Cancelled,
    ContextLengthExceeded,
    Internal,
    MethodNotAllowed,
    NotFound,
    NotReady,
)
from ..telemetry import metrics

PROBES = ("/health", "/ready", "/metrics")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
BAD_REQUEST = {409: 400, 422: 400}  # OpenAI's clients know 400 where ours see 409 and 422
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
} | dict.fromkeys((503, 504), "service_unavailable_error")
STATUSES = {
    401: "the key is missing or wrong",
    403: "the key is without the admin scope, or the source is not allowed",
    404: "no such adapter, model or route",
    405: "no such method",
    409: "the id is taken or reserved",
    413: "the body is over its limit",
    422: "a bad field, or an adapter that cannot be served",
    429: "the queue is full, or the key is over its limit",
    500: "a defect; the request id is in the body",
    503: "loading, draining or restarting",
    504: "the request's time limit passed",
}
ALWAYS = (401, 405, 413, 500)


def openai_dialect(path: str) -> bool:
    return path.startswith("/v1/")


def status_of(error: AdapterdError, openai: bool) -> int:
    return BAD_REQUEST.get(error.status, error.status) if openai else error.status


def error_body(error: AdapterdError, openai: bool) -> dict[str, Any]:
    """The error's JSON, in OpenAI's envelope or in ours; also what an error event of a stream
    carries.
    """
    if openai:
        kind = OPENAI_TYPES.get(error.status, "invalid_request_error")
        return {
            "error": {
                "message": error.message,
                "type": kind,
                "param": error.param,
                "code": _openai_code(error),
            }
        }
    told = {"error": error.message, "error_type": error.code}
    return told | ({"details": error.details} if error.details is not None else {})


def _openai_code(error: AdapterdError) -> str:
    if isinstance(error, AdapterNotFound):
        return "model_not_found"
    plain = isinstance(error, BadRequest) and not isinstance(error, ContextLengthExceeded)
    return "invalid_request_error" if plain else error.code


def note_error(error: AdapterdError, scope: Scope) -> None:
    """The request ended with this error: the log will say so, and it counts, if the engine has not
    counted it.

    That it is not ready is what a probe wants to know, and no failed request.
    """
    state = scope.setdefault("state", {})
    state.setdefault("log", {})["outcome"] = error.code
    state["failed"] = error.status >= 500
    if not error.counted and not (isinstance(error, NotReady) and scope["path"] in PROBES):
        metrics.FAILURE.labels(error.code).inc()


def error_response(error: AdapterdError, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    note_error(error, scope)
    openai = openai_dialect(scope["path"])
    sent = dict(headers or {})
    if error.retry_after is not None or error.status in (429, 503):
        sent["retry-after"] = str(error.retry_after or 1)
    if error.status == 401:
        sent.setdefault("www-authenticate", "Bearer")
    # ASCII only: a lone surrogate that a client sent must not break the answer that refuses it
    content = json.dumps(error_body(error, openai), separators=(",", ":"), allow_nan=False)
    return Response(content, status_of(error, openai), sent, "application/json")


def document_errors(*statuses: int, openai: bool = False) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for OpenAPI: what these and every route can answer when they
    refuse.
    """
    example = error_body(BadRequest("max_new_tokens: must be at least 1", param="max_new_tokens"), openai)
    content = {"application/json": {"schema": {"type": "object", "required": ["error"]}, "example": example}}
    found = {BAD_REQUEST.get(s, s) if openai else s: STATUSES[s] for s in sorted({*ALWAYS, *statuses})}
    return {s: {"description": text, "content": content} for s, text in found.items()}


def from_validation(errors: Iterable[Mapping[str, Any]]) -> BadRequest:
    """One error that names the fields of pydantic's findings, the first three at most."""
    found = list(errors)
    lines = list(dict.fromkeys(_describe_finding(e) for e in found))
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return BadRequest("; ".join(lines[:3]) + more, param=_field_name(found[0]) or None)


def _field_name(error: Mapping[str, Any]) -> str:
    """The field's name; before it stands where it was sent: a body, a query or a path.

    What is no JSON has none, only a place.
    """
    return "" if error["type"] == "json_invalid" else ".".join(str(part) for part in error["loc"][1:])


def _describe_finding(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at {error['loc'][-1]}"
    said = {"extra_forbidden": "unknown field", "missing": "is required"}.get(
        error["type"], error["msg"].removeprefix("Value error, ")
    )
    if not _field_name(error):
        unread = error["type"] == "missing" or isinstance(error["input"], bytes)
        return (
            "a JSON body is required, with content-type: application/json" if unread else f"the body: {said}"
        )
    return f"{_field_name(error)}: {said}"


async def _answer_known(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterdError), "registered for AdapterdError"
    return error_response(error, request.scope)


async def _answer_left(request: Request, error: Exception) -> Response:
    """Who seems to have left may have been told why by the connection itself."""
    return error_response(
        request.scope["state"].get("refused") or Cancelled("the client left"), request.scope
    )


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for RequestValidationError"
    return error_response(from_validation(error.errors()), request.scope)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for HTTPException"
    # Raised while the framework read the body, which wraps it
    if isinstance(error.__cause__, AdapterdError):
        return error_response(error.__cause__, request.scope)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _answer_left(request, error)
    if error.status_code == 404:
        return error_response(NotFound("there is no such route; /docs lists them"), request.scope)
    if error.status_code == 405:
        allowed = ", ".join(allowed_methods(request.app, request.scope))
        return error_response(
            MethodNotAllowed(f"{request.method} is not allowed here; allowed: {allowed}"),
            request.scope,
            {"allow": allowed},
        )
    if error.status_code < 500:
        return error_response(
            BadRequest(
                "the body cannot be read: it is no UTF-8 JSON, is nested too deep, or is a broken form"
            ),
            request.scope,
        )
    return error_response(internal_error(request.scope), request.scope)


def internal_error(scope: Scope) -> Internal:
    id = scope.get("state", {}).get("request_id", "")
    return Internal(f"internal error; it is in the log under request id {id}", details={"request_id": id})


def allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    """The methods that some route takes at this path."""

    def taken(method: str) -> bool:
        asked = {**scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(asked)[0] is Match.FULL for route in app.routes)

    return [method for method in METHODS if taken(method)]


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(AdapterdError, _answer_known)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_left)
