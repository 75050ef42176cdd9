"""Workspace YAML → Workspace, with every problem of the file reported at once.

    text ── yaml_lines ──► documents (plain values + the line of each) ── pydantic + whole-file rules ──► WorkspaceFile

KAITO's spelling lives in the aliases of this file and nowhere else. Its contract: api/v1beta1/workspace_types.go and
workspace_validation.go of kaito-project/kaito; v1alpha1 has the same tuning section. Two of KAITO's rules are missing
on purpose: those on `instanceType` and node auto-provisioning, which this project does not do.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetPydanticSchema,
    StrictInt,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_core.core_schema import no_info_after_validator_function, str_schema

from tuner.errors import MOST_PROBLEMS, ConfigError, Problem, cut, did_you_mean
from tuner.redaction import hide_url
from tuner.reference import ImageReference, names_registry, parse_reference
from tuner.urls import Allowed, url_problem
from tuner.yaml_lines import (
    RENDER_FIRST,
    UNFILLED_EXPRESSION,
    Document,
    Fault,
    Location,
    YamlValue,
    check_size,
    read_documents,
    read_text,
    what_is,
)

API_VERSIONS = ("kaito.sh/v1beta1", "kaito.sh/v1alpha1")
TRAINING_CONFIG_KEY = "training_config.yaml"


# ── what a Workspace is ──────────────────────────────────────────────────────────────────────────────────────────────


def _fault(message: str, hint: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("fault", "{message}", {"message": message, "hint": hint})


# The rules below are held by the API server too, where our CRD is: tuner/cluster/rules.py has each in CEL, under the
# validator's name, and says it in the words that stand here as constants. `{}` is filled in.
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
LABEL_CHARACTERS = 63
OBJECT_NAME_CHARACTERS = 253
MAX_TEXT_CHARACTERS = 512  # of what is no URL
MAX_URL_CHARACTERS = 8192
MAX_NAMES = 16  # in a list of what is no URL
MAX_URLS = 2000  # of which our CRD takes fewer
EMPTY = "is empty"
TOO_LONG = "is too long; at most {} characters"
TOO_MANY = "has too many entries; at most {}"
NOT_A_LABEL = "{} must be a DNS-1123 label: a-z, 0-9 and -, a letter or digit at both ends"
NOT_AN_OBJECT_NAME = "must be the name of a Kubernetes object: a-z, 0-9, - and ., a letter or digit at both ends"


def checked_label(name: str) -> str:
    if len(name) > LABEL_CHARACTERS:
        raise _fault(TOO_LONG.format(LABEL_CHARACTERS))
    if not LABEL.fullmatch(name):
        near = name_for(name.partition("?")[0])  # without the query of what may be a signed URL
        raise _fault(NOT_A_LABEL.format(repr(name)), f'for example "{near}"')
    return name


def checked_object_name(name: str) -> str:
    """The value is not shown: where a Secret's name belongs, somebody may have put what is in it."""
    if len(name) > OBJECT_NAME_CHARACTERS or not SUBDOMAIN.fullmatch(name):
        raise _fault(NOT_AN_OBJECT_NAME)
    return name


def name_for(text: str) -> str:
    """The nearest name that a Workspace can have: `Phi-3.5_mini` → `phi-3-5-mini`"""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:LABEL_CHARACTERS].strip("-") or "tuning"


LabelName = Annotated[str, AfterValidator(checked_label)]
ObjectName = Annotated[str, AfterValidator(checked_object_name)]


def empty_is_none(value: object) -> object:
    return None if value == "" else value  # KAITO's Go types cannot tell "" from a missing field


OptionalName = Annotated[ObjectName | None, BeforeValidator(empty_is_none)]
OptionalText = Annotated[str | None, BeforeValidator(empty_is_none)]


A_URL = "a URL, where an image reference belongs"
NAMES_DIGEST = "{} names a digest, which only a push can know"


def parsed_image(image: str) -> ImageReference:
    if "://" in image:  # not for parse_reference: its message would show a signed query
        raise _fault(A_URL, "write it like myregistry.azurecr.io/adapters/phi-3:v1")
    if len(image) > MAX_TEXT_CHARACTERS:
        raise _fault(TOO_LONG.format(MAX_TEXT_CHARACTERS))
    try:
        return parse_reference(image)
    except ConfigError as error:
        raise _fault(error.message, error.hint) from error


def checked_output_image(image: ImageReference) -> ImageReference:
    if image.digest:
        raise _fault(NAMES_DIGEST.format(repr(str(image))), "leave out @sha256:…, give a tag")
    return image


Image = Annotated[
    ImageReference,
    GetPydanticSchema(lambda *_: no_info_after_validator_function(parsed_image, str_schema())),
]
OptionalImage = Annotated[Image | None, BeforeValidator(empty_is_none)]


def is_local_file(url: str) -> bool:
    """Whether an entry of `urls` is a path or a file:// URL on this machine."""
    return url.lower().startswith("file:") or not re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", url)


@dataclass(frozen=True)
class _Rules:
    """What the place where the run happens allows; pydantic hands it to the validators as their context."""

    allowed: Allowed
    local_files: bool


LOCAL_FILE = "names a file of one machine, which a pod cannot read"


def checked_url(url: str, info: ValidationInfo) -> str:
    rules = info.context
    assert isinstance(rules, _Rules)
    hide_url(url)
    if not url.strip():
        raise _fault(EMPTY)
    if not is_local_file(url):
        if problem := url_problem(url, rules.allowed, stores=rules.local_files):
            raise _fault(problem)
    elif not rules.local_files:
        raise _fault(
            LOCAL_FILE,
            "write an https:// URL, or put the data into an image (input.image) or a volume (input.volumeSource)",
        )
    return url


Url = Annotated[str, AfterValidator(checked_url)]

VOLUME_KINDS = frozenset((
    "awsElasticBlockStore", "azureDisk", "azureFile", "cephfs", "cinder", "configMap", "csi", "downwardAPI", "emptyDir",
    "ephemeral", "fc", "flexVolume", "gcePersistentDisk", "glusterfs", "hostPath", "image", "iscsi", "nfs",
    "persistentVolumeClaim", "portworxVolume", "projected", "rbd", "secret", "vsphereVolume",
))  # fmt: skip
READ_ONLY_VOLUME_KINDS = frozenset({"configMap", "downwardAPI", "image", "projected", "secret"})
REQUIRED_OF_VOLUME = {"persistentVolumeClaim": "claimName", "hostPath": "path"}
NO_VOLUME = "must name exactly one kind of volume; it names none"
SEVERAL_VOLUMES = "must name exactly one kind of volume"
INCOMPLETE_VOLUME = "{} has no {}"
READ_ONLY_VOLUME = "{} volumes are read-only: no adapter can be saved there"


