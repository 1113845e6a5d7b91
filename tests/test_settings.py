"""Settings: every knob from a variable or a flag, and one line that names what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import SettingsError
from service.keys import find_key
from service.settings import Faults, Settings, read_settings

BASE = {"ADAPTERD_BASE": "org/name"}


def refused(environment: dict[str, str], flags: dict[str, str] | None = None) -> str:
    with pytest.raises(SettingsError) as caught:
        read_settings(environment, flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_set_is_the_demo_on_loopback() -> None:
    chosen = read_settings({})
    assert (chosen.host, chosen.port, chosen.base, chosen.keyed) == ("127.0.0.1", 8080, "demo", False)
    assert chosen.adapters.parts[-2:] == ("demo", "adapters")
    assert read_settings(BASE).adapters == Path("adapters")


def test_flags_are_over_variables_and_other_variables_are_none_of_ours() -> None:
    chosen = read_settings(
        BASE | {"ADAPTERD_PORT": "1", "ADAPTERD_MAX_ROWS": "3", "PATH": "/bin"}, {"port": "2"}
    )
    assert (chosen.port, chosen.max_rows) == (2, 3)


WRONG = {
    "PORT": ("http", "70000", "-1"),
    "QUANTIZATION": ("nf5",),
    "DTYPE": ("float7",),
    "DEVICE": ("gpu", "cuda:x"),
    "MAX_ROWS": ("0", "1.5", ""),
    "COMPILE": ("maybe",),
    "FAULTS": ("nonsense", "step:0", "kill:x", "slow_load:"),
    "DRAIN_S": ("-1", "inf", "nan"),
    "LOG_LEVEL": ("loud",),
    "BASE": ("no/such/folder", "no.gguf", ""),
    "ADAPTERS_DIR": ("", __file__),
    "HUB": ("on", "*", "org/*, other", "https://huggingface.co/org/name"),
    "SOURCES": (
        "on",
        "*",
        "s3://",
        "file:///srv",
        "https://host/a?b",
        "https://host/..",
        "ftp://host",
        "s3://a, b",
    ),
    "RESOLVE": ("yes",),
    "SHARED": ("1",),
    "NO_SUCH": ("1",),
    "MAX_RANK": ("513",),
    "HOST": ("0.0.0.0",),
    "API_KEYS": ("@/no/such/file", "sha256:short"),
    "KEY_RATE": ("0", "-1", "fast"),
    "KEY_CONCURRENCY": ("0",),
    "CORS_ORIGINS": ("example.org", "https://example.org/path", "https://*.example.org"),
    "FORWARDED_ALLOW_IPS": ("*", "proxy.example.org", "10.0.0.1/8"),
    "METRICS_ADAPTERS": ("-1",),
    "METRICS_OPEN": ("yes",),
    "LORA_REQUESTS_INFO": ("maybe",),
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_refused_by_name(name: str, value: str) -> None:
    assert refused(BASE | {f"ADAPTERD_{name}": value}).startswith(f"ADAPTERD_{name}: ")


@pytest.mark.parametrize("count", ["2", "0", "many"])
def test_more_than_one_process_is_refused(count: str) -> None:
    """C1: each would have a registry of its own."""
    assert "worker" in refused(BASE | {"WEB_CONCURRENCY": count})


def test_faults_are_parsed() -> None:
    assert read_settings(BASE | {"ADAPTERD_FAULTS": "step:3, stuck,slow_load:0.5"}).faults == Faults(
        step=3, stuck=1, slow_load=0.5
    )
    assert read_settings(BASE | {"ADAPTERD_FAULTS": "kill:2,stuck:4"}).faults == Faults(kill=2, stuck=4)


def test_the_hub_is_off_or_a_list() -> None:
    assert read_settings(BASE | {"ADAPTERD_HUB": "off"}).hub == ()
    assert read_settings(BASE | {"ADAPTERD_HUB": "org/*, other/name"}).hub == ("org/*", "other/name")


def test_sources_are_off_or_prefixes_in_one_spelling() -> None:
    assert read_settings(BASE | {"ADAPTERD_SOURCES": "off"}).sources == ()
    chosen = read_settings(BASE | {"ADAPTERD_SOURCES": "s3://bucket/team/, HTTPS://Host:443/a"})
    assert chosen.sources == ("s3://bucket/team", "https://host/a")
    assert "sources" not in chosen.public_values(), "they name hosts of a network"


def test_a_refused_source_is_not_echoed() -> None:
    assert "hunter2" not in refused(BASE | {"ADAPTERD_SOURCES": "https://user:hunter2@host/a"})


def test_other_hosts_need_a_key() -> None:
    assert read_settings(BASE | {"ADAPTERD_HOST": "0.0.0.0", "ADAPTERD_API_KEYS": "sk"}).host == "0.0.0.0"
    assert read_settings(BASE | {"ADAPTERD_HOST": "::1"}).host == "::1"


def test_keys_are_known_and_never_shown(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("sk-file\n\n sk-more \n")
    chosen = read_settings(
        BASE | {"ADAPTERD_API_KEYS": "sk-a, sk-b", "ADAPTERD_ADMIN_KEYS": f"@{tmp_path / 'keys'}"}
    )
    assert find_key("sk-b", chosen.api_keys)
    assert find_key("sk-more", chosen.admin_keys)
    for wrong in ("", "sk-", "sk-a, sk-b", "\udcff", *(key.digest for key in chosen.api_keys)):
        assert not find_key(wrong, chosen.api_keys)
    assert "sk-" not in repr(chosen) + str(chosen.public_values())
    assert "/" not in str({name: value for name, value in chosen.public_values().items() if name != "hub"})


def test_a_refused_key_is_not_echoed() -> None:
    """Nor is one that begins with @, as a file does."""
    for key in ("sha256:sk-secret", "@sk-secret", f"@sk-secret{'x' * 5000}"):
        assert "sk-secret" not in refused(BASE | {"ADAPTERD_API_KEYS": key})


def test_settings_cannot_be_changed() -> None:
    chosen: Settings = read_settings(BASE)
    with pytest.raises(ValueError, match="frozen"):
        chosen.port = 1
