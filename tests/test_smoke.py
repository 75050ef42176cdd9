"""What a user puts into their CI: `tuner run --smoke`, for every preset, and the five stages as five processes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from data_files import message_rows, write_data

from tuner.cli import main
from tuner.presets import load_presets
from tuner.runspec import STAGES

pytestmark = pytest.mark.train

PRESETS = sorted(load_presets())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "train.parquet"
    write_data(path, message_rows(60))
    return path


def last_line(text: str) -> str:
    return text.strip().splitlines()[-1]


def layout_manifest(work_dir: Path) -> dict[str, Any]:
    index = json.loads((work_dir / "image/index.json").read_text("utf-8"))
    digest = index["manifests"][0]["digest"].removeprefix("sha256:")
    return json.loads((work_dir / "image/blobs/sha256" / digest).read_text("utf-8"))


def test_there_are_presets() -> None:
    assert len(PRESETS) >= 10


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_runs_with_smoke_and_names_no_hub_id(
    preset: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """KAITO faults 1, 2, 19 and 20: presets that adapt a third of their layers, or none, or crash the controller."""
    work_dir = tmp_path / "work"
    assert main(["run", "--smoke", "--model", preset, "--data", str(data), "--work-dir", str(work_dir)]) == 0
    said = capsys.readouterr()
    image = last_line(said.out)
    assert image.startswith(f"oci:{work_dir}/image:smoke@sha256:")
    adapter = json.loads(next(work_dir.glob("adapter-*/adapter_config.json")).read_text("utf-8"))
    assert set(adapter["target_modules"]) == set(load_presets()[preset].linear_modules)
    assert adapter["base_model_name_or_path"] is None
    annotations = layout_manifest(work_dir)["annotations"]
    assert annotations["sh.kaito.model.name"] == preset
    assert annotations["tuner.smoke"] == "true"
    assert load_presets()[preset].model_id not in json.dumps(annotations)


@pytest.fixture
def workspace(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "workspace.yaml"
    path.write_text(
        f"""\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {{name: five}}
resource: {{labelSelector: {{matchLabels: {{app: five}}}}}}
tuning:
  preset: {{name: phi-3-mini-4k-instruct}}
  method: qlora
  input: {{urls: ["{data}"]}}
  output: {{image: "registry.example.com/five:1"}}
""",
        encoding="utf-8",
    )
    return path


def stage(name: str, spec: Path, work_dir: Path) -> tuple[int, dict[str, Any]]:
    """Exit code and StageResult of one stage in a process of its own."""
    command = [sys.executable, "-m", "tuner", "stage", name, "--spec", str(spec), "--secrets", f"{spec}.secrets"]
    done = subprocess.run([*command, "--work-dir", str(work_dir)], capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(last_line(done.stdout))


def test_the_five_stages_as_five_processes_push_the_same_digest(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [str(workspace), "--smoke", "--output", f"oci:{tmp_path}/image:five"]
    assert main(["run", *flags, "--work-dir", str(tmp_path / "one")]) == 0
    in_one_process = last_line(capsys.readouterr().out)
    spec = tmp_path / "spec.json"
    assert main(["check", *flags, "--work-dir", str(tmp_path / "check"), "--write-spec", str(spec)]) == 0
    results = [stage(name, spec, tmp_path / "five") for name in STAGES]
    assert [(code, result["stage"]) for code, result in results] == [(0, name) for name in STAGES]
    assert results[-1][1]["values"]["image"] == in_one_process


def test_a_stage_whose_predecessor_did_not_run_says_so(workspace: Path, tmp_path: Path) -> None:
    spec = tmp_path / "spec.json"
    flags = [str(workspace), "--smoke", "--no-preflight", "--work-dir", str(tmp_path / "work")]
    assert main(["check", *flags, "--write-spec", str(spec)]) == 0
    code, result = stage("train", spec, tmp_path / "work")
    assert (code, result["exit_code"], result["reason"]) == (66, 66, "InputMissingError")
    assert "fetched.json" in result["message"]
