"""What to do about one Workspace: `plan(observed, settings, now)` → the actions and the status. Pure.

Every decision of the controller is here. Nothing is remembered between two calls: what was decided before is in the
Workspace's annotations and status, in its ControllerRevisions and in its Jobs.

    Workspace, ConfigMap ──► hash ──► revision n ──► (check Job n) ──► Job n ──► status
                              │                         │
               another hash: revision n + 1      of an older revision: deleted; waited for until it is gone

What keeps two controllers, or one with an old picture, from doing harm: a new revision begins with a write to the
Workspace that fails when the Workspace has changed (`Annotate`), revisions only count up, a Job is deleted by uid and
only when its revision has been overtaken, and has the Workspace's name, so that there is one of it at a time.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from tuner.cluster.nodes import fitting_nodes
from tuner.cluster.observe import ROUTINE, Ending, JobView, Object, ProgressLine, view_job
from tuner.cluster.workspace_status import (
    End,
    Standing,
    build_status,
    recorded_revision,
    settled,
    status_differs,
    with_others_conditions,
    written_end,
)
from tuner.errors import ConfigError, TunerError
from tuner.redaction import redact
from tuner.request import RETRY_ANNOTATION
from tuner.runspec import Scalar, StageName, StageResult
from tuner.workspace import SERVER_DEFAULTS, TRAINING_CONFIG_KEY

REVISION_ANNOTATION = "workspace.kaito.io/revision"
HASH_ANNOTATION = "workspace.kaito.io/hash"
NAME_LABEL = "workspace.kaito.io/name"
WORKSPACE_LABEL = "kaito.sh/workspace"
RUN_DIGEST_ANNOTATION = "tuner/run-digest"
OWN_ANNOTATIONS = "tuner/"  # gates, levers, a Secret: they say what a run is, as the sections do
REPORTER = "tuner"
REVISIONS_KEPT = 10

# KAITO's names for the ConfigMap that a Workspace without one stands for.
DEFAULT_CONFIG_MAPS = {"lora": "lora-params-template", "qlora": "qlora-params-template"}

CheckJob = Literal["auto", "always", "never"]


# ── in ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Rendered:
    """What a revision is made of: `objects` come before the Jobs that name them."""

    objects: tuple[dict[str, Any], ...]
    job: dict[str, Any]
    check_job: dict[str, Any]
    notes: tuple[str, ...] = ()


class Render(Protocol):
    """How a revision's objects are made; raises TunerError with what is wrong with the Workspace."""

    def __call__(
        self, workspace: Object, config_map: Object | None, revision: int, nodes: Sequence[Object]
    ) -> Rendered:
        """`nodes` are those there are: labels that none of them carries must not be required."""


@dataclass(frozen=True)
class Settings:
    """`prunes_tuning_status`: the CRD is KAITO's, which has no `status.tuning`.

    `conditions_are_atomic`: it does not say that conditions are a map by their type: whoever applies some replaces all.

    `ttl_s`: Jobs are deleted so long after their end. Not by Kubernetes, which would not wait until it is recorded.
    """

    render: Render
    check_job: CheckJob = "auto"
    prunes_tuning_status: bool = False
    conditions_are_atomic: bool = False
    ttl_s: int | None = None


@dataclass(frozen=True)
class Observed:
    """All there is about one Workspace. `config_map` is the one that it names, else the default for its method.

    `records` are its ControllerRevisions: what each revision is, and how those ended that have. `nodes` is None where
    they may not be listed. `pods_are_fresh`: the pods were just asked for, and are all there are. `error` is what the
    last reconcile could not do.
    """

    workspace: Object
    config_map: Object | None = None
    job: Object | None = None
    check_job: Object | None = None
    push_job: Object | None = None
    pods: Sequence[Object] = ()
    pods_are_fresh: bool = False
    records: Sequence[Object] = ()
    nodes: Sequence[Object] | None = None
    events: Sequence[Object] = ()
    progress: ProgressLine | None = None
    error: str | None = None

    @property
    def revisions(self) -> list[Object]:
        return [record for record in self.records if not is_end(record)]

    @property
    def ends(self) -> list[Object]:
        return [record for record in self.records if is_end(record)]


