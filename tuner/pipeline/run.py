"""RunSpec → RunResult: the whole story in a handful of calls.

preflight  spec, GPU, disk, secrets, the tag, push permission     seconds; no data, no GPU work
fetch      every URL, verified; base weights                      no push secret
prepare    every row: shape, template, labels, lengths, split     CPU
train      4-bit base + LoRA; checkpoints; evaluation; gates      no credentials
push       package, blobs, manifest by digest, tag                never retrains
"""

import fcntl
import hashlib
import logging
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

from tuner.durable import make_directories, remove, replacing, sync_tree
from tuner.errors import ConfigError, DeniedError, GateError, InputMissingError, NotPushedError, TunerError
from tuner.gpus import visible_gpus
from tuner.open_files import OpenDirectory, OpenFile
from tuner.pipeline.adapter import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TOKENIZER_FILES,
    adapter_config,
    check_weights,
    file_digests,
    locked_files,
    model_card,
    run_lock,
    write_json,
)
from tuner.pipeline.checkpoints import CHECKPOINTS, begin, check_unfinished, newest_checkpoint
from tuner.pipeline.download import format_bytes
from tuner.pipeline.fetch import check_stores, fetch
from tuner.pipeline.launch import by_itself, end_with_parent, is_worker, rank, train_in_processes, world_size
from tuner.pipeline.libraries import check_packages, quiet
from tuner.pipeline.package import PACKAGED_FILES, adapter_image
from tuner.pipeline.prepare import prepare
from tuner.pipeline.registry_checkpoints import Uploads, restore
from tuner.pipeline.startup import TOTAL, StartUp
from tuner.pipeline.tracking import check_trackers, tracked
from tuner.pod import SENTINEL
from tuner.records import CANARY, LOCK, Canary, Figures
from tuner.reference import ImageReference
from tuner.registry import client_for
from tuner.registry.credentials import parse_credentials
from tuner.registry.layout import layout_digest
from tuner.registry.probe import probe_push
from tuner.registry.push import Pushed, push_layout
from tuner.registry.push_state import PushOptions, load_push_state, push_resumably
from tuner.request import all_at_once
from tuner.runspec import (
    FETCHED,
    PREPARED,
    TRAINED,
    Destination,
    DirectoryDestination,
    Fetched,
    FetchedModel,
    HubModel,
    ImageDestination,
    ImageModel,
    LayoutDestination,
    Network,
    Prepared,
    Reporter,
    RunResult,
    RunSpec,
    Scalar,
    Secrets,
    Silent,
    StageName,
    Trained,
)

_SPARE_DISK_BYTES = 2 * 2**30  # tokens, checkpoints, adapter


def run(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    on_stage: Callable[[StageName], None],
    options: PushOptions | None = None,
    registry_checkpoints: bool = False,
) -> RunResult:
    """Everything, in one process. `on_stage` is told as each stage begins. Raises the TunerError of what failed.

    `registry_checkpoints`: the registry of the destination, which must be an image, keeps the newest one.
    """
    started = time.monotonic()
    open_work_dir = partial(OpenDirectory.at, work_dir)
    uploads = Uploads(spec, open_work_dir, lambda: secrets, reporter) if registry_checkpoints else None
    with _alone_in(work_dir), by_itself(reporter):
        return _run(spec, secrets, work_dir, reporter, on_stage, options, uploads, started)


@contextmanager
def _alone_in(work_dir: Path) -> Iterator[None]:
    """Two runs in one work directory would write over each other's tokens and checkpoints."""
    check_writable(work_dir)
    with (work_dir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{work_dir}: another tuner run is at work in it", hint="wait for it, or give another --work-dir"
            ) from None
        yield


