"""Options as fields of dataclasses, where they stand in --help, and that each is said once."""

import ast
import re
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import typer.main

import tuner
from tuner.cli import main
from tuner.cli.cluster_options import PodFlags
from tuner.cli.commands import COMMANDS as LINES
from tuner.cli.commands import app
from tuner.cli.flags import PANELS, GroupedCommand, flattened, network, training
from tuner.cli.options import PushFlags
from tuner.cluster.job_options import JobOptions
from tuner.errors import UsageError
from tuner.registry.push_state import PushOptions


def every_command() -> dict[str, Any]:
    """`data preview` → its command, of all that there are."""

    def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
        yield path, command
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, f"{path} {name}".strip())

    return dict(walk(typer.main.get_command(app), ""))


COMMANDS = every_command()

# ── a dataclass and its options ──────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, kw_only=True)
class Shared:
    ca: Annotated[Path | None, network("--ca")]
    ranges: Annotated[tuple[str, ...], network("--range")]
    retries: Annotated[int, network("--retries", min=0)] = 3


@dataclass(frozen=True, kw_only=True)
class Own(Shared):
    smoke: Annotated[bool, training("--smoke")]
    kind: Annotated[Literal["one", "two"] | None, training("--kind")]


def called(*argv: str) -> tuple[str, Own, Shared]:
    """What a command gets that is called so; `Own` and `Shared` have options in common."""
    seen: list[tuple[str, Own, Shared]] = []

    def command(name: Annotated[str, typer.Argument()], flags: Own, shared: Shared) -> None:
        seen.append((name, flags, shared))

    program = typer.Typer(add_completion=False)
    program.command()(flattened(command))
    program(list(argv), standalone_mode=False)
    return seen[0]


def test_a_command_gets_its_options_as_typed_values() -> None:
    name, flags, shared = called("x", "--ca", "f", "--range", "a", "--range", "b", "--kind", "two", "--smoke")
    assert (name, flags) == ("x", Own(ca=Path("f"), ranges=("a", "b"), retries=3, smoke=True, kind="two"))
    assert shared == Shared(ca=Path("f"), ranges=("a", "b"), retries=3)


def test_an_option_that_is_not_given_is_none_false_no_values_or_its_default() -> None:
    assert called("x")[1] == Own(ca=None, ranges=(), retries=3, smoke=False, kind=None)


def test_a_word_that_is_not_one_of_a_literals_is_refused_with_all_of_them() -> None:
    with pytest.raises(UsageError, match="--kind three: must be one or two"):
        called("x", "--kind", "three")


# ── each once ────────────────────────────────────────────────────────────────────────────────────────────────────────

# The same word for other things: what it is depends on what the command does.
HOMONYMS = {
    "--check-job",  # prints it; runs it or not; when the controller does
    "--data",  # files; URLs; look at it, too
    "--dry-run",
    "--image",  # the controller cannot do without
    "--namespace",  # of new objects; of a run; of the controller; to watch
    "--output",  # a pod's is an image
    "--preset",
    "--registry-checkpoints",  # of `stage`, which is told by a Job
    "--ttl",  # the controller must see the end
    "--wait",
    "--work-dir",
}


def options() -> dict[str, dict[str, Any]]:
    """Option → command → all that Typer knows of it."""
    found: dict[str, dict[str, Any]] = defaultdict(dict)
    for path, command in COMMANDS.items():
        for param in command.params:
            if param.param_type_name == "option":
                found[max(param.opts, key=len)][path] = param
    return found


def test_an_option_is_the_same_in_every_command_that_has_it() -> None:
    unlike = set()
    for name, by_command in options().items():
        known = ("help", "metavar", "envvar", "default", "min", "multiple", "rich_help_panel")
        said = {tuple(str(getattr(each, fact, None)) for fact in known) for each in by_command.values()}
        if len(said) > 1:
            unlike.add(name)
    assert unlike == HOMONYMS
    assert len(options()) > 60


def test_what_an_option_defaults_to_is_what_the_code_below_does() -> None:
    push = {field.name: field.default for field in fields(PushFlags)}
    assert (push["push_deadline"], push["compression"]) == (PushOptions().deadline_s, PushOptions().compression)
    (retries,) = (field.default for field in fields(PodFlags) if field.name == "retries")
    assert retries == JobOptions("x").backoff_limit


