"""training_config.py: what was written, what we fill in, and what is refused before a GPU is asked for."""

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tuner.errors import ConfigError
from tuner.training_config import (
    IGNORED,
    OWN_TYPES,
    REFUSED,
    RENAMED,
    SECTIONS,
    ConfigSource,
    foresee_target_modules,
    resolve_target_modules,
    resolve_training_config,
)
from tuner.training_fields import TYPES
from tuner.training_settings import DEFAULT_WARMUP_SHARE, TrainingConfig

PHI3 = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
LLAMA = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Model:
    name: str = "phi-3-mini-4k-instruct"
    revision: str | None = "0a67737cc96d2554230f90338b163bc6380a2a85"
    linear_modules: tuple[str, ...] = PHI3


UNKNOWN_MODEL = Model("org/name", None, ())


def resolve(sections: str | None = None, *overrides: str, **options: Any) -> TrainingConfig:
    """The configuration of the sections below `training_config:`, in a file of that one line more."""
    arguments = {"method": "qlora", "preset": Model()} | options
    source = None
    if sections is not None:
        source = ConfigSource("training_config:\n" + indent(dedent(sections).lstrip("\n"), "  "), "config.yaml")
    return resolve_training_config(config_map=source, overrides=overrides, **arguments)


def setting(config: TrainingConfig, path: str) -> Any:
    """The value of "Section.key"; None where it is not there."""
    section, _, key = path.partition(".")
    return config.sections()[section].get(key)