# ── out ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Annotate:
    """Write annotations to the Workspace."""

    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Confirm:
    """Go on only when the object is still at `resource_version`: what follows was decided by it."""

    kind: Literal["Workspace", "ConfigMap"]
    name: str
    resource_version: str


@dataclass(frozen=True)
class Create:
    """Create it. One of that name that is there already is as good, but for a Job, where it means: look again."""

    manifest: Mapping[str, Any]


@dataclass(frozen=True)
class Delete:
    """Delete the object with this uid and what it owns; one that is gone is as good."""

    kind: Literal["Job", "ControllerRevision"]
    name: str
    uid: str


@dataclass(frozen=True)
class Emit:
    """A Kubernetes Event; its name follows from what it says, so saying it twice makes one."""

    event: Mapping[str, Any]


@dataclass(frozen=True)
class ApplyStatus:
    status: Mapping[str, Any]


Action = Annotate | Confirm | Create | Delete | Emit | ApplyStatus


@dataclass(frozen=True)
class Plan:
    """The actions, in order; each is done only when those before it were. `again_in_s`: look again by then.

    What is written to the Workspace (Annotate, ApplyStatus) is written to the version that was observed, or fails: an
    old picture must not overwrite what somebody who knew more has written.

    `wants_pods`: before it can be said how the Job ended, its pods must be asked for. `wants_events` and
    `wants_progress`: what is worth asking for before the next look.
    """

    actions: tuple[Action, ...] = ()
    standing: Standing | None = None
    again_in_s: float | None = None
    wants_pods: bool = False
    wants_events: bool = False
    wants_progress: bool = False


# ── the plan ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def plan(observed: Observed, settings: Settings, now: datetime) -> Plan:
    """What is to be done now. Planned again after it was done, there is nothing to do."""
    workspace = observed.workspace
    if "deletionTimestamp" in workspace["metadata"]:
        return _plan_status(observed, settings, Standing("deleting", revision=recorded_revision(workspace)), now)
    if "tuning" not in workspace:
        return _plan_status(observed, settings, Standing("inference"), now)
    known = _known_revisions(observed)
    current = max(known, default=0)
    wanted = _wanted(observed)
    if isinstance(wanted, _Missing):
        if not current:
            return _plan_status(observed, settings, Standing("invalid", message=wanted.sentence), now)
        # A run does not end because its ConfigMap was deleted under it.
        return _plan_revision(observed, settings, current, (), now, notice=wanted.sentence)
    if not recorded_revision(workspace) and settled(workspace) and RETRY_ANNOTATION not in _annotations(workspace):
        return Plan()  # what another controller has finished stays finished
    if current and known[current] == wanted:
        return _plan_revision(observed, settings, current, _missing_records(observed, current, wanted), now)
    return _plan_new_revision(observed, settings, current, wanted, now)


def _plan_new_revision(observed: Observed, settings: Settings, current: int, wanted: str, now: datetime) -> Plan:
    """Begin the next revision, or say why it cannot begin and go on with the one that there is."""
    number = current + 1
    try:
        rendered = _render(observed, settings, number)
    except TunerError as error:
        sentence = say(error)
        if current:
            notice = f"the change is not valid: {sentence}"
            if settled(observed.workspace, current):  # whose status is about what has finished, and stays
                said = event_manifest(observed.workspace, current, "Warning", "Invalid", notice, now)
                return Plan((Emit(said),), Standing("settled", revision=current))
            return _plan_revision(observed, settings, current, (), now, notice=notice)
        return _plan_status(observed, settings, Standing("invalid", message=sentence), now)
    return _plan_revision(observed, settings, number, _begin(observed, number, wanted), now, rendered=rendered)


