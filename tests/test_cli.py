import base64
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from data_files import completion_rows, message_rows, write_data
from http_server import Answer, HttpServer
from registries import (
    PASSWORD,
    Tls,
    docker_config,
    make_certificate,
    running_registry,
    running_token_server,
)
from tiny import tiny_base

from tuner import cli
from tuner.cli.common import open_talk

PRESET = "phi-3-mini-4k-instruct"
SIGNATURE = "sv=2024-01-01&sig=c2VjcmV0LXNpZ25hdHVyZQ"
SECRETS = (PASSWORD, "c2VjcmV0LXNpZ25hdHVyZQ", "hunter2", "hf_verysecret", "eyJhdXRocyI6")


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        return self.out.rstrip("\n").rpartition("\n")[2]


Tuner = Callable[..., Ended]


def check_talk(ended: Ended) -> Ended:
    """What holds for every command: no secret anywhere, no traceback, and an error is said."""
    for secret in SECRETS:
        assert secret not in ended.out + ended.err
    assert "Traceback" not in ended.err
    assert ended.code == 0 or ended.err.strip()
    return ended


@pytest.fixture
def tuner(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tuner:
    """Runs a command line in this process, in `tmp_path`."""
    monkeypatch.chdir(tmp_path)

    def run(*argv: str | Path) -> Ended:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in argv])
        captured = capsys.readouterr()
        return check_talk(Ended(code, captured.out, captured.err))

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_data(tmp_path / "train.parquet", message_rows(40))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A model directory as far as it is looked at before weights are needed."""
    directory = tmp_path / "base"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}')
    return directory


@pytest.fixture
def server() -> Iterator[HttpServer]:
    with HttpServer() as running:
        yield running


def secret_document(name: str, text: str) -> dict[str, Any]:
    encoded = base64.b64encode(text.encode()).decode()
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "type": "kubernetes.io/dockerconfigjson",
        "data": {".dockerconfigjson": encoded},
    }


def config_document(name: str, sections: dict[str, Any]) -> dict[str, Any]:
    text = yaml.safe_dump({"training_config": sections})
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": name},
        "data": {"training_config.yaml": text},
    }


def write_workspace(
    path: Path,
    urls: Sequence[str],
    *others: dict[str, Any],
    output: dict[str, Any] | None = None,
    **tuning: Any,
) -> Path:
    document = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": "my-run"},
        "resource": {"labelSelector": {"matchLabels": {"app": "x"}}},
        "tuning": {
            "preset": {"name": PRESET},
            "method": "qlora",
            "input": {"urls": list(urls)},
            "output": output or {"image": "registry.azurecr.io/x:1"},
            **tuning,
        },
    }
    path.write_text(yaml.safe_dump_all([document, *others]), encoding="utf-8")
    return path


# ── what was typed ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("", 64, "Usage: tuner"),
        ("runn x", 64, "no such command 'runn'. Did you mean 'run'?"),
        ("run --smok", 64, "no such option: --smok"),
        ("run a.yaml b.yaml", 64, "unexpected extra argument"),
        ("run", 64, "give a WORKSPACE file, or --model, --data and --output"),
        (f"run --model {PRESET}", 64, "missing: --data, --output"),
        (f"run a.yaml --model {PRESET}", 64, "--model and a WORKSPACE are two ways to say the same"),
        ("run a.yaml --method lora", 64, "--method and a WORKSPACE are two ways to say the same"),
        ("run https://host/w.yaml?sig=c2VjcmV0LXNpZ25hdHVyZQ", 64, "is a file on this machine, not a URL"),
        ("run a.yaml https://h/x?sig=c2VjcmV0LXNpZ25hdHVyZQ", 64, "https://h/x?…"),
        ("check", 64, "missing argument 'WORKSPACE'"),
        ("check nope.yaml", 66, "nope.yaml: there is no such file"),
        ("run slice.parquet", 64, "--data slice.parquet --output ./adapter"),
        ("check train.jsonl.gz", 64, "train.jsonl.gz is a file or directory of data, and a WORKSPACE is YAML"),
        ("submit train.csv --set-image a/b:1", 64, "--data train.csv"),
        ("run nope.json", 66, "nope.json: there is no such file"),
        ("run --model nope --data nope.yaml --smoke", 78, "--model: no preset 'nope'"),
        ("presets phi-3-mini-4k", 78, 'did you mean "phi-3-mini-4k-instruct"?'),
        ("init nodir/w.yaml", 66, "nodir: there is no such directory"),
        ("init /proc/w.yaml", 78, "/proc/w.yaml: cannot be written"),
        ("verify oci:x:y --load nodir", 66, "--load nodir: no such directory"),
        ("verify oci:x:y --load .", 66, "--load .: it has no config.json, so it is no model"),
        ("init --preset nope w.yaml", 78, "no preset 'nope'"),
        ("data preview nope.parquet", 66, "nope.parquet: not there"),
        ("data preview x --rows -1", 64, "--rows"),
        ("push nodir oci:x:y", 66, "nodir: there is no such directory"),
        ("push . oci:x:y", 66, ".: no adapter, there is no adapter_config.json in it"),
        ("push nodir adapter", 64, "adapter names no registry"),
        ("push nodir oci:x:y --digest-file nodir/d", 78, "--digest-file nodir/d: cannot be written"),
        ("pull oci:nodir:x out", 66, "not an OCI image layout"),
        ("pull UPPER/x:1 out", 78, "lower case"),
        ("verify .", 66, ".: no adapter, there is no adapter_config.json in it"),
        ("pull . out", 64, ". is a file or directory here, and no image"),
        ("run w.yaml --output ''", 64, "--output: is empty"),
        ("data preview w.yaml", 65, "w.yaml: YAML is no data"),
        ("pull adapter out", 78, "names no registry, which means docker.io/library/adapter:latest"),
        ("verify adapter:1", 78, "myregistry.azurecr.io/adapter:1; a layout on disk is oci:DIR:TAG"),
        ("stage nope --spec x", 64, "'nope' is no stage"),
        ("stage fetch --spec nope.json", 66, "nope.json: not there"),
    ],
)
def test_a_bad_command_line_gets_a_sentence_and_its_exit_code(tuner: Tuner, line: str, code: int, said: str) -> None:
    ended = tuner(*shlex.split(line))
    assert ended.code == code
    assert said in ended.err


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--set LoraConfig.rr=3", 78, '--set LoraConfig.rr: unknown key, did you mean "r"?'),
        ("--set TrainingArguments.learning_rat=1", 78, 'did you mean "learning_rate"?'),
        ("--set Lora.r=2", 78, "Unrecognized section: Lora"),
        ("--set nothing", 78, "'nothing' is not SECTION.KEY=VALUE"),
        ("--set LoraConfig.r=many", 78, "--set LoraConfig.r"),
        ("--set ModelConfig.trust_remote_code=true", 78, "--trust-remote-code"),
        ("--set ModelConfig.chat_template=nope.jinja", 66, "no Jinja template"),
        ("--method dora", 78, "--method"),
        ("--method lora --set QuantizationConfig.load_in_4bit=true", 78, "method lora does not quantize"),
        ("--config nope.yaml", 66, "--config nope.yaml: there is no such file"),
        ("--base-model nodir", 66, "nodir: there is no such model directory"),
        ("--output http://h/x", 78, "a reference has no scheme"),
        ("--output registry.azurecr.io/UPPER:1", 78, "upper-case"),
        ("--output oci::tag", 78, "no directory"),
        (f"--output registry.azurecr.io/x@sha256:{'a' * 64}", 78, "names a digest"),
        ("--output train.parquet", 78, "train.parquet: is a file"),
        ("--output /proc/adapter", 78, "/proc/adapter: cannot be written"),
        ("--work-dir train.parquet", 78, "train.parquet: is a file"),
        ("--work-dir /proc/work", 78, "/proc/work: cannot be written"),
        ("--ca nope.pem", 66, "there is no such file"),
        ("--ca train.parquet", 78, "train.parquet: not a readable file of CA certificates"),
        ("--docker-config nope", 66, "docker config nope: cannot be read: No such file"),
        ("--docker-config train.parquet", 66, "docker config train.parquet: cannot be read: it is not UTF-8 text"),
        ("--output adapter:v1", 78, "myregistry.azurecr.io/adapter:v1, or a path, as ./adapter:v1"),
        ("--output localhost:5000", 78, "an image without its registry, or a directory?"),
        (f"--output adapter@sha256:{'a' * 64}", 78, "an image without its registry"),
        ("--data train.parqet", 66, 'did you mean "train.parquet"?'),
        ("--data nope", 66, "a path begins where the command is run"),
        ("--data '~nobody-here/x'", 78, "~ in a path: no such home directory"),
        ("--work-dir '~nobody-here/x'", 78, "~ in a path: no such home directory"),
        ("--compression gz", 64, "must be none, zstd or gzip"),
        ("--allow-cidr 169.254.0.0/16", 78, "it is never opened"),
        ("--allow-cidr here", 78, "not a range of IP addresses"),
        ("--output adapter --digest-file digest", 64, "a directory has no digest"),
        ("--digest-file nodir/digest", 78, "--digest-file nodir/digest: cannot be written"),
        ("--data nope.parquet --data no.jsonl", 66, "nope.parquet: there is no such file"),
        ("--data ftp://h/x", 78, "must use HTTP or HTTPS"),
        ("--data https://u:hunter2@h/x", 78, "must not hold a user name or password"),
        ("--data http://127.0.0.1/x", 78, "--allow-cidr 127.0.0.1/32 opens it"),
        ("--data http://169.254.169.254/x?sig=c2VjcmV0LXNpZ25hdHVyZQ", 78, "it is never fetched from"),
        ("--data file://elsewhere/x.parquet", 66, "names a file of the machine elsewhere"),
    ],
)
def test_a_bad_flag_is_refused_before_anything_is_done(
    tuner: Tuner, data: Path, flags: str, code: int, said: str
) -> None:
    ended = tuner("run", "--smoke", "--model", PRESET, "--data", data, *shlex.split(flags))
    assert ended.code == code
    assert said in ended.err
    assert "── fetch" not in ended.err


def test_what_may_not_be_read_is_a_missing_input(tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("w.yaml", "d.jsonl"):
        (tmp_path / name).write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("os.access", lambda *_: False)  # whoever runs the tests may read everything
    ended = tuner("run", "w.yaml")
    assert (ended.code, ended.err) == (66, "error: WORKSPACE w.yaml: cannot be read: Permission denied\n")
    ended = tuner("data", "preview", "d.jsonl")
    assert (ended.code, ended.err) == (66, "error: FILE… d.jsonl: cannot be read: Permission denied\n")
    ended = tuner("run", "--smoke", "--model", PRESET, "--data", "folder")
    assert ended.code == 66
    assert f"error: {tmp_path}/folder: cannot be read: Permission denied" in ended.err


def test_a_nul_in_a_path_is_no_bug(tuner: Tuner, tmp_path: Path, data: Path) -> None:
    output = {"volumeSource": {"hostPath": {"path": "a\0b"}}}
    path = write_workspace(tmp_path / "w.yaml", [str(data)], output=output)
    ended = tuner("check", path)
    assert (ended.code, "a path has a NUL character in it" in ended.err) == (78, True)


def test_a_list_in_json_or_a_directory_of_data_is_no_workspace(tuner: Tuner, tmp_path: Path, data: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"text": "a"}]')
    (tmp_path / "folder").mkdir()
    data.rename(tmp_path / "folder/train.parquet")
    for name in ("rows.json", "folder"):
        ended = tuner("run", name)
        assert ended.code == 64
        assert f"--data {name} --output" in ended.err
    (tmp_path / "folder/w.yaml").write_text("")
    ended = tuner("run", "folder")
    assert (ended.code, "in it: w.yaml" in ended.err) == (78, True)


def test_several_bad_flags_are_said_at_once(tuner: Tuner, data: Path) -> None:
    flags = "--set LoraConfig.rr=3 --config nope.yaml --output reg.io/UP --data no.parquet --docker-config n --ca n"
    ended = tuner("run", "--model", "phi-3-mini-4", "--data", data, *shlex.split(flags))
    assert ended.code == 78
    for said in ("phi-3-mini-4'", "LoraConfig.rr", "--config nope.yaml", "upper-case", "no.parquet", "--ca"):
        assert said in ended.err


def test_faults_of_workspace_and_flags_come_in_one_report(tuner: Tuner, tmp_path: Path) -> None:
    path = write_workspace(tmp_path / "w.yaml", ["ftp://host/x"], method="dora")
    ended = tuner("run", path, "--set", "LoraConfig.rr=3", "--docker-config", "nope", "--base-model", "nodir")
    assert ended.code == 78
    for said in ("tuning.method", "tuning.input.urls[0]", "LoraConfig.rr", "docker config nope", "nodir"):
        assert said in ended.err


def test_faults_of_config_preset_data_and_secret_come_in_one_report(tuner: Tuner, tmp_path: Path) -> None:
    path = write_workspace(
        tmp_path / "w.yaml",
        ["no.parquet"],
        config_document("c", {"LoraConfig": {"rr": 1}, "TrainingArguments": {"learning_rat": 1}}),
        secret_document("s", "hunter2"),
        config="c",
        preset={"name": "phi-3-mini-4"},
        output={"image": "reg.azurecr.io/x:1", "imagePushSecret": "s"},
    )
    ended = tuner("check", path)
    assert ended.code == 78
    for said in ("5 problems", "LoraConfig.rr", "learning_rat", "phi-3-mini-4", "no.parquet", "Secret 's'"):
        assert said in ended.err
    assert re.search(r"w\.yaml:\d+ LoraConfig\.rr", ended.err)


@pytest.mark.parametrize(
    ("tuning", "said"),
    [
        ({"output": {"image": "ACR_REPO_HERE.azurecr.io/IMAGE_NAME_HERE:0.0.1"}}, "placeholder"),
        ({"input": {"urls": ["https://h/x"], "image": "reg.io/x"}}, "tuning.input"),
        ({"input": {}}, "exactly one of urls, image or volumeSource"),
        ({"output": {"image": "reg.io/UP"}}, "upper-case"),
        ({"presett": {}}, 'did you mean "preset"?'),
        ({"preset": {"name": "falcon-7b"}}, "was removed from KAITO"),
        ({"config": "nope"}, "ConfigMap 'nope' is not in the Workspace's file"),
        ({"input": {"volumeSource": {"persistentVolumeClaim": {"claimName": "x"}}}}, "--data DIR"),
        ({"output": {"volumeSource": {"persistentVolumeClaim": {"claimName": "x"}}}}, "--output DIR"),
    ],
)
def test_a_bad_workspace_gets_a_sentence(tuner: Tuner, tmp_path: Path, tuning: dict[str, Any], said: str) -> None:
    ended = tuner("check", write_workspace(tmp_path / "w.yaml", ["https://h/x"], **tuning))
    assert ended.code == 78
    assert said in ended.err


def test_an_inference_workspace_is_told_that_this_runs_tuning(tuner: Tuner, tmp_path: Path) -> None:
    path = tmp_path / "w.yaml"
    document = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "x"}, "inference": {}}
    path.write_text(yaml.safe_dump(document | {"resource": {"labelSelector": {"matchLabels": {"a": "b"}}}}))
    ended = tuner("run", path)
    assert ended.code == 78
    assert "this command runs tuning" in ended.err


def test_kaito_21_qlora_in_any_case_is_qlora(tuner: Tuner, tmp_path: Path, data: Path) -> None:
    ended = tuner(
        "check",
        write_workspace(tmp_path / "w.yaml", [str(data)], method="QLoRA"),
        "--smoke",
        "--json",
        "--no-preflight",
    )
    assert json.loads(ended.out)["method"] == "qlora"


def test_no_disk_space_is_said_before_anything_is_fetched(
    tuner: Tuner, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    ended = tuner("run", "--smoke", "--model", PRESET, "--data", data)
    assert ended.code == 78
    assert "0.0 GiB free" in ended.err
    assert "── fetch" not in ended.err


@dataclass(frozen=True)
class _Usage:
    total: int = 0
    used: int = 0
    free: int = 0


def test_a_disk_that_fills_up_is_no_bug_of_ours(tuner: Tuner, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: object, **named: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tuner.pipeline.run.fetch", full)
    ended = tuner("run", "--smoke", "--model", PRESET, "--data", data)
    assert ended.code == 78
    assert "No space left on device" in ended.err
    assert "free some space" in ended.err


def test_a_bug_shows_its_traceback_without_a_query(
    capsys: pytest.CaptureFixture[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError(f"GET https://host/x.parquet?{SIGNATURE} went wrong")

    monkeypatch.setattr("tuner.request.build_run", broken)
    assert cli.main(["run", "--smoke", "--model", PRESET, "--data", str(data)]) == 70
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "https://host/x.parquet?…" in err
    assert "sig=" not in err


# ── data over HTTP ───────────────────────────────────────────────────────────────────────────────────────────────────


PARQUET = b"PAR1" + b"\0" * 5000


@pytest.mark.parametrize(
    ("answer", "code", "said"),
    [
        (Answer(status=404), 66, "404"),
        (Answer(status=403), 77, "403"),
        (Answer(body=b"<!DOCTYPE html><html>sign in</html>", headers={"Content-Type": "text/html"}), 65, "web page"),
        (Answer(body=PARQUET), 65, "cut short"),
        (Answer(body=b"\0\1\2" * 99), 65, "not a parquet file"),
        (Answer(body=b""), 65, "empty"),
        (Answer.redirect("http://169.254.169.254/latest?token=hunter2"), 78, "169.254.169.254"),
    ],
    ids=["404", "403", "html", "truncated", "binary", "empty", "redirect"],
)
def test_kaito_29_a_bad_url_is_named_without_its_query(
    tuner: Tuner, tmp_path: Path, server: HttpServer, answer: Answer, code: int, said: str
) -> None:
    url = server.serve("/train.parquet", answer)
    path = write_workspace(tmp_path / "w.yaml", [f"{url}?{SIGNATURE}"])
    ended = tuner("check", "--data", path, "--smoke", "--no-preflight", "--allow-cidr", "127.0.0.1/32")
    assert ended.code == code
    assert said in ended.err
    assert url in ended.err
    assert "sv=" not in ended.err


@pytest.mark.train
@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"q": "why?", "a": "so"}] * 20, "column"),
        ([{"messages": [{"role": "user", "content": "no answer"}]}] * 20, "assistant"),
    ],
)
def test_rows_without_a_usable_shape_stop_the_run_before_it_trains(
    tuner: Tuner, tmp_path: Path, rows: list[dict[str, Any]], said: str
) -> None:
    data = write_data(tmp_path / "train.jsonl", rows)
    ended = tuner("run", "--smoke", "--model", PRESET, "--data", data)
    assert ended.code == 65
    assert said in ended.err
    assert "train.jsonl" in ended.err
    assert "── train" not in ended.err


# ── credentials and registries ───────────────────────────────────────────────────────────────────────────────────────


def check_push(
    tuner: Tuner, tmp_path: Path, host: str, data: str, *secrets: dict[str, Any], flags: str = "--plain-http"
) -> Ended:
    """A check whose data is on a server, too: preflight must end before it is asked."""
    output = {"image": f"{host}/adapters/x:1", "imagePushSecret": "push"}
    path = write_workspace(tmp_path / "w.yaml", [data], *secrets, output=output)
    return tuner("check", "--data", "--smoke", "--allow-cidr", "127.0.0.1/32", path, *shlex.split(flags))


@pytest.mark.registry
def test_kaito_25_a_wrong_secret_is_found_before_any_download(tuner: Tuner, tmp_path: Path, server: HttpServer) -> None:
    url = server.serve("/train.parquet", b"never asked for")
    with running_registry(htpasswd=True) as registry:
        wrong = secret_document("push", docker_config(registry.host, password="hunter2"))
        ended = check_push(tuner, tmp_path, registry.host, url, wrong)
    assert ended.code == 77
    assert registry.host in ended.err
    assert "tuner" in ended.err  # the user's name
    assert server.requests == []


@pytest.mark.registry
@pytest.mark.parametrize(
    ("secret", "code", "said"),
    [
        (None, 66, "tuning.output.imagePushSecret: Secret 'push' is not in the Workspace's file"),
        ("hunter2, not JSON", 78, "Secret 'push': .dockerconfigjson is not JSON"),
        ('{"auths": {"HOST": {"auth": "%%%hunter2"}}}', 78, "not the base64 form"),
        ('{"credsStore": "desktop"}', 78, "without auths"),
        ('{"auths": {"other.io": {"auth": "dHVuZXI6aHVudGVyMg=="}}}', 77, "other.io"),
    ],
)
def test_a_missing_or_malformed_secret_is_said_at_once(
    tuner: Tuner, tmp_path: Path, server: HttpServer, secret: str | None, code: int, said: str
) -> None:
    url = server.serve("/train.parquet", b"never asked for")
    with running_registry(htpasswd=True) as registry:
        documents = [secret_document("push", secret.replace("HOST", registry.host))] if secret else []
        ended = check_push(tuner, tmp_path, registry.host, url, *documents)
    assert ended.code == code
    assert said in ended.err
    assert server.requests == []


@pytest.mark.registry
def test_a_credential_that_docker_keeps_in_a_helper_may_push(
    tuner: Tuner, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cli").mkdir()
    config = tmp_path / "cli/config.json"
    config.write_text('{"auths": {}, "credsStore": "fake"}')
    with running_registry(htpasswd=True) as registry:
        path = write_workspace(tmp_path / "w.yaml", [str(data)], output={"image": f"{registry.host}/a:1"})
        ended = tuner("check", "--smoke", "--plain-http", "--docker-config", config, path)
        assert ended.code == 77
        assert "keeps its credentials in docker-credential-fake, which is not installed here" in ended.err
        program = tmp_path / "cli/docker-credential-fake"
        answer = json.dumps({"Username": "tuner", "Secret": PASSWORD})
        program.write_text(f"#!/bin/sh\nread server\necho '{answer}'\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}/cli:{os.environ['PATH']}")
        ended = tuner("check", "--smoke", "--plain-http", "--docker-config", config, path)
    assert ended.code == 0, ended.err
    assert f"may push to {registry.host}/a:1 with user 'tuner'" in ended.err


@pytest.mark.registry
def test_a_token_that_may_only_pull_is_denied_before_any_download(
    tuner: Tuner, tmp_path: Path, server: HttpServer
) -> None:
    url = server.serve("/train.parquet", b"never asked for")
    with running_token_server({"tuner": {"pull"}}) as tokens, running_registry(token_server=tokens) as registry:
        ended = check_push(tuner, tmp_path, registry.host, url, secret_document("push", docker_config(registry.host)))
    assert ended.code == 77
    assert server.requests == []


def test_a_malformed_docker_config_is_found_without_a_probe_too(
    tuner: Tuner, tmp_path: Path, data: Path, base: Path
) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"auths": {"reg.azurecr.io": {"auth": "%hunter2"}}}')
    path = write_workspace(tmp_path / "w.yaml", [str(data)], output={"image": "reg.azurecr.io/x:1"})
    ended = tuner("check", path, "--no-preflight", "--docker-config", config, "--base-model", base)
    assert ended.code == 78
    assert "not the base64 form" in ended.err


@pytest.mark.registry
def test_a_registry_without_tls_gets_the_flag_as_hint(tuner: Tuner, tmp_path: Path, data: Path) -> None:
    with running_registry() as registry:
        secret = secret_document("push", docker_config(registry.host))
        ended = check_push(tuner, tmp_path, registry.host, str(data), secret, flags="")
    assert ended.code in (69, 78)
    assert "--plain-http" in ended.err


def test_a_registry_that_is_not_there_is_said_before_any_download(
    tuner: Tuner, tmp_path: Path, server: HttpServer
) -> None:
    url = server.serve("/train.parquet", b"never asked for")
    with socket.socket() as nobody:  # bound, not listening: refuses
        nobody.bind(("127.0.0.1", 0))
        host = f"127.0.0.1:{nobody.getsockname()[1]}"
        ended = check_push(tuner, tmp_path, host, url, secret_document("push", docker_config(host)))
    assert ended.code == 69
    assert host in ended.err
    assert server.requests == []


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Tls:
    return make_certificate(tmp_path_factory.mktemp("tls"))


@pytest.mark.registry
def test_an_unknown_ca_gets_the_flag_as_hint_and_the_flag_helps(
    tuner: Tuner, tmp_path: Path, data: Path, certificate: Tls
) -> None:
    with running_registry(tls=certificate) as registry:
        path = write_workspace(tmp_path / "w.yaml", [str(data)], output={"image": f"{registry.host}/x:1"})
        refused = tuner("check", "--smoke", path)
        allowed = tuner("check", "--smoke", path, "--ca", certificate.certificate)
        other = make_certificate(tmp_path).certificate
        wrong = tuner("check", "--smoke", path, "--ca", other)
    assert refused.code in (69, 77, 78)
    assert "--ca" in refused.err
    assert allowed.code == 0
    assert wrong.code == refused.code
    assert f"hint: {other} has not the CA that signed it" in wrong.err


# ── a run ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory in which one smoke run has succeeded: its adapter, its image."""
    directory = tmp_path_factory.mktemp("finished")
    write_data(directory / "train.parquet", message_rows(40))
    arguments = ["run", "--smoke", "--model", PRESET, "--data", "train.parquet", "--work-dir", "work", "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(
        [sys.executable, "-m", "tuner", *arguments], cwd=directory, env=environment, capture_output=True, text=True
    )
    (directory / "stdout").write_text(done.stdout)
    (directory / "stderr").write_text(done.stderr)
    check_talk(Ended(done.returncode, done.stdout, done.stderr))
    assert done.returncode == 0, done.stderr
    return directory


