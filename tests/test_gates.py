"""Gates: what is a comparison of figures and what is not, and what they say of numbers."""

import itertools
import math
from contextlib import suppress

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tuner.errors import ConfigError
from tuner.gates import METRICS, parse_gate, parse_gates, split_gates

FIGURES = {"eval_loss": 1.5, "base": 2.0, "steps": 100, "train_loss": 1.25}


@pytest.mark.parametrize(
    ("text", "passed"),
    [
        ("eval_loss <= 0.98 * base", True),
        ("eval_loss < 0.75*base", False),
        ("eval_loss <= .75 * base", True),
        ("base - eval_loss >= 0.5", True),
        ("base - eval_loss > 5e-1", False),
        ("(base - eval_loss) / base >= 0.25", True),
        ("base - 0.25 - 0.25 == eval_loss", True),  # from the left
        ("base / 2 / 2 == 0.5", True),
        ("1 + 2 * steps == 201", True),
        ("-eval_loss < - 1", True),
        ("train_loss<=eval_loss", True),
        ("eval_loss - train_loss > 1 / (base - 2)", False),  # no number
        ("steps >= 100", True),
    ],
)
def test_a_gate_is_a_comparison_of_figures(text: str, passed: bool) -> None:
    assert parse_gate(text).judge(FIGURES).passed is passed


@given(st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.01, 2))
def test_a_gate_agrees_with_python(loss: float, base: float, share: float) -> None:
    gate = parse_gate(f"eval_loss <= {share!r} * base")
    assert gate.judge({"eval_loss": loss, "base": base}).passed is (loss <= share * base)


def test_the_sentence_shows_both_sides_and_every_figure() -> None:
    verdict = parse_gate("eval_loss  <= 0.5 * base").judge({"eval_loss": 1.5, "base": 2.0})
    assert verdict.sentence == "eval_loss <= 0.5 * base: 1.5 <= 1 (eval_loss 1.5, base 2)"


@pytest.mark.parametrize("value", [None, math.nan])
@pytest.mark.parametrize("comparison", ["<=", ">", "=="])
def test_what_was_not_measured_passes_no_gate(value: float | None, comparison: str) -> None:
    verdict = parse_gate(f"eval_loss {comparison} 3").judge({"eval_loss": value})
    assert not verdict.passed
    assert "eval_loss unknown" in verdict.sentence


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("eval_los <= 2", r"no metric 'eval_los', did you mean \"eval_loss\"\?"),
        ("accuracy >= 0.9", "no metric 'accuracy'"),
        ("__import__('os') > 0", "what is"),
        ("eval_loss", "a comparison .* must follow, and it ends there"),
        ("eval_loss = 2", "what is '= 2'"),
        ("eval_loss <= 2 <= base", "'<=' is too much"),
        ("eval_loss <= base and steps > 2", "'and' is too much"),
        ("eval_loss <= 2 base", "'base' is too much"),
        ("eval_loss <= ", "a number or a metric is missing at its end"),
        ("<= 2", "a number or a metric is missing before '<='"),
        ("(eval_loss <= 2", r"a \) is missing"),
        ("1 < 2", "only numbers"),
        ("", "is missing at its end"),
        ("(" * 50 + "eval_loss" + ")" * 50 + " < 2", "nested too deeply"),
        ("-" * 50 + "eval_loss < 2", "nested too deeply"),
        ("- " * 50 + "eval_loss < 2", "nested too deeply"),
        ("eval_loss < " + "+".join(["1"] * 5000), r"it has 10,011 characters; at most 500 are read"),
        ("(" * 100_000, "it has 100,000 characters"),
        ("eval_loss ** 2 < 4", r"what is '\*\* 2 < 4'"),
        ("eval_loss // 2 < 4", "what is '// 2 < 4'"),
        ("eval_loss < 2 << 1", "what is '<< 1'"),
        ("eval_loss % 2 < 4", "what is '% 2 < 4'"),
        ("eval_loss != 2", "what is '!= 2'"),
        ("eval_loss < +2", r"what is '\+'"),
        ("eval_loss < 0x10", "what is '0x10'"),
        ("eval_loss < 1_000", "what is '1_000'"),
        ("eval_loss < 02", "what is '02'"),
        ("eval_loss < 2j", "what is '2j'"),
        ("eval_loss < ...", "what is '...'"),
        ("eval_loss < 1or 2", "what is '1or 2'"),
        ("eval_loss < 2 # a comment", "what is '# a comment'"),
        ("eval_loss < '2'", "what is \"'2'\""),
        ("eval_loss < \u0662", "what is '\u0662'"),
        ("\uff45val_loss < 2", "what is '\uff45val_loss < 2'"),
        ("eval_loss < base if 1 else 2", "no metric 'if'"),
        ("not eval_loss < base", "no metric 'not'"),
        ("eval_loss < True", "no metric 'True'"),
        ("eval loss < base", "no metric 'eval', did you mean"),
        ("eval_loss(2) < base", r"what is 'eval_loss\(2\)'"),
        ("eval_loss < ()", r"what is '\(\)'"),
        ("(eval_loss < 2) < base", "what is 'eval_loss < 2'"),
        ("eval_loss < 2)", r"'\)' is too much"),
        ("eval_loss < (2 + )", r"is missing before '\)'"),
        ("eval_loss <= 2; steps > 1", "what is '; steps > 1'"),
        ("eval_loss / 0 <= 2", "it divides by zero"),
        ("eval_loss <= base / (1 - 1)", "it divides by zero"),
        ("eval_loss <= base / (0 * steps)", "it divides by zero"),
        ("eval_loss <= 1e999", "a number in it is too large"),
        ("eval_loss <= 1" + "0" * 400, "a number in it is too large"),
        ("eval_loss <= 1e200 * 1e200", "a number in it is too large"),
        ("1e308 * base_perplexity * 10 > eval_loss", "a number in it is too large"),
        ("eval_loss >= 0", "it holds whatever the run does"),
        ("eval_perplexity >= 1", "it holds whatever the run does"),
        ("eval_loss > -1", "it holds whatever the run does"),
        ("0 * eval_loss <= 1", "it holds whatever the run does"),
        ("eval_loss <= eval_loss", "it holds whatever the run does"),
        ("0 * base == 0 * steps", "it holds whatever the run does"),
        ("eval_loss < 0", "no run can pass it"),
        ("-base > 0", "no run can pass it"),
        ("eval_perplexity < 1", "no run can pass it"),
        ("eval_loss + 1 <= 0.5", "no run can pass it"),
        ("steps == -5", "no run can pass it"),
        ("0 >= 1 + eval_loss * base", "no run can pass it"),
        ("eval_loss > eval_loss", "no run can pass it"),
        ("0 * base == 1", "no run can pass it"),
        ("-2 == eval_loss / (1 + base)", "no run can pass it"),
    ],
)
def test_what_is_no_gate_is_refused_with_why(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_gate(text)
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "(" * 20 + "-" * 20 + "eval_loss" + ")" * 20 + " < " + "+".join(["2"] * 214),
        "eval_loss < " + "+".join(["1"] * 244),
        "eval_loss < 1" + "0" * 300,
    ],
)
def test_the_longest_and_deepest_gates_are_read(text: str) -> None:
    assert parse_gate(text).judge({"eval_loss": 1.0}).passed


