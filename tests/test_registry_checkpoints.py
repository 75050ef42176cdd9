"""A run's newest checkpoint in the registry: what goes there, what comes back, and what costs no run."""

import json
import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from registries import docker_config
from test_cluster_job import workspace
from tiny import Heard, make_job, rows_of, stopped_in_the_first_step

from tests.fake_registry import FakeRegistry, fake_registry
from tuner.cli import main
from tuner.errors import InterruptedRunError, ServiceError
from tuner.open_files import OpenDirectory, OpenFile
from tuner.pipeline.checkpoints import CHECKPOINTS, LEVERS, is_whole, seal, sealed_files
from tuner.pipeline.registry_checkpoints import Uploads, checkpoint_reference, restore
from tuner.request import Request, build_run
from tuner.runspec import ImageDestination, Network, RunSpec, Secrets
from tuner.workspace import parse_objects

FOLDER = "0123456789ab-2"
OPEN = Network(plain_http=True, allow_private_urls=True)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


def spec_of(registry: FakeRegistry, **changes: object) -> RunSpec:
    run = build_run(parse_objects(workspace()), Request(place="pod"), Path("nowhere"), {})
    destination = ImageDestination(reference=f"{registry.host}/adapters/tickets:1")
    return run.spec.model_copy(update={"destination": destination, "network": OPEN, **changes})


def secrets_of(registry: FakeRegistry) -> Secrets:
    return Secrets(docker_configs=(docker_config(registry.host),))


def write_docker_config(directory: Path, registry: FakeRegistry) -> Path:
    path = directory / "config.json"
    path.write_text(docker_config(registry.host))
    return path


def checkpoint(work_dir: Path, step: int) -> Path:
    """A sealed one, beside what was decided when the run began."""
    folder = work_dir / CHECKPOINTS / FOLDER
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (folder / LEVERS).write_text('{"tokens": 512}')
    (made / "optimizer.pt").write_bytes(bytes(1000) + str(step).encode())
    (made / "adapter_model.safetensors").write_bytes(b"weights of " + str(step).encode())
    seal(made, unlogged_loss=0.0, last_logged_step=step)
    return made


def uploads(registry: FakeRegistry, work_dir: Path, heard: Heard | None = None) -> Uploads:
    return Uploads(
        spec_of(registry), partial(OpenDirectory.at, work_dir), lambda: secrets_of(registry), heard or Heard()
    )


def tags(registry: FakeRegistry) -> list[str]:
    repository = registry.repositories.get("adapters/tickets")
    return sorted(repository.tags) if repository else []


def test_the_newest_checkpoint_goes_there_and_comes_back(registry: FakeRegistry, tmp_path: Path) -> None:
    checkpoint(tmp_path / "one", 5)
    newest = checkpoint(tmp_path / "one", 40)
    (tmp_path / "one" / CHECKPOINTS / FOLDER / "checkpoint-45").mkdir()  # begun
    heard = Heard()
    uploads(registry, tmp_path / "one", heard).look()
    assert any(line.startswith("checkpoint-40 is in the registry") for line in heard.notes)
    assert [path.name for path in (tmp_path / "one").iterdir()] == [CHECKPOINTS]

    spec = spec_of(registry)
    assert tags(registry) == [f"checkpoint-{spec.digest[7:19]}"]
    assert restore(spec, secrets_of(registry), tmp_path / "two", Heard()) == 40
    back = tmp_path / "two" / CHECKPOINTS / FOLDER / "checkpoint-40"
    assert is_whole(back)
    assert {path.name: path.read_bytes() for path in back.iterdir()} == {
        path.name: path.read_bytes() for path in newest.iterdir()
    }
    assert json.loads((back.parent / LEVERS).read_text()) == {"tokens": 512}
    assert [path.name for path in (tmp_path / "two").iterdir()] == [CHECKPOINTS]


