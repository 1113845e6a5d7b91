"""Every served token equals plain PEFT's, whatever is in the batch, in the pool, or was there
before.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import dora
from peft.utils.integrations import dequantize_module_weight
from transformers import AutoConfig, AutoModelForCausalLM

from service.core.adapter import Adapter, ExecutionPath, Placement, WeightedPart
from service.core.request import Request
from service.core.sampling import Sampling
from service.engine.plan import Chunk
from service.errors import AdapterInvalid, SettingsError
from service.model.build import build_runner
from service.model.loading import load_base
from service.model.lora_pool import LoraPool
from service.model.lora_weights import read_weights
from service.model.runner import ModelRunner
from service.model.step_layout import SequenceStep
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver, plan_of

Folders = dict[str | None, Path]  # None: the base
Q0 = "layers.0.self_attn.q_proj"
SHAPES: list[dict[str, Any]] = [
    {},
    {"targets": ("q_proj", "k_proj", "v_proj", "o_proj"), "r": 16, "alpha": 32},
    {"targets": "all-linear", "r": 8},
    {"r": 16, "use_rslora": True},
    {"targets": ("q_proj", "up_proj", "down_proj"), "use_dora": True},
    {"rank_pattern": {Q0: 16}, "alpha_pattern": {Q0: 4}},
    {"targets": ("gate_proj", "up_proj", "down_proj"), "r": 64, "std": 0.05},
    {"targets": ("lm_head",), "r": 1, "std": 1.0, "save": {"save_embedding_layers": False}},
]


def prompts() -> list[list[int]]:
    source = random.Random(3)
    return [[source.randrange(3, 250) for _ in range(length)] for length in (1, 2, 5, 9, 17, 30, 44, 61)]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """TINY and one adapter of it of each shape; None is the base."""
    root = tmp_path_factory.mktemp("parity")
    base = making.tiny(root / "base", tie_word_embeddings=True)
    made: Folders = {None: base}
    for i, shape in enumerate(SHAPES):
        made[f"a{i}"] = making.noise(root / f"a{i}", base, 100 + i, **shape)
    return made


def runner_on(base: Path, **settings: Any) -> ModelRunner:
    plain = {"device": "cpu", "dtype": "float32", "quantization": "none", "compile": "off", "max_rows": 8}
    chosen = Settings.model_validate(plain | {"base": str(base)} | settings)
    return build_runner(chosen, lambda stage, fraction: None)[0]


def test_eight_adapters_and_the_base_in_one_changing_batch_say_what_peft_says(
    folders: Folders,
) -> None:
    runner = runner_on(folders[None])
    driver = RunnerDriver(runner, 8)
    plans = {name: plan_of(folder, folders[None]) for name, folder in folders.items() if name}
    for plan in plans.values():
        driver.place(plan)
    jobs = []
    for name in folders:
        digest = plans[name].digest if name else None
        jobs += [(name, Job(prompt, 5 + i % 4, digest)) for i, prompt in enumerate(prompts())]
    random.Random(0).shuffle(jobs)
    driver.run([job for _, job in jobs])
    for name, job in jobs:
        folder = folders[name] if name else None
        assert job.ids == making.greedy(folders[None], folder, job.prompt, job.n), name


def test_an_adapter_placed_where_another_was_finds_nothing_of_it(folders: Folders) -> None:
    runner = runner_on(folders[None], pool_rank=64, max_rank=64)
    driver = RunnerDriver(runner, 8)
    source = random.Random(5)
    plans = {name: plan_of(folder, folders[None]) for name, folder in folders.items() if name}
    prompt = prompts()[4]
    want = {name: making.greedy(folders[None], folders[name], prompt, 6) for name in plans}
    for _ in range(50):
        name = source.choice(list(plans))
        driver.place(plans[name], source.randrange(0, 64 - plans[name].pool_rows + 1))
        job, plain = Job(prompt, 6, plans[name].digest), Job(prompt, 2)
        driver.run([job, plain])
        assert job.ids == want[name], name
        driver.remove(plans[name].digest)
    assert not any(holds_numbers(layer) for layer in runner.pool.layers.values())


@pytest.mark.parametrize("weights", [(0.7, 0.3), (0.5, -1.2), (1.0, 1.0, 0.25)])
def test_a_mix_says_what_peft_says_of_its_parts_joined(
    folders: Folders, weights: tuple[float, ...], tmp_path: Path
) -> None:
    base, names = folders[None], ("a1", "a2", "a3")
    runner = runner_on(base)
    driver = RunnerDriver(runner, 4)
    parts = [plan_of(folders[name], base) for name, _ in zip(names, weights, strict=False)]
    weighted = tuple(map(WeightedPart, parts, weights))
    rank, size = sum(part.rank for part in parts), sum(part.size for part in parts)
    mix = Adapter("sha256:mix", "", "", ExecutionPath.POOL, rank, size, parts=weighted)
    driver.place(mix)
    driver.place(parts[0])
    jobs = [Job(prompts()[i], 6, digest) for i in (3, 6) for digest in (mix.digest, parts[0].digest, None)]
    driver.run(jobs)
    joined = making.mixed(
        [(folders[name], w) for name, w in zip(names, weights, strict=False)], base, tmp_path
    )
    wanted = {mix.digest: joined, parts[0].digest: folders["a1"], None: None}
    for job in jobs:
        assert job.ids == making.greedy(base, wanted[job.adapter], job.prompt, 6)


def test_a_part_whose_weight_makes_it_overflow_is_refused(folders: Folders) -> None:
    part = plan_of(folders["a0"], folders[None])
    weighted = (WeightedPart(part, 1e300), WeightedPart(part, 1.0))
    mix = Adapter("sha256:mix", "", "", ExecutionPath.POOL, 2 * part.rank, part.size, parts=weighted)
    with pytest.raises(AdapterInvalid, match="1e\\+300"):
        runner_on(folders[None]).load_adapter(mix)


def test_a_dora_adapter_without_a_row_for_its_gate_is_refused(folders: Folders) -> None:
    plan = plan_of(folders["a4"], folders[None])
    rank = plan.rank
    runner_on(folders[None], pool_rank=rank + 1, max_rank=rank).load_adapter(plan)
    runner = runner_on(folders[None], pool_rank=rank, max_rank=rank)
    with pytest.raises(AdapterInvalid, match=f"rank {rank} and DoRA's gate take {rank + 1} rows"):
        runner.load_adapter(plan)


def holds_numbers(layer: Any) -> bool:
    """Whether anything of an adapter is left in a layer."""
    return bool(layer.pool_a.any() or layer.pool_b.any() or getattr(layer, "gates", None))


def test_a_layer_that_its_model_keeps_in_float32_is_adapted_in_float32(
    folders: Folders,
) -> None:
    base, plan = folders[None], plan_of(folders["a1"], folders[None])
    model = making.load(base).to(torch.bfloat16)
    kept = model.model.layers[1].self_attn.q_proj.float()
    kept.register_forward_pre_hook(lambda layer, args: (args[0].float(),))
    pool = LoraPool(model, 64, torch.bfloat16, torch.device("cpu"))
    own = pool.layers["model.layers.1.self_attn.q_proj"]
    with torch.inference_mode():
        pool.place_adapter(Placement(plan.digest, 0, plan.pool_rows), read_weights(plan, pool))
        pool.begin_step([SequenceStep([1, 2, 3], 0, [0], plan.digest)])
        x = torch.randn(1, 3, 64, dtype=torch.bfloat16)
        modules = dict(making.served(base, folders["a1"]).named_modules())
        lora = modules["base_model.model.model.layers.1.self_attn.q_proj"]
        assert own(x).dtype == torch.float32
        assert torch.allclose(own(x), kept(x) + lora(x.float()) - lora.base_layer(x.float()), atol=0.05)


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_on_a_quantized_base_adapters_say_what_peft_says_on_the_same_base(
    folders: Folders, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared by log probabilities: bitsandbytes' CPU kernels round differently for other batch
    sizes, so tokens may part at ties.
    """
    base = folders[None]
    runner = runner_on(base, quantization=quantization)
    driver = RunnerDriver(runner, 8)
    before = weights_digest(runner)
    # PEFT's own DoRA cannot run on bitsandbytes' int8 layers on a CPU
    names = (None, "a1", "a2") if quantization == "int8" else (None, "a1", "a2", "a4")
    jobs = [job for name in names for job in scored_jobs(driver, folders, name)]
    driver.run([job for _, job in jobs])
    plain = {len(job.prompt): job for name, job in jobs if name is None}
    for name, job in jobs:
        folder = folders[name] if name else None
        want = quantized_logprobs(base, folder, quantization, job.prompt, monkeypatch)
        assert distance(job, want) < 0.05, name
        change = distance(plain[len(job.prompt)], want)
        assert name is None or change > 0.5, "the adapter changes next to nothing: a weak fixture"
    assert weights_digest(runner) == before


