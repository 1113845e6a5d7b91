"""A live service for the tests here: the real program, on a tiny random base with one adapter,
beside a GPU that is made up.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.bench.servers import started
from tests import making

GPU = """
from types import SimpleNamespace

NVML_TEMPERATURE_GPU = 0
NVMLError = OSError
nvmlInit = dict
nvmlDeviceGetCount = lambda: 1
nvmlDeviceGetHandleByIndex = int
nvmlDeviceGetMemoryInfo = lambda gpu: SimpleNamespace(used=10**9, total=10**10)
nvmlDeviceGetUtilizationRates = lambda gpu: SimpleNamespace(gpu=50)
nvmlDeviceGetTemperature = lambda gpu, sensor: 60
"""

SETTINGS = {
    "base_id": "tiny",
    "dtype": "float32",
    "quantization": "none",
    "device": "cpu",
    "compile": "off",
    "max_rows": "4",
}


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    base = making.tiny(folder / "base")
    making.noise(folder / "adapters" / "noise", base)
    folders = {"base": str(base), "adapters_dir": str(folder / "adapters")}
    (folder / "pynvml.py").write_text(GPU)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", str(folder))
        with started(SETTINGS | folders, folder / "log") as server:
            yield server.url
