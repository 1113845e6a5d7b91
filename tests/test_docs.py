"""README, CONTRIBUTING and docs/ say what there is and nothing else: settings, routes, fields,
errors, commands, files, tests, links.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from starlette.routing import compile_path

from service import errors
from service.api.errors import status_of
from service.api.schemas.chat import ChatMessage, ChatRequest
from service.api.schemas.fields import TABLES, render_table
from service.api.schemas.generate import GenerateRequest, Parameters
from service.api.schemas.openai import CompletionRequest, OpenAIRequest
from service.commands import run_command
from service.settings import PREFIX, Settings
from service.telemetry import metrics

from .api.served_app import ServedApp, serve_app

ROOT = Path(__file__).parents[1]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
}
del PAGES["CHANGELOG.md"]  # it tells of what was
METHODS = "GET|POST|PUT|PATCH|DELETE"
DECIDED = {None, (), ""}  # defaults that are told in words
LONGEST = 150  # lines of the README
MOST = 2e6  # bytes of all pictures together
# Of whatever type a field is, it takes one of them
PROBES: tuple[Any, ...] = ("x", 1, True, [1], {"a": 1})
Table = tuple[str, list[list[str]]]

each_page = pytest.mark.parametrize("page", PAGES)


def read_section(page: str, title: str) -> str:
    return PAGES[page].split(f"\n## {title}\n")[1].split("\n## ")[0]


def read_tables(text: str) -> list[Table]:
    """Each table's header line and the cells of its rows."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.M)
    lines = [block.splitlines() for block in blocks]
    return [(header, [split_row(row) for row in rows]) for header, _, *rows in lines]


def split_row(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def read_rows(page: str, title: str) -> list[list[str]]:
    return [row for _, rows in read_tables(read_section(page, title)) for row in rows]


def find_code(text: str) -> list[str]:
    """What stands between single backticks, without the blocks."""
    return [
        " ".join(span.split())
        for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))
    ]


