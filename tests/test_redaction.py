"""tuner/redaction.py: no secret is in a sentence, whatever spelling it has and whoever repeats it."""

import base64
import json
import string

import pytest
from canaries import spelled_in, spellings
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.errors import ConfigError, DeniedError, Problem, ServiceError
from tuner.redaction import (
    forgotten,
    hide,
    hide_arguments,
    hide_environment,
    hide_header,
    hide_login,
    hide_url,
    redact,
)
from tuner.registry.authorization import Token
from tuner.registry.azure import parse_reply
from tuner.registry.credentials import Credential, parse_credentials
from tuner.runspec import Secrets, StageResult
from tuner.source_headers import parse_source_headers
from tuner.urls import split_url

SECRETS = [
    "hunter2-hunter2",
    "p@ss/w+rd=&?~",
    'quo"te\\and <angle>',
    "Größe-Äpfel-9",
    "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJtZSJ9.c2ln",
    "tab\tand\x1b[1m escape",
    "  padded with blanks  ",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_hidden_secret_is_in_no_spelling(secret: str) -> None:
    hide(secret)
    for spelling in spellings(secret):
        shown = redact(f"the registry says {spelling!s}, and no more")
        assert not spelled_in(secret, shown), spelling
        assert shown.startswith("the registry says")


@settings(max_examples=200, deadline=None)
@given(
    st.text(string.printable + "äß€", min_size=8, max_size=40), st.text("ab:", max_size=7), st.text("yz", max_size=7)
)
def test_any_secret_is_hidden_in_whatever_surrounds_it(secret: str, before: str, after: str) -> None:
    with forgotten():
        hide(secret)
        whole = before + secret + after
        for text in (whole, json.dumps(whole), base64.b64encode(whole.encode()).decode(), repr(whole)):
            assert not spelled_in(secret.strip(), redact(text)) or not secret.strip()[3:]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://h/a.jsonl;sig=S: no", "https://h/a.jsonl?…: no"),
        ("https://h/a%3Fsig=S", "https://h/a?…"),
        ("https://h/a%253Fsig%253DS", "https://h/a?…"),
        ("https://h/a&sig=S, then", "https://h/a?…, then"),
        ("//user:S@host/x: there is no such file", "//host/x: there is no such file"),
        ("user:S@host/x", "…@host/x"),
        ("https://user:S/s@host/x", "https://host/x"),
        ("s3://KEY:S@bucket/x", "s3://bucket/x"),
        ("postgres://me:S@h:5432/x", "postgres://h:5432/x"),
        ("file://me:S@h/x names one of the machine me:S@h", "file://h/x names one of the machine …@h"),
        ("('https://h/a?sig=it's')", "('https://h/a?…')"),
        ("(see https://h/a?b)", "(see https://h/a?…)"),
        ('{"u":"https://h/a?sig=x"}', '{"u":"https://h/a?…"}'),
        ("https://h/a?sig=(x'y)z w", "https://h/a?… w"),
        ("/v2/x/blobs/uploads/1?_state=S", "/v2/x/blobs/uploads/1?…"),
        ("--set TrainingArguments.hub_token=S", "--set TrainingArguments.hub_token=…"),
        ("it has X-Amz-Signature=S&b and token%3DS", "it has X-Amz-Signature=…&b and token%3D…"),
        ('{"auths": {"h": {"auth": "Ym9iOlM="}}}', '{"auths": {"h": {"auth": "…"}}}'),
        (r"'{\"password\": \"S\"}'", r"'{\"password\": \"…\"}'"),
        ("header was Basic Ym9iOlMzQ1JFVA==, sorry", "header was Basic …, sorry"),
        ("header was bearer eyJhbGciOiJub25lIn0.e30.", "header was bearer …"),
    ],
)
def test_what_looks_like_a_secret_is_not_shown(text: str, shown: str) -> None:
    assert redact(text) == shown
    assert redact(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        *("oci:/b:1@sha256:abc", "reg.example:5000/a/b:1@sha256:abcd", "127.0.0.1:5000/x:v1", "git@github.com:x/y"),
        *(
            "basic authentication required",
            "Bearer authentication required",
            "a data source URL must use HTTP or HTTPS",
        ),
        *("https://h:8080/a@b", "https://h/a;v=1", "https://h/date=2024-01-01/t", "hf://datasets/a/b@main/x"),
        *("write it as 10.1.0.0/16", "a//b", "//cdn.example/x", "use ?download=true on SharePoint", "is it right?"),
        *("kubectl create secret generic NAME --from-literal=HF_TOKEN=…", "password=…", "C:/Users/x@y", "12:30 @ x"),
        *("--set TrainingArguments.eos_token=<|end|>", "max_tokens=4096", "pad_token=x"),
    ],
)
def test_what_is_no_secret_is_shown(text: str) -> None:
    assert redact(text) == text


def test_what_is_short_hides_nothing() -> None:
    hide("abc")
    hide("")
    hide(None)
    assert redact("abc is no secret") == "abc is no secret"


# ── who hides ────────────────────────────────────────────────────────────────────────────────────────────────────────

CANARY = "c4nary/of+the~mine="


def learn_docker_config() -> None:
    auth = base64.b64encode(f"me:{CANARY}".encode()).decode()
    parse_credentials([json.dumps({"auths": {"h": {"auth": auth}}})])


