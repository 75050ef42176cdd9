"""A run whose machine loses its power at any moment: a checkpoint or the adapter is there, and never half a result."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from power_cuts import SYNCED, Cut, Disk, Seen
from tiny import Heard, Job, make_job, rows_of

from tuner.pipeline.adapter import file_digests
from tuner.pipeline.checkpoints import by_step, is_whole
from tuner.pipeline.run import check_destination, checkpoints_of, finished_adapter, inputs_digest, run
from tuner.runspec import DirectoryDestination, Fetched, Prepared, RunSpec, Secrets, Trained

pytestmark = pytest.mark.train

STEPS = 3
CONFIG = {
    "TrainingArguments": {"max_steps": STEPS, "save_steps": 1, "learning_rate": 0.02, "gradient_accumulation_steps": 2}
}


@dataclass(frozen=True)
class Recorded:
    """A whole run, every moment of it, and what it has left in the end."""

    job: Job
    disk: Disk
    inputs: str
    files: dict[str, str]
    directory: Path

    def after_power_cuts(self, look: Callable[[Path], Seen]) -> list[tuple[Cut, Seen]]:
        return self.disk.after_power_cuts(look, self.directory, random_ones=1)

    def step(self, root: Path) -> int:
        """After which step a run would go on; 0 without a whole checkpoint."""
        directory = checkpoints_of(self.inputs, root / "work", 1)
        return max((step for step, checkpoint in by_step(directory).items() if is_whole(checkpoint)), default=0)

    def spec_for(self, root: Path) -> RunSpec:
        """The same run, whose output is in the directory that is left."""
        return self.job.spec.model_copy(update={"destination": DirectoryDestination(path=str(root / "adapter"))})


@pytest.fixture(scope="module")
def recorded() -> Iterator[Recorded]:
    # In memory: thousands of links, and no fsync of this disk has to be real.
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as name:
        directory = Path(name)
        root = directory / "disk"
        root.mkdir()
        made = make_job(directory / "job", rows_of("messages", 24), CONFIG, output=str(root / "adapter"))
        job = Job(made.spec, made.secrets, root / "work")
        with Disk(root, directory / "store") as disk:
            run(job.spec, job.secrets, job.work_dir, Heard(), on_stage=lambda stage: None)
        inputs = inputs_digest(Fetched.load(job.work_dir / "fetched.json"))
        yield Recorded(job, disk, inputs, file_digests(root / "adapter"), directory)


def test_no_power_cut_takes_back_a_step_that_was_saved(recorded: Recorded) -> None:
    """From the first checkpoint on there is one of that step or a later one, or the finished adapter."""

    def look(root: Path) -> int:
        return STEPS + 1 if finished_adapter(recorded.inputs, root / "work") else recorded.step(root)

    found = recorded.after_power_cuts(look)
    saved = 0
    for cut, step in found:
        if cut.kept == SYNCED:
            saved = max(saved, step)
        assert step >= saved, cut
    assert {step for cut, step in found if cut.kept == SYNCED} == {*range(STEPS + 2)}
    assert saved == STEPS + 1


def test_an_output_directory_that_readers_take_for_an_adapter_has_all_of_it(recorded: Recorded) -> None:
    """And however little is there, the same command may go on with it."""

    def look(root: Path) -> dict[str, str]:
        check_destination(recorded.spec_for(root).destination, recorded.job.spec, Secrets(), Heard())
        return file_digests(root / "adapter")

    found = recorded.after_power_cuts(look)
    for cut, files in found:
        assert "adapter_config.json" not in files or files == recorded.files, cut
        assert not cut.is_last or files == recorded.files, cut
    assert {len(files) for _, files in found} == {*range(len(recorded.files) + 1)}


def test_what_a_stage_says_it_has_left_is_there(recorded: Recorded) -> None:
    made = {**file_digests(recorded.job.work_dir / "prepared")}
    tokens = {name: digest for name, digest in made.items() if name.endswith(".arrow")}
    assert tokens

    def look(root: Path) -> tuple[bool, bool]:
        prepared, trained = root / "work/prepared.json", root / "work/trained.json"
        if prepared.exists():
            assert Prepared.load(prepared).run_digest == recorded.job.spec.digest
            assert file_digests(root / "work/prepared").items() >= tokens.items()
            tokenizer = file_digests(root / "work/prepared/tokenizer")
            assert tokenizer == file_digests(recorded.job.work_dir / "prepared/tokenizer")
        if trained.exists():
            said = Trained.load(trained)
            assert file_digests(root / "work" / said.adapter_dir) == said.files
        return prepared.exists(), trained.exists()

    assert {left for _, left in recorded.after_power_cuts(look)} == {(False, False), (True, False), (True, True)}


@pytest.mark.parametrize(
    "operation", ["checkpoint-2/.seal.json.tmp", "work/.trained.json.tmp", "adapter/.adapter_model.safetensors.tmp"]
)
def test_after_a_power_cut_the_same_command_ends_in_the_same_bytes(
    operation: str, recorded: Recorded, tmp_path: Path
) -> None:
    """Where least is left: before a checkpoint is sealed, before trained.json is there, in the middle of copying."""
    about = (cut for cut in recorded.disk.cuts() if cut.operation.startswith("fsync") and cut.kept == SYNCED)
    cut = next(cut for cut in about if cut.operation.endswith(operation))
    cut.make(recorded.directory / tmp_path.name)
    root = shutil.copytree(recorded.directory / tmp_path.name, tmp_path / "left")
    run(recorded.spec_for(root), recorded.job.secrets, root / "work", Heard(), on_stage=lambda stage: None)
    assert file_digests(root / "adapter") == recorded.files
