"""What the benchmark of single steps found: kept on disk as it comes, and what it comes to.

Knows neither models nor devices.
"""

from __future__ import annotations

import json
import statistics
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

BASE, ONE, DIFFERENT = "base only", "one adapter", "all different"
LOOP, AHEAD = ", by the worker's loop", ", by the worker's loop, launched ahead"  # behind a mix
FLOOR, FLOOR_MIXED = "floor, base only: ms", "floor, all different: ms"
PLAIN, MIXED = "transformers, base only: ms a step", "PEFT's mixed batch, all different: ms a step"
BAR = "bar: at most 1.10"  # of many rows, all different, over base only


@dataclass(frozen=True)
class Timed:
    """Decode steps of one kind, in milliseconds; `compile` is what ADAPTERD_COMPILE was."""

    compile: str
    rows: int
    mix: str
    median_ms: float
    best_ms: float
    tokens_per_s: float

    @classmethod
    def of(cls, compile: str, rows: int, mix: str, seconds: Sequence[float]) -> Timed:
        middle = statistics.median(seconds)
        return cls(compile, rows, mix, 1000 * middle, 1000 * min(seconds), rows / middle)


class Found:
    """Each figure is printed and written to the file `out` at once: a machine with a GPU may be
    taken back at any time.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.began = out, time.monotonic()
        self.facts: dict[str, Any] = {}
        self.steps: list[Timed] = []
        self.raised: dict[str, str] = {}

    def line(self, text: str) -> None:
        print(f"[{time.monotonic() - self.began:6.1f} s] {text}", flush=True)

    def tell(self, what: str, value: Any) -> None:
        self.facts[what] = value
        self.line(f"{what}: {value:.4g}" if isinstance(value, float) else f"{what}: {value}")
        self.save()

    def add(self, timed: Timed) -> None:
        self.steps.append(timed)
        times = (
            f"{timed.median_ms:.3f} ms a step, best {timed.best_ms:.3f}, {timed.tokens_per_s:.1f} tokens/s"
        )
        self.line(f"compile {timed.compile}, {timed.rows} rows, {timed.mix}: {times}")
        self.save()

    @contextmanager
    def trying(self, what: str) -> Iterator[None]:
        """What raises is told, and the rest goes on."""
        self.line(f"-- {what}")
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.raised[what] = f"{type(error).__name__}: {str(error)[:500]}"
            self.line(f"{what} RAISED {self.raised[what]}")
            self.save()

    def save(self) -> None:
        kept = {
            "facts": self.facts,
            "steps": [asdict(timed) for timed in self.steps],
            "ratios": self.ratios(),
            "raised": self.raised,
        }
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.out.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    def ratios(self) -> dict[str, float]:
        """Medians over medians, as far as both were timed;

        PEFT and the floor of all different are of as many rows as there are.
        """
        ms = {(timed.compile, timed.rows, timed.mix): timed.median_ms for timed in self.steps}
        most = max((timed.rows for timed in self.steps), default=0)
        pairs: dict[str, tuple[float | None, float | None]] = {}
        for (how, rows, mix), own in ms.items():
            named = f"{mix}, {rows} rows, compile {how}"
            is_other = mix in (ONE, DIFFERENT)
            pairs[f"{named} ÷ base only"] = (own, ms.get((how, rows, BASE)) if is_other else None)
            pairs[f"{named} ÷ compile auto"] = (own, ms.get(("auto", rows, mix)) if how == "off" else None)
            floor = FLOOR if mix == BASE else FLOOR_MIXED if mix == DIFFERENT and rows == most else ""
            pairs[f"{named} ÷ its floor"] = (own, self.facts.get(floor))
            read = ms.get((how, rows, mix.replace(AHEAD, LOOP))) if mix.endswith(AHEAD) else None
            pairs[f"{named} ÷ read at once"] = (own, read)
            theirs = {BASE: PLAIN, DIFFERENT: MIXED}.get(mix, "") if rows == most else ""
            pairs[f"{theirs.partition(':')[0]} ÷ {named}"] = (self.facts.get(theirs), own)
        return {
            what: over / under
            for what, (over, under) in pairs.items()
            if over is not None and under is not None
        }

    def table(self) -> str:
        """Markdown: the steps, then the ratios, the bar beside those that have one."""
        ratios = self.ratios()
        lines = ["| compile | rows | mix | median ms | best ms | tokens/s |", "|---|---|---|---|---|---|"]
        lines += [
            f"| {t.compile} | {t.rows} | {t.mix} "
            f"| {t.median_ms:.3f} | {t.best_ms:.3f} | {t.tokens_per_s:.1f} |"
            for t in self.steps
        ]
        lines += ["", "| ratio | | |", "|---|---|---|"]
        most = f"{DIFFERENT}, {max((t.rows for t in self.steps), default=0)} rows"
        barred = {what for what in ratios if what.startswith(most) and what.endswith("base only")}
        lines += [
            f"| {what} | {ratio:.3f} | {BAR if what in barred else ''} |" for what, ratio in ratios.items()
        ]
        return "\n".join([*lines, *(f"\n{what} RAISED {why}" for what, why in self.raised.items())]) + "\n"
