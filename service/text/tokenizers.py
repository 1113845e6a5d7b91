"""Tokenizers of the base and of adapters that bring their own: prompts and chats to ids, ids to
text.

Runs in the API process. Knows tokenizer files and chat templates. Must not know HTTP, adapter names
or sequences.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
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
from .compat import is_panic
from .incremental import BROKEN, IncrementalDecoder
from .template_options import PLAIN, TemplateOptions
from .template_process import RenderRequest, describe_refusal, render_template
from .template_renderer import TemplateRenderer
from .tool_calls import CallFormat, declared_format
from .tool_calls.formats import special_texts

# Adapters' tokenizers that stay in memory; most share the base's backend and are small
KEPT = 512
# Those among them with a backend of their own, of a hundred megabytes each where the vocabulary is
# large
OWN_KEPT = 16
# Texts of single tokens that a backend remembers: 3 MB, and nearly all that answers show
PIECES = 16_384
WORDS, SETTINGS, SPECIALS, TEMPLATE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
ADDED = "added_tokens.json"
# The files that count where there is no tokenizer.json
VOCABULARIES = (ADDED, "vocab.*", "merges.txt", "tokenizer.model")
TEMPLATE_JSON, GENERATION, CONFIG = "chat_template.json", "generation_config.json", "config.json"
OWN = (WORDS, *VOCABULARIES, SETTINGS, SPECIALS, TEMPLATE, TEMPLATE_JSON, GENERATION)
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
# Settings that shape no ids
UNSHAPING = (
    "chat_template",
    "tool_call_format",
    "model_max_length",
    "name_or_path",
    "padding_side",
    "truncation_side",
)
CALLS = "tool_call_format"  # the setting of an adapter, or of a base, that names it
LONGEST_TEMPLATE = 1_000_000  # characters
BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece writes one
BYTES = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level tokenizers do

Message = Mapping[str, Any]
Templates = str | dict[str, str]


class Tokenizers:
    """The base's tokenizer, and those of adapters whose folders bring a tokenizer, a template or
    other eos tokens.
    """

    def __init__(self, folder: str | Path) -> None:
        """Reads the base's folder. Raises SettingsError when it holds no usable tokenizer."""
        self.folder = Path(folder)
        self.renderer = TemplateRenderer()
        self._tokenizer = _load_tokenizer(self.folder)
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._vocabulary: dict[str, int] = backend.get_vocab()
        self._words = Words(backend)
        self.base = self._make_base()
        self._cached: dict[Digest, AdapterTokenizer] = {}
        self._own: WeakValueDictionary[str, Words] = WeakValueDictionary()
        self._like_base: set[str] = set()
        self._loading = threading.Lock()

    def find_cached(self, digest: Digest) -> AdapterTokenizer | None:
        """The tokenizer of this content if its files were read before."""
        return self._cached.get(digest)

    def tokenizer_of(self, digest: Digest, folder: Path, files: Manifest) -> AdapterTokenizer:
        """The tokenizer of this content, from a folder that must still hold it.

        Raises AdapterInvalid when it does not, or is broken.
        """
        try:
            tokenizer = self._read_tokenizer(folder)
        finally:
            # The files were this content's only if they are so still
            check_text_files(folder, files)
        tokenizer = self._cached.setdefault(digest, tokenizer)
        self._trim_cache()
        return tokenizer

    async def close(self) -> None:
        await self.renderer.close()

    def _make_base(self) -> AdapterTokenizer:
        eos = _read_eos_ids(self.folder, GENERATION) | _read_eos_ids(self.folder, CONFIG)
        if self._tokenizer.eos_token_id is not None:
            eos |= {self._tokenizer.eos_token_id}
        templates = self._tokenizer.chat_template or _read_templates(self.folder, {})
        specials: dict[str, Any] = self._tokenizer.special_tokens_map
        try:
            format = _read_call_format(_read_json(self.folder / SETTINGS))
        except AdapterInvalid as error:
            raise SettingsError(f"ADAPTERD_BASE: {error.message}") from None
        return AdapterTokenizer(self._words, eos, templates, specials, call_format=format)

    def _trim_cache(self) -> None:
        cached = list(self._cached.items())  # a list, for other threads add to it meanwhile
        oldest = [digest for digest, _ in cached[:-KEPT]]
        own = [digest for digest, tokenizer in cached if tokenizer.words.own]
        for digest in oldest + own[:-OWN_KEPT]:
            self._cached.pop(digest, None)

    def _read_tokenizer(self, folder: Path) -> AdapterTokenizer:
        if not any(any(folder.glob(name)) for name in OWN):
            return self.base
        try:
            return self._read_own(folder)
        except AdapterInvalid:
            raise
        # The tokenizers library raises plain Exceptions, and its panics are not even those
        except BaseException as error:
            kind = type(error).__name__
            raise AdapterInvalid([f"the adapter's tokenizer files cannot be read: {kind}"]) from error

    def _read_own(self, folder: Path) -> AdapterTokenizer:
        base = self.base
        settings = _read_json(folder / SPECIALS) | _read_json(folder / SETTINGS)
        words = self._words_of(folder, settings)
        templates = _read_templates(folder, settings) or base.templates
        named = {key: text for key in NAMED if (text := _special_text(settings.get(key)))}
        eos = base.eos | _read_eos_ids(folder, GENERATION)
        own_eos = words.backend.token_to_id(named.get("eos_token", ""))
        if own_eos is not None:
            eos |= {own_eos}
        specials = {**base.specials, **named}
        own_template = (templates, specials) != (base.templates, base.specials)
        # A template of the adapter's own is not what the base's files speak of
        format = _read_call_format(settings) or (base.call_format if templates == base.templates else None)
        return AdapterTokenizer(words, eos, templates, specials, own_template, format)

    def _words_of(self, folder: Path, settings: Mapping[str, Any]) -> Words:
        """The adapter's own backend, or the base's where ids and text are shaped alike. One of each
        content is kept.
        """
        contents = {file.name: _hash_file(file) for file in _word_files(folder)}
        are_base_files = contents.items() <= self._contents.items()
        if are_base_files and not (contents and self._adds_tokens(settings)):
            return self._words
        shaping = {name: value for name, value in settings.items() if name not in UNSHAPING}
        key = sha256(json.dumps([contents, shaping], sort_keys=True).encode()).hexdigest()
        with self._loading:
            return self._share_words(key, folder)

    def _share_words(self, key: str, folder: Path) -> Words:
        if key in self._like_base:
            return self._words
        words = self._own.get(key) or self._load_words(folder)
        if words is self._words:
            self._like_base.add(key)
        else:
            self._own[key] = words
        return words

    def _adds_tokens(self, settings: Mapping[str, Any]) -> bool:
        """Whether transformers would add tokens to the base's tokenizer by these settings, or use
        its tokens in another way.
        """
        known = {str(id): token for id, token in self._words.backend.get_added_tokens_decoder().items()}
        decoder = settings.get("added_tokens_decoder") or {}
        added = {id: AddedToken(**token) for id, token in decoder.items()}
        special, known_special = _special_texts(settings), {t.content for t in known.values() if t.special}
        if not all(_is_same_token(token, known.get(id)) for id, token in added.items()):
            return True
        if not special <= known_special:
            return True
        return any(settings.get(key) for key in ("split_special_tokens", "fix_mistral_regex"))

    def _load_words(self, folder: Path) -> Words:
        backend = self._load_adapter_backend(folder)
        if _serialize_backend(backend) in self._serialized:
            return self._words
        has_base_vocabulary = self._vocabulary.items() <= backend.get_vocab().items()
        return Words(backend, own=True, own_vocabulary=not has_base_vocabulary)

    def _load_adapter_backend(self, folder: Path) -> Tokenizer:
        """The backend as transformers loads it; a tokenizer.json as it is, whatever class the
        settings name.
        """
        if (folder / WORDS).exists():
            return _load_backend(PreTrainedTokenizerFast, folder)
        kind = AutoTokenizer if "tokenizer_class" in _read_json(folder / SETTINGS) else type(self._tokenizer)
        try:
            return _load_backend(kind, folder)
        except Exception as error:
            names = ", ".join(file.name for file in _word_files(folder))
            hint = "save it again with a tokenizer.json"
            raise AdapterInvalid(
                [f"the adapter's tokenizer files cannot be read: {names}: {type(error).__name__}; {hint}"]
            ) from error

    @cached_property
    def _contents(self) -> dict[str, str]:
        files = [file for name in (WORDS, *VOCABULARIES) for file in self.folder.glob(name)]
        return {file.name: _hash_file(file) for file in files}

    @cached_property
    def _serialized(self) -> set[str]:
        """The base's backend, as it is and as its file has it, for some classes of transformers
        build it anew.
        """
        serialized = {_serialize_backend(self._words.backend)}
        if (self.folder / WORDS).exists() and type(self._tokenizer) is not PreTrainedTokenizerFast:
            serialized.add(_serialize_backend(_load_backend(PreTrainedTokenizerFast, self.folder)))
        return serialized


