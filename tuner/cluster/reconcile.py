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

from tuner.cluster.observe import ROUTINE, Ending, JobView, Object, ProgressLine, view_job
from tuner.cluster.workspace_status import (
    Standing,
    build_status,
    recorded_revision,
    settled,
    status_differs,
    with_others_conditions,
)
from tuner.errors import ConfigError, TunerError
from tuner.redaction import redact
from tuner.request import RETRY_ANNOTATION
from tuner.runspec import Scalar, StageName, StageResult
from tuner.workspace import TRAINING_CONFIG_KEY

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
        self, workspace: Object, config_map: Object | None, revision: int, *, labels_preferred: bool
    ) -> Rendered:
        """`labels_preferred`: no node has the labels yet, so none would be made for a pod that requires them."""


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

    `nodes` is None where they may not be listed. `pods_are_fresh`: they were just asked for, and are all there are.
    `error` is what the last reconcile could not do.
    """

    workspace: Object
    config_map: Object | None = None
    job: Object | None = None
    check_job: Object | None = None
    push_job: Object | None = None
    pods: Sequence[Object] = ()
    pods_are_fresh: bool = False
    revisions: Sequence[Object] = ()
    nodes: Sequence[Object] | None = None
    events: Sequence[Object] = ()
    progress: ProgressLine | None = None
    error: str | None = None


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
class Record:
    """Write annotations to the ControllerRevision with this uid; one that is gone is as good."""

    name: str
    uid: str
    annotations: Mapping[str, str]


@dataclass(frozen=True)
class Emit:
    """A Kubernetes Event; its name follows from what it says, so saying it twice makes one."""

    event: Mapping[str, Any]


@dataclass(frozen=True)
class ApplyStatus:
    status: Mapping[str, Any]


Action = Annotate | Confirm | Create | Delete | Record | Emit | ApplyStatus


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

    def with_status(standing: Standing, *further: Action, again_in_s: float | None = None) -> Plan:
        standing = replace(standing, revision=number, notice=notice)
        planned = _plan_status(observed, settings, standing, now, (*actions, *further, *_record(observed, standing)))
        return replace(planned, again_in_s=again_in_s or planned.again_in_s)

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
        return Plan((*actions, *expired), Standing("settled", revision=number), again_in_s)
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
    if not checked and _wants_check(observed, settings):
        creates = (*map(Create, rendered.objects), Create(rendered.check_job))
        return with_status(_about("check", rendered.check_job), *confirm, *creates, *said)
    # After a check its objects are there; a default or the controller's own flags may have changed meanwhile.
    there = _mounted(observed.check_job)
    objects = (each for each in rendered.objects if (each["kind"], each["metadata"]["name"]) not in there)
    creates = (*map(Create, objects), Create(rendered.job))
    said = () if checked else said
    return with_status(_about("job", rendered.job), *confirm, *creates, *said)


def _render(observed: Observed, settings: Settings, number: int) -> Rendered:
    # Karpenter and the autoscaler make no node for a pod that requires labels which they do not know.
    resource = observed.workspace.get("resource") or {}
    selector = resource.get("labelSelector") or {}
    labelled = any(_has_labels(node, selector) for node in observed.nodes or ())
    preferred = bool(resource.get("instanceType")) and not labelled
    return settings.render(observed.workspace, observed.config_map, number, labels_preferred=preferred)


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
_DEFAULTS: Mapping[str, Any] = {"count": 1, "accessMode": "public"}


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
    for revision in observed.revisions:
        if _owner_uid(revision) == uid:
            known[_revision_of(revision)] = _annotations(revision).get(HASH_ANNOTATION, "")
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
    for each in {_name(each): each for each in (*same_name, *surplus)}.values():
        actions.append(Delete("ControllerRevision", _name(each), each["metadata"]["uid"]))
    return (*actions, Create(revision))


def _missing_records(observed: Observed, number: int, wanted: str) -> tuple[Action, ...]:
    """What of a revision's records is not there: a controller was ended between two of them."""
    actions: list[Action] = []
    if _revision_of(observed.workspace) != number:
        actions.append(_annotate(number, wanted))
    if number not in {_revision_of(revision) for revision in observed.revisions}:
        revision = _revision_manifest(observed, number, wanted)
        actions += [
            Delete("ControllerRevision", _name(each), each["metadata"]["uid"])
            for each in observed.revisions
            if _name(each) == _name(revision)
        ]
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
    data = {key: workspace[key] for key in ("resource", "inference", "tuning") if key in workspace}
    if isinstance(urls := ((data.get("tuning") or {}).get("input") or {}).get("urls"), list):
        # A record is kept when the Workspace has another URL by now: it repeats no signature.
        shown = [redact(url) if isinstance(url, str) else url for url in urls]
        data["tuning"] = {**data["tuning"], "input": {**data["tuning"]["input"], "urls": shown}}
    return {
        "apiVersion": "apps/v1",
        "kind": "ControllerRevision",
        "metadata": {
            "name": named,
            "namespace": workspace["metadata"].get("namespace", "default"),
            "labels": {NAME_LABEL: name, WORKSPACE_LABEL: name},
            "annotations": {HASH_ANNOTATION: wanted, REVISION_ANNOTATION: str(number)},
            "ownerReferences": [owner_reference(workspace)],
        },
        "revision": number,
        "data": data,
    }