LEARNT = {
    "a password": lambda: Credential("k", "me", CANARY),
    "an identity token": lambda: Credential("k", identity_token=CANARY),
    "a registry token": lambda: Credential("k", registry_token=CANARY),
    "a docker config": learn_docker_config,
    "a token server's token": lambda: Token(CANARY, 60),
    "a cloud's token": lambda: parse_reply(json.dumps({"refresh_token": CANARY}).encode(), "refresh_token", "h"),
    "a token of the Hub": lambda: Secrets(hf_token=CANARY),
    "a signed query": lambda: Secrets(queries={"a": f"sv=1&sig={CANARY}"}),
    "a bearer of a source": lambda: parse_source_headers(json.dumps({"https://h": {"bearer": CANARY}}), "f"),
    "a login of a source": lambda: parse_source_headers(
        json.dumps({"https://h": {"username": "me", "password": CANARY}}), "f"
    ),
    "a header of a source": lambda: parse_source_headers(
        json.dumps({"https://h": {"headers": {"x-key": CANARY}}}), "f"
    ),
    "a URL's query": lambda: split_url(f"https://h/a?sig={CANARY}"),
    "a coded query": lambda: hide_url("https://h/a?sig=c4nary%2Fof%2Bthe~mine%3D"),
    "a URL's user": lambda: hide_url("https://me:c4nary%2Fof%2Bthe~mine%3D@h/a"),
    "a URL's fragment": lambda: hide_url(f"https://h/a#{CANARY}"),
    "a signature in a path": lambda: hide_url(f"https://h/a;sig={CANARY}"),
    "an argument": lambda: hide_arguments(["run", f"--data=https://h/a?sig={CANARY}"]),
    "a variable": lambda: hide_environment({"AWS_SECRET_ACCESS_KEY": CANARY}),
    "a proxy's user": lambda: hide_environment({"HTTPS_PROXY": "me:c4nary%2Fof%2Bthe~mine%3D@proxy:3128"}),
    "an Authorization header": lambda: hide_header(f"Bearer {CANARY}"),
    "a login's header": lambda: hide_header(f"Basic {base64.b64encode(f'me:{CANARY}'.encode()).decode()}"),
    "a login": lambda: hide_login("me", CANARY),
}


@pytest.mark.parametrize("learn", LEARNT.values(), ids=LEARNT)
def test_whoever_learns_a_secret_hides_it(learn: object) -> None:
    assert callable(learn)
    assert redact(CANARY) == CANARY
    learn()
    assert redact(f"{CANARY} is no good") == "… is no good"


def test_of_a_signature_only_what_is_secret_is_hidden() -> None:
    split_url(
        "https://h/a?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIAIOSFODNN7EXAMPLE%2F20240101%2Fus-east-1"
        "&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature=fe5f80f77d5fa3be&q-sign-algorithm=sha1"
    )
    split_url("https://h/b?sv=2023-11-03&sp=r&spr=https&sr=b&sig=q%2Bc")
    said = "in 3600 s the host has sha1 over https, since 2023-11-03"
    assert redact(said) == said
    assert redact("fe5f80f77d5fa3be AKIAIOSFODNN7EXAMPLE/20240101/us-east-1") == "… …"


def test_variables_that_name_a_secrets_place_hide_nothing() -> None:
    places = {
        "TUNER_PUSH_SECRET": "registry-credentials",
        "AWS_WEB_IDENTITY_TOKEN_FILE": "/var/run/token",
        "GOOGLE_APPLICATION_CREDENTIALS": "/etc/google.json",
        "SECRET_NAME": "my-credentials",
        "CREDENTIALS_DIRECTORY": "/run/credentials",
        "TOKENIZERS_PARALLELISM": "false",
    }
    hide_environment(places)
    said = ", ".join(places.values())
    assert redact(said) == said


def test_a_pin_and_what_a_url_shows_anyway_are_not_hidden() -> None:
    split_url(f"https://h/train-of-the-year.parquet?path=train-of-the-year.parquet#sha256={'a' * 64}")
    said = f"train-of-the-year.parquet has sha256 {'a' * 64}"
    assert redact(said) == said


# ── whatever speaks ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_error_problem_or_result_shows_one() -> None:
    hide(CANARY)
    error = ServiceError(f"it says {CANARY}", hint=f"not {CANARY}")
    error.hint = f"nor {CANARY}"
    problem = Problem(f"is {CANARY}", hint=CANARY)
    result = StageResult(stage="push", message=f"it says {CANARY}", hint=CANARY)
    said = [str(error), repr(error), error.message, str(error.hint), repr(error.args), str(problem), str(problem.hint)]
    said += [str(ConfigError.of([problem])), repr(DeniedError(CANARY)), result.to_message(), repr(result)]
    assert not [each for each in said if spelled_in(CANARY, each)]


def test_of_very_many_secrets_the_newest_are_known() -> None:
    for number in range(5000):
        hide(f"secret-{number:06}")
    assert redact("secret-004999 secret-003000") == "… …"


def test_a_new_secret_costs_a_controller_that_knows_many_next_to_nothing() -> None:
    import time

    for number in range(2000):
        hide(f"secret-{number:06}")
    redact("")
    began = time.process_time()
    for number in range(20):
        hide(f"another-{number:06}")
        redact("a sentence of some length " * 10)
    assert (time.process_time() - began) / 20 < 0.5