def adapter_of(directory: Path) -> Path:
    (found,) = (directory / "work").glob("adapter-*")
    return found


@pytest.mark.train
def test_a_smoke_run_says_its_stages_on_stderr_and_its_result_on_stdout(finished: Path) -> None:
    (line,) = (finished / "stdout").read_text().splitlines()
    result = json.loads(line)
    assert re.fullmatch(rf"oci:{finished}/work/image:smoke@sha256:[0-9a-f]{{64}}", result["image"])
    assert (result["smoke"], result["train_rows"], result["eval_rows"], result["smoke_unused_rows"]) == (True, 38, 2, 0)
    talk = (finished / "stderr").read_text()
    stages = re.findall(r"^\S* (preflight|fetch|prepare|train|push)$", talk, re.MULTILINE)
    assert stages == ["preflight", "fetch", "prepare", "train", "push"]
    assert re.search(r"^done in \d+ s: 4 steps, loss", talk, re.MULTILINE)


@pytest.mark.train
def test_progress_in_a_log_is_a_few_json_lines(finished: Path) -> None:
    lines = [line for line in (finished / "stderr").read_text().splitlines() if line.startswith("{")]
    progress = [json.loads(line) for line in lines]
    assert [(line["task"], line["unit"]) for line in progress if line["done"] == line["total"]] == [
        ("training", "steps")
    ]
    assert len(progress) <= 6


