"""Nobody takes what is written: a full disk, a reader that is gone or does not read, closed descriptors.

It starts, serves, and ends as it does anywhere else.
"""

from __future__ import annotations

import fcntl
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from service.exit_codes import ExitCode
from service.process_start import open_lossy
from tests import making

from .processes import LIMIT_S, REAL, STANDING, run, serving

FULL = Path("/dev/full")
PAGE = 4096  # bytes of the smallest pipe
TINY = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off", "base-id": "tiny"}


@contextmanager
def writing_to_full_disk() -> Iterator[dict[str, Any]]:
    with FULL.open("wb") as full:
        yield {"stdout": full, "stderr": full}


@contextmanager
def writing_to_gone_reader() -> Iterator[dict[str, Any]]:
    reader, writer = os.pipe()
    os.close(reader)
    yield {"stdout": writer, "stderr": writer}
    os.close(writer)


@contextmanager
def writing_to_deaf_reader() -> Iterator[dict[str, Any]]:
    """A pipe with room for a page, which somebody holds and never reads."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    yield {"stdout": writer, "stderr": writer}
    os.close(writer)
    os.close(reader)


LOST = (writing_to_full_disk, writing_to_gone_reader, writing_to_deaf_reader)
each_loss = pytest.mark.parametrize("losing", LOST, ids=lambda losing: losing.__name__)


@each_loss
def test_it_serves_and_ends_well_where_its_log_is_lost(losing: Callable[[], Any]) -> None:
    with losing() as streams, serving(**streams) as started:
        assert [started.get(f"/adapters?n={n}").status_code for n in range(60)] == [200] * 60
        started.send(signal.SIGTERM)
        assert started.end() == ExitCode.OK


@each_loss
def test_a_wrong_setting_is_the_same_exit_code_where_its_line_is_lost(losing: Callable[[], Any]) -> None:
    with losing() as streams:
        assert run("serve", "--port", "http", capture_output=False, **streams).returncode == ExitCode.REFUSED


def test_closed_descriptors_become_the_null_device_and_no_socket() -> None:
    closing = ("/bin/sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    with serving(program=(*closing, *STANDING)) as started:
        assert started.get("/adapters").is_success
        folder = Path(f"/proc/{started.process.pid}/fd")
        assert [os.readlink(folder / str(number)) for number in range(3)] == [os.devnull] * 3
        started.send(signal.SIGTERM)
        assert started.end() == ExitCode.OK


def test_the_worker_starts_and_starts_again_where_nobody_reads_the_log(tmp_path: Path) -> None:
    """Its libraries would show how far they are, and fail at it."""
    base = making.tiny(tmp_path / "base")
    folders = ("--base", str(base), "--adapters-dir", str(tmp_path / "adapters"))
    flags = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    with (
        writing_to_full_disk() as streams,
        serving(*folders, *flags, program=REAL, **streams) as one,
    ):
        before = find_worker(one.process.pid)
        before.kill()
        before.wait(LIMIT_S)
        body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2}}
        while (answer := ask(one.url, body)).status_code == 503:
            assert one.get("/health").is_success, "the worker is not started any more"
        assert answer.is_success, answer.text
        assert find_worker(one.process.pid) != before
        one.send(signal.SIGTERM)
        assert one.end() == ExitCode.OK


def ask(url: str, body: dict[str, Any]) -> httpx.Response:
    return httpx.post(f"{url}/generate", json=body, trust_env=False, timeout=LIMIT_S)


def find_worker(pid: int) -> psutil.Process:
    below = psutil.Process(pid).children()
    return next(one for one in below if "service.worker.loop" in one.cmdline())


def test_what_is_read_is_whole_however_much_it_is() -> None:
    reader, writer = os.pipe()
    text = "".join(f"line {number} ü\n" for number in range(100_000))
    read: list[bytes] = []

    def read_all() -> None:
        with open(reader, "rb") as source:
            read.append(source.read())

    thread = threading.Thread(target=read_all)
    thread.start()
    with open_lossy(writer) as stream:
        stream.write(text)
        stream.flush()
    os.close(writer)
    thread.join()
    assert read == [text.encode()]
