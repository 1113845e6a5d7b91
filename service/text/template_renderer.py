"""The API process's end of rendering adapters' chat templates: two processes, started when first
needed, replaced when they die.

A template that was slow or killed its process has the second one from then on, and takes turns
there with others of its kind, so that it holds up no template that behaves. Must not know HTTP,
adapters or tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from ..errors import AdapterdError, BadRequest, NotReady, Overloaded
from ..threads import PROCESS, run_in
from .template_process import CPU_S, Rendering, RenderRequest

START_S = 60.0
# For what processor time does not measure: a process that is stopped, or a machine that swaps
WALL_S = 10.0
LAST_WORDS_S = 2.0  # how long a process may take to end after it closed its pipe
BYTES = 12  # of JSON for a character, at most
# Of processor time; a template of a usual length takes a few milliseconds, and fifty the first time
SLOW_S = 0.25
SLOW_FOR_S = 60.0  # how long a template counts as slow
SLOW_WAITING = 16  # requests that may wait for slow templates
# All that a stranger's program needs
ENVIRONMENT = ("PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")


class TemplateRenderer:
    """Renders one conversation at a time in each of its two processes."""

    def __init__(self) -> None:
        self._quick, self._slow = RenderProcess(), RenderProcess()
        self._turns = {self._quick: asyncio.Lock(), self._slow: asyncio.Lock()}
        self._slow_waiting = 0
        self._slow_until: dict[str, float] = {}

    @property
    def pids(self) -> list[int]:
        """The ids of the processes there are."""
        return [process.pid for process in self._turns if process.pid is not None]

    async def render(self, request: RenderRequest) -> str:
        """The rendered text.

        Raises BadRequest with the template's reason or the limit it broke; Overloaded; NotReady.

        A caller who leaves gives up the text, not the process: the next one would get this text for
        its own.
        """
        outcome = await asyncio.shield(asyncio.create_task(self._in_turn(request)))
        if isinstance(outcome, AdapterdError):
            raise outcome
        if outcome.text is None:
            raise BadRequest(f"messages: the chat template {outcome.reason}", param="messages")
        return outcome.text

    async def close(self) -> None:
        """Ends both processes, whatever they are busy with."""
        for process, turn in self._turns.items():
            process.kill()
            async with turn:
                await run_in(PROCESS, process.close)

    async def _in_turn(self, request: RenderRequest) -> Rendering | AdapterdError:
        if not self._is_slow(request.template):
            async with self._turns[self._quick]:
                # Another conversation may have shown it meanwhile
                if not self._is_slow(request.template):
                    return await self._rendered(self._quick, request)
        if self._slow_waiting >= SLOW_WAITING:
            return Overloaded("too many requests wait for chat templates that are slow", retry_after=10)
        self._slow_waiting += 1
        try:
            async with self._turns[self._slow]:
                return await self._rendered(self._slow, request)
        finally:
            self._slow_waiting -= 1

    async def _rendered(self, process: RenderProcess, request: RenderRequest) -> Rendering | AdapterdError:
        outcome = await run_in(PROCESS, process.render, request)
        if isinstance(outcome, Rendering) and outcome.seconds > SLOW_S:
            now = time.monotonic()
            self._slow_until = {template: end for template, end in self._slow_until.items() if end > now}
            self._slow_until[request.template] = now + SLOW_FOR_S
        return outcome

    def _is_slow(self, template: str) -> bool:
        return self._slow_until.get(template, 0.0) > time.monotonic()


class RenderProcess:
    """One process after another. All but `kill` is for one thread at a time."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen else None

    def render(self, request: RenderRequest) -> Rendering | AdapterdError:
        """The rendering.

        A process that somebody else killed is no fault of the template unless it happens twice.
        """
        for _ in range(2):
            try:
                pipe = self._started()
            except (EOFError, OSError):
                self._end()
                return NotReady(
                    "not ready: the process that renders chat templates cannot be started", retry_after=2
                )
            rendering = self._exchanged(pipe, request)
            if rendering is not None:
                return rendering
        return Rendering(None, "ends the process that renders it", CPU_S)

    def kill(self) -> None:
        """Ends the process for good, from any thread; what waits for it is told that it died."""
        self._closed = True
        if self._popen:
            self._popen.kill()

    def close(self) -> None:
        self._closed = True
        self._end()

    def _started(self) -> Connection:
        if self._pipe is not None and self._popen is not None and self._popen.poll() is None:
            return self._pipe
        self._end()
        if self._closed:
            raise EOFError
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "service.text.template_process", str(theirs.fileno())]
        with theirs:
            self._popen = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_environment(),
            )
        if not self._pipe.poll(START_S):
            raise EOFError
        self._pipe.recv_bytes()
        return self._pipe

    def _exchanged(self, pipe: Connection, request: RenderRequest) -> Rendering | None:
        """None where the process has died of what no limit of a template explains."""
        assert self._popen is not None, "a pipe has a process at its other end"
        late = threading.Timer(WALL_S, self._popen.kill)
        late.start()
        began = time.monotonic()
        try:
            pipe.send(request)
            rendering = Rendering(**json.loads(pipe.recv_bytes(BYTES * request.limit + 10_000)))
        except RecursionError:  # before anything was sent
            return Rendering(None, "refuses them: they are nested too deep")
        except (EOFError, OSError, ValueError, TypeError):
            return self._ended(time.monotonic() - began)
        finally:
            late.cancel()
        if rendering.worn:
            self._end()
        return rendering

    def _ended(self, after: float) -> Rendering | None:
        """Which limit of time the process broke when it died after so many seconds, if it was one."""
        assert self._popen is not None, "it has just died"
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(LAST_WORDS_S)
        code = self._popen.poll()
        self._end()
        if code == -signal.SIGPROF:
            return Rendering(None, f"takes more than {CPU_S:g} s of processor time", CPU_S)
        return Rendering(None, f"takes more than {WALL_S:g} s", CPU_S) if after >= WALL_S else None

    def _end(self) -> None:
        if self._pipe:
            self._pipe.close()
        if self._popen:
            self._popen.kill()
            self._popen.wait()
        self._pipe = self._popen = None


def _environment() -> dict[str, str]:
    """No key and no token of the service's own."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    paths = os.pathsep.join(path for path in sys.path if path)  # it must find the very same modules
    quiet = {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    return kept | quiet | {"PYTHONPATH": paths}
