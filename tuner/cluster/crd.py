"""The CustomResourceDefinition `workspaces.kaito.sh`, for clusters without KAITO's.

Fields, types and choices are read off the models of workspace.py, what is asked of the values off rules.py. So a field
that the parser learns is one that the CRD has, and neither can say what the other does not: a field without a
description here, or a description without its field, is an error. It takes whatever KAITO's takes and is correct, and
has `status.tuning` besides.

    python scripts/generate_crd.py

writes job_templates/install/crd.yaml from it.
"""

import copy
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from tuner import workspace
from tuner.cluster import rules
from tuner.cluster.rules import Rule, Text
from tuner.reference import ImageReference
from tuner.runspec import StageName

GROUP, PLURAL, KIND = "kaito.sh", "workspaces", "Workspace"
NAME = f"{PLURAL}.{GROUP}"
STORED, OLDER = (version.removeprefix(f"{GROUP}/") for version in workspace.API_VERSIONS)
MADE_BY = "app.kubernetes.io/managed-by"  # with the value "tuner": KAITO's own CRD has no such label

Schema = dict[str, Any]

_ANYTHING: Schema = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
_DEPRECATED = "Deprecated by KAITO, and without effect here. "

# What `kubectl explain` says, by path. `<kind>` is any kind of volume.
DESCRIPTIONS = {
    "": (
        "A Workspace says what to run: here, which data to tune which model on, and where the adapter goes. "
        "There is no spec: resource and tuning stand at the top level."
    ),
    "apiVersion": "kaito.sh/v1beta1, or kaito.sh/v1alpha1; a Workspace reads the same in both.",
    "kind": "Workspace",
    "metadata.name": "A DNS label of at most 63 characters: Job, pods and adapter are named after it.",
    "resource": "Where in the cluster it runs: on one node with a GPU. May be left out.",
    "resource.instanceType": (
        "The node's instance type, such as Standard_NC24ads_A100_v4. The pod asks for a node of that type; an "
        "autoscaler may add one. Leave it out to run on nodes of your own."
    ),
    "resource.count": "Deprecated by KAITO. Tuning runs on one node: 1 is the only value.",
    "resource.labelSelector": (
        "Labels of the nodes to run on. With an instanceType, labels that no node carries are a preference only."
    ),
    "resource.labelSelector.matchLabels": "Labels and the values that the node must have.",
    "resource.labelSelector.matchExpressions": "Conditions on labels; all of them must hold.",
    "resource.labelSelector.matchExpressions[]": "A label, an operator and, for In and NotIn, values.",
    "resource.labelSelector.matchExpressions[].key": "The label.",
    "resource.labelSelector.matchExpressions[].operator": "In, NotIn, Exists or DoesNotExist.",
    "resource.labelSelector.matchExpressions[].values": "The values for In and NotIn.",
    "resource.preferredNodes": _DEPRECATED + "Use labelSelector.",
    "resource.partition": "A part of a GPU. For inference only: tuning takes whole GPUs.",
    "tuning": (
        "Tune a model: QLoRA or LoRA on the data of input; the adapter is pushed to output as an image. Exactly one "
        "of tuning and inference is there. Preset and method cannot be changed afterwards; a change of anything "
        "else, the ConfigMap's text included, is a new revision and runs anew."
    ),
    "tuning.preset": "The model to tune.",
    "tuning.preset.name": (
        "A preset (`tuner presets` lists them), such as phi-3-mini-128k-instruct, or the id of any causal language "
        "model on Hugging Face, such as Qwen/Qwen3-4B."
    ),
    "tuning.preset.accessMode": _DEPRECATED + "public or private.",
    "tuning.preset.presetOptions": "How to get at the model's weights.",
    "tuning.preset.presetOptions.image": "Deprecated by KAITO. An image with the weights.",
    "tuning.preset.presetOptions.imagePullSecrets": "Deprecated by KAITO. Secrets of that image's registry.",
    "tuning.preset.presetOptions.modelAccessSecret": (
        "A Secret with the key HF_TOKEN: the Hugging Face token for a gated model."
    ),
    "tuning.method": "qlora (4-bit base model) or lora, in any case.",
    "tuning.config": (
        "A ConfigMap in the same namespace whose key training_config.yaml holds KAITO's sections (LoraConfig, "
        "TrainingArguments, DatasetConfig, …). Left out, every value is Tuner's default."
    ),
    "tuning.input": "The data to tune on: exactly one of urls, image and volumeSource.",
    "tuning.input.name": "A name for the data. Cannot be changed.",
    "tuning.input.urls": (
        "Files to fetch by HTTP or HTTPS: parquet, JSON, JSON lines, CSV, Arrow. All of them are trained on. What a "
        "signed query holds is kept in a Secret and shown nowhere. Loopback, link-local and metadata addresses are "
        "never fetched from, private ones only where whoever installed the controller allows it."
    ),
    "tuning.input.urls[]": (
        "An http:// or https:// URL; #sha256=… after it pins the content, #rows=… and #weight=… take a part."
    ),
    "tuning.input.validation": "Files like those of urls, which are evaluated and not trained on.",
    "tuning.input.validation[]": "An http:// or https:// URL; #sha256=… after it pins the content.",
    "tuning.input.image": "An OCI image with the data files under /data.",
    "tuning.input.imagePullSecrets": "Secrets of that image's registry, of type kubernetes.io/dockerconfigjson.",
    "tuning.input.volumeSource": "A volume with the data files, as a pod's volumes have it, without its name.",
    "tuning.output": "Where the adapter goes: exactly one of image and volumeSource.",
    "tuning.output.image": (
        "The image to push, registry/repository:tag. The tag is set once the push has succeeded; "
        "status.tuning.artifact has the digest."
    ),
    "tuning.output.imagePushSecret": (
        "The Secret with the registry's credentials, of type kubernetes.io/dockerconfigjson. Required for an image."
    ),
    "tuning.output.volumeSource": "A volume for the adapter's files, as a pod's volumes have it, without its name.",
    "volumeSource.<kind>": "As in a pod's volumes.",
    "volumeSource.persistentVolumeClaim": "A claim in the same namespace.",
    "volumeSource.persistentVolumeClaim.claimName": "The claim's name.",
    "volumeSource.hostPath": "A directory of the node.",
    "volumeSource.hostPath.path": "The directory.",
    "inference": "Serve a model. Tuner leaves such a Workspace alone; KAITO's own controller runs it.",
}
_ITEM_DESCRIPTIONS = {  # of list items that need no text of their own
    "resource.labelSelector.matchExpressions[].values[]": "A value.",
    "resource.preferredNodes[]": "A node's name.",
    "tuning.preset.presetOptions.imagePullSecrets[]": "A Secret's name.",
    "tuning.input.imagePullSecrets[]": "A Secret's name.",
}

