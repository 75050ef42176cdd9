"""What is asked of a Job: the Workspace, its annotations and what was typed, in one value, and whether it makes sense.

cluster/job.py makes the objects of it. Pure.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from tuner import __version__, pod
from tuner.cluster.templates import Manifest
from tuner.errors import ConfigError, Problem
from tuner.instance_types import Machine, find_instance_type
from tuner.reference import parse_reference
from tuner.request import (
    CHECKPOINTS_ANNOTATION,
    RESULTS_VOLUME_ANNOTATION,
    SOURCES_ANNOTATION,
    WEIGHTS_VOLUME_ANNOTATION,
    Run,
    annotated_checkpoints,
)
from tuner.runspec import (
    DirectoryDestination,
    ImageDestination,
    ImageModel,
    ImageSource,
    RunSpec,
    VolumeSource,
    asks_hub,
)
from tuner.workspace import (
    LABEL,
    LABEL_CHARACTERS,
    NOT_A_LABEL,
    NOT_AN_OBJECT_NAME,
    OBJECT_NAME_CHARACTERS,
    SUBDOMAIN,
    ImageInput,
    ImageOutput,
    Tuning,
    VolumeOutput,
    Workspace,
    WorkspaceFile,
)
from tuner.yaml_lines import Document

WORKSPACE_LABEL = "kaito.sh/workspace"
REVISION_ANNOTATION = "workspace.kaito.io/revision"
DIGEST_ANNOTATION = "tuner/run-digest"
INSTANCE_TYPE_LABEL = "node.kubernetes.io/instance-type"
GPU = "nvidia.com/gpu"
QUEUE_PREFIX = "kueue.x-k8s.io/"


@dataclass(frozen=True)
class JobOptions:
    """What of a Job no Workspace says. `gpus` and `instance_type` win over the Workspace's instanceType.

    `labels_preferred`: no node carries the labels yet, so they must not be required. `owner` is an ownerReference.
    `config_text` is training_config.yaml as --config has it, `ca_text` what --ca names. `patch_annotation`: whether
    the Workspace may name a patch; who renders with other rights than its author's must not let it.
    """

    image: str
    namespace: str | None = None
    gpus: int | None = None
    instance_type: str | None = None
    service_account: str | None = None
    workload_identity: bool = False
    spot: bool = False
    queue: str | None = None
    queue_priority: str | None = None
    priority_class: str | None = None
    scheduler: str | None = None
    runtime_class: str | None = None
    image_pull_secrets: tuple[str, ...] = ()
    results_volume: str | None = None
    registry_checkpoints: bool = False
    weights_volume: str | None = None
    push_hold_s: int = pod.PUSH_HOLD_S
    backoff_limit: int = 3
    ttl_s: int | None = None
    deadline_s: int | None = None
    image_volume: bool = False
    disruption_ok: bool = False
    labels_preferred: bool = False
    patches: tuple[Document, ...] = ()
    patch_annotation: bool = False
    revision: int = 1
    owner: Mapping[str, Any] | None = None
    config_text: str | None = None
    ca_text: str | None = None


def with_annotations(workspace: Workspace, options: JobOptions) -> JobOptions:
    """What outlives the pod, as the Workspace's annotations say, where no flag says otherwise."""
    written = workspace.metadata.annotations
    return replace(
        options,
        results_volume=options.results_volume or written.get(RESULTS_VOLUME_ANNOTATION),
        weights_volume=options.weights_volume or written.get(WEIGHTS_VOLUME_ANNOTATION),
        registry_checkpoints=options.registry_checkpoints or annotated_checkpoints(workspace),
    )


def count_gpus(workspace: Workspace, options: JobOptions, *, smoke: bool = False) -> int:
    """The pod's GPUs: as typed, those of the instance type, else one; a smoke run has none.

    Raises ConfigError for an instance type on which nothing can be trained.
    """
    if smoke:
        return 0
    machine = machine_of(workspace, options)
    if options.gpus is not None:
        return options.gpus
    return machine.gpus if machine else 1


def written_instance_type(workspace: Workspace, options: JobOptions) -> str | None:
    """The one to ask for, --instance-type before the Workspace's."""
    return options.instance_type or workspace.resource.instance_type


def machine_of(workspace: Workspace, options: JobOptions) -> Machine | None:
    """What is known of the instance type; None for none, and for one that is in no table."""
    name = written_instance_type(workspace, options)
    if name is None:
        return None
    try:
        machine = find_instance_type(name)
    except ConfigError:
        return None
    if problem := machine.gpu.problem:
        path = "--instance-type" if options.instance_type else "resource.instanceType"
        hint = "another one wins over the Workspace's: --instance-type Standard_NC24ads_A100_v4"
        raise ConfigError.of([Problem(f"{name}: {problem}", path=path, hint=hint)])
    return machine


