"""Workspace + Run + JobOptions → the objects of a run: ConfigMap, Secrets, Job. Pure: no clock, no cluster.

    job_templates/job.yaml ── values by name ── user's patches ── what must not change ── checks ──► Job

Plain dicts end to end: the client's models refuse or drop what they do not know.
"""

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tuner import pod
from tuner.cluster import templates
from tuner.cluster.checks import job_problems, restricted_problems
from tuner.cluster.job_options import (
    DIGEST_ANNOTATION,
    GPU,
    QUEUE_PREFIX,
    REVISION_ANNOTATION,
    Ask,
    JobOptions,
    machine_of,
    option_problems,
    with_annotations,
    written_instance_type,
)
from tuner.cluster.nodes import label_expressions, node_affinity
from tuner.cluster.patch import apply_patches, parse_patches
from tuner.cluster.sizes import UNKNOWN_WEIGHTS_GIB, Sizes, read_sizes
from tuner.cluster.templates import EXAMPLE_NAME, Manifest
from tuner.errors import ConfigError, InputMissingError
from tuner.instance_types import GIB, Machine
from tuner.plan import make_plan
from tuner.request import HF_TOKEN, JOB_PATCH_ANNOTATION, RESULTS_VOLUME_ANNOTATION, Run
from tuner.runspec import HubModel, ImageSource
from tuner.workspace import (
    TRAINING_CONFIG_KEY,
    Secret,
    WorkspaceFile,
    require_tuning,
)
from tuner.yaml_lines import Document

SECRET_MODE = 0o440  # fsGroup reads it

_OBJECT_BYTES = 2**20  # what the API server takes of a ConfigMap or Secret
_APPLY_BYTES = 250_000  # kubectl apply keeps the whole object in one annotation of at most 256 KiB
_HASH_CHARACTERS = 10
_DISRUPTION = {"cluster-autoscaler.kubernetes.io/safe-to-evict": "false", "karpenter.sh/do-not-disrupt": "true"}
# What the clouds put on nodes that may go away at any time; Amazon leaves the taint to the cluster's owner.
_SPOT_TAINTS = {
    "kubernetes.azure.com/scalesetpriority": "spot",
    "cloud.google.com/gke-spot": "true",
    "eks.amazonaws.com/capacityType": "SPOT",
    "karpenter.sh/capacity-type": "spot",
}


@dataclass(frozen=True)
class JobObjects:
    """What to create, in this order: the ConfigMap, the Secrets, the Job. `notes` are sentences for who asked."""

    config_map: Manifest
    secrets: tuple[Manifest, ...] = field(repr=False)
    job: Manifest
    notes: tuple[str, ...] = ()

    @property
    def objects(self) -> tuple[Manifest, ...]:
        return (self.config_map, *self.secrets, self.job)


def render_job(file: WorkspaceFile, run: Run, options: JobOptions) -> JobObjects:
    """The objects of a run that `build_run` made for a pod, with `world_size=count_gpus(…)`.

    Raises ConfigError with all that Kubernetes would refuse, InputMissingError for a patch that is not there.
    """
    ask = Ask(file, require_tuning(file), run, with_annotations(file.workspace, options))
    problems = list(option_problems(ask))
    if problems:
        raise ConfigError.of(problems)
    config_map = _config_map(ask)
    own = _own_secret(ask)
    job = _job(ask, config_map["metadata"]["name"], own["metadata"]["name"] if own else None)
    job = apply_patches(job, [*_annotations_patches(ask), *options.patches])
    if problems := job_problems(job):
        raise ConfigError.of(problems)
    secrets = (*_carried_secrets(ask), *([own] if own else []))
    return JobObjects(config_map, secrets, job, tuple(_notes(ask, config_map, job)))


def _annotations_patches(ask: Ask) -> list[Document]:
    """Those in the ConfigMap that the Workspace's annotation names."""
    written = ask.workspace.metadata.annotations.get(JOB_PATCH_ANNOTATION)
    if written is None or not ask.options.patch_annotation:
        return []
    origin = f"metadata.annotations[{JOB_PATCH_ANNOTATION}]"
    name, slash, key = written.partition("/")
    if not slash:
        raise ConfigError(f"{origin}: {written!r} is not CONFIGMAP/KEY")
    config_map = ask.file.config_maps.get(name)
    if config_map is None or key not in config_map.data:
        missing = f"ConfigMap {name!r} is" if config_map is None else f"the key {key!r} of ConfigMap {name!r} is"
        raise InputMissingError(
            f"{origin}: {missing} not in the Workspace's file", hint="put it there as another YAML document"
        )
    return parse_patches(*config_map.text(key))