@pytest.mark.train
@pytest.mark.registry
def test_push_and_pull_give_the_digest_of_the_run(tuner: Tuner, tmp_path: Path, finished: Path) -> None:
    digest = json.loads((finished / "stdout").read_text())["image"].rpartition("@")[2]
    with running_registry() as registry:
        image = f"{registry.host}/adapters/x:1"
        pushed = tuner("push", adapter_of(finished), image, "--plain-http", "--digest-file", "digest")
        pulled = tuner("pull", image, "out", "--plain-http")
    assert pushed.last_line == f"{registry.host}/adapters/x@{digest}"
    assert (tmp_path / "digest").read_text() == f"{digest}\n"
    assert pulled.last_line == pushed.last_line
    assert (tmp_path / "out/adapter_config.json").is_file() or (tmp_path / "out/data/adapter_config.json").is_file()


@pytest.mark.train
def test_who_pushes_a_work_directory_is_told_where_its_adapter_is(tuner: Tuner, finished: Path) -> None:
    ended = tuner("push", finished / "work", "oci:layout:v1")
    assert ended.code == 66
    assert f"hint: below it: {adapter_of(finished)}\n" in ended.err


@pytest.mark.train
def test_a_file_in_the_place_of_a_directory_is_said(tuner: Tuner, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "taken").write_text("")
    adapter = adapter_of(finished)
    pushed = tuner("push", adapter, "oci:taken:x")
    assert (pushed.code, "a file is where the layout's directory would be" in pushed.err) == (78, True)
    pulled = tuner("pull", f"oci:{finished}/work/image:smoke", "taken/x")
    assert (pulled.code, "a file is where a directory would be" in pulled.err) == (78, True)
    named = tuner("push", adapter / "adapter_model.safetensors", "oci:layout:x")
    assert (named.code, f"hint: name its directory: {adapter}\n" in named.err) == (66, True)
    merged = tuner("merge", adapter / "adapter_config.json", "merged")
    assert (merged.code, "cannot be read: Not a directory" in merged.err) == (66, True)


