"""Secrets planted in every input, against servers that repeat them in every way, turn up nowhere that people look."""

import base64
import html
import json
import logging
import os
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, quote_plus

import pytest
import yaml
from canaries import spelled_in
from http_server import Answer, HttpServer
from test_controller import Start, cluster, documents, start, until
from test_fetch import QUICK, Recording, a_spec, reporter, server, url_sources
from test_package import adapter
from test_registry_push import QUICK as IMPATIENT

from tests.fake_kubernetes import FakeKubernetes
from tests.registries import QuietHandler, running_server
from tuner.cli import main
from tuner.cluster.observe import parse_result
from tuner.cluster.reconcile import event_manifest
from tuner.errors import TunerError
from tuner.pipeline.fetch import fetch_sources
from tuner.redaction import hide
from tuner.registry.authorization import basic_header

__all__ = ["cluster", "reporter", "server", "start"]  # fixtures

CANARY = 'c4nA/+~y"'  # short, so that all its spellings are in what is shown of an answer
USER = "bob"


def echoes(secret: str) -> list[str]:
    """What a server may make of it, each short."""
    encoded = base64.b64encode(f"{USER}:{secret}".encode()).decode()
    alone = base64.b64encode(secret.encode()).decode()
    return [
        *(secret, encoded, f"Basic {encoded}", encoded.rstrip("="), encoded.translate(str.maketrans("+/", "-_"))),
        *(alone, quote(secret, safe=""), quote_plus(secret), json.dumps(secret), html.escape(secret)),
        *(secret.encode().hex(), "\u200b".join(secret), "\n".join(encoded)),
    ]


def everything_in(directory: Path, *, but: tuple[Path, ...] = ()) -> str:
    """The text of all files below it."""
    return "\n".join(
        f"{path}\n{path.read_bytes().decode('latin-1')}"
        for path in directory.rglob("*")
        if path.is_file() and path not in but
    )


def quick_start() -> tuple[dict[str, Any], dict[str, Any]]:
    """A Workspace and its ConfigMap."""
    by_kind = {each["kind"]: each for each in documents()}
    return by_kind["Workspace"], by_kind["ConfigMap"]


# ── registries ───────────────────────────────────────────────────────────────────────────────────────────────────────

Reply = tuple[int, dict[str, str], bytes]


def errors(said: str) -> bytes:
    return json.dumps({"errors": [{"code": "DENIED", "message": said}]}).encode()


def one_line(said: str) -> str:
    return "".join(letter for letter in said if letter.isprintable()).encode("latin-1", "replace").decode("latin-1")


# Where an answer may repeat what was sent, each tried in a push, a pull and a probe.
PLACES: dict[str, Callable[[str, str], Reply]] = {
    "message": lambda said, host: (403, {}, errors(said)),
    "message of what is not found": lambda said, host: (404, {}, errors(said)),
    "message of what is odd": lambda said, host: (418, {}, errors(said)),
    "code": lambda said, host: (400, {}, json.dumps({"errors": [{"code": said, "detail": said}]}).encode()),
    "XML": lambda said, host: (403, {}, f"<Error><Code>X</Code><Message>{html.escape(said)}</Message>".encode()),
    "redirect": lambda said, host: (
        307,
        {"Location": f"http://{host}/else/{quote(said, safe='')}?s={quote(said)}"},
        b"",
    ),
    "address of an upload": lambda said, host: (202, {"Location": f"http://{host}/up/{quote(said, safe='')}"}, b""),
    "digest": lambda said, host: (200, {"Docker-Content-Digest": one_line(said)}, b"{}"),
    "manifest": lambda said, host: (200, {}, json.dumps({"mediaType": said, "manifests": [said]}).encode()),
    "challenge": lambda said, host: (401, {"WWW-Authenticate": f'Basic realm="{one_line(said)}"'}, errors(said)),
}


@dataclass
class Echo:
    """A registry that lets everybody in who has a credential, and then repeats it; so does its token server."""

    place: str
    scheme: str
    secrets: tuple[str, ...]
    host: str = ""
    at_token_server: bool = False
    answered: int = 0


