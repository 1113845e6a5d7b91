"""URLs have one spelling, prefixes end at a border of the path, and nothing of a bad one is repeated."""

from __future__ import annotations

import pytest

from service.source_urls import is_allowed, parse_url

SPELLED = {
    "s3://bucket/team/one/": "s3://bucket/team/one",
    "S3://Bucket/team": "s3://Bucket/team",
    "https://Files.Example.COM:443/a": "https://files.example.com/a",
    "http://127.0.0.1:8000/a/b": "http://127.0.0.1:8000/a/b",
    "https://[::1]:8443/a": "https://[::1]:8443/a",
    "gs://bucket": "gs://bucket",
    "https://host/a@b/~c+d=e,f:g!h": "https://host/a@b/~c+d=e,f:g!h",
}


@pytest.mark.parametrize(("text", "spelled"), SPELLED.items())
def test_a_url_has_one_spelling(text: str, spelled: str) -> None:
    assert str(parse_url(text)) == spelled
    assert parse_url(spelled) == parse_url(text)


SECRET = "hunter2"
BAD = [
    "",
    "folder",
    f"file:///{SECRET}",
    f"ftp://host/{SECRET}",
    f"https://user:{SECRET}@host/a",
    f"https://{SECRET}@host/a",
    f"s3://key:{SECRET}@bucket/a",
    f"https://host/a?token={SECRET}",
    f"https://host/a#{SECRET}",
    f"https://host/a/../{SECRET}",
    f"https://host/./{SECRET}",
    f"https://host/%2e%2e/{SECRET}",
    f"https://host/a%2fb/{SECRET}",
    f"https://host//{SECRET}",
    f"https://host/a\\..\\{SECRET}",
    f"https://host/a b/{SECRET}",
    f"https://host/\n{SECRET}",
    f"https://host/\0{SECRET}",
    f"https://host/ä/{SECRET}",
    f"https://host:0/{SECRET}",
    f"https://host:65536/{SECRET}",
    f"https://host:8x/{SECRET}",
    f"https://:80/{SECRET}",
    f"https:///{SECRET}",
    f"https://ho..st/{SECRET}",
    f"https://host./{SECRET}",
    f"https://hóst/{SECRET}",
    f"https://host/{'a' * 1024}{SECRET}",
    "https://host/" + "\ud800",
]


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_plain_url_is_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match=r"^(wanted|adapters come from) ") as caught:
        parse_url(text)
    assert SECRET not in str(caught.value)


INSIDE = {
    "s3://bucket/team/": ["s3://bucket/team/one", "s3://bucket/team/a/b/c", "s3://bucket/team"],
    "https://host/a": ["https://host:443/a/b", "https://HOST/a"],
    "https://host": ["https://host/anything"],
}
OUTSIDE = {
    "s3://bucket/team": [
        "s3://bucket/teams/one",
        "s3://bucket/other",
        "gs://bucket/team",
        "s3://buckets/team",
    ],
    "https://host/a": [
        "http://host/a",
        "https://host:8443/a",
        "https://host.evil.org/a",
        "https://evil.org/host/a",
    ],
    "http://127.0.0.1:80/a": ["http://localhost/a", "http://127.0.0.1:81/a", "https://127.0.0.1/a"],
}


@pytest.mark.parametrize(("prefix", "url"), [(prefix, url) for prefix in INSIDE for url in INSIDE[prefix]])
def test_what_lies_below_a_prefix_is_allowed(prefix: str, url: str) -> None:
    assert is_allowed(parse_url(url), [parse_url("s3://else"), parse_url(prefix)])


@pytest.mark.parametrize(("prefix", "url"), [(prefix, url) for prefix in OUTSIDE for url in OUTSIDE[prefix]])
def test_what_lies_beside_a_prefix_is_not(prefix: str, url: str) -> None:
    assert not is_allowed(parse_url(url), [parse_url(prefix)])
