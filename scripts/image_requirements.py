"""The requirements files of the image's layers: torch.txt, control.txt, run.txt and constraints.txt.

The Dockerfile runs it in a stage of its own, with the base image's Python and nothing else.
"""

import argparse
import os
import tomllib
from collections.abc import Sequence
from pathlib import Path


def layers(pyproject: str, constraints: str, extras: Sequence[str], torch: str | None) -> dict[str, list[str]]:
    """File name → lines. `torch` replaces the pinned one, for the build for CPUs or another CUDA."""
    project = tomllib.loads(pyproject)["project"]
    unknown = [extra for extra in extras if extra not in project["optional-dependencies"]]
    if unknown:
        raise SystemExit(f"error: EXTRAS has {', '.join(unknown)}, which pyproject.toml does not have")
    pins = [line for line in constraints.splitlines() if line and not line.startswith("#")]
    pinned_torch = torch or next(pin for pin in pins if pin.startswith("torch=="))
    control = project["dependencies"]
    return {
        "torch.txt": [pinned_torch],
        "control.txt": control,
        "run.txt": [*control, *(line for extra in extras for line in project["optional-dependencies"][extra])],
        "constraints.txt": [pinned_torch, *(pin for pin in pins if not pin.startswith("torch=="))],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("project", type=Path, help="directory of pyproject.toml and constraints.txt")
    parser.add_argument("into", type=Path)
    parser.add_argument("--extras", default="", help="those of `run`, with commas between")
    parser.add_argument("--torch", default="", help="torch==…")
    options = parser.parse_args()
    pyproject = (options.project / "pyproject.toml").read_text(encoding="utf-8")
    constraints = (options.project / "constraints.txt").read_text(encoding="utf-8")
    extras = [extra.strip() for extra in options.extras.split(",") if extra.strip()]
    options.into.mkdir(parents=True)
    for name, lines in layers(pyproject, constraints, extras, options.torch).items():
        path = options.into / name
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        os.utime(path, (0, 0))  # builders compare times too: only new words may make a new layer


if __name__ == "__main__":
    main()
