"""What becomes of a rendered Job when a container ends with an exit code: the whole table, container by container."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from kubelet import decide

from tuner import pod
from tuner.cluster.beside import render_check_job, render_retry_push
from tuner.cluster.job import render_job
from tuner.cluster.job_options import JobOptions
from tuner.cluster.templates import containers
from tuner.errors import EXIT_INTERNAL, KINDS
from tuner.request import Request, build_run
from tuner.workspace import parse_objects

NAME = "tickets"
TO_IMAGE = {"image": "contoso.azurecr.io/adapters/tickets:1", "imagePushSecret": "push"}
TO_VOLUME = {"volumeSource": {"persistentVolumeClaim": {"claimName": "out"}}}
URLS = {"urls": ["https://data.contoso.com/tickets.parquet"]}
IMAGE = {"image": "contoso.azurecr.io/data/tickets:1"}

# What would fail again; the rest is tried again: a service that is down, a bug that may be of the moment, a signal.
FINAL = {64, 65, 66, 73, 74, 76, 77, 78}
RETRY_PUSH_RETRIED = {75, 143}


def job_of(output: Mapping[str, Any] = TO_IMAGE, data: Mapping[str, Any] = URLS) -> dict[str, Any]:
    workspace = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": NAME},
        "resource": {"labelSelector": {"matchLabels": {"app": NAME}}},
        "tuning": {"preset": {"name": "phi-3-mini-4k-instruct"}, "method": "qlora", "input": data, "output": output},
    }
    file = parse_objects(workspace)
    options = JobOptions("reg.example/tuner:1", results_volume="results" if output is TO_IMAGE else None)
    return render_job(file, build_run(file, Request(place="pod"), Path("nowhere"), {}), options).job


JOBS = {
    "to an image": job_of(),
    "to a volume": job_of(TO_VOLUME),
    "from an image": job_of(data=IMAGE),
    "check": render_check_job(job_of()),
    "push": render_retry_push(job_of()),
}
PLACES = [(kind, each["name"]) for kind, job in JOBS.items() for each in containers(job)]


def test_the_jobs_have_the_containers_that_the_table_is_about() -> None:
    assert {name for _, name in PLACES} == {NAME, *pod.CONTAINERS}


@pytest.mark.parametrize(("kind", "container"), PLACES)
def test_every_exit_code_fails_the_job_or_is_tried_again(kind: str, container: str) -> None:
    final = FINAL
    if container == pod.PUSHER:  # as a sidecar it ends after the trainer, whose end is the run's
        final = set(range(1, 256)) - RETRY_PUSH_RETRIED if kind == "push" else set()
    others = {each["name"]: 0 for each in containers(JOBS[kind])}
    decisions = {code: decide(JOBS[kind], {**others, container: code}) for code in range(1, 256)}
    assert {code for code, decision in decisions.items() if decision == "FailJob"} == final
    assert {code for code, decision in decisions.items() if decision == "Count"} == set(range(1, 256)) - final


@pytest.mark.parametrize("kind", JOBS)
def test_a_pod_that_a_node_takes_with_it_is_nobodys_failure(kind: str) -> None:
    for each in containers(JOBS[kind]):
        assert decide(JOBS[kind], {each["name"]: 78}, was_disrupted=True) == "Ignore"


def test_every_kind_of_error_has_its_place_in_the_table() -> None:
    codes = set(KINDS)
    assert codes - FINAL == {69, 75}
    assert codes >= FINAL
    assert EXIT_INTERNAL not in FINAL


def test_however_its_pusher_is_ended_the_trainer_has_the_word() -> None:
    for code in (0, 1, 137, 143):
        assert decide(JOBS["to an image"], {NAME: 65, pod.PUSHER: code}) == "FailJob"
        assert decide(JOBS["to an image"], {NAME: 75, pod.PUSHER: code}) == "Count"
