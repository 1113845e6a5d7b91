"""Reads the GPUs' state from NVIDIA's management library, where it finds one; API process.

Must not know collectors. The library is imported at the first reading, and not tried again where that
failed.
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

    None is a value that the GPU does not have, as partitions do not.
    """

    gpu: str
    memory_used: int | None
    memory_total: int | None
    utilization: float | None
    celsius: int | None


def read_gpus() -> list[GpuReading]:
    """A reading for each GPU; none where there is no library, driver or GPU.

    Takes milliseconds, so it is not for an event loop.
    """
    library = _load_library()
    if library is None:
        return []
    count = _call_library(library, library.nvmlDeviceGetCount) or 0
    return [_read_gpu(library, index) for index in range(count)]


@cache
def _load_library() -> ModuleType | None:
    try:
        library = import_module("pynvml")
        library.nvmlInit()
    except Exception:  # not installed, no driver, or a driver that does not fit: the service runs on without
        return None
    return library


def _call_library(library: ModuleType, call: Callable[[], T]) -> T | None:
    try:
        return call()
    except library.NVMLError:
        return None


def _read_gpu(library: ModuleType, index: int) -> GpuReading:
    device = _call_library(library, lambda: library.nvmlDeviceGetHandleByIndex(index))
    memory = _call_library(library, lambda: library.nvmlDeviceGetMemoryInfo(device))
    rates = _call_library(library, lambda: library.nvmlDeviceGetUtilizationRates(device))
    celsius = _call_library(
        library, lambda: library.nvmlDeviceGetTemperature(device, library.NVML_TEMPERATURE_GPU)
    )
    used, total = (memory.used, memory.total) if memory else (None, None)
    return GpuReading(str(index), used, total, rates.gpu / 100 if rates else None, celsius)
