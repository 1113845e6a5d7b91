"""Adapters on the PEFT path say what PEFT says, beside a pool adapter and the base, and leave the
base's tensors as they were.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton
from service.core.adapter import Adapter, ExecutionPath
from service.core.manifest import compute_digest, read_manifest
from service.core.messages import AddAdapter, Submit
from service.core.request import Request
from service.core.sampling import Sampling
from service.engine.plan import Chunk
from service.errors import AdapterInvalid, AdapterUnsupported
from service.model.peft_fallback import build_peft_model
from service.model.runner import ModelRunner
from service.settings import Settings
from service.worker.loop import Worker
from tests import fakes, kinds, making
from tests.worker.test_loop import desk, tokens_of

from .driver import Job, RunnerDriver, plan_of
from .test_parity import are_empty, distance, prompts, quantized_logprobs, runner_on, weights_digest

PROMPTS, LENGTH = prompts()[2:6], 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("fallback") / "base", tie_word_embeddings=False)


@pytest.fixture(scope="module")
def skeleton(base: Path) -> Skeleton:
    return Skeleton(base)


def fallback_plan(folder: Path) -> Adapter:
    config, weights = folder / making.CONFIG, folder / making.WEIGHTS
    files, size = read_manifest(folder), weights.stat().st_size
    return Adapter(
        compute_digest(files), str(config), str(weights), ExecutionPath.SHADOW, 0, size, files=files
    )


@dataclass(frozen=True)
class SharedRunner:
    """A runner with a pool adapter in it, PEFT's answers of that one and of the base to each of
    PROMPTS, and the base's hash.
    """

    runner: ModelRunner
    driver: RunnerDriver
    pooled: str
    right: dict[str | None, list[list[int]]]
    hash: str


@pytest.fixture(scope="module")
def shared(base: Path, tmp_path_factory: pytest.TempPathFactory) -> SharedRunner:
    folder = making.noise(tmp_path_factory.mktemp("fallback") / "plain", base, 4)
    runner, pooled = runner_on(base), plan_of(folder, base)
    hash, driver = weights_digest(runner), RunnerDriver(runner, 8)
    driver.place(pooled)
    right = {
        None: making.answers(base, None, PROMPTS, LENGTH),
        pooled.digest: making.answers(base, folder, PROMPTS, LENGTH),
    }
    return SharedRunner(runner, driver, pooled.digest, right, hash)


@pytest.mark.parametrize("kind", kinds.SHADOW)
@pytest.mark.filterwarnings("ignore")
def test_an_adapter_on_the_peft_path_says_what_peft_says_and_its_neighbours_do_too(
    kind: str, shared: SharedRunner, base: Path, skeleton: Skeleton, tmp_path: Path
) -> None:
    """A10, A12, and all that runs beside the pool: read as the service reads it, mixed with the
    base and a pool adapter.
    """
    folder = kinds.SHADOW[kind](tmp_path / "fallback", base)
    fallback = validate_adapter(skeleton, folder, 64).adapter
    assert fallback.lane is ExecutionPath.SHADOW
    shared.runner.load_adapter(fallback)
    own = making.answers(base, folder, PROMPTS, LENGTH)
    assert own != shared.right[None], "the adapter changes nothing: a weak fixture"
    right = shared.right | {fallback.digest: own}
    jobs = [Job(prompt, LENGTH, name) for prompt in PROMPTS for name in right]
    shared.driver.run(jobs)
    for i, job in enumerate(jobs):
        assert job.ids == right[job.adapter][i // len(right)], job.adapter
    shared.runner.evict_adapter(fallback.digest)
    assert weights_digest(shared.runner) == shared.hash


PROMPT = tuple(PROMPTS[0])
DICE = Sampling(temperature=1.0, seed=3, frequency_penalty=2.0)
NULLABLE = {
    "bias",
    "rank_pattern",
    "alpha_pattern",
    "exclude_modules",
    "layers_to_transform",
    "inference_mode",
}


@pytest.mark.parametrize("kind", kinds.SHADOW)
@pytest.mark.filterwarnings("ignore")
def test_what_the_validator_accepts_the_worker_loads_however_the_config_is_written(
    kind: str, shared: SharedRunner, base: Path, skeleton: Skeleton, tmp_path: Path
) -> None:
    """Nulls, dropout and a byte order mark: PEFT itself would raise at some; validator and worker must
    say the same.
    """
    folder = kinds.SHADOW[kind](tmp_path / "fallback", base)
    right = making.answers(base, folder, PROMPTS[:1], LENGTH)
    write_oddly(folder / making.CONFIG)
    fallback = validate_adapter(skeleton, folder, 64).adapter
    shared.runner.load_adapter(fallback)
    job = Job(PROMPTS[0], LENGTH, fallback.digest)
    shared.driver.run([job])
    assert job.ids == right[0]
    shared.runner.evict_adapter(fallback.digest)


def write_oddly(config: Path) -> None:
    fields = json.loads(config.read_text(encoding="utf-8"))
    odd = fields | dict.fromkeys(fields.keys() & NULLABLE) | {"lora_dropout": 0.25}
    config.write_bytes(b"\xef\xbb\xbf" + json.dumps(odd).encode())


@pytest.mark.filterwarnings("ignore")
def test_a_tensor_that_peft_would_drop_is_refused(base: Path, tmp_path: Path) -> None:
    folder = kinds.SHADOW["IA3"](tmp_path / "ia3", base)
    odd = making.edit(
        folder,
        tmp_path / "odd",
        weights=lambda t: {key.replace("k_proj", "z_proj"): value for key, value in t.items()},
    )
    with pytest.raises(AdapterInvalid, match=r"missing: .*k_proj"):
        build_peft_model(making.load(base), fallback_plan(odd))


@pytest.mark.filterwarnings("ignore")
def test_a_saved_embedding_is_not_written_through_to_the_base(base: Path, tmp_path: Path) -> None:
    model = making.load(base)
    before = model.get_input_embeddings().weight.clone()
    folder = making.noise(tmp_path / "embedding", base, 5, modules_to_save=["embed_tokens"])
    build_peft_model(model, fallback_plan(folder))
    assert torch.equal(model.get_input_embeddings().weight, before)


@pytest.mark.filterwarnings("ignore")
def test_what_peft_would_write_into_the_base_is_refused(tmp_path: Path) -> None:
    """Biases that a type trains beside its own weights are the base's own tensors."""
    base = making.tiny(tmp_path / "biased", attention_bias=True)
    model = making.load(base)
    model.model.layers[0].self_attn.q_proj.bias.data.normal_()
    before = [weight.clone() for weight in model.parameters()]
    folder = kinds.other("OFT", r=0, oft_block_size=8, bias="oft_only")(tmp_path / "oft", base)
    with pytest.raises(AdapterUnsupported, match=r"q_proj\.base_layer\.bias into the base's own weights"):
        build_peft_model(model, fallback_plan(folder))
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_attention_layers_whose_blocks_nobody_would_share_is_refused(
    shared: SharedRunner, base: Path, tmp_path: Path
) -> None:
    for kind, maker in {
        "saved": kinds.lora(17, targets=("down_proj",), modules_to_save=["self_attn"]),
        "tuned": kinds.other("LN_TUNING", target_modules=["self_attn"]),
    }.items():
        with pytest.raises(AdapterUnsupported, match="what it keeps of sequences"):
            shared.runner.load_adapter(fallback_plan(maker(tmp_path / kind, base)))


