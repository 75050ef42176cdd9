"""KAITO's training_config.yaml + what was typed + our defaults → TrainingConfig: every value, and where it comes from.

What the user wrote wins, key by key; a null is the same as leaving the key out. Keys are checked against the lists in
training_fields.py, so nothing here imports torch, and a typo is found before a GPU is asked for.
"""

import math
import posixpath
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from string import Formatter
from types import MappingProxyType
from typing import Any, Protocol, get_args

from tuner.errors import MOST_PROBLEMS, ConfigError, Problem, cut, did_you_mean
from tuner.training_fields import CHOICES, TYPES
from tuner.training_settings import ALL_LINEAR, PRESET, TYPED, ColumnRole, Method, TrainingConfig
from tuner.yaml_lines import Document, Fault, Location, YamlValue, field_path, read_documents

DOCUMENTS_PER_STEP = 16  # as in the QLoRA paper (https://arxiv.org/abs/2305.14314)
ROOT = "training_config"  # the one key that KAITO reads

# The two sections that no library class stands behind, and what a run knows beside TrainingArguments.
OWN_TYPES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        "ModelConfig": {"chat_template": "str", "dtype": "str", "revision": "str", "trust_remote_code": "bool"},
        "DatasetConfig": {
            "bad_row_share": "float",
            "columns": "dict",
            "context_column": "str",
            "dataset_extension": "str",
            "dataset_path": "str",
            "messages_column": "str",
            "over_length": "str",
            "prompt_template": "str",
            "raw_text": "bool",
            "response_column": "str",
            "shuffle_dataset": "bool",
            "shuffle_seed": "int",
            "system_prompt": "str",
            "train_test_split": "float",
        },
        "TrainingArguments": {
            "early_stopping_patience": "int",
            "early_stopping_threshold": "float",
            "watchdog": "bool",
        },
    }
)
SECTIONS = ("ModelConfig", "QuantizationConfig", "LoraConfig", "TrainingArguments", "DataCollator", "DatasetConfig")

TRACKERS = ("tensorboard", "mlflow", "wandb")
DTYPES = ("bfloat16", "float16", "float32")
WORDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "ModelConfig.dtype": (*DTYPES, "auto"),
        "QuantizationConfig.bnb_4bit_quant_type": ("nf4", "fp4"),
        "QuantizationConfig.bnb_4bit_compute_dtype": DTYPES,
        "DatasetConfig.dataset_extension": ("parquet", "json", "jsonl", "csv", "arrow", "text", "txt"),
        "DatasetConfig.over_length": ("drop", "truncate", "error"),
        # perplexity falls as the loss does
        "TrainingArguments.metric_for_best_model": ("eval_loss", "loss", "eval_perplexity", "perplexity"),
    }
    | {f"{section}.{key}": words for section, keys in CHOICES.items() for key, words in keys.items()}
    | {
        # dft is another loss
        "TrainingArguments.loss_type": ("nll", "chunked_nll"),
        # The others update in backward, of which a step has several, or want to be told of training and evaluation.
        "TrainingArguments.optim": tuple(
            name
            for name in CHOICES["TrainingArguments"]["optim"]
            if name not in ("lomo", "adalomo") and "layerwise" not in name and "schedule_free" not in name
        ),
    }
)

Bound = tuple[Callable[[float], bool], str]
ABOVE_ZERO: Bound = (lambda number: number > 0, "greater than 0")
NOT_NEGATIVE: Bound = (lambda number: number >= 0, "0 or more")
SHARE: Bound = (lambda number: 0 <= number <= 1, "from 0 to 1")
BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        "LoraConfig.r": ABOVE_ZERO,
        "LoraConfig.lora_alpha": ABOVE_ZERO,
        "LoraConfig.lora_dropout": (lambda number: 0 <= number < 1, "from 0 to less than 1"),
        "TrainingArguments.learning_rate": ABOVE_ZERO,
        "TrainingArguments.num_train_epochs": ABOVE_ZERO,
        "TrainingArguments.per_device_train_batch_size": ABOVE_ZERO,
        "TrainingArguments.per_device_eval_batch_size": ABOVE_ZERO,
        "TrainingArguments.gradient_accumulation_steps": ABOVE_ZERO,
        "TrainingArguments.max_length": ABOVE_ZERO,
        "TrainingArguments.max_steps": (lambda number: number > 0 or number == -1, "greater than 0, or -1 for epochs"),
        "TrainingArguments.warmup_steps": NOT_NEGATIVE,
        "TrainingArguments.weight_decay": NOT_NEGATIVE,
        "TrainingArguments.seed": NOT_NEGATIVE,
        "TrainingArguments.early_stopping_patience": NOT_NEGATIVE,
        "TrainingArguments.early_stopping_threshold": NOT_NEGATIVE,
        "DatasetConfig.bad_row_share": SHARE,
        "DatasetConfig.shuffle_seed": NOT_NEGATIVE,
        "DatasetConfig.train_test_split": (lambda number: 0 < number <= 1, "the share to train on, up to 1 (all)"),
    }
)