def checked_volume(source: dict[str, Any]) -> dict[str, Any]:
    if len(source) != 1:
        raise _fault(
            SEVERAL_VOLUMES if source else NO_VOLUME,
            f"it names {', '.join(sorted(source))}" if source else "persistentVolumeClaim: {claimName: my-claim}",
        )
    kind, settings = next(iter(source.items()))
    if kind not in VOLUME_KINDS:
        raise _fault(f"{kind!r} is no kind of Kubernetes volume", did_you_mean(kind, VOLUME_KINDS))
    if not isinstance(settings, dict):
        raise _fault(f"{kind} must be a mapping, not {what_is(settings)}")
    required = REQUIRED_OF_VOLUME.get(kind)
    if required and not (isinstance(settings.get(required), str) and settings[required]):
        raise _fault(INCOMPLETE_VOLUME.format(kind, required))
    return source


def checked_output_volume(source: dict[str, Any]) -> dict[str, Any]:
    if kinds := sorted(source.keys() & READ_ONLY_VOLUME_KINDS):
        raise _fault(READ_ONLY_VOLUME.format(kinds[0]))
    return source


VolumeText = Annotated[dict[str, Any], AfterValidator(checked_volume)]


class _FromYaml(BaseModel):
    """Frozen; its attributes are snake_case, the keys in a file are KAITO's camelCase."""

    model_config = ConfigDict(frozen=True, extra="forbid", alias_generator=to_camel)


class Metadata(_FromYaml):
    name: LabelName
    namespace: Annotated[LabelName | None, BeforeValidator(empty_is_none)] = None
    labels: dict[str, str] = Field(default_factory=dict)
    annotations: dict[str, str] = Field(default_factory=dict)


class ObjectMetadata(Metadata):
    """Of a ConfigMap or Secret: their names may have dots."""

    name: ObjectName


class Requirement(_FromYaml):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: tuple[str, ...] = ()


class LabelSelector(_FromYaml):
    match_labels: dict[str, str] = Field(default_factory=dict)
    match_expressions: tuple[Requirement, ...] = ()


class Resource(_FromYaml):
    """`resource`: where in a cluster it runs. Nothing of it matters on a GPU box."""

    instance_type: OptionalText = None
    count: StrictInt = Field(default=1, ge=1)
    label_selector: LabelSelector | None = None
    preferred_nodes: tuple[str, ...] = ()
    partition: dict[str, Any] | None = None


class PresetOptions(_FromYaml):
    image: OptionalImage = None
    image_pull_secrets: tuple[ObjectName, ...] = ()
    model_access_secret: OptionalName = None


class PresetSpec(_FromYaml):
    name: str = Field(min_length=1)
    access_mode: Literal["public", "private"] | None = None
    preset_options: PresetOptions = PresetOptions()


class UrlInput(_FromYaml):
    """`urls` are as written: URLs with their queries (which may be secret) and, on a box, paths and file:// URLs.

    `validation` are evaluated and not trained on: Tuner's own field, which KAITO's CRD drops (there `#use=validation`
    after an entry of `urls` says the same).
    """

    urls: tuple[Url, ...] = Field(repr=False, max_length=MAX_URLS)
    validation: tuple[Url, ...] = Field(default=(), repr=False, max_length=MAX_URLS)
    name: OptionalName = None


class ImageInput(_FromYaml):
    """An OCI image with the data files under /data."""

    image: Image
    image_pull_secrets: tuple[ObjectName, ...] = ()
    name: OptionalName = None


class VolumeInput(_FromYaml):
    """A Kubernetes volume, as a pod's `volumes` would have it."""

    volume_source: VolumeText
    name: OptionalName = None


class ImageOutput(_FromYaml):
    image: Annotated[Image, AfterValidator(checked_output_image)]
    image_push_secret: OptionalName = None


class VolumeOutput(_FromYaml):
    """A Kubernetes volume; `hostPath` also is how `--output DIR` looks as a Workspace."""

    volume_source: Annotated[VolumeText, AfterValidator(checked_output_volume)]


INPUT_VARIANTS: dict[str, type[_FromYaml]] = {"urls": UrlInput, "image": ImageInput, "volumeSource": VolumeInput}
OUTPUT_VARIANTS: dict[str, type[_FromYaml]] = {"image": ImageOutput, "volumeSource": VolumeOutput}
_VARIANTS: dict[Location, dict[str, type[_FromYaml]]] = {
    ("tuning", "input"): INPUT_VARIANTS,
    ("tuning", "output"): OUTPUT_VARIANTS,
}
EXACTLY_ONE: dict[Location, str] = {
    ("tuning", "input"): "exactly one of urls, image or volumeSource must be specified",
    ("tuning", "output"): "exactly one of image or volumeSource must be specified",
}
ANOTHER_ONE = "{}; there is another one beside it"


def _first_alternative(value: object) -> str | None:
    """The variant's tag. When two alternatives are there the second then is an extra key of the first's type."""
    return next((f"<{key}>" for key in INPUT_VARIANTS if isinstance(value, dict) and key in value), None)


Input = Annotated[
    Annotated[UrlInput, Tag("<urls>")]
    | Annotated[ImageInput, Tag("<image>")]
    | Annotated[VolumeInput, Tag("<volumeSource>")],
    Discriminator(_first_alternative),
]
Output = Annotated[
    Annotated[ImageOutput, Tag("<image>")] | Annotated[VolumeOutput, Tag("<volumeSource>")],
    Discriminator(_first_alternative),
]


