"""`TrainingArguments.report_to`: tensorboard, mlflow and wandb, whose files land in the work directory.

transformers has a callback for each; here is what they find in the environment. What the user set there wins, so that a
server is reached as anywhere else. Nothing that could be a secret is written: wandb would record the command line, in
which a URL may carry a signature.
"""

import logging
import netrc
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import urlsplit

from tuner.durable import write_text
from tuner.errors import ConfigError, Problem, ServiceError
from tuner.runspec import RunSpec
from tuner.training_settings import TrainingConfig

FOLDER = "tracking"  # in the work directory
_RUN_ID = "mlflow-run"  # so that a resumed run goes on in the same one
_CLUSTER = "KUBERNETES_SERVICE_HOST"  # in every pod
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")


def trackers(training: TrainingConfig) -> tuple[str, ...]:
    return training.arguments.report_to or ()


def check_trackers(training: TrainingConfig, env: Mapping[str, str]) -> None:
    """Raises ConfigError for packages and keys that are not there, all at once. Nothing is imported or asked for."""
    problems = [
        Problem(problem, path="TrainingArguments.report_to", hint=hint)
        for name in trackers(training)
        for problem, hint in _problems(name, env)
    ]
    if problems:
        raise ConfigError.of(problems)


def _problems(name: str, env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    if find_spec(name) is None:
        yield f"{name} is not installed", "pip install 'tuner[track]'"
    elif name == "wandb" and _wandb_mode(env) == "online" and not _has_wandb_key(env):
        yield "wandb has no key", "set WANDB_API_KEY, run wandb login, or set WANDB_MODE=offline"
    elif name == "mlflow":
        scheme = urlsplit(env.get("MLFLOW_TRACKING_URI", "")).scheme.partition("+")[0]
        if scheme in _DATABASES and find_spec("sqlalchemy") is None:
            yield f"MLFLOW_TRACKING_URI is a {scheme} database, and sqlalchemy is not installed", "pip install mlflow"


def _wandb_mode(env: Mapping[str, str]) -> str:
    """In a Job nobody has logged in, and the network may be closed."""
    return env.get("WANDB_MODE") or ("offline" if _CLUSTER in env else "online")


def _has_wandb_key(env: Mapping[str, str]) -> bool:
    if env.get("WANDB_API_KEY"):
        return True
    file = Path(env.get("NETRC") or f"{env.get('HOME', '')}/.netrc")
    host = urlsplit(env.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname or ""
    try:
        return file.is_file() and netrc.netrc(file).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def settings(spec: RunSpec, directory: Path, run: str, env: Mapping[str, str]) -> dict[str, str]:
    """The environment that the callbacks read. `run` names the run: the same one goes on under the same name."""
    ours = {
        "TENSORBOARD_LOGGING_DIR": str(directory / "tensorboard" / f"{spec.name}-{run}"),
        "MLFLOW_TRACKING_URI": (directory / "mlruns").absolute().as_uri(),
        "MLFLOW_ALLOW_FILE_STORE": "true",  # it is in maintenance; the alternative is a database and its packages
        "MLFLOW_EXPERIMENT_NAME": spec.name,
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # its own default makes a training wait for minutes
        "WANDB_MODE": _wandb_mode(env),
        "WANDB_PROJECT": spec.name,
        "WANDB_RUN_ID": f"{spec.name}-{run}",
        "WANDB_RESUME": "allow",
        "WANDB_DIR": str(directory),
        "WANDB_CACHE_DIR": str(directory / "wandb" / "cache"),
        "WANDB_DATA_DIR": str(directory / "wandb" / "data"),
        "WANDB_SILENT": "true",
    }
    # Not for the user to set: the command line, with its URLs, and our own lines would be recorded.
    private = {"WANDB_X_DISABLE_META": "true", "WANDB_DISABLE_GIT": "true", "WANDB_DISABLE_CODE": "true"}
    return {name: env.get(name) or value for name, value in ours.items()} | private | {"WANDB_CONSOLE": "off"}


@contextmanager
def tracked(spec: RunSpec, work_dir: Path, run: str) -> Iterator[None]:
    """What is trained in the block is reported to where `report_to` says. Raises ServiceError when that cannot be
    reached at the start; later it is only logged."""
    names = trackers(spec.training)
    if not names:
        yield
        return
    check_trackers(spec.training, os.environ)
    directory = work_dir / FOLDER
    directory.mkdir(parents=True, exist_ok=True)
    before = dict(os.environ)
    os.environ.update(settings(spec, directory, run, before))
    try:
        with _services_down():
            if "mlflow" in names:
                os.environ["MLFLOW_RUN_ID"] = _mlflow_run(spec, directory / f"{_RUN_ID}-{run}")
            yield
    finally:
        _finish(names)
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _services_down() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package not in ("mlflow", "wandb"):
            raise
        sentence = " ".join(str(error).split())[:300]
        raise ServiceError(
            f"TrainingArguments.report_to: {package}: {sentence}", hint="run again, or leave it out of report_to"
        ) from error


def _mlflow_run(spec: RunSpec, remembered: Path) -> str:
    """The id of the run to log to: begun here, so that a process that is killed has left it."""
    import mlflow

    logging.getLogger("mlflow").setLevel(logging.WARNING)
    client = mlflow.MlflowClient()
    if remembered.is_file():
        run_id = remembered.read_text(encoding="utf-8")
        try:
            if client.get_run(run_id).info.lifecycle_stage == "active":
                return run_id
        except mlflow.exceptions.RestException:  # it is of another server
            pass
        except mlflow.exceptions.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
    experiment = mlflow.set_experiment(os.environ["MLFLOW_EXPERIMENT_NAME"])
    name = spec.training.arguments.run_name or spec.name
    run_id = str(client.create_run(experiment.experiment_id, run_name=name).info.run_id)
    write_text(remembered, run_id)
    return run_id


def _finish(names: tuple[str, ...]) -> None:
    """End what the callbacks leave open when a training is stopped."""
    mlflow, wandb = (sys.modules.get(name) if name in names else None for name in ("mlflow", "wandb"))
    if mlflow:
        mlflow.flush_async_logging()
        mlflow.end_run()
    if wandb:
        wandb.finish()
