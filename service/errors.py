"""Every error that can leave the service; each knows its code and its HTTP status.

Knows nothing of HTTP frameworks.

AdapterdError
├── BadRequest               422 validation (400 invalid_request_error on /v1)
│   ├── ContextLengthExceeded
│   └── TooSlow              408
├── Unauthorized             401
├── Forbidden                403
├── NotFound                 404
│   └── AdapterNotFound      (model_not_found on /v1)
├── MethodNotAllowed         405
├── Conflict                 409
├── PayloadTooLarge          413
├── AdapterInvalid           422, details.problems
│   ├── SourceMissing        (404 under vLLM's names)
│   └── AdapterUnsupported
├── Overloaded               429, retry-after
├── Cancelled                499, for the log only
├── Internal                 500
├── NotReady                 503, retry-after
└── DeadlineExceeded         504

SettingsError stops the start; it never becomes a response.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar


class SettingsError(Exception):
    """A wrong setting; the message names the variable in one line."""


class AdapterdError(Exception):
    """Base of all errors a client can see. `details` is JSON-ready; `retry_after` is in seconds."""

    code: ClassVar[str] = "internal"
    status: ClassVar[int] = 500
    counted = False  # whether the engine has counted it among the failed requests

    def __init__(
        self,
        message: str,
        *,
        details: dict[str, Any] | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.details = details
        self.param = param
        self.retry_after = retry_after


class BadRequest(AdapterdError):
    code, status = "validation", 422


class ContextLengthExceeded(BadRequest):
    code = "context_length_exceeded"


class TooSlow(BadRequest):
    status = 408


class Unauthorized(AdapterdError):
    code, status = "unauthorized", 401


class Forbidden(AdapterdError):
    code, status = "forbidden", 403


class NotFound(AdapterdError):
    code, status = "not_found", 404


class AdapterNotFound(NotFound):
    code = "adapter_not_found"


class MethodNotAllowed(AdapterdError):
    code, status = "method_not_allowed", 405


class Conflict(AdapterdError):
    code, status = "conflict", 409


class PayloadTooLarge(AdapterdError):
    code, status = "payload_too_large", 413


class AdapterInvalid(AdapterdError):
    """The adapter cannot be served; every problem names a key, tensor or number."""

    code, status = "adapter_invalid", 422

    def __init__(self, problems: Sequence[str], **extra: Any) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems[:3]), details={"problems": self.problems, **extra})


class SourceMissing(AdapterInvalid):
    """There is no such folder."""


class AdapterUnsupported(AdapterInvalid):
    """Well formed, but it uses a feature that is not served; the problem names the feature."""

    code = "adapter_unsupported"


class Overloaded(AdapterdError):
    code, status = "overloaded", 429


class Cancelled(AdapterdError):
    code, status = "cancelled", 499


class Internal(AdapterdError):
    pass


class NotReady(AdapterdError):
    code, status = "not_ready", 503


class DeadlineExceeded(AdapterdError):
    code, status = "deadline_exceeded", 504