def _run(
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    on_stage: Callable[[StageName], None],
    options: PushOptions | None,
    uploads: Uploads | None,
    started: float,
) -> RunResult:
    startup = StartUp()
    on_stage("preflight")
    with startup.part("preflight"):
        _warn_of_cpu(spec, reporter)
        preflight(spec, secrets, work_dir, reporter)
    on_stage("fetch")
    startup.import_ahead()
    with startup.part("fetch"):
        fetched = fetch(spec, secrets, work_dir, reporter)
    fetched.save(work_dir / FETCHED)
    if not finished_adapter(inputs_digest(fetched), work_dir):
        startup.load_ahead(spec, fetched, work_dir, _import_training)
    on_stage("prepare")
    with startup.part("tokens"):
        prepared = prepare(spec, fetched, work_dir, reporter)
    on_stage("train")
    if uploads and not finished_adapter(inputs_digest(fetched), work_dir):
        restore(spec, secrets, work_dir, reporter)
    with uploads.beside() if uploads else nullcontext():
        trained = train(spec, fetched, prepared, work_dir, reporter, startup)
    check_gates(spec, trained, work_dir, reporter)
    on_stage("push")
    with OpenDirectory.at(work_dir) as work:
        result = push(spec, secrets, trained, work, reporter, started=started, options=options)
    if uploads:
        uploads.forget()
    return result


def run_stage(
    name: StageName,
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    *,
    options: PushOptions | None = None,
    startup: StartUp | None = None,
) -> dict[str, Scalar]:
    """One stage in a process of its own, from and to the JSON files in the work directory; what it is worth saying.

    `startup` where the same process trains after prepare: the base model is then loaded beside the tokenizing.
    Raises what the stage raises; InputMissingError when the stage before it has not run, ConfigError when that was of
    another run.
    """
    if is_worker():
        end_with_parent()
    with by_itself(reporter if name == "train" else Silent()):
        return _run_stage(name, spec, secrets, work_dir, reporter, options, startup)


def _run_stage(
    name: StageName,
    spec: RunSpec,
    secrets: Secrets,
    work_dir: Path,
    reporter: Reporter,
    options: PushOptions | None,
    startup: StartUp | None,
) -> dict[str, Scalar]:
    match name:
        case "preflight":
            preflight(spec, secrets, work_dir, reporter, trains=False)
            return {}
        case "fetch":
            fetched = fetch(spec, secrets, work_dir, reporter)
            fetched.save(work_dir / FETCHED)
            return fetched_values(fetched)
        case "prepare":
            fetched = _left(Fetched, work_dir / FETCHED, spec)
            if startup:
                startup.load_ahead(spec, fetched, work_dir, _import_training)
            with (startup or StartUp()).part("tokens"):
                prepared = prepare(spec, fetched, work_dir, reporter)
            return prepared_values(prepared)
        case "train" if rank() > 0:
            _help_train(spec, work_dir)
            return {}
        case "train":
            fetched = _left(Fetched, work_dir / FETCHED, spec)
            trained = train(spec, fetched, _left(Prepared, work_dir / PREPARED, spec), work_dir, reporter, startup)
            if not is_worker():  # the process that started it looks
                check_gates(spec, trained, work_dir, reporter)
            return {
                "steps": trained.steps,
                "examples": trained.examples,
                "tokens": trained.tokens,
                "seconds": round(trained.train_seconds, 1),
                "startup_seconds": trained.startup.get(TOTAL),
                "loss": trained.last_train_loss,
                "eval_loss_before": trained.eval_loss_before,
                "eval_loss": trained.eval_loss_after,
            }
        case "push":
            with OpenDirectory.at(work_dir) as work:
                return push_left(spec, secrets, work, reporter, options=options)


def fetched_values(fetched: Fetched) -> dict[str, Scalar]:
    data = hashlib.sha256("\n".join(file.sha256 for file in fetched.files).encode()).hexdigest()
    values: dict[str, Scalar] = {
        "files": len(fetched.files),
        "bytes": sum(file.size_bytes for file in fetched.files),
        "data_digest": f"sha256:{data}",
    }
    if model := fetched.base_model:
        values |= {"base_model": model.id, "base_model_revision": model.revision, "base_model_digest": model.digest}
    return values


def prepared_values(prepared: Prepared) -> dict[str, Scalar]:
    return {
        "rows": prepared.rows_read,
        "train_rows": prepared.train.rows,
        "eval_rows": prepared.eval_rows,
        "bad_rows": prepared.bad_rows,
        "smoke_unused_rows": prepared.smoke_unused_rows,
    }


def left_to_push(spec: RunSpec, work: OpenDirectory) -> Trained:
    """The adapter of this run and of what was fetched for it. Raises InputMissingError when it is of other data."""
    trained = _of_run(spec, Trained.load_from(work, TRAINED), work.path / TRAINED)
    fetched = _of_run(spec, Fetched.load_from(work, FETCHED), work.path / FETCHED)
    if trained.inputs_digest != inputs_digest(fetched):
        raise InputMissingError(
            f"{work.path / trained.adapter_dir}: trained on other data than what was fetched since", hint="train again"
        )
    return trained


