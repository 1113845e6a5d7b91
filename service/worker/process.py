"""The API process's grip on one worker process: starts it, carries messages both ways, ends it.

Two threads, so that neither the event loop nor the worker ever waits for the other. Must not know
tickets or adapters.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue

from ..core.messages import Command, Message
from ..settings import Settings

# Of /proc/PID/stat behind the name: user, system, and both of its children; see proc(5)
CPU_TIMES = slice(11, 15)
LAST_WORDS_S = 2.0  # how long a worker may take to end after it closed its connection


class WorkerProcess:
    """One life of a worker.

    `heard` gets each notice and `ended` the exit code, once, both on the reading thread.
    """

    def __init__(
        self, settings: Settings, factory: str, heard: Callable[[Message], None], ended: Callable[[int], None]
    ) -> None:
        self._connection, theirs = Pipe()
        command = [sys.executable, "-m", "service.worker.loop", str(theirs.fileno()), factory]
        # It must find the very same modules
        paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        with theirs:
            self._popen = subprocess.Popen(
                command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, env=os.environ | paths
            )
        self.pid = self._popen.pid
        self._orders: SimpleQueue[Command | Settings | None] = SimpleQueue()
        self._orders.put(settings)
        self._reader = threading.Thread(
            target=self._read_messages, args=(heard, ended), name="worker-reader", daemon=True
        )
        self._writer = threading.Thread(target=self._write_commands, name="worker-writer", daemon=True)
        self._reader.start()
        self._writer.start()

    def send_command(self, order: Command) -> None:
        """Queues the order; what a worker that died did not take is lost."""
        self._orders.put(order)

    def kill_worker(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._popen.kill()

    def processor_ticks(self) -> int | None:
        """Processor time of the worker and of all processes under it (a compiler's), in ticks;

        None where the system does not tell.
        """
        try:
            return sum(map(_processor_ticks, _process_tree(self.pid)))
        except OSError:  # no Linux, or one has just ended
            return None

    def wait_until_gone(self) -> None:
        """Waits until the process is gone and both threads have ended."""
        self._reader.join()
        self._writer.join()

    def _write_commands(self) -> None:
        with contextlib.suppress(OSError):
            while (order := self._orders.get()) is not None:
                self._connection.send(order)

    def _read_messages(self, heard: Callable[[Message], None], ended: Callable[[int], None]) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                heard(self._connection.recv())
        try:
            code = self._popen.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        self._orders.put(None)
        self._writer.join()
        self._connection.close()
        ended(code)


def _process_tree(pid: int) -> Iterator[int]:
    yield pid
    for told in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in told.read_text().split():
            yield from _process_tree(int(child))


def _processor_ticks(pid: int) -> int:
    """Of the process and those that it has waited for."""
    return sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[CPU_TIMES]))
