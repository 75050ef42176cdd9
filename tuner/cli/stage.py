"""`tuner stage`: one stage, or those of one container, as a pod runs them."""

import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tuner.cli.common import Stopped, environment_error, open_talk
from tuner.cli.flags import command
from tuner.errors import ConfigError, InterruptedRunError, TunerError, UsageError
from tuner.pod import CHECK, PUSH_HOLD_S, SPEC_FILE, TERMINATION_LOG

if TYPE_CHECKING:
    from tuner.runspec import Scalar, StageName, StageResult


@command(
    "stage",
    example="tuner stage fetch --spec run.json --secrets secrets.json --work-dir work",
)
def stage(
    names: Annotated[tuple[str, ...], typer.Argument(metavar="STAGE…", help="preflight, fetch, prepare, train, push")],
    spec_file: Annotated[Path | None, typer.Option("--spec", metavar="FILE", help="the RunSpec")],
    secrets_file: Annotated[Path | None, typer.Option("--secrets", metavar="FILE", help="its secrets")],
    work_dir: Annotated[Path | None, typer.Option("--work-dir", metavar="D", help="[tuner-work]")],
    in_pod: Annotated[
        bool, typer.Option("--pod", help="as a container of a pod: paths, secrets and volumes as tuner/pod.py has them")
    ],
    waits: Annotated[
        bool, typer.Option("--wait", help="push: as a sidecar, what the trainer beside has finished; then stay")
    ],
    registry_checkpoints: Annotated[
        bool, typer.Option("--registry-checkpoints", help="preflight, push: the registry keeps checkpoints")
    ],
    max_data_bytes: Annotated[
        int | None, typer.Option("--max-data", metavar="BYTES", min=0, help="check: larger data are left to the run")
    ],
    hold_s: Annotated[
        float, typer.Option("--hold", metavar="S", min=0, help=f"push: try for so long, as {PUSH_HOLD_S}")
    ] = 0,
) -> None:
    """Run stages of a RunSpec in this process; their StageResult is the last line of stdout.

    In a pod it is the container's termination message, too.
    """
    from tuner.runspec import RunSpec, Secrets, StageResult

    if in_pod and (secrets_file or work_dir):
        raise UsageError("--pod says where secrets and work directory are", hint="leave out --secrets and --work-dir")
    if not in_pod and (waits or hold_s or registry_checkpoints or max_data_bytes is not None or CHECK in names):
        raise UsageError(
            "--wait, --hold, --registry-checkpoints, --max-data and check are for a pod", hint="give --pod"
        )
    if not in_pod and spec_file is None:
        raise UsageError("a stage needs a RunSpec", hint="tuner check workspace.yaml --write-spec run.json")
    if CHECK in names and (len(names) > 1 or max_data_bytes is None):
        raise UsageError("check stands alone, with --max-data BYTES")
    stages = ("fetch", "prepare") if CHECK in names else tuple(map(_known, names))
    result = StageResult(stage=stages[0])

    turns = None
    if waits:
        from tuner.pipeline.turns import Turns

        turns = Turns()
        turns.be_the_pusher()
        if told := turns.pushed():  # killed after all was done
            _leave(told, in_pod)
            _stay()
            return

    def leave(last: "StageResult") -> None:
        """The last words; of a push they are the trainer's to end with, and the sidecar stays as long as the pod does.

        One that fails before it has begun to push is started again, and says nothing of it.
        """
        _leave(last, in_pod)
        if turns is not None and turns.has_begun:
            turns.tell(last)
            _stay()

    values: dict[str, Scalar] = {}
    try:
        with open_talk() as talk:

            def on_stage(name: "StageName") -> None:
                nonlocal result
                result = result.model_copy(update={"stage": name})
                talk.stage(name)

            spec = RunSpec.load(spec_file or SPEC_FILE)
            if in_pod:
                from tuner.pipeline.containers import Container, Push

                container = Container(spec, os.environ, talk, on_stage, registry_checkpoints=registry_checkpoints)
                if max_data_bytes is not None and CHECK in names:
                    values, said = container.check(max_data_bytes)
                    result = result.model_copy(update={"message": said})
                else:
                    values = container.run(stages, Push(waits, hold_s))
            else:
                from tuner.pipeline.run import run_stage

                secrets = Secrets.load(secrets_file) if secrets_file else Secrets()
                for name in stages:
                    result = result.model_copy(update={"stage": name})
                    values |= run_stage(name, spec, secrets, work_dir or Path("tuner-work"), talk)
    # A result for every end but SIGKILL. What is raised again goes to main(), which says it and gives the exit code.
    except InterruptedRunError as error:
        if not in_pod or "train" in stages:
            _leave(_failed(result, error), in_pod)
            raise
        # 75 says that a new pod goes on from a checkpoint: a trainer's word, which nobody else may use.
        exit_code = 128 + signal.SIGTERM
        _leave(_stopped(result, exit_code), in_pod)
        raise Stopped(exit_code) from error
    except Stopped as stopped:
        _leave(_stopped(result, stopped.exit_code), in_pod)
        raise
    except OSError as error:
        known = environment_error(error)
        leave(_failed(result, known or error))
        if known is None:
            raise
        raise known from error
    except Exception as error:
        leave(_failed(result, error))
        raise
    leave(result.model_copy(update={"values": values}))


def _known(name: str) -> "StageName":
    from tuner.runspec import STAGES

    known = next((known for known in STAGES if known == name), None)
    if known is None:
        raise UsageError(f"{name!r} is no stage", hint=f"one of {', '.join(STAGES)}")
    return known


def _failed(result: "StageResult", error: Exception) -> "StageResult":
    """Everything that a person would be told, as the pod's log may be gone when they look."""
    from tuner.errors import EXIT_INTERNAL

    message, hint, exit_code = f"a bug in tuner: {error}", None, EXIT_INTERNAL
    if isinstance(error, TunerError):
        message, hint, exit_code = error.message, error.hint, error.exit_code
    if isinstance(error, ConfigError) and len(error.problems) > 1:
        message = "\n".join([message, *map(str, error.problems)])
    kept = result.model_dump(exclude={"exit_code", "reason", "message", "hint"})
    return type(result)(**kept, exit_code=exit_code, reason=type(error).__name__, message=message, hint=hint)


def _stopped(result: "StageResult", exit_code: int) -> "StageResult":
    name = signal.Signals(exit_code - 128).name
    return result.model_copy(update={"exit_code": exit_code, "reason": name, "message": f"stopped by {name}"})


def _leave(result: "StageResult", in_pod: bool) -> None:
    """Where those look who asked for the stage. A disk that is full loses the message, not the exit code."""
    message = result.to_message()
    print(message, file=sys.stdout, flush=True)
    if in_pod and TERMINATION_LOG.is_file():
        with suppress(OSError):
            TERMINATION_LOG.write_text(message, encoding="utf-8")


def _stay() -> None:
    """Until the kubelet ends this container, which it starts again when it ends by itself."""
    with suppress(Stopped):
        while True:
            time.sleep(3600)
