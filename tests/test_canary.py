"""canary.json: what base and adapter answer to fixed sentences, measured on the files that are pushed."""

import gc
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tiny import Heard, Job, make_job, prepared_job, rows_of, tiny_base

from tuner.errors import ConfigError, GateError
from tuner.records import Canary, RunLock
from tuner.runspec import Prepared, Trained

pytestmark = pytest.mark.train

SHORT = {"max_steps": 4, "learning_rate": 0.02, "gradient_accumulation_steps": 2, "warmup_steps": 0}


def train_one(
    directory: Path, rows: Any = None, heard: Heard | None = None, **request: Any
) -> tuple[Job, Prepared, Trained]:
    from tuner.pipeline.run import train

    config = {"TrainingArguments": SHORT, **request.pop("config", {})}
    job = make_job(directory, rows or rows_of("messages", 40), config, **request)
    fetched, prepared = prepared_job(job)
    return job, prepared, train(job.spec, fetched, prepared, job.work_dir, heard or Heard())


def canary_of(job: Job, trained: Trained) -> Canary:
    return Canary.model_validate_json((job.work_dir / trained.adapter_dir / "canary.json").read_bytes())


def lock_of(job: Job, trained: Trained) -> RunLock:
    return RunLock.model_validate_json((job.work_dir / trained.adapter_dir / "run.lock.json").read_bytes())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Prepared, Trained, Heard]:
    heard = Heard()
    return *train_one(tmp_path_factory.mktemp("canary"), heard=heard), heard


def likelihood(model: Any, ids: list[int]) -> float:
    """Of one row alone, as transformers itself reckons a loss."""
    import torch

    row = torch.tensor([ids])
    with torch.no_grad():
        return -float(model(input_ids=row, labels=row).loss)


def adapted(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).eval()


def test_the_likelihoods_are_those_of_the_saved_adapter_on_either_base(finished: Any) -> None:
    """One sentence at a time, by transformers' own loss."""
    import torch
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import load_base_model, pick_device

    job, _, trained, _ = finished
    canary = canary_of(job, trained)
    assert canary.compute_dtypes == {"nf4": "float32", "bfloat16": "bfloat16"}
    assert canary.trained_in == "nf4"
    adapter = job.work_dir / trained.adapter_dir
    bases = {
        "nf4": lambda: load_base_model(tiny_base(), job.spec.training, pick_device(), attention=None),
        "bfloat16": lambda: AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.bfloat16),
    }
    for precision, load in bases.items():
        within = 1e-3 if precision == "nf4" else 0.02
        base, tuned = load(), adapted(load(), adapter)
        for sentence in canary.sentences:
            said = sentence.log_likelihood[precision]
            assert said.base == pytest.approx(likelihood(base, list(sentence.token_ids)), abs=within)
            assert said.tuned == pytest.approx(likelihood(tuned, list(sentence.token_ids)), abs=within)
    gaps = [abs(s.log_likelihood["nf4"].base - s.log_likelihood["nf4"].tuned) for s in canary.sentences]
    assert max(gaps) > 0.01


def test_each_goes_on_as_greedy_generation_does(finished: Any) -> None:
    import torch

    from tuner.pipeline.model import load_base_model, pick_device

    job, _, trained, _ = finished
    model = adapted(
        load_base_model(tiny_base(), job.spec.training, pick_device(), attention=None),
        job.work_dir / trained.adapter_dir,
    )
    for sentence in canary_of(job, trained).sentences:
        prompt = torch.tensor([list(sentence.token_ids[: sentence.prompt_tokens])])
        generated = model.generate(input_ids=prompt, max_new_tokens=16, do_sample=False, eos_token_id=-1)
        assert sentence.greedy_token_ids
        assert generated[0, prompt.shape[1] :].tolist() == list(sentence.greedy_token_ids.tuned)


