"""What a container reads and says: its secrets, its arguments, what the Hub and a preflight tell it beforehand."""

import fcntl
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
from http_server import Answer, HttpServer
from registries import docker_config
from tiny import Heard, make_job, rows_of

from tuner import cli, pod
from tuner.errors import ConfigError, DeniedError, NotPushedError, ServiceError, TunerError
from tuner.pipeline import containers as module
from tuner.pipeline.containers import Container, Push, read_secrets
from tuner.runspec import HubModel, ImageDestination, RunSpec, StageResult

pytestmark = pytest.mark.train


def mount(root: Path, directory: Path, **files: str) -> None:
    """What a kubelet puts there, hidden directory included. A dot in a key is written as __."""
    target = root / directory.relative_to("/")
    (target / "..2026").mkdir(parents=True)
    (target / "..data").symlink_to("..2026")
    for key, text in files.items():
        name = key.replace("__", ".")
        (target / "..2026" / name).write_text(text)
        (target / name).symlink_to(f"..data/{name}")


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_nothing_mounted_is_no_secret(tmp_path: Path) -> None:
    secrets = read_secrets({}, tmp_path)
    assert (secrets.docker_configs, secrets.pull_docker_configs, secrets.queries) == ((), (), {})
    assert (secrets.hf_token, secrets.source_headers, secrets.push_docker_config_file) == (None, (), None)


def test_everything_that_is_mounted_is_read_whole(tmp_path: Path) -> None:
    push = docker_config("contoso.azurecr.io")
    mount(tmp_path, pod.PUSH_SECRET_DIR, __dockerconfigjson=push)
    mount(tmp_path, pod.PULL_SECRETS_DIR / "b", config__json=docker_config("b.example"))
    legacy = json.dumps(json.loads(docker_config("a.example"))["auths"])
    mount(tmp_path, pod.PULL_SECRETS_DIR / "a", __dockercfg=legacy)
    mount(tmp_path, pod.SOURCES_DIR, queries__json='{"train": "sig=x"}', sources__json='{"a.example": {"bearer": "t"}}')
    mount(tmp_path, pod.HEADERS_DIR, sources__json='{"b.example": {"bearer": "u"}}')
    secrets = read_secrets({"HF_TOKEN": "hf_abc\n"}, tmp_path)
    assert secrets.docker_configs == (push,)
    assert secrets.pull_docker_configs == (legacy, docker_config("b.example"))
    assert secrets.queries == {"train": "sig=x"}
    assert [json.loads(text) for text in secrets.source_headers] == [
        {"a.example": {"bearer": "t"}},
        {"b.example": {"bearer": "u"}},
    ]
    assert secrets.hf_token == "hf_abc"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        (
            {"token": "hunter2"},
            "Secret 'acr': has no .dockerconfigjson and no config.json and no .dockercfg; its keys are",
        ),
        ({"__dockerconfigjson": "hunter2"}, "Secret 'acr': not a JSON object"),
        ({"__dockerconfigjson": '{"auths": {"x": {"auth": "hunter2"}}}'}, "Secret 'acr' auths.*base64"),
    ],
)
def test_a_secret_that_is_none_to_push_with_is_called_by_its_name_and_not_shown(
    files: dict[str, str], said: str, tmp_path: Path
) -> None:
    mount(tmp_path, pod.PUSH_SECRET_DIR, **files)
    with pytest.raises(ConfigError, match=said) as raised:
        read_secrets({pod.PUSH_SECRET_ENV: "acr"}, tmp_path)
    assert "kubectl create secret docker-registry" in str(raised.value.hint)
    assert "hunter2" not in f"{raised.value.message} {raised.value.hint}"


