"""Threads of the API process by kind of work: slow work of one kind keeps no other kind waiting.

A source that takes ten seconds holds download threads, and no reading of `/metrics`, no tokenizing.
Must not know the calls that it runs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Threads = ThreadPoolExecutor  # those of one kind

# stat, read, write and delete files: the adapters directory may be a slow share
DISK = ThreadPoolExecutor(8, "disk")
DOWNLOAD = ThreadPoolExecutor(16, "download")  # ask another machine, for minutes at worst
# Tokenize: processor time in a library that lets the event loop run
TEXT = ThreadPoolExecutor(4, "text")
# Compile grammars: the same, but anybody can send one of seconds
GRAMMAR = ThreadPoolExecutor(2, "grammar")
# Write answers: the interpreter's time, which two would only share
RENDER = ThreadPoolExecutor(1, "render")
# Wait for a child process: each has one caller at a time
PROCESS = ThreadPoolExecutor(4, "process")
DEVICE = ThreadPoolExecutor(1, "device")  # ask the GPUs' driver how they are
ALL = (DISK, DOWNLOAD, TEXT, GRAMMAR, RENDER, PROCESS, DEVICE)


async def run_in(executor: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The call's result, from a thread of this kind. Raises what the call raises.

    A caller who is cancelled leaves the call running.
    """
    return await asyncio.get_running_loop().run_in_executor(executor, partial(call, *args, **kwargs))


def stop_threads() -> None:
    """Cancels the calls that wait for a thread, and waits for none that runs; no kind takes another
    call.
    """
    for executor in ALL:
        executor.shutdown(wait=False, cancel_futures=True)
