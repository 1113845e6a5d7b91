"""The digest that names an adapter's content: over the bytes of its config and of its weights. Knows nothing of what they mean."""

from __future__ import annotations

from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path


def digest(config: bytes, weights: bytes | Path) -> str:
    """`sha256:` and 64 hex digits over both parts' sha256; weights given as a path are read in pieces. Raises OSError."""
    if isinstance(weights, bytes):
        inner = file_digest(BytesIO(weights), "sha256")
    else:
        with weights.open("rb") as file:
            inner = file_digest(file, "sha256")
    return "sha256:" + sha256(sha256(config).digest() + inner.digest()).hexdigest()
