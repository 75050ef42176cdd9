"""The Dockerfile keeps in step with the project, without building it: ./scripts/test-image does that."""

import importlib.util
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
CONSTRAINTS = (ROOT / "scripts/constraints.txt").read_text("utf-8")
TARGETS = ("control", "run")


@dataclass(frozen=True)
class Instruction:
    stage: str
    name: str
    value: str


def read_dockerfile() -> list[Instruction]:
    lines = [line for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if not line.startswith("#")]
    found, stage = [], ""
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        if line.strip():
            name, value = line.split(maxsplit=1)
            stage = value.split(" AS ")[1] if name == "FROM" else stage
            found.append(Instruction(stage, name, re.sub(r"\s+", " ", value)))
    return found


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"scripts_{name}", ROOT / "scripts" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look for it there
    spec.loader.exec_module(module)
    return module


DOCKERFILE = read_dockerfile()
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
REQUIREMENTS = load_script("image_requirements")
BUILD = load_script("test_image")


def values(stage: str, name: str) -> list[str]:
    return [each.value for each in DOCKERFILE if (each.stage, each.name) == (stage, name)]


def default(argument: str) -> str:
    found = {each.value for each in DOCKERFILE if each.name == "ARG" and each.value.startswith(f"{argument}=")}
    assert len(found) == 1, f"{argument} has {len(found)} defaults"
    return found.pop().partition("=")[2].strip('"')


def image_layers(extras: str | None = None, torch: str | None = None) -> dict[str, list[str]]:
    extras = default("EXTRAS") if extras is None else extras
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    made: dict[str, list[str]] = REQUIREMENTS.layers(pyproject, CONSTRAINTS, extras.split(","), torch)
    return made


def packages(lines: list[str]) -> set[str]:
    return {Requirement(line).name.lower() for line in lines}


# ── what is installed ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_layers_have_what_the_project_asks_for() -> None:
    layers = image_layers()
    assert packages(layers["control.txt"]) == packages(PROJECT["dependencies"])
    train = PROJECT["optional-dependencies"]["train"]
    assert packages(layers["run.txt"]) >= packages(PROJECT["dependencies"]) | packages(train)
    assert packages(layers["torch.txt"]) == {"torch"}


def test_the_control_image_has_nothing_that_trains() -> None:
    assert not packages(image_layers()["control.txt"]) & packages(PROJECT["optional-dependencies"]["train"])


def test_every_pin_is_one_that_the_project_allows() -> None:
    """What is pinned and not asked for by name (accelerate) came with something that is."""
    pins = [Requirement(line) for line in image_layers()["constraints.txt"]]
    asked = [*PROJECT["dependencies"], *(line for extra in PROJECT["optional-dependencies"].values() for line in extra)]
    specifiers = {Requirement(line).name.lower(): Requirement(line).specifier for line in asked}
    assert pins
    for pin in pins:
        (pinned,) = pin.specifier
        assert pinned.operator == "==", pin
        assert specifiers.get(pin.name.lower(), SpecifierSet()).contains(pinned.version), pin


def test_another_torch_replaces_the_pinned_one_in_every_file() -> None:
    layers = image_layers(torch="torch==2.13.0+cpu")
    assert layers["torch.txt"] == ["torch==2.13.0+cpu"]
    assert [line for line in layers["constraints.txt"] if line.startswith("torch==")] == ["torch==2.13.0+cpu"]


def test_an_extra_that_is_none_stops_the_build() -> None:
    with pytest.raises(SystemExit, match="EXTRAS has trian"):
        image_layers(extras="trian")


def test_the_files_are_equal_to_the_bit_and_second_as_long_as_no_requirement_changes(tmp_path: Path) -> None:
    """Builders look at both before they make a layer of gigabytes anew."""
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    seen = []
    for name, text in (("before", pyproject), ("after", pyproject + "\n[tool.other]\nline-length = 1\n")):
        source = tmp_path / name
        source.mkdir()
        (source / "pyproject.toml").write_text(text)
        (source / "constraints.txt").write_text(CONSTRAINTS)
        command = [ROOT / "scripts/image_requirements.py", source, source / "made", "--extras", default("EXTRAS")]
        subprocess.run([sys.executable, *command], check=True)
        files = sorted((source / "made").iterdir())
        seen.append([(file.name, file.read_bytes(), file.stat().st_mtime) for file in files])
    assert len(seen[0]) == 4
    assert seen[0] == seen[1]


def test_our_code_is_the_last_layer_and_brings_no_library() -> None:
    """A change of code is a few hundred kilobytes to pull."""
    for target in TARGETS:
        *libraries, code = [value for value in values(target, "RUN") if "pip install" in value]
        assert libraries
        assert "--no-deps --no-index /opt/tuner/*.whl" in code
        assert all("*.whl" not in value for value in libraries)
        changing = [value for value in values(target, "COPY") if not value.startswith("--from=")]
        assert changing == [], "a file of the project would make all later layers anew"


# ── what is copied ───────────────────────────────────────────────────────────────────────────────────────────────────


def copied_paths() -> set[str]:
    found = [each.value for each in DOCKERFILE if each.name == "COPY" and not each.value.startswith("--from=")]
    return {path for value in found for path in value.split()[:-1]}


