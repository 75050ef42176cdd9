"""What a Workspace becomes in a cluster: the objects, field by field."""

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tuner.cluster.beside import helper_name, render_check_job, render_retry_push
from tuner.cluster.checks import job_problems
from tuner.cluster.job import JobObjects, render_job
from tuner.cluster.job_options import JobOptions, count_gpus
from tuner.cluster.sizes import read_sizes
from tuner.cluster.templates import container, containers, dump_manifests, load_template, pod_spec, volume
from tuner.errors import ConfigError
from tuner.pod import CHECK_JOB, CONTAINERS, PUSH_JOB
from tuner.request import Request, build_run
from tuner.runspec import RunSpec
from tuner.workspace import LABEL, SUBDOMAIN, WorkspaceFile, parse_objects
from tuner.yaml_lines import Document

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
    assert [each["name"] for each in spec["initContainers"]] == ["preflight", "data-downloader", "pusher"]
    assert [each["name"] for each in spec["containers"]] == [NAME]
    from_image = render(workspace(tuning={"input": {"image": "contoso.azurecr.io/data:1"}})).job
    assert [each["name"] for each in pod_spec(from_image)["initContainers"]] == ["preflight", "puller", "pusher"]


def test_the_pusher_is_a_sidecar_until_it_is_a_job_of_its_own() -> None:
    job = render(workspace(), results_volume="results").job
    sidecars = [each["name"] for each in containers(job) if each.get("restartPolicy") == "Always"]
    assert sidecars == ["pusher"]
    assert "restartPolicy" not in container(render_retry_push(job), "pusher")


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


def test_trainer_and_pusher_share_the_run_and_its_results_and_no_home() -> None:
    job = render(workspace()).job
    mounted = [{mount["name"] for mount in container(job, name)["volumeMounts"]} for name in (NAME, "pusher")]
    assert mounted[0] & mounted[1] == {"config-volume", "results-volume", "run"}


def test_a_check_job_ends_even_where_no_node_ever_takes_it() -> None:
    assert render_check_job(render(workspace()).job)["spec"]["activeDeadlineSeconds"] == 3600


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
    assert check["metadata"]["name"] == "tickets--check"
    assert [each["name"] for each in containers(check)] == ["preflight", "check"]
    assert container(check, "check")["args"][-1] == "1000"
    assert "nvidia.com/gpu" not in json.dumps(check)
    assert "persistentVolumeClaim" not in json.dumps(check)
    assert "affinity" not in pod_spec(check)
    assert names_with(check, "/run/secrets/registry") == ["preflight"]


def test_a_second_push_mounts_the_claim_and_the_secret_and_does_not_wait() -> None:
    objects = render(workspace(), results_volume="results")
    retry = render_retry_push(objects.job)
    assert retry["metadata"]["name"] == "tickets--push"
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


def test_names_of_jobs_beside_are_never_too_long_and_differ_where_names_do() -> None:
    assert helper_name("a" * 56, CHECK_JOB) == "a" * 56 + "--check"
    long = [helper_name("a" * 62 + end, CHECK_JOB) for end in "bc"]
    assert [len(name) for name in long] == [63, 63]
    assert long[0] != long[1]


@pytest.mark.parametrize("name", ["a", "a-check", "a" * 63, "a" * 57])
def test_no_workspace_can_be_called_as_a_job_beside_another(name: str) -> None:
    for end in (CHECK_JOB, PUSH_JOB):
        beside = helper_name(name, end)
        assert len(beside) <= 63
        document = workspace() | {"metadata": {"name": beside}}
        with pytest.raises(ConfigError, match="is how a Job beside"):
            render(document)
        # Nor is the Job beside one Workspace that of another: a shortened name ends as no name may.
        assert not LABEL.fullmatch(beside.removesuffix(end)) or beside == name + end


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def affinity(**given: Any) -> dict[str, Any]:
    resource = given.pop("resource")
    return pod_spec(render(workspace(resource=resource), **given).job).get("affinity", {}).get("nodeAffinity", {})