# ── the ConfigMap and the Secrets ────────────────────────────────────────────────────────────────────────────────────


def _config_map(ask: Ask) -> Manifest:
    """What every container reads; its name says what is in it, so an edit is another object."""
    data = {pod.RUN_JSON: ask.spec.model_dump_json(indent=2)}
    if ask.options.config_text is not None:
        data[TRAINING_CONFIG_KEY] = ask.options.config_text
    elif ask.tuning.config and ask.tuning.config in ask.file.config_maps:
        data[TRAINING_CONFIG_KEY] = ask.file.config_maps[ask.tuning.config].training_config().text
    if ask.options.ca_text is not None:
        data[pod.CA_CRT] = ask.options.ca_text
    size_bytes = sum(len(key) + len(text.encode()) for key, text in data.items())
    if size_bytes > _OBJECT_BYTES:
        largest = max(data, key=lambda key: len(data[key]))
        raise ConfigError(
            f"the run's ConfigMap has {size_bytes:,} bytes, and Kubernetes takes {_OBJECT_BYTES:,}; "
            f"most of them are {largest}",
            hint="what is so large in tuning.config? a chat template may be left out where the model has its own",
        )
    digest = hashlib.sha256((json.dumps(data, sort_keys=True) + _owner_uid(ask)).encode()).hexdigest()
    metadata = ask.metadata(f"{ask.name}-config-{digest[:_HASH_CHARACTERS]}")
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "immutable": True, "data": data}


def _owner_uid(ask: Ask) -> str:
    """In the names: what an earlier Workspace of this name leaves behind is about to be collected, and not as good."""
    return str(ask.options.owner["uid"]) if ask.options.owner else ""


def _own_secret(ask: Ask) -> Manifest | None:
    """Signed queries and the headers that were given on the command line; None where there are none."""
    data: dict[str, str] = {}
    if ask.run.secrets.queries:
        data[pod.QUERIES_JSON] = json.dumps(ask.run.secrets.queries, sort_keys=True)
    if ask.run.secrets.source_headers:
        (data[pod.SOURCES_JSON],) = ask.run.secrets.source_headers
    if not data:
        return None
    # Names are for many to read: trying passwords against this one takes 16 MiB and tens of milliseconds for each.
    text = json.dumps(data, sort_keys=True).encode()
    digest = hashlib.scrypt(text, salt=(ask.name + _owner_uid(ask)).encode(), n=2**14, r=8, p=1).hex()
    encoded = {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}
    metadata = ask.metadata(f"{ask.name}-sources-{digest[:_HASH_CHARACTERS]}")
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "immutable": True, "type": "Opaque"}
    return {**secret, "data": encoded}


def _carried_secrets(ask: Ask) -> Iterator[Manifest]:
    """Secrets of the Workspace's file that the pod mounts: without them in the cluster it would wait for ever."""
    needed = (ask.push_secret, *ask.pull_secrets, ask.hub_secret, ask.headers_secret, *_kubelet_secrets(ask))
    for name in dict.fromkeys(needed):
        if name and name in ask.file.secrets:
            yield _as_manifest(ask.file.secrets[name], ask)


def _as_manifest(secret: Secret, ask: Ask) -> Manifest:
    metadata: Manifest = {"name": secret.metadata.name}
    if namespace := ask.options.namespace or secret.metadata.namespace or ask.workspace.metadata.namespace:
        metadata["namespace"] = namespace
    for key in ("labels", "annotations"):
        if written := getattr(secret.metadata, key):
            metadata[key] = dict(written)
    manifest: Manifest = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": secret.type}
    manifest |= {"data": dict(secret.data)} if secret.data else {}
    manifest |= {"stringData": dict(secret.string_data)} if secret.string_data else {}
    return manifest


# ── the Job ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _job(ask: Ask, config_map_name: str, own_secret_name: str | None) -> Manifest:
    job = templates.load_template("job-volume-output.yaml" if ask.output_volume else "job.yaml")
    sizes = read_sizes(ask.spec, ask.gpus)
    _set_names(job, ask)
    _set_policy(job, ask)
    _set_place(job, ask)
    _set_identity(job, ask)
    templates.set_volume(job, pod.CONFIG_VOLUME, {"configMap": {"name": config_map_name, "defaultMode": SECRET_MODE}})
    _set_data(job, ask, sizes)
    _set_weights(job, ask, sizes)
    _set_results(job, ask, sizes)
    _set_secrets(job, ask, own_secret_name)
    _set_resources(job, ask, sizes)
    return job


