"""Logs as JSON: no line on stderr is anything else, whoever writes it, and stdout stays empty."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.exit_codes import ExitCode
from tests import making

from .processes import LIMIT_S, REAL, ROOT, environment, run, serving
from .test_lost_logs import TINY, ask, find_worker

# All the ways in which a library says something
LIBRARY = """
import logging, sys, threading, traceback, warnings
from service.telemetry.logs import set_up_logging
set_up_logging("json", "info")
own = logging.getLogger("library")
own.addHandler(logging.StreamHandler())
own.propagate = False
own.warning("by a handler of its own")
warnings.warn("by the warnings module")
print("by print")
sys.stderr.write("by a bar: 10%\\rby a bar: 90%\\r")
try:
    raise ValueError("by a traceback")
except ValueError:
    traceback.print_exc()
thread = threading.Thread(target=lambda: 1 / 0)
thread.start()
thread.join()
sys.stderr.write("without an end of line")
raise RuntimeError("uncaught")
"""
SAID = (
    "by a handler of its own",
    "by the warnings module",
    "by print",
    "by a bar: 10%",
    "by a bar: 90%",
    "by a traceback",
    "ZeroDivisionError",
    "without an end of line",
    "a defect ends the process",
)


def read_records(log: bytes) -> list[dict[str, Any]]:
    """The log's lines, each of which must be a JSON object."""
    records = [json.loads(line) for line in log.decode().split("\n")[:-1]]
    assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
    return records


def test_whatever_a_library_writes_is_a_line_of_the_log() -> None:
    ran = run("-c", LIBRARY, program=(sys.executable,))
    messages = [record["message"] for record in read_records(ran.stderr)]
    assert [words for words in SAID if not any(words in message for message in messages)] == []
    assert (ran.returncode, ran.stdout) == (1, b"")
    (defect,) = [record for record in read_records(ran.stderr) if "exception" in record]
    assert defect["exception"].endswith("RuntimeError: uncaught")


@pytest.mark.parametrize(
    ("flags", "variables"),
    [
        (["--log-format", "json", "--log-level", "error", "--max-rows", "0"], {}),
        (["--max-rows", "0"], {"ADAPTERD_LOG_FORMAT": "json"}),
    ],
)
def test_a_wrong_setting_is_a_line_of_the_log(flags: list[str], variables: dict[str, str]) -> None:
    ran = run("serve", *flags, variables=variables)
    (record,) = read_records(ran.stderr)
    assert (ran.returncode, record["level"]) == (ExitCode.REFUSED, "critical")
    assert record["message"].startswith("ADAPTERD_MAX_ROWS: ")


def test_a_base_that_cannot_be_served_is_a_line_of_the_log() -> None:
    program = [sys.executable, "-m", "tests.standing"]
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = str(held.getsockname()[1])
    words = [*program, "serve", "--broken", "--log-format", "json", "--port", port]
    ran = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, check=False)
    assert ran.returncode == ExitCode.FAILED
    assert read_records(ran.stderr)[-1]["message"] == "ADAPTERD_BASE: the folder holds no config.json"


def test_a_whole_life_writes_nothing_else(tmp_path: Path) -> None:
    """Start, an adapter, what the validator measures, a request that is none, a worker that dies, the end."""
    base = making.tiny(tmp_path / "base")
    making.noise(tmp_path / "adapters" / "noise", base)
    folders = ("--base", str(base), "--adapters-dir", str(tmp_path / "adapters"))
    flags = [word for name, value in TINY.items() for word in (f"--{name}", value)]
    variables = {"ADAPTERD_LOG_FORMAT": "json", "PYTHONWARNINGS": "always"}
    with (
        (tmp_path / "out").open("wb") as out,
        (tmp_path / "log").open("wb") as log,
        serving(*folders, *flags, program=REAL, variables=variables, stdout=out, stderr=log) as one,
    ):
        body = {"inputs": "Hi", "parameters": {"max_new_tokens": 2, "adapter_id": "noise"}}
        assert ask(one.url, body).is_success
        assert one.get("/adapters/noise/architecture/norms").is_success
        with socket.create_connection(("127.0.0.1", httpx.URL(one.url).port or 0)) as client:
            client.sendall(b"nonsense\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.1 400")
        before = find_worker(one.process.pid)
        before.kill()
        before.wait(LIMIT_S)
        while (answer := ask(one.url, body)).status_code == 503:
            assert one.get("/health").is_success, "the worker is not started any more"
        assert answer.is_success, answer.text
        one.send(signal.SIGTERM)
        assert one.end() == ExitCode.OK
    records = read_records((tmp_path / "log").read_bytes())
    assert "the worker died (SIGKILL) and is started again" in {record["message"] for record in records}
    assert (tmp_path / "out").read_bytes() == b""