def test_each_checkpoint_is_sent_once_and_only_what_is_new(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.pipeline.registry_checkpoints._LOOK_EACH_S", 0)
    heard = Heard()
    ours = uploads(registry, tmp_path, heard)
    ours.look()
    assert not registry.log  # nothing to send
    checkpoint(tmp_path, 5)
    ours.look()
    asked = len(registry.log)
    ours.look()
    assert len(registry.log) == asked
    checkpoint(tmp_path, 10)
    ours.look()
    assert len([line for line in heard.notes if "is in the registry" in line]) == 2
    assert restore(spec_of(registry), secrets_of(registry), tmp_path / "new", Heard()) == 10


def test_a_registry_that_is_down_is_a_warning_to_the_pusher_and_an_error_to_the_next_pod(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on without it; beginning anew because of a passing fault would cost hours."""
    monkeypatch.setattr("tuner.pipeline.registry_checkpoints._WITHIN_S", 0.5)
    checkpoint(tmp_path / "one", 5)
    registry.answers += [(method, "/v2/", 503) for method in ("GET", "HEAD", "POST") for _ in range(50)]
    heard = Heard()
    ours = uploads(registry, tmp_path / "one", heard)
    ours.look()
    assert len(heard.warnings) == 1
    assert "checkpoint-5 could not be kept in the registry" in heard.warnings[0]
    ours.look()
    assert len(heard.warnings) == 1  # not again at once
    with pytest.raises(ServiceError):
        restore(spec_of(registry), secrets_of(registry), tmp_path / "two", Heard())


def test_what_the_trainer_takes_away_meanwhile_is_not_missed(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = checkpoint(tmp_path, 5)

    def gone(directory: OpenDirectory) -> dict[str, OpenFile] | None:
        files = sealed_files(directory)
        shutil.rmtree(made)
        return files

    monkeypatch.setattr("tuner.pipeline.registry_checkpoints.sealed_files", gone)
    heard = Heard()
    uploads(registry, tmp_path, heard).look()
    assert not heard.warnings
    assert restore(spec_of(registry), secrets_of(registry), tmp_path / "new", heard) == 5  # it was held open


def test_a_checkpoint_of_another_run_or_a_damaged_one_is_as_good_as_none(
    registry: FakeRegistry, tmp_path: Path
) -> None:
    made = checkpoint(tmp_path / "one", 5)
    uploads(registry, tmp_path / "one").look()
    spec = spec_of(registry)
    repository = registry.repositories["adapters/tickets"]
    (tag,) = repository.tags
    other = spec_of(registry, smoke=True)
    repository.tags[str(checkpoint_reference(other).tag)] = repository.tags[tag]
    assert restore(other, secrets_of(registry), tmp_path / "other", Heard()) is None

    (made / "optimizer.pt").write_bytes(b"damaged")  # after it was sealed
    files = {f"{made.name}/{path.name}": OpenFile.at(path) for path in made.iterdir()}
    uploads(registry, tmp_path / "one")._push(5, FOLDER, files, 60)
    heard = Heard()
    assert restore(spec, secrets_of(registry), tmp_path / "two", heard) is None
    assert "not a whole checkpoint of this run: beginning anew" in heard.warnings[0]
    assert not (tmp_path / "two" / CHECKPOINTS).exists()


def test_one_that_is_there_already_is_not_fetched(registry: FakeRegistry, tmp_path: Path) -> None:
    """A container that is started again in the same pod."""
    checkpoint(tmp_path, 5)
    assert restore(spec_of(registry), secrets_of(registry), tmp_path, Heard()) is None
    assert not registry.log


def test_when_the_adapter_is_pushed_it_is_deleted_where_that_is_allowed(registry: FakeRegistry, tmp_path: Path) -> None:
    checkpoint(tmp_path, 5)
    heard = Heard()
    ours = uploads(registry, tmp_path, heard)
    ours.look()
    ours.forget()
    assert not tags(registry)
    assert not any("of no use any more" in line for line in heard.notes)

    again = uploads(registry, tmp_path, heard)
    again.look()
    registry.answers.append(("DELETE", "/manifests/", 405))
    again.forget()
    reference = checkpoint_reference(spec_of(registry))
    assert f"{reference} is of no use any more; the registry lets nobody delete it with this Secret" in heard.notes


# ── on a box ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.train
def test_a_run_whose_machine_is_lost_goes_on_on_another_one(registry: FakeRegistry, tmp_path: Path) -> None:
    from tuner.pipeline.run import run

    job = make_job(
        tmp_path / "job",
        rows_of("messages", 30),
        {"TrainingArguments": {"max_steps": 6, "logging_steps": 1, "learning_rate": 0.01}},
        output=f"{registry.host}/adapters/tickets:1",
        docker_config=write_docker_config(tmp_path, registry),
        network=OPEN,
    )

    def attempt(name: str, keeps: bool = True) -> tuple[Heard, str]:
        heard = Heard()
        result = run(
            job.spec, job.secrets, tmp_path / name, heard, on_stage=lambda stage: None, registry_checkpoints=keeps
        )
        return heard, result.image.rpartition("@")[2]

    with stopped_in_the_first_step(), pytest.raises(InterruptedRunError):
        attempt("lost")
    (tag,) = tags(registry)
    assert tag.startswith("checkpoint-")
    heard, digest = attempt("another")
    assert "the checkpoint of step 1 is back from the registry" in heard.notes
    assert "resuming after step 1 of 6" in heard.notes
    assert tags(registry) == ["1"]
    assert attempt("unbroken", keeps=False)[1] == digest


@pytest.mark.train
def test_a_thread_uploads_while_the_box_trains(
    registry: FakeRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tuner.pipeline.registry_checkpoints._LOOK_EACH_S", 0.05)
    ours = uploads(registry, tmp_path)
    with ours.beside():
        checkpoint(tmp_path, 5)
        ends = time.monotonic() + 30
        while not tags(registry):
            assert time.monotonic() < ends
            time.sleep(0.01)


def test_a_flag_without_a_registry_is_refused(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    words = ["--model", "phi-3-mini-4k-instruct", "--data", str(rows), "--output", str(tmp_path / "adapter")]
    assert main(["run", "--smoke", *words, "--registry-checkpoints"]) == 64