@pytest.mark.filterwarnings("ignore")
def test_where_pefts_own_code_raises_its_adapter_fails_and_the_neighbours_do_not_notice(
    base: Path, skeleton: Skeleton, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The neighbours' choices depend on what they were given before: a token that was consumed
    twice would change them.
    """
    runner = runner_on(base)
    pooled = validate_adapter(skeleton, making.noise(tmp_path / "pooled", base, 4), 64).adapter
    bad = validate_adapter(skeleton, kinds.SHADOW["IA3"](tmp_path / "ia3", base), 64).adapter
    break_when_loaded(runner, bad, monkeypatch)
    settings = Settings(max_rows=8, max_context=512)

    def serve(connection: Any) -> int:
        return Worker(connection, runner, fakes.card(settings), settings).run_loop()

    with desk(serve) as parent:
        parent.send(AddAdapter(pooled, preload=True), AddAdapter(bad, preload=True))
        neighbours = [Request(id, PROMPT, 20, name, DICE) for id, name in enumerate((None, pooled.digest))]
        parent.send(*map(Submit, neighbours))
        alone, _, _ = tokens_of(parent, {0, 1})
        assert alone[0] != alone[1]
        parent.send(*(Submit(replace(neighbour, id=neighbour.id + 10)) for neighbour in neighbours))
        parent.send(*(Submit(Request(id, PROMPT, 9, bad.digest)) for id in (20, 21)))
        tokens, ends, _ = tokens_of(parent, {10, 11, 20, 21})
        assert [tokens[10], tokens[11]] == [alone[0], alone[1]]
        assert {ends[id].code for id in (20, 21)} == {"adapter_invalid"}
        assert all("its step raised ValueError" in ends[id].message for id in (20, 21))


def break_when_loaded(runner: ModelRunner, bad: Adapter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets every step of this adapter raise."""

    def load(adapter: Adapter) -> int:
        size = ModelRunner.load_adapter(runner, adapter)
        if adapter == bad:
            runner.hosted[adapter.digest].tree.register_forward_pre_hook(broken)
        return size

    monkeypatch.setattr(runner, "load_adapter", load)


@pytest.mark.filterwarnings("ignore")
def test_a_request_whose_own_step_raises_leaves_nothing_in_its_blocks(
    shared: SharedRunner, base: Path, tmp_path: Path
) -> None:
    fallback = fallback_plan(kinds.SHADOW["IA3"](tmp_path / "ia3", base))
    shared.runner.load_adapter(fallback)
    tree = shared.runner.hosted[fallback.digest].tree
    # All layers have written by then
    tree.get_output_embeddings().register_forward_pre_hook(broken)
    chunk = Chunk(Request(901, PROMPT, 1, fallback.digest), (3, 4), 0, PROMPT, True)
    with pytest.raises(ValueError, match="no such layer"):
        shared.runner.run_chunks((chunk,))
    assert are_empty(shared.runner, (3, 4), len(PROMPT))
    shared.runner.evict_adapter(fallback.digest)


def broken(module: nn.Module, args: object) -> None:
    raise ValueError("no such layer here")


PACKED = {
    "LOHA",
    "LOKR",
    "BEFT",
    "C3A",
    "DEFT",
    "DELORA",
    "FOURIERFT",
    "GLORA",
    "GRALORA",
    "HRA",
    "OSF",
    "PEANUT",
    "PSOFT",
    "TINYLORA",
}
PACKED |= {"VBLORA", "WAVEFT"}  # PEFT would take packed bytes for weights

DORA = "DoRA beside a saved head"
REPACKED = {
    ("HIRA", "nf4"),
    (DORA, "nf4"),
    (DORA, "int8"),
}  # PEFT would read what bitsandbytes has reordered, or take an int8 layer's scales


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_on_a_quantized_base_an_adapter_on_the_peft_path_runs_as_in_peft_or_is_refused_by_name(
    base: Path, skeleton: Skeleton, tmp_path: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B18: compared by log probabilities, for bitsandbytes rounds differently for other batches;
    nothing is merged into the base.
    """
    runner = runner_on(base, quantization=quantization)
    driver, before = RunnerDriver(runner, 2), weights_digest(runner)
    for kind, maker in kinds.SHADOW.items():
        folder = maker(tmp_path / kind.replace(" ", "-"), base)
        fallback = validate_adapter(skeleton, folder, 64).adapter
        if kind in PACKED or (kind, quantization) in REPACKED:
            check_refusal(runner, fallback, "use_dora" if "DoRA" in kind else kind)
            continue
        runner.load_adapter(fallback)
        job = Job(PROMPTS[3], 1, fallback.digest, prompt_logprobs=0)
        driver.run([job])
        right = quantized_logprobs(base, folder, quantization, job.prompt, monkeypatch)
        assert distance(job, right) < 0.05, kind
        runner.evict_adapter(fallback.digest)
    assert weights_digest(runner) == before


def check_refusal(runner: ModelRunner, fallback: Adapter, name: str) -> None:
    with pytest.raises(AdapterUnsupported, match=f"`{name}` on (this|a quantized) base"):
        runner.load_adapter(fallback)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
@pytest.mark.filterwarnings("ignore")
def test_switching_twenty_times_on_a_quantized_base_changes_nothing(
    base: Path, tmp_path: Path, quantization: str
) -> None:
    """B18: a pool adapter, one on the PEFT path and the base in turn say the same each time, and the packed
    weights stay.
    """
    runner = runner_on(base, quantization=quantization)
    driver, before = RunnerDriver(runner, 2), weights_digest(runner)
    pooled = plan_of(kinds.plain(tmp_path / "plain", base), base)
    beside = fallback_plan(kinds.SHADOW["lora_bias"](tmp_path / "beside", base))
    driver.place(pooled)
    runner.load_adapter(beside)
    rounds = []
    for _ in range(20):
        jobs = [Job(PROMPTS[1], LENGTH, name) for name in (pooled.digest, None, beside.digest)]
        for job in jobs:
            driver.run([job])
        rounds.append([job.ids for job in jobs])
    assert rounds == [rounds[0]] * 20
    assert len({tuple(said) for said in rounds[0]}) == 3
    assert weights_digest(runner) == before
