"""An adapter whose tokenizer, template or generation files cannot be used is refused when it is
registered, with the reason.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.catalog.validator import text_files
from service.catalog.validator.check import validate_adapter
from service.catalog.validator.skeleton import Skeleton
from service.core.manifest import TEXT_FILES, read_manifest
from service.errors import AdapterInvalid

from ... import making

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935\nsize 16777216\n"
PANICS = {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
NAMED = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ tools }}"}]


def words(**changes: Any) -> bytes:
    return json.dumps(json.loads(making.tokenizer().backend_tokenizer.to_str()) | changes).encode()


def settings(template: Any) -> bytes:
    return json.dumps({"chat_template": template}).encode()


def problems(skeleton: Skeleton, folder: Path) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        validate_adapter(skeleton, folder, 64)
    assert str(folder) not in str(caught.value.details)
    return "\n".join(caught.value.problems)


@pytest.fixture
def folder(plain: Path, tmp_path: Path) -> Path:
    return making.edit(plain, tmp_path / "a")


@pytest.mark.parametrize("name", [*TEXT_FILES, "vocab.json", "vocab.txt"])
def test_a_git_lfs_pointer_is_refused_with_the_hint_that_weights_get(
    skeleton: Skeleton, folder: Path, name: str
) -> None:
    (folder / name).write_bytes(POINTER)
    assert f"{name} is a git-lfs pointer, not the file itself: fetch it with `git lfs pull`" in problems(
        skeleton, folder
    )


def test_the_config_as_a_pointer_gets_the_hint_too(skeleton: Skeleton, folder: Path) -> None:
    (folder / making.CONFIG).write_bytes(POINTER)
    assert "adapter_config.json is a git-lfs pointer" in problems(skeleton, folder)


BROKEN: dict[str, tuple[str, bytes, str]] = {
    "cut": ("tokenizer.json", b'{"version": "1.0"', "is not JSON"),
    "deep": ("tokenizer.json", b"[" * 100_000, "is not JSON"),
    "a list": ("tokenizer.json", b"[]", "is not a JSON object"),
    "no tokenizer": ("tokenizer.json", b"{}", "the tokenizers library"),
    "another library's": (
        "tokenizer.json", b'{"version": "1.0", "model": {"type": "Magic"}}', "the tokenizers library",
    ),
    "one that panics": ("tokenizer.json", words(**PANICS), "the tokenizers library"),
    "settings cut": ("tokenizer_config.json", b"{", "is not JSON"),
    "settings with a byte order mark": ("tokenizer_config.json", b"\xef\xbb\xbf{}", "is not JSON"),
    "settings in another encoding": ("tokenizer_config.json", '{"a": "é"}'.encode("latin-1"), "is not JSON"),
    "special tokens a list": ("special_tokens_map.json", b"[]", "is not a JSON object"),
    "added tokens cut": ("added_tokens.json", b"{", "is not JSON"),
    "vocabulary cut": ("vocab.json", b"{", "is not JSON"),
    "generation cut": ("generation_config.json", b"{", "is not JSON"),
    "generation a text": ("generation_config.json", b'"x"', "is not a JSON object"),
    "eos a text": ("generation_config.json", b'{"eos_token_id": "2"}', "eos_token_id"),
    "eos true": ("generation_config.json", b'{"eos_token_id": [true]}', "eos_token_id"),
    "template unclosed": ("chat_template.jinja", b"{% for m in messages %}", "Unexpected end of template"),
    "template of another language": (
        "chat_template.jinja", b"line\n{% foreach %}", "unknown tag 'foreach'. (line 2)",
    ),
    "template no text": ("chat_template.jinja", b"\xff\xfe", "is not UTF-8 text"),
    "template in the settings": ("tokenizer_config.json", settings("{{ a"), "cannot be parsed"),
    "template by name": (
        "tokenizer_config.json",
        settings([*NAMED, {"name": "rag", "template": "{% if %}"}]),
        "cannot be parsed",
    ),
    "template a number": ("tokenizer_config.json", settings(5), "`chat_template`"),
    "template an object": ("tokenizer_config.json", settings({"default": "x"}), "`chat_template`"),
    "template without a name": ("tokenizer_config.json", settings([{"template": "x"}]), "`chat_template`"),
    "template in a file of its own": ("chat_template.json", settings("{{ a"), "cannot be parsed"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "reason"), BROKEN.values(), ids=BROKEN)
def test_what_cannot_be_used_is_refused_by_name(
    skeleton: Skeleton, folder: Path, name: str, content: bytes, reason: str
) -> None:
    (folder / name).write_bytes(content)
    told = problems(skeleton, folder)
    assert told.startswith(name)
    assert reason in told


def test_every_broken_file_is_told(skeleton: Skeleton, folder: Path) -> None:
    (folder / "tokenizer.json").write_bytes(POINTER)
    (folder / "chat_template.jinja").write_text("{{")
    assert len(problems(skeleton, folder).splitlines()) == 2


def test_a_file_over_the_limit_is_not_read(
    skeleton: Skeleton, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files, "LIMIT", 10)
    (folder / "merges.txt").write_bytes(bytes(11))
    assert problems(skeleton, folder) == "merges.txt is 11 bytes; the limit is 10"


FINE: dict[str, tuple[str, bytes]] = {
    "a tokenizer": ("tokenizer.json", words()),
    "no settings": ("tokenizer_config.json", b"{}"),
    "named templates": ("tokenizer_config.json", settings(NAMED)),
    "no template": ("tokenizer_config.json", settings(None)),
    "what transformers adds to Jinja": (
        "chat_template.jinja",
        b"{% for m in messages %}{% generation %}{{ m | tojson }}{% endgeneration %}"
        b"{% break %}{% continue %}{% endfor %}",
    ),
    "what only running would tell": (
        "chat_template.jinja",
        b"{{ raise_exception('no') }}{{ 'x' * 10 ** 15 }}{{ 1 | strange }}",
    ),
    "one eos": ("generation_config.json", b'{"eos_token_id": 2}'),
    "several": ("generation_config.json", b'{"eos_token_id": [2, 7]}'),
    "none": ("generation_config.json", b'{"eos_token_id": null, "temperature": 0.5}'),
    "merges": ("merges.txt", b"#version: 0.2\na b\n"),
    "a model": ("tokenizer.model", bytes(range(256))),
}


@pytest.mark.parametrize(("name", "content"), FINE.values(), ids=FINE)
def test_what_can_be_used_is_taken_and_nothing_of_it_is_run(
    skeleton: Skeleton, folder: Path, name: str, content: bytes
) -> None:
    (folder / name).write_bytes(content)
    assert validate_adapter(skeleton, folder, 64).adapter.files == read_manifest(folder)


def test_a_tokenizer_that_many_bring_is_looked_at_once(
    skeleton: Skeleton, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bytes] = []
    look = text_files._check_tokenizer

    def looking(content: bytes) -> Iterator[str]:
        looked.append(content)
        return look(content)

    monkeypatch.setattr(text_files, "_check_tokenizer", looking)
    for _ in range(3):
        (folder / "tokenizer.json").write_bytes(words(version="1.0", truncation=None) + b" ")
        validate_adapter(skeleton, folder, 64)
    assert len(looked) == 1


def test_what_is_known_is_not_looked_at_again(skeleton: Skeleton, folder: Path) -> None:
    known = read_manifest(folder)
    (folder / "tokenizer.json").write_bytes(POINTER)
    assert validate_adapter(skeleton, folder, 64, known).adapter.files == known


def test_what_was_found_to_be_fine_is_forgotten_in_the_end(
    skeleton: Skeleton, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_files.FINE, "capacity", 2)
    for i in range(5):
        (folder / "merges.txt").write_text(f"a {i}")
        validate_adapter(skeleton, folder, 64)
    assert len(text_files.FINE) <= 2
