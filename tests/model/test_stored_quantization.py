"""Checkpoints that come quantized: served as they are stored, told as they are held, or refused in one line
that names the method and what it lacks.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

from service.core.base_info import BaseInfo
from service.errors import AdapterUnsupported, SettingsError
from service.model import base_size, loading, stored_quantization
from service.model.build import build_runner
from service.model.lora_pool import LoraPool
from service.model.lora_weights import dense_weight
from service.model.peft_fallback import build_peft_model
from service.model.runner import ModelRunner
from service.settings import Settings
from tests import kinds, making

from .driver import Job, RunnerDriver, plan_of
from .test_experts import EXPERTS
from .test_parity import distance, prompts, random_base
from .test_peft_fallback import fallback_plan

FILE = "model.safetensors"
BNB: dict[str, tuple[torch.dtype, dict[str, Any]]] = {
    "nf4": (torch.float32, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    "fp4": (torch.bfloat16, {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}),
    "int8": (torch.float32, {"load_in_8bit": True}),
}


def start(folder: Path, **settings: Any) -> tuple[ModelRunner, BaseInfo]:
    plain = {"device": "cpu", "dtype": "float32", "quantization": "auto", "compile": "off", "max_rows": 4}
    with making.quiet():
        chosen = Settings.model_validate(plain | {"base": str(folder)} | settings)
        return build_runner(chosen, loading.no_progress)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("stored") / "plain", tie_word_embeddings=False)


def stored_by_bitsandbytes(plain: Path, folder: Path, method: str) -> Path:
    dtype, how = BNB[method]
    with making.quiet():
        model = AutoModelForCausalLM.from_pretrained(
            plain, quantization_config=BitsAndBytesConfig(**how), dtype=dtype, device_map="cpu"
        )
        model.save_pretrained(folder)
    return folder


def claiming(plain: Path, folder: Path, stored: Any) -> Path:
    """The plain base, whose config says that its weights are stored so."""
    shutil.copytree(plain, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": stored}))
    return folder


@torch.no_grad()
def own_logprobs(folder: Path, adapter: Path | None, prompt: list[int], dtype: torch.dtype) -> Tensor:
    """Of the prompt, by transformers and PEFT on the checkpoint as it is stored."""
    with making.quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, device_map="cpu").eval()
        asked = torch.tensor([prompt])
        if getattr(model, "is_loaded_in_8bit", False):  # its layers lose their scales when PEFT comes first
            model(input_ids=asked)
        model = PeftModel.from_pretrained(model, adapter).eval() if adapter else model
        logprobs: Tensor = model(input_ids=asked).logits[0].float().log_softmax(-1)
    return logprobs[:-1].gather(1, asked[0, 1:, None])[:, 0]


def check_answers(runner: ModelRunner, folder: Path, adapter: Path, plain: Path) -> None:
    """Base and adapter, in one batch, say what PEFT says on the checkpoint itself."""
    plan = plan_of(adapter, plain)
    driver = RunnerDriver(runner, 4)
    driver.place(plan)
    jobs = {name: Job(prompts()[4], 2, name, prompt_logprobs=0) for name in (None, plan.digest)}
    driver.run(list(jobs.values()))
    for name, job in jobs.items():
        want = own_logprobs(folder, adapter if name else None, list(job.prompt), runner.pool.dtype)
        assert distance(job, want) < 0.05, name
    assert distance(jobs[None], want) > 0.5, "a weak fixture"


@pytest.mark.parametrize("method", BNB)
@pytest.mark.filterwarnings("ignore")
def test_what_bitsandbytes_has_stored_is_served_and_told_as_it_is(
    method: str, plain: Path, tmp_path: Path
) -> None:
    folder = stored_by_bitsandbytes(plain, tmp_path / "base", method)
    runner, card = start(folder)
    assert card.quantization == method
    weights = [tensor for name, tensor in load_file(folder / FILE).items() if "proj" in name]
    assert 0 < card.quantized_bytes <= sum(tensor.nbytes for tensor in weights)
    assert card.dtype == str(BNB[method][0]).removeprefix("torch.")
    check_answers(runner, folder, making.noise(tmp_path / "a", plain, 1), plain)
    beside = kinds.SHADOW["lora_bias"](tmp_path / "beside", plain)
    check_beside(runner, folder, beside)


def check_beside(runner: ModelRunner, folder: Path, adapter: Path) -> None:
    """An adapter on PEFT's path says what PEFT says, and the base the same after it came as before."""
    plan, driver = fallback_plan(adapter), RunnerDriver(runner, 4)
    before, after = (Job(prompts()[4], 2, None, prompt_logprobs=0) for _ in range(2))
    driver.run([before])
    runner.load_adapter(plan)
    job = Job(prompts()[4], 2, plan.digest, prompt_logprobs=0)
    driver.run([job])
    assert distance(job, own_logprobs(folder, adapter, list(job.prompt), runner.pool.dtype)) < 0.05
    driver.run([after])
    assert [token.logprob for token in after.prompt_tokens] == [
        token.logprob for token in before.prompt_tokens
    ]