@pytest.mark.train
def test_push_needs_no_registry_for_a_layout(tuner: Tuner, tmp_path: Path, finished: Path) -> None:
    first = tuner("push", adapter_of(finished), "oci:layout:v1")
    again = tuner("push", adapter_of(finished), "oci:layout:v1")
    assert first.code == again.code == 0
    assert first.last_line == again.last_line == f"oci:{tmp_path}/layout:v1@{first.last_line.rpartition('@')[2]}"


@pytest.mark.train
@pytest.mark.registry
def test_an_existing_tag_stops_at_once_with_no_overwrite(
    tuner: Tuner, tmp_path: Path, finished: Path, server: HttpServer
) -> None:
    url = server.serve("/train.parquet", b"never asked for")
    with running_registry() as registry:
        pushed = tuner("push", adapter_of(finished), f"{registry.host}/x:1", "--plain-http")
        path = write_workspace(tmp_path / "w.yaml", [url], output={"image": f"{registry.host}/x:1"})
        flags = ["--smoke", "--plain-http", "--allow-cidr", "127.0.0.1/32", "--no-overwrite"]
        ended = tuner("run", path, *flags)
    assert ended.code == 78
    assert pushed.last_line.rpartition("@")[2] in ended.err  # the old digest
    assert server.requests == []


