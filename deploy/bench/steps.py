"""Times single decode steps in this process on random weights of any shape, beside PEFT's mixed
batch and the memory's floor.

    python -m deploy.bench.steps [--shape llama-3.1-8b] [--quantization nf4] [--work
    build/bench/steps] [--out build/bench/steps.json]

Base only, all rows one adapter, and all different, with CUDA graphs and without; on a CPU, with the
kernels and without. On a GPU also by the worker's loop: each step launched before the last one is
read, and not. Needs torch, transformers, accelerate, PEFT, bitsandbytes, pydantic and
llguidance alone, so that it runs where there is a GPU and little else.
"""

from __future__ import annotations

import argparse
import gc
import logging
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from service.core.adapter import Adapter, Placement
from service.core.base_info import BaseInfo
from service.core.request import Token
from service.model import loading
from service.model.build import build_runner
from service.model.runner import ModelRunner
from service.settings import Settings

from .decoding import CONTEXT, Decoding, Mix, Said, apart
from .figures import AHEAD, BASE, DIFFERENT, FLOOR, FLOOR_MIXED, LOOP, ONE, Found, Timed
from .looping import Looping
from .random_base import RANK, SHAPES, config_of, made, trained

ROUNDS, WARM = 4, 4  # the mixes take turns, a quarter of their steps at a time
WATCHED, TOP = 16, 100  # decode steps whose words are compared, and the log probabilities of each
PLACINGS = 10
PEFT_STEPS = 16  # one takes longer than many of ours
SWITCHES = {"both": ("auto", "off"), "on": ("auto",), "off": ("off",)}


@dataclass(frozen=True)
class Work:
    """What every runner of this run gets."""

    folder: Path
    settings: Settings
    adapters: list[Adapter]
    prompts: list[list[int]]
    steps: int
    profile: bool

    def different(self, rows: int) -> dict[int, Adapter | None]:
        return {row: self.adapters[row % len(self.adapters)] for row in range(rows)}


