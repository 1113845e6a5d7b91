"""Times decode steps in this process, without HTTP, on a random Llama: base only, one adapter, all different; beside PEFT and the floor.

    python -m deploy.bench.steps [--shape llama-3.1-8b] [--rows 32] [--quantization nf4] [--out build/bench/steps]

Needs torch, transformers, PEFT, bitsandbytes and llguidance alone, so that it runs on a machine that has a GPU and little else.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from service.adapters.reader import read
from service.adapters.skeleton import Skeleton
from service.engine.request import Adapter, BaseCard, Chunk, Placement, Plan, Request
from service.model import base
from service.model.runner import Runner, build
from service.settings import Settings

from . import adapters

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rope_theta": 500000.0,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
}
RANK, WARM, PLACINGS = 16, 5, 10
BARS = {"different over base only": "at most 1.10"}


@dataclass
class Found:
    """Milliseconds, ratios and whatever else was found, in the order of the report; `told` also prints it at once."""

    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def told(self, what: str, value: Any) -> None:
        self.facts[what] = value
        shown = f"{value:.3f}" if isinstance(value, float) else value
        bar = next((f"   (bar: {bar})" for name, bar in BARS.items() if what.startswith(name)), "")
        print(f"[{time.monotonic() - self.began:6.1f} s] {what}: {shown}{bar}", flush=True)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What raises is told, and the rest goes on: a machine with a GPU may not be there tomorrow."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.told(f"{what} raised", f"{type(error).__name__}: {str(error)[:300]}")


def made(shape: str, folder: Path, device: torch.device) -> Path:
    """A random base of this shape in bfloat16, made where it is quick, once."""
    if not folder.exists():
        with device:
            model = AutoModelForCausalLM.from_config(LlamaConfig(**SHAPES[shape]), dtype=torch.bfloat16)
        aside = folder.with_name(f"{folder.name}.making")
        model.save_pretrained(aside)
        aside.rename(folder)
    return folder


def trained(folder: Path, root: Path, count: int) -> list[Adapter]:
    """So many random adapters of this base on q, k, v and o, as the service reads them."""
    config = LlamaConfig.from_pretrained(folder)
    hidden, kv = config.hidden_size, config.head_dim * config.num_key_value_heads
    shapes = {"q_proj": (hidden, hidden), "k_proj": (hidden, kv), "v_proj": (hidden, kv), "o_proj": (hidden, hidden)}
    skeleton, found = Skeleton(folder), []
    for seed in range(count):
        if not (root / f"a{seed}" / "adapter_model.safetensors").exists():
            adapters.write(root / f"a{seed}", RANK, seed, shapes, config.num_hidden_layers)
        found.append(read(skeleton, root / f"a{seed}", RANK).adapter)
    return found


def median(times: Sequence[float]) -> float:
    return 1000 * statistics.median(times)


class Bench:
    """Steps of one runner; row i decodes after a random prompt of its own."""

    def __init__(self, runner: Runner, card: BaseCard, prompt: int) -> None:
        self.runner, self.card, self.prompt = runner, card, prompt
        torch.manual_seed(0)
        self.prompts = torch.randint(card.vocab_size, (card.rows, prompt)).tolist()

    def place(self, found: Sequence[Adapter]) -> None:
        for i, adapter in enumerate(found):
            self.runner.load(adapter)
            self.runner.step(Plan(place=(Placement(adapter.digest, i * RANK, RANK),)))

    def decoded(self, who: Sequence[Adapter | None], steps: int) -> tuple[list[float], list[list[int]]]:
        """Seconds of each decode step, and the tokens of each row; row i is of who[i]."""
        requests = [Request(i, tuple(self.prompts[i]), steps + 1, adapter.digest if adapter else None) for i, adapter in enumerate(who)]
        first = [self._first(request) for request in requests]
        tokens, times = [[token] for token in first], []
        for step in range(steps):
            at = self.prompt + step
            chunks = tuple(Chunk(r, r.id, at, (tokens[r.id][-1],), True, step + 1) for r in requests)
            began = time.perf_counter()
            results = self.runner.step(Plan(chunks=chunks))
            times.append(time.perf_counter() - began)
            for row, result in zip(tokens, results, strict=True):
                row.append(result.token.id if result.token else -1)
        return times, tokens

    def _first(self, request: Request) -> int:
        (result,) = self.runner.step(Plan(chunks=(Chunk(request, request.id, 0, request.prompt, True),)))
        return result.token.id if result.token else -1


def variants(bench: Bench, found: Sequence[Adapter], rows: int, steps: int, told: Found, how: str) -> None:
    """Base only, one adapter and all different by turns, twice; the medians of all."""
    mixes: dict[str, list[Adapter | None]] = {"base only": [None] * rows, "one": [found[0]] * rows, "different": [*found[:rows]]}
    times: dict[str, list[float]] = {name: [] for name in mixes}
    for _ in range(2):
        for name, who in mixes.items():
            times[name] += bench.decoded(who, steps + WARM)[0][WARM:]
    middles = {name: median(each) for name, each in times.items()}
    for name, middle in middles.items():
        told.told(f"{name}, {rows} rows, {how}: ms a step", middle)
        told.told(f"{name}, {rows} rows, {how}: tokens a second", 1000 * rows / middle)
    told.told(f"different over base only, {rows} rows, {how}", middles["different"] / middles["base only"])


def truth(bench: Bench, found: Sequence[Adapter], rows: int, told: Found) -> None:
    """Whether rows say beside all others what they say alone; on a quantized base, ties may part them."""
    _, together = bench.decoded([*found[:rows]], 16)
    alone = [bench.decoded([None] * row + [found[row]], 16)[1][row] for row in (0, rows - 1)]
    told.told("rows that say alone what they say together, of 2", sum(a == together[r] for a, r in zip(alone, (0, rows - 1), strict=True)))


def placing(bench: Bench, adapter: Adapter, told: Found) -> None:
    """From host memory to the device, until it is there, beside one copy of as many bytes."""
    place, digest = bench.runner.bank.places[adapter.digest], adapter.digest
    host = torch.empty(bench.runner.hosted[digest].size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    there = torch.empty_like(host, device=bench.runner.bank.device)
    times: dict[str, list[float]] = {"placing an adapter: ms": [], "copying its bytes: ms": []}
    for _ in range(PLACINGS):
        bench.runner.step(Plan(remove=(digest,)))
        for what, work in zip(times, (lambda: bench.runner.step(Plan(place=(place,))), lambda: there.copy_(host)), strict=True):
            times[what].append(clocked(work))
    for what, each in times.items():
        told.told(what, median(each))


def clocked(work: Callable[[], Any]) -> float:
    """Seconds until the device has done it."""
    settle()
    began = time.perf_counter()
    work()
    settle()
    return time.perf_counter() - began


def settle() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bandwidth(device: torch.device) -> float:
    """Bytes a second at which the device reads, the best of some sums over more than its caches hold."""
    block = torch.ones((4 << 30) if device.type == "cuda" else (256 << 20), dtype=torch.uint8, device=device).view(torch.float32)
    return block.nbytes / min(clocked(block.sum) for _ in range(8))


def floor(bench: Bench, found: Sequence[Adapter], told: Found) -> None:
    """The bytes that a step must read (all the base keeps but its embeddings, unless they are its head too), and how long that takes."""
    model = bench.runner.model
    inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    needed = sum(bench.card.resident_bytes.values()) - (0 if inputs.data_ptr() == outputs.data_ptr() else inputs.nbytes)
    speed = bandwidth(bench.runner.bank.device)
    more = sum(bench.runner.hosted[adapter.digest].size for adapter in found)
    told.told("read bandwidth: GB/s", speed / 1e9)
    told.told(f"floor, base only ({needed / 1e9:.2f} GB): ms", 1000 * needed / speed)
    told.told(f"floor with {len(found)} adapters ({more / 1e6:.0f} MB more): ms", 1000 * (needed + more) / speed)


def profiled(bench: Bench, who: Sequence[Adapter | None], what: str) -> None:
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA][: 1 + torch.cuda.is_available()]
    bench.decoded(who, WARM)
    with torch.profiler.profile(activities=kinds) as seen:
        bench.decoded(who, WARM)
    order = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(what, seen.key_averages().table(sort_by=order, row_limit=25), sep="\n", flush=True)


@torch.inference_mode()
def by_peft(folder: Path, settings: Settings, found: Sequence[Adapter], prompts: list[list[int]], steps: int, told: Found) -> None:
    """PEFT's own mixed batch on the same base: a decode step of as many rows, each of its own adapter, and of the base alone."""
    from peft import PeftModel

    plain: Any = base.load(folder, settings, lambda stage, fraction: None)
    ids = torch.tensor(prompts, device=plain.device)
    told.told(f"transformers, base only, {len(prompts)} rows: ms a step", median(steps_of(plain, ids, steps, {})))
    model = PeftModel.from_pretrained(plain, Path(found[0].config).parent, adapter_name="a0")
    for i, adapter in enumerate(found[1:], 1):
        model.load_adapter(Path(adapter.config).parent, adapter_name=f"a{i}")
    names = {"adapter_names": [f"a{i}" for i in range(len(prompts))]}
    told.told(f"PEFT's adapter_names, {len(prompts)} rows, all different: ms a step", median(steps_of(model.eval(), ids, steps, names)))