@dataclass(frozen=True)
class Ask:
    """All that was asked for, and what follows from it in a word."""

    file: WorkspaceFile
    tuning: Tuning
    run: Run
    options: JobOptions

    @property
    def spec(self) -> RunSpec:
        return self.run.spec

    @property
    def name(self) -> str:
        return self.spec.name

    @property
    def workspace(self) -> Workspace:
        return self.file.workspace

    @property
    def gpus(self) -> int:
        return count_gpus(self.workspace, self.options, smoke=self.spec.smoke)

    @property
    def input_volume(self) -> Mapping[str, Any] | None:
        """The volume that the data are on; None where they are fetched."""
        return next((each.source for each in self.spec.sources if isinstance(each, VolumeSource)), None)

    @property
    def output_volume(self) -> Mapping[str, Any] | None:
        """The volume that the adapter goes to; None where it becomes an image."""
        if isinstance(self.spec.destination, DirectoryDestination) and isinstance(self.tuning.output, VolumeOutput):
            return self.tuning.output.volume_source
        return None

    @property
    def push_secret(self) -> str | None:
        pushes = isinstance(self.spec.destination, ImageDestination) or self.spec.probe
        return self.tuning.output.image_push_secret if pushes and isinstance(self.tuning.output, ImageOutput) else None

    @property
    def input_pull_secrets(self) -> tuple[str, ...]:
        return self.tuning.input.image_pull_secrets if isinstance(self.tuning.input, ImageInput) else ()

    @property
    def pull_secrets(self) -> tuple[str, ...]:
        """Those that our own puller reads, each once."""
        names: list[str] = []
        if isinstance(self.spec.base_model, ImageModel):
            names += self.tuning.preset.preset_options.image_pull_secrets
        if any(isinstance(source, ImageSource) for source in self.spec.sources):
            names += self.input_pull_secrets
        return tuple(dict.fromkeys(names))

    @property
    def hub_secret(self) -> str | None:
        named = self.tuning.preset.preset_options.model_access_secret
        return named if asks_hub(self.spec.base_model, self.spec.sources) else None

    @property
    def headers_secret(self) -> str | None:
        return self.workspace.metadata.annotations.get(SOURCES_ANNOTATION)

    def metadata(self, name: str) -> Manifest:
        """Of an object of this run."""
        metadata: Manifest = {"name": name}
        if namespace := self.options.namespace or self.workspace.metadata.namespace:
            metadata["namespace"] = namespace
        metadata["labels"] = self.labels
        if self.options.owner:
            metadata["ownerReferences"] = [dict(self.options.owner)]
        return metadata

    @property
    def labels(self) -> dict[str, str]:
        return {
            WORKSPACE_LABEL: self.name,
            "app.kubernetes.io/name": "tuner",
            "app.kubernetes.io/instance": self.name,
            "app.kubernetes.io/component": "tuning",
            "app.kubernetes.io/managed-by": "tuner",
            "app.kubernetes.io/version": __version__,
        }


# ── what contradicts itself ──────────────────────────────────────────────────────────────────────────────────────────


def option_problems(ask: Ask) -> Iterator[Problem]:
    """Options that contradict each other or the Workspace."""
    options = ask.options
    if options.gpus is not None and options.gpus < 1:
        yield Problem(f"{options.gpus} GPUs: at least one trains", path="--gpus", hint="--smoke needs none")
    if ask.output_volume and options.results_volume:
        yield Problem(
            "the output is a volume already, and checkpoints go there",
            path="--results-volume",
            hint="leave out --results-volume, or tuning.output.volumeSource",
        )
    yield from _checkpoint_problems(ask)
    if options.image_volume and not isinstance(ask.tuning.input, ImageInput):
        yield Problem("the input is no image", path="--image-volume")
    if options.workload_identity and not options.service_account:
        yield Problem(
            "whose identity? It is given to a service account",
            path="--workload-identity",
            hint="--service-account NAME, which the identity is federated with",
        )
    if ask.headers_secret and not _is_object_name(ask.headers_secret):
        yield Problem(NOT_AN_OBJECT_NAME, path=f"metadata.annotations[{SOURCES_ANNOTATION}]")
    if options.queue_priority and not options.queue:
        yield Problem("there is no queue for it", path="--queue-priority", hint="--queue NAME, too")
    yield from _name_problems(options, ask.workspace)


def _checkpoint_problems(ask: Ask) -> Iterator[Problem]:
    """Whether the registry can keep checkpoints, and need."""
    if not ask.options.registry_checkpoints:
        return
    written = annotated_checkpoints(ask.workspace)
    path = f"metadata.annotations[{CHECKPOINTS_ANNOTATION}]" if written else "--registry-checkpoints"
    if ask.output_volume or ask.options.results_volume:
        yield Problem("checkpoints are on a volume, which outlives the pod", path=path, hint="one of the two is enough")
    elif not isinstance(ask.spec.destination, ImageDestination):
        yield Problem("no image is pushed, so there is no registry to keep them in", path=path)


def _name_problems(options: JobOptions, workspace: Workspace) -> Iterator[Problem]:
    """Names that no object of Kubernetes can have, and an image that no kubelet can pull."""
    annotated = workspace.metadata.annotations
    try:
        parse_reference(options.image)
    except ConfigError as error:
        yield Problem(error.message, path="--set-image", hint=error.hint)
    if options.namespace and not (len(options.namespace) <= LABEL_CHARACTERS and LABEL.fullmatch(options.namespace)):
        yield Problem(NOT_A_LABEL.format(repr(options.namespace)), path="--namespace")
    names = {
        "--service-account": options.service_account,
        "--results-volume": options.results_volume,
        "--weights-volume": options.weights_volume,
        "--queue": options.queue,
        "--queue-priority": options.queue_priority,
        "--priority-class": options.priority_class,
        "--scheduler": options.scheduler,
        "--runtime-class": options.runtime_class,
    }
    for flag, name in (*names.items(), *(("--image-pull-secret", name) for name in options.image_pull_secrets)):
        if name is not None and not _is_object_name(name):
            annotation = f"tuner/{flag.removeprefix('--')}"
            origin = f"metadata.annotations[{annotation}]" if annotated.get(annotation) == name else flag
            yield Problem(NOT_AN_OBJECT_NAME, path=f"{origin} {name!r}")


def _is_object_name(name: str) -> bool:
    return len(name) <= OBJECT_NAME_CHARACTERS and SUBDOMAIN.fullmatch(name) is not None