def _plan_revision(
    observed: Observed,
    settings: Settings,
    number: int,
    actions: tuple[Action, ...],
    now: datetime,
    *,
    notice: str | None = None,
    rendered: Rendered | None = None,
) -> Plan:
    """Bring this revision about. `actions` come first; `notice` is what else has to be said."""

    def with_status(standing: Standing, *further: Action, rendered: Rendered | None = rendered) -> Plan:
        fitting = _fitting(observed, settings, number, rendered)
        standing = replace(standing, revision=number, notice=notice, fitting=fitting)
        return _plan_status(observed, settings, standing, now, (*actions, *further))

    jobs = [job for job in (observed.job, observed.check_job, observed.push_job) if job]
    foreign = next((job for job in jobs if not _is_ours(job, observed.workspace)), None)
    overtaken = [job for job in jobs if _is_ours(job, observed.workspace) and _revision_of(job) < number]
    if any(_is_ours(job, observed.workspace) and _revision_of(job) > number for job in jobs):
        return Plan()  # our picture of the Workspace is the older one: a newer is on its way
    if foreign and not settled(observed.workspace, number):
        return with_status(Standing("waiting", message=about_foreign(foreign, observed.workspace)))
    if overtaken:
        going = [
            Delete("Job", job["metadata"]["name"], job["metadata"]["uid"])
            for job in overtaken
            if "deletionTimestamp" not in job["metadata"]
        ]
        message = f"revision {number} begins when the Job of revision {_revision_of(overtaken[0])} is gone"
        return with_status(Standing("waiting", message=message), *going)
    pushed = observed.push_job and view_job(observed.push_job, _pods_of(observed.push_job, observed.pods))
    if pushed and pushed.phase == "succeeded" and not settled(observed.workspace, number, "Succeeded"):
        if pushed.lacks_words and not observed.pods_are_fresh:
            return Plan(wants_pods=True)
        return with_status(Standing("job", view=pushed, run_digest=_run_digest(observed.push_job)))
    if settled(observed.workspace, number):
        expired, again_in_s = _expired(jobs, settings.ttl_s, now)
        # What a status says may be lost with it, and a Job is not needed any more once its end is recorded.
        return Plan(
            (*actions, *_missing_end(observed, number), *expired), Standing("settled", revision=number), again_in_s
        )
    if remembered := _remembered(observed, number):  # whoever has lost the status, it is not trained again
        return with_status(remembered)
    if observed.job:
        view = view_job(observed.job, _pods_of(observed.job, observed.pods), observed.events)
        if view.lacks_words and not observed.pods_are_fresh:
            return Plan(wants_pods=True)  # what is said of a finished Workspace is said for good
        if view.is_ending:
            return Plan(actions)  # its end is told once, and whole
        progress = observed.progress if view.phase == "running" else None
        standing = Standing("job", view=view, progress=progress, run_digest=_run_digest(observed.job))
        return with_status(standing)
    return _start(observed, settings, number, actions, with_status, rendered, now)


def _start(
    observed: Observed,
    settings: Settings,
    number: int,
    actions: tuple[Action, ...],
    with_status: Callable[..., Plan],
    rendered: Rendered | None,
    now: datetime,
) -> Plan:
    """Create what the revision still lacks: its check Job where a node would boot, then its Job."""
    checked = observed.check_job and view_job(
        observed.check_job, _pods_of(observed.check_job, observed.pods), observed.events
    )
    if checked and checked.phase != "succeeded":
        return with_status(Standing("check", view=checked, run_digest=_run_digest(observed.check_job)))
    try:
        rendered = rendered or _render(observed, settings, number)
    except TunerError as error:
        return with_status(Standing("invalid", message=say(error)))
    confirm: tuple[Action, ...] = ()
    if not any(isinstance(action, Annotate) for action in actions):
        # Nobody has looked at the Workspace itself since it was listed: it may be finished by now.
        confirm = (Confirm("Workspace", *_identity(observed.workspace)),)
    # What a person should know before it runs, such as that nothing of it outlives its pod.
    notes = "; ".join(rendered.notes)
    said = (Emit(event_manifest(observed.workspace, number, "Normal", "Note", notes, now)),) if notes else ()
    if not checked and _wants_check(observed, settings, rendered.job):
        creates = (*map(Create, rendered.objects), Create(rendered.check_job))
        return with_status(_about("check", rendered.check_job), *confirm, *creates, *said, rendered=rendered)
    # After a check its objects are there; a default or the controller's own flags may have changed meanwhile.
    there = _mounted(observed.check_job)
    objects = (each for each in rendered.objects if (each["kind"], each["metadata"]["name"]) not in there)
    creates = (*map(Create, objects), Create(rendered.job))
    said = () if checked else said
    return with_status(_about("job", rendered.job), *confirm, *creates, *said, rendered=rendered)


