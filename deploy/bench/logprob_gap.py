"""How far the log probabilities of a prompt's tokens are from PEFT's own forward on the same base, as a
trainer would compare them: over `/v1/completions`, for each precision of the base.

    python -m deploy.bench.logprob_gap [float32] [bfloat16] [nf4] [int8]

Knows the demo base and its adapters.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import torch
from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer

from service.model import loading
from service.settings import DEMO_ADAPTERS, Settings

from .grid import OUT
from .load import prompt
from .servers import Server, end_cleanly_when_told, models, started

PROMPTS, WORDS = 8, 100
WAYS = {
    "float32": {"dtype": "float32", "quantization": "none"},
    "bfloat16": {"dtype": "bfloat16", "quantization": "none"},
    "nf4": {"dtype": "bfloat16", "quantization": "nf4"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
}
Prompts = list[list[int]]
Scores = dict[str, list[float]]  # by model


def served_logprobs(server: Server, model: str, prompts: Prompts) -> list[float]:
    """Of all tokens of the prompts but the first of each."""
    found: list[float] = []
    for ids in prompts:
        body = {"model": model, "prompt": ids, "max_tokens": 1, "prompt_logprobs": 0}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=600, trust_env=False)
        told = answer.raise_for_status().json()["choices"][0]["prompt_logprobs"]
        found += [entry[str(id)]["logprob"] for id, entry in zip(ids[1:], told[1:], strict=True)]
    return found


@torch.inference_mode()
def compute_logprobs(model: Any, prompts: Prompts) -> list[float]:
    """The same by a forward of the model for each prompt."""
    found: list[float] = []
    for ids in prompts:
        asked = torch.tensor([ids])
        scores = model(input_ids=asked).logits[0, :-1].float().log_softmax(-1)
        found += scores.gather(-1, asked[0, 1:, None])[:, 0].tolist()
    return found


def measure_gaps(way: str) -> dict[str, dict[str, float]]:
    """Nats, over the base and all demo adapters; exact is PEFT's forward in float32 on the same weights."""
    settings = Settings.model_validate({"base": "demo", "device": "cpu", **WAYS[way]})
    folder = loading.resolve_folder("demo", loading.dtype_of(settings, torch.device("cpu")))
    words: Any = AutoTokenizer.from_pretrained(folder)
    prompts = [words(prompt(WORDS, f"gap {i}"))["input_ids"] for i in range(PROMPTS)]
    with started({"base": "demo", **WAYS[way]}, OUT / f"gap-{way}.log") as server:
        base, adapters = models(server)
        ours = {name: served_logprobs(server, name, prompts) for name in (base, *adapters)}
    theirs = dict(_iterate_references(folder, settings, base, prompts))
    exact_settings = settings.model_copy(update={"dtype": "float32"})
    exact = dict(_iterate_references(folder, exact_settings, base, prompts))
    pairs = {"ours, PEFT's": (ours, theirs), "ours, exact": (ours, exact), "PEFT's, exact": (theirs, exact)}
    return {name: _describe_gaps(*pair) for name, pair in pairs.items()}


def _describe_gaps(some: Scores, others: Scores) -> dict[str, float]:
    common = some.keys() & others.keys()
    gaps = sorted(abs(a - b) for name in common for a, b in zip(some[name], others[name], strict=True))
    places = {"median": len(gaps) // 2, "p99": len(gaps) * 99 // 100, "worst": -1}
    return {"tokens": len(gaps), **{name: round(gaps[place], 5) for name, place in places.items()}}


def _iterate_references(
    folder: Path, settings: Settings, base: str, prompts: Prompts
) -> Iterator[tuple[str, list[float]]]:
    """The base's and each demo adapter's, by transformers and PEFT, on a base of its own: an 8-bit one that
    has run cannot be wrapped. On a quantized base without DoRA's, whose weights PEFT misreads on a CPU.
    """
    yield base, compute_logprobs(loading.load_base(folder, settings, loading.no_progress), prompts)
    for adapter in sorted(DEMO_ADAPTERS.iterdir()):
        if settings.quantization != "none" and PeftConfig.from_pretrained(str(adapter)).use_dora:
            continue
        model: Any = loading.load_base(folder, settings, loading.no_progress)
        yield adapter.name, compute_logprobs(PeftModel.from_pretrained(model, str(adapter)).eval(), prompts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ways", nargs="*", help="of float32, bfloat16, nf4, int8; all, where none is named")
    asked = parser.parse_args()
    end_cleanly_when_told()
    for way in asked.ways or WAYS:
        print(json.dumps({way: measure_gaps(way)}), flush=True)


if __name__ == "__main__":
    main()
