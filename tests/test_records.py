"""run.lock.json and canary.json as values: what is documented, what is refused, what later versions may add."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from tuner.records import Canary, Quantization, Record, RunLock, WeightCount, lock_format, seal_of

DOCUMENT = Path(__file__).parent.parent / "docs" / "artifact.md"


def fields_of(model: type[BaseModel]) -> set[str]:
    """Names of a record's keys, and of the records' in it."""
    names = set(model.model_fields)
    for field in model.model_fields.values():
        for part in re.findall(r"tuner\.records\.(\w+)", str(field.annotation)):
            kind = getattr(__import__("tuner.records", fromlist=[part]), part)
            names |= fields_of(kind) if isinstance(kind, type) and issubclass(kind, Record) else set()
    return names


@pytest.mark.parametrize(("model", "heading"), [(RunLock, "## run.lock.json"), (Canary, "## canary.json")])
def test_every_key_is_documented(model: type[BaseModel], heading: str) -> None:
    section = DOCUMENT.read_text(encoding="utf-8").partition(heading)[2].partition("\n## ")[0]
    names = fields_of(model)
    assert len(names) > 10
    words = set(re.findall(r"\w+", section))
    assert names <= words, names - words


CANARY: dict[str, Any] = {
    "format": 1,
    "run_digest": "sha256:1",
    "tensors_sha256": "2",
    "row_format": "messages",
    "trained_in": "nf4",
    "compute_dtypes": {"nf4": "bfloat16"},
    "sentences": [
        {
            "row": {"text": "x"},
            "token_ids": [1, 2, 3],
            "prompt_tokens": 3,
            "log_likelihood": {"nf4": {"base": -2.5, "tuned": -1.5}},
            "token_log_likelihoods": {"nf4": {"base": [-2.0, -3.0], "tuned": [-2.0, -1.0]}},
            "greedy_token_ids": {"base": [1], "tuned": [2]},
        }
    ],
}


def test_a_canary_says_its_gap_and_whether_it_knows_16_bits() -> None:
    canary = Canary.model_validate_json(json.dumps(CANARY))
    assert canary.distance("nf4") == pytest.approx(2**0.5)
    assert str(canary) == "base and adapter differ at a token by 1.414 nats on nf4"
    assert not canary.has_sixteen_bits
    assert Canary.model_validate_json(json.dumps(canary.as_json())) == canary


def test_a_key_that_a_later_version_adds_is_passed_over() -> None:
    assert Canary.model_validate(CANARY | {"later": 1}) == Canary.model_validate(CANARY)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", 2),
        ("sentences", []),
        ("row_format", "poems"),
        ("compute_dtypes", {"nf4": "bfloat16", "bfloat16": "bfloat16"}),
        ("log_likelihood", {"nf4": {"base": -2.5, "tuned": 0.5}}),
        ("log_likelihood", {"nf4": {"base": float("nan"), "tuned": -0.5}}),
        ("log_likelihood", {"fp4": {"base": -2.5, "tuned": -1.5}}),
        ("log_likelihood", {"nf4": {"base": -2.5, "tuned": -1.7}}),
        ("token_log_likelihoods", {"nf4": {"base": [-2.5], "tuned": [-1.5]}}),
        ("prompt_tokens", 4),
        ("token_ids", [1]),
        ("token_ids", [1, -2]),
        ("prompt_tokens", 0),
        ("greedy_token_ids", {"base": [], "tuned": [1]}),
    ],
)
def test_what_no_canary_says_is_refused(key: str, value: Any) -> None:
    sentence = CANARY["sentences"][0]
    broken = {"sentences": [sentence | {key: value}]} if key in sentence else {key: value}
    with pytest.raises(ValidationError):
        Canary.model_validate_json(json.dumps(CANARY | broken))


def test_the_seal_is_over_the_content_however_the_file_is_written() -> None:
    lock = {"b": [1, 2.5], "a": {"ä": None}}
    assert seal_of(lock) == seal_of(json.loads(json.dumps({"a": {"ä": None}, "b": [1, 2.5]}, indent=4)))
    assert seal_of(lock | {"lock_sha256": "any"}) == seal_of(lock)
    assert seal_of(lock | {"b": [1, 2.6]}) != seal_of(lock)


def test_locks_without_a_format_are_of_the_first_by_their_version() -> None:
    assert (lock_format({"version": 1}), lock_format({"format": 2}), lock_format({})) == (1, 2, None)


def counted(quant_type: str | None, **linear: int) -> Quantization:
    counts = {precision: WeightCount(tensors=1, parameters=count) for precision, count in linear.items()}
    return Quantization(quant_type=quant_type, double_quant=False, compute_dtype="bfloat16", weights={"linear": counts})


def test_the_precision_is_the_quantized_one_or_that_of_most_weights() -> None:
    assert counted("nf4", nf4=1, bfloat16=5).precision == "nf4"
    assert counted(None, float32=1, bfloat16=5).precision == "bfloat16"
    assert str(counted("nf4", nf4=1000, bfloat16=5)) == "1,000 of 1,005 parameters in nf4; computed in bfloat16"
    assert str(counted(None, bfloat16=5)) == "not quantized, bfloat16"