def _data_container(ask: Ask) -> str:
    """By KAITO's names: images are pulled, all else is downloaded."""
    pulls = any(isinstance(source, ImageSource) for source in ask.spec.sources)
    return pod.PULLER if pulls else pod.DATA_DOWNLOADER


def _set_names(job: Manifest, ask: Ask) -> None:
    digest = {DIGEST_ANNOTATION: ask.spec.digest}
    job["metadata"] = ask.metadata(ask.name)
    templates.annotate(job, {REVISION_ANNOTATION: str(ask.options.revision), **digest})
    template = templates.pod_template(job)
    template["metadata"]["labels"] = ask.labels
    templates.annotate(template, digest)
    templates.rename_container(job, EXAMPLE_NAME, ask.name)
    templates.rename_container(job, pod.DATA_DOWNLOADER, _data_container(ask))
    for container in templates.containers(job):
        container["image"] = ask.options.image


def _set_policy(job: Manifest, ask: Ask) -> None:
    """How often, how long, in which queue."""
    options, spec = ask.options, templates.pod_spec(job)
    job["spec"]["backoffLimit"] = options.backoff_limit
    if options.ttl_s is not None:
        job["spec"]["ttlSecondsAfterFinished"] = options.ttl_s
    if options.deadline_s is not None:
        job["spec"]["activeDeadlineSeconds"] = options.deadline_s
    # A queue that the Workspace's own labels name is the Job's.
    written = ask.workspace.metadata
    templates.label(job, {key: value for key, value in written.labels.items() if key.startswith(QUEUE_PREFIX)})
    placement = {key: value for key, value in written.annotations.items() if key.startswith(f"{QUEUE_PREFIX}podset-")}
    templates.annotate(templates.pod_template(job), placement)
    if options.queue:
        templates.label(job, {f"{QUEUE_PREFIX}queue-name": options.queue})
    if options.queue_priority:
        templates.label(job, {f"{QUEUE_PREFIX}priority-class": options.queue_priority})
    for key, value in (
        ("priorityClassName", options.priority_class),
        ("schedulerName", options.scheduler),
        ("runtimeClassName", options.runtime_class),
    ):
        if value:
            spec[key] = value
    if options.spot or options.disruption_ok:
        annotations = templates.pod_template(job)["metadata"]["annotations"]
        for key in _DISRUPTION:
            del annotations[key]


def _set_place(job: Manifest, ask: Ask) -> None:
    """On which nodes: labels, instance type, preferred nodes, taints."""
    spec = templates.pod_spec(job)
    if ask.options.spot:
        spec["tolerations"] += [
            {"key": key, "operator": "Equal", "value": value, "effect": "NoSchedule"}
            for key, value in _SPOT_TAINTS.items()
        ]
    affinity = {} if ask.spec.smoke else node_affinity(ask.workspace, ask.options)
    if affinity:
        spec["affinity"] = {"nodeAffinity": affinity}
    else:
        del spec["affinity"]


def _set_identity(job: Manifest, ask: Ask) -> None:
    """A service account where asked for; its token is mounted nowhere, and a cloud's identity not in the trainer."""
    spec, options = templates.pod_spec(job), ask.options
    if options.service_account:
        spec["serviceAccountName"] = options.service_account
    if names := _kubelet_secrets(ask):
        spec["imagePullSecrets"] = [{"name": name} for name in names]
    if options.workload_identity:
        template = templates.pod_template(job)
        templates.label(template, {"azure.workload.identity/use": "true"})
        for key in ("azure.workload.identity/skip-containers", "eks.amazonaws.com/skip-containers"):
            templates.annotate(template, {key: ask.name})


def _kubelet_secrets(ask: Ask) -> tuple[str, ...]:
    """With what the kubelet pulls: our own image, and an image volume."""
    names = list(ask.options.image_pull_secrets)
    if ask.input_volume and "image" in ask.input_volume:
        names += ask.input_pull_secrets
    return tuple(dict.fromkeys(names))


def _set_data(job: Manifest, ask: Ask, sizes: Sizes) -> None:
    volume = ask.input_volume
    if volume is None:
        templates.set_volume(job, pod.DATA_VOLUME, {"emptyDir": {"sizeLimit": f"{sizes.data_limit_gib}Gi"}})
        return
    templates.set_volume(job, pod.DATA_VOLUME, volume)
    templates.make_read_only(job, pod.DATA_VOLUME)


