"""Commands over dataclasses: Typer sees an option for each field, a command gets typed values.

    @dataclass(frozen=True, kw_only=True)
    class SettingFlags:
        config: Annotated[Path | None, training("--config", help="…")]
        overrides: Annotated[tuple[str, ...], training("--set", help="…")]

    def plan(workspace: WorkspaceFile, flags: SettingFlags) -> None: ...

So an option stands once, in the class of those that are always found together. Typer takes no dataclass
(https://github.com/fastapi/typer/issues/154).
"""

import inspect
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import MISSING, fields, is_dataclass
from functools import partial, wraps
from types import GenericAlias, NoneType
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand
from typer.models import OptionInfo

from tuner.errors import UsageError

T = TypeVar("T")
Command = TypeVar("Command", bound=Callable[..., object])

# The groups of a --help, in its order. `network("--ca", …)` is a typer.Option that is listed under Network.
PANELS = ("Data", "Training", "Output", "Registry", "Cluster", "Scheduling", "Storage", "Network", "Other")
data, training, output, registry, cluster, scheduling, storage, network, other = (
    partial(typer.Option, rich_help_panel=panel) for panel in PANELS
)
_AT_A_GLANCE = 8  # so few options need no groups
_FIRST_COLUMN = 30  # characters, at most

registered: dict[str, typer.Typer] = {}  # by name, of the modules that are imported


def command(name: str, *, example: str, of: typer.Typer | None = None) -> Callable[[Command], Command]:
    """Registers a command, whose parameters are options, arguments and dataclasses of them; `of` a group, if in one."""

    def register(function: Command) -> Command:
        group = typer.Typer(add_completion=False, rich_markup_mode=None) if of is None else of
        group.command(name, cls=GroupedCommand, epilog=f"Example: {example}")(flattened(function))
        if of is None:
            registered[name] = group
        return function

    return register


def flattened(command: Callable[..., T]) -> Callable[..., T]:
    """`command` as Typer takes it: a parameter that is a dataclass is replaced by the dataclass's fields."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, Any] = {
        name: each.annotation for name, each in signature.parameters.items() if is_dataclass(each.annotation)
    }
    options: dict[str, inspect.Parameter] = {}
    for name, parameter in signature.parameters.items():
        for each in _fields(groups[name]) if name in groups else [parameter]:
            options[each.name] = _for_typer(each)

    @wraps(command)
    def call(**typed: Any) -> T:
        values = {name: tuple(value) if isinstance(value, list) else value for name, value in typed.items()}
        for name, group in groups.items():
            values[name] = group(**{field.name: values[field.name] for field in fields(group)})
        return command(**{name: values[name] for name in signature.parameters})

    call.__signature__ = signature.replace(parameters=list(options.values()))  # type: ignore[attr-defined]
    call.__annotations__ = {}  # the signature has them
    return call


def _fields(group: type[Any]) -> Iterator[inspect.Parameter]:
    """A class's own before those of its bases: what a command has alone comes first in its help."""
    hints, defaults = get_type_hints(group, include_extras=True), {field.name: field.default for field in fields(group)}
    for owner in group.__mro__:
        for name in inspect.get_annotations(owner):
            default = inspect.Parameter.empty if defaults[name] is MISSING else defaults[name]
            yield inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])


def _for_typer(field: inspect.Parameter) -> inspect.Parameter:
    """With Typer's words for its type, and without a default the one that means nothing: None, False, no values.

    Of a Literal the words are checked and completed here: only newer releases of Typer know how.
    """
    kind, info = get_args(field.annotation)
    choices = get_args(kind) or (kind,)
    nothing: Any = inspect.Parameter.empty
    if NoneType in choices:
        nothing = None
    elif isinstance(info, OptionInfo) and kind is bool:
        nothing = False
    if get_origin(kind) is tuple:
        kind = GenericAlias(list, choices[0])
        nothing = () if isinstance(info, OptionInfo) else nothing
    for literal in (kind, *choices):
        if get_origin(literal) is Literal:
            kind, info = (str | None if nothing is None else str), _one_of(get_args(literal), info)
    default = nothing if field.default is inspect.Parameter.empty else field.default
    return field.replace(kind=inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info])


def _one_of(words: tuple[str, ...], info: Any) -> Any:
    def checked(option: typer.CallbackParam, word: str | None) -> str | None:
        if word is not None and word not in words:
            raise UsageError(f"{option.opts[0]} {word}: must be {', '.join(words[:-1])} or {words[-1]}")
        return word

    info = copy(info)
    info.callback, info.autocompletion = checked, lambda: words
    return info


class GroupedCommand(TyperCommand):
    """A command whose --help lists its options by panel, as text: in Typer's boxes there is little room for words."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        shown = [(param, record) for param in self.get_params(ctx) if (record := param.get_help_record(ctx))]
        options = sum(param.param_type_name == "option" for param, _ in shown) - 1  # but for --help
        panels: dict[str, list[tuple[str, str]]] = {}
        for param, record in shown:
            if param.param_type_name == "argument":
                panel = "Arguments"
            else:
                panel = getattr(param, "rich_help_panel", None) or PANELS[-1] if options > _AT_A_GLANCE else "Options"
            panels.setdefault(panel, []).append(record)
        # One column for all: click would measure each list alone.
        width = min(_FIRST_COLUMN, max(len(name) for _, (name, _) in shown))
        for panel in ("Arguments", "Options", *PANELS):
            if rows := panels.get(panel):
                with formatter.section(panel):
                    formatter.write_dl([(f"{name:<{width}}", text) for name, text in rows], col_max=_FIRST_COLUMN)

    def shell_complete(self, ctx: Any, incomplete: str) -> Any:
        """The options with their help, in which Typer would take [words in brackets] for markup."""
        found = super().shell_complete(ctx, incomplete)
        for each in found:
            each.help = each.help and each.help.replace("[", r"\[")
        return found

    def format_epilog(self, _ctx: Any, formatter: Any) -> None:
        """Its example in one line, however long: it is there to be copied."""
        formatter.write(f"\n  {self.epilog}\n")
