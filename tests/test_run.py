"""The whole story: a Workspace's run in one process and in five, and what a second run does not do again."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, Job, make_job, rows_of

from tuner.errors import ConfigError, DataError, GateError, InputMissingError
from tuner.levers import LEVERS
from tuner.pipeline.run import run, run_stage
from tuner.presets import load_presets
from tuner.runspec import STAGES, Fetched, Prepared, RunResult, Trained

pytestmark = pytest.mark.train

SHORT = {"TrainingArguments": {"max_steps": 4, "learning_rate": 0.02, "gradient_accumulation_steps": 2}}


def job_with_image(directory: Path, config: Any = SHORT, **request: Any) -> Job:
    return make_job(directory, rows_of("messages", 40), config, output=f"oci:{directory}/image:1", **request)


def run_whole(job: Job, reporter: Heard | None = None) -> RunResult:
    return run(job.spec, job.secrets, job.work_dir, reporter or Heard(), on_stage=lambda stage: None)


def layout_digest_of(directory: Path) -> str:
    (manifest,) = json.loads((directory / "image" / "index.json").read_text())["manifests"]
    return str(manifest["digest"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, RunResult]:
    job = job_with_image(tmp_path_factory.mktemp("whole"))
    return job, run_whole(job)


def test_a_run_ends_with_an_image_by_its_digest(finished: tuple[Job, RunResult]) -> None:
    job, result = finished
    assert result.image.endswith(layout_digest_of(job.work_dir.parent))
    assert result.steps == 4
    assert result.train_loss < 10
    assert result.eval_loss is not None
    assert result.eval_loss_before is not None
    assert result.eval_loss < result.eval_loss_before


def test_five_stages_through_their_files_give_the_same_image(finished: tuple[Job, RunResult], tmp_path: Path) -> None:
    _, whole = finished
    job = job_with_image(tmp_path)
    for stage in STAGES:
        said = run_stage(stage, job.spec, job.secrets, job.work_dir, Heard())
    assert str(said["image"]).rpartition("@")[2] == whole.image.rpartition("@")[2]
    for kind, name in ((Fetched, "fetched.json"), (Prepared, "prepared.json"), (Trained, "trained.json")):
        assert kind.load(job.work_dir / name).run_digest == job.spec.digest


def test_a_second_run_elsewhere_gives_the_same_bytes(finished: tuple[Job, RunResult], tmp_path: Path) -> None:
    job, whole = finished
    other = job_with_image(tmp_path)
    again = run_whole(other)
    assert again.image.rpartition("@")[2] == whole.image.rpartition("@")[2]
    one, two = (Trained.load(each.work_dir / "trained.json") for each in (job, other))
    assert one.files == two.files
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "metrics.jsonl"} <= set(one.files)


def test_a_finished_adapter_is_not_trained_again(finished: tuple[Job, RunResult]) -> None:
    job, whole = finished
    heard = Heard()
    again = run_whole(job, heard)
    assert any("already trained" in line for line in heard.notes)
    assert not heard.steps
    assert again.image == whole.image


def test_an_adapter_whose_files_changed_is_trained_again(tmp_path: Path) -> None:
    job = job_with_image(tmp_path)
    first = run_whole(job)
    trained = Trained.load(job.work_dir / "trained.json")
    (job.work_dir / trained.adapter_dir / "adapter_model.safetensors").write_bytes(b"damaged")
    heard = Heard()
    assert run_whole(job, heard).image == first.image
    assert not any("already trained" in line for line in heard.notes)


def test_another_config_in_the_same_work_directory_leaves_the_first_adapter_alone(tmp_path: Path) -> None:
    one = job_with_image(tmp_path)
    run_whole(one)
    first = Trained.load(one.work_dir / "trained.json")
    other = job_with_image(tmp_path, {"TrainingArguments": SHORT["TrainingArguments"] | {"max_steps": 2}})
    assert run_whole(other).steps == 2
    second = Trained.load(other.work_dir / "trained.json")
    assert second.adapter_dir != first.adapter_dir
    assert (one.work_dir / first.adapter_dir / "adapter_model.safetensors").is_file()


def test_stages_of_another_run_or_out_of_order_are_refused(tmp_path: Path) -> None:
    one = job_with_image(tmp_path)
    one.work_dir.mkdir()
    with pytest.raises(InputMissingError, match=r"fetched\.json"):
        run_stage("prepare", one.spec, one.secrets, one.work_dir, Heard())
    run_stage("fetch", one.spec, one.secrets, one.work_dir, Heard())
    other = job_with_image(tmp_path, {"TrainingArguments": {"max_steps": 2}})
    with pytest.raises(ConfigError, match=r"fetched\.json is of run"):
        run_stage("prepare", other.spec, other.secrets, other.work_dir, Heard())


def test_a_directory_as_the_destination_gets_the_files(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows_of("prompt/completion", 30), SHORT, output=str(tmp_path / "adapter"))
    assert run_whole(job).image == str(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"


@pytest.mark.gpu
def test_a_whole_run_on_this_gpu(tmp_path: Path) -> None:
    """Levers measured, memory probed, trained, packaged; and once more, with the same losses but for rounding."""
    losses = []
    for place in (tmp_path / "one", tmp_path / "two"):
        job = job_with_image(place)
        result = run_whole(job)
        assert result.image.endswith(layout_digest_of(place))
        trained = Trained.load(job.work_dir / "trained.json")
        assert trained.levers["memory-probe"] == "on"
        assert set(trained.levers) == set(LEVERS)
        assert trained.startup["levers"] > 0
        losses.append([result.train_loss, result.eval_loss_before, result.eval_loss])
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


# ── gates ────────────────────────────────────────────────────────────────────────────────────────────────────────────

HOPELESS, EASY = "eval_loss <= 0.01 * base", "eval_loss <= 1.5 * base"


def test_a_gate_that_is_not_passed_keeps_the_adapter_pushes_nothing_and_shows_the_numbers(tmp_path: Path) -> None:
    job = job_with_image(tmp_path, require=(EASY, HOPELESS))
    with pytest.raises(GateError) as caught:
        run_whole(job)
    trained = Trained.load(job.work_dir / "trained.json")
    adapter_dir = job.work_dir / trained.adapter_dir
    assert (adapter_dir / "adapter_model.safetensors").is_file()
    assert not (tmp_path / "image" / "index.json").exists()
    assert caught.value.exit_code == 76
    assert f"eval_loss {trained.eval_loss_after:.6g}, base {trained.eval_loss_before:.6g}" in caught.value.message
    assert EASY not in caught.value.message
    assert f"tuner push {adapter_dir} oci:{tmp_path}/image:1" in str(caught.value.hint)
    # as a stage of its own, and at the push too: a retried push must not slip through
    for stage in ("train", "push"):
        with pytest.raises(GateError):
            run_stage(stage, job.spec, job.secrets, job.work_dir, Heard())


def test_another_gate_does_not_train_again_and_changes_no_byte(finished: tuple[Job, RunResult], tmp_path: Path) -> None:
    strict = job_with_image(tmp_path, require=(HOPELESS,))
    with pytest.raises(GateError):
        run_whole(strict)
    lenient = job_with_image(tmp_path, require=(EASY,))
    assert lenient.spec.digest == strict.spec.digest
    heard = Heard()
    result = run_whole(lenient, heard)
    assert not heard.steps
    assert any(line.startswith(f"gate passed: {EASY}: ") for line in heard.notes)
    assert result.image.rpartition("@")[2] == finished[1].image.rpartition("@")[2]


def test_a_smoke_run_says_its_gates_and_passes(tmp_path: Path) -> None:
    heard = Heard()
    run_whole(job_with_image(tmp_path, {}, smoke=True, require=(HOPELESS,)), heard)
    assert any(line.startswith(f"gate not passed: {HOPELESS}") for line in heard.notes)


def test_a_gate_on_held_out_rows_without_any_is_said_before_training(tmp_path: Path) -> None:
    job = make_job(tmp_path, rows_of("messages", 8), SHORT, output=str(tmp_path / "adapter"), require=(EASY,))
    heard = Heard()
    with pytest.raises(DataError, match="needs held-out rows, and of 8 rows none is held out"):
        run_whole(job, heard)
    assert not heard.steps


def test_there_are_presets() -> None:
    assert len(load_presets()) > 10


@pytest.mark.parametrize("preset", load_presets())
def test_every_preset_runs_under_smoke(preset: str, tmp_path: Path) -> None:
    """KAITO faults 2, 19, 20: half of its presets cannot be tuned with its own defaults."""
    job = job_with_image(tmp_path, {}, preset=preset, smoke=True)
    result = run_whole(job)
    assert result.steps == 4
    trained = Trained.load(job.work_dir / "trained.json")
    assert set(trained.modules) == set(job.spec.preset.linear_modules)
    config = json.loads((job.work_dir / trained.adapter_dir / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None
    lock = json.loads((job.work_dir / trained.adapter_dir / "run.lock.json").read_text())
    assert lock["smoke"] is True
    assert lock["rows"]["smoke_unused"] == 0
    assert "Smoke run" in (job.work_dir / trained.adapter_dir / "README.md").read_text()


def test_two_runs_do_not_work_in_one_directory(tmp_path: Path) -> None:
    from tuner.pipeline.run import _alone_in

    with (
        _alone_in(tmp_path),
        pytest.raises(ConfigError, match="another tuner run is at work in it"),
        _alone_in(tmp_path),
    ):
        raise AssertionError("never here")
    with _alone_in(tmp_path):
        pass


def test_a_program_may_call_run_in_any_thread(tmp_path: Path) -> None:
    """Only the main thread can hear signals; that is no reason not to train in another."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(run_whole, job_with_image(tmp_path)).result().steps == 4