# ── keys that are no longer, or never were, ours ─────────────────────────────────────────────────────────────────────


def _ratio_of_steps(ratio: Any) -> float:
    number = _as_float(ratio)
    if not 0 <= number < 1:
        raise ValueError("must be from 0 to less than 1")
    return number


def _if_true(word: str) -> Callable[[Any], str | None]:
    def translate(value: Any) -> str | None:
        if value is True:
            return word
        if value is False:
            return None
        raise ValueError(f"must be true or false, not {_show(value)}")

    return translate


def _unless_text(column: Any) -> Any:
    return None if column == "text" else column  # trl's default, known without being told


def _same(value: Any) -> Any:
    return value


# What it is called now, and how the value changes.
RENAMED: Mapping[str, tuple[str, Callable[[Any], Any]]] = MappingProxyType(
    {
        "ModelConfig.torch_dtype": ("ModelConfig.dtype", _same),
        "TrainingArguments.adafactor": ("TrainingArguments.optim", _if_true("adafactor")),
        "TrainingArguments.dataset_text_field": ("DatasetConfig.response_column", _unless_text),
        "TrainingArguments.evaluation_strategy": ("TrainingArguments.eval_strategy", _same),
        "TrainingArguments.gradient_checkpointing": ("TrainingArguments.activation_checkpointing", _same),
        "TrainingArguments.gradient_checkpointing_kwargs": ("TrainingArguments.activation_checkpointing_kwargs", _same),
        "TrainingArguments.group_by_length": ("TrainingArguments.train_sampling_strategy", _if_true("group_by_length")),
        "TrainingArguments.max_seq_length": ("TrainingArguments.max_length", _same),
        "TrainingArguments.no_cuda": ("TrainingArguments.use_cpu", _same),
        "TrainingArguments.per_gpu_eval_batch_size": ("TrainingArguments.per_device_eval_batch_size", _same),
        "TrainingArguments.per_gpu_train_batch_size": ("TrainingArguments.per_device_train_batch_size", _same),
        "TrainingArguments.warmup_ratio": ("TrainingArguments.warmup_steps", _ratio_of_steps),
    }
)