def test_the_build_context_is_what_the_dockerfile_copies() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line.removeprefix("!") for line in lines if line.startswith("!")} == copied_paths()
    for path in copied_paths():
        assert (ROOT / path).exists(), path


def test_the_wheel_stage_has_what_the_wheel_is_made_of() -> None:
    hatch = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {"pyproject.toml", PROJECT["readme"], *PROJECT["license-files"], *hatch["packages"]}
    assert needed | set(hatch["force-include"]) == {
        path for value in values("wheel", "COPY") for path in value.split()[:-1]
    }


# ── how it runs ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("target", TARGETS)
def test_it_runs_tuner_without_a_shell_as_a_numbered_user(target: str) -> None:
    """runAsNonRoot refuses a user by name."""
    assert values(target, "USER")[-1] == "65532:65532"
    assert values(target, "ENTRYPOINT") == ['["tuner"]']
    assert values(target, "WORKDIR")[-1] == "/tmp"
    after = [each.name for each in DOCKERFILE if each.stage == target]
    assert "RUN" not in after[after.index("USER") :]


@pytest.mark.parametrize("target", TARGETS)
def test_labels_say_version_revision_and_source_and_no_time(target: str) -> None:
    (labels,) = values(target, "LABEL")
    for name in ("version", "revision", "source"):
        assert f'org.opencontainers.image.{name}="${{{name.upper()}}}"' in labels
    assert "created" not in labels
    assert default("VERSION") == PROJECT["version"]


def test_the_base_is_the_python_that_the_versions_were_tried_on() -> None:
    match = re.fullmatch(r"docker\.io/library/python:(3\.\d+)-slim-\w+", default("BASE"))
    assert match is not None
    assert SpecifierSet(PROJECT["requires-python"]).contains(f"{match[1]}.0")
    assert f"tried together on Python {match[1]}." in CONSTRAINTS


def test_no_syntax_that_only_one_builder_reads() -> None:
    text = (ROOT / "Dockerfile").read_text("utf-8")
    for syntax in ("# syntax=", "--mount", "<<", "--link", "ADD ", "--chmod"):
        assert syntax not in text, syntax


# ── what test-image says of sizes ────────────────────────────────────────────────────────────────────────────────────


def test_sizes_are_read_as_they_were_written() -> None:
    sizes = {("run", "torch"): 217.1, ("run", "all"): 669.2, ("run with CUDA", "estimate"): 3207.7}
    assert BUILD.read_sizes(BUILD.render_sizes(sizes)) == sizes
    assert BUILD.read_sizes(BUILD.SIZES.read_text("utf-8"))["run with CUDA", "estimate"] <= BUILD.CUDA_LIMIT_MB


@pytest.mark.parametrize(
    ("layers", "estimate", "complaint"),
    [
        ({"tuner": 6.0}, 3000, "control: our code is 6.0 MB, more than 5"),
        ({"tuner": 1.0}, 4001, "about 4,001 MB, more than 4,000"),
        ({"libraries": 112.0}, None, "control, libraries: 112.0 MB, was 100.0; if that is right: --write"),
    ],
)
def test_what_has_grown_too_much_is_an_error(
    layers: dict[str, float], estimate: float | None, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tmp_path / "sizes.md"
    sizes.write_text(BUILD.render_sizes({("control", "libraries"): 100.0}))
    monkeypatch.setattr(BUILD, "SIZES", sizes)
    with pytest.raises(SystemExit, match=re.escape(complaint)):
        BUILD.judge({"control": layers}, estimate, write=False)
    BUILD.judge({"control": {"libraries": 109.0}}, 3999, write=False)


@pytest.mark.parametrize("target", TARGETS)
def test_every_layer_that_the_dockerfile_makes_has_a_name(target: str) -> None:
    made = [value for stage in ("base", target) for value in values(stage, "RUN")]
    names = [BUILD.layer_name(value) for value in made]
    assert "base" not in names
    assert len(set(names)) == len(made)


# ── the package ──────────────────────────────────────────────────────────────────────────────────────────────────────


def build_package(project: Path, kind: str, into: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(into)]
    subprocess.run(command, cwd=project, check=True, capture_output=True)
    (built,) = into.glob("*.whl" if kind == "wheel" else "*.tar.gz")
    return built


def wheel_files(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def test_the_wheel_has_presets_and_templates_and_the_source_archive_makes_the_same(tmp_path: Path) -> None:
    files = wheel_files(build_package(ROOT, "wheel", tmp_path / "wheel"))
    for folder in ("presets", "job_templates"):
        here = {str(path.relative_to(ROOT)) for path in (ROOT / folder).rglob("*") if path.is_file()}
        assert here
        assert {f"tuner/_data/{name}" for name in here} == {
            name for name in files if name.startswith(f"tuner/_data/{folder}/")
        }
    assert not any(name.startswith(("tests", "scripts")) for name in files)

    with tarfile.open(build_package(ROOT, "sdist", tmp_path / "sdist")) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (project,) = (tmp_path / "unpacked").iterdir()
    assert wheel_files(build_package(project, "wheel", tmp_path / "again")) == files
    for name in ("tests/test_image.py", "scripts/test", "docs/architecture.md", "Dockerfile", "CHANGELOG.md"):
        assert (project / name).is_file(), name