def problems(sections: str | None, *overrides: str, **options: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(sections, *overrides, **options)
    return [str(problem) for problem in caught.value.problems]


# KAITO's template (charts/kaito/workspace/templates/qlora-params.yaml) and its example for Phi-3.
KAITO_TEMPLATE = """
    ModelConfig: {torch_dtype: bfloat16, local_files_only: true, device_map: auto}
    QuantizationConfig:
      load_in_4bit: true
      bnb_4bit_quant_type: nf4
      bnb_4bit_compute_dtype: bfloat16
      bnb_4bit_use_double_quant: true
    LoraConfig: {r: 8, lora_alpha: 8, lora_dropout: 0.0}
    TrainingArguments:
      output_dir: /mnt/results
      ddp_find_unused_parameters: false
      save_strategy: "no"
      per_device_train_batch_size: 1
    DataCollator: {mlm: true}
    DatasetConfig: {shuffle_dataset: true, train_test_split: 1}
"""

# ── defaults and precedence ──────────────────────────────────────────────────────────────────────────────────────────


def test_unwritten_values_are_the_defaults_of_the_design() -> None:
    config = resolve()
    assert config.lora.keywords() == {
        "r": 16,
        "lora_alpha": 32,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    assert config.arguments.keywords() == {
        "num_train_epochs": 3.0,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 16,
        "learning_rate": 2e-4,
        "lr_scheduler_type": "cosine",
        "optim": "adamw_torch_fused",
        "seed": 42,
        "eval_strategy": "steps",
        "load_best_model_at_end": True,
        "early_stopping_threshold": 0.0,
        "watchdog": True,
    }
    assert config.quantization.keywords() == {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
    }
    assert (config.dataset.shuffle, config.dataset.shuffle_seed, config.dataset.over_length) == (True, 42, "drop")


def test_kaitos_template_wins_key_by_key_over_our_defaults() -> None:
    config = resolve(KAITO_TEMPLATE)
    assert config.lora.keywords() == {
        "r": 8,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": "all-linear",
    }
    assert setting(config, "TrainingArguments.save_strategy") == "no"
    assert setting(config, "TrainingArguments.learning_rate") == 2e-4


def test_writing_alpha_leaves_our_r() -> None:
    config = resolve("LoraConfig: {lora_alpha: 8}")
    assert (setting(config, "LoraConfig.r"), setting(config, "LoraConfig.lora_alpha")) == (16, 8)


@pytest.mark.parametrize(
    ("written", "world_size", "steps"), [("", 1, 16), ("2", 1, 8), ("3", 1, 6), ("32", 1, 1), ("1", 8, 2), ("2", 3, 3)]
)
def test_sixteen_documents_per_optimizer_step_unless_written(written: str, world_size: int, steps: int) -> None:
    config = resolve(f"TrainingArguments: {{per_device_train_batch_size: {written}}}", world_size=world_size)
    assert setting(config, "TrainingArguments.gradient_accumulation_steps") == steps


def test_written_accumulation_stays() -> None:
    config = resolve("TrainingArguments: {gradient_accumulation_steps: 1}")
    assert setting(config, "TrainingArguments.gradient_accumulation_steps") == 1


def test_every_value_knows_where_it_comes_from() -> None:
    config = resolve("LoraConfig:\n  r: 8\n  lora_alpha: 8\n", "LoraConfig.r=4")
    origins = {path: (value, origin) for path, value, origin in config.explained()}
    assert origins["LoraConfig.r"] == (4, "--set")
    assert origins["LoraConfig.lora_alpha"] == (8, "config.yaml:4")
    assert origins["LoraConfig.lora_dropout"] == (0.0, "default")
    assert origins["ModelConfig.revision"] == (Model().revision, "preset")
    assert "LoraConfig.r" in config.origins
    assert "LoraConfig.lora_dropout" not in config.origins
    assert "LoraConfig.use_dora" not in config.origins


def test_line_numbers_are_those_of_the_file_the_text_stands_in() -> None:
    text = "training_config:\n  LoraConfig:\n    target_modules:\n      - qkv_proj\n"
    source = ConfigSource(text, "quickstart.yaml", first_line=39)
    config = resolve_training_config(method="qlora", preset=Model(), config_map=source)
    assert config.origin("LoraConfig.target_modules") == "quickstart.yaml:41"


def test_config_survives_json() -> None:
    config = resolve(
        """
        TrainingArguments:
          gradient_checkpointing_kwargs: {use_reentrant: false, nested: {a: [1, 2.5, null, "x"]}}
          learning_rate: 2e-4
          num_train_epochs: 2
        """
    )
    again = TrainingConfig.model_validate_json(config.model_dump_json())
    assert again == config
    assert repr(again) == repr(config)  # 2.0 stays a float, 1 an int


# ── the dataset's settings ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("written", "fraction"), [("", None), ("1", 1.0), ("0.8", 0.8)])
def test_kaito_fault_12_rows_are_held_out_as_the_user_wrote_or_as_we_evaluate_them(
    written: str, fraction: float | None
) -> None:
    assert resolve(f"DatasetConfig: {{train_test_split: {written}}}").dataset.train_fraction == fraction


def test_dataset_settings_are_read_where_they_stand() -> None:
    dataset = resolve(
        """
        DatasetConfig:
          shuffle_dataset: false
          shuffle_seed: 7
          context_column: question
          response_column: answer
          dataset_extension: .Parquet
          dataset_path: data/train.parquet
          over_length: truncate
          bad_row_share: 0
        """
    ).dataset
    assert (dataset.shuffle, dataset.shuffle_seed) == (False, 7)
    assert (dataset.context_column, dataset.response_column, dataset.messages_column) == ("question", "answer", None)
    assert (dataset.dataset_extension, dataset.dataset_path) == ("parquet", "data/train.parquet")
    assert (dataset.over_length, dataset.bad_row_share) == ("truncate", 0.0)


# ── LoRA's modules ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_kaito_fault_1_split_names_adapt_the_fused_layers_of_phi_3() -> None:
    targets = resolve_target_modules(
        ["k_proj", "q_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj"], PHI3
    )
    assert set(targets.modules) == set(PHI3)
    assert targets.renamed["q_proj"] == "qkv_proj"
    assert targets.renamed["up_proj"] == "gate_up_proj"
    assert (targets.unmatched, targets.left_out) == ((), ())


def test_kaito_fault_1_what_lora_leaves_out_is_said() -> None:
    config = resolve("LoraConfig: {target_modules: [q_proj, k_proj, v_proj, o_proj]}")
    assert any("leaves out gate_up_proj, down_proj" in note for note in config.notes)
    assert any("q_proj means qkv_proj" in note for note in config.notes)


def test_fused_names_adapt_the_split_layers_of_llama() -> None:
    targets = resolve_target_modules(["qkv_proj", "gate_up_proj"], LLAMA)
    assert targets.modules == ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
    assert targets.left_out == ("o_proj", "down_proj")


@pytest.mark.parametrize("modules", [PHI3, LLAMA])
def test_kaito_fault_2_without_target_modules_every_linear_layer_is_adapted(modules: tuple[str, ...]) -> None:
    requested = resolve(None, preset=Model(linear_modules=modules)).lora.target_modules
    assert resolve_target_modules(requested, modules).modules == modules


@pytest.mark.parametrize("written", ["all-linear", '"all-linear"', "[all-linear]"])
def test_kaito_fault_3_all_linear_stays_a_word(written: str) -> None:
    config = resolve(f"LoraConfig: {{target_modules: {written}}}")
    assert setting(config, "LoraConfig.target_modules") == "all-linear"


@pytest.mark.parametrize("written", ["[qkv_proj, o_proj]", '"qkv_proj, o_proj"', '"qkv_proj,o_proj"'])
def test_target_modules_are_a_list_or_words_with_commas(written: str) -> None:
    config = resolve(f"LoraConfig: {{target_modules: {written}}}")
    assert setting(config, "LoraConfig.target_modules") == ["qkv_proj", "o_proj"]


@pytest.mark.parametrize(
    "pattern", ["((((.*)*)*)*)*x", "(|)" * 60 + "x", "(a|b|ab)*c", "(.*?,){11}P", ".*.*.*.*.*.*.*.*x"]
)
def test_a_pattern_that_may_take_for_ever_is_left_to_the_train_stage(pattern: str) -> None:
    began = time.process_time()
    config = resolve(f"LoraConfig: {{target_modules: '{pattern}'}}")
    assert time.process_time() - began < 3
    assert config.lora.target_modules == pattern
    assert config.notes == ()
    assert foresee_target_modules(pattern, PHI3).modules == PHI3


@pytest.mark.parametrize("pattern", ["(", "(" * 500, "a" * 2_000 + "|b"])
def test_what_is_no_pattern_to_compile_is_said(pattern: str) -> None:
    (problem,) = problems(f"LoraConfig: {{target_modules: '{pattern}'}}")
    assert "regular expression" in problem


def test_target_modules_may_be_a_regular_expression() -> None:
    config = resolve('LoraConfig: {target_modules: "(qkv|o)_proj"}')
    requested = setting(config, "LoraConfig.target_modules")
    assert resolve_target_modules(requested, PHI3).modules == ("qkv_proj", "o_proj")


def test_module_that_the_preset_has_not_is_refused_in_its_line() -> None:
    (problem,) = problems("LoraConfig:\n  target_modules: [qkv_prj]\n")
    assert problem.startswith("config.yaml:3 LoraConfig.target_modules: no linear layer 'qkv_prj'")
    assert 'did you mean "qkv_proj"?' in problem


def test_modules_of_an_unknown_model_are_left_to_the_run() -> None:
    config = resolve("LoraConfig: {target_modules: [Wqkv]}", preset=UNKNOWN_MODEL)
    assert setting(config, "LoraConfig.target_modules") == ["Wqkv"]


@settings(suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no fault of the strategy
@given(st.lists(st.sampled_from([*PHI3, *LLAMA, "lm_head"]), max_size=6), st.sampled_from([PHI3, LLAMA]))
def test_target_modules_are_layers_of_the_model_and_account_for_every_name(
    requested: list[str], modules: tuple[str, ...]
) -> None:
    targets = resolve_target_modules(requested, modules)
    assert set(targets.modules) <= set(modules)
    assert set(targets.modules) | set(targets.left_out) == set(modules)
    assert set(requested) <= {*targets.modules, *targets.renamed, *targets.unmatched}


# ── quantization ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_unwritten_quantization_keys_are_ours() -> None:
    config = resolve("QuantizationConfig: {load_in_4bit: true, bnb_4bit_quant_type: fp4}")
    assert setting(config, "QuantizationConfig.bnb_4bit_quant_type") == "fp4"
    assert setting(config, "QuantizationConfig.bnb_4bit_use_double_quant") is True


def test_eight_bits_take_the_place_of_four() -> None:
    section = resolve("QuantizationConfig: {load_in_8bit: true}").quantization.keywords()
    assert section == {"load_in_4bit": False, "load_in_8bit": True}


def test_lora_does_not_quantize() -> None:
    config = resolve("QuantizationConfig: {load_in_4bit: false, bnb_4bit_quant_type: nf4}", method="lora")
    assert config.quantization.keywords() == {"load_in_4bit": False, "load_in_8bit": False}
    assert any("bnb_4bit_quant_type is ignored" in note for note in config.notes)


@pytest.mark.parametrize(
    ("method", "section", "words"),
    [
        ("lora", "{load_in_4bit: true}", "method lora does not quantize"),
        ("lora", "{load_in_8bit: true}", "method lora does not quantize"),
        ("qlora", "{load_in_4bit: true, load_in_8bit: true}", "are both true"),
        ("qlora", "{load_in_4bit: false}", "load_in_4bit is false"),
        ("qlora", '{load_in_4bit: "true"}', "must be true or false (no quotes), not 'true'"),
        ("qlora", "{load_in_4bit: 1}", "must be true or false"),
    ],
)
def test_method_and_quantization_must_agree(method: str, section: str, words: str) -> None:
    (problem,) = problems(f"QuantizationConfig: {section}", method=method)
    assert problem.startswith("config.yaml:2 QuantizationConfig")
    assert words in problem


# ── types ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("written", ["2e-4", "2E-4", '"2e-4"', "0.0002", "2.0e-4", ".0002"])
def test_kaito_fault_17_a_number_is_a_number_however_it_is_written(written: str) -> None:
    config = resolve(f"TrainingArguments: {{learning_rate: {written}}}")
    assert setting(config, "TrainingArguments.learning_rate") == 2e-4


def test_kaito_fault_17_null_means_unset() -> None:
    config = resolve("TrainingArguments: {learning_rate: null, max_steps: null, seed: ~, data_seed: }")
    assert setting(config, "TrainingArguments.learning_rate") == 2e-4
    assert "max_steps" not in config.arguments.keywords()


def test_kaito_fault_17_nested_maps_arrive() -> None:
    config = resolve("TrainingArguments: {gradient_checkpointing_kwargs: {use_reentrant: false}}")
    assert setting(config, "TrainingArguments.activation_checkpointing_kwargs") == {"use_reentrant": False}


@pytest.mark.parametrize("key", ["learning_rat", "learning"])
def test_kaito_fault_17_the_beginning_of_a_key_is_no_key(key: str) -> None:
    (problem,) = problems(f"TrainingArguments:\n  seed: 1\n  {key}: 0.1\n")
    assert problem.startswith(f"config.yaml:4 TrainingArguments.{key}: unknown key")
    assert key != "learning_rat" or problem.endswith('did you mean "learning_rate"?')


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ("LoraConfig: {r: eight}", "LoraConfig.r: must be a whole number, not 'eight'"),
        ("LoraConfig: {r: '1.2.3'}", "LoraConfig.r: must be a number, not '1.2.3'"),
        ("LoraConfig: {r: 8.5}", "LoraConfig.r: must be a whole number, not 8.5"),
        ("LoraConfig: {r: true}", "LoraConfig.r: must be a whole number, not true"),
        ("LoraConfig: {r: 0}", "LoraConfig.r: must be greater than 0, not 0"),
        ("LoraConfig: {lora_dropout: 1}", "must be from 0 to less than 1"),
        ("LoraConfig: {use_dora: yes please}", "must be true or false"),
        ("LoraConfig: {rank_pattern: [1]}", "must be a map, not [1]"),
        ("LoraConfig: {rank_pattern: {1: 2}}", "LoraConfig.rank_pattern: the key 1 is a number, not text"),
        ("LoraConfig: {target_modules: []}", "must be names of linear layers"),
        ("LoraConfig: {modules_to_save: [1]}", "LoraConfig.modules_to_save: must be a list of names, not [1]"),
        ("LoraConfig: {layers_to_transform: [a]}", "must be a list of whole numbers, not ['a']"),
        ("LoraConfig: {target_modules: '(q'}", "is no regular expression"),
        ("TrainingArguments: {learning_rate: fast}", "must be a number, not 'fast'"),
        ("TrainingArguments: {learning_rate: .inf}", "must be a finite number"),
        ("TrainingArguments: {num_train_epochs: -1}", "must be greater than 0"),
        ("TrainingArguments: {max_steps: 0}", "must be greater than 0, or -1 for epochs, not 0"),
        ("TrainingArguments: {lr_scheduler_type: cosin}", 'did you mean "cosine"?'),
        ("LoraConfig: {init_lora_weights: pissa}", "'pissa' makes the adapter begin with another model"),
        ("LoraConfig: {init_lora_weights: loftq}", "makes the adapter begin with another model"),
        ("LoraConfig: {init_lora_weights: false}", "makes the adapter begin with another model"),
        ("LoraConfig: {loftq_config: {loftq_bits: 4}}", "LoraConfig.loftq_config: is not supported"),
        ("LoraConfig: {alora_invocation_tokens: [1]}", "LoraConfig.alora_invocation_tokens: is not supported"),
        ("LoraConfig: {target_modules: [o_proj, lm_head]}", "modules_to_save trains them whole"),
        ("TrainingArguments: {report_to: wandbb}", 'did you mean "wandb"?'),
        ("TrainingArguments: {report_to: all}", "'all' is none of tensorboard, mlflow, wandb"),
        ("TrainingArguments: {metric_for_best_model: accuracy}", "'accuracy' is none of eval_loss, loss"),
        ("TrainingArguments: {greater_is_better: true}", "is not supported"),
        ("TrainingArguments: {early_stopping_patience: -1}", "must be 0 or more"),
        ("TrainingArguments: {optim: adam}", "TrainingArguments.optim: 'adam' is none of"),
        ("TrainingArguments: {optim: lomo}", "TrainingArguments.optim: 'lomo' is none of"),
        ("TrainingArguments: {optim: schedule_free_adamw}", "'schedule_free_adamw' is none of"),
        ("TrainingArguments: {optim: galore_adamw_layerwise}", "'galore_adamw_layerwise' is none of"),
        ("TrainingArguments: {loss_type: dft}", "'dft' is none of nll, chunked_nll"),
        ("TrainingArguments: {label_smoothing_factor: 0.1}", "is not supported"),
        ("TrainingArguments: {neftune_noise_alpha: 5}", "is not supported"),
        ("TrainingArguments: {report_to: {a: b}}", "must be a list or a text"),
        ("DatasetConfig: {train_test_split: 0}", "must be the share to train on, up to 1 (all), not"),
        ("DatasetConfig: {train_test_split: 80}", "must be the share to train on, up to 1 (all), not"),
        ("DatasetConfig: {over_length: dorp}", 'did you mean "drop"?'),
        ("DatasetConfig: {columns: {body: promt}}", "body: 'promt' is none of messages, prompt"),
        ("DatasetConfig: {columns: {body: [prompt]}}", "is none of messages, prompt"),
        (
            "DatasetConfig: {columns: {a: prompt, b: prompt}}",
            "several columns are said to be the prompt: a, b; prompt_t",
        ),
        ("DatasetConfig: {prompt_template: no column}", "names no column: write one in braces"),
        ('DatasetConfig: {prompt_template: "{a"}', "is no template"),
        ('DatasetConfig: {prompt_template: "{}"}', "a column's name alone stands in braces"),
        ('DatasetConfig: {prompt_template: "{a!r:>9}"}', "a column's name alone stands in braces"),
        ("DatasetConfig: {dataset_extension: webdataset}", "is none of parquet"),
        ("ModelConfig: {torch_dtype: int8}", "is none of bfloat16"),
    ],
)
def test_wrong_value_is_refused_with_its_key(section: str, words: str) -> None:
    (problem,) = problems(section)
    assert words in problem


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        (
            "training-config: {LoraConfig: {r: 8}}",
            "config.yaml:1 training-config: unknown key",
            'mean "training_config"',
        ),
        ("TrainingConfig: {}", 'did you mean "training_config"?', 'did you mean "training_config"?'),
        ("LoraConfig: {r: 8}", "must be a map with the one key training_config", "write training_config: on a line"),
        ("kind: ConfigMap\ndata: {}", "must be a map with the one key", "the text under its key training_config.yaml"),
        ("", "must be a map with the one key training_config", "training_config: {LoraConfig: {r: 32}}"),
        ("training_config: 8", "training_config: must be a map of sections", "the sections are ModelConfig, "),
        ("training_config: {LoraConfig: {rank: 8}}", "LoraConfig.rank: unknown key", "write LoraConfig.r"),
        ("training_config: {LoraConfig: {seed: 8}}", "unknown key", "write TrainingArguments.seed"),
        ("training_config: {TrainingArguments: {lr: 1}}", "unknown key", "write TrainingArguments.learning_rate"),
        (
            "training_config: {DatasetConfig: {zzz: 1}}",
            "unknown key",
            "its keys are bad_row_share, columns, context_column",
        ),
        ("training_config: {LoraConfig: {zzz: 1}}", "unknown key", "its keys are those of peft's LoraConfig"),
    ],
)
def test_a_wrong_key_is_told_the_right_one(text: str, said: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_training_config(method="qlora", preset=Model(), config_map=ConfigSource(text, "config.yaml"))
    (problem,) = caught.value.problems
    assert said in str(problem)
    assert hint in str(problem.hint)


def test_what_is_below_a_misspelt_root_is_checked_too() -> None:
    source = ConfigSource("trainingconfig:\n  LoraConfig: {rr: 8}\n", "config.yaml")
    with pytest.raises(ConfigError) as caught:
        resolve_training_config(method="qlora", preset=Model(), config_map=source)
    assert [problem.line for problem in caught.value.problems] == [1, 2]


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        ("r=8", "write LoraConfig.r"),
        ("learning_rate=1e-4", "write TrainingArguments.learning_rate"),
        ("lora.r=8", "write LoraConfig.r"),
        ("epochs=1", "write TrainingArguments.num_train_epochs"),
        ("zzz=1", "for example --set LoraConfig.r=32"),
        ("ModelConfig.chat_template={{ x", "--set ModelConfig.chat_template=FILE takes it from a file"),
    ],
)
def test_a_typed_key_without_its_section_is_told_it(typed: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_training_config(method="qlora", preset=Model(), overrides=(typed,))
    assert caught.value.hint == hint


@pytest.mark.parametrize(
    "value",
    ["\x00", "\x07", "[" * 2000, "1" * 5000, "!!timestamp x", "!!binary zzz", "!foo 1", "&a [*a]", "{[a]: b}", "{"],
)
def test_what_no_yaml_reader_takes_is_a_problem_with_its_line(value: str) -> None:
    text = f"training_config:\n  LoraConfig:\n    r: {value}\n"
    with pytest.raises(ConfigError) as caught:
        resolve_training_config(method="qlora", preset=Model(), config_map=ConfigSource(text, "config.yaml", 10))
    (problem,) = caught.value.problems
    assert problem.line in (12, 13)
    with pytest.raises(ConfigError, match=r"^--set LoraConfig\.r: "):
        resolve_training_config(method="qlora", preset=Model(), overrides=(f"LoraConfig.r={value}",))


@pytest.mark.parametrize("written", ["no", '"no"', "off"])
def test_a_word_that_yaml_takes_for_false_stays_a_word(written: str) -> None:
    found = resolve(f"TrainingArguments: {{run_name: {written}}}").arguments.run_name
    assert found == written.strip('"')


@pytest.mark.parametrize("revision", ["1e5", "1e5abc", "0012", "2024-01-01", "main", "9" * 40, "1e" + "9" * 38])
def test_a_revision_that_looks_like_a_number_stays_a_text(revision: str) -> None:
    assert resolve(f"ModelConfig: {{revision: {revision}}}").model.revision == revision


def test_kaito_fault_14_a_chat_template_stays_as_written() -> None:
    template = "{% for m in messages %}\n  «{{ m['content'] }}» — Ünïcode 你好 \\n\n{% endfor %}\n"
    text = yaml.safe_dump({"training_config": {"ModelConfig": {"chat_template": template}}}, allow_unicode=True)
    config = resolve_training_config(method="qlora", preset=Model(), config_map=ConfigSource(text, "config.yaml"))
    assert setting(config, "ModelConfig.chat_template") == template
    assert TrainingConfig.model_validate_json(config.model_dump_json()).model.chat_template == template


@pytest.mark.parametrize(
    ("written", "directory"),
    [("/mnt/out", "/mnt/out"), ("out/a", "/mnt/out/a"), ("/mnt/a/../b/", "/mnt/b"), ("./out", "/mnt/out")],
)
def test_output_directory_is_below_mnt(written: str, directory: str) -> None:
    config = resolve(f"TrainingArguments: {{output_dir: {written}}}")
    assert setting(config, "TrainingArguments.output_dir") == directory


@pytest.mark.parametrize("written", ["/mnt", "/mnt/", "/tmp/out", "../out", "/mnt/../etc", "/mnt2/out", "."])
def test_output_directory_elsewhere_is_refused(written: str) -> None:
    (problem,) = problems(f"TrainingArguments: {{output_dir: {written}}}")
    assert "must be a directory below /mnt" in problem


# ── keys of older libraries ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "section", "key", "value"),
    [
        ("TrainingArguments: {evaluation_strategy: steps}", "TrainingArguments", "eval_strategy", "steps"),
        ("TrainingArguments: {evaluation_strategy: no}", "TrainingArguments", "eval_strategy", "no"),
        ("TrainingArguments: {max_seq_length: 2048}", "TrainingArguments", "max_length", 2048),
        ("TrainingArguments: {warmup_ratio: 0.1}", "TrainingArguments", "warmup_steps", 0.1),
        ("TrainingArguments: {warmup_ratio: '5e-2'}", "TrainingArguments", "warmup_steps", 0.05),
        (
            "TrainingArguments: {group_by_length: true}",
            "TrainingArguments",
            "train_sampling_strategy",
            "group_by_length",
        ),
        (
            "TrainingArguments: {per_gpu_train_batch_size: 2}",
            "TrainingArguments",
            "per_device_train_batch_size",
            2,
        ),
        ("TrainingArguments: {no_cuda: true}", "TrainingArguments", "use_cpu", True),
        ("TrainingArguments: {adafactor: true}", "TrainingArguments", "optim", "adafactor"),
        ("TrainingArguments: {dataset_text_field: body}", "DatasetConfig", "response_column", "body"),
        ("ModelConfig: {torch_dtype: torch.float16}", "ModelConfig", "dtype", "float16"),
        ("TrainingArguments: {gradient_checkpointing: false}", "TrainingArguments", "activation_checkpointing", False),
    ],
)
def test_renamed_key_is_translated_and_said(written: str, section: str, key: str, value: object) -> None:
    config = resolve(written)
    assert setting(config, f"{section}.{key}") == value
    assert f"{section}.{key}" in config.origins
    (note,) = config.notes
    assert f"is now {section}.{key}" in note