_GONE = "newer libraries have no such setting"
_LABELS = "the assistant's tokens and the end of its turn are learnt, nothing else"
_WEIGHTS = "the fetch stage decides where weights come from"
_OURS = "tuner decides this"
_PACKED = "documents are packed whatever it says, see nothing of each other, and a step is so many documents"
_FITS = "a step that does not fit the memory is taken in smaller pieces, then with recomputed activations"
_LIGER = "Liger's kernels are on where they are proved and faster; --disable liger turns them off"
IGNORED: Mapping[str, str] = MappingProxyType(
    {
        **{
            f"ModelConfig.{key}": _WEIGHTS
            for key in ("pretrained_model_name_or_path", "state_dict", "cache_dir", "force_download", "proxies")
        },
        "ModelConfig.local_files_only": _WEIGHTS + "; training itself never downloads",
        "ModelConfig.output_loading_info": _OURS,
        "ModelConfig.device_map": "the model lies on the GPU of its process",
        **{
            f"LoraConfig.{key}": "the adapter's own facts say this"
            for key in (
                *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_type", "peft_version"),
                *("revision", "runtime_config", "task_type"),
            )
        },
        **{
            f"TrainingArguments.{key}": _GONE
            for key in (
                *("chars_per_token", "dataset_batch_size", "fp16_backend", "fp16_opt_level", "fsdp_min_num_params"),
                *("fsdp_transformer_layer_cls_to_wrap", "half_precision_backend", "include_inputs_for_metrics"),
                *("include_tokens_per_second", "jit_mode_eval", "logging_dir", "mp_parameters", "num_of_sequences"),
                *("overwrite_output_dir", "past_index", "push_to_hub_model_id", "push_to_hub_organization"),
                *("ray_scope", "save_safetensors", "sharded_ddp", "tpu_metrics_debug", "tpu_num_cores", "use_ipex"),
                *("use_mps_device", "torchdynamo", "xpu_backend"),
            )
        },
        **{f"TrainingArguments.{key}": _LABELS for key in ("assistant_only_loss", "completion_only_loss")},
        **{
            f"TrainingArguments.{key}": _OURS
            for key in (
                *("average_tokens_across_devices", "bf16_full_eval", "dataset_kwargs", "dataset_num_proc"),
                *("ddp_static_graph", "disable_tqdm", "do_eval", "do_predict", "do_train", "eos_token"),
                *("fp16_full_eval", "ignore_data_skip", "include_num_input_tokens_seen"),
                *("label_names", "local_rank", "logging_nan_inf_filter", "pad_token", "padding_free"),
                *("remove_unused_columns", "resume_from_checkpoint", "save_total_limit"),
            )
        },
        **{
            f"TrainingArguments.{key}": _PACKED
            for key in ("eval_packing", "packing", "packing_strategy", "pad_to_multiple_of")
        },
        **{
            f"TrainingArguments.{key}": _FITS
            for key in ("activation_offloading", "auto_find_batch_size", "torch_empty_cache_steps")
        },
        **{f"TrainingArguments.{key}": _LIGER for key in ("liger_kernel_config", "use_liger_kernel")},
        "TrainingArguments.dataloader_drop_last": "every row is trained on",
        # Its handler would take SIGTERM, and end the training as if it were finished.
        "TrainingArguments.enable_jit_checkpoint": "a run that is stopped saves a checkpoint anyway",
        "TrainingArguments.shuffle_dataset": "DatasetConfig.shuffle_dataset is the one that counts",
        "TrainingArguments.truncation_mode": "DatasetConfig.over_length says what happens to long rows",
        **{
            f"TrainingArguments.hub_{key}": "the adapter goes to a registry, not to the hub"
            for key in ("always_push", "model_id", "private_repo", "revision", "strategy")
        },
    }
)
# Wrong to pass over in silence: the run would not be what was asked for. False, "" and the like ask for nothing.
_OTHER_LORA = "tuner trains LoRA, rsLoRA and DoRA; leave it out"
REFUSED: Mapping[str, str] = MappingProxyType(
    {
        **{
            f"LoraConfig.{key}": _OTHER_LORA
            for key in (
                *("alora_invocation_tokens", "arrow_config", "corda_config", "eva_config", "kasa_config"),
                *("lora_ga_config", "megatron_config", "monteclora_config", "use_bdlora", "use_qalora"),
                "velora_config",
            )
        },
        "LoraConfig.loftq_config": "LoftQ changes the base's weights, so its adapter is wrong on the published base",
        "TrainingArguments.chat_template_path": "write the template as ModelConfig.chat_template",
        "TrainingArguments.deepspeed": "one process a GPU is what tuner runs; leave it out",
        "TrainingArguments.fsdp": "one process a GPU is what tuner runs; leave it out",
        "TrainingArguments.fsdp_config": "one process a GPU is what tuner runs; leave it out",
        "TrainingArguments.greater_is_better": "a held-out loss is better when it is less; leave it out",
        "TrainingArguments.hub_token": "a token has no place in a ConfigMap; use $HF_TOKEN or modelAccessSecret",
        "TrainingArguments.label_smoothing_factor": "the loss is that of the tokens as they stand; leave it out",
        "TrainingArguments.model_init_kwargs": "write ModelConfig and QuantizationConfig instead",
        "TrainingArguments.neftune_noise_alpha": "its noise would depend on what is packed together; leave it out",
        "TrainingArguments.parallelism_config": "one process a GPU is what tuner runs; leave it out",
        "TrainingArguments.push_to_hub": "tuning.output says where the adapter goes",
        "TrainingArguments.trust_remote_code": "write it as ModelConfig.trust_remote_code",
    }
)

# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class ModelFacts(Protocol):
    """What this module asks of a Preset (presets.py, which stands beside it and is not imported)."""

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def linear_modules(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class ConfigSource:
    """The text of training_config.yaml, and the file and 1-based line where it begins."""

    text: str
    file: str
    first_line: int = 1


def resolve_training_config(
    *,
    method: Method,
    preset: ModelFacts,
    config_map: ConfigSource | None = None,
    overrides: Sequence[str] = (),
    world_size: int = 1,
) -> TrainingConfig:
    """The configuration of a run: `config_map`, over it `overrides` ("LoraConfig.r=32"), under both our defaults.

    Raises ConfigError with every problem of both, each with its line.
    """
    reading = _Reading()
    if config_map:
        reading.read_config_map(config_map)
    for override in overrides:
        reading.read_override(override)
    reading.check_quantization(method)
    reading.check_target_modules(preset)
    if reading.problems:
        # in the order of the file, then of the command line
        raise ConfigError.of(sorted(reading.problems, key=lambda problem: (problem.line is None, problem.line or 0)))
    origins = {path: str(entry.place) for path, entry in reading.written.items()}
    sections = {section: {key: entry.value for key, entry in reading.of(section).items()} for section in SECTIONS}
    if method == "qlora":
        sections["QuantizationConfig"] = _four_bits(sections["QuantizationConfig"])
    arguments = sections["TrainingArguments"]
    per_step = arguments.get("per_device_train_batch_size", 1) * world_size
    arguments.setdefault("gradient_accumulation_steps", math.ceil(DOCUMENTS_PER_STEP / per_step))
    if preset.revision and "revision" not in sections["ModelConfig"]:
        sections["ModelConfig"]["revision"] = preset.revision
        origins["ModelConfig.revision"] = PRESET
    return TrainingConfig.of(method, sections, origins=origins, notes=tuple(dict.fromkeys(reading.notes)))


def _four_bits(written: Mapping[str, Any]) -> dict[str, Any]:
    """QuantizationConfig of method qlora: NF4 with double quantization, unless the user wrote otherwise."""
    if written.get("load_in_8bit"):
        return {"load_in_4bit": False, **written}
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **written}


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Place:
    """The line of a file, or the command line, which has none."""

    file: str
    line: int | None

    def __str__(self) -> str:
        return self.file if self.line is None else f"{self.file}:{self.line}"


