"""The validator's process: it answers, survives bad files, and is replaced when it is gone or does not
answer.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from service.catalog.validator import process
from service.catalog.validator.messages import ReadRequest, Refusal, ValidatedAdapter
from service.catalog.validator.process import Validator
from service.core.base_info import LayerLimit
from service.errors import AdapterInvalid, AdapterUnsupported, NotReady, Overloaded

from ... import making


@pytest.mark.anyio
async def test_one_process_reads_refuses_and_is_replaced(
    base: Path, plain: Path, other: Path, tmp_path: Path
) -> None:
    """One test, for each process takes seconds to import torch."""
    validator = Validator(max_rank=64)
    try:
        await check_introduction(validator, base)
        first, second = await validate_both(validator, plain, other)
        await check_refusals(validator, plain, tmp_path)
        await check_leaving(validator, plain, other, second)
        await check_replacement(validator, plain, first)
        odd = making.noise(tmp_path / "odd", base, 3, ("k_proj", "q_proj"))
        await check_limit_is_known(validator, odd)
        stalling = await check_patience(validator, plain, tmp_path)
        stalled = await start_stalling(validator, stalling, plain)
    finally:
        await asyncio.wait_for(validator.close(), 60)  # against hangs only
    outcomes = await asyncio.gather(*stalled, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [AdapterInvalid, NotReady]
    assert validator.pid is None


def test_where_memory_ran_out_the_adapter_is_not_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipe of a child that the system has killed is at its end."""
    kills = iter((3, 4))
    monkeypatch.setattr(process, "count_oom_kills", lambda: next(kills))
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    validator = Validator(max_rank=64)
    with pytest.raises(Overloaded, match="memory ran out while the adapter was validated"):
        validator._exchange_messages(ours, ReadRequest(Path("a"), ()), 1.0)


async def check_introduction(validator: Validator, base: Path) -> None:
    """The process that was warmed up is the one that gets the base."""
    await validator.warm_up()
    pid = validator.pid
    limit = LayerLimit("model.layers.*.self_attn.k_proj", "Odd", "gives a tuple", by_peft=False)
    await validator.start_on(base, (limit,))
    assert (validator.pid, validator.tree and validator.tree.text) == (pid, "LlamaForCausalLM")


async def validate_both(
    validator: Validator, plain: Path, other: Path
) -> tuple[ValidatedAdapter, ValidatedAdapter]:
    first, second = await asyncio.gather(validator.validate_adapter(plain), validator.validate_adapter(other))
    assert (first.adapter.rank, second.adapter.rank) == (4, 8)
    again = await validator.validate_adapter(plain)
    assert again.adapter.patches is first.adapter.patches
    norms = await validator.measure_norms(first)
    assert norms.keys() == {layer.module for layer in first.layers}
    return first, second


async def check_refusals(validator: Validator, plain: Path, tmp_path: Path) -> None:
    cut = making.edit(plain, tmp_path / "cut", weights=drop_lora_b)
    with pytest.raises(AdapterInvalid, match="4 of 8") as caught:
        await validator.validate_adapter(cut)
    assert caught.value.details is not None
    assert (caught.value.details["matched"], caught.value.details["total"]) == (4, 8)
    task = making.edit(plain, tmp_path / "task", {"task_type": "SEQ_CLS"})
    with pytest.raises(AdapterUnsupported, match="SEQ_CLS"):
        await validator.validate_adapter(task)


def drop_lora_b(tensors: making.Tensors) -> making.Tensors:
    return {key: tensor for key, tensor in tensors.items() if "lora_B" not in key}


async def check_leaving(validator: Validator, plain: Path, other: Path, second: ValidatedAdapter) -> None:
    leaving = asyncio.create_task(validator.validate_adapter(plain))
    await asyncio.sleep(0)
    leaving.cancel()
    answer = await validator.validate_adapter(other)
    assert answer.adapter == second.adapter, "the answer is that of the one who left"


async def check_replacement(validator: Validator, plain: Path, first: ValidatedAdapter) -> None:
    pid = validator.pid
    os.kill(pid or 0, signal.SIGKILL)
    with pytest.raises(AdapterInvalid, match="ended the reader's process"):
        await validator.validate_adapter(plain)
    again = await validator.validate_adapter(plain)
    assert again.adapter == first.adapter
    assert validator.pid not in (None, pid)


async def check_limit_is_known(validator: Validator, odd: Path) -> None:
    """The new process knows what the base cannot serve."""
    refusal = r"LoRA on Odd is not served: model\.layers\.\*\.self_attn\.k_proj gives"
    with pytest.raises(AdapterUnsupported, match=refusal):
        await validator.validate_adapter(odd)


async def check_patience(validator: Validator, plain: Path, tmp_path: Path) -> Path:
    """An adapter that takes for ever is refused in time, and the next one is read."""
    endless = {"target_modules": "(" + "(.*)*" * 12 + ")x$"}
    stalling = making.edit(plain, tmp_path / "stalling", endless)
    validator.read_s = 0.5
    with pytest.raises(AdapterInvalid, match="longer than"):
        await validator.validate_adapter(stalling)
    validator.read_s = 3600.0
    await validator.validate_adapter(plain)
    return stalling


async def start_stalling(validator: Validator, stalling: Path, plain: Path) -> list[asyncio.Task[Any]]:
    """One adapter that is read for ever, and one that waits behind it."""
    running = asyncio.create_task(validator.validate_adapter(stalling))
    while not validator._turn.locked():  # noqa: ASYNC110 - a lock tells nobody that it is taken
        await asyncio.sleep(0.01)
    return [running, asyncio.create_task(validator.validate_adapter(plain))]


@pytest.mark.anyio
async def test_where_no_child_can_be_started_the_next_try_starts_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def scarce(*words: str, **more: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(process, "start_child", scarce)
    validator = Validator(max_rank=64)
    for _ in range(2):
        with pytest.raises(OSError, match="Too many open files"):
            await validator.warm_up()
    await validator.close()


def test_what_the_child_cannot_answer_it_refuses() -> None:
    def gone() -> ValidatedAdapter:
        raise FileNotFoundError(2, "No such file or directory", "/secret/path")

    refusal = process.answer_request(gone)
    assert isinstance(refusal, Refusal)
    assert refusal.to_error().problems == ["the files cannot be read: No such file or directory"]