def steps_of(model: Any, ids: torch.Tensor, steps: int, more: dict[str, Any]) -> list[float]:
    out = model(input_ids=ids, use_cache=True, **more)
    times = []
    for _ in range(steps + WARM):
        began = time.perf_counter()
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()
        out = model(input_ids=tokens, past_key_values=out.past_key_values, use_cache=True, **more)
        settle()
        times.append(time.perf_counter() - began)
    return times[WARM:]


def ours(asked: argparse.Namespace, settings: Settings, found: Sequence[Adapter], told: Found) -> list[list[int]]:
    """All that our own runner is asked; the prompts that its rows had."""
    runner, card = build(settings, lambda stage, fraction: None)
    told.told("the base's bytes, by dtype", dict(card.resident_bytes))
    bench = Bench(runner, card, asked.prompt)
    bench.place(found)
    recorded = runner.graphs
    told.told("CUDA graphs", recorded is not None)
    for how, graphs in (("graphs", recorded), ("no graphs", None)) if recorded else (("no graphs", None),):
        runner.graphs = graphs
        for rows in sorted({1, asked.rows}):
            with told.trying(f"{rows} rows, {how}"):
                variants(bench, found, rows, asked.steps, told, how)
    runner.graphs = recorded
    rest: dict[str, Callable[[], None]] = {
        "the truth": lambda: truth(bench, found, asked.rows, told),
        "placing": lambda: placing(bench, found[0], told),
        "the floor": lambda: floor(bench, found, told),
    }
    for what, work in rest.items():
        with told.trying(what):
            work()
    if asked.profile:
        profiled(bench, [None] * asked.rows, "base only")
        profiled(bench, [*found[: asked.rows]], "all different")
    return bench.prompts


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    made.add_argument("--rows", type=int, default=32, help="and as many adapters")
    made.add_argument("--prompt", type=int, default=64)
    made.add_argument("--steps", type=int, default=64)
    made.add_argument("--quantization", choices=["auto", "nf4", "int8", "none"], default="auto")
    made.add_argument("--profile", action="store_true")
    made.add_argument("--no-peft", action="store_true")
    made.add_argument("--out", type=Path, default=Path("build/bench/steps"))
    return made


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    asked, told = parser().parse_args(arguments), Found()
    device = base.device_of(Settings())
    told.told("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    told.told("versions", {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")})
    folder = made(asked.shape, asked.out / asked.shape, device)
    found = trained(folder, asked.out / f"{asked.shape}-adapters", asked.rows)
    settings = Settings(
        base=str(folder),
        quantization=asked.quantization,
        max_rows=asked.rows,
        max_context=min(SHAPES[asked.shape]["max_position_embeddings"], 1024),
        pool_rank=asked.rows * RANK,
        max_rank=RANK,
    )
    prompts = ours(asked, settings, found, told)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if not asked.no_peft:
        with told.trying("PEFT"):
            by_peft(folder, settings, found, prompts, asked.steps, told)
    (asked.out / "results.json").write_text(json.dumps(told.facts, indent=1) + "\n")
    return told.facts


if __name__ == "__main__":
    main()