@pytest.fixture
def echo() -> Iterator[Callable[..., Echo]]:
    stack: list[Any] = []

    def begin(place: str, scheme: str, *secrets: str, at_token_server: bool = False) -> Echo:
        state = Echo(place, scheme, secrets, at_token_server=at_token_server)

        class Handler(QuietHandler):
            def _answer(self) -> None:
                body, sent = self.read_body().decode("latin-1"), self.headers.get("Authorization", "")
                said = " ".join(each for secret in state.secrets for each in echoes(secret))
                if self.path.startswith("/token"):
                    known = sent or "refresh_token" in parse_qs(body)
                    if state.at_token_server and known:
                        state.answered += 1
                        self.reply(401, errors(said))
                    else:
                        self.reply(200, json.dumps({"token": state.secrets[-1]}).encode())
                    return
                if not sent:
                    realm = f'{state.scheme} realm="http://{state.host}/token",service="s"'
                    self.reply(401, b"", {"WWW-Authenticate": realm})
                    return
                state.answered += 1
                status, headers, body_bytes = PLACES[state.place](said, state.host)
                self.send_response(status, one_line(said))
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(body_bytes)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body_bytes)

            do_GET = do_HEAD = do_POST = do_PATCH = do_PUT = do_DELETE = _answer

        context = running_server(Handler)
        stack.append(context)
        state.host = context.__enter__()
        return state

    yield begin
    for context in stack:
        context.__exit__(None, None, None)


