"""Bodies in gzip and deflate: read as if they had come plain, within the limit; others are 415 by name."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .scripted_app import ScriptedApp, serve_script

NATIVE = json.dumps({"inputs": "Hi", "parameters": {"max_new_tokens": 3}}).encode()
OPENAI = json.dumps({"model": "tiny", "prompt": "Hi", "max_tokens": 3}).encode()
PATHS = (("/generate", NATIVE, 422), ("/v1/completions", OPENAI, 400))


def deflate_bare(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(body) + packer.flush()


PACKERS: list[tuple[str, Callable[[bytes], bytes]]] = [
    ("gzip", gzip.compress),
    ("GZIP", gzip.compress),
    ("x-gzip", gzip.compress),
    ("deflate", zlib.compress),
    ("deflate", deflate_bare),
    ("identity", bytes),
    ("", bytes),
]
each_path = pytest.mark.parametrize(("path", "body", "bad"), PATHS)


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedApp]:
    with serve_script(tmp_path_factory.mktemp("encoding"), max_body_mb="0.1") as scripted:
        yield scripted


def send(api: ScriptedApp, path: str, body: bytes | Iterator[bytes], encoding: str) -> Any:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return api.http.post(path, content=body, headers=headers)


def in_pieces(body: bytes, size: int) -> Iterator[bytes]:
    return (body[i : i + size] for i in range(0, len(body), size))


@each_path
@pytest.mark.parametrize(("encoding", "pack"), PACKERS)
def test_a_packed_body_is_read(
    api: ScriptedApp, path: str, body: bytes, bad: int, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    assert send(api, path, pack(body), encoding).status_code == 200
    assert send(api, path, in_pieces(pack(body), 3), encoding).status_code == 200


@each_path
@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, gzip", "nonsense"])
def test_another_encoding_is_415_by_name(
    api: ScriptedApp, path: str, body: bytes, bad: int, encoding: str
) -> None:
    answer = send(api, path, body, encoding)
    assert answer.status_code == 415
    assert encoding in answer.text
    assert "unsupported_encoding" in answer.text


PACKED = gzip.compress(NATIVE, mtime=0)
BROKEN = {
    "a header alone": b"\x1f\x8b broken",
    "cut": PACKED[:-4],
    "and more": PACKED + b"more",
    "empty": b"",
    "not packed": b"{}",
}


@each_path
@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_a_broken_body_is_a_validation_error(
    api: ScriptedApp, path: str, body: bytes, bad: int, broken: bytes
) -> None:
    assert send(api, path, broken, "gzip").status_code == bad
    assert send(api, path, in_pieces(broken, 2), "gzip").status_code == bad


@each_path
def test_the_limit_counts_what_it_decodes_to(api: ScriptedApp, path: str, body: bytes, bad: int) -> None:
    for spaces, status in ((50_000, 200), (20_000_000, 413)):
        packed = gzip.compress(body[:-1] + b" " * spaces + b"}")
        assert len(packed) < 100_000
        assert send(api, path, packed, "gzip").status_code == status


def test_the_limit_counts_what_comes_too(api: ScriptedApp) -> None:
    """Empty blocks decode to nothing, however many come."""
    empty = b"\x00\x00\x00\xff\xff"
    endless = (empty * 1000 for _ in range(100))
    assert send(api, "/generate", endless, "deflate").status_code == 413