@pytest.mark.parametrize("written", ["{group_by_length: false}", "{adafactor: false}", "{dataset_text_field: text}"])
def test_old_key_at_its_default_changes_nothing(written: str) -> None:
    assert resolve(f"TrainingArguments: {written}").sections() == resolve().sections()


@pytest.mark.parametrize("written", ["auto", "torch.auto"])
def test_dtype_auto_is_left_to_the_gpu(written: str) -> None:
    assert resolve(f"ModelConfig: {{torch_dtype: {written}}}").model.dtype is None


@pytest.mark.parametrize(("share", "said"), [(0.2, True), (0.5, False), (0.95, False), (1, False)])
def test_a_split_that_holds_out_the_most_is_said(share: float, said: bool) -> None:
    notes = resolve(f"DatasetConfig: {{train_test_split: {share}}}").notes
    assert any("0.2 is the share that is trained on: 80% of the rows are held out" in note for note in notes) is said


def test_a_warmup_ratio_of_one_or_more_is_refused() -> None:
    assert "must be from 0 to less than 1" in problems("TrainingArguments: {warmup_ratio: 1}")[0]


def test_a_key_under_its_old_and_its_new_name_is_refused() -> None:
    (problem,) = problems("TrainingArguments:\n  max_length: 10\n  max_seq_length: 20\n")
    assert problem.startswith("config.yaml:4 TrainingArguments.max_seq_length: ")
    assert problem.endswith("TrainingArguments.max_length (config.yaml:3) is the same setting")


