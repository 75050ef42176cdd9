"""What an adapter says of itself, in its directory and in its image: run.lock.json and canary.json.

docs/artifact.md is the format for others. Of a format that it knows a reader takes the keys that it knows: a key is
added without a new number, and never changes its meaning. Run locks of format 1, which had a `version` and no digests,
are read wherever their keys are enough.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from tuner.runspec import RowFormat

LOCK, CANARY = "run.lock.json", "canary.json"
SEAL = "lock_sha256"


class Record(BaseModel):
    """A frozen value that somebody else's version of tuner may have written, or may read."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    def as_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


# ── run.lock.json ────────────────────────────────────────────────────────────────────────────────────────────────────


class LockedFile(Record):
    sha256: str = Field(description="in hexadecimal digits, as each sha256 here")
    size_bytes: int


class LockedBase(Record):
    title: str = Field(description="what adapter_config.json calls it: the hub id, else its directory's own name")
    id: str | None = Field(description="the hub id; none of a model that is only a directory")
    revision: str | None = Field(description="a commit")
    digest: str = Field(description="`sha256:…` over its weights, configuration and tokenizer")


class LockedData(Record):
    source: str = Field(description="its URL without the query, its image reference, or a local file's name")
    sha256: str
    size_bytes: int


class LockedRows(Record):
    """How many rows became what; `train` and `evaluation` count what is learnt from and held out."""

    read: int
    train: int
    evaluation: int
    smoke_unused: int = Field(description="good ones that a smoke run leaves to the real one")
    bad: int
    over_length: int = Field(description="left out as too long")
    truncated: int
    unsupervised: int = Field(description="left out as no token of them is learnt")
    train_order_sha256: str = Field(description="over the file and row numbers in their order")


class WeightCount(Record):
    tensors: int
    parameters: int


WeightKind = Literal["linear", "experts", "head", "embeddings", "other"]


class Quantization(Record):
    """The base's weights as they lay in memory in training, counted on the loaded model."""

    quant_type: str | None = Field(description="nf4, fp4 or int8; null where nothing is quantized")
    double_quant: bool = Field(description="whether the scales of 4-bit weights are quantized, too")
    compute_dtype: str = Field(description="the dtype that quantized weights are decoded to, else the weights' own")
    weights: dict[WeightKind, dict[str, WeightCount]] = Field(
        description="kind of weight → precision (quant_type, or the dtype) → how many. `linear`: the linear layers of "
        "the blocks; `experts`: those of a mixture's experts, in one tensor or many; `head` is none where it is the "
        "embeddings; `other`: norms, biases, routers"
    )

    @property
    def precision(self) -> str:
        """What the model is called by: how most of its layers' weights lie in memory."""
        found: dict[str, int] = {}
        for kind in ("linear", "experts"):
            for precision, count in self.weights.get(kind, {}).items():
                found[precision] = found.get(precision, 0) + count.parameters
        return self.quant_type or max(found, key=lambda precision: found[precision], default=self.compute_dtype)

    def __str__(self) -> str:
        counts = [each for kinds in self.weights.values() for each in kinds.items()]
        total = sum(count.parameters for _, count in counts)
        if self.quant_type is None:
            return f"not quantized, {self.compute_dtype}"
        quantized = sum(count.parameters for precision, count in counts if precision == self.quant_type)
        double = ", its scales quantized too" if self.double_quant else ""
        return f"{quantized:,} of {total:,} parameters in {self.quant_type}{double}; computed in {self.compute_dtype}"


class Figures(Record):
    """Losses are nats a learnt token; null where no row is held out."""

    steps: int
    epochs: float
    kept_step: int = Field(description="the step whose adapter this is")
    first_train_loss: float
    last_train_loss: float
    eval_loss_before: float | None
    eval_loss_after: float | None = Field(description="of the adapter that is kept")


class RunLock(Record):
    """run.lock.json: what the adapter was made of, and what every file beside it must be."""

    format: Literal[2] = 2
    name: str = Field(description="of the Workspace")
    run_digest: str = Field(description="`sha256:…` over all that decides the adapter: equal ones are the same run")
    smoke: bool = Field(description="whether the base is a tiny random model")
    method: Literal["lora", "qlora"] = Field(description="as asked for; `quantization` says what came of it")
    preset: str
    base_model: LockedBase | None = Field(description="null for a smoke run")
    quantization: Quantization
    datasets: tuple[LockedData, ...]
    rows: LockedRows
    row_formats: dict[RowFormat, int] = Field(
        description="how the rows that are learnt from were rendered → how many: `messages` by the chat template, "
        "`prompt/completion` one after the other and EOS, `text` as it is and EOS"
    )
    chat_template_sha256: str | None = Field(
        description="of chat_template.jinja, where rows were rendered by it; null where none was"
    )
    max_length: int = Field(description="tokens of the longest row that is taken")
    seed: int
    config: dict[str, dict[str, Any]] = Field(
        description="section → key → value as the run used them, but for where files lie"
    )
    figures: Figures
    versions: dict[str, str] = Field(description="tuner and the libraries that decide numbers")
    tensors_sha256: str = Field(
        description="over the adapter's tensors, whatever file holds them: for each in the order of their names (by "
        'code point) one line `["NAME","DTYPE",[SHAPE]]` of JSON without blanks, ended by \\n, then its bytes as '
        "safetensors has them"
    )
    files: dict[str, LockedFile] = Field(description="every other file of the image, by its name below /data")

    def sealed(self) -> dict[str, Any]:
        """As it stands in the file: with the digest of its own content."""
        content = self.as_json()
        return content | {SEAL: seal_of(content)}


