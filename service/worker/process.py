"""Starts one worker process, carries messages both ways, and ends it (API process).

Two threads, so that neither the event loop nor the worker ever waits for the other. Must not know
tickets or adapters.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from multiprocessing import Pipe
from pathlib import Path
from queue import SimpleQueue

from ..child_process import start_child
from ..core.messages import Command, Message
from ..limits import count_oom_kills
from ..settings import Settings

# Of /proc/PID/stat behind the name: user, system, and both of its children; see proc(5)
CPU_TIMES = slice(11, 15)
PROGRAM = "service.worker.loop"
LAST_WORDS_S = 2.0  # how long a worker may take to end after it closed its connection
OVERSTAYED = f"it closed its connection, did not end within {LAST_WORDS_S:g} s and was killed"


@dataclass(frozen=True, slots=True)
class WorkerExit:
    """How a worker ended: its exit code, negative for a signal, and why it was killed from here, or "".

    `out_of_memory`: the system killed it, or another process of its group, for want of memory.
    """

    code: int
    killed: str = ""
    out_of_memory: bool = False


class WorkerProcess:
    """One worker process.

    `on_message` gets each message and `on_exit` how it ended, once, both on the reading thread.
    """

    def __init__(
        self,
        settings: Settings,
        factory: str,
        on_message: Callable[[Message], None],
        on_exit: Callable[[WorkerExit], None],
    ) -> None:
        self._killed = ""
        self._oom_kills = count_oom_kills()
        self._connection, worker_end = Pipe()
        with worker_end:
            self._popen = start_child(PROGRAM, worker_end, factory, environment=os.environ)
        self.pid = self._popen.pid
        self._commands: SimpleQueue[Command | Settings | None] = SimpleQueue()
        self._commands.put(settings)
        # The reader ends the writer, so the writer is there first
        self._writer = _start_thread("worker-writer", self._write_commands)
        self._reader = _start_thread("worker-reader", partial(self._read_messages, on_message, on_exit))

    def send_command(self, command: Command) -> None:
        """Queues the command; it is lost where the worker dies before it takes it."""
        self._commands.put(command)

    def kill_worker(self, why: str) -> None:
        """`why`: a sentence that goes with the exit."""
        self._killed = self._killed or why
        with contextlib.suppress(ProcessLookupError):
            self._popen.kill()

    def processor_ticks(self) -> int | None:
        """Processor time of the worker and of all processes under it (a compiler's), in ticks.

        None where the system does not have it.
        """
        try:
            return sum(map(_processor_ticks, _process_tree(self.pid)))
        except OSError:  # no Linux, or a process has just ended
            return None

    def wait_until_gone(self) -> None:
        """Waits until the process is gone and both threads have ended."""
        self._reader.join()
        self._writer.join()

    def _write_commands(self) -> None:
        with contextlib.suppress(OSError):
            while (command := self._commands.get()) is not None:
                self._connection.send(command)

    def _read_messages(
        self, on_message: Callable[[Message], None], on_exit: Callable[[WorkerExit], None]
    ) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                on_message(self._connection.recv())
        ending = self._wait_for_exit()
        self._commands.put(None)
        self._writer.join()
        self._connection.close()
        on_exit(ending)

    def _wait_for_exit(self) -> WorkerExit:
        try:
            code = self._popen.wait(LAST_WORDS_S)
        except subprocess.TimeoutExpired:
            self.kill_worker(OVERSTAYED)
            code = self._popen.wait()
        killed = self._killed if code == -signal.SIGKILL else ""
        is_foreign = code == -signal.SIGKILL and not killed
        return WorkerExit(code, killed, is_foreign and count_oom_kills() > self._oom_kills)


def _start_thread(name: str, call: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=call, name=name, daemon=True)
    thread.start()
    return thread


def _process_tree(pid: int) -> Iterator[int]:
    yield pid
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in children.read_text(encoding="utf-8").split():
            yield from _process_tree(int(child))


def _processor_ticks(pid: int) -> int:
    """Of the process and of the children that it has waited for."""
    _, _, fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")
    return sum(map(int, fields.split()[CPU_TIMES]))
