"""The tokenizer border: text that grows equals the whole, stop strings never leak, adapters speak
with their own words.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from service.core.manifest import Manifest, compute_digest, read_manifest
from service.errors import AdapterInvalid, BadRequest, SettingsError
from service.text import tokenizers as words
from service.text.incremental import BROKEN, IncrementalDecoder
from service.text.stop_strings import StopStrings
from service.text.tokenizers import AdapterTokenizer, Words
from service.text.tool_calls import CallFormat
from tests import making

ALPHABET = "aé日😀👩‍👩‍👧 \n.,the wonß한"
USER = {"role": "user", "content": "Hi"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    making.tokenizer().save_pretrained(base)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 2}))
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    return base


class Text(words.Tokenizers):
    """Takes an adapter's files as they are now for those that were registered, unless a test says
    otherwise.
    """

    def tokenizer_of(self, digest: str, folder: Path, files: Manifest | None = None) -> AdapterTokenizer:
        return super().tokenizer_of(digest, folder, read_manifest(folder) if files is None else files)


@pytest.fixture(scope="module")
def text(folder: Path) -> Text:
    return Text(folder)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """An adapter's folder, without tokenizer files so far."""
    (tmp_path / "adapter_config.json").write_text("{}")
    return tmp_path


def sentencepiece() -> Tokenizer:
    """Bytes and a few words, with a space before each, as Llama 2 and Mistral have them."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *("▁" + w for w in ("Hello", "there", "a")),
        "▁",
        "▁▁▁",
        "x",
        "y",
    ]
    made = Tokenizer(
        models.BPE(
            vocab={w: i for i, w in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True
        )
    )
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    strip = decoders.Strip(" ", 1, 0)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]
    )
    made.add_special_tokens([AddedToken("<s>", special=True), AddedToken("</s>", special=True)])
    return made


def id_of(words: Tokenizer, token: str) -> int:
    id = words.token_to_id(token)
    assert id is not None
    return int(id)


def grown(decoder: IncrementalDecoder, ids: list[int]) -> list[str]:
    return [*(decoder.push_token(id) for id in ids), decoder.flush_held()]


def chat(
    tokenizer: AdapterTokenizer, messages: Sequence[Any], tools: Sequence[Any] | None = None
) -> tuple[int, ...]:
    """The ids of a conversation, its template rendered here, whosever it is."""
    return tokenizer.encode(
        tokenizer.render_here(tokenizer.render_request(messages, tools, 1000)), special=False
    )


def texts(count: int) -> Iterator[str]:
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choice(ALPHABET) for _ in range(rng.randrange(1, 40)))


# ---- decoding


def test_joined_increments_are_the_text(text: Text) -> None:
    for whole in ["a😀日é👩‍👩‍👧b", *texts(200)]:
        ids = list(text.base.encode(whole))
        assert "".join(grown(text.base.make_decoder(), ids)) == whole


def test_no_increment_holds_a_broken_character(text: Text) -> None:
    for whole in texts(50):
        assert not [
            part for part in grown(text.base.make_decoder(), list(text.base.encode(whole))) if BROKEN in part
        ]


def test_a_character_cut_short_is_one_replacement(text: Text) -> None:
    ids = list(text.base.encode("a😀"))
    assert "".join(grown(text.base.make_decoder(), ids[:-1])) == "a" + BROKEN


def test_a_run_of_bytes_that_are_no_text_is_not_held_for_ever(text: Text) -> None:
    (first, *_) = text.base.encode("😀")
    assert any(grown(text.base.make_decoder(), [first] * 20)[:-1])


def test_special_tokens_add_nothing_and_break_nothing(text: Text) -> None:
    ids = text.base.encode("日本")
    assert "".join(grown(text.base.make_decoder(), [ids[0], 2, *ids[1:], 1])) == "日本"


def test_words_with_leading_spaces_keep_them() -> None:
    words = sentencepiece()
    hello, there, a, x = (id_of(words, w) for w in ("▁Hello", "▁there", "▁a", "x"))
    ids = [1, hello, there, x, 2, a, a]
    assert (
        "".join(grown(IncrementalDecoder(words.decode, {1, 2}), ids))
        == words.decode(ids)
        == "Hello therex a a"
    )


def test_an_answer_keeps_the_space_behind_its_prompt() -> None:
    words = sentencepiece()
    hello, there = id_of(words, "▁Hello"), id_of(words, "▁there")
    assert "".join(grown(IncrementalDecoder(words.decode, {1, 2}, [1, hello]), [there])) == " there"


def test_bytes_of_a_next_character_do_not_take_back_the_last_one() -> None:
    words = sentencepiece()
    ids = [id_of(words, f"<0x{byte:02X}>") for byte in "日本".encode()]
    assert grown(IncrementalDecoder(words.decode), ids) == ["", "", "日", "", "", "本", ""]
    assert "".join(grown(IncrementalDecoder(words.decode), ids[:4])) == "日" + BROKEN


def test_a_prompt_that_ends_within_a_character_does_no_harm(text: Text) -> None:
    ids = text.base.encode("a😀b")
    assert "".join(grown(text.base.make_decoder(ids[:3]), list(ids[3:]))).endswith("b")


def test_a_token_is_shown_with_its_own_space() -> None:
    words = sentencepiece()
    tokenizer = AdapterTokenizer(Words(words))
    assert tokenizer.token_text(id_of(words, "▁Hello")) == " Hello"
    assert tokenizer.token_text(1) == "<s>"


def test_spaces_in_a_row_keep_them_all() -> None:
    words = sentencepiece()
    assert AdapterTokenizer(Words(words)).token_text(id_of(words, "▁▁▁")) == "   "


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "words"])
def test_the_bytes_of_all_tokens_are_the_texts(text: Text, kind: str) -> None:
    """Also where a token is a part of a character, or a character is U+FFFD itself."""
    plain = Tokenizer(models.WordLevel({"the": 0, "hen": 1, "a": 2, "?": 3}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words = {"byte-level": text.base.backend, "sentencepiece": sentencepiece(), "words": plain}[kind]
    for whole in ["the hen a"] if kind == "words" else ["x日本 😀  y\ufffd\n", *texts(20)]:
        tokenizer, ids = AdapterTokenizer(Words(words)), words.encode(whole, add_special_tokens=False).ids
        lead = "" if kind == "byte-level" else " "  # before the first word too, as within a text
        assert b"".join(map(tokenizer.piece_bytes, ids)).decode() == lead + whole


def test_a_special_tokens_bytes_are_its_names_and_one_that_is_none_has_none(text: Text) -> None:
    assert text.base.piece_bytes(2) == b"<|im_end|>"
    assert text.base.piece_bytes(10**6) == b""


# ---- stop strings


def pieces(whole: str, rng: random.Random) -> list[str]:
    cuts = sorted(rng.randrange(len(whole) + 1) for _ in range(rng.randrange(6)))
    return [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)], strict=True)]


def expected(whole: str, stops: list[str]) -> str:
    """By looking at every prefix: the text before the longest stop at the first place where one
    ends.
    """
    for end in range(1, len(whole) + 1):
        ended = [s for s in stops if whole[:end].endswith(s)]
        if ended:
            return whole[: end - max(map(len, ended))]
    return whole


def test_stops_cut_the_same_text_however_it_comes() -> None:
    rng = random.Random(1)
    for _ in range(2000):
        whole = "".join(rng.choice("ab") for _ in range(rng.randrange(1, 30)))
        stops = [
            "".join(rng.choice("ab") for _ in range(rng.randrange(1, 7))) for _ in range(rng.randrange(1, 4))
        ]
        filter, kept = StopStrings(stops), ""
        for part in pieces(whole, rng):
            kept += filter.push_text(part)
            assert expected(whole, stops).startswith(kept), (whole, stops)
            if filter.found:
                break
        kept += "" if filter.found else filter.flush_held()
        assert kept == expected(whole, stops), (whole, stops)


def test_what_only_looks_like_a_stop_is_let_go() -> None:
    filter = StopStrings(["N Q"])
    assert [filter.push_text(part) for part in (" M", " N", " O")] == [" M", " ", "N O"]
    assert filter.push_text(" N") == " "
    assert filter.flush_held() == "N"


def test_a_stop_tells_which_and_what_came_behind() -> None:
    filter = StopStrings(["</s>", ""])
    assert filter.push_text("one</") == "one"
    assert filter.push_text("s>two") == ""
    assert (filter.found, filter.rest) == ("</s>", "two")


def test_without_stops_everything_passes_at_once() -> None:
    assert StopStrings([]).push_text("abc") == StopStrings([""]).push_text("abc") == "abc"


# ---- the base's tokenizer


def test_encoding_is_the_tokenizers_own(text: Text) -> None:
    for whole in texts(20):
        assert list(text.base.encode(whole)) == making.ids(whole)


def test_eos_are_all_that_any_file_lists(text: Text) -> None:
    assert text.base.eos == {2, 7}


def test_a_lone_surrogate_is_refused(text: Text) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        text.base.encode("a\ud800")


def test_chat_renders_without_a_doubled_bos(text: Text) -> None:
    """B15."""
    ids = chat(text.base, [USER])
    assert ids == tuple(making.ids("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"))


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": "user", "content": None}], [{}], []])
def test_what_a_template_refuses_is_a_bad_request(
    text: Text, folder: Path, tmp_path: Path, messages: list[dict[str, str]]
) -> None:
    template = (
        "{{ raise_exception('no messages') if not messages }}"
        "{{ '<|im_start|>' + messages[0].role + messages[0].content }}"
    )
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadRequest, match="messages"):
        chat(text.tokenizer_of("strict", tmp_path), messages)


def test_a_base_without_a_template_says_so(tmp_path: Path) -> None:
    making.tokenizer(template=False).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(BadRequest, match="template"):
        chat(Text(tmp_path).base, [USER])


def test_a_base_without_a_tokenizer_stops_the_start(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(SettingsError, match="ADAPTERD_BASE"):
        Text(tmp_path)


# ---- adapters' tokenizers


def test_an_adapter_without_files_speaks_as_the_base(text: Text, own: Path) -> None:
    assert text.find_cached("plain") is None
    assert text.tokenizer_of("plain", own) is text.base
    assert text.find_cached("plain") is text.base


def test_the_last_tokenizers_are_kept(folder: Path, own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words, "KEPT", 2)
    text = Text(folder)
    assert all(text.tokenizer_of(generation, own) is text.base for generation in "abc")
    assert [text.find_cached(generation) for generation in "abc"] == [None, text.base, text.base]


def test_files_that_changed_since_they_were_registered_never_speak_for_that_content(
    text: Text, own: Path
) -> None:
    template = own / "chat_template.jinja"
    template.write_text("old")
    registered = read_manifest(own)
    digest = compute_digest(registered)
    for change in (lambda: template.write_text("new"), lambda: template.write_text("{{"), template.unlink):
        change()
        with pytest.raises(
            AdapterInvalid, match=r"changed on disk since it was registered: register it again \(PUT\)"
        ):
            text.tokenizer_of(digest, own, registered)
        assert text.find_cached(digest) is None
    template.write_text("old")
    (own / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterInvalid, match="changed on disk"):
        text.tokenizer_of(digest, own, registered)
    (own / "tokenizer.json").unlink()
    assert list(chat(text.tokenizer_of(digest, own, registered), [USER])) == making.ids("old")
    template.write_text("new")
    known = text.find_cached(digest)
    assert known is not None
    assert list(chat(known, [USER])) == making.ids("old"), "what was read once is this content's"


def test_a_change_while_the_files_are_read_is_noticed(
    text: Text, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    template, read = own / "chat_template.jinja", words.Tokenizers._read_tokenizer
    template.write_text("old")
    registered = read_manifest(own)

    def slow(self: words.Tokenizers, folder: Path) -> AdapterTokenizer:
        template.write_text("new")
        return read(self, folder)

    monkeypatch.setattr(words.Tokenizers, "_read_tokenizer", slow)
    with pytest.raises(AdapterInvalid, match="changed on disk"):
        text.tokenizer_of("slow", own, registered)


def test_an_adapters_template_comes_before_the_bases(text: Text, own: Path) -> None:
    (own / "chat_template.jinja").write_text("{{ bos_token }}One sentence. {{ messages[-1]['content'] }}")
    assert list(chat(text.tokenizer_of("jinja", own), [USER])) == making.ids("<|im_start|>One sentence. Hi")


def test_a_template_in_the_tokenizers_config_counts_and_so_do_its_tokens(text: Text, own: Path) -> None:
    settings = {
        "chat_template": "{{ eos_token }}{{ messages[0].content }}",
        "eos_token": {"content": "<|endoftext|>"},
    }
    (own / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = text.tokenizer_of("config", own)
    assert list(chat(tokenizer, [USER])) == making.ids("<|endoftext|>Hi")
    assert tokenizer.eos == {0, 2, 7}


def test_named_templates_are_chosen_by_need(text: Text, own: Path) -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    tokenizer = text.tokenizer_of("named", own)
    assert list(chat(tokenizer, [USER])) == making.ids("plain")
    assert list(chat(tokenizer, [USER], [{"type": "function", "function": {"name": "add"}}])) == making.ids(
        "add"
    )


def test_an_adapters_own_eos_ends_its_answers_too(text: Text, own: Path) -> None:
    (own / "generation_config.json").write_text(json.dumps({"eos_token_id": [9]}))
    assert text.tokenizer_of("eos", own).eos == {2, 7, 9}


def saved_words(folder: Path) -> dict[str, Any]:
    saved: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return saved


def test_a_file_that_says_the_same_in_another_way_shares_the_bases_tokenizer(
    text: Text, folder: Path, own: Path
) -> None:
    shutil.copyfile(folder / "tokenizer.json", own / "tokenizer.json")
    assert text.tokenizer_of("same", own).backend is text.base.backend
    (own / "tokenizer.json").write_text(json.dumps(saved_words(folder), indent=4))
    assert text.tokenizer_of("reformatted", own).backend is text.base.backend
    cut = Tokenizer.from_file(str(folder / "tokenizer.json"))
    cut.enable_truncation(4)
    cut.enable_padding(length=9, pad_id=2, pad_token="<|im_end|>")
    cut.save(str(own / "tokenizer.json"))
    assert text.tokenizer_of("for training", own).backend is text.base.backend
    making.tokenizer().save_pretrained(own)
    assert text.tokenizer_of("saved beside", own).backend is text.base.backend


BOS = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
PARTS = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
SPECIALS = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [BOS, PARTS[0]],
    "pair": PARTS,
    "special_tokens": SPECIALS,
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PART = {
    "id": 75,
    "content": "i",
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}


@pytest.mark.parametrize(
    "changed",
    [
        {"post_processor": PROCESSOR},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {**BYTE_LEVEL, "add_prefix_space": True}},
        {
            "decoder": {
                "type": "Sequence",
                "decoders": [BYTE_LEVEL, {"type": "Strip", "content": "H", "start": 1, "stop": 0}],
            }
        },
        {"added_tokens": [PART]},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_same_vocabulary_used_in_another_way_is_the_adapters_own(
    text: Text, folder: Path, own: Path, changed: Any
) -> None:
    (own / "tokenizer.json").write_text(json.dumps(saved_words(folder) | changed))
    tokenizer, right = text.tokenizer_of(str(changed), own), Tokenizer.from_file(str(own / "tokenizer.json"))
    assert list(tokenizer.encode("Hi")) == right.encode("Hi").ids
    assert tokenizer.decode([42, 75]) == right.decode([42, 75])
    assert (list(tokenizer.encode("Hi")), tokenizer.decode([42, 75])) != (making.ids("Hi"), "Hi")
    assert tokenizer.words.own
    assert not tokenizer.words.own_vocabulary


EOS = {
    "content": "<|im_end|>",
    "special": True,
    "single_word": False,
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
}


def test_settings_that_add_tokens_or_use_them_in_another_way_count(
    text: Text, folder: Path, own: Path
) -> None:
    shutil.copyfile(folder / "tokenizer.json", own / "tokenizer.json")
    extra = {"added_tokens_decoder": {"269": {"content": "<|extra|>", "special": True}}}
    (own / "tokenizer_config.json").write_text(json.dumps(extra))
    assert text.tokenizer_of("extra", own).encode("<|extra|>Hi") == (269, *making.ids("Hi"))
    (own / "tokenizer_config.json").write_text(json.dumps({"additional_special_tokens": ["<|extra|>"]}))
    assert text.tokenizer_of("listed", own).encode("<|extra|>Hi") == (269, *making.ids("Hi"))
    greedy = {"added_tokens_decoder": {"2": {**EOS, "lstrip": True}}}
    (own / "tokenizer_config.json").write_text(json.dumps(greedy))
    assert text.tokenizer_of("greedy", own).encode("Hi <|im_end|>") == (*making.ids("Hi"), 2)
    (own / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    assert 2 not in text.tokenizer_of("split", own).encode("Hi<|im_end|>")


def test_settings_that_name_only_what_the_base_has_load_nothing(
    text: Text, folder: Path, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To load a tokenizer of a hundred thousand words stops every other thread for seconds."""
    monkeypatch.setattr(words, "_load_backend", pytest.fail)
    shutil.copyfile(folder / "tokenizer.json", own / "tokenizer.json")
    settings = {
        "added_tokens_decoder": {"2": EOS},
        "pad_token": "<|endoftext|>",
        "extra_special_tokens": ["<|im_start|>"],
    }
    (own / "tokenizer_config.json").write_text(
        json.dumps({**settings, "padding_side": "left", "add_bos_token": True})
    )
    assert text.tokenizer_of("nothing new", own).backend is text.base.backend


