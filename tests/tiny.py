"""Tokenizers and models small enough for tests, of every preset's kind."""

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import pytest
import yaml
from data_files import Rows, write_data

from tuner.presets import find_preset
from tuner.request import Request, build_run
from tuner.runspec import Fetched, Prepared, Progress, Reporter, RunSpec, Secrets, Silent
from tuner.workspace import WorkspaceFile, make_workspace

WORDS = (
    "The quick brown fox jumps over the lazy dog. What is 2 + 2? It is 4.",
    "Grüße aus Zürich, 你好世界, привет, 🙂 emoji and\nnew lines\n\nand tabs\t.",
    "system user assistant tool function arguments name get_weather city Paris",
)


@cache
def tiny_tokenizer(preset_name: str, chat_template: str | None = None) -> Any:
    """A byte-level tokenizer with the preset's special tokens, and its chat template unless another is given."""
    from tuner.pipeline.tiny_model import make_tiny_tokenizer

    tokenizer = make_tiny_tokenizer(find_preset(preset_name), WORDS)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer


# ── a run on a tiny model ────────────────────────────────────────────────────────────────────────────────────────────

_ANIMALS = ("cat", "dog", "fox", "owl", "bee", "cow", "hen", "pig", "rat", "yak")
SHAPES = ("messages", "prompt/completion", "text")


def rows_of(shape: str, count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Questions with one kind of answer, which a tiny model learns in a few steps; lengths differ."""
    rows: list[dict[str, Any]] = []
    for number in range(first, first + count):
        animal = _ANIMALS[number % len(_ANIMALS)]
        question = f"There is one {animal}." + " And then?" * (number % 4) + f" What if there are {number}?"
        answer = f"Then there are {number} {animal}s."
        match shape:
            case "messages":
                turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.append({"messages": turns})
            case "prompt/completion":
                rows.append({"prompt": question + " ", "completion": answer})
            case _:
                rows.append({"text": f"{question} {answer}"})
    return rows


@cache
def one_thread() -> None:
    """Threads that wait for each other cost a tiny model on a busy machine ten times what they give."""
    import torch

    torch.set_num_threads(1)


@cache
def tiny_base(preset_name: str = "phi-3-mini-4k-instruct") -> Path:
    """A tiny model of the preset's architecture on disk, made once for all tests."""
    from tuner.pipeline.libraries import quiet
    from tuner.pipeline.tiny_model import make_tiny_model

    quiet()
    one_thread()
    directory = Path(tempfile.mkdtemp(prefix="tiny-base-"))
    atexit.register(shutil.rmtree, directory)
    texts = [message["content"] for row in rows_of("messages", 60) for message in row["messages"]]
    make_tiny_model(find_preset(preset_name), [*texts, *WORDS], directory, vocabulary=600)
    return directory


@dataclass(frozen=True)
class Job:
    """A run that nothing was done of yet."""

    spec: RunSpec
    secrets: Secrets
    work_dir: Path


def make_job(
    directory: Path,
    data: Rows | Path | Sequence[Path],
    config: Mapping[str, Mapping[str, Any]] = MappingProxyType({}),
    *,
    preset: str = "phi-3-mini-4k-instruct",
    method: str = "qlora",
    output: str | None = None,
    **request: Any,
) -> Job:
    """What `tuner run --model preset --data …` builds, with the work directory `directory`/work.

    `data` are rows, or paths to them. The base is `tiny_base(preset)` unless `request` asks for a smoke run or names
    another. `config` are the sections of training_config.yaml.
    """
    one_thread()
    directory.mkdir(parents=True, exist_ok=True)
    paths = [data] if isinstance(data, Path) else [each for each in data if isinstance(each, Path)]
    if not paths:
        paths = [write_data(directory / "train.parquet", cast(Rows, data))]
    if config:
        path = directory / "training_config.yaml"
        path.write_text(yaml.safe_dump({"training_config": {key: dict(value) for key, value in config.items()}}))
        request["config"] = path
    if not request.get("smoke") and "base_model" not in request:
        request["base_model"] = tiny_base(preset)
    destination = output or str(directory / "adapter")
    file = WorkspaceFile(make_workspace(preset, [str(path) for path in paths], destination, method, "tiny-run"))
    work_dir = directory / "work"
    run = build_run(file, Request(output=destination, **request), work_dir, {})
    return Job(run.spec, run.secrets, work_dir)


class Heard:
    """A Reporter that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self.steps: list[Progress] = []

    def note(self, line: str) -> None:
        self.notes.append(line)

    def warn(self, line: str) -> None:
        self.warnings.append(line)

    def progress(self, progress: Progress) -> None:
        if progress.unit == "steps":
            self.steps.append(progress)


@contextmanager
def stopped_in_the_first_step() -> Iterator[None]:
    """Whoever trains in the block is asked to stop while the first step is taken, of a resumed run the next one."""
    from tuner.pipeline.train import _Trainer

    step = _Trainer.training_step

    def stopped(trainer: _Trainer, *args: Any) -> Any:
        trainer.stop.requested = True
        return step(trainer, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Trainer, "training_step", stopped)
        yield


def prepared_job(job: Job, reporter: Reporter | None = None) -> tuple[Fetched, Prepared]:
    """Fetch and prepare."""
    from tuner.pipeline.fetch import fetch
    from tuner.pipeline.prepare import prepare

    job.work_dir.mkdir(parents=True, exist_ok=True)
    fetched = fetch(job.spec, job.secrets, job.work_dir, Silent())
    return fetched, prepare(job.spec, fetched, job.work_dir, reporter or Silent())


def of_the_first_format(adapter: Path, *, base: str | None = None) -> Path:
    """The adapter directory as tuner wrote it before format 2: no canary, no digests, `base` wherever it lay."""
    (adapter / "canary.json").unlink()
    lock = json.loads((adapter / "run.lock.json").read_text(encoding="utf-8"))
    for key in ("format", "files", "tensors_sha256", "lock_sha256", "row_formats", "quantization"):
        del lock[key]
    if lock["base_model"]:
        del lock["base_model"]["title"]
    (adapter / "run.lock.json").write_text(json.dumps(lock | {"version": 1}), encoding="utf-8")
    config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | ({"base_model_name_or_path": base} if base else {})), encoding="utf-8"
    )
    return adapter
