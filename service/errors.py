"""Every error that can leave the service, with its code and its HTTP status; runs in every process.

Must not know HTTP frameworks. `ERROR_OF_CODE` is the one way from a code to its class.

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
│   └── DigestMismatch       (409 on /v1, too)
│       └── UnexpectedDigest 422 in every dialect
├── PayloadTooLarge          413
├── UnsupportedEncoding      415
├── AdapterInvalid           422, details.problems
│   ├── SourceMissing        (404 under vLLM's names)
│   └── AdapterUnsupported
├── StorageFull              507
├── Overloaded               429, retry-after
├── Cancelled                499, for the log only
├── Internal                 500
├── NotReady                 503, retry-after
└── DeadlineExceeded         504

SettingsError stops the start; it never becomes a response.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from .core.error_codes import ErrorCode


class SettingsError(Exception):
    """A wrong setting; the message names the variable in one line."""


class DoesNotFit(SettingsError):
    """The base, or what serving it takes, is larger than the memory or the disk that there is."""


class DirectoryHeld(SettingsError):
    """Another service has the directory of registrations; it may be gone at the next try."""


class AdapterdError(Exception):
    """Base of all errors a client can see. `details` is JSON-ready; `retry_after` is in seconds."""

    code: ClassVar[ErrorCode] = ErrorCode.INTERNAL
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
    code, status = ErrorCode.VALIDATION, 422


class ContextLengthExceeded(BadRequest):
    code = ErrorCode.CONTEXT_LENGTH_EXCEEDED


class TooSlow(BadRequest):
    status = 408


class Unauthorized(AdapterdError):
    code, status = ErrorCode.UNAUTHORIZED, 401


class Forbidden(AdapterdError):
    code, status = ErrorCode.FORBIDDEN, 403


class NotFound(AdapterdError):
    code, status = ErrorCode.NOT_FOUND, 404


class AdapterNotFound(NotFound):
    code = ErrorCode.ADAPTER_NOT_FOUND


class MethodNotAllowed(AdapterdError):
    code, status = ErrorCode.METHOD_NOT_ALLOWED, 405


class Conflict(AdapterdError):
    code, status = ErrorCode.CONFLICT, 409


class DigestMismatch(Conflict):
    """The id has other content than the request demands, and keeps no version that is it."""

    code = ErrorCode.DIGEST_MISMATCH


class UnexpectedDigest(DigestMismatch):
    """The files that were to be registered are another content than was expected."""

    status = 422


class PayloadTooLarge(AdapterdError):
    code, status = ErrorCode.PAYLOAD_TOO_LARGE, 413


class UnsupportedEncoding(AdapterdError):
    code, status = ErrorCode.UNSUPPORTED_ENCODING, 415


class AdapterInvalid(AdapterdError):
    """The adapter cannot be served; every problem names a key, tensor or number."""

    code, status = ErrorCode.ADAPTER_INVALID, 422

    def __init__(self, problems: Sequence[str], **extra: Any) -> None:
        self.problems = list(problems)
        super().__init__("; ".join(self.problems[:3]), details={"problems": self.problems, **extra})


class SourceMissing(AdapterInvalid):
    """There is no such folder."""


class AdapterUnsupported(AdapterInvalid):
    """Well formed, but it uses a feature that is not served; the problem names the feature."""

    code = ErrorCode.ADAPTER_UNSUPPORTED


class StorageFull(AdapterdError):
    """What was to be kept could not be written, and nothing has changed."""

    code, status = ErrorCode.STORAGE_FULL, 507


class Overloaded(AdapterdError):
    code, status = ErrorCode.OVERLOADED, 429


class Cancelled(AdapterdError):
    code, status = ErrorCode.CANCELLED, 499


class Internal(AdapterdError):
    pass


class NotReady(AdapterdError):
    code, status = ErrorCode.NOT_READY, 503


class DeadlineExceeded(AdapterdError):
    code, status = ErrorCode.DEADLINE_EXCEEDED, 504


# TooSlow, SourceMissing and UnexpectedDigest share the codes of their parents, and only the API process
# raises them
ERROR_OF_CODE: Mapping[ErrorCode, type[AdapterdError]] = MappingProxyType(
    {
        kind.code: kind
        for kind in (
            BadRequest,
            ContextLengthExceeded,
            Unauthorized,
            Forbidden,
            NotFound,
            AdapterNotFound,
            MethodNotAllowed,
            Conflict,
            DigestMismatch,
            PayloadTooLarge,
            UnsupportedEncoding,
            AdapterInvalid,
            AdapterUnsupported,
            StorageFull,
            Overloaded,
            Cancelled,
            Internal,
            NotReady,
            DeadlineExceeded,
        )
    }
)
