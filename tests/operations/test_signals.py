"""Signals before there is anything to drain, a terminal that hangs up, and which processes hear them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import psutil
import pytest

from service.core.request import Finish
from service.exit_codes import ExitCode

from ..worker.test_client import engine, read, submit, worker
from .processes import LIMIT_S, NEW_PIDS, ROOT, STANDING, environment, require_command, serving

# Says when the heavy imports begin, and makes the first of them wait for a signal
IMPORTING = """
import signal, sys

class Waiting:
    def find_spec(self, name, path=None, target=None):
        if name == "service.commands":
            print("importing", flush=True)
            signal.pause()

sys.meta_path.insert(0, Waiting())
from service.__main__ import main
sys.exit(main(["serve"]))
"""
CODES = {
    signal.SIGTERM: ExitCode.TERMINATED,
    signal.SIGINT: ExitCode.INTERRUPTED,
    signal.SIGHUP: ExitCode.HUNG_UP,
}

each_signal = pytest.mark.parametrize("number", CODES, ids=lambda number: number.name)


@contextmanager
def importing(*prefix: str) -> Iterator[subprocess.Popen[bytes]]:
    """The program in the middle of its imports."""
    words = [*prefix, sys.executable, "-c", IMPORTING]
    with subprocess.Popen(
        words, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == b"importing\n"
            yield process
        finally:
            process.kill()


@each_signal
def test_a_signal_before_it_serves_ends_it_at_once_and_without_a_word(number: signal.Signals) -> None:
    with importing() as process:
        process.send_signal(number)
        said = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, said) == (-number, (b"", b""))


@each_signal
def test_it_does_so_too_as_process_1_which_no_signal_ends_by_itself(number: signal.Signals) -> None:
    require_command(*NEW_PIDS)
    with importing(*NEW_PIDS) as process:
        (first,) = psutil.Process(process.pid).children()
        first.send_signal(number)
        said = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, said) == (CODES[number], (b"", b""))


def test_a_terminal_that_hangs_up_begins_a_drain() -> None:
    with serving("--drain-s", "300") as started, httpx.stream("GET", f"{started.url}/dribble") as stream:
        lines = stream.iter_lines()
        assert next(lines) == "0"
        started.send(signal.SIGHUP)
        assert [*lines] == [str(number) for number in range(1, 20)]
        assert started.end() == ExitCode.OK


def test_under_nohup_it_does_not_hear_the_terminal() -> None:
    with serving(program=("nohup", *STANDING)) as started:
        started.send(signal.SIGHUP)
        assert started.get("/ready").is_success
        started.send(signal.SIGTERM)
        assert started.end() == ExitCode.OK


@pytest.mark.anyio
async def test_the_processes_below_leave_signals_to_the_service() -> None:
    """A terminal sends them to all."""
    async with engine() as client:
        before = worker(client)
        for number in CODES:
            os.kill(before, number)
        tokens, last = await read(submit(client, (1, 2), 5))
        assert (len(tokens), last.finish, worker(client)) == (5, Finish.LENGTH, before)