LeftT = TypeVar("LeftT", Fetched, Prepared, Trained)


def _left(kind: type[LeftT], path: Path, spec: RunSpec) -> LeftT:
    """What an earlier stage of this very run left."""
    return _of_run(spec, kind.load(path), path)


def _of_run(spec: RunSpec, left: LeftT, path: Path) -> LeftT:
    if left.run_digest != spec.digest:
        raise ConfigError(
            f"{path} is of run {left.run_digest[7:19]}, and this is run {spec.digest[7:19]}",
            hint="run the stages before this one again, or use another --work-dir",
        )
    return left


# ── preflight ────────────────────────────────────────────────────────────────────────────────────────────────────────


def preflight(spec: RunSpec, secrets: Secrets, work_dir: Path, reporter: Reporter, *, trains: bool = True) -> None:
    """Find out in seconds what would otherwise be found out after hours.

    Raises ConfigError (packages, GPU, disk, a tag that must not be overwritten), DeniedError (push permission, a gated
    model without a token), ServiceError (registry down), InputMissingError. `trains`: whether this machine will train.
    """
    if trains:
        check_packages()
        _check_gpu()
    checks: list[Callable[[], object]] = [
        partial(_check_disk, spec, work_dir),
        partial(_check_model_access, spec, secrets),
        partial(parse_credentials, secrets.pull_docker_configs),
        partial(check_stores, spec.sources),
        partial(check_unfinished, spec, work_dir),
        partial(check_trackers, spec.training, os.environ),
        partial(check_destination, spec.destination, spec, secrets, reporter),
    ]
    if spec.probe:
        checks.append(partial(check_destination, spec.probe, spec, secrets, reporter))
    run_checks(checks)


def run_checks(checks: Sequence[Callable[[], object]]) -> None:
    """Every one of them; raises what they raise, all at once."""
    errors: list[TunerError] = []
    for check in checks:
        try:
            check()
        except TunerError as error:
            errors.append(error)
    if errors:
        raise all_at_once(errors)


def check_destination(destination: Destination, spec: RunSpec, secrets: Secrets, reporter: Reporter) -> None:
    """Whether it will take the adapter, and whether what is there may be replaced."""
    match destination:
        case ImageDestination():
            parse_credentials(secrets.docker_configs)  # without a probe, too
            if spec.preflight:
                _probe(destination, spec, secrets, reporter)
        case LayoutDestination(reference=reference, overwrite=overwrite):
            existing = layout_digest(reference)
            if existing and not overwrite:
                raise _exists(str(reference), existing)
            check_writable(reference.path)
        case DirectoryDestination(path=path):
            _check_only_ours(Path(path), reporter)
            check_writable(Path(path))


def _check_only_ours(directory: Path, reporter: Reporter) -> None:
    """An adapter of ours in an output directory is replaced, and that is said; other files are not touched.

    Of a volume's root what is hidden, the file system's own directory and KAITO's sentinel are nobody's files.
    """
    names = {path.name for path in directory.iterdir()} if directory.is_dir() else set()
    names = {name for name in names if not name.startswith(".")} - {"lost+found", SENTINEL}
    if not names:
        return
    others = sorted(names - PACKAGED_FILES)
    if others or not (directory / LOCK).is_file():
        raise ConfigError(
            f"{directory}: is not empty, and not an adapter of ours ({', '.join(others[:3]) or 'no ' + LOCK})",
            hint="give a new or an empty directory",
        )
    reporter.note(f"{directory} has an adapter, which will be replaced")


def _warn_of_cpu(spec: RunSpec, reporter: Reporter) -> None:
    """A real model on a laptop: gigabytes are downloaded, and then nothing seems to happen."""
    if isinstance(spec.base_model, HubModel | ImageModel) and not visible_gpus(os.environ):
        size = f" of {spec.preset.weights_gib:.1f} GiB" if spec.preset.weights_gib else ""
        reporter.warn(
            f"no NVIDIA GPU is here: training a model{size} on the CPU takes days or more. --smoke tries it with a "
            "tiny one; `tuner submit` runs it in a cluster"
        )


def _check_gpu() -> None:
    """Only where there is a GPU is it worth the seconds that importing torch takes."""
    if visible_gpus(os.environ):
        from tuner.pipeline.model import pick_device

        pick_device()


