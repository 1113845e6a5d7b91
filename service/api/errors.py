"""Errors as responses, counted and noted for the log: the native envelope, and OpenAI's under /v1.

API process; must not show a path of the host, a token or a stack trace.
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
    DigestMismatch,
    Internal,
    MethodNotAllowed,
    NotFound,
    NotReady,
)
from ..telemetry import metrics

PROBES = ("/health", "/ready", "/metrics")
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
# OpenAI's clients expect 400 where ours get 409 and 422, but 409 for an adapter that is not what was demanded
BAD_REQUEST = {409: 400, 422: 400}
OPENAI_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    507: "server_error",
} | dict.fromkeys((503, 504), "service_unavailable_error")
STATUSES = {
    401: "the key is missing or wrong",
    403: "the key is without the admin scope or may not have this priority, or the source is not allowed",
    404: "no such adapter, model or route",
    405: "no such method",
    409: "the id is taken or reserved, or has other content than the request demands",
    413: "the body is over its limit",
    415: "the body's content-encoding is not served",
    422: "a bad field, or an adapter that cannot be served",
    429: "the queue is full, memory is short, or the key is over a limit of its own",
    500: "a defect; the request id is in the body",
    503: "loading, draining, restarting, or the worker was lost meanwhile",
    504: "the request's time limit passed",
    507: "what was to be kept could not be written; nothing has changed",
}
# Anthropic's types, by the status that is sent
ANTHROPIC_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    503: "overloaded_error",
    504: "timeout_error",
    507: "api_error",
}
LONGEST_PATH = 200  # characters of a path that is told again
ALWAYS = (401, 405, 413, 415, 500)


def openai_dialect(path: str) -> bool:
    return path.startswith("/v1/")


def anthropic_dialect(path: str) -> bool:
    return path == "/v1/messages" or path.startswith("/v1/messages/")


def status_of(error: AdapterdError, openai: bool) -> int:
    if not openai or isinstance(error, DigestMismatch):
        return error.status
    return BAD_REQUEST.get(error.status, error.status)


def error_body(error: AdapterdError, openai: bool) -> dict[str, Any]:
    """The error's JSON, in OpenAI's envelope or in ours; an error event of a stream carries it, too."""
    if openai:
        return {"error": _openai_error(error)}
    body: dict[str, Any] = {"error": error.message, "error_type": error.code}
    if error.details is not None:
        body["details"] = error.details
    return body


def body_at(error: AdapterdError, path: str) -> dict[str, Any]:
    """The error's JSON in the envelope of the dialect that has this path."""
    return anthropic_body(error) if anthropic_dialect(path) else error_body(error, openai_dialect(path))