def _render(observed: Observed, settings: Settings, number: int) -> Rendered:
    return settings.render(observed.workspace, observed.config_map, number, observed.nodes or ())


def _about(kind: Literal["check", "job"], job: Object) -> Standing:
    """How it stands with a Job that is just being created."""
    return Standing(kind, view=view_job(job, ()), run_digest=_run_digest(job))


# ── revisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class _Missing:
    sentence: str


def _wanted(observed: Observed) -> str | _Missing:
    """The hash of what the Workspace asks for now: sections, annotations of ours, the ConfigMap that it names.

    A default ConfigMap does not count: who names none gets the default of the day, and an administrator's edit of it
    must not train everything again.
    """
    workspace = observed.workspace
    name = workspace["tuning"].get("config")
    content = None
    if name:
        if observed.config_map is None:
            namespace = workspace["metadata"].get("namespace", "default")
            return _Missing(f"ConfigMap {name!r} specified in 'config' not found in namespace {namespace!r}")
        content = (observed.config_map.get("data") or {}).get(TRAINING_CONFIG_KEY)
    parts = [
        _without_unset(workspace.get("resource")),
        _without_unset(workspace.get("inference")),
        _without_unset(workspace["tuning"]),
        content,
        {key: value for key, value in _annotations(workspace).items() if key.startswith(OWN_ANNOTATIONS)},
    ]
    text = "".join(f"{json.dumps(part, sort_keys=True)}\n" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()


# What an API server fills in by itself: a CRD that gets or loses a default must not train everything again.
_DEFAULTS: Mapping[str, Any] = {str(location[-1]): value for location, value in SERVER_DEFAULTS.items()}


def _without_unset(value: Any) -> Any:
    if isinstance(value, Mapping):
        kept = {key: _without_unset(each) for key, each in value.items() if _DEFAULTS.get(key) != each}
        return {key: each for key, each in kept.items() if each not in (None, "", [], {})}
    if isinstance(value, list):
        return [_without_unset(each) for each in value]
    return value


def _known_revisions(observed: Observed) -> dict[int, str]:
    """Each revision's number and hash, by the Workspace's annotations and by its ControllerRevisions.

    Another controller's (KAITO's hash is another) count too: ours come after them.
    """
    known: dict[int, str] = {}
    uid = observed.workspace["metadata"]["uid"]
    for record in observed.records:
        if _owner_uid(record) == uid:
            known[_revision_of(record)] = _annotations(record).get(HASH_ANNOTATION, "")
    number = _revision_of(observed.workspace)
    if number:
        known[number] = _annotations(observed.workspace).get(HASH_ANNOTATION, "")
    return known


def _begin(observed: Observed, number: int, wanted: str) -> tuple[Action, ...]:
    """The records of a new revision: the Workspace's annotations first, which fail when it has changed meanwhile."""
    actions: list[Action] = []
    if number > 1 and observed.config_map and observed.workspace["tuning"].get("config"):
        actions.append(Confirm("ConfigMap", *_identity(observed.config_map)))
    actions.append(_annotate(number, wanted))
    revision = _revision_manifest(observed, number, wanted)
    same_name = [each for each in observed.revisions if each["metadata"]["name"] == revision["metadata"]["name"]]
    oldest_first = sorted(observed.revisions, key=_revision_of)
    surplus = oldest_first[: max(0, len(oldest_first) + 1 - REVISIONS_KEPT)]
    gone = {_name(each): each for each in (*same_name, *surplus)}.values()
    return (*actions, *_forget(gone, observed), Create(revision))


def _forget(revisions: Iterable[Object], observed: Observed) -> Iterator[Delete]:
    """Revisions, and how they ended."""
    for revision in revisions:
        of = (_owner_uid(revision), _revision_of(revision))
        for each in (revision, *(end for end in observed.ends if (_owner_uid(end), _revision_of(end)) == of)):
            yield Delete("ControllerRevision", _name(each), each["metadata"]["uid"])


def _missing_records(observed: Observed, number: int, wanted: str) -> tuple[Action, ...]:
    """What of a revision's records is not there: a controller was ended between two of them."""
    actions: list[Action] = []
    if _revision_of(observed.workspace) != number:
        actions.append(_annotate(number, wanted))
    if number not in {_revision_of(revision) for revision in observed.revisions}:
        revision = _revision_manifest(observed, number, wanted)
        actions += _forget([each for each in observed.revisions if _name(each) == _name(revision)], observed)
        actions.append(Create(revision))
    return tuple(actions)


def _annotate(number: int, wanted: str) -> Annotate:
    return Annotate({REVISION_ANNOTATION: str(number), HASH_ANNOTATION: wanted})


def _revision_manifest(observed: Observed, number: int, wanted: str) -> dict[str, Any]:
    workspace = observed.workspace
    name = _name(workspace)
    # Five characters as KAITO has it; more where the newest revision happens to begin with the same five.
    newest = max(observed.revisions, key=_revision_of, default=None)
    taken = {_name(newest)} if newest else set()
    named = next(f"{name}-{wanted[:length]}" for length in (5, 10, 64) if f"{name}-{wanted[:length]}" not in taken)
    # For people to read, and many may: what signs a URL stands in a Secret.
    data = {key: _unsigned(workspace[key]) for key in ("resource", "inference", "tuning") if key in workspace}
    return _record(workspace, number, wanted, named, data)


def _unsigned(value: Any) -> Any:
    """With `?…` for the query of each URL."""
    if isinstance(value, Mapping):
        return {key: _unsigned(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_unsigned(each) for each in value]
    return redact(value) if isinstance(value, str) else value


def _record(workspace: Object, number: int, wanted: str, name: str, data: Mapping[str, Any]) -> dict[str, Any]:
    """A ControllerRevision: an API server lets nobody change its data, nor patch it at all.

    Whoever may edit Workspaces may not make one (the role `edit` has none), so what it says was said by a controller.
    """
    of = _name(workspace)
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": name,
            "namespace": workspace["metadata"].get("namespace", "default"),
            "labels": {NAME_LABEL: of, WORKSPACE_LABEL: of},
            "annotations": {HASH_ANNOTATION: wanted, REVISION_ANNOTATION: str(number)},
            "ownerReferences": [owner_reference(workspace)],
        },
        "revision": number,
        "data": dict(data),
    }


