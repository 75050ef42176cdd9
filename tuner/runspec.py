"""The contracts: what a run is asked to do (RunSpec), what stages leave for each other, and what comes out.

    RunSpec ── preflight ── fetch ──► Fetched ── prepare ──► Prepared ── train ──► Trained ── push ──► RunResult

RunSpec, Fetched, Prepared and Trained are JSON files that another process reads, so they are parsed strictly
(pydantic, unknown keys refused). None of them holds a secret: signed queries and tokens travel in `Secrets`.
"""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    field_validator,
)

from tuner.durable import replacing
from tuner.errors import ConfigError, InputMissingError
from tuner.folder import Use
from tuner.gates import Gate, parse_gates
from tuner.open_files import OpenDirectory
from tuner.presets import Preset
from tuner.redaction import hide, hide_url, redact
from tuner.reference import ImageReference, LayoutReference, parse_destination, parse_reference
from tuner.training_settings import TrainingConfig
from tuner.urls import is_hub_url

StageName = Literal["preflight", "fetch", "prepare", "train", "push"]
STAGES: tuple[StageName, ...] = ("preflight", "fetch", "prepare", "train", "push")


class Contract(BaseModel):
    """A frozen value that is also a JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def save(self, path: Path, *, durably: bool = True) -> None:
        """Write it whole or not at all, and `durably` so that a power cut leaves it, too."""
        with replacing(path, durably=durably) as file:
            file.write((self.model_dump_json(indent=2) + "\n").encode())

    def save_in(self, directory: OpenDirectory, name: str) -> None:
        """The same in a directory that others write to."""
        directory.write(name, (self.model_dump_json(indent=2) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises InputMissingError when an earlier stage did not leave it, ConfigError when it is not ours."""
        try:
            return cls._parse(path.read_bytes(), path)
        except FileNotFoundError as error:
            raise InputMissingError(f"{path}: not there", hint="run the stages before this one first") from error
        except OSError as error:
            raise InputMissingError(f"{path}: cannot be read: {error.strerror}") from error

    @classmethod
    def load_from(cls, directory: OpenDirectory, name: str) -> Self:
        """The same from a directory that others write to; DataError for what is no plain file."""
        try:
            return cls._parse(directory.file(name).content(), directory.path / name)
        except InputMissingError as error:
            error.hint = "run the stages before this one first"
            raise

    @classmethod
    def _parse(cls, content: bytes, path: Path) -> Self:
        try:
            return cls.model_validate_json(content.decode())
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: not a {cls.__name__} of this version of tuner: it is not text") from None
        except ValidationError as error:
            # Never what stands there: the file may be another one, with secrets in it.
            first = error.errors(include_input=False, include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise ConfigError(
                f"{path}: not a {cls.__name__} of this version of tuner: {where + ': ' if where else ''}{first['msg']}"
            ) from None


def _reference(value: str | ImageReference) -> ImageReference:
    return value if isinstance(value, ImageReference) else parse_reference(value)


def _image_location(value: str | ImageReference | LayoutReference) -> ImageReference | LayoutReference:
    return parse_destination(value) if isinstance(value, str) else value


# In JSON a reference is its text, in its normal form.
Reference = Annotated[ImageReference, PlainValidator(_reference), PlainSerializer(str, return_type=str)]
ImageLocation = Annotated[
    ImageReference | LayoutReference, PlainValidator(_image_location), PlainSerializer(str, return_type=str)
]


# ── sources ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Sampled(Contract):
    """A source of which not every row need be taken once."""

    use: Use = "training"
    rows: int | None = Field(default=None, description="how many of its rows are taken at most")
    weight: float | None = Field(default=None, description="how often each row is taken; below 1, what share of them")


class UrlSource(_Sampled):
    """One of `tuning.input.urls`. `url` has neither query nor fragment: those may carry a signature."""

    kind: Literal["url"] = "url"
    name: str = Field(description="file name in the data directory, unique in the run")
    url: str
    query_sha256: str = Field(
        default="", description="digest of the query less a signature's parameters: counts as input"
    )
    sha256: str | None = Field(default=None, description="what the user pinned with #sha256=")


class FileSource(_Sampled):
    """A path or file:// URL on this machine, known by its content."""

    kind: Literal["file"] = "file"
    name: str
    path: str
    sha256: str


class ImageSource(_Sampled):
    """`tuning.input.image`: the data files are under /data of an OCI image."""

    kind: Literal["image"] = "image"
    reference: ImageLocation


class VolumeSource(_Sampled):
    """`tuning.input.volumeSource`; on a box `path` is the directory it stands for."""

    kind: Literal["volume"] = "volume"
    path: str
    source: dict[str, Any] = Field(default_factory=dict)


Source = Annotated[UrlSource | FileSource | ImageSource | VolumeSource, Field(discriminator="kind")]


# ── base model ───────────────────────────────────────────────────────────────────────────────────────────────────────


class HubModel(Contract):
    """A Hugging Face repository; `revision` is a commit when the preset pins one."""

    kind: Literal["hub"] = "hub"
    id: str
    revision: str


class LocalModel(Contract):
    """A directory with config.json, safetensors and a tokenizer, known by its content."""

    kind: Literal["local"] = "local"
    path: str
    sha256: str
    id: str | None = Field(default=None, description="the hub id that the preset says these weights are")
    revision: str | None = None

    @property
    def title(self) -> str:
        """What the adapter calls its base: the hub id, else the directory's own name, never a path of the machine."""
        return self.id or Path(self.path).name


class ImageModel(Contract):
    """`presetOptions.image`: an OCI artifact with the weights, as KAITO ships them."""

    kind: Literal["image"] = "image"
    reference: ImageLocation
    id: str | None = None
    revision: str | None = None


class SmokeModel(Contract):
    """The preset's architecture made small with random weights; nothing is downloaded."""

    kind: Literal["smoke"] = "smoke"


BaseModelSource = Annotated[HubModel | LocalModel | ImageModel | SmokeModel, Field(discriminator="kind")]


def asks_hub(base_model: BaseModelSource | None, sources: Sequence[Source]) -> bool:
    """Whether weights or data come from the Hugging Face Hub, so that its token is of use."""
    return isinstance(base_model, HubModel) or any(
        isinstance(source, UrlSource) and is_hub_url(source.url) for source in sources
    )


# ── destinations ─────────────────────────────────────────────────────────────────────────────────────────────────────


class ImageDestination(Contract):
    """`tuning.output.image`: a registry reference with a tag."""

    kind: Literal["image"] = "image"
    reference: Reference
    overwrite: bool = True


class LayoutDestination(Contract):
    """`oci:DIR:TAG`: an OCI image layout on disk."""

    kind: Literal["layout"] = "layout"
    path: str
    tag: str
    overwrite: bool = True

    @property
    def reference(self) -> LayoutReference:
        return LayoutReference(Path(self.path), self.tag)


class DirectoryDestination(Contract):
    """`--output DIR`, or `tuning.output.volumeSource` as a path: the adapter's files, no image."""

    kind: Literal["directory"] = "directory"
    path: str


Destination = Annotated[ImageDestination | LayoutDestination | DirectoryDestination, Field(discriminator="kind")]


# ── the run ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Network(Contract):
    """What the run may reach beside public addresses, and how registries are spoken to."""

    allow_cidrs: tuple[str, ...] = ()
    allow_private_urls: bool = False
    plain_http: bool = Field(default=False, description="registries over http")
    ca_file: str | None = None


_NOT_INPUTS = frozenset({"destination", "probe", "network", "preflight", "require", "canary"})


class RunSpec(Contract):
    """All that a run needs to know but its secrets; equal digests mean equal runs."""

    version: Literal[1] = 1
    name: str = Field(description="metadata.name of the Workspace")
    method: Literal["lora", "qlora"]
    preset: Preset
    preset_as_written: str = Field(
        description="tuning.preset.name, of a directory its own name, for the annotation sh.kaito.model.name"
    )
    base_model: BaseModelSource
    training: TrainingConfig
    sources: tuple[Source, ...] = Field(min_length=1)
    destination: Destination
    probe: ImageDestination | None = Field(
        default=None, description="where a smoke run asks for push permission without pushing"
    )
    network: Network = Network()
    smoke: bool = False
    preflight: bool = Field(default=True, description="False: --no-preflight, no push-permission probe")
    trust_remote_code: bool = False
    require: tuple[str, ...] = Field(default=(), description="gates, as gates.py reads them")
    disabled: tuple[str, ...] = Field(
        default=(), description="levers (levers.py) turned off; in the digest, as they change last bits"
    )
    canary: bool = Field(
        default=True, description="False: --no-canary, canary.json is without the base in 16 bits; not in the digest"
    )

    @field_validator("require")
    @classmethod
    def _are_gates(cls, texts: tuple[str, ...]) -> tuple[str, ...]:
        try:
            parse_gates(texts, "require")
        except ConfigError as error:
            raise ValueError(error.message) from None
        return texts

    @property
    def gates(self) -> tuple[Gate, ...]:
        """What the adapter must reach to be pushed."""
        return parse_gates(self.require, "require")

    @property
    def digest(self) -> str:
        """`sha256:…` over everything that decides the adapter: not where it goes, nor how it is reached, nor what it
        must reach to go there, nor what is measured on it."""
        return f"sha256:{hashlib.sha256(json.dumps(self.inputs(), sort_keys=True).encode()).hexdigest()}"

    def inputs(self) -> dict[str, Any]:
        """What the digest is of."""
        inputs = self.model_dump(mode="json", exclude=set(_NOT_INPUTS))
        del inputs["training"]["notes"]
        del inputs["training"]["origins"]  # the same value is the same run wherever it was written
        # Whoever turns the watchdog off wants the run that it stopped to go on, not another.
        del inputs["training"]["arguments"]["watchdog"]
        for place in (*inputs["sources"], inputs["base_model"]):
            if place["kind"] in ("file", "local"):
                del place["path"]  # known by content
        if isinstance(self.base_model, LocalModel) and self.base_model.id is None:
            inputs["base_model"]["title"] = self.base_model.title  # stands in the adapter
        return inputs


@dataclass(frozen=True)
class Secrets:
    """What must never be in a RunSpec, a log or a manifest. Its repr says nothing."""

    queries: dict[str, str] = field(default_factory=dict, repr=False)  # source name → query of its URL, no "?"
    docker_configs: tuple[str, ...] = field(default=(), repr=False)  # JSON texts: push, first match wins
    pull_docker_configs: tuple[str, ...] = field(default=(), repr=False)
    hf_token: str | None = field(default=None, repr=False)
    source_headers: tuple[str, ...] = field(default=(), repr=False)  # sources.json texts, first match wins
    push_docker_config_file: str | None = None  # where docker_configs was read, if from a file

    def __post_init__(self) -> None:
        for query in self.queries.values():
            hide_url(f"?{query}")
        hide(self.hf_token)

    def push_docker_configs(self) -> tuple[str, ...]:
        """The docker configs to push with, read again: a token that was renewed while the GPU worked is the one."""
        if self.push_docker_config_file is None:
            return self.docker_configs
        try:
            return (Path(self.push_docker_config_file).read_text(encoding="utf-8"),)
        except (OSError, UnicodeDecodeError):
            return self.docker_configs

    def save(self, path: Path) -> None:
        """Write them to a file that only its owner can read."""
        path.unlink(missing_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(asdict(self), file)

    @classmethod
    def load(cls, path: Path) -> "Secrets":
        """Raises InputMissingError and ConfigError, neither with a word of what is in the file."""
        try:
            written = TypeAdapter(cls).validate_json(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputMissingError(f"{path}: cannot be read: {error.strerror}") from error
        except (ValidationError, UnicodeDecodeError):
            raise ConfigError(f"{path}: not the secrets of a run") from None
        return written


# ── between the stages ───────────────────────────────────────────────────────────────────────────────────────────────

FETCHED, PREPARED, TRAINED = "fetched.json", "prepared.json", "trained.json"  # in the work directory


class FetchedFile(Contract):
    """A verified data file on disk. `path` is relative to the work directory unless the file lies elsewhere."""

    source: str = Field(description="where it came from: a URL without query, a path, a path in an image")
    path: str
    sha256: str
    size_bytes: int
    source_index: int = Field(default=0, description="of which of RunSpec.sources it is")
    use: Use = "training"
    is_part: bool = Field(default=False, description="found in a folder, of whose files some may be empty")


class FetchedModel(Contract):
    """The base model's directory on disk. `digest` covers every weight file's sha256, sorted by name."""

    path: str
    id: str | None = None
    revision: str | None = None
    digest: str

    @property
    def title(self) -> str:
        """As LocalModel.title."""
        return self.id or Path(self.path).name


class Fetched(Contract):
    """fetched.json"""

    run_digest: str
    files: tuple[FetchedFile, ...] = Field(min_length=1)
    base_model: FetchedModel | None = Field(description="None for a smoke run: prepare makes the model")


class RowProblem(Contract):
    file: str
    row: int = Field(description="1-based; for JSON lines and text the line")
    reason: str


class Split(Contract):
    """One Arrow file of token ids. `supervised_tokens` is how many of `tokens` have a label."""

    path: str
    rows: int
    tokens: int
    supervised_tokens: int
    longest: int
    order_sha256: str = Field(description="over the rows' file and row numbers, in order")


RowFormat = Literal["messages", "prompt/completion", "text"]


class Sentence(Contract):
    """One of the texts that canary.json asks base and adapter for."""

    row: dict[str, Any] = Field(description="as in a data file: messages, prompt and completion, or text")
    token_ids: tuple[int, ...]
    prompt_tokens: int = Field(description="how many of them a model is given to go on from")


class Prepared(Contract):
    """prepared.json"""

    run_digest: str
    train: Split
    evaluation: Split | None
    has_validation_split: bool = Field(
        default=False,
        description="`evaluation` is rows that the data say are for it, not held out of the training rows",
    )
    rows_read: int
    rows_not_taken: int = Field(default=0, description="good rows that a source's #rows or #weight leaves out")
    shapes: dict[str, int] = Field(description="shape of row → how many")
    row_formats: dict[RowFormat, int] = Field(description="how what is trained on was rendered → how many")
    sentences: tuple[Sentence, ...] = Field(description="of the canary: four in the run's row format, two as text")
    bad_rows: int
    over_length_rows: int
    truncated_rows: int
    unsupervised_rows: int = Field(description="rows with no supervised token, left out")
    smoke_unused_rows: int = Field(default=0, description="good rows that a smoke run leaves to the real one")
    problems: tuple[RowProblem, ...] = Field(description="the first 20; all are in problems_file")
    problems_file: str | None
    max_length: int
    tokenizer_dir: str
    base_model_dir: str

    @property
    def eval_rows(self) -> int:
        return self.evaluation.rows if self.evaluation else 0


class Trained(Contract):
    """trained.json"""

    run_digest: str
    inputs_digest: str = Field(description="over the run's digest and all that was fetched")
    adapter_dir: str
    files: dict[str, str] = Field(description="name in adapter_dir → sha256; all that goes into the image")
    steps: int
    epochs: float
    examples: int
    tokens: int
    train_seconds: float
    first_train_loss: float
    last_train_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None
    train_rows: int
    eval_rows: int
    smoke_unused_rows: int = 0
    kept_step: int = Field(description="the step whose adapter this is")
    modules: dict[str, int] = Field(description="LoRA module name → how many layers have it")
    trainable_parameters: int
    total_parameters: int
    levers: dict[str, str] = Field(default_factory=dict, description="lever → that it was on, or why not")
    startup: dict[str, float] = Field(
        default_factory=dict, description="seconds from the start of the process to the first step, and of its parts"
    )

    @property
    def figures(self) -> dict[str, float | None]:
        """What gates.METRICS names."""
        before, after = self.eval_loss_before, self.eval_loss_after
        return {
            "eval_loss": after,
            "base": before,
            "eval_perplexity": None if after is None else perplexity(after),
            "base_perplexity": None if before is None else perplexity(before),
            "train_loss": self.last_train_loss,
            "first_train_loss": self.first_train_loss,
            "steps": self.steps,
            "epochs": self.epochs,
            "examples": self.examples,
            "tokens": self.tokens,
        }


def perplexity(loss: float) -> float:
    """How many tokens the model wavers between, of a mean loss in nats a token."""
    return math.exp(loss) if loss < _GREATEST_EXPONENT else math.inf


_GREATEST_EXPONENT = 700  # e to the power of more is no float


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────

Scalar = str | int | float | bool | None
Said = Annotated[str, AfterValidator(redact)]
# Of one container a kubelet keeps 4,096 bytes, of a pod 12 KiB in equal shares. We have up to four containers; webhooks
# (meshes, a cloud's identity) add some. Half a line of JSON would tell nothing.
TERMINATION_MESSAGE_BYTES = 2048


class StageResult(Contract):
    """How a stage ended; in a pod the container's termination message."""

    stage: StageName
    exit_code: int = 0
    reason: str = "Completed"
    message: Said = ""
    hint: Said | None = None
    values: dict[str, Scalar] = Field(default_factory=dict)

    def to_message(self) -> str:
        """One line of JSON of at most 2,048 bytes: the message gives way, then the hint, the values do not."""
        result = self
        for name, said in (("message", self.message), ("hint", self.hint)):
            over = len(result.model_dump_json().encode()) - TERMINATION_MESSAGE_BYTES
            if said and over > 0:
                # Every dropped character frees at least one byte; "…" costs three.
                result = result.model_copy(update={name: said[: max(0, len(said) - over - 3)] + "…"})
        return result.model_dump_json()


class RunResult(Contract):
    """What a finished run says: `image` is repository@sha256:… (or a directory).

    A smoke run takes only a part of the rows: `smoke_unused_rows` says how many it left.
    """

    run_digest: str
    image: str
    tag: str | None = None
    previous_digest: str | None = None
    smoke: bool = False
    train_rows: int
    eval_rows: int
    smoke_unused_rows: int = 0
    steps: int
    examples: int
    tokens: int
    seconds: float
    train_loss: float
    eval_loss_before: float | None = None
    eval_loss: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far one task is: a bar on a terminal, a JSON line elsewhere.

    `unit` is what `done` and `total` count; `values` are shown beside (loss, tokens_per_s, …).
    """

    stage: StageName
    task: str
    done: int
    total: int | None
    unit: Literal["B", "rows", "steps"]
    values: dict[str, float] = field(default_factory=dict)


class Reporter(Protocol):
    """How a stage talks to the person who waits. Only the CLI has one that prints."""

    def note(self, line: str) -> None:
        """One line of information."""

    def warn(self, line: str) -> None:
        """One line that asks for attention."""

    def progress(self, progress: Progress) -> None:
        """May be called very often, from any thread."""


class Silent:
    """A Reporter that says nothing."""

    def note(self, line: str) -> None: ...
    def warn(self, line: str) -> None: ...
    def progress(self, progress: Progress) -> None: ...
