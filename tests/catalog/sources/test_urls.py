"""Adapters from URLs: against a web server on loopback, and fsspec's file system in memory in place of an
object store.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from service.catalog.sources import remote, web
from service.catalog.sources.base import SourceLocation
from service.catalog.sources.hub import Hub
from service.catalog.sources.object_store import open_store
from service.catalog.sources.remote import Download
from service.catalog.sources.store import Store
from service.catalog.sources.urls import Urls
from service.core.manifest import CONFIG, WEIGHTS, compute_digest, read_manifest
from service.errors import (
    AdapterdError,
    AdapterInvalid,
    BadRequest,
    Forbidden,
    PayloadTooLarge,
    SourceMissing,
    StorageFull,
)

pytestmark = pytest.mark.anyio
LIMIT = 1_000_000
FILES = ("chat_template.jinja", "tokenizer.json", "vocab.txt", "vocab.json")


class Site:
    """Files of a web server by path, and how it answers for some of them."""

    server: ThreadingHTTPServer

    def __init__(self) -> None:
        self.url = ""
        self.files: dict[str, bytes] = {}
        self.moved: dict[str, str] = {}
        self.codes: dict[str, int] = {}
        self.lengths: dict[str, int] = {}
        self.headers: dict[str, str] = {}
        self.asked: list[str] = []
        self.hosts: set[str] = set()

    def put(self, folder: Path, path: str) -> None:
        for file in folder.iterdir():
            self.files[f"{path}/{file.name}"] = file.read_bytes()


@pytest.fixture
def site() -> Iterator[Site]:
    one = Site()

    class SiteHandler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            one.asked.append(self.path)
            one.hosts.add(self.headers["host"])
            body = one.files.get(self.path)
            if target := one.moved.get(self.path):
                self._answer(302, b"", {"location": target})
            elif self.path in one.codes:
                self._answer(one.codes[self.path], b"")
            elif body is None:
                self._answer(404, b"no such file")
            else:
                self._answer(200, body, one.headers)

        def _answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            self.send_header("content-length", str(one.lengths.get(self.path, len(body))))
            self.send_header("connection", "close")
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True

        def log_message(self, format: str, *arguments: object) -> None:
            return None

    with ThreadingHTTPServer(("127.0.0.1", 0), SiteHandler) as one.server:
        thread = threading.Thread(target=one.server.serve_forever, args=(0.01,))
        thread.start()
        one.url = f"http://127.0.0.1:{one.server.server_port}"
        yield one
        one.server.shutdown()
        thread.join()


@pytest.fixture
def dressed(tmp_path: Path, plain: Path) -> Path:
    """An adapter with files of its tokenizer and others that are none of an adapter's."""
    folder = tmp_path / "dressed"
    folder.mkdir()
    for name in (CONFIG, WEIGHTS):
        (folder / name).write_bytes((plain / name).read_bytes())
    for name in (*FILES, "README.md", "optimizer.pt"):
        (folder / name).write_text(name)
    return folder


def store(tmp_path: Path, *allowed: str, limit: int = LIMIT, memory: Any = None) -> Store:
    urls = Urls(allowed, tmp_path / "adapters", (lambda scheme: memory) if memory else open_store)
    return Store(tmp_path / "adapters", Hub(()), limit, None, (urls,))


def leftovers(tmp_path: Path) -> list[str]:
    folder = tmp_path / "adapters" / ".downloads"
    return sorted(os.listdir(folder)) if folder.exists() else []


def digest_of(folder: Path) -> str:
    return compute_digest(read_manifest(folder))


# ---- web servers


async def test_the_files_of_the_manifest_come_and_no_other(site: Site, tmp_path: Path, dressed: Path) -> None:
    site.put(dressed, "/team/one")
    told: list[int] = []
    place = await store(tmp_path, f"{site.url}/team/").find_source(
        f"{site.url}/team/one/", on_progress=told.append
    )
    assert place.staged
    assert place.source == f"{site.url}/team/one"
    assert digest_of(place.folder) == digest_of(dressed)
    assert {path.rpartition("/")[2] for path in site.asked}.isdisjoint({"README.md", "optimizer.pt"})
    assert told == sorted(told)
    assert told[-1] == sum((dressed / name).stat().st_size for name in (CONFIG, WEIGHTS, *FILES))