def read_commands(page: str) -> list[list[str]]:
    """Each command of the page's shell blocks, in words; a comment ends one."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGES[page], re.S)
    lines = re.sub(r"\\\n", " ", "\n".join(blocks)).splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


CURLS = [words for page in PAGES for words in read_commands(page) if words[0] == "curl"]


@pytest.fixture(scope="module")
def served() -> Iterator[ServedApp]:
    with serve_app() as found:
        yield found


@pytest.fixture(scope="module")
def api(served: ServedApp) -> dict[str, Any]:
    described: dict[str, Any] = served.json("GET", "/openapi.json")
    return described


def test_the_readme_is_short() -> None:
    assert len(PAGES["README.md"].splitlines()) <= LONGEST


# ---- settings

SETTINGS = read_rows("docs/operating.md", "Settings")


def test_every_setting_is_in_the_table_once_and_no_other_is() -> None:
    named = [name for row in SETTINGS for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == sorted(PREFIX + name.upper() for name in Settings.model_fields)


@each_page
def test_a_page_names_only_settings_that_exist(page: str) -> None:
    named = set(re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", PAGES[page]))
    assert named <= {PREFIX + name.upper() for name in Settings.model_fields}


@pytest.mark.parametrize("row", SETTINGS, ids=lambda row: row[0])
def test_defaults_are_the_settings_own(row: list[str]) -> None:
    names = [name.removeprefix(PREFIX).lower() for name in re.findall(r"`(\w+)`", row[0])]
    plain = [
        value
        for name in names
        if (value := Settings.model_fields[name].default) not in DECIDED and name != "faults"
    ]
    shown = re.findall(r"[\w./-]+", row[1])
    for value in plain:
        assert re.sub(r"\.0$", "", str(value)) in shown


# ---- routes and fields


def test_every_route_is_in_the_table_and_no_other_is(api: dict[str, Any]) -> None:
    named = [
        found
        for row in read_rows("docs/clients.md", "Routes")
        for found in re.findall(rf"`({METHODS}) (\S+)`", row[0])
    ]
    there = [(method.upper(), path) for path, methods in api["paths"].items() for method in methods]
    assert sorted(named) == sorted(there)


def find_route(api: dict[str, Any], method: str, path: str) -> dict[str, Any] | None:
    paths = (
        methods
        for known, methods in api["paths"].items()
        if compile_path(known.replace("{id}", "{id:path}"))[0].match(path)
    )
    found: dict[str, Any] | None = next(
        (methods[method.lower()] for methods in paths if method.lower() in methods), None
    )
    return found


@each_page
def test_a_page_names_only_routes_that_exist(page: str, api: dict[str, Any]) -> None:
    for code in find_code(PAGES[page]):
        if named := re.fullmatch(rf"({METHODS}) (/\S*)", code):
            assert find_route(api, named[1], urlsplit(named[2]).path), code


OWN: dict[str, list[str]] = {  # the fields that a table must have
    "field of `parameters`": list(Parameters.model_fields),
    "field of both": list(OpenAIRequest.model_fields),
    "field of completions": list(CompletionRequest.model_fields.keys() - OpenAIRequest.model_fields.keys()),
    "field of chat": list(ChatRequest.model_fields.keys() - OpenAIRequest.model_fields.keys()),
    "field of a message": list(ChatMessage.model_fields),
}


@pytest.mark.parametrize("title", OWN)
def test_every_field_is_in_its_table_once_and_no_other_is(title: str) -> None:
    (rows,) = [
        rows for header, rows in read_tables(PAGES["docs/clients.md"]) if header.startswith(f"| {title} |")
    ]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0])) == sorted(OWN[title])


@pytest.mark.parametrize("title", TABLES)
def test_the_tables_of_openais_fields_are_those_of_the_schemas(title: str) -> None:
    assert render_table(title, TABLES[title]) in PAGES["docs/clients.md"]


def is_taken(schema: type[BaseModel], body: dict[str, Any]) -> bool:
    try:
        schema.model_validate(body)
    except ValidationError:
        return False
    return True


def find_taking(name: str, kind: str) -> bool:
    """Whether a field is taken with some value;

    `kind` is 422 for TGI's dialect, 400 for OpenAI's.
    """
    if kind == "422":
        return any(
            is_taken(GenerateRequest, {"inputs": "x", "parameters": {name: probe}}) for probe in PROBES
        )
    completion, chat = (
        {"model": "x", "prompt": "x"},
        {"model": "x", "messages": [{"role": "user", "content": "x"}]},
    )
    return any(
        is_taken(CompletionRequest, completion | {name: p}) or is_taken(ChatRequest, chat | {name: p})
        for p in PROBES
    )


MOVED = [
    row
    for header, rows in read_tables(PAGES["docs/migrating.md"])
    for row in rows
    if header.startswith("| field")
]


@pytest.mark.parametrize(
    "row", [row for row in MOVED if row[1].startswith(("400", "422"))], ids=lambda row: row[0]
)
def test_fields_of_other_servers_that_are_said_to_be_refused_are(row: list[str]) -> None:
    for name in re.findall(r"`(\w+)`", row[0]):
        assert not find_taking(name, row[1][:3]), name


@pytest.mark.parametrize(
    "row", [row for row in MOVED if row[1].startswith("the same")], ids=lambda row: row[0]
)
def test_fields_of_other_servers_that_are_said_to_be_the_same_are_there(row: list[str]) -> None:
    known = {name for schema in (Parameters, CompletionRequest, ChatRequest) for name in schema.model_fields}
    assert set(re.findall(r"`(\w+)`", row[0])) <= known


# ---- errors, metrics, alerts


def list_kinds(kind: type[errors.AdapterdError]) -> Iterator[type[errors.AdapterdError]]:
    for child in kind.__subclasses__():
        yield child
        yield from list_kinds(child)


def test_every_error_is_in_the_table_with_its_statuses_and_no_other_is() -> None:
    rows = [(re.findall(r"`(\w+)`", row[0]), row) for row in read_rows("docs/clients.md", "Errors")]
    kinds = [kind for kind in list_kinds(errors.AdapterdError) if kind.__module__ == errors.__name__]
    assert sorted(code for codes, _ in rows for code in codes) == sorted({kind.code for kind in kinds})
    for kind in kinds:
        (row,) = [row for codes, row in rows if kind.code in codes]
        assert str(kind.status) in " ".join(row), kind
        in_v1 = str(status_of(kind("x"), openai=True))
        assert in_v1 in row[2] or row[2] == "the same" or in_v1 in row[3], kind


def list_series() -> set[str]:
    return {
        family.name + end
        for family in metrics.REGISTRY.collect()
        for end in ("", "_total", "_count", "_sum", "_bucket")
    }


@each_page
def test_a_page_names_only_metrics_that_exist(page: str) -> None:
    for code in find_code(PAGES[page]):
        if named := re.fullmatch(r"(adapterd_\w+)(?:\{.*\})?", code):
            assert named[1] in list_series(), code


def test_every_alert_is_in_the_runbook_and_no_other_is() -> None:
    (group,) = yaml.safe_load((ROOT / "deploy" / "prometheus" / "rules" / "alerts.yml").read_text())["groups"]
    named = [row[0].strip("`") for row in read_rows("docs/operating.md", "Runbook")]
    assert sorted(named) == sorted(rule["alert"] for rule in group["rules"])


# ---- commands


@pytest.mark.parametrize("words", CURLS, ids=lambda words: " ".join(words)[:80])
def test_each_request_goes_to_a_route_and_its_body_is_what_that_takes(
    words: list[str], api: dict[str, Any]
) -> None:
    path = urlsplit(next(word for word in words if word.startswith("http"))).path
    body = words[words.index("-d") + 1] if "-d" in words else None
    method = words[words.index("-X") + 1] if "-X" in words else "POST" if body else "GET"
    asked = find_route(api, method, path)
    assert asked, f"{method} {path}"
    if body:
        schema = asked["requestBody"]["content"]["application/json"]["schema"]["$ref"].rsplit("/", 1)[1]
        assert json.loads(body).keys() <= api["components"]["schemas"][schema]["properties"].keys()


def test_the_readme_has_requests_to_try() -> None:
    assert len([words for words in read_commands("README.md") if words[0] == "curl"]) >= 5


@each_page
def test_each_command_is_there(page: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = " ".join(PAGES[page].split())
    targets = [words[1] for words in read_commands(page) if words[0] == "make"]
    for target in targets + re.findall(r"`make ([\w-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.M), target
    for name in set(re.findall(r"python -m service (\w+)", text)):
        try:
            code: Any = run_command([name, "--help"])
        except SystemExit as ended:
            code = ended.code
        assert code == 0, name
    for module in re.findall(r"python -m ((?:tests|deploy|service)\.[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module


def test_the_fast_tests_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    lists = dict(re.findall(r"^(FAST|NOT_FAST) := (.*)$", makefile, re.M))
    fast, left_out = lists["FAST"].split(), lists["NOT_FAST"].split()
    for path in fast + left_out:
        assert (ROOT / path).exists(), path
    for path in left_out:
        assert any(path.startswith(f"{folder}/") for folder in fast), path


# ---- files, tests, links, pictures


@each_page
def test_each_file_that_is_named_is_there(page: str) -> None:
    for code in find_code(PAGES[page]):
        for word in code.split():
            if re.match(r"(service|tests|deploy|docs|\.ci)/", word):
                assert (ROOT / word.partition("::")[0]).exists(), word


@each_page
def test_each_test_that_is_named_is_there(page: str) -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGES[page]):
        assert re.search(rf"^(async )?def {name}\(", (ROOT / path).read_text(), re.M), f"{path}::{name}"


def test_the_threats_are_held_by_tests() -> None:
    for row in read_rows("docs/security.md", "Threats"):
        assert re.search(r"`tests/[\w/]+\.py", row[2]), row[0]


def list_anchors(page: str) -> set[str]:
    """The headings of a page as links spell them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def list_links(page: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", PAGES[page])
    return [link for pair in found for link in pair if link and not link.startswith("http")]


def resolve_link(page: str, link: str) -> str:
    """The path from the root of what a page's link leads to."""
    path = link.partition("#")[0]
    return str(((ROOT / page).parent / path).resolve().relative_to(ROOT)) if path else page


@each_page
def test_each_link_leads_to_a_file_and_a_heading(page: str) -> None:
    for link in list_links(page):
        target, anchor = resolve_link(page, link), link.partition("#")[2]
        assert (ROOT / target).is_file(), link
        assert not anchor or anchor in list_anchors(target), link


def test_each_page_is_linked_from_the_readme() -> None:
    assert PAGES.keys() - {"README.md"} <= {
        resolve_link("README.md", link) for link in list_links("README.md")
    }


def test_the_pictures_are_all_shown_and_small() -> None:
    pictures = {
        str(path.relative_to(ROOT)): path for path in (ROOT / "docs").rglob("*.*") if path.suffix != ".md"
    }
    assert pictures.keys() <= {resolve_link(page, link) for page in PAGES for link in list_links(page)}
    assert sum(picture.stat().st_size for picture in pictures.values()) < MOST


def test_no_cell_of_a_table_leaves_a_question() -> None:
    """What nobody has looked at says so, and what was not found does."""
    for header, rows in read_tables(PAGES["docs/peers.md"]):
        for row in rows:
            assert len(row) == len(split_row(header)), row
            assert not {"", "-", "–", "?"} & set(row[1:]), row