@pytest.mark.train
def test_pull_does_not_write_over_what_is_there(tuner: Tuner, tmp_path: Path, finished: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").touch()
    ended = tuner("pull", f"oci:{finished}/work/image:smoke", "out")
    assert ended.code == 78
    assert (tmp_path / "out/mine").exists()


@pytest.mark.train
def test_pull_names_the_tags_that_are_there(tuner: Tuner, finished: Path) -> None:
    ended = tuner("pull", f"oci:{finished}/work/image:nope", "out")
    assert ended.code == 66
    assert "there are: smoke" in ended.err


@pytest.mark.train
def test_a_failed_push_keeps_the_adapter_and_says_how_to_go_on(
    tuner: Tuner, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.errors import DeniedError

    def denied(*arguments: object, **named: object) -> None:
        raise DeniedError("the token has expired")

    monkeypatch.setattr("tuner.registry.push_state.push_image", denied)
    ended = tuner("push", adapter_of(finished), "reg.azurecr.io/x:1")
    assert ended.code == 74
    assert f"go on with: tuner push {adapter_of(finished)} reg.azurecr.io/x:1" in ended.err


# ── check, presets, init, preview ────────────────────────────────────────────────────────────────────────────────────


def test_check_shows_what_a_run_would_do_and_every_setting_with_its_origin(
    tuner: Tuner, tmp_path: Path, data: Path
) -> None:
    path = write_workspace(tmp_path / "w.yaml", [str(data)], config_document("c", {"LoraConfig": {"r": 8}}), config="c")
    ended = tuner("check", path, "--smoke", "--no-preflight", "--set", "TrainingArguments.seed=7")
    assert ended.code == 0
    lines = ended.out.splitlines()
    assert f"data         {data}" in lines
    assert any(line.startswith("destination  oci:") for line in lines)
    assert "to push      none needed" in lines
    origins = {line.split()[0]: line.split()[-2:] for line in lines if "." in line.split(" ")[0]}
    assert origins["LoraConfig.r"][0] == "8"
    assert re.search(r"w\.yaml:\d+$", origins["LoraConfig.r"][1])
    assert origins["TrainingArguments.seed"] == ["7", "--set"]
    assert origins["LoraConfig.lora_alpha"] == ["32", "default"]
    starts = {line.index(" default") for line in lines if line.endswith(" default")}
    assert len(starts) == 1  # aligned


def test_check_json_has_all_of_it(tuner: Tuner, tmp_path: Path, base: Path) -> None:
    path = write_workspace(
        tmp_path / "w.yaml",
        [f"https://data.example.org/a.parquet?{SIGNATURE}"],
        secret_document("push", docker_config("reg.azurecr.io")),
        output={"image": "reg.azurecr.io/x:1", "imagePushSecret": "push"},
    )
    ended = tuner("check", path, "--no-preflight", "--base-model", base, "--json", "--work-dir", "w")
    found = json.loads(ended.out)
    assert found["sources"][0]["url"] == "https://data.example.org/a.parquet"
    assert found["destination"]["reference"] == "reg.azurecr.io/x:1"
    assert found["base_model"]["path"] == str(base)
    assert found["credentials"]["push"] == "Secret 'push' in the Workspace's file"
    assert {"setting": "LoraConfig.r", "value": 16, "origin": "default"} in found["settings"]
    assert found["work_dir"] == str(tmp_path / "w")
    assert found["run_digest"].startswith("sha256:")


@pytest.mark.train
def test_check_with_data_counts_every_row(tuner: Tuner, tmp_path: Path, data: Path) -> None:
    path = write_workspace(tmp_path / "w.yaml", [str(data)])
    ended = tuner("check", "--data", path, "--no-preflight", "--base-model", tiny_base(), "--json")
    assert json.loads(ended.out)["data"]["rows_read"] == 40


def test_the_readmes_workspace_on_a_laptop_is_told_what_is_next_and_checked_without_the_secret(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "fresh"))
    readme = Path(__file__).parents[1].joinpath("README.md").read_text(encoding="utf-8")
    (tmp_path / "workspace.yaml").write_text(readme.partition("```yaml\n")[2].partition("```")[0], encoding="utf-8")
    ended = tuner("check", "workspace.yaml")
    assert ended.code == 66
    assert "Secret 'registry-secret' is not in the Workspace's file" in ended.err
    assert "docker login myregistry.azurecr.io" in ended.err
    assert "--no-preflight checks the rest, tuner submit --dry-run asks the cluster" in ended.err
    ended = tuner("check", "workspace.yaml", "--no-preflight")
    assert ended.code == 0, ended.err
    assert "to push      Secret 'registry-secret', which is not here\n" in ended.out
    assert "train.parquet: … stands in its query; the whole signed URL is needed\n" in ended.err
    assert "LoraConfig.r " in ended.out


def test_what_init_writes_is_told_what_to_replace_when_it_is_checked_as_it_is(
    tuner: Tuner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "fresh"))
    tuner("init", "new.yaml")
    ended = tuner("check", "new.yaml")
    assert ended.code == 66
    notes = re.findall(r"^note: new\.yaml:\d+ (\S+): \S*example\.com is an example's host", ended.err, re.MULTILINE)
    assert notes == ["tuning.input.urls[0]", "tuning.output.image"]


