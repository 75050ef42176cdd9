"""The trainer runs others' code beside a pusher that has the push Secret: no byte of that gets into a registry."""

import base64
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from canaries import spelled_in
from hostile_trainer import Tricks, finish, leave_adapter, leave_checkpoint
from test_cluster_job import workspace
from test_job_processes import CLAIM, NAME, Cluster, Make, digest_in, make, registry, result_of, server

from tests.fake_registry import FakeRegistry, fake_registry
from tests.registries import PASSWORD as REAL_PASSWORD
from tests.registries import USER, RunningRegistry, docker_config
from tuner import pod
from tuner.cluster.beside import render_retry_push
from tuner.cluster.templates import container
from tuner.errors import TunerError
from tuner.pipeline.containers import Container, Push
from tuner.pipeline.registry_checkpoints import Uploads
from tuner.pipeline.run import FETCHED
from tuner.pipeline.turns import Turns
from tuner.request import Request, build_run
from tuner.runspec import Fetched, FetchedFile, ImageDestination, Network, RunSpec, Silent
from tuner.workspace import parse_objects

__all__ = ["make", "registry", "server"]  # fixtures

PASSWORD = "S3cret/pass+word~of the pusher"
MOST_S = 30


@pytest.fixture(scope="module")
def fake() -> Iterator[FakeRegistry]:
    with fake_registry() as running:
        yield running


def stored(fake: FakeRegistry) -> Iterator[bytes]:
    """Every byte that the registry was given, also of uploads that were not finished."""
    for each in fake.repositories.values():
        yield from each.blobs.values()
        yield from (content for content, _ in each.manifests.values())
    yield from (upload.content for _, upload in fake.uploads.values())


def leaks(contents: Iterable[bytes], password: str = PASSWORD) -> list[str]:
    user_and_password = base64.b64encode(f"{USER}:{password}".encode()).decode()
    return [
        each for content in contents for secret in (password, user_and_password) for each in spelled_in(secret, content)
    ]


def make_spec(fake: FakeRegistry, repository: str) -> RunSpec:
    run = build_run(parse_objects(workspace()), Request(place="pod"), Path("nowhere"), {})
    destination = ImageDestination(reference=f"{fake.host}/{repository}:1")
    network = Network(plain_http=True)
    return run.spec.model_copy(update={"destination": destination, "network": network, "smoke": True})


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Whatever hangs in it fails."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise AssertionError("the pusher hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Pusher:
    """The pusher's own code, in this process, on a volume of its own with a finished adapter and a checkpoint."""

    def __init__(self, directory: Path, fake: FakeRegistry, repository: str, patch: pytest.MonkeyPatch) -> None:
        self.run_dir, results = directory / "run", directory / "results"
        self.secret = directory / "secret" / ".dockerconfigjson"
        for each in (self.run_dir, results, self.secret.parent):
            each.mkdir(parents=True)
        self.secret.write_text(docker_config(fake.host, password=PASSWORD))
        spec = make_spec(fake, repository)
        patch.setattr(pod, "RESULTS_DIR", results)
        self.work_dir = pod.work_dir(spec)
        self.work_dir.mkdir(parents=True)
        fetched = FetchedFile(source="https://data.example/a", path="a", sha256="0" * 64, size_bytes=1)
        Fetched(run_digest=spec.digest, files=(fetched,), base_model=None).save(self.work_dir / FETCHED)
        trained = leave_adapter(spec, self.work_dir)
        self.adapter = self.work_dir / trained.adapter_dir
        leave_checkpoint(self.work_dir)
        finish_once = partial(finish, trained, self.run_dir)
        look = Uploads.look

        def look_and_finish(uploads: Uploads) -> None:
            look(uploads)
            finish_once()

        patch.setattr(Uploads, "look", look_and_finish)
        patch.setattr("tuner.pipeline.turns._POLL_S", 0)
        patch.setattr(pod, "PUSH_SECRET_DIR", self.secret.parent)
        turns = Turns(self.run_dir)
        self.container = Container(spec, {}, Silent(), lambda stage: None, turns=turns, registry_checkpoints=True)

    def run(self) -> TunerError | None:
        """What it ended with."""
        try:
            with within(MOST_S):
                self.container.run(("push",), Push(waits=True))
        except TunerError as error:
            return error
        return None


def at_a_moment(patch: pytest.MonkeyPatch, fake: FakeRegistry, moments: dict[int, Any]) -> None:
    """Before the n-th look at the file system, or answer of the registry, what `moments` says is done."""
    count = 0
    busy = False

    def tick() -> None:
        nonlocal count, busy
        if busy:
            return
        busy = True
        try:
            if act := moments.get(count):
                act()
            count += 1
        finally:
            busy = False

    for name in ("open", "stat", "lstat", "listdir", "scandir", "fstat", "preadv"):
        real = getattr(os, name)

        def watched(*given: Any, real: Any = real, **named: Any) -> Any:
            if threading.current_thread() is threading.main_thread():
                tick()
            return real(*given, **named)

        patch.setattr(os, name, watched)
    patch.setattr(fake, "on_request", lambda method, path: tick())


SEEDS = 200
MOMENTS = 250  # of a push that nobody disturbs


