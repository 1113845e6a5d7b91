"""The private part of tokenizers that the texts lean on, under a name that says what it means. API process.

The upper bound in pyproject.toml keeps it as it is; tests/text/test_compat.py shows it.
"""

from __future__ import annotations


def is_panic(error: BaseException) -> bool:
    """Whether the library's Rust code has panicked: no module exports the class, and it is no Exception."""
    return type(error).__name__ == "PanicException"