@pytest.mark.parametrize(("new", "old"), [("true", "false"), ("false", "true"), ("true", "true")])
@pytest.mark.parametrize("is_first", [True, False])
def test_both_names_of_activation_checkpointing_are_refused(new: str, old: str, is_first: bool) -> None:
    """One was read by `tuner plan`, the other by the training."""
    lines = [f"  activation_checkpointing: {new}\n", f"  gradient_checkpointing: {old}\n"]
    (problem,) = problems("TrainingArguments:\n" + "".join(lines if is_first else reversed(lines)))
    assert problem.endswith("checkpointing (config.yaml:3) is the same setting")
    typed = [f"TrainingArguments.activation_checkpointing={new}", f"TrainingArguments.gradient_checkpointing={old}"]
    (problem,) = problems(None, *typed)
    assert problem.endswith("TrainingArguments.activation_checkpointing (--set) is the same setting")


def test_what_is_typed_wins_over_the_other_name_in_the_file() -> None:
    config = resolve(
        "TrainingArguments: {gradient_checkpointing: true}", "TrainingArguments.activation_checkpointing=false"
    )
    assert config.arguments.activation_checkpointing is False
    taken_back = resolve(
        "TrainingArguments: {activation_checkpointing: true}", "TrainingArguments.gradient_checkpointing=null"
    )
    assert taken_back.arguments.activation_checkpointing is None