def lowered(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


class Tuning(_FromYaml):
    """`tuning`. `output` is None only where the caller said that the command line names the destination."""

    preset: PresetSpec
    method: Annotated[Literal["lora", "qlora"], BeforeValidator(lowered)]
    config: OptionalName = None
    input: Input
    output: Output | None = None

    @field_validator("input", "output", mode="before")
    @classmethod
    def _without_the_unset(cls, value: object) -> object:
        """KAITO takes an empty alternative as not written, and a secret that no image needs as harmless."""
        if not isinstance(value, dict):
            return value
        written = {key: each for key, each in value.items() if key not in INPUT_VARIANTS or each not in ("", [])}
        if "image" not in written and written.keys() & {"urls", "volumeSource"}:
            written = {key: each for key, each in written.items() if key not in IMAGE_SECRETS}
        return written


IMAGE_SECRETS = ("imagePullSecrets", "imagePushSecret")


class Workspace(_FromYaml):
    """KAITO's Workspace, checked. Exactly one of `tuning` and `inference` is there; `inference` is left as written."""

    api_version: Literal["kaito.sh/v1beta1", "kaito.sh/v1alpha1"]
    kind: Literal["Workspace"]
    metadata: Metadata
    resource: Resource = Resource()
    tuning: Tuning | None = None
    inference: dict[str, Any] | None = None


# ── what stands beside it in the file ────────────────────────────────────────────────────────────────────────────────


class ConfigMapAsWritten(_FromYaml):
    api_version: Literal["v1"]
    kind: Literal["ConfigMap"]
    metadata: ObjectMetadata
    data: dict[str, str] = Field(default_factory=dict)
    binary_data: dict[str, str] = Field(default_factory=dict)
    immutable: bool | None = None


class TextInFile(NamedTuple):
    """A text and where it stands: `first_line` (1-based) of `file` is its first line."""

    text: str
    file: str
    first_line: int


@dataclass(frozen=True)
class ConfigMap:
    """A ConfigMap of the file. `first_lines` has the line where the text under each key begins."""

    name: str
    data: dict[str, str]
    file: str
    first_lines: dict[str, int]

    def training_config(self) -> TextInFile:
        """The text under KAITO's key; ConfigError with the keys that are there when it is not."""
        if TRAINING_CONFIG_KEY not in self.data:
            raise ConfigError(
                f"{self.file}: ConfigMap {self.name!r} has no key {TRAINING_CONFIG_KEY}; it has {_listed(self.data)}",
                hint=f"KAITO reads this key only: name the text {TRAINING_CONFIG_KEY}",
            )
        return self.text(TRAINING_CONFIG_KEY)

    def text(self, key: str) -> TextInFile:
        return TextInFile(self.data[key], self.file, self.first_lines[key])


_DOCKER_CONFIG_KEYS = (".dockerconfigjson", "config.json", ".dockercfg")


class Secret(_FromYaml):
    """A Secret of the file. Neither its repr nor any message has a value of it."""

    api_version: Literal["v1"]
    kind: Literal["Secret"]
    metadata: ObjectMetadata
    type: str = "Opaque"
    data: dict[str, str] = Field(default_factory=dict, repr=False)
    string_data: dict[str, str] = Field(default_factory=dict, repr=False)
    immutable: bool | None = None

    def value(self, key: str) -> str:
        """One value as text; `stringData` wins over `data`, as in the API server."""
        if key in self.string_data:
            return self.string_data[key]
        if key not in self.data:
            raise ConfigError(f"Secret {self.metadata.name!r} has no key {key}; it has {_listed(self._keys())}")
        try:
            return base64.b64decode("".join(self.data[key].split()), validate=True).decode("utf-8")
        except (binascii.Error, ValueError):
            # No "from": the cause would carry the bytes.
            raise ConfigError(
                f"Secret {self.metadata.name!r}: data[{key}] is not text in base64",
                hint="plain text belongs under stringData",
            ) from None

    def docker_config(self) -> str:
        """The JSON text of a docker config with `auths`, whichever of the three ways it is kept."""
        key = next((key for key in _DOCKER_CONFIG_KEYS if key in self._keys()), None)
        if key is None:
            raise ConfigError(
                f"Secret {self.metadata.name!r} (type {self.type}) holds no registry credentials: "
                f"it has {_listed(self._keys())}, not {' or '.join(_DOCKER_CONFIG_KEYS)}",
                hint="make it with kubectl create secret docker-registry",
            )
        wrong = f"Secret {self.metadata.name!r}: {key} is "
        try:
            config = json.loads(self.value(key))
        except (ValueError, RecursionError):
            raise ConfigError(f"{wrong}not JSON", hint="make it with kubectl create secret docker-registry") from None
        if not isinstance(config, dict):
            raise ConfigError(f"{wrong}{what_is(config)}, not a JSON object")
        if key == ".dockercfg" and "auths" not in config:
            config = {"auths": config}  # the format before Docker 1.7: the inner mapping alone
        if not isinstance(config.get("auths"), dict):
            raise ConfigError(f"{wrong}a docker config without auths", hint="credential helpers cannot be in a Secret")
        return json.dumps({"auths": config["auths"]})  # whoever wrote the file must not choose a program to be run

    def _keys(self) -> set[str]:
        return self.data.keys() | self.string_data.keys()


@dataclass(frozen=True)
class WorkspaceFile:
    """The one Workspace of a file and what stands beside it.

    `other_kinds` are the objects that were passed over (`PersistentVolumeClaim/my-claim`); `notes` say what in the
    file is outdated or has no effect, a sentence each. `is_typed`: there is no file, flags stand for one.
    """

    workspace: Workspace
    config_maps: dict[str, ConfigMap] = field(default_factory=dict)
    secrets: dict[str, Secret] = field(default_factory=dict)
    other_kinds: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    is_typed: bool = False


def require_tuning(file: WorkspaceFile) -> Tuning:
    """The tuning section, or ConfigError for an inference Workspace."""
    if file.workspace.tuning is None:
        raise ConfigError(
            f"Workspace {file.workspace.metadata.name!r}: this Workspace has an inference section; "
            "this command runs tuning",
            hint="give a Workspace with a tuning section; tuner init writes one",
        )
    return file.workspace.tuning


NO_PUSH_SECRET = "must specify imagePushSecret with destination image: a pod has no other credentials"


def cluster_problems(workspace: Workspace) -> list[Problem]:
    """What a GPU box can do without and a pod cannot."""
    tuning = workspace.tuning
    if tuning is None:
        return []
    problems = []
    if isinstance(tuning.input, UrlInput):
        problems += [
            Problem(LOCAL_FILE, path=f"tuning.input.{field}[{index}]")
            for field, urls in (("urls", tuning.input.urls), ("validation", tuning.input.validation))
            for index, url in enumerate(urls)
            if is_local_file(url)
        ]
    if isinstance(tuning.output, ImageOutput) and tuning.output.image_push_secret is None:
        problems.append(
            Problem(
                NO_PUSH_SECRET,
                path="tuning.output.imagePushSecret",
                hint="kubectl create secret docker-registry NAME --docker-server=… --docker-username=… "
                "--docker-password=…, then imagePushSecret: NAME",
            )
        )
    return problems


# ── from a file ──────────────────────────────────────────────────────────────────────────────────────────────────────


def load_workspace_file(
    path: Path, *, allowed: Allowed | None = None, local_files: bool = True, output_given: bool = False
) -> WorkspaceFile:
    """`parse_workspace_text` of a file; InputMissingError when there is none to read."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory, not a Workspace file", hint=_yaml_files_in(path))
    return parse_workspace_text(
        read_text(path, str(path), hint="tuner init writes a Workspace to start from"),
        str(path),
        allowed=allowed,
        local_files=local_files,
        output_given=output_given,
    )


def _yaml_files_in(directory: Path) -> str | None:
    names = sorted(path.name for path in directory.iterdir() if path.suffix in (".yaml", ".yml"))
    return f"in it: {', '.join(names[:5])}" if names else None


def parse_workspace_text(
    text: str,
    file: str,
    *,
    allowed: Allowed | None = None,
    local_files: bool = True,
    output_given: bool = False,
) -> WorkspaceFile:
    """The one Workspace in `text` with its ConfigMaps and Secrets; ConfigError with all that is wrong.

    `allowed` opens addresses to `urls`. `local_files` permits paths and file:// URLs there: a GPU box. `output_given`
    says that the command line names the destination: then `tuning.output` may be missing or an unfilled placeholder,
    and is None.
    """
    rules = _Rules(allowed or Allowed(), local_files)
    documents, problems = read_documents(text, file)
    problems += [
        Problem(f"{what_is(document.value)}, not a Kubernetes object", file=file, line=document.line)
        for document in documents
        if not isinstance(document.value, dict)
    ]
    objects = [_Object.of(document) for document in documents if isinstance(document.value, dict)]
    return _assembled(objects, problems, file, rules, output_given=output_given)


def parse_objects(
    workspace: Mapping[str, Any],
    *others: Mapping[str, Any],
    allowed: Allowed | None = None,
    output_given: bool = False,
) -> WorkspaceFile:
    """The same of objects as the API server gives them: a Workspace, and ConfigMaps and Secrets that it names.

    What a field is called stands in each problem, no line. Files of this machine are never meant.
    """
    rules = _Rules(allowed or Allowed(), local_files=False)
    objects: list[_Object] = []
    problems: list[Problem] = []
    for each in (workspace, *others):
        file = f"configmap/{_name_of(each)}" if each.get("kind") == "ConfigMap" else ""
        too_large = check_size(each, file)
        problems += too_large
        objects += [] if too_large else [_Object.of(Document(dict(each), file))]
    return _assembled(objects, problems, "", rules, output_given=output_given)


def _name_of(value: Mapping[str, Any]) -> str:
    metadata = value.get("metadata")
    return str(metadata.get("name")) if isinstance(metadata, dict) else ""


@dataclass(frozen=True)
class _Object:
    """One Kubernetes object as it was written, and the document that it is."""

    value: dict[str, Any] = field(repr=False)
    document: Document

    @classmethod
    def of(cls, document: Document) -> "_Object":
        return cls(_without_nulls(document.value), document)

    @property
    def kind(self) -> str:
        kind = self.value.get("kind")
        return cut(kind, 60) if isinstance(kind, str) and kind.isprintable() else "object without kind"

    @property
    def title(self) -> str:
        metadata = self.value.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        return f"{self.kind}/{cut(name, 80)}" if isinstance(name, str) and name.isprintable() else self.kind

    @property
    def line(self) -> int:
        return self.document.line

    def problem(self, fault: Fault) -> Problem:
        return self.document.problem(fault)


def _without_nulls(value: YamlValue) -> Any:
    """For Kubernetes a null is a key not written."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _assembled(
    objects: Sequence[_Object], problems: list[Problem], file: str, rules: _Rules, *, output_given: bool
) -> WorkspaceFile:
    workspaces = [each for each in objects if each.kind == "Workspace"]
    if len(workspaces) != 1 and not problems:
        problems.append(_not_one_workspace(objects, workspaces, file))

    workspace: Workspace | None = None
    notes: list[str] = []
    for written in workspaces:
        known = written.document.faults
        unfilled = (
            fault for fault in _text_faults(written.value) if not any(each.hides(fault.location) for each in known)
        )
        faults = [*known, *islice(unfilled, MOST_PROBLEMS + 1)]
        if output_given:
            written, faults = _without_unfilled_output(written, faults)
        faults += _whole_faults(written.value, output_given=output_given)
        workspace, found = _validated(written, Workspace, rules, faults)
        problems += found
        if workspace:
            notes += _notes(written, workspace)

    config_maps, found = _named(objects, "ConfigMap", ConfigMapAsWritten, rules)
    problems += found
    secrets, found = _named(objects, "Secret", Secret, rules)
    problems += found
    if problems or workspace is None:
        raise ConfigError.of(sorted(problems, key=lambda problem: problem.line or 0))
    return WorkspaceFile(
        workspace,
        config_maps={name: _config_map(written, checked) for name, (written, checked) in config_maps.items()},
        secrets={name: secret for name, (_, secret) in secrets.items()},
        other_kinds=tuple(each.title for each in objects if each.kind not in _OUR_KINDS),
        notes=tuple(notes),
    )


