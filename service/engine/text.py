"""The tokenizer border: prompts and chats to ids, ids to text, for the base and for adapters that bring their own words.

Knows tokenizer files and chat templates. Must not know HTTP, names or sequences.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer

from ..errors import AdapterInvalid, BadRequest, SettingsError
from .decoding import Decoder
from .tools import Format, declared

KEPT = 512  # voices of adapters that stay in memory; most share the base's tokenizer and are small
PIECES = 16_384  # texts of single tokens that a tokenizer's voices remember: 3 MB, and nearly all that are told
SPACE = "\u2581"  # how sentencepiece writes a space
WORDS, SETTINGS, SPECIALS, TEMPLATE = "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"
GENERATION, CONFIG = "generation_config.json", "config.json"
OWN = (WORDS, SETTINGS, SPECIALS, TEMPLATE, GENERATION)

Message = Mapping[str, Any]


class Text:
    """All voices over one base: its own, and those of adapters whose folders bring a tokenizer, a template or other eos tokens."""

    def __init__(self, folder: str | Path) -> None:
        """Reads the base's folder. Raises SettingsError when it holds no usable tokenizer."""
        self.folder = Path(folder)
        self._tokenizer = _tokenizer(self.folder)
        backend: Tokenizer = self._tokenizer.backend_tokenizer
        self._vocabulary: dict[str, int] = backend.get_vocab()
        eos = _eos(self.folder, GENERATION) | _eos(self.folder, CONFIG)
        if self._tokenizer.eos_token_id is not None:
            eos |= {self._tokenizer.eos_token_id}
        self.base = Voice(backend, self._tokenizer, eos, self._tokenizer.chat_template, {}, pieces_of(backend))
        self._voices: dict[object, Voice] = {}

    def known(self, generation: object) -> Voice | None:
        """The voice of this generation of an adapter if its files were read before. (A digest says nothing about tokenizer files.)"""
        return self._voices.get(generation)

    def of(self, generation: object, folder: Path) -> Voice:
        """The voice of this generation, from its folder's files. Raises AdapterInvalid when its tokenizer files are broken."""
        voice = self._voices.setdefault(generation, self._read(folder))
        for old in list(self._voices)[:-KEPT]:  # a list, for other threads add to it meanwhile
            self._voices.pop(old, None)
        return voice

    def _read(self, folder: Path) -> Voice:
        if not any((folder / name).exists() for name in OWN):
            return self.base
        try:
            backend = self._words(folder)
            settings = _json(folder / SPECIALS) | _json(folder / SETTINGS)
            template = _template(folder, settings) or self._tokenizer.chat_template
            specials = {key: text for key in ("bos_token", "eos_token", "unk_token", "pad_token") if (text := _content(settings.get(key)))}
            own = backend.token_to_id(specials.get("eos_token", ""))
            eos = self.base.eos | _eos(folder, GENERATION) | ({own} if own is not None else set())
        except BaseException as error:  # the tokenizers library raises plain Exceptions, and its panics are not even those
            raise AdapterInvalid([f"the adapter's tokenizer files cannot be read: {type(error).__name__}"]) from error
        piece = self.base.piece if backend is self.base.backend else pieces_of(backend)
        return Voice(backend, self._tokenizer, frozenset(eos), template, specials, piece)

    def _words(self, folder: Path) -> Tokenizer:
        """The adapter's own tokenizer where its vocabulary differs from the base's, else the base's."""
        own, base = folder / WORDS, self.folder / WORDS
        if not own.exists() or (base.exists() and own.read_bytes() == base.read_bytes()):
            return self.base.backend
        found = Tokenizer.from_file(str(own))
        if found.get_vocab() == self._vocabulary:
            return self.base.backend
        found.no_truncation()
        found.no_padding()
        return found