REQUIRED, PREFERRED = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))
A100 = "Standard_NC24ads_A100_v4"
IN_A100 = {"key": "node.kubernetes.io/instance-type", "operator": "In", "values": [A100]}


def test_labels_are_required_and_expressions_go_over_one_to_one() -> None:
    selector = {
        "matchLabels": {"app": "tickets", "kaito.sh/workspace": "ignored"},
        "matchExpressions": [
            {"key": "zone", "operator": "NotIn", "values": ["a", "b"]},
            {"key": "gpu", "operator": "Exists"},
        ],
    }
    (term,) = affinity(resource={"labelSelector": selector})[REQUIRED]["nodeSelectorTerms"]
    assert term["matchExpressions"] == [
        {"key": "app", "operator": "In", "values": ["tickets"]},
        {"key": "zone", "operator": "NotIn", "values": ["a", "b"]},
        {"key": "gpu", "operator": "Exists"},
    ]


def test_an_instance_type_is_required_and_labels_may_be_a_preference() -> None:
    resource = {"instanceType": A100, "labelSelector": {"matchLabels": {"app": "x"}}, "preferredNodes": ["node-1"]}
    found = affinity(resource=resource, labels_preferred=True)
    assert found[REQUIRED]["nodeSelectorTerms"] == [{"matchExpressions": [IN_A100]}]
    assert [each["preference"]["matchExpressions"][0]["key"] for each in found[PREFERRED]] == [
        "app",
        "kubernetes.io/hostname",
    ]
    assert {each["weight"] for each in found[PREFERRED]} == {100}
    (term,) = affinity(resource=resource)[REQUIRED]["nodeSelectorTerms"]
    assert [each["key"] for each in term["matchExpressions"]] == [IN_A100["key"], "app"]


def test_a_typed_instance_type_wins_and_brings_its_gpus() -> None:
    document = workspace(resource={"instanceType": A100})
    job = render(document, instance_type="Standard_NC96ads_A100_v4").job
    expressions = pod_spec(job)["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"][0]["matchExpressions"]
    assert expressions[0]["values"] == ["Standard_NC96ads_A100_v4"]
    trainer = container(job, NAME)
    assert trainer["resources"]["requests"]["nvidia.com/gpu"] == trainer["resources"]["limits"]["nvidia.com/gpu"] == "4"


def test_without_any_wish_every_node_with_a_gpu_will_do() -> None:
    assert affinity(resource={}) == {}