def test_the_sentences_are_written_as_the_run_s_rows_are(finished: Any) -> None:
    from transformers import AutoTokenizer

    job, _, trained, _ = finished
    tokenizer = AutoTokenizer.from_pretrained(job.work_dir / trained.adapter_dir)
    canary = canary_of(job, trained)
    assert canary.row_format == "messages"
    assert [set(sentence.row) for sentence in canary.sentences] == [{"messages"}] * 4 + [{"text"}] * 2
    for sentence in canary.sentences[:4]:
        messages = sentence.row["messages"]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(sentence.token_ids)
        prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert ids == list(sentence.token_ids[: sentence.prompt_tokens])
    for sentence in canary.sentences[4:]:
        assert tokenizer(sentence.row["text"])["input_ids"] == list(sentence.token_ids)
        assert sentence.prompt_tokens == len(sentence.token_ids)


@pytest.mark.parametrize("shape", ["prompt/completion", "text"])
def test_other_row_formats_end_with_eos_and_have_no_template(shape: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    job = make_job(tmp_path, rows_of(shape, 24))
    _, prepared = prepared_job(job)
    assert prepared.row_formats == {shape: prepared.train.rows}
    tokenizer = AutoTokenizer.from_pretrained(job.work_dir / prepared.tokenizer_dir)
    for sentence in prepared.sentences[:4]:
        text = "".join(sentence.row[key] for key in shape.split("/"))
        assert [*tokenizer(text)["input_ids"], tokenizer.eos_token_id] == list(sentence.token_ids)
        asked = sentence.row.get("prompt", text)
        assert sentence.prompt_tokens == len(tokenizer(asked)["input_ids"])
    for sentence in prepared.sentences[4:]:
        assert tokenizer(sentence.row["text"])["input_ids"] == list(sentence.token_ids)


def test_of_several_row_formats_the_one_of_most_rows_is_taken(tmp_path: Path) -> None:
    job = make_job(tmp_path / "run", rows_of("messages", 24))
    texts = make_job(tmp_path / "texts", rows_of("text", 30))
    both = job.spec.model_copy(update={"sources": (*job.spec.sources, *texts.spec.sources)})
    _, prepared = prepared_job(Job(both, job.secrets, job.work_dir))
    assert sum(prepared.row_formats.values()) == prepared.train.rows
    assert prepared.row_formats["text"] > prepared.row_formats["messages"] > 0
    assert [set(sentence.row) for sentence in prepared.sentences] == [{"text"}] * 6


def test_a_template_that_takes_no_such_turn_leaves_the_words() -> None:
    from tiny import tiny_tokenizer

    from tuner.pipeline.labels import Labeller
    from tuner.pipeline.sentences import canary_sentences

    tokenizer = tiny_tokenizer("phi-3-mini-4k-instruct")
    picky = (
        "{% if 'France' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + tokenizer.chat_template
    )
    labeller = Labeller(tiny_tokenizer("phi-3-mini-4k-instruct", picky))
    first, second, *_ = canary_sentences(labeller, {"messages": 1})
    assert first.row == {"text": "What is the capital of France? The capital of France is Paris."}
    assert "messages" in second.row


# ── what is measured when ────────────────────────────────────────────────────────────────────────────────────────────


def test_method_lora_has_one_precision(tmp_path: Path) -> None:
    job, _, trained = train_one(tmp_path, method="lora")
    canary = canary_of(job, trained)
    assert canary.compute_dtypes == {"float32": "float32"}
    assert canary.trained_in == "float32"
    quantization = lock_of(job, trained).quantization
    assert quantization.quant_type is None
    assert set(quantization.weights["linear"]) == {"float32"}


def test_without_the_canary_the_16_bits_are_left_out_and_the_run_is_the_same(finished: Any, tmp_path: Path) -> None:
    from tuner.pipeline.run import train

    job, _, whole, _ = finished
    without, prepared, trained = train_one(tmp_path, canary=False)
    assert without.spec.digest == job.spec.digest
    assert canary_of(without, trained).compute_dtypes == {"nf4": "float32"}
    weights = "adapter_model.safetensors"
    assert trained.files[weights] == whole.files[weights]
    assert trained.files["canary.json"] != whole.files["canary.json"]
    # the adapter that is there is not trained again for it, and that is said
    heard = Heard()
    asked = without.spec.model_copy(update={"canary": True})
    again = train(asked, prepared_job(without)[0], prepared, without.work_dir, heard)
    assert again == trained
    assert not heard.steps
    assert any("canary.json is without 16 bits" in line for line in heard.notes)


@pytest.mark.parametrize(("written", "measured"), [(None, True), ("true", True), ("false", False)])
def test_a_workspace_can_leave_it_out_by_an_annotation(written: str | None, measured: bool, tmp_path: Path) -> None:
    assert spec_with({} if written is None else {"tuner/canary": written}, tmp_path).canary is measured


def test_an_annotation_that_is_neither_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuner/canary.*'no' is neither true nor false"):
        spec_with({"tuner/canary": "no"}, tmp_path)


def spec_with(annotations: Mapping[str, str], directory: Path) -> Any:
    from data_files import write_data

    from tuner.request import Request, build_run
    from tuner.workspace import WorkspaceFile, make_workspace

    data = write_data(directory / "train.parquet", rows_of("messages", 4))
    workspace = make_workspace("phi-3-mini-4k-instruct", [str(data)], "x", "qlora", "w")
    workspace = workspace.model_copy(
        update={"metadata": workspace.metadata.model_copy(update={"annotations": dict(annotations)})}
    )
    request = Request(smoke=True, output=str(directory / "out"))
    return build_run(WorkspaceFile(workspace), request, directory / "work", {}).spec


# ── what does not go as it should ────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_asked_in_16_bits_is_said_and_loses_no_run(
    finished: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tuner.pipeline import canary as module

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(module, "load_sixteen_bit_base", full)
    heard = Heard()
    job, _, trained = train_one(tmp_path, heard=heard)
    assert canary_of(job, trained).compute_dtypes == {"nf4": "float32"}
    assert "the canary is without 16 bits: CUDA out of memory" in heard.warnings


def test_an_adapter_that_peft_cannot_load_again_is_not_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tuner.pipeline import train as module

    save = module.save_adapter

    def without_a_layer(model: Any, directory: Path, dtype: Any) -> None:
        from safetensors.torch import load_file, save_file

        save(model, directory, dtype)
        path = directory / "adapter_model.safetensors"
        tensors = {name: tensor for name, tensor in load_file(path).items() if "layers.1" not in name}
        save_file(tensors, path)

    monkeypatch.setattr(module, "save_adapter", without_a_layer)
    with pytest.raises(GateError, match=r"the adapter was saved, and cannot be used: PEFT cannot load .*missing"):
        train_one(tmp_path)
    assert not (tmp_path / "work" / "trained.json").exists()


def test_an_adapter_that_shows_in_no_sentence_is_warned_of(tmp_path: Path) -> None:
    heard = Heard()
    train_one(tmp_path, heard=heard, config={"TrainingArguments": SHORT | {"max_steps": 1, "learning_rate": 1e-9}})
    assert "the adapter changes the likelihood of none of the canary's sentences" in heard.warnings


def test_the_trained_model_is_let_go_before_another_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU both would have to fit."""
    from peft import PeftModel

    from tuner.pipeline import canary as module

    load, left = module.load_base_model, []

    def count(*arguments: Any, **options: Any) -> Any:
        gc.collect()
        left.append(sum(issubclass(type(each), PeftModel) for each in gc.get_objects()))
        return load(*arguments, **options)

    gc.collect()
    before = sum(issubclass(type(each), PeftModel) for each in gc.get_objects())
    monkeypatch.setattr(module, "load_base_model", count)
    train_one(tmp_path)
    assert left == [before]


def test_lock_and_canary_are_of_one_adapter_and_the_run_says_the_gap(finished: Any) -> None:
    job, _, trained, heard = finished
    canary, lock = canary_of(job, trained), lock_of(job, trained)
    assert (canary.run_digest, canary.tensors_sha256) == (lock.run_digest, lock.tensors_sha256)
    assert canary.trained_in == lock.quantization.precision
    assert any(line.startswith("canary: log-likelihood of 6 sentences, base → tuned: nf4 ") for line in heard.notes)
    assert "canary.json" in (job.work_dir / trained.adapter_dir / "README.md").read_text()
    assert json.loads((job.work_dir / trained.adapter_dir / "canary.json").read_text())["format"] == 1
