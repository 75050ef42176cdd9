"""`tuner render`: YAML on stdout, talk on stderr, and quickly."""

import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from registries import make_certificate

from tuner.cli import main

WORKSPACES = Path(__file__).parent / "workspaces"
QUICK_START = str(WORKSPACES / "quick_start_filled.yaml")
IMAGE = ("--set-image", "reg.example/tuner:1")


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def test_stdout_is_what_kubectl_applies_and_notes_are_beside_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", QUICK_START, *IMAGE]) == 0
    out, err = capsys.readouterr()
    assert [each["kind"] for each in documents(out)] == ["ConfigMap", "Secret", "Job"]  # its URL has a query
    assert "note: checkpoints and adapter are in the pod" in err
    assert all(line.startswith("note: ") for line in err.splitlines())


def test_the_image_may_come_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["render", QUICK_START]) == 64
    assert "--set-image is missing" in capsys.readouterr().err
    monkeypatch.setenv("TUNER_IMAGE", "reg.example/tuner:2")
    assert main(["render", QUICK_START]) == 0
    assert "image: reg.example/tuner:2" in capsys.readouterr().out


def test_a_diff_shows_what_options_and_patches_change_and_no_more(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main(["render", QUICK_START, *IMAGE, "--diff"]) == 0
    assert capsys.readouterr().out == ""
    patch = tmp_path / "patch.yaml"
    patch.write_text("spec: {template: {spec: {containers: [{name: trainer, resources: {requests: {cpu: '8'}}}]}}}")
    assert main(["render", QUICK_START, *IMAGE, "--diff", "--patch", str(patch), "--queue", "gpus"]) == 0
    lines = capsys.readouterr().out.splitlines()
    changed = [line for line in lines if line.startswith(("+", "-")) and not line.startswith(("+++", "---"))]
    assert changed == ["+    kueue.x-k8s.io/queue-name: gpus", "-            cpu: '2'", "+            cpu: '8'"]


def test_the_check_job_stands_in_the_jobs_place(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["render", QUICK_START, *IMAGE, "--check-job"]) == 0
    config_map, _, check = documents(capsys.readouterr().out)
    assert config_map["kind"] == "ConfigMap"
    assert check["metadata"]["name"] == "workspace-tuning-phi-3--check"


def test_the_instance_type_of_the_old_quick_start_is_refused_with_another(capsys: pytest.CaptureFixture[str]) -> None:
    old = ["render", QUICK_START, *IMAGE, "--instance-type", "Standard_NC6s_v3"]
    assert main(old) == 78
    err = capsys.readouterr().err
    assert "--instance-type: Standard_NC6s_v3: V100-16 has compute capability 7.0" in err


def test_a_url_on_the_command_line_may_be_signed_and_a_file_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url = "https://data.contoso.com/train.parquet?sig=SIGNATURE"
    assert main(["render", QUICK_START, *IMAGE, "--data", url]) == 0
    out, err = capsys.readouterr()
    assert "SIGNATURE" not in out + err  # base64 in the Secret
    assert [each["kind"] for each in documents(out)] == ["ConfigMap", "Secret", "Job"]
    (tmp_path / "train.jsonl").write_text("{}")
    assert main(["render", QUICK_START, *IMAGE, "--data", str(tmp_path / "train.jsonl")]) == 78
    assert "names a file of one machine, which a pod cannot read" in capsys.readouterr().err


def test_files_that_are_named_go_into_the_config_map(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("training_config: {LoraConfig: {r: 4}}\n")
    ca = make_certificate(tmp_path).certificate
    assert main(["render", QUICK_START, *IMAGE, "--config", str(config), "--ca", str(ca)]) == 0
    data = documents(capsys.readouterr().out)[0]["data"]
    assert data["training_config.yaml"] == config.read_text()
    assert data["ca.crt"] == ca.read_text()


def test_render_imports_neither_torch_nor_a_client_and_is_quick() -> None:
    program = (
        "import sys, resource; from tuner.cli import main; "
        f"code = main({['render', QUICK_START, *IMAGE]!r}); "
        "print([name for name in ('torch', 'transformers', 'kubernetes', 'huggingface_hub', 'pyarrow', 'numpy') "
        "if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stderr.splitlines()[-1] == "[]"
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 2  # 0.4 on an idle core of 2024; a busy machine is no failure