@dataclass(frozen=True)
class _Written:
    """One value as it was written: `text` is what stands there for a scalar without quotes that is no text.

    `faults` are what the reader found in it.
    """

    value: YamlValue
    text: str | None
    faults: tuple[Fault, ...]
    place: _Place

    @classmethod
    def at(cls, location: Location, value: YamlValue, document: Document, place: _Place) -> "_Written":
        faults = tuple(fault for fault in document.faults if fault.location[: len(location)] == location)
        return cls(value, document.written.get(location), faults, place)


@dataclass(frozen=True)
class _Entry:
    """An accepted value, the path it was written under, and where."""

    value: Any
    path: str
    place: _Place


class _Reading:
    """What has been read so far; `written` holds accepted values by "Section.key"."""

    def __init__(self) -> None:
        self.written: dict[str, _Entry] = {}
        self.problems: list[Problem] = []
        self.notes: list[str] = []
        self._excused: set[Fault] = set()  # no numbers, and wanted as texts

    def of(self, section: str) -> dict[str, _Entry]:
        prefix = section + "."
        return {path.removeprefix(prefix): entry for path, entry in self.written.items() if path.startswith(prefix)}

    def read_config_map(self, source: ConfigSource) -> None:
        documents, problems = read_documents(source.text, source.file, source.first_line)
        if len(documents) > 1:
            problems = [Problem("a second YAML document, and one is read", file=source.file, line=documents[1].line)]
        self.problems += problems
        if problems:
            return
        document = documents[0] if documents else Document({}, source.file, source.first_line)
        self._read_root(document)
        self.problems += [
            replace(document.problem(fault), path=field_path(fault.location[1:] or fault.location))
            for fault in document.faults
            if fault not in self._excused
        ]

    def _read_root(self, document: Document) -> None:
        root = document.mapping
        first = list(islice(root, MOST_PROBLEMS))
        if ROOT not in root and not any(map(_means_root, first)):
            place = _Place(document.file, document.line)
            self._refuse(f"must be a map with the one key {ROOT}", "", place, _hint_for_root(first))
            return
        for key, value in root.items():
            if self._has_enough():
                return
            place = _Place(document.file, document.line_of((key,)))
            if key != ROOT:
                near = f'did you mean "{ROOT}"?' if ROOT not in root and _means_root(key) else None
                self._refuse(f"unknown key, {near or f'only {ROOT} stands here'}", field_path((key,)), place, near)
            if isinstance(value, dict):
                if key == ROOT or _means_root(key):  # what is below it may have faults of its own
                    self._read_sections(key, value, document)
            elif key == ROOT and not document.is_covered((key,)):
                self._refuse("must be a map of sections", key, place, f"the sections are {', '.join(SECTIONS)}")

    def _read_sections(self, root: str, sections: Mapping[str, YamlValue], document: Document) -> None:
        for section, values in sections.items():
            if self._has_enough():
                return
            place = _Place(document.file, document.line_of((root, section)))
            if section not in SECTIONS:
                self._refuse_section(section, place)
            elif isinstance(values, dict):
                for key, value in values.items():
                    if self._has_enough():
                        return
                    at = (root, section, key)
                    place = _Place(document.file, document.line_of(at))
                    self._accept(section, key, _Written.at(at, value, document, place))
            elif values is not None and not document.is_covered((root, section)):
                self._refuse("must be a map", section, place, f"{section}: {{KEY: VALUE}}, or a line for each key")

    def _has_enough(self) -> bool:
        return len(self.problems) > MOST_PROBLEMS

    def read_override(self, text: str) -> None:
        """One --set: SECTION.KEY=VALUE, the value as YAML."""
        place = _Place(TYPED, None)
        path, equals, value = text.partition("=")
        section, _, key = path.strip().partition(".")
        if not equals or not key:
            hint = _belongs(section) if equals and not key else None
            self._refuse(f"{path!r} is not SECTION.KEY=VALUE", "", place, hint or "for example --set LoraConfig.r=32")
        elif section not in SECTIONS:
            self._refuse_section(section, place, _belongs(key))
        else:
            documents, problems = read_documents(value, TYPED)
            if problems or len(documents) > 1:
                hint = f"--set {path}=FILE takes it from a file" if path == "ModelConfig.chat_template" else None
                message = problems[0].message if problems else "is several YAML documents"
                self._refuse(message, path, place, hint)
                return
            document = documents[0] if documents else Document(None)
            self._accept(section, key, _Written.at((), document.value, document, place))
            for fault in document.faults:
                if fault not in self._excused:
                    self._refuse(fault.message, field_path((section, key, *fault.location)), place, fault.hint)

    def _accept(self, section: str, key: str, written: _Written) -> None:
        path = f"{section}.{key}"
        types = _types(section)
        if path in REFUSED:
            if written.value:
                self._refuse("is not supported", path, written.place, REFUSED[path])
        elif path in IGNORED or (section == "DataCollator" and key in types):
            self.notes.append(f"{path} is ignored: {IGNORED.get(path, _LABELS)}")
        elif path in RENAMED or key in types:
            self._read_value(path, written)
        else:
            near = did_you_mean(key, (*types, *_old_names(section)))
            hint = _belongs(key) or near or _known_keys(section)
            said = f"unknown key, {near}" if near and hint == near else "unknown key"
            self._refuse(said, cut(path, 100), written.place, hint)

    def _read_value(self, path: str, written: _Written) -> None:
        name, translate = RENAMED.get(path, (path, _same))
        section, _, key = name.partition(".")
        types, place = _types(section)[key].split(" | "), written.place
        if written.text and "str" in types:  # the digits of a commit, beyond any number, are a text
            self._excused.update(fault for fault in written.faults if fault.covers)
        if not self._excused.issuperset(written.faults):
            return
        raw = written.text if written.faults else written.value
        try:
            value = None if raw is None else translate(raw)
            if value is not None:
                value = _checked(name, _typed(value, types, written.text))
        except ValueError as error:
            self._refuse(str(error), path, place)
            return
        before = self.written.get(name)
        if before and before.path != path and before.place.file == place.file:
            self._refuse(f"{before.path} ({before.place}) is the same setting", path, place)
        if name == "DatasetConfig.train_test_split" and value is not None and value < 0.5:
            self.notes.append(
                f"{path} {value:g} is the share that is trained on: {1 - value:.0%} of the rows are held out"
            )
        if name != path and value is not None:
            changed = "" if translate is _same else f" = {_show(value)}"
            self.notes.append(f"{path} is now {name}{changed}")
        if value is None:
            self.written.pop(name, None)  # a null typed with --set takes back what the file says
        else:
            self.written[name] = _Entry(value, path, place)

    def _refuse(self, message: str, path: str, place: _Place, hint: str | None = None) -> None:
        self.problems.append(Problem(cut(message), path=path, file=place.file, line=place.line, hint=hint))

    def _refuse_section(self, section: str, place: _Place, belongs: str | None = None) -> None:
        near = did_you_mean(section, SECTIONS)
        hint = near or belongs or f"the sections are {', '.join(SECTIONS)}"
        self._refuse(f"Unrecognized section: {section}{f', {near}' if near else ''}", "", place, hint)

    # ── rules over several keys ──

    def check_quantization(self, method: Method) -> None:
        four = self.written.get("QuantizationConfig.load_in_4bit")
        eight = self.written.get("QuantizationConfig.load_in_8bit")
        asked = [entry for entry in (four, eight) if entry and entry.value]
        if method == "lora" and asked:
            self._refuse_quantization(asked[0], "method lora does not quantize", "use method: qlora, or write false")
        elif len(asked) == 2:
            self._refuse_quantization(asked[1], "load_in_4bit and load_in_8bit are both true", "choose one")
        elif method == "qlora" and not asked and four:
            hint = "leave load_in_4bit out, or use method: lora"
            self._refuse_quantization(four, "method qlora quantizes, and load_in_4bit is false", hint)
        if method == "lora":
            for key in [key for key in self.of("QuantizationConfig") if not key.startswith("load_in")]:
                del self.written[f"QuantizationConfig.{key}"]
                self.notes.append(f"QuantizationConfig.{key} is ignored: method lora does not quantize")

    def _refuse_quantization(self, entry: _Entry, message: str, hint: str) -> None:
        self._refuse(message, "QuantizationConfig", entry.place, hint)

    def check_target_modules(self, preset: ModelFacts) -> None:
        """What the preset's facts already tell; of other models the train stage does, before its first step."""
        entry = self.written.get("LoraConfig.target_modules")
        if not entry or not preset.linear_modules:
            return
        targets = foresee_target_modules(entry.value, preset.linear_modules)
        there = f"{preset.name} has {', '.join(preset.linear_modules)}"
        for name in targets.unmatched[: MOST_PROBLEMS + 1]:
            near = OUTSIDE_BLOCKS if name in HEAD_AND_EMBEDDINGS else did_you_mean(name, preset.linear_modules)
            message = f"no linear layer {name!r}: {there}" + (f"; {near}" if near else "")
            self._refuse(message, "LoraConfig.target_modules", entry.place, near)
        for asked, got in targets.renamed.items():
            self.notes.append(f"LoraConfig.target_modules: {asked} means {got} in {preset.name}")
        if targets.left_out and not targets.unmatched:
            self.notes.append(f"LoraConfig.target_modules leaves out {', '.join(targets.left_out)}: {there}")


