"""The rendered Job, run: its pods as local processes, a real registry, the data over HTTP.

A smoke run throughout: its adapter has the real shape, and is small. What one test has trained others start from, on a
copy of its volume.
"""

import base64
import json
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from data_files import message_rows, write_data
from http_server import Answer, HttpServer
from hub import publish_model
from kubelet import JobOutcome, Node, Pod, decide, require_node
from registries import (
    PASSWORD,
    Fault,
    FaultyRegistry,
    RunningRegistry,
    docker_config,
    faulty,
    running_registry,
)
from tiny import tiny_base

from tuner.cluster.beside import render_check_job, render_retry_push
from tuner.cluster.job import JobObjects, render_job
from tuner.cluster.job_options import JobOptions
from tuner.cluster.templates import container
from tuner.open_files import OpenFile
from tuner.presets import find_preset
from tuner.reference import parse_reference
from tuner.registry import client_for
from tuner.registry.image import build_image
from tuner.registry.push import push_image
from tuner.request import Request, build_run
from tuner.runspec import Network, Silent, StageResult
from tuner.urls import Allowed
from tuner.workspace import parse_objects

pytestmark = [pytest.mark.train, pytest.mark.registry]

NAME, CLAIM = "tickets", "results"
STEPS = 40
OPEN = Network(plain_http=True, allow_private_urls=True)


@pytest.fixture(scope="module")
def registry() -> Iterator[RunningRegistry]:
    require_node()
    with running_registry(htpasswd=True) as running:
        yield running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HttpServer]:
    with HttpServer() as running:
        running.serve("/train.parquet", write_data(tmp_path_factory.mktemp("data") / "train.parquet", message_rows(40)))
        yield running


@dataclass
class Cluster:
    """A namespace with one Workspace's objects, and a node."""

    node: Node
    objects: JobObjects

    @property
    def job(self) -> dict[str, Any]:
        return self.objects.job

    def start(self, **how: Any) -> Pod:
        return self.node.start_pod(self.job, **how)

    def run(self, disturb: Callable[[int, Pod], None] = lambda number, pod: None) -> JobOutcome:
        return self.node.run_job(self.job, disturb=disturb)


Make = Callable[..., Cluster]


@pytest.fixture
def make(registry: RunningRegistry, server: HttpServer, tmp_path: Path) -> Make:
    return partial(make_cluster, registry, server, tmp_path)


def make_cluster(
    registry: RunningRegistry,
    server: HttpServer,
    directory: Path,
    *,
    host: str | None = None,
    tag: str = "1",
    data: str = "train.parquet",
    secret: str | None = None,
    volume: Path | None = None,
    tuning: Mapping[str, Any] | None = None,
    smoke: bool = True,
    steps: int = STEPS,
    settings: Mapping[str, Any] | None = None,
    **options: Any,
) -> Cluster:
    """`volume`: what the claim for results holds already."""
    host = host or registry.host
    image = f"{host}/adapters/tickets:{tag}"
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": NAME},
        "resource": {"labelSelector": {"matchLabels": {"app": NAME}}},
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"},
            "method": "qlora",
            "config": "settings",
            "input": {"urls": [f"{server.url}/{data}"]},
            "output": {"image": f"{host}/adapters/tickets:real", "imagePushSecret": "push"},
            **(tuning or {}),
        },
    }
    written = {"TrainingArguments": {"logging_steps": 1, "output_dir": "/mnt/results", **(settings or {})}}
    config_map = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "settings"},
        "data": {"training_config.yaml": json.dumps({"training_config": written})},
    }
    allowed = Allowed.of(OPEN.allow_cidrs, OPEN.allow_private_urls)
    file = parse_objects(workspace, config_map, allowed=allowed, output_given=smoke)
    request = Request(
        place="pod",
        smoke=smoke,
        output=image if smoke else None,
        network=OPEN,
        overrides=(f"TrainingArguments.max_steps={steps}",),
    )
    objects = render_job(file, build_run(file, request, directory, {}), JobOptions("reg.example/tuner:1", **options))
    if volume is not None:
        shutil.copytree(volume, directory / "node" / "claims" / CLAIM)
    cluster = Cluster(Node(directory / "node", [objects.config_map, *objects.secrets]), objects)
    set_secret(cluster, docker_config(host) if secret is None else secret)
    return cluster


