"""An id whose content is replaced again and again, and an alias whose weights move, under load: every answer
is whole, and of the content that it names.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests import making

from .conftest import Asking, LiveService

pytestmark = pytest.mark.anyio

ID, ALIAS = "trained", "prod"
CLIENTS, REPLACEMENTS, PAUSE_S = 12, 24, 0.1
MARKERS = ("m0", "m2", "m3", "m4", "m5", "m6")


@dataclass
class Training:
    """The versions so far, each with when its upload began and ended, and what each content says."""

    letters: dict[str, str]
    versions: list[tuple[str, float, float]] = field(default_factory=list)
    over: bool = False

    def could_answer(self, digest: str, began: float, ended: float) -> bool:
        """Whether this was current at some time between the two."""
        ends = [end for _, _, end in self.versions[1:]] + [ended]
        lives = [(*version[:2], end) for version, end in zip(self.versions, ends, strict=True)]
        return any(known == digest and start <= ended and end >= began for known, start, end in lives)


async def upload(asking: Asking, live: LiveService, training: Training, marker: str) -> None:
    names = (making.CONFIG, making.WEIGHTS)
    files = {name: (name, (live.adapters / marker / name).read_bytes()) for name in names}
    began = time.monotonic()
    answer = await asking.http.put(f"/adapters/{ID}/upload", files=files)
    assert answer.status_code in (200, 201), answer.text
    digest = answer.json()["digest"]
    training.versions.append((digest, began, time.monotonic()))


Answered = tuple[str, float, float]


async def ask_on(asking: Asking, training: Training, client: int) -> list[Answered]:
    """Asks until the training is over: for the current version, or for one of the last two by its digest.

    The digests that answered by themselves, each with when it was asked and when it had answered.
    """
    unnamed: list[Answered] = []
    count = 0
    while not training.over:
        named = training.versions[-min(1 + count % 2, len(training.versions))][0] if client % 2 else ""
        began = time.monotonic()
        told = await asking.generate("Hello", f"{ID}@{named}" if named else ID, 6, ignore_eos_token=True)
        digest = told["adapter"]["digest"]
        assert told["generated_text"] == training.letters[digest] * 6
        assert digest == named or not named
        if not named:
            unnamed.append((digest, began, time.monotonic()))
        count += 1
    assert count
    return unnamed


async def test_replacements_under_load_drop_nothing_and_mix_nothing(
    live: LiveService, asking: Asking
) -> None:
    digests = {card["id"]: card["digest"] for card in (await asking.http.get("/adapters")).json()["adapters"]}
    training = Training({digests[marker]: live.letters[marker] for marker in MARKERS})
    await upload(asking, live, training, MARKERS[0])
    clients = [asyncio.create_task(ask_on(asking, training, client)) for client in range(CLIENTS)]
    for turn in range(1, REPLACEMENTS):
        await upload(asking, live, training, MARKERS[turn % len(MARKERS)])
        await asyncio.sleep(PAUSE_S)
    training.over = True
    answered = [answer for found in await asyncio.gather(*clients) for answer in found]
    assert all(training.could_answer(*answer) for answer in answered)
    kept = (await asking.http.get(f"/adapters/{ID}/versions")).json()["versions"]
    assert [version["digest"] for version in kept] == [digest for digest, _, _ in training.versions[:-4:-1]]
    assert [version["in_flight"] for version in kept] == [0, 0, 0]
    stored = [path.name for path in (live.adapters / ".uploads").iterdir() if path.name[0] != "."]
    assert len(stored) == 3, "what is no version any more leaves no files"
    assert (await asking.http.delete(f"/adapters/{ID}?purge=true")).status_code == 200
    assert list((live.adapters / ".uploads").iterdir()) == []


async def test_a_canary_gets_the_share_that_its_weight_says_and_the_counts_agree(
    live: LiveService, asking: Asking
) -> None:
    answered: Counter[str] = Counter()
    shares = []
    for weight in (0, 10, 50, 100):
        targets = [{"id": "m0", "weight": 100 - weight}, {"id": "m2", "weight": weight}]
        assert (await asking.http.put(f"/aliases/{ALIAS}", json={"targets": targets})).is_success
        told = await asyncio.gather(*(asking.generate("Hello", ALIAS, 2) for _ in range(60)))
        for answer in told:
            assert answer["generated_text"] == live.letters[answer["adapter"]["id"]] * 2
        went = Counter(answer["adapter"]["id"] for answer in told)
        shares.append(went["m2"] / 60)
        answered += went
    assert (shares[0], shares[-1]) == (0, 1)
    assert 0 < shares[1] < 0.3 < shares[2] < 0.7
    assert await counted(asking) == answered
    assert (await asking.http.delete(f"/aliases/{ALIAS}")).status_code == 200
    assert not await counted(asking)


async def counted(asking: Asking) -> Counter[str]:
    """The requests for the alias by target, as the metrics have them."""
    families = text_string_to_metric_families((await asking.http.get("/metrics")).text)
    samples = (sample for family in families for sample in family.samples)
    counts = Counter[str]()
    for sample in samples:
        if sample.name == "adapterd_alias_requests_total" and sample.labels["alias"] == ALIAS:
            counts[sample.labels["adapter"]] += int(sample.value)
    return counts
