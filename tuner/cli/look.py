"""`tuner presets`, `tuner init` and `tuner data preview`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.common import (
    open_talk,
    say,
)
from tuner.cli.options import (
    AsJson,
    Config,
    app,
    data_app,
)
from tuner.errors import ConfigError, DataError, InputMissingError, UsageError


@app.command(epilog="Example: tuner presets phi-3-mini-4k-instruct")
def presets(
    name: Annotated[str | None, typer.Argument(help="show one")] = None,
    as_json: AsJson = False,
) -> None:
    """List the models whose facts are known; any other Hugging Face id and any directory works too."""
    import json

    from tuner.presets import find_preset, load_presets

    if name is not None:
        preset = find_preset(name)
        if as_json:
            print(preset.model_dump_json(indent=2))
            return
        import yaml

        shown = preset.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
        print(yaml.safe_dump(shown, sort_keys=False, allow_unicode=True), end="")
        return
    known = load_presets()
    if as_json:
        print(json.dumps([preset.model_dump(mode="json") for preset in known.values()]))
        return
    width = max(len(name) for name in known)
    print(f"{'NAME':<{width}}  {'CONTEXT':>8}  {'WEIGHTS':>8}  {'TOKEN':<5}  {'LICENCE':<12}  MODEL")
    for preset in known.values():
        weights = f"{preset.weights_gib:.1f} GiB" if preset.weights_gib else "–"
        token = "yes" if preset.gated else "no"
        context = f"{preset.context_length:,}" if preset.context_length else "–"
        print(
            f"{preset.name:<{width}}  {context:>8}  {weights:>8}  {token:<5}  {preset.licence or '–':<12}  "
            f"{preset.model_id}"
        )


@app.command(epilog="Example: tuner init --preset qwen3-4b workspace.yaml")
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE")] = Path("workspace.yaml"),
    preset: Annotated[str, typer.Option("--preset", help="see `tuner presets`")] = "phi-3-mini-4k-instruct",
) -> None:
    """Write a commented Workspace to start from."""
    from tuner.presets import find_preset
    from tuner.workspace import template_workspace

    text = template_workspace(find_preset(preset).name)
    if not path.absolute().parent.is_dir():
        raise InputMissingError(f"{path.parent}: there is no such directory")
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{path} is there already", hint="give another file name") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}", hint="give another place") from error
    say(f"wrote {path}; replace what says example.com, then: tuner check {path}")


@data_app.command("preview", epilog="Example: tuner data preview train.parquet --rows 3")
def data_preview(
    files: Annotated[list[Path], typer.Argument(metavar="FILE…", help="data files of any format")],
    preset: Annotated[
        str | None, typer.Option("--preset", help="whose chat template to use [the base model's]")
    ] = None,
    base_model: Annotated[
        Path | None, typer.Option("--base-model", metavar="DIR", help="a model's files, whose tokenizer counts exactly")
    ] = None,
    config: Config = None,
    rows: Annotated[int, typer.Option("--rows", min=0, help="how many rows to show")] = 3,
) -> None:
    """Show rows, token counts and, in colour, which tokens are learnt. Rows that would stop a run end it with 65."""
    from tuner.pipeline.preview import load_preview, print_preview

    with open_talk() as talk:
        preview = load_preview(files, preset, base_model, config, rows, talk)
    print_preview(preview, sys.stdout)
    if preview.stops:
        sys.stdout.flush()  # the error is the last thing to be read
        raise DataError(
            f"a run would stop: {'; '.join(preview.stops)}",
            hint="correct these rows, or change the setting in the ConfigMap (here: --config FILE)",
        )
