"""Defaults and figures that several rooms share, in any process. Constants only."""

from __future__ import annotations

from dataclasses import dataclass

DEMO_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the public base that the demo adapters are for

# A file is waited for so long, and for its size at the pace of the slowest disk
READ_S = 60.0
SLOWEST_DISK_BYTES_PER_S = 20e6

# Dtypes that adapters may be stored in, by torch's name: safetensors' name
FLOAT_CODES = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, slots=True)
class DeviceDefaults:
    """What holds on a kind of device where no setting says otherwise."""

    rows: int
    prefill_tokens: int
    quantization: str


CPU_DEFAULTS = DeviceDefaults(rows=16, prefill_tokens=512, quantization="none")
GPU_DEFAULTS = DeviceDefaults(rows=64, prefill_tokens=4096, quantization="nf4")


def defaults_of(device: str) -> DeviceDefaults:
    """The defaults of a device by its torch name, such as `cuda:0`."""
    return CPU_DEFAULTS if device == "cpu" else GPU_DEFAULTS