def set_secret(cluster: Cluster, text: str) -> None:
    """What the user's `kubectl create secret docker-registry push` leaves."""
    data = {".dockerconfigjson": base64.b64encode(text.encode()).decode()}
    cluster.node.objects[:] = [each for each in cluster.node.objects if each["metadata"]["name"] != "push"]
    cluster.node.objects.append({"kind": "Secret", "metadata": {"name": "push"}, "data": data})


def result_of(outcome: JobOutcome, name: str) -> StageResult:
    return StageResult.model_validate_json(outcome.last.containers[name].message)


def digest_in(registry: RunningRegistry, tag: str = "1") -> str | None:
    reference = parse_reference(f"{registry.host}/adapters/tickets:{tag}")
    with client_for(reference, OPEN, [docker_config(registry.host)], reporter=Silent()) as client:
        return client.manifest_digest(tag)


@dataclass(frozen=True)
class Finished:
    """A run that nothing disturbed, and what it left."""

    outcome: JobOutcome
    digest: str
    volume: Path


@pytest.fixture(scope="module")
def finished(registry: RunningRegistry, server: HttpServer, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    directory = tmp_path_factory.mktemp("finished")
    cluster = make_cluster(registry, server, directory, tag="unbroken", results_volume=CLAIM)
    outcome = cluster.run()
    digest = digest_in(registry, "unbroken")
    assert digest is not None, outcome.last
    return Finished(outcome, digest, cluster.node.claim(CLAIM))


def test_a_job_runs_to_an_image_whose_digest_is_in_the_termination_message(
    finished: Finished, registry: RunningRegistry
) -> None:
    outcome = finished.outcome
    assert (outcome.condition, len(outcome.pods)) == ("Complete", 1)
    assert outcome.last.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 0, "pusher": 0}
    pushed = result_of(outcome, "pusher")
    assert pushed.values["image"] == f"{registry.host}/adapters/tickets@{finished.digest}"
    trained = result_of(outcome, NAME)
    assert (trained.stage, trained.values["steps"]) == ("train", STEPS)
    assert {"loss", "eval_loss", "train_rows", "seconds"} <= trained.values.keys()
    assert result_of(outcome, "data-downloader").values["files"] == 1


def test_the_trainer_had_no_credential_and_nothing_secret_was_said(finished: Finished) -> None:
    for name, each in finished.outcome.last.containers.items():
        assert PASSWORD not in each.log, name
        assert base64.b64encode(f"tuner:{PASSWORD}".encode()).decode() not in each.log + each.message


# ── before anything is trained ───────────────────────────────────────────────────────────────────────────────────────


def test_bad_data_fail_the_job_at_once_and_an_old_result_on_the_volume_is_not_pushed(
    make: Make, finished: Finished, registry: RunningRegistry, server: HttpServer, tmp_path: Path
) -> None:
    """The volume has a finished adapter of this very run, and of what its URL had then."""
    before = server._answers["/train.parquet"][0]
    bad = write_data(tmp_path / "bad.parquet", [{"something": "else", "entirely": number} for number in range(20)])
    server.serve("/train.parquet", bad)
    try:
        outcome = make(tag="bad", results_volume=CLAIM, volume=finished.volume).run()
    finally:
        server.serve("/train.parquet", before)
    assert (outcome.condition, outcome.reason, len(outcome.pods)) == ("Failed", "PodFailurePolicy", 1)
    assert outcome.last.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 65, "pusher": 143}
    failed = result_of(outcome, NAME)
    assert (failed.stage, failed.reason) == ("prepare", "DataError")
    assert "something" in failed.message
    assert digest_in(registry, "bad") is None


@pytest.mark.parametrize(
    ("secret", "exit_code", "said"),
    [
        (lambda host: docker_config(host, password="wrong"), 77, ["Secret 'push'", "kubectl create secret"]),
        (
            lambda host: docker_config("other.example"),
            77,
            ["Secret 'push' has credentials for other.example", "none for"],
        ),
        (lambda host: "{", 78, ["Secret 'push'", "not a JSON object"]),
    ],
    ids=["wrong", "of another registry", "malformed"],
)
def test_a_bad_secret_is_found_before_anything_is_downloaded(
    make: Make, registry: RunningRegistry, server: HttpServer, secret: Any, exit_code: int, said: list[str]
) -> None:
    cluster = make(secret=secret(registry.host))
    requests = len(server.requests)
    outcome = cluster.run()
    assert outcome.reason == "PodFailurePolicy"
    assert outcome.last.exit_codes == {"preflight": exit_code}
    assert len(server.requests) == requests
    result = result_of(outcome, "preflight")
    for words in said:
        assert words in f"{result.message} {result.hint}"