def test_what_init_writes_checks_clean_once_it_is_edited_as_it_says(tuner: Tuner, tmp_path: Path, data: Path) -> None:
    assert tuner("init", "w.yaml").code == 0
    path = tmp_path / "w.yaml"
    text = path.read_text()
    text = text.replace("https://example.com/data/train.parquet", str(data))
    text = text.replace("registry.example.com", "registry.azurecr.io")
    path.write_text(text)
    config = tmp_path / "config.json"
    config.write_text(docker_config("registry.azurecr.io"))
    ended = tuner("check", path, "--no-preflight", "--smoke", "--docker-config", config)
    assert ended.code == 0, ended.err


def test_init_writes_over_nothing(tuner: Tuner, tmp_path: Path) -> None:
    (tmp_path / "w.yaml").write_text("mine")
    assert tuner("init", "w.yaml").code == 64
    assert (tmp_path / "w.yaml").read_text() == "mine"


def test_presets_lists_all_and_shows_one(tuner: Tuner) -> None:
    assert PRESET in tuner("presets").out
    assert yaml.safe_load(tuner("presets", PRESET).out)["model_id"].startswith("microsoft/")
    assert len(json.loads(tuner("presets", "--json").out)) >= 10
    assert json.loads(tuner("presets", PRESET, "--json").out)["name"] == PRESET


