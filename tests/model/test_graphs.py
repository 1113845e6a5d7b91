"""A step on a GPU that is only pretended: its words are PEFT's, its copies are awaited, its recordings
are true.

Where a real one is, the same tests run on that.
"""

from __future__ import annotations

import logging
import random
import weakref
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config
from transformers import AttentionInterface

from service.core.adapter import Adapter, ExecutionPath, Placement, WeightedPart
from service.core.base_info import BLOCK_TOKENS
from service.core.request import Request, Token
from service.core.sampling import Sampling
from service.engine.plan import Chunk, Result
from service.errors import SettingsError
from service.model import gpu_kernels, graphs, kv, selfcheck
from service.model.build import build_runner
from service.model.graphs import CudaGraphs, Recording
from service.model.lora_linear import LoraLinear
from service.model.lora_pool import LoraPool
from service.model.runner import ModelRunner
from service.model.step_layout import make_block_table
from service.settings import Settings
from tests import making, pretended

from .driver import Job, RunnerDriver, plan_of
from .test_parity import FAMILIES, Folders, random_base
from .test_peft_fallback import fallback_plan

SHAPES: list[dict[str, Any]] = [
    {"targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "r": 16, "alpha": 32},
    {"targets": "all-linear", "r": 8},
    {"targets": ("q_proj", "up_proj", "down_proj"), "use_dora": True},
    {"targets": ("gate_proj", "up_proj", "down_proj"), "r": 40, "std": 0.05},
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """TINY and one adapter of it of each shape; None is the base."""
    root = tmp_path_factory.mktemp("graphs")
    base = making.tiny(root / "base", tie_word_embeddings=True)
    folders: Folders = {None: base}
    for i, shape in enumerate(SHAPES):
        folders[f"a{i}"] = making.noise(root / f"a{i}", base, 300 + i, **shape)
    return folders


def device() -> Any:
    return nullcontext() if torch.cuda.is_available() else pretended.gpu()


PLAIN = {"device": "cuda", "dtype": "float32", "quantization": "none", "max_rows": 8, "max_context": 512}
SMALL = {"pool_rank": 128, "max_rank": 64, "kv_mb": 16}


def runner_on(base: Path, **settings: Any) -> ModelRunner:
    chosen = Settings.model_validate(PLAIN | SMALL | {"base": str(base)} | settings)
    return build_runner(chosen, lambda stage, fraction: None)[0]


def ask(folders: Folders, *names: str | None, count: int = 10) -> list[tuple[str | None, Job, list[int]]]:
    """Name, job, and what PEFT says, of so many jobs of different lengths, by turns of these."""
    source = random.Random(11)
    asked = []
    for i in range(count):
        name = names[i % len(names)]
        prompt = [source.randrange(3, 250) for _ in range(source.choice((1, 4, 9, 40)))]
        adapter = plan_of(folders[name], folders[None]).digest if name else None
        job = Job(prompt, source.choice((3, 12, 17, 24, 40)), adapter)
        folder = folders[name] if name else None
        asked.append((name, job, making.greedy(folders[None], folder, prompt, job.n)))
    return asked


def answered(
    folders: Folders, asked: list[tuple[str | None, Job, list[int]]], **settings: Any
) -> ModelRunner:
    """A runner with all adapters resident that has answered all this as PEFT does."""
    runner = runner_on(folders[None], **settings)
    driver = RunnerDriver(runner, 8)
    for name, folder in folders.items():
        if name:
            driver.place(plan_of(folder, folders[None]))
    driver.run([job for _, job, _ in asked], chunk=64)
    assert [name for name, job, want in asked if job.ids != want] == []
    return runner


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> Counter[Recording]:
    """How often which recording is replayed for a step."""
    seen: Counter[Recording] = Counter()
    run_step, replay = CudaGraphs.run_step, CudaGraphs.replay

    def note_step(graphs: CudaGraphs, *step: Any) -> Any:
        def note(graphs: CudaGraphs, recording: Recording, *step: Any) -> Any:
            seen[recording] += 1
            return replay(graphs, recording, *step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CudaGraphs, "replay", note)
            return run_step(graphs, *step)

    monkeypatch.setattr(CudaGraphs, "run_step", note_step)
    return seen


ALL = [Recording(slots, adapted) for slots in (8, 4, 2, 1) for adapted in (True, False)]


def test_recorded_steps_say_what_peft_says_whoever_comes_and_goes(
    folders: Folders, replayed: Counter[Recording]
) -> None:
    """The adapters with DoRA's gate among them, which steps beside them do not see."""
    asked = ask(folders, None, "a0", "a1", "a2", "a3", count=40)
    with device():
        runner = answered(folders, asked, compile="on")
        assert runner.graphs is not None
        assert list(runner.graphs.recorded) == ALL
    assert len({recording.slots for recording in replayed if recording.has_adapters}) > 2


@pytest.mark.parametrize("name", [None, "a2"])
def test_each_decode_step_is_replayed_and_one_of_the_base_alone_knows_no_adapters(
    name: str | None, folders: Folders, replayed: Counter[Recording]
) -> None:
    asked = ask(folders, name, count=1)
    with device():
        answered(folders, asked)
    steps = asked[0][1].n - (len(asked[0][1].prompt) > 1)
    assert replayed == {Recording(1, has_adapters=name is not None): steps}


def test_no_step_waits_for_a_recording(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask(folders, None, "a1", count=6)
    with device():
        runner = runner_on(folders[None])
        driver = RunnerDriver(runner, 8)
        driver.place(plan_of(folders["a1"], folders[None]))
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "CUDAGraph", None)
            driver.run([job for _, job, _ in asked])
    assert [name for name, job, want in asked if job.ids != want] == []


def test_recordings_are_told_of_while_they_are_made_and_when_they_are(
    folders: Folders, caplog: pytest.LogCaptureFixture
) -> None:
    told: list[tuple[str, float]] = []
    chosen = Settings.model_validate(PLAIN | SMALL | {"base": str(folders[None]), "max_rows": 3})
    with device(), caplog.at_level(logging.INFO):
        build_runner(chosen, lambda stage, fraction: told.append((stage, fraction)))
    shares = [fraction for stage, fraction in told if stage == "recording decode steps"]
    assert shares == [i / 6 for i in range(6)]
    assert caplog.text.count("graphs: 6 recordings for up to 3 sequences, in ") == 1


def test_the_counts_are_few_and_waste_less_than_half() -> None:
    assert graphs.list_counts(64) == [1, 2, 4, 8, 16, 24, 32, 48, 64]
    assert graphs.list_counts(1) == [1]
    assert graphs.list_counts(20) == [1, 2, 4, 8, 16, 20]
    assert graphs.list_counts(200) == [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 200]


def test_a_mix_is_recorded_beside_one_of_its_parts(
    folders: Folders, tmp_path: Path, replayed: Counter[Recording]
) -> None:
    base, names, weights = folders[None], ("a0", "a3"), (0.75, -1.5)
    parts = [plan_of(folders[name], base) for name in names]
    weighted = tuple(map(WeightedPart, parts, weights))
    mix = Adapter("sha256:mix", "", "", ExecutionPath.POOL, 56, sum(p.size for p in parts), parts=weighted)
    named = [(folders[name], weight) for name, weight in zip(names, weights, strict=True)]
    joined = making.mixed(named, base, tmp_path)
    jobs = [Job([5, 6, 7, 8], 8, digest) for digest in (mix.digest, parts[0].digest, None)]
    wanted = [making.greedy(base, folder, [5, 6, 7, 8], 8) for folder in (joined, folders["a0"], None)]
    with device():
        driver = RunnerDriver(runner_on(base), 3)
        driver.place(mix)
        driver.place(parts[0])
        driver.run(jobs)
    assert [job.ids for job in jobs] == wanted
    assert replayed[Recording(4, True)]


def test_sequences_that_share_their_first_blocks_are_recorded(
    folders: Folders, replayed: Counter[Recording]
) -> None:
    """Two go on from the same 16 tokens in one block, each in a second of its own."""
    base, plan = folders[None], plan_of(folders["a2"], folders[None])
    shared = tuple(range(40, 40 + BLOCK_TOKENS))
    prompts = [(*shared, 9, 8), (*shared, 30)]
    requests = [Request(i, prompt, 6, plan.digest) for i, prompt in enumerate(prompts)]
    tables, said = [(3, 5), (3, 1)], [list[int](), list[int]()]
    with device():
        runner = runner_on(base)
        RunnerDriver(runner, 1).place(plan)
        runner.run_chunks((Chunk(requests[0], (3,), 0, shared, False),))
        for request, table, ids in zip(requests, tables, said, strict=True):
            rest = request.prompt[BLOCK_TOKENS:]
            (result,) = runner.run_chunks((Chunk(request, table, BLOCK_TOKENS, rest, True),))
            ids.append(token_of(result))
        for step in range(5):
            places = [len(prompt) + step for prompt in prompts]
            each = zip(requests, tables, places, said, strict=True)
            chunks = [Chunk(r, table, at, (ids[-1],), True, step + 1) for r, table, at, ids in each]
            for ids, result in zip(said, runner.run_chunks(chunks), strict=True):
                ids.append(token_of(result))
    assert said == [making.greedy(base, folders["a2"], list(prompt), 6) for prompt in prompts]
    assert replayed[Recording(2, True)] == 5


def token_of(result: Result) -> int:
    assert result.token is not None, result.error
    return result.token.id


def test_of_the_block_table_only_what_is_new_is_sent(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[list[int]] = []

    def note_lines(lines: Sequence[Sequence[int]]) -> torch.Tensor:
        sent.extend(map(list, lines))
        return make_block_table(lines)

    with device():
        runner = runner_on(folders[None])
        monkeypatch.setattr(graphs, "make_block_table", note_lines)
        RunnerDriver(runner, 1).run([Job([5] * 14, 40)], chunk=14)
    assert sent == [[0, 0], [0, 0, 1], [0, 0, 1, 2], [0, 0, 1, 2, 3]]


def test_of_long_sequences_the_recording_sees_them_whole(folders: Folders) -> None:
    prompt = [5 + i % 200 for i in range(250)]
    want = making.greedy(folders[None], folders["a1"], prompt, 20)
    plan = plan_of(folders["a1"], folders[None])
    with device():
        runner = runner_on(folders[None])
        driver = RunnerDriver(runner, 2)
        driver.place(plan)
        job = Job(prompt, 20, plan.digest)
        driver.run([job], chunk=300)
        assert job.ids == want
        assert runner.graphs is not None


def test_an_adapter_that_moved_is_there_when_its_next_step_is_replayed(folders: Folders) -> None:
    plan = plan_of(folders["a0"], folders[None])
    with device() as gpu:
        runner = runner_on(folders[None])
        driver = RunnerDriver(runner, 1)
        driver.place(plan, 0)
        job = Job([9, 8, 7, 6], 6, plan.digest)
        driver.run([job])
        driver.remove(plan.digest)
        assert not any(layer.held for layer in runner.pool.layers.values() if isinstance(layer, LoraLinear))
        assert len(storages_of(runner, plan.digest)) == 1
        driver.place(plan, 32)
        assert gpu is None or runner.pool._copies.queue, "the copies run beside the steps"
        request = Request(77, (9, 8, 7, 6), 9, plan.digest)
        (result,) = runner.run_chunks((Chunk(request, (0,), 8, (job.ids[4],), True, 5),))
        assert result.token is not None
        assert result.token.id == job.ids[5]


def storages_of(runner: ModelRunner, digest: str) -> set[int]:
    """The addresses of the memory that a hosted adapter's factors lie in."""
    layers = runner.hosted[digest].factors.values()
    factors = [factor for layer in layers for factor in (layer.a, layer.b)]
    return {factor.untyped_storage().data_ptr() for factor in factors}


def test_an_adapter_of_other_layers_is_not_served_by_a_recording_without_them(
    folders: Folders,
) -> None:
    want = making.greedy(folders[None], folders["a1"], [3, 4, 5], 8)
    plans = [plan_of(folders[name], folders[None]) for name in ("a0", "a1")]
    with device():
        runner = runner_on(folders[None])
        driver = RunnerDriver(runner, 1)
        for plan in plans:
            driver.place(plan)
            job = Job([3, 4, 5], 8, plan.digest)
            driver.run([job])
        assert job.ids == want


SAMPLINGS = [
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=5, logprobs=3),
    Sampling(temperature=1.2, typical_p=0.9, repetition_penalty=1.3, seed=9),
    Sampling(frequency_penalty=0.7, presence_penalty=0.2, logit_bias=((17, 2.0),), logprobs=0),
    Sampling(grammar='{"grammars":[{"lark_grammar":"start: /[ab]{40}/"}]}'),
]


@pytest.mark.filterwarnings("ignore")
def test_all_that_a_request_may_ask_is_answered_as_on_a_cpu(folders: Folders, tmp_path: Path) -> None:
    plan, base = plan_of(folders["a0"], folders[None]), folders[None]
    fallback = fallback_plan(making.adapter(tmp_path / "ia3", base, IA3Config(task_type="CAUSAL_LM"), seed=8))
    want = run_requests(runner_on(base, device="cpu"), plan, fallback)
    with device():
        got = run_requests(runner_on(base), plan, fallback)
    for ours, right in zip(got, want, strict=True):
        assert ours.ids == right.ids
        assert logprobs_of(ours.tokens) == pytest.approx(logprobs_of(right.tokens), abs=1e-4)
        assert logprobs_of(ours.prompt_tokens) == pytest.approx(logprobs_of(right.prompt_tokens), abs=1e-4)
        assert best_of(ours.tokens) == best_of(right.tokens)


def run_requests(runner: ModelRunner, pooled: Adapter, fallback: Adapter) -> list[Job]:
    """Jobs of all SAMPLINGS under both adapters, and of scored prompts."""
    driver = RunnerDriver(runner, 8)
    driver.place(pooled)
    runner.load_adapter(fallback)
    adapters = pooled.digest, fallback.digest
    jobs = [Job([7, 8, 9, 10], 9, digest, sampling) for sampling in SAMPLINGS for digest in adapters]
    jobs += [Job(list(range(5, 30)), 3, pooled.digest, prompt_logprobs=2), Job([7, 8, 9, 10], 9)]
    driver.run(jobs)
    return jobs


def logprobs_of(tokens: Sequence[Token]) -> list[float | None]:
    return [token.logprob for token in tokens]


def best_of(tokens: Sequence[Token]) -> list[list[int]]:
    return [[id for id, _ in token.top] for token in tokens]


@pytest.mark.parametrize("switch", ["off", "on"])
def test_an_adapter_that_goes_while_it_is_still_being_copied_leaves_nothing_to_the_next(
    folders: Folders, switch: str
) -> None:
    """A copy that lands late in layers that the next one does not adapt, and another does, would be taken
    for the next one's.
    """
    other, first, second = (plan_of(folders[name], folders[None]) for name in ("a3", "a1", "a0"))
    want = making.greedy(folders[None], folders["a0"], [3, 4, 5], 12)
    with device():
        runner = runner_on(folders[None], compile=switch)
        for plan in (other, first, second):
            runner.load_adapter(plan)
        runner.place_adapter(Placement(other.digest, 16, other.rank))
        runner.place_adapter(Placement(first.digest, 0, first.rank))
        runner.remove_adapter(first.digest)
        runner.place_adapter(Placement(second.digest, 0, second.rank))
        job = Job([3, 4, 5], 12, second.digest)
        RunnerDriver(runner, 1).run([job])
        assert job.ids == want


def test_an_adapter_that_is_forgotten_leaves_no_pinned_memory(
    folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch keeps what was freed for the next of that size, and others would pin as much again."""
    plan, left = plan_of(folders["a0"], folders[None]), []
    with device():
        runner = runner_on(folders[None])
        size = runner.load_adapter(plan)
        factor = weakref.ref(next(iter(runner.hosted[plan.digest].factors.values())).a)
        monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: left.append(factor()))
        assert runner.evict_adapter(plan.digest) == size
    assert left == [None]


def test_a_context_that_the_proof_does_not_fit_into_is_refused(folders: Folders) -> None:
    with device():
        runner_on(folders[None], max_context=selfcheck.PROBE)
        with pytest.raises(SettingsError, match="ADAPTERD_MAX_CONTEXT: 23 tokens are too few"):
            runner_on(folders[None], max_context=selfcheck.PROBE - 1)


def test_a_gpus_pool_is_made_once(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second would not fit beside the KV blocks, which were given what one leaves."""
    made: list[LoraPool] = []

    def note_pool(*given: Any) -> LoraPool:
        made.append(LoraPool(*given))
        return made[-1]

    monkeypatch.setattr("service.model.build.LoraPool", note_pool)
    with device():
        pool = runner_on(folders[None]).pool
    assert made == [pool]


@pytest.mark.parametrize("where", ["load", "attend", "Bank"])
def test_memory_that_runs_out_at_the_start_is_told(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with device(), monkeypatch.context() as patch:
        match where:
            case "load":
                patch.setattr("service.model.loading.load_base", full)
            case "attend":
                patch.setitem(AttentionInterface._global_mapping, kv.NAME, full)
            case "Bank":
                patch.setattr("service.model.build.LoraPool", full)
        with pytest.raises(SettingsError, match="a pool of 128 do not fit into the GPU's memory"):
            runner_on(folders[None])


# A CPU cannot count the tokens of their experts as a GPU does
WITH_EXPERTS = {"mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "hunyuan_v1_moe"}


@pytest.mark.parametrize("kind", sorted(FAMILIES.keys() - WITH_EXPERTS))
@pytest.mark.filterwarnings("ignore")
def test_every_family_is_recorded_and_says_what_generate_says(kind: str, tmp_path: Path) -> None:
    sizes, targets = FAMILIES[kind]
    base = random_base(tmp_path / "base", kind, sizes)
    folder = making.noise(tmp_path / "a", base, 1, targets, r=8, use_dora=True)
    plan = plan_of(folder, base)
    jobs = [Job([5, 6, 7], 12), Job([9] * 11, 12), Job([9] * 11, 12, plan.digest)]
    wants = [making.greedy(base, folder if job.adapter else None, job.prompt, job.n) for job in jobs]
    with device():
        runner = runner_on(base, max_context=None)
        driver = RunnerDriver(runner, 8)
        driver.place(plan)
        driver.run(jobs, chunk=64)
        assert [job.ids for job in jobs] == wants
        assert driver.waits == 0, "for the device, in mid-step"
        assert runner.graphs is not None


def test_a_base_that_asks_the_device_in_mid_step_runs_unrecorded(
    folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.llama.modeling_llama import LlamaMLP

    plain = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: plain(self, x) if float(x.sum()) < 1e30 else x)
    asked = ask(folders, None)
    with device() as gpu:
        assert answered(folders, asked).graphs is None
        assert gpu is None or (not gpu.filling and not +gpu.held), "the broken recording's memory is free"
        assert caplog.text.count("cannot be recorded") == 1
        # The cause of the break, not only that there was one
        assert "operation not permitted when stream is capturing" in caplog.text
        with pytest.raises(SettingsError, match="ADAPTERD_COMPILE: on"):
            runner_on(folders[None], compile="on")
        assert runner_on(folders[None], compile="off").graphs is None


@pytest.mark.parametrize("broken", [0, 5])
def test_a_replay_that_does_nothing_is_found_out(
    broken: int, folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whichever of the recordings it is."""
    with device(), monkeypatch.context() as patch:
        replay, count = torch.cuda.CUDAGraph.replay, iter(range(100))
        patch.setattr(torch.cuda.CUDAGraph, "replay", lambda self: next(count) == broken or replay(self))
        assert runner_on(folders[None]).graphs is None
    assert "graphs: off; the logits of the step that was tried differ" in caplog.text


@pytest.mark.parametrize("what", ["explain_absence", "_explain_difference"])
def test_where_a_kernel_cannot_be_used_steps_run_unrecorded_and_right(
    what: str, folders: Folders, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = ask(folders, "a2", "a0", None)
    with device(), monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(gpu_kernels, what, lambda *_: "no such luck")
        assert answered(folders, asked).graphs is None
        assert "no such luck" in caplog.text
        assert "graphs: off; steps are recorded only with the kernels" in caplog.text
        with pytest.raises(SettingsError, match="ADAPTERD_COMPILE: on, but decode steps"):
            runner_on(folders[None], compile="on")