# ── how revisions ended ──────────────────────────────────────────────────────────────────────────────────────────────

_END_LABELS = {"app.kubernetes.io/component": "end"}


def is_end(record: Object) -> bool:
    """Whether a ControllerRevision says how a revision ended, and not what it is."""
    return _END_LABELS.items() <= (record["metadata"].get("labels") or {}).items()


def _missing_end(observed: Observed, number: int) -> tuple[Action, ...]:
    """What the status says of a finished revision, kept beside it: a record of its own, made once and never changed.

    A revision may have two: one that failed has succeeded when a second push got through.
    """
    workspace = observed.workspace
    end = written_end(workspace)
    if end is None or any(known.state == end.state for known in _known_ends(observed, number)):
        return ()
    job = observed.push_job if end.state == "Succeeded" and observed.push_job else observed.job
    end = replace(end, run_digest=end.run_digest or _run_digest(job))
    said = hashlib.sha256(f"{workspace['metadata']['uid']} {number} {end.state}".encode()).hexdigest()
    name = f"{_name(workspace)}-end-{said[:10]}"
    record = _record(workspace, number, _known_revisions(observed)[number], name, end.as_data())
    record["metadata"]["labels"] |= _END_LABELS
    return (Create(record),)


def _known_ends(observed: Observed, number: int) -> list[End]:
    uid = observed.workspace["metadata"]["uid"]
    own = (each for each in observed.ends if _owner_uid(each) == uid and _revision_of(each) == number)
    return [end for each in own if (end := End.of_data(each.get("data"))) is not None]


