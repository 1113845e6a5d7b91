"""Tiny random models of every architecture that transformers has, and what the service makes of them.

`python -m tests.model.families` tries them all, one after the other, and writes docs/bases.md; with model
types, it writes their rows anew. Knows the start of the service, its validator and its runner, and PEFT,
which they are compared with.
"""

from __future__ import annotations

import logging
import os
import random
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from service.base_config import auto_class, read_base_config
from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton, linear_shape
from service.core.adapter import ExecutionPath
from service.core.base_info import BaseInfo, name_pattern
from service.errors import SettingsError
from service.model.build import build_runner
from service.model.runner import ModelRunner
from service.model.small_model import shrink_config, stir_weights
from service.settings import Settings
from tests import making

from .driver import Job, RunnerDriver

PAGE = Path(__file__).parents[2] / "docs" / "bases.md"
CONTEXT = 128  # tokens, of the served base
LONGEST = 1 << 20  # every threshold of a config is below it, and becomes one of a few tokens
MOST_PARAMETERS = 150_000_000
PROMPTS, ANSWER = (9, 17, 30), 8  # tokens
SERVED = "served"

# Config fields whose defaults do not make a model, or one that cannot be shrunk
SMALL: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = SMALL | {"mamba_n_heads": 8, "mamba_d_head": 16, "num_hidden_layers": 2}
GEMMA4: dict[str, Any] = {"num_hidden_layers": 6, "num_kv_shared_layers": 0}
FIELDS: dict[str, dict[str, Any]] = {
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 200},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "dory": {"num_hidden_layers": 4, "n_input_layers": 1, "n_recurrent_layers": 2, "n_output_layers": 1},
    "gemma4": {"text_config": GEMMA4},
    "gemma4_text": GEMMA4,
    "gemma4_unified": {"text_config": GEMMA4},
    "gemma4_unified_text": GEMMA4,
    "granitemoehybrid": MAMBA | {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "llama4": {"text_config": {"floor_scale": 1 << 21}},  # acts on no served context
    "llama4_text": {"floor_scale": 1 << 21},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2, "num_dense_layers": 1},
    "mamba2": {"hidden_size": 64, "num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": SMALL | {"head_dim": 16},
    "rwkv": {"hidden_size": 64, "attention_hidden_size": 64},
    "xlstm": {"hidden_size": 64, "num_heads": 4, "num_blocks": 2},
}


class Verdict(NamedTuple):
    """What came of one architecture: a row of the page.

    `told`: how many answers are PEFT's, and where adapters run that are not all in the pool; or why it is not
    served.
    """

    kind: str
    name: str
    state: str  # served, refused, not made, fails
    told: str


def all_kinds() -> tuple[list[str], list[str]]:
    """The model types of causal language models, and of those that see images and have no such class."""
    causal = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return causal, [kind for kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES if kind not in causal]


def class_name(kind: str) -> str:
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)
    return str(name or MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[kind])


