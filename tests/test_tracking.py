"""`report_to`: what tensorboard, mlflow and wandb really wrote, read back with their own readers; nothing leaves."""

import json
import os
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, Job, make_job, prepared_job, rows_of, stopped_in_the_first_step

from tuner.errors import ConfigError, InterruptedRunError, ServiceError
from tuner.pipeline import tracking
from tuner.pipeline.run import preflight, train
from tuner.pipeline.tracking import check_trackers, settings, tracked
from tuner.runspec import Fetched, Prepared

pytestmark = pytest.mark.train

SECRET = "hunter2"
ARGUMENTS = {"max_steps": 4, "logging_steps": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.01}


@pytest.fixture(autouse=True)
def _no_trackers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("WANDB_", "MLFLOW_", "TENSORBOARD_", "KUBERNETES_"))]:
        monkeypatch.delenv(name)
    # wandb and mlflow look at the command line
    monkeypatch.setattr(sys, "argv", ["tuner", "run", "--data", f"https://example.org/t.parquet?sig={SECRET}"])


def job_of(directory: Path, *trackers: str, rows: int = 30, **written: Any) -> Job:
    config = {"TrainingArguments": ARGUMENTS | {"report_to": list(trackers)} | written}
    return make_job(directory, rows_of("messages", rows), config)


def run(job: Job, reporter: Any = None) -> tuple[Fetched, Prepared]:
    fetched, prepared = prepared_job(job)
    train(job.spec, fetched, prepared, job.work_dir, reporter or Heard())
    return fetched, prepared


def losses(job: Job) -> list[float]:
    """What our own metrics.jsonl says."""
    (path,) = job.work_dir.glob("adapter-*/metrics.jsonl")
    entries = [json.loads(line) for line in path.read_text().splitlines()]
    return [entry["loss"] for entry in entries if "loss" in entry]


def contents(directory: Path) -> dict[Path, bytes]:
    files = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file() and not path.is_symlink()}
    assert files
    return files


# ── what is written ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_reads_the_losses_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    job = job_of(tmp_path, "tensorboard")
    run(job)
    (directory,) = (job.work_dir / "tracking" / "tensorboard").iterdir()
    events = EventAccumulator(str(directory))
    events.Reload()
    assert [event.value for event in events.Scalars("train/loss")] == pytest.approx(losses(job))
    assert {"eval/loss", "eval/perplexity", "train/grad_norm", "train/learning_rate"} <= set(events.Tags()["scalars"])
    assert not any(SECRET.encode() in text for text in contents(directory).values())


def mlflow_history(job: Job, metric: str) -> list[tuple[int, float]]:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=(job.work_dir / "tracking" / "mlruns").absolute().as_uri())
    experiment = client.get_experiment_by_name(job.spec.name)
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])  # one run, however often it was interrupted
    assert found.info.status == "FINISHED"
    return sorted((each.step, each.value) for each in client.get_metric_history(found.info.run_id, metric))


def test_mlflow_reads_the_losses_back_from_a_file_store_and_a_resumed_run_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # for reading it
    job = job_of(tmp_path, "mlflow", eval_strategy="no")
    fetched, prepared = prepared_job(job)
    with stopped_in_the_first_step(), pytest.raises(InterruptedRunError):
        train(job.spec, fetched, prepared, job.work_dir, Heard())
    train(job.spec, fetched, prepared, job.work_dir, Heard())
    assert mlflow_history(job, "loss") == [(step, pytest.approx(loss)) for step, loss in enumerate(losses(job), 1)]
    assert [step for step, _ in mlflow_history(job, "eval_loss")] == [0, 4]
    assert not any(SECRET.encode() in text for text in contents(job.work_dir / "tracking").values())


def test_wandb_writes_offline_into_the_work_directory_and_no_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    job = job_of(tmp_path, "wandb")
    run(job)
    (directory,) = (job.work_dir / "tracking" / "wandb").glob("offline-run-*")
    (log,) = directory.glob("*.wandb")
    history = wandb_history(log)
    assert [entry["train/loss"] for entry in history if "train/loss" in entry] == pytest.approx(losses(job))
    assert any("eval/perplexity" in entry for entry in history)
    assert directory.name.endswith(f"{job.spec.name}-{trained_inputs(job)}")
    for path, text in contents(job.work_dir / "tracking").items():
        assert SECRET.encode() not in text, path


def trained_inputs(job: Job) -> str:
    return next(job.work_dir.glob("adapter-*")).name.removeprefix("adapter-")