def _types(section: str) -> Mapping[str, str]:
    return {**TYPES.get(section, {}), **OWN_TYPES.get(section, {})}


def words_of_settings() -> dict[str, tuple[str, ...]]:
    """SECTION.KEY of every setting that has an effect → the words that it may be; () for what is no word."""
    return {
        path: WORDS.get(path, ("true", "false") if kind == "bool" else ())
        for section in SECTIONS
        for key, kind in _types(section).items()
        if (path := f"{section}.{key}") not in IGNORED and path not in REFUSED and section != "DataCollator"
    }


def _old_names(section: str) -> list[str]:
    return [path.partition(".")[2] for path in (*RENAMED, *IGNORED, *REFUSED) if path.partition(".")[0] == section]


def _means_root(key: str) -> bool:
    """Whether it is nearer to the root's name than to any section's."""
    bare = {name.replace("_", ""): name for name in (ROOT, *SECTIONS)}
    near = did_you_mean(key.replace("_", ""), bare)
    return key != ROOT and near is not None and ROOT.replace("_", "") in near


def _hint_for_root(keys: Sequence[str]) -> str:
    if any(key in SECTIONS or did_you_mean(key, SECTIONS) for key in keys):
        return f"write {ROOT}: on a line above and indent the sections under it"
    if "kind" in keys:
        return "give the text under its key training_config.yaml alone, or put the ConfigMap into the Workspace's file"
    return f"{ROOT}: {{LoraConfig: {{r: 32}}}}"


