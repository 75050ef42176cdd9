"""TrainingConfig: every setting of a run as a typed value, once training_config.py has read what the user wrote.

A field here is a setting that tuner itself decides by, with its default; the other keys of a section go untouched to
the library's own class (`passthrough`). None: nobody decided, and the run follows the machine, the preset or the data.
"""

from collections.abc import Iterator, Mapping
from string import Formatter
from types import MappingProxyType
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

Method = Literal["lora", "qlora"]
Dtype = Literal["bfloat16", "float16", "float32"]
OverLength = Literal["drop", "truncate", "error"]
# What a column may be said to hold.
ColumnRole = Literal[
    "messages",
    "prompt",
    "response",
    "context",
    "text",
    "system",
    "history",
    "tools",
    "choices",
    "reasoning",
    "documents",
    "chat_template_kwargs",
    "label",
    "split",
    "ignored",
]

DEFAULT, PRESET, TYPED = "default", "preset", "--set"  # origins that are no place in a file
ALL_LINEAR = "all-linear"
DEFAULT_WARMUP_SHARE = 0.03  # of all steps

# What the run takes where a setting is None, for people who ask.
UNSET: Mapping[str, str] = MappingProxyType(
    {
        "ModelConfig.dtype": "bfloat16, where the device has it",
        "ModelConfig.chat_template": "the model's own",
        "QuantizationConfig.bnb_4bit_compute_dtype": "bfloat16, where the device has it",
        "TrainingArguments.output_dir": "/mnt/results in a pod",
        "TrainingArguments.warmup_steps": f"{DEFAULT_WARMUP_SHARE:.0%} of the steps",
        "TrainingArguments.max_length": "the longest row, at most 8,192 tokens",
        "TrainingArguments.eval_steps": "five times in a run",
        "TrainingArguments.early_stopping_patience": "by the length of the run",
        "DatasetConfig.train_test_split": "5% for evaluation, at most 500",
    }
)


class Section(BaseModel):
    """One section of training_config.yaml. A field's alias, where it has one, is KAITO's name of the key."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_by_name=True, serialize_by_alias=True)

    passthrough: dict[str, Any] = Field(default_factory=dict, description="keys that the library's class takes as is")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The section with these keys; a key that is no field is passed through. Raises ValidationError."""
        fields = {field.alias or name for name, field in cls.model_fields.items()} - {"passthrough"}
        known = {key: value for key, value in values.items() if key in fields}
        rest = {key: value for key, value in values.items() if key not in fields and value is not None}
        return cls.model_validate(known | {"passthrough": rest})

    def values(self) -> dict[str, Any]:
        """Key → value as JSON has it, under KAITO's names, those that are None too."""
        own = self.model_dump(mode="json", exclude={"passthrough"})
        return own | self.passthrough

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments of the library's class: all that is set."""
        return {key: value for key, value in self.values().items() if value is not None}


class ModelSettings(Section):
    chat_template: str | None = None
    dtype: Dtype | None = None
    revision: str | None = Field(default=None, description="a commit; the preset's unless the user wrote one")
    trust_remote_code: bool = False


class QuantizationSettings(Section):
    """transformers' BitsAndBytesConfig; `load_in_4bit` is what method qlora means."""

    load_in_4bit: bool = False
    load_in_8bit: bool = False
    bnb_4bit_quant_type: Literal["nf4", "fp4"] | None = None
    bnb_4bit_use_double_quant: bool | None = None
    bnb_4bit_compute_dtype: Dtype | None = None

    @property
    def bits(self) -> Literal[4, 8, 16]:
        """Of a weight of the base model's linear layers; 16 stands for unquantized."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 16


class LoraSettings(Section):
    """peft's LoraConfig."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None


