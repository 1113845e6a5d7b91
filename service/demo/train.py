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
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


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
    end = tokenizer(answer, add_special_tokens=False).input_ids
    return [*start, *end, tokenizer.eos_token_id], len(start)


def iterate_batches(tokenizer: Any, task: Task) -> Iterator[Batch]:
    """Ids, attention mask, both [batch, length], and a mask [batch, length - 1] of the positions
    that predict an answer's token.
    """
    size = task.recipe.batch
    items = task.items("train", task.recipe.steps * size)
    for start in range(0, len(items), size):
        yield pad_examples([encode_example(tokenizer, item) for item in items[start : start + size]])


def pad_examples(examples: Sequence[tuple[list[int], int]]) -> Batch:
    """Examples and the lengths of their prompts as one batch, padded at the end."""
    positions = torch.arange(max(len(ids) for ids, _ in examples))
    batch = torch.zeros(len(examples), len(positions), dtype=torch.long)
    for row, (ids, _) in enumerate(examples):
        batch[row, : len(ids)] = torch.tensor(ids)
    ends = torch.tensor([[len(ids)] for ids, _ in examples])
    starts = torch.tensor([[prompt] for _, prompt in examples])
    attended = positions < ends
    return batch, attended.long(), (attended & (positions >= starts))[:, 1:]


def learning_rate(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    if step < WARM_UP:
        return recipe.rate * (step + 1) / WARM_UP
    return recipe.rate * (1 + math.cos(math.pi * (step - WARM_UP) / (recipe.steps - WARM_UP))) / 2


def loss_of(model: Any, ids: torch.Tensor, attention: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
    """The mean loss over the answers' tokens; the head runs on their positions only."""
    causal = model.get_base_model()
    output = causal.model(input_ids=ids, attention_mask=attention, use_cache=False)
    hidden = output.last_hidden_state[:, :-1][answers]
    logits = causal.lm_head(hidden).float()
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:][answers])


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
        loss = train_step(model, optimizer, weights, batch)
        if step % 20 == 0 or step == task.recipe.steps - 1:
            seconds = time.perf_counter() - began
            print(f"{task.name} step {step} loss {loss:.3f} seconds {seconds:.0f}", flush=True)
    save_adapter(model, ADAPTERS / task.name)
    return time.perf_counter() - began


def train_step(model: Any, optimizer: torch.optim.Optimizer, weights: list[Any], batch: Batch) -> float:
    """One step of the optimizer; returns the loss before it."""
    loss = loss_of(model, *batch)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(weights, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


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
    save_config(model.peft_config["default"], folder)


def save_config(config: Any, folder: Path) -> None:
    """Keys and target modules in order, so that the same training writes the same bytes."""
    config.base_model_name_or_path, config.inference_mode = DEMO_BASE, True
    config.save_pretrained(folder)
    path = folder / "adapter_config.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    kept["target_modules"] = sorted(kept["target_modules"])
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@torch.inference_mode()
def greedy_answers(model: Any, tokenizer: Any, items: Sequence[Item], limit: int) -> list[str]:
    """The greedy answer to each item, without special tokens and outer blanks."""
    answers: list[str] = []
    options = {"max_new_tokens": limit, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    for start in range(0, len(items), TOGETHER):
        prompts = [prompt_ids(tokenizer, item) for item in items[start : start + TOGETHER]]
        batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        generated = model.generate(**batch, **options)[:, batch["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(generated, skip_special_tokens=True)
        answers += [text.strip() for text in texts]
    return answers


def score_answers(task: Task, items: Sequence[Item], answers: Sequence[str]) -> Scores:
    """The mean of each measure."""
    scores = [task.score(answer, item.answer) for answer, item in zip(answers, items, strict=True)]
    sums = {measure: sum(score[measure] for score in scores) for measure in task.measures}
    return {measure: round(total / len(scores), 3) for measure, total in sums.items()}


def evaluate_task(base: str, task: Task) -> dict[str, Any]:
    """Scores of the base on the held-out prompts, of the base told in words, and of the saved adapter;
    an answer of base and adapter to the sample.
    """
    model, tokenizer = load_model(base)
    items = task.items("test", task.tests)
    instructed = [
        Item(f"{task.instruction}\n\n{bare_prompt(item)}", item.answer, chat=True) for item in items
    ]

    def measure(model: Any, items: Sequence[Item]) -> Scores:
        return score_answers(task, items, greedy_answers(model, tokenizer, items, task.limit))

    def answer_sample(model: Any) -> str:
        return greedy_answers(model, tokenizer, [Item(task.sample, "")], task.limit)[0]

    result: dict[str, Any] = {"items": len(items), "base": measure(model, items)}
    result["base_instructed"] = measure(model, instructed)
    sample = answer_sample(model)
    tuned = PeftModel.from_pretrained(model, str(ADAPTERS / task.name), autocast_adapter_dtype=False).eval()
    result["adapter"] = measure(tuned, items)
    return result | {"sample": {"base": sample, "adapter": answer_sample(tuned)}}


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
    options = parser.parse_args(arguments)
    base = str(resolve_folder(options.base))
    tasks = [TASKS[options.only]] if options.only else TASKS.values()
    for task in tasks:
        if not options.evaluate:
            card.keep_result(HERE, task.name, {"seconds": round(train_task(base, task))})
        card.keep_result(HERE, task.name, evaluate_task(base, task))
        card.write_readme(HERE, task)
        print(json.dumps({task.name: card.read_results(HERE)[task.name]}, indent=2), flush=True)


if __name__ == "__main__":
    main()
