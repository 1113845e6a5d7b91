"""The private part of uvicorn that the API leans on is there and means what its name says."""

from __future__ import annotations

import pytest
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from service.api.compat import stop_keepalive_timer

from .test_wire import FakeTransport


@pytest.mark.anyio
async def test_the_timer_of_a_connection_that_waits_is_stopped() -> None:
    config = uvicorn.Config(lambda: None, ws="none", log_config=None, lifespan="off")
    protocol = HttpToolsProtocol(config, ServerState(), {})
    protocol.connection_made(FakeTransport())
    stop_keepalive_timer(protocol)  # there is none yet
    protocol.on_response_complete()
    timer = protocol.timeout_keep_alive_task
    assert timer is not None
    stop_keepalive_timer(protocol)
    assert timer.cancelled()
    assert protocol.timeout_keep_alive_task is None