def test_another_vocabulary_is_the_adapters_own(text: Text, folder: Path, own: Path) -> None:
    more = Tokenizer.from_file(str(folder / "tokenizer.json"))
    more.add_special_tokens(["<|extra|>"])
    more.save(str(own / "tokenizer.json"))
    tokenizer = text.tokenizer_of("more", own)
    assert tokenizer.encode("<|extra|>") == (text.base.backend.get_vocab_size(),)
    assert not tokenizer.words.own_vocabulary, "the base's words mean what they meant"
    saved = saved_words(folder)
    vocabulary = saved["model"]["vocab"]
    saved["model"]["vocab"] = vocabulary | {"H": vocabulary["i"], "i": vocabulary["H"]}
    (own / "tokenizer.json").write_text(json.dumps(saved))
    swapped = text.tokenizer_of("swapped", own)
    assert swapped.encode("Hi") == tuple(reversed(making.ids("Hi")))
    assert swapped.words.own_vocabulary


def test_adapters_with_the_same_content_share_one_tokenizer(text: Text, folder: Path, tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer.json").write_text(
            json.dumps(saved_words(folder) | {"normalizer": {"type": "Lowercase"}})
        )
        (tmp_path / name / "tokenizer_config.json").write_text(
            json.dumps({"chat_template": f"{name} has its own template"})
        )
    first, second = (text.tokenizer_of(f"shares {name}", tmp_path / name) for name in "ab")
    assert first.backend is second.backend is not text.base.backend