@pytest.mark.parametrize(
    ("instance_type", "sentence"),
    [
        ("Standard_NC6s_v3", "V100-16 has compute capability 7.0"),
        ("g4ad.xlarge", "Radeon Pro V520 is made by AMD"),
        ("trn1.2xlarge", "Trainium is made by AWS"),
    ],
)
def test_a_machine_that_cannot_train_is_refused_before_a_node_boots(instance_type: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        render(workspace(resource={"instanceType": instance_type}))


def test_of_an_unknown_machine_it_is_said_that_one_gpu_is_asked_for() -> None:
    objects = render(workspace(resource={"instanceType": "Standard_NC999"}))
    assert "instance type Standard_NC999 is in no table: one GPU is asked for; --gpus N says otherwise" in objects.notes
    assert container(objects.job, NAME)["resources"]["limits"]["nvidia.com/gpu"] == "1"


def test_what_does_not_fit_the_gpu_is_said() -> None:
    large = {"preset": {"name": "qwen2.5-coder-32b-instruct"}, "method": "lora"}
    notes = render(workspace(tuning=large, resource={"instanceType": "g5.xlarge"})).notes
    assert any("as estimated one document needs" in note and "g5.xlarge has 22" in note for note in notes)


# ── what the pod asks for ────────────────────────────────────────────────────────────────────────────────────────────


def gib(text: str) -> int:
    return int(text.removesuffix("Gi"))


def test_a_larger_model_asks_for_more_memory_and_disk() -> None:
    small = container(render(workspace()).job, NAME)["resources"]
    large = container(render(workspace(tuning={"preset": {"name": "qwen2.5-coder-32b-instruct"}})).job, NAME)[
        "resources"
    ]
    for key in ("memory", "ephemeral-storage"):
        assert gib(large["requests"][key]) > gib(small["requests"][key])
    assert gib(small["requests"]["ephemeral-storage"]) > 7.12  # the weights alone
    assert gib(large["requests"]["ephemeral-storage"]) > 61


def test_the_smallest_gpu_machine_of_a_cloud_has_room_for_the_quick_start() -> None:
    """g5.xlarge: 4 CPUs, 16 GiB, of which a kubelet leaves 3.9 and about 14.5."""
    spec = pod_spec(render(workspace(resource={"instanceType": "g5.xlarge"})).job)
    sidecars = [each for each in spec["initContainers"] if each.get("restartPolicy") == "Always"]
    requests = [each["resources"]["requests"] for each in (*spec["containers"], *sidecars)]
    assert sum(gib(each["memory"]) if each["memory"].endswith("Gi") else 0.25 for each in requests) <= 14
    assert [each["cpu"] for each in requests] == ["2", "100m"]


@pytest.mark.parametrize("claims", [{}, {"results_volume": "results", "weights_volume": "weights"}])
@pytest.mark.parametrize("model", ["phi-3-mini-4k-instruct", "qwen2.5-coder-32b-instruct"])
def test_what_a_pod_is_expected_to_write_is_asked_for_and_no_volume_is_smaller(
    model: str, claims: dict[str, Any]
) -> None:
    file = parse_objects(workspace(tuning={"preset": {"name": model}}))
    run = build_run(file, Request(place="pod"), Path("nowhere"), {})
    job = render_job(file, run, JobOptions("reg.example/tuner:1", **claims)).job
    sizes = read_sizes(run.spec, 1)
    expected = {"data-volume": sizes.data_gib, "tmp": sizes.tmp_gib}
    if not claims:
        expected |= {"model-weights-volume": sizes.weights_gib, "results-volume": sizes.results_gib}
    for name, expected_gib in expected.items():
        assert gib(volume(job, name)["emptyDir"]["sizeLimit"]) >= expected_gib, name
    disks = {name: gib(container(job, name)["resources"]["requests"]["ephemeral-storage"]) for name in (NAME, "pusher")}
    assert disks[NAME] == sum(expected.values())
    assert disks["pusher"] == gib(volume(job, "pusher-tmp")["emptyDir"]["sizeLimit"])
    # Whoever writes is expected to: each writable volume of the pod is one of these, or of a few megabytes.
    written = {each["name"] for each in pod_spec(job)["volumes"] if "emptyDir" in each} - expected.keys()
    assert written == {"run", "dshm", "pusher-tmp"}


def annotated(**annotations: str) -> dict[str, Any]:
    document = workspace()
    written = {f"tuner/{name.replace('_', '-')}": value for name, value in annotations.items()}
    return {**document, "metadata": {**document["metadata"], "annotations": written}}


def test_an_annotation_names_a_claim_as_a_flag_does_and_a_flag_wins() -> None:
    """Under a controller there are no flags for one Workspace."""
    by_annotation = render(annotated(results_volume="results", weights_volume="weights"))
    by_flag = render(workspace(), results_volume="results", weights_volume="weights")
    assert by_annotation.job["spec"] == by_flag.job["spec"]
    assert by_annotation.notes == by_flag.notes
    job = render(annotated(results_volume="results"), results_volume="other").job
    assert volume(job, "results-volume")["persistentVolumeClaim"]["claimName"] == "other"
    assert render_retry_push(by_annotation.job)


def test_a_claims_name_in_an_annotation_is_looked_at() -> None:
    with pytest.raises(ConfigError, match=r"metadata.annotations\[tuner/results-volume\] 'No_Name': must be"):
        render(annotated(results_volume="No_Name"))
    document = annotated(results_volume="results")
    document["tuning"]["output"] = {"volumeSource": CLAIM}
    with pytest.raises(ConfigError, match="the output is a volume already"):
        render(document)


def test_the_registry_keeps_checkpoints_by_flag_and_by_annotation() -> None:
    plain, by_flag = render(workspace()), render(workspace(), registry_checkpoints=True)
    assert render(annotated(checkpoints="registry")).job["spec"] == by_flag.job["spec"]
    for name in ("preflight", "pusher"):
        assert container(by_flag.job, name)["args"] == [*container(plain.job, name)["args"], "--registry-checkpoints"]
    assert "--registry-checkpoints" not in container(by_flag.job, by_flag.job["metadata"]["name"])["args"]
    assert any("a lost node loses the run (with --registry-checkpoints" in note for note in plain.notes)
    assert not any("a lost node loses the run" in note for note in by_flag.notes)


def test_checkpoints_in_the_registry_need_one_and_no_volume() -> None:
    with pytest.raises(ConfigError, match="on a volume, which outlives the pod"):
        render(workspace(), registry_checkpoints=True, results_volume="results")
    with pytest.raises(ConfigError, match="on a volume, which outlives the pod"):
        render(annotated(checkpoints="registry", results_volume="results"))
    with pytest.raises(ConfigError, match=r"metadata.annotations\[tuner/checkpoints\]: 'disk' keeps no checkpoints"):
        render(annotated(checkpoints="disk"))


def test_a_claim_is_not_counted_as_the_nodes_disk() -> None:
    job = render(workspace(), results_volume="results", weights_volume="weights").job
    plain = render(workspace()).job
    for name in ("data-downloader", NAME):
        on_claims = container(job, name)["resources"]["requests"]["ephemeral-storage"]
        assert gib(on_claims) < gib(container(plain, name)["resources"]["requests"]["ephemeral-storage"])
    assert volume(job, "results-volume")["persistentVolumeClaim"]["claimName"] == "results"
    assert volume(job, "model-weights-volume")["persistentVolumeClaim"]["claimName"] == "weights"


def test_a_model_of_unknown_size_gets_an_allowance_no_limit_and_a_line() -> None:
    objects = render(workspace(tuning={"preset": {"name": "someone/some-model"}}))
    assert volume(objects.job, "model-weights-volume") == {"name": "model-weights-volume", "emptyDir": {}}
    assert any("someone/some-model is no preset: room for 30 GiB" in note for note in objects.notes)


def test_results_are_mounted_at_output_dir() -> None:
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "mine"},
        "data": {"training_config.yaml": "training_config: {TrainingArguments: {output_dir: /mnt/out/run}}"},
    }
    job = render(workspace(tuning={"config": "mine"}), config).job
    assert names_with(job, "/mnt/out/run") == ["preflight", "data-downloader", "pusher", NAME]
    config["data"]["training_config.yaml"] = "training_config: {TrainingArguments: {output_dir: /mnt/data/out}}"
    with pytest.raises(ConfigError, match="in a pod /mnt/data holds the data"):
        render(workspace(tuning={"config": "mine"}), config)