def _set_weights(job: Manifest, ask: Ask, sizes: Sizes) -> None:
    claim = ask.options.weights_volume
    if claim:
        templates.set_volume(job, pod.WEIGHTS_VOLUME, {"persistentVolumeClaim": {"claimName": claim}})
        return
    limit = {"sizeLimit": f"{sizes.weights_limit_gib}Gi"} if sizes.weights_limit_gib else {}
    templates.set_volume(job, pod.WEIGHTS_VOLUME, {"emptyDir": limit})


def _set_results(job: Manifest, ask: Ask, sizes: Sizes) -> None:
    """The user's volume, a claim, or the pod's own, at output_dir."""
    source: Mapping[str, Any] = {"emptyDir": {"sizeLimit": f"{sizes.results_limit_gib}Gi"}}
    if ask.options.results_volume:
        source = {"persistentVolumeClaim": {"claimName": ask.options.results_volume}}
    templates.set_volume(job, pod.RESULTS_VOLUME, ask.output_volume or source)
    templates.move_mounts(job, pod.RESULTS_VOLUME, str(pod.results_dir(ask.spec)))
    if templates.has_container(job, pod.PUSHER):
        # On a claim the adapter outlives the pod and `tuner retry-push` finishes; here it must be now or never.
        hold = [] if ask.options.results_volume else ["--hold", str(ask.options.push_hold_s)]
        kept = ["--registry-checkpoints"] if ask.options.registry_checkpoints else []
        templates.container(job, pod.PUSHER)["args"] = ["stage", "push", "--pod", "--wait", *hold, *kept]
        templates.container(job, pod.PREFLIGHT)["args"] += kept


def _set_secrets(job: Manifest, ask: Ask, own_secret_name: str | None) -> None:
    """Each Secret whole and read-only, in the containers that need it and in no other; none in the trainer."""
    before = (pod.PREFLIGHT, _data_container(ask))
    if name := ask.push_secret:
        templates.set_volume(job, pod.PUSH_SECRET_VOLUME, _secret_volume(name))
        for container in (pod.PREFLIGHT, pod.PUSHER):
            templates.set_env(templates.container(job, container), pod.PUSH_SECRET_ENV, name)
    elif templates.has_volume(job, pod.PUSH_SECRET_VOLUME):
        templates.remove_volume(job, pod.PUSH_SECRET_VOLUME)
        for container in (pod.PREFLIGHT, pod.PUSHER):
            templates.remove_env(templates.container(job, container), pod.PUSH_SECRET_ENV)
    mounted: list[tuple[str, str, str]] = []
    for index, name in enumerate(ask.pull_secrets):
        volume = _pull_volume(index)
        mounted.append((volume, name, str(pod.PULL_SECRETS_DIR / name)))
    if own_secret_name:
        mounted.append((pod.SOURCES_VOLUME, own_secret_name, str(pod.SOURCES_DIR)))
    if name := ask.headers_secret:
        mounted.append((pod.HEADERS_VOLUME, name, str(pod.HEADERS_DIR)))
    for volume, name, path in mounted:
        templates.set_volume(job, volume, _secret_volume(name))
        for container in before:
            templates.mount(templates.container(job, container), volume, path, read_only=True)
    if name := ask.hub_secret:
        for container in before:
            templates.set_secret_env(templates.container(job, container), HF_TOKEN, name, HF_TOKEN)
            templates.set_env(templates.container(job, container), pod.HUB_SECRET_ENV, name)


def _pull_volume(index: int) -> str:
    """`docker-config-0-tuning-input`: nearly KAITO's name, whose part from `input.name` may not be a volume's."""
    return f"{pod.PUSH_SECRET_VOLUME}-{index}-tuning-input"


def _secret_volume(name: str) -> Manifest:
    return {"secret": {"secretName": name, "defaultMode": SECRET_MODE}}


