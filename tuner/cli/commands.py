"""`tuner` and its commands by name. What a command needs is imported when it is called."""

from collections.abc import Iterator, Mapping
from functools import cache
from importlib import import_module
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from tuner.cli.flags import registered

# Name → the module that registers it, and its line in `tuner --help`, in which order they stand: 45 characters at most.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Train on this machine and push the adapter"),
    "check": ("run", "Find what would go wrong, before it does"),
    "plan": ("run", "Estimate memory, time and cost on a GPU"),
    "render": ("cluster", "Print a run's Kubernetes objects"),
    "submit": ("submit", "Run a Workspace as a Job in a cluster"),
    "status": ("follow", "Show where a run in the cluster stands"),
    "logs": ("follow", "Print the logs of a run, stage by stage"),
    "events": ("follow", "Print what the cluster says of a run"),
    "cancel": ("follow", "Stop a run after a checkpoint"),
    "delete": ("follow", "Delete a run's Jobs, ConfigMap and Secrets"),
    "retry-push": ("follow", "Push a trained adapter from its volume"),
    "install": ("install", "Install the controller in a cluster"),
    "uninstall": ("install", "Remove the controller from a cluster"),
    "controller": ("controller", "Run the controller (in its Deployment)"),
    "presets": ("look", "List the known base models"),
    "init": ("look", "Write a Workspace to start from"),
    "stage": ("stage", ""),  # for pods: not shown
    "push": ("images", "Push an adapter directory as an image"),
    "verify": ("images", "Check an adapter image, digests and weights"),
    "pull": ("images", "Fetch and unpack an adapter or data image"),
    "merge": ("images", "Add an adapter to its base model's weights"),
    "data": ("look", "Look at data before training"),
}


class _OnDemand(Mapping[str, Any]):
    """The commands as Typer keeps them, each made when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        return _made(name)

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)


@cache
def _made(name: str) -> Any:
    module, line = COMMANDS[name]
    import_module(f"tuner.cli.{module}")
    made: Any = typer.main.get_command(registered[name])
    made.short_help, made.hidden = line, not line
    return made


class _Commands(TyperGroup):
    """What lists the commands does not make them."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands: Any = _OnDemand()

    def list_commands(self, _ctx: Any) -> list[str]:
        return list(COMMANDS)

    def format_commands(self, _ctx: Any, formatter: Any) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in COMMANDS.items() if line])

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        self.commands = {
            name: TyperCommand(name, short_help=line, hidden=not line) for name, (_, line) in COMMANDS.items()
        }
        return super().shell_complete(ctx, incomplete)


app = typer.Typer(
    name="tuner",
    cls=_Commands,
    help="Run the tuning section of a KAITO Workspace: data in, 4-bit QLoRA, a pushed adapter image out.",
    epilog="Example: tuner run workspace.yaml",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        from tuner import __version__

        print(f"tuner {__version__}")
        raise typer.Exit


@app.callback()
def _global(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None: ...
