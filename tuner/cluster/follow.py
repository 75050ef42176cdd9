"""What a person sees of a run in a cluster: where it stands, why it waits and what helps, its logs and events.

`load_run` asks the server; `describe` is pure: a Snapshot becomes a Status, all of it words and numbers to print.
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from tuner import pod
from tuner.cluster.api import EVENT, JOB, NAMESPACE, OUR_JOBS, POD, WORKSPACE, Api, Object
from tuner.cluster.api_errors import ApiError, BadRequestError, ForbiddenError, NotFoundError, UnavailableError
from tuner.cluster.beside import helper_name
from tuner.cluster.job_options import GPU, INSTANCE_TYPE_LABEL, WORKSPACE_LABEL
from tuner.cluster.nodes import required_labels
from tuner.cluster.observe import (
    QUEUE_LABEL,
    Ending,
    JobView,
    ProgressLine,
    container_statuses,
    main_container,
    parse_progress,
    stage_of,
    view_job,
)
from tuner.cluster.server_text import shown
from tuner.errors import InputMissingError, TunerError, did_you_mean
from tuner.runspec import Progress, Reporter, StageName

_PROGRESS_LINES = 20
POLL_S = 3.0  # between two looks at what goes on
_FORMS = {"preflight": "checking", "fetch": "fetching", "prepare": "preparing", "train": "training", "push": "pushing"}


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Snapshot:
    """What the server had of one Job at one moment. `unread` says what this identity may not read."""

    job: Object
    pods: tuple[Object, ...] = ()
    events: tuple[Object, ...] = ()
    progress: ProgressLine | None = None
    unread: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.job["metadata"]["name"])

    @property
    def view(self) -> JobView:
        return view_job(self.job, self.pods, self.events)


@dataclass(frozen=True)
class Status:
    """Where a run stands. `hint` is what helps: a command, where there is one. `age_s` since the Job was created."""

    name: str
    namespace: str
    phase: str
    stage: StageName | None = None
    done: int | None = None
    total: int | None = None
    unit: str | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    eta_s: int | None = None
    attempt: int = 1
    attempts: int = 1
    last: str | None = None
    waiting_for: str | None = None
    hint: str | None = None
    error: str | None = None
    exit_code: int | None = None
    image: str | None = None
    eval_loss: float | None = None
    node: str | None = None
    pod: str | None = None
    age_s: int | None = None
    notes: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        return {name: value for name, value in asdict(self).items() if value not in (None, ())}


class JobFailedError(TunerError):
    """A run in the cluster has failed: with the failing stage's words and exit code."""

    def __init__(self, message: str, exit_code: int | None, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        if exit_code:
            self.exit_code = exit_code


# ── a moment ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_run(api: Api, name: str, *, progress: bool = True, or_check: bool = False) -> Snapshot:
    """The Job `name` and all that tells of it; with `or_check` its check Job where that is all there is yet.

    Raises InputMissingError when there is none.
    """
    job = api.find(JOB, name)
    if job is None and or_check and (job := api.find(JOB, helper_name(name, pod.CHECK_JOB))):
        name = str(job["metadata"]["name"])
    if job is None:
        with suppress(ApiError):  # whoever may not look, or has no such kind, is told of the Job
            if api.find(WORKSPACE, name) is not None:
                raise InputMissingError(
                    f"Workspace {name} in namespace {api.namespace} has no Job yet",
                    hint=f"kubectl get workspace {name} -o wide shows what its controller says",
                )
        refuse_missing_namespace(api)
        near = None
        with suppress(ApiError):
            jobs = api.list(JOB, label_selector=OUR_JOBS).items
            near = did_you_mean(name, [str(each["metadata"]["name"]) for each in jobs])
        raise InputMissingError(
            f"there is no Job {name} in namespace {api.namespace}",
            hint=near or "tuner status shows those there are; --namespace?",
        )
    pods = api.list(POD, label_selector=f"batch.kubernetes.io/job-name={name}").items
    return _with_rest(api, job, pods, progress=progress)


def refuse_missing_namespace(api: Api) -> None:
    """Raises InputMissingError: lists in it would only be empty. Who may not read namespaces is left in doubt."""
    with suppress(ForbiddenError):
        try:
            api.get(NAMESPACE, api.namespace)
        except NotFoundError as error:
            raise InputMissingError(
                f"there is no namespace {api.namespace}",
                hint=f"kubectl create namespace {api.namespace}, or --namespace",
            ) from error


def load_runs(api: Api) -> tuple[Snapshot, ...]:
    """All Jobs of ours in the namespace, the newest first."""
    jobs = api.list(JOB, label_selector=OUR_JOBS).items
    if not jobs:
        refuse_missing_namespace(api)
    pods = api.list(POD, label_selector=OUR_JOBS).items if jobs else ()
    found = []
    for job in sorted(jobs, key=lambda each: str(each["metadata"].get("creationTimestamp")), reverse=True):
        own = [each for each in pods if _owner_uid(each) == job["metadata"]["uid"]]
        found.append(_with_rest(api, job, own, progress=True))
    return tuple(found)


def _owner_uid(thing: Mapping[str, Any]) -> str | None:
    return next(
        (owner["uid"] for owner in thing["metadata"].get("ownerReferences") or () if owner.get("controller")), None
    )


def _with_rest(api: Api, job: Object, pods: Sequence[Object], *, progress: bool) -> Snapshot:
    """Events only where nothing else would tell why it waits, a log's end only where something runs."""
    snapshot = Snapshot(job, tuple(pods))
    view, unread = snapshot.view, []
    events: tuple[Object, ...] = ()
    if view.is_silent:
        names = {job["metadata"]["name"], *(each["metadata"]["name"] for each in pods)}
        try:
            events = tuple(each for each in api.list(EVENT).items if _about(each).get("name") in names)
        except ForbiddenError as error:
            unread.append(f"events are not readable, so why it waits is a guess; {error.hint}")
    line = None
    if progress and view.phase == "running" and view.pod and view.stage:
        container = _running_container(snapshot)
        try:
            line = parse_progress(api.logs(view.pod, container, tail_lines=_PROGRESS_LINES)) if container else None
        except ForbiddenError as error:
            unread.append(f"logs are not readable, so there is no progress; {error.hint}")
        except (BadRequestError, NotFoundError, UnavailableError):
            pass  # it has not begun, or is gone by now
    return Snapshot(job, tuple(pods), events, line, tuple(unread))


def _about(event: Mapping[str, Any]) -> Mapping[str, Any]:
    return event.get("involvedObject") or event.get("regarding") or {}


def _running_container(snapshot: Snapshot) -> str | None:
    newest = _newest(snapshot)
    for status in container_statuses(newest) if newest else ():
        if "running" in (status.get("state") or {}):
            return str(status["name"])
    return None


def _newest(snapshot: Snapshot) -> Object | None:
    named = snapshot.view.pod
    return next((each for each in snapshot.pods if each["metadata"]["name"] == named), None)


# ── what to say of it ────────────────────────────────────────────────────────────────────────────────────────────────


def describe(snapshot: Snapshot, now: datetime) -> Status:
    """The Status of a Snapshot."""
    view, job, line = snapshot.view, snapshot.job, snapshot.progress
    results = view.results
    trained = results.get("train")
    image = view.values.get("image")
    eval_loss = trained.values.get("eval_loss") if trained else None
    created = _time(job["metadata"].get("creationTimestamp"))
    values = line.values if line else {}
    return Status(
        name=snapshot.name,
        namespace=str(job["metadata"].get("namespace", "")),
        phase="queued" if view.phase == "suspended" and _queue(job) else view.phase,
        stage=line.stage if line and view.stage == "train" else view.stage,
        done=line.done if line else None,
        total=line.total if line else None,
        unit=line.unit if line else None,
        loss=values.get("loss"),
        tokens_per_s=values.get("tokens_per_s"),
        eta_s=line.eta_s if line else None,
        attempt=view.attempt if view.phase != "failed" else max(1, int(job["status"].get("failed") or 1)),
        attempts=view.attempts,
        last=view.last.sentence if view.last else None,
        waiting_for=view.waiting_for,
        hint=_full_volume_hint(view.failure or view.last)
        or (_failure_hint(snapshot) if view.failure else pending_hint(job, view.waiting_for)),
        error=view.failure.sentence if view.failure else None,
        exit_code=view.failure.exit_code if view.failure else None,
        image=str(image) if image else None,
        eval_loss=float(eval_loss) if isinstance(eval_loss, int | float) else None,
        node=view.nodes[0] if view.nodes else None,
        pod=view.pod,
        age_s=int((now - created).total_seconds()) if created else None,
        notes=snapshot.unread,
    )


def pending_hint(job: Mapping[str, Any], waiting_for: str | None) -> str | None:
    """What helps against what a Job waits for; None where only time does."""
    if not waiting_for:
        return None
    namespace = job["metadata"].get("namespace", "default")
    # A node is asked for GPUs only when its labels are right.
    if f"Insufficient {GPU}" in waiting_for:
        return (
            f"no node has {_gpus(job)} free: kubectl get nodes -o custom-columns='NAME:.metadata.name,"
            "GPUS:.status.allocatable.nvidia\\.com/gpu' (none at all: install NVIDIA's device plugin)"
        )
    if "node affinity" in waiting_for or "node selector" in waiting_for or "didn't match Pod's" in waiting_for:
        return _label_hint(job)
    if taint := re.search(r"untolerated taint\(?s?\)? ?\{([^}]*)\}", waiting_for):
        key = taint[1].split(":")[0].strip()
        if job["metadata"].get("labels", {}).get("app.kubernetes.io/component") == pod.CHECK:
            return f"it needs a node for pods without a GPU, and these are tainted {key}: --no-check-job does without"
        return f"the nodes are tainted {key}: add a toleration with --patch" + (" or --spot" if "spot" in key else "")
    if "cannot be pulled" in waiting_for:
        secret = "--image-pull-secret NAME where the registry is private"
        return f"is the reference right, and may the nodes pull it? {secret}"
    if missing := re.search(r'(secret|configmap) "([^"]+)" not found', waiting_for):
        kind = "docker-registry" if missing[1] == "secret" else ""
        if missing[1] == "configmap":
            return "submit again: the run's ConfigMap is gone"
        return f"kubectl create secret {kind} {missing[2]} -n {namespace} …; the pod goes on by itself"
    if "exceeded quota" in waiting_for:
        return f"kubectl describe quota -n {namespace} shows what is used"
    if lost := re.search(r"a new pod begins when .* on node (\S+) is gone", waiting_for):
        return (
            f"takes it long, is the node lost? kubectl get node {lost[1]}; kubectl delete node {lost[1]} lets go of it"
        )
    if "security context constraint" in waiting_for:
        return "OpenShift has its own uids: --patch with runAsUser, runAsGroup and fsGroup null (docs/kubernetes.md)"
    if "violates PodSecurity" in waiting_for:
        return "the Job as rendered is clean under restricted: look at what --patch or a webhook added"
    if "persistentvolumeclaim" in waiting_for.lower() or "unbound" in waiting_for.lower():
        return f"kubectl get pvc -n {namespace}"
    if "queued by Kueue" in waiting_for:
        return f"kubectl get workloads -n {namespace} shows the queue"
    return None


def _label_hint(job: Mapping[str, Any]) -> str | None:
    labels = required_labels(job["spec"]["template"]["spec"])
    types = labels.pop(INSTANCE_TYPE_LABEL, ())
    if labels:
        pairs = " ".join(f"{key}={values[0] if values else ''}" for key, values in labels.items())
        return f"kubectl label node NODE {pairs}   (a node with {_gpus(job)}; the pod goes there by itself)"
    if types:
        return (
            f"no node is of the type {types[0]}: an autoscaler may make one now; else tuner submit --instance-type "
            "with one that kubectl get nodes -L node.kubernetes.io/instance-type shows"
        )
    return None


def _gpus(job: Mapping[str, Any]) -> str:
    limits = [
        (container.get("resources") or {}).get("limits", {}).get(GPU)
        for container in job["spec"]["template"]["spec"]["containers"]
    ]
    count = next((limit for limit in limits if limit), "0")
    return f"{count} GPU{'' if str(count) == '1' else 's'}"


def _full_volume_hint(ending: Ending | None) -> str | None:
    full = re.search(r'EmptyDir volume "([^"]+)" exceeds the limit "([^"]+)"', ending.sentence) if ending else None
    if full is None:
        return None
    patch = f"spec: {{template: {{spec: {{volumes: [{{name: {full[1]}, emptyDir: {{sizeLimit: …}}}}]}}}}}}"
    return f"{full[2]} are its allowance; tuner cancel, then --patch with more: {patch}"


def _failure_hint(snapshot: Snapshot) -> str | None:
    failure = snapshot.view.failure
    if failure is None:
        return None
    if failure.exit_code == 74 and keeps_results(snapshot.job):
        return f"the adapter is kept: tuner retry-push {snapshot.name}"
    stage = failure.result.stage if failure.result else stage_of(failure.container) if failure.container else None
    return f"tuner logs {snapshot.name}" + (f" --stage {stage}" if stage else "") if snapshot.pods else None


def keeps_results(job: Mapping[str, Any]) -> bool:
    """Whether checkpoints and adapter outlive the pod."""
    volumes = job["spec"]["template"]["spec"].get("volumes") or ()
    results = next((each for each in volumes if each["name"] == pod.RESULTS_VOLUME), None)
    return results is not None and "emptyDir" not in results


def _queue(job: Mapping[str, Any]) -> str | None:
    return (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)


def _time(text: str | None) -> datetime | None:
    if not text:
        return None
    return datetime.fromisoformat(text.replace("Z", "+00:00")).astimezone(UTC)


def duration(seconds: float | None) -> str:
    """`42s`, `7m`, `3h12m` or `2d4h`, as kubectl shows ages."""
    if seconds is None:
        return "–"
    minutes, hours, days = int(seconds // 60), int(seconds // 3600), int(seconds // 86400)
    if minutes < 1:
        return f"{max(0, int(seconds))}s"
    if hours < 1:
        return f"{minutes}m"
    if days < 1:
        return f"{hours}h{minutes % 60:02}m"
    return f"{days}d{hours % 24}h"


def progress_text(status: Status) -> str:
    """`training 120/468` · `fetching 3.1 of 13.1 MB` · `waiting` · `pushed`."""
    if status.phase == "running" and status.stage:
        form = _FORMS[status.stage]
        if status.done is None:
            return form
        if status.unit == "B":
            of = f" of {status.total / 1e6:,.1f}" if status.total else ""
            return f"{form} {status.done / 1e6:,.1f}{of} MB"
        of = f"/{status.total:,}" if status.total else ""
        return f"{form} {status.done:,}{of}"
    return status.phase


# ── waiting for the end ──────────────────────────────────────────────────────────────────────────────────────────────


def follow_run(
    api: Api,
    name: str,
    reporter: Reporter,
    *,
    begin_stage: Callable[[StageName], None] = lambda _: None,
    poll_s: float = POLL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Status:
    """The Status at the Job's end, with each change told on the way.

    Raises JobFailedError with the failing stage's own exit code. A server that is away for a while is waited for.
    """
    told: set[str] = set()
    stage: StageName | None = None
    uid: str | None = None

    def tell_once(line: str, *, warns: bool = False) -> None:
        if line not in told:
            told.add(line)
            (reporter.warn if warns else reporter.note)(line)

    while True:
        try:
            snapshot = load_run(api, name)
        except InputMissingError as error:
            if uid is None:
                raise
            gone = f"Job {name} was deleted before its end was seen, with its pods and what they said"
            raise JobFailedError(gone, None, hint=f"tuner events {name}; did its registry get the image?") from error
        except UnavailableError as error:
            if error.is_final:
                raise
            tell_once(f"{error.message}; the run goes on, waiting for the server", warns=True)
            sleep(poll_s * 3)
            continue
        uid = uid or snapshot.job["metadata"]["uid"]
        if snapshot.job["metadata"]["uid"] != uid:
            raise JobFailedError(f"Job {name} was deleted and made anew meanwhile", None, hint=f"tuner status {name}")
        status = describe(snapshot, datetime.now(UTC))
        for note in status.notes:
            tell_once(note, warns=True)
        if status.last:
            tell_once(f"attempt {status.attempt} of {status.attempts}, last: {status.last}", warns=True)
        if status.waiting_for:
            tell_once(f"waiting: {status.waiting_for}" + (f"\n  hint: {status.hint}" if status.hint else ""))
        if status.stage and status.stage != stage:
            stage = status.stage
            begin_stage(stage)
        if snapshot.progress:
            reporter.progress(_as_progress(snapshot.progress))
        if status.phase == "succeeded":
            return status
        if status.phase == "failed":
            raise JobFailedError(f"{name}: {status.error}", status.exit_code, hint=status.hint)
        sleep(poll_s)


def _as_progress(line: ProgressLine) -> Progress:
    unit = line.unit if line.unit in ("B", "rows", "steps") else "steps"
    return Progress(line.stage, _FORMS[line.stage], line.done, line.total, unit, dict(line.values))  # type: ignore[arg-type]


# ── logs and events ──────────────────────────────────────────────────────────────────────────────────────────────────


def read_logs(
    api: Api,
    name: str,
    stage: StageName | None,
    *,
    follows: bool,
    sleep: Callable[[float], None] = time.sleep,
    poll_s: float = 1.0,
) -> Iterator[str]:
    """The lines of the newest pod: of one stage, else of what runs or failed; followed, of one container after another.

    Raises InputMissingError when the pod is gone or has not begun.
    """
    seen: set[tuple[str, str]] = set()
    while True:
        snapshot = load_run(api, name, progress=False, or_check=True)
        newest = _newest(snapshot)
        if newest is None and not follows:
            raise InputMissingError(
                f"Job {name} has no pod{': ' + snapshot.view.waiting_for if snapshot.view.waiting_for else ''}",
                hint=f"tuner status {name}",
            )
        container = _log_container(newest, stage, seen if follows else set()) if newest else None
        if newest is None or container is None:
            if snapshot.view.phase in ("succeeded", "failed") or not follows:
                if not seen:
                    what = f"its {stage} stage has not begun" if stage else "nothing of it has run yet"
                    raise InputMissingError(
                        f"Job {name}: {what}", hint=snapshot.view.waiting_for or f"tuner status {name}"
                    )
                return
            sleep(poll_s)
            continue
        pod_name = str(newest["metadata"]["name"])
        seen.add((pod_name, container))
        if not follows:
            yield from api.logs(pod_name, container).splitlines()
            return
        yield from _followed(api, pod_name, container, sleep)


def _followed(api: Api, pod_name: str, container: str, sleep: Callable[[float], None]) -> Iterator[str]:
    """Each line once, over broken connections: they are taken up by the time stamp that the kubelet gives a line."""
    since, told_at = "", set[str]()
    while True:
        try:
            for line in api.follow_logs(
                pod_name, container, timestamps=True, since_time=since[:19] + "Z" if since else ""
            ):
                stamp, _, text = line.partition(" ")
                if stamp < since or line in told_at:
                    continue
                told_at = {line} if stamp > since else told_at | {line}
                since = stamp
                yield text
        except UnavailableError:
            sleep(1.0)
            continue
        except NotFoundError:
            return
        return


def _log_container(newest: Object, stage: StageName | None, seen: set[tuple[str, str]]) -> str | None:
    name = str(newest["metadata"]["name"])
    begun = [
        each
        for each in container_statuses(newest)
        if {"running", "terminated"} & set(each.get("state") or {}) and (name, each["name"]) not in seen
    ]
    if stage:
        return next((str(each["name"]) for each in begun if stage_of(each["name"]) == stage or
                     (stage == "prepare" and stage_of(each["name"]) == "train")), None)  # fmt: skip
    if not _has_trained(newest):  # a pusher beside it only waits
        begun = [each for each in begun if each["name"] != pod.PUSHER]
    failed = [each for each in begun if (each["state"].get("terminated") or {}).get("exitCode")]
    running = [each for each in begun if "running" in each["state"]]
    main = [each for each in begun if each["name"] == main_container(newest)]
    chosen = failed or running or main or begun[-1:]
    return str(chosen[0]["name"]) if chosen else None


def _has_trained(newest: Object) -> bool:
    """Whether its main container has ended, or is the pusher itself."""
    main = main_container(newest)
    return main == pod.PUSHER or any(
        each["name"] == main and "terminated" in (each.get("state") or {}) for each in container_statuses(newest)
    )


@dataclass(frozen=True)
class EventLine:
    """One Event as a table shows it."""

    at: datetime | None
    type: str
    reason: str
    about: str
    message: str
    count: int


def read_events(api: Api, name: str) -> tuple[EventLine, ...]:
    """All that is said of a run: of its Workspace, its Jobs and their pods, in the order of time."""
    jobs = {name, helper_name(name, pod.CHECK_JOB), helper_name(name, pod.PUSH_JOB)}
    pods = {
        each["metadata"]["name"]
        for each in api.list(POD, label_selector=f"{WORKSPACE_LABEL}={name}").items
    }  # fmt: skip
    lines = []
    for event in api.list(EVENT).items:
        about = _about(event)
        kind, called = str(about.get("kind")), str(about.get("name"))
        own = called in jobs if kind in ("Job", "Workspace", "Workload") else kind == "Pod" and (
            called in pods or re.fullmatch(rf"({'|'.join(map(re.escape, jobs))})-[a-z0-9]{{5}}", called) is not None
        )  # fmt: skip
        if own:
            lines.append(_event_line(event, f"{kind}/{called}"))
    return tuple(sorted(lines, key=lambda each: each.at or datetime.min.replace(tzinfo=UTC)))


def _event_line(event: Mapping[str, Any], about: str) -> EventLine:
    series = event.get("series") or {}
    at = series.get("lastObservedTime") or event.get("lastTimestamp") or event.get("eventTime")
    return EventLine(
        at=_time(at or event["metadata"].get("creationTimestamp")),
        type=str(event.get("type", "")),
        reason=str(event.get("reason", "")),
        about=about,
        message=" ".join(shown(str(event.get("message") or event.get("note") or "")).split()),
        count=int(series.get("count") or event.get("count") or 1),
    )
