"""Writes tuner/training_fields.py from the installed trl, peft and transformers.

    python scripts/generate_training_fields.py

Run it after raising a version; a test says when the file and the installed classes differ.
"""

import dataclasses
import enum
import inspect
import types
import typing
from pathlib import Path

from peft import LoraConfig
from transformers import BitsAndBytesConfig, DataCollatorForLanguageModeling
from transformers.trainer_utils import IntervalStrategy, SaveStrategy, SchedulerType
from transformers.training_args import OptimizerNames
from trl import SFTConfig

TARGET = Path(__file__).parent.parent / "tuner" / "training_fields.py"
HEADER = '''"""What SFTConfig, LoraConfig, BitsAndBytesConfig and the data collator take: generated, do not edit.

    python scripts/generate_training_fields.py

TYPES: section → key → the types YAML may give it, joined by " | "; null, which means unset, is not named.
CHOICES: the words an enumeration knows.
"""

'''
# BitsAndBytesConfig has no annotations: the default's type is the key's, but where the default is None.
BITSANDBYTES_UNTYPED = {
    "llm_int8_skip_modules": "list",
    "bnb_4bit_compute_dtype": "str",
    "bnb_4bit_quant_storage": "str",
}
ENUMERATIONS: tuple[type[enum.Enum], ...] = (IntervalStrategy, SaveStrategy, SchedulerType, OptimizerNames)
PLAIN = {bool: "bool", int: "int", float: "float", str: "str"}


def type_words(annotation: object) -> set[str]:
    """The YAML types an annotation allows; a class of the library's own is written as a map."""
    if annotation is type(None):
        return set()
    if annotation in PLAIN:
        return {PLAIN[typing.cast("type", annotation)]}
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        return set().union(*(type_words(part) for part in typing.get_args(annotation)))
    if origin is typing.Literal:
        return {PLAIN[type(value)] for value in typing.get_args(annotation)}
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return {"str"}
    if (origin or annotation) in (list, tuple):
        return {"list"}
    return {"dict"}


def dataclass_types(cls: type) -> dict[str, str]:
    hints = typing.get_type_hints(cls)
    return {field.name: " | ".join(sorted(type_words(hints[field.name]))) for field in dataclasses.fields(cls)}


def bitsandbytes_types() -> dict[str, str]:
    parameters = inspect.signature(BitsAndBytesConfig.__init__).parameters
    named = [p for p in parameters.values() if p.name != "self" and p.kind is not inspect.Parameter.VAR_KEYWORD]
    return {p.name: BITSANDBYTES_UNTYPED.get(p.name) or PLAIN[type(p.default)] for p in named}


def collator_types() -> dict[str, str]:
    found = dataclass_types(DataCollatorForLanguageModeling)
    del found["tokenizer"]  # ours to give
    return found


def choices(cls: type) -> dict[str, tuple[str, ...]]:
    """The words of every key that takes only some: an enumeration's, literal ones, or those of its command line."""
    found = {}
    for name, hint in typing.get_type_hints(cls).items():
        if typing.get_origin(hint) is typing.Literal:
            found[name] = typing.get_args(hint)
        for part in typing.get_args(hint):
            if part in ENUMERATIONS:
                found[name] = tuple(member.value for member in part)
    named = {field.name: field.metadata["choices"] for field in dataclasses.fields(cls) if "choices" in field.metadata}
    return found | {name: tuple(words) for name, words in named.items()}


def training_fields() -> dict[str, dict[str, dict[str, typing.Any]]]:
    return {
        "TYPES": {
            "QuantizationConfig": bitsandbytes_types(),
            "LoraConfig": dataclass_types(LoraConfig),
            "TrainingArguments": dataclass_types(SFTConfig),
            "DataCollator": collator_types(),
        },
        "CHOICES": {"LoraConfig": choices(LoraConfig), "TrainingArguments": choices(SFTConfig)},
    }


def render(fields: dict[str, dict[str, dict[str, typing.Any]]]) -> str:
    lines = []
    for constant, value_type in (("TYPES", "str"), ("CHOICES", "tuple[str, ...]")):
        lines.append(f"{constant}: dict[str, dict[str, {value_type}]] = {{")
        for section, keys in fields[constant].items():
            lines.append(f'    "{section}": {{')
            for key, value in sorted(keys.items()):
                lines += _entry(key, value)
            lines.append("    },")
        lines.append("}\n")
    return HEADER + "\n".join(lines).rstrip("\n") + "\n"


def _entry(key: str, value: str | tuple[str, ...]) -> list[str]:
    if isinstance(value, str):
        return [f'        "{key}": "{value}",']
    return [f'        "{key}": (', *(f'            "{word}",' for word in value), "        ),"]


if __name__ == "__main__":
    TARGET.write_text(render(training_fields()), encoding="utf-8")
    print(f"wrote {TARGET}")
