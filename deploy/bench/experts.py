"""Times decode steps of adapters on a mixture's experts, in the batch and by PEFT, on random weights.

    python -m deploy.bench.experts

Milliseconds of processor time on one thread, so that other work on the machine counts little. 201 MB of
experts: 4 layers of 32, 4 a token, float32; adapters of rank 16 on q and both parameters of the experts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import Adapter, ExecutionPath, Placement
from service.model.build import build_runner
from service.settings import Settings

from .decoding import CONTEXT, Decoding, Mix

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "vocab_size": 512,
}
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
ROWS, RANK, STEPS, ROUNDS = 4, 16, 6, 3


def make_folders(root: Path) -> tuple[Path, list[Path]]:
    """A random base, and ROWS random adapters of it."""
    base = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**SHAPE))
    base.save_pretrained(root / "base")
    options = {
        "r": RANK,
        "target_modules": ["q_proj"],
        "target_parameters": EXPERTS,
        "task_type": "CAUSAL_LM",
    }
    model = get_peft_model(base, LoraConfig(**options, init_lora_weights=False))
    folders = [root / f"a{row}" for row in range(ROWS)]
    for folder in folders:
        for name, weight in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(weight, 0, 0.05)
        model.save_pretrained(folder)
    return root / "base", folders


def measure_steps(decoding: Decoding) -> list[float]:
    """Milliseconds of each step."""
    times = []
    for _ in range(STEPS):
        began = time.process_time()
        decoding.step()
        times.append((time.process_time() - began) * 1000)
    decoding.end()
    return times


def measure_mixes(root: Path) -> dict[str, float]:
    """Who decodes → the median of its steps, all by turns."""
    base, folders = make_folders(root)
    settings = {"device": "cpu", "dtype": "float32", "quantization": "none", "threads": 1, "base": str(base)}
    kv = {"max_rows": ROWS, "max_context": CONTEXT, "kv_mb": 200}
    runner, card = build_runner(Settings.model_validate(settings | kv), lambda stage, fraction: None)
    together, apart = Skeleton(base, (), card.adapted_parameters), Skeleton(base)
    batched: list[Adapter] = [validate_adapter(together, folder, RANK).adapter for folder in folders]
    by_peft = [validate_adapter(apart, folder, RANK).adapter for folder in folders]
    by_peft = [replace(adapter, digest=f"{adapter.digest} by PEFT") for adapter in by_peft]
    for row, adapter in enumerate((*batched, *by_peft)):
        runner.load_adapter(adapter)
        if adapter.lane is ExecutionPath.POOL:
            runner.place_adapter(Placement(adapter.digest, row * RANK, RANK))
    mixes: dict[str, Mix] = {}
    for rows in (1, ROWS):
        mixes[f"base only, {rows}"] = dict.fromkeys(range(rows))
        mixes[f"in the batch, {rows}"] = dict(enumerate(batched[:rows]))
        mixes[f"by PEFT, {rows}"] = dict(enumerate(by_peft[:rows]))
    prompts = torch.randint(512, (ROWS, 16)).tolist()
    times: dict[str, list[float]] = {name: [] for name in mixes}
    for _ in range(ROUNDS):
        for name, mix in mixes.items():
            times[name] += measure_steps(Decoding(runner, prompts, mix))
    return {name: statistics.median(each) for name, each in times.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as root:
        for name, milliseconds in measure_mixes(Path(root)).items():
            print(f"{name}: {milliseconds:.1f} ms")


if __name__ == "__main__":
    main()
