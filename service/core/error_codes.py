"""The codes of every error that a client can see; both ends of the worker's pipe name errors by them.

Runs in the API process, the worker and the validator; must not know classes, messages or HTTP statuses:
`service/errors.py` has the class and the status of each code.
"""

from __future__ import annotations

from enum import StrEnum


class ErrorCode(StrEnum):
    """The value is what clients, logs and metrics see, so it never changes."""

    VALIDATION = "validation"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    UNAUTHORIZED = "unauthorized"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    ADAPTER_NOT_FOUND = "adapter_not_found"
    METHOD_NOT_ALLOWED = "method_not_allowed"
    CONFLICT = "conflict"
    DIGEST_MISMATCH = "digest_mismatch"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNSUPPORTED_ENCODING = "unsupported_encoding"
    ADAPTER_INVALID = "adapter_invalid"
    ADAPTER_UNSUPPORTED = "adapter_unsupported"
    STORAGE_FULL = "storage_full"
    OVERLOADED = "overloaded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"
    NOT_READY = "not_ready"
    DEADLINE_EXCEEDED = "deadline_exceeded"