def _set_resources(job: Manifest, ask: Ask, sizes: Sizes) -> None:
    """Requests: what the scheduler, Kueue and the order of eviction go by. The pusher's own are in the template.

    No limit on a container's disk: each volume has its own, and one that is passed evicts the pod as well.
    """
    weights = 0 if ask.options.weights_volume else sizes.weights_gib
    data = 0 if ask.input_volume else sizes.data_gib
    results = sizes.results_gib if not ask.output_volume and not ask.options.results_volume else 0
    fetch = templates.container(job, _data_container(ask))
    fetch["resources"]["requests"]["ephemeral-storage"] = f"{max(1, weights + data)}Gi"
    trainer = templates.container(job, ask.name)
    trainer["resources"] = {
        "requests": {
            "cpu": str(sizes.cpus),
            "memory": f"{sizes.memory_gib}Gi",
            "ephemeral-storage": f"{weights + data + results + sizes.tmp_gib}Gi",
        },
        "limits": {"memory": f"{sizes.memory_limit_gib}Gi"},
    }
    if sizes.gpus:
        for kind in trainer["resources"].values():
            kind[GPU] = str(sizes.gpus)
    templates.set_volume(job, pod.SHM_VOLUME, {"emptyDir": {"medium": "Memory", "sizeLimit": f"{sizes.shm_gib}Gi"}})
    templates.set_volume(job, pod.TMP_VOLUME, {"emptyDir": {"sizeLimit": f"{sizes.tmp_limit_gib}Gi"}})


# ── what is worth a line ─────────────────────────────────────────────────────────────────────────────────────────────


def _notes(ask: Ask, config_map: Mapping[str, Any], job: Mapping[str, Any]) -> Iterator[str]:
    options, spec = ask.options, ask.spec
    instance_type = written_instance_type(ask.workspace, options)
    machine = None if spec.smoke else machine_of(ask.workspace, options)
    for other in ask.file.other_kinds:
        yield f"{other} stands in the Workspace's file and is not rendered: apply it yourself"
    if spec.smoke:
        yield "a smoke run: a tiny random model, no GPU, any node"
    elif machine is None and options.gpus is None:
        what = f"instance type {instance_type} is in no table" if instance_type else "no instance type is written"
        yield f"{what}: one GPU is asked for; --gpus N says otherwise"
    if machine and options.gpus is not None and options.gpus != machine.gpus:
        yield f"{machine.name} has {machine.gpus} GPUs, {options.gpus} are asked for"
    if options.labels_preferred and any(True for _ in label_expressions(ask.workspace)) and not spec.smoke:
        yield (
            "labelSelector is a preference only: KAITO would put the labels on nodes it makes, an autoscaler does not"
        )
    if not spec.smoke:
        yield from _fit_notes(ask, machine)
    if not ask.output_volume and not options.results_volume and not spec.smoke:
        what = (
            "the adapter is in the pod"
            if options.registry_checkpoints
            else "checkpoints and adapter are in the pod: a lost node loses the run (with --registry-checkpoints what "
            "it did since the last one)"
        )
        yield (
            f"{what}, and while the registry is down the GPU is held for up to {options.push_hold_s:,} s; "
            f"--results-volume CLAIM, or the annotation {RESULTS_VOLUME_ANNOTATION}, keeps them"
        )
    if spec.preset.gated and not ask.hub_secret and isinstance(spec.base_model, HubModel):
        yield f"{spec.base_model.id} is gated: without presetOptions.modelAccessSecret the preflight will be denied"
    if options.image_volume or (ask.input_volume and "image" in ask.input_volume):
        yield "an image volume needs Kubernetes 1.35, or 1.31 with the feature gate ImageVolume"
    if JOB_PATCH_ANNOTATION in ask.workspace.metadata.annotations and not options.patch_annotation:
        yield f"the annotation {JOB_PATCH_ANNOTATION} is left out: a Workspace's author may not patch Jobs here"
    for problem in restricted_problems(templates.pod_spec(job)):
        yield f"{problem.path}: {problem.message} where Pod Security is restricted"
    size_bytes = len(json.dumps(config_map))
    if size_bytes > _APPLY_BYTES:
        yield f"the ConfigMap has {size_bytes:,} bytes: kubectl apply takes it with --server-side only"


def _fit_notes(ask: Ask, machine: Machine | None) -> Iterator[str]:
    """Whether the GPU holds it, where both are known; and what is not known."""
    if not ask.spec.preset.weights_gib and not ask.options.weights_volume and isinstance(ask.spec.base_model, HubModel):
        yield f"{ask.spec.preset.name} is no preset: room for {UNKNOWN_WEIGHTS_GIB} GiB of weights is asked for"
    if machine is None:
        return
    try:
        plan = make_plan(ask.spec.preset, ask.spec.training, machine)
    except ConfigError:
        return  # a model whose dimensions nobody knows yet
    if plan.verdict == "does not fit":
        needed = plan.estimate.total / GIB
        yield (
            f"as estimated one document needs {needed:.0f} GiB, and {machine.name} has {machine.gpu.memory_gib:.0f} "
            "on each GPU; tuner plan says what would fit"
        )