@given(st.text(alphabet="evalos_b 019.e-+*/()<>=!#'\"\\\n\x00\u0661", max_size=40))
def test_whatever_stands_in_an_annotation_is_a_gate_or_refused_in_a_sentence(text: str) -> None:
    with suppress(ConfigError):
        parse_gate(text)


def test_of_a_flood_of_gates_the_first_are_read() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gates(["steps > 0"] * 60_000, "metadata.annotations[tuner/require]")
    (problem,) = caught.value.problems
    assert problem.message == "60,000 gates, and at most 50 are read"


def test_the_problems_of_all_gates_come_at_once_each_with_where_it_stands() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_gates(["eval_los < 1", "steps > 0", "loss < 1"], "--require")
    assert [problem.path for problem in caught.value.problems] == ["--require", "--require"]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_can_stand_in_a_gate_and_says_whether_it_is_of_held_out_rows(metric: str) -> None:
    gate = parse_gate(f"2 * {metric} > 3")
    assert gate.metrics == (metric,)
    assert gate.needs_held_out_rows is metric.startswith(("eval_", "base"))
    assert gate.judge({metric: 2.0}).passed


_TERMS = st.recursive(
    st.sampled_from(["0", "1", "0.5", "2", "eval_loss", "base", "steps", "base_perplexity"]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda parts: f"({' '.join(parts)})"),
    max_leaves=5,
)


@given(_TERMS, st.sampled_from(["<", "<=", ">", ">=", "=="]), _TERMS)
def test_what_is_refused_as_foregone_is_so_for_every_run(left: str, comparison: str, right: str) -> None:
    try:
        parse_gate(f"{left} {comparison} {right}")
    except ConfigError as error:
        refusal = str(error)
    else:
        return
    names = {"eval_loss", "base", "steps", "base_perplexity"}
    assume(any(name in left + right for name in names))
    verdicts = set()
    for values in itertools.product((0.0, 0.5, 1.0, 3.0), (0.0, 2.0), (0.0, 1.0, 1e6), (1.0, 2.0)):
        figures = dict(zip(("eval_loss", "base", "steps", "base_perplexity"), values, strict=True))
        with suppress(ZeroDivisionError):
            verdicts.add(eval(f"{left} {comparison} {right}", {}, figures))
    assert verdicts <= {"holds" in refusal}


def test_an_annotation_holds_several() -> None:
    assert split_gates("eval_loss <= base;\n steps > 10 \n\n") == ("eval_loss <= base", "steps > 10")
