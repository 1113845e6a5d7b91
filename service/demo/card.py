"""The figures of the demo adapters and the README of each, written from them.

Must not know how they were trained or measured.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from ..core.defaults import DEMO_BASE
from .task import Recipe, Task

Results = dict[str, dict[str, Any]]

README = """---
base_model: {base}
library_name: peft
license: apache-2.0
---

# {task.name}

{task.summary}

{recipe}; bfloat16. Prompt: `{task.form}`, {prompt_forms}.

```sh
{command}
```

Base: {base_answer}
Adapter: {adapter_answer}

Measured on {result[items]} held-out items, greedy, bfloat16, plain PEFT:

{table}

Told in words, through the chat template: "{task.instruction}"

Trained in {result[seconds]} s on two shared CPU cores ({task.recipe.steps} steps of {task.recipe.batch}):

```sh
python -m service.demo.train --only {task.name}
```
"""


def read_results(folder: Path) -> Results:
    """What `results.json` holds, by adapter; nothing when there is none yet."""
    path = folder / "results.json"
    found: Results = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return found


def keep_result(folder: Path, name: str, figures: dict[str, Any]) -> None:
    """Adds figures of an adapter to the results, beside what is known of it and of others."""
    results = read_results(folder)
    results[name] = results.get(name, {}) | figures
    text = json.dumps(dict(sorted(results.items())), indent=2, ensure_ascii=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")


def write_readme(folder: Path, task: Task) -> None:
    """Rewrites the README of the task's adapter."""
    readme = make_readme(task, read_results(folder)[task.name])
    (folder / "adapters" / task.name / "README.md").write_text(readme, encoding="utf-8")


def describe_recipe(recipe: Recipe) -> str:
    """The recipe in one line."""
    plain = "rsLoRA" if recipe.rslora else "LoRA"
    name = "DoRA" if recipe.dora else plain
    return f"{name}, rank {recipe.rank}, alpha {recipe.alpha}, on {', '.join(recipe.targets)}"


def format_percent(value: float) -> str:
    return f"{100 * value:.0f} %"


def results_table(task: Task, result: dict[str, Any]) -> str:
    """One row a measure: base on the same prompts, base told in words, adapter."""
    lines = ["| measure | base, same prompt | base, told in words | adapter |", "|---|---|---|---|"]
    for measure, meaning in task.measures.items():
        shares = [format_percent(result[model][measure]) for model in ("base", "base_instructed", "adapter")]
        lines.append(f"| {' | '.join([meaning, *shares])} |")
    return "\n".join(lines)


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
    answers = result["sample"]
    return README.format(
        base=DEMO_BASE,
        task=task,
        result=result,
        recipe=describe_recipe(task.recipe),
        prompt_forms=prompt_forms(task),
        command=curl_command(task),
        base_answer=quote_answer(answers["base"]),
        adapter_answer=quote_answer(answers["adapter"]),
        table=results_table(task, result),
    )


def quote_answer(text: str) -> str:
    """The answer as one line of code; two blanks break the line in Markdown."""
    return f"`{json.dumps(text, ensure_ascii=False)}`  "
