"""The one reader of YAML: what a text is read as, what is wrong with it, and how much of it is read at all."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cluster_objects import make_config_map, make_workspace
from tuner import yaml_lines
from tuner.cluster.job_options import JobOptions
from tuner.cluster.patch import parse_patches
from tuner.cluster.revision import RevisionRenderer
from tuner.errors import MOST_PROBLEMS, ConfigError, InputMissingError, Problem
from tuner.presets import find_preset
from tuner.request import Request
from tuner.training_config import ConfigSource, resolve_training_config
from tuner.workspace import parse_objects, parse_workspace_text
from tuner.yaml_lines import MAX_BYTES, MAX_DEPTH, MAX_VALUES, Document, YamlValue, read_documents, read_text


def document(text: str, first_line: int = 1) -> Document:
    (found,), problems = read_documents(text, "f.yaml", first_line)
    assert not problems
    return found


def value(text: str) -> YamlValue:
    found = document(text)
    assert not found.faults
    return found.value


def faults(text: str, first_line: int = 1) -> list[str]:
    found = document(text, first_line)
    return [str(found.problem(fault)) for fault in found.faults]


def refusal(text: str, first_line: int = 1) -> str:
    _, (problem,) = read_documents(text, "f.yaml", first_line)
    return str(problem)


# ── scalars ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("written", "is_read_as"),
    [
        # YAML 1.2's core schema
        *(("null", None), ("Null", None), ("~", None), ("true", True), ("False", False), ("TRUE", True)),
        *(("0", 0), ("-17", -17), ("+3", 3), ("0x1F", 31), ("0o17", 15), ("089", 89)),
        *(("2e-4", 2e-4), ("1E5", 1e5), (".5", 0.5), ("1.", 1.0), ("-1.5e+3", -1500.0)),
        *(("2024-01-01", "2024-01-01"), ("12:30:15", "12:30:15"), ("1_", "1_"), ("_1", "_1"), ("=", "=")),
        *(("nul", "nul"), ("y", "y"), ("1.2.3", "1.2.3"), ("0xG", "0xG"), ("e5", "e5"), (".", "."), ("-", None)),
        # as kubectl and KAITO read them
        *(("yes", True), ("No", False), ("on", True), ("OFF", False), ("0644", 0o644), ("-017", -15)),
        *(("1_000", 1000), ("1_0.5", 10.5), ("0b11", 3)),
        # whole numbers beyond 64 bits
        *(("18446744073709551615", 2**64 - 1), ("9" * 67, int("9" * 67)), ("1" + "0" * 70, 1e70)),
        # quotes and tags
        *(('"yes"', "yes"), ("'2e-4'", "2e-4"), ("!!str 0644", "0644"), ("! 1", "1"), ('!!int "5"', 5)),
        *(("!!float 3", 3.0), ("!!bool on", True), ("!!null ~", None), ("|\n  on\n", "on\n")),
    ],
)
def test_a_scalar_is_what_the_core_schema_says_but_for_what_kubectl_reads_otherwise(
    written: str, is_read_as: YamlValue
) -> None:
    if written == "-":
        assert value("a:\n- \n") == {"a": [None]}
        return
    read = document(f"a: {written}").mapping["a"]
    assert (read, type(read)) == (is_read_as, type(is_read_as))


KAITO_AND_KUBECTL = (
    "null ~ true False yes Yes NO on Off y n 0 -17 +3 0x1F 0o17 0644 -017 089 2e-4 1E5 .5 1. -1.5e+3 1_000 1_0.5 0b11 "
    "12:30:15 2024-01-01 1.2.3 e5 word 9223372036854775807".split()
)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl here")
def test_what_kubectl_and_kaitos_yaml_agree_on_is_read_as_they_read_it(tmp_path: Path) -> None:
    file = tmp_path / "workspace.json"
    file.write_text(json.dumps({"apiVersion": "kaito.sh/v1beta1", "kind": "Workspace", "metadata": {"name": "a"}}))
    patch = "x: [" + ", ".join(KAITO_AND_KUBECTL) + "]"
    how = ["kubectl", "patch", "--local", "--type=merge", "-o", "json", "-f", file, "-p", patch]
    kubectl = json.loads(subprocess.run(how, capture_output=True, text=True, check=True).stdout)["x"]
    kaito, ours = yaml.safe_load(patch)["x"], document(patch).mapping["x"]
    assert isinstance(ours, list)
    agreed = 0
    for word, theirs, his, read in zip(KAITO_AND_KUBECTL, kubectl, kaito, ours, strict=True):
        if theirs == his and isinstance(theirs, bool) == isinstance(his, bool):
            agreed += 1
            assert (word, read, isinstance(read, bool)) == (word, his, isinstance(his, bool))
    assert agreed > 20


def in_a_config(text: str) -> Any:
    source = ConfigSource(
        f"training_config:\n  TrainingArguments:\n    activation_checkpointing_kwargs: {{a: {text}}}\n", ""
    )
    training = resolve_training_config(method="qlora", preset=find_preset("phi-4"), config_map=source)
    return training.arguments.passthrough["activation_checkpointing_kwargs"]["a"]


def in_a_set(text: str) -> Any:
    typed = (f"TrainingArguments.activation_checkpointing_kwargs={{a: {text}}}",)
    training = resolve_training_config(method="qlora", preset=find_preset("phi-4"), overrides=typed)
    return training.arguments.passthrough["activation_checkpointing_kwargs"]["a"]


def in_a_patch(text: str) -> Any:
    (patch,) = parse_patches(f"spec: {{a: {text}}}", "p.yaml")
    return patch.value["spec"]["a"]


WORKSPACE = """\
apiVersion: kaito.sh/v1beta1
kind: Workspace
metadata: {name: a}
tuning:
  preset: {name: phi-4}
  method: qlora
  input: {volumeSource: {csi: {driver: d, volumeAttributes: {a: VALUE}}}}
  output: {image: contoso.azurecr.io/a:1}
