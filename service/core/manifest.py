"""Lists the files of an adapter that shape an answer, and names them together by a digest; in every process.

Knows names and bytes, not what they mean.

The manifest of a folder has one entry, name, size and sha256, for each of these files that lies in it,
sorted by name. The digest is `sha256:` and the sha256 of the manifest as JSON lines, each
`{"name":"…","bytes":1,"sha256":"…"}` and a newline, without spaces. So one digest is one content,
whichever source it came from; any other file of the folder, a README.md, is not part of it.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass
from hashlib import file_digest, sha256
from io import BytesIO
from pathlib import Path

from ..errors import AdapterInvalid

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TEXT_FILES = (
    "added_tokens.json", "chat_template.jinja", "chat_template.json", "generation_config.json", "merges.txt",
    "special_tokens_map.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
)  # fmt: skip
VOCABULARY = re.compile(r"vocab\.[A-Za-z0-9._-]+")  # vocab.json, vocab.txt, ...
PATTERNS = (CONFIG, WEIGHTS, *TEXT_FILES, "vocab.*")  # the same names, to match paths with
CHANGED = (
    "its files have changed on disk since it was registered: register it again (PUT) to serve the new content"
)


@dataclass(frozen=True, slots=True)
class File:
    """One entry; `bytes` is the size, `sha256` 64 hex digits."""

    name: str
    bytes: int
    sha256: str


Manifest = tuple[File, ...]


def is_manifest_name(name: str) -> bool:
    return name in (CONFIG, WEIGHTS) or is_text_name(name)


def is_text_name(name: str) -> bool:
    """Whether a file of this name says how an adapter reads and writes text."""
    return name in TEXT_FILES or VOCABULARY.fullmatch(name) is not None


def list_names(folder: Path) -> list[str]:
    """The names in this folder that belong in its manifest, sorted. Raises OSError."""
    return sorted(filter(is_manifest_name, os.listdir(folder)))


def read_manifest(folder: Path) -> Manifest:
    """Hashes every file of the manifest. Raises OSError, AdapterInvalid for a name that is no file."""
    return tuple(hash_file(folder / name) for name in list_names(folder))


def hash_file(path: Path) -> File:
    """The file's entry, read in pieces.

    Raises OSError, AdapterInvalid for what is no file, which may have no end.
    """
    if not path.is_file():
        raise AdapterInvalid([f"{path.name} is no file"])
    with path.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
        return File(path.name, file.tell(), digest)


def hash_bytes(name: str, content: bytes) -> File:
    return File(name, len(content), file_digest(BytesIO(content), "sha256").hexdigest())


def compute_digest(manifest: Manifest) -> str:
    """`sha256:` and 64 hex digits; see above for what is hashed."""
    files = sorted(manifest, key=lambda file: file.name)
    lines = (json.dumps(asdict(file), separators=(",", ":")) + "\n" for file in files)
    return "sha256:" + sha256("".join(lines).encode()).hexdigest()


def check_text_files(folder: Path, manifest: Manifest) -> None:
    """Raises AdapterInvalid where the files that shape prompts and text, or their absence, are not
    those of the manifest.

    A folder that is gone has none of them: without any an adapter that is in memory can do without
    its folder.
    """
    try:
        names = list_names(folder) if folder.exists() else []
        present = [hash_file(folder / name) for name in names if is_text_name(name)]
    except OSError as error:
        raise AdapterInvalid([f"its files cannot be read any more: {error.strerror}"]) from None
    if present != [file for file in manifest if is_text_name(file.name)]:
        raise AdapterInvalid([CHANGED])