def seal_of(lock: Mapping[str, Any]) -> str:
    """What `lock_sha256` must be: over all other keys as JSON, sorted, without blanks, in ASCII."""
    content = {key: value for key, value in lock.items() if key != SEAL}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def lock_format(lock: Mapping[str, Any]) -> Any:
    """1 for those that called it their version."""
    return lock.get("format", lock.get("version"))


# ── canary.json ──────────────────────────────────────────────────────────────────────────────────────────────────────


Token = Annotated[int, Field(ge=0)]
LogLikelihood = Annotated[float, Field(le=0, allow_inf_nan=False)]  # nats


class Means(Record):
    base: LogLikelihood
    tuned: LogLikelihood


class TokenByToken(Record):
    base: tuple[LogLikelihood, ...]
    tuned: tuple[LogLikelihood, ...]


class Continuation(Record):
    base: tuple[Token, ...] = Field(min_length=1)
    tuned: tuple[Token, ...] = Field(min_length=1)


class CanarySentence(Record):
    row: dict[str, Any] = Field(description="the sentence as a row of data: messages, prompt and completion, or text")
    token_ids: tuple[Token, ...] = Field(min_length=2, description="as the run's template and tokenizer write it")
    prompt_tokens: int = Field(ge=1, description="how many of them a model is given to go on from: the question")
    log_likelihood: dict[str, Means] = Field(description="by precision: the mean of the token_log_likelihoods")
    token_log_likelihoods: dict[str, TokenByToken] = Field(
        description="by precision: of each token but the first, which nothing predicts"
    )
    greedy_token_ids: Continuation | None = Field(
        description="the 16 tokens that are each the most likely one after prompt_tokens tokens, EOS or not; in the "
        "precision of the training"
    )

    @model_validator(mode="after")
    def _agrees_with_itself(self) -> Self:
        if self.prompt_tokens > len(self.token_ids) or set(self.log_likelihood) != set(self.token_log_likelihoods):
            raise ValueError("prompt_tokens or precisions do not fit the tokens")
        for precision, means in self.log_likelihood.items():
            tokens = self.token_log_likelihoods[precision]
            for mean, of_each in ((means.base, tokens.base), (means.tuned, tokens.tuned)):
                if len(of_each) != len(self.token_ids) - 1 or abs(mean - sum(of_each) / len(of_each)) > 0.001:
                    raise ValueError(f"the mean of {precision} is not that of its tokens")
        return self


class Canary(Record):
    """canary.json: what base and adapter make of six fixed sentences, to know a server by."""

    format: Literal[1] = 1
    run_digest: str = Field(description="as in run.lock.json")
    tensors_sha256: str = Field(description="as in run.lock.json: of the adapter that was measured")
    row_format: RowFormat = Field(description="of the first four sentences; the last two are plain text")
    trained_in: str = Field(description="the precision of the base in training")
    compute_dtypes: dict[str, str] = Field(
        description="precision of the base's weights (nf4, fp4, int8, bfloat16, float16, float32) → the dtype that it "
        "was measured in; one that was not measured is not there"
    )
    sentences: tuple[CanarySentence, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _is_measured_alike(self) -> Self:
        if any(set(sentence.log_likelihood) != set(self.compute_dtypes) for sentence in self.sentences):
            raise ValueError("a sentence is not measured in the precisions that compute_dtypes names")
        return self

    @property
    def has_sixteen_bits(self) -> bool:
        """Whether it says what the adapter does on a base that is not quantized."""
        return any(precision.endswith(("16", "32")) for precision in self.compute_dtypes)

    def distance(self, precision: str) -> float:
        """How far the adapter is from its base: the root mean square, over all tokens, of how their log-likelihoods
        differ. Of means little is left: an adapter makes some tokens likelier and others less."""
        pairs = [
            pair
            for sentence in self.sentences
            for tokens in [sentence.token_log_likelihoods[precision]]
            for pair in zip(tokens.base, tokens.tuned, strict=True)
        ]
        return math.sqrt(sum((base - tuned) ** 2 for base, tuned in pairs) / len(pairs))

    def __str__(self) -> str:
        apart = [f"{self.distance(precision):.3f} nats on {precision}" for precision in self.compute_dtypes]
        return f"base and adapter differ at a token by {' and by '.join(apart)}" if apart else "nothing was measured"
