"""Starts the validator process and passes requests to it, one adapter at a time.

Runs in the API process, but for what begins with `run_process`, which is the child
(`python -m service.catalog.validator.process FD FORM LEVEL MAX_RANK`) and alone loads torch and PEFT.
A file that stalls or kills the child costs one refused adapter; the next one gets a fresh child.
Must not know torch itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...child_process import settle_child, start_child
from ...core.adapter import share_specs
from ...core.base_info import LayerLimit
from ...core.defaults import READ_S, SLOWEST_DISK_BYTES_PER_S
from ...core.manifest import Manifest, list_names
from ...errors import AdapterInvalid, AdapterUnsupported, Internal, NotReady, Overloaded
from ...limits import count_oom_kills
from ...threads import DISK, PROCESS, run_in
from ..architecture import ModuleNode
from .messages import NormsRequest, ReadRequest, Refusal, ValidatedAdapter

if TYPE_CHECKING:
    from .skeleton import Skeleton

T = TypeVar("T")
PROGRAM = "service.catalog.validator.process"
PARENT_GONE = (EOFError, BrokenPipeError, ConnectionResetError)
START_S = 300.0
RETRY_S = 2  # after memory was short


class Validator:
    """Validates adapters against one base, in its own process."""

    def __init__(self, max_rank: int, read_s: float = READ_S) -> None:
        self.max_rank, self.read_s = max_rank, read_s
        self.tree: ModuleNode | None = None
        self._base: tuple[Path, tuple[LayerLimit, ...], tuple[str, ...]] | None = None
        self._turn = asyncio.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._closed = False

    @property
    def pid(self) -> int | None:
        """The child's process id, while there is one."""
        return self._process.pid if self._process else None

    async def warm_up(self) -> None:
        """Starts the child, which takes seconds to load its libraries, before there is a base to
        read against.
        """
        await self._in_turn(self._ensure_child)

    async def start_on(
        self, folder: Path, limits: tuple[LayerLimit, ...] = (), parameters: tuple[str, ...] = ()
    ) -> None:
        """Shows the child the base, its `limits` and the `parameters` that it adapts.

        Raises Internal when it does not understand it.
        """
        self._base = folder, limits, parameters
        await self._in_turn(self._introduce_base)

    async def validate_adapter(self, folder: Path, known: Manifest = ()) -> ValidatedAdapter:
        """Validates the adapter in this folder.

        Raises AdapterInvalid, AdapterUnsupported, Overloaded where memory ran out.
        """
        size = await run_in(DISK, _size_of, folder)
        answer = await self._ask_child(ReadRequest(folder, known), size)
        assert isinstance(answer, ValidatedAdapter)
        adapter = replace(answer.adapter, patches=share_specs(answer.adapter.patches))
        return replace(answer, adapter=adapter, layers=share_specs(answer.layers))

    async def measure_norms(self, validated: ValidatedAdapter) -> dict[str, float]:
        """Module → Frobenius norm of its scaling · B · A.

        Raises AdapterInvalid when the files are gone or have changed.
        """
        answer = await self._ask_child(
            NormsRequest(validated.adapter, validated.layers), validated.adapter.size
        )
        assert isinstance(answer, dict)
        return answer

    async def _ask_child(self, request: ReadRequest | NormsRequest, size: int) -> Any:
        seconds = self.read_s + size / SLOWEST_DISK_BYTES_PER_S
        answer = await self._in_turn(lambda: self._answer_within(request, seconds))
        if isinstance(answer, Refusal):
            raise answer.to_error()
        return answer

    async def close(self) -> None:
        """Ends the child, whatever it reads; its callers get NotReady, and so do all later ones."""
        self._closed = True
        self._kill()
        await self._in_turn(self._end_child)

    def _kill(self) -> None:
        process = self._process
        if process is not None:
            process.kill()

    async def _in_turn(self, call: Callable[[], T]) -> T:
        """Calls in a thread, one at a time.

        A caller that leaves gives up the answer, not the turn: it would take the next caller's answer.
        """

        async def turn() -> T:
            async with self._turn:
                if self._closed and call != self._end_child:
                    raise NotReady("the service is shutting down")
                return await run_in(PROCESS, call)

        return await asyncio.shield(asyncio.create_task(turn()))

    # ---- in a thread

    def _ensure_child(self) -> Connection:
        return self._pipe or self._spawn_child()

    def _spawn_child(self) -> Connection:
        alone = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        ours, theirs = Pipe()
        with theirs:
            process = start_child(PROGRAM, theirs, str(self.max_rank), environment=os.environ | alone)
        self._pipe, self._process = ours, process
        if self._closed:
            process.kill()
        return ours

    def _introduce_base(self) -> Connection:
        pipe = self._ensure_child()
        answer = self._exchange_messages(pipe, self._base, START_S)
        if isinstance(answer, Refusal):
            self._end_child()
            raise Internal(f"the reader does not understand the base: {answer.problems[0]}")
        self.tree = answer
        return pipe

    def _answer_within(self, request: ReadRequest | NormsRequest, seconds: float) -> Any:
        return self._exchange_messages(self._pipe or self._introduce_base(), request, seconds)

    def _exchange_messages(self, pipe: Connection, message: Any, seconds: float) -> Any:
        kills, is_short = count_oom_kills(), False
        try:
            pipe.send(message)
            if pipe.poll(seconds):
                return pipe.recv()
            reason = f"reading it took longer than {seconds:.0f} s"
        except (EOFError, OSError):
            reason = "reading it ended the reader's process"
            is_short = count_oom_kills() > kills
        self._end_child()
        if is_short:
            raise Overloaded("memory ran out while the adapter was validated", retry_after=RETRY_S)
        return Refusal((reason,), {}, supported=True)

    def _end_child(self) -> None:
        if self._pipe:
            self._pipe.close()
        if self._process:
            self._process.kill()
            self._process.wait()
        self._pipe = self._process = None


