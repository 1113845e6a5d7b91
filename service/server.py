"""Runs the API process: one socket, one event loop, signals, the drain and the exit code.

Must not know a route or the inside of a service.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import re
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from .api.services import Services
from .api.wire import CONNECTIONS, HttpProtocol
from .errors import SettingsError
from .exit_codes import ExitCode
from .settings import Settings
from .telemetry import logs
from .telemetry.traces import Tracer
from .threads import stop_threads

log = logging.getLogger("adapterd")

CLOSING_S = 1  # for connections to end in, once their requests were cancelled
HARD_STOP_S = 2.0  # after the grace: then the process ends, whatever holds it
STUCK_S = 0.5  # for threads to end in, once everything else has
FILES = 65_536  # open at once, if the system lets it have so many
# Of these files no connection may take any; and half of the rest is for connections that come all at
# once
OWN_FILES = 256
FAULTS_OF_HOST = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EINVAL)
VARIABLE = re.compile(r"[A-Z][A-Z_]+: ")


class Server(uvicorn.Server):
    """uvicorn's server, which drains before it closes its socket: meanwhile new requests get a 503 and
    no refused connection.

    SIGTERM, SIGINT and SIGHUP begin the drain, a second signal cuts it short.
    """

    def __init__(self, config: uvicorn.Config, services: Services) -> None:
        super().__init__(config)
        self.services = services
        self.cut_short = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Takes them to the end of the process, where uvicorn would give them back and raise them again:
        a drained service exits with 0, however often it is told.
        """
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.handle_exit)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
            signal.signal(signal.SIGHUP, self.handle_exit)
        yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.cut_short = self.should_exit
        if not self.should_exit:
            _exit_after(self.services.settings.drain_s + HARD_STOP_S, ExitCode.OK)
        self.services.draining = True
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._drain_requests()
        await super().shutdown(sockets)

    async def _drain_requests(self) -> None:
        services, grace_s = self.services, self.services.settings.drain_s
        services.draining = True
        end = time.monotonic() + grace_s
        if services.running:
            log.info("draining", extra={"fields": {"requests": services.running, "grace_s": grace_s}})
        while services.running and time.monotonic() < end and not self.cut_short:  # noqa: ASYNC110 - a signal handler wakes no event
            await asyncio.sleep(0.05)
        if services.running:
            await services.client.stop_worker(0)  # ends what still runs with an error event


def run_server(settings: Settings, tracer: Tracer | None = None) -> int:
    """Serves until a signal; the exit code: OK after a drain, FAILED where the base can never be served,
    REFUSED where it is larger than the memory.

    Raises SettingsError; DirectoryHeld where another service has the registrations.
    """
    from .app import create_app

    logs.set_up_logging(settings.log_format, settings.log_level)
    HttpProtocol.max_connections = max(1, min(CONNECTIONS, (_raise_file_limit() - OWN_FILES) // 2))
    listener = _open_socket(settings.host, settings.port)
    failures: list[str] = []

    def stop_failed(reason: str) -> None:
        failures.append(reason)
        server.should_exit = True

    app = create_app(settings, on_failure=stop_failed, record=tracer.record_request if tracer else None)
    services: Services = app.state.services
    services.registry.claim_state()
    services.usage.keep_in(settings.state)
    server = Server(_make_config(app, settings), services)
    _log_address(listener)
    server.run(sockets=[listener])
    if tracer:
        tracer.flush_and_close()
    if failures:
        _tell_failure(failures[0])
    code = app.state.services.client.exit_code if failures else ExitCode.OK
    _leave_stuck_threads(code)
    return code


def _make_config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan="on",
        ws="none",
        http=HttpProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=list(settings.forwarded_allow_ips),
        server_header=False,
        # Longer than the pools of clients and proxies keep theirs, so that they never meet a closed
        # one
        timeout_keep_alive=75,
        timeout_graceful_shutdown=CLOSING_S,
    )


def _log_address(listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    log.info("listening", extra={"fields": {"url": f"http://{host}:{port}"}})


def _tell_failure(reason: str) -> None:
    logs.tell_failure(reason if VARIABLE.match(reason) else f"ADAPTERD_BASE: {reason}")


def _leave_stuck_threads(code: int) -> None:
    """The interpreter would wait for every thread before it ends, also for one that waits for
    another machine.
    """
    stop_threads()
    _exit_after(STUCK_S, code)


def _exit_after(seconds: float, code: int) -> None:
    timer = threading.Timer(seconds, os._exit, (code,))
    timer.daemon = True
    timer.start()


def _open_socket(host: str, port: int) -> socket.socket:
    """Raises SettingsError naming the host, where that is no address of this machine, or the port."""
    family, address = _resolve_host(host, port)
    both = host == "::" and socket.has_dualstack_ipv6()
    try:
        return socket.create_server(address, family=family, backlog=2048, dualstack_ipv6=both)
    except OSError as error:
        name = "ADAPTERD_HOST" if error.errno in FAULTS_OF_HOST else "ADAPTERD_PORT"
        reason = os.strerror(error.errno or 0)
        raise SettingsError(f"{name}: cannot listen on {host}:{port}: {reason}") from None


def _resolve_host(host: str, port: int) -> tuple[socket.AddressFamily, Any]:
    """The family and the address to listen on; of a name with both families, the one of IPv4."""
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "no such name can be"
        raise SettingsError(f"ADAPTERD_HOST: {host!r} cannot be resolved: {reason}") from None
    family, _, _, _, address = min(found, key=lambda one: one[0] != socket.AF_INET)
    return family, address


def _raise_file_limit() -> int:
    """The number of files that may be open, once raised as far as may be: without one left no worker
    could be started, nor a file read.
    """
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    soft, hard = (FILES if limit == resource.RLIM_INFINITY else limit for limit in limits)
    wanted = min(FILES, hard)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, limits[1]))
    return max(soft, wanted)
