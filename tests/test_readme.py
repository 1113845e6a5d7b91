"""The README says what there is and nothing else: settings, routes, commands, files, and requests that the API's own schema takes."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from starlette.routing import compile_path

from service.__main__ import main
from service.settings import PREFIX, Settings

from .api.house import House, house

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHODS = "GET|POST|PUT|PATCH|DELETE"
DECIDED = {None, (), ""}  # defaults that the README tells in words
MOST = 2e6  # bytes of all pictures together


def section(title: str) -> str:
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")]


def commands() -> list[list[str]]:
    """Each command of the README's shell blocks, in words; a comment ends one."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = re.sub(r"\\\n", " ", "\n".join(blocks)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def home() -> Iterator[House]:
    with house() as found:
        yield found


@pytest.fixture(scope="module")
def api(home: House) -> dict[str, Any]:
    told: dict[str, Any] = home.json("GET", "/openapi.json")
    return told


# ---- settings


def test_every_setting_is_in_the_table_once_and_no_other_is() -> None:
    told = [name for row in rows(section("Settings")) for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(told) == sorted(PREFIX + name.upper() for name in Settings.model_fields)
    assert set(re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", README)) <= set(told)


@pytest.mark.parametrize("row", rows(section("Settings")), ids=lambda row: row[0])
def test_defaults_are_the_settings_own(row: list[str]) -> None:
    names = [name.removeprefix(PREFIX).lower() for name in re.findall(r"`(\w+)`", row[0])]
    plain = [value for name in names if (value := Settings.model_fields[name].default) not in DECIDED and name != "faults"]
    told = re.findall(r"[\w./-]+", row[1])
    for value in plain:
        assert re.sub(r"\.0$", "", str(value)) in told


# ---- routes


def test_every_route_is_in_the_table_and_no_other_is(api: dict[str, Any]) -> None:
    told = [found for row in rows(section("Routes")) for found in re.findall(rf"`({METHODS}) (\S+)`", row[0])]
    there = [(method.upper(), path) for path, methods in api["paths"].items() for method in methods]
    assert sorted(told) == sorted(there)


# ---- commands


def test_each_request_goes_to_a_route_and_its_body_is_what_that_takes(api: dict[str, Any]) -> None:
    curls = [words for words in commands() if words[0] == "curl"]
    assert len(curls) >= 5
    for words in curls:
        path = urlsplit(next(word for word in words if word.startswith("http"))).path
        body = words[words.index("-d") + 1] if "-d" in words else None
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if body else "GET"
        routes = [one for one, methods in api["paths"].items() if method.lower() in methods]
        route = next(one for one in routes if compile_path(one.replace("{id}", "{id:path}"))[0].match(path))
        asked = api["paths"][route][method.lower()]
        if body:
            schema = asked["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
            assert json.loads(body).keys() <= api["components"]["schemas"][schema]["properties"].keys()


def test_each_command_is_there() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in [words[1] for words in commands() if words[0] == "make"] + re.findall(r"`make (\w+)", README):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for name in re.findall(r"python -m service (\w+)", README):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0, name
    for module in re.findall(r"python -m ((?:tests|deploy)[\w.]+)", README):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists()


# ---- files


def test_each_file_that_is_named_or_linked_is_there() -> None:
    named = re.findall(r"`((?:service|tests|deploy|docs)/[\w./-]*)`", README)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)|(?:src|srcset)=\"([^\"]+)\"", README) for link in link if link]
    for path in [*named, *(link for link in linked if not link.startswith("http"))]:
        assert (ROOT / path).exists(), path


def test_each_test_that_is_named_is_there() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", README)
    assert len(named) > 10
    for path, name in named:
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path}::{name}"


def test_the_pictures_are_all_shown_and_small() -> None:
    pictures = list((ROOT / "docs").rglob("*.*"))
    for picture in pictures:
        assert str(picture.relative_to(ROOT)) in README
    assert sum(picture.stat().st_size for picture in pictures) < MOST
