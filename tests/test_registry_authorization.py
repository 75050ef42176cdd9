"""tuner/registry/authorization.py, and the pure part of transport.py"""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import DeniedError, ServiceError
from tuner.registry.authorization import (
    check_address,
    parse_challenges,
    parse_token,
    same_origin,
    token_requests,
    token_scopes,
)
from tuner.registry.credentials import Credential
from tuner.urls import Allowed


@pytest.mark.parametrize(
    ("header", "challenges"),
    [
        ('Basic realm="lab"', [("basic", {"realm": "lab"})]),
        ("Basic realm=lab", [("basic", {"realm": "lab"})]),
        ("Basic", [("basic", {})]),
        (
            'Bearer realm="https://a.b/token",service="a.b",scope="repository:x/y:pull,push"',
            [("bearer", {"realm": "https://a.b/token", "service": "a.b", "scope": "repository:x/y:pull,push"})],
        ),
        (
            "Bearer realm=https://a.b/token , service=a.b",
            [("bearer", {"realm": "https://a.b/token", "service": "a.b"})],
        ),
        (
            'Bearer realm="t",error="insufficient_scope", Basic realm="r", Negotiate',
            [("bearer", {"realm": "t", "error": "insufficient_scope"}), ("basic", {"realm": "r"}), ("negotiate", {})],
        ),
        (r'BEARER Realm = "a \"b\" \\c"', [("bearer", {"realm": r'a "b" \c'})]),
        ('Bearer realm="first",realm="second"', [("bearer", {"realm": "first"})]),
        ("", []),
        (", ,", []),
        ('realm="without a scheme"', []),
    ],
)
def test_challenges_are_read(header: str, challenges: list[tuple[str, dict[str, str]]]) -> None:
    assert [(challenge.scheme, challenge.parameters) for challenge in parse_challenges(header)] == challenges


@given(st.text(alphabet='aB ,="\\/:é\t', max_size=60))
def test_any_header_is_read(header: str) -> None:
    for challenge in parse_challenges(header):
        assert challenge.scheme


@given(st.lists(st.tuples(st.from_regex(r"[a-z]{1,8}", fullmatch=True), st.text(max_size=20)), max_size=4))
def test_quoted_values_come_back_whole(parameters: list[tuple[str, str]]) -> None:
    quoted = [(name, value.replace("\\", "\\\\").replace('"', '\\"')) for name, value in parameters]
    header = "Bearer " + ",".join(f'{name}="{value}"' for name, value in quoted if "\n" not in value)
    expected: dict[str, str] = {}
    for name, value in parameters:
        if "\n" not in value:
            expected.setdefault(name, value)
    (challenge,) = parse_challenges(header)
    assert challenge.parameters == expected


@pytest.mark.parametrize(
    ("challenged", "scopes"),
    [
        ("", ["repository:x:pull,push"]),
        ("repository:x:pull", ["repository:x:pull,push"]),
        ("repository:x:pull,push", ["repository:x:pull,push"]),
        ("repository:x:delete", ["repository:x:pull,push,delete"]),
        ("repository:y:pull", ["repository:y:pull", "repository:x:pull,push"]),
    ],
)
def test_a_token_is_asked_for_the_whole_job(challenged: str, scopes: list[str]) -> None:
    assert token_scopes("repository:x:pull,push", challenged) == scopes


def test_an_identity_token_is_posted_and_then_tried_as_a_password() -> None:
    (challenge,) = parse_challenges('Bearer realm="https://a.b/t?x=1",service="s"')
    post, get = token_requests(challenge, Credential("k", identity_token="refresh"), ["one", "two"])
    assert post.url == "https://a.b/t?x=1"
    assert post.form == {
        "grant_type": "refresh_token",
        "service": "s",
        "client_id": "tuner",
        "scope": "one two",
        "refresh_token": "refresh",
    }
    assert get.url == "https://a.b/t?x=1&service=s&scope=one&scope=two"
    assert get.headers["Authorization"].startswith("Basic ")
    assert "refresh" not in f"{post!r}{get!r}"


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"token": ""}', b'{"token": 1}', b'{"token": "a\\nb"}', b'{"token":"a","expires_in":[1]}'],
)
def test_a_reply_without_a_token_is_refused(body: bytes) -> None:
    with pytest.raises(ServiceError):
        parse_token(body, "a.b")


def test_both_names_of_a_token_are_read() -> None:
    assert parse_token(b'{"token": "t"}', "a.b").value == "t"
    assert parse_token(b'{"token": "t"}', "a.b").lifetime_s == 60
    token = parse_token(b'{"access_token": "t", "expires_in": 4500}', "a.b")
    assert (token.value, token.lifetime_s) == ("t", 4500)


@pytest.mark.parametrize(
    ("url", "registry", "allowed"),
    [
        ("https://auth.docker.io/token", "https://registry-1.docker.io", True),
        ("https://a.b:8443/token", "https://a.b", True),
        ("http://a.b/token", "https://a.b", False),
        ("http://a.b/token", "http://a.b", True),
        ("http://127.0.0.1:2/token", "http://127.0.0.1:1", True),
        ("http://127.0.0.1:2/token", "http://a.b", False),
        ("https://10.1.2.3/token", "https://a.b", False),
        ("https://10.1.2.3/token", "https://10.1.2.3", True),
        ("https://169.254.169.254/token", "https://a.b", False),
        ("https://2130706433/token", "https://a.b", False),
        ("https://[::1]/token", "https://a.b", False),
        ("https://localhost/token", "https://a.b", False),
        ("https://metadata.google.internal/token", "https://a.b", False),
        ("https://user:pw@a.b/token", "https://a.b", False),
        ("https://a.b:port/token", "https://a.b", False),
        ("file:///etc/passwd", "https://a.b", False),
        ("", "https://a.b", False),
    ],
)
def test_a_registry_may_send_us_only_to_public_places_and_to_itself(url: str, registry: str, allowed: bool) -> None:
    if allowed:
        assert check_address(url, registry, "token server", Allowed()) == url
    else:
        with pytest.raises(DeniedError):
            check_address(url, registry, "token server", Allowed())


def test_an_allowed_range_opens_internal_addresses() -> None:
    allowed = Allowed.of(["10.0.0.0/8"], private=False)
    assert check_address("https://10.1.2.3/token", "https://a.b", "token server", allowed)


def test_an_origin_is_scheme_host_and_port() -> None:
    assert same_origin("https://a.b/x", "https://a.b:443")
    assert not same_origin("http://a.b/x", "https://a.b")
    assert not same_origin("https://a.b:5000/x", "https://a.b")
    assert not same_origin("https://a.b.c/x", "https://a.b")