def test_the_users_data_volume_is_read_only_in_every_container() -> None:
    job = render(workspace(tuning={"input": {"volumeSource": CLAIM}})).job
    mounts = [mount for each in containers(job) for mount in each["volumeMounts"] if mount["name"] == "data-volume"]
    assert len(mounts) == 2
    assert all(mount["readOnly"] for mount in mounts)


def test_an_image_volume_is_pulled_by_the_kubelet_with_the_inputs_secrets() -> None:
    source = {"input": {"image": "contoso.azurecr.io/data:1", "imagePullSecrets": ["pull"]}}
    objects = render(workspace(tuning=source), image_volume=True)
    spec = pod_spec(objects.job)
    assert spec["imagePullSecrets"] == [{"name": "pull"}]
    assert volume(objects.job, "data-volume")["image"] == {"reference": "contoso.azurecr.io/data:1"}
    assert [each["name"] for each in spec["initContainers"]] == ["preflight", "data-downloader", "pusher"]
    assert "an image volume needs Kubernetes 1.35" in " ".join(objects.notes)


def test_base_weights_from_an_image_are_pulled_with_the_presets_secrets() -> None:
    options = {"image": "contoso.azurecr.io/weights:1", "imagePullSecrets": ["weights-pull"]}
    job = render(workspace(tuning={"preset": {"name": "phi-4-mini-instruct", "presetOptions": options}})).job
    assert names_with(job, "/run/secrets/pull/weights-pull") == ["preflight", "data-downloader"]


