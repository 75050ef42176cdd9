"""A tuning Workspace → what serves its adapter: a KAITO inference Workspace, or vLLM with a Service.

    job_templates/serving-kaito.yaml, serving-vllm.yaml ── values by name ──► Serving

vLLM's flags: https://docs.vllm.ai/en/stable/features/lora.html
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from tuner.cluster import templates
from tuner.cluster.job_options import GPU, JobOptions, count_gpus, written_instance_type
from tuner.cluster.nodes import node_affinity
from tuner.cluster.sizes import read_sizes
from tuner.cluster.templates import Manifest
from tuner.errors import ConfigError, Problem
from tuner.reference import ImageReference
from tuner.request import HF_TOKEN, Run, check_names_registry
from tuner.runspec import HubModel, ImageModel, RunSpec
from tuner.workspace import LABEL_CHARACTERS, ImageOutput, Tuning, VolumeOutput, WorkspaceFile, require_tuning

Server = Literal["kaito", "vllm"]
SERVERS: tuple[Server, ...] = ("kaito", "vllm")
# vllm/config/lora.py, MaxLoRARanks; 1 is left out, as only newer releases have it.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
ADAPTER_DIR = "/adapter/files"
CHAT_TEMPLATE_FILE = "chat_template.jinja"

# Of LoraConfig what vLLM refuses, and what it does not read (vllm/lora/peft_helper.py).
_REFUSED_BY_VLLM = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices", "layer_replication")
_IGNORED_BY_VLLM = ("rank_pattern", "alpha_pattern")
_MERGE = "tuner merge makes a model of base and adapter, which needs no LoRA"


@dataclass(frozen=True)
class ServingOptions:
    """`adapter` is the pushed image, by digest if known; `strength` is KAITO's; `vllm_image` is the server's."""

    adapter: ImageReference | None = None
    strength: float | None = None
    vllm_image: str | None = None


@dataclass(frozen=True)
class Serving:
    """What to apply, and sentences for who asked."""

    objects: tuple[Manifest, ...]
    notes: tuple[str, ...]


def render_serving(server: Server, file: WorkspaceFile, run: Run, job: JobOptions, options: ServingOptions) -> Serving:
    """The manifests that serve what this run trains. Raises ConfigError for what the server does not take."""
    tuning = require_tuning(file)
    if problems := list(_problems(server, tuning, run.spec, options)):
        raise ConfigError.of(problems)
    ask = _Ask(file, tuning, run.spec, job, options)
    objects = (_kaito(ask),) if server == "kaito" else tuple(_vllm(ask))
    return Serving(objects, tuple(_notes(server, ask)))


@dataclass(frozen=True)
class _Ask:
    file: WorkspaceFile
    tuning: Tuning
    spec: RunSpec
    job: JobOptions
    options: ServingOptions

    @property
    def image(self) -> str | None:
        """The adapter's; None where it is on a volume."""
        written = self.tuning.output.image if isinstance(self.tuning.output, ImageOutput) else None
        image = self.options.adapter or written
        return str(image) if image else None

    @property
    def secret(self) -> str | None:
        """Who may push may pull."""
        return self.tuning.output.image_push_secret if isinstance(self.tuning.output, ImageOutput) else None

    @property
    def namespace(self) -> dict[str, str]:
        name = self.job.namespace or self.file.workspace.metadata.namespace
        return {"namespace": name} if name else {}


def _problems(server: Server, tuning: Tuning, spec: RunSpec, options: ServingOptions) -> Iterator[Problem]:
    if options.adapter:
        try:
            check_names_registry(options.adapter, "--adapter")
        except ConfigError as error:
            yield Problem(error.message, hint=error.hint)
    if options.strength is not None and server != "kaito":
        yield Problem("is KAITO's: vLLM adds an adapter as it is", path="--strength")
    elif options.strength is not None and not 0 <= options.strength <= 1:
        yield Problem(f"must be 0 to 1, not {options.strength:g}", path="--strength")
    if server == "kaito" and isinstance(tuning.output, VolumeOutput) and not options.adapter:
        yield Problem(
            "KAITO's inference.adapters takes an image, and this adapter is on a volume",
            path="tuning.output.volumeSource",
            hint="push it (tuner push DIR IMAGE) and give --adapter IMAGE, or serve it with vllm",
        )
    if server == "vllm" and isinstance(spec.base_model, ImageModel):
        yield Problem(
            "vLLM loads the base model from the Hub, and this one is in an image",
            path="tuning.preset.presetOptions.image",
            hint="serve it with kaito",
        )
    if server == "vllm":
        yield from _not_in_vllm(spec.training.lora.keywords())