def _size_of(folder: Path) -> int:
    """The bytes of the files that are read. Raises OSError."""
    return sum((folder / name).stat().st_size for name in list_names(folder))


def run_process(descriptor: str, form: str, level: str, max_rank: str) -> None:
    """The child."""
    settle_child(form, level)
    modules: dict[str, Any] = sys.modules
    # PEFT would load it, 110 MB, for weights that are never looked at here
    modules["bitsandbytes"] = None
    with Connection(int(descriptor)) as pipe, contextlib.suppress(*PARENT_GONE):
        serve_requests(pipe, int(max_rank))


def serve_requests(pipe: Connection, max_rank: int) -> None:
    """Answers until the parent is gone, which raises one of PARENT_GONE.

    It answers the base's folder, limits and parameters with its tree, a ReadRequest with a
    ValidatedAdapter, a NormsRequest with norms. A request that it cannot answer gets a Refusal.
    """
    from . import check  # here, so that only the child loads torch and PEFT

    base = _receive_base(pipe)
    while base:
        request = pipe.recv()
        if isinstance(request, NormsRequest):
            work: Callable[[], Any] = partial(check.measure_norms, request.adapter, request.layers)
        else:
            work = partial(check.validate_adapter, base, request.folder, max_rank, request.known)
        pipe.send(answer_request(work))


def _receive_base(pipe: Connection) -> Skeleton | None:
    """The base as the parent names it, whose tree is sent back; None where it cannot be understood.

    Raises EOFError.
    """
    from . import skeleton

    try:
        base = skeleton.Skeleton(*pipe.recv())
    except EOFError:
        raise
    except Exception as error:  # whatever the library makes of the base, the parent must be told
        pipe.send(Refusal((f"{type(error).__name__}: {error}"[:300],), {}, supported=True))
        return None
    pipe.send(base.make_tree())
    return base


def answer_request(work: Callable[[], T]) -> T | Refusal:
    try:
        return work()
    except AdapterInvalid as error:
        extra = {key: value for key, value in (error.details or {}).items() if key != "problems"}
        return Refusal(tuple(error.problems), extra, not isinstance(error, AdapterUnsupported))
    except OSError as error:
        return Refusal((f"the files cannot be read: {error.strerror}",), {}, supported=True)


if __name__ == "__main__":
    run_process(*sys.argv[1:])
