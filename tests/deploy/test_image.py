"""The image: two stages on one chosen base, no root, a health check, and nothing copied that is not
there.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from fnmatch import fnmatch
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.loopback import listening

from .files import ROOT, compose, follow_key_recipe

TEXT = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
STEPS = [
    (word, rest.strip())
    for word, _, rest in (line.partition(" ") for line in TEXT.splitlines() if line.strip())
]
LAST = STEPS[max(i for i, (word, _) in enumerate(STEPS) if word == "FROM") :]
SENT = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]


def test_both_stages_stand_on_the_base_that_was_chosen() -> None:
    assert STEPS[0] == ("ARG", "BASE=python:3.11-slim")
    assert [rest for word, rest in STEPS if word == "FROM"] == ["${BASE} AS build", "${BASE} AS run"]


def test_it_does_not_run_as_root() -> None:
    user = next(rest for word, rest in LAST if word == "USER")
    assert user.isdigit()
    assert int(user) > 0
    assert f"--uid {user} " in TEXT
    assert [word for word, _ in LAST].index("USER") < [word for word, _ in LAST].index("ENTRYPOINT")


class HealthHandler(BaseHTTPRequestHandler):
    """Answers /health with the status of its subclass, anything else with 404."""

    status = 200

    def do_GET(self) -> None:
        self.send_response(self.status if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        return


class UnhealthyHandler(HealthHandler):
    """As a service that cannot recover by itself."""

    status = 503


def run_health_check(**environment: str) -> int:
    """The exit code of the image's check, where these variables are set beside the image's own."""
    (check,) = [rest for word, rest in LAST if word == "HEALTHCHECK"]
    python, *arguments = json.loads(check.partition("CMD ")[2])
    assert python == "python3"
    (image,) = [rest for word, rest in LAST if word == "ENV"]
    variables = dict(pair.split("=", 1) for pair in image.split() if pair.startswith("ADAPTERD_"))
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables | environment, capture_output=True).returncode


@pytest.mark.parametrize(("handler", "code"), [(HealthHandler, 0), (UnhealthyHandler, 1)])
def test_its_health_is_asked_for_where_it_listens_and_by_no_proxy(
    handler: type[HealthHandler], code: int
) -> None:
    with listening(handler) as url:
        port = str(urlsplit(url).port)
        assert run_health_check(ADAPTERD_PORT=port, http_proxy="http://127.0.0.1:9") == code
        assert run_health_check(ADAPTERD_PORT=port, ADAPTERD_HOST="127.0.0.1") == code


def test_where_nobody_listens_it_is_not_healthy() -> None:
    with listening(HealthHandler) as url:
        port = str(urlsplit(url).port)
    assert run_health_check(ADAPTERD_PORT=port) != 0


@pytest.mark.parametrize("line", [rest for word, rest in STEPS if word == "COPY" and "--from" not in rest])
def test_what_is_copied_exists_and_is_sent_to_the_builder(line: str) -> None:
    *sources, _ = [part for part in line.split() if not part.startswith("--")]
    for source in sources:
        assert (ROOT / source).exists(), source
        assert any(fnmatch(source, pattern) or source.startswith(pattern + "/") for pattern in SENT), source


def test_compose_publishes_on_loopback_only_and_keeps_keys_out_of_the_environment() -> None:
    for name, service in compose()["services"].items():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert all(
            value.startswith("@/run/secrets/")
            for key, value in service.get("environment", {}).items()
            if key.endswith("_KEYS")
        ), name


def test_a_read_only_container_gets_its_secrets_as_files() -> None:
    """Compose refuses any other there (docker/compose#12531)."""
    whole = compose()
    for name, service in whole["services"].items():
        if service.get("read_only"):
            assert all(
                whole["secrets"][secret].keys() == {"file"} for secret in service.get("secrets", [])
            ), name


@pytest.mark.parametrize("umask", [0o022, 0o077], ids=oct)
def test_keys_made_as_compose_says_can_be_read_in_the_containers_and_by_nobody_else(
    tmp_path: Path, umask: int
) -> None:
    """In a container the user is another one than on the host, and the folder is not there."""
    keys = follow_key_recipe(tmp_path, umask)
    assert keys.stat().st_mode & 0o777 == 0o700
    files = {Path(secret["file"]) for secret in compose()["secrets"].values()}
    assert files == {Path("keys") / path.name for path in keys.iterdir()}
    for path in keys.iterdir():
        assert path.stat().st_mode & 0o777 == 0o644, path.name
        assert re.fullmatch(r"[0-9a-f]{64}\n", path.read_text(encoding="utf-8"))


def test_compose_gives_up_what_does_not_start_and_says_what_it_may_use() -> None:
    for name in ("adapterd", "adapterd-gpu"):
        service = compose()["services"][name]
        assert re.fullmatch(r"on-failure:[1-9]\d?", service["restart"]), name
        assert service["cpus"] >= 1, name
        assert re.fullmatch(r"\d+g", service["mem_limit"]), name


def test_compose_says_which_compose_it_is_for() -> None:
    head = (ROOT / "docker-compose.yml").read_text(encoding="utf-8").partition("name: adapterd")[0]
    assert "Compose v2" in head


def test_either_profile_brings_up_one_adapterd_under_one_name() -> None:
    services = compose()["services"]
    assert services["adapterd"]["profiles"] == ["cpu"]
    assert services["adapterd-gpu"]["profiles"] == ["gpu"]
    assert services["adapterd-gpu"]["networks"]["default"]["aliases"] == ["adapterd"]
    assert services["adapterd-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == [
        "gpu"
    ]


def test_compose_mounts_what_exists_and_declares_what_it_names() -> None:
    whole = compose()
    for name, service in whole["services"].items():
        for mount in service["volumes"]:
            source = mount.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in whole["volumes"], (
                f"{name}: {mount}"
            )
        assert set(service.get("secrets", [])) <= set(whole["secrets"]), name
        assert set(service.get("depends_on", [])) <= set(whole["services"]), name
