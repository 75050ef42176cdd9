"""Workspace YAML → Workspace, with every problem of the file reported at once.

    text ── compose ──► documents (plain values + the line of each) ── pydantic + whole-file rules ──► WorkspaceFile

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
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

import yaml
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

from tuner.errors import ConfigError, InputMissingError, Problem, did_you_mean
from tuner.redaction import hide_url
from tuner.reference import ImageReference, names_registry, parse_reference
from tuner.urls import Allowed, url_problem

API_VERSIONS = ("kaito.sh/v1beta1", "kaito.sh/v1alpha1")
TRAINING_CONFIG_KEY = "training_config.yaml"

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_VALUES = 20_000  # of one file, aliases counted as often as they are used
MAX_DEPTH = 64

Location = tuple[str | int, ...]


# ── what a Workspace is ──────────────────────────────────────────────────────────────────────────────────────────────


def _fault(message: str, hint: str | None = None) -> PydanticCustomError:
    return PydanticCustomError("fault", "{message}", {"message": message, "hint": hint})


# The rules below are held by the API server too, where our CRD is: tuner/cluster/rules.py has each in CEL, under the
# validator's name, and says it in the words that stand here as constants. `{}` is filled in.
LABEL = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SUBDOMAIN = re.compile(rf"{LABEL.pattern}(\.{LABEL.pattern})*")
LABEL_CHARACTERS = 63
OBJECT_NAME_CHARACTERS = 253
EMPTY = "is empty"
TOO_LONG = "is too long; at most {} characters"
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
        raise _fault(f"{kind} must be a mapping, not {_what_is(settings)}")
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
    """`urls` are as written: URLs with their queries (which may be secret) and, on a box, paths and file:// URLs."""

    urls: tuple[Url, ...] = Field(repr=False)
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
        return TextInFile(self.data[TRAINING_CONFIG_KEY], self.file, self.first_lines[TRAINING_CONFIG_KEY])


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
            raise ConfigError(f"{wrong}{_what_is(config)}, not a JSON object")
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
            Problem(LOCAL_FILE, path=f"tuning.input.urls[{index}]")
            for index, url in enumerate(tuning.input.urls)
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
    try:
        if path.is_dir():
            raise ConfigError(f"{path}: is a directory, not a Workspace file", hint=_yaml_files_in(path))
        size_bytes = path.stat().st_size
        if size_bytes > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {size_bytes:,} bytes are no Workspace; at most {MAX_FILE_BYTES:,} are read")
        content = path.read_bytes()
    except FileNotFoundError as error:
        siblings = [sibling.name for sibling in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = did_you_mean(path.name, siblings) or "tuner init writes a Workspace to start from"
        raise InputMissingError(f"{path}: there is no such file", hint=hint) from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputMissingError(f"{path}: cannot be read: {reason}") from error
    return parse_workspace_text(
        _decoded(content, str(path)),
        str(path),
        allowed=allowed,
        local_files=local_files,
        output_given=output_given,
    )


def _yaml_files_in(directory: Path) -> str | None:
    names = sorted(path.name for path in directory.iterdir() if path.suffix in (".yaml", ".yml"))
    return f"in it: {', '.join(names[:5])}" if names else None


def _decoded(content: bytes, file: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf_16 = content.startswith((b"\xff\xfe", b"\xfe\xff"))
        problem = Problem(
            "not UTF-8 text" + (" but UTF-16" if utf_16 else ""),
            file=file,
            line=content.count(b"\n", 0, error.start) + 1,
            hint="save the file as UTF-8",
        )
        raise ConfigError.of([problem]) from error


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
    documents, problems = _read_documents(text, file)
    return _assembled(documents, problems, file, rules, output_given=output_given)


def parse_objects(
    workspace: Mapping[str, Any],
    *others: Mapping[str, Any],
    allowed: Allowed | None = None,
    output_given: bool = False,
) -> WorkspaceFile:
    """The same of objects as the API server gives them: a Workspace, and ConfigMaps and Secrets that it names.

    What a field is called stands in each problem, no line. Files of this machine are never meant.
    """
    documents = [
        _Document(_without_nulls(each), {}, 1, f"configmap/{_name_of(each)}" if each.get("kind") == "ConfigMap" else "")
        for each in (workspace, *others)
    ]
    rules = _Rules(allowed or Allowed(), local_files=False)
    return _assembled(documents, [], "", rules, output_given=output_given)


def _name_of(value: Mapping[str, Any]) -> str:
    metadata = value.get("metadata")
    return str(metadata.get("name")) if isinstance(metadata, dict) else ""


def _without_nulls(value: Any) -> Any:
    """As _Builder leaves a mapping: for Kubernetes a null is a key not written."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value


def _assembled(
    documents: Sequence["_Document"], problems: list[Problem], file: str, rules: _Rules, *, output_given: bool
) -> WorkspaceFile:
    workspaces = [document for document in documents if document.kind == "Workspace"]
    if len(workspaces) != 1 and not problems:
        problems.append(_not_one_workspace(documents, workspaces, file))

    workspace: Workspace | None = None
    notes: list[str] = []
    for document in workspaces:
        faults = list(_unfilled(document.value))
        if output_given:
            document, faults = _without_unfilled_output(document, faults)
        faults += _whole_faults(document.value, output_given=output_given)
        workspace, found = _validated(document, Workspace, rules, faults)
        problems += found
        if workspace:
            notes += _notes(document, workspace)

    config_maps, found = _named(documents, "ConfigMap", ConfigMapAsWritten, rules)
    problems += found
    secrets, found = _named(documents, "Secret", Secret, rules)
    problems += found
    if problems or workspace is None:
        raise ConfigError.of(sorted(problems, key=lambda problem: problem.line or 0))
    return WorkspaceFile(
        workspace,
        config_maps={name: _config_map(document, checked) for name, (document, checked) in config_maps.items()},
        secrets={name: secret for name, (_, secret) in secrets.items()},
        other_kinds=tuple(document.title for document in documents if document.kind not in _OUR_KINDS),
        notes=tuple(notes),
    )


_OUR_KINDS = ("Workspace", "ConfigMap", "Secret")


def _named(
    documents: Sequence["_Document"], kind: str, model: type["_ObjectT"], rules: _Rules
) -> tuple[dict[str, tuple["_Document", "_ObjectT"]], list[Problem]]:
    """The documents of one kind by their names."""
    objects: dict[str, tuple[_Document, _ObjectT]] = {}
    problems: list[Problem] = []
    for document in documents:
        if document.kind != kind:
            continue
        checked, found = _validated(document, model, rules, [])
        problems += found
        if checked and checked.metadata.name in objects:
            fault = _Fault(("metadata", "name"), f"a second {document.title}; the file has one already")
            problems.append(document.problem(fault))
        elif checked:
            objects[checked.metadata.name] = document, checked
    return objects, problems


def _config_map(document: "_Document", checked: ConfigMapAsWritten) -> ConfigMap:
    first_lines = {key: document.text_lines.get(("data", key), document.line) for key in checked.data}
    return ConfigMap(checked.metadata.name, checked.data, document.file, first_lines)


def _not_one_workspace(documents: Sequence["_Document"], workspaces: Sequence["_Document"], file: str) -> Problem:
    if workspaces:
        there = ", ".join(f"{document.title} (line {document.line})" for document in workspaces)
        return Problem(
            f"{len(workspaces)} Workspaces in one file: {there}",
            file=file,
            line=workspaces[1].line,
            hint="a run takes one; put each into a file of its own",
        )
    if not documents:
        return Problem("the file is empty", file=file, hint="tuner init writes a Workspace to start from")
    there = ", ".join(document.title for document in documents)
    near = next((document for document in documents if did_you_mean(document.kind, ["Workspace"])), None)
    if near:
        return Problem(
            f"no Workspace in it, but a {near.kind!r}; it has {there}",
            path="kind",
            file=file,
            line=near.lines.get(("kind",), near.line),
            hint=did_you_mean(near.kind, ["Workspace"]),
        )
    keys = {key for document in documents for key in document.value}
    hint = "tuner init writes a Workspace to start from"
    if "training_config" in keys:
        hint = "a training configuration goes beside the Workspace: --config FILE"
    elif keys & {"tuning", "inference"}:
        hint = f"write apiVersion: {API_VERSIONS[0]} and kind: Workspace at the top"
    return Problem(f"no Workspace in it; it has {there}", file=file, line=documents[0].line, hint=hint)


# ── rules that pydantic cannot see ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Fault:
    """One thing wrong at a place of a document. `covers`: whatever else is found at or below it is only noise."""

    location: Location
    message: str
    hint: str | None = None
    covers: bool = False

    def hides(self, other: "_Fault") -> bool:
        return self.covers and other.location[: len(self.location)] == self.location


TEMPLATE_EXPRESSION = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\$\{[^}]*\}|\$[A-Z_][A-Z0-9_]*", re.DOTALL)
PLACEHOLDER = re.compile(r"\b[A-Z][A-Z0-9_]*_HERE\b|<[A-Za-z][A-Za-z0-9 _-]*>|\bYOUR[_-][A-Z0-9_-]+\b")
SEVERAL_PLACEHOLDERS = re.compile(f"(?:{PLACEHOLDER.pattern}).*(?:{PLACEHOLDER.pattern})", re.DOTALL)
UNFILLED_EXPRESSION = "an unfilled template expression: {}"
A_PLACEHOLDER = "{} is a placeholder of an example, not a value"
PLACEHOLDERS = "{} has placeholders of an example in place of values"
NOT_BOTH = "either inference or tuning must be specified, but not both"
NOT_NEITHER = "either inference or tuning must be specified, not neither"
ONE_NODE = "tuning does not support multi-node configurations: count must be 1"
NO_PARTITION = "GPU partitioning is not supported for tuning workloads"


def _unfilled(workspace: Mapping[str, Any]) -> Iterator[_Fault]:
    """Placeholders and template expressions that nobody has filled in."""
    metadata = workspace.get("metadata")
    if isinstance(metadata, dict):
        yield from _unfilled_at(("metadata", "name"), metadata.get("name"))
    for section in ("resource", "tuning"):
        yield from _unfilled_at((section,), workspace.get(section))


def _unfilled_at(location: Location, value: object) -> Iterator[_Fault]:
    if isinstance(value, dict):
        for key, each in value.items():
            if key != "volumeSource":  # CSI drivers have ${…} of their own
                yield from _unfilled_at((*location, key), each)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from _unfilled_at((*location, index), each)
    elif isinstance(value, str):
        shown_part = value.partition("?")[0] if "://" in value else value  # a signed query is never shown
        if expression := TEMPLATE_EXPRESSION.search(shown_part):
            shown = " ".join(expression[0].split())[:60]
            yield _Fault(
                location,
                UNFILLED_EXPRESSION.format(shown),
                "render the file first (helm template, envsubst, …)",
                covers=True,
            )
        elif placeholder := PLACEHOLDER.search(shown_part):
            several = SEVERAL_PLACEHOLDERS.search(shown_part)
            sentence = PLACEHOLDERS.format(several[0]) if several else A_PLACEHOLDER.format(placeholder[0])
            hint = "write the real value"
            if location[-1] == "image":
                hint = "write your registry, repository and tag: myregistry.azurecr.io/adapters/my-adapter:0.0.1"
            elif location[-1] == "imagePushSecret":
                hint = "write the name of the Secret with the registry's credentials"
            yield _Fault(location, sentence, hint, covers=True)


def _without_unfilled_output(document: "_Document", faults: list[_Fault]) -> tuple["_Document", list[_Fault]]:
    """The same without `tuning.output` where that still has a placeholder in it."""
    others = [fault for fault in faults if fault.location[:2] != ("tuning", "output")]
    if len(others) == len(faults):
        return document, faults
    tuning = {key: value for key, value in document.value["tuning"].items() if key != "output"}
    return replace(document, value={**document.value, "tuning": tuning}), others


def _whole_faults(workspace: Mapping[str, Any], *, output_given: bool) -> Iterator[_Fault]:
    """The rules that look at more than one field; they hold whatever else is wrong."""
    tuning = workspace.get("tuning")
    if tuning is not None and "inference" in workspace:
        yield _Fault(("inference",), NOT_BOTH)
    meant = ("spec" in workspace) or any(did_you_mean(key, ["tuning", "inference"]) for key in workspace)
    if tuning is None and "inference" not in workspace and not meant:
        yield _Fault((), NOT_NEITHER)
    if not isinstance(tuning, dict):
        return
    if "output" not in tuning and not output_given:
        yield _Fault(("tuning", "output"), f"is required: {_REQUIRED['tuning', 'output']}")
    resource = workspace.get("resource")
    if not isinstance(resource, dict):
        return
    count = resource.get("count")
    if isinstance(count, int) and count > 1:
        yield _Fault(
            ("resource", "count"),
            ONE_NODE,
            "one node with several GPUs works: choose a larger instanceType",
        )
    if resource.get("partition") is not None:
        yield _Fault(("resource", "partition"), NO_PARTITION)


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
    document: "_Document", model: type[_ModelT], rules: _Rules, faults: Sequence[_Fault]
) -> tuple[_ModelT | None, list[Problem]]:
    """The model, or None and what is wrong with the document: `faults` and all that pydantic finds."""
    value = {key: each for key, each in document.value.items() if key != "status"}
    if isinstance(metadata := value.get("metadata"), dict):
        value["metadata"] = {key: each for key, each in metadata.items() if key not in _SERVER_METADATA}
    checked: _ModelT | None = None
    found = [*document.faults, *faults]
    try:
        checked = model.model_validate(value, context=rules)
    except ValidationError as error:
        details = error.errors(include_url=False)
        found += [
            fault
            for detail in details
            for fault in _faults_of(detail, model)
            if not any(known.hides(fault) for known in found)
        ]
    return (None if found else checked), [document.problem(fault) for fault in found]


NOT_A_CHOICE = "must be {}, not {}"


def _faults_of(detail: ErrorDetails, model: type[_FromYaml]) -> Iterator[_Fault]:
    tags = {f"<{key}>" for key in INPUT_VARIANTS}
    location = tuple(part for part in detail["loc"] if part not in tags)
    value, context = detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "fault":
            yield _Fault(location, context["message"], context["hint"])
        case "missing":
            why = _REQUIRED.get(location) if model is Workspace else None
            yield _Fault(location, f"is required: {why}" if why else "is required")
        case "extra_forbidden":
            yield _unknown_key(location, model)
        case "union_tag_not_found" if isinstance(value, dict):
            known = {field.alias for variant in _VARIANTS[location].values() for field in variant.model_fields.values()}
            unknown = [_unknown_key((*location, key), model) for key in value if key not in known]
            yield from unknown or [_Fault(location, EXACTLY_ONE[location])]
        case "literal_error":
            choices = re.findall(r"'([^']*)'", context["expected"])
            hint = did_you_mean(value, choices) if isinstance(value, str) else None
            shown = repr(value) if isinstance(value, str) else _what_is(value)
            if location == ("tuning", "method") and model is Workspace:
                hint = hint or "qlora: 4-bit base model, lora: 16 bit; a model is not trained whole here"
            yield _Fault(location, NOT_A_CHOICE.format(" or ".join(choices), shown), hint)
        case "string_type":
            hint = None
            if isinstance(value, bool | int | float):
                hint = "put it in quotes"
            elif location == ("tuning", "config") and model is Workspace:
                hint = f"write a ConfigMap's name; the settings stand in it, under the key {TRAINING_CONFIG_KEY}"
            elif isinstance(value, dict) and "name" in value:
                hint = "write the name alone, without name:"
            elif isinstance(value, dict) and location[:3] == ("tuning", "input", "urls"):
                hint = "write the address alone"
            elif isinstance(value, list):
                hint = "write one alone, without [ ] or -"
            elif isinstance(value, dict) and location[:1] == ("data",):
                hint = "write a | after the key: a ConfigMap holds text"
            yield _Fault(location, f"must be text, not {_what_is(value)}", hint)
        case "dict_type" | "model_type" | "model_attributes_type" | "union_tag_not_found":
            hint = _AS_MAPPING.get(location) if model is Workspace and isinstance(value, str | list) else None
            if hint and isinstance(value, str) and location == ("tuning", "preset") and _PLAIN_NAME.fullmatch(value):
                hint = f"did you mean preset: {{name: {value}}}?"
            yield _Fault(location, f"must be a mapping, not {_what_is(value)}", hint)
        case "tuple_type":
            yield _Fault(
                location, f"must be a list, not {_what_is(value)}", "write each entry on a line with - in front"
            )
        case "int_type":
            yield _Fault(location, f"must be a whole number, not {_what_is(value)}")
        case "string_too_short":
            yield _Fault(location, EMPTY)
        case _:
            yield _Fault(location, detail["msg"])


def _unknown_key(location: Location, model: type[_FromYaml]) -> _Fault:
    *parents, key = location
    parent, name = tuple(parents), str(key)
    known: set[str]
    if model is Workspace and parent in _VARIANTS:
        if name in _VARIANTS[parent]:
            return _Fault(location, ANOTHER_ONE.format(EXACTLY_ONE[parent]))
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
    return _Fault(location, "unknown key", hint or (f"known here: {_listed(known)}" if known else None))


def _what_is(value: object) -> str:
    """The kind of value in YAML's words; never the value itself, which may be secret."""
    for kind, words in _YAML_WORDS.items():
        if isinstance(value, kind):
            return words
    return "nothing"


_YAML_WORDS: dict[type, str] = {
    bool: "true or false",
    int: "a number",
    float: "a number",
    str: "text",
    dict: "a mapping",
    list: "a list",
}


def _listed(names: Mapping[str, object] | set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


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


def _notes(document: "_Document", workspace: Workspace) -> list[str]:
    faults = _outdated(document.value, workspace)
    if not document.lines:  # an object of the API server: nobody wrote its defaults
        faults = (each for each in faults if not _is_default(document.value, each.location))
    return [str(document.problem(fault)) for fault in faults]


def _is_default(value: Any, location: Location) -> bool:
    if location not in SERVER_DEFAULTS:
        return False
    for key in location:
        value = value.get(key, {})
    return bool(value == SERVER_DEFAULTS[location])


def _outdated(written: Mapping[str, Any], workspace: Workspace) -> Iterator[_Fault]:
    """What in a correct Workspace does less than it seems to."""
    resource, tuning = workspace.resource, workspace.tuning
    if tuning is None:
        return
    if resource.instance_type and _V100_INSTANCE_TYPE.fullmatch(resource.instance_type):
        yield _Fault(
            ("resource", "instanceType"),
            f"Azure no longer offers {resource.instance_type} (V100); Standard_NC24ads_A100_v4 is in KAITO's examples "
            "now. On a GPU box instanceType has no effect",
        )
    if "resource" in written and resource.label_selector is None:
        yield _Fault(
            ("resource",),
            "no labelSelector: nothing here needs it, but KAITO's CRD refuses such a file at kubectl apply",
        )
    if "count" in written.get("resource", {}):
        yield _Fault(("resource", "count"), "deprecated by KAITO; tuning always runs on one node")
    if resource.preferred_nodes:
        yield _Fault(("resource", "preferredNodes"), "deprecated by KAITO; only a preference here, use labelSelector")
    labels = resource.label_selector.match_labels if resource.label_selector else {}
    for label in filter(is_reserved_label, labels):
        yield _Fault(("resource", "labelSelector", "matchLabels", label), "reserved by KAITO and ignored")
    yield from _outdated_preset(tuning.preset)
    for side in ("input", "output"):
        for key in IMAGE_SECRETS:
            if key in written["tuning"].get(side, {}) and "image" not in written["tuning"][side]:
                yield _Fault(("tuning", side, key), "has no effect without an image")
    yield from _example_hosts(tuning)


def _outdated_preset(preset: PresetSpec) -> Iterator[_Fault]:
    if hub_id := _REMOVED_PRESETS.get(preset.name.lower()):
        yield _Fault(
            ("tuning", "preset", "name"),
            f"KAITO has removed its preset {preset.name}; the model itself is {hub_id} on Hugging Face",
        )
    if preset.access_mode is not None:
        yield _Fault(("tuning", "preset", "accessMode"), "deprecated by KAITO; has no effect")
    options = preset.preset_options
    if options.image is not None:
        yield _Fault(
            ("tuning", "preset", "presetOptions", "image"), "deprecated by KAITO; the base weights are taken from it"
        )
    elif options.image_pull_secrets:
        yield _Fault(("tuning", "preset", "presetOptions", "imagePullSecrets"), "has no effect without an image")


def _example_hosts(tuning: Tuning) -> Iterator[_Fault]:
    places: list[tuple[Location, str]] = []
    if isinstance(tuning.input, UrlInput):
        places += [(("tuning", "input", "urls", index), url) for index, url in enumerate(tuning.input.urls)]
    elif isinstance(tuning.input, ImageInput):
        places.append((("tuning", "input", "image"), str(tuning.input.image)))
    if isinstance(tuning.output, ImageOutput):
        places.append((("tuning", "output", "image"), str(tuning.output.image)))
    for location, address in places:
        if found := _EXAMPLE_HOST.match(address):
            yield _Fault(location, f"{found[0]} is an example's host: replace it with your own")


# ── YAML with line numbers ───────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Document:
    """One YAML document as plain values.

    `lines` has the 1-based line of every key and list item, `text_lines` the one where a scalar's own text begins.
    """

    value: dict[str, Any] = field(repr=False)
    lines: dict[Location, int]
    line: int
    file: str
    text_lines: dict[Location, int] = field(default_factory=dict)
    faults: tuple[_Fault, ...] = ()

    @property
    def kind(self) -> str:
        kind = self.value.get("kind")
        return kind if isinstance(kind, str) and kind.isprintable() else "object without kind"

    @property
    def title(self) -> str:
        metadata = self.value.get("metadata")
        name = metadata.get("name") if isinstance(metadata, dict) else None
        return f"{self.kind}/{name}" if isinstance(name, str) and name.isprintable() else self.kind

    def problem(self, fault: _Fault) -> Problem:
        location = fault.location
        while location and location not in self.lines:
            location = location[:-1]
        line = self.lines.get(location, self.line)
        return Problem(fault.message, _path(fault.location), self.file, line, fault.hint)


def _path(location: Location) -> str:
    """`tuning.input.urls[1]`, `metadata.labels[app.kubernetes.io/name]`"""
    path = ""
    for key in location:
        part = key.partition("?")[0] if isinstance(key, str) else key  # a signed URL, mistaken for a key
        if isinstance(part, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]*", part):
            path += f".{part}" if path else part
        else:
            path += f"[{part}]" if str(part).isprintable() else f"[{part!r}]"
    return path


class _Loader(yaml.SafeLoader):
    """YAML as the API server reads it: no dates, no "=" value."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("timestamp", "value")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}

_SCALAR_TAGS = frozenset(f"tag:yaml.org,2002:{name}" for name in ("str", "int", "float", "bool", "null"))
_NULL_TAG = "tag:yaml.org,2002:null"
_MERGE_TAG = "tag:yaml.org,2002:merge"


def _read_documents(text: str, file: str) -> tuple[list[_Document], list[Problem]]:
    """The documents up to the first syntax error, and that error."""
    documents: list[_Document] = []
    problems: list[Problem] = []
    try:
        loader = _Loader(text)
        try:
            while loader.check_node() and (node := loader.get_node()):
                line = node.start_mark.line + 1
                if isinstance(node, yaml.MappingNode):
                    documents.append(_Builder(loader, text).document(node, file))
                elif node.tag != _NULL_TAG:  # comments alone
                    what = "a list" if isinstance(node, yaml.SequenceNode) else "text"
                    problems.append(Problem(f"{what}, not a Kubernetes object", file=file, line=line))
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        problems.append(_syntax_problem(error, text, file))
    except RecursionError:
        problems.append(Problem("nested too deeply to be read", file=file))
    return documents, problems


def _syntax_problem(error: yaml.YAMLError, text: str, file: str) -> Problem:
    if isinstance(error, yaml.reader.ReaderError):
        line = text.count("\n", 0, error.position) + 1
        return Problem(f"the character U+{ord(text[error.position]):04X} cannot be in YAML", file=file, line=line)
    assert isinstance(error, yaml.MarkedYAMLError)
    mark = error.problem_mark or error.context_mark
    line = mark.line + 1 if mark else 1
    lines = text.splitlines()
    here = lines[line - 1] if line <= len(lines) else ""
    hint = None
    if "\t" in here[: len(here) - len(here.lstrip())]:
        hint = "there is a tab; YAML is indented with spaces"
    elif "{{" in here or "{%" in here:
        hint = "this looks like a template; render it first (helm template, …)"
    else:
        hint = "look at indentation, brackets and quotes in this line and the one before"
    return Problem(f"not YAML: {error.problem or error.context or 'syntax error'}", file=file, line=line, hint=hint)


class _Builder:
    """Nodes → plain values, the line of each, and what YAML lets pass but a reader should not."""

    def __init__(self, loader: _Loader, text: str) -> None:
        self.loader = loader
        self.text = text
        self.lines: dict[Location, int] = {}
        self.faults: list[_Fault] = []
        self.text_lines: dict[Location, int] = {}
        self.values = 0
        self.too_much = False

    def document(self, node: yaml.MappingNode, file: str) -> _Document:
        value = self.mapping(node, ())
        line = node.start_mark.line + 1
        return _Document(value, self.lines, line, file, self.text_lines, tuple(self.faults))

    def build(self, node: yaml.Node, location: Location) -> Any:
        self.values += 1
        if self.values > MAX_VALUES or len(location) > MAX_DEPTH:
            if not self.too_much:
                self.fault(
                    location[:1], f"more than {MAX_VALUES:,} values or {MAX_DEPTH} levels; an alias in a circle?"
                )
            self.too_much = True
            return None
        if isinstance(node, yaml.ScalarNode):
            # The text of a block scalar begins on the line after its | or >.
            self.text_lines[location] = node.start_mark.line + (2 if node.style in ("|", ">") else 1)
            return self.scalar(node, location)
        if not node.tag.endswith((":map", ":seq")):
            self.fault(location, f"the YAML tag {node.tag!r} means nothing here")
            return None
        if isinstance(node, yaml.SequenceNode):
            return [self.item(each, (*location, index)) for index, each in enumerate(node.value)]
        assert isinstance(node, yaml.MappingNode)
        if node.flow_style and any(isinstance(key, yaml.MappingNode) for key, _ in node.value):
            # {{ .Values.image }} without quotes is YAML for a mapping in a mapping: keep what was written.
            return self.text[node.start_mark.index : node.end_mark.index]
        return self.mapping(node, location)

    def item(self, node: yaml.Node, location: Location) -> Any:
        self.lines[location] = node.start_mark.line + 1
        return self.build(node, location)

    def mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        """Without its nulls: for Kubernetes a null is a key not written."""
        values: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        own: set[str] = set()
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE_TAG:
                for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                    each = self.build(source, location)
                    merged = {**(each if isinstance(each, dict) else {}), **merged}
                continue
            line = key_node.start_mark.line + 1
            key = self.scalar(key_node, location) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                self.fault(location, f"a key on line {line} is not text", covers=False)
                continue
            place = (*location, key)
            if key in own:
                self.fault(place, f"written twice, on lines {self.lines[place]} and {line}", covers=False)
                continue
            own.add(key)
            self.lines[place] = line
            value = self.build(value_node, place)
            if value is not None:
                values[key] = value
        return {**merged, **values}

    def scalar(self, node: yaml.ScalarNode, location: Location) -> Any:
        if node.tag not in _SCALAR_TAGS:
            self.fault(location, f"the YAML tag {node.tag!r} means nothing here")
            return None
        try:
            value = self.loader.construct_object(node)
            if isinstance(value, str):
                value.encode("utf-8")  # "\ud800" in quotes is half a character
        except (ValueError, LookupError, yaml.YAMLError):
            self.fault(location, f"cannot be read as {node.tag.rpartition(':')[2]}")
            return None
        return value

    def fault(self, location: Location, message: str, *, covers: bool = True) -> None:
        self.faults.append(_Fault(location, message, covers=covers))


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
    document = _Document(value, {}, 1, "")
    workspace, problems = _validated(document, Workspace, _Rules(allowed or Allowed(), local_files), [])
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
