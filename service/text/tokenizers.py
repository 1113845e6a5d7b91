"""The tokenizer border: prompts and chats to ids, ids to text, for the base and for adapters that
bring their own words.

Knows tokenizer files and chat templates. Must not know HTTP, names or sequences.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from ..core.adapter import Digest
from ..core.manifest import Manifest, check_text_files
from ..errors import AdapterInvalid, BadRequest, SettingsError
from .incremental import BROKEN, IncrementalDecoder
from .template_process import RenderRequest, refusal, render_template
from .template_renderer import TemplateRenderer
from .tool_calls import CallFormat, declared_format

KEPT = 512  # voices of adapters that stay in memory; most share the base's tokenizer and are small
# Tokenizers among them that are an adapter's own, of a hundred megabytes each where the vocabulary
# is large
OWN_KEPT = 16
# Texts of single tokens that a tokenizer's voices remember: 3 MB, and nearly all that are told
PIECES = 16_384
WORDS, SETTINGS, SPECIALS, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
ADDED = "added_tokens.json"
# What counts where there is no tokenizer.json
VOCABULARIES = (ADDED, "vocab.*", "merges.txt", "tokenizer.model")
TEMPLATE_JSON, GENERATION, CONFIG = "chat_template.json", "generation_config.json", "config.json"
OWN = (WORDS, *VOCABULARIES, SETTINGS, SPECIALS, TEMPLATE, TEMPLATE_JSON, GENERATION)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings that shape no ids
UNSHAPING = ("chat_template", "model_max_length", "name_or_path", "padding_side", "truncation_side")
LONGEST_TEMPLATE = 1_000_000  # characters
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece writes one
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level tokenizers do

Message = Mapping[str, Any]
Templates = str | dict[str, str]


class Tokenizers:
    """All voices over one base: its own, and those of adapters whose folders bring a tokenizer, a
    template or other eos tokens.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the base's folder. Raises SettingsError when it holds no usable tokenizer."""
        self.folder = Path(folder)
        self.renderer = TemplateRenderer()
        self._tokenizer = _load_tokenizer(self.folder)
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._vocabulary: dict[str, int] = backend.get_vocab()
        self._words = Words(backend)
        eos = _eos_ids(self.folder, GENERATION) | _eos_ids(self.folder, CONFIG)
        if self._tokenizer.eos_token_id is not None:
            eos |= {self._tokenizer.eos_token_id}
        templates = self._tokenizer.chat_template or _templates(self.folder, {})
        specials: dict[str, Any] = self._tokenizer.special_tokens_map
        self.base = AdapterTokenizer(self._words, eos, templates, specials)
        self._voices: dict[Digest, AdapterTokenizer] = {}
        self._own: WeakValueDictionary[str, Words] = WeakValueDictionary()
        self._like_base: set[str] = set()
        self._loading = threading.Lock()

    def find_cached(self, digest: Digest) -> AdapterTokenizer | None:
        """The voice of this content if its files were read before."""
        return self._voices.get(digest)

    def tokenizer_of(self, digest: Digest, folder: Path, files: Manifest) -> AdapterTokenizer:
        """The voice of this content, from a folder that must still hold it.

        Raises AdapterInvalid when it does not, or is broken.
        """
        try:
            voice = self._read_tokenizer(folder)
        finally:
            # What was read was this content's only if it is so still
            check_text_files(folder, files)
        voice = self._voices.setdefault(digest, voice)
        kept = list(self._voices.items())  # a list, for other threads add to it meanwhile
        own = [old for old, spoken in kept if spoken.words.own]
        for old in [old for old, _ in kept[:-KEPT]] + own[:-OWN_KEPT]:
            self._voices.pop(old, None)
        return voice

    async def close(self) -> None:
        await self.renderer.close()

    def _read_tokenizer(self, folder: Path) -> AdapterTokenizer:
        if not any(any(folder.glob(name)) for name in OWN):
            return self.base
        try:
            settings = _read_json(folder / SPECIALS) | _read_json(folder / SETTINGS)
            words = self._words_of(folder, settings)
            templates = _templates(folder, settings) or self.base.templates
            named = {key: text for key in NAMED if (text := _special_text(settings.get(key)))}
            own = words.backend.token_to_id(named.get("eos_token", ""))
            eos = self.base.eos | _eos_ids(folder, GENERATION) | ({own} if own is not None else set())
        except AdapterInvalid:
            raise
        except (
            BaseException
        ) as error:  # the tokenizers library raises plain Exceptions, and its panics are not even those
            raise AdapterInvalid(
                [f"the adapter's tokenizer files cannot be read: {type(error).__name__}"]
            ) from error
        specials = {**self.base.specials, **named}
        return AdapterTokenizer(
            words,
            eos,
            templates,
            specials,
            (templates, specials) != (self.base.templates, self.base.specials),
        )

    def _words_of(self, folder: Path, settings: Mapping[str, Any]) -> Words:
        """The adapter's own tokenizer, or the base's where all that shapes ids and text is the
        same. One of each content is kept.
        """
        contents = {file.name: _digest(file) for file in _word_files(folder)}
        if contents.items() <= self._contents.items() and not (contents and self._adds_tokens(settings)):
            return self._words
        shaping = {name: value for name, value in settings.items() if name not in UNSHAPING}
        key = sha256(json.dumps([contents, shaping], sort_keys=True).encode()).hexdigest()
        with self._loading:
            if key in self._like_base:
                return self._words
            found = self._own.get(key) or self._loaded(folder)
            if found is self._words:
                self._like_base.add(key)
            else:
                self._own[key] = found
        return found

    def _adds_tokens(self, settings: Mapping[str, Any]) -> bool:
        """Whether transformers would add tokens to the base's tokenizer by these settings, or use
        its tokens in another way.
        """
        known = {str(id): token for id, token in self._words.backend.get_added_tokens_decoder().items()}
        added = {
            id: AddedToken(**token) for id, token in (settings.get("added_tokens_decoder") or {}).items()
        }
        others = [settings.get(key) or () for key in ("additional_special_tokens", "extra_special_tokens")]
        listed = [
            token for group in others for token in (group.values() if isinstance(group, dict) else group)
        ]
        special = {text for token in (*listed, *map(settings.get, NAMED)) if (text := _special_text(token))}
        return (
            any(
                id not in known or token.__getstate__() != known[id].__getstate__()
                for id, token in added.items()
            )
            or not special <= {token.content for token in known.values() if token.special}
            or any(settings.get(key) for key in ("split_special_tokens", "fix_mistral_regex"))
        )

    def _loaded(self, folder: Path) -> Words:
        backend = self._backend_of(folder)
        if _serialized(backend) in self._serialized:
            return self._words
        return Words(
            backend, own=True, own_vocabulary=not self._vocabulary.items() <= backend.get_vocab().items()
        )

    def _backend_of(self, folder: Path) -> Tokenizer:
        """What transformers makes of the folder; a tokenizer.json as it is, whatever class the
        settings name.
        """
        kind = AutoTokenizer if "tokenizer_class" in _read_json(folder / SETTINGS) else type(self._tokenizer)
        try:
            return _backend(PreTrainedTokenizerFast if (folder / WORDS).exists() else kind, folder)
        except Exception as error:
            if (folder / WORDS).exists():
                raise
            names = ", ".join(file.name for file in _word_files(folder))
            hint = "save it again with a tokenizer.json"
            raise AdapterInvalid(
                [f"the adapter's tokenizer files cannot be read: {names}: {type(error).__name__}; {hint}"]
            ) from error

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {
            file.name: _digest(file) for name in (WORDS, *VOCABULARIES) for file in self.folder.glob(name)
        }

    @cached_property
    def _serialized(self) -> set[str]:
        """The base's tokenizer, as it is and as its file has it, for some classes of transformers
        build it anew.
        """
        plain = (self.folder / WORDS).exists() and type(self._tokenizer) is not PreTrainedTokenizerFast
        return {
            _serialized(self._words.backend),
            *([_serialized(_backend(PreTrainedTokenizerFast, self.folder))] if plain else []),
        }


