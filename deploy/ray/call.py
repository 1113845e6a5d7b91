"""A request as it travels from the ingress to an engine, and what the ingress must know of it:
whose it is, whether it changes anything.

Knows the wire shapes; must not know Ray.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from starlette.types import Scope

from service.api.middleware.authentication import READING
from service.api.schemas.chat import ChatRequest
from service.api.schemas.generate import GenerateRequest
from service.api.schemas.messages import CountTokensRequest, MessagesRequest
from service.api.schemas.openai import CompletionRequest
from service.api.schemas.responses import ResponseRequest
from service.api.schemas.tokens import DetokenizeRequest, TokenizeRequest
from service.catalog import ids
from service.settings import Settings

SHAPES: dict[str, type[BaseModel]] = {
    "/": GenerateRequest,
    "/generate": GenerateRequest,
    "/generate_stream": GenerateRequest,
    "/v1/completions": CompletionRequest,
    "/v1/chat/completions": ChatRequest,
    "/v1/responses": ResponseRequest,
    "/v1/messages": MessagesRequest,
    "/v1/messages/count_tokens": CountTokensRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
KEPT = (
    "type",
    "asgi",
    "http_version",
    "method",
    "scheme",
    "path",
    "raw_path",
    "query_string",
    "headers",
    "client",
    "server",
)


@dataclass(frozen=True)
class Call:
    """One HTTP request, whole.

    `adapter` is the id that its answer needs; empty: none, or nothing that would be answered.
    """

    scope: dict[str, Any]
    body: bytes
    adapter: str = ""

    @property
    def generates(self) -> bool:
        return self.scope["method"] == "POST" and self.scope["path"] in SHAPES

    @property
    def changes(self) -> bool:
        """Whether it may change what is registered: all may that does not only read, generate, check
        or prefetch.
        """
        reads = self.scope["method"] in READING or self.scope["path"] in (
            "/adapters/check",
            "/adapters/prefetch",
        )
        return not reads and not self.generates

    @property
    def repeatable(self) -> bool:
        """Whether it may be asked again, elsewhere, when its engine dies before it says anything."""
        return self.generates or self.scope["method"] == "GET"


def call(scope: Scope, body: bytes, settings: Settings) -> Call:
    """The request, to be sent on; under the id that the ingress gave it."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
    headers.append((b"x-request-id", scope["state"]["request_id"].encode()))
    kept = {key: scope[key] for key in KEPT if key in scope} | {"headers": headers, "root_path": ""}
    shape = SHAPES.get(scope["path"]) if scope["method"] == "POST" else None
    return Call(kept, body, _adapter(shape, body, settings) if shape else "")


def _adapter(shape: type[BaseModel], body: bytes, settings: Settings) -> str:
    """A body that is not valid belongs to nobody: any engine refuses it, in the words of the
    contract, once it has seen the key.
    """
    try:
        asked = shape.model_validate_json(body)
    except ValidationError:
        return ""
    if isinstance(asked, GenerateRequest):
        name = (asked.parameters.adapter_id if asked.parameters else None) or ""
    else:
        name = str(getattr(asked, "model", None) or "")
    id = name.partition(ids.DIGEST_MARK)[0].rpartition(":")[2]
    base = settings.base_id or ids.base_name(settings.base)
    return "" if id in (base, *ids.BASE) else id
