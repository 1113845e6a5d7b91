"""Remembers over restarts what the validator has found, so that unchanged files are not read again.

Runs in the API process; must not know where adapters lie. A line of the file is the CRC-32 of its rest, in
8 hex digits, and a JSON value: the LoRA layers that adapters of one recipe share, or what was found of one
adapter. A line that is not whole counts as none, and so does one of another base, setting or version of the
code. The file is a saving and no more: what it lacks is validated again.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import astuple
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from .. import durable
from ..core.adapter import Adapter, ExecutionPath, LoraLayerSpec, share_specs
from ..core.base_info import BaseInfo
from ..core.manifest import File, compute_digest
from .validator.messages import ValidatedAdapter

CACHE_FILE = ".adapterd.validated"
SOURCE = Path(__file__).parents[1]
LIBRARIES = ("jinja2", "peft", "safetensors", "tokenizers", "torch", "transformers")
WASTE = 100  # lines that nothing uses, over as many as are used, until the file is written anew
MOST = 20_000  # adapters that are added after the start; some 50 MB
Layers = tuple[LoraLayerSpec, ...]


class ValidationCache:
    """What was found of adapters, by the fingerprint of their files (see SourceLocation)."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / CACHE_FILE
        self._context = ""
        self._lines = 0  # in the file
        self._found: dict[str, ValidatedAdapter] = {}
        self._used: dict[str, ValidatedAdapter] | None = {}  # found or added; None after the start
        self._added = 0  # after the start
        self._written_layers: set[str] = set()

    def read_file(self, base: BaseInfo, max_rank: int) -> None:
        """Reads what was found on the same base, with the same settings and code."""
        try:
            self._context = _describe_context(base, max_rank)
        except OSError:  # nothing can be said of the base: nothing is found or added
            return
        layers: dict[str, Layers] = {}
        for value in self._read_lines():
            with suppress(ValueError, TypeError, KeyError, IndexError):
                if value[0] == "layers":
                    layers[value[1]] = share_specs(tuple(LoraLayerSpec(*spec) for spec in value[2]))
                elif value[1] == self._context:
                    self._found[value[2]] = _parse_validated(value[3], layers)
        self._written_layers = set(layers)

    def find_adapter(self, fingerprint: str) -> ValidatedAdapter | None:
        """What was found; its paths are empty (see ValidatedAdapter.move_to)."""
        found = self._found.get(fingerprint)
        if found is not None and self._used is not None:
            self._used[fingerprint] = found
        return found

    def add_adapter(self, fingerprint: str, validated: ValidatedAdapter) -> None:
        """Adds what was found, at the end of the file."""
        if not self._context or self._added >= MOST:
            return
        if self._used is not None:
            self._used[fingerprint] = validated
        else:
            self._added += 1
        lines = "".join(self._describe_adapter(fingerprint, validated))
        with suppress(OSError), self.path.open("ab") as file:
            file.write(b"\n" + lines.encode())  # what was written last may have been cut

    def end_start(self) -> None:
        """Forgets what was read, and writes the file anew where most of it was of no use."""
        used, self._used, self._found = self._used or {}, None, {}
        if self._lines > 2 * len(used) + WASTE:
            self._written_layers = set()
            lines = [line for entry in used.items() for line in self._describe_adapter(*entry)]
            with suppress(OSError):
                durable.write_file(self.path, "".join(lines).encode())

    def _read_lines(self) -> Iterator[Any]:
        try:
            lines = self.path.read_bytes().splitlines()
        except OSError:
            return
        self._lines = len(lines)
        for line in lines:
            checksum, _, text = line.partition(b" ")
            with suppress(ValueError):
                if text and int(checksum, 16) == zlib.crc32(text):
                    yield json.loads(text)

    def _describe_adapter(self, fingerprint: str, validated: ValidatedAdapter) -> Iterator[str]:
        """The lines of an adapter: its layers, unless they are in the file, and itself."""
        specs = [astuple(layer) for layer in validated.layers]
        key = sha256(json.dumps(specs).encode()).hexdigest()[:16]
        if key not in self._written_layers:
            self._written_layers.add(key)
            yield _make_line(["layers", key, specs])
        yield _make_line(["adapter", self._context, fingerprint, _describe_validated(validated, key)])


def _make_line(value: list[Any]) -> str:
    text = json.dumps(value, separators=(",", ":"))
    return f"{zlib.crc32(text.encode()):08x} {text}\n"


def _describe_validated(validated: ValidatedAdapter, layers: str) -> dict[str, Any]:
    adapter = validated.adapter
    return {
        "digest": adapter.digest,
        "lane": adapter.lane,
        "rank": adapter.rank,
        "size": adapter.size,
        "invocation": adapter.invocation,
        "files": [astuple(file) for file in adapter.files],
        "facts": validated.facts,
        "warnings": validated.warnings,
        "layers": layers,
    }


def _parse_validated(value: dict[str, Any], known_layers: dict[str, Layers]) -> ValidatedAdapter:
    """Raises ValueError, TypeError, KeyError."""
    layers, lane = known_layers[value["layers"]], ExecutionPath(value["lane"])
    files = tuple(File(*file) for file in value["files"])
    if compute_digest(files) != value["digest"]:
        raise ValueError("another digest")
    adapter = Adapter(
        digest=value["digest"],
        config="",
        weights="",
        lane=lane,
        rank=value["rank"],
        size=value["size"],
        patches=layers if lane is ExecutionPath.POOL else (),
        invocation=tuple(value["invocation"]),
        files=files,
    )
    return ValidatedAdapter(adapter, value["facts"], tuple(value["warnings"]), layers)


def _describe_context(base: BaseInfo, max_rank: int) -> str:
    """What a validation depends on beside the adapter's own files, in 16 hex digits. Raises OSError."""
    visible = sorted(path for path in Path(base.folder).iterdir() if not path.name.startswith("."))
    stats = [(path.name, path.stat()) for path in visible]
    files = [(name, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for name, stat in stats]
    installed = [(found.name.lower(), found.version) for found in metadata.distributions()]
    versions = sorted(version for version in installed if version[0] in LIBRARIES)
    parts = (files, base.limits, base.adapted_parameters, max_rank, versions, _hash_source())
    return sha256(repr(parts).encode()).hexdigest()[:16]


def _hash_source() -> str:
    """The hash of all of this package's code: the smallest change of it may change a verdict."""
    hashes = [sha256(path.read_bytes()).hexdigest() for path in sorted(SOURCE.rglob("*.py"))]
    return sha256("".join(hashes).encode()).hexdigest()