def test_a_secret_of_another_type_is_read_too(make: Make, registry: RunningRegistry) -> None:
    """The older kubernetes.io/dockercfg, and one that is made by hand of a config.json."""
    cluster = make()
    whole = json.loads(docker_config(registry.host))
    for key, text in ((".dockercfg", json.dumps(whole["auths"])), ("config.json", json.dumps(whole))):
        cluster.node.objects[-1]["data"] = {key: base64.b64encode(text.encode()).decode()}
        only_preflight = deepcopy(cluster.job)
        only_preflight["spec"]["template"]["spec"]["containers"] = []
        del only_preflight["spec"]["template"]["spec"]["initContainers"][1:]
        outcome = cluster.node.run_job(only_preflight)
        assert outcome.last.exit_codes == {"preflight": 0}, outcome.last.containers["preflight"].log


def test_sigterm_ends_a_download_as_process_1_and_what_follows_is_not_started(make: Make, server: HttpServer) -> None:
    server.serve("/slow.parquet", Answer(body=b"PAR1" + bytes(10_000), stall_after=5_000))
    pod = make(data="slow.parquet").start()
    pod.wait_for(lambda: server.count("/slow.parquet"))
    began = time.monotonic()
    pod.terminate(grace_s=20)
    outcome = pod.wait()
    assert outcome.exit_codes == {"preflight": 0, "data-downloader": 143}
    assert time.monotonic() - began < 15
    ended = StageResult.model_validate_json(outcome.containers["data-downloader"].message)
    assert (ended.stage, ended.reason) == ("fetch", "SIGTERM")


def test_the_check_job_finds_bad_rows_without_results_and_leaves_large_data_to_the_run(
    make: Make, server: HttpServer, tmp_path: Path
) -> None:
    server.serve("/bad.parquet", write_data(tmp_path / "bad.parquet", [{"a": "b", "c": 1}] * 20))
    cluster = make(data="bad.parquet")
    outcome = cluster.node.run_job(render_check_job(cluster.job))
    assert outcome.last.exit_codes == {"preflight": 0, "check": 65}
    assert outcome.reason == "PodFailurePolicy"
    downloads = server.count("/bad.parquet")
    small = render_check_job(cluster.job)
    container(small, "check")["args"] = ["stage", "check", "--pod", "--max-data", "100"]
    outcome = cluster.node.run_job(small)
    assert outcome.condition == "Complete"
    result = result_of(outcome, "check")
    assert result.values["checked"] is False
    assert "rows are checked beforehand up to 100 B" in result.message
    assert server.count("/bad.parquet") == downloads + 1  # its size was asked for


# ── trainer and pusher ───────────────────────────────────────────────────────────────────────────────────────────────


def test_a_trainer_that_is_killed_at_work_is_not_pushed_for_and_is_tried_again(make: Make) -> None:
    cluster = make()
    pod = cluster.start()
    pod.wait_for_log(NAME, "── prepare")
    pod.kill(NAME)
    outcome = pod.wait()
    assert outcome.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 137, "pusher": 143}
    assert decide(cluster.job, outcome.exit_codes) == "Count"