# How a revision ended, on its ControllerRevision: what a status that is lost was about.
STATE_ANNOTATION, IMAGE_ANNOTATION, MESSAGE_ANNOTATION = "tuner/state", "tuner/image", "tuner/message"


def _record(observed: Observed, standing: Standing) -> tuple[Action, ...]:
    """The end of a revision, kept with it: the pushed image by digest, or why it has failed."""
    view = standing.view
    if (
        view is None
        or view.phase not in ("succeeded", "failed")
        or (view.phase, standing.kind) == ("succeeded", "check")
    ):
        return ()
    said = {STATE_ANNOTATION: "Succeeded" if view.phase == "succeeded" else "Failed"}
    if image := view.values.get("image"):
        said[IMAGE_ANNOTATION] = str(image)
    if view.failure:
        said[MESSAGE_ANNOTATION] = _within(view.failure.sentence, _NOTE_BYTES)
    if standing.run_digest:
        said[RUN_DIGEST_ANNOTATION] = standing.run_digest
    revision = _own_revision(observed, standing.revision)
    if revision is None or said.items() <= _annotations(revision).items():
        return ()
    return (Record(_name(revision), revision["metadata"]["uid"], said),)


def _remembered(observed: Observed, number: int) -> Standing | None:
    """The end that is recorded with a revision."""
    revision = _own_revision(observed, number)
    said = _annotations(revision) if revision else {}
    digest = said.get(RUN_DIGEST_ANNOTATION)
    match said.get(STATE_ANNOTATION):
        case "Succeeded":
            values: dict[str, Scalar] = {"image": said[IMAGE_ANNOTATION]} if IMAGE_ANNOTATION in said else {}
            results: dict[StageName, StageResult] = {"push": StageResult(stage="push", values=values)}
            return Standing("job", view=JobView("succeeded", results=results), run_digest=digest)
        case "Failed":
            failure = Ending(said.get(MESSAGE_ANNOTATION, "its Job has failed"))
            return Standing("job", view=JobView("failed", failure=failure), run_digest=digest)
    return None


def _own_revision(observed: Observed, number: int) -> Object | None:
    uid = observed.workspace["metadata"]["uid"]
    return next((each for each in observed.revisions if _owner_uid(each) == uid and _revision_of(each) == number), None)


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


def _wants_check(observed: Observed, settings: Settings) -> bool:
    """Whether to check on a CPU first: where the pod would make a node boot, unless it was said."""
    if settings.check_job != "auto":
        return settings.check_job == "always"
    has_instance_type = bool((observed.workspace.get("resource") or {}).get("instanceType"))
    return has_instance_type and not fitting_nodes(observed.workspace, observed.nodes)


def fitting_nodes(workspace: Object, nodes: Sequence[Object] | None) -> list[str]:
    """The ready nodes with GPUs that the Workspace's selector and instance type take, sorted."""
    resource = workspace.get("resource") or {}
    return sorted(_name(node) for node in nodes or () if _fits(node, resource))


def _fits(node: Object, resource: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    conditions = {each["type"]: each["status"] for each in node.get("status", {}).get("conditions") or ()}
    allocatable = node.get("status", {}).get("allocatable") or {}
    instance_type = resource.get("instanceType")
    return (
        conditions.get("Ready") == "True"
        and not (node.get("spec") or {}).get("unschedulable")
        and str(allocatable.get("nvidia.com/gpu", "0")) != "0"
        and (not instance_type or labels.get("node.kubernetes.io/instance-type") == instance_type)
        and _has_labels(node, resource.get("labelSelector") or {})
    )


def _has_labels(node: Object, selector: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in (selector.get("matchLabels") or {}).items()) and all(
        _matches(labels, each) for each in selector.get("matchExpressions") or ()
    )


def _matches(labels: Object, expression: Object) -> bool:
    value, values = labels.get(expression["key"]), expression.get("values") or ()
    match expression["operator"]:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case _:
            return value is None


# ── status and events ────────────────────────────────────────────────────────────────────────────────────────────────

PROGRESS_EVERY_S = 15.0
EVENTS_AGAIN_IN_S = 20.0
PROGRESS_AGAIN_IN_S = 30.0


def _plan_status(
    observed: Observed, settings: Settings, standing: Standing, now: datetime, actions: tuple[Action, ...] = ()
) -> Plan:
    """The actions, then the Events and the status where they differ from what is there."""
    standing = replace(
        standing,
        fitting=tuple(fitting_nodes(observed.workspace, observed.nodes)),
        error=observed.error,
    )
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
    if standing.kind == "invalid" or standing.notice or standing.error:
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
