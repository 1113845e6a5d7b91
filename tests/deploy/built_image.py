"""Builds the image of a checkout that has been used, and runs it as compose does: `make image-test`.

For a release, not part of `make test`: it takes minutes, an engine (docker or podman) and the registries.
ENGINE chooses the engine, BASE the image's base, BUILD_FLAGS are more flags of its build.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import requests

from .files import ROOT, compose, follow_key_recipe
from .used_checkout import plant_builder_state, tracked_files

TAG = "adapterd:image-test"
SERVICE = compose()["services"]["adapterd"]
READY_S = 900  # of a first start: the base is converted and the kernels are built, maybe on two busy cores
ENDED_S = 300
# What an engine is told of a service, by its key in the compose file
FLAGS: dict[str, Callable[[Any], list[str]]] = {
    "init": lambda value: ["--init"] * value,
    "restart": lambda policy: [f"--restart={policy}"],
    "stop_grace_period": lambda seconds: [f"--stop-timeout={seconds.removesuffix('s')}"],
    "environment": lambda variables: [f"--env={name}={value}" for name, value in variables.items()],
    "read_only": lambda value: ["--read-only"] * value,
    "tmpfs": lambda paths: [f"--tmpfs={path}" for path in paths],
    "shm_size": lambda size: [f"--shm-size={size}"],
    "cap_drop": lambda names: [f"--cap-drop={name}" for name in names],
    "security_opt": lambda options: [f"--security-opt={option}" for option in options],
    "cpus": lambda number: [f"--cpus={number}"],
    "mem_limit": lambda size: [f"--memory={size}"],
}
ELSEWHERE = {"build", "image", "profiles", "ports", "secrets", "volumes"}
ASK = """
import http.client, json, sys
method, path, headers = sys.argv[1:]
asked = http.client.HTTPConnection("127.0.0.1", 8080, timeout=300)
asked.request(method, path, sys.stdin.buffer.read() or None, json.loads(headers))
answer = asked.getresponse()
print(json.dumps([answer.status, answer.read().decode()]))
"""
RIGHTS = """
import os
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status") if ":\\t" in line)
try:
    open("/home/adapterd/written", "w")
except OSError as error:
    print(os.getuid(), int(status["CapBnd"], 16), int(status["NoNewPrivs"]), error.strerror)
"""


@cache
def find_engine() -> list[str]:
    """The engine's command. Raises RuntimeError where none answers."""
    if named := os.environ.get("ENGINE"):
        return shlex.split(named)
    for name in ("docker", "podman"):
        if shutil.which(name) and subprocess.run([name, "info"], capture_output=True).returncode == 0:
            return [name]
    raise RuntimeError("neither docker nor podman answers here")


def run_engine(*words: str, body: bytes = b"", checked: bool = True) -> subprocess.CompletedProcess[str]:
    """Raises RuntimeError with what the engine said, if `checked`."""
    command = [*find_engine(), *words]
    done = subprocess.run(command, input=body, capture_output=True)
    out, err = done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace")
    if checked and done.returncode:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{out[-2000:]}{err[-4000:]}")
    return subprocess.CompletedProcess(command, done.returncode, out, err)


@dataclass(frozen=True)
class Container:
    """One container of the image, as the engine knows it."""

    name: str
    keys: Path

    def start(self, *flags: str, serve: Sequence[str] = ()) -> None:
        run_engine("run", "--detach", f"--name={self.name}", "--network=none", *flags, TAG, *serve)

    def inspect(self, field: str) -> str:
        return run_engine("inspect", f"--format={{{{{field}}}}}", self.name).stdout.strip()

    def run_python(self, code: str, *arguments: str, body: bytes = b"") -> str:
        words = ("exec", "--interactive", self.name, "python3", "-c", code, *arguments)
        return run_engine(*words, body=body).stdout

    def ask(self, method: str, path: str, key: str = "", body: bytes = b"", kind: str = "") -> list[Any]:
        """The status and the answer's text, asked from inside: it has no network. `key` is a file's name."""
        headers = {"authorization": f"Bearer {(self.keys / key).read_text('utf-8').strip()}"} if key else {}
        headers |= {"content-type": kind or "application/json"} if body else {}
        found: list[Any] = json.loads(self.run_python(ASK, method, path, json.dumps(headers), body=body))
        return found

    def logs(self) -> str:
        done = run_engine("logs", self.name, checked=False)
        return done.stdout + done.stderr

    def await_state(self, is_reached: Callable[[], bool], seconds: float) -> None:
        """Raises RuntimeError with the end of the log where it takes too long."""
        until = time.monotonic() + seconds
        while not is_reached():
            if time.monotonic() > until:
                raise RuntimeError(f"{self.inspect('.State.Status')}:\n{self.logs()[-2000:]}")
            time.sleep(1)

    def is_ready(self) -> bool:
        return self._is_running() and self._answers("/ready")

    def is_listening(self) -> bool:
        return self._is_running() and '"listening"' in self.logs()

    def _is_running(self) -> bool:
        status = self.inspect(".State.Status")
        if status == "exited":
            raise RuntimeError(f"it ended:\n{self.logs()[-2000:]}")
        return status == "running"

    def _answers(self, path: str) -> bool:
        words = ("exec", self.name, "python3", "-c", ASK, "GET", path, "{}")
        return run_engine(*words, checked=False).stdout.startswith("[200,")


