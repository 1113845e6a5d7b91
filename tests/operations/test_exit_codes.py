"""The tables of exit codes and last lines in docs/operating.md: each such start is made to fail."""

from __future__ import annotations

import json
import re
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from service.catalog.ownership import claim_directory
from service.exit_codes import ExitCode

from .. import making
from ..test_docs import read_section, read_tables
from .processes import REAL, run

CODES, LINES = (rows for _, rows in read_tables(read_section("docs/operating.md", "Stopping, exit codes")))
# A worker whose base ends it
DYING = """
import functools, sys
from service.worker import client
client.WorkerClient = functools.partial(client.WorkerClient, factory="tests.fakes:build_dying")
from service.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


@dataclass
class Fault:
    """What makes a start fail with a line of the table."""

    flags: Sequence[str] = ()
    variables: dict[str, str] = field(default_factory=dict)
    program: Sequence[str] = REAL
    lock: AbstractContextManager[object] = field(default_factory=nullcontext)  # held meanwhile


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def no_base(folder: Path) -> Fault:
    return Fault(["--base", str(folder), "--adapters-dir", str(folder / "adapters")])


def dying_worker(folder: Path) -> Fault:
    return Fault(["--adapters-dir", str(folder)], program=(sys.executable, "-c", DYING))


def newer_state(folder: Path) -> Fault:
    write(folder, ".adapterd.json", '{"version": 99, "adapters": {}, "deleted": []}')
    return Fault(["--adapters-dir", str(folder)])


def huge_base(folder: Path) -> Fault:
    """A base that is a config alone, of 15 TB in float32: whoever read its weights would find none."""
    base = making.tiny(folder / "base")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 60, "head_dim": 512}
    write(base, "config.json", json.dumps(config))
    (base / "model.safetensors").unlink()
    return Fault(["--base", str(base), "--adapters-dir", str(folder)])


def long_context(folder: Path) -> Fault:
    base = making.tiny(folder / "base", max_position_embeddings=100_000)
    flags = ["--adapters-dir", str(folder), "--max-context", "100000", "--kv-mb", "1"]
    return Fault(["--base", str(base), "--device", "cpu", *flags])


def held_directory(folder: Path) -> Fault:
    lock = claim_directory(folder, 8080)
    assert lock is not None
    return Fault(["--adapters-dir", str(folder)], lock=lock)


def no_cache(folder: Path) -> Fault:
    return Fault(["--base", "demo", "--adapters-dir", str(folder)], {"XDG_CACHE_HOME": "/proc/none"})


# By how the line of the table begins
FAULTS: dict[str, Callable[[Path], Fault]] = {
    "ADAPTERD_…: no such setting": lambda _: Fault(variables={"ADAPTERD_ROWS": "1"}),
    "ADAPTERD_…: … (got …)": lambda _: Fault(["--max-rows", "0"]),
    "WEB_CONCURRENCY: ": lambda _: Fault(variables={"WEB_CONCURRENCY": "2"}),
    "ADAPTERD_API_KEYS: the key file … cannot be read: ": lambda folder: Fault(["--api-keys", f"@{folder}"]),
    "ADAPTERD_API_KEYS: line … of the key file: ": lambda folder: Fault(
        ["--api-keys", f"@{write(folder, 'keys', 'sk-a sk-b')}"]
    ),
    "ADAPTERD_ADAPTERS_DIR: … was written by a newer adapterd: ": newer_state,
    "ADAPTERD_ADAPTERS_DIR: … is held by another service, ": held_directory,
    "ADAPTERD_HOST: … is not loopback; ": lambda _: Fault(["--host", "0.0.0.0"]),
    "ADAPTERD_HOST: … cannot be resolved: ": lambda _: Fault(["--host", "x" * 70, "--admin-keys", "sk"]),
    "ADAPTERD_HOST: cannot listen on ": lambda _: Fault(["--host", "192.0.2.1", "--admin-keys", "sk"]),
    "ADAPTERD_PORT: cannot listen on ": lambda _: Fault(["--port", "PORT"]),
    "ADAPTERD_BASE: … is no folder, ": lambda _: Fault(["--base", "no/such/base"]),
    "ADAPTERD_BASE: the folder … holds no config.json": no_base,
    "ADAPTERD_BASE: … needs … MB of memory ": huge_base,
    "ADAPTERD_MAX_CONTEXT: … tokens do not fit into memory; ": long_context,
    "XDG_CACHE_HOME: the cache folder … cannot be written: ": no_cache,
    "ADAPTERD_BASE: the worker died (…) … times in a row while loading": dying_worker,
}


def test_the_codes_of_the_table_are_those_of_the_program() -> None:
    codes = [int(code) for row in CODES for code in row[0].split(", ")]
    assert codes == sorted(ExitCode)


def find_fault(line: str) -> Callable[[Path], Fault]:
    (fault,) = [fault for start, fault in FAULTS.items() if line.startswith(start)]
    return fault


@contextmanager
def taken_port() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as held:
        yield str(held.getsockname()[1])


@pytest.mark.parametrize("row", LINES, ids=lambda row: row[0])
def test_each_last_line_comes_with_its_code(row: list[str], tmp_path: Path) -> None:
    line = row[0].strip("`")
    fault = find_fault(line)(tmp_path)
    with taken_port() as port, fault.lock:
        flags = [port if flag == "PORT" else flag for flag in fault.flags]
        given = [] if port in flags else ["--port", "0"]
        ran = run("serve", *flags, *given, program=fault.program, variables=fault.variables)
    last = ran.stderr.decode().splitlines()[-1]
    assert re.fullmatch(".+".join(map(re.escape, line.split("…"))) + ".*", last), last
    assert (ran.returncode, len(ran.stdout)) == (int(row[1]), 0)


def test_no_fault_is_missing_in_the_table() -> None:
    lines = [row[0].strip("`") for row in LINES]
    assert [start for start in FAULTS if not any(line.startswith(start) for line in lines)] == []