@dataclass(frozen=True, eq=False)
class Words:
    """A tokenizer.

    `own`: it is an adapter's, and so a stranger's program; `own_vocabulary`: ids mean other texts
    than the base's.
    """

    backend: Tokenizer
    own: bool = False
    own_vocabulary: bool = False

    @cached_property
    def piece(self) -> Callable[[int], str]:
        """Gives one token's text; see `AdapterTokenizer.token_text`.

        Remembers it, for beside each token twenty likely ones may be told, and they are mostly the
        same.
        """
        decode, (ids, lead) = self.backend.decode, self._lead

        @lru_cache(maxsize=PIECES)
        def piece(id: int) -> str:
            text: str = decode([*ids, id], skip_special_tokens=False)
            return (
                text.removeprefix(lead) if text.startswith(lead) else decode([id], skip_special_tokens=False)
            )

        return piece

    @cached_property
    def _lead(self) -> tuple[list[int], str]:
        """A token to decode others behind, for at the start of a text some tokenizers drop a space,
        and its own text.
        """
        ids = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        text = self.backend.decode(ids, skip_special_tokens=False)
        return (ids, text) if text and BROKEN not in text else ([], "")


@dataclass(frozen=True)
class AdapterTokenizer:
    """How the base or one adapter reads and writes text. Safe to use from several threads.

    `templates` is a chat template, or several by name (`default`, `tool_use`), or None; `specials`
    are the special tokens' texts that a template may use. `own_template`: one of these is an
    adapter's, and so a stranger's program.
    """

    words: Words
    eos: frozenset[int] = frozenset()
    templates: Templates | None = None
    specials: Mapping[str, Any] = field(default_factory=dict)
    own_template: bool = False

    @property
    def backend(self) -> Tokenizer:
        return self.words.backend

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are no text: those the tokenizer leaves out when it decodes."""
        return frozenset(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Ids of a text;

        `special`: with the tokens this tokenizer puts around plain text. Raises BadRequest for lone
        surrogates.

        As a batch of one, for only then does the library let other threads run meanwhile.
        """
        try:
            return tuple(self.backend.encode_batch([text], add_special_tokens=special)[0].ids)
        except TypeError:
            raise BadRequest("the text is not valid Unicode: it holds a lone surrogate") from None
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # whose class nothing exports
                raise
            raise BadRequest("the tokenizer fails at this text") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def make_decoder(self, prompt: Sequence[int] = ()) -> IncrementalDecoder:
        """Turns the answer to this prompt into text, token by token."""
        return IncrementalDecoder(self.backend.decode, self.special, prompt)

    def token_text(self, id: int) -> str:
        """One token's text as it is within a text, special ones by their name; the bytes of an
        incomplete character are U+FFFD.
        """
        return self.words.piece(id)

    def piece_bytes(self, id: int) -> bytes:
        """One token's own bytes, also where they are only a part of a character."""
        text, name = self.token_text(id), self.backend.id_to_token(id) or ""
        if BROKEN not in text:
            return text.encode()
        if byte := BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        return bytes(BYTES[char] for char in name) if BYTES.keys() >= set(name) else text.encode()

    def choose_template(self, tools: bool) -> str:
        """The chat template's source. Raises BadRequest when there is none."""
        found = self.templates
        if isinstance(found, dict):
            found = (found.get("tool_use") if tools else None) or found.get("default")
        if not found:
            raise BadRequest(
                "this model has no chat template: use completions, or an adapter that brings a template",
                param="messages",
            )
        return found

    def tool_format(self) -> CallFormat | None:
        """How this voice's template writes tool calls. Raises BadRequest when it takes no tools."""
        template = self.choose_template(tools=True)
        if "tools" not in template:
            raise BadRequest("tools: this model's chat template takes none", param="tools")
        return declared_format(template)

    def render_request(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, limit: int
    ) -> RenderRequest:
        """The conversation as the template gets it, to be at most so many characters.

        Raises BadRequest when there is no template.
        """
        shown = [dict(tool) for tool in tools] if tools else None
        return RenderRequest(
            self.choose_template(bool(tools)), [dict(m) for m in messages], shown, dict(self.specials), limit
        )

    @staticmethod
    def render_here(request: RenderRequest) -> str:
        """The rendered text, in this process: for the base's own template only.

        Raises BadRequest with the template's own reason.
        """
        try:
            return render_template(request)
        except Exception as error:  # a template may raise anything
            raise BadRequest(f"messages: the chat template {refusal(error)}", param="messages") from error