def list_flags(keys: Path, volumes: str) -> list[str]:
    """The flags that say what compose says of the service; its volumes are named `volumes` and what they are.

    Raises KeyError where compose says what is not known here.
    """
    flags = [flag for key in SERVICE.keys() - ELSEWHERE for flag in FLAGS[key](SERVICE[key])]
    secrets = {name: Path(told["file"]).name for name, told in compose()["secrets"].items()}
    mounts = [f"{keys / secrets[name]}:/run/secrets/{name}:ro" for name in SERVICE["secrets"]]
    mounts += [f"{volumes}-{mount}" for mount in SERVICE["volumes"]]
    return flags + [f"--volume={mount}" for mount in mounts]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return follow_key_recipe(tmp_path_factory.mktemp("compose"))


@pytest.fixture(scope="module", autouse=True)
def image(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Built of a copy of the checkout, in which somebody has served, uploaded and tested."""
    context = tmp_path_factory.mktemp("context")
    for path in tracked_files():
        (context / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / path, context / path)
    plant_builder_state(context)
    flags = shlex.split(os.environ.get("BUILD_FLAGS", ""))
    if base := os.environ.get("BASE"):
        flags.append(f"--build-arg=BASE={base}")
    if find_engine()[0].endswith("podman"):
        flags.append("--format=docker")  # the other format has no HEALTHCHECK
    run_engine("build", f"--tag={TAG}", *flags, str(context))


@pytest.fixture(scope="module")
def make_container(keys: Path) -> Iterator[Callable[[], Container]]:
    """Makes names for containers, which are removed in the end with what was mounted."""
    with ExitStack() as cleaning:

        def make() -> Container:
            name = f"adapterd-{uuid.uuid4().hex[:8]}"
            for mount in SERVICE["volumes"]:
                volume = f"{name}-{mount.partition(':')[0]}"
                cleaning.callback(run_engine, "volume", "rm", volume, checked=False)
            cleaning.callback(run_engine, "rm", "--force", name, checked=False)
            return Container(name, keys)

        yield make


@pytest.fixture(scope="module")
def served(make_container: Callable[[], Container]) -> Container:
    """One that runs as compose runs it, ready."""
    container = make_container()
    container.start(*list_flags(container.keys, container.name))
    container.await_state(container.is_ready, READY_S)
    return container


def test_it_holds_the_code_and_the_shipped_adapters_and_nothing_of_its_builder() -> None:
    find = 'find /adapters "$(dirname "$(python3 -c "import service; print(service.__file__)")")" -type f'
    lines = run_engine("run", "--rm", "--network=none", "--entrypoint=sh", TAG, "-c", find).stdout.split()
    found = {path.replace("/adapters/", "service/demo/adapters/", 1) for path in lines if "/lib/" not in path}
    code = {"service/" + path.partition("/service/")[2] for path in lines if "/lib/" in path}
    shipped = {path for path in tracked_files() if path.startswith("service/demo/adapters/")}
    assert found == shipped
    assert {path for path in code if "__pycache__" not in path} <= set(tracked_files())
    assert shipped <= code


def test_it_has_no_rights(served: Container) -> None:
    assert served.run_python(RIGHTS).strip() == "10001 0 1 Read-only file system"


def test_it_answers_whoever_has_a_key(served: Container) -> None:
    asked = {"inputs": "Hello", "parameters": {"adapter_id": "dates", "max_new_tokens": 4}}
    body = json.dumps(asked).encode()
    assert served.ask("POST", "/generate", body=body)[0] == 401
    status, text = served.ask("POST", "/generate", "api", body)
    assert status == 200, text
    assert json.loads(text)["adapter"]["id"] == "dates"


def test_what_was_uploaded_and_deleted_is_so_after_a_restart(served: Container) -> None:
    archive = shutil.make_archive(str(served.keys / "dates"), "zip", ROOT / "service/demo/adapters/dates")
    with open(archive, "rb") as file:
        request = requests.Request("POST", "http://x", files={"file": ("dates.zip", file)}).prepare()
    assert isinstance(request.body, bytes)
    kind = request.headers["content-type"]
    assert served.ask("POST", "/adapters/kept/upload", "admin", request.body, kind)[0] == 201
    assert served.ask("DELETE", "/adapters/labels", "admin")[0] == 200
    run_engine("restart", served.name)
    served.await_state(served.is_ready, READY_S)
    listed = json.loads(served.ask("GET", "/adapters", "api")[1])
    assert {each["id"] for each in listed["adapters"]} == {"dates", "kept", "orders", "pirate"}


@pytest.mark.parametrize("port", ["8080", "9000"])
def test_its_health_is_asked_for_where_it_listens(make_container: Callable[[], Container], port: str) -> None:
    container = make_container()
    container.start(*list_flags(container.keys, container.name), f"--env=ADAPTERD_PORT={port}")
    container.await_state(container.is_listening, READY_S)
    kind, *check = json.loads(container.inspect("json .Config.Healthcheck.Test"))
    assert kind == "CMD"
    assert run_engine("exec", container.name, *check).returncode == 0


def test_it_ends_with_0_when_it_is_stopped(make_container: Callable[[], Container]) -> None:
    container = make_container()
    container.start(*list_flags(container.keys, container.name))
    container.await_state(container.is_listening, READY_S)
    run_engine("stop", container.name)
    assert container.inspect(".State.ExitCode") == "0", container.logs()[-2000:]


def test_a_wrong_setting_is_tried_as_often_as_compose_says_and_then_left(
    make_container: Callable[[], Container],
) -> None:
    container = make_container()
    container.start(*list_flags(container.keys, container.name), serve=["serve", "--pool-rank", "none"])
    tries = SERVICE["restart"].partition(":")[2]
    container.await_state(lambda: container.inspect(".RestartCount") == tries, ENDED_S)
    container.await_state(lambda: container.inspect(".State.Status") == "exited", ENDED_S)
    assert container.inspect(".State.ExitCode") == "2"
    assert "ADAPTERD_POOL_RANK" in container.logs()
