"""The proof, before anything is served, that what will run gives the model's own logits: instead of a list of architectures.

Knows the probe's tokens. Must not know adapters, requests or settings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import kv
from .bank import Bank, Run
from .graphs import Graphs
from .runner import forward

log = logging.getLogger(__name__)

PROBE = 24  # tokens
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}  # relative, of logits that were computed in another order


def plain(model: Any) -> Tensor:
    """What the model itself makes of the probe, before its attention is replaced: logits [PROBE, vocabulary].

    By the eager attention, which alone knows all that a model may want: transformers' default leaves Gemma 2's cap out in some releases.
    """
    try:
        model.set_attn_implementation("eager")
        logits: Tensor = model(input_ids=_probe(model), use_cache=False).logits
    except (TypeError, ValueError, AttributeError) as error:
        raise kv.refused(model, f"a plain forward raises {type(error).__name__}") from error
    return logits[0].float()


def prove(bank: Bank, expected: Tensor) -> None:
    """The same probe in two chunks and one decoded token, through the rows and the adapted layers, must give the same logits."""
    ids, parts = _probe(bank.tree)[0].tolist(), []
    for start, stop in ((0, PROBE // 2), (PROBE // 2, PROBE - 1), (PROBE - 1, PROBE)):
        span, decode = kv.Span(0, stop - start, 0, start), int(stop - start == 1)
        bank.begin([Run(stop - start, None)], [], decode, [span])
        parts.append(forward(bank.tree, bank.device, ids[start:stop], [span], decode, range(stop - start)).float())
    error = _apart(torch.cat(parts), expected)
    if not error < TOLERANCE[bank.dtype]:
        raise kv.refused(bank.tree, f"its logits through the row attention differ from its own by {error:.2g}")


def recorded(bank: Bank, attention: Sequence[kv.Sighting], graphs: Graphs, expected: Tensor) -> bool:
    """Whether the probe's last token gets the same logits by CUDA graphs; the log says why not."""
    for logits in _tries(graphs, attention, _probe(bank.tree)[0].tolist()[-1]):
        error = _apart(logits, expected[-1:])
        if not (graphs.able and error < TOLERANCE[bank.dtype]):
            log.warning("graphs: off; the logits of the step that was tried differ from the model's own by %.2g", error)
            return False
    return True


def _tries(graphs: Graphs, attention: Sequence[kv.Sighting], token: int) -> Iterator[Tensor]:
    """The probe's last token by a step that is recorded and by one that is replayed: with KV read where it lies, and gathered."""
    for row in dict.fromkeys((0, graphs.rows - 1)):
        kv.fork(attention, 0, row, PROBE - 1)
        for _ in ("recorded", "replayed"):
            graphs.logits.zero_()  # a replay that does nothing is not to be taken for a good one
            yield graphs.step([token], [kv.Span(0, 1, row, PROBE - 1)], [None])


def _probe(model: Any) -> Tensor:
    vocabulary: int = model.config.get_text_config().vocab_size
    return torch.arange(7, 7 + 11 * PROBE, 11, device=model.device)[None] % vocabulary


def _apart(logits: Tensor, expected: Tensor) -> float:
    """The relative distance."""
    return float((logits.float() - expected).norm() / expected.norm())