def test_a_trainer_that_is_killed_once_it_has_finished_trains_nothing_again(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    """The next pod, which the Job makes for it, finds the adapter on the volume."""
    cluster = make(tag="killed", results_volume=CLAIM, volume=finished.volume)
    slow = deepcopy(cluster.job)
    container(slow, "pusher")["command"] = ["sleep", "60"]
    pod = cluster.node.start_pod(slow)
    pod.wait_for(lambda: (pod.volume("run") / "trained").exists())
    pod.kill(NAME)
    killed = pod.wait()
    assert killed.exit_codes[NAME] == 137
    assert decide(cluster.job, killed.exit_codes) == "Count"
    again = cluster.run()
    assert again.condition == "Complete"
    assert "already trained" in again.last.containers[NAME].log
    assert digest_in(registry, "killed") == finished.digest


def test_a_pusher_that_is_killed_while_training_goes_on_is_started_again_and_pushes(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    cluster = make(tag="pusher-killed")

    def kill(number: int, pod: Pod) -> None:
        pod.wait_for_log(NAME, r'^\{"stage": "train".*"done": [1-9]')
        pod.kill("pusher")
        pod.wait_for(lambda: pod.starts["pusher"] == 2)

    outcome = cluster.run(kill)
    assert (outcome.condition, len(outcome.pods)) == ("Complete", 1)
    assert outcome.last.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 0, "pusher": 0}
    assert digest_in(registry, "pusher-killed") == finished.digest
    assert result_of(outcome, "pusher").values["image"] == result_of(outcome, NAME).values["image"]


def test_a_pusher_that_fails_while_it_waits_has_not_failed_to_push(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    cluster = make(tag="stumbles", results_volume=CLAIM, volume=finished.volume)
    stumbles = (
        "import sys; from pathlib import Path; from tuner.cli import main; from tuner.pipeline.turns import Turns; "
        "real, once = Turns.wait_for_adapter, Path('/run/tuner/once'); "
        "Turns.wait_for_adapter = lambda *it: real(*it) if once.exists() else (once.touch(), 1 / 0); "
        "sys.exit(main(sys.argv[1:]))"
    )
    clumsy = deepcopy(cluster.job)
    container(clumsy, "pusher")["command"] = [sys.executable, "-c", stumbles]
    outcome = cluster.node.run_job(clumsy)
    assert (outcome.condition, len(outcome.pods)) == ("Complete", 1)
    assert "ZeroDivisionError" in outcome.last.containers["pusher"].log
    assert digest_in(registry, "stumbles") == finished.digest


def test_a_pusher_that_is_killed_in_every_push_ends_the_job_with_the_adapter_kept(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    """As one that has too little memory: the GPU is not held for ever."""
    cluster = make(tag="never", results_volume=CLAIM, volume=finished.volume)
    dies = (
        "import os, sys; from tuner.pipeline import containers; from tuner.cli import main; "
        "containers.Container._push_patiently = lambda *_: os.kill(os.getpid(), 9) or os._exit(137); "
        "sys.exit(main(sys.argv[1:]))"
    )
    broken = deepcopy(cluster.job)
    container(broken, "pusher")["command"] = [sys.executable, "-c", dies]
    outcome = cluster.node.run_job(broken)
    assert (outcome.condition, outcome.reason, len(outcome.pods)) == ("Failed", "PodFailurePolicy", 1)
    assert outcome.last.exit_codes[NAME] == 74
    result = result_of(outcome, NAME)
    assert (result.stage, result.exit_code) == ("push", 74)
    assert "5 pushes were begun, and each was killed" in result.message
    assert f"tuner retry-push {NAME}" in str(result.hint)
    retry = cluster.node.run_job(render_retry_push(cluster.job))
    assert retry.condition == "Complete"
    assert digest_in(registry, "never") == finished.digest


def test_after_sigterm_and_a_checkpoint_the_next_pod_goes_on_and_pushes_what_an_unbroken_run_does(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    cluster = make(tag="resumed", results_volume=CLAIM)

    def evict(number: int, pod: Pod) -> None:
        if number == 0:
            pod.wait_for_log(NAME, r'^\{"stage": "train".*"done": [1-9]')
            pod.terminate(disruption=True)

    outcome = cluster.run(evict)
    first, second = outcome.pods
    assert first.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 75, "pusher": 143}
    assert "checkpoint saved" in first.containers[NAME].message
    assert second.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 0, "pusher": 0}
    steps = [
        json.loads(line)["done"] for line in second.containers[NAME].log.splitlines() if '"stage": "train"' in line
    ]
    assert steps[0] > 1, "it did not begin anew"
    assert digest_in(registry, "resumed") == finished.digest


def logged_steps(pod: Any) -> list[int]:
    return [json.loads(line)["done"] for line in pod.containers[NAME].log.splitlines() if '"stage": "train"' in line]


def test_without_a_volume_a_drained_nodes_run_goes_on_from_the_registry(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    cluster = make(tag="drained", registry_checkpoints=True)

    def evict(number: int, pod: Pod) -> None:
        if number == 0:
            pod.wait_for_log(NAME, r'^\{"stage": "train".*"done": [1-9]')
            pod.terminate(disruption=True)

    outcome = cluster.run(evict)
    first, second = outcome.pods
    assert first.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 75, "pusher": 143}
    assert re.search(r"checkpoint-\d+ is in the registry", first.containers["pusher"].log)
    assert second.exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 0, "pusher": 0}
    assert "is back from the registry" in second.containers["preflight"].log
    assert logged_steps(second)[0] > 1, "it did not begin anew"
    assert digest_in(registry, "drained") == finished.digest
    run = cluster.job["metadata"]["annotations"]["tuner/run-digest"][7:19]
    assert digest_in(registry, f"checkpoint-{run}") is None, "it was for getting here"


def test_without_a_volume_a_lost_nodes_run_goes_on_from_the_last_checkpoint_that_the_registry_has(make: Make) -> None:
    """Longer than anybody would wait: neither pod is to end by itself."""
    often = {"save_steps": 50, "logging_steps": 50}
    cluster = make(tag="lost", steps=100_000, registry_checkpoints=True, settings=often)
    first = cluster.start()
    first.wait_for_log("pusher", r"checkpoint-\d+ is in the registry")
    first.terminate(grace_s=0, disruption=True)
    first.wait()
    kept = [int(step) for step in re.findall(r"checkpoint-(\d+) is in the registry", first.log("pusher"))]

    second = cluster.start()
    second.wait_for_log(NAME, r'^\{"stage": "train".*"done": [1-9]')
    second.terminate(grace_s=0, disruption=True)
    outcome = second.wait()
    back = re.search(r"the checkpoint of step (\d+) is back", outcome.containers["preflight"].log)
    assert back
    assert int(back[1]) >= kept[-1]
    assert logged_steps(outcome)[0] > int(back[1])


def test_sigterm_while_rows_are_prepared_is_no_checkpoint(make: Make) -> None:
    pod = make().start()
    pod.wait_for_log(NAME, "── prepare")
    pod.terminate(grace_s=20)
    assert pod.wait().exit_codes == {"preflight": 0, "data-downloader": 0, NAME: 143, "pusher": 143}


def test_a_run_takes_whatever_uid_an_openshift_namespace_gives_it(make: Make, finished: Finished) -> None:
    """That uid is in no passwd, its group is root's, and a claim's files are its fsGroup's."""
    cluster = make(tag="openshift", results_volume=CLAIM)
    given = {"runAsUser": 1000650000, "runAsGroup": 0, "fsGroup": 1000650000}
    cluster.job["spec"]["template"]["spec"]["securityContext"] |= given
    outcome = cluster.run()
    assert (outcome.condition, len(outcome.pods)) == ("Complete", 1), outcome.last.containers
    assert result_of(outcome, NAME).values["image"].endswith(finished.digest)


# ── the push ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def shaky(registry: RunningRegistry) -> Iterator[FaultyRegistry]:
    with faulty(registry) as proxy:
        yield proxy


def test_a_registry_that_is_down_for_a_while_gets_the_image_all_the_same(
    make: Make, finished: Finished, shaky: FaultyRegistry
) -> None:
    cluster = make(host=shaky.host, tag="later", results_volume=CLAIM, volume=finished.volume)

    def break_down(number: int, pod: Pod) -> None:
        pod.wait_for(lambda: "may push to" in pod.log("preflight"))
        shaky.faults += [Fault("HEAD", "/manifests/", status=503, times=2), Fault("PUT", "/manifests/", times=2)]

    outcome = cluster.run(break_down)
    assert (outcome.condition, len(outcome.pods)) == ("Complete", 1)
    assert not any(fault.times for fault in shaky.faults)
    assert result_of(outcome, "pusher").values["image"].endswith(finished.digest)


def test_a_refused_push_ends_in_74_without_a_second_training_and_retry_push_finishes_it(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    cluster = make(tag="refused", results_volume=CLAIM, volume=finished.volume)

    def change_password(number: int, pod: Pod) -> None:
        pod.wait_for(lambda: "may push to" in pod.log("preflight"))
        set_secret(cluster, docker_config(registry.host, password="wrong"))
        pod.update_secret("docker-config")

    outcome = cluster.run(change_password)
    assert (outcome.condition, outcome.reason, len(outcome.pods)) == ("Failed", "PodFailurePolicy", 1)
    assert outcome.last.exit_codes[NAME] == 74
    result = result_of(outcome, NAME)
    assert result == result_of(outcome, "pusher")
    assert "trained, but not pushed" in result.message
    assert result.hint is not None
    assert f"tuner retry-push {NAME}" in result.hint
    set_secret(cluster, docker_config(registry.host))
    retry = cluster.node.run_job(render_retry_push(cluster.job))
    assert (retry.condition, len(retry.pods)) == ("Complete", 1)
    assert list(retry.last.containers) == ["pusher"]
    assert digest_in(registry, "refused") == finished.digest


def test_a_secret_that_is_renewed_while_the_pusher_holds_is_the_one_that_pushes(
    make: Make, finished: Finished, registry: RunningRegistry
) -> None:
    cluster = make(tag="renewed", results_volume=CLAIM, volume=finished.volume)
    container(cluster.job, "pusher")["args"] += ["--hold", "60"]

    def renew(number: int, pod: Pod) -> None:
        pod.wait_for(lambda: "may push to" in pod.log("preflight"))
        set_secret(cluster, docker_config(registry.host, password="wrong"))
        pod.update_secret("docker-config")
        pod.wait_for_log("pusher", "again in 5 s")
        set_secret(cluster, docker_config(registry.host))
        pod.update_secret("docker-config")

    outcome = cluster.run(renew)
    assert (outcome.condition, len(outcome.pods)) == ("Complete", 1)
    assert digest_in(registry, "renewed") == finished.digest


# ── an output volume, and a base model from an image ─────────────────────────────────────────────────────────────────


@pytest.fixture
def base_image(registry: RunningRegistry) -> str:
    """A tiny model as KAITO ships weights: an image that needs a pull secret."""
    files = {path.name: OpenFile.at(path) for path in sorted(tiny_base().iterdir()) if path.is_file()}
    reference = parse_reference(f"{registry.host}/models/tiny:1")
    with client_for(reference, OPEN, [docker_config(registry.host)], reporter=Silent()) as client:
        push_image(build_image(files), reference, client, reporter=Silent())
    return str(reference)


def to_volume(**options: Any) -> dict[str, Any]:
    preset = {"name": "phi-3-mini-4k-instruct", "presetOptions": options}
    return {"preset": preset, "output": {"volumeSource": {"persistentVolumeClaim": {"claimName": CLAIM}}}}


def test_an_output_volume_gets_the_adapter_and_then_the_sentinel(make: Make, server: HttpServer) -> None:
    """Without --smoke: the base model comes from a Hub, with a token, and is trained from a read-only mount."""
    preset = find_preset("phi-3-mini-4k-instruct")
    assert preset.revision is not None
    files = {path.name: path.read_bytes() for path in tiny_base().iterdir() if path.is_file()}
    publish_model(server, files, preset.model_id, preset.revision)
    cluster = make(tuning=to_volume(modelAccessSecret="hf"), smoke=False, steps=2)
    token = {"HF_TOKEN": base64.b64encode(b"hf_of_the_cluster").decode()}
    cluster.node.objects.append({"kind": "Secret", "metadata": {"name": "hf"}, "data": token})
    for name in ("preflight", "data-downloader"):
        container(cluster.job, name)["env"].append({"name": "HF_ENDPOINT", "value": server.url})
    volume = cluster.node.claim(CLAIM)
    (volume / "fine_tuning_completed.txt").touch()  # an earlier run's

    def look(number: int, pod: Pod) -> None:
        pod.wait_for_log(NAME, "── train")
        assert not (volume / "fine_tuning_completed.txt").exists()

    outcome = cluster.run(look)
    assert outcome.condition == "Complete", outcome.last.exit_codes
    assert list(outcome.last.containers) == ["preflight", "data-downloader", NAME]
    result = result_of(outcome, NAME)
    assert (result.stage, result.values["image"], result.values["steps"]) == ("push", "/mnt/results", 2)
    names = {path.name for path in volume.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "fine_tuning_completed.txt"} <= names
    assert names >= {".tuner", "lost+found"}
    asked = [each for each in server.requests if preset.model_id in each.path]
    assert {each.headers.get("authorization") for each in asked} == {"Bearer hf_of_the_cluster"}


def test_base_weights_in_an_image_are_pulled_with_their_own_secret(make: Make, base_image: str) -> None:
    cluster = make(tuning=to_volume(image=base_image, imagePullSecrets=["push"]), smoke=False, steps=2)
    cluster.job["spec"]["template"]["spec"]["containers"] = []
    pod = cluster.start()
    assert pod.wait().exit_codes == {"preflight": 0, "data-downloader": 0}
    (weights,) = pod.volume("model-weights-volume").glob("image-*/data/model.safetensors")
    assert weights.read_bytes() == (tiny_base() / "model.safetensors").read_bytes()


def test_a_volume_with_somebodys_files_is_found_before_anything_is_downloaded(make: Make, server: HttpServer) -> None:
    cluster = make(tuning=to_volume(), smoke=False, steps=2)
    (cluster.node.claim(CLAIM) / "thesis.tex").write_text("mine")
    requests = len(server.requests)
    outcome = cluster.run()
    assert outcome.last.exit_codes == {"preflight": 78}
    assert "thesis.tex" in result_of(outcome, "preflight").message
    assert len(server.requests) == requests
