"""Keys: what a list or a file of them says, that only their hashes are kept, and that no word about
a wrong one holds it.
"""

from __future__ import annotations

import hmac
from pathlib import Path

import pytest

from service.errors import SettingsError
from service.keys import Key, find_key, hash_secret, parse_keys
from service.settings import read_settings

BASE = {"ADAPTERD_BASE": "org/name"}


def written(folder: Path, text: str) -> str:
    (folder / "keys").write_text(text)
    return f"@{folder / 'keys'}"


def test_a_file_holds_hashes_or_keys_and_what_each_may_use_and_take(tmp_path: Path) -> None:
    digest = hash_secret("sk-web").removeprefix("sha256:").upper()
    web = (
        f"sha256:{digest} name=web adapters=support,org/* rate=0.5 concurrency=3 tokens=6000 max_priority=-2"
    )
    first, plain = parse_keys(written(tmp_path, f"# the web site\n{web}\n\n sk-plain \n"))
    assert first == Key(hash_secret("sk-web"), "web", ("support", "org/*"), 0.5, 3, 6000, -2)
    assert plain == Key(hash_secret("sk-plain"))
    assert "sk-" not in repr([first, plain])
    assert find_key("sk-web", (first, plain)) is first


def test_a_key_is_told_of_by_its_name_or_a_piece_of_its_hash() -> None:
    assert Key(hash_secret("sk-web"), "web").label == "web"
    assert Key(hash_secret("sk-web")).label == hash_secret("sk-web")[:19]


def test_patterns_are_of_whole_ids_and_their_case_counts() -> None:
    key = Key("", adapters=("support", "org/*"))
    assert [key.may_use(id) for id in ("support", "org/a", "Support", "support2", "org", "other")] == [
        True,
        True,
        False,
        False,
        False,
        False,
    ]
    assert Key("").may_use("anything")
    assert not Key("", adapters=()).may_use("anything")


WRONG = [
    "rate=0",
    "rate=inf",
    "concurrency=1.5",
    "tokens=0",
    "tokens=many",
    "max_priority=1.5",
    "max_priority=",
]
WRONG += ["colour=red", "and more", "name=a name=b", "adapters="]


@pytest.mark.parametrize("line", ["sha256:sk-secret", *(f"sk-secret {rest}" for rest in WRONG)])
def test_a_wrong_line_is_named_by_its_number_and_not_shown(tmp_path: Path, line: str) -> None:
    with pytest.raises(SettingsError, match=r"^ADAPTERD_API_KEYS: line 2 of the key file: ") as refused:
        read_settings(BASE | {"ADAPTERD_API_KEYS": written(tmp_path, f"# first\n{line}\n")})
    assert "secret" not in str(refused.value)


def test_a_file_without_a_key_does_not_open_the_service(tmp_path: Path) -> None:
    for text in ("", "\n# sk-none\n"):
        with pytest.raises(SettingsError, match="holds no key"):
            read_settings(BASE | {"ADAPTERD_API_KEYS": written(tmp_path, text)})
    (tmp_path / "keys").write_bytes(b"\xff\xfe")
    with pytest.raises(SettingsError, match="no UTF-8"):
        read_settings(BASE | {"ADAPTERD_API_KEYS": f"@{tmp_path / 'keys'}"})


def test_an_admin_key_has_no_list_of_adapters(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^ADAPTERD_ADMIN_KEYS: an admin key manages every adapter"):
        read_settings(BASE | {"ADAPTERD_ADMIN_KEYS": written(tmp_path, "sk-a adapters=x\n")})


def test_every_key_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a match: how long it takes must not tell which key it was."""
    compared: list[tuple[str, str]] = []
    equal = hmac.compare_digest

    def compare(a: str, b: str) -> bool:
        compared.append((a, b))
        return equal(a, b)

    monkeypatch.setattr("service.keys.hmac.compare_digest", compare)
    many = parse_keys("sk-a,sk-b,sk-c")
    assert find_key("sk-a", many) == many[0]
    assert find_key("sk-x", many) is None
    assert [a for a, _ in compared] == [key.digest for key in many] * 2
    assert all(b.startswith("sha256:") for _, b in compared)