async def test_a_subfolder_is_part_of_the_url(site: Site, tmp_path: Path, plain: Path) -> None:
    site.put(plain, "/team/run/checkpoint-20")
    here = store(tmp_path, f"{site.url}/team")
    place = await here.find_source(f"{site.url}/team/run", subfolder="checkpoint-20")
    assert (place.source, place.subfolder) == (f"{site.url}/team/run", "checkpoint-20")
    assert digest_of(place.folder) == digest_of(plain)
    for bad, kind in (("..", Forbidden), ("a%2fb", BadRequest), ("/a", Forbidden)):
        with pytest.raises(kind, match=r"^subfolder"):
            await here.find_source(f"{site.url}/team/run", subfolder=bad)


async def test_what_is_not_below_a_prefix_is_forbidden_and_not_asked_for(
    site: Site, tmp_path: Path, plain: Path
) -> None:
    site.put(plain, "/other/one")
    here = store(tmp_path, f"{site.url}/team")
    port = site.url.rpartition(":")[2]
    for source in (
        f"{site.url}/other/one",
        f"{site.url}/teams",
        f"http://localhost:{port}/team/one",
        "http://169.254.169.254/latest",
        "s3://bucket/team/one",
        "https://example.com/team/one",
    ):
        with pytest.raises(Forbidden, match="ADAPTERD_SOURCES"):
            await here.find_source(source)
    for source in (
        f"{site.url}/team/../other/one",
        f"{site.url}/team/%2e%2e/other/one",
        "file:///etc/passwd",
    ):
        with pytest.raises(BadRequest, match=r"^source: "):
            await here.find_source(source)
    with pytest.raises(Forbidden):
        await store(tmp_path).find_source(f"{site.url}/team/one")
    with pytest.raises(BadRequest, match="revision"):
        await here.find_source(f"{site.url}/team/one", revision="main")
    assert (site.asked, leftovers(tmp_path)) == ([], [])


