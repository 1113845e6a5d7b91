"""One tiny base for all tests of the catalog, a folder of adapters, and a registry over a stand-in for
the engine.
"""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from service.catalog.registry import Registry
from service.catalog.validator import check
from service.catalog.validator.messages import ValidatedAdapter
from service.catalog.validator.process import Validator
from service.catalog.validator.skeleton import Skeleton
from service.core.base_info import BaseInfo, LayerLimit
from service.core.manifest import Manifest
from service.settings import Settings

from .. import making
from ..doubles.engine import FakeEngine

Noise = Callable[..., Path]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return making.tiny(tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="session")
def skeleton(base: Path) -> Skeleton:
    return Skeleton(base)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """An adapter on q_proj and v_proj, rank 4, alpha 8."""
    return making.noise(tmp_path_factory.mktemp("adapters") / "plain", base, 1)


@pytest.fixture(scope="session")
def other(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    """Another adapter, of rank 8."""
    return making.noise(tmp_path_factory.mktemp("adapters") / "other", base, 2, r=8)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "adapters"
    folder.mkdir()
    return folder


def card(base: Path) -> BaseInfo:
    skeleton = Skeleton(base)
    return BaseInfo(
        folder=str(base),
        architecture="LlamaForCausalLM",
        layers=2,
        hidden_size=64,
        intermediate_size=128,
        vocab_size=269,
        parameters=skeleton.parameters,
        context=512,
        quantization="none",
        dtype="float32",
        device="cpu",
        resident_bytes={"float32": 4 * skeleton.parameters},
        linears=tuple(skeleton.list_linears()),
        pool_rank=64,
        rows=4,
    )


class InProcessValidator(Validator):
    """Validates in this process, so that a test does not wait for another one to import torch."""

    reads: list[tuple[Path, Manifest]]

    async def start_on(
        self, folder: Path, limits: tuple[LayerLimit, ...] = (), parameters: tuple[str, ...] = ()
    ) -> None:
        self.reads = []
        self._skeleton = Skeleton(folder, limits, parameters)
        self.tree = self._skeleton.make_tree()

    async def validate_adapter(self, folder: Path, known: Manifest = ()) -> ValidatedAdapter:
        self.reads.append((folder, known))
        await asyncio.sleep(0)
        return check.validate_adapter(self._skeleton, folder, self.max_rank, known)

    async def measure_norms(self, validated: ValidatedAdapter) -> dict[str, float]:
        await asyncio.sleep(0)
        return check.measure_norms(validated.adapter, validated.layers)

    async def close(self) -> None:
        return None


class RegistryFixture:
    """A registry on a stand-in for the engine over one adapters directory;

    `opened` starts it, again and again if need be.
    """

    def __init__(self, root: Path, base: Path) -> None:
        self.root, self.base = root, base
        self.device = FakeEngine(card(base))

    def settings(self, **more: Any) -> Settings:
        return Settings(
            base=str(self.base), base_id="tiny", adapters_dir=self.root, **{"max_rank": 64, **more}
        )

    @asynccontextmanager
    async def opened(
        self, limits: tuple[LayerLimit, ...] = (), parameters: tuple[str, ...] = (), **more: Any
    ) -> AsyncIterator[Registry]:
        described = replace(card(self.base), limits=limits, adapted_parameters=parameters)
        self.device = FakeEngine(described)
        registry = Registry(self.settings(**more), self.device, validator=InProcessValidator)
        await registry.open_catalog()
        try:
            yield registry
        finally:
            await registry.close()


@pytest.fixture
def catalog(root: Path, base: Path) -> RegistryFixture:
    return RegistryFixture(root, base)


@pytest.fixture(scope="session")
def contents(tmp_path_factory: pytest.TempPathFactory, base: Path) -> list[Path]:
    """Five adapters of one shape, as a trainer writes them."""
    folder = tmp_path_factory.mktemp("contents")
    return [making.noise(folder / f"v{i}", base, 20 + i) for i in range(5)]


@pytest.fixture
def trained(catalog: RegistryFixture, contents: list[Path]) -> RegistryFixture:
    """Five sources, v0 to v4, none of which is registered by itself."""
    for folder in contents:
        shutil.copytree(folder, catalog.root / folder.name)
    state = {"version": 2, "adapters": {}, "deleted": [folder.name for folder in contents]}
    (catalog.root / ".adapterd.json").write_text(json.dumps(state))
    return catalog