def _check_disk(spec: RunSpec, work_dir: Path) -> None:
    weights = spec.preset.weights_gib if isinstance(spec.base_model, HubModel) else None
    if weights and _is_cached(spec):
        weights = None
    check_space(spec, work_dir, weights_gib=weights)


def check_space(spec: RunSpec, work_dir: Path, *, weights_gib: float | None) -> None:
    """Whether the directory can be written, and has room for what a run leaves there, and for `weights_gib`."""
    check_writable(work_dir)
    need = _SPARE_DISK_BYTES // (8 if spec.smoke else 1) + int((weights_gib or 0) * 2**30)
    free = shutil.disk_usage(work_dir).free
    if free < need:
        raise ConfigError(
            f"{work_dir}: {free / 2**30:.1f} GiB free, and the run needs about {need / 2**30:.1f} GiB",
            hint="give another --work-dir, or HF_HOME for the weights",
        )


def _is_cached(spec: RunSpec) -> bool:
    from huggingface_hub import try_to_load_from_cache

    assert isinstance(spec.base_model, HubModel)
    found = try_to_load_from_cache(spec.base_model.id, "config.json", revision=spec.base_model.revision)
    return isinstance(found, str)


def _check_model_access(spec: RunSpec, secrets: Secrets) -> None:
    if not isinstance(spec.base_model, HubModel) or not spec.preset.gated or secrets.hf_token:
        return
    if not _is_cached(spec):
        raise DeniedError(
            f"{spec.base_model.id} is gated: the hub gives it to those who accepted its licence",
            hint=f"accept it at https://huggingface.co/{spec.base_model.id} and set HF_TOKEN",
        )


def check_writable(directory: Path) -> None:
    try:
        make_directories(directory)
        marker = directory / ".tuner-writable"
        marker.touch()
        marker.unlink()
    except (FileExistsError, NotADirectoryError) as error:
        raise ConfigError(f"{directory}: is a file, or below one; a directory is needed there") from error
    except OSError as error:
        raise ConfigError(f"{directory}: cannot be written: {error.strerror}", hint="give another directory") from error


def _exists(reference: str, digest: str) -> ConfigError:
    return ConfigError(
        f"{reference} is there already, with {digest}", hint="give another tag, or leave out --no-overwrite"
    )


def _probe(destination: ImageDestination, spec: RunSpec, secrets: Secrets, reporter: Reporter) -> None:
    reference = destination.reference
    store = parse_credentials(secrets.docker_configs)
    if missing := store.missing_helper(reference):
        reporter.warn(f"the docker config keeps its credentials in {missing}, which is not installed here")
    elif secrets.docker_configs and not store.find(reference):
        reporter.warn(f"the docker config to push with has no entry for {reference.registry}")
    with client_for(reference, spec.network, secrets.docker_configs, reporter=reporter) as client:
        found = probe_push(reference, client)
    if found.existing_digest and not destination.overwrite:
        raise _exists(str(reference), found.existing_digest)
    if found.expires_at and found.expires_at <= datetime.now(UTC):
        raise DeniedError(
            f"{reference}: the credential has expired, at {found.expires_at:%Y-%m-%d %H:%M} UTC",
            hint="renew it: az acr login, docker login, or a new imagePushSecret",
        )
    if found.expires_at:
        reporter.warn(
            f"the credential for {reference.registry} ends at {found.expires_at:%Y-%m-%d %H:%M} UTC: if training takes "
            "longer, renew it meanwhile (it is read again for the push)"
        )
    tag = f"; its tag has {found.existing_digest} now" if found.existing_digest else ""
    reporter.note(f"may push to {reference} with {found.credential}{tag}")


# ── train ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _import_training() -> None:
    quiet()
    import tuner.pipeline.train  # noqa: F401