_RULES: dict[str, Sequence[Rule]] = {
    "": rules.WHOLE,
    "tuning": rules.TUNING,
    "tuning.input": rules.INPUT,
    "tuning.input.volumeSource": rules.VOLUME,
    "tuning.output": rules.OUTPUT,
    "tuning.output.volumeSource": rules.OUTPUT_VOLUME,
}
# Their names count only beside an image: a rule of the object above them has them.
_NAMES_BESIDE_AN_IMAGE = ("tuning.input.imagePullSecrets[]", "tuning.output.imagePushSecret")
_ALTERNATIVES = ("tuning.input.image", "tuning.output.image")  # "" is as good as not written
_DEFAULTS = {".".join(map(str, location)): value for location, value in workspace.SERVER_DEFAULTS.items()}
_LIST_LENGTHS = {"tuning.input.urls": rules.MAX_URLS, "tuning.input.validation": rules.MAX_VALIDATION_URLS}


def custom_resource_definition(*, opened: bool = False) -> dict[str, Any]:
    """The object for `kubectl apply`. `opened`: some private addresses may be fetched from (see rules.url)."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": NAME, "labels": {MADE_BY: "tuner"}},
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": "workspace",
                "shortNames": ["wk", "wks"],
                "categories": ["workspace"],
            },
            "scope": "Namespaced",
            "versions": [
                _version(OLDER, _root(opened), _COLUMNS_OF_OLDER, stored=False),
                _version(STORED, _root(opened), COLUMNS, stored=True),
            ],
        },
    }


def _version(name: str, schema: Schema, columns: Sequence[Schema], *, stored: bool) -> dict[str, Any]:
    return {
        "name": name,
        "served": True,
        "storage": stored,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {"status": {}},
        "additionalPrinterColumns": [dict(each) for each in columns],
    }


# ── columns ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _column(name: str, kind: str, path: str, **more: Any) -> Schema:
    return {"name": name, "type": kind, "jsonPath": path, **more}


def _condition(name: str) -> Schema:
    return _column(name, "string", f'.status.conditions[?(@.type=="{name}")].status')


_AGE = _column("Age", "date", ".metadata.creationTimestamp")
_INSTANCE = _column("Instance", "string", ".resource.instanceType")
# KAITO's eight, in its order, then ours.
COLUMNS = (
    _INSTANCE,
    *map(_condition, ("ResourceReady", "InferenceReady", "JobStarted", "WorkspaceSucceeded")),
    _column("TargetNodeCount", "integer", ".status.targetNodeCount"),
    _column("State", "string", ".status.state"),
    _AGE,
    _column("Progress", "integer", ".status.tuning.progressPercentage", description="percent of the training"),
    _column(
        "Loss",
        "string",
        ".status.tuning.loss",
        priority=1,
        description="the latest training loss",
    ),
)
# What the first users of v1alpha1 saw, and what their scripts cut columns out of.
_COLUMNS_OF_OLDER = (_INSTANCE, *map(_condition, ("ResourceReady", "InferenceReady", "WorkspaceReady")), _AGE)


# ── what is written: read off the parser's models ────────────────────────────────────────────────────────────────────


def _root(opened: bool) -> Schema:
    reader = _Reader(opened)
    schema = reader.object("", [workspace.Workspace])
    if unused := {*DESCRIPTIONS, *_ITEM_DESCRIPTIONS, *_RULES, *_DEFAULTS} - reader.used - _OF_THE_ROOT:
        raise ValueError(f"no field of the parser's has this path: {', '.join(sorted(unused))}")
    name = _text(DESCRIPTIONS["metadata.name"])
    schema["properties"] = {
        "apiVersion": _text(DESCRIPTIONS["apiVersion"]),
        "kind": _text(DESCRIPTIONS["kind"]),
        "metadata": {"type": "object", "properties": {"name": name}},
        **schema["properties"],
        "status": copy.deepcopy(status_schema()),
    }
    return schema


_OF_THE_ROOT = {"apiVersion", "kind", "metadata.name"}


class _Reader:
    """Models → schemas. `used` are the paths that it came by."""

    def __init__(self, opened: bool) -> None:
        self.used: set[str] = set()
        self.url = rules.url(opened=opened)
        self.text_of: dict[Callable[..., Any], Text] = {
            workspace.checked_object_name: rules.OBJECT_NAME,
            workspace.checked_output_image: rules.OUTPUT_IMAGE,
        }

    def object(self, path: str, models: Sequence[type[BaseModel]]) -> Schema:
        """A mapping; several models are the variants of one, of which an object has the fields of just one."""
        properties: dict[str, Schema] = {}
        required = []
        for model in models:
            for field in model.model_fields.values():
                key = str(field.alias)
                if path == "" and key in ("apiVersion", "kind", "metadata"):
                    continue  # the API server knows them, and its own limits
                where = f"{path}.{key}".lstrip(".")
                properties.setdefault(key, self.field(where, field))
                if (field.is_required() and len(models) == 1) or where in _REQUIRED_IN_A_CLUSTER:
                    required.append(key)
        schema = self.described(path, {"type": "object", "properties": properties})
        return schema | ({"required": required} if required else {})

    def field(self, path: str, field: FieldInfo) -> Schema:
        return self.value(path, field.annotation, field.metadata)

    def value(self, path: str, annotation: Any, metadata: Sequence[Any] = ()) -> Schema:
        annotation, metadata = _unpacked(annotation, metadata)
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin in (typing.Union, types.UnionType):
            return self.object(path, [_unpacked(variant, ())[0] for variant in arguments])
        if origin is tuple:
            limit = _LIST_LENGTHS.get(path, workspace.MAX_NAMES)
            items = self.value(f"{path}[]", arguments[0])
            schema = {"type": "array", "items": items, "maxItems": limit, "x-kubernetes-list-type": "atomic"}
            return self.described(path, schema)
        if origin is dict:
            return self.described(path, self.mapping(arguments[1], metadata))
        if origin is Literal:
            return self.described(path, _choice(arguments, metadata))
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            schema = self.object(path, [annotation])
            return schema | ({"x-kubernetes-map-type": "atomic"} if annotation is workspace.LabelSelector else {})
        if annotation is int:
            return self.described(path, {"type": "integer", "minimum": next(each.ge for each in metadata)})
        if annotation in (str, ImageReference):
            default = rules.ANY_TEXT if annotation is str else rules.IMAGE
            return self.described(path, self.text(path, metadata, default))
        raise TypeError(f"{path}: no schema for {annotation}")

    def text(self, path: str, metadata: Sequence[Any], default: Text) -> Schema:
        validators = [each.func for each in metadata if isinstance(each, AfterValidator)]
        if workspace.checked_url in validators:
            return dict(self.url)
        text = self.text_of[validators[-1]] if validators else default
        if any(getattr(each, "min_length", 0) for each in metadata):
            text = rules.REQUIRED_TEXT
        if path in _NAMES_BESIDE_AN_IMAGE:
            text = rules.SECRET
        if path.startswith("resource.labelSelector"):
            text = rules.LABEL
        unwritten = workspace.empty_is_none in _before(metadata) or path in _ALTERNATIVES
        return text.schema(may_be_empty=unwritten)

    def mapping(self, values: Any, metadata: Sequence[Any]) -> Schema:
        if values is str:
            text = _text("The value.", maxLength=rules.MAX_LABEL_CHARACTERS)
            return {"type": "object", "additionalProperties": text, "maxProperties": rules.MAX_LABELS}
        if any(getattr(each, "func", None) is workspace.checked_volume for each in metadata):
            return {"type": "object", "properties": dict(self.volumes())}
        return dict(_ANYTHING)

    def volumes(self) -> Iterator[tuple[str, Schema]]:
        """Every kind is named, because CEL sees no others. What is in them is the API server's to check, in the pod."""
        for kind in sorted(workspace.VOLUME_KINDS):
            schema = dict(_ANYTHING)
            if key := workspace.REQUIRED_OF_VOLUME.get(kind):
                self.used.add(f"volumeSource.{kind}.{key}")
                schema["properties"] = {key: _text(DESCRIPTIONS[f"volumeSource.{kind}.{key}"])}
            where = f"volumeSource.{kind}"
            where = where if where in DESCRIPTIONS else "volumeSource.<kind>"
            self.used.add(where)
            yield kind, {"description": DESCRIPTIONS[where], **schema}

    def described(self, path: str, schema: Schema) -> Schema:
        """With its description, its default and the rules that stand at this place, in the order they are read."""
        description = DESCRIPTIONS.get(path) or _ITEM_DESCRIPTIONS[path]
        self.used.add(path)
        schema = {"description": description, **schema}
        if path in _DEFAULTS:
            schema["default"] = _DEFAULTS[path]
        if path in _RULES:
            schema["x-kubernetes-validations"] = [rule.manifest() for rule in _RULES[path]]
        return schema