def _not_in_vllm(lora: Mapping[str, Any]) -> Iterator[Problem]:
    refused = [key for key in _REFUSED_BY_VLLM if lora.get(key)]
    refused += ["bias"] if lora.get("bias", "none") != "none" else []
    for key in refused:
        yield Problem(f"vLLM loads no adapter with {key}", path=f"LoraConfig.{key}", hint=_MERGE)
    for key in _IGNORED_BY_VLLM:
        if lora.get(key):
            yield Problem(
                "vLLM ignores it, and would scale those layers wrongly", path=f"LoraConfig.{key}", hint=_MERGE
            )
    if lora["r"] > LORA_RANKS[-1]:
        yield Problem(f"vLLM takes ranks up to {LORA_RANKS[-1]}, and this is {lora['r']}", path="LoraConfig.r")


def _kaito(ask: _Ask) -> Manifest:
    workspace = templates.load_template("serving-kaito.yaml")
    resource = ask.file.workspace.resource
    name = ask.spec.name
    workspace["metadata"] = {
        "name": _called(name, "serving"),
        **ask.namespace,
        "labels": {**workspace["metadata"]["labels"], "app.kubernetes.io/instance": name},
    }
    if ask.options.strength is not None:  # only this runtime knows strengths
        templates.annotate(workspace, {"kaito.sh/runtime": "transformers"})
    selector = resource.label_selector
    labels: Manifest = {"matchLabels": dict(selector.match_labels)} if selector and selector.match_labels else {}
    if selector and selector.match_expressions:
        labels["matchExpressions"] = [
            {"key": each.key, "operator": each.operator, **({"values": list(each.values)} if each.values else {})}
            for each in selector.match_expressions
        ]
    instance_type = written_instance_type(ask.file.workspace, ask.job)
    workspace["resource"] = {
        **({"instanceType": instance_type} if instance_type else {}),
        "labelSelector": labels or {"matchLabels": {"app": name}},  # KAITO's CRD wants one
    }
    source: Manifest = {"name": name, "image": ask.image}
    if ask.secret:
        source["imagePullSecrets"] = [ask.secret]
    adapter: Manifest = {"source": source}
    if ask.options.strength is not None:
        adapter["strength"] = f"{ask.options.strength:g}" if ask.options.strength % 1 else f"{ask.options.strength:.1f}"
    preset: Manifest = {"name": ask.spec.preset_as_written}
    if token := ask.tuning.preset.preset_options.model_access_secret:
        preset["presetOptions"] = {"modelAccessSecret": token}
    workspace["inference"] = {"preset": preset, "adapters": [adapter]}
    return workspace


def _vllm(ask: _Ask) -> Iterator[Manifest]:
    deployment, service = templates.load_templates("serving-vllm.yaml")
    name = ask.spec.name
    labels = {"app.kubernetes.io/instance": name}
    metadata = {"name": service_name(name), **ask.namespace}
    for each in (deployment, service):
        each["metadata"] |= metadata
        templates.label(each, labels)
    deployment["spec"]["selector"]["matchLabels"] |= labels
    service["spec"]["selector"] |= labels
    templates.label(templates.pod_template(deployment), labels)
    _set_adapter(deployment, ask)
    _set_server(deployment, ask)
    _set_place(deployment, ask)
    yield deployment
    yield service


def service_name(name: str) -> str:
    """`<name>-vllm`; a Service's name begins with a letter."""
    return _called(name if name[0].isalpha() else f"tuner-{name}", "vllm")


def _called(name: str, suffix: str) -> str:
    """`<name>-<suffix>`, of at most 63 characters: a long name's end becomes a hash."""
    if len(name) + 1 + len(suffix) <= LABEL_CHARACTERS:
        return f"{name}-{suffix}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return f"{name[: LABEL_CHARACTERS - len(suffix) - 10]}-{digest}-{suffix}"


