"""What a Workspace becomes in a cluster: the objects, field by field."""

import base64
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tuner.cluster.job import (
    JobObjects,
    JobOptions,
    count_gpus,
    helper_name,
    render_check_job,
    render_job,
    render_retry_push,
)
from tuner.cluster.templates import container, containers, pod_spec, volume
from tuner.errors import ConfigError
from tuner.request import Request, build_run
from tuner.workspace import WorkspaceFile, parse_objects

NAME = "tickets"
IMAGE = "reg.example/tuner@sha256:" + "0" * 64
TO_IMAGE = {"image": "contoso.azurecr.io/adapters/tickets:1", "imagePushSecret": "push"}
CLAIM = {"persistentVolumeClaim": {"claimName": "data"}}


def workspace(
    *, tuning: Mapping[str, Any] | None = None, resource: Mapping[str, Any] | None = None, **metadata: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {"name": NAME, **metadata},
        "resource": resource if resource is not None else {"labelSelector": {"matchLabels": {"app": "tickets"}}},
        "tuning": {
            "preset": {"name": "phi-3-mini-4k-instruct"},
            "method": "qlora",
            "input": {"urls": ["https://data.contoso.com/tickets.parquet"]},
            "output": TO_IMAGE,
            **(tuning or {}),
        },
    }


def render(
    document: Mapping[str, Any], *others: Mapping[str, Any], request: Request | None = None, **options: Any
) -> JobObjects:
    """As the CLI and the controller do it."""
    file: WorkspaceFile = parse_objects(document, *others)
    asked = JobOptions(IMAGE, **options)
    smoke = bool(request and request.smoke)
    fields = {"place": "pod", "world_size": max(1, count_gpus(file.workspace, asked, smoke=smoke))}
    fields["image_volume"] = asked.image_volume
    run = build_run(file, Request(**{**vars(request or Request()), **fields}), Path("nowhere"), {})
    return render_job(file, run, asked)


def env_of(each: Mapping[str, Any]) -> dict[str, Any]:
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in each.get("env", ())}


def has_mount(each: Mapping[str, Any], path: str) -> bool:
    return any(mount["mountPath"] == path for mount in each["volumeMounts"])


def names_with(job: Mapping[str, Any], path: str) -> list[str]:
    return [each["name"] for each in containers(job) if has_mount(each, path)]


# ── containers and secrets ───────────────────────────────────────────────────────────────────────────────────────────


def test_the_containers_are_named_and_ordered_as_kaito_has_them() -> None:
    spec = pod_spec(render(workspace()).job)
    assert [each["name"] for each in spec["initContainers"]] == ["preflight", "data-downloader"]
    assert [each["name"] for each in spec["containers"]] == [NAME, "pusher"]
    from_image = render(workspace(tuning={"input": {"image": "contoso.azurecr.io/data:1"}})).job
    assert [each["name"] for each in pod_spec(from_image)["initContainers"]] == ["preflight", "puller"]


def test_a_volume_output_has_no_pusher_and_the_trainer_writes_it() -> None:
    job = render(workspace(tuning={"output": {"volumeSource": CLAIM}})).job
    assert [each["name"] for each in pod_spec(job)["containers"]] == [NAME]
    assert container(job, NAME)["args"] == ["stage", "prepare", "train", "push", "--pod"]
    assert volume(job, "results-volume") == {"name": "results-volume", **CLAIM}
    assert names_with(job, "/run/tuner") == []


def test_each_secret_is_mounted_read_only_where_it_is_needed_and_never_in_the_trainer() -> None:
    job = render(
        workspace(
            tuning={
                "preset": {"name": "phi-3-mini-4k-instruct", "presetOptions": {"modelAccessSecret": "hub"}},
                "input": {"image": "contoso.azurecr.io/data:1", "imagePullSecrets": ["pull.one", "pull-two"]},
            },
            annotations={"tuner/sources-secret": "headers"},
        )
    ).job
    assert names_with(job, "/run/secrets/registry") == ["preflight", "pusher"]
    for path in ("/run/secrets/pull/pull.one", "/run/secrets/pull/pull-two", "/run/secrets/headers"):
        assert names_with(job, path) == ["preflight", "puller"]
    tokens = [each["name"] for each in containers(job) if "HF_TOKEN" in env_of(each)]
    assert tokens == ["preflight", "puller"]
    assert env_of(container(job, "puller"))["HF_TOKEN"]["secretKeyRef"]["name"] == "hub"
    secret_mounts = [
        mount for each in containers(job) for mount in each["volumeMounts"] if mount["mountPath"].startswith("/run/sec")
    ]
    assert secret_mounts
    assert all(mount["readOnly"] for mount in secret_mounts)