@pytest.mark.train
def test_every_alias_that_the_libraries_know_is_one_setting_here() -> None:
    """Else both of its names could be written, and each be read somewhere."""
    from dataclasses import fields

    from peft import LoraConfig
    from trl import SFTConfig

    aliases = {}
    for section, kind in (("TrainingArguments", SFTConfig), ("LoraConfig", LoraConfig)):
        for field in fields(kind):
            if found := re.search(r"[Dd]eprecated alias of `(\w+)`", str(field.metadata.get("help"))):
                aliases[f"{section}.{field.name}"] = f"{section}.{found[1]}"
    assert aliases
    assert {old: RENAMED[old][0] for old in aliases if old in RENAMED} == aliases


@pytest.mark.parametrize("path", IGNORED)
def test_ignored_key_is_said_and_changes_nothing(path: str) -> None:
    section, _, key = path.partition(".")
    config = resolve(f"{section}: {{{key}: true}}")
    assert config.sections() == resolve().sections()
    (note,) = config.notes
    assert note.startswith(f"{path} is ignored: ")


def test_data_collator_is_said_to_be_ours() -> None:
    config = resolve("DataCollator: {mlm: true}")
    assert "DataCollator" not in config.sections()
    assert config.notes == (
        "DataCollator.mlm is ignored: the assistant's tokens and the end of its turn are learnt, nothing else",
    )