# What people call a key who have another tool in mind.
_OTHER_WORDS: Mapping[str, str] = MappingProxyType(
    {
        "rank": "LoraConfig.r",
        "lora_r": "LoraConfig.r",
        "lora_rank": "LoraConfig.r",
        "alpha": "LoraConfig.lora_alpha",
        "dropout": "LoraConfig.lora_dropout",
        "lr": "TrainingArguments.learning_rate",
        "epochs": "TrainingArguments.num_train_epochs",
        "num_epochs": "TrainingArguments.num_train_epochs",
        "steps": "TrainingArguments.max_steps",
        "batch_size": "TrainingArguments.per_device_train_batch_size",
        "micro_batch_size": "TrainingArguments.per_device_train_batch_size",
        "sequence_len": "TrainingArguments.max_length",
        "column_mapping": "DatasetConfig.columns",
        "default_system": "DatasetConfig.system_prompt",
        "max_sequence_length": "TrainingArguments.max_length",
    }
)


def _belongs(key: str) -> str | None:
    """`write TrainingArguments.learning_rate`, for a key of one other section or another tool's word for it."""
    sections = [section for section in SECTIONS if section != "DataCollator"]  # whose keys have no effect
    places = [f"{section}.{key}" for section in sections if key in _types(section) or key in _old_names(section)]
    known = _OTHER_WORDS.get(key.lower()) or (places[0] if len(places) == 1 else None)
    return f"write {known}" if known else None


_CLASSES: Mapping[str, str] = MappingProxyType(
    {
        "QuantizationConfig": "transformers' BitsAndBytesConfig",
        "LoraConfig": "peft's LoraConfig",
        "TrainingArguments": "transformers' TrainingArguments",
        "DataCollator": "transformers' DataCollatorForLanguageModeling",
    }
)


def _known_keys(section: str) -> str:
    if section in _CLASSES:
        return f"its keys are those of {_CLASSES[section]}"
    return f"its keys are {', '.join(OWN_TYPES[section])}"


def _typed(value: Any, types: Sequence[str], text: str | None) -> Any:
    """`value` in one of `types`; raises ValueError when none of them can hold it."""
    if isinstance(value, bool):
        if "bool" in types:
            return value
    elif isinstance(value, str):
        if "str" in types:
            return value
        for name, convert in (("int", _as_int), ("float", _as_float)):
            if name in types and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value.strip()):
                return convert(value)
    elif isinstance(value, int | float):
        if "int" in types and float(value).is_integer():
            return int(value)
        if "float" in types:
            return _as_float(value)
    elif isinstance(value, list | dict) and type(value).__name__ in types:
        return value
    if "str" in types and text is not None and not isinstance(value, list | dict):
        return text
    raise ValueError(f"must be {_describe(types)}, not {_show(value)}")


