"""plan.py: for every preset on every machine an answer, and the right one where it is known."""

from dataclasses import replace
from typing import Any

import pytest

from tuner.errors import ConfigError, UsageError
from tuner.instance_types import find_gpu, instance_types
from tuner.plan import UTILISATION, Plan, choose_machine, count_evaluations, describe_plan, make_plan, plan_as_json
from tuner.presets import find_preset, load_presets
from tuner.runspec import Prepared, Split
from tuner.training_config import resolve_training_config


def plan(model: str, gpu: str | None = None, *settings: str, method: Any = "qlora", **more: Any) -> Plan:
    """The plan of a preset on `gpu`, or on the instance type `on`."""
    machine = choose_machine(gpu, more.pop("on", None), None)
    preset = find_preset(model)
    training = resolve_training_config(method=method, preset=preset, overrides=settings, world_size=machine.gpus)
    return make_plan(preset, training, machine, **more)


def prepared(rows: int = 320, tokens: int = 54_400, longest: int = 400) -> Prepared:
    train = Split(
        path="train", rows=rows, tokens=tokens, supervised_tokens=tokens // 2, longest=longest, order_sha256=""
    )
    return Prepared(
        run_digest="",
        train=train,
        evaluation=train.model_copy(update={"longest": longest + 100}),
        rows_read=rows,
        shapes={},
        row_formats={},
        sentences=(),
        bad_rows=0,
        over_length_rows=0,
        truncated_rows=0,
        unsupervised_rows=0,
        problems=(),
        problems_file=None,
        max_length=4096,
        tokenizer_dir="",
        base_model_dir="",
    )


@pytest.mark.parametrize("model", load_presets())
def test_every_preset_has_an_answer_on_every_instance_type(model: str) -> None:
    machines = instance_types()
    assert len(machines) > 50
    for name, machine in machines.items():
        answer = plan(model, on=name)
        assert answer.verdict == "cannot run" if machine.gpu.problem else answer.verdict in ("fits", "does not fit")
        assert (answer.estimate.total <= machine.gpu.memory_bytes) or answer.verdict != "fits"
        assert name in describe_plan(answer)
        # where it does not run, there is something to do
        assert answer.verdict == "fits" or answer.larger


@pytest.mark.parametrize(
    ("settings", "times"),
    [
        ((), 6),  # 600 steps: before, and five times
        (("TrainingArguments.num_train_epochs=0.1",), 3),  # 20 steps: before, at 10 and 20
        (("TrainingArguments.eval_steps=100",), 7),
        (("TrainingArguments.eval_steps=0.5",), 3),
        (("TrainingArguments.eval_strategy=no",), 2),
        (("TrainingArguments.eval_strategy=epoch",), 4),
        (("TrainingArguments.max_steps=30",), 4),
    ],
)
def test_evaluations_are_counted(settings: tuple[str, ...], times: int) -> None:
    training = resolve_training_config(method="qlora", preset=find_preset("phi-4"), overrides=settings)
    assert count_evaluations(training.arguments, 3200) == times


def test_what_evaluations_cost_is_a_share_of_training() -> None:
    made = plan("phi-4", "H100", prepared=prepared())  # as many rows held out as trained on, 3 epochs, 6 evaluations
    assert any("evaluating 320 held-out rows 6 times costs about 80% of training" in line for line in made.assumptions)
    made = plan("phi-4", "H100", "TrainingArguments.max_steps=10", prepared=prepared())  # half of the rows, twice
    assert any("320 held-out rows 2 times costs about 160% of training" in line for line in made.assumptions)


def test_small_card_recomputes_and_a_large_one_does_not() -> None:
    small, large = plan("phi-3-mini-4k-instruct", "24GB"), plan("phi-3-mini-4k-instruct", "H200")
    assert (small.verdict, small.estimate.checkpointing) == ("fits", True)
    assert (large.verdict, large.estimate.checkpointing) == ("fits", False)


def test_checkpointing_as_written_is_kept() -> None:
    assert plan(
        "phi-3-mini-4k-instruct", "H200", "TrainingArguments.activation_checkpointing=true"
    ).estimate.checkpointing
    off = plan("phi-3-mini-4k-instruct", "24GB", "TrainingArguments.activation_checkpointing=false")
    assert not off.estimate.checkpointing


@pytest.mark.parametrize(
    ("gpu", "settings", "method", "change"),
    [
        ("16GB", ["TrainingArguments.activation_checkpointing=false"], "qlora", "activation_checkpointing: true"),
        ("24GB", [], "lora", "method: qlora"),
        ("17GB", ["QuantizationConfig.load_in_8bit=true"], "qlora", "load_in_4bit: true"),
        ("24GB", ["LoraConfig.r=512"], "qlora", "LoraConfig.r: 64"),
        ("12GB", ["TrainingArguments.max_length=16384"], "qlora", "max_length: "),
    ],
)
def test_nearest_configuration_is_named_and_fits(gpu: str, settings: list[str], method: str, change: str) -> None:
    model = {"24GB": "phi-4"}.get(gpu, "llama-3.1-8b-instruct")
    answer = plan(model, gpu, *settings, method=method)
    assert answer.verdict == "does not fit"
    chosen = next(words for words in answer.changes if change in words)
    if change.startswith("method"):
        assert plan(model, gpu, *settings).verdict == "fits"
        return
    changed = [words.replace(": ", "=") for words in chosen.split(" and ")]
    # --set refuses 4-bit beside the 8-bit that is written: the user writes one for the other
    kept = [] if "4bit" in change else settings
    assert plan(model, gpu, *kept, *changed).verdict == "fits"