async def test_a_name_whose_address_changes_is_asked_where_it_was_checked(
    site: Site, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second answer of a resolver is never heard: there is no second question."""
    site.put(plain, "/team/one")
    port = site.url.rpartition(":")[2]
    questions: list[str] = []

    def resolve(host: str, *given: Any, **named: Any) -> list[Any]:
        if host == "files.example.com":
            questions.append(host)
            address = "127.0.0.1" if len(questions) == 1 else "169.254.169.254"
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0))]
        assert host in ("127.0.0.1", "169.254.169.254"), "connections go to addresses alone"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, given[0]))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    here = store(tmp_path, f"http://files.example.com:{port}/team", f"http://127.0.0.1:{port}/nothing")
    await here.find_source(f"http://files.example.com:{port}/team/one")
    assert questions == ["files.example.com"]
    assert site.hosts == {f"files.example.com:{port}"}
    with pytest.raises(Forbidden, match="not of the internet"):
        await here.find_source(f"http://files.example.com:{port}/team/one")


async def test_a_redirect_leads_to_the_same_host_below_a_prefix_or_nowhere(
    site: Site, tmp_path: Path, plain: Path
) -> None:
    site.put(plain, "/team/real")
    site.moved = {f"/team/one/{name}": f"/team/real/{name}" for name in (CONFIG, WEIGHTS)}
    here = store(tmp_path, f"{site.url}/team")
    assert digest_of((await here.find_source(f"{site.url}/team/one")).folder) == digest_of(plain)
    port = site.url.rpartition(":")[2]
    for target in (
        f"http://localhost:{port}/team/real/{CONFIG}",
        f"/other/{CONFIG}",
        f"{site.url}/team/real/{CONFIG}?X-Signature=hunter2",
        "file:///etc/passwd",
        "https://example.com/team/one",
    ):
        site.moved[f"/team/one/{CONFIG}"] = target
        with pytest.raises(AdapterInvalid, match="redirected to another place") as caught:
            await here.find_source(f"{site.url}/team/one")
        assert "hunter2" not in caught.value.message
    steps = [f"/team/{name}/{CONFIG}" for name in ("one", "a", "b", "real")]
    site.moved |= dict(pairwise(steps))
    assert digest_of((await here.find_source(f"{site.url}/team/one")).folder) == digest_of(plain)
    site.moved[f"/team/one/{CONFIG}"] = f"/team/one/{CONFIG}"
    with pytest.raises(AdapterInvalid, match="again and again"):
        await here.find_source(f"{site.url}/team/one")


async def test_what_is_not_there_or_only_in_part_is_told(site: Site, tmp_path: Path, plain: Path) -> None:
    here = store(tmp_path, f"{site.url}/team")
    with pytest.raises(SourceMissing, match="no adapter lies there"):
        await here.find_source(f"{site.url}/team/none")
    site.put(plain, "/team/one")
    del site.files[f"/team/one/{WEIGHTS}"]
    with pytest.raises(AdapterInvalid, match=rf"^{WEIGHTS} is missing from {site.url}/team/one$"):
        await here.find_source(f"{site.url}/team/one")
    site.codes[f"/team/one/{WEIGHTS}"] = 403
    with pytest.raises(AdapterInvalid, match=f"{WEIGHTS} was answered with 403"):
        await here.find_source(f"{site.url}/team/one")
    assert leftovers(tmp_path) == []


async def test_other_bytes_than_the_files_are_refused(site: Site, tmp_path: Path, plain: Path) -> None:
    site.put(plain, "/team/one")
    site.headers = {"content-encoding": "gzip"}
    with pytest.raises(AdapterInvalid, match="encoding 'gzip'"):
        await store(tmp_path, f"{site.url}/team").find_source(f"{site.url}/team/one")


async def test_sizes_are_limited_as_told_and_as_they_come(site: Site, tmp_path: Path, plain: Path) -> None:
    site.put(plain, "/team/one")
    size = len(site.files[f"/team/one/{WEIGHTS}"])
    with pytest.raises(PayloadTooLarge, match="over the limit of 2000 bytes"):
        await store(tmp_path, f"{site.url}/team", limit=2000).find_source(f"{site.url}/team/one")
    here = store(tmp_path, f"{site.url}/team")
    site.lengths[f"/team/one/{WEIGHTS}"] = 10 * LIMIT
    with pytest.raises(PayloadTooLarge, match=f"limit of {LIMIT} bytes"):
        await here.find_source(f"{site.url}/team/one")
    site.lengths[f"/team/one/{WEIGHTS}"] = size + 10
    with pytest.raises(AdapterInvalid, match=f"cut after {size} bytes of {size + 10}"):
        await here.find_source(f"{site.url}/team/one")
    del site.lengths[f"/team/one/{WEIGHTS}"]
    site.files[f"/team/one/{CONFIG}"] = b" " * (remote.CONFIG_LIMIT + 1)
    with pytest.raises(PayloadTooLarge, match=f"{CONFIG} is over the limit of {remote.CONFIG_LIMIT} bytes"):
        await store(tmp_path, f"{site.url}/team", limit=10 * LIMIT).find_source(f"{site.url}/team/one")
    assert leftovers(tmp_path) == []


async def test_a_server_that_is_gone_or_drips_is_told_by_the_kind_of_its_error(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(web, "LONGEST_S", 0.2)
        began = time.monotonic()
        with pytest.raises(AdapterInvalid, match=r"cannot be fetched: RemoteDisconnected$"):
            await store(tmp_path, url).find_source(f"{url}/one")
        assert time.monotonic() - began < 5
    with pytest.raises(AdapterInvalid, match=r"cannot be fetched: ConnectionRefusedError$"):
        await store(tmp_path, url).find_source(f"{url}/one")


async def test_a_download_that_takes_too_long_is_given_up(
    site: Site, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put(plain, "/team/one")
    monkeypatch.setattr(remote, "LONGEST_S", -1)
    with pytest.raises(AdapterInvalid, match="not fetched within"):
        await store(tmp_path, f"{site.url}/team").find_source(f"{site.url}/team/one")


async def test_https_is_never_spoken_in_the_clear(site: Site, tmp_path: Path) -> None:
    port = site.url.rpartition(":")[2]
    url = f"https://127.0.0.1:{port}"
    with pytest.raises(AdapterInvalid, match=r"cannot be fetched: SSLError$"):
        await store(tmp_path, url).find_source(f"{url}/one")


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """A certificate for files.example.com that it has signed itself, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "files.example.com")])
    now = datetime.now(UTC)
    signed = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("files.example.com")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoding = serialization.Encoding.PEM
    form, none = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    path = tmp_path / "certificate.pem"
    path.write_bytes(key.private_bytes(encoding, form, none) + signed.public_bytes(encoding))
    return path


