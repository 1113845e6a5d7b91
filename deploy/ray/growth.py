"""What more adapters and more engines do to the share of requests that find their adapter in place,
by simulation. Knows no Ray.

`python -m deploy.ray.growth` prints the table of README.md.
"""

from __future__ import annotations

import itertools
import random
from bisect import bisect
from collections import OrderedDict, defaultdict
from dataclasses import dataclass, field

PLACES, HOSTED = 32, 256  # adapters that one engine holds on its device and in its host memory
# 55 MB over PCIe at 20 GB/s, which the steps wait for; 109 MB from a disk at 1 GB/s, beside them
PLACE_S, READ_S = 0.003, 0.11
RUN_S, TOKENS = 2.0, 128  # of a request
ROWS = 64  # requests that an engine runs at once
BUSY = 0.7  # of their rows that arrivals keep busy
RATE = BUSY * ROWS / RUN_S  # requests a second that an engine ends
PRICE = 2.5  # of an engine's hour
WARM, COUNTED = 15_000, 15_000
SIZES = list(itertools.product((100, 1_000, 10_000), (1, 2, 4, 8, 16)))


@dataclass
class Cache:
    """The `size` most recently used adapters."""

    size: int
    held: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def take(self, adapter: int) -> tuple[bool, int | None]:
        """Whether it was there, and who left for it."""
        found = adapter in self.held
        self.held[adapter] = None
        self.held.move_to_end(adapter)
        return found, self.held.popitem(last=False)[0] if len(self.held) > self.size else None


@dataclass(frozen=True)
class Found:
    """Where requests found their adapter, as shares of all."""

    device: float
    host: float

    @property
    def disk(self) -> float:
        return max(0.0, 1 - self.device - self.host)

    @property
    def placing(self) -> float:
        """The share of its time that an engine copies adapters to the device."""
        return (1 - self.device) * RATE * PLACE_S

    @property
    def reading(self) -> float:
        """The share of its time that an engine's one loader reads; over 1 it cannot keep up."""
        return self.disk * RATE * READ_S

    @property
    def cost(self) -> float:
        """Of a million tokens."""
        tokens_s = RATE * TOKENS * (1 - self.placing) / max(1.0, self.reading)
        return PRICE / 3600 / tokens_s * 1e6


def simulate(adapters: int, engines: int, affine: bool, seed: int = 1) -> Found:
    """Requests for adapters whose popularity falls as 1/rank.

    `affine`: they go to an engine that holds theirs, unless it is full.
    """
    dice = random.Random(seed)
    weights = list(itertools.accumulate(1 / rank for rank in range(1, adapters + 1)))
    devices, hosts = ([Cache(size) for _ in range(engines)] for size in (PLACES, HOSTED))
    holders: defaultdict[int, set[int]] = defaultdict(set)
    running = [0] * engines
    ends: list[int] = []  # the engine of each request that runs, oldest first
    hits = {"device": 0, "host": 0}
    for number in range(WARM + COUNTED):
        if len(ends) > BUSY * ROWS * engines:
            running[ends.pop(0)] -= 1
        adapter = bisect(weights, dice.random() * weights[-1])
        engine = choose_engine(dice, running, holders[adapter] if affine else set())
        running[engine] += 1
        ends.append(engine)
        on_device, left = devices[engine].take(adapter)
        in_host, _ = hosts[engine].take(adapter)
        holders[adapter].add(engine)
        if left is not None:
            holders[left].discard(engine)
        if number >= WARM:
            hits["device"] += on_device
            hits["host"] += in_host and not on_device
    return Found(hits["device"] / COUNTED, hits["host"] / COUNTED)


def choose_engine(dice: random.Random, running: list[int], holders: set[int]) -> int:
    """The less busy of two, of those that hold the adapter and have a row free; else of all, as
    Serve's router chooses.
    """
    free = [engine for engine in sorted(holders) if running[engine] < ROWS]
    pair = dice.choices(free or range(len(running)), k=2)
    return min(pair, key=lambda engine: running[engine])


def table() -> str:
    """Markdown: first by adapter, then at random."""
    heads = ["adapters", "engines"] + 2 * ["on the device", "in host memory", "placing", "reading", "cost"]
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for adapters, engines in SIZES:
        told = [row(simulate(adapters, engines, affine)) for affine in (True, False)]
        lines.append(f"| {adapters:,} | {engines} | {' | '.join(told)} |")
    return "\n".join(lines) + "\n"


def row(found: Found) -> str:
    hits = f"{found.device:.0%} | {found.host:.0%}"
    return f"{hits} | {found.placing:.1%} | {found.reading:.0%} | {found.cost:.2f}"


if __name__ == "__main__":
    print(table(), end="")