def wandb_history(log: Path) -> list[dict[str, Any]]:
    from wandb.proto.wandb_internal_pb2 import Record

    entries = []
    for data in _leveldb_records(log.read_bytes()):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            entries.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    assert entries
    return entries


def _leveldb_records(text: bytes) -> Iterator[bytes]:
    """https://github.com/google/leveldb/blob/main/doc/log_format.md after wandb's seven bytes of its own."""
    at, record, block = 7, b"", 32768
    while at + 7 <= len(text):
        if block - at % block < 7:  # a block's end is filled up
            at += block - at % block
            continue
        length, kind = struct.unpack_from("<HB", text, at + 4)
        record += text[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield record
            record = b""


def test_the_environment_is_what_it_was(tmp_path: Path) -> None:
    job = job_of(tmp_path, "tensorboard")
    before = dict(os.environ)
    with tracked(job.spec, tmp_path, "run"):
        assert os.environ["TENSORBOARD_LOGGING_DIR"].startswith(str(tmp_path))
    assert dict(os.environ) == before


def test_a_run_that_reports_to_nobody_leaves_no_folder(tmp_path: Path) -> None:
    job = job_of(tmp_path)
    run(job)
    assert not (job.work_dir / "tracking").exists()


# ── what is missing ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_missing_package_is_found_before_any_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, "wandb", "mlflow")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ConfigError) as caught:
        preflight(job.spec, job.secrets, job.work_dir, Heard(), trains=False)
    said = [str(problem) for problem in caught.value.problems]
    assert said == [f"TrainingArguments.report_to: {name} is not installed" for name in ("wandb", "mlflow")]
    assert caught.value.problems[0].hint == "pip install 'tuner[track]'"


@pytest.mark.parametrize(
    ("env", "missing"),
    [
        ({}, True),
        ({"WANDB_API_KEY": "x"}, False),
        ({"WANDB_MODE": "offline"}, False),
        ({"WANDB_MODE": "disabled"}, False),
        ({"WANDB_MODE": "online"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),  # offline there
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "WANDB_MODE": "online"}, True),
        ({"HOME": "{home}"}, False),
        ({"HOME": "{home}", "WANDB_BASE_URL": "https://wandb.example.org"}, True),  # the key is for another
    ],
)
def test_a_key_that_is_missing_is_found_before_any_download(
    env: Mapping[str, str], missing: bool, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text(f"machine api.wandb.ai login user password {SECRET}\n")
    (tmp_path / ".netrc").chmod(0o600)
    job = job_of(tmp_path / "job", "wandb")
    env = {name: value.format(home=tmp_path) for name, value in env.items()}
    if not missing:
        check_trackers(job.spec.training, env)
        return
    with pytest.raises(ConfigError, match="wandb has no key") as caught:
        check_trackers(job.spec.training, env)
    assert "WANDB_API_KEY" in str(caught.value.hint)


def test_a_database_needs_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = job_of(tmp_path, "mlflow")
    monkeypatch.setattr(tracking, "find_spec", lambda name: None if name == "sqlalchemy" else object())
    with pytest.raises(ConfigError, match="a sqlite database, and sqlalchemy is not installed"):
        check_trackers(job.spec.training, {"MLFLOW_TRACKING_URI": f"sqlite:///{SECRET}.db"})
    check_trackers(job.spec.training, {"MLFLOW_TRACKING_URI": "https://mlflow.example.org"})


def test_what_the_user_set_wins_but_not_over_what_is_private(tmp_path: Path) -> None:
    job = job_of(tmp_path, "wandb")
    mine = {"WANDB_PROJECT": "mine", "MLFLOW_TRACKING_URI": "https://mlflow.example.org", "WANDB_X_DISABLE_META": "0"}
    found = settings(job.spec, tmp_path, "run", mine)
    assert found["WANDB_PROJECT"] == "mine"
    assert found["MLFLOW_TRACKING_URI"] == "https://mlflow.example.org"
    assert found["WANDB_X_DISABLE_META"] == "true"
    assert settings(job.spec, tmp_path, "run", {"KUBERNETES_SERVICE_HOST": "x"})["WANDB_MODE"] == "offline"


def test_a_server_that_is_down_stops_the_run_before_its_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_of(tmp_path, "mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    heard = Heard()
    with pytest.raises(ServiceError, match=r"report_to: mlflow: ") as caught:
        run(job, heard)
    assert caught.value.exit_code == 69
    assert not heard.steps
