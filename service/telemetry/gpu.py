"""What NVIDIA's management library says of the GPUs, asked only where it is installed and finds
one. Knows no collector.

The library is imported at the first question, and not asked again where that failed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class GpuReading:
    """`gpu` is the library's index; memory in bytes, `utilization` 0 to 1.

    None is what the GPU does not tell, as partitions do not.
    """

    gpu: str
    memory_used: int | None
    memory_total: int | None
    utilization: float | None
    celsius: int | None


def read_gpus() -> list[GpuReading]:
    """One for each GPU; none where there is no library, driver or GPU.

    Takes milliseconds, so it is not for an event loop.
    """
    library = _load_library()
    if library is None:
        return []
    return [
        _read_gpu(library, index) for index in range(_ask_library(library, library.nvmlDeviceGetCount) or 0)
    ]


@cache
def _load_library() -> ModuleType | None:
    try:
        library = import_module("pynvml")
        library.nvmlInit()
    except Exception:  # not installed, no driver, or a driver that does not fit: the service runs on without
        return None
    return library


def _ask_library(library: ModuleType, question: Callable[[], T]) -> T | None:
    try:
        return question()
    except library.NVMLError:
        return None


def _read_gpu(library: ModuleType, index: int) -> GpuReading:
    device = _ask_library(library, lambda: library.nvmlDeviceGetHandleByIndex(index))
    memory = _ask_library(library, lambda: library.nvmlDeviceGetMemoryInfo(device))
    rates = _ask_library(library, lambda: library.nvmlDeviceGetUtilizationRates(device))
    celsius = _ask_library(
        library, lambda: library.nvmlDeviceGetTemperature(device, library.NVML_TEMPERATURE_GPU)
    )
    used, total = (memory.used, memory.total) if memory else (None, None)
    return GpuReading(str(index), used, total, rates.gpu / 100 if rates else None, celsius)