class Bench:
    """One runner with all adapters resident, adapter i in pool rows [16 i, 16 i + 16)."""

    def __init__(self, work: Work, switch: str, found: Found) -> None:
        self.work, self.found, self.switch = work, found, switch
        self.settings = work.settings.model_copy(update={"compile": switch})
        built: tuple[ModelRunner, BaseInfo] = build_runner(
            self.settings, lambda stage, fraction: found.line(stage)
        )
        self.runner, self.card = built
        self.on = loading.device_of(self.settings)
        for i, adapter in enumerate(work.adapters):
            self.runner.load_adapter(adapter)
            self.place(i)

    def place(self, i: int) -> None:
        self.runner.place_adapter(Placement(self.work.adapters[i].digest, i * RANK, RANK))

    def decoding(self, mix: Mix, logprobs: int | None = None) -> Decoding:
        return Decoding(self.runner, self.work.prompts, mix, logprobs)

    def variants(self, rows: int) -> None:
        """The three mixes by turns, every turn after the same prompts, which are read once."""
        mixes: dict[str, Mix] = {
            BASE: dict.fromkeys(range(rows)),
            ONE: dict.fromkeys(range(rows), self.work.adapters[0]),
            DIFFERENT: self.work.different(rows),
        }
        seconds: dict[str, list[float]] = {name: [] for name in mixes}
        read = self.decoding(mixes[BASE])
        for _ in range(ROUNDS):
            for name, mix in mixes.items():
                decoding = Decoding(self.runner, self.work.prompts, mix, after=read)
                seconds[name] += [decoding.step() for _ in range(WARM + -(-self.work.steps // ROUNDS))][WARM:]
                decoding.end()
        for name, each in seconds.items():
            self.found.add(Timed.of(self.switch, rows, name, each))

    def looped(self, rows: int) -> None:
        """Base only and all different by the worker's loop, each step read before the next is launched,
        and launched ahead; on a CPU there is nothing to compare.
        """
        for ahead in (False, True) if self.runner.runs_ahead else ():
            for name, mix in ((BASE, dict.fromkeys(range(rows))), (DIFFERENT, self.work.different(rows))):
                self.take_out()
                self.runner.runs_ahead = ahead
                loop = Looping(self.runner, self.card, self.settings)
                seconds = loop.time_turns(self.work.prompts, mix, WARM + self.work.steps)
                kind = f"{name}{AHEAD if ahead else LOOP}"
                self.found.add(Timed.of(self.switch, rows, kind, seconds[WARM:]))
        self.take_out()
        for i in range(len(self.work.adapters)):
            self.place(i)

    def take_out(self) -> None:
        for adapter in self.work.adapters:
            self.runner.remove_adapter(adapter.digest)

    def truth(self, rows: int) -> None:
        """The first row and the last, among all different ones and alone.

        Where ties part them, the numbers say by how little.
        """
        mix = self.work.different(rows)
        together = self.watched(mix)
        for row in sorted({0, rows - 1}):
            said = [token.id for token in together[row]]
            alone = self.watched({row: mix[row]})[row]
            equal = next(
                (i for i, (token, id) in enumerate(zip(alone, said, strict=True)) if token.id != id),
                len(said),
            )
            named = f"compile {self.switch}, row {row} of {rows}"
            self.found.tell(f"{named}: tokens as alone, before the first that is not, of {len(said)}", equal)
            for other, who in (("alone", mix[row]), ("without its adapter", None)):
                fed = self.watched({row: who}, said)[row]
                most = max(map(apart, together[row], fed))
                self.found.tell(f"{named}: log probabilities differ from those {other} by at most", most)

    def watched(self, mix: Mix, fed: Sequence[int] | None = None) -> dict[int, list[Token]]:
        """Each row's tokens with log probabilities;

        `fed`: what its one row goes on from instead of its own.
        """
        decoding = self.decoding(mix, self.top)
        for step in range(WATCHED):
            decoding.step(dict.fromkeys(mix, fed[step]) if fed else None)
        decoding.end()
        return decoding.tokens

    @property
    def top(self) -> int:
        return min(TOP, self.card.vocab_size)

    def first_tokens(self, rows: int) -> Said:
        """What the first row and the last say after their prompts, to be held against PEFT's."""
        ends = sorted({0, rows - 1})
        different = self.work.different(rows)
        mixes: dict[str, Mix] = {BASE: dict.fromkeys(ends), DIFFERENT: {row: different[row] for row in ends}}
        said = {name: self.decoding(mix, self.top).tokens for name, mix in mixes.items()}
        return {name: {row: tokens[0] for row, tokens in each.items()} for name, each in said.items()}

    def placing(self) -> None:
        """An adapter from host memory to the device, until it is there, beside one copy of as many
        bytes.
        """
        digest = self.work.adapters[0].digest
        host = torch.empty(
            self.bytes_of(self.work.adapters[0]), dtype=torch.uint8, pin_memory=self.on.type == "cuda"
        )
        there = torch.empty_like(host, device=self.on)
        placed, copied = [], []
        for _ in range(PLACINGS):
            self.runner.remove_adapter(digest)
            placed.append(clocked(lambda: self.place(0)))
            copied.append(clocked(lambda: there.copy_(host, non_blocking=True)))
        for what, seconds in (
            (f"placing an adapter of {host.nbytes / 1e6:.1f} MB", placed),
            ("one copy of its bytes", copied),
        ):
            self.found.tell(f"compile {self.switch}: {what}: ms", 1000 * statistics.median(seconds))

    def bytes_of(self, adapter: Adapter) -> int:
        """Of its factors; what the host holds for a GPU is rounded up to a power of two."""
        return sum(
            tensor.nbytes
            for part in self.runner.hosted[adapter.digest].factors.values()
            for tensor in part
            if tensor is not None
        )

    def floor(self) -> None:
        """What a step cannot be faster than: each byte that it must read, once.

        KV, which it reads too, is not counted.

        Of the base all that it keeps but its embeddings, of which a step reads a row a token,
        unless they are its head too.
        """
        if FLOOR in self.found.facts:
            return
        model = self.runner.model
        inputs, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        needed = sum(self.card.resident_bytes.values()) - (0 if inputs is outputs else inputs.nbytes)
        more = sum(map(self.bytes_of, self.work.adapters))
        speed = bandwidth(self.on, self.found)
        self.found.tell(
            "bytes that a step reads of the base (all but the embeddings, unless they are the head): GB",
            needed / 1e9,
        )
        self.found.tell(f"bytes of the {len(self.work.adapters)} adapters: GB", more / 1e9)
        self.found.tell(FLOOR, 1000 * needed / speed)
        self.found.tell(FLOOR_MIXED, 1000 * (needed + more) / speed)

    def profiled(self, rows: int) -> None:
        """The kernels of one decode step, base only and all different."""
        activities = {torch.profiler.ProfilerActivity.CPU}
        activities |= {torch.profiler.ProfilerActivity.CUDA} if self.on.type == "cuda" else set()
        order = "self_cuda_time_total" if self.on.type == "cuda" else "self_cpu_time_total"
        for name, mix in ((BASE, dict.fromkeys(range(rows))), (DIFFERENT, self.work.different(rows))):
            decoding = self.decoding(mix)
            for _ in range(WARM):
                decoding.step()
            with torch.profiler.profile(activities=activities) as seen:
                decoding.step()
                settle()
            decoding.end()
            print(
                f"compile {self.switch}, {rows} rows, {name}",
                seen.key_averages().table(sort_by=order, row_limit=30),
                sep="\n",
                flush=True,
            )


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


def free(found: Found) -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        found.line(f"{torch.cuda.memory_allocated() / 1e9:.2f} GB of the device are held")


def bandwidth(device: torch.device, found: Found) -> float:
    """Bytes a second, of a sum or of a copy (read and written) over more than the caches hold, the
    faster; each the best of eight.
    """
    block = torch.ones(
        (4 << 30) if device.type == "cuda" else (256 << 20), dtype=torch.uint8, device=device
    ).view(torch.float32)
    target = torch.empty_like(block)
    read = block.nbytes / min(clocked(block.sum) for _ in range(8))
    copied = 2 * block.nbytes / min(clocked(lambda: target.copy_(block)) for _ in range(8))
    found.tell("bandwidth of a sum: GB/s", read / 1e9)
    found.tell("bandwidth of a copy, read and written: GB/s", copied / 1e9)
    return max(read, copied)


def ours(work: Work, switch: str, rows: int, found: Found) -> Said:
    """All that one runner is asked; its first tokens."""
    bench = Bench(work, switch, found)
    found.tell(
        "the base",
        f"{bench.card.architecture}, {bench.card.parameters / 1e9:.2f} billion parameters, "
        f"{bench.card.quantization}",
    )
    found.tell("its dtype", bench.card.dtype)
    found.tell("its bytes, by dtype", bench.card.resident_bytes)
    found.tell(f"compile {switch}: CUDA graphs", bench.runner.graphs is not None)
    asked: dict[str, Callable[[], None]] = {
        f"{each} rows": partial(bench.variants, each) for each in sorted({rows, 1}, reverse=True)
    }
    asked |= {"the worker's loop": partial(bench.looped, rows)}
    asked |= {"the floor": bench.floor, "placing": bench.placing, "the truth": partial(bench.truth, rows)}
    asked |= {"the profile": partial(bench.profiled, rows)} if work.profile else {}
    for what, run in asked.items():
        with found.trying(f"compile {switch}: {what}"):
            run()
    return bench.first_tokens(rows)


def prepared(asked: argparse.Namespace, found: Found) -> Work:
    """The base, the adapters and the prompts, made where they are not there yet."""
    device = loading.device_of(Settings())
    found.tell("device", torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    found.tell(
        "versions", {name: version(name) for name in ("torch", "transformers", "peft", "bitsandbytes")}
    )
    found.tell("asked", {name: str(value) for name, value in vars(asked).items()})
    found.line("making the base")
    folder = asked.base or made(asked.shape, asked.work / asked.shape, device)
    free(found)
    found.line("making the adapters")
    adapters = trained(folder, asked.work / f"{folder.name}-adapters", asked.adapters)
    config = config_of(folder)
    torch.manual_seed(0)
    settings = Settings(
        base=str(folder),
        quantization=asked.quantization,
        max_rows=asked.rows,
        max_context=min(config.max_position_embeddings, CONTEXT),
        pool_rank=asked.adapters * RANK,
        max_rank=RANK,
    )
    prompts = torch.randint(config.vocab_size, (asked.rows, asked.prompt)).tolist()
    return Work(folder, settings, adapters, prompts, asked.steps, asked.profile)


def run(asked: argparse.Namespace, found: Found) -> None:
    work = prepared(asked, found)
    said: Said = {}
    for switch in SWITCHES[asked.graphs]:
        with found.trying(f"compile {switch}"):
            said = ours(work, switch, asked.rows, found)
        free(found)
    if asked.peft:
        with found.trying("PEFT"):
            from .by_peft import compared

            mix = [work.adapters[row % len(work.adapters)] for row in range(asked.rows)]
            compared(
                work.folder, work.settings, mix, work.prompts, min(asked.steps, PEFT_STEPS), said, found.tell
            )


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="of a base that is made")
    made.add_argument("--base", type=Path, help="a folder with a base, instead")
    made.add_argument("--adapters", type=int, default=32)
    made.add_argument("--rows", type=int, default=32)
    made.add_argument("--prompt", type=int, default=64, help="tokens")
    made.add_argument("--steps", type=int, default=64, help="timed, of each mix")
    made.add_argument("--quantization", choices=["auto", "nf4", "int8", "none"], default="auto")
    made.add_argument("--graphs", choices=SWITCHES, default="both", help="on a CPU: the kernels")
    made.add_argument("--peft", action=argparse.BooleanOptionalAction, default=True)
    made.add_argument("--profile", action="store_true", help="print the kernels of a step")
    made.add_argument(
        "--work",
        type=Path,
        default=Path("build/bench/steps"),
        help="keeps base (16 GB of 8B) and adapters for the next time",
    )
    made.add_argument(
        "--out", type=Path, default=Path("build/bench/steps.json"), help="written after every figure"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> Found:
    asked = parser().parse_args(arguments)
    if asked.prompt + max(WARM + asked.steps, WATCHED) + 2 > CONTEXT:
        parser().error(f"prompt and steps go over {CONTEXT} tokens")
    found = Found(asked.out)
    with found.trying("the run"):
        run(asked, found)
    print(found.table(), flush=True)
    return found


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    sys.exit(1 if main().raised else 0)
