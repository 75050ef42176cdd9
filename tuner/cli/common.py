"""What several commands do: read a Workspace file with its flags, talk on stderr, print a result on stdout."""

import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tuner.cli.options import PushFlags, RegistryFlags, RequestFlags
from tuner.errors import ConfigError, InputMissingError, TunerError, UsageError

if TYPE_CHECKING:
    from tuner.registry.push_state import PushOptions
    from tuner.request import Request, Run
    from tuner.runspec import Destination, Network
    from tuner.talk import Talk
    from tuner.workspace import WorkspaceFile


def say(text: str) -> None:
    from tuner.redaction import redact
    from tuner.talk import Lasting

    print(redact(text), file=Lasting(sys.stderr), flush=True)


class Stopped(BaseException):
    """SIGINT or SIGTERM came. A BaseException, so that nobody takes it for a fault."""

    def __init__(self, exit_code: int) -> None:
        super().__init__()
        self.exit_code = exit_code


# What is wrong with a machine and not with us, wherever it shows.
_ENVIRONMENT = {
    errno.ENOSPC: "free some space, or give another --work-dir; what is there already is used again",
    errno.EDQUOT: "free some space, or give another --work-dir; what is there already is used again",
    errno.EROFS: "give another --work-dir or --output",
    errno.EACCES: "whose is it, and may you read it, or write there?",
    errno.EPERM: "whose is it, and may you read it, or write there?",
    errno.ENOTDIR: "a part of this path is a file",
    errno.EISDIR: "name a file",
    errno.ENAMETOOLONG: None,
}


def environment_error(error: OSError | RuntimeError | ValueError) -> ConfigError | None:
    """The sentence for what a full disk, a wrong owner or a strange path makes fail; None for a fault of ours."""
    if isinstance(error, RuntimeError):  # of Path.expanduser, which does not say for whom
        unknown = "home directory" in str(error)
        return ConfigError("~ in a path: no such home directory", hint="write the path from /") if unknown else None
    if isinstance(error, ValueError):
        return ConfigError("a path has a NUL character in it") if "embedded null byte" in str(error) else None
    if error.errno not in _ENVIRONMENT:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return ConfigError(f"{where}{error.strerror}", hint=_ENVIRONMENT[error.errno])


def registry_network(flags: RegistryFlags) -> "Network":
    from tuner.runspec import Network

    return Network(plain_http=flags.plain_http, ca_file=str(flags.ca.expanduser().absolute()) if flags.ca else None)


def make_request(flags: RequestFlags) -> "Request":
    """Of a run on this machine; what only some commands know is left as it is without a flag."""
    from tuner.request import Request

    reach = {"allow_cidrs": flags.allow_cidr, "allow_private_urls": flags.allow_private_urls}
    return Request(
        smoke=flags.smoke,
        config=flags.config,
        overrides=flags.overrides,
        source_headers=flags.source_headers,
        network=registry_network(flags).model_copy(update=reach),
        overwrite=not flags.no_overwrite,
        preflight=not flags.no_preflight,
        require=flags.require,
        disable=flags.disable,
        canary=not flags.no_canary,
        trust_remote_code=flags.trust_remote_code,
    )