def test_every_broken_secret_is_told_at_once(tmp_path: Path) -> None:
    mount(tmp_path, pod.PUSH_SECRET_DIR, __dockerconfigjson="[]")
    mount(tmp_path, pod.PULL_SECRETS_DIR / "mine", __dockerconfigjson="[]")
    mount(tmp_path, pod.SOURCES_DIR, queries__json='{"train": 1}')
    with pytest.raises(ConfigError, match="4 problems") as raised:
        read_secrets({"HF_TOKEN": " ", pod.HUB_SECRET_ENV: "hf"}, tmp_path)
    said = " | ".join(map(str, raised.value.problems))
    for words in ("the Secret to push with", "Secret 'mine'", "queries.json", "Secret 'hf': its HF_TOKEN is empty"):
        assert words in said


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("stage fetch", "a stage needs a RunSpec"),
        ("stage fetch --pod --work-dir w", "--pod says where secrets and work directory are"),
        ("stage push --wait --spec s", "are for a pod"),
        ("stage check --spec s", "are for a pod"),
        ("stage check --pod", "check stands alone, with --max-data"),
        ("stage check fetch --pod --max-data 1", "check stands alone"),
        ("stage prepare nope --pod", "'nope' is no stage"),
    ],
)
def test_a_container_with_arguments_that_make_no_sense_is_told_so(
    line: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 64
    assert said in capsys.readouterr().err


def test_a_containers_last_word_has_every_problem_and_the_hint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a pod the log is soon gone; the termination message stays in the API."""
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr("tuner.cli.stage.TERMINATION_LOG", log)
    spec = make_job(tmp_path, rows_of("messages", 4), smoke=True).spec
    spec.save(tmp_path / "run.json")
    mount(tmp_path, pod.PUSH_SECRET_DIR, __dockerconfigjson="[]")
    mount(tmp_path, pod.PULL_SECRETS_DIR / "mine", __dockerconfigjson="[]")
    monkeypatch.setattr(module, "read_secrets", lambda env: read_secrets(env, tmp_path))
    assert cli.main(["stage", "preflight", "--pod", "--spec", str(tmp_path / "run.json")]) == 78
    result = StageResult.model_validate_json(log.read_text())
    assert (result.stage, result.exit_code, result.reason) == ("preflight", 78, "ConfigError")
    assert result.message.count("not a JSON object") == 2
    assert capsys.readouterr().out.strip().endswith(log.read_text())


def test_last_words_are_whole_where_a_pods_containers_share_what_a_kubelet_keeps() -> None:
    """12 KiB of a pod in equal shares: ours has four containers, and a mesh or a cloud's identity adds two."""
    share = 12 * 1024 // 6
    long = StageResult(
        stage="train",
        exit_code=65,
        message='"ä\n' * 2000,
        hint='"ö\n' * 2000,
        values={"run_digest": "sha256:" + "a" * 64},
    )
    cut = StageResult.model_validate_json(long.to_message())
    assert len(long.to_message().encode()) <= share
    assert (cut.exit_code, cut.values, cut.message) == (65, long.values, "…")
    hinted = StageResult(stage="train", message="x" * 3000, hint="do this")
    assert len(hinted.to_message().encode()) <= share
    assert StageResult.model_validate_json(hinted.to_message()).hint == "do this"
    silent = StageResult(stage="train", hint="y" * 3000)
    assert StageResult.model_validate_json(silent.to_message()).message == ""
    assert StageResult(stage="train", message="short").to_message().count("short") == 1


def test_a_bug_has_a_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "termination-log"
    log.touch()
    monkeypatch.setattr("tuner.cli.stage.TERMINATION_LOG", log)
    make_job(tmp_path, rows_of("messages", 4), smoke=True).spec.save(tmp_path / "run.json")
    monkeypatch.setattr(module, "read_secrets", lambda env: 1 // 0)
    assert cli.main(["stage", "preflight", "--pod", "--spec", str(tmp_path / "run.json")]) == 70
    result = StageResult.model_validate_json(log.read_text())
    assert (result.exit_code, result.reason) == (70, "ZeroDivisionError")


# ── the Hub, asked beforehand ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HttpServer]:
    import huggingface_hub.constants as constants

    with HttpServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        yield server


def container_of(directory: Path, *, gated: bool = False, **env: str) -> Container:
    spec = make_job(directory, rows_of("messages", 4), smoke=True).spec
    preset = spec.preset.model_copy(update={"gated": gated})
    model = HubModel(id="org/tiny", revision="main")
    destination = ImageDestination(reference="reg.example/a:1")
    spec = spec.model_copy(update={"base_model": model, "preset": preset, "destination": destination})
    return Container(spec, env, Heard(), lambda stage: None)


GATED = Answer(status=403, headers={"X-Error-Code": "GatedRepo"})


@pytest.mark.parametrize(
    ("answer", "gated", "env", "kind"),
    [
        (b"{}", True, {"HF_TOKEN": "hf_mine"}, None),
        (b"{}", False, {}, None),
        (GATED, True, {}, DeniedError),
        (GATED, True, {"HF_TOKEN": "hf_mine", pod.HUB_SECRET_ENV: "hf"}, DeniedError),
        (Answer(status=401), False, {"HF_TOKEN": "hf_old"}, TunerError),
        (Answer(status=503), True, {"HF_TOKEN": "hf_mine"}, None),
    ],
)
def test_a_token_that_does_not_open_the_model_is_found_before_the_download(
    answer: Answer | bytes,
    gated: bool,
    env: dict[str, str],
    kind: type[TunerError] | None,
    hub: HttpServer,
    tmp_path: Path,
) -> None:
    hub.serve("/api/models/org/tiny/auth-check", answer)
    container = container_of(tmp_path, gated=gated, **env)
    check: Callable[[], None] = lambda: container._check_model(read_secrets(container.env, tmp_path))  # noqa: E731
    if kind is None:
        check()
        return
    with pytest.raises(kind) as raised:
        check()
    if kind is DeniedError:
        assert f"Secret {env.get(pod.HUB_SECRET_ENV, 'NAME')!r}" in str(raised.value.hint)
    assert "hf_" not in raised.value.message


# ── patience ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class Clock:
    """time, as far as it is looked at."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def push_that(monkeypatch: pytest.MonkeyPatch, cause: TunerError, *, times: int) -> list[RunSpec]:
    """Pushes fail so often, for this reason; a list of those that were tried. No volume is mounted here."""
    tried: list[RunSpec] = []

    def push_left(spec: RunSpec, *_: object, **__: object) -> dict[str, str]:
        tried.append(spec)
        if len(tried) <= times:
            raise NotPushedError(f"trained, but not pushed: {cause.message}") from cause
        return {"image": "reg.example/a@sha256:1"}

    monkeypatch.setattr(module, "push_left", push_left)
    monkeypatch.setattr(Container, "open_work_dir", lambda self: nullcontext())
    return tried


@pytest.mark.parametrize("cause", [ServiceError("down"), DeniedError("expired")])
def test_the_pusher_keeps_trying_until_it_is_through(
    cause: TunerError, clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = push_that(monkeypatch, cause, times=6)
    assert container_of(tmp_path).push(Push(hold_s=3600))["image"] == "reg.example/a@sha256:1"
    assert len(tried) == 7
    assert clock.slept == [5, 10, 20, 40, 60, 60]


def test_it_gives_up_when_its_time_is_over_and_says_how_to_finish(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    push_that(monkeypatch, ServiceError("down"), times=10**6)
    with pytest.raises(NotPushedError, match="down") as raised:
        container_of(tmp_path).push(Push(hold_s=100))
    assert clock.now == 100
    assert "tuner retry-push tiny-run" in str(raised.value.hint)


def test_what_no_second_try_would_change_is_not_tried_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tried = push_that(monkeypatch, ConfigError("the tag exists already"), times=10**6)
    with pytest.raises(NotPushedError):
        container_of(tmp_path).push(Push(hold_s=3600))
    assert (len(tried), clock.slept) == (1, [])


def test_a_service_that_is_down_never_becomes_the_code_that_trains_again(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def push_left(*_: object, **__: object) -> None:
        raise ServiceError("down")

    monkeypatch.setattr(module, "push_left", push_left)
    monkeypatch.setattr(Container, "open_work_dir", lambda self: nullcontext())
    with pytest.raises(NotPushedError):
        container_of(tmp_path).push(Push())


# ── one trainer on a volume ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_trainer_waits_for_one_that_a_lost_node_still_runs_on_the_same_volume(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pod, "work_dir", lambda spec: tmp_path / "work")
    seen: list[str] = []
    monkeypatch.setattr(module, "run_stage", lambda stage, *_, **__: seen.append(stage) or {})
    container = container_of(tmp_path)
    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        waiting = threading.Thread(target=container.run, args=(("train",), Push()))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
        assert seen == []
    waiting.join(10)
    assert seen == ["train"]
    assert isinstance(container.reporter, Heard)
    assert "another process is training in it" in container.reporter.notes[0]