def test_of_tokenizers_of_their_own_few_are_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(words, "OWN_KEPT", 2)
    text = Text(folder)
    text.tokenizer_of("none", tmp_path)
    for name in "abc":
        (tmp_path / name).mkdir()
        changed = {"normalizer": {"type": "Replace", "pattern": {"String": name}, "content": ""}}
        (tmp_path / name / "tokenizer.json").write_text(json.dumps(saved_words(folder) | changed))
        text.tokenizer_of(name, tmp_path / name)
    assert [text.find_cached(name) is not None for name in ("none", *"abc")] == [True, False, True, True]


def vocabulary_files(saved: dict[str, Any], folder: Path) -> None:
    """A tokenizer as it was saved before there was one file for it."""
    (folder / "vocab.json").write_text(json.dumps(saved["model"]["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in saved["model"]["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")


def test_a_vocabulary_and_its_merges_are_a_tokenizer_too(text: Text, folder: Path, own: Path) -> None:
    saved = saved_words(folder)
    vocabulary = saved["model"]["vocab"]
    saved["model"]["vocab"] = vocabulary | {"H": vocabulary["i"], "i": vocabulary["H"]}
    vocabulary_files(saved, own)
    (own / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    assert text.tokenizer_of("qwen", own).encode("Hi") == tuple(reversed(making.ids("Hi")))


@pytest.mark.parametrize("name", ["vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"])
def test_what_cannot_be_made_a_tokenizer_is_refused_by_name(
    text: Text, folder: Path, own: Path, name: str
) -> None:
    vocabulary_files(saved_words(folder), own)
    (own / "added_tokens.json").write_text(json.dumps({"<|extra|>": 269}))
    (own / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02")
    for other in ("vocab.json", "merges.txt", "tokenizer.model", "added_tokens.json"):
        if other != name:
            (own / other).unlink()
    with pytest.raises(AdapterInvalid, match=rf"{name}.*tokenizer\.json"):
        text.tokenizer_of(f"only {name}", own)


def test_the_bases_own_older_files_are_no_other_tokenizer(folder: Path, tmp_path: Path) -> None:
    base, own = tmp_path / "base", tmp_path / "own"
    shutil.copytree(folder, base)
    own.mkdir()
    for place in (base, own):
        vocabulary_files(saved_words(folder), place)
    text = Text(base)
    assert text.tokenizer_of("older", own).backend is text.base.backend


def test_a_template_that_a_processor_saved_counts(
    text: Text, own: Path, folder: Path, tmp_path: Path
) -> None:
    (own / "chat_template.json").write_text(
        json.dumps({"chat_template": "{{ messages[0].content }} of a processor"})
    )
    assert list(chat(text.tokenizer_of("processor", own), [USER])) == making.ids("Hi of a processor")
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    (base / "chat_template.jinja").unlink()
    shutil.copyfile(own / "chat_template.json", base / "chat_template.json")
    assert list(chat(Text(base).base, [USER])) == making.ids("Hi of a processor")


def test_only_what_is_not_the_bases_own_is_a_strangers_template(text: Text, folder: Path, own: Path) -> None:
    shutil.copyfile(folder / "chat_template.jinja", own / "chat_template.jinja")
    (own / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "padding_side": "left"})
    )
    assert not text.tokenizer_of("the same template", own).own_template
    (own / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    assert text.tokenizer_of("the same with other tokens", own).own_template
    (own / "tokenizer_config.json").unlink()
    (own / "chat_template.jinja").write_text(making.TEMPLATE + " ")
    assert text.tokenizer_of("another template", own).own_template


def test_a_template_has_a_length(text: Text, own: Path) -> None:
    (own / "chat_template.jinja").write_text("x" * 1_000_001)
    with pytest.raises(
        AdapterInvalid, match="the chat template has 1000001 characters; 1000000 are the most"
    ):
        text.tokenizer_of("too long", own)
    (own / "chat_template.jinja").unlink()
    halves = [{"name": name, "template": "x" * 500_001} for name in ("default", "tool_use")]
    (own / "tokenizer_config.json").write_text(json.dumps({"chat_template": halves}))
    with pytest.raises(AdapterInvalid, match="1000002 characters"):
        text.tokenizer_of("too long in parts", own)


def test_tokenizer_files_at_which_the_library_panics_are_the_adapters_fault_too(
    text: Text, own: Path
) -> None:
    """Its panics are no Exceptions."""
    words = json.loads(making.tokenizer().backend_tokenizer.to_str())
    (own / "tokenizer.json").write_text(
        json.dumps(words | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}})
    )
    with pytest.raises(AdapterInvalid, match="tokenizer files cannot be read"):
        text.tokenizer_of("panics", own)
    late = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x"}
    words["model"]["vocab"]["a word of its own"] = 1000
    (own / "tokenizer.json").write_text(json.dumps(words | {"normalizer": late}))
    with pytest.raises(BadRequest, match="fails at this text"):
        text.tokenizer_of("panics later", own).encode("a" * 40 + "!")


def test_other_threads_run_while_a_long_text_is_tokenized(text: Text) -> None:
    turns, over = [0], threading.Event()

    def turn() -> None:
        while not over.wait(0.001):
            turns[0] += 1

    beside = threading.Thread(target=turn)
    beside.start()
    text.base.encode("é" * 1_000_000)
    seen = turns[0]
    over.set()
    beside.join()
    assert seen > 10


def test_many_answers_with_the_same_stop_strings_prepare_them_once() -> None:
    assert StopStrings(["ab" * 500])._falls[0] is StopStrings(["ab" * 500])._falls[0]


def test_broken_tokenizer_files_are_the_adapters_fault(text: Text, own: Path) -> None:
    (own / "tokenizer.json").write_text("{")
    with pytest.raises(AdapterInvalid, match="tokenizer"):
        text.tokenizer_of("broken", own)


def test_a_template_without_tools_takes_none(text: Text, own: Path) -> None:
    with pytest.raises(BadRequest, match="tools"):
        text.base.tool_format()
    (own / "chat_template.jinja").write_text("{{ tools }}<tool_call>")
    assert text.tokenizer_of("tools", own).tool_format() is CallFormat.HERMES