@dataclass(frozen=True, eq=False)
class Words:
    """A tokenizer's backend, which turns text into ids and ids into text; several adapters may share it.

    `own`: it is an adapter's, and so not to be trusted; `own_vocabulary`: ids mean other texts than the
    base's.
    """

    backend: Tokenizer
    own: bool = False
    own_vocabulary: bool = False

    @cached_property
    def piece(self) -> Callable[[int], str]:
        """Gives one token's text; see `AdapterTokenizer.token_text`.

        Remembers it, for an answer may show twenty likely tokens beside each, mostly the same ones.
        """
        decode = partial(self.backend.decode, skip_special_tokens=False)
        ids, lead = self._lead

        @lru_cache(maxsize=PIECES)
        def decode_piece(id: int) -> str:
            text: str = decode([*ids, id])
            return text.removeprefix(lead) if text.startswith(lead) else decode([id])

        return decode_piece

    @cached_property
    def _lead(self) -> tuple[list[int], str]:
        """A token to decode others behind, and its own text: at the start of a text some tokenizers
        drop a space.
        """
        ids = self.backend.encode("a", add_special_tokens=False).ids[-1:]
        text = self.backend.decode(ids, skip_special_tokens=False)
        return (ids, text) if text and BROKEN not in text else ([], "")


