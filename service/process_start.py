"""The first calls of every process of the service: signals, standard streams, UTF-8, where modules come from.

Runs in all processes, before anything heavy is imported; must not know settings, logs or a command.
"""

from __future__ import annotations

import io
import os
import select
import signal
import sys
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, TextIO

from .exit_codes import OF_SIGNAL

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
PATIENCE_MS = 1000  # for a reader of the log that is busy; one that does not read is then waited for no more


def settle_program() -> None:
    """For the process that somebody starts; others are settled by `service/child_process.py`."""
    end_at_signals()
    enter_utf8_mode()
    open_standard_descriptors()
    sys.stderr = open_lossy(2)
    leave_working_directory()


def end_at_signals() -> None:
    """Lets each signal that stops the service end this process at once, as long as it serves nothing.

    Process 1 of a container would otherwise be sent them in vain. One that is ignored stays so: `nohup`.
    """
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end_process)


def _end_process(number: int, frame: FrameType | None) -> None:
    """Ends as the signal does by itself, or with its exit code where it does nothing to process 1."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    os._exit(OF_SIGNAL + number)


def enter_utf8_mode() -> None:
    """Starts the program again in Python's UTF-8 mode where the locale is of another encoding.

    By the locale Python spells the names of files, and libraries read what is in them.
    """
    is_chosen = sys.flags.utf8_mode or "utf8" in sys._xoptions
    if is_chosen or sys.getfilesystemencoding() == "utf-8":
        return
    name, *arguments = sys.orig_argv
    with suppress(OSError):
        os.execv(sys.executable, [name, "-X", "utf8", *arguments])


def open_standard_descriptors() -> None:
    """Opens those of descriptors 0 to 2 that are closed on the null device.

    Else a socket of the service gets the number, and with it what is written to a standard stream.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free, which is this one
            os.set_inheritable(descriptor, True)


class LossyFile(io.FileIO):
    """A descriptor to write to that raises nothing and holds up nobody for long.

    What cannot be written (a full disk, a pipe whose reader is gone or does not read) is lost.
    """

    _is_stuck = False

    def write(self, data: ReadableBuffer, /) -> int:
        """The bytes that were written, or lost."""
        view = memoryview(data)
        with suppress(OSError):
            if self._wait_until_free():
                # So much fits into a pipe that has room at all; more could wait for the reader
                return super().write(view[: select.PIPE_BUF]) or len(view)
        return len(view)

    def _wait_until_free(self) -> bool:
        poller = select.poll()
        poller.register(self, select.POLLOUT)
        is_free = bool(poller.poll(0 if self._is_stuck else PATIENCE_MS))
        self._is_stuck = not is_free
        return is_free


def open_lossy(descriptor: int) -> TextIO:
    """A text stream over a standard descriptor, in UTF-8 and written line by line."""
    raw = LossyFile(descriptor, "w", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )


def leave_working_directory() -> None:
    """Takes the working directory, which `python -m` puts first, off the path of modules.

    A `queue.py` there would be imported for the library's. A checkout that the service itself comes from
    stays.
    """
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    with suppress(OSError):  # the directory is gone
        is_first = bool(sys.path) and sys.path[0] in ("", os.getcwd())
        if is_first and not sys.flags.safe_path and os.getcwd() != home:
            del sys.path[0]
