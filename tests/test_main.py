"""The command line and the server process: what stops a start, what SIGTERM does, and the exit
codes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from deploy.bench.servers import free_port
from service import commands as command
from service.catalog.ownership import claim_directory
from service.settings import Settings
from tests import making

ROOT = Path(__file__).parent.parent
LIMIT_S = 60  # against hangs only


def environment(**settings: str) -> dict[str, str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("ADAPTERD_")}
    return kept | {"ADAPTERD_BASE": "org/none"} | settings


def run(*words: str, **settings: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", *words]
    return subprocess.run(
        line, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=LIMIT_S
    )


@contextmanager
def server(*flags: str, serves: bool = True) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A serving process with stand-ins behind its door, and its address."""
    port = free_port()
    line = [sys.executable, "-m", "tests.standing", "serve", "--port", str(port), *flags]
    process = subprocess.Popen(
        line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    url = f"http://127.0.0.1:{port}"
    with process:
        try:
            while process.poll() is None:
                try:
                    if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                        break
                except httpx.TransportError:
                    continue
            assert serves == (process.poll() is None), process.communicate()[0]
            yield process, url
        finally:
            process.kill()


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=LIMIT_S)
    return process.returncode, out


def test_sigterm_lets_a_stream_end_whole_refuses_the_next_request_and_exits_with_0() -> None:
    with server("--drain-s", "30") as (process, url), httpx.Client(base_url=url, trust_env=False) as http:
        with http.stream("GET", "/dribble") as stream:
            lines = stream.iter_lines()
            assert next(lines) == "0"
            process.send_signal(signal.SIGTERM)
            while (refused := http.get("/adapters").status_code) == 200:
                pass
            assert http.get("/health").json()["state"] == "draining"
            rest = list(lines)
        assert rest == [str(number) for number in range(1, 20)]
        assert refused == 503
        code, out = ended(process)
        assert (code, "Traceback" in out) == (0, False), out


def test_a_client_that_never_reads_does_not_hold_the_exit() -> None:
    """C3: the hard limit."""
    with server("--drain-s", "1") as (process, url), socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", int(url.rsplit(":", 1)[1])))
        deaf.sendall(b"GET /flood HTTP/1.1\r\nHost: x\r\n\r\n")
        assert deaf.recv(8) == b"HTTP/1.1"
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


def test_a_room_that_never_closes_does_not_hold_the_exit_either() -> None:
    with server("--stuck", "--drain-s", "0") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


def test_a_source_that_never_answers_does_not_hold_the_exit() -> None:
    """The grace is for requests, and none runs."""
    with server("--held", "--drain-s", "100000") as (process, _):
        process.send_signal(signal.SIGTERM)
        assert ended(process)[0] == 0


def test_nor_does_it_where_the_base_cannot_be_served() -> None:
    with server("--held", "--broken", "--log-level", "error", serves=False) as (process, _):
        assert ended(process) == (1, "ADAPTERD_BASE: the folder holds no config.json\n")


def test_a_second_signal_cuts_the_drain_short() -> None:
    with (
        server("--drain-s", "100000") as (process, url),
        httpx.Client(base_url=url, trust_env=False) as http,
        http.stream("GET", "/flood") as stream,
    ):
        chunks = stream.iter_raw()  # kept, for the stream would go with it
        next(chunks)
        process.send_signal(signal.SIGTERM)
        while http.get("/health").json()["state"] != "draining":
            pass
        process.send_signal(signal.SIGINT)
        assert ended(process)[0] == 0


def test_a_base_that_cannot_be_served_ends_the_process_with_one_line() -> None:
    with server("--broken", "--log-level", "error", serves=False) as (process, _):
        code, out = ended(process)
    assert code == 1
    assert out == "ADAPTERD_BASE: the folder holds no config.json\n"


def test_a_base_that_does_not_fit_ends_as_a_wrong_setting_does() -> None:
    with server("--large", "--log-level", "error", serves=False) as (process, _):
        assert ended(process) == (2, "ADAPTERD_BASE: it is too large\n")


def test_a_directory_that_another_service_has_is_one_line_that_names_it(tmp_path: Path) -> None:
    held = claim_directory(tmp_path, 8080)
    assert held is not None
    with held:
        ran = run("service", "serve", "--port", str(free_port()), ADAPTERD_ADAPTERS_DIR=str(tmp_path))
    assert (ran.returncode, ran.stdout) == (3, "")
    said = f"ADAPTERD_ADAPTERS_DIR: {tmp_path} is held by another service, process {os.getpid()} on the host "
    assert ran.stderr.splitlines()[-1].startswith(said)
    assert "Traceback" not in ran.stderr