async def test_https_asks_the_checked_address_and_believes_the_name_alone(
    site: Site, tmp_path: Path, plain: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put(plain, "/team/one")
    own = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    own.load_cert_chain(certificate)
    site.server.socket = own.wrap_socket(site.server.socket, server_side=True)
    port = site.server.server_port
    names = {"files.example.com": "127.0.0.1", "other.example.com": "127.0.0.1"}
    resolve = socket.getaddrinfo
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda host, *given, **named: resolve(names.get(host, host), *given, **named)
    )
    prefixes = [f"https://{host}:{port}/team" for host in (*names, "127.0.0.1")]
    here = store(tmp_path, *prefixes)
    refusal = r"cannot be fetched: SSLCertVerificationError$"
    with pytest.raises(AdapterInvalid, match=refusal):
        await here.find_source(f"{prefixes[0]}/one")
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(ssl, "create_default_context", lambda: trusting)
    place = await here.find_source(f"{prefixes[0]}/one")
    assert digest_of(place.folder) == digest_of(plain)
    assert site.hosts == {f"files.example.com:{port}"}
    with pytest.raises(AdapterInvalid, match=refusal):
        await here.find_source(f"{prefixes[1]}/one")


# ---- object stores


@pytest.fixture
def memory() -> Iterator[Any]:
    files = fsspec.filesystem("memory", skip_instance_cache=True)
    files.store.clear()
    yield files
    files.store.clear()
    files.pseudo_dirs[:] = [""]


def fill(memory: Any, folder: Path, path: str) -> None:
    for file in folder.iterdir():
        memory.pipe_file(f"/{path}/{file.name}", file.read_bytes())