def train(
    spec: RunSpec,
    fetched: Fetched,
    prepared: Prepared,
    work_dir: Path,
    reporter: Reporter,
    startup: StartUp | None = None,
) -> Trained:
    """Train, finish the adapter directory, check it. An adapter of these very inputs is not trained again."""
    inputs = inputs_digest(fetched)
    done = finished_adapter(inputs, work_dir)
    if done:
        reporter.note(f"already trained: {work_dir / done.adapter_dir}")
        _note_canary(spec, work_dir / done.adapter_dir / CANARY, reporter)
        return done
    startup = startup or StartUp()
    with startup.part("imports"):
        quiet()
        from tuner.pipeline.canary import measure
        from tuner.pipeline.model import gpu_count
        from tuner.pipeline.train import Stop, optimise

    checkpoints = checkpoints_of(inputs, work_dir, world_size() if is_worker() else max(1, gpu_count()))
    begin(checkpoints, spec)
    if not is_worker() and gpu_count() > 1:
        newest_checkpoint(checkpoints, reporter)  # removes damaged ones, before several processes look at them
        train_in_processes(spec, work_dir, gpu_count(), reporter)
        return Trained.load(work_dir / TRAINED)
    # A name of its own, so that an adapter of other inputs in the same work directory stays.
    adapter_dir = work_dir / f"adapter-{inputs[:12]}"
    if adapter_dir.exists():
        shutil.rmtree(adapter_dir)
    with Stop(reporter.warn).listening() as stop, tracked(spec, work_dir, inputs[:12]):
        outcome = optimise(spec, prepared, work_dir, adapter_dir, checkpoints, stop, reporter, startup)
    base = _base_to_name(spec, fetched)
    config, newer = adapter_config(outcome.lora_config, outcome.lora_defaults, base)
    if newer:
        reporter.warn(
            f"KAITO's transformers runtime (peft 0.11.1) cannot load this adapter: it does not know {', '.join(newer)}"
        )
    figures = Figures(
        steps=outcome.steps,
        epochs=outcome.epochs,
        kept_step=outcome.kept_step,
        first_train_loss=outcome.first_train_loss,
        last_train_loss=outcome.last_train_loss,
        eval_loss_before=outcome.eval_loss_before,
        eval_loss_after=outcome.eval_loss_after,
    )
    write_json(adapter_dir / ADAPTER_CONFIG, config)
    quantization = outcome.coverage.quantization
    card = model_card(
        spec, fetched, prepared, figures=figures, quantization=quantization, coverage=str(outcome.coverage)
    )
    (adapter_dir / "README.md").write_text(card, encoding="utf-8")
    for name in TOKENIZER_FILES:
        if (work_dir / prepared.tokenizer_dir / name).is_file():
            shutil.copyfile(work_dir / prepared.tokenizer_dir / name, adapter_dir / name)
    tensors = check_weights(OpenFile.at(adapter_dir / ADAPTER_WEIGHTS))
    canary = measure(spec, prepared, work_dir, adapter_dir, tensors, quantization, reporter)
    write_json(adapter_dir / CANARY, canary.as_json(), indent=None)  # a thousand numbers
    lock = run_lock(
        spec,
        fetched,
        prepared,
        figures=figures,
        quantization=quantization,
        versions=outcome.versions,
        tensors_sha256=tensors,
        files=locked_files(adapter_dir),
    )
    write_json(adapter_dir / LOCK, lock.sealed())  # the last, as it says what the others are
    trained = Trained(
        run_digest=spec.digest,
        inputs_digest=inputs,
        adapter_dir=adapter_dir.name,
        files=file_digests(adapter_dir),
        steps=outcome.steps,
        epochs=outcome.epochs,
        examples=outcome.examples,
        tokens=outcome.tokens,
        train_seconds=outcome.seconds,
        first_train_loss=outcome.first_train_loss,
        last_train_loss=outcome.last_train_loss,
        eval_loss_before=outcome.eval_loss_before,
        eval_loss_after=outcome.eval_loss_after,
        train_rows=prepared.train.rows,
        eval_rows=prepared.eval_rows,
        smoke_unused_rows=prepared.smoke_unused_rows,
        kept_step=outcome.kept_step,
        modules=dict(outcome.coverage.modules),
        trainable_parameters=outcome.coverage.trainable_parameters,
        total_parameters=outcome.coverage.total_parameters,
        levers=outcome.levers,
        startup=outcome.startup,
    )
    sync_tree(adapter_dir)
    trained.save(work_dir / TRAINED)
    # They were for getting here, and what a power cut would leave is the adapter.
    shutil.rmtree(checkpoints, ignore_errors=True)
    return trained


def _note_canary(spec: RunSpec, file: Path, reporter: Reporter) -> None:
    if spec.canary and file.is_file() and not Canary.model_validate_json(file.read_bytes()).has_sixteen_bits:
        reporter.note(f"{file} is without 16 bits, as it was left when this was trained")