def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        ran = run("tests.standing", "serve", "--port", str(held.getsockname()[1]))
    assert ran.returncode == 2
    assert ran.stderr.startswith("ADAPTERD_PORT: cannot listen on 127.0.0.1:")
    assert len(ran.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "settings", "said"),
    [
        (["serve", "--workers", "2"], {}, "--workers"),
        (["serve"], {"WEB_CONCURRENCY": "2"}, "worker"),
        (["serve"], {"ADAPTERD_PORT": "http"}, "ADAPTERD_PORT"),
        (["serve", "--max-rows", "0"], {}, "ADAPTERD_MAX_ROWS"),
        (["serve"], {"ADAPTERD_BASE": "no/such/folder"}, "ADAPTERD_BASE"),
        (["serve"], {"ADAPTERD_NO_SUCH": "1"}, "ADAPTERD_NO_SUCH"),
    ],
)
def test_a_wrong_start_is_one_line_that_names_it(
    words: list[str],
    settings: dict[str, str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in [name for name in os.environ if name.startswith("ADAPTERD_")]:
        monkeypatch.delenv(name)
    for name, text in settings.items():
        monkeypatch.setenv(name, text)
    assert command.run_command(words) == 2
    told = capsys.readouterr().err
    assert said in told
    assert len(told.splitlines()) == 1


def test_registrations_of_a_newer_service_stop_the_start_with_one_line_and_stay(tmp_path: Path) -> None:
    state = tmp_path / ".adapterd.json"
    state.write_text('{"version": 4, "adapters": {}, "deleted": []}')
    ran = run("service", "serve", "--port", str(free_port()), ADAPTERD_ADAPTERS_DIR=str(tmp_path))
    assert ran.returncode == 2
    assert ran.stderr.startswith(
        f"ADAPTERD_ADAPTERS_DIR: {state} was written by a newer adapterd: its version is 4"
    )
    assert len(ran.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == [".adapterd.json"]
    assert '"version": 4' in state.read_text()


def test_flags_override_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []

    def serve(settings: Settings, tracer: object) -> int:
        assert tracer is None
        seen.append(settings)
        return 0

    monkeypatch.setenv("ADAPTERD_BASE", "org/none")
    monkeypatch.setenv("ADAPTERD_PORT", "1")
    monkeypatch.setattr("service.server.run_server", serve)
    assert command.run_command(["serve", "--port", "2", "--max-rows=3"]) == 0
    assert (seen[0].port, seen[0].max_rows) == (2, 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A base's folder and an adapter's."""
    home = tmp_path_factory.mktemp("files")
    base = making.tiny(home / "base")
    return base, making.noise(home / "noise", base)


def test_inspect_tells_what_a_folder_holds_as_text_and_as_json(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    _, adapter = files
    assert command.run_command(["inspect", str(adapter)]) == 0
    assert "q_proj" in capsys.readouterr().out
    assert command.run_command(["inspect", str(adapter), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["peft_type"], told["modules"], told["problems"]) == ("LORA", 4, [])


def test_inspect_of_something_else_is_one_line(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (files[0], Path("/no/such")):
        assert command.run_command(["inspect", str(path)]) == 2
        assert capsys.readouterr().err == "adapter_config.json is missing\n"


def test_inspect_of_a_bad_adapter_exits_with_1(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = making.edit(files[1], tmp_path / "bad", config={"r": "4"})
    assert command.run_command(["inspect", str(bad)]) == 1
    assert "! " in capsys.readouterr().out
    unfetched = making.edit(files[1], tmp_path / "unfetched")
    (unfetched / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert command.run_command(["inspect", str(unfetched)]) == 1
    assert "tokenizer.json is a git-lfs pointer" in capsys.readouterr().out


def test_forecast_says_what_such_an_adapter_would_weigh(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for config in (files[0], files[0] / "config.json"):
        asked = ["forecast", "--config", str(config), "--r", "4", "--target-modules", "q_proj, v_proj"]
        assert command.run_command([*asked, "--format", "json"]) == 0
        told = json.loads(capsys.readouterr().out)
        held = command.run_command(["inspect", str(files[1]), "--format", "json"])
        assert (held, told["parameters"]) == (0, json.loads(capsys.readouterr().out)["parameters"])
        assert command.run_command(asked) == 0
        assert f"{told['parameters']:,}" in capsys.readouterr().out


def test_a_forecast_that_cannot_be_made_is_one_line(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    for config, modules, said in (
        (files[0], "nope", "nope"),
        (files[0] / "gone", "q_proj", "--config"),
        (files[1], "q_proj", ""),
    ):
        assert (
            command.run_command(
                ["forecast", "--config", str(config), "--r", "4", "--target-modules", modules]
            )
            == 2
        )
        told = capsys.readouterr().err
        assert said in told
        assert len(told.splitlines()) == 1


def test_bench_is_the_load_generator_and_takes_its_options() -> None:
    ran = run("service", "bench", "--clients", "2", "--help")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert "NAME=URL" in ran.stdout


def test_the_real_command_starts_as_a_module() -> None:
    ran = run("service", "serve", ADAPTERD_QUANTIZATION="nf5")
    assert ran.returncode == 2
    assert ran.stderr.startswith("ADAPTERD_QUANTIZATION: ")


def test_the_server_reads_a_tokenizer_without_torch(tmp_path: Path) -> None:
    base = making.tiny(tmp_path / "base")
    code = (
        "import sys; from service.commands import _without_torch; _without_torch();"
        "from service.text.tokenizers import Tokenizers;"
        f"print(Tokenizers({str(base)!r}).base.encode('the hen'), sys.modules['torch'])"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.stdout, ran.stderr) == (f"{tuple(making.ids('the hen'))} None\n", "")
