"""Nothing is read, written or deleted outside the adapters directory, whatever a source, a link or
an archive says.
"""

from __future__ import annotations

import errno
import gzip
import io
import os
import shutil
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Literal

import pytest

from service.catalog.sources import store as store_module
from service.catalog.sources.base import SourceLocation
from service.catalog.sources.hub import Hub
from service.catalog.sources.store import Store, upload_source
from service.catalog.validator.header import CONFIG, WEIGHTS
from service.core.manifest import compute_digest, read_manifest
from service.errors import (
    AdapterdError,
    AdapterInvalid,
    BadRequest,
    Forbidden,
    PayloadTooLarge,
    StorageFull,
)

from ..test_registry import Part, parts

pytestmark = pytest.mark.anyio
LIMIT = 100_000
TEXTS = ("tokenizer.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "vocab.txt")


@pytest.fixture
def store(root: Path) -> Store:
    return Store(root, Hub(()), LIMIT)


# ---- sources


async def test_a_folder_under_the_root_is_found(store: Store, root: Path, plain: Path) -> None:
    shutil.copytree(plain, root / "org" / "name")
    assert (await store.find_source("org/name")).folder == (root / "org/name").resolve()
    assert (await store.find_source("org/name/")).source == "org/name"


@pytest.mark.parametrize(
    "source",
    [
        "/etc",
        "..",
        "../outside",
        "x/../../outside",
        "~",
        "~root",
        "file:///etc",
        "a\0b",
        "",
        ".",
        "a//b",
        "./x",
        ".uploads/x",
        "a\\b",
        "C:/x",
        "x/..",
        "a" * 2000,
        "a/" * 2_000_000,
    ],
)
async def test_sources_outside_are_forbidden(store: Store, source: str) -> None:
    with pytest.raises(Forbidden):
        await store.find_source(source)
    with pytest.raises(Forbidden):
        await store.find_source("x", subfolder=source) if source else await store.find_source("")


@pytest.mark.parametrize("name", ["\ud800", "bad\udcff", "x/bad\udcff"])
async def test_a_name_that_is_no_utf8_is_refused_though_the_folder_is_there(
    store: Store, root: Path, plain: Path, name: str
) -> None:
    """Libraries cannot open it, and would say so with the host's path."""
    for folder in ("bad\udcff", "x/bad\udcff"):
        with suppress(OSError):  # some file systems have no such names
            shutil.copytree(plain, root / folder)
    for source, subfolder, field in ((name, None, "source"), ("x", name, "subfolder")):
        with pytest.raises(BadRequest, match="no UTF-8") as refused:
            await store.find_source(source, subfolder)
        assert (refused.value.param, str(root) in refused.value.message) == (field, False)


async def test_a_missing_folder_is_invalid_and_hides_the_root(store: Store, root: Path) -> None:
    with pytest.raises(AdapterInvalid, match="no such folder") as caught:
        await store.find_source("no-such")
    assert str(root) not in caught.value.message


@pytest.mark.parametrize("name", ["", CONFIG, WEIGHTS, *TEXTS])
async def test_links_that_leave_the_root_are_forbidden(
    store: Store, root: Path, plain: Path, tmp_path: Path, name: str
) -> None:
    outside = tmp_path / "outside"
    shutil.copytree(plain, outside)
    if name:
        shutil.copytree(plain, root / "x")
        (root / "x" / name).unlink(missing_ok=True)
        (outside / name).touch()
    (root / "x" / name).symlink_to(outside / name)
    with pytest.raises(Forbidden, match="link"):
        await store.find_source("x")


async def test_links_within_the_root_are_followed(store: Store, root: Path, plain: Path) -> None:
    shutil.copytree(plain, root / "real")
    (root / "x").symlink_to(root / "real")
    assert (await store.find_source("x")).folder == (root / "real").resolve()
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(AdapterInvalid):
        await store.find_source("loop")


async def test_a_run_folder_lists_its_checkpoints_and_one_can_be_named(
    store: Store, root: Path, plain: Path
) -> None:
    for n in (10, 20):
        shutil.copytree(plain, root / "run" / f"checkpoint-{n}")
    with pytest.raises(AdapterInvalid, match="checkpoint-10, checkpoint-20"):
        await store.find_source("run")
    assert (await store.find_source("run", subfolder="checkpoint-20")).path == "run/checkpoint-20"


async def test_a_revision_is_only_for_the_hub(store: Store) -> None:
    with pytest.raises(BadRequest, match="revision"):
        await store.find_source("x", revision="main")


async def test_folders_below_the_root_are_listed_without_hidden_ones(
    store: Store, root: Path, plain: Path
) -> None:
    for name in ("a", "org/b", ".hidden/c", "d/e/f/g", "d/e/f/g/h"):
        shutil.copytree(plain, root / name, dirs_exist_ok=True)
    assert list(store.list_folders()) == ["a", "d/e/f/g", "org/b"]


async def test_links_within_the_root_are_listed_and_those_that_leave_it_are_named(
    store: Store, root: Path, plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As git-sync and Kubernetes lay them."""
    for name in ("real", ".worktrees/a1/tone", ".worktrees/a1/team/x", "map/..2026"):
        shutil.copytree(plain, root / name)
    shutil.copytree(plain, tmp_path / "outside")
    (root / "map" / "..data").symlink_to("..2026")
    (root / "map" / CONFIG).symlink_to(f"..data/{CONFIG}")
    (root / "map" / WEIGHTS).symlink_to(f"..data/{WEIGHTS}")
    (root / "org").mkdir()
    links = {"tone": ".worktrees/a1/tone", "org/again": "../real", "team": str(root / ".worktrees/a1/team")}
    links |= dict.fromkeys(("leaves", "org/leaves too"), str(tmp_path / "outside"))
    for name, target in links.items():
        (root / name).symlink_to(target)
    listed = ["map", "org/again", "real", "team/x", "tone"]
    assert list(store.list_folders()) == listed
    assert sorted(caplog.messages) == [
        f"the link {name} is not registered: it leaves the adapters directory"
        for name in ("leaves", "org/leaves too")
    ]
    for name in listed:
        assert (await store.find_source(name)).folder.is_relative_to(root)


def test_links_in_a_circle_end(store: Store, root: Path, plain: Path) -> None:
    shutil.copytree(plain, root / "a")
    shutil.copytree(plain, root / "b")
    circles = {"round": ".", "a/self": ".", "a/up": "..", "a/b": "../b", "b/a": "../a"}
    circles |= {"gone": "nowhere", "loop": "loop"}
    for name, target in circles.items():
        (root / name).symlink_to(target)
    assert list(store.list_folders()) == ["a", "a/b", "b", "b/a"]


def test_the_fingerprint_changes_with_every_file_of_the_manifest_and_with_no_other(
    root: Path, plain: Path
) -> None:
    shutil.copytree(plain, root / "x")
    place = SourceLocation(root / "x", "x")
    seen = {place.compute_fingerprint()}
    for name in (CONFIG, WEIGHTS):
        os.utime(root / "x" / name, ns=(1, 1))
        seen.add(place.compute_fingerprint())
    for name in TEXTS:
        (root / "x" / name).touch()
        seen.add(place.compute_fingerprint())
        os.utime(root / "x" / name, ns=(1, 1))
        seen.add(place.compute_fingerprint())
    assert len(seen) == 3 + 2 * len(TEXTS)
    (root / "x" / "README.md").touch()
    assert place.compute_fingerprint() in seen


def test_the_fingerprint_changes_with_content_of_the_same_size_and_time(root: Path, plain: Path) -> None:
    shutil.copytree(plain, root / "x")
    place, weights = SourceLocation(root / "x", "x"), root / "x" / WEIGHTS
    before, stat = place.compute_fingerprint(), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    while weights.stat().st_ctime_ns == stat.st_ctime_ns:  # a file system's clock ticks
        weights.write_bytes(content)
        os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = weights.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)
    assert place.compute_fingerprint() != before


async def test_what_is_named_like_a_file_of_the_manifest_and_is_none_is_refused(
    store: Store, root: Path, plain: Path
) -> None:
    for name, make in (("pipe", os.mkfifo), ("folder", os.mkdir)):
        shutil.copytree(plain, root / name)
        make(root / name / "chat_template.jinja")
        with pytest.raises(AdapterInvalid, match=r"chat_template\.jinja .* is no file"):
            await store.find_source(name)


# ---- uploads


def zipped(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return out.getvalue()


Packing = Literal["w:", "w:gz", "w:bz2", "w:xz"]
PACKINGS: tuple[Packing, ...] = ("w:", "w:gz", "w:bz2", "w:xz")


def tarred(
    members: dict[str, bytes],
    mode: Packing = "w:gz",
    change: Callable[[tarfile.TarInfo], None] = lambda info: None,
) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            change(info)
            file.addfile(info, io.BytesIO(content))
    return out.getvalue()


def content(folder: Path, prefix: str = "") -> dict[str, bytes]:
    return {prefix + name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}


@pytest.mark.parametrize("pack", [zipped, *(partial(tarred, mode=mode) for mode in PACKINGS)])
@pytest.mark.parametrize("prefix", ["", "checkpoint-20/", "./"])
async def test_an_archive_gives_the_two_files_and_nothing_else(
    store: Store, plain: Path, pack: Callable[[dict[str, bytes]], bytes], prefix: str
) -> None:
    staged = await store.stage_upload(
        {"file": Part(pack(content(plain, prefix) | {"notes/README.md": b"hello"}))}
    )
    assert sorted(path.name for path in staged.iterdir()) == [CONFIG, WEIGHTS]
    assert (staged / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("prefix", ["", "checkpoint-20/"])
async def test_an_archive_gives_every_file_of_the_manifest_that_lies_beside_the_weights(
    store: Store, plain: Path, pack: Callable[[dict[str, bytes]], bytes], prefix: str
) -> None:
    beside = {prefix + name: name.encode() for name in (*TEXTS, "README.md")}
    elsewhere = {"base/tokenizer.json": b"", "base/merges.txt": b"", "deeper/base/chat_template.jinja": b""}
    staged = await store.stage_upload({"file": Part(pack(elsewhere | content(plain, prefix) | beside))})
    assert sorted(path.name for path in staged.iterdir()) == sorted((CONFIG, WEIGHTS, *TEXTS))
    assert all((staged / name).read_text() == name for name in TEXTS)


async def test_parts_by_the_names_of_the_manifest_are_stored_and_count(
    store: Store, root: Path, plain: Path
) -> None:
    sent: dict[str, Any] = {name: Part(name.encode()) for name in TEXTS}
    staged = await store.stage_upload(parts(plain) | sent)
    assert sorted(path.name for path in staged.iterdir()) == sorted((CONFIG, WEIGHTS, *TEXTS))
    assert all((staged / name).read_text() == name for name in TEXTS)
    shutil.rmtree(staged)
    with pytest.raises(PayloadTooLarge):
        await store.stage_upload(parts(plain) | {"chat_template.jinja": Part(bytes(LIMIT))})
    with pytest.raises(PayloadTooLarge):
        await store.stage_upload(
            {"file": Part(tarred(content(plain) | {"chat_template.jinja": bytes(LIMIT)}))}
        )
    assert list((root / ".uploads").iterdir()) == []


def linked(good: dict[str, bytes], name: str, kind: bytes) -> bytes:
    """A tar in which this member is a link or a device."""

    def change(info: tarfile.TarInfo) -> None:
        if info.name == name:
            info.type, info.linkname, info.size = kind, "/etc/passwd", 0

    return tarred(good | {name: b""}, change=change)


def flipped(archive: bytes) -> bytes:
    half = len(archive) // 2
    return archive[:half] + bytes(byte ^ 255 for byte in archive[half : half + 100]) + archive[half + 100 :]


EVIL: dict[str, Callable[[dict[str, bytes]], bytes]] = {
    "zip climbs": lambda good: zipped(good | {"../../escape": b"x"}),
    "zip absolute": lambda good: zipped(good | {"/escape": b"x"}),
    "zip backslash": lambda good: zipped(good | {"..\\escape": b"x"}),
    "tar climbs": lambda good: tarred(good | {"../../escape": b"x"}),
    "tar absolute": lambda good: tarred(good | {"/escape": b"x"}),
    "tar link": lambda good: linked(good, WEIGHTS, tarfile.SYMTYPE),
    "tar hard link": lambda good: linked(good, WEIGHTS, tarfile.LNKTYPE),
    "tar device": lambda good: linked(good, "dev", tarfile.CHRTYPE),
    "two of one name": lambda good: tarred({**good, "tokenizer.json": b"", "./tokenizer.json": b""}),
    "a link to a template": lambda good: linked(good, "chat_template.jinja", tarfile.SYMTYPE),
    "two adapters": lambda good: zipped(good | {f"x/{name}": data for name, data in good.items()}),
    "halves in two folders": lambda good: zipped(
        {f"a/{CONFIG}": good[CONFIG], f"b/{WEIGHTS}": good[WEIGHTS]}
    ),
    "no weights": lambda good: zipped({CONFIG: good[CONFIG]}),
    "junk": lambda good: b"junk",
    "empty": lambda good: b"",
    "cut zip": lambda good: zipped(good)[:-30],
    "cut tar": lambda good: tarred(good)[:200],
    "zip with a name that is no UTF-8": lambda good: (
        zipped(good | {"é": b""}).replace("é".encode(), b"\xff\xff")
    ),
    "cut xz": lambda good: tarred(good, "w:xz")[:2000],
    "damaged xz": lambda good: flipped(tarred(good, "w:xz")),
    "damaged bz2": lambda good: flipped(tarred(good, "w:bz2")),
    "zip with a bad sum": lambda good: zipped(good).replace(good[WEIGHTS][-64:], bytes(64), 1),
}  # fmt: skip


@pytest.mark.parametrize("evil", EVIL)
async def test_evil_and_broken_archives_are_refused_and_leave_nothing(
    store: Store, root: Path, plain: Path, evil: str
) -> None:
    with pytest.raises(AdapterInvalid):
        await store.stage_upload({"file": Part(EVIL[evil](content(plain)))})
    assert list((root / ".uploads").iterdir()) == []
    assert not list(root.parent.rglob("escape*"))


async def test_what_unpacks_to_more_than_the_limit_is_too_large(
    store: Store, root: Path, plain: Path
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(CONFIG, b"{}")
        file.writestr(WEIGHTS, bytes(LIMIT + 1))
    assert len(out.getvalue()) < LIMIT
    with pytest.raises(PayloadTooLarge):
        await store.stage_upload({"file": Part(out.getvalue())})
    with pytest.raises(PayloadTooLarge):
        await store.stage_upload({"file": Part(tarred(content(plain) | {"big": bytes(LIMIT)}))})
    assert list((root / ".uploads").iterdir()) == []


def many(good: dict[str, bytes]) -> bytes:
    """Nothing but names; each takes half a kilobyte of memory, too."""
    return zipped(good | {f"{i:0100}/": b"" for i in range(60_000)})


def headed(good: dict[str, bytes], kind: bytes) -> bytes:
    """A tar whose first member's name, or whose extended header, has 50 MB: zeros, which weigh
    nothing when compressed.
    """
    head = tarfile.TarInfo("x")
    head.type, head.size = kind, 50_000_000
    return gzip.compress(head.tobuf(tarfile.GNU_FORMAT) + bytes(50_000_256)) + tarred(good)


def sparse(good: dict[str, bytes]) -> bytes:
    """A tar whose first member has a map of holes that goes on and on, in blocks that each say that
    another one follows.
    """
    head = bytearray(tarfile.TarInfo("x").tobuf(tarfile.GNU_FORMAT))
    head[156:157], head[386:398], head[482] = tarfile.GNUTYPE_SPARSE, b"00000000000\0", 1
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    block = (b"00000000000\0" * 42) + b"\1" + bytes(7)
    return gzip.compress(bytes(head) + block * 40_000)


@pytest.mark.parametrize(
    "pack",
    [many, partial(headed, kind=tarfile.XHDTYPE), partial(headed, kind=tarfile.GNUTYPE_LONGNAME), sparse],
    ids=["zip", "pax", "name", "sparse"],
)
async def test_an_archive_that_describes_itself_without_end_is_not_taken_into_memory(
    root: Path, plain: Path, pack: Callable[[dict[str, bytes]], bytes]
) -> None:
    store = Store(root, Hub(()), 1000 * LIMIT)
    part = Part(pack(content(plain)))
    tracemalloc.start()
    try:
        with pytest.raises(PayloadTooLarge, match="to say what it holds"):
            await store.stage_upload({"file": part})
        assert tracemalloc.get_traced_memory()[1] < 40_000_000
    finally:
        tracemalloc.stop()


async def test_a_zip_that_lies_about_a_size_gives_no_more_than_it_has_told(
    store: Store, root: Path, plain: Path, monkeypatch: Any
) -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(CONFIG, b"{}")
        file.writestr(WEIGHTS, bytes(10 * LIMIT))
    real, lie = (10 * LIMIT).to_bytes(4, "little"), (10).to_bytes(4, "little")
    sizes: list[int] = []
    monkeypatch.setattr(
        store_module,
        "delete_folder",
        lambda folder: sizes.extend(path.stat().st_size for path in folder.iterdir()),
    )
    with pytest.raises(AdapterInvalid):
        await store.stage_upload({"file": Part(out.getvalue().replace(real, lie))})
    assert max(sizes) < LIMIT


async def test_an_upload_over_the_limit_is_too_large(store: Store, root: Path) -> None:
    with pytest.raises(PayloadTooLarge):
        await store.stage_upload({CONFIG: Part(bytes(LIMIT)), WEIGHTS: Part(bytes(1))})
    assert list((root / ".uploads").iterdir()) == []


BAD_PARTS = [
    (),
    (CONFIG,),
    (WEIGHTS,),
    (CONFIG, "adapter_model.bin"),
    ("file", CONFIG),
    ("file", "tokenizer.json"),
    ("a.zip",),
    ("tokenizer.json",),
    (CONFIG, WEIGHTS, "README.md"),
    (CONFIG, WEIGHTS, "vocab.a/../../x"),
    (CONFIG, WEIGHTS, "../tokenizer.json"),
]


@pytest.mark.parametrize("names", BAD_PARTS)
async def test_other_parts_are_a_bad_request(store: Store, names: tuple[str, ...]) -> None:
    with pytest.raises(BadRequest, match=r"adapter_config\.json"):
        await store.stage_upload({name: Part(b"") for name in names})


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, StorageFull),
        (errno.EDQUOT, StorageFull),
        (errno.EIO, StorageFull),
        (errno.EROFS, Forbidden),
        (errno.EACCES, Forbidden),
    ],
)
async def test_an_upload_that_cannot_be_stored_is_told_and_leaves_nothing(
    store: Store, root: Path, code: int, kind: type[AdapterdError]
) -> None:
    class Broken:
        async def read(self, size: int = -1) -> bytes:
            raise OSError(code, os.strerror(code))

    with pytest.raises(kind, match=f"^the upload cannot be stored: {os.strerror(code)}$"):
        await store.stage_upload({"file": Broken()})
    assert list((root / ".uploads").iterdir()) == []


async def test_an_upload_is_synced_before_it_has_its_name(
    store: Store, root: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[tuple[int, bool]] = []
    name, sync = compute_digest(read_manifest(plain)), os.fsync

    def note(descriptor: int) -> None:
        synced.append((os.fstat(descriptor).st_ino, (root / upload_source(name)).exists()))
        sync(descriptor)

    staged = await store.stage_upload(parts(plain))
    monkeypatch.setattr(os, "fsync", note)
    place = store.keep_upload(staged, name)
    before = {inode for inode, is_named in synced if not is_named}
    assert before == {path.stat().st_ino for path in (place.folder, *place.folder.iterdir())}
    assert [inode for inode, is_named in synced if is_named] == [place.folder.parent.stat().st_ino]


async def test_an_upload_that_cannot_be_synced_is_not_kept(
    store: Store, root: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    staged = await store.stage_upload(parts(plain))
    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageFull):
        store.keep_upload(staged, compute_digest(read_manifest(plain)))
    assert list((root / ".uploads").iterdir()) == [staged]


async def test_what_was_kept_under_a_digest_is_replaced_only_when_it_is_not_that(
    store: Store, root: Path, plain: Path
) -> None:
    name = compute_digest(read_manifest(plain))
    for damage in (False, True):
        place = store.keep_upload(await store.stage_upload(parts(plain)), name)
        assert (place.folder / WEIGHTS).read_bytes() == (plain / WEIGHTS).read_bytes()
        if not damage:
            (place.folder / WEIGHTS).write_bytes(b"other")
    assert [path.name for path in (root / ".uploads").iterdir()] == [name.removeprefix("sha256:")]


async def test_only_uploads_are_purged_and_leftovers_are_swept(store: Store, root: Path, plain: Path) -> None:
    shutil.copytree(plain, root / "kept")
    staged = await store.stage_upload(parts(plain))
    for source in ("kept", ".uploads", "..", ".uploads/..", ".uploads/../kept", ""):
        store.purge_upload(source)
    assert (root / "kept" / CONFIG).exists()
    assert staged.exists()
    store.sweep_interrupted()
    assert not staged.exists()


async def test_purging_a_link_deletes_the_link_alone(
    store: Store, root: Path, plain: Path, tmp_path: Path
) -> None:
    shutil.copytree(plain, tmp_path / "outside")
    (root / ".uploads").mkdir()
    (root / ".uploads" / "abc").symlink_to(tmp_path / "outside")
    store.purge_upload(".uploads/abc")
    assert (tmp_path / "outside" / CONFIG).exists()
    assert not (root / ".uploads" / "abc").is_symlink()