def _load_tokenizer(folder: Path) -> Any:
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = found.backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise SettingsError(f"ADAPTERD_BASE: its tokenizer cannot be used: {type(error).__name__}") from error
    backend.no_truncation()
    backend.no_padding()
    return found


def _backend(kind: Any, folder: Path) -> Tokenizer:
    found: Tokenizer = kind.from_pretrained(
        folder, local_files_only=True, trust_remote_code=False
    ).backend_tokenizer
    found.no_truncation()
    found.no_padding()
    return found


def _word_files(folder: Path) -> list[Path]:
    """The files that hold a tokenizer: its one file, or those of older ways to save it."""
    patterns = (WORDS, ADDED) if (folder / WORDS).exists() else VOCABULARIES
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def _digest(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def _serialized(backend: Tokenizer) -> str:
    """A digest of all that a tokenizer does, which is the same whatever the file's spelling was."""
    return sha256(f"{backend.encode_special_tokens}{backend.to_str()}".encode()).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return value if isinstance(value, dict) else {}


def _special_text(value: Any) -> str:
    """A special token as tokenizer files write it: its text, or an object that holds it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _eos_ids(folder: Path, name: str) -> frozenset[int]:
    value = _read_json(folder / name).get("eos_token_id")
    return frozenset(id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int))


def _templates(folder: Path, settings: Mapping[str, Any]) -> Templates | None:
    """From a file of its own, the settings, or the file that processors save.

    Raises AdapterInvalid for one that is too long.
    """
    if (folder / TEMPLATE).exists():
        found: Any = (folder / TEMPLATE).read_text("utf-8")
    else:
        found = settings.get("chat_template") or _read_json(folder / TEMPLATE_JSON).get("chat_template")
    if isinstance(found, list):
        found = {str(named["name"]): str(named["template"]) for named in found}
    if not isinstance(found, str | dict):
        return None
    size = len(found) if isinstance(found, str) else sum(map(len, found.values()))
    if size > LONGEST_TEMPLATE:
        raise AdapterInvalid([f"the chat template has {size} characters; {LONGEST_TEMPLATE} are the most"])
    return found
