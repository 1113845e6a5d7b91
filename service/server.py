"""The server process: one socket, one event loop, signals, the drain and the exit code.

Knows no route and no room's inside.
"""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import socket
import sys
import threading
import time
from types import FrameType

import uvicorn

from .api.services import Services
from .api.wire import CONNECTIONS, HttpProtocol
from .errors import SettingsError
from .settings import Settings
from .telemetry import logs
from .telemetry.traces import Tracer
from .threads import stop_threads

log = logging.getLogger("adapterd")

CLOSING_S = 1  # what connections get to end in, once their requests were told to
HARD_STOP_S = 2.0  # over the grace: then the process ends, whatever holds it
STUCK_S = 0.5  # that threads get to end in, once everything else has
FILES = 65_536  # open at once, if the system lets it have so many
# Of them, that no connection may take; and half of the rest is for those that come all at once
OWN_FILES = 256


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it closes its socket: meanwhile new requests are told
    503 instead of meeting no one.

    A second signal cuts the drain short.
    """

    def __init__(self, config: uvicorn.Config, rooms: Services) -> None:
        super().__init__(config)
        self.rooms = rooms
        self.hurried = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not recorded as uvicorn would, which raises the signal again in the end: a drained
        service exits with 0.
        """
        self.hurried = self.should_exit
        if not self.should_exit:
            _end_within(self.rooms.settings.drain_s + HARD_STOP_S, 0)
        self.rooms.draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._drain_requests()
        await super().shutdown(sockets)

    async def _drain_requests(self) -> None:
        self.rooms.draining = True
        end = time.monotonic() + self.rooms.settings.drain_s
        if self.rooms.running:
            log.info(
                "draining",
                extra={"fields": {"requests": self.rooms.running, "grace_s": self.rooms.settings.drain_s}},
            )
        while self.rooms.running and time.monotonic() < end and not self.hurried:  # noqa: ASYNC110 - a signal handler wakes no event
            await asyncio.sleep(0.05)
        if self.rooms.running:
            await self.rooms.client.stop_worker(0)  # ends what still runs with an error event


def run_server(settings: Settings, tracer: Tracer | None = None) -> int:
    """Serves until a signal; the exit code: 0 after a drain, 1 where the base can never be served.

    Raises SettingsError.
    """
    from .app import create_app

    logs.set_up_logging(settings.log_format, settings.log_level)
    HttpProtocol.most = max(1, min(CONNECTIONS, (_raise_file_limit() - OWN_FILES) // 2))
    listener = _open_socket(settings.host, settings.port)
    failures: list[str] = []

    def failed(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    app = create_app(settings, on_failure=failed, record=tracer.record_request if tracer else None)
    config = uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        # Longer than the pools of clients and proxies keep theirs, so that they never meet a closed
        # one
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSING_S,
    )
    server = Server(config, app.state.rooms)
    host, port = listener.getsockname()[:2]
    log.info("listening", extra={"fields": {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})
    server.run(sockets=[listener])
    if tracer:
        tracer.flush_and_close()
    if failures:
        line = " ".join(failures[0].split())
        print(line if line.startswith("ADAPTERD_") else f"ADAPTERD_BASE: {line}", file=sys.stderr)
    code = 1 if failures else 0
    _leave_stuck_threads(code)
    return code


def _leave_stuck_threads(code: int) -> None:
    """The interpreter would wait for every thread before it ends, also for one that waits for
    another machine.
    """
    stop_threads()
    _end_within(STUCK_S, code)


def _end_within(seconds: float, code: int) -> None:
    last = threading.Timer(seconds, os._exit, (code,))
    last.daemon = True
    last.start()


def _open_socket(host: str, port: int) -> socket.socket:
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=2048
        )
    except OSError as error:
        raise SettingsError(f"ADAPTERD_PORT: cannot listen on {host}:{port}: {error.strerror}") from None


def _raise_file_limit() -> int:
    """How many files may be open, after asking for all there may be: without one left no worker
    could be started, nor a file read.
    """
    soft, hard = (
        FILES if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    wanted = min(FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return max(soft, wanted)
