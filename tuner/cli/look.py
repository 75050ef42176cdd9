"""`tuner presets`, `tuner init` and `tuner data preview`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from tuner.cli import completion
from tuner.cli.common import open_talk, say
from tuner.cli.flags import command, data, registered, training
from tuner.cli.options import AsJson, BaseModel, SettingFlags
from tuner.errors import ConfigError, DataError, InputMissingError, UsageError

data_app = registered["data"] = typer.Typer(
    help="Look at data before it is trained on.",
    epilog="Example: tuner data preview train.parquet",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@data_app.callback()
def _data() -> None: ...  # or Typer would make its one command of it


@command("presets", example="tuner presets phi-3-mini-4k-instruct")
def presets(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="show one", autocompletion=completion.presets)],
    as_json: AsJson,
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


@command("init", example="tuner init --preset qwen3-4b workspace.yaml")
def init(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="to write")] = Path("workspace.yaml"),
    preset: Annotated[
        str,
        training("--preset", metavar="NAME", help="see `tuner presets`", autocompletion=completion.presets),
    ] = "phi-3-mini-4k-instruct",
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


@command(
    "preview",
    example="tuner data preview train.parquet --rows 3",
    of=data_app,
)
def data_preview(
    files: Annotated[tuple[Path, ...], typer.Argument(metavar="FILE…", help="data files of any format")],
    preset: Annotated[
        str | None,
        training(
            "--preset",
            metavar="NAME",
            help="whose chat template to use [the base model's]",
            autocompletion=completion.presets,
        ),
    ],
    base_model: BaseModel,
    flags: SettingFlags,
    rows: Annotated[int, data("--rows", metavar="N", min=0, help="how many rows to show")] = 3,
) -> None:
    """Show rows, and which tokens are learnt.

    In colour, with counts of tokens. Rows that would stop a run end it with 65.
    """
    from tuner.pipeline.preview import load_preview, print_preview

    with open_talk() as talk:
        preview = load_preview(files, preset, base_model, flags.config, flags.overrides, rows, talk)
    print_preview(preview, sys.stdout)
    if preview.stops:
        sys.stdout.flush()  # the error is the last thing to be read
        raise DataError(
            f"a run would stop: {'; '.join(preview.stops)}",
            hint="correct these rows, or change the setting in the ConfigMap (here: --config FILE)",
        )