def scored_jobs(driver: RunnerDriver, folders: Folders, name: str | None) -> list[tuple[str | None, Job]]:
    """Places the adapter; jobs for the log probabilities of a few prompts under it."""
    digest = None
    if name:
        plan = plan_of(folders[name], folders[None])
        driver.place(plan)
        digest = plan.digest
    return [(name, Job(prompt, 2, digest, prompt_logprobs=0)) for prompt in prompts()[3:7]]


def distance(job: Job, want: torch.Tensor) -> float:
    """The mean difference of the prompt's log probabilities, in nats."""
    told = [token.logprob for token in job.prompt_tokens[1:]]
    return float((torch.tensor(told) - want).abs().mean())


def weights_digest(runner: ModelRunner) -> str:
    hashed = sha256()
    for tensor in runner.pool.tree.parameters():
        hashed.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def give_dora_weights(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for layer in model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
    weights = {id(layer): dequantize_module_weight(layer) for layer in layers}

    def dequantize(layer: Any) -> Any:
        return weights[id(layer)] if id(layer) in weights else dequantize_module_weight(layer)

    monkeypatch.setattr(dora, "dequantize_module_weight", dequantize)


@torch.no_grad()
def quantized_logprobs(
    base: Path,
    adapter: Path | None,
    quantization: str,
    prompt: Sequence[int],
    monkeypatch: pytest.MonkeyPatch,
) -> torch.Tensor:
    """PEFT on a base of its own.

    Its DoRA is given the weights as they were before bitsandbytes repacked them, which it would
    misread.
    """
    with making.quiet():
        settings = {"device": "cpu", "dtype": "float32", "quantization": quantization}
        model: Any = load_base(base, Settings.model_validate(settings), lambda stage, fraction: None)
        give_dora_weights(model, monkeypatch)
        asked = torch.tensor([list(prompt)])
        # Int8 layers lose their scales when PEFT touches them before their first forward
        model(input_ids=asked)
        model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
        logprobs: torch.Tensor = model(input_ids=asked).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(1, asked[0, 1:, None])[:, 0]


SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SIZES |= {
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
GPT2 = {
    "vocab_size": 256,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_OSS = {"head_dim": 16, "intermediate_size": 32, "num_local_experts": 4, "sliding_window": 8}
LATENT = {  # keys of 24, values of 16
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
}
DEEPSEEK = LATENT | {
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 32,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
FAMILIES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mistral": (SIZES | {"sliding_window": 8}, ("q_proj", "down_proj")),
    "mixtral": (SIZES | {"num_local_experts": 4}, ("q_proj", "o_proj")),
    "qwen2": (SIZES, ("q_proj", "k_proj", "up_proj")),
    "qwen3": (SIZES | {"head_dim": 16}, ("q_proj", "v_proj")),
    "gemma2": (
        SIZES | {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
        ("q_proj", "o_proj"),
    ),
    "gemma3_text": (SIZES | {"head_dim": 16, "sliding_window": 8}, ("q_proj", "o_proj")),
    "phi3": (SIZES, ("qkv_proj", "gate_up_proj")),
    "gpt_neox": (SIZES, ("query_key_value", "dense")),
    "gpt2": (GPT2, ("c_attn", "c_proj")),
    "olmo": (SIZES, ("q_proj",)),
    "cohere": (SIZES, ("v_proj",)),
    "starcoder2": (SIZES, ("q_proj", "c_fc")),
    "opt": (SIZES | {"ffn_dim": 128, "word_embed_proj_dim": 64}, ("q_proj", "fc1")),
    "stablelm": (SIZES, ("q_proj", "down_proj")),
    "gpt_oss": (SIZES | GPT_OSS, ("q_proj", "o_proj")),
    "deepseek_v2": (SIZES | DEEPSEEK, ("q_a_proj", "kv_b_proj", "o_proj")),
    "deepseek_v3": (SIZES | DEEPSEEK, ("q_b_proj", "kv_a_proj_with_mqa")),
    "minicpm3": (SIZES | LATENT, ("q_b_proj", "kv_b_proj", "down_proj")),
    "hunyuan_v1_moe": (SIZES | {"head_dim": 16, "num_experts": 4, "moe_topk": 2}, ("q_proj", "wg")),
}


# Layers with states of their own, among them such with attention beside them
DELTA = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MAMBA = {
    "num_hidden_layers": 2,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}
LFM2 = {"layer_types": ["conv", "full_attention"] * 2, "block_auto_adjust_ff_dim": False}
MAMBA2 = {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 8}
QWEN3_NEXT = DELTA | {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
}
NEMOTRON_H = {
    "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "ssm_state_size": 16,
    "n_groups": 2,
    "chunk_size": 8,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 32,
}
KIMI = LATENT | {
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "num_experts": 4,
    "num_experts_per_token": 2,
    "moe_intermediate_size": 32,
}
STATEFUL: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "qwen3_5_text": (SIZES | DELTA, ("in_proj_qkv", "in_proj_b", "out_proj", "q_proj", "down_proj")),
    "qwen3_next": (SIZES | QWEN3_NEXT, ("in_proj_qkvz", "out_proj", "v_proj")),
    "lfm2": (SIZES | LFM2, ("in_proj", "out_proj", "k_proj")),
    "granitemoehybrid": (
        SIZES | MAMBA | {"layer_types": ["linear_attention", "full_attention"], "num_local_experts": 4},
        ("in_proj", "o_proj"),
    ),
    "bamba": (SIZES | MAMBA | {"attn_layer_indices": [1]}, ("in_proj", "out_proj", "gate_proj")),
    "falcon_h1": (SIZES | MAMBA | {"mamba_d_ssm": 128, "head_dim": 16}, ("in_proj", "q_proj")),
    "nemotron_h": (SIZES | NEMOTRON_H, ("in_proj", "q_proj", "up_proj")),
    "mamba2": (SIZES | MAMBA2, ("in_proj",)),
    "olmo_hybrid": (SIZES | DELTA, ("q_proj", "o_proj", "a_proj")),
    "kimi_linear": (SIZES | KIMI, ("q_proj", "o_proj")),
}


def random_base(folder: Path, kind: str, sizes: dict[str, Any]) -> Path:
    torch.manual_seed(4)
    with making.quiet():
        config = AutoConfig.for_model(
            kind,
            **{k: v for k, v in sizes.items() if not (kind == "gpt_neox" and k == "num_key_value_heads")},
        )
        model = AutoModelForCausalLM.from_config(config).float()
        for name, weight in model.named_parameters():
            if "norm" in name:  # all ones, they could be taken for each other
                weight.data.mul_(torch.empty_like(weight).uniform_(0.5, 1.5))
        model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", FAMILIES | STATEFUL)
@pytest.mark.filterwarnings("ignore")
def test_every_family_says_what_generate_says_with_and_without_adapters(kind: str, tmp_path: Path) -> None:
    sizes, targets = (FAMILIES | STATEFUL)[kind]
    base = random_base(tmp_path / "base", kind, sizes)
    adapters = [
        making.noise(tmp_path / f"a{i}", base, i, targets, r=4 + 4 * i, use_dora=i == 1) for i in range(2)
    ]
    driver = RunnerDriver(runner_on(base), 8)
    jobs: list[tuple[Path | None, Job]] = [(None, Job(p, 6)) for p in prompts()[3:6]]
    for folder in adapters:
        plan = plan_of(folder, base)
        driver.place(plan)
        jobs += [(folder, Job(p, 6, plan.digest)) for p in prompts()[3:6]]
    driver.run([job for _, job in jobs])
    for adapter, job in jobs:
        assert job.ids == making.greedy(base, adapter, job.prompt, job.n), adapter


@pytest.mark.parametrize("kind", ["falcon", "bloom"])
@pytest.mark.filterwarnings("ignore")
def test_a_base_with_other_attention_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    named = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: SIZES[name] for name in named}
    base = random_base(tmp_path / "base", kind, sizes)
    with pytest.raises(SettingsError, match=rf"ADAPTERD_BASE: (?i:{kind})ForCausalLM is not supported"):
        runner_on(base)


def test_prompt_and_answer_logprobs_are_those_of_a_direct_forward(folders: Folders) -> None:
    driver = RunnerDriver(runner_on(folders[None]), 4)
    job = Job(prompts()[5], 4, None, Sampling(logprobs=3), prompt_logprobs=0)
    driver.run([job, Job(prompts()[4], 8)])
    with torch.no_grad():
        ids = [*job.prompt, *job.ids]
        want = making.load(folders[None])(torch.tensor([ids])).logits[0].log_softmax(-1)
    got = [*job.prompt_tokens, *job.tokens]
    assert [token.id for token in got] == ids
    assert got[0].logprob is None
    for i, token in enumerate(got[1:], 1):
        assert token.logprob == pytest.approx(float(want[i - 1, ids[i]]), abs=1e-4)
    for i, token in enumerate(job.tokens, len(job.prompt)):
        assert [t for t, _ in token.top] == want[i - 1].topk(3).indices.tolist()


def test_a_shared_block_goes_on_as_in_the_sequence_it_came_from(folders: Folders) -> None:
    runner = runner_on(folders[None])
    prompt = tuple(prompts()[6])
    whole, part = Request(1, prompt, 1), Request(2, (*prompt[:32], 9, 9), 1)
    runner.run_chunks((Chunk(whole, (5, 2, 9), 0, prompt, True),))
    (result,) = runner.run_chunks((Chunk(part, (5, 2, 7), 32, (9, 9), True),))
    assert result.token is not None
    assert [result.token.id] == making.greedy(folders[None], None, part.prompt, 1)


def test_a_resident_adapter_runs_on_when_it_has_left_host_memory(folders: Folders) -> None:
    runner = runner_on(folders[None])
    driver = RunnerDriver(runner, 2)
    plan = plan_of(folders["a0"], folders[None])
    driver.place(plan)
    runner.evict_adapter(plan.digest)
    job = Job(prompts()[3], 4, plan.digest)
    driver.run([job])
    assert job.ids == making.greedy(folders[None], folders["a0"], job.prompt, 4)


@pytest.mark.parametrize(
    ("sampled", "scored"),
    [(True, None), (False, None), (False, 0)],
    ids=["sampled", "in the middle", "only scored"],
)
def test_an_adapter_whose_numbers_overflow_fails_alone_and_leaves_nothing_in_its_blocks(
    folders: Folders, tmp_path: Path, sampled: bool, scored: int | None
) -> None:
    base, prompt = folders[None], tuple(prompts()[4])
    runner = runner_on(base)
    driver, plan = RunnerDriver(runner, 2), plan_of(overflowing(folders["a0"], tmp_path / "wild"), base)
    driver.place(plan)
    bad, good = Request(101, prompt, 4, plan.digest, prompt_logprobs=scored), Request(102, prompt, 4)
    chunks = Chunk(bad, (0, 3), 0, prompt, sampled), Chunk(good, (1, 2), 0, prompt, True)
    failed, fine = runner.run_chunks(chunks)
    assert "not finite" in failed.error
    assert fine.token is not None
    assert [fine.token.id] == making.greedy(base, None, prompt, 1)
    assert are_empty(runner, (0, 3), len(prompt))


def overflowing(folder: Path, target: Path) -> Path:
    def raise_b(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {key: tensor * 1e38 if "lora_B" in key else tensor for key, tensor in tensors.items()}

    return making.edit(folder, target, weights=raise_b)


def are_empty(runner: ModelRunner, blocks: tuple[int, ...], positions: int) -> bool:
    """Whether nothing is kept of so many positions from the first block's start on."""
    buffers = [each for layer, *_ in runner.attention for each in (layer.kv_keys, layer.kv_values)]
    held = [buffer[list(blocks)].transpose(1, 2).flatten(0, 1)[:positions] for buffer in buffers]
    return not any(part.any() for part in held)
