"""Reads a base's config and chooses transformers' class for it, in the validator process and in the
worker process.

Both choose here, so that they cannot disagree. Must not know weights, settings or adapters.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)


def read_base_config(folder: Path) -> Any:
    """Of a folder, or of a config.json itself; never with code that lies beside it.

    Raises whatever transformers makes of it.
    """
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def auto_class(config: Any) -> Any:
    """The Auto class to load by: a language model inside a model that sees images comes with all of
    that, where transformers has no class for it alone.
    """
    kind = config.model_type
    is_wrapper = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    if is_wrapper and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return AutoModelForImageTextToText
    return AutoModelForCausalLM
