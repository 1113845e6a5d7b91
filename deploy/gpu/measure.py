"""What the checks of the GPU path measure with: the device or a pretence of it, times, errors, and a
report that is on disk as it grows.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported

import torch  # noqa: E402

DEVICE = torch.device("cpu" if DRY else "cuda")
DTYPE = torch.float32 if DRY else torch.bfloat16  # the interpreter errs in bfloat16 without a word
CACHES = 128 << 20  # bytes: more than any device's caches hold


class Report:
    """Lines and figures; each is printed and written at once: the machine may be taken back."""

    def __init__(self, out: Path, seconds: float) -> None:
        self.out, self.began = out, time.monotonic()
        self.ends = self.began + seconds
        self.rows: list[dict[str, Any]] = []
        self.faults: list[str] = []
        out.mkdir(parents=True, exist_ok=True)

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:5.1f} s] {text}", flush=True)

    def add(self, part: str, what: str, **figures: Any) -> None:
        self.rows.append({"part": part, "what": what, **figures})
        self.line(f"{part}: {what}: {describe(figures)}")
        self._save()

    def fault(self, text: str) -> None:
        self.faults.append(text)
        self.line(f"FAULT {text}")
        self._save()

    def expect(self, is_right: bool, text: str) -> None:
        if not is_right:
            self.fault(text)

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What fails is a fault, and the rest goes on; time that is over ends the whole part."""
        try:
            yield
        except TimeoutError:
            raise
        except Exception as error:
            self.fault(f"{what}: {type(error).__name__}: {' '.join(str(error).split())[:300]}")

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """What fails, or takes longer, is a fault, and the rest goes on. A CPU that pretends gets time."""
        seconds = max(1.0, min(self.ends - time.monotonic(), seconds * (20 if DRY else 1)))
        self.line(f"-- {name}, at most {seconds:.0f} s")
        signal.signal(signal.SIGALRM, _ring)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            with self.trying(name):
                yield
        except TimeoutError:
            traceback.print_exc()
            self.fault(f"{name}: not done in {seconds:.0f} s")
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    def table(self) -> str:
        lines = ["| part | what | figures |", "|---|---|---|"]
        lines += [f"| {row['part']} | {row['what']} | {describe(_figures(row))} |" for row in self.rows]
        return "\n".join([*lines, "", *(f"FAULT {fault}" for fault in self.faults or ["none"])])

    def _save(self) -> None:
        content = json.dumps({"rows": self.rows, "faults": self.faults}, indent=1)
        (self.out / "check.json").write_text(content)


def _ring(number: int, frame: Any) -> None:
    raise TimeoutError("out of its time")


def _figures(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("part", "what")}


def describe(figures: dict[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )


Call = Callable[[], Any]


def took(calls: Sequence[Call]) -> float:
    """Median microseconds of one call when all run one behind the other from a recorded graph, as
    steps do. Calls on different memory, more than the caches hold together, find it cold.
    """
    for call in calls[:1] if DRY else calls:
        call()
    if DRY:
        return float("nan")
    from triton.testing import do_bench

    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    milliseconds: float = do_bench(graph.replay, warmup=5, rep=30, return_mode="median")
    return 1000 * milliseconds / len(calls)


def ring(size: int) -> int:
    """How many copies of so many bytes no cache holds: 2 to 16."""
    return 1 if DRY else max(2, min(16, -(-CACHES // size)))


def measure_bandwidth() -> float:
    """Bytes a microsecond of a copy, read and written; not from a graph, where the copy engine is slow."""
    if DRY:
        return float("nan")
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    milliseconds: float = do_bench(lambda: target.copy_(source), return_mode="median")
    return 2 * source.nbytes / milliseconds / 1000


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference, relative."""
    return float((got.float() - want.float()).norm() / want.float().norm())


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)