def test_signed_queries_are_in_a_secret_and_nowhere_else() -> None:
    url = "https://data.contoso.com/tickets.parquet?sv=1&sig=SIGNATURE"
    objects = render(workspace(tuning={"input": {"urls": [url]}}))
    (secret,) = objects.secrets
    queries = json.loads(base64.b64decode(secret["data"]["queries.json"]))
    assert list(queries.values()) == ["sv=1&sig=SIGNATURE"]
    assert "SIGNATURE" not in json.dumps([objects.config_map, objects.job])
    assert "SIGNATURE" not in repr(objects)
    assert names_with(objects.job, "/run/secrets/sources") == ["preflight", "data-downloader"]
    assert secret["metadata"]["name"] == volume(objects.job, "source-secrets")["secret"]["secretName"]


def test_what_the_run_reads_is_in_an_immutable_config_map_named_by_its_content() -> None:
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "short"},
        "data": {"training_config.yaml": "training_config: {TrainingArguments: {num_train_epochs: 1}} # mine\n"},
    }
    objects = render(workspace(tuning={"config": "short"}), config)
    assert objects.config_map["immutable"] is True
    assert objects.config_map["data"]["training_config.yaml"] == config["data"]["training_config.yaml"]
    name = objects.config_map["metadata"]["name"]
    assert volume(objects.job, "config-volume")["configMap"]["name"] == name
    config["data"]["training_config.yaml"] += "# edited\n"
    assert render(workspace(tuning={"config": "short"}), config).config_map["metadata"]["name"] != name
    assert render(workspace(tuning={"config": "short"}), config) == render(
        workspace(tuning={"config": "short"}), config
    )


# ── the check and the second push ────────────────────────────────────────────────────────────────────────────────────


def test_the_check_asks_for_no_gpu_and_has_no_results_volume() -> None:
    objects = render(workspace(), results_volume="results", weights_volume="weights")
    check = render_check_job(objects.job, max_data_bytes=1000)
    assert check["metadata"]["name"] == "tickets-check"
    assert [each["name"] for each in containers(check)] == ["preflight", "check"]
    assert container(check, "check")["args"][-1] == "1000"
    assert "nvidia.com/gpu" not in json.dumps(check)
    assert "persistentVolumeClaim" not in json.dumps(check)
    assert "affinity" not in pod_spec(check)
    assert names_with(check, "/run/secrets/registry") == ["preflight"]


def test_a_second_push_mounts_the_claim_and_the_secret_and_does_not_wait() -> None:
    objects = render(workspace(), results_volume="results")
    retry = render_retry_push(objects.job)
    assert retry["metadata"]["name"] == "tickets-push"
    (pusher,) = containers(retry)
    assert pusher["args"] == ["stage", "push", "--pod"]
    assert {each["mountPath"] for each in pusher["volumeMounts"]} == {
        "/mnt/config",
        "/mnt/results",
        "/run/secrets/registry",
        "/tmp",
    }


def test_without_a_claim_there_is_nothing_to_push_a_second_time() -> None:
    with pytest.raises(ConfigError, match="kept its adapter in the pod, which is gone"):
        render_retry_push(render(workspace()).job)
    with pytest.raises(ConfigError, match="pushes nothing"):
        render_retry_push(render(workspace(tuning={"output": {"volumeSource": CLAIM}})).job)


def test_names_of_helpers_are_never_too_long_and_differ_where_names_do() -> None:
    assert helper_name("a" * 57, "check") == "a" * 57 + "-check"
    long = [helper_name("a" * 62 + end, "check") for end in "bc"]
    assert [len(name) for name in long] == [63, 63]
    assert long[0] != long[1]
