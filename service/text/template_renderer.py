"""Renders adapters' chat templates in two processes; the API process's end of them.

They are started when first needed, and replaced when they die. A template that was slow or killed its
process has the second process from then on, and takes turns there with other slow ones, so that it
holds up no template that behaves. Must not know HTTP, adapters or tokens.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import threading
import time
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection

from ..child_process import start_child
from ..errors import AdapterdError, BadRequest, NotReady, Overloaded
from ..threads import PROCESS, run_in
from .template_process import CPU_S, Rendering, RenderRequest

PROGRAM = "service.text.template_process"
START_S = 60.0
# For delays that processor time does not measure: a process that is stopped, or a machine that swaps
WALL_S = 10.0
CANNOT_START = "not ready: the process that renders chat templates cannot be started"
LAST_WORDS_S = 2.0  # how long a process may take to end after it closed its pipe
BYTES = 12  # of JSON for a character, at most
# Of processor time; a template of a usual length takes a few milliseconds, and fifty the first time
SLOW_S = 0.25
SLOW_FOR_S = 60.0  # how long a template counts as slow
SLOW_WAITING = 16  # requests that may wait for slow templates
# All that a template's process needs
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

        A caller who leaves gives up the text, not the process: the next caller would get this text for
        its own.
        """
        outcome = await asyncio.shield(asyncio.create_task(self._render_in_turn(request)))
        if isinstance(outcome, AdapterdError):
            raise outcome
        if outcome.text is None:
            raise BadRequest(f"messages: the chat template {outcome.reason}", param="messages")
        return outcome.text

    async def close(self) -> None:
        """Ends both processes, busy or not."""
        for process, turn in self._turns.items():
            process.kill()
            async with turn:
                await run_in(PROCESS, process.close)

    async def _render_in_turn(self, request: RenderRequest) -> Rendering | AdapterdError:
        if not self._is_slow(request.template):
            async with self._turns[self._quick]:
                # Another conversation may have shown it meanwhile
                if not self._is_slow(request.template):
                    return await self._render_in(self._quick, request)
        if self._slow_waiting >= SLOW_WAITING:
            return Overloaded("too many requests wait for chat templates that are slow", retry_after=10)
        self._slow_waiting += 1
        try:
            async with self._turns[self._slow]:
                return await self._render_in(self._slow, request)
        finally:
            self._slow_waiting -= 1

    async def _render_in(self, process: RenderProcess, request: RenderRequest) -> Rendering | AdapterdError:
        outcome = await run_in(PROCESS, process.render, request)
        if isinstance(outcome, Rendering) and outcome.seconds > SLOW_S:
            now = time.monotonic()
            self._slow_until = {template: end for template, end in self._slow_until.items() if end > now}
            self._slow_until[request.template] = now + SLOW_FOR_S
        return outcome

    def _is_slow(self, template: str) -> bool:
        return self._slow_until.get(template, 0.0) > time.monotonic()


class RenderProcess:
    """One process, started again after its end. All but `kill` is for one thread at a time."""

    def __init__(self) -> None:
        self._popen: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        return self._popen.pid if self._popen else None

    def render(self, request: RenderRequest) -> Rendering | AdapterdError:
        """The rendering.

        A process that another program killed is no fault of the template unless it happens twice.
        """
        for _ in range(2):
            try:
                pipe = self._ensure_started()
            except (EOFError, OSError):
                self._end_process()
                return NotReady(CANNOT_START, retry_after=2)
            rendering = self._exchange(pipe, request)
            if rendering is not None:
                return rendering
        return Rendering(None, "ends the process that renders it", CPU_S)

    def kill(self) -> None:
        """Ends the process for good, from any thread; a thread that waits for it sees that it died."""
        self._closed = True
        if self._popen:
            self._popen.kill()

    def close(self) -> None:
        self._closed = True
        self._end_process()

    def _ensure_started(self) -> Connection:
        is_running = self._popen is not None and self._popen.poll() is None
        if self._pipe is not None and is_running:
            return self._pipe
        self._end_process()
        if self._closed:
            raise EOFError
        self._pipe, child_end = Pipe()
        with child_end:
            self._popen = start_child(PROGRAM, child_end, environment=_make_environment())
        if not self._pipe.poll(START_S):
            raise EOFError
        self._pipe.recv_bytes()
        return self._pipe

    def _exchange(self, pipe: Connection, request: RenderRequest) -> Rendering | None:
        """The rendering; None where the process died and no limit of a template explains it."""
        assert self._popen is not None, "a pipe has a process at its other end"
        killer = threading.Timer(WALL_S, self._popen.kill)
        killer.start()
        began = time.monotonic()
        try:
            pipe.send(request)
            answer = pipe.recv_bytes(BYTES * request.limit + 10_000)
            rendering = Rendering(**json.loads(answer))
        except RecursionError:  # before anything was sent
            return Rendering(None, "refuses them: they are nested too deep")
        except (EOFError, OSError, ValueError, TypeError):
            return self._explain_end(time.monotonic() - began)
        finally:
            killer.cancel()
        if rendering.worn:
            self._end_process()
        return rendering

    def _explain_end(self, after: float) -> Rendering | None:
        """The limit of time that the process broke when it died after so many seconds, if it did."""
        assert self._popen is not None, "it has just died"
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(LAST_WORDS_S)
        code = self._popen.poll()
        self._end_process()
        if code == -signal.SIGPROF:
            return Rendering(None, f"takes more than {CPU_S:g} s of processor time", CPU_S)
        return Rendering(None, f"takes more than {WALL_S:g} s", CPU_S) if after >= WALL_S else None

    def _end_process(self) -> None:
        if self._pipe:
            self._pipe.close()
        if self._popen:
            self._popen.kill()
            self._popen.wait()
        self._pipe = self._popen = None


def _make_environment() -> dict[str, str]:
    """The process's environment, without the service's keys and tokens."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return kept | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