_OUR_KINDS = ("Workspace", "ConfigMap", "Secret")


def _named(
    objects: Sequence[_Object], kind: str, model: type["_ObjectT"], rules: _Rules
) -> tuple[dict[str, tuple[_Object, "_ObjectT"]], list[Problem]]:
    """The objects of one kind by their names."""
    named: dict[str, tuple[_Object, _ObjectT]] = {}
    problems: list[Problem] = []
    for each in objects:
        if each.kind != kind:
            continue
        checked, found = _validated(each, model, rules, each.document.faults)
        problems += found
        if checked and checked.metadata.name in named:
            fault = Fault(("metadata", "name"), f"a second {each.title}; the file has one already")
            problems.append(each.problem(fault))
        elif checked:
            named[checked.metadata.name] = each, checked
    return named, problems


def _config_map(written: _Object, checked: ConfigMapAsWritten) -> ConfigMap:
    first_lines = {key: written.document.text_lines.get(("data", key), written.line) for key in checked.data}
    return ConfigMap(checked.metadata.name, checked.data, written.document.file, first_lines)


def _not_one_workspace(objects: Sequence[_Object], workspaces: Sequence[_Object], file: str) -> Problem:
    if workspaces:
        there = cut(", ".join(f"{each.title} (line {each.line})" for each in workspaces))
        return Problem(
            f"{len(workspaces)} Workspaces in one file: {there}",
            file=file,
            line=workspaces[1].line,
            hint="a run takes one; put each into a file of its own",
        )
    if not objects:
        return Problem("the file is empty", file=file, hint="tuner init writes a Workspace to start from")
    there = cut(", ".join(each.title for each in objects))
    near = next((each for each in objects if did_you_mean(each.kind, ["Workspace"])), None)
    if near:
        return Problem(
            f"no Workspace in it, but a {near.kind!r}; it has {there}",
            path="kind",
            file=file,
            line=near.document.line_of(("kind",)),
            hint=did_you_mean(near.kind, ["Workspace"]),
        )
    keys = {key for each in objects for key in each.value}
    hint = "tuner init writes a Workspace to start from"
    if "training_config" in keys:
        hint = "a training configuration goes beside the Workspace: --config FILE"
    elif keys & {"tuning", "inference"}:
        hint = f"write apiVersion: {API_VERSIONS[0]} and kind: Workspace at the top"
    return Problem(f"no Workspace in it; it has {there}", file=file, line=objects[0].line, hint=hint)


