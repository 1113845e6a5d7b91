"""The private parts of uvicorn that the API leans on, each under a name that says what it means. API process.

The upper bounds in pyproject.toml keep them as they are; tests/api/test_compat.py shows it.
"""

from __future__ import annotations

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol


def stop_keepalive_timer(protocol: HttpToolsProtocol) -> None:
    """Stops uvicorn's timer that closes a connection which waits for its next request, if it runs."""
    protocol._unset_keepalive_if_required()
