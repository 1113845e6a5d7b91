"""Other people's clients, as they are, each in a process of its own: `make test-clients`.

Not part of `make test`, for they are large to install: .venv-clients has those in Python, by
`more/requirements.lock`, `more/node_modules` those of node, by `more/package-lock.json`, and a JDK has its
own.
They ask nothing but loopback.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from service.demo import dates, labels
from service.model.loading import resolve_folder

from .conftest import LABEL, ORDER, SPOKEN_ORDER, Demo, Order

MORE = Path(__file__).parent / "more"
PROGRAMS = Path(__file__).parents[2] / ".venv-clients" / "bin"
CACTUS, TOKENS = "How do I water a cactus?", 40  # the answer has fewer
ENDED_S = 600
# Else they ask for prices, models and data sets, and report what they do
QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
CALL = {"name": "place_order", "quantity": 7, "city": "Berlin"}
PLACED = Order.model_validate_json(ORDER).model_dump()
# What each client does here
SCRIPTS = {
    "ask_litellm.py": {"plain", "streamed", "called", "structured", "too_long"},
    "ask_instructor.py": {"structured", "partial", "unshown"},
    "ask_pydantic_ai.py": {"plain", "streamed", "structured"},
    "ask_openai_agents.py": {
        "plain", "streamed", "called", "streamed_call", "structured", "result", "after"
    },
    "ask_anthropic.py": {"plain", "streamed", "called", "streamed_call", "structured", "pieces", "counted"},
    "ask_ai_sdk.mjs": {"plain", "streamed", "called", "streamed_call", "structured", "pieces"},
    "ask_openai_node.mjs": {"plain", "streamed", "called", "streamed_call", "structured"},
}  # fmt: skip


def run_client(command: Sequence[str | Path], given: str = "") -> str:
    done = subprocess.run(
        command, input=given, env=os.environ | QUIET, capture_output=True, text=True, timeout=ENDED_S
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def ask(script: str, demo: Demo) -> dict[str, list[Any]]:
    """What a script tells, each a list of what it got in one way or another."""
    given = {"url": demo.url, "cactus": CACTUS, "order": SPOKEN_ORDER, "tokens": TOKENS}
    program = "node" if script.endswith(".mjs") else PROGRAMS / "python"
    *_, line = run_client([program, MORE / script], json.dumps(given)).splitlines()
    return {name: value if isinstance(value, list) else [value] for name, value in json.loads(line).items()}


def chat(**fields: Any) -> dict[str, Any]:
    asked = {"model": "pirate", "messages": [{"role": "user", "content": CACTUS}], "max_tokens": TOKENS}
    return {**asked, "temperature": 0, **fields}


def brief(call: dict[str, Any]) -> dict[str, Any]:
    order = Order.model_validate(call["arguments"])
    return {"name": call["name"], "quantity": order.quantity, "city": order.city}


@pytest.fixture(scope="module")
def answer(demo: Demo) -> str:
    """The pirate's, asked plainly."""
    told = demo.http.post("/v1/chat/completions", json=chat()).raise_for_status()
    text: str = told.json()["choices"][0]["message"]["content"]
    return text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_client_gets_what_it_asks_for(demo: Demo, answer: str, script: str) -> None:
    """The adapter that `model` names, whole and streamed; calls; a value of a type."""
    told = ask(script, demo)
    assert set(told) == SCRIPTS[script]
    for name in {"plain", "streamed"} & set(told):
        assert set(told[name]) == {answer}, name
    for name in {"called", "streamed_call"} & set(told):
        assert [brief(call) for call in told[name]] == [CALL] * len(told[name]), name
    for name in {"structured", "partial"} & set(told):
        assert [Order.model_validate(value).city for value in told[name]] == ["Berlin"] * len(told[name])
    assert min(told.get("pieces", [2])) > 1, "arguments come as they are made"
    assert told.get("too_long", ["ContextWindowExceededError"]) == ["ContextWindowExceededError"]
    assert set(told.get("unshown", PLACED)) == set(PLACED)
    assert told.get("result", ["The order is placed."]) == ["The order is placed."]
    assert min(told.get("counted", [1])) > 0


def test_guidellm_measures(demo: Demo, tmp_path: Path) -> None:
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    items = dates.TASK.items("test", 2)
    prompts.write_text("".join(json.dumps({"prompt": item.prompt}) + "\n" for item in items))
    run_client([
        PROGRAMS / "guidellm", "run", "--disable-console",
        "--backend", f"kind=openai_http,target={demo.url},model=dates,request_format=/v1/completions",
        "--profile", "kind=synchronous",
        "--constraint", "kind=max_requests,count=2",
        "--data", f"kind=json_file,path={prompts}",
        "--output", f"kind=json,path={report}",
    ])  # fmt: skip
    (measured,) = json.loads(report.read_text())["benchmarks"]
    assert measured["metrics"]["request_totals"]["successful"] == 2


def test_lm_eval_scores(demo: Demo, tmp_path: Path) -> None:
    """By the prompt's log probabilities: the adapter's label is the likeliest."""
    items = tmp_path / "items.json"
    items.write_text(json.dumps({"prompt": labels.TASK.sample, "label": 0}) + "\n")
    task = {
        "task": "labels_sample",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(items)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": [f" {LABEL}", " nonsense"],
        "doc_to_target": "{{label}}",
    }
    (tmp_path / "labels.yaml").write_text(json.dumps(task))
    server = f"model=labels,base_url={demo.url}/v1/completions,tokenizer={resolve_folder('demo')}"
    run_client([
        PROGRAMS / "lm_eval", "run", "--model", "local-completions", "--model_args", server,
        "--include_path", tmp_path, "--tasks", "labels_sample", "--output_path", tmp_path / "told",
    ])  # fmt: skip
    (report,) = (tmp_path / "told").rglob("results_*.json")
    assert json.loads(report.read_text())["results"]["labels_sample"]["acc,none"] == 1


def test_the_jdk_is_answered_over_its_upgrade(demo: Demo, answer: str) -> None:
    asked = [json.dumps(chat()), json.dumps(chat(stream=True))]
    whole, *events = run_client(["java", MORE / "AskJdk.java", demo.url, *asked]).splitlines()
    assert json.loads(whole)["choices"][0]["message"]["content"] == answer
    chunks = [line.removeprefix("data: ") for line in events if line]
    assert chunks.pop() == "[DONE]"
    deltas = [json.loads(chunk)["choices"][0]["delta"] for chunk in chunks]
    assert "".join(delta.get("content") or "" for delta in deltas) == answer