def test_an_output_directory_with_somebodys_files_is_left_alone(tmp_path: Path) -> None:
    from tuner.pipeline.run import _check_only_ours

    (tmp_path / "README.md").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match="not an adapter of ours"):
        _check_only_ours(tmp_path, Heard())
    (tmp_path / "run.lock.json").write_text("{}", encoding="utf-8")
    heard = Heard()
    _check_only_ours(tmp_path, heard)
    assert "will be replaced" in heard.notes[0]
    (tmp_path / "thesis.tex").write_text("mine", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        _check_only_ours(tmp_path, Heard())


_AS_COMMAND = """
from tuner.__main__ import main

sys.argv = ["tuner", *sys.argv[1:]]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""
_FROM_A_PROGRAM = """
import huggingface_hub.constants
from tuner.cli import main

assert main(sys.argv[1:]) == 0
"""
_TOLD = """
import sys, threading
{run}
from huggingface_hub import constants
from trl.trainer import base_trainer

print(constants.HF_HUB_DISABLE_TELEMETRY, [one.name for one in threading.enumerate() if "telemetry" in one.name])
"""


@pytest.mark.train
@pytest.mark.parametrize("run", [_AS_COMMAND, _FROM_A_PROGRAM], ids=["as a command", "from a program"])
def test_a_run_tells_nobody_of_itself(run: str, tmp_path: Path) -> None:
    """TRL sends a line about each trainer, unless it is told not to or runs in CI."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"a{n}", "completion": f"b{n}"}) + "\n" for n in range(8)))
    words = [
        "run",
        "--smoke",
        "--model",
        "phi-3-mini-4k-instruct",
        "--data",
        str(rows),
        "--output",
        str(tmp_path / "o"),
    ]
    environment = {name: value for name, value in os.environ.items() if name not in ("CI", "DO_NOT_TRACK")}
    done = subprocess.run(
        [sys.executable, "-c", _TOLD.replace("{run}", run), *words, "--work-dir", str(tmp_path / "w")],
        env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.stdout.splitlines()[-1] == "True []", done.stderr[-2000:]
