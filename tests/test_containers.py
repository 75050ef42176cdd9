"""What a container of a pod looks at, and what it leaves alone."""

from pathlib import Path

import pytest
from power_cuts import Disk
from test_cluster_job import CLAIM, workspace

from tuner import pod
from tuner.pipeline.adapter import file_digests
from tuner.pipeline.containers import Container, Push
from tuner.pipeline.run import inputs_digest
from tuner.request import Request, build_run
from tuner.runspec import DirectoryDestination, Fetched, FetchedFile, RunSpec, Silent, Trained
from tuner.workspace import parse_objects


def test_where_the_results_volume_is_not_mounted_an_output_volume_is_not_looked_at() -> None:
    """The check Job: its root is read-only, and a look would end in "cannot be written"."""
    file = parse_objects(workspace(tuning={"output": {"volumeSource": CLAIM}}))
    request = Request(place="pod", smoke=True, preflight=False)
    spec = build_run(file, request, Path("nowhere"), {}).spec
    assert not pod.RESULTS_DIR.exists()
    for destination in (spec.destination, DirectoryDestination(path=str(pod.RESULTS_DIR))):
        looked: RunSpec = spec.model_copy(update={"destination": destination})
        Container(looked, {}, Silent(), lambda stage: None).preflight()
    assert not pod.RESULTS_DIR.exists()


def test_after_a_power_cut_kaitos_sentinel_stands_beside_the_whole_adapter_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even an earlier run's sentinel comes back beside half of this one's files."""
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(pod, "results_dir", lambda spec: results)
    request = Request(place="pod", smoke=True, preflight=False)
    built = build_run(parse_objects(workspace(tuning={"output": {"volumeSource": CLAIM}})), request, results, {}).spec
    spec = built.model_copy(update={"destination": DirectoryDestination(path=str(results))})
    container = Container(spec, {}, Silent(), lambda stage: None)
    for name in ("adapter_config.json", "run.lock.json"):
        (results / name).write_text("an earlier run's")
    earlier = file_digests(results)
    (results / pod.SENTINEL).touch()
    trained = finished_adapter(spec, container.work_dir)
    with Disk(results, tmp_path / "store") as disk:
        container.prepare()
        container.push(Push())

    def look(root: Path) -> tuple[bool, str]:
        files = {name: digest for name, digest in file_digests(root).items() if name in trained.files}
        whose = "earlier" if files == earlier else "new" if files == trained.files else "mixed"
        return (root / pod.SENTINEL).is_file(), whose

    found = disk.after_power_cuts(look, tmp_path)
    assert {left for _, left in found} == {
        (True, "earlier"),
        (False, "earlier"),
        (False, "mixed"),
        (False, "new"),
        (True, "new"),
    }
    assert {left for cut, left in found if cut.is_last} == {(True, "new")}


def finished_adapter(spec: RunSpec, work_dir: Path) -> Trained:
    """What train leaves."""
    adapter = work_dir / "adapter"
    adapter.mkdir(parents=True)
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors", "run.lock.json"):
        (adapter / name).write_text(name)
    file = FetchedFile(source="data", path="data", sha256="0", size_bytes=1)
    fetched = Fetched(run_digest=spec.digest, files=(file,), base_model=None)
    fetched.save(work_dir / "fetched.json")
    trained = Trained(
        run_digest=spec.digest,
        inputs_digest=inputs_digest(fetched),
        adapter_dir="adapter",
        files=file_digests(adapter),
        steps=1,
        epochs=1.0,
        examples=1,
        tokens=1,
        train_seconds=1.0,
        first_train_loss=1.0,
        last_train_loss=1.0,
        eval_loss_before=None,
        eval_loss_after=None,
        train_rows=1,
        eval_rows=0,
        kept_step=1,
        modules={},
        trainable_parameters=1,
        total_parameters=1,
    )
    trained.save(work_dir / "trained.json")
    return trained