def _help_train(spec: RunSpec, work_dir: Path) -> None:
    """One of several training processes, but the first: it shares the work and leaves nothing of its own."""
    quiet()
    from tuner.pipeline.train import Stop, optimise

    fetched = _left(Fetched, work_dir / FETCHED, spec)
    prepared = _left(Prepared, work_dir / PREPARED, spec)
    checkpoints = checkpoints_of(inputs_digest(fetched), work_dir, world_size())
    with TemporaryDirectory() as nowhere, Stop(lambda _: None).listening() as stop:
        optimise(spec, prepared, work_dir, Path(nowhere), checkpoints, stop, _ToLog())


class _ToLog(Silent):
    """What only this process warns of, such as a GPU that is fuller than the others, on stderr: its rank-N.log."""

    def warn(self, line: str) -> None:
        logging.getLogger(__name__).warning(line)


def checkpoints_of(inputs: str, work_dir: Path, processes: int) -> Path:
    """Where a run of these inputs keeps its checkpoints. Another number of processes goes through the rows in other
    steps, so it begins anew."""
    return work_dir / CHECKPOINTS / (inputs[:12] if processes == 1 else f"{inputs[:12]}-{processes}")


def inputs_digest(fetched: Fetched) -> str:
    """sha256 over the run's digest and the content of everything it fetched: what the adapter depends on."""
    parts = [fetched.run_digest, *(file.sha256 for file in fetched.files)]
    parts.append(fetched.base_model.digest if fetched.base_model else "")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def finished_adapter(inputs: str, work_dir: Path) -> Trained | None:
    """What trained.json says, when it is of these inputs and every file is still as it was."""
    try:
        trained = Trained.load(work_dir / TRAINED)
    except (InputMissingError, ConfigError):
        return None
    adapter_dir = work_dir / trained.adapter_dir
    if trained.inputs_digest != inputs or not adapter_dir.is_dir():
        return None
    return trained if file_digests(adapter_dir) == trained.files else None


def check_gates(spec: RunSpec, trained: Trained, work_dir: Path, reporter: Reporter) -> None:
    """Raises GateError, with every gate's numbers, when the adapter must not be pushed. A smoke run only says them: its
    tiny random model proves nothing about the real one."""
    verdicts = [gate.judge(trained.figures) for gate in spec.gates]
    failed = [verdict.sentence for verdict in verdicts if not verdict.passed]
    if failed and not spec.smoke:
        adapter_dir = work_dir / trained.adapter_dir
        raise GateError(
            f"trained, but not pushed: {'; '.join(failed)} does not hold. The adapter is in {adapter_dir}",
            hint=f"to push it all the same: {_push_command(adapter_dir, spec.destination)}; with another --require the "
            "same command does not train again",
        )
    for verdict in verdicts:
        reporter.note(f"gate {'passed' if verdict.passed else 'not passed'}: {verdict.sentence}")


def _push_command(adapter_dir: Path, destination: Destination) -> str:
    match destination:
        case ImageDestination() | LayoutDestination():
            return shlex.join(["tuner", "push", str(adapter_dir), str(destination.reference)])
        case DirectoryDestination(path=path):
            return shlex.join(["cp", "-r", f"{adapter_dir}/.", path])


def _base_to_name(spec: RunSpec, fetched: Fetched) -> FetchedModel | None:
    """The base that adapter_config.json names: none for a smoke run, whose base is made up."""
    return None if spec.smoke else fetched.base_model


# ── push ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def push_left(
    spec: RunSpec, secrets: Secrets, work: OpenDirectory, reporter: Reporter, *, options: PushOptions | None = None
) -> dict[str, Scalar]:
    """Push what the stages before left in the work directory; what is worth saying of that."""
    trained = left_to_push(spec, work)
    check_gates(spec, trained, work.path, reporter)
    result = push(spec, secrets, trained, work, reporter, started=time.monotonic(), options=options)
    return {"image": result.image, "previous_digest": result.previous_digest}