_REQUIRED_IN_A_CLUSTER = ("tuning.output",)  # on a box the command line may name it


def _unpacked(annotation: Any, metadata: Sequence[Any]) -> tuple[Any, Sequence[Any]]:
    """The type without Annotated and `| None`, and all that was said about it, the innermost first."""
    while True:
        origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
        if origin is typing.Annotated:
            annotation, metadata = arguments[0], [*arguments[1:], *metadata]
        elif origin in (typing.Union, types.UnionType) and type(None) in arguments and len(arguments) == 2:
            annotation = next(each for each in arguments if each is not type(None))
        else:
            return annotation, metadata


def _before(metadata: Sequence[Any]) -> list[Any]:
    return [each.func for each in metadata if isinstance(each, BeforeValidator)]


def _choice(choices: tuple[str, ...], metadata: Sequence[Any]) -> Schema:
    if workspace.lowered in _before(metadata):
        return rules.one_of(choices).schema()
    return {"type": "string", "enum": list(choices)}


def _text(description: str, **more: Any) -> Schema:
    return {"type": "string", "description": description, **more}


# ── status: what the controller writes ───────────────────────────────────────────────────────────────────────────────


def _whole(description: str, **more: Any) -> Schema:
    return {"type": "integer", "description": description, **more}


def _object(description: str, properties: dict[str, Schema], required: Sequence[str] = ()) -> Schema:
    schema: Schema = {"type": "object", "description": description, "properties": properties}
    return schema | ({"required": list(required)} if required else {})