def test_a_deadline_a_ttl_and_retries_are_the_jobs() -> None:
    spec = render(workspace(), ttl_s=60, deadline_s=3600, backoff_limit=0).job["spec"]
    assert (spec["ttlSecondsAfterFinished"], spec["activeDeadlineSeconds"], spec["backoffLimit"]) == (60, 3600, 0)
    plain = render(workspace()).job["spec"]
    assert "ttlSecondsAfterFinished" not in plain
    assert "activeDeadlineSeconds" not in plain


def test_the_queue_of_the_workspaces_own_labels_is_the_jobs_and_a_typed_one_wins() -> None:
    labelled = workspace(labels={"kueue.x-k8s.io/queue-name": "team", "other": "x"})
    assert render(labelled).job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team"
    assert "other" not in render(labelled).job["metadata"]["labels"]
    assert render(labelled, queue="mine").job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "mine"
    check = render_check_job(render(labelled).job)
    assert "kueue.x-k8s.io/queue-name" not in check["metadata"]["labels"]


def test_spot_nodes_are_tolerated_and_the_pod_is_not_held_on_to() -> None:
    pods = [render(workspace(), **options).job["spec"]["template"] for options in ({}, {"spot": True})]
    held = [
        "karpenter.sh/do-not-disrupt" in each["metadata"]["annotations"]
        and "cluster-autoscaler.kubernetes.io/safe-to-evict" in each["metadata"]["annotations"]
        for each in pods
    ]
    assert held == [True, False]
    keys = {each["key"] for each in pods[1]["spec"]["tolerations"]}
    assert keys >= {
        "kubernetes.azure.com/scalesetpriority",
        "cloud.google.com/gke-spot",
        "nvidia.com/gpu",
        "sku",
        "gpu",
    }


def test_a_clouds_identity_is_kept_from_the_trainer_and_no_token_is_mounted() -> None:
    template = render(workspace(), service_account="tuner", workload_identity=True).job["spec"]["template"]
    assert template["metadata"]["labels"]["azure.workload.identity/use"] == "true"
    assert template["metadata"]["annotations"]["azure.workload.identity/skip-containers"] == NAME
    assert template["spec"]["automountServiceAccountToken"] is False


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"workload_identity": True}, "--workload-identity: whose identity?"),
        ({"queue_priority": "high"}, "--queue-priority: there is no queue for it"),
        ({"gpus": 0}, "--gpus: 0 GPUs: at least one trains"),
        ({"image_volume": True}, "--image-volume: the input is no image"),
    ],
)
def test_options_that_mean_nothing_alone_are_refused(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence.replace("?", "\\?")):
        render(workspace(), **options)


def test_names_that_no_object_can_have_are_refused_all_at_once() -> None:
    flags = ("service_account", "results_volume", "weights_volume", "queue", "priority_class", "scheduler")
    with pytest.raises(ConfigError) as caught:
        render(workspace(), **dict.fromkeys(flags, "Not: a {name}"), namespace="a.b", image_pull_secrets=("",))
    paths = [problem.path.partition(" ")[0] for problem in caught.value.problems]
    assert paths == ["--namespace", *(f"--{flag.replace('_', '-')}" for flag in flags), "--image-pull-secret"]


@pytest.mark.parametrize("image", ["", "two words", "reg.example/x:y:z", "https://reg.example/x"])
def test_an_image_that_no_kubelet_can_pull_is_refused(image: str) -> None:
    file = parse_objects(workspace())
    run = build_run(file, Request(place="pod"), Path("nowhere"), {})
    with pytest.raises(ConfigError, match="--set-image"):
        render_job(file, run, JobOptions(image))


def test_an_annotation_that_names_no_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"metadata\.annotations\[tuner/sources-secret\]"):
        render(workspace(annotations={"tuner/sources-secret": "a\nb: c"}))