def anthropic_body(error: AdapterdError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(status_of(error, openai=True), "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _openai_error(error: AdapterdError) -> dict[str, Any]:
    return {
        "message": error.message,
        "type": OPENAI_TYPES.get(error.status, "invalid_request_error"),
        "param": error.param,
        "code": _openai_code(error),
    }


def _openai_code(error: AdapterdError) -> str:
    if isinstance(error, AdapterNotFound):
        return "model_not_found"
    plain = isinstance(error, BadRequest) and not isinstance(error, ContextLengthExceeded)
    return "invalid_request_error" if plain else error.code


def note_error(error: AdapterdError, scope: Scope) -> None:
    """Notes for the log that the request ended with this error, and counts it, unless the engine has.

    A probe that finds the service not ready is no failed request.
    """
    state = scope.setdefault("state", {})
    state.setdefault("log", {})["outcome"] = error.code
    state["failed"] = error.status >= 500
    if not error.counted and not (isinstance(error, NotReady) and scope["path"] in PROBES):
        metrics.FAILURE.labels(error.code).inc()


def error_response(error: AdapterdError, scope: Scope, headers: Mapping[str, str] | None = None) -> Response:
    note_error(error, scope)
    sent_headers = dict(headers or {})
    if error.retry_after is not None or error.status in (429, 503):
        sent_headers["retry-after"] = str(error.retry_after or 1)
    if error.status == 504 or isinstance(error, DigestMismatch):
        sent_headers["x-should-retry"] = "false"  # OpenAI's clients would ask for the same three times more
    if error.status == 401:
        sent_headers.setdefault("www-authenticate", "Bearer")
    # ASCII only: a lone surrogate that a client sent must not break the answer that refuses it
    content = json.dumps(body_at(error, scope["path"]), separators=(",", ":"), allow_nan=False)
    return Response(
        content, status_of(error, openai_dialect(scope["path"])), sent_headers, "application/json"
    )


def document_errors(
    *statuses: int, openai: bool = False, anthropic: bool = False
) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a route for OpenAPI: its own refusals and those that every route has."""
    error = BadRequest("max_new_tokens: must be at least 1", param="max_new_tokens")
    example = anthropic_body(error) if anthropic else error_body(error, openai)
    content = {"application/json": {"schema": {"type": "object", "required": ["error"]}, "example": example}}
    responses: dict[int | str, dict[str, Any]] = {}
    for status in sorted({*ALWAYS, *statuses}):
        sent_status = 400 if status == 422 and (openai or anthropic) else status
        responses[sent_status] = {"description": STATUSES[status], "content": content}
    return responses


def from_validation(errors: Iterable[Mapping[str, Any]]) -> BadRequest:
    """One error that names the fields of pydantic's findings, the first three at most."""
    findings = list(errors)
    lines = list(dict.fromkeys(map(_describe_finding, findings)))
    more = f"; and {len(lines) - 3} more" if len(lines) > 3 else ""
    return BadRequest("; ".join(lines[:3]) + more, param=_field_name(findings[0]) or None)


def _field_name(error: Mapping[str, Any]) -> str:
    """The field's name; it follows the part of the request: a body, a query or a path.

    A finding in broken JSON names no field, only a position.
    """
    if error["type"] == "json_invalid":
        return ""
    return ".".join(map(str, error["loc"][1:]))


def _describe_finding(error: Mapping[str, Any]) -> str:
    if error["type"] == "json_invalid":
        return f"the body is not valid JSON: {error['ctx']['error']} at {error['loc'][-1]}"
    name, message = _field_name(error), _finding_text(error)
    if name:
        return f"{name}: {message}"
    if error["type"] == "missing" or isinstance(error["input"], bytes):
        return "a JSON body is required, with content-type: application/json"
    return f"the body: {message}"


def _finding_text(error: Mapping[str, Any]) -> str:
    if error["type"] == "extra_forbidden":
        return "unknown field"
    if error["type"] == "missing":
        return "is required"
    return str(error["msg"].removeprefix("Value error, "))


async def _answer_known(request: Request, error: Exception) -> Response:
    assert isinstance(error, AdapterdError), "registered for AdapterdError"
    return error_response(error, request.scope)


async def _answer_disconnect(request: Request, error: Exception) -> Response:
    """Answers a client that seems to have left; the connection itself may have refused its request."""
    refusal = request.scope["state"].get("refused")
    return error_response(refusal or Cancelled("the client left"), request.scope)


async def _answer_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for RequestValidationError"
    return error_response(from_validation(error.errors()), request.scope)


async def _answer_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for HTTPException"
    # Raised while the framework read the body, which wraps it
    if isinstance(error.__cause__, AdapterdError):
        return error_response(error.__cause__, request.scope)
    if isinstance(error.__cause__, ClientDisconnect):
        return await _answer_disconnect(request, error)
    if error.status_code == 405:
        return _answer_wrong_method(request)
    return error_response(_known_error(error.status_code, request.scope), request.scope)


def _answer_wrong_method(request: Request) -> Response:
    allowed = ", ".join(allowed_methods(request.app, request.scope))
    refusal = MethodNotAllowed(f"{request.method} is not allowed here; allowed: {allowed}")
    return error_response(refusal, request.scope, {"allow": allowed})


def _known_error(status: int, scope: Scope) -> AdapterdError:
    """The framework's own refusal as an error of ours."""
    if status == 404:
        return NotFound(
            f"there is no route {scope['method']} {scope['path'][:LONGEST_PATH]}; /docs lists them"
        )
    if status < 500:
        return BadRequest(
            "the body cannot be read: it is no UTF-8 JSON, is nested too deep, or is a broken form"
        )
    return internal_error(scope)


def internal_error(scope: Scope) -> Internal:
    id = scope.get("state", {}).get("request_id", "")
    return Internal(f"internal error; it is in the log under request id {id}", details={"request_id": id})


def allowed_methods(app: FastAPI, scope: Scope) -> list[str]:
    """The methods that some route takes at this path."""

    def takes_method(method: str) -> bool:
        # The routes declare no HEAD
        with_method = {**scope, "method": "GET" if method == "HEAD" else method}
        return any(route.matches(with_method)[0] is Match.FULL for route in app.routes)

    return [method for method in METHODS if takes_method(method)]


def install_handlers(app: FastAPI) -> None:
    app.add_exception_handler(AdapterdError, _answer_known)
    app.add_exception_handler(RequestValidationError, _answer_invalid)
    app.add_exception_handler(HTTPException, _answer_http)
    app.add_exception_handler(ClientDisconnect, _answer_disconnect)
