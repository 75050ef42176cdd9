import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import ConfigError
from tuner.source_headers import headers_for, parse_source_headers


def entries(document: object) -> tuple:
    return parse_source_headers(json.dumps(document), "sources.json")


def sent_to(url: str, *keys: str) -> str | None:
    """Which of the keys decides what this URL is sent."""
    numbered = {key: {"headers": {"X-Key": str(number)}} for number, key in enumerate(keys)}
    number = headers_for(url, entries(numbered)).get("X-Key")
    return None if number is None else keys[int(number)]


@pytest.mark.parametrize(
    ("entry", "headers"),
    [
        ({"bearer": "abc\n"}, {"Authorization": "Bearer abc"}),
        ({"username": "me", "password": "p:w"}, {"Authorization": "Basic bWU6cDp3"}),
        ({"headers": {"PRIVATE-TOKEN": "abc", "x-ms-version": "2023-11-03"}}, None),
    ],
)
def test_each_form_of_an_entry_becomes_headers(entry: dict, headers: dict | None) -> None:
    assert headers_for("https://a.example/t", entries({"https://a.example": entry})) == headers or entry["headers"]


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("https://a.example", "https://a.example/t.parquet?x=1"),
        ("https://a.example/", "https://a.example/t.parquet"),
        ("a.example", "https://a.example/t.parquet"),
        ("A.Example./team", "https://a.EXAMPLE/team/t.parquet"),
        ("https://a.example:443", "https://a.example/t"),
        ("https://a.example/team", "https://a.example/team"),
        ("https://a.example/team/", "https://a.example/team/x"),
        ("http://a.example:8080", "http://a.example:8080/t"),
        ("https://*.a.example", "https://b.a.example/t"),
        ("https://bücher.example", "https://xn--bcher-kva.example/t"),
        ("https://[::1]:8443/x", "https://[::1]:8443/x/y"),
    ],
)
def test_what_is_below_the_key_is_sent_its_headers(key: str, url: str) -> None:
    assert sent_to(url, key) == key


@pytest.mark.parametrize(
    ("key", "url"),
    [
        ("https://a.example", "http://a.example/t"),
        ("https://a.example", "https://a.example:8443/t"),
        ("https://a.example", "https://b.a.example/t"),
        ("https://a.example", "https://a.example.evil.example/t"),
        ("https://a.example", "https://evil.example/https://a.example"),
        ("https://a.example/team", "https://a.example/teams/t"),
        ("https://a.example/team", "https://a.example/team/../other/t"),
        ("https://a.example/team", "https://a.example/team/%2e%2e/other/t"),
        ("https://a.example/team", "https://a.example/team/..%5Cother"),
        ("https://*.a.example", "https://a.example/t"),
        ("https://*.a.example", "https://c.b.a.example/t"),
    ],
)
def test_what_is_beside_the_key_is_not(key: str, url: str) -> None:
    assert sent_to(url, key) is None


def test_the_longest_path_wins_and_then_the_exact_host() -> None:
    keys = ("https://*.a.example", "https://b.a.example", "https://*.a.example/team")
    assert sent_to("https://b.a.example/team/t", *keys) == "https://*.a.example/team"
    assert sent_to("https://b.a.example/t", *keys) == "https://b.a.example"
    assert sent_to("https://c.a.example/t", *keys) == "https://*.a.example"


BAD = [
    ("ftp://a.example", {"bearer": "hunter2"}, "http or https"),
    ("https://", {"bearer": "hunter2"}, "http or https"),
    ("https://a.example:99999", {"bearer": "hunter2"}, "not a URL"),
    ("https://me:hunter2@a.example", {"bearer": "x"}, "without user"),
    ("https://a.example/?sig=hunter2", {"bearer": "x"}, "without user"),
    ("https://*.example", {"bearer": "hunter2"}, "left of the last two"),
    ("https://*", {"bearer": "hunter2"}, "left of the last two"),
    ("https://a.example", {"bearer": 7}, "must be"),
    ("https://a.example", {"bearer": "hunter2", "username": "x"}, "must be"),
    ("https://a.example", {"token": "hunter2"}, "must be"),
    ("https://a.example", "hunter2", "must be"),
    ("https://a.example", {"bearer": "hunter2\r\nHost: evil"}, "without line breaks"),
    ("https://a.example", {"headers": {"X-A: b": "hunter2"}}, "header's name"),
    ("https://a.example", {"headers": {"Range": "hunter2"}}, "not for you"),
    ("https://a.example", {"headers": {"host": "hunter2"}}, "not for you"),
    ("https://a.example", {"headers": {"X-A": "hunter2\u00e9"}}, "beyond ASCII"),
    ("https://a.example", {"headers": {"X-A": None}}, "beyond ASCII"),
]


@pytest.mark.parametrize(("key", "entry", "words"), BAD)
def test_a_bad_entry_is_said_without_its_secret(key: str, entry: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        entries({key: entry})
    assert "hunter2" not in f"{caught.value!r} {caught.value.hint} {caught.value.__cause__!r}"


def test_all_bad_entries_are_said_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        entries({"ftp://a.example": {"bearer": "x"}, "https://b.example": {}})
    assert len(caught.value.problems) == 2


@pytest.mark.parametrize("text", ["", "[]", "hunter2", "[" * 100_000])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a JSON object"):
        parse_source_headers(text, "sources.json")


def test_the_repr_of_an_entry_says_nothing() -> None:
    assert "hunter2" not in repr(entries({"https://a.example": {"bearer": "hunter2"}}))


@given(st.text(max_size=30), st.sampled_from(["https", "http"]), st.text(max_size=12))
def test_a_host_that_is_not_named_never_gets_a_secret(host: str, scheme: str, path: str) -> None:
    try:
        sent = sent_to(f"{scheme}://{host}/{path}", "https://a.example/team")
    except ValueError:  # no URL
        return
    assert sent is None or host.lower().rstrip(".") in ("a.example", "a.example:443", "a.example:") or "@" in host