def read_workspace_file(
    workspace: Path | None,
    model: str | None,
    data: Sequence[str],
    method: str | None,
    request: "Request",
    eval_data: Sequence[str] = (),
) -> "WorkspaceFile":
    """The file that was named, or the one that --model and its fellows stand for."""
    from tuner.request import all_at_once, evaluated_on, flag_errors, with_data
    from tuner.urls import Allowed
    from tuner.workspace import WorkspaceFile, load_workspace_file, make_workspace

    if request.output is not None and not request.output.strip():
        raise UsageError("--output: is empty", hint="a variable of the shell that is not set?")
    if workspace and str(workspace).lower().startswith(("http:/", "https:/")):
        raise UsageError("a WORKSPACE is a file on this machine, not a URL", hint="download it first")
    if workspace and _is_data(workspace):
        shown = shlex.quote(str(workspace))
        raise UsageError(
            f"{workspace} is a file or directory of data, and a WORKSPACE is YAML that names it",
            hint=f"tuner run --model phi-3-mini-4k-instruct --data {shown} --output ./adapter, or write its path under "
            "urls in what tuner init writes",
        )
    if workspace and (model or method):
        flag = "--model" if model else "--method"
        raise UsageError(
            f"{flag} and a WORKSPACE are two ways to say the same", hint=f"leave out {flag}, or change the file"
        )
    output_given = bool(request.output) or request.smoke
    if not workspace and not (model and data and output_given):
        missing = [
            flag for flag, given in (("--model", model), ("--data", data), ("--output", output_given)) if not given
        ]
        raise UsageError(
            "give a WORKSPACE file, or --model, --data and --output"
            + (f"; missing: {', '.join(missing)}" if len(missing) < 3 else ""),
            hint="tuner run --model phi-3-mini-4k-instruct --data train.jsonl --output ./adapter",
        )
    sources = [*data, *map(evaluated_on, eval_data)]
    try:
        allowed = Allowed.of(request.network.allow_cidrs, request.network.allow_private_urls)
        if workspace:
            on_box = not request.in_pod
            file = load_workspace_file(workspace, allowed=allowed, local_files=on_box, output_given=output_given)
            return with_data(file, sources, allowed, local_files=on_box) if sources else file
        made = make_workspace(str(model), sources, None, method or "qlora", allowed=allowed)
        return WorkspaceFile(made, is_typed=True)
    except (ConfigError, InputMissingError) as error:
        raise all_at_once([error, *flag_errors(request)]) from error


def _is_data(path: Path) -> bool:
    """By its name, as what people take for the first argument is data.jsonl; JSON may be a Workspace, too."""
    from tuner.folder import named_as_data

    if path.is_dir():
        names = [each.name for each in path.iterdir()]
        return bool(named_as_data(names)) and not any(name.endswith((".yaml", ".yml")) for name in names)
    if path.suffix.lower() != ".json":
        return bool(named_as_data([path.name]))
    with suppress(OSError), path.open("rb") as file:
        return file.read(4096).lstrip().startswith(b"[")
    return False


def build(file: "WorkspaceFile", request: "Request", work_dir: Path | None) -> tuple["Run", Path]:
    from tuner.request import build_run
    from tuner.workspace import as_flag

    directory = work_dir.expanduser() if work_dir else Path("tuner-work") / file.workspace.metadata.name
    try:
        return build_run(file, request, directory, os.environ), directory
    except TunerError as error:
        for line in file.notes:  # what would be said at the start of a run: a placeholder may be the cause
            say(f"note: {line}")
        if not (file.is_typed and isinstance(error, ConfigError) and error.problems):
            raise
        raise ConfigError.of([as_flag(problem) for problem in error.problems]) from error


def push_options(flags: PushFlags) -> "PushOptions":
    from tuner.registry.push_state import PushOptions

    return PushOptions(
        compression=flags.compression,
        chunk_bytes=flags.chunk_size,
        deadline_s=flags.push_deadline,
        modelpack=flags.modelpack,
        provenance=flags.provenance,
    )


def check_digest_file(digest_file: Path | None, destination: "Destination") -> None:
    """Before hours of training, not after them."""
    if digest_file is None:
        return
    if destination.kind == "directory":
        raise UsageError("--digest-file: a directory has no digest", hint="--output oci:DIR:TAG makes an image on disk")
    was_there = digest_file.exists()
    try:
        digest_file.open("a").close()
        if not was_there:
            digest_file.unlink()  # who waits for it must not find an empty one
    except OSError as error:
        raise ConfigError(f"--digest-file {digest_file}: cannot be written: {error.strerror}") from error


@contextmanager
def open_talk() -> Iterator["Talk"]:
    """A Talk on stderr; meanwhile what libraries print goes there, too: stdout is for the result."""
    from tuner.talk import Talk

    with redirect_stdout(sys.stderr), Talk(sys.stderr) as talk:
        yield talk


def print_result(image: str, digest_file: Path | None, result: dict[str, Any] | None) -> None:
    import json

    print(json.dumps(result) if result is not None else image)
    if digest_file:
        digest_file.write_text(image.rpartition("@")[2] + "\n", encoding="utf-8")