def _list(description: str, items: Schema, key: str | None = None, limit: int | None = None) -> Schema:
    schema: Schema = {"type": "array", "description": description, "items": items}
    if limit is not None:
        schema["maxItems"] = limit
    if key is None:
        return schema | {"x-kubernetes-list-type": "atomic"}
    return schema | {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": [key]}


STAGES = ("check", *typing.get_args(StageName))  # the check Job comes before the run's own stages
STATES = ("Pending", "Running", "Succeeded", "Failed")


def status_schema() -> Schema:
    """KAITO's status, and `status.tuning`, whose progress has the names of Kubeflow Trainer's (KEP-2779)."""
    return _object(
        "What became of it. `state` is the short answer, the conditions give reasons.",
        {
            "state": _text(f"{', '.join(STATES)}; for inference also Ready and NotReady."),
            "conditions": _list(
                "ResourceReady, NodesReady, JobStarted and WorkspaceSucceeded (WorkspaceReady says the same as the "
                "last), each with a reason and a sentence.",
                _CONDITION,
                key="type",
            ),
            "workerNodes": _list("The nodes it runs on.", _text("A node's name.")),
            "targetNodeCount": _whole("How many nodes it takes: 1.", format="int32"),
            "performance": _object(
                "Figures, by name. KAITO's field; the progress of a tuning is in status.tuning.",
                {"metrics": _METRICS_BY_NAME},
            ),
            "tuning": _TUNING_STATUS,
        },
    )


_CONDITION = _object(
    "One aspect of the state.",
    {
        "type": _text(
            "Which aspect.",
            maxLength=316,
            pattern=(
                r"^([a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*/)?"
                r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])$"
            ),
        ),
        "status": _text("True, False or Unknown.", enum=["True", "False", "Unknown"]),
        "reason": _text(
            "Why, in one word.", minLength=1, maxLength=1024, pattern="^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"
        ),
        "message": _text("Why, in a sentence.", maxLength=32768),
        "lastTransitionTime": _text("When the status last changed.", format="date-time"),
        "observedGeneration": _whole(
            "The metadata.generation that this is about; with a smaller one than the Workspace has, it is out of date.",
            format="int64",
            minimum=0,
        ),
    },
    required=("lastTransitionTime", "message", "reason", "status", "type"),
)
_METRICS_BY_NAME: Schema = {
    "type": "object",
    "description": "Figures by name.",
    "additionalProperties": _object(
        "A figure.",
        {
            "description": _text("What was measured."),
            "value": _text("The figure."),
            "unit": _text("Its unit."),
            "config": {
                "type": "object",
                "description": "How it was measured.",
                "additionalProperties": _text("A setting."),
            },
        },
        required=("description", "value"),
    ),
}
_TUNING_STATUS = _object(
    "The run: how far it is, what it made and from what.",
    {
        "revision": _whole("Which revision of the Workspace this is about, from 1.", format="int64", minimum=1),
        "runDigest": _text("Names the run: equal inputs give an equal digest."),
        "stage": _text(
            "What is going on: check (of all that can fail without a GPU), preflight (secrets, tag, permissions), "
            "fetch (data and base model), prepare (tokens), train, push.",
            enum=list(STAGES),
        ),
        "attempt": _whole("Which attempt this is, from 1.", format="int32", minimum=0),
        "attempts": _whole("How many attempts there are at most.", format="int32", minimum=0),
        "progressPercentage": _whole("How much of the training is done.", format="int32", minimum=0, maximum=100),
        "step": _whole("The optimizer steps that are done.", format="int64", minimum=0),
        "totalSteps": _whole("The optimizer steps in all.", format="int64", minimum=0),
        "loss": _text("The training loss at the last step.", maxLength=64),
        "evalLoss": _text("The loss on the rows that were held out.", maxLength=64),
        "estimatedRemainingSeconds": _whole("Seconds until the training ends.", format="int64", minimum=0),
        "metrics": _list(
            "More figures as the training reports them: tokens_per_s, samples_per_s, checkpoint_step, …",
            _object(
                "A figure.",
                {"name": _text("What it is.", maxLength=63), "value": _text("The figure.", maxLength=64)},
                required=("name", "value"),
            ),
            key="name",
            limit=64,
        ),
        "lastUpdatedTime": _text("When any of this last changed.", format="date-time"),
        "artifact": _object(
            "The adapter that was pushed.",
            {
                "image": _text("The image; it names exactly this adapter."),
                "digest": _text("Its digest, sha256:…"),
            },
        ),
        "baseModel": _object(
            "The model that was tuned.",
            {
                "id": _text("Its id on Hugging Face."),
                "revision": _text("The commit of its weights."),
                "digest": _text("The digest of its weights' files."),
            },
        ),
        "dataset": _object(
            "The data that was trained on.",
            {
                "digest": _text("One digest over all its files, in order."),
                "files": _whole("How many files.", format="int64", minimum=0),
                "sizeBytes": _whole("Their size in bytes.", format="int64", minimum=0),
                "rows": _whole("The rows that were trained on.", format="int64", minimum=0),
            },
        ),
    },
)