class Bucket:
    """The memory's files without the slash that they begin with there, as a bucket's are."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.opened: list[str] = []
        self.failure: Exception | None = None

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        if self.failure:
            raise self.failure
        entries = self.memory.ls(path, detail=detail)
        return [entry | {"name": entry["name"].lstrip("/")} for entry in entries]

    def open(self, path: str, mode: str, block_size: int) -> Any:
        self.opened.append(path)
        return self.memory.open(path, mode, block_size=block_size)


async def test_a_buckets_folder_gives_the_files_of_the_manifest_and_no_other(
    tmp_path: Path, dressed: Path, memory: Any
) -> None:
    fill(memory, dressed, "bucket/team/one")
    fill(memory, dressed, "bucket/team/one/deeper")
    bucket = Bucket(memory)
    place = await store(tmp_path, "s3://bucket/team", memory=bucket).find_source("s3://bucket/team/one")
    assert place == SourceLocation(place.folder, "s3://bucket/team/one", staged=True)
    assert digest_of(place.folder) == digest_of(dressed)
    assert sorted(bucket.opened) == sorted(f"bucket/team/one/{name}" for name in (CONFIG, WEIGHTS, *FILES))
    with pytest.raises(SourceMissing, match="no adapter lies there"):
        await store(tmp_path, "s3://bucket", memory=bucket).find_source("s3://bucket/none")


async def test_a_bucket_has_the_same_limits(tmp_path: Path, dressed: Path, memory: Any) -> None:
    fill(memory, dressed, "bucket/one")
    with pytest.raises(PayloadTooLarge):
        await store(tmp_path, "gs://bucket", limit=3000, memory=Bucket(memory)).find_source("gs://bucket/one")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    "failure", [PermissionError("key AKIA hunter2"), RuntimeError("hunter2"), OSError("hunter2")]
)
async def test_what_a_library_says_is_not_repeated(
    tmp_path: Path, memory: Any, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    bucket = Bucket(memory)
    bucket.failure = failure
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(AdapterInvalid, match=rf"s3://bucket/one cannot be fetched: {type(failure).__name__}$"),
    ):
        await store(tmp_path, "s3://bucket", memory=bucket).find_source("s3://bucket/one")
    assert "hunter2" not in caplog.text


async def test_a_package_that_is_missing_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def miss(*given: object, **named: object) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "filesystem", miss)
    for scheme, package in (("s3", "s3fs"), ("gs", "gcsfs")):
        line = f"{scheme}:// needs the package {package}, which is not installed here: pip install {package}"
        with pytest.raises(AdapterInvalid) as caught:
            await store(tmp_path, f"{scheme}://bucket").find_source(f"{scheme}://bucket/one")
        assert caught.value.problems == [line]


# ---- what is kept


async def test_what_is_kept_is_found_again_without_a_question(
    site: Site, tmp_path: Path, dressed: Path
) -> None:
    site.put(dressed, "/team/one")
    here = store(tmp_path, f"{site.url}/team")
    source, digest = f"{site.url}/team/one", digest_of(dressed)
    held = [CONFIG, WEIGHTS, *FILES]
    kept = here.keep_download(await here.find_source(source), digest)
    assert (kept.stored, kept.staged) == (f".downloads/{digest.removeprefix('sha256:')}", False)
    site.asked.clear()
    assert await here.find_source(source, uploads=True, held=held, digest=digest) == kept
    assert site.asked == []
    (kept.folder / WEIGHTS).unlink()
    again = await here.find_source(source, uploads=True, held=held, digest=digest)
    assert (again, digest_of(again.folder)) == (kept, digest)
    assert leftovers(tmp_path) == [digest.removeprefix("sha256:")]


async def test_what_was_registered_before_and_is_no_longer_allowed_is_refused(
    site: Site, tmp_path: Path, plain: Path
) -> None:
    site.put(plain, "/team/one")
    here = store(tmp_path, f"{site.url}/team")
    kept = here.keep_download(await here.find_source(f"{site.url}/team/one"), digest_of(plain))
    with pytest.raises(Forbidden):
        await store(tmp_path).find_source(kept.source, uploads=True, held=[CONFIG], digest=digest_of(plain))


async def test_leftovers_and_what_was_replaced_are_swept(site: Site, tmp_path: Path, plain: Path) -> None:
    site.put(plain, "/team/one")
    here = store(tmp_path, f"{site.url}/team")
    source = f"{site.url}/team/one"
    kept = here.keep_download(await here.find_source(source), digest_of(plain))
    staged = await here.find_source(source)
    here.sweep_interrupted(older_than_s=60)
    assert staged.folder.exists(), "another service may be at it"
    here.sweep_interrupted()
    assert (staged.folder.exists(), kept.folder.exists()) == (False, True)
    state = tmp_path / "adapters" / ".adapterd.json"
    here.sweep_replaced(state)
    assert kept.folder.exists(), "nothing is known"
    state.write_text(digest_of(plain))
    here.sweep_replaced(state)
    assert kept.folder.exists()
    state.write_text("{}")
    here.sweep_replaced(state, older_than_s=60)
    assert kept.folder.exists()
    here.sweep_replaced(state)
    assert leftovers(tmp_path) == []


async def test_a_full_disk_and_one_that_is_only_read_are_told(
    site: Site, tmp_path: Path, plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.put(plain, "/team/one")
    here = store(tmp_path, f"{site.url}/team")

    def fail(code: int) -> Any:
        def raising(*given: object, **named: object) -> None:
            raise OSError(code, os.strerror(code))

        return raising

    cases: list[tuple[int, type[AdapterdError]]] = [(errno.ENOSPC, StorageFull), (errno.EROFS, Forbidden)]
    for code, kind in cases:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "mkdir", fail(code))
            with pytest.raises(kind, match=r"^the download cannot be stored: "):
                await here.find_source(f"{site.url}/team/one")
    monkeypatch.setattr(Download, "fetch_files", fail(errno.ENOSPC))
    with pytest.raises(StorageFull, match="No space left"):
        await here.find_source(f"{site.url}/team/one")
    assert leftovers(tmp_path) == []