# ── rules that pydantic cannot see ───────────────────────────────────────────────────────────────────────────────────

TEMPLATE_EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\$\{[^}]*\}|\$[A-Z_][A-Z0-9_]*", re.DOTALL)  # for CEL
_BRACKETS = (("{{", "}}"), ("{%", "%}"), ("${", "}"))
_VARIABLE = re.compile(r"\$[A-Z_][A-Z0-9_]*")
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z0-9_]*_HERE\b|<[A-Za-z][A-Za-z0-9 _-]*>|\bYOUR[_-][A-Z0-9_-]+\b")
SEVERAL_PLACEHOLDERS = re.compile(f"(?:{PLACEHOLDER.pattern}).*(?:{PLACEHOLDER.pattern})", re.DOTALL)  # for CEL
_SHORTEST_PLACEHOLDER = re.compile(PLACEHOLDER.pattern.replace("*", "*?").replace("+", "+?"))
A_PLACEHOLDER = "{} is a placeholder of an example, not a value"
PLACEHOLDERS = "{} has placeholders of an example in place of values"
NOT_BOTH = "either inference or tuning must be specified, but not both"
NOT_NEITHER = "either inference or tuning must be specified, not neither"
ONE_NODE = "tuning does not support multi-node configurations: count must be 1"
NO_PARTITION = "GPU partitioning is not supported for tuning workloads"


def _text_faults(workspace: Mapping[str, Any]) -> Iterator[Fault]:
    """Placeholders and template expressions that nobody has filled in, and what is longer than our CRD lets through."""
    metadata = workspace.get("metadata")
    if isinstance(metadata, dict):
        yield from _text_faults_at(("metadata", "name"), metadata.get("name"))
    for section in ("resource", "tuning"):
        yield from _text_faults_at((section,), workspace.get(section))


def _text_faults_at(location: Location, value: object) -> Iterator[Fault]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key != "volumeSource":  # CSI drivers have ${…} of their own
                yield from _text_faults_at((*location, key), each)
    elif isinstance(value, list):
        if len(value) > MAX_NAMES and location[-1] != "urls":
            yield Fault(location, TOO_MANY.format(MAX_NAMES), covers=True)
        for index, each in enumerate(value):
            yield from _text_faults_at((*location, index), each)
    elif isinstance(value, str):
        most = MAX_URL_CHARACTERS if "urls" in location else MAX_TEXT_CHARACTERS
        shown_part = value.partition("?")[0] if "://" in value else value  # a signed query is never shown
        if len(value) > most:
            yield Fault(location, TOO_LONG.format(most), covers=True)
        elif expression := template_expression(shown_part):
            shown = " ".join(expression.split())[:60]
            yield Fault(location, UNFILLED_EXPRESSION.format(shown), RENDER_FIRST, covers=True, is_unfilled=True)
        elif placeholder := PLACEHOLDER.search(shown_part):
            several = several_placeholders(shown_part)
            sentence = PLACEHOLDERS.format(several) if several else A_PLACEHOLDER.format(placeholder[0])
            hint = "write the real value"
            if location[-1] == "image":
                hint = "write your registry, repository and tag: myregistry.azurecr.io/adapters/my-adapter:0.0.1"
            elif location[-1] == "imagePushSecret":
                hint = "write the name of the Secret with the registry's credentials"
            yield Fault(location, sentence, hint, covers=True, is_unfilled=True)


def several_placeholders(text: str) -> str | None:
    """The text from the first placeholder to the last, if there are two; as SEVERAL_PLACEHOLDERS, but for the time."""
    first = _SHORTEST_PLACEHOLDER.search(text)
    others = list(PLACEHOLDER.finditer(text, first.end())) if first else []
    return text[first.start() : others[-1].end()] if first and others else None


def template_expression(text: str) -> str | None:
    """What TEMPLATE_EXPRESSION finds first; a regex of Python's takes the square of its length for a text of `{{`."""
    variable = _VARIABLE.search(text)
    found = [(variable.start(), variable[0])] if variable else []
    for opening, closing in _BRACKETS:
        begin = text.find(opening)
        end = text.find(closing, begin + len(opening)) if begin >= 0 else -1
        if end >= 0:
            found.append((begin, text[begin : end + len(closing)]))
    return min(found)[1] if found else None


