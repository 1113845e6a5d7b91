"""Whatever comes, fails, is replaced or goes, the base and the neighbours say the same to the last
bit, and the base's tensors stay.

A random walk over every kind of adapter through the real registry, reader and worker, in float32;
what is served says what PEFT says.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from service.catalog.registry import Registry
from service.core.request import UNNUMBERED, Event, Request, Token
from service.core.sampling import Sampling
from service.errors import AdapterInvalid, AdapterNotFound
from service.settings import Settings
from service.worker.client import WorkerClient
from tests import kinds, making

pytestmark = pytest.mark.anyio

PROMPT = [9, 40, 41, 77, 8, 30, 5, 9, 120, 4, 66]
LENGTH = 5
STEPS = 105
IDS = [f"x{i}" for i in range(7)]
BESIDE = (
    *(
        "modules_to_save",
        "embedding saved",
        "trainable_token_indices",
        "lora_bias",
        "embedding",
        "target_parameters",
    ),
    *("IA3", "VERA", "LOHA", "LOKR", "OFT", "LN_TUNING", "OSF", "FOURIERFT"),
)
GOOD = kinds.POOL | {name: kinds.SHADOW[name] for name in BESIDE}
# Asked after each deed, never touched by one
WITNESSES = {"base": None, "pooled": "dora", "beside": "modules_to_save"}
PLAIN = {"dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off"}
# Less than all of them need, in both tiers
BOUNDS = {"max_rows": 8, "pool_rank": 40, "max_rank": 32, "host_cache_mb": 1}


def wild(folder: Path, base: Path) -> Path:
    """One whose numbers overflow."""
    loud = kinds.edited(
        weights=lambda tensors: {
            name: tensor * 1e38 if "lora_B" in name else tensor for name, tensor in tensors.items()
        }
    )
    return loud(folder, base)


@dataclass
class Walk:
    """`held` is the kind under each id.

    A deed is judged by itself; `look` afterwards judges that nobody else noticed it.
    """

    registry: Registry
    client: WorkerClient
    root: Path
    right: dict[str | None, list[int]]
    dice: random.Random = field(default_factory=lambda: random.Random(20))
    held: dict[str, str] = field(default_factory=dict)
    first: dict[str, list[Token]] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)

    # ---- asking

    async def answer(self, id: str | None) -> tuple[list[Token], Event]:
        """The prompt's and the answer's tokens, with their log probabilities; asked so that nothing
        is reused of an earlier prefill.
        """
        if id is None:
            return await self._read(None)
        with self.registry.lease_adapter(id) as generation:
            return await self._read(generation.digest)

    async def _read(self, digest: str | None) -> tuple[list[Token], Event]:
        sampling = Sampling(logprobs=3)
        request = Request(UNNUMBERED, tuple(PROMPT), LENGTH, digest, sampling, prompt_logprobs=3)
        ticket = self.client.submit_request(request)
        events = [event async for event in ticket]
        return [
            token for event in events for token in (*event.prompt, event.token) if token is not None
        ], events[-1]

    async def ids(self, id: str | None) -> list[int]:
        tokens, end = await self.answer(id)
        assert end.finish == "length", f"{id} ({self.held.get(id or '')}): {end.message}"
        return [token.id for token in tokens[len(PROMPT) :]]

    async def look(self, after: str) -> None:
        for name, kind in WITNESSES.items():
            tokens, _ = await self.answer(name if kind else None)
            assert tokens == self.first.setdefault(name, tokens), f"{name} noticed: {after}"
        assert not any(math.isnan(token.logprob or 0) for tokens in self.first.values() for token in tokens)

    # ---- deeds

    def deck(self, cards: list[str]) -> list[str]:
        """So many that each is drawn before one comes again."""
        shuffled = [
            card for _ in range(STEPS // len(cards) + 1) for card in self.dice.sample(cards, len(cards))
        ]
        return shuffled[::-1]

    async def put(self, id: str, kind: str, **more: Any) -> None:
        self.seen.add(kind)
        await self.registry.register_adapter(id, kind.replace(" ", "-"), replace=True, **more)
        self.held[id] = kind

    async def come(self, kind: str) -> str:
        id = self.dice.choice(IDS)
        was = self.held.get(id)
        await self.put(id, kind, preload=self.dice.random() < 0.7, pinned=self.dice.random() < 0.2)
        if self.dice.random() < 0.7:
            assert await self.ids(id) == self.right[kind], kind
        return f"{id}: {was} became {kind}"

    async def fail(self, kind: str) -> str:
        self.seen.add(kind)
        id = self.dice.choice(IDS)
        with pytest.raises(AdapterInvalid) as refused:
            await self.registry.register_adapter(id, kind.replace(" ", "-"), replace=True)
        assert kinds.REFUSED[kind][1] in "\n".join(refused.value.problems)
        if id in self.held:
            assert await self.ids(id) == self.right[self.held[id]], kind
        else:
            with pytest.raises(AdapterNotFound):
                self.registry.card_of(id)
        return f"{id} did not become {kind}"

    async def leave(self, id: str, kind: str) -> str:
        """Deleted, or replaced, while it is asked."""
        asked = [asyncio.create_task(self.ids(id)) for _ in range(3)]
        await asyncio.sleep(0)
        del self.held[id]
        other = self.dice.choice([*GOOD, None])
        if other:
            await self.put(id, other)
        else:
            await self.registry.remove_adapter(id)
        assert await asyncio.gather(*asked) == [self.right[kind]] * 3
        return f"{kind} under {id} left for {other}"

    async def pin(self, id: str, kind: str) -> str:
        pinned = not self.registry.card_of(id)["pinned"]
        await self.registry.pin_adapter(id, pinned)
        assert await self.ids(id) == self.right[kind]
        return f"{kind} pinned: {pinned}"

    async def crowd(self, *_: str) -> str:
        names: list[str | None] = [None, *(name for name, kind in WITNESSES.items() if kind), *self.held]
        kind = {**self.held, **WITNESSES}
        told = await asyncio.gather(*(self.ids(name) for name in names))
        for name, said in zip(names, told, strict=True):
            assert said == self.right[kind[name] if name else None], name
        return f"all at once: {names}"

    async def overflow(self, *_: str) -> str:
        await self.registry.register_adapter("wild", "wild", replace=True)
        loud, base = await asyncio.gather(self.answer("wild"), self.ids(None))
        assert "not finite" in loud[1].message
        assert base == self.right[None]
        await self.registry.remove_adapter("wild")
        return "one overflowed"

    async def rot(self, *_: str) -> str:
        """Its file changes on disk after it was registered and before it was read."""
        number = self.dice.random()  # else an adapter of the same content might be resident
        folder = making.edit(self.root / "plain", self.root / f"rotten{number}", {"lora_dropout": number})
        await self.registry.register_adapter("rotten", folder.name, preload=False, replace=True)
        making.edit(
            folder, folder, weights=lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()}
        )
        told = (await self.answer("rotten"))[1]
        assert "changed on disk" in told.message
        await self.registry.remove_adapter("rotten")
        return "one rotted"


@asynccontextmanager
async def walking(folder: Path) -> AsyncIterator[Walk]:
    base, root = making.tiny(folder / "base", tie_word_embeddings=False), folder / "adapters"
    settings = Settings.model_validate(
        {**PLAIN, **BOUNDS, "base": str(base), "base_id": "tiny", "adapters_dir": root}
    )
    client = WorkerClient(settings, "tests.weighing:build")
    registry = Registry(settings, client)
    client.watch_loads(registry.note_load)
    await asyncio.gather(client.start_worker(), registry.start_validator())
    try:
        folders = await asyncio.to_thread(stocked, folder / "stock", base)
        right = {kind: making.answers(base, path, [PROMPT], LENGTH)[0] for kind, path in folders.items()}
        await client.wait_ready()
        await registry.open_catalog()
        (folder / "stock").rename(root)
        yield Walk(registry, client, root, right)
    finally:
        await registry.close()
        await client.stop_worker(0)


def stocked(root: Path, base: Path) -> dict[str | None, Path | None]:
    """Saves every kind below the root; the folders of the good ones, and of the base none."""
    good = kinds.make(root, base, GOOD)
    kinds.make(root, base, {kind: maker for kind, (maker, _) in kinds.REFUSED.items()} | {"wild": wild})
    return {None: None} | {kind: good[kind] for kind in GOOD}


async def test_nobody_notices_what_becomes_of_others(tmp_path: Path) -> None:
    async with walking(tmp_path) as walk:
        for name, kind in WITNESSES.items():
            if kind:
                await walk.put(name, kind)
                del walk.held[name]
        await walk.look("nothing")
        good, bad = walk.deck(list(GOOD)), walk.deck(list(kinds.REFUSED))
        deeds: list[Callable[..., Coroutine[Any, Any, str] | Awaitable[str]]] = [
            walk.leave,
            walk.pin,
            walk.crowd,
            walk.overflow,
            walk.rot,
        ]
        for step in range(STEPS):
            if step % 5 < 2 or not walk.held:
                after = await walk.come(good.pop())
            elif step % 5 < 4:
                after = await walk.fail(bad.pop())
            else:
                after = await walk.dice.choices(deeds, (4, 2, 2, 1, 1))[0](
                    *walk.dice.choice(list(walk.held.items()))
                )
            await walk.look(f"step {step}, {after}")
        await walk.crowd()
        assert walk.seen == {*GOOD, *kinds.REFUSED}
    before, after = (tmp_path / "hashes").read_text().split()
    assert before == after