def make_tiny(kind: str, folder: Path) -> None:
    """Saves a random float32 model of the class's own defaults, shrunk, with windows of a few tokens.

    Raises whatever its class raises, and ValueError where it stays large.
    """
    config = CONFIG_MAPPING[kind](**FIELDS.get(kind, {}))
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    config = shrink_config(config, LONGEST, CONTEXT)
    make = auto_class(config).from_config
    with torch.device("meta"):
        size = sum(weight.numel() for weight in make(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"the smallest has {size} parameters")
    torch.manual_seed(4)
    model = make(config, dtype=torch.float32).eval().requires_grad_(False)
    stir_weights(model)
    model.save_pretrained(folder)


def start(folder: Path) -> tuple[ModelRunner, BaseInfo]:
    """Serves it in float32, in one thread: what is this small waits for a second one."""
    chosen = {"device": "cpu", "dtype": "float32", "compile": "off", "max_rows": 8, "threads": 1}
    settings = Settings.model_validate(chosen | {"base": str(folder), "max_context": CONTEXT})
    return build_runner(settings, lambda stage, part: None)


def load(folder: Path) -> Any:
    model = auto_class(read_base_config(folder)).from_pretrained(folder, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def make_adapter(folder: Path, base: Path, modules: Sequence[str], seed: int) -> Any:
    """Saves a LoRA of these modules whose B is noise; PEFT's model, which it comes from.

    Read back it may be another: PEFT renames some families' tensors as it reads them, and drops them.
    """
    torch.manual_seed(seed)
    config = LoraConfig(r=4 + 4 * seed, lora_alpha=8, target_modules=list(modules), task_type="CAUSAL_LM")
    model = get_peft_model(load(base), config)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(0, 0.3)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


# Whose `out_proj` PEFT adapts in no model
PEFT_MAMBA = {"falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h"}


def adaptable(skeleton: Skeleton) -> list[str]:
    """The linear layers that the base and PEFT let be adapted, but for the head, which may be tied to
    another.
    """
    model = skeleton.model
    closed = "out_proj" if model.config.model_type in PEFT_MAMBA else ""
    head = model.get_output_embeddings()
    linears = [(name, layer) for name, layer in model.named_modules() if linear_shape(layer)]
    open_ones = [name for name, layer in linears if layer is not head and is_open(skeleton, name)]
    return [name for name in open_ones if name.rpartition(".")[2] != closed]


def is_open(skeleton: Skeleton, name: str) -> bool:
    limit = skeleton.limit(name)
    return limit is None or limit.by_peft


def judge(kind: str) -> Verdict:
    """Makes a tiny model of this type, starts the service on it, and asks it and PEFT the same."""
    with tempfile.TemporaryDirectory() as root:
        base = Path(root) / "base"
        try:
            make_tiny(kind, base)
        except Exception as error:  # whatever a class makes of its own defaults
            return Verdict(kind, class_name(kind), "not made", describe(error))
        try:
            runner, card = start(base)
        except SettingsError as error:
            return Verdict(kind, class_name(kind), "refused", shorten(str(error)))
        return compare(kind, base, runner, card)


def compare(kind: str, base: Path, runner: ModelRunner, card: BaseInfo) -> Verdict:
    """The base and two adapters, mixed and in chunks, beside transformers and PEFT alone."""
    skeleton, driver = Skeleton(base, card.limits), RunnerDriver(runner, 8)
    modules = adaptable(skeleton)
    plain, paths = load(base), set()
    jobs: list[tuple[Any, Job]] = [(plain, Job(prompt, ANSWER)) for prompt in prompts(card)]
    few = {name_pattern(module) for module in modules[:2]}
    some = [module for module in modules if name_pattern(module) in few]
    for seed, chosen in enumerate((modules, some)):
        folder = base.parent / f"adapter{seed}"
        model = make_adapter(folder, base, chosen, seed)
        adapter = validate_adapter(skeleton, folder, 64).adapter
        paths.add(adapter.lane.value)
        place = runner.load_adapter if adapter.lane is ExecutionPath.SHADOW else driver.place
        place(adapter)
        jobs += [(model, Job(prompt, ANSWER, adapter.digest)) for prompt in prompts(card)]
    driver.run([job for _, job in jobs])
    equal = sum(is_greedy(model, job) for model, job in jobs)
    beside = "" if paths == {"pool"} else f"; adapters by {' and '.join(sorted(paths))}"
    return Verdict(kind, class_name(kind), SERVED, f"{equal} of {len(jobs)}{beside}")


def prompts(card: BaseInfo) -> list[list[int]]:
    dice = random.Random(3)
    return [[dice.randrange(3, card.vocab_size) for _ in range(length)] for length in PROMPTS]


@torch.no_grad()
def is_greedy(model: Any, job: Job) -> bool:
    """Whether the model's own likeliest token is the job's, each time."""
    ids = torch.tensor([[*job.prompt, *job.ids]])
    logits: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return logits[0, len(job.prompt) - 1 : -1].argmax(-1).tolist() == job.ids


# ---- the page


def describe(error: Exception) -> str:
    return shorten(f"{type(error).__name__}: {' '.join(str(error).split())}")


def shorten(reason: str) -> str:
    """Without the setting's name and the folder's, in one cell of a table."""
    reason = re.sub(r"^ADAPTERD_BASE: (\S+ is not supported: |'\S+' )?", "", reason)
    return reason.replace("|", "/")[:160]


HEAD = """# Bases

What the service makes of each architecture of transformers {version}: a tiny random model of the class's
own defaults is served in float32 on a CPU, and the base and two adapters of its linear layers, mixed in one
batch and in chunks, are compared with transformers and PEFT, answer by answer.
`python -m tests.model.families` makes this page; `tests/model/test_families.py` holds some of it.

**{served} of {all} are served**: {causal} of {causals} causal language models, and {text} of {wrappers} of
those that see images or hear sounds. Of these the text is served: their other parts are let go of, an adapter
of them is refused, and so is an image in a message. Of a model that is not made here, transformers' own
defaults make none, or none that is small; a real one is tried when the service starts on it.
"""


def write_page(verdicts: Sequence[Verdict], page: Path = PAGE) -> None:
    causal, wrappers = ([each for each in verdicts if each.kind in kinds] for kinds in all_kinds())
    counts = {"served": verdicts, "causal": causal, "text": wrappers}
    values: dict[str, Any] = {name: sum(is_right(each) for each in part) for name, part in counts.items()}
    values |= {"all": len(verdicts), "causals": len(causal), "wrappers": len(wrappers)}
    text = HEAD.format(version=transformers.__version__, **values)
    text += table("Causal language models", causal) + table("Text of models that see images", wrappers)
    page.write_text(text, encoding="utf-8")


def is_right(verdict: Verdict) -> bool:
    return verdict.state == SERVED and verdict.told.startswith("9 of 9")


def table(title: str, verdicts: Iterable[Verdict]) -> str:
    rows = [
        f"\n## {title}\n",
        "| `model_type` | class | | answers equal to PEFT's, or why not |",
        "|---|---|---|---|",
    ]
    rows += [f"| `{each.kind}` | {each.name} | {each.state} | {each.told} |" for each in verdicts]
    return "\n".join(rows) + "\n"


def read_page(page: Path = PAGE) -> dict[str, Verdict]:
    """The rows of the page as it is, by model type."""
    rows = re.findall(r"^\| `(.+?)` \| (\w+) \| ([\w ]+) \| (.*) \|$", page.read_text(encoding="utf-8"), re.M)
    return {row[0]: Verdict(*row) for row in rows}


def try_kind(kind: str) -> Verdict:
    """Whatever goes wrong behind the start is told in the page, too."""
    try:
        return judge(kind)
    except Exception as error:
        return Verdict(kind, class_name(kind), "fails", describe(error))


def main() -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    all = [kind for part in all_kinds() for kind in part]
    verdicts = read_page() if sys.argv[1:] else {}
    with making.quiet():
        for kind in sys.argv[1:] or all:
            verdicts[kind] = try_kind(kind)
            print(*verdicts[kind], sep=" | ", flush=True)
    write_page([verdicts[kind] for kind in all])


if __name__ == "__main__":
    main()
