"""What an adapter's digest stands for: every file that shapes an answer, and nothing else."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

from service.core.manifest import File, check_text_files, compute_digest, is_manifest_name, read_manifest
from service.errors import AdapterInvalid

NAMES = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
STRAYS = (
    "README.md",
    "training_args.bin",
    "config.json",
    "tokenizer.json.bak",
    "chat_template.jinja2",
    "xvocab.json",
    "vocab",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, name in enumerate((*NAMES, *STRAYS)):
        (tmp_path / name).write_bytes(name.encode() * i)
    return tmp_path


def test_the_manifest_is_every_file_that_shapes_an_answer_and_no_other(folder: Path) -> None:
    contents = {name: (folder / name).read_bytes() for name in NAMES}
    assert read_manifest(folder) == tuple(
        File(name, len(data), sha256(data).hexdigest()) for name, data in contents.items()
    )


def test_the_digest_is_over_json_lines_sorted_by_name(folder: Path) -> None:
    lines = ""
    for name in NAMES:
        data = (folder / name).read_bytes()
        lines += (
            json.dumps({"name": name, "bytes": len(data), "sha256": sha256(data).hexdigest()}).replace(
                " ", ""
            )
            + "\n"
        )
    wanted = "sha256:" + sha256(lines.encode()).hexdigest()
    assert compute_digest(read_manifest(folder)) == wanted
    assert compute_digest(tuple(reversed(read_manifest(folder)))) == wanted, (
        "whatever the order it was told in"
    )


def test_a_stray_changes_nothing_and_each_file_of_the_manifest_changes_the_digest(folder: Path) -> None:
    before = compute_digest(read_manifest(folder))
    for name in STRAYS:
        (folder / name).unlink()
    assert compute_digest(read_manifest(folder)) == before
    seen = {before}
    for name in NAMES:
        (folder / name).write_bytes(b"other")
        seen.add(compute_digest(read_manifest(folder)))
        (folder / name).unlink()
        seen.add(compute_digest(read_manifest(folder)))
    assert len(seen) == 1 + 2 * len(NAMES)


@pytest.mark.parametrize(
    "name",
    [
        "",
        "vocab.",
        "vocab./x",
        "vocab.a/b",
        "../vocab.json",
        "vocab.\0",
        "a/tokenizer.json",
        "Tokenizer.json",
        "file",
    ],
)
def test_names_that_are_none_of_it(name: str) -> None:
    assert not is_manifest_name(name)


@pytest.mark.parametrize(
    "make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)], ids=["pipe", "folder", "link"]
)
def test_what_is_no_file_has_no_hash(folder: Path, make: Callable[[Path], None]) -> None:
    make(folder / "vocab.bpe")
    with pytest.raises(AdapterInvalid, match=r"vocab\.bpe is no file"):
        read_manifest(folder)


@pytest.mark.parametrize("name", NAMES[2:])
def test_text_files_that_change_come_or_go_are_noticed(folder: Path, name: str) -> None:
    whole = read_manifest(folder)
    check_text_files(folder, whole)
    (folder / name).unlink()
    with pytest.raises(AdapterInvalid, match=r"changed on disk.*PUT"):
        check_text_files(folder, whole)
    short = read_manifest(folder)
    check_text_files(folder, short)
    (folder / name).write_bytes(b"other")
    for registered in (whole, short):
        with pytest.raises(AdapterInvalid, match=r"changed on disk.*PUT"):
            check_text_files(folder, registered)


def test_weights_are_the_workers_to_check_and_a_folder_that_is_gone_has_no_text_files(folder: Path) -> None:
    registered = read_manifest(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"other")
    check_text_files(folder, registered)
    with pytest.raises(AdapterInvalid, match=r"changed on disk.*PUT"):
        check_text_files(folder / "none", registered)
    check_text_files(folder / "none", tuple(file for file in registered if file.name.startswith("adapter_")))


def test_what_cannot_be_read_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = read_manifest(folder)

    def fail(folder: Path) -> list[str]:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("service.core.manifest.list_names", fail)
    with pytest.raises(AdapterInvalid, match="cannot be read any more: Input/output error"):
        check_text_files(folder, registered)