class TrainingSettings(Section):
    """transformers' TrainingArguments and trl's SFTConfig, and what only tuner knows."""

    output_dir: str | None = None
    num_train_epochs: float = 3.0
    max_steps: int | None = Field(default=None, description="of the whole run; None: num_train_epochs says how long")
    per_device_train_batch_size: int = Field(default=1, description="documents")
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_steps: int | float | None = Field(default=None, description="below 1 a share of all steps")
    optim: str = "adamw_torch_fused"
    max_length: int | None = Field(default=None, description="tokens of a row")
    seed: int = 42
    bf16: bool | None = None
    fp16: bool | None = None
    activation_checkpointing: bool | None = None
    train_sampling_strategy: str | None = None
    eval_strategy: str = "steps"
    eval_steps: int | float | None = Field(default=None, description="below 1 a share of all steps")
    logging_steps: int | float | None = None
    save_strategy: str | None = None
    save_steps: int | float | None = None
    report_to: tuple[str, ...] | None = None
    run_name: str | None = None
    load_best_model_at_end: bool = True
    early_stopping_patience: int | None = Field(default=None, description="evaluations; 0 waits for ever")
    early_stopping_threshold: float = 0.0
    watchdog: bool = True

    @property
    def documents_per_process(self) -> int:
        """What one process takes in an optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class DatasetSettings(Section):
    """What the prepare stage is told. `train_fraction` None holds 5 % out, at most 500 rows; 1.0 holds nothing out."""

    shuffle: bool = Field(default=True, alias="shuffle_dataset")
    shuffle_seed: int = 42
    train_fraction: float | None = Field(default=None, alias="train_test_split")
    columns: dict[str, ColumnRole] = Field(default_factory=dict)
    prompt_template: str | None = None
    system_prompt: str | None = None
    raw_text: bool | None = None
    messages_column: str | None = None
    context_column: str | None = None
    response_column: str | None = None
    dataset_path: str | None = None
    dataset_extension: str | None = None
    over_length: OverLength = "drop"
    bad_row_share: float = 0.1

    @property
    def named_columns(self) -> dict[str, ColumnRole]:
        """Column → what the user says it is: in `columns`, or in KAITO's keys, of which context_column alone goes with
        a column `text`."""
        named = dict(self.columns)
        if self.messages_column is not None:
            named[self.messages_column] = "messages"
        elif self.context_column is not None:
            named[self.context_column] = "prompt"
            named[self.response_column or "text"] = "response"
        elif self.response_column is not None:
            has_prompt = bool(self.prompt_template) or "prompt" in named.values()
            named[self.response_column] = "response" if has_prompt else "text"
        return named

    @property
    def prompt_columns(self) -> tuple[str, ...]:
        """The columns that `prompt_template` puts together."""
        parts = Formatter().parse(self.prompt_template or "")
        return tuple(dict.fromkeys(name for _, name, _, _ in parts if name))

    def naming(self, column: str) -> str:
        """The key that names this column."""
        keys = {
            self.messages_column: "messages_column",
            self.context_column: "context_column",
            self.response_column: "response_column",
        } | dict.fromkeys(self.prompt_columns, "prompt_template")
        return "columns" if column in self.columns else keys.get(column, "response_column")


class TrainingConfig(BaseModel):
    """Every setting of a run.

    `origins` says where a value was written, by `Section.key`; a setting that is not there has its default. It is for
    people to read, and no code decides by it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Method
    model: ModelSettings
    quantization: QuantizationSettings
    lora: LoraSettings
    arguments: TrainingSettings
    dataset: DatasetSettings
    origins: dict[str, str] = Field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        method: Method,
        sections: Mapping[str, Mapping[str, Any]],
        *,
        origins: Mapping[str, str] = MappingProxyType({}),
        notes: tuple[str, ...] = (),
    ) -> Self:
        """The configuration with these values by section and key, defaults for the others. Raises ValidationError."""
        return cls(
            method=method,
            model=ModelSettings.of(sections.get("ModelConfig", {})),
            quantization=QuantizationSettings.of(sections.get("QuantizationConfig", {})),
            lora=LoraSettings.of(sections.get("LoraConfig", {})),
            arguments=TrainingSettings.of(sections.get("TrainingArguments", {})),
            dataset=DatasetSettings.of(sections.get("DatasetConfig", {})),
            origins=dict(origins),
            notes=notes,
        )

    def sections(self) -> dict[str, dict[str, Any]]:
        """Section → key → value, as training_config.yaml has them."""
        return {section: getattr(self, field).values() for section, field in _FIELD_OF.items()}

    def explained(self) -> Iterator[tuple[str, Any, str]]:
        """("LoraConfig.r", 16, "default"), … for all that is set, and for what UNSET explains."""
        for section, values in self.sections().items():
            for key, value in values.items():
                path = f"{section}.{key}"
                if value is not None or path in UNSET:
                    yield path, value, self.origin(path)

    def origin(self, path: str) -> str:
        """Where `Section.key` was written: file:line, "--set", "preset" or "default"."""
        return self.origins.get(path, DEFAULT)


_FIELD_OF: Mapping[str, str] = MappingProxyType(
    {
        "ModelConfig": "model",
        "QuantizationConfig": "quantization",
        "LoraConfig": "lora",
        "TrainingArguments": "arguments",
        "DatasetConfig": "dataset",
    }
)


def name_in_yaml(path: str) -> str | None:
    """`LoraConfig.r` for `lora.r`, a path in the JSON of a TrainingConfig; None where it is no setting."""
    field, _, key = path.partition(".")
    section = next((section for section, each in _FIELD_OF.items() if each == field), None)
    return section and f"{section}.{key.removeprefix('passthrough.')}"
