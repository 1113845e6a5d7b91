"""The kernels' library in the cache: built once, found without a compiler, built anew where it is damaged,
and done without, with the reason, where it cannot be had.

A small source stands for the kernels', which need a processor of their own.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from service.model import kernels, processor

pytestmark = pytest.mark.skipif(processor.find_compiler() is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of libraries; what is built there has a function that gives 42."""
    source = tmp_path / "small.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    monkeypatch.setattr(kernels, "SOURCES", [source])
    monkeypatch.setattr(kernels, "FLAGS", ["-fPIC", "-shared"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapterd" / "kernels"


def ask(library: Path) -> int:
    return int(ctypes.CDLL(str(library)).answer())


def test_it_is_built_once_and_found_without_a_compiler(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = processor.find_compiler()
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    assert not kernels.can_load_kernels()
    monkeypatch.setattr(kernels, "find_compiler", lambda: compiler)
    library = kernels._find_library(kernels._list_flags("auto"))
    built = library.stat()
    assert library.is_relative_to(cache)
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    assert kernels.can_load_kernels()
    assert kernels._find_library(kernels._list_flags("auto")) == library
    assert kernels._load_library("auto")
    assert library.stat() == built
    assert ask(library) == 42


def cut(library: Path) -> None:
    os.truncate(library, library.stat().st_size // 2)


def zero_half(library: Path) -> None:
    content = library.read_bytes()
    library.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


each_damage = pytest.mark.parametrize("damage", [cut, zero_half, Path.unlink])


@each_damage
def test_a_damaged_one_is_built_anew(
    damage: Callable[[Path], None], cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    library = kernels._find_library(kernels._list_flags("auto"))
    damage(library)
    assert kernels._load_library("auto")
    assert "is damaged and is made anew" in caplog.text
    assert ask(library) == 42
    assert [path.name for path in cache.iterdir() if not path.name.startswith(".")] == [library.parent.name]


@each_damage
def test_a_damaged_one_is_never_loaded_where_nothing_can_build_it(
    damage: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    library = kernels._find_library(kernels._list_flags("auto"))
    damage(library)
    monkeypatch.setattr(kernels, "find_compiler", lambda: None)
    assert not kernels._load_library("auto")
    assert caplog.messages[-1] == "kernels: off, they cannot be built: no C++ compiler (g++) is installed"
    assert str(library) not in Path("/proc/self/maps").read_text(encoding="utf-8")


def test_a_source_that_does_not_compile_is_told_and_leaves_nothing(
    cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.SOURCES[0].write_text("int broken = ;\n")
    assert not kernels._load_library("auto")
    assert "kernels: off, they cannot be built: " in caplog.messages[-1]
    assert "expected primary-expression" in caplog.messages[-1]
    assert [path.name for path in cache.iterdir()] == [".making.lock"]


def test_one_that_the_loader_refuses_is_told_in_its_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    odd = tmp_path / "odd.so"
    odd.write_text("no library, but many bytes of something else" * 10)
    monkeypatch.setattr(kernels, "_find_library", lambda flags: odd)
    assert not kernels._load_library("auto")
    (said,) = caplog.messages
    assert said.startswith("kernels: off, their library cannot be loaded: ")
    assert "invalid ELF header" in said


def test_a_cache_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nope")
    assert not kernels._load_library("auto")
    (said,) = caplog.messages
    assert said.startswith("kernels: off, they cannot be built: ops-")
    assert said.endswith(" cannot be written: No such file or directory")


LEAST = {"avx2", "fma", "f16c"}
WIDE = LEAST | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.mark.parametrize(
    ("features", "name"), [(LEAST, "AVX2"), (WIDE, "AVX512"), (WIDE | {"avx512_bf16"}, "AVX512_BF16")]
)
def test_the_vectors_are_named_as_far_as_the_processor_has_them(
    features: set[str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "list_features", lambda: frozenset(features))
    assert processor.name_vectors() == name
    assert processor.name_vectors("avx2") == "AVX2"