def test_what_the_pod_needs_to_reach_a_registry_the_check_and_the_second_push_have_too() -> None:
    hosts = [{"ip": "10.0.0.7", "hostnames": ["registry.internal"]}]
    patch = Document({"spec": {"template": {"spec": {"hostAliases": hosts}}}})
    options = {"results_volume": "results", "patches": (patch,), "service_account": "tuner", "workload_identity": True}
    job = render(workspace(), **options).job
    for made in (render_check_job(job), render_retry_push(job)):
        assert pod_spec(made)["hostAliases"] == hosts
        assert pod_spec(made)["serviceAccountName"] == "tuner"
        assert made["spec"]["template"]["metadata"]["labels"]["azure.workload.identity/use"] == "true"


def test_headers_from_the_command_line_are_in_our_secret(tmp_path: Path) -> None:
    text = json.dumps({"https://data.contoso.com": {"bearer": "open-sesame"}})
    (tmp_path / "headers.json").write_text(text)
    objects = render(workspace(), request=Request(source_headers=tmp_path / "headers.json"))
    (secret,) = objects.secrets
    assert base64.b64decode(secret["data"]["sources.json"]).decode() == text
    assert "open-sesame" not in json.dumps([objects.config_map, objects.job])


def test_a_claim_for_results_beside_an_output_volume_is_refused() -> None:
    with pytest.raises(ConfigError, match="the output is a volume already"):
        render(workspace(tuning={"output": {"volumeSource": CLAIM}}), results_volume="results")


def test_a_workspace_that_is_made_anew_takes_nothing_that_goes_with_the_earlier_one() -> None:
    signed = workspace(tuning={"input": {"urls": ["https://a.contoso.com/x.csv?sig=1"]}})
    owner = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "name": NAME, "controller": True}
    made = [render(signed, owner={**owner, "uid": uid}) for uid in ("1", "1", "2")]
    first, again, anew = ([each["metadata"]["name"] for each in (it.config_map, *it.secrets)] for it in made)
    assert first == again
    assert len(first) == 2
    assert not set(first) & set(anew)


def test_the_owner_of_a_workspace_owns_all_that_is_made_for_it() -> None:
    owner = {"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "name": NAME, "uid": "1", "controller": True}
    objects = render(workspace(tuning={"input": {"urls": ["https://a.contoso.com/x.csv?sig=1"]}}), owner=owner)
    assert len(objects.objects) == 3
    assert all(each["metadata"]["ownerReferences"] == [owner] for each in objects.objects)
    assert render_check_job(objects.job)["metadata"]["ownerReferences"] == [owner]


def test_a_run_that_would_be_lost_with_its_node_says_so() -> None:
    sentence = "checkpoints and adapter are in the pod: a lost node loses the run"
    assert any(sentence in note for note in render(workspace()).notes)
    assert not any(sentence in note for note in render(workspace(), results_volume="results").notes)


def test_a_volume_that_a_restricted_namespace_refuses_is_a_line_and_no_error() -> None:
    objects = render(workspace(tuning={"input": {"volumeSource": {"hostPath": {"path": "/data"}}}}))
    assert any("a hostPath is refused where Pod Security is restricted" in note for note in objects.notes)


# ── secrets of the file ──────────────────────────────────────────────────────────────────────────────────────────────


def test_secrets_in_the_file_that_the_run_names_come_along_and_others_do_not() -> None:
    def secret(name: str) -> dict[str, Any]:
        config = json.dumps({"auths": {"contoso.azurecr.io": {"auth": "bWU6cHc="}}})
        return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "stringData": {"config.json": config}}

    objects = render(workspace(), secret("push"), secret("other"), namespace="tuning")
    (carried,) = objects.secrets
    assert carried["metadata"] == {"name": "push", "namespace": "tuning"}
    assert carried["stringData"] == secret("push")["stringData"]


def test_a_names_hash_of_a_secret_is_slow_to_guess_from_and_the_same_for_the_same() -> None:
    def name_of(query: str) -> str:
        (secret,) = render(workspace(tuning={"input": {"urls": [f"https://a.contoso.com/x.csv?{query}"]}})).secrets
        return secret["metadata"]["name"]

    assert name_of("sig=1") == name_of("sig=1") != name_of("sig=2")
    fast = hashlib.sha256(json.dumps({"0000-x.csv": "sig=1"}).encode()).hexdigest()
    assert fast[:10] not in name_of("sig=1")


