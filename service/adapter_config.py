"""Builds an adapter's config as PEFT's own class, in the validator process and in the worker process.

Both read a config here, so that they cannot disagree. Must not know a base, a tensor or a file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig

# Keys that change no tensor and no answer: dropout acts in training only, and what is drawn at random
# is loaded over
ASIDE = frozenset(
    {
        "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "inference_mode",
        "lora_dropout", "init_vector_bank_bound",
    }
)  # fmt: skip


def build_peft_config(config: Mapping[str, Any]) -> PeftConfig:
    """The config for inference, without keys that PEFT does not know and without nulls, which it does
    not expect everywhere.

    Raises whatever PEFT makes of a stranger's config.
    """
    known = known_keys(config["peft_type"]) - ASIDE
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[config["peft_type"]]
    values = {key: value for key, value in config.items() if key in known and value is not None}
    built = config_class(**values)
    # Else PEFT would compute the prompts it saves, of weights that are not there
    built.inference_mode = True
    return built


def known_keys(peft_type: str) -> frozenset[str]:
    return frozenset(PEFT_TYPE_TO_CONFIG_MAPPING[peft_type].__dataclass_fields__) - {"runtime_config"}
