"""The image: two stages on one chosen base, no root, a health check, and nothing copied that is not
there.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch

import pytest

from .files import ROOT, compose

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


def test_docker_can_ask_for_its_health() -> None:
    (check,) = [rest for word, rest in LAST if word == "HEALTHCHECK"]
    assert "http://127.0.0.1:8080/health" in check


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
