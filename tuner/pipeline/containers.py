"""The stages as the containers of a pod run them: secrets from mounts, data and weights on volumes of their own.

preflight        what can be found out before anything is downloaded, in words that speak of Secrets and volumes
data-downloader  fetch
trainer          prepare, train; says in /run/tuner what it has finished, and ends as the push has (turns.py)
pusher           waits for the adapter, then pushes until it is through or its time is up
check            without a GPU: the data and their rows, where they are not too large for that
"""

import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from tuner import pod
from tuner.durable import make_directories, remove, write_text
from tuner.errors import (
    EXIT_INTERNAL,
    KINDS,
    ConfigError,
    DeniedError,
    InputMissingError,
    InterruptedRunError,
    NotPushedError,
    ServiceError,
    TunerError,
)
from tuner.open_files import OpenDirectory
from tuner.pipeline.dataset import gather_rows
from tuner.pipeline.download import format_bytes
from tuner.pipeline.fetch import announced_bytes, check_stores, fetch, wait_until_alone
from tuner.pipeline.hub import HubRepository
from tuner.pipeline.prepare import data_files, has_chat_template, prepare
from tuner.pipeline.registry_checkpoints import Uploads, restore
from tuner.pipeline.run import (
    check_destination,
    check_space,
    fetched_values,
    finished_adapter,
    inputs_digest,
    left_to_push,
    prepared_values,
    push_left,
    run_checks,
    run_stage,
)
from tuner.pipeline.startup import StartUp
from tuner.pipeline.tracking import check_trackers
from tuner.pipeline.turns import Finished, Turns
from tuner.reference import ImageReference
from tuner.registry.credentials import parse_credentials
from tuner.registry.push_state import PushOptions
from tuner.request import HF_TOKEN
from tuner.retry import Backoff
from tuner.runspec import (
    FETCHED,
    TRAINED,
    Destination,
    DirectoryDestination,
    Fetched,
    HubModel,
    ImageDestination,
    Progress,
    Reporter,
    RunSpec,
    Scalar,
    Secrets,
    StageName,
)
from tuner.source_headers import parse_source_headers

Values = dict[str, Scalar]
_WOULD_TRAIN_AGAIN = (EXIT_INTERNAL, ServiceError.exit_code, InterruptedRunError.exit_code)  # as a trainer's end
_BETWEEN_PUSHES = Backoff(5.0, 60.0)  # a Secret that is renewed shows within a minute or two


# ── secrets ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_secrets(env: Mapping[str, str], root: Path = Path("/")) -> Secrets:
    """What is mounted into this container, and its HF_TOKEN. What is not mounted is not for this container.

    Raises ConfigError, with every Secret that holds something else than it should and no word of what it holds.
    """
    queries: dict[str, str] = {}
    push: list[Path] = []
    pull: list[str] = []
    headers: list[str] = []
    token: list[str] = []

    def read_push() -> None:
        directory = _below(root, pod.PUSH_SECRET_DIR)
        if directory.is_dir():
            push.append(_docker_config(directory, _secret(env, pod.PUSH_SECRET_ENV, "to push with")))

    def read_pull() -> None:
        parent = _below(root, pod.PULL_SECRETS_DIR)
        for directory in sorted(parent.iterdir()) if parent.is_dir() else ():
            pull.append(_read(_docker_config(directory, f"Secret {directory.name!r}")))

    def read_queries() -> None:
        path = _below(root, pod.SOURCES_DIR) / pod.QUERIES_JSON
        if path.is_file():
            try:
                queries.update(TypeAdapter(dict[str, str]).validate_json(_read(path)))
            except ValidationError:
                raise ConfigError(f"{path}: not the queries of a run", hint="submit the run again") from None

    def read_headers(directory: Path) -> None:
        path = _below(root, directory) / pod.SOURCES_JSON
        if path.is_file():
            text = _read(path)
            parse_source_headers(text, str(path))
            headers.append(text)

    def read_token() -> None:
        if HF_TOKEN in env:
            text = env[HF_TOKEN].strip()
            if not re.fullmatch(r"[!-~]+", text):
                secret = _secret(env, pod.HUB_SECRET_ENV, f"with {HF_TOKEN}")
                raise ConfigError(
                    f"{secret}: its {HF_TOKEN} is empty, or has characters that no token has",
                    hint=f"make it again: kubectl create secret generic NAME --from-literal={HF_TOKEN}=…",
                )
            token.append(text)

    run_checks(
        [
            read_push,
            read_pull,
            read_queries,
            partial(read_headers, pod.SOURCES_DIR),
            partial(read_headers, pod.HEADERS_DIR),
            read_token,
        ]
    )
    return Secrets(
        queries=queries,
        docker_configs=tuple(_read(path) for path in push),
        pull_docker_configs=tuple(pull),
        hf_token="".join(token) or None,
        source_headers=tuple(headers),
        push_docker_config_file=str(push[0]) if push else None,
    )


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _secret(env: Mapping[str, str], variable: str, what: str) -> str:
    """`Secret 'acr'` where the pod says its name, else `the Secret to push with`."""
    name = env.get(variable)
    return f"Secret {name!r}" if name else f"the Secret {what}"