@pytest.mark.parametrize("path", REFUSED)
def test_key_that_would_change_the_run_unseen_is_refused_with_the_way_to_write_it(path: str) -> None:
    section, _, key = path.partition(".")
    with pytest.raises(ConfigError, match="is not supported") as caught:
        resolve(f"{section}: {{{key}: s3cret-value}}")
    assert caught.value.hint
    assert "s3cret-value" not in str(caught.value)
    assert resolve(f"{section}: {{{key}: false}}").sections() == resolve().sections()


# ── the file as a whole ──────────────────────────────────────────────────────────────────────────────────────────────


def test_all_problems_come_at_once_in_the_order_of_the_file() -> None:
    found = problems(
        """
        LoraConfig:
          r: none
          lora_alfa: 8
        LoRAConfig: {r: 8}
        TrainingArguments:
          learning_rat: 0.1
          output_dir: /tmp
        QuantizationConfig: {load_in_4bit: false}
        """,
        "LoraConfig.rr=3",
        "nonsense",
    )
    places = [problem.split(": ")[0] for problem in found]
    assert places == [
        "config.yaml:3 LoraConfig.r",
        "config.yaml:4 LoraConfig.lora_alfa",
        "config.yaml:5",
        "config.yaml:7 TrainingArguments.learning_rat",
        "config.yaml:8 TrainingArguments.output_dir",
        "config.yaml:9 QuantizationConfig",
        "--set LoraConfig.rr",
        "--set",
    ]