@pytest.mark.parametrize("setting", ["none", "nf4", "int8"])
@pytest.mark.parametrize("method", BNB)
def test_a_setting_that_the_checkpoint_contradicts_is_refused(
    method: str, setting: str, plain: Path, tmp_path: Path
) -> None:
    stored = {"quant_method": "bitsandbytes"} | BNB[method][1]
    folder = claiming(plain, tmp_path / "base", stored)
    values = {"base": str(folder), "quantization": setting}
    if setting == method:
        loading.read_config(folder, Settings.model_validate(values))
        return
    said = rf"^ADAPTERD_BASE: '.*' cannot be loaded: it is stored in {method}, which "
    with pytest.raises(SettingsError, match=rf"{said}ADAPTERD_QUANTIZATION={setting} cannot change"):
        start(folder, quantization=setting)


@pytest.mark.parametrize("method", stored_quantization.PACKAGES)
def test_a_method_whose_package_is_not_there_is_refused_by_both_names(
    method: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert method in AUTO_QUANTIZATION_CONFIG_MAPPING
    monkeypatch.setattr(stored_quantization, "_is_installed", lambda name: False)
    folder = claiming(plain, tmp_path / "base", {"quant_method": method, "bits": 4})
    packages = " ".join(stored_quantization.PACKAGES[method].values())
    said = rf"^ADAPTERD_BASE: '.*' cannot be loaded: it is quantized by {method}, which needs {packages}: pip"
    with pytest.raises(SettingsError, match=said):
        start(folder)


@pytest.mark.parametrize(
    ("stored", "why"),
    [
        ({"quant_method": "modelopt"}, "quantized by 'modelopt', a method that transformers does not know"),
        ({"bits": 4}, "its `quantization_config` names no `quant_method`"),
        ("gptq", "its `quantization_config` is no object"),
        ({"quant_method": "fouroversix"}, "fouroversix"),
        ({"quant_method": "bitnet"}, "weight_scale"),
        ({"quant_method": "gemma", "num_bits": 4}, "gemma"),
    ],
    ids=str,
)
def test_any_other_method_is_refused_in_one_line(stored: Any, why: str, plain: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^ADAPTERD_BASE: .*$") as refused:
        start(claiming(plain, tmp_path / "gemma", stored))
    assert why in str(refused.value)


# ---- FP8


def stored_in_fp8(plain: Path, folder: Path) -> Path:
    """Each matrix in e4m3 with one scale for all of it, as it has no more than one block of 128 by 128."""
    stored = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    claiming(plain, folder, stored)
    tensors: dict[str, Tensor] = {}
    for name, weight in load_file(plain / FILE).items():
        tensors[name] = weight
        if "proj" in name:
            scale = weight.abs().amax() / torch.finfo(torch.float8_e4m3fn).max
            tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})
    return folder


@pytest.mark.filterwarnings("ignore")
def test_an_fp8_checkpoint_is_plain_weights_on_a_cpu_and_is_measured_and_told_so(
    plain: Path, tmp_path: Path
) -> None:
    folder = stored_in_fp8(plain, tmp_path / "base")
    runner, card = start(folder)
    assert (card.quantization, card.quantized_bytes) == ("none", 0)
    measured = base_size._measure_folder(folder, torch.float32, "nf4")
    assert measured == pytest.approx(sum(card.resident_bytes.values()), rel=0.01)
    on_gpu = base_size._measure_folder(folder, torch.float32, "nf4", "cuda")
    assert on_gpu == (folder / FILE).stat().st_size
    check_answers(runner, folder, making.noise(tmp_path / "a", plain, 1), plain)


