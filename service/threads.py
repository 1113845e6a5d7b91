"""Threads of the API process, by kind of work: slow work of one kind never keeps work of another kind waiting.

A source that takes ten seconds holds download threads, and no reading of `/metrics`, no tokenizing. Must not know what the work is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

DISK = ThreadPoolExecutor(8, "disk")  # stat, read, write and delete files of the adapters directory
DOWNLOAD = ThreadPoolExecutor(16, "download")  # ask another machine, for minutes at worst
TEXT = ThreadPoolExecutor(4, "text")  # tokenize, compile grammars, render long answers: processor time, without end in sight
PROCESS = ThreadPoolExecutor(4, "process")  # wait for a child process: each has one caller at a time


async def run_in(executor: ThreadPoolExecutor, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """The call's result, from a thread of this kind. Raises what the call raises. A caller who is cancelled leaves the call running."""
    return await asyncio.get_running_loop().run_in_executor(executor, partial(call, *args, **kwargs))
