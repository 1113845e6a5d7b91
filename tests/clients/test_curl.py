"""The curl lines of the README, of docs/ and of the adapters' own READMEs, run as they stand, but
for the address.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from service.demo import card, dates, labels, orders, pirate

from .conftest import BASE_DATE, DATE, RESULTS, Demo

ROOT = Path(__file__).parents[2]
ADDRESS = "http://127.0.0.1:8080"


def list_lines(page: Path) -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    return [
        line
        for block in blocks
        for line in re.sub(r"\\\n\s*", "", block).splitlines()
        if line.startswith("curl ")
    ]


LINES = list_lines(ROOT / "README.md")
OTHERS = [line for page in sorted((ROOT / "docs").glob("*.md")) for line in list_lines(page)]


def run(line: str, demo: Demo, where: Path) -> str:
    assert ADDRESS in line
    ran = subprocess.run(
        line.replace(ADDRESS, demo.url), shell=True, cwd=where, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def told(demo: Demo, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each line of the README prints, by what it asks for.

    `support-bot` is a folder that was put there, and a zip of it.
    """
    where = tmp_path_factory.mktemp("curl")
    shutil.copytree(demo.adapters / "dates", demo.adapters / "support-bot")
    with zipfile.ZipFile(where / "support-bot.zip", "w") as archive:
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            archive.write(demo.adapters / "dates" / name, name)
    return {key(line): run(line, demo, where) for line in LINES}


def key(line: str) -> str:
    """Method, path and the adapter or model that the body names."""
    words = shlex.split(line, comments=True)
    method = words[words.index("-X") + 1] if "-X" in words else "GET"
    path = next(word for word in words if word.startswith(ADDRESS)).removeprefix(ADDRESS)
    body: dict[str, Any] = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    named = body.get("model") or body.get("parameters", {}).get("adapter_id") or ""
    return f"{method} {path} {named}".strip()


def test_the_readme_has_the_lines_that_are_tested(told: dict[str, str]) -> None:
    assert len(told) == len(LINES), "two lines ask for the same"
    assert len(told) >= 9


def test_an_adapter_and_the_base(told: dict[str, str]) -> None:
    adapted = json.loads(told["GET /generate dates"])
    assert (adapted["generated_text"].strip(), adapted["adapter"]["id"]) == (DATE, "dates")
    assert json.loads(told["GET /generate"])["generated_text"].strip() == BASE_DATE


def test_a_streamed_chat(told: dict[str, str]) -> None:
    frames = [
        frame.removeprefix("data: ")
        for frame in told["GET /v1/chat/completions pirate"].split("\n\n")
        if frame
    ]
    assert frames.pop() == "[DONE]"
    text = "".join(
        choice["delta"].get("content") or "" for frame in frames for choice in json.loads(frame)["choices"]
    )
    assert pirate.TASK.score(text, "")["voice"] == 1


def test_what_an_adapter_is_and_would_be(told: dict[str, str]) -> None:
    summary = told["GET /adapters/dates/summary?format=text"]
    assert all(word in summary for word in ("dates", "q_proj", "v_proj", "DoRA", "16"))
    (forecast,) = [json.loads(text) for line, text in told.items() if line.startswith("GET /forecast")]
    assert forecast["parameters"] == 30 * 32 * (576 + 576 + 576 + 192)


def test_an_adapters_life(told: dict[str, str]) -> None:
    assert json.loads(told["POST /adapters"])["id"] == "support-bot"
    assert (
        json.loads(told["POST /adapters/support-bot/upload"])["digest"]
        == json.loads(told["POST /adapters"])["digest"]
    )
    assert json.loads(told["POST /adapters/check"])["ok"] is True
    assert json.loads(told["DELETE /adapters/support-bot"])["id"] == "support-bot"


@pytest.mark.parametrize("line", OTHERS)
def test_the_lines_of_the_other_pages_are_answered(demo: Demo, tmp_path: Path, line: str) -> None:
    answer = run(line, demo, tmp_path)
    assert '"error"' not in answer.replace('"error":null', "")
    assert json.loads(answer)


@pytest.mark.parametrize(
    "task", [dates.TASK, labels.TASK, orders.TASK, pirate.TASK], ids=lambda task: task.name
)
def test_an_adapters_own_readme(demo: Demo, tmp_path: Path, task: Any) -> None:
    answer = json.loads(run(card.curl_command(task), demo, tmp_path))["generated_text"].strip()
    measure = next(iter(task.measures))
    assert task.score(answer, RESULTS[task.name]["sample"]["adapter"])[measure] == 1
