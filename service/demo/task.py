"""The nouns of the demo: an item of data, a recipe for an adapter, the task that joins them.

Must not know torch or how to train.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Literal

Split = Literal["train", "test"]
Scores = dict[str, float]


@dataclass(frozen=True, slots=True)
class Item:
    """A prompt as a client sends it and the answer wanted.

    `chat`: the prompt is a user message for the base's chat template.
    """

    prompt: str
    answer: str
    chat: bool = False


@dataclass(frozen=True, slots=True)
class Recipe:
    """How an adapter is trained:

    AdamW over `steps` batches of `batch` items, `rate` at its highest.
    """

    rank: int
    alpha: int
    targets: tuple[str, ...]
    steps: int
    rate: float
    batch: int = 8
    rslora: bool = False
    dora: bool = False


@dataclass(frozen=True, slots=True)
class Task:
    """One adapter's purpose, data and measure.

    `make` draws one item of a split. `score` compares an answer (stripped) with the wanted one: each
    measure is 0 to 1, and `measures` explains them; the first one is the one that counts. `instruction`
    is the task in words, for the base when it is measured. `limit` is the number of tokens an answer may
    have; `tests` the number of held-out items; `sample` a prompt for the README.
    """

    name: str
    summary: str
    form: str
    sample: str
    instruction: str
    recipe: Recipe
    make: Callable[[Random, Split], Item]
    score: Callable[[str, str], Scores]
    measures: dict[str, str]
    limit: int
    tests: int = 104

    def items(self, split: Split, count: int) -> list[Item]:
        """The first `count` items of a split; the same ones each time.

        Held-out prompts are all different.
        """
        rng = Random(f"{self.name} {split}")
        if split == "train":
            return [self.make(rng, split) for _ in range(count)]
        found: dict[str, Item] = {}
        while len(found) < count:
            item = self.make(rng, split)
            found.setdefault(item.prompt, item)
        return list(found.values())