def play(seeds: Iterable[int], directory: Path, fake: FakeRegistry) -> list[tuple[int, list[str], TunerError | None]]:
    """Of each seed the tricks, and what the pusher ended with."""
    outcomes = []
    for seed in seeds:
        chance = random.Random(seed)
        with pytest.MonkeyPatch.context() as patch:
            pusher = Pusher(directory / str(seed), fake, f"seed/{seed}", patch)
            tricks = Tricks(pusher.work_dir, pusher.adapter, pusher.run_dir, pusher.secret, chance)
            played: list[str] = []

            def trick(tricks: Tricks = tricks, played: list[str] = played) -> None:
                played.append(tricks.play())

            at_a_moment(patch, fake, {chance.randrange(MOMENTS): trick for _ in range(chance.choice([1, 1, 2, 3]))})
            outcomes.append((seed, played, pusher.run()))
    return outcomes


@pytest.mark.parametrize("first", range(0, SEEDS, 25))
def test_no_trick_at_any_moment_gets_the_secret_into_what_is_pushed(
    first: int, tmp_path: Path, fake: FakeRegistry
) -> None:
    outcomes = play(range(first, first + 25), tmp_path, fake)
    assert leaks(stored(fake)) == [], outcomes
    assert any(error is None for _, _, error in outcomes), "some tricks come too late to matter"
    assert any(error is not None for _, _, error in outcomes), "some tricks are in time to be refused"


def test_a_pusher_that_nobody_tricks_pushes(tmp_path: Path, fake: FakeRegistry) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert Pusher(tmp_path, fake, "honest", patch).run() is None
    assert {"1"} <= fake.repository("honest").tags.keys()


_WATCHED = """
import os, sys
from pathlib import Path
import pytest
from test_hostile_trainer import Pusher, fake_registry
opened, place = [], Path(sys.argv[1])
with fake_registry() as fake, pytest.MonkeyPatch.context() as patch:
    pusher = Pusher(place, fake, "watched", patch)
    sys.addaudithook(lambda event, given: opened.append(given) if event == "open" else None)
    print(pusher.run())
names = {path.name for path in place.rglob("*")} - {".dockerconfigjson"}
print(len([path for path, _, _ in opened if path in names]) > 20)
for path, _, flags in opened:
    is_mount = str(path) in (str(pusher.run_dir), str(place / "results"))
    if isinstance(path, str | Path) and Path(path).name in names and not flags & os.O_NOFOLLOW and not is_mount:
        print("loose:", path)
"""


def test_whatever_the_pusher_opens_of_what_the_trainer_writes_it_opens_without_following_links(tmp_path: Path) -> None:
    """Also what somebody adds to it later: CPython tells of every open."""
    command = [sys.executable, "-c", _WATCHED, str(tmp_path)]
    where = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=where)
    assert done.stdout.splitlines() == ["None", "True"], done.stderr


# ── in pods ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def hostile(cluster: Cluster, attack: str) -> Cluster:
    trainer = container(cluster.job, NAME)
    trainer["command"], trainer["args"] = (
        [sys.executable, str(Path(__file__).with_name("hostile_trainer.py"))],
        [attack],
    )
    return cluster


def storage(registry: RunningRegistry) -> Iterator[bytes]:
    return (path.read_bytes() for path in registry.storage.rglob("*") if path.is_file())


REFUSED = {
    "link": "README.md: is a symbolic link",
    "fifo": "README.md: is a FIFO",
    "directory": ".tuner: is a symbolic link",
}


@pytest.mark.registry
@pytest.mark.parametrize(
    "attack", ["link", *(pytest.param(each, marks=pytest.mark.long) for each in ("fifo", "directory"))]
)
def test_in_a_pod_a_link_to_the_mounted_secret_is_refused_and_said(
    make: Make, registry: RunningRegistry, attack: str
) -> None:
    cluster = hostile(make(tag=attack, results_volume=CLAIM), attack)
    outcome = cluster.run()
    ended = result_of(outcome, "pusher")
    assert (ended.stage, ended.exit_code) == ("push", 65), outcome.last.containers["pusher"].log
    assert REFUSED[attack] in ended.message
    again = cluster.node.run_job(render_retry_push(cluster.job))
    assert again.last.exit_codes == {"pusher": 65}
    assert digest_in(registry, attack) is None
    assert leaks(storage(registry), REAL_PASSWORD) == []


@pytest.mark.registry
@pytest.mark.parametrize("number", [0, *(pytest.param(each, marks=pytest.mark.long) for each in range(1, 20))])
def test_in_a_pod_a_file_that_is_a_link_by_turns_is_pushed_as_itself_or_not_at_all(
    make: Make, registry: RunningRegistry, number: int
) -> None:
    outcome = hostile(make(tag=f"race-{number}"), "race").run()
    assert result_of(outcome, "pusher").exit_code in (0, 65, 70), outcome.last.containers["pusher"].log
    assert leaks(storage(registry), REAL_PASSWORD) == []


@pytest.mark.long
@pytest.mark.parametrize("first", range(SEEDS, 20 * SEEDS, 25))
def test_no_trick_at_any_of_many_more_moments_gets_the_secret_out(
    first: int, tmp_path: Path, fake: FakeRegistry
) -> None:
    play(range(first, first + 25), tmp_path, fake)
    assert leaks(stored(fake)) == []
