"""canary.json: what base and adapter answer to fixed sentences, measured on the files that are pushed."""

import gc
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from statistics import fmean
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


def token_likelihoods(model: Any, ids: list[int]) -> list[float]:
    """Of one row alone, as transformers itself reckons a loss: of each prefix the last token's."""
    import torch

    row = torch.tensor([ids])
    with torch.no_grad():
        logits = model(input_ids=row).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[:-1], row[0, 1:], reduction="none")
    return [-float(loss) for loss in losses]


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
        within = 1e-3 if precision == "nf4" else 0.1  # in bf16 a logit has two digits
        base, tuned = load(), adapted(load(), adapter)
        for sentence in canary.sentences:
            said = sentence.token_log_likelihoods[precision]
            ids = list(sentence.token_ids)
            assert said.base == pytest.approx(token_likelihoods(base, ids), abs=within)
            assert said.tuned == pytest.approx(token_likelihoods(tuned, ids), abs=within)
            assert sentence.log_likelihood[precision].tuned == pytest.approx(fmean(said.tuned), abs=1e-4)
    assert canary.distance("nf4") > 0.05
    assert canary.distance("bfloat16") > 0.05


def strength_and_rest(canary: Canary, precision: str, served: list[list[float]]) -> tuple[float, float]:
    """What docs/artifact.md says of a server that gives the sentences' tokens these likelihoods."""
    measured = [sentence.token_log_likelihoods[precision] for sentence in canary.sentences]
    base = [value for each in measured for value in each.base]
    way = [tuned - b for each in measured for tuned, b in zip(each.tuned, each.base, strict=True)]
    off = [value - b for value, b in zip(chain(*served), base, strict=True)]
    whole = sum(each**2 for each in way)
    strength = sum(one * other for one, other in zip(off, way, strict=True)) / whole
    rest = sum((one - strength * other) ** 2 for one, other in zip(off, way, strict=True)) / whole
    return strength, rest**0.5


@pytest.mark.parametrize("precision", ["nf4", "bfloat16"])
def test_a_server_without_the_adapter_or_with_half_of_it_is_told_from_the_right_one(
    precision: str, finished: Any
) -> None:
    """The right one computes in another type than the canary was measured in, as another engine would."""
    import torch
    from transformers import AutoModelForCausalLM

    from tuner.pipeline.model import load_base_model, pick_device

    job, _, trained, _ = finished
    canary = canary_of(job, trained)
    base: Any
    if precision == "nf4":
        base = load_base_model(tiny_base(), job.spec.training, pick_device(), attention=None).bfloat16()
    else:
        base = AutoModelForCausalLM.from_pretrained(tiny_base(), dtype=torch.float32)

    def asked(model: Any) -> tuple[float, float]:
        served = [token_likelihoods(model, list(sentence.token_ids)) for sentence in canary.sentences]
        return strength_and_rest(canary, precision, served)

    alone = asked(base)
    tuned = adapted(base, job.work_dir / trained.adapter_dir)
    whole = asked(tuned)
    for module in tuned.modules():
        if isinstance(getattr(module, "scaling", None), dict):  # of LoRA, not of attention
            module.scaling = {name: scale / 2 for name, scale in module.scaling.items()}
    half = asked(tuned)
    assert alone[0] == pytest.approx(0, abs=0.1)
    assert whole[0] == pytest.approx(1, abs=0.1)
    assert 0.3 < half[0] < whole[0] - 0.2  # not quite ½: a likelihood is no straight line from base to tuned
    assert whole[1] < 0.5


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
        assert sentence.greedy_token_ids
        row = prompt
        for token in sentence.greedy_token_ids.tuned:
            with torch.no_grad():
                assert int(model(input_ids=row).logits[0, -1].argmax()) == token
            row = torch.cat([row, torch.tensor([[token]])], dim=1)


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


def test_a_checkpoint_that_is_quantized_itself_is_not_taken_for_16_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who serves it serves it as it is."""
    from tuner.pipeline import canary as module
    from tuner.pipeline.model import load_base_model, pick_device
    from tuner.training_settings import TrainingConfig

    training = TrainingConfig.of("qlora", {"QuantizationConfig": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}})
    quantized = load_base_model(tiny_base(), training, pick_device(), attention=None)
    monkeypatch.setattr(module, "load_sixteen_bit_base", lambda *_, **__: quantized)
    job, _, trained = train_one(tmp_path)
    assert canary_of(job, trained).compute_dtypes == {"nf4": "float32"}


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


def test_an_adapter_that_hardly_shows_in_the_sentences_is_warned_of(finished: Any, tmp_path: Path) -> None:
    heard = Heard()
    train_one(tmp_path, heard=heard, config={"TrainingArguments": SHORT | {"max_steps": 1, "learning_rate": 1e-9}})
    said = "the canary's sentences hardly tell the adapter from its base on nf4 and bfloat16"
    assert any(line.startswith(said) for line in heard.warnings)
    assert not any(line.startswith("the canary") for line in finished[3].warnings)


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
    assert any(line.startswith("canary: base and adapter differ at a token by ") for line in heard.notes)
    assert "canary.json" in (job.work_dir / trained.adapter_dir / "README.md").read_text()
    assert json.loads((job.work_dir / trained.adapter_dir / "canary.json").read_text())["format"] == 1