@pytest.mark.train
def test_preview_shows_rows_on_stdout_and_progress_on_stderr(tuner: Tuner, tmp_path: Path) -> None:
    data = write_data(tmp_path / "train.jsonl", completion_rows(9))
    ended = tuner("data", "preview", data, "--rows", "1")
    assert ended.code == 0
    assert "9 rows" in ended.out
    assert "⟦" in ended.out


@pytest.mark.train
@pytest.mark.parametrize(("bad", "code"), [(1, 0), (9, 65)])
def test_preview_ends_as_a_run_would(tuner: Tuner, tmp_path: Path, bad: int, code: int) -> None:
    write_data(tmp_path / "d.jsonl", [*message_rows(20), *[{"messages": []}] * bad])
    ended = tuner("data", "preview", "d.jsonl")
    assert ended.code == code
    assert "learnt tokens look" in ended.out
    assert ("error: a run would stop: more than 10% of the rows are bad" in ended.err) is (code == 65)


# ── pipes and signals ────────────────────────────────────────────────────────────────────────────────────────────────


def start(*argv: str | Path, cwd: Path, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tuner", *map(str, argv)],
        cwd=cwd,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait(process: "subprocess.Popen[str]") -> Ended:
    out, err = process.communicate(timeout=120)
    return check_talk(Ended(process.returncode, out, err))


def test_a_reader_that_goes_away_ends_it_quietly(tmp_path: Path) -> None:
    with start("presets", "--json", cwd=tmp_path) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert process.wait(timeout=30) == 141
        assert process.stderr.read() == ""


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LANG": "C", "LC_ALL": "C"}])
def test_a_terminal_without_our_signs_is_no_reason_to_stop(
    tmp_path: Path, data: Path, environment: dict[str, str]
) -> None:
    arguments = ["check", "--smoke", "--no-preflight", write_workspace(tmp_path / "w.yaml", [str(data)])]
    with start(*arguments, cwd=tmp_path, **environment) as process:
        ended = wait(process)
    assert ended.code == 0
    assert "LoraConfig.r" in ended.out


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [(signal.SIGINT, 130, "SIGINT: stopping"), (signal.SIGTERM, 143, "SIGTERM: stopping")],
)
def test_a_signal_outside_training_ends_it_at_once(
    tmp_path: Path, server: HttpServer, number: signal.Signals, code: int, said: str
) -> None:
    url = server.serve("/train.parquet", Answer(body=b"x" * 9999, stall_after=10))
    with start(
        *("run", "--smoke", "--model", PRESET, "--data", f"{url}?{SIGNATURE}", "--allow-cidr", "127.0.0.1/32"),
        cwd=tmp_path,
    ) as process:
        wait_until(lambda: bool(server.requests), process)
        process.send_signal(number)
        ended = wait(process)
    assert ended.code == code
    assert said in ended.err