def test_unknown_section_is_refused_as_kaito_says_it() -> None:
    (problem,) = problems("LoraCfg: {r: 8}")
    assert problem == 'config.yaml:2: Unrecognized section: LoraCfg, did you mean "LoraConfig"?'


@pytest.mark.parametrize("text", ["", "- a", "just words", "training: {}", "training_config:", "training_config: []"])
def test_a_file_without_training_config_is_refused(text: str) -> None:
    source = ConfigSource(text, "config.yaml", first_line=7)
    with pytest.raises(ConfigError, match=r"^config\.yaml:7"):
        resolve_training_config(method="qlora", preset=Model(), config_map=source)


def test_broken_yaml_is_refused_with_its_line() -> None:
    source = ConfigSource("training_config:\n  LoraConfig: {r: 8\n  x", "config.yaml", first_line=11)
    with pytest.raises(ConfigError, match=r"^config\.yaml:13: not YAML"):
        resolve_training_config(method="qlora", preset=Model(), config_map=source)


def test_yaml_that_makes_objects_is_refused() -> None:
    (problem,) = problems("LoraConfig: {r: !!python/object/apply:os.getcwd []}")
    assert problem == "config.yaml:2 LoraConfig.r: the YAML tag !!python/object/apply:os.getcwd means nothing here"


def test_key_written_twice_is_refused() -> None:
    (problem,) = problems("LoraConfig:\n  r: 8\n  r: 16\n")
    assert problem == "config.yaml:4 LoraConfig.r: written twice, on lines 3 and 4"


