"""What need not wait for each other on the way to the first step does not, and each part is timed."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, make_job, prepared_job, rows_of

from tuner.errors import ConfigError
from tuner.pipeline.startup import TOTAL, StartUp, describe, process_start

CONFIG = {"TrainingArguments": {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}}


def test_the_process_started_before_now_and_not_long_ago() -> None:
    assert 0 < time.monotonic() - process_start() < 3600
    assert abs(process_start() - process_start()) < 0.1


def test_parts_are_added_up_until_the_first_step() -> None:
    startup = StartUp(began=time.monotonic() - 10)
    startup.add("imports", 1.0)
    startup.add("imports", 0.5)
    startup.add("step", 2.0)
    seconds = startup.first_step()
    assert (seconds["imports"], seconds["step"]) == (1.5, 2.0)
    assert 10 <= seconds[TOTAL] < 11
    startup.add("imports", 9.0)
    assert startup.first_step() == seconds
    assert describe(seconds) == "first step after 10.0 s: imports 1.5, step 2.0 (parts overlap)"


@pytest.mark.train
def test_the_base_is_loaded_while_rows_are_tokenized_and_trains_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.pipeline import model, run
    from tuner.pipeline.adapter import file_digests

    tokenizing, loaded_in = threading.Event(), []
    load = model.load_base_model

    def slow_load(*arguments: Any, **named: Any) -> Any:
        loaded_in.append(threading.current_thread())
        assert tokenizing.wait(30), "prepare did not run beside it"
        return load(*arguments, **named)

    prepare = run.prepare

    def noted_prepare(*arguments: Any, **named: Any) -> Any:
        tokenizing.set()
        return prepare(*arguments, **named)

    weights = []
    for beside in (True, False):
        job = make_job(tmp_path / str(beside), rows_of("messages", 24), CONFIG)
        heard = Heard()
        if beside:
            monkeypatch.setattr(model, "load_base_model", slow_load)
            monkeypatch.setattr(run, "prepare", noted_prepare)
            run.run(job.spec, job.secrets, job.work_dir, heard, on_stage=lambda _: None)
            monkeypatch.undo()
        else:
            fetched, prepared = prepared_job(job)
            run.train(job.spec, fetched, prepared, job.work_dir, heard)
        trained = run.Trained.load(job.work_dir / "trained.json")
        weights.append(file_digests(job.work_dir / trained.adapter_dir)["adapter_model.safetensors"])
        assert trained.startup[TOTAL] > 0
        assert {"model", "levers", "step"} <= trained.startup.keys()
        assert trained.levers["packing"] == "on"
        (line,) = [note for note in heard.notes if note.startswith("first step after")]
        assert ("weights" in line) is beside
    assert loaded_in[0] is not threading.main_thread()
    assert weights[0] == weights[1]


@pytest.mark.train
def test_what_loading_ahead_raises_is_raised_where_the_model_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.pipeline import model, run

    def refused(*_: Any, **__: Any) -> Any:
        raise ConfigError("bitsandbytes refuses")

    monkeypatch.setattr(model, "load_base_model", refused)
    job = make_job(tmp_path, rows_of("messages", 24), CONFIG)
    stages: list[str] = []
    with pytest.raises(ConfigError, match="bitsandbytes refuses"):
        run.run(job.spec, job.secrets, job.work_dir, Heard(), on_stage=stages.append)
    assert stages[-1] == "train"
