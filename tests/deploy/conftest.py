"""A live service for the tests here: the real program, on a tiny random base with one adapter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deploy.bench.servers import started
from tests import making


@pytest.fixture(scope="package")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("live")
    base = making.tiny(folder / "base")
    making.noise(folder / "adapters" / "noise", base)
    settings = {"base": str(base), "base_id": "tiny", "dtype": "float32", "quantization": "none", "device": "cpu", "compile": "off"}
    with started({**settings, "adapters_dir": str(folder / "adapters"), "max_rows": "4"}, folder / "log") as server:
        yield server.url
