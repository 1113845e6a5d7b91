"""Makes the small random models and adapters that the tests run on, and says what plain PEFT makes
of them. Knows nothing of the service.

TINY is a two-layer Llama in float32 with a byte-level tokenizer; NOISE an adapter of it whose B
matrices are random; EDIT a changed copy.
"""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

Tensors = dict[str, torch.Tensor]
ConfigEdit = dict[str, Any] | Callable[[dict[str, Any]], dict[str, Any]]
TensorEdit = Callable[[Tensors], Tensors | None]

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("t h", "th e", "i n", "a n", "Ġ the", "h e", "Ġ a", "e r", "Ġ w", "o n")
TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT and transformers warn about much that is meant here, and the tests treat warnings as
    errors.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- bases

TINY: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # the usual 0.02 makes a model that says one token for ever
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}


@cache
def tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """Every byte is a token, ten common pairs are one too; ids 0, 1 and 2 are the special ones, and
    2 ends a text and pads.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    words = [*SPECIAL, *letters, *("".join(pair) for pair in pairs)]
    made = Tokenizer(
        models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[(a, b) for a, b in pairs])
    )
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=SPECIAL[1],
        eos_token=SPECIAL[2],
        pad_token=SPECIAL[2],
        clean_up_tokenization_spaces=False,
        chat_template=TEMPLATE if template else None,
    )


def ids(text: str) -> list[int]:
    encoded: list[int] = tokenizer()(text)["input_ids"]
    return encoded


def tiny(
    folder: Path,
    *,
    seed: int = 1,
    template: bool = True,
    generation: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """Saves a random two-layer Llama, in float32 and with tied embeddings unless `changes` to its
    config say otherwise.
    """
    words = tokenizer(template)
    torch.manual_seed(seed)
    with quiet():
        config = LlamaConfig(**(TINY | {"vocab_size": len(words)} | changes))
        model = LlamaForCausalLM(config).float()
        if generation:
            model.generation_config.update(**generation)
        model.save_pretrained(folder)
        words.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    """The base in float32; with all its parts, where it sees images."""
    with quiet():
        is_causal = type(AutoConfig.from_pretrained(folder)) in MODEL_FOR_CAUSAL_LM_MAPPING
        kind = AutoModelForCausalLM if is_causal else AutoModelForImageTextToText
        return kind.from_pretrained(folder, dtype=torch.float32).eval()


# ---- adapters


def adapter(
    folder: Path,
    base: Path,
    config: PeftConfig,
    *,
    seed: int,
    std: float = 0.3,
    save: dict[str, Any] | None = None,
) -> Path:
    """Saves any PEFT adapter of the base with noise where a fresh one would change nothing."""
    torch.manual_seed(seed)
    with quiet():
        model = get_peft_model(load(base), config)
    torch.manual_seed(seed)
    lora = str(config.peft_type.value) == "LORA"
    with torch.no_grad():
        for name, weight in model.named_parameters():
            add_noise(name, weight, std, others=not lora and weight.requires_grad)
    with quiet():
        model.save_pretrained(folder, **(save or {}))
    return folder


NOISY = ("lora_B", "lora_embedding_B", "token_adapter", "hada_", "lokr_", "oft_R", "vera_lambda_b")


def add_noise(name: str, weight: torch.Tensor, std: float, others: bool) -> None:
    """`others`: also where the name tells no kind of weight."""
    values = torch.empty_like(weight)
    if any(word in name for word in NOISY):
        weight.copy_(values.normal_(0, std))
    elif "magnitude" in name or "ia3" in name:
        weight.mul_(values.uniform_(0.7, 1.4))
    elif "modules_to_save.default" in name:
        weight.add_(values.normal_(0, 0.05))
    elif others:
        weight.add_(values.normal_(0, std / 3))


def noise(
    folder: Path,
    base: Path,
    seed: int = 0,
    targets: Sequence[str] | str | None = ("q_proj", "v_proj"),
    r: int = 4,
    alpha: float = 8,
    *,
    std: float = 0.3,
    save: dict[str, Any] | None = None,
    **config: Any,
) -> Path:
    """Saves a LoRA of the base whose B matrices are normal(0, std); other seeds say other things."""
    modules = targets if targets is None or isinstance(targets, str) else list(targets)
    with quiet():
        made = LoraConfig(r=r, lora_alpha=alpha, target_modules=modules, task_type="CAUSAL_LM", **config)
    return adapter(folder, base, made, seed=seed, std=std, save=save)


def tensors(folder: Path) -> Tensors:
    found: Tensors = load_file(folder / WEIGHTS)
    return found


def edit(source: Path, to: Path, config: ConfigEdit | None = None, weights: TensorEdit | None = None) -> Path:
    """Copies an adapter, if it is not to be changed where it is, its config updated (or what the
    callable returns), its tensors changed.
    """
    if source != to:
        shutil.copytree(source, to, dirs_exist_ok=True)
    if config is not None:
        now = json.loads((to / CONFIG).read_text())
        (to / CONFIG).write_text(json.dumps(now | config if isinstance(config, dict) else config(now)))
    if weights is not None:
        found = tensors(to)
        found = weights(found) or found
        save_file(
            {name: tensor.contiguous().clone() for name, tensor in found.items()},
            to / WEIGHTS,
            metadata={"format": "pt"},
        )
    return to


def mixed(parts: Sequence[tuple[Path, float]], base: Path, to: Path) -> Path:
    """One adapter of several with weights, as PEFT joins them."""
    names = [f"part{i}" for i in range(len(parts))]
    with quiet():
        model = PeftModel.from_pretrained(load(base), parts[0][0], adapter_name=names[0])
        for name, (folder, _) in zip(names[1:], parts[1:], strict=True):
            model.load_adapter(folder, adapter_name=name)
        weights = [weight for _, weight in parts]
        model.add_weighted_adapter(names, weights, "mixed", combination_type="cat")
        model.set_adapter("mixed")
        model.save_pretrained(to, selected_adapters=["mixed"])
    return to / "mixed"


# ---- what plain PEFT says


def served(base: Path, adapter: Path | None = None) -> Any:
    """The base with this adapter alone in it, put there by PEFT."""
    model = load(base)
    with quiet():
        return model if adapter is None else PeftModel.from_pretrained(model, adapter).eval()


@torch.no_grad()
def answers(base: Path, adapter: Path | None, prompts: Iterable[Sequence[int]], n: int) -> list[list[int]]:
    """The next n token ids of each prompt, one by one, by transformers' own generate, float32, no
    end-of-sequence.
    """
    model = served(base, adapter)
    model.generation_config.eos_token_id = None
    told = []
    for prompt in prompts:
        asked = torch.tensor([list(prompt)])
        with quiet():
            out = model.generate(
                input_ids=asked, attention_mask=torch.ones_like(asked), do_sample=False, max_new_tokens=n
            )
        told.append(out[0, len(prompt) :].tolist())
    return told


def greedy(base: Path, adapter: Path | None, prompt: Sequence[int], n: int) -> list[int]:
    return answers(base, adapter, [prompt], n)[0]


def usage(prompt: int, completion: int, cached: int = 0) -> dict[str, Any]:
    """OpenAI's count of so many tokens."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