def test_no_function_takes_more_than_twelve_parameters() -> None:
    """But for a GPU kernel: Triton knows no structures."""
    found = {}
    for path in Path(tuner.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                found[f"{path.name}: {node.name}"] = len(
                    [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                )
    assert len(found) > 1000
    assert {name for name, count in found.items() if count > 12} == {"triton_kernels.py: _rotate_kernel"}


# ── help ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def help_of(path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, columns: int = 80) -> str:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main([*path.split(), "--help"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("columns", [60, 80, 200])
def test_every_command_has_one_whole_line_in_the_list(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of("", capsys, monkeypatch, columns)
    for name, (_, line) in LINES.items():
        assert len(line) <= 45
        assert not line or re.search(rf"^  {name} +{re.escape(line)}$", text, re.MULTILINE), name
    assert "..." not in text.partition("Commands:")[2]
    assert not re.search(r"^  stage", text, re.MULTILINE)


def test_a_name_in_the_list_is_a_command() -> None:
    assert {path for path in COMMANDS if path and " " not in path} == set(LINES)
    assert {path for path, command in COMMANDS.items() if command.hidden} == {"stage"}


@pytest.mark.parametrize("path", [path for path, command in COMMANDS.items() if isinstance(command, GroupedCommand)])
def test_many_options_stand_in_groups_and_each_stands_once(
    path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of(path, capsys, monkeypatch)
    shown = [param for param in COMMANDS[path].params if param.param_type_name == "option" and not param.hidden]
    headings = re.findall(r"^(\w+):$", text, re.MULTILINE)
    if len(shown) > 8:
        assert set(headings) <= {"Arguments", *PANELS}
        assert len(headings) >= 4
        assert all(param.rich_help_panel for param in shown)
    else:
        assert headings[-1:] == ["Options"]
        assert set(headings) <= {"Arguments", "Options"}
    names = re.findall(r"^  (?:-\w, )?(--[\w-]+)", text, re.MULTILINE)
    assert sorted(names) == sorted([*(max(param.opts, key=len) for param in shown), "--help"])
    assert [heading for heading in PANELS if heading in headings] == [each for each in headings if each in PANELS]


@pytest.mark.parametrize("columns", [60, 80])
def test_no_line_of_a_help_is_wider_than_the_terminal_but_the_example(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in COMMANDS:
        *lines, example = help_of(path, capsys, monkeypatch, columns).rstrip().splitlines()
        assert [line for line in lines if len(line) > columns] == []
        assert example.startswith("  Example: tuner ")  # in one line, to be copied


def test_a_terminal_without_colours_gets_the_same_help(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = help_of("run", capsys, monkeypatch)
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.setenv("NO_COLOR", "1")
    assert help_of("run", capsys, monkeypatch) == text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("argv", "modules"), [(["--help"], set()), (["status", "--help"], {"follow"}), (["--version"], set())]
)
def test_a_command_is_imported_alone(argv: list[str], modules: set[str]) -> None:
    code = f"import sys; from tuner.cli import main; main({argv}); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    commands = {f"tuner.cli.{module}" for module, _ in LINES.values()}
    assert commands & set(done.stderr.split()) == {f"tuner.cli.{module}" for module in modules}


def test_all_commands_are_there() -> None:
    assert {"run", "check", "presets", "init", "data preview", "push", "pull", "stage"} <= COMMANDS.keys()


@pytest.mark.parametrize("path", COMMANDS)
def test_the_short_flag_helps_too(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path.split(), "-h"]) == 0
    said = capsys.readouterr().out
    assert main([*path.split(), "--help"]) == 0
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("path", COMMANDS)
def test_every_help_ends_with_an_example_that_parses(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*path.split(), "--help"]) == 0
    program, *words = shlex.split(capsys.readouterr().out.partition("Example:")[2])
    assert program == "tuner"
    name = max((known for known in COMMANDS if " ".join(words).startswith(known)), key=len)
    assert name.startswith(path)
    command = COMMANDS[name]
    with command.make_context(name, words[len(name.split()) :], resilient_parsing=False):
        pass


@pytest.mark.parametrize("path", ["presets", "init"])
def test_an_example_that_costs_nothing_works(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = shlex.split(COMMANDS[path].epilog.removeprefix("Example: "))
    assert main(words[1:]) == 0


def test_help_imports_nothing_heavy() -> None:
    code = "import sys; from tuner.cli import main; main(['--help']); print(' '.join(sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    assert "typer" in loaded
    assert not loaded & {
        *("torch", "pyarrow", "httpx2", "oras", "huggingface_hub", "pydantic", "yaml", "transformers", "kubernetes"),
        "prometheus_client",
    }