def docker_config(kind: str, host: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    entry: dict[str, str] = {}
    whole: dict[str, Any] = {}
    match kind:
        case "auth":
            entry = {"auth": base64.b64encode(f"{USER}:{CANARY}".encode()).decode()}
        case "password":
            entry = {"username": USER, "password": CANARY}
        case "identity token":
            entry = {"identitytoken": CANARY}
        case "registry token":
            entry = {"registrytoken": CANARY}
        case "helper":
            program = directory / "bin" / "docker-credential-canary"
            program.parent.mkdir()
            answer = json.dumps({"Username": USER, "Secret": CANARY})
            program.write_text(f"#!/bin/sh\ncat <<'END'\n{answer}\nEND\n")
            program.chmod(program.stat().st_mode | stat.S_IXUSR)
            monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
            whole = {"credHelpers": {host: "canary"}}
    path = directory / "config.json"
    path.write_text(json.dumps({"auths": {host: entry}, **whole}))
    return path


KINDS = ["auth", "password", "identity token", "registry token", "helper"]


@pytest.fixture
def look(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> Callable[[str, Echo], str]:
    """All that a push, its resumption, a pull and a verification say and leave, with a credential of this kind."""

    def everything(kind: str, echoing: Echo) -> str:
        caplog.set_level(logging.INFO)
        config = docker_config(kind, echoing.host, tmp_path, monkeypatch)
        made = adapter(tmp_path / "work" / "adapter")
        monkeypatch.setattr("tuner.registry.transport.Patience", lambda: IMPATIENT)
        image, how = f"{echoing.host}/x/a:1", ["--plain-http", "--docker-config", str(config)]
        assert main(["push", str(made), image, *how, "--push-deadline", "5", "--provenance"]) > 0
        main(["push", "--resume", str(tmp_path / "work"), "--docker-config", str(config)])
        main(["pull", image, str(tmp_path / "work" / "pulled"), *how])
        main(["verify", image, *how])
        out, err = capfd.readouterr()
        assert echoing.answered
        assert "error: " in err
        helper = tmp_path / "bin" / "docker-credential-canary"
        return "\n".join([out, err, caplog.text, everything_in(tmp_path, but=(config, helper))])

    return everything


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["auth", "registry token"])
def test_a_registry_that_repeats_a_credential_is_not_quoted(
    kind: str, place: str, echo: Callable[..., Echo], look: Callable[[str, Echo], str]
) -> None:
    said = look(kind, echo(place, "Basic" if kind == "auth" else "Bearer", CANARY))
    assert not spelled_in(CANARY, said), said
    assert not [each for each in echoes(CANARY) if each in said]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("at_token_server", [False, True])
def test_no_kind_of_credential_nor_the_token_that_it_was_traded_for_is_quoted(
    kind: str, at_token_server: bool, echo: Callable[..., Echo], look: Callable[[str, Echo], str]
) -> None:
    if at_token_server and kind == "registry token":
        pytest.skip("it is traded for nothing")
    token = "eyJ0b3AifQ.s3cr3t_t0ken"
    secrets = (CANARY,) if kind == "registry token" or at_token_server else (CANARY, token)
    said = look(kind, echo("message", "Bearer", *secrets, at_token_server=at_token_server))
    for secret in secrets:
        assert not spelled_in(secret, said), said


# ── data ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("place", ["reason", "etag", "date", "redirect", "body", "headers"])
@pytest.mark.parametrize("status", [200, 403, 404, 503])
def test_a_source_that_repeats_what_it_was_sent_is_not_quoted_and_nothing_of_it_is_kept(
    server: HttpServer,
    tmp_path: Path,
    reporter: Recording,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    place: str,
    status: int,
) -> None:
    caplog.set_level(0)
    signature, bearer = "s1gn4ture/of+mine", "b34rer-of-mine"
    said = " ".join(one_line(each) for secret in (signature, bearer) for each in echoes(secret))
    headers = {
        "etag": {"ETag": f'"{said}"'},
        "date": {"Last-Modified": said, "Date": said},
        "redirect": {"Location": f"/else/{quote(said, safe='')}"},
        "headers": dict.fromkeys(("Content-Encoding", "Retry-After", "WWW-Authenticate", "Warning"), said),
    }.get(place, {})
    raw = None
    if place == "reason":
        raw = f"HTTP/1.1 {status} {said}\r\nContent-Length: 0\r\n\r\n".encode("latin-1", "replace")
    body = b'{"a": 1}\n' if place != "body" else said.encode()
    server.serve("/t.jsonl", Answer(body=body, status=302 if place == "redirect" else status, headers=headers, raw=raw))
    url = f"{server.url}/t.jsonl?sv=1&sig={quote(signature, safe='')}"
    sources, secrets = url_sources(url)
    secrets = replace(secrets, source_headers=(json.dumps({server.url: {"bearer": bearer}}),))
    work_dir, error = tmp_path / "work", ""
    for _ in range(2):  # the second time with what the first has left
        try:
            fetch_sources(a_spec(*sources), secrets, work_dir, reporter, transfer=QUICK)
        except TunerError as raised:
            error += f"{raised.message} {raised.hint} {raised!r} {raised.__cause__!r}"
    out, err = capfd.readouterr()
    everything = "\n".join([error, *reporter.notes, *reporter.warnings, caplog.text, out, err])
    on_disk = everything_in(work_dir) if place != "body" or status != 200 else ""
    for secret in (signature, bearer):
        assert not spelled_in(secret, everything + on_disk)


# ── what was typed ───────────────────────────────────────────────────────────────────────────────────────────────────

PLAIN = "S3cretCanary99"
SHAPES = [
    "{base}/a.jsonl?sig=S",
    "{base}/a.jsonl?SIG=S#x",
    "{base}/a.jsonl?sv=1&se=2020-01-01&sig=S%2Bb",
    "{base}/a.jsonl?X-Amz-Signature=S&X-Amz-Date=20200101T000000Z&X-Amz-Expires=1",
    "{base}/a.jsonl?S",
    "{base}/a.jsonl?'S'",
    "{base}/a.jsonl?(S)",
    "{base}/a.jsonl#S",
    "{base}/a.jsonl#sha256=S",
    "{base}/a.jsonl#x&sha256=S",
    "{base}/a.jsonl;sig=S",
    "{base}/a.jsonl;v=1;sig=S;b=2",
    "{base}/a.jsonl%3Fsig=S",
    "{base}/a.jsonl%3fsig%3dS",
    "{base}/a.jsonl%253Fsig%253DS",
    "{base}/a.jsonl&token=S",
    "{base}/a.jsonl%26sig=S",
    "{base}/sig=S/a.jsonl",
    "{user}",
    "https://S@data.example/a.jsonl",
    "https://me:S@data.example/a.jsonl?sig=S",
    "https://me:S/S@data.example/a.jsonl",
    "https://me:S@",
    "https:/me:S@data.example/a.jsonl",
    "HTTPS://me:S@data.example/a.jsonl",
    "https://data.example:S/a.jsonl",
    "https://[::1/a.jsonl?sig=S",
    "https://data.example\\@me:S@x/a.jsonl",
    "https://data.example/a b.jsonl?sig=S",
    "http://169.254.169.254/a.jsonl?sig=S",
    "//me:S@data.example/a.jsonl",
    "me:S@data.example/a.jsonl",
    "data.example/a.jsonl?sig=S",
    "./a.jsonl?sig=S",
    "file://me:S@data.example/a.jsonl",
    "file:///nowhere/a.jsonl?sig=S#S",
    "ftp://me:S@data.example/a.jsonl",
    "s3://KEY:S@bucket/a.jsonl",
    "s3://bucket/a.jsonl?sig=S",
    "az://container/a.jsonl?sig=S",
    "hf://datasets/a/b?token=S",
    "hf://datasets/me:S@a/b",
    "postgresql://me:S@data.example/rows",
    "<{base}/a.jsonl?sig=S>",
]


@pytest.fixture(scope="module")
def nothing_there() -> Iterator[HttpServer]:
    with HttpServer() as running:
        yield running


def written_shape(pattern: str, base: str) -> str:
    """`S` is the secret, but in names."""
    text = pattern.format(base=base, user=base.replace("://", "://me:S@") + "/a.jsonl")
    for name in ("SIG", "Signature", "HTTPS"):
        text = text.replace(name, name.replace("S", "\0"))
    return text.replace("S", PLAIN).replace("\0", "S")


@pytest.mark.parametrize("pattern", SHAPES)
def test_a_url_of_any_shape_shows_nothing_secret(
    pattern: str,
    tmp_path: Path,
    nothing_there: HttpServer,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In a Workspace, and as a flag."""
    monkeypatch.chdir(tmp_path)
    url = written_shape(pattern, nothing_there.url)
    assert PLAIN in url
    workspace, config_map = quick_start()
    workspace["tuning"]["input"] = {"urls": [url]}
    Path("workspace.yaml").write_text(yaml.safe_dump_all([workspace, config_map]))
    how = ["--allow-private-urls", "--no-preflight", "--output", "out"]
    codes = [
        main(["check", "workspace.yaml", *how, "--smoke"]),
        main(["check", "workspace.yaml", *how, "--smoke", "--json"]),
        main(["check", "--data", "workspace.yaml", *how, "--smoke", "--work-dir", "work"]),
        main(
            ["render", "workspace.yaml", "--image", "reg.example/tuner:1", "--allow-private-urls", "--output", "oci:x"]
        ),
        main(["plan", "workspace.yaml", "--gpu", "24GB"]),
    ]
    out, err = capfd.readouterr()
    assert any(codes), "there is no such file at least"
    said = "\n".join(line for line in (out + err).splitlines() if "queries.json" not in line)
    assert not spelled_in(PLAIN, said), said
    work = Path("work")
    assert not spelled_in(PLAIN, everything_in(work) if work.is_dir() else "")


FLAGS = [
    ["run", "--model", "phi-3-mini-4k-instruct", "--data", "//me:S@h/x", "--output", "out"],
    ["run", "--model", "phi-3-mini-4k-instruct", "--data", "x.jsonl", "--output", "me:S@reg.example/a:1"],
    ["run", "--model", "phi-3-mini-4k-instruct", "--data", "x.jsonl", "--output", "https://me:S@reg.example/a:1?sig=S"],
    ["run", "--model", "https://me:S@h/x", "--data", "https://h/x?sig=S", "--output", "out"],
    ["run", "https://h/w.yaml?sig=S"],
    ["check", "https://me:S@h/w.yaml"],
    ["check", "nowhere.yaml?sig=S"],
    ["push", "nowhere", "me:S@reg.example/a:1"],
    ["push", "https://h/x?sig=S", "reg.example/a:1"],
    ["push", "nowhere", "reg.example/a:1", "--docker-config", '{"auths": {"h": {"auth": "S"}}}'],
    ["push", "nowhere", "reg.example/a:1", "--docker-config", "https://me:S@h/config.json"],
    ["pull", "https://me:S@reg.example/a:1", "out"],
    ["pull", "docker://me:S@reg.example/a:1", "out"],
    ["verify", "me:S@reg.example/a:1"],
    ["data", "preview", "https://h/x?sig=S"],
    ["render", "https://h/w.yaml?sig=S"],
    ["submit", "https://h/w.yaml?sig=S"],
    ["nonsense", "--token=S", "https://h/x?sig=S"],
    ["check", "--set", "TrainingArguments.hub_token=S", "w.yaml"],
]


@pytest.mark.parametrize("words", FLAGS, ids=lambda words: " ".join(words)[:60])
def test_a_flag_of_any_shape_shows_nothing_secret(
    words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("x.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    Path("w.yaml").write_text(yaml.safe_dump_all(documents()))
    assert main([word.replace("S", PLAIN) for word in words]) > 0
    out, err = capfd.readouterr()
    assert err
    assert not spelled_in(PLAIN, out + err), out + err


@pytest.mark.parametrize(
    "content",
    [
        '{"auths": {"h": {"auth": "S"}}}',
        '{"auths": {"h": {"auth": ["S"]}}}',
        '{"auths": {"h": "S"}}',
        '{"auths": "S"}',
        '"S"',
        "S",
        '{"auths": {"https://me:S@h/v1/": {"username": "a", "password": ""}}, "x": S}',
    ],
)
@pytest.mark.parametrize("flag", ["--docker-config", "--source-headers"])
def test_a_file_of_secrets_that_is_malformed_is_not_quoted(
    content: str, flag: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    secrets, workspace = tmp_path / "secrets.json", tmp_path / "w.yaml"
    secrets.write_text(content.replace("S", PLAIN))
    workspace.write_text(yaml.safe_dump_all(documents()))
    main(["check", str(workspace), "--smoke", "--output", str(tmp_path / "out"), flag, str(secrets), "--no-preflight"])
    out, err = capfd.readouterr()
    assert not spelled_in(PLAIN, out + err), out + err


def test_a_secret_in_a_configmap_is_not_quoted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    workspace, config_map = quick_start()
    settings = {"TrainingArguments": {"hub_token": PLAIN, "token": PLAIN}, "ModelConfig": {"api_key": PLAIN}}
    config_map["data"]["training_config.yaml"] = yaml.safe_dump({"training_config": settings})
    path = tmp_path / "w.yaml"
    path.write_text(yaml.safe_dump_all([workspace, config_map]))
    assert main(["check", str(path), "--no-preflight"]) == 78
    out, err = capfd.readouterr()
    assert not spelled_in(PLAIN, out + err), out + err


# ── whatever else writes ─────────────────────────────────────────────────────────────────────────────────────────────


def test_what_libraries_threads_and_bugs_write_shows_no_secret(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", PLAIN)
    monkeypatch.setenv("https_proxy", f"me:{CANARY}@proxy.example:3128")
    said = f"{PLAIN} and {CANARY}, see https://h/a?sig=zzzzzz"

    def fails(*_: object) -> None:
        handler = logging.StreamHandler()
        logging.getLogger("library").addHandler(handler)
        logging.getLogger("library").warning(said)
        logging.getLogger("library").removeHandler(handler)
        thread = threading.Thread(target=lambda: print(said, file=sys.stderr))
        thread.start()
        thread.join()
        raise RuntimeError(said)

    monkeypatch.setattr("tuner.cli.images._image_argument", fails)
    assert main(["verify", "reg.example/a:1"]) == 70
    out, err = capfd.readouterr()
    assert "RuntimeError: … and …, see https://h/a?…" in err
    assert err.count("… and …, see https://h/a?…") == 3
    for secret in (PLAIN, CANARY, "zzzzzz"):
        assert not spelled_in(secret, out + err), err


# ── a cluster ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_no_object_of_a_cluster_but_a_secret_has_one(cluster: FakeKubernetes, start: Start) -> None:
    """The Workspaces themselves have what somebody wrote into them: their specs are left out."""
    count = 0
    for pattern in SHAPES:
        url = written_shape(pattern, "https://data.example")
        workspace, config_map = quick_start()
        workspace["metadata"] |= {"name": f"w-{count}", "namespace": "default", "uid": f"uid-{count}"}
        workspace["tuning"]["input"] = {"urls": [url]}
        config_map["metadata"]["namespace"] = "default"
        cluster.put(config_map)
        cluster.put(workspace)
        count += 1
    running = start()

    def all_have_a_status() -> bool:
        found = cluster.objects("workspaces", "default")
        return len(found) == count and all((each.get("status") or {}).get("conditions") for each in found)

    until(all_have_a_status, timeout_s=60)
    running.stop()
    for plural in ("workspaces", "events", "jobs", "configmaps", "pods", "controllerrevisions"):
        found = [{key: value for key, value in each.items() if key != "tuning"} for each in cluster.objects(plural)]
        assert not spelled_in(PLAIN, json.dumps(found, ensure_ascii=False)), plural
    assert cluster.objects("events")
    assert not spelled_in(PLAIN, json.dumps(running.lines, default=str, ensure_ascii=False))


def test_what_pods_and_others_say_goes_into_no_event_or_condition_as_it_is(cluster: FakeKubernetes) -> None:
    hide(PLAIN)
    workspace, _ = quick_start()
    workspace["metadata"] |= {"uid": "1"}
    said = f"pulled https://h/a?sig=zzzzzz with {basic_header('me', 'zzzzzz')} and {PLAIN}"
    event = event_manifest(workspace, 1, "Warning", "X", said, datetime.now(UTC))
    message = json.dumps({"stage": "push", "exit_code": 1, "reason": "X", "message": said, "hint": said})
    for text in (event["note"], repr(parse_result(message))):
        for secret in ("zzzzzz", PLAIN):
            assert not spelled_in(secret, text)
