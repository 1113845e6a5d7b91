"""A live service on a tiny float32 base, with adapters whose every token plain PEFT can tell, and
short ways to ask it.

m0, m1, ... are markers: each says one letter only. n1, n2 and n3 are noise. m9 and n3 run in the
shadow lane. The base lists two eos, the second of them the letter that m1 says.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from deploy.bench.servers import started
from tests import making, markers

ROWS = 16
SILENT = "m1"
TEMPLATE = "{{ bos_token }}One sentence of its own. {{ messages[-1]['content'] }}"
SETTINGS = {
    "base_id": "tiny",
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "max_rows": str(ROWS),
}
Body = dict[str, Any]


@dataclass(frozen=True)
class LiveService:
    """Where the service is and what it serves: the base's folder, the adapters' root, and the
    letter that each marker says.
    """

    url: str
    base: Path
    adapters: Path
    letters: dict[str, str]

    def folder(self, adapter: str | None) -> Path | None:
        return self.adapters / adapter if adapter else None

    def greedy(self, adapter: str | None, prompt: str, n: int) -> list[int]:
        """What PEFT says."""
        return making.greedy(self.base, self.folder(adapter), making.ids(prompt), n)

    @torch.no_grad()
    def logits(self, adapter: str | None, ids: Sequence[int]) -> torch.Tensor:
        """[tokens, vocabulary], by a plain forward of transformers."""
        found: torch.Tensor = making.served(self.base, self.folder(adapter))(
            torch.tensor([list(ids)])
        ).logits[0]
        return found


@dataclass(frozen=True)
class Asking:
    http: httpx.AsyncClient

    async def post(self, path: str, body: Body, status: int = 200) -> Any:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == status, answer.text
        return answer.json()

    async def generate(
        self, inputs: str, adapter: str | None = None, n: int = 8, status: int = 200, **parameters: Any
    ) -> Any:
        asked = {"adapter_id": adapter, "max_new_tokens": n, **parameters}
        return await self.post("/generate", {"inputs": inputs, "parameters": asked}, status)

    async def ids(self, inputs: str, adapter: str | None = None, n: int = 8, **parameters: Any) -> list[int]:
        """The answer's tokens, eos or not."""
        told = await self.generate(
            inputs, adapter, n, **{"details": True, "ignore_eos_token": True, **parameters}
        )
        return [token["id"] for token in told["details"]["tokens"]]

    async def complete(self, prompt: Any, model: str = "tiny", tokens: int = 8, **fields: Any) -> Any:
        return await self.post(
            "/v1/completions",
            {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, **fields},
        )

    async def stream(self, path: str, body: Body) -> list[Any]:
        answer = await self.http.post(path, json=body)
        assert answer.status_code == 200, answer.text
        frames = [frame.removeprefix("data: ") for frame in answer.text.split("\n\n") if frame]
        return [json.loads(frame) for frame in frames if frame != "[DONE]"]

    async def streamed(self, inputs: str, adapter: str | None = None, n: int = 8, **parameters: Any) -> str:
        """The text of a stream, which its last event must confirm."""
        asked = {"adapter_id": adapter, "max_new_tokens": n, **parameters}
        events = await self.stream("/generate_stream", {"inputs": inputs, "parameters": asked})
        text = "".join(event["token"]["text"] for event in events if not event["token"]["special"])
        assert events[-1]["generated_text"] == text
        return text

    async def crowd(self, count: int, adapters: Sequence[str | None] = ("n1", "n3", "m9", None)) -> None:
        """Neighbours of all kinds: long prompts, sampling, other adapters."""
        asked = [
            ("x" * (20 + 9 * i), adapters[i % len(adapters)], {"do_sample": True, "seed": i} if i % 2 else {})
            for i in range(count)
        ]
        await asyncio.gather(*(self.ids(prompt, adapter, 24, **more) for prompt, adapter, more in asked))


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveService]:
    folder = tmp_path_factory.mktemp("live")
    base = markers.base(folder / "base")
    letters = markers.write_adapters(folder / "adapters", base, 10)
    (base / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [2, making.ids(letters[SILENT])[0]]})
    )
    for seed in (1, 2):
        making.noise(folder / "adapters" / f"n{seed}", base, seed)
    making.noise(folder / "adapters" / "n3", base, 3, lora_bias=True)
    making.edit(folder / "adapters" / "n1", folder / "adapters" / "own")
    (folder / "adapters" / "own" / "chat_template.jinja").write_text(TEMPLATE)
    settings = {**SETTINGS, "base": str(base), "adapters_dir": str(folder / "adapters")}
    with started(settings, folder / "log") as server:
        yield LiveService(server.url, base, folder / "adapters", letters)


@pytest.fixture
async def asking(live: LiveService) -> AsyncIterator[Asking]:
    async with httpx.AsyncClient(base_url=live.url, timeout=60, trust_env=False) as http:
        yield Asking(http)
