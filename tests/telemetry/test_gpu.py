"""GPU readings by a stand-in of NVIDIA's library: exact values, gaps where it does not tell,
nothing where there is none.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from service.telemetry import gpu, metrics
from service.telemetry.gpu import GpuReading


class NVMLError(Exception):
    pass


class Library(ModuleType):
    """Two GPUs; what is in `silent` raises, as a partition or a lost GPU does."""

    NVML_TEMPERATURE_GPU = 0
    NVMLError = NVMLError

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.started = 0
        self.silent: set[tuple[str, int]] = set()

    def nvmlInit(self) -> None:
        self.started += 1

    def nvmlDeviceGetCount(self) -> int:
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetMemoryInfo(self, device: int) -> Any:
        return self.said("memory", device, SimpleNamespace(used=10 + device, total=80))

    def nvmlDeviceGetUtilizationRates(self, device: int) -> Any:
        return self.said("rates", device, SimpleNamespace(gpu=50 + device))

    def nvmlDeviceGetTemperature(self, device: int, sensor: int) -> Any:
        return self.said("celsius", device, 40 + device + sensor)

    def said(self, what: str, device: int, value: Any) -> Any:
        if (what, device) in self.silent:
            raise NVMLError
        return value


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[Library]:
    found = Library()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    gpu._load_library.cache_clear()
    yield found
    gpu._load_library.cache_clear()
    metrics.set_gpus([])


def test_every_gpu_is_read_and_the_library_started_once(library: Library) -> None:
    both = [GpuReading("0", 10, 80, 0.5, 40), GpuReading("1", 11, 80, 0.51, 41)]
    assert gpu.read_gpus() == both
    assert gpu.read_gpus() == both
    assert library.started == 1


def test_what_a_gpu_does_not_tell_has_no_series(library: Library) -> None:
    library.silent = {("rates", 1), ("memory", 1)}
    metrics.set_gpus(gpu.read_gpus())
    text = metrics.render_metrics("")[0].decode()
    shown = [line for line in text.splitlines() if line.startswith("adapterd_gpu_")]
    assert shown == [
        'adapterd_gpu_memory_used_bytes{gpu="0"} 10.0',
        'adapterd_gpu_memory_total_bytes{gpu="0"} 80.0',
        'adapterd_gpu_utilization_ratio{gpu="0"} 0.5',
        'adapterd_gpu_temperature_celsius{gpu="0"} 40.0',
        'adapterd_gpu_temperature_celsius{gpu="1"} 41.0',
    ]
    metrics.set_gpus([])
    assert 'gpu="' not in metrics.render_metrics("")[0].decode()


def test_without_library_or_driver_nothing_is_read_and_it_is_not_asked_again(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def broken() -> None:
        asked.append("init")
        raise NVMLError("no driver")

    monkeypatch.setattr(library, "nvmlInit", broken, raising=False)
    assert gpu.read_gpus() == gpu.read_gpus() == []
    assert asked == ["init"]
    gpu._load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert gpu.read_gpus() == []


def test_the_stand_in_has_no_name_that_the_library_lacks() -> None:
    import pynvml

    names = [name for name in vars(Library) if name.startswith(("nvml", "NVML"))]
    assert len(names) == 8
    assert [name for name in names if not hasattr(pynvml, name)] == []
    assert issubclass(pynvml.NVMLError, Exception)


def test_the_library_is_not_imported_before_somebody_asks() -> None:
    code = "import sys, service.telemetry.metrics, service.server; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
