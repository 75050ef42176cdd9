"""`tuner stage`: one stage, as a pod runs it."""

from pathlib import Path
from typing import Annotated

import typer

from tuner.cli.common import (
    open_talk,
)
from tuner.cli.options import (
    app,
)
from tuner.errors import TunerError, UsageError


@app.command(hidden=True, epilog="Example: tuner stage fetch --spec run.json --secrets secrets.json --work-dir work")
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="preflight, fetch, prepare, train or push")],
    spec_file: Annotated[Path, typer.Option("--spec", metavar="FILE", help="the RunSpec")],
    secrets_file: Annotated[Path | None, typer.Option("--secrets", metavar="FILE", help="its secrets")] = None,
    work_dir: Annotated[Path, typer.Option("--work-dir", metavar="D")] = Path("tuner-work"),
) -> None:
    """Run one stage of a RunSpec in this process; its StageResult is the last line of stdout."""
    from tuner.pipeline.run import run_stage
    from tuner.runspec import STAGES, RunSpec, Secrets, StageResult

    known = next((known for known in STAGES if known == name), None)
    if known is None:
        raise UsageError(f"{name!r} is no stage", hint=f"one of {', '.join(STAGES)}")
    try:
        spec = RunSpec.load(spec_file)
        secrets = Secrets.load(secrets_file) if secrets_file else Secrets()
        with open_talk() as talk:
            values = run_stage(known, spec, secrets, work_dir, talk)
    except TunerError as error:
        failed = StageResult(stage=known, exit_code=error.exit_code, reason=type(error).__name__, message=error.message)
        print(failed.to_message(), flush=True)
        raise
    print(StageResult(stage=known, values=values).to_message())
