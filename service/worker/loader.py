"""Reads adapters into host memory on a thread of its own; runs in the worker process.

One adapter at a time, so that no step waits for a disk. An adapter that does not fit the memory that is
left is refused before it is read: else the system would kill the worker for it. Must not know requests,
or which adapter comes next.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from multiprocessing import Pipe
from queue import SimpleQueue

from ..core.adapter import Adapter
from ..core.defaults import READ_S, SLOWEST_DISK_BYTES_PER_S
from ..core.error_codes import ErrorCode
from ..core.messages import Load
from ..engine.plan import Runner
from ..errors import AdapterdError, AdapterInvalid, Internal, Overloaded
from . import memory

log = logging.getLogger(__name__)


class Loader:
    """`results` yields a (Load, error code) for each `read_adapter`; it can be waited for beside other
    connections. The code is None where the load went well.

    `deadline` is the `time.monotonic` at which the load in progress should have ended; infinite when
    there is none. A load that hangs is given up with its thread: another Loader reads on.
    """

    def __init__(self, runner: Runner, slow_s: float = 0.0) -> None:
        self.results, self._done = Pipe(duplex=False)
        self.deadline = math.inf
        self._runner, self._slow_s = runner, slow_s
        self._todo: SimpleQueue[Adapter | None] = SimpleQueue()
        threading.Thread(target=self._read_forever, name="loader", daemon=True).start()

    def read_adapter(self, adapter: Adapter) -> None:
        self.deadline = time.monotonic() + self._slow_s + READ_S + adapter.size / SLOWEST_DISK_BYTES_PER_S
        self._todo.put(adapter)

    def take_result(self) -> tuple[Load, ErrorCode | None]:
        """The next result, which must be there."""
        self.deadline = math.inf
        result: tuple[Load, ErrorCode | None] = self.results.recv()
        return result

    def end_reading(self) -> None:
        """Reads no more after the load in progress, whose result can still be taken."""
        self._todo.put(None)

    def _read_forever(self) -> None:
        while (adapter := self._todo.get()) is not None:
            began = time.monotonic()
            time.sleep(self._slow_s)
            size, code, reason = self._try_load(adapter)
            self._done.send((Load(adapter.digest, time.monotonic() - began, size, reason), code))

    def _try_load(self, adapter: Adapter) -> tuple[int, ErrorCode | None, str]:
        """The bytes read, or the code and the words of what went wrong."""
        try:
            return self._load_adapter(adapter), None, ""
        except AdapterdError as error:
            return 0, error.code, error.message or error.code

    def _load_adapter(self, adapter: Adapter) -> int:
        """The bytes read. Raises AdapterdError."""
        free = memory.free_bytes()
        if free is not None and adapter.size > free:
            need = f"it takes {adapter.size} bytes, {free} are free"
            raise Overloaded(f"there is not enough memory for the adapter: {need}")
        try:
            return self._runner.load_adapter(adapter)
        except AdapterdError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise AdapterInvalid([f"the adapter's files cannot be read: {reason}"]) from error
        except Exception as error:
            log.exception("an adapter could not be loaded")
            raise Internal(f"the adapter could not be loaded ({type(error).__name__})") from error
