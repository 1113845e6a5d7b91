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
from ..core.messages import Load
from ..engine.plan import Runner
from ..errors import AdapterdError, AdapterInvalid, Internal, Overloaded
from ..limits import free_memory, megabytes

log = logging.getLogger(__name__)

# While it is read an adapter is there twice: the file, and the tensors made of it
COPIES = 2
NO_MEMORY = "there is not enough memory for the adapter: {}"


class Loader:
    """`results` yields a Load for each `read_adapter`; it can be waited for beside other connections.

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

    def take_result(self) -> Load:
        """The next result, which must be there."""
        self.deadline = math.inf
        load: Load = self.results.recv()
        return load

    def end_reading(self) -> None:
        """Reads no more after the load in progress, whose result can still be taken."""
        self._todo.put(None)

    def _read_forever(self) -> None:
        while (adapter := self._todo.get()) is not None:
            began = time.monotonic()
            time.sleep(self._slow_s)
            self._done.send(self._try_load(adapter, began))

    def _try_load(self, adapter: Adapter, began: float) -> Load:
        """How the load went that began at this `time.monotonic`."""
        try:
            size = self._load_adapter(adapter)
        except AdapterdError as error:
            reason = error.message or error.code
            return Load(adapter.digest, time.monotonic() - began, 0, reason, error.code)
        return Load(adapter.digest, time.monotonic() - began, size)

    def _load_adapter(self, adapter: Adapter) -> int:
        """The bytes read. Raises AdapterdError."""
        require_memory(COPIES * adapter.size)
        try:
            return self._runner.load_adapter(adapter)
        except AdapterdError:
            raise
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise AdapterInvalid([f"the adapter's files cannot be read: {reason}"]) from error
        except Exception as error:
            if is_out_of_memory(error):
                raise Overloaded(NO_MEMORY.format("it ran out while it was read")) from error
            log.exception("an adapter could not be loaded")
            raise Internal(f"the adapter could not be loaded ({type(error).__name__})") from error


def require_memory(needed: int) -> None:
    """Raises Overloaded where so many bytes are not left."""
    free = free_memory()
    if free is not None and needed > free.memory:
        need = f"it takes {megabytes(needed)} to be read, {megabytes(free.memory)} are free, for {free.limit}"
        raise Overloaded(NO_MEMORY.format(need))


def is_out_of_memory(error: Exception) -> bool:
    """Whether the system or the device refused memory; torch has a word of its own for each."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in str(error)
    )
