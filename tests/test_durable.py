"""What must last is whole or not there at all, whatever ends the writing; damage is found; what killed
processes left goes, and what others are making stays.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from service import durable
from service.durable import NotWritten

ROOT = Path(__file__).parent.parent
CONTENT = bytes(range(256)) * 40


def fail(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, code: int = errno.ENOSPC) -> None:
    def refuse(*given: Any, **named: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(owner, name, refuse)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- files


def test_a_file_is_made_with_its_folder_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state"
    for content in (b"old", b"new"):
        durable.write_file(path, content)
        assert path.read_bytes() == content
    assert names(path.parent) == ["state"]


def test_it_is_synced_before_it_has_its_name_and_its_folder_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []
    sync, rename = os.fsync, Path.replace

    def note_sync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        done.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        sync(descriptor)

    def note_rename(path: Path, target: Path) -> Path:
        done.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(Path, "replace", note_rename)
    durable.write_file(tmp_path / "state", b"12345")
    assert done == ["file of 5", "rename", "folder"]


@pytest.mark.parametrize(("owner", "name"), [(os, "fsync"), (Path, "replace"), (Path, "open")])
def test_a_failure_leaves_the_old_content_and_nothing_else_and_is_told_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str
) -> None:
    path = tmp_path / "state"
    durable.write_file(path, b"old")
    with monkeypatch.context() as patch:
        fail(patch, owner, name)
        with pytest.raises(NotWritten) as caught:
            durable.write_file(path, b"new")
    assert str(caught.value) == "state cannot be written: No space left on device"
    assert (caught.value.errno, caught.value.strerror) == (errno.ENOSPC, "No space left on device")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["state"]


def test_a_share_that_cannot_sync_folders_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = os.fsync

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_folders)
    durable.write_file(tmp_path / "state", b"x")
    assert (tmp_path / "state").read_bytes() == b"x"


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_modes_are_the_umasks(tmp_path: Path, mask: int, file: int, folder: int) -> None:
    before = os.umask(mask)
    try:
        durable.write_file(tmp_path / "state", b"x")
        with durable.making_folder(tmp_path / "base") as made:
            (made / "weights").touch(0o600)  # as a library does that makes its files for itself
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert [modes[name] for name in ("state", "weights", durable.RECORD)] == [file] * 3
    assert modes["base"] == folder


# ---- folders


def make(target: Path, content: bytes = CONTENT) -> Path:
    with durable.making_folder(target) as made:
        (made / "inner").mkdir()
        (made / "inner" / "weights").write_bytes(content)
        (made / "config.json").write_bytes(b"{}")
    return target


def test_a_folder_has_its_name_once_it_is_filled_and_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "bases" / "base"
    with durable.making_folder(target) as made:
        (made / "weights").write_bytes(CONTENT)
        assert not target.exists()
        assert made.parent == target.parent
    assert names(target.parent) == [durable.LOCK, "base"]
    assert (target / "weights").read_bytes() == CONTENT
    assert durable.is_whole(target)
    assert not durable.is_whole(tmp_path / "none")


def test_what_raises_while_it_is_filled_leaves_nothing(tmp_path: Path) -> None:
    def fill_half() -> None:
        with durable.making_folder(tmp_path / "base") as made:
            (made / "weights").write_bytes(CONTENT)
            raise KeyError

    with pytest.raises(KeyError):
        fill_half()
    assert names(tmp_path) == [durable.LOCK]


def test_a_folder_that_cannot_be_synced_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, os, "fsync", errno.EIO)
    with pytest.raises(NotWritten, match=r"^base cannot be written: "):
        make(tmp_path / "base")
    assert names(tmp_path) == [durable.LOCK]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def zero_half(path: Path) -> None:
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + bytes(path.stat().st_size - half))


def change_unnoticed(path: Path) -> None:
    """One byte, and the times as they were."""
    before = path.stat()
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(bytes(content))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


WEIGHTS = Path("inner/weights")
DAMAGE: dict[str, tuple[Path, Callable[[Path], object], str]] = {
    "cut": (WEIGHTS, cut, "inner/weights has 5120 bytes of 10240"),
    "half zeroed": (WEIGHTS, zero_half, "inner/weights has other bytes than were written"),
    "a byte": (WEIGHTS, change_unnoticed, "inner/weights has other bytes than were written"),
    "gone": (WEIGHTS, Path.unlink, "inner/weights is missing"),
    "empty": (Path("config.json"), lambda path: os.truncate(path, 0), "config.json has 0 bytes of 2"),
    "no record": (Path(durable.RECORD), Path.unlink, "it has no record of its files"),
    "a cut record": (Path(durable.RECORD), cut, f"{durable.RECORD} is damaged"),
    "a zeroed record": (
        Path(durable.RECORD),
        lambda path: path.write_bytes(bytes(100)),
        f"{durable.RECORD} is damaged",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_a_new_folder_takes_the_place(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    file, damage, said = DAMAGE[kind]
    target = make(tmp_path / "base")
    damage(target / file)
    assert durable.find_damage(target) == said
    assert not durable.is_whole(target)
    assert said in caplog.text
    make(target, CONTENT[::-1])
    assert durable.is_whole(target)
    assert (target / WEIGHTS).read_bytes() == CONTENT[::-1]
    assert names(tmp_path) == [durable.LOCK, "base"]


RECORDS: list[Any] = [[], {}, *({"files": files} for files in ([], [["a"]], [[1, 2, 3]], 1))]


@pytest.mark.parametrize("record", RECORDS)
def test_a_record_that_says_nothing_is_damage(tmp_path: Path, record: Any) -> None:
    (make(tmp_path / "base") / durable.RECORD).write_text(json.dumps(record))
    assert durable.find_damage(tmp_path / "base") == f"{durable.RECORD} is damaged"


def test_of_two_that_make_the_same_folder_the_first_ones_stays(tmp_path: Path) -> None:
    target = tmp_path / "base"
    with durable.making_folder(target) as made:
        (made / "weights").write_bytes(b"second")
        make(target, b"first")
    assert (target / WEIGHTS).read_bytes() == b"first"
    assert names(tmp_path) == [durable.LOCK, "base"]


def test_checksums_are_computed_once_after_each_start_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make(tmp_path / "base")
    boot, computed = tmp_path / "boot_id", []
    compute = durable._compute_checksum

    def count(path: Path) -> int:
        computed.append(path.name)
        return compute(path)

    monkeypatch.setattr(durable, "_compute_checksum", count)
    assert durable.is_whole(target)
    assert computed == [], "it was made since the machine started"
    monkeypatch.setattr(durable, "BOOT_ID", boot)
    boot.write_text("another\n")
    for _ in range(2):
        assert durable.is_whole(target)
    assert sorted(computed) == ["config.json", "weights"]
    boot.unlink()  # a system that does not say when it started
    for _ in range(2):
        assert durable.is_whole(target)
    assert len(computed) == 6


# ---- what is left half made


def test_what_is_half_made_is_swept_and_nothing_else(tmp_path: Path) -> None:
    make(tmp_path / "base")
    (tmp_path / ".making-1-base").mkdir()
    (tmp_path / ".making-1-base" / "weights").touch()
    (tmp_path / ".making-2-state").touch()
    (tmp_path / ".making-3-link").symlink_to(tmp_path / "base")
    durable.sweep_unfinished(tmp_path)
    assert names(tmp_path) == [durable.LOCK, "base"]
    durable.sweep_unfinished(tmp_path / "none")


HOLDER = """
import sys, time
from pathlib import Path
from service import durable
with durable.making_folder(Path(sys.argv[1])) as made:
    (made / "weights").touch()
    print(made.name, flush=True)
    time.sleep(1000)
"""


def test_what_another_process_makes_stays_until_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "base")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            made = holder.stdout.readline().strip()
            durable.sweep_unfinished(tmp_path)
            assert (tmp_path / made / "weights").exists()
        finally:
            holder.kill()
    assert (tmp_path / made).exists()
    durable.sweep_unfinished(tmp_path)
    assert names(tmp_path) == [durable.LOCK]


def test_a_folder_that_is_not_there_yet_is_as_writable_as_the_one_it_would_lie_in(tmp_path: Path) -> None:
    assert durable.why_unwritable(tmp_path / "a" / "b") == ""
