"""Preset name, alias, Hugging Face id or model directory → Preset: what is known of a base model before any download.

A preset is one file of `presets/`, named as the preset. `based_on` names another that it equals but for what it says:
`config` is merged key by key, everything else is replaced.
"""

import json
import re
from collections.abc import Sequence
from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tuner.data import data_dir
from tuner.errors import ConfigError, InputMissingError
from tuner.yaml_lines import read_documents

HUB_ID = re.compile(r"(?!.*(--|\.\.))[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)

# Names KAITO serves under but has no tuning parameters for, and whose hub id is beyond doubt.
SERVED_ONLY = MappingProxyType(
    {
        "llama-3.3-70b-instruct": "meta-llama/Llama-3.3-70B-Instruct",
        "deepseek-r1-distill-llama-8b": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
        "deepseek-r1-distill-qwen-14b": "deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        "gpt-oss-20b": "openai/gpt-oss-20b",
        "gpt-oss-120b": "openai/gpt-oss-120b",
        "gemma-3-4b-instruct": "google/gemma-3-4b-it",
        "gemma-3-27b-instruct": "google/gemma-3-27b-it",
    }
)
# Presets of KAITO's earlier releases that its own examples still name.
REMOVED = MappingProxyType(
    {
        "falcon-7b": "tiiuae/falcon-7b",
        "falcon-7b-instruct": "tiiuae/falcon-7b-instruct",
        "falcon-40b": "tiiuae/falcon-40b",
        "falcon-40b-instruct": "tiiuae/falcon-40b-instruct",
        "phi-2": "microsoft/phi-2",
    }
)


class Preset(BaseModel):
    """A base model. Of one that only its id is known of, `config`, `linear_modules` and the tokens are empty."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    model_id: str = Field(description="Hugging Face id, or the name of a local directory")
    aliases: tuple[str, ...] = ()
    revision: str | None = Field(default=None, description="the commit that the facts were read at")
    architecture: str | None = Field(default=None, description="class in transformers")
    licence: str | None = None
    gated: bool = Field(default=False, description="the hub asks for a token of somebody who agreed to the licence")
    weights_gib: float | None = Field(default=None, description="the safetensors files, as downloaded")
    linear_modules: tuple[str, ...] = Field(default=(), description="the linear layers of one block")
    config: dict[str, Any] = Field(default_factory=dict, description="config.json, in its own key names")
    chat_template: str | None = Field(default=None, description="Jinja; a real run prefers the tokenizer's own")
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None
    special_tokens: tuple[str, ...] = Field(default=(), description="all that the template and the tokens above use")

    @property
    def hub_revision(self) -> str:
        """What to ask the hub for: the pinned commit, or whatever `main` is today."""
        return self.revision or "main"

    @property
    def context_length(self) -> int | None:
        return self._number("max_position_embeddings")

    @property
    def layers(self) -> int | None:
        return self._number("num_hidden_layers")

    @property
    def hidden_size(self) -> int | None:
        return self._number("hidden_size")

    @property
    def vocabulary(self) -> int | None:
        return self._number("vocab_size")

    def _number(self, key: str) -> int | None:
        # A model that also sees keeps its language part's numbers one level down.
        value = self.config.get(key, self.config.get("text_config", {}).get(key))
        return value if isinstance(value, int) else None


def load_presets() -> dict[str, Preset]:
    """Every preset by name, sorted."""
    return dict(_presets())


@cache
def _presets() -> MappingProxyType[str, Preset]:
    folder = data_dir("presets")
    written = {path.stem: _read_preset(path) for path in sorted(folder.glob("*.yaml"))}
    if not written:
        raise ConfigError(f"{folder}: no presets there", hint="install the package again")
    return MappingProxyType({name: _build_preset(folder, name, written) for name in written})


def _read_preset(path: Path) -> dict[str, Any]:
    documents, problems = read_documents(path.read_text(encoding="utf-8"), str(path))
    problems += [each.problem(fault) for each in documents for fault in each.faults]
    if problems:
        raise ConfigError.of(problems)
    if len(documents) != 1:
        raise ConfigError(f"{path}: must be a map")
    return dict(documents[0].mapping)


def _build_preset(folder: Path, name: str, written: dict[str, dict[str, Any]]) -> Preset:
    try:
        return Preset(name=name, **_inherit(name, written))
    except KeyError as error:
        raise ConfigError(f"{folder / name}.yaml: based_on: no preset {error}") from error
    except ValidationError as error:
        raise ConfigError(f"{folder / name}.yaml: {error}") from error


def _inherit(name: str, written: dict[str, dict[str, Any]]) -> dict[str, Any]:
    own = dict(written[name])
    if "based_on" not in own:
        return own
    # Aliases are names of one model; a commit is one model's too.
    base = _inherit(own.pop("based_on"), written) | {"aliases": (), "revision": None}
    return base | own | {"config": _merge(base["config"], own.get("config", {}))}


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        both_are_maps = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _merge(base[key], value) if both_are_maps else value
    return merged


def find_preset(name: str) -> Preset:
    """The preset that `name` means: a preset's name, an alias or hub id of one in any case, or any `org/name`.

    Raises ConfigError for anything else. Nothing is asked of the hub.
    """
    presets = _presets()
    by_word = {
        word.lower(): preset for preset in presets.values() for word in (preset.name, preset.model_id, *preset.aliases)
    }
    wanted = name.strip().lower()
    if wanted in by_word:
        return by_word[wanted]
    if wanted in SERVED_ONLY:
        return _unknown(SERVED_ONLY[wanted])
    if wanted in REMOVED:
        raise ConfigError(
            f"preset {name!r} was removed from KAITO, although its examples still name it",
            hint=f"write the Hugging Face id {REMOVED[wanted]}; {_listing(_nearest(wanted))}",
        )
    if HUB_ID.fullmatch(name.strip()):
        return _unknown(name.strip())
    near = _nearest(wanted)
    raise ConfigError(
        f"no preset {name!r}" + (f', did you mean "{near[0]}"?' if near else ""),
        hint=f"{_listing(near[1:])}; any Hugging Face id org/name works too",
    )


_SHOWN = 3


def _listing(near: Sequence[str]) -> str:
    """`near it: phi-4, phi-4-mini-instruct; tuner presets lists all`"""
    return (f"near it: {', '.join(near[:_SHOWN])}; " if near else "") + "tuner presets lists all"


def _nearest(wanted: str) -> list[str]:
    """Names that resemble it or are of its family, the nearest first: llama3 is near llama-3.1-8b-instruct."""
    names = dict.fromkeys((*_presets(), *SERVED_ONLY))
    written = _in_words(wanted)
    likeness = {name: SequenceMatcher(None, written, _in_words(name)).ratio() for name in names}
    family = written.partition("-")[0]
    found = [name for name in names if likeness[name] >= 0.6 or (family and _in_words(name).startswith(f"{family}-"))]
    return sorted(found, key=lambda name: (not _in_words(name).startswith(written), -likeness[name]))


def _in_words(name: str) -> str:
    """`Phi3 mini-4k` → `phi-3-mini-4-k`: people leave out and put in what stands between letters and numbers."""
    return "-".join(re.findall(r"[a-z]+|[0-9.]+", name.lower()))


def _unknown(model_id: str) -> Preset:
    return Preset(name=model_id, model_id=model_id)


def preset_from_directory(path: Path) -> Preset:
    """What the config.json of a model directory says; its linear modules and chat template are found when it is loaded.

    The name is the directory's own, never its path: equal models make equal runs wherever they lie.
    """
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputMissingError(
            f"{path}: no model there, config.json is missing",
            hint="name a directory with config.json, safetensors weights and a tokenizer",
        ) from error
    except ValueError as error:
        raise ConfigError(f"{file}: not JSON: {error}") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ConfigError(f"{file}: no model_type", hint="this is not the config.json of a transformers model")
    architectures = config.get("architectures") or [None]
    name = path.resolve().name
    return Preset(name=name, model_id=name, architecture=architectures[0], config=config)