@dataclass(frozen=True)
class AdapterTokenizer:
    """The tokenizer and the chat templates of the base or of one adapter. Safe to use from several
    threads.

    `templates` is a chat template, or several by name (`default`, `tool_use`), or None; `specials`
    are the special tokens' texts that a template may use. `own_template`: one of these is an
    adapter's, and so not to be trusted. `call_format` is the form of tool calls where the files say it,
    and not the template.
    """

    words: Words
    eos: frozenset[int] = frozenset()
    templates: Templates | None = None
    specials: Mapping[str, Any] = field(default_factory=dict)
    own_template: bool = False
    call_format: CallFormat | None = None

    @property
    def backend(self) -> Tokenizer:
        return self.words.backend

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are no text: those the tokenizer leaves out when it decodes."""
        return frozenset(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Ids of a text; `special`: with the tokens that this tokenizer puts around plain text.

        Raises BadRequest for lone surrogates.
        """
        try:
            # As a batch of one, for only then does the library let other threads run meanwhile
            return tuple(self.backend.encode_batch([text], add_special_tokens=special)[0].ids)
        except TypeError:
            raise BadRequest("the text is not valid Unicode: it holds a lone surrogate") from None
        except BaseException as error:
            if not is_panic(error):
                raise
            raise BadRequest("the tokenizer fails at this text") from error

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """The text of the ids; `special`: special tokens by their names, which are else left out.

        Raises BadRequest where the tokenizer fails at them.
        """
        try:
            return self.backend.decode(list(ids), skip_special_tokens=not special)
        except BaseException as error:
            if not is_panic(error):
                raise
            raise BadRequest("the tokenizer fails at these ids") from error

    def token_name(self, id: int) -> str:
        """One token as the vocabulary spells it; nothing where it has none."""
        return self.backend.id_to_token(id) or ""

    def make_decoder(
        self, prompt: Sequence[int] = (), kept_special: frozenset[int] = frozenset()
    ) -> IncrementalDecoder:
        """Turns the answer to this prompt into text, token by token; `kept_special` are special
        tokens that are text.
        """
        if not kept_special:
            return IncrementalDecoder(self.backend.decode, self.special, prompt)
        decode = partial(self.backend.decode, skip_special_tokens=False)
        return IncrementalDecoder(decode, self.special - kept_special, prompt)

    def token_text(self, id: int) -> str:
        """One token's text as it is within a text, special ones by their name; the bytes of an
        incomplete character are U+FFFD.
        """
        return self.words.piece(id)

    def piece_bytes(self, id: int) -> bytes:
        """One token's own bytes, also where they are only a part of a character."""
        text, name = self.token_text(id), self.token_name(id)
        if BROKEN not in text:
            return text.encode()
        if byte := BYTE.fullmatch(name):
            return bytes([int(byte[1], 16)])
        if BYTES.keys() >= set(name):
            return bytes(BYTES[char] for char in name)
        return text.encode()

    def choose_template(self, tools: bool) -> str:
        """The chat template's source. Raises BadRequest when there is none."""
        template = self.templates
        if isinstance(template, dict):
            template = (template.get("tool_use") if tools else None) or template.get("default")
        if not template:
            raise BadRequest(
                "this model has no chat template: use completions, or an adapter that brings a template",
                param="messages",
            )
        return template

    def names_word(self, word: str, tools: bool) -> bool:
        """Whether the chat template holds this word: a role or a field that it knows."""
        return word in self.choose_template(tools)

    def find_marks(self, format: CallFormat) -> frozenset[int]:
        """The special tokens that stand around calls, and must stay in the text to be found there."""
        ids = (self.backend.token_to_id(text) for text in special_texts(format))
        return frozenset(id for id in ids if id is not None and id in self.special)

    def find_call_format(self) -> CallFormat | None:
        """How the model writes tool calls; None where that is not known."""
        return self.call_format or declared_format(self.choose_template(tools=True))

    def tool_format(self) -> CallFormat:
        """How the model writes tool calls where it may choose to.

        Raises BadRequest when its template takes no tools, or the form is not known.
        """
        if not self.names_word("tools", tools=True):
            raise BadRequest(
                "tools: this model's chat template takes none; tool_choice can force a call", param="tools"
            )
        format = self.find_call_format()
        if format is None:
            raise BadRequest(
                "tools: this model's chat template writes calls in a form that is not known here; "
                f"tool_choice can force a call, and {CALLS} in {SETTINGS} names a form",
                param="tools",
            )
        return format

    def render_request(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        limit: int,
        options: TemplateOptions = PLAIN,
    ) -> RenderRequest:
        """The conversation as the template gets it; the text may have `limit` characters.

        Raises BadRequest when there is no template, or where a variable is a special token's.
        """
        taken = sorted(self.specials.keys() & options.variables.keys())
        if taken:
            param = "chat_template_kwargs"
            raise BadRequest(f"{param}: {taken[0]!r} is the tokenizer's own", param=param)
        return RenderRequest(
            self.choose_template(bool(tools)),
            [dict(message) for message in messages],
            [dict(tool) for tool in tools] if tools else None,
            {**options.variables, **self.specials},
            limit,
            options.opens_turn,
            options.continues,
        )

    @staticmethod
    def render_here(request: RenderRequest) -> str:
        """The rendered text, in this process: for the base's own template only.

        Raises BadRequest with the template's own reason.
        """
        try:
            return render_template(request)
        except Exception as error:  # a template may raise anything
            raise BadRequest(
                f"messages: the chat template {describe_refusal(error)}", param="messages"
            ) from error