def _without_unfilled_output(written: _Object, faults: list[Fault]) -> tuple[_Object, list[Fault]]:
    """The same without `tuning.output` where that still has a placeholder in it."""
    others = [fault for fault in faults if not fault.is_unfilled or fault.location[:2] != ("tuning", "output")]
    if len(others) == len(faults):
        return written, faults
    tuning = {key: value for key, value in written.value["tuning"].items() if key != "output"}
    return replace(written, value={**written.value, "tuning": tuning}), others


def _whole_faults(workspace: Mapping[str, Any], *, output_given: bool) -> Iterator[Fault]:
    """The rules that look at more than one field; they hold whatever else is wrong."""
    tuning = workspace.get("tuning")
    if tuning is not None and "inference" in workspace:
        yield Fault(("inference",), NOT_BOTH)
    meant = ("spec" in workspace) or any(did_you_mean(key, ["tuning", "inference"]) for key in workspace)
    if tuning is None and "inference" not in workspace and not meant:
        yield Fault((), NOT_NEITHER)
    if not isinstance(tuning, dict):
        return
    if "output" not in tuning and not output_given:
        yield Fault(("tuning", "output"), f"is required: {_REQUIRED['tuning', 'output']}")
    resource = workspace.get("resource")
    if not isinstance(resource, dict):
        return
    count = resource.get("count")
    if isinstance(count, int) and count > 1:
        yield Fault(
            ("resource", "count"),
            ONE_NODE,
            "one node with several GPUs works: choose a larger instanceType",
        )
    if resource.get("partition") is not None:
        yield Fault(("resource", "partition"), NO_PARTITION)


# ── pydantic's findings in our words ─────────────────────────────────────────────────────────────────────────────────

_ModelT = TypeVar("_ModelT", Workspace, ConfigMapAsWritten, Secret)
_ObjectT = TypeVar("_ObjectT", ConfigMapAsWritten, Secret)

# What the API server adds to what was applied: `kubectl get -o yaml` writes it.
_SERVER_METADATA = frozenset((
    "creationTimestamp", "deletionGracePeriodSeconds", "deletionTimestamp", "finalizers", "generateName", "generation",
    "managedFields", "ownerReferences", "resourceVersion", "selfLink", "uid",
))  # fmt: skip

_MODEL_AT: dict[Location, type[_FromYaml]] = {
    ("resource",): Resource,
    ("resource", "labelSelector"): LabelSelector,
    ("tuning",): Tuning,
    ("tuning", "preset"): PresetSpec,
    ("tuning", "preset", "presetOptions"): PresetOptions,
}
_REQUIRED: dict[Location, str] = {
    ("metadata", "name"): "the run, its Job and its adapter are named after it",
    ("tuning", "preset"): "the model to tune",
    ("tuning", "preset", "name"): "the model to tune",
    ("tuning", "method"): "lora or qlora",
    ("tuning", "input"): "the data to tune on, in urls, image or volumeSource",
    ("tuning", "output"): "where the adapter goes, an image or a volumeSource",
}
_MISPLACED: dict[str, str] = {
    "spec": "KAITO's Workspace has no spec; move the keys in it up, to the top level",
    "volume": 'KAITO calls it "volumeSource"',
    "modelWeightsPVC": "it is for inference; tuner run --base-model DIR takes weights from a directory",
    "modelWeightsSubPath": "it is for inference; tuner run --base-model DIR takes weights from a directory",
    "accessMode": "it belongs under tuning.preset",
    "presetOptions": "it belongs under tuning.preset",
    "preset": "it belongs under tuning",
    "method": "it belongs under tuning",
    "config": "it belongs under tuning",
    "input": "it belongs under tuning",
    "output": "it belongs under tuning",
    "urls": "it belongs under tuning.input",
    "imagePushSecret": "it belongs under tuning.output",
    "instanceType": "it belongs under resource",
    "labelSelector": "it belongs under resource",
    "matchLabels": "it belongs under resource.labelSelector",
    "name": "the Workspace's own name is metadata.name, the model's is tuning.preset.name",
}


# What somebody meant who wrote a text or a list there.
_AS_MAPPING: dict[Location, str] = {
    ("metadata",): "metadata: {name: NAME}",
    ("resource",): "resource: {instanceType: TYPE}",
    ("resource", "labelSelector"): "labelSelector: {matchLabels: {KEY: VALUE}}",
    ("tuning", "preset"): "preset: {name: NAME}",
    ("tuning", "input"): "input: {urls: [URL]}, {image: REFERENCE} or {volumeSource: VOLUME}",
    ("tuning", "output"): "output: {image: REFERENCE, imagePushSecret: NAME} or {volumeSource: VOLUME}",
}
_PLAIN_NAME = re.compile(r"[A-Za-z0-9][\w./-]{0,127}", re.ASCII)


def _validated(
    written: _Object, model: type[_ModelT], rules: _Rules, faults: Sequence[Fault]
) -> tuple[_ModelT | None, list[Problem]]:
    """The model, or None and what is wrong with the object: `faults` and all that pydantic finds."""
    value = {key: each for key, each in written.value.items() if key != "status"}
    if isinstance(metadata := value.get("metadata"), dict):
        value["metadata"] = {key: each for key, each in metadata.items() if key not in _SERVER_METADATA}
    checked: _ModelT | None = None
    found = list(faults)
    try:
        checked = model.model_validate(value, context=rules)
    except ValidationError as error:
        details = error.errors(include_url=False)[: MOST_PROBLEMS + 1]
        found += [
            fault
            for detail in details
            for fault in _faults_of(detail, model)
            if not any(known.hides(fault.location) for known in faults)
        ]
    return (None if found else checked), [written.problem(fault) for fault in found]


NOT_A_CHOICE = "must be {}, not {}"