"""


def in_a_workspace(text: str) -> Any:
    tuning = parse_workspace_text(WORKSPACE.replace("VALUE", text), "w.yaml").workspace.tuning
    return tuning.input.volume_source["csi"]["volumeAttributes"]["a"]


DOORS: list[Callable[[str], Any]] = [in_a_config, in_a_set, in_a_patch, in_a_workspace]


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("written", ["2e-4", "1_000", "yes", "0644", "2024-01-01", '"1"', "[1, {b: no}]"])
def test_every_door_reads_a_value_as_the_others_do(door: Callable[[str], Any], written: str) -> None:
    read, alone = door(written), value(written)
    assert (read, type(read)) == (alone, type(alone))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        ("{b: 1, b: 2}", "a.b: written twice, on line "),
        ("{1: x}", "a: the key 1 is a number, not text"),
        ("{on: x}", "a: the key on is true or false, not text"),
        ("{[b]: x}", "a: a key is a list, not text"),
        (".nan", "a: must be a finite number, not .nan"),
        ("-.inf", "a: must be a finite number, not -.inf"),
        ("1e999", "a: must be a finite number, not 1e999"),
        ("!env NAME", "a: the YAML tag !env means nothing here"),
        ("!!binary aGk=", "a: the YAML tag !!binary means nothing here"),
        ("!!timestamp 2024-01-01", "a: the YAML tag !!timestamp means nothing here"),
        ("!!int x", "a: cannot be read as int"),
        ("!!set {b}", "a: the YAML tag !!set means nothing here"),
        ("{<<: 5}", "a: << merges mappings, and this is none"),
        ("{{ .Values.a }}", "a: an unfilled template expression: {{ .Values.a }}"),
        ("&x [*x]", "*x stands in what it stands for: an alias in a circle"),
        ("*x", "there is no &x before *x"),
        ("[", "not YAML: "),
        ('"\\ud800"', "not YAML: "),
        ("\x07", "the character U+0007 cannot be in YAML"),
        ("[" * 200, f"nested too deeply to be read: more than {MAX_DEPTH} levels"),
        (f"[{'x,' * MAX_VALUES}]", "more than 20,000 values, counting what aliases stand for"),
    ],
)
def test_every_door_says_what_is_wrong_in_the_same_words(
    door: Callable[[str], Any], written: str, sentence: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        door(written)
    (said,) = [str(problem) for problem in caught.value.problems]
    assert sentence in said


# ── what else YAML lets pass ─────────────────────────────────────────────────────────────────────────────────────────


def test_lines_are_those_of_the_file_that_the_text_stands_in() -> None:
    text = "a:\n  b: |\n    text\n  c:\n  - 1\n  -\n    d: 2\n"
    found = document(text, first_line=10)
    assert found.lines == {("a",): 10, ("a", "b"): 11, ("a", "c"): 13, ("a", "c", 0): 14, ("a", "c", 1): 16} | {
        ("a", "c", 1, "d"): 16
    }
    assert found.text_lines[("a", "b")] == 12
    assert found.line_of(("a", "c", 7)) == 13
    assert found.line == 10


def test_a_key_written_twice_is_said_with_both_lines_and_the_first_holds() -> None:
    found = document("a: 1\nb:\n  c: 2\n  d: 3\n  c: 4\na: 5\n", 10)
    assert found.value == {"a": 1, "b": {"c": 2, "d": 3}}
    assert sorted(str(found.problem(fault)) for fault in found.faults) == [
        "f.yaml:14 b.c: written twice, on lines 12 and 14",
        "f.yaml:15 a: written twice, on lines 10 and 15",
    ]


def test_own_keys_win_over_merged_ones_even_when_they_are_null() -> None:
    merged = "base: &base {a: 1, b: 2}\nother: &other {a: 3, c: 4}\n"
    read = value(f"{merged}x: {{<<: *base, b: 5}}\ny: {{<<: [*base, *other]}}\nz: {{a: null, <<: *base}}\n")
    assert isinstance(read, dict)
    assert read["x"] == {"a": 1, "b": 5}
    assert read["y"] == {"a": 1, "b": 2, "c": 4}
    assert read["z"] == {"a": None, "b": 2}


def test_what_is_wrong_in_an_anchored_mapping_is_said_once() -> None:
    assert len(faults("a: &a {b: 1, b: 2}\nc: *a\nd: {<<: *a}\n")) == 1


def test_an_anchor_may_be_used_again_for_another_value() -> None:
    assert value("a: &x 1\nb: *x\nc: &x 2\nd: *x\n") == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_json_is_read_whatever_it_is_indented_with() -> None:
    assert value('{\n\t"a": [1,\n\t\t"b"],\n\t"c": {"d": null}}') == {"a": [1, "b"], "c": {"d": None}}


def test_the_documents_before_a_mistake_are_read() -> None:
    documents, (problem,) = read_documents("a: 1\n---\n# nothing\n---\nb: 2\n---\nc: [\n", "f.yaml")
    assert [each.value for each in documents] == [{"a": 1}, {"b": 2}]
    assert problem.line == 8


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("a:\n\tb: 1\n", "there is a tab"),
        ("a: {{ .b }}/c:{{ .d }}\n", "looks like a template"),
        ("a: b: c\n", "look at indentation"),
    ],
)
def test_what_is_no_yaml_gets_a_hint(text: str, hint: str) -> None:
    _, (problem,) = read_documents(text, "f.yaml")
    assert problem.message.startswith("not YAML: ")
    assert hint in str(problem.hint)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=20), inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=50, deadline=None)
@given(JSON)
def test_what_yaml_writers_write_is_read_back(written: Any) -> None:
    # In quotes throughout: PyYAML writes by YAML 1.1, where 1e5 and 1_0 without quotes are other things.
    text = yaml.safe_dump({"a": written}, default_style='"', allow_unicode=True)
    assert value(text) == {"a": written}


WORDS = ["- ", ": ", "\n  ", "&a ", "*a", "<<: ", "[*a, *a]", "---\n", "{a: ", "no"]
PIECES = st.sampled_from([*"ab:- \n\t{}[]&*!|>'\"%#,?<~=0.1\u00e9", *WORDS])


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, max_size=25).map("".join))
def test_any_text_is_read_or_refused_and_whatever_comes_out_is_json(text: str) -> None:
    documents, problems = read_documents(text, "f.yaml")
    for each in documents:
        assert json.loads(json.dumps(each.value, allow_nan=False)) == each.value
        assert all(str(each.problem(fault)) for fault in each.faults)
    assert all(problem.line and problem.line <= text.count("\n") + 1 for problem in problems)


@pytest.mark.parametrize("name", ["presets/phi-4.yaml", "tests/workspaces/quick_start_filled.yaml"])
def test_without_libyaml_the_same_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / name).read_text(encoding="utf-8")
    read = read_documents(text, name)
    monkeypatch.setattr(yaml_lines, "_Parser", yaml.SafeLoader)
    assert read_documents(text, name) == read
    assert read[0]


# ── files ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_that_cannot_be_read_is_said_by_its_flag(tmp_path: Path) -> None:
    (tmp_path / "patch.yaml").write_text("")
    with pytest.raises(InputMissingError, match=r"^--patch patch\.yml: there is no such file$") as missing:
        read_text(tmp_path / "patch.yml", "--patch patch.yml")
    assert missing.value.hint == 'did you mean "patch.yaml"?'
    with pytest.raises(InputMissingError, match=r"^--patch d: cannot be read: Is a directory$"):
        read_text(tmp_path, "--patch d")
    (tmp_path / "latin").write_bytes(b"a: 1\nb: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"^latin:2: not UTF-8 text$"):
        read_text(tmp_path / "latin", "latin")


def test_no_more_than_the_limit_is_taken_from_a_file_without_end() -> None:
    with pytest.raises(ConfigError, match="bytes are too many"):
        read_text(Path("/dev/zero"), "/dev/zero")


# ── limits ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def bomb(levels: int, item: Callable[[int, str], str]) -> str:
    lines = [f"a0: &a0 {item(0, 'x')}"]
    lines += [f"a{level}: &a{level} {item(level, f'*a{level - 1}')}" for level in range(1, levels)]
    return "\n".join(lines) + "\n"


def a_list(_: int, of: str) -> str:
    return f"[{', '.join([of] * 10)}]"


def a_mapping(_: int, of: str) -> str:
    return "{" + ", ".join(f"k{number}: {of}" for number in range(10)) + "}"


def merged(level: int, of: str) -> str:
    return f"{{<<: [{', '.join([of] * 10)}], k{level}: 1}}" if level else "{k: x}"


def numbered(template: str, count: int) -> str:
    return "".join(template.format(number) for number in range(count))


ATTACKS = {
    "aliases of lists": bomb(9, a_list),
    "aliases of mappings": bomb(9, a_mapping),
    "aliases in keys": bomb(9, a_list) + "{*a8 : 1}: x\n",
    "merge keys": bomb(9, merged),
    "a chain of merge keys": "a: {a0: &m0 {k: 1}"
    + "".join(f", a{n}: &m{n} {{<<: *m{n - 1}, k{n}: 1}}" for n in range(1, 4000)),
    "many merge sources": "a:\n  <<: [" + numbered("{{k{0}: 1}}, ", 9_000) + "]\n",
    "a long text often": f"a: &a {'x' * 500_000}\nb: [{'*a,' * 10_000}]\n",
    "a long template often": f"a: &a {{{{ x{' ' * 400_000}}}}}\nb: [{'*a,' * 4_000}]\n",
    "many aliases": f"a: &a x\nb: [{'*a,' * 300_000}]\n",
    "many anchors": f"a: [{numbered('&a{0} x, ', 80_000)}]\n",
    "nested lists": "[" * 1_000_000,
    "nested mappings": "{a: " * 250_000,
    "nested lines": numbered("- ", 400_000),
    "nested keys": "? " * 500_000,
    "nested by indentation": "".join(f"{' ' * depth}a:\n" for depth in range(1_300)),
    "a long word": f"a: {'x' * 1_000_000}\n",
    "many words": f"a: {'x ' * 500_000}\n",
    "many escapes": 'a: "' + "\\x41" * 200_000 + '"\n',
    "a long key": f"? {'k' * 1_000_000}\n: 1\n",
    "a long whole number": f"a: {'1' * 1_000_000}\n",
    "a long hexadecimal number": f"a: 0x{'f' * 1_000_000}\n",
    "a long sexagesimal number": f"a: {'1:' * 500_000}1\n",
    "a long fraction": f"a: 0.{'1' * 1_000_000}\n",
    "many documents": "--- a\n" * 170_000,
    "many duplicates": "a: 1\n" * 9_900,
    "many pairs": numbered("k{0}: 1\nk{0}: 2\n", 4_900),
    "many keys that are not text": numbered("{0}: 1\n", 9_900),
    "many tags": f"a: [{'!t x, ' * 19_000}]\n",
    "a long tag": f"a: !{'t' * 1_000_000} x\n",
    "many tag directives": numbered("%TAG !{0}! tag:x\n", 50_000) + "---\na: 1\n",
    "a long tag directive": f"%TAG ! tag:{'x' * 500_000}\n---\na: [{'!t x,' * 19_000}]\n",
    "a list of many lines": "a: [\n" + "x,\n" * 300_000 + "]\n",
    "comments": "# x\n" * 260_000,
    "empty lines": "\n" * 1_000_000,
    "values at the limit": f"a: [{'[],' * 19_000}]\n",
    "more than a mebibyte": "a: 1\n" * 300_000,
}


@pytest.mark.parametrize("text", ATTACKS.values(), ids=ATTACKS.keys())
def test_no_text_takes_long_or_says_much(text: str) -> None:
    began = time.process_time()
    documents, problems = read_documents(text, "f.yaml")
    written = json.dumps([each.value for each in documents])
    said = [*problems, *(each.problem(fault) for each in documents for fault in each.faults)]
    assert time.process_time() - began < 3  # about 0.1 s on a machine with nothing else to do
    assert len(written) <= 6 * MAX_BYTES
    assert len(said) <= MOST_PROBLEMS + 1
    assert max((len(str(problem)) for problem in said), default=0) < 300


def test_an_alias_counts_for_what_it_stands_for() -> None:
    row = f"a: &a [{', '.join(['x'] * 99)}]\nb: "
    assert isinstance(value(row + f"[{', '.join(['*a'] * 198)}]\n"), dict)
    assert refusal(row + f"[{', '.join(['*a'] * 199)}]\n") == (
        "f.yaml:2: more than 20,000 values, counting what aliases stand for"
    )
    deep = "a: &a " + "[" * 40 + "]" * 40 + "\nb: "
    assert isinstance(value(deep + "[" * 20 + "*a" + "]" * 20), dict)
    assert refusal(deep + "[" * 30 + "*a" + "]" * 30) == (
        f"f.yaml:2: nested too deeply to be read: more than {MAX_DEPTH} levels"
    )
    long = f"a: &a {'x' * 100_000}\nb: "
    assert isinstance(value(long + "[*a, *a]"), dict)
    assert refusal(long + f"[{'*a,' * 10}]") == "f.yaml:2: more than 1,048,576 bytes, counting what aliases stand for"


def test_a_config_map_of_half_a_kilobyte_costs_a_controller_nothing() -> None:
    render = RevisionRenderer(Request(place="pod"), JobOptions(image="example.com/tuner:1"))
    text = bomb(9, a_list) + "training_config: {LoraConfig: {target_modules: *a8}}\n"
    began = time.process_time()
    with pytest.raises(ConfigError) as caught:
        render(make_workspace(config="config"), make_config_map("config", text), 1)
    assert time.process_time() - began < 3
    assert [str(problem) for problem in caught.value.problems] == [
        "configmap/config:5: more than 20,000 values, counting what aliases stand for"
    ]


def test_reading_stays_below_200_megabytes(tmp_path: Path) -> None:
    for name in ("aliases of lists", "a long text often", "values at the limit", "many words", "many tags"):
        (tmp_path / f"{name}.yaml").write_text(ATTACKS[name])
    code = (
        "import pathlib, re, sys\n"
        "from tuner.yaml_lines import read_documents\n"
        "for path in pathlib.Path(sys.argv[1]).iterdir():\n"
        "    read_documents(path.read_text(), path.name)\n"
        "print(re.search('VmHWM: *(.+) kB', pathlib.Path('/proc/self/status').read_text().replace(chr(9), ' '))[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200_000


@pytest.mark.parametrize("where", ["metadata", "tuning"])
@pytest.mark.parametrize(
    ("large", "sentence"),
    [
        (["x"] * MAX_VALUES, "more than 20,000 values"),
        (json.loads("[" * 100 + "]" * 100), "nested too deeply to be read"),
        (json.loads('{"a":' * 900 + "1" + "}" * 900), "nested too deeply to be read"),
    ],
)
def test_an_object_of_the_api_server_has_the_same_limits(where: str, large: Any, sentence: str) -> None:
    workspace = make_workspace()
    workspace[where]["odd"] = large
    with pytest.raises(ConfigError) as caught:
        parse_objects(workspace)
    (problem,) = caught.value.problems
    assert sentence in problem.message


def test_a_configuration_with_thousands_of_problems_says_the_first_hundred() -> None:
    text = "training_config:\n  TrainingArguments:\n" + numbered("    learning_rat{0}: 1\n", 9_000)
    began = time.process_time()
    with pytest.raises(ConfigError, match="more than 100 problems") as caught:
        resolve_training_config(
            method="qlora", preset=find_preset("phi-4"), config_map=ConfigSource(text, "config.yaml")
        )
    assert time.process_time() - began < 5
    *first, last = caught.value.problems
    assert [problem.line for problem in first] == list(range(3, 103))
    assert last == Problem("there are more problems than these")
