"""A request that names a folder has it registered first, in every dialect, if its key may know of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .scripted_app import ScriptedApp, serve_script

MESSAGES = [{"role": "user", "content": "Hi"}]
NAMING: dict[str, Any] = {
    "/generate": {"inputs": "Hi", "parameters": {"adapter_id": "late"}},
    "/v1/completions": {"model": "late", "prompt": "Hi", "max_tokens": 2},
    "/v1/chat/completions": {"model": "tiny:late", "messages": MESSAGES, "max_tokens": 2},
    "/v1/responses": {"model": "late", "input": "Hi"},
    "/v1/messages": {"model": "late", "messages": MESSAGES, "max_tokens": 2},
    "/tokenize": {"model": "late", "prompt": "Hi"},
}
MIX = [{"id": "late", "weight": 1.0}, {"id": "x", "weight": 1.0}]
MIXES: dict[str, Any] = {
    "/generate": {"inputs": "Hi", "parameters": {"adapters": MIX}},
    "/v1/completions": {"model": "tiny", "prompt": "Hi", "max_tokens": 2, "adapters": MIX},
}
CASES = [*NAMING.items(), *MIXES.items()]


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path) as scripted:
        yield scripted


@pytest.mark.parametrize(("path", "body"), CASES)
def test_the_folder_is_registered_before_it_is_leased(api: ScriptedApp, path: str, body: Any) -> None:
    assert api.http.post(path, json=body).status_code == 404
    api.registry.folders.add("late")
    api.post(path, body)
    assert "late" in api.registry.cards


def test_a_key_registers_nothing_that_it_may_not_know_of(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("sk-x adapters=x\nsk-all\n")
    with serve_script(tmp_path, api_keys=f"@{keys}") as api:
        api.registry.folders.add("late")
        for key, status in (("sk-x", 404), ("sk-all", 200)):
            answer = api.http.post(
                "/generate", json=NAMING["/generate"], headers={"authorization": f"Bearer {key}"}
            )
            assert answer.status_code == status
            assert ("late" in api.registry.cards) == (status == 200)