def _faults_of(detail: ErrorDetails, model: type[_FromYaml]) -> Iterator[Fault]:
    tags = {f"<{key}>" for key in INPUT_VARIANTS}
    location = tuple(part for part in detail["loc"] if part not in tags)
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "fault":
            yield Fault(location, context["message"], context["hint"])
        case "missing":
            why = _REQUIRED.get(location) if model is Workspace else None
            yield Fault(location, f"is required: {why}" if why else "is required")
        case "extra_forbidden":
            yield _unknown_key(location, model)
        case "union_tag_not_found" if isinstance(value, dict):
            known = {field.alias for variant in _VARIANTS[location].values() for field in variant.model_fields.values()}
            unknown = [_unknown_key((*location, key), model) for key in value if key not in known]
            yield from unknown or [Fault(location, EXACTLY_ONE[location])]
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            hint = did_you_mean(value, choices) if isinstance(value, str) else None
            shown = repr(value) if isinstance(value, str) else what_is(value)
            if location == ("tuning", "method") and model is Workspace:
                hint = hint or "qlora: 4-bit base model, lora: 16 bit; a model is not trained whole here"
            yield Fault(location, NOT_A_CHOICE.format(" or ".join(choices), shown), hint)
        case "string_type":
            hint = None
            if isinstance(value, bool | int | float):
                hint = "put it in quotes"
            elif location == ("tuning", "config") and model is Workspace:
                hint = f"write a ConfigMap's name; the settings stand in it, under the key {TRAINING_CONFIG_KEY}"
            elif isinstance(value, dict) and "name" in value:
                hint = "write the name alone, without name:"
            elif isinstance(value, dict) and location[:3] in (
                ("tuning", "input", "urls"),
                ("tuning", "input", "validation"),
            ):
                hint = "write the address alone"
            elif isinstance(value, list):
                hint = "write one alone, without [ ] or -"
            elif isinstance(value, dict) and location[:1] == ("data",):
                hint = "write a | after the key: a ConfigMap holds text"
            yield Fault(location, f"must be text, not {what_is(value)}", hint)
        case "dict_type" | "model_type" | "model_attributes_type" | "union_tag_not_found":
            hint = _AS_MAPPING.get(location) if model is Workspace and isinstance(value, str | list) else None
            if hint and isinstance(value, str) and location == ("tuning", "preset") and _PLAIN_NAME.fullmatch(value):
                hint = f"did you mean preset: {{name: {value}}}?"
            yield Fault(location, f"must be a mapping, not {what_is(value)}", hint)
        case "tuple_type":
            yield Fault(location, f"must be a list, not {what_is(value)}", "write each entry on a line with - in front")
        case "too_long":
            yield Fault(location, TOO_MANY.format(context["max_length"]))
        case "int_type":
            yield Fault(location, f"must be a whole number, not {what_is(value)}")
        case "string_too_short":
            yield Fault(location, EMPTY)
        case _:
            yield Fault(location, detail["msg"])


def _unknown_key(location: Location, model: type[_FromYaml]) -> Fault:
    *parents, key = location
    parent, name = tuple(parents), str(key)
    known: set[str]
    if model is Workspace and parent in _VARIANTS:
        if name in _VARIANTS[parent]:
            return Fault(location, ANOTHER_ONE.format(EXACTLY_ONE[parent]))
        variants = _VARIANTS[parent].values()
        known = {field.alias or "" for variant in variants for field in variant.model_fields.values()}
    else:
        at = _MODEL_AT.get(parent) if model is Workspace and parent else model
        at = Metadata if parent == ("metadata",) else at
        known = {field.alias or "" for field in at.model_fields.values()} if at else set()
    near = did_you_mean(name, known)
    if model is Workspace and parent == ("resource", "labelSelector") and not near:
        near = "labels stand below matchLabels: {KEY: VALUE}"
    hint = _MISPLACED.get(name, near) if model is Workspace else near
    return Fault(location, "unknown key", hint or (f"known here: {_listed(known)}" if known else None))


def _listed(names: Mapping[str, object] | set[str]) -> str:
    return cut(", ".join(sorted(names))) or "none"


# ── what is outdated or has no effect ────────────────────────────────────────────────────────────────────────────────

_REMOVED_PRESETS = {
    "falcon-7b": "tiiuae/falcon-7b",
    "falcon-7b-instruct": "tiiuae/falcon-7b-instruct",
    "falcon-40b": "tiiuae/falcon-40b",
    "falcon-40b-instruct": "tiiuae/falcon-40b-instruct",
    "phi-2": "microsoft/phi-2",
}
_V100_INSTANCE_TYPE = re.compile(r"standard_nc(6|12|24|24r)s_v3", re.IGNORECASE)
_RESERVED_LABELS = re.compile(
    r"kaito\.sh/(workspace|workspacenamespace|ragengine|ragenginenamespace)"
    r"|karpenter\.kaito\.sh/(workspace|inferenceset)-(name|namespace)"
)


def is_reserved_label(key: str) -> bool:
    """Whether KAITO sets this label by itself and ignores it in a labelSelector."""
    return _RESERVED_LABELS.fullmatch(key) is not None


_EXAMPLE_HOST = re.compile(r"(?:https?://)?(?:[a-z0-9-]+\.)*example\.(?:com|org|net)(?=[:/]|$)", re.IGNORECASE)


# What an API server fills in where it was not written: KAITO's CRD, and ours.
SERVER_DEFAULTS: dict[Location, Any] = {("resource", "count"): 1, ("tuning", "preset", "accessMode"): "public"}


def _notes(written: _Object, workspace: Workspace) -> list[str]:
    faults = _outdated(written.value, workspace)
    if not written.document.lines:  # an object of the API server: nobody wrote its defaults
        faults = (each for each in faults if not _is_default(written.value, each.location))
    return [str(written.problem(fault)) for fault in faults]


def _is_default(value: Any, location: Location) -> bool:
    if location not in SERVER_DEFAULTS:
        return False
    for key in location:
        value = value.get(key, {})
    return bool(value == SERVER_DEFAULTS[location])


def _outdated(written: Mapping[str, Any], workspace: Workspace) -> Iterator[Fault]:
    """What in a correct Workspace does less than it seems to."""
    resource, tuning = workspace.resource, workspace.tuning
    if tuning is None:
        return
    if resource.instance_type and _V100_INSTANCE_TYPE.fullmatch(resource.instance_type):
        yield Fault(
            ("resource", "instanceType"),
            f"Azure no longer offers {resource.instance_type} (V100); Standard_NC24ads_A100_v4 is in KAITO's examples "
            "now. On a GPU box instanceType has no effect",
        )
    if "resource" in written and resource.label_selector is None:
        yield Fault(
            ("resource",),
            "no labelSelector: nothing here needs it, but KAITO's CRD refuses such a file at kubectl apply",
        )
    if "count" in written.get("resource", {}):
        yield Fault(("resource", "count"), "deprecated by KAITO; tuning always runs on one node")
    if resource.preferred_nodes:
        yield Fault(("resource", "preferredNodes"), "deprecated by KAITO; only a preference here, use labelSelector")
    labels = resource.label_selector.match_labels if resource.label_selector else {}
    for label in filter(is_reserved_label, labels):
        yield Fault(("resource", "labelSelector", "matchLabels", label), "reserved by KAITO and ignored")
    yield from _outdated_preset(tuning.preset)
    for side in ("input", "output"):
        for key in IMAGE_SECRETS:
            if key in written["tuning"].get(side, {}) and "image" not in written["tuning"][side]:
                yield Fault(("tuning", side, key), "has no effect without an image")
    yield from _example_hosts(tuning)


