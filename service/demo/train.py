"""Trains the demo adapters on the CPU, measures them beside the base, and writes the files.

`python -m service.demo.train [--base FOLDER] [--only NAME] [--evaluate]`. Must not know the server:
it uses plain transformers and PEFT.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..core.defaults import DEMO_BASE
from ..model.loading import resolve_folder
from . import card, dates, labels, orders, pirate
from .task import Item, Recipe, Scores, Task

HERE = Path(__file__).parent
ADAPTERS = HERE / "adapters"
TASKS = {task.name: task for task in (dates.TASK, labels.TASK, orders.TASK, pirate.TASK)}
WARM_UP = 8
SEED = 7
TOGETHER = 52


def load_model(base: str) -> tuple[Any, Any]:
    """The base in bfloat16 and its tokenizer, from a local folder."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(base, local_files_only=True)


def prompt_ids(tokenizer: Any, item: Item) -> list[int]:
    """Rendered first and then tokenized without special tokens, so that none is doubled."""
    text = item.prompt
    if item.chat:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False).input_ids
    return ids


def encode_example(tokenizer: Any, item: Item) -> tuple[list[int], int]:
    """The ids of prompt, answer and eos, and how many of them are the prompt's."""
    start = prompt_ids(tokenizer, item)
    answer = item.answer if item.chat else f" {item.answer}"
    return [*start, *tokenizer(answer, add_special_tokens=False).input_ids, tokenizer.eos_token_id], len(
        start
    )


def iterate_batches(tokenizer: Any, task: Task) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Ids, attention mask, both [batch, length], and a mask [batch, length - 1] of the positions
    that predict an answer's token.
    """
    size = task.recipe.batch
    items = task.items("train", task.recipe.steps * size)
    for start in range(0, len(items), size):
        rows = [encode_example(tokenizer, item) for item in items[start : start + size]]
        places = torch.arange(max(len(ids) for ids, _ in rows))
        ids = torch.zeros(size, len(places), dtype=torch.long)
        for row, (found, _) in enumerate(rows):
            ids[row, : len(found)] = torch.tensor(found)
        ends = torch.tensor([[len(found)] for found, _ in rows])
        starts = torch.tensor([[begin] for _, begin in rows])
        yield ids, (places < ends).long(), ((places >= starts) & (places < ends))[:, 1:]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARM_UP:
        return recipe.rate * (step + 1) / WARM_UP
    return recipe.rate * (1 + math.cos(math.pi * (step - WARM_UP) / (recipe.steps - WARM_UP))) / 2


def loss_of(model: Any, ids: torch.Tensor, attention: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The mean loss over the answers' tokens; the head runs on their positions only."""
    causal = model.get_base_model()
    hidden = causal.model(input_ids=ids, attention_mask=attention, use_cache=False).last_hidden_state[:, :-1][
        answers
    ]
    return torch.nn.functional.cross_entropy(causal.lm_head(hidden).float(), ids[:, 1:][answers])


def train_task(base: str, task: Task) -> float:
    """Trains and saves the task's adapter; returns the seconds it took."""
    torch.manual_seed(SEED)
    model, tokenizer = load_model(base)
    model = get_peft_model(model, config_of(task.recipe)).train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, weight_decay=0.0)
    began = time.perf_counter()
    for step, batch in enumerate(iterate_batches(tokenizer, task)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, task.recipe)
        loss = loss_of(model, *batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0 or step == task.recipe.steps - 1:
            print(
                f"{task.name} step {step} loss {loss.item():.3f} seconds {time.perf_counter() - began:.0f}",
                flush=True,
            )
    save_adapter(model, ADAPTERS / task.name)
    return time.perf_counter() - began


def config_of(recipe: Recipe) -> LoraConfig:
    return LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        target_modules=list(recipe.targets),
        use_rslora=recipe.rslora,
        use_dora=recipe.dora,
        task_type="CAUSAL_LM",
    )


def save_adapter(model: Any, folder: Path) -> None:
    """Weights in bfloat16 (PEFT trains them in float32); the config names the public base, whatever
    folder it was read from.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    weights = {key: tensor.detach().to(torch.bfloat16).contiguous() for key, tensor in sorted(state.items())}
    save_file(weights, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    # Safetensors writes for the owner only; a server may run as somebody else
    (folder / "adapter_model.safetensors").chmod(0o644)
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = DEMO_BASE, True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    kept = json.loads(path.read_text())
    kept["target_modules"] = sorted(kept["target_modules"])
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n")


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, items: Sequence[Item], limit: int) -> list[str]:
    """The greedy answer to each item, without special tokens and outer blanks."""
    found: list[str] = []
    for start in range(0, len(items), TOGETHER):
        rows = [prompt_ids(tokenizer, item) for item in items[start : start + TOGETHER]]
        batch = tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        made = model.generate(
            **batch, max_new_tokens=limit, do_sample=False, pad_token_id=tokenizer.pad_token_id
        )
        new = made[:, batch["input_ids"].shape[1] :]
        found += [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
    return found


def score_answers(task: Task, items: Sequence[Item], found: Sequence[str]) -> Scores:
    each = [task.score(answer, item.answer) for answer, item in zip(found, items, strict=True)]
    return {measure: round(sum(one[measure] for one in each) / len(each), 3) for measure in task.measures}


def evaluate_task(base: str, task: Task) -> dict[str, Any]:
    """Scores of the saved adapter, of the base on the same prompts, and of the base told in words;
    an answer of each to the sample.
    """
    model, tokenizer = load_model(base)
    items = task.items("test", task.tests)
    told = [Item(f"{task.instruction}\n\n{bare_prompt(item)}", item.answer, chat=True) for item in items]
    sample = [Item(task.sample, "")]
    before = greedy_answers(model, tokenizer, items, task.limit)
    instructed = greedy_answers(model, tokenizer, told, task.limit)
    plain = greedy_answers(model, tokenizer, sample, task.limit)[0]
    tuned = PeftModel.from_pretrained(model, str(ADAPTERS / task.name), autocast_adapter_dtype=False).eval()
    after = greedy_answers(tuned, tokenizer, items, task.limit)
    return {
        "items": len(items),
        "base": score_answers(task, items, before),
        "base_instructed": score_answers(task, items, instructed),
        "adapter": score_answers(task, items, after),
        "sample": {"base": plain, "adapter": greedy_answers(tuned, tokenizer, sample, task.limit)[0]},
    }


def bare_prompt(item: Item) -> str:
    """The prompt without the word that it leads up to, which would only confuse a base that is told
    in words.
    """
    return item.prompt if item.chat else item.prompt.rpartition("\n")[0]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m service.demo.train", description="Train and measure the demo adapters."
    )
    parser.add_argument("--base", default="demo", help="the base, as ADAPTERD_BASE names it")
    parser.add_argument("--only", choices=TASKS, help="one adapter instead of all")
    parser.add_argument("--evaluate", action="store_true", help="measure what is saved, do not train")
    asked_for = parser.parse_args(arguments)
    base = str(resolve_folder(asked_for.base))
    for task in [TASKS[asked_for.only]] if asked_for.only else TASKS.values():
        if not asked_for.evaluate:
            card.keep_result(HERE, task.name, {"seconds": round(train_task(base, task))})
        card.keep_result(HERE, task.name, evaluate_task(base, task))
        card.write_readme(HERE, task)
        print(json.dumps({task.name: card.read_results(HERE)[task.name]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