def _load_tokenizer(folder: Path) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = tokenizer.backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise SettingsError(f"ADAPTERD_BASE: its tokenizer cannot be used: {type(error).__name__}") from error
    backend.no_truncation()
    backend.no_padding()
    return tokenizer


def _load_backend(kind: Any, folder: Path) -> Tokenizer:
    tokenizer = kind.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


def _word_files(folder: Path) -> list[Path]:
    """The files that hold a tokenizer: its one file, or those of older ways to save it."""
    patterns = (WORDS, ADDED) if (folder / WORDS).exists() else VOCABULARIES
    return [file for pattern in patterns for file in sorted(folder.glob(pattern))]


def _hash_file(file: Path) -> str:
    with file.open("rb") as opened:
        return file_digest(opened, "sha256").hexdigest()


def _serialize_backend(backend: Tokenizer) -> str:
    """A digest of the backend's behaviour, which is the same whatever the file's spelling was."""
    return sha256(f"{backend.encode_special_tokens}{backend.to_str()}".encode()).hexdigest()


def _read_json(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    return value if isinstance(value, dict) else {}


def _special_text(value: Any) -> str:
    """A special token as tokenizer files write it: its text, or an object that holds it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else ""


def _special_texts(settings: Mapping[str, Any]) -> set[str]:
    """The texts of all special tokens that the settings name."""
    tokens = [settings.get(key) for key in NAMED]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        group = settings.get(key) or ()
        tokens += group.values() if isinstance(group, dict) else group
    return {text for token in tokens if (text := _special_text(token))}


def _is_same_token(token: AddedToken, known: AddedToken | None) -> bool:
    return known is not None and token.__getstate__() == known.__getstate__()


def _read_eos_ids(folder: Path, name: str) -> frozenset[int]:
    value = _read_json(folder / name).get("eos_token_id")
    ids = value if isinstance(value, list) else [value]
    return frozenset(id for id in ids if isinstance(id, int))


def _read_templates(folder: Path, settings: Mapping[str, Any]) -> Templates | None:
    """From a file of its own, the settings, or the file that processors save.

    Raises AdapterInvalid for one that is too long.
    """
    if (folder / TEMPLATE).exists():
        found: Any = (folder / TEMPLATE).read_text(encoding="utf-8")
    else:
        found = settings.get("chat_template") or _read_json(folder / TEMPLATE_JSON).get("chat_template")
    if isinstance(found, list):
        found = {str(named["name"]): str(named["template"]) for named in found}
    if not isinstance(found, str | dict):
        return None
    _check_length(found)
    return found


def _read_call_format(settings: Mapping[str, Any]) -> CallFormat | None:
    """Raises AdapterInvalid for one that is not known."""
    name = settings.get(CALLS)
    if name is None:
        return None
    if name not in list(CallFormat):
        known = ", ".join(CallFormat)
        raise AdapterInvalid([f"{SETTINGS}: {CALLS} is {str(name)[:40]!r}, and not one of {known}"])
    return CallFormat(name)


def _check_length(templates: Templates) -> None:
    size = len(templates) if isinstance(templates, str) else sum(map(len, templates.values()))
    if size > LONGEST_TEMPLATE:
        raise AdapterInvalid([f"the chat template has {size} characters; {LONGEST_TEMPLATE} are the most"])
