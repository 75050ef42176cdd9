"""tuner/registry/credentials.py"""

import base64
import contextlib
import json
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.errors import ConfigError
from tuner.reference import parse_reference
from tuner.registry.credentials import Credential, expires_at, parse_credentials


def encoded(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()


def config(**auths: object) -> str:
    return json.dumps({"auths": auths})


def users(texts: list[str], reference: str) -> list[str]:
    return [credential.username for credential in parse_credentials(texts).find(parse_reference(reference))]


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """docker-credential-fake, which knows two registries and writes down what it is asked."""
    program = tmp_path / "docker-credential-fake"
    program.write_text(
        f"""#!{sys.executable}
import json, sys
server = sys.stdin.read()
open({str(tmp_path / "asked")!r}, "a").write(" ".join(sys.argv[1:]) + " " + server + "\\n")
known = {{"acr.azurecr.io": ("ci", "hunter2"), "https://index.docker.io/v1/": ("<token>", "hunter2")}}
if server not in known:
    print("credentials not found in native keychain")
    sys.exit(1)
user, secret = known[server]
print(json.dumps({{"ServerURL": server, "Username": user, "Secret": secret}}))
"""
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "asked"


@pytest.mark.parametrize(
    "named", [{"credsStore": "fake"}, {"credHelpers": {"acr.azurecr.io": "fake"}, "credsStore": "another"}]
)
def test_a_helper_is_asked_before_the_entries(helper: Path, named: dict[str, object]) -> None:
    text = json.dumps({"auths": {"acr.azurecr.io": {"auth": encoded("me", "pw")}}, **named})
    store = parse_credentials([text])
    first, second = store.find(parse_reference("acr.azurecr.io/phi:1"))
    assert (first.username, first.password, second.username) == ("ci", "hunter2", "me")
    assert helper.read_text() == "get acr.azurecr.io\n"
    assert "hunter2" not in f"{store!r} {first!r} {first.describe()}"
    assert store.missing_helper(parse_reference("acr.azurecr.io/phi:1")) is None


def test_a_helpers_token_is_an_identity_token(helper: Path) -> None:
    (found,) = parse_credentials(['{"credsStore": "fake"}']).find(parse_reference("me/phi:1"))
    assert (found.identity_token, found.username, found.password) == ("hunter2", "", "")


def test_a_helper_that_knows_nothing_or_is_not_there_leaves_the_entries(helper: Path) -> None:
    entries = {"auths": {"ghcr.io": {"auth": encoded("me", "pw")}}}
    assert users([json.dumps({**entries, "credsStore": "fake"})], "ghcr.io/a/b:1") == ["me"]
    absent = parse_credentials([json.dumps({**entries, "credsStore": "desktop"})])
    assert [each.username for each in absent.find(parse_reference("ghcr.io/a/b:1"))] == ["me"]
    assert absent.missing_helper(parse_reference("ghcr.io/a/b:1")) == "docker-credential-desktop"


@pytest.mark.parametrize("answer", ["", "[]", "not JSON", '{"Username": "x"}', '{"Username": "x", "Secret": 3}'])
def test_a_helper_that_answers_nonsense_gives_nothing(helper: Path, answer: str) -> None:
    program = helper.with_name("docker-credential-fake")
    program.write_text(f"#!{sys.executable}\nprint({answer!r})\n")
    assert users(['{"credsStore": "fake"}'], "acr.azurecr.io/phi:1") == []


@pytest.mark.parametrize("name", [3, None, "", "../fake", "fake get;", ["fake"]])
def test_what_is_no_helpers_name_runs_nothing(helper: Path, name: object) -> None:
    texts = [json.dumps({"credsStore": name}), json.dumps({"credHelpers": {"acr.azurecr.io": name}})]
    assert users(texts, "acr.azurecr.io/phi:1") == []
    assert not helper.exists()


@pytest.mark.parametrize(
    "key",
    [
        "acr.azurecr.io",
        "https://acr.azurecr.io",
        "http://acr.azurecr.io",
        "https://acr.azurecr.io/v2/",
        "https://acr.azurecr.io/v1/",
        "acr.azurecr.io/v2",
        "acr.azurecr.io/team",
        "acr.azurecr.io/team/phi",
        "ACR.azurecr.io",
        "*.azurecr.io",
        "https://*.azurecr.io/v2/",
        "a?r.*.io",
    ],
)
def test_a_key_finds_its_registry(key: str) -> None:
    text = config(**{key: {"auth": encoded("ci", "pw")}})
    assert users([text], "acr.azurecr.io/team/phi:1") == ["ci"]


@pytest.mark.parametrize(
    "key",
    [
        "azurecr.io",
        "acr.azurecr.io:5000",
        "other.azurecr.io",
        "*.io",
        "*",
        "*.azurecr.io:443",
        "acr.azurecr.io/tea",
        "acr.azurecr.io/team/phi/x",
        "",
    ],
)
def test_a_key_of_another_place_is_not_used(key: str) -> None:
    text = config(**{key: {"auth": encoded("ci", "pw")}})
    assert users([text], "acr.azurecr.io/team/phi:1") == []


def test_a_port_is_part_of_the_key() -> None:
    text = config(**{"localhost": {"auth": encoded("a", "x")}, "localhost:5000": {"auth": encoded("b", "x")}})
    assert users([text], "localhost:5000/phi") == ["b"]


@pytest.mark.parametrize("key", ["https://index.docker.io/v1/", "docker.io", "registry-1.docker.io"])
def test_docker_hub_has_three_names(key: str) -> None:
    assert users([config(**{key: {"auth": encoded("ci", "pw")}})], "phi") == ["ci"]


def test_the_nearest_key_comes_first() -> None:
    text = config(
        **{
            "*.azurecr.io": {"auth": encoded("glob", "x")},
            "acr.azurecr.io": {"auth": encoded("host", "x")},
            "acr.azurecr.io/team/phi": {"auth": encoded("repository", "x")},
            "acr.azurecr.io/team": {"auth": encoded("team", "x")},
        }
    )
    assert users([text], "acr.azurecr.io/team/phi") == ["repository", "team", "host", "glob"]


def test_the_first_text_wins_over_a_nearer_key_in_the_second() -> None:
    first = config(**{"*.azurecr.io": {"auth": encoded("given", "x")}})
    second = config(**{"acr.azurecr.io": {"auth": encoded("ambient", "x")}})
    assert users([first, second], "acr.azurecr.io/phi") == ["given", "ambient"]


def one(entry: dict[str, object]) -> Credential:
    (credential,) = parse_credentials([config(**{"a.b": entry})]).find(parse_reference("a.b/phi"))
    return credential


def test_auth_is_split_at_the_first_colon_and_loses_trailing_nuls() -> None:
    credential = one({"auth": encoded("ci", "p:w\0\0")})
    assert (credential.username, credential.password) == ("ci", "p:w")


def test_auth_may_lack_its_padding() -> None:
    assert one({"auth": encoded("ci", "pw12").rstrip("=")}).password == "pw12"


def test_username_and_password_are_enough() -> None:
    credential = one({"username": "ci", "password": "pw", "email": "x@y"})
    assert (credential.username, credential.password) == ("ci", "pw")


def test_tokens_are_read() -> None:
    assert one({"auth": encoded("0-0", ""), "identitytoken": "refresh"}).identity_token == "refresh"
    assert one({"registrytoken": "bearer"}).registry_token == "bearer"


def test_the_legacy_file_has_no_auths() -> None:
    assert users([json.dumps({"https://a.b": {"auth": encoded("ci", "pw")}})], "a.b/phi") == ["ci"]


@pytest.mark.parametrize("text", ["{}", '{"auths": {}}', '{"auths": {"a.b": {}}}', '{"credHelpers": {"a.b": "x"}}'])
def test_a_configuration_without_secrets_is_empty(text: str) -> None:
    store = parse_credentials([text])
    assert store.find(parse_reference("a.b/phi")) == []
    assert store.describe() == "no credentials"


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("hunter2", "docker config: not a JSON object"),
        ('["hunter2"]', "docker config: not a JSON object"),
        ('{"auths": "hunter2"}', "docker config auths"),
        ('{"auths": {"a.b": "hunter2"}}', 'docker config auths["a.b"]'),
        ('{"auths": {"a.b": {"auth": ["hunter2"]}}}', 'docker config auths["a.b"].auth'),
        ('{"auths": {"a.b": {"auth": "hunter2!"}}}', 'docker config auths["a.b"].auth'),
        ('{"auths": {"a.b": {"auth": "aHVudGVyMg=="}}}', 'docker config auths["a.b"].auth'),
        ('{"auths": {"a.b": {"auth": "//79"}}}', 'docker config auths["a.b"].auth'),
    ],
)
def test_malformed_texts_are_named_without_their_content(text: str, where: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_credentials([text])
    assert caught.value.message.startswith(where)
    assert "hunter2" not in caught.value.message
    assert "hunter2" not in repr(caught.value.problems)


def test_all_malformed_texts_are_named_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_credentials(["x", "{}", '{"auths": {"a.b": {"auth": "!"}, "c.d": {"auth": 1}}}'])
    assert [problem.file for problem in caught.value.problems] == [
        "docker config 1 of 3",
        "docker config 3 of 3",
        "docker config 3 of 3",
    ]


def test_no_repr_and_no_description_shows_a_secret() -> None:
    text = config(**{"a.b": {"auth": encoded("ci", "hunter2"), "identitytoken": "hunter2", "registrytoken": "hunter2"}})
    store = parse_credentials([text])
    (credential,) = store.find(parse_reference("a.b/phi"))
    assert "hunter2" not in f"{store!r}{credential!r}{store.describe()}{credential.describe()}"
    assert credential.describe() == "user 'ci' (key 'a.b' of the secret)"


def jwt(claims: object) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'RS256'})}.{part(claims)}.c2lnbmF0dXJl"


def test_the_end_of_a_token_is_read_from_it() -> None:
    token = jwt({"exp": 1_800_000_000})
    assert expires_at(Credential("a.b", "0-0", token)) == datetime.fromtimestamp(1_800_000_000, UTC)
    assert expires_at(Credential("a.b", identity_token=token)) is not None


@pytest.mark.parametrize("token", ["hunter2", "a.b.c", jwt({}), jwt([]), jwt({"exp": "soon"}), jwt({"exp": 1e300})])
def test_what_does_not_say_its_end_has_none(token: str) -> None:
    assert expires_at(Credential("a.b", "ci", token)) is None


@given(st.text())
def test_any_text_is_parsed_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_credentials([text])


@given(st.text(), st.sampled_from(["a.b/c:1", "localhost:5000/x/y", "phi"]))
def test_any_key_matches_or_not(key: str, reference: str) -> None:
    parse_credentials([config(**{key: {"auth": encoded("ci", "pw")}})]).find(parse_reference(reference))
