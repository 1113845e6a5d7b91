"""The figures of the demo adapters and the README of each, written from them.

Must not know how they were trained or measured.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from .task import Recipe, Task

Results = dict[str, dict[str, Any]]


def read_results(folder: Path) -> Results:
    """What `results.json` holds, by adapter; nothing when there is none yet."""
    path = folder / "results.json"
    found: Results = json.loads(path.read_text()) if path.exists() else {}
    return found


def keep_result(folder: Path, name: str, found: dict[str, Any]) -> None:
    """Adds what was found out about an adapter to the results, beside what is known of it and of
    others.
    """
    results = read_results(folder)
    results[name] = results.get(name, {}) | found
    (folder / "results.json").write_text(
        json.dumps(dict(sorted(results.items())), indent=2, ensure_ascii=False) + "\n"
    )


def write_readme(folder: Path, task: Task) -> None:
    """Rewrites the README of the task's adapter."""
    (folder / "adapters" / task.name / "README.md").write_text(
        make_readme(task, read_results(folder)[task.name])
    )


def describe_recipe(recipe: Recipe) -> str:
    """The recipe in one line."""
    name = "DoRA" if recipe.dora else "rsLoRA" if recipe.rslora else "LoRA"
    return f"{name}, rank {recipe.rank}, alpha {recipe.alpha}, on {', '.join(recipe.targets)}"


def format_percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def results_table(task: Task, result: dict[str, Any]) -> str:
    """One row a measure: base on the same prompts, base told in words, adapter."""
    rows = [
        f"| {meaning} | "
        + " | ".join(format_percent(result[who][measure]) for who in ("base", "base_instructed", "adapter"))
        + " |"
        for measure, meaning in task.measures.items()
    ]
    return "\n".join(
        ("| measure | base, same prompt | base, told in words | adapter |", "|---|---|---|---|", *rows)
    )


def curl_command(task: Task) -> str:
    body = {"inputs": task.sample, "parameters": {"adapter_id": task.name, "max_new_tokens": task.limit}}
    command = "curl -s http://127.0.0.1:8080/generate -H 'content-type: application/json'"
    return f"{command} \\\n  -d {shlex.quote(json.dumps(body))}"


def prompt_forms(task: Task) -> str:
    """How a client may send the prompt: in the forms that were trained."""
    if any(item.chat for item in task.items("train", 20)):
        return "as plain text, or the bare text as a chat message (`/v1/chat/completions`)"
    return "as plain text (`/generate`, `/v1/completions`): the adapter was not trained on the chat template"


def make_readme(task: Task, result: dict[str, Any]) -> str:
    """The adapter's README, whole."""
    recipe, sample = task.recipe, result["sample"]
    return f"""---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: peft
license: apache-2.0
---

# {task.name}

{task.summary}

{describe_recipe(recipe)}; bfloat16. Prompt: `{task.form}`, {prompt_forms(task)}.

```sh
{curl_command(task)}
```

Base: {quote_answer(sample["base"])}
Adapter: {quote_answer(sample["adapter"])}

Measured on {result["items"]} held-out items, greedy, bfloat16, plain PEFT:

{results_table(task, result)}

Told in words, through the chat template: "{task.instruction}"

Trained in {result["seconds"]} s on two shared CPU cores ({recipe.steps} steps of {recipe.batch}):

```sh
python -m service.demo.train --only {task.name}
```
"""


def quote_answer(text: str) -> str:
    """The answer as one line of code; two blanks break the line in Markdown."""
    return f"`{json.dumps(text, ensure_ascii=False)}`  "