def test_larger_machines_hold_it_unchanged() -> None:
    answer = plan("qwen2.5-coder-32b-instruct", "16GB")
    assert answer.larger
    for machine in answer.larger:
        preset = find_preset("qwen2.5-coder-32b-instruct")
        training = resolve_training_config(method="qlora", preset=preset, world_size=machine.gpus)
        assert make_plan(preset, training, machine).verdict == "fits"


def test_what_no_card_holds_is_said() -> None:
    answer = plan("phi-4", "A2", "TrainingArguments.activation_checkpointing=false", "LoraConfig.r=4096")
    assert (answer.verdict, answer.exit_code, answer.larger) == ("does not fit", 73, ())
    assert "no GPU of the table holds it unchanged" in describe_plan(answer)


def test_steps_are_counted_from_prepared_rows() -> None:
    answer = plan("phi-3-mini-4k-instruct", "A100-80", prepared=prepared(rows=330))
    assert (answer.documents_per_step, answer.steps, answer.tokens) == (16, 3 * 21, 3 * 54_400)
    assert answer.workload.longest == 500  # of the held-out rows


def test_documents_per_step_cover_all_gpus() -> None:
    written = plan("phi-3-mini-4k-instruct", None, "TrainingArguments.per_device_train_batch_size=4", on="p4d.24xlarge")
    assert plan("phi-3-mini-4k-instruct", on="p4d.24xlarge").documents_per_step == 16
    assert written.documents_per_step == 32


def test_max_steps_wins_over_epochs() -> None:
    answer = plan("phi-3-mini-4k-instruct", "A100-80", "TrainingArguments.max_steps=10", prepared=prepared())
    assert (answer.steps, answer.epochs, answer.tokens) == (10, 0.5, 27_200)


def test_without_data_the_assumption_is_said() -> None:
    words = describe_plan(plan("phi-3-mini-4k-instruct", "A100-80"))
    assert "no prepared.json: 1,000 rows of 512 tokens" in words
    assert "the longest document has 4,096 tokens (max_length is not written)" in words


def test_price_gives_a_cost_and_more_gpus_take_less_time() -> None:
    one = plan("phi-3-mini-4k-instruct", on="Standard_NC24ads_A100_v4", price_per_hour=3.6)
    four = plan("phi-3-mini-4k-instruct", on="Standard_NC96ads_A100_v4", price_per_hour=4 * 3.6)
    assert one.seconds is not None
    assert four.seconds is not None
    assert one.cost == pytest.approx(one.seconds / 1000)
    assert four.seconds == pytest.approx(one.seconds / 4)
    assert four.cost == pytest.approx(one.cost)


def test_time_and_cost_are_called_estimates_with_their_assumption() -> None:
    words = describe_plan(plan("phi-3-mini-4k-instruct", on="Standard_NC24ads_A100_v4", price_per_hour=3.67))
    assert "estimated time: about" in words
    assert "Estimates, not measurements:" in words
    assert f"at {UTILISATION:.0%} of the 312 TFLOP/s of the data sheet" in words


def test_plain_size_gives_no_time() -> None:
    answer = plan("phi-3-mini-4k-instruct", "24GB", price_per_hour=1.0)
    assert (answer.seconds, answer.cost) == (None, None)


def test_what_is_not_counted_is_said() -> None:
    assert "LoraConfig.use_dora is not counted" in describe_plan(plan("phi-4", "H200", "LoraConfig.use_dora=true"))


def test_json_adds_up() -> None:
    written = plan_as_json(plan("phi-4", "24GB"))
    *parts, total = written["memory_bytes"].values()
    assert sum(parts) == total
    assert written["verdict"] == "fits"


def test_exit_code_tells_the_verdict() -> None:
    codes = [plan("phi-4", gpu, method=method).exit_code for gpu, method in (("H200", "qlora"), ("24GB", "lora"))]
    assert codes == [0, 73]
    assert plan("phi-4", "V100").exit_code == 78


def test_machine_is_that_of_the_flag_then_of_the_workspace() -> None:
    assert choose_machine("L4", None, "Standard_NC24ads_A100_v4").gpu.name == "L4"
    assert choose_machine(None, "g5.xlarge", "Standard_NC24ads_A100_v4").gpu.name == "A10G"
    assert choose_machine(None, None, "Standard_NC24ads_A100_v4").gpu.name == "A100-80"
    with pytest.raises(UsageError, match="which GPU"):
        choose_machine(None, None, None)
    with pytest.raises(UsageError, match="both given"):
        choose_machine("L4", "g5.xlarge", None)


def test_model_that_is_no_preset_is_refused_with_what_to_do() -> None:
    with pytest.raises(ConfigError) as caught:
        plan("google/gemma-3-27b-it", "H200")
    assert "--base-model" in (caught.value.hint or "")


def test_model_directory_needs_no_list_of_linear_modules() -> None:
    preset = find_preset("qwen3-8b")
    unknown = preset.model_copy(update={"linear_modules": ()})
    training = resolve_training_config(method="qlora", preset=preset)
    machine = find_gpu("A100-80")
    assert replace(make_plan(unknown, training, machine)) == make_plan(preset, training, machine)


def test_target_module_that_is_nowhere_is_refused() -> None:
    preset = find_preset("qwen3-8b").model_copy(update={"linear_modules": ()})
    training = resolve_training_config(
        method="qlora", preset=preset, overrides=["LoraConfig.target_modules=[query, v_proj]"]
    )
    with pytest.raises(ConfigError, match="no query in qwen3-8b"):
        make_plan(preset, training, find_gpu("A100-80"))
