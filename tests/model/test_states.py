"""Each sequence goes on from states of its own, whatever its slot held before, and a step that is run again
finds them as they were.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoConfig

from service.core.base_info import BaseInfo
from service.core.request import Request
from service.core.sampling import Sampling
from service.engine.plan import Chunk
from service.model import build, kv, states
from service.model.build import build_runner
from service.model.loading import load_base, no_progress
from service.model.runner import ModelRunner
from service.settings import Settings
from service.worker.loop import make_scheduler
from tests import making

from .driver import Job, RunnerDriver, plan_of
from .test_base_size import leave
from .test_parity import STATEFUL, prompts, random_base
from .test_peft_fallback import fallback_plan

KINDS = ("qwen3_5_text", "falcon_h1", "lfm2")
PLAIN: dict[str, Any] = {"device": "cpu", "dtype": "float32", "quantization": "none", "compile": "off"}

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(params=KINDS, scope="module")
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes, _ = STATEFUL[request.param]
    return random_base(tmp_path_factory.mktemp(request.param) / "base", request.param, sizes)


def settings_of(base: Path, **settings: Any) -> Settings:
    return Settings.model_validate(PLAIN | {"base": str(base), "max_rows": 4} | settings)


def start(base: Path, **settings: Any) -> tuple[ModelRunner, BaseInfo]:
    return build_runner(settings_of(base, **settings), lambda stage, fraction: None)


def test_a_slot_leaves_nothing_to_the_next_sequence(base: Path) -> None:
    driver = RunnerDriver(start(base)[0], 1)
    for prompt in (prompts()[5], *prompts()[:3]):
        job = Job(prompt, 5)
        driver.run([job])
        assert job.ids == making.greedy(base, None, prompt, 5)


def test_a_step_that_raised_is_run_again_from_the_same_states(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its numbers are those of a step that did not."""
    runner, _ = start(base)
    texts = [tuple(prompt) for prompt in prompts()[4:6]]
    scored = Sampling(logprobs=1)
    requests = [Request(i, prompt, 1, None, scored) for i, prompt in enumerate(texts)]
    blocks = [(0, 1), (2, 3)]

    def make_chunks(start: int, stop: int | None) -> list[Chunk]:
        return [
            Chunk(r, own, start, r.prompt[start:stop], stop is None, slot=r.id)
            for r, own in zip(requests, blocks, strict=True)
        ]

    runner.run_chunks(make_chunks(0, 10))
    wanted = runner.run_chunks(make_chunks(10, None))
    runner.run_chunks(make_chunks(0, 10))
    with monkeypatch.context() as patch:
        patch.setattr(runner.sampler, "launch_batch", no_memory)
        with pytest.raises(MemoryError):
            runner.run_chunks(make_chunks(10, None))
    for chunk, want in zip(make_chunks(10, None), wanted, strict=True):
        (result,) = runner.run_chunks((chunk,))
        assert result.token is not None
        assert want.token is not None
        assert result.token.logprob == pytest.approx(want.token.logprob, abs=1e-4)


def no_memory(*_: object) -> None:
    raise MemoryError


def test_prompts_that_are_alike_and_those_that_wait_anew_say_what_generate_says(base: Path) -> None:
    """Four sequences of one prompt and two of others, in blocks that are too few for them."""
    runner, card = start(base, prefill_tokens=16)
    scheduler = make_scheduler(replace(card, kv_blocks=9), settings_of(base, prefill_tokens=16))
    asked = [Request(i, tuple(prompt), 12) for i, prompt in enumerate([prompts()[6]] * 4 + prompts()[3:5])]
    for request in asked:
        scheduler.submit_request(request)
    while scheduler.running or scheduler.waiting:
        plan = scheduler.plan_step()
        scheduler.commit_step(plan, runner.run_chunks(plan.chunks))
    report = scheduler.take_report()
    assert report.gauges.preemptions > 0, "a weak fixture"
    for request in asked:
        said = [event.token.id for event in report.events if event.request == request.id and event.token]
        assert said == making.greedy(base, None, request.prompt, 12), request.id


def test_an_adapter_on_pefts_path_has_the_states_of_its_own_sequences(base: Path, tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if base.parent.name.startswith(kind))
    _, targets = STATEFUL[kind]
    pooled, fallback = (making.noise(tmp_path / f"a{i}", base, i, targets, r=4) for i in range(2))
    driver = RunnerDriver(start(base)[0], 4)
    plans = {pooled: plan_of(pooled, base), fallback: fallback_plan(fallback)}
    driver.place(plans[pooled])
    driver.runner.load_adapter(plans[fallback])
    jobs = [(folder, Job(p, 5, plans[folder].digest)) for p in prompts()[3:6] for folder in plans]
    driver.run([job for _, job in jobs])
    for folder, job in jobs:
        assert job.ids == making.greedy(base, folder, job.prompt, job.n)


def test_the_memory_of_states_is_what_their_buffers_take(base: Path) -> None:
    runner, card = start(base, max_rows=3)
    kept = [buffer for name, buffer in runner.model.named_buffers() if "_state_" in name]
    assert sum(buffer.nbytes for buffer in kept) == 3 * card.state_bytes > 0


def test_what_states_take_is_no_room_for_blocks(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for rows in (1, 100):
        settings = settings_of(base, max_rows=rows)
        with making.quiet():
            probed = build._probe_base(load_base(base, settings, no_progress), settings)
        leave(monkeypatch, 100_000_000)
        counts.append(build._count_blocks(probed))
    lost = 2 * 99 * states.bytes_per_sequence(probed.stateful)
    block = 16 * kv.bytes_per_position(probed.attention, probed.model.dtype)
    assert counts[0] - counts[1] == pytest.approx(lost * 0.25 / block, abs=1)


@pytest.mark.parametrize(
    "config",
    [AutoConfig.for_model("llama", num_hidden_layers=1), SimpleNamespace()],
    ids=["a kind of layer that it does not know", "no layers"],
)
def test_a_config_that_transformers_has_no_cache_for_has_no_states(config: Any) -> None:
    config.layer_types = ["made up"]
    assert states.probe_states(SimpleNamespace(config=config)) == []
