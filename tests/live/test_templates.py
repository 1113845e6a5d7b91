"""Adapters whose chat templates mean no good, on a real service: their own chats are 400, and
nobody else notices.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import httpx
import psutil
import pytest

from deploy.bench.servers import started
from tests import making

from .conftest import SETTINGS, TEMPLATE, Asking, LiveService

pytestmark = pytest.mark.anyio

ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLED = "{% set n = namespace(a=[1]) %}{% for i in range(99) %}{% set n.a = n.a + n.a %}{% endfor %}"
HOSTILE = {
    "endless": (ENDLESS, ("takes more than",)),
    "memory": ("{{ 'x' * 10**10 }}", ("more than 512 MB",)),
    "doubled": (DOUBLED, ("more than 512 MB", "takes more than")),
    "output": ("{{ 'x' * 4000001 }}", ("4000000 are the most",)),
    "raising": ("{{ raise_exception('only aliens') }}", ("only aliens",)),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ("recursion",)),
}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "temperature": 0}


@pytest.mark.parametrize("kind", HOSTILE)
async def test_a_hostile_template_harms_nobody_else(live: LiveService, asking: Asking, kind: str) -> None:
    template, said = HOSTILE[kind]
    folder = making.edit(live.adapters / "n2", live.adapters / f"hostile-{kind}")
    (folder / "chat_template.jinja").write_text(template)
    await asking.post("/adapters", {"id": folder.name, "source": folder.name}, 201)
    known = await asking.post("/v1/chat/completions", {"model": "own", **CHAT})
    hostile = [
        asyncio.create_task(asking.post("/v1/chat/completions", {"model": folder.name, **CHAT}, 400))
        for _ in range(3)
    ]
    neighbours = 0
    while not all(task.done() for task in hostile):
        assert (await asking.http.get("/health")).status_code == 200
        told = await asking.post("/v1/chat/completions", {"model": "own", **CHAT})
        assert told["choices"] == known["choices"]
        neighbours += 1
    assert neighbours
    for task in hostile:
        error = (await task)["error"]
        assert any(words in error["message"] for words in said), error
        assert (error["type"], error["param"]) == ("invalid_request_error", "messages")
    await asking.http.delete(f"/adapters/{folder.name}")


async def test_an_adapters_tokenizer_of_its_own_reads_its_prompts(live: LiveService, asking: Asking) -> None:
    folder = making.edit(live.adapters / "n2", live.adapters / "lowercase")
    words = json.loads((live.base / "tokenizer.json").read_text()) | {"normalizer": {"type": "Lowercase"}}
    (folder / "tokenizer.json").write_text(json.dumps(words))
    await asking.post("/adapters", {"id": "lowercase", "source": "lowercase"}, 201)
    right = making.greedy(live.base, folder, making.ids("hello"), 8)
    assert await asking.ids("HELLO", "lowercase", 8) == right
    await asking.http.delete("/adapters/lowercase")


async def test_no_process_is_left_behind(live: LiveService, tmp_path: Path) -> None:
    folder = making.edit(live.adapters / "n2", tmp_path / "adapters" / "own")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    settings = {**SETTINGS, "base": str(live.base), "adapters_dir": str(tmp_path / "adapters")}
    with started(settings, tmp_path / "log") as server:
        pid = server.pid
        before = {child.pid for child in psutil.Process(pid).children(recursive=True)}
        async with httpx.AsyncClient(base_url=server.url, timeout=60, trust_env=False) as http:
            await Asking(http).post("/v1/chat/completions", {"model": "own", **CHAT})
        family = psutil.Process(pid).children(recursive=True)
        assert {child.pid for child in family} - before, "the template has a process of its own"
    gone, alive = psutil.wait_procs(family, timeout=10)
    assert not alive
    assert len(gone) == len(family)