# ── hostile values ───────────────────────────────────────────────────────────────────────────────────────────────────


def config_with(text: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "mine"},
        "data": {"training_config.yaml": text},
    }


def test_a_config_map_over_a_mebibyte_is_refused_with_what_is_large() -> None:
    comment = "# " + "x" * (2**20 - 100)
    with pytest.raises(ConfigError, match=r"most of them are training_config\.yaml"):
        render(workspace(tuning={"config": "mine"}), config_with(f"training_config: {{}}\n{comment}\n"))


def test_a_config_map_that_kubectl_apply_cannot_annotate_is_said() -> None:
    comment = "# " + "x" * 300_000
    objects = render(workspace(tuning={"config": "mine"}), config_with(f"training_config: {{}}\n{comment}\n"))
    assert any("kubectl apply takes it with --server-side only" in note for note in objects.notes)


@pytest.mark.parametrize("name", ["Upper", "a.b", "a" * 64, "-a", "a_b", "preflight", "pusher", "check", "puller", ""])
def test_names_that_a_job_or_its_container_cannot_have_are_refused_at_the_door(name: str) -> None:
    with pytest.raises(ConfigError, match=r"metadata\.name"):
        render({**workspace(), "metadata": {"name": name}})


def test_the_longest_name_fits_every_object() -> None:
    name = "a" * 63
    objects = render({**workspace(), "metadata": {"name": name}}, results_volume="results")
    for job in (objects.job, render_check_job(objects.job), render_retry_push(objects.job)):
        assert job_problems(job) == []


# What would be another manifest, if any value were pasted into one.
YAML_IN = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Zl", "Zp")), max_size=40)
LABEL_NAME = st.from_regex(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(
    name=LABEL_NAME.filter(lambda name: name not in CONTAINERS and "--" not in name[:4]),
    path=YAML_IN,
    query=YAML_IN,
    label=st.from_regex(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?", fullmatch=True),
    comment=YAML_IN,
    secret=st.from_regex(r"[a-z0-9]([-a-z0-9.]{0,20}[a-z0-9])?", fullmatch=True).filter(SUBDOMAIN.fullmatch),
)
def test_no_value_of_a_workspace_changes_what_it_is_written_into(
    name: str, path: str, query: str, label: str, comment: str, secret: str
) -> None:
    url = f"https://data.contoso.com/{quote(path)}/x.csv?{quote(query, safe='=&:')}\n".strip()
    document = {
        **workspace(
            tuning={
                "input": {"urls": [url]},
                "output": {**TO_IMAGE, "imagePushSecret": secret},
                "config": "mine",
            },
            resource={"labelSelector": {"matchLabels": {"app": label}}},
        ),
        "metadata": {"name": name, "annotations": {"any": comment}},
    }
    config = config_with(f"training_config: {{}}\n# {comment}\n")
    objects = render(document, config)
    again = list(yaml.safe_load_all(dump_manifests(objects.objects)))
    assert again == json.loads(json.dumps(list(objects.objects)))
    config_map, job = again[0], again[-1]
    assert [each["kind"] for each in again] == ["ConfigMap", *(["Secret"] if query else []), "Job"]
    assert config_map["data"]["training_config.yaml"] == config["data"]["training_config.yaml"]
    assert RunSpec.model_validate_json(config_map["data"]["run.json"]).sources[0].url == url.partition("?")[0]
    assert job["metadata"]["name"] == container(job, name)["name"] == name
    assert volume(job, "docker-config")["secret"]["secretName"] == secret
    terms = pod_spec(job)["affinity"]["nodeAffinity"][REQUIRED]["nodeSelectorTerms"]
    assert terms == [{"matchExpressions": [{"key": "app", "operator": "In", "values": [label]}]}]
    assert {key for each in containers(job) for key in each} <= CONTAINER_KEYS


CONTAINER_KEYS = set().union(*(each.keys() for each in containers(load_template("job.yaml"))))