@pytest.mark.parametrize("key", ["cache_dir", "nonsense", "dtype"])
def test_key_written_twice_is_refused_whatever_the_key_means(key: str) -> None:
    (*_, problem) = problems(f"ModelConfig: {{{key}: float16, {key}: float16}}\n")
    assert problem == f"config.yaml:2 ModelConfig.{key}: written twice, on line 2"


def test_a_configuration_of_two_documents_is_refused() -> None:
    source = ConfigSource("training_config: {}\n---\ntraining_config: {}\n", "config.yaml")
    with pytest.raises(ConfigError, match=r"^config\.yaml:3: a second YAML document, and one is read$"):
        resolve_training_config(method="qlora", preset=Model(), config_map=source)


def test_merged_maps_are_read_and_the_own_key_wins() -> None:
    config = resolve("LoraConfig:\n  <<: {r: 8, lora_alpha: 4}\n  lora_alpha: 2\n")
    assert (setting(config, "LoraConfig.r"), setting(config, "LoraConfig.lora_alpha")) == (8, 2)


def test_empty_sections_are_allowed() -> None:
    assert resolve("DataCollator:\nLoraConfig: {}\n").sections() == resolve().sections()


# ── --set ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("typed", "section", "key", "value"),
    [
        ("LoraConfig.r=32", "LoraConfig", "r", 32),
        ("TrainingArguments.learning_rate=1e-4", "TrainingArguments", "learning_rate", 1e-4),
        ("LoraConfig.target_modules=[qkv_proj]", "LoraConfig", "target_modules", ["qkv_proj"]),
        ("TrainingArguments.save_strategy=no", "TrainingArguments", "save_strategy", "no"),
        ("ModelConfig.chat_template=a=b", "ModelConfig", "chat_template", "a=b"),
        ("TrainingArguments.max_seq_length=64", "TrainingArguments", "max_length", 64),
    ],
)
def test_what_is_typed_wins_over_the_file(typed: str, section: str, key: str, value: object) -> None:
    config = resolve("LoraConfig: {r: 8}\nTrainingArguments: {max_length: 10}", typed)
    assert setting(config, f"{section}.{key}") == value
    assert config.origin(f"{section}.{key}") == "--set"


@pytest.mark.parametrize("typed", ["LoraConfig.r=", "LoraConfig.r=null"])
def test_a_typed_null_takes_back_what_the_file_says(typed: str) -> None:
    config = resolve("LoraConfig: {r: 8}", typed)
    assert (setting(config, "LoraConfig.r"), ("LoraConfig.r" in config.origins)) == (16, False)


@pytest.mark.parametrize("typed", ["r=32", "LoraConfig=3", "LoraConfig.r", "Lora.r=3", "LoraConfig.r=[", ""])
def test_what_cannot_be_set_is_refused(typed: str) -> None:
    (problem,) = problems(None, typed)
    assert problem.startswith("--set")


# ── the lists of fields ──────────────────────────────────────────────────────────────────────────────────────────────


def test_tables_of_old_keys_name_sections_and_keys_that_exist() -> None:
    types = {section: TYPES.get(section, {}) | dict(OWN_TYPES.get(section, {})) for section in SECTIONS}
    for path, (name, _) in RENAMED.items():
        section, _, key = name.partition(".")
        assert key in types[section], path
        is_theirs = path.endswith("dataset_text_field") or "gradient_checkpointing" in path
        assert path.partition(".")[2] not in types[path.partition(".")[0]] or is_theirs
    assert not set(IGNORED) & set(REFUSED) | set(RENAMED) & (set(IGNORED) | set(REFUSED))


def test_importing_imports_no_torch() -> None:
    code = "import sys, tuner.training_config, tuner.presets; print('torch' in sys.modules, 'peft' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.train
def test_field_lists_are_those_of_the_installed_classes() -> None:
    folder = Path(__file__).parent.parent
    sys.path.insert(0, str(folder / "scripts"))
    try:
        from generate_training_fields import render, training_fields
    finally:
        sys.path.pop(0)
    written = (folder / "tuner" / "training_fields.py").read_text(encoding="utf-8")
    assert written == render(training_fields()), "run scripts/generate_training_fields.py"


@pytest.mark.train
# trl's own default for gradient_checkpointing goes by a name that transformers is giving up
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_the_installed_classes_take_our_defaults(tmp_path: Path) -> None:
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig

    config = resolve(KAITO_TEMPLATE)
    LoraConfig(**config.lora.keywords())
    BitsAndBytesConfig(**config.quantization.keywords())
    ours = {*OWN_TYPES["TrainingArguments"], "load_best_model_at_end"}  # what the Trainer is not asked for
    theirs = {key: value for key, value in config.arguments.keywords().items() if key not in ours}
    of_the_run = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "warmup_steps": DEFAULT_WARMUP_SHARE}
    assert SFTConfig(**theirs | of_the_run).get_warmup_steps(1000) == 30
