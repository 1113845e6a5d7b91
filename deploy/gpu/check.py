"""Checks the GPU path on a real device and times it: each kernel against its oracle, then whole
decode steps. Prints one table.

    python -m deploy.gpu.check --out FOLDER [--dry] [--only kernels]

Every part has its time and may fail alone. `--dry` shows on a CPU that the check itself runs: tiny
shapes, in Triton's interpreter. Needs torch, Triton, transformers and what `deploy.bench.steps` needs.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .measure import DEVICE, DRY, Report, measure_bandwidth  # first: it tells Triton how to run

import torch  # isort: skip
import triton  # isort: skip

from . import adapters, paging, products

ROOT = Path(__file__).parents[2]
COMPILERS = 8  # processes
STEPS_SECONDS = 1200 if DRY else 170


def compile_part(part: int) -> None:
    """One process's share of the binaries, into the cache that all processes read."""
    for module in (products, paging, adapters):
        module.compile_all(part, COMPILERS)


def start_compilers() -> list[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "deploy.gpu.check", "--compile"]
    return [subprocess.Popen([*command, str(part)], cwd=ROOT) for part in range(COMPILERS)]


def await_compilers(report: Report, running: Sequence[subprocess.Popen[bytes]]) -> None:
    try:
        for process in running:
            report.expect(process.wait() == 0, f"a compiler ended with {process.returncode}")
    finally:
        for process in running:
            process.kill()
    report.line("compiled")


def check_kernels(report: Report) -> None:
    with report.part("compiling", 60):
        await_compilers(report, [] if DRY else start_compilers())
    for name, check in (
        ("NF4 is right", products.check_products),
        ("bitsandbytes' bytes", products.check_library_bytes),
        ("LoRA is right", adapters.check_adapters),
        ("attention is right", paging.check_attention),
    ):
        with report.part(name, 20):
            check(report)


def time_kernels(report: Report) -> None:
    bandwidth = float("nan")
    with report.part("bandwidth", 10):
        bandwidth = measure_bandwidth()
        report.add("device", "bandwidth of a copy", TB_per_s=bandwidth / 1e6)
    with report.part("times of NF4", 45):
        products.time_products(report, bandwidth)
    with report.part("times of attention", 20):
        paging.time_attention(report, bandwidth)
    with report.part("times of prefill", 10):
        paging.time_prefill(report)
    with report.part("times of LoRA", 20):
        adapters.time_adapters(report, bandwidth)


def run_steps(report: Report) -> None:
    """Whole decode steps of the service's own runner, in a process of their own."""
    figures = report.out / "steps.json"
    command = [sys.executable, "-m", "deploy.bench.steps", "--out", str(figures)]
    if DRY:
        command += ["--shape", "tiny", "--adapters", "2", "--rows", "2", "--prompt", "4", "--steps", "4"]
        command += ["--graphs", "off", "--no-peft"]
    else:
        command += ["--graphs", "on", "--no-peft", "--steps", "32", "--work", "/dev/shm/steps"]
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        report.expect(process.wait(timeout=STEPS_SECONDS) == 0, f"the steps ended with {process.returncode}")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for step in json.loads(figures.read_text())["steps"]:
        report.add("steps", f"{step['rows']} rows, {step['mix']}", median_ms=step["median_ms"])


def describe_machine(report: Report) -> None:
    name = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "cpu"
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    report.add("device", name, **versions)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="a folder for the figures")
    parser.add_argument("--dry", action="store_true", help="tiny shapes on a CPU, in the interpreter")
    parser.add_argument("--seconds", type=float, default=350, help="for all of it")
    parser.add_argument("--only", choices=["kernels", "steps"])
    parser.add_argument("--compile", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    asked: Any = parse(arguments)
    if asked.compile is not None:
        compile_part(asked.compile)
        return 0
    report = Report(asked.out.absolute(), asked.seconds * (20 if DRY else 1))
    with report.part("the machine", 10):
        describe_machine(report)
    if asked.only != "steps":
        check_kernels(report)
        time_kernels(report)
    if asked.only != "kernels":
        with report.part("steps", STEPS_SECONDS + 10):
            run_steps(report)
    print(report.table(), flush=True)
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