@dataclass(frozen=True)
class Voice:
    """How the base or one adapter reads and writes text. Safe to use from several threads.

    `templates` is a chat template, or several by name (`default`, `tool_use`), or None; `specials` are the special tokens' texts a
    template may use, where they differ from the base's. `piece` gives one token's own text; see `pieces_of`.
    """

    backend: Tokenizer
    renderer: Any
    eos: frozenset[int]
    templates: str | dict[str, str] | None
    specials: dict[str, str]
    piece: Callable[[int], str]

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are no text: those the tokenizer leaves out when it decodes."""
        return frozenset(id for id, token in self.backend.get_added_tokens_decoder().items() if token.special)

    def encode(self, text: str, special: bool = True) -> tuple[int, ...]:
        """Ids of a text; `special`: with the tokens this tokenizer puts around plain text. Raises BadRequest for lone surrogates.

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

    def decoder(self, prompt: Sequence[int] = ()) -> Decoder:
        """Turns the answer to this prompt into text, token by token."""
        return Decoder(self.backend.decode, self.special, prompt)

    def template(self, tools: bool) -> str:
        """The chat template's source. Raises BadRequest when there is none."""
        found = self.templates
        if isinstance(found, dict):
            found = (found.get("tool_use") if tools else None) or found.get("default")
        if not found:
            raise BadRequest("this model has no chat template: use completions, or an adapter that brings a template", param="messages")
        return found

    def format(self) -> Format | None:
        """How this voice's template writes tool calls. Raises BadRequest when it takes no tools."""
        template = self.template(tools=True)
        if "tools" not in template:
            raise BadRequest("tools: this model's chat template takes none", param="tools")
        return declared(template)

    def chat(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None) -> tuple[int, ...]:
        """Ids of the rendered conversation, up to where the assistant answers. Raises BadRequest with the template's own reason."""
        template = self.template(tools=bool(tools))
        try:
            rendered = self.renderer.apply_chat_template(
                [dict(m) for m in messages],
                tools=[dict(t) for t in tools] if tools else None,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
                **self.specials,
            )
        except Exception as error:  # a template is foreign code and may raise anything
            raise BadRequest(f"messages: the chat template refuses them: {error}", param="messages") from error
        return self.encode(rendered, special=False)  # the template has written the special tokens itself


def pieces_of(backend: Tokenizer) -> Callable[[int], str]:
    """Gives one token's own text, special ones by their name; the bytes of an incomplete character are U+FFFD.

    Remembers it, for beside each token twenty likely ones may be told, and they are mostly the same.
    """

    @lru_cache(maxsize=PIECES)
    def piece(id: int) -> str:
        text: str = backend.decode([id], skip_special_tokens=False)
        raw = backend.id_to_token(id) or ""
        return " " + text if raw.startswith(SPACE) and not text.startswith(" ") else text

    return piece


def _tokenizer(folder: Path) -> Any:
    try:
        found = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        backend = found.backend_tokenizer
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise SettingsError(f"ADAPTERD_BASE: its tokenizer cannot be used: {type(error).__name__}") from error
    backend.no_truncation()
    backend.no_padding()
    return found


def _json(file: Path) -> dict[str, Any]:
    value = json.loads(file.read_text()) if file.exists() else {}
    return value if isinstance(value, dict) else {}


def _content(value: Any) -> str:
    """A special token as tokenizer files write it: its text, or an object that holds it."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) else ""


def _eos(folder: Path, name: str) -> frozenset[int]:
    value = _json(folder / name).get("eos_token_id")
    return frozenset(id for id in (value if isinstance(value, list) else [value]) if isinstance(id, int))


def _template(folder: Path, settings: Mapping[str, Any]) -> str | dict[str, str] | None:
    if (folder / TEMPLATE).exists():
        return (folder / TEMPLATE).read_text()
    found = settings.get("chat_template")
    if isinstance(found, list):
        return {str(named["name"]): str(named["template"]) for named in found}
    return found if isinstance(found, str) else None