def _as_int(value: Any) -> int:
    number = _as_float(value)
    if not number.is_integer():
        raise ValueError(f"must be a whole number, not {_show(value)}")
    return int(number)


def _as_float(value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"must be a number, not {_show(value)}") from None
    if not math.isfinite(number):
        raise ValueError(f"must be a finite number, not {_show(value)}")
    return number


def _describe(types: Sequence[str]) -> str:
    names = {
        "bool": "true or false (no quotes)",
        "int": "a whole number",
        "float": "a number",
        "str": "a text",
        "list": "a list",
        "dict": "a map",
    }
    return " or ".join(names[name] for name in types)


def _show(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return cut(repr(value), 60)


_ITEMS: Mapping[str, tuple[type, str]] = MappingProxyType(
    {"LoraConfig.modules_to_save": (str, "names"), "LoraConfig.layers_to_transform": (int, "whole numbers")}
)


def _checked(path: str, value: Any) -> Any:
    """The value as the run takes it; raises ValueError when it makes no sense for this key."""
    if path in BOUNDS and not isinstance(value, str):
        holds, words = BOUNDS[path]
        if not holds(value):
            raise ValueError(f"must be {words}, not {_show(value)}")
    if path in ("ModelConfig.dtype", "QuantizationConfig.bnb_4bit_compute_dtype"):
        value = value.removeprefix("torch.")
    if path == "DatasetConfig.dataset_extension":
        value = value.removeprefix(".").lower()
    if path in WORDS and value not in WORDS[path]:
        near = did_you_mean(value, WORDS[path])
        raise ValueError(f"{_show(value)} is none of {', '.join(WORDS[path])}{f'; {near}' if near else ''}")
    if (path, value) in (("ModelConfig.dtype", "auto"), ("TrainingArguments.max_steps", -1)):
        return None  # as when it is not written
    if path in _ITEMS and isinstance(value, list):
        kind, words = _ITEMS[path]
        if not all(type(item) is kind for item in value):
            raise ValueError(f"must be a list of {words}, not {_show(value)}")
    if path == "DatasetConfig.columns":
        return _column_roles(value)
    if path == "DatasetConfig.prompt_template":
        _check_prompt_template(value)
    if path == "LoraConfig.target_modules":
        return _module_names(value)
    if path == "LoraConfig.init_lora_weights":
        return _start(value)
    if path == "TrainingArguments.report_to":
        return _tracker_names(value)
    if path == "TrainingArguments.output_dir":
        return _under_mnt(value)
    return value


def _column_roles(value: dict[str, Any]) -> dict[str, Any]:
    """Column → what it holds; only context may be several columns, and what is left out."""
    roles = get_args(ColumnRole)
    for column, role in value.items():
        if role not in roles:
            near = did_you_mean(role, roles) if isinstance(role, str) else None
            raise ValueError(f"{column}: {_show(role)} is none of {', '.join(roles)}{f'; {near}' if near else ''}")
    written = list(value.values())
    for role in roles:
        if role not in ("context", "ignored") and written.count(role) > 1:
            columns = ", ".join(column for column, each in value.items() if each == role)
            ways = "; prompt_template puts several columns together" if role == "prompt" else ""
            raise ValueError(f"several columns are said to be the {role}: {columns}{ways}")
    return value


def _check_prompt_template(value: str) -> None:
    try:
        fields = [(name, form, how) for _, name, form, how in Formatter().parse(value) if name is not None]
    except ValueError as error:
        raise ValueError(f"is no template: {error}; a brace itself is written {{{{ or }}}}") from None
    if not fields:
        raise ValueError("names no column: write one in braces, as {question}")
    for name, form, how in fields:
        if not name or form or how:
            raise ValueError(
                f"{_show(name)}: a column's name alone stands in braces; a brace itself is written {{{{ or }}}}"
            )


def _module_names(value: str | list[Any]) -> str | list[str]:
    """A list of names; `all-linear` and a regular expression, which peft knows too, stay texts."""
    if isinstance(value, str):
        if value == ALL_LINEAR:
            return value
        if _is_pattern(value):
            _compile(value)
            return value
        return [name.strip() for name in value.split(",") if name.strip()]
    if value == [ALL_LINEAR]:
        return ALL_LINEAR
    if not value or not all(isinstance(name, str) for name in value):
        raise ValueError(f'must be names of linear layers or "{ALL_LINEAR}", not {_show(value)}')
    return value


def _start(value: bool | str) -> bool | str:
    """How an adapter may begin: it must change nothing, since it is served on the published base.

    PiSSA, OLoRA, CorDA, LoftQ and the like take a part out of the base's weights first, and false begins with noise.
    """
    if value is True or value == "gaussian":
        return value
    raise ValueError(
        f"{_show(value)} makes the adapter begin with another model than the published base, on which it would be "
        "wrong; true and gaussian do not"
    )


def _tracker_names(value: str | list[Any]) -> list[str] | None:
    """A list of those that there are; `none` is the same as leaving it out."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else value
    for name in names:
        if name not in ("none", *TRACKERS):
            near = did_you_mean(name, TRACKERS) if isinstance(name, str) else None
            raise ValueError(f"{_show(name)} is none of {', '.join(TRACKERS)}{f'; {near}' if near else ''}")
    return [name for name in dict.fromkeys(names) if name != "none"] or None


def _is_pattern(text: str) -> bool:
    return not re.fullmatch(r"[\w.,\s-]+", text)


_PATTERN_CHARACTERS = 1000


def _compile(pattern: str) -> None:
    if len(pattern) > _PATTERN_CHARACTERS:
        raise ValueError(f"is too long for a regular expression; at most {_PATTERN_CHARACTERS:,} characters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"is no regular expression: {error}") from None


def _under_mnt(value: str) -> str:
    """An absolute path below /mnt, where a pod has its volumes; a relative one is meant below it."""
    path = posixpath.normpath(posixpath.join("/mnt", value))
    if not path.startswith("/mnt/"):
        raise ValueError(f"must be a directory below /mnt, not {_show(value)}")
    return path


# ── which modules LoRA adapts ────────────────────────────────────────────────────────────────────────────────────────

FUSED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
)


HEAD_AND_EMBEDDINGS = ("lm_head", "embed_tokens")
OUTSIDE_BLOCKS = "head and embeddings get no adapters; LoraConfig.modules_to_save trains them whole"


@dataclass(frozen=True)
class TargetModules:
    """`modules` to adapt, `renamed`: asked → what it is in this model, and the linear layers `left_out`."""

    modules: tuple[str, ...]
    renamed: Mapping[str, str]
    unmatched: tuple[str, ...]
    left_out: tuple[str, ...]


def resolve_target_modules(requested: str | Sequence[str], linear_modules: Sequence[str]) -> TargetModules:
    """What `LoraConfig.target_modules` means in a model whose blocks have these linear layers.

    A name that only a split or only a fused model has means the same weights in the other one. A text other than
    "all-linear" is a regular expression over the names.
    """
    if requested == ALL_LINEAR:
        return TargetModules(tuple(dict.fromkeys(linear_modules)), {}, (), ())
    if isinstance(requested, str):
        modules = [name for name in linear_modules if re.fullmatch(requested, name)]
        return _target_modules(modules, {}, () if modules else (requested,), linear_modules)
    found: list[str] = []
    renamed: dict[str, str] = {}
    unmatched: list[str] = []
    for name in requested:
        matches = [name] if name in linear_modules else _same_weights(name, linear_modules)
        if not matches:
            unmatched.append(name)
        elif matches != [name]:
            renamed[name] = ", ".join(matches)
        found += matches
    return _target_modules(found, renamed, unmatched, linear_modules)


def foresee_target_modules(requested: str | Sequence[str], linear_modules: Sequence[str]) -> TargetModules:
    """The same before the train stage. A regular expression that may take long stands for all linear layers.

    Some take for ever, and a controller, which is given everybody's, must not try them: the train stage does, in its
    author's own pod.
    """
    takes_long = isinstance(requested, str) and requested != ALL_LINEAR and not _is_quick(requested)
    return resolve_target_modules(ALL_LINEAR if takes_long else requested, linear_modules)


def _is_quick(pattern: str) -> bool:
    """Whether a dozen names of layers are tried in no time, whatever is in it: there is little to go back to."""
    repeats, groups = sum(map(pattern.count, "*+?{")), pattern.count("(")
    return len(pattern) <= 200 and repeats <= 3 and groups <= 2 and not re.search(r"\)[*+?{]", pattern)


def _same_weights(name: str, linear_modules: Sequence[str]) -> list[str]:
    fused = [whole for whole, parts in FUSED.items() if name in parts and whole in linear_modules]
    return fused or [part for part in FUSED.get(name, ()) if part in linear_modules]


def _target_modules(
    modules: Sequence[str], renamed: Mapping[str, str], unmatched: Sequence[str], linear_modules: Sequence[str]
) -> TargetModules:
    left_out = tuple(name for name in dict.fromkeys(linear_modules) if name not in modules)
    return TargetModules(tuple(dict.fromkeys(modules)), MappingProxyType(dict(renamed)), tuple(unmatched), left_out)