def wait_until(happened: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)


class Listener:
    """Reads a process's stderr line by line, so that a test can wait for one."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self.lines: list[str] = []
        self._process = process
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        assert self._process.stderr
        for line in self._process.stderr:
            self.lines.append(line)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: any(text in line for line in self.lines), self._process)

    def end(self) -> Ended:
        assert self._process.stdout
        out = self._process.stdout.read()
        code = self._process.wait(timeout=120)
        self._thread.join()
        return check_talk(Ended(code, out, "".join(self.lines)))


@pytest.mark.train
def test_ctrl_c_in_training_saves_and_says_how_to_go_on_and_twice_ends_it(tmp_path: Path, data: Path) -> None:
    arguments = ["run", "--model", PRESET, "--data", data, "--base-model", tiny_base(), "--output", "oci:image:v1"]
    arguments += ["--set", "TrainingArguments.max_steps=2000"]
    with start(*arguments, cwd=tmp_path) as process:
        heard = Listener(process)
        heard.wait_for('"training"')
        process.send_signal(signal.SIGINT)
        stopped = heard.end()
    assert stopped.code == 75
    assert "SIGINT: finishing this step, then saving a checkpoint" in stopped.err
    assert f"go on with: {shlex.join(['tuner', *map(str, arguments)])}" in stopped.err
    assert stopped.out == ""

    with start(*arguments, cwd=tmp_path) as process:
        heard = Listener(process)
        heard.wait_for('"training"')
        process.send_signal(signal.SIGINT)
        process.send_signal(signal.SIGTERM)
        again = heard.end()
    assert again.code == 130
    assert "SIGTERM again: stopping without a checkpoint" in again.err


# ── registry options ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.train
@pytest.mark.registry
def test_push_verify_and_resume_with_everything_that_was_asked_for(tuner: Tuner, finished: Path) -> None:
    with running_registry() as registry:
        reference = f"{registry.host}/team/adapter:1"
        flags = ["--plain-http", "--compression", "zstd", "--chunk-size", "65536", "--modelpack", "--provenance"]
        pushed = tuner("push", adapter_of(finished), reference, *flags)
        assert pushed.code == 0, pushed.err
        assert "1-modelpack" in registry.tags("team/adapter")
        again = tuner("push", "--resume", adapter_of(finished).parent)
        assert again.code == 0, again.err
        assert again.out == pushed.out
        assert "pushed 0 bytes, the rest was there" in again.err
        verified = tuner("verify", reference, "--plain-http")
        assert verified.code == 0, verified.err
        assert verified.out == pushed.out


@pytest.mark.train
def test_verify_finds_an_image_that_contradicts_itself(tuner: Tuner, finished: Path) -> None:
    layout = finished / "work/image"
    blob = max((layout / "blobs/sha256").iterdir(), key=lambda path: path.stat().st_size)
    content = blob.read_bytes()
    try:
        blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        ended = tuner("verify", f"oci:{layout}:smoke")
    finally:
        blob.write_bytes(content)
    assert ended.code == 65
    assert "sha256" in ended.err


def test_push_wants_what_and_where_or_what_to_resume(tuner: Tuner, tmp_path: Path) -> None:
    assert tuner("push").code == 64
    assert tuner("push", "--resume", tmp_path, "more", "than:1").code == 64
    ended = tuner("push", "--resume", tmp_path)
    assert ended.code == 66
    assert "no push was begun" in ended.err


def test_plan_answers_without_data_secret_or_gpu(tuner: Tuner, tmp_path: Path) -> None:
    path = write_workspace(tmp_path / "w.yaml", ["https://example.org/x.parquet"])
    fits = tuner("plan", path, "--gpu", "24GB")
    assert fits.code == 0
    assert "fits" in fits.out
    assert "Estimates, not measurements" in fits.out
    assert tuner("plan", path, "--gpu", "V100").code == 78
    assert tuner("plan", path, "--gpu", "4GB").code == 73
    assert tuner("plan", path).code == 64


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_real_model_on_a_cpu_is_warned_of_before_it_is_downloaded(
    tuner: Tuner, tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, gpus: int
) -> None:
    monkeypatch.setattr("tuner.pipeline.run.visible_gpus", lambda env: gpus)
    monkeypatch.setattr("tuner.pipeline.run._check_gpu", lambda: None)
    monkeypatch.setattr("shutil.disk_usage", lambda path: _Usage())
    ended = tuner("run", "--model", PRESET, "--data", data, "--output", "adapter")
    assert ended.code == 78
    assert ("warning: no NVIDIA GPU is here: training a model of 7.1 GiB" in ended.err) is not bool(gpus)


def test_plan_without_a_prepared_json_says_what_leaves_one(tuner: Tuner, tmp_path: Path) -> None:
    path = write_workspace(tmp_path / "w.yaml", ["https://h/x.parquet"])
    for name, code in (("nope.json", 66), ("w.yaml", 78)):
        ended = tuner("plan", path, "--gpu", "24GB", "--prepared", name)
        assert ended.code == code
        assert "hint: tuner check --data leaves one in its work directory" in ended.err


def test_what_a_library_prints_is_no_result(capsys: pytest.CaptureFixture[str]) -> None:
    with open_talk():
        print("[INFO] Running in WANDB offline mode")  # transformers does
    print("the digest")
    said = capsys.readouterr()
    assert said.out == "the digest\n"
    assert "WANDB" in said.err