def _docker_config(directory: Path, secret: str) -> Path:
    """The one of a Secret's keys that is a docker config: of its own type, of the older one, or put there by hand."""
    found = next((directory / key for key in pod.DOCKER_CONFIG_KEYS if (directory / key).is_file()), None)
    if found is None:
        keys = sorted(path.name for path in directory.iterdir() if not path.name.startswith(".."))
        raise ConfigError(
            f"{secret}: has no {' and no '.join(pod.DOCKER_CONFIG_KEYS)}; its keys are {', '.join(keys) or 'none'}",
            hint=_make_secret("NAME", "REGISTRY"),
        )
    try:
        parse_credentials([_read(found)])
    except ConfigError as error:
        raise ConfigError.of([replace(problem, file=secret) for problem in error.problems]) from error
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputMissingError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text") from None


def _make_secret(name: str, server: str) -> str:
    return (
        f"make it: kubectl create secret docker-registry {name} --docker-server={server} --docker-username=… "
        "--docker-password=… --dry-run=client -o yaml | kubectl apply -f -"
    )


# ── the containers ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Push:
    """How a container pushes. `waits`: for the trainer beside it; `hold_s`: 0 is one push, however long that takes."""

    waits: bool = False
    hold_s: float = 0


@dataclass(frozen=True)
class Container:
    """One container of a run's pod."""

    spec: RunSpec
    env: Mapping[str, str]
    reporter: Reporter
    on_stage: Callable[[StageName], None]
    turns: Turns = field(default_factory=Turns)
    startup: StartUp = field(default_factory=StartUp)
    registry_checkpoints: bool = False  # preflight gets the last one back, the pusher puts each there

    @property
    def work_dir(self) -> Path:
        return pod.work_dir(self.spec)

    def run(self, stages: tuple[StageName, ...], push: Push) -> Values:
        """What each stage is worth saying, in one. Raises what the stages raise."""
        if "train" in stages:
            # A pod that was replaced because its node was lost may still be at work, on a volume that both have.
            make_directories(self.work_dir)
            with wait_until_alone(self.work_dir / ".lock", "training in it", self.reporter, threading.Event()):
                return self._run(stages, push)
        return self._run(stages, push)

    def _run(self, stages: tuple[StageName, ...], push: Push) -> Values:
        values: Values = {}
        for stage in stages:
            if stage != "push":  # which may have to wait first
                self.on_stage(stage)
            match stage:
                case "preflight":
                    self.preflight()
                case "fetch":
                    values |= self.fetch()
                case "prepare":
                    values |= self.prepare()
                case "train":
                    values |= self.train()
                case "push":
                    values |= self.push(push)
        return values

    def open_work_dir(self) -> OpenDirectory:
        """The work directory, from the volume's mount on, which is all that the trainer cannot replace by a link."""
        mount = pod.results_dir(self.spec)
        with OpenDirectory.at(mount) as results:
            return results.below(*self.work_dir.relative_to(mount).parts)

    # before a GPU is asked for

    def preflight(self) -> None:
        """Secrets, the tag, push permission, the model's licence, the volume. Nothing is downloaded."""
        spec = self.spec
        secrets = read_secrets(self.env)
        checks: list[Callable[[], object]] = [
            partial(self._check_volume),
            partial(self._check_model, secrets),
            partial(check_stores, spec.sources),
            partial(check_trackers, spec.training, self.env),
            partial(self._check_destination, spec.destination, secrets),
        ]
        if spec.probe:
            checks.append(partial(self._check_destination, spec.probe, secrets))
        run_checks(checks)
        here = pod.results_dir(spec).is_dir()  # not in the check Job
        if self.registry_checkpoints and here and not (self.work_dir / TRAINED).exists():
            restore(spec, secrets, self.work_dir, self.reporter)

    def _check_volume(self) -> None:
        """The check Job has no results volume; the weights' room is for fetch to see, which has theirs."""
        if not pod.results_dir(self.spec).is_dir():
            self.reporter.note("the results volume is not mounted here, so it is not looked at")
            return
        check_space(self.spec, self.work_dir, weights_gib=None)

    def _check_model(self, secrets: Secrets) -> None:
        model = self.spec.base_model
        if not isinstance(model, HubModel):
            return
        named = self.env.get(pod.HUB_SECRET_ENV)
        advice = (
            f"accept the licence at https://huggingface.co/{model.id} with the account whose token is in "
            f"Secret {named or 'NAME'!r}: kubectl create secret generic {named or 'NAME'} --from-literal={HF_TOKEN}=…"
            + ("" if named else ", and name it in tuning.preset.presetOptions.modelAccessSecret")
        )
        if self.spec.preset.gated and not secrets.hf_token:
            raise DeniedError(
                f"{model.id} is gated: the Hub gives it to those who accepted its licence, and no token is given",
                hint=advice,
            )
        try:
            HubRepository(model, secrets.hf_token, reporter=self.reporter).check_access()
        except DeniedError as error:
            raise DeniedError(error.message, hint=advice) from error

    def _check_destination(self, destination: Destination, secrets: Secrets) -> None:
        if not isinstance(destination, ImageDestination):
            if pod.results_dir(self.spec).is_dir():  # else as in _check_volume
                check_destination(destination, self.spec, secrets, self.reporter)
            return
        reference = destination.reference
        named = self.env.get(pod.PUSH_SECRET_ENV)
        try:
            check_destination(destination, self.spec, secrets, self.reporter)
        except DeniedError as error:
            if named is None:
                raise
            raise self._denied(error, reference, secrets, named) from error

    def _denied(self, error: DeniedError, reference: ImageReference, secrets: Secrets, named: str) -> DeniedError:
        """With the Secret's name, and whether it has anything for this registry at all."""
        server = "https://index.docker.io/v1/" if reference.registry == "docker.io" else reference.registry
        store = parse_credentials(secrets.docker_configs)
        if store.find(reference):
            message = f"{error.message} (Secret {named!r})"
        else:
            message = f"Secret {named!r} has {store.describe()}, and none for {reference.registry}: {error.message}"
        return DeniedError(message, hint=_make_secret(named, server))

    def check(self, max_data_bytes: int) -> tuple[Values, str]:
        """Rows that would stop the run, found without a GPU: what was found, and a sentence on what was not looked at.

        Data of more than so many bytes, or of an unknown size, are not downloaded for this.
        """
        spec, reporter = self.spec, self.reporter
        secrets = read_secrets(self.env)
        self.on_stage("fetch")
        size = announced_bytes(spec, secrets, reporter)
        if size is None or size > max_data_bytes:
            how_many = "of a size that their server does not tell" if size is None else format_bytes(size)
            said = f"the data are {how_many}, and rows are checked beforehand up to {format_bytes(max_data_bytes)}"
            reporter.note(f"{said}: this is left to the run itself")
            return {"checked": False, "bytes": size}, said
        work_dir = pod.check_dir()
        fetched = fetch(
            spec,
            secrets,
            work_dir,
            reporter,
            data_dir=pod.DATA_DIR,
            weights_dir=pod.WEIGHTS_DIR,
            tokenizer_only=True,
        )
        values = {"checked": True} | fetched_values(fetched)
        self.on_stage("prepare")
        if fetched.base_model is None and not spec.smoke:
            gathered = gather_rows(
                data_files(spec, fetched, work_dir),
                spec.training.dataset,
                chat=has_chat_template(spec, fetched, work_dir),
            )
            for remark in gathered.remarks:
                reporter.note(remark)
            said = "the base model is in an image, so rows were read but not tokenized"
            reporter.note(said)
            return values | {"rows": gathered.good_rows, "bad_rows": len(gathered.bad)}, said
        return values | prepared_values(prepare(spec, fetched, work_dir, reporter)), ""

    # at work

    def fetch(self) -> Values:
        work_dir = self.work_dir
        fetched = fetch(
            self.spec,
            read_secrets(self.env),
            work_dir,
            self.reporter,
            data_dir=pod.DATA_DIR,
            weights_dir=pod.WEIGHTS_DIR,
        )
        fetched.save(work_dir / FETCHED)
        return fetched_values(fetched)

    def prepare(self) -> Values:
        """Nothing where an earlier pod left a finished adapter of these inputs: train says so."""
        if isinstance(self.spec.destination, DirectoryDestination):
            remove(self._sentinel)  # an earlier run's, which would speak for this one
        with suppress(InputMissingError, ConfigError):
            if finished_adapter(inputs_digest(Fetched.load(self.work_dir / FETCHED)), self.work_dir):
                return {}
        return run_stage("prepare", self.spec, Secrets(), self.work_dir, self.reporter, startup=self.startup)

    def train(self) -> Values:
        """Until the adapter is pushed, where a pusher beside does that: this container's end is the run's."""
        values = run_stage("train", self.spec, Secrets(), self.work_dir, self.reporter, startup=self.startup)
        if self.turns.is_shared:
            with self.open_work_dir() as work:
                trained = left_to_push(self.spec, work)
            self.turns.finish(Finished(run_digest=trained.run_digest, inputs_digest=trained.inputs_digest))
            values |= self._wait_for_push()
        return values

    def _wait_for_push(self) -> Values:
        """The pushed image. Raises what the pusher has ended with."""
        self.reporter.note("trained; the container pusher pushes it")
        self.reporter.progress(Progress("push", "pushing", 0, 1, "steps"))  # for whoever reads the last line alone
        try:
            pushed = self.turns.wait_for_push()
        except NotPushedError as error:
            self.on_stage("push")
            raise self._not_pushed(error) from error
        if pushed.exit_code:
            self.on_stage("push")
            final = pushed.exit_code not in _WOULD_TRAIN_AGAIN
            kind = KINDS.get(pushed.exit_code, NotPushedError) if final else NotPushedError
            raise kind(pushed.message, hint=pushed.hint)
        return {key: value for key, value in pushed.values.items() if key == "image"}

    def push(self, how: Push) -> Values:
        hold_s = how.hold_s
        uploads = None
        if self.registry_checkpoints:
            uploads = Uploads(self.spec, self.open_work_dir, partial(read_secrets, self.env), self.reporter)
        if how.waits:
            finished = self._wait_for_adapter(uploads)
            self.on_stage("push")
            try:
                self.turns.begin_push()
            except NotPushedError as error:
                raise self._not_pushed(error) from error
            with self.open_work_dir() as work:
                trained = left_to_push(self.spec, work)
            if finished != Finished(run_digest=trained.run_digest, inputs_digest=trained.inputs_digest):
                raise TunerError(f"{self.work_dir}: not the adapter that the trainer of this pod has finished")
            hold_s = max(1.0, hold_s - self.turns.seconds_since_adapter()) if hold_s else 0
        else:
            self.on_stage("push")
        values = self._push_patiently(hold_s)
        if uploads:
            uploads.forget()
        if isinstance(self.spec.destination, DirectoryDestination):
            write_text(self._sentinel, "")
        return values

    def _wait_for_adapter(self, uploads: Uploads | None) -> Finished:
        if uploads is None:
            return self.turns.wait_for_adapter()
        finished = None
        try:
            finished = self.turns.wait_for_adapter(uploads.look)
        finally:
            if finished is None:  # this pod is told to end, after its trainer, whose last checkpoint is there by now
                uploads.finish()
        return finished

    def _push_patiently(self, hold_s: float) -> Values:
        """The Secret is read anew for each try: who renews it meanwhile has the adapter pushed."""
        deadline = time.monotonic() + hold_s
        failures = 0
        while True:
            left_s = deadline - time.monotonic()
            options = PushOptions(deadline_s=max(left_s, 1)) if hold_s else PushOptions()
            try:
                return self._push_once(options)
            except NotPushedError as error:
                left_s = deadline - time.monotonic()
                may_pass = isinstance(error.__cause__, ServiceError | DeniedError | InputMissingError)
                if not may_pass or left_s <= 0:
                    raise self._not_pushed(error) from error
                failures += 1
                pause_s = min(_BETWEEN_PUSHES.wait_s(failures), left_s)
                self.reporter.warn(f"{error.message}; again in {pause_s:.0f} s, for {left_s:.0f} s more")
            time.sleep(pause_s)

    def _push_once(self, options: PushOptions) -> Values:
        """Raises NotPushedError for whatever the Secret, the network or the registry is the reason of."""
        try:
            # A Secret that is broken now was whole before the run: somebody is at it.
            secrets = read_secrets(self.env)
        except TunerError as error:
            cause = InputMissingError(error.message, hint=error.hint)
            raise NotPushedError(f"trained, but not pushed: {error.message}") from cause
        try:
            with self.open_work_dir() as work:
                return push_left(self.spec, secrets, work, self.reporter, options=options)
        except ServiceError as error:  # 69 would have the whole pod run again
            raise NotPushedError(f"trained, but not pushed: {error.message}", hint=error.hint) from error

    def _not_pushed(self, error: NotPushedError) -> NotPushedError:
        cause = error.__cause__ or error
        advice = f"; {cause.hint}" if isinstance(cause, TunerError) and cause.hint else ""
        return NotPushedError(
            error.message,
            hint=f"where the results volume outlives the pod, this finishes: tuner retry-push {self.spec.name}{advice}",
        )

    @property
    def _sentinel(self) -> Path:
        return pod.results_dir(self.spec) / pod.SENTINEL