def _set_adapter(deployment: Manifest, ask: _Ask) -> None:
    """An init container that pulls it, or the volume that it is on."""
    if ask.image is None:
        assert isinstance(ask.tuning.output, VolumeOutput)
        templates.pod_spec(deployment).pop("initContainers")
        for volume in ("docker-config", "tmp"):
            templates.remove_volume(deployment, volume)
        templates.set_volume(deployment, "adapter", ask.tuning.output.volume_source)
        templates.mount(templates.container(deployment, "vllm"), "adapter", ADAPTER_DIR, read_only=True)
        return
    puller = templates.container(deployment, "adapter")
    puller["image"] = ask.job.image
    flags = ["--plain-http"] if ask.spec.network.plain_http else []
    if ask.secret:
        templates.volume(deployment, "docker-config")["secret"]["secretName"] = ask.secret
        flags += ["--docker-config", "/run/secrets/registry"]
    else:
        templates.remove_volume(deployment, "docker-config")
    puller["args"] = ["pull", ask.image, ADAPTER_DIR, *flags]


def _set_server(deployment: Manifest, ask: _Ask) -> None:
    vllm = templates.container(deployment, "vllm")
    if ask.options.vllm_image:
        vllm["image"] = ask.options.vllm_image
    gpus = max(1, count_gpus(ask.file.workspace, ask.job))
    model, revision = _model(ask.spec)
    rank = next(rank for rank in LORA_RANKS if rank >= ask.spec.training.lora.r)
    args = [model, *(["--revision", revision] if revision else []), "--enable-lora", "--max-lora-rank", str(rank)]
    args += ["--lora-modules", f"{ask.spec.name}={ADAPTER_DIR}"]
    if _has_chat_template(ask.spec):
        args += ["--chat-template", f"{ADAPTER_DIR}/{CHAT_TEMPLATE_FILE}"]
    if gpus > 1:
        args += ["--tensor-parallel-size", str(gpus)]
    if ask.spec.trust_remote_code:
        args.append("--trust-remote-code")
    vllm["args"] = args
    if token := ask.tuning.preset.preset_options.model_access_secret:
        templates.set_secret_env(vllm, HF_TOKEN, token, HF_TOKEN)
    sizes = read_sizes(ask.spec.model_copy(update={"smoke": False}), gpus)
    memory = 8 + sizes.weights_gib  # vLLM reads the weights once, into the GPU
    vllm["resources"] = {
        "requests": {
            "cpu": str(sizes.cpus),
            "memory": f"{memory}Gi",
            "ephemeral-storage": f"{sizes.weights_gib + 2}Gi",
            GPU: str(gpus),
        },
        "limits": {"memory": f"{3 * memory}Gi", GPU: str(gpus)},
    }
    limit = {"sizeLimit": f"{sizes.weights_limit_gib}Gi"} if sizes.weights_limit_gib else {}
    templates.set_volume(deployment, "models", {"emptyDir": limit})
    templates.set_volume(deployment, "dshm", {"emptyDir": {"medium": "Memory", "sizeLimit": f"{sizes.shm_gib}Gi"}})


def _set_place(deployment: Manifest, ask: _Ask) -> None:
    spec = templates.pod_spec(deployment)
    affinity = node_affinity(ask.file.workspace, ask.job)
    if affinity:
        spec["affinity"] = {"nodeAffinity": affinity}
    else:
        del spec["affinity"]
    if ask.job.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in ask.job.image_pull_secrets]
    for key, value in (("runtimeClassName", ask.job.runtime_class), ("priorityClassName", ask.job.priority_class)):
        if value:
            spec[key] = value


def _model(spec: RunSpec) -> tuple[str, str | None]:
    """The hub's name and commit of the base model, whatever a smoke run trains on."""
    if isinstance(spec.base_model, HubModel):
        return spec.base_model.id, spec.base_model.revision
    return spec.preset.model_id, spec.preset.revision


def _has_chat_template(spec: RunSpec) -> bool:
    """Whether the adapter is known to carry one: a model's whose facts we know, or the one that was written."""
    return bool(spec.preset.chat_template or spec.training.model.chat_template)


def _notes(server: Server, ask: _Ask) -> Iterator[str]:
    if ask.image and "@sha256:" not in ask.image:
        yield (
            f"{ask.image} is a tag, which another push may move: --adapter REPOSITORY@sha256:… serves what was trained"
        )
    if server == "kaito":
        yield "KAITO loads the adapter under the base model; requests name it as their model"
        return
    yield f"requests name {ask.spec.name} as their model; the Service is {service_name(ask.spec.name)}, port 80"
    if not _has_chat_template(ask.spec):
        yield f"no chat template is known for {ask.spec.preset.name}: vLLM takes the base model's own"
    if ask.spec.network.ca_file and ask.image:
        yield "--ca is not in these manifests: the container that pulls the adapter knows public certificates only"
