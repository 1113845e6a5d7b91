"""PEFT's own mixed batch: the same base, adapters and prompts, a different adapter a row.

Knows nothing of our runner but what it said.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from service.core.adapter import Adapter
from service.model import loading
from service.settings import Settings

from .decoding import Said
from .figures import BASE, DIFFERENT, MIXED, PLAIN

WARM = 3
Tell = Callable[[str, Any], None]


@torch.inference_mode()
def compared(
    folder: Path,
    settings: Settings,
    mix: Sequence[Adapter],
    prompts: list[list[int]],
    steps: int,
    ours: Said,
    tell: Tell,
) -> None:
    """Times a decode step of as many rows: of the base alone by plain transformers, and of row i
    with mix[i] by PEFT.

    `ours` are some of our first tokens, with log probabilities.
    """
    plain: Any = loading.load_base(folder, settings, lambda stage, fraction: None)
    ids = torch.tensor(prompts, device=plain.device)
    seconds, logits = timed(plain, ids, steps, {})
    tell(PLAIN, 1000 * statistics.median(seconds))
    told_apart(BASE, ours, logits, tell)
    model, names = wrapped(plain, mix)
    seconds, logits = timed(model, ids, steps, {"adapter_names": names})
    tell(MIXED, 1000 * statistics.median(seconds))
    told_apart(DIFFERENT, ours, logits, tell)


def wrapped(plain: Any, mix: Sequence[Adapter]) -> tuple[Any, list[str]]:
    """The base with these adapters, and the name of each row's.

    In their own bfloat16: PEFT would make float32 of it, which is slower.
    """
    folders = {adapter.digest: Path(adapter.config).parent for adapter in mix}
    first, *others = folders.items()
    model = PeftModel.from_pretrained(plain, first[1], adapter_name=first[0], autocast_adapter_dtype=False)
    for name, folder in others:
        model.load_adapter(folder, adapter_name=name, autocast_adapter_dtype=False)
    return model.eval(), [adapter.digest for adapter in mix]


def timed(model: Any, ids: Tensor, steps: int, more: dict[str, Any]) -> tuple[list[float], Tensor]:
    """Seconds of each decode step, until its tokens are on the host, and the logits after the
    prompts, [rows, vocabulary].
    """
    out = model(input_ids=ids, use_cache=True, **more)
    first: Tensor = out.logits[:, -1].float()
    tokens = out.logits[:, -1].argmax(-1, keepdim=True)
    seconds = []
    for _ in range(WARM + steps):
        began = time.perf_counter()
        out = model(input_ids=tokens, past_key_values=out.past_key_values, use_cache=True, **more)
        tokens = out.logits[:, -1].argmax(-1, keepdim=True)
        tokens.tolist()
        seconds.append(time.perf_counter() - began)
    return seconds[WARM:], first


def told_apart(mix: str, ours: Said, logits: Tensor, tell: Tell) -> None:
    """The largest difference of log probabilities, over those that we named."""
    for row, token in ours.get(mix, {}).items():
        ids, values = zip(*token.top, strict=True)
        theirs = logits[row].log_softmax(-1).cpu()[list(ids)]
        most = float((theirs - torch.tensor(values)).abs().max())
        tell(f"{mix}, row {row}: log probabilities of its first token differ from theirs by at most", most)