# ---- layers of a class of its own, as GPTQ's and AWQ's are


class PackedLinear(nn.Module):
    """A linear layer of 8-bit values [out, in] and a scale for each output, and no `weight`."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        scales = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("qweight", (layer.weight.detach() / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    qweight: Tensor
    scales: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, (self.qweight * self.scales).to(x.dtype))


@pytest.fixture
def packed(plain: Path) -> Any:
    """The plain base, whose projections are packed, and whose config says by whom."""
    model = making.load(plain)
    for name, layer in list(model.named_modules()):
        if "proj" in name:
            model.set_submodule(name, PackedLinear(layer))
    model.config.quantization_config = {"quant_method": "gptq"}
    return model.requires_grad_(False)


def test_packed_layers_are_told_by_their_method_and_bytes(packed: Any) -> None:
    layers = [layer for layer in packed.modules() if isinstance(layer, PackedLinear)]
    assert len(list(loading.iterate_linears(packed))) == len(layers) + 1  # and the head
    assert loading.held_quantization(packed) == "gptq"
    size = sum(layer.qweight.nbytes + layer.scales.nbytes for layer in layers)
    assert loading.quantized_bytes(packed) == size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_packed_layers_computes_in_the_pools_dtype(
    packed: Any, plain: Path, dtype: torch.dtype
) -> None:
    pool = LoraPool(packed.to(dtype), 8, dtype, torch.device("cpu"))
    assert {layer.pool_a.dtype for layer in pool.layers.values()} == {dtype}
    assert len(pool.layers) == 15


def test_a_layer_in_fp8_is_adapted_in_the_pools_dtype(plain: Path) -> None:
    model = making.load(plain).bfloat16().requires_grad_(False)
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    pool = LoraPool(model, 8, torch.bfloat16, torch.device("cpu"))
    assert {layer.pool_a.dtype for layer in pool.layers.values()} == {torch.bfloat16}


def test_what_would_have_to_read_packed_weights_is_refused_by_name(
    packed: Any, plain: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterUnsupported, match="`use_dora` is not served on PackedLinear"):
        dense_weight(packed.model.layers[0].mlp.up_proj)
    folder = kinds.SHADOW["LOHA"](tmp_path / "loha", plain)
    with making.quiet(), pytest.raises(AdapterUnsupported, match="`LOHA` on this base"):
        build_peft_model(packed, fallback_plan(folder))


@pytest.mark.filterwarnings("ignore")
def test_peft_is_not_let_read_a_layer_in_fp8(plain: Path, tmp_path: Path) -> None:
    model = making.load(plain).requires_grad_(False)
    layer = model.model.layers[0].self_attn.q_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), requires_grad=False)
    folder = kinds.SHADOW["LOHA"](tmp_path / "loha", plain)
    with pytest.raises(AdapterUnsupported, match="on a quantized base"):
        build_peft_model(model, fallback_plan(folder))


# ---- experts

LEAST: dict[str, Callable[[int], float]] = {"nf4": lambda count: count / 2, "int8": lambda count: count}


@pytest.mark.parametrize("method", LEAST)
@pytest.mark.filterwarnings("ignore")
def test_experts_that_stay_as_they_are_are_told_in_bytes(method: str, tmp_path: Path) -> None:
    base = random_base(tmp_path / "base", "qwen3_moe", EXPERTS["qwen3_moe"] | {"moe_intermediate_size": 32})
    _, card = start(base, quantization=method)
    experts = [tensor for name, tensor in load_file(base / FILE).items() if ".experts." in name]
    assert card.quantization == method
    assert card.plain_expert_bytes == sum(tensor.nbytes for tensor in experts)
    linears = sum(kind.in_features * kind.out_features * kind.count for kind in card.linears)
    head = card.hidden_size * card.vocab_size
    least = LEAST[method](linears - head)
    # Where bitsandbytes does not repack for the processor, each small layer has a table of 1 kB
    assert least <= card.quantized_bytes < 2 * least
    assert card.quantized_bytes + card.plain_expert_bytes < sum(card.resident_bytes.values())


@pytest.mark.filterwarnings("ignore")
def test_a_plain_base_has_nothing_quantized(plain: Path) -> None:
    _, card = start(plain)
    assert (card.quantization, card.quantized_bytes, card.plain_expert_bytes) == ("none", 0, 0)