def push(
    spec: RunSpec,
    secrets: Secrets,
    trained: Trained,
    work: OpenDirectory,
    reporter: Reporter,
    *,
    started: float,
    options: PushOptions | None = None,
) -> RunResult:
    """Package and deliver. Raises NotPushedError, with the command that finishes, whatever the registry said."""
    adapter = work.below(trained.adapter_dir)
    if adapter.digests() != trained.files:
        raise TunerError(f"{adapter.path}: its files are not those that were trained")
    previous = tag = None
    match spec.destination:
        case DirectoryDestination(path=path):
            target = Path(path)
            _copy_adapter(adapter, trained, target)
            image = str(target)
        case LayoutDestination() | ImageDestination() as destination:
            wanted = _mounting(options or PushOptions(), spec, destination)
            pushed = deliver(
                adapter, work, destination, spec.network, secrets.push_docker_configs(), reporter, options=wanted
            )
            image, previous, tag = pushed.reference, pushed.previous_digest, pushed.tag
            reporter.note(
                f"pushed {format_bytes(pushed.bytes_sent)}"
                + (f", {pushed.blobs_skipped} blobs were there" if pushed.blobs_skipped else "")
                + (f"; the tag was at {previous}" if previous and previous != pushed.digest else "")
            )
    return RunResult(
        run_digest=spec.digest,
        image=image,
        tag=tag,
        previous_digest=previous,
        smoke=spec.smoke,
        train_rows=trained.train_rows,
        eval_rows=trained.eval_rows,
        smoke_unused_rows=trained.smoke_unused_rows,
        steps=trained.steps,
        examples=trained.examples,
        tokens=trained.tokens,
        seconds=time.monotonic() - started,
        train_loss=trained.last_train_loss,
        eval_loss_before=trained.eval_loss_before,
        eval_loss=trained.eval_loss_after,
    )


def _copy_adapter(adapter: OpenDirectory, trained: Trained, target: Path) -> None:
    """Each file whole or not at all. What readers look for goes first, should an earlier adapter be there, and comes
    last; the lock, by which a run that goes on knows its own directory, comes first. Only contents: a volume's root is
    not ours."""
    try:
        make_directories(target)
        remove(target / ADAPTER_CONFIG)
        for name in sorted(trained.files, key=lambda name: (name != LOCK, name == ADAPTER_CONFIG, name)):
            with replacing(target / name) as copy:
                copy.writelines(adapter.file(name).chunks())
    except OSError as error:
        raise NotPushedError(
            f"trained, but not written to {target}: {error.strerror}", hint=f"the adapter is kept in {adapter.path}"
        ) from error


def deliver(
    adapter: OpenDirectory,
    directory: OpenDirectory,
    destination: ImageDestination | LayoutDestination,
    network: Network,
    docker_configs: Sequence[str],
    reporter: Reporter,
    *,
    options: PushOptions,
) -> Pushed:
    """Push an adapter directory as an image; whatever a registry says becomes NotPushedError with what to do next.

    `directory` gets push-state.json: what a later push finishes from.
    """
    image = adapter_image(adapter, options.compression)
    match destination:
        case LayoutDestination(reference=layout, overwrite=overwrite):
            return push_layout(image, layout, overwrite=overwrite, reporter=reporter)
        case ImageDestination(reference=reference, overwrite=overwrite):
            return push_resumably(
                image,
                reference,
                adapter=adapter,
                directory=directory,
                overwrite=overwrite,
                network=network,
                docker_configs=docker_configs,
                options=options,
                reporter=reporter,
            )


def resume_push(directory: OpenDirectory, docker_configs: Sequence[str], reporter: Reporter) -> Pushed:
    """Finish the push that push-state.json in `directory` is about: only what the registry lacks is sent."""
    state = load_push_state(directory)
    adapter = state.open_adapter(directory)
    image = adapter_image(adapter, state.options.compression)
    state.check_image(image, adapter)
    return push_resumably(
        image,
        state.reference,
        adapter=adapter,
        directory=directory,
        overwrite=state.overwrite,
        network=state.network,
        docker_configs=docker_configs,
        options=state.options,
        reporter=reporter,
    )


def _mounting(options: PushOptions, spec: RunSpec, destination: ImageDestination | LayoutDestination) -> PushOptions:
    """With a base image in the same registry, what the adapter shares with it need not be sent."""
    if isinstance(spec.base_model, ImageModel) and isinstance(destination, ImageDestination):
        base = spec.base_model.reference
        if isinstance(base, ImageReference) and base.registry == destination.reference.registry:
            return options.model_copy(update={"mount_from": base.repository})
    return options