def _outdated_preset(preset: PresetSpec) -> Iterator[Fault]:
    if hub_id := _REMOVED_PRESETS.get(preset.name.lower()):
        yield Fault(
            ("tuning", "preset", "name"),
            f"KAITO has removed its preset {preset.name}; the model itself is {hub_id} on Hugging Face",
        )
    if preset.access_mode is not None:
        yield Fault(("tuning", "preset", "accessMode"), "deprecated by KAITO; has no effect")
    options = preset.preset_options
    if options.image is not None:
        yield Fault(
            ("tuning", "preset", "presetOptions", "image"), "deprecated by KAITO; the base weights are taken from it"
        )
    elif options.image_pull_secrets:
        yield Fault(("tuning", "preset", "presetOptions", "imagePullSecrets"), "has no effect without an image")


def _example_hosts(tuning: Tuning) -> Iterator[Fault]:
    places: list[tuple[Location, str]] = []
    if isinstance(tuning.input, UrlInput):
        places += [(("tuning", "input", "urls", index), url) for index, url in enumerate(tuning.input.urls)]
        places += [(("tuning", "input", "validation", index), url) for index, url in enumerate(tuning.input.validation)]
    elif isinstance(tuning.input, ImageInput):
        places.append((("tuning", "input", "image"), str(tuning.input.image)))
    if isinstance(tuning.output, ImageOutput):
        places.append((("tuning", "output", "image"), str(tuning.output.image)))
    for location, address in places:
        if found := _EXAMPLE_HOST.match(address):
            yield Fault(location, f"{found[0]} is an example's host: replace it with your own")


# ── made by us ───────────────────────────────────────────────────────────────────────────────────────────────────────

_FLAG_OF = {
    "tuning.preset": "--model",
    "tuning.input": "--data",
    "tuning.output": "--output",
    "tuning.method": "--method",
    "metadata.name": "--name",
}


def make_workspace(
    model: str,
    data: Sequence[str],
    output: str | None,
    method: str = "qlora",
    name: str | None = None,
    *,
    allowed: Allowed | None = None,
    local_files: bool = True,
) -> Workspace:
    """The Workspace that `tuner run --model ID --data FILE… --output DIR|REF` stands for.

    An `output` that names its registry host is an image, another one a directory (as `hostPath`). None and `oci:…`,
    which no Workspace can say, leave `tuning.output` None. `name` defaults to the model's last part.
    """
    value: dict[str, Any] = {
        "apiVersion": API_VERSIONS[0],
        "kind": "Workspace",
        "metadata": {"name": name_for(re.split(r"[/\\]", model.rstrip("/\\"))[-1]) if name is None else name},
        "tuning": {"preset": {"name": model}, "method": method, "input": {"urls": list(data)}},
    }
    if output is not None and not output.startswith("oci:"):
        is_image = names_registry(output)
        value["tuning"]["output"] = {"image": output} if is_image else {"volumeSource": {"hostPath": {"path": output}}}
    written = _Object(value, Document(value))
    workspace, problems = _validated(written, Workspace, _Rules(allowed or Allowed(), local_files), [])
    if workspace is None:
        raise ConfigError.of([as_flag(problem) for problem in problems])
    return workspace


def as_flag(problem: Problem) -> Problem:
    """The problem with the flag in the place of the field that it stands for."""
    flag = next((flag for path, flag in _FLAG_OF.items() if problem.path.startswith(path)), problem.path)
    return replace(problem, path=flag)


def template_workspace(preset: str = "phi-3-mini-4k-instruct") -> str:
    """The file that `tuner init` writes: a Workspace and its ConfigMap, to be filled in where it says example.com."""
    return f"""\
# A KAITO Workspace that tunes a model. Replace what says example.com, then:
#
#   tuner check workspace.yaml          what is wrong or missing, without a GPU
#   tuner run --smoke workspace.yaml    the whole run with a tiny model, without a GPU
#   tuner run workspace.yaml            the run, on this machine's GPU
apiVersion: {API_VERSIONS[0]}
kind: Workspace
metadata:
  name: my-adapter                      # a-z, 0-9 and -; the Job gets this name
resource:                               # only a cluster reads this section
  instanceType: Standard_NC24ads_A100_v4
  labelSelector:
    matchLabels:
      app: my-adapter
tuning:
  preset:
    name: {json.dumps(preset)}    # a name from "tuner presets", or any Hugging Face id
  method: qlora                         # 4-bit base model; lora: base model in 16 bit
  config: my-adapter-config             # the ConfigMap below
  input:
    urls:                               # parquet, JSON, JSON lines or CSV; every file is used
      - https://example.com/data/train.parquet
      # On this machine a path works as well:
      # - data/train.parquet
  output:
    image: registry.example.com/adapters/my-adapter:0.0.1
    imagePushSecret: registry-credentials
---
# The Secret with the registry's credentials is made in the cluster, and its password stays out of this file:
#
#   kubectl create secret docker-registry registry-credentials \\
#     --docker-server=registry.example.com --docker-username=USER --docker-password=PASSWORD
#
# On this machine "docker login registry.example.com" is enough.
apiVersion: v1
kind: ConfigMap
metadata:
  name: my-adapter-config
data:
  {TRAINING_CONFIG_KEY}: |
    training_config:
      LoraConfig:
        r: 16                           # rank: how much the adapter can learn
        lora_alpha: 32                  # its weight; twice the rank is usual
      TrainingArguments:
        output_dir: /mnt/results
        num_train_epochs: 3
        learning_rate: 2.0e-4
        per_device_train_batch_size: 1  # unwritten gradient_accumulation_steps make it 16 documents a step
      DatasetConfig:
        shuffle_seed: 42
        train_test_split: 0.95          # the rest is held out for evaluation
"""