def _remembered(observed: Observed, number: int) -> Standing | None:
    """How it stands with a revision whose end is recorded and whose status is lost."""
    ends = {end.state: end for end in _known_ends(observed, number)}
    if end := ends.get("Succeeded"):
        values: dict[str, Scalar] = {"image": end.image} if end.image else {}
        results: dict[StageName, StageResult] = {"push": StageResult(stage="push", values=values)}
        return Standing("job", view=JobView("succeeded", results=results), run_digest=end.run_digest)
    if end := ends.get("Failed"):
        failure = Ending(end.message or "its Job has failed")
        return Standing("job", view=JobView("failed", failure=failure), run_digest=end.run_digest)
    return None


def _expired(jobs: Iterable[Object], ttl_s: int | None, now: datetime) -> tuple[tuple[Action, ...], float | None]:
    """Those whose end is long enough ago, and in how many seconds it is for the next one."""
    gone: list[Action] = []
    left: list[float] = []
    for job in jobs if ttl_s is not None else ():
        ended_at = _ended_at(job)
        if ended_at is None or "deletionTimestamp" in job["metadata"]:
            continue
        assert ttl_s is not None
        wait_s = ttl_s - (now - ended_at).total_seconds()
        if wait_s <= 0:
            gone.append(Delete("Job", _name(job), job["metadata"]["uid"]))
        else:
            left.append(wait_s)
    return tuple(gone), min(left, default=None)


def _ended_at(job: Object) -> datetime | None:
    for each in job.get("status", {}).get("conditions") or ():
        if each["type"] in ("Complete", "Failed") and each["status"] == "True" and each.get("lastTransitionTime"):
            return datetime.fromisoformat(each["lastTransitionTime"])
    return None


def owner_reference(workspace: Object) -> dict[str, Any]:
    """What makes the garbage collector delete an object with its Workspace."""
    return {
        "apiVersion": workspace["apiVersion"],
        "kind": "Workspace",
        "name": _name(workspace),
        "uid": workspace["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }


# ── what is whose ────────────────────────────────────────────────────────────────────────────────────────────────────


def _name(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def _annotations(thing: Object) -> Mapping[str, str]:
    return thing["metadata"].get("annotations") or {}


def _identity(thing: Object) -> tuple[str, str]:
    return _name(thing), str(thing["metadata"]["resourceVersion"])


def _owner_uid(thing: Object) -> str | None:
    owners = thing["metadata"].get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), None)


def _is_ours(job: Object, workspace: Object) -> bool:
    """Made by this controller for this very Workspace, not for one that had its name before it."""
    return _owner_uid(job) == workspace["metadata"]["uid"] and _run_digest(job) is not None


def _mounted(job: Object | None) -> set[tuple[str, str | None]]:
    """The ConfigMaps and Secrets without which its pod would not have run."""
    volumes = job["spec"].get("template", {}).get("spec", {}).get("volumes") or () if job else ()
    return {("ConfigMap", each.get("configMap", {}).get("name")) for each in volumes} | {
        ("Secret", each.get("secret", {}).get("secretName")) for each in volumes
    }


def _run_digest(job: Object | None) -> str | None:
    written = _annotations(job).get(RUN_DIGEST_ANNOTATION) if job else None
    return str(written) if written else None


def _revision_of(thing: Object) -> int:
    """0 where it says none, or something that is no number."""
    written = _annotations(thing).get(REVISION_ANNOTATION, "")
    return int(written) if written.isascii() and written.isdigit() else 0


def about_foreign(job: Object, workspace: Object) -> str:
    """Why the Job that has the Workspace's name is neither taken over nor deleted."""
    owner = _owner_uid(job)
    if owner and owner != workspace["metadata"]["uid"]:
        return f"the Job {_name(job)!r} of an earlier Workspace of this name is not gone yet"
    return (
        f"a Job {_name(job)!r} is there that this controller did not make; it is left alone: "
        f"to tune here, delete it (kubectl delete job {_name(job)}) or give the Workspace another name"
    )


def _pods_of(job: Object, pods: Iterable[Object]) -> list[Object]:
    """The pods of this Job and not of one that had its name before it."""
    uid, name = job["metadata"]["uid"], _name(job)
    found = []
    for pod in pods:
        owner = _owner_uid(pod)
        labels = pod["metadata"].get("labels") or {}
        if owner == uid or (owner is None and labels.get("batch.kubernetes.io/job-name") == name):
            found.append(pod)
    return found


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _wants_check(observed: Observed, settings: Settings, job: Object) -> bool:
    """Whether to check on a CPU first: where the pod would make a node boot, unless it was said."""
    if settings.check_job != "auto":
        return settings.check_job == "always"
    has_instance_type = bool((observed.workspace.get("resource") or {}).get("instanceType"))
    return has_instance_type and not fitting_nodes(_pod_spec(job), observed.nodes or ())


def _fitting(observed: Observed, settings: Settings, number: int, rendered: Rendered | None) -> tuple[str, ...]:
    """The ready nodes that take the pod of a revision: its Job's, else that of the Job which would be made."""
    job = rendered.job if rendered else observed.job
    if not rendered and not (job and _is_ours(job, observed.workspace) and _revision_of(job) == number):
        try:
            job = _render(observed, settings, number).job
        except TunerError:
            return ()
    return tuple(fitting_nodes(_pod_spec(job), observed.nodes or ())) if job else ()


def _pod_spec(job: Object) -> Object:
    spec: Object = job["spec"]["template"]["spec"]
    return spec


# ── status and events ────────────────────────────────────────────────────────────────────────────────────────────────

PROGRESS_EVERY_S = 15.0
EVENTS_AGAIN_IN_S = 20.0
PROGRESS_AGAIN_IN_S = 30.0


def _plan_status(
    observed: Observed, settings: Settings, standing: Standing, now: datetime, actions: tuple[Action, ...] = ()
) -> Plan:
    """The actions, then the Events and the status where they differ from what is there."""
    standing = replace(standing, error=observed.error)
    view = standing.view
    waits = view is not None and view.is_silent
    runs = view is not None and view.phase == "running" and standing.kind == "job"
    status = build_status(observed.workspace, standing, now, tuning_is_pruned=settings.prunes_tuning_status)
    written: Mapping[str, Any] = observed.workspace.get("status") or {}
    if settings.conditions_are_atomic:
        status = with_others_conditions(status, written)
    result = Plan(
        actions,
        standing,
        wants_events=waits,
        wants_progress=runs and view is not None and view.stage == "train",
        again_in_s=EVENTS_AGAIN_IN_S if waits else PROGRESS_AGAIN_IN_S if runs else None,
    )
    differs = status_differs(written, status)
    if not differs:
        return result
    if differs == "progress" and (wait_s := _until_next_write_s(written, now)) > 0:
        return replace(result, again_in_s=wait_s)
    emitted = tuple(Emit(event) for event in _events(observed.workspace, standing, written, status, now))
    return replace(result, actions=(*actions, *emitted, ApplyStatus(status)))


def _until_next_write_s(written: Mapping[str, Any], now: datetime) -> float:
    """Seconds until progress may be written again; never longer than the pause, whatever a clock says."""
    last = (written.get("tuning") or {}).get("lastUpdatedTime")
    if not last:
        return 0.0
    passed_s = (now - datetime.fromisoformat(last)).total_seconds()
    return PROGRESS_EVERY_S - passed_s if 0 <= passed_s < PROGRESS_EVERY_S else 0.0


_EVENT_REASONS = {
    "Succeeded": ("Normal", "Succeeded"),
    "Failed": ("Warning", "Failed"),
    "Running": ("Normal", "Running"),
    "Pending": ("Normal", "Waiting"),
}


def _events(
    workspace: Object, standing: Standing, written: Mapping[str, Any], status: Mapping[str, Any], now: datetime
) -> Iterator[dict[str, Any]]:
    """One Event where the state, the stage, the attempt or what is waited for has changed."""
    before, after = _headline(written), _headline(status)
    view = standing.view
    if view and standing.kind == "job" and view.waiting_for in ROUTINE and not (view.retry or standing.notice):
        before = before if standing.error else after  # what every pod waits for is no news
    if before == after or after[1] is None:
        return
    state, note = after
    kind, reason = _EVENT_REASONS.get(str(state), ("Normal", "Waiting"))
    if state in ("Succeeded", "Failed"):
        pass  # an end is told as what it is, whatever else could not be done
    elif standing.kind == "invalid" or standing.notice or standing.error:
        kind, reason = "Warning", "Invalid" if not standing.error else "ReconcileError"
    elif state == "Running" and "attempt " in str(note):
        kind, reason = "Warning", "Retrying"
    yield event_manifest(workspace, standing.revision, kind, reason, str(note), now)


def _headline(status: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """What a person is told of: the state, and the words of the condition that says most about it."""
    state = status.get("state")
    kind = "WorkspaceSucceeded" if state in ("Succeeded", "Failed") else "JobStarted"
    return state, (_condition(status, kind) or {}).get("message")


def _condition(status: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    return next((each for each in status.get("conditions") or () if each["type"] == kind), None)


def event_manifest(
    workspace: Object, revision: int, kind: str, reason: str, note: str, now: datetime
) -> dict[str, Any]:
    """An Event about the Workspace. https://kubernetes.io/docs/reference/kubernetes-api/cluster-resources/event-v1"""
    metadata, note = workspace["metadata"], redact(note)
    said = hashlib.sha256(f"{metadata['uid']} {revision} {reason} {note}".encode()).hexdigest()
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": f"{_name(workspace)}.{said[:16]}", "namespace": metadata.get("namespace", "default")},
        "eventTime": now.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "reportingController": "tuner.kaito.sh/controller",
        "reportingInstance": REPORTER,
        "action": "Reconcile",
        "type": kind,
        "reason": reason,
        "note": _within(note, _NOTE_BYTES),
        "regarding": {
            "apiVersion": workspace["apiVersion"],
            "kind": "Workspace",
            "name": _name(workspace),
            "namespace": metadata.get("namespace", "default"),
            "uid": metadata["uid"],
            "resourceVersion": metadata.get("resourceVersion", ""),
        },
    }


_NOTE_BYTES = 1024  # the server calls them characters, and counts bytes


def _within(text: str, most_bytes: int) -> str:
    """As much of it as fits, no character cut in two."""
    return text.encode()[:most_bytes].decode(errors="ignore")


def say(error: TunerError) -> str:
    """All that an error has to say, in one line: each problem with its place and what to do."""
    if isinstance(error, ConfigError) and error.problems:
        return "; ".join(f"{problem}{f' ({problem.hint})' if problem.hint else ''}" for problem in error.problems)
    return f"{error.message} ({error.hint})" if error.hint else error.message
