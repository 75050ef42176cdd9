"""A Job, its Pods and their Events → where the run stands, in words. Pure: `tuner status` and the controller read it.

The objects are plain dicts as the API server has them. What is said comes from the Job's *conditions*: a failed pod is
an attempt, and only the Job says when there is no further one.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast

from pydantic import ValidationError

from tuner.cluster.server_text import shown
from tuner.pod import CHECK, DATA_DOWNLOADER, PREFLIGHT, PULLER, PUSHER
from tuner.redaction import redact
from tuner.runspec import Scalar, StageName, StageResult

Object = Mapping[str, Any]

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
MAIN_CONTAINER_ANNOTATION = "kubectl.kubernetes.io/default-container"

NO_NODE_YET, BEING_MADE = "its pod has no node yet", "its containers are being made"
ROUTINE = (NO_NODE_YET, BEING_MADE)  # what every pod waits for

Phase = Literal["suspended", "waiting", "running", "succeeded", "failed", "stopping"]


@dataclass(frozen=True)
class Ending:
    """How one container, or a whole pod, ended badly. `sentence` is for people."""

    sentence: str
    exit_code: int | None = None
    container: str = ""
    result: StageResult | None = None


@dataclass(frozen=True)
class JobView:
    """Where a Job stands.

    `has_started` is true once a container of any attempt has run. `attempt` counts from 1 and goes up when a pod has
    failed; an evicted pod is replaced within its attempt. `waiting_for` says why nothing runs at the moment, `last`
    how the attempt before ended, `failure` why the Job has failed. `is_silent`: only Events could tell why it waits.
    `is_ending`: its pod has succeeded, and the Job is about to say so. `lacks_words`: the Job has ended, and no pod
    that is known says how: the pods may just not have been heard of yet.
    """

    phase: Phase
    has_started: bool = False
    stage: StageName | None = None
    attempt: int = 1
    attempts: int = 1
    waiting_for: str | None = None
    is_silent: bool = False
    is_ending: bool = False
    lacks_words: bool = False
    last: Ending | None = None
    failure: Ending | None = None
    pod: str | None = None
    nodes: tuple[str, ...] = ()
    results: Mapping[StageName, StageResult] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Scalar]:
        """What the stages that went well said of themselves, in one."""
        well = (result.values for result in self.results.values() if result.exit_code == 0)
        return {key: value for values in well for key, value in values.items()}

    @property
    def retry(self) -> str | None:
        """`attempt 2 of 4, last: …`, or None in the first attempt without a mishap."""
        if self.last is None and self.attempt == 1:
            return None
        last = f", last: {self.last.sentence}" if self.last else ""
        return f"attempt {self.attempt} of {self.attempts}{last}"


def view_job(job: Object, pods: Sequence[Object], events: Sequence[Object] = ()) -> JobView:
    """Where `job` stands. `pods` are those it made, in any order; `events` are about the Job or its pods."""
    spec, status = job.get("spec", {}), job.get("status", {})
    ordered = sorted(pods, key=_age)
    alive = [pod for pod in ordered if _phase(pod) not in ("Failed", "Succeeded") and not _is_going(pod)]
    newest = alive[-1] if alive else (ordered[-1] if ordered else None)
    attempts = int(spec.get("backoffLimit", 6)) + 1
    last = next(
        (ending for pod in reversed(ordered) if pod is not newest or not alive if (ending := _ending(pod))), None
    )
    started = [pod for pod in ordered if _has_run(pod)]
    view = JobView(
        phase="running",
        has_started=bool(started or status.get("succeeded") or status.get("failed") or last),
        attempt=min(int(status.get("failed") or 0) + 1, attempts),
        attempts=attempts,
        last=last,
        pod=_name(newest) if newest else None,
        nodes=tuple(sorted({pod["spec"]["nodeName"] for pod in alive or ordered[-1:] if pod["spec"].get("nodeName")})),
        results=_results(ordered),
    )
    conditions = {each["type"]: each for each in status.get("conditions", ()) if each.get("status") == "True"}
    # A pod that still runs is an old picture of it: what it said at its end is on its way.
    if "Complete" in conditions and not alive:
        return replace(view, phase="succeeded", has_started=True, last=None, lacks_words="image" not in view.values)
    if (failed := conditions.get("Failed")) and not alive:
        failure = _why_failed(failed, last)
        return replace(view, phase="failed", has_started=True, failure=failure, last=None, lacks_words=last is None)
    if _is_going(job) or "FailureTarget" in conditions:
        return replace(view, phase="stopping")
    if spec.get("suspend"):
        return replace(view, phase="suspended", waiting_for=_suspended(job))
    if newest and _phase(newest) == "Succeeded":
        return replace(view, stage=_stage(newest), is_ending=True)
    if newest and not alive and _phase(newest) not in ("Failed", "Succeeded"):
        # podReplacementPolicy: Failed. On a node that does not answer this is for ever.
        return replace(view, phase="waiting", waiting_for=_is_going_away(newest))
    if newest is None or not alive:
        refused = _event_note(events, "Job", _name(job), ("FailedCreate",))
        reason = f"its pod is refused: {refused}" if refused else None if view.last else NO_NODE_YET
        return replace(view, phase="waiting", waiting_for=reason, is_silent=True)
    if reason := _why_pod_waits(newest):
        return replace(view, phase="waiting", waiting_for=reason)
    if not _has_run(newest):
        missing = _event_note(events, "Pod", _name(newest), _MOUNT_EVENTS)
        reason = f"its volumes are not there: {missing}" if missing else BEING_MADE
        return replace(view, phase="waiting", waiting_for=reason, is_silent=True)
    stage = _stage(newest)
    if ending := _ending(newest):  # a container has failed, and its pod is about to end
        return replace(view, stage=stage_of(ending.container) if stage == "push" else stage, last=ending)
    return replace(view, stage=stage, last=_sidecars_ending(newest) or view.last)


# ── pods ─────────────────────────────────────────────────────────────────────────────────────────────────────────────

_STAGE_OF: Mapping[str, StageName] = {
    PREFLIGHT: "preflight",
    DATA_DOWNLOADER: "fetch",
    PULLER: "fetch",
    CHECK: "prepare",
    PUSHER: "push",
}


def stage_of(container: str) -> StageName:
    """The stage that a container runs; the main one, named as the Workspace, trains."""
    return _STAGE_OF.get(container, "train")


def main_container(pod: Object) -> str:
    """The container that trains: the one `kubectl logs` shows by default."""
    annotations = pod["metadata"].get("annotations") or {}
    return str(annotations.get(MAIN_CONTAINER_ANNOTATION) or pod["spec"]["containers"][0]["name"])


def _name(thing: Object) -> str:
    return str(thing["metadata"]["name"])


def _age(pod: Object) -> tuple[str, str]:
    return str(pod["metadata"].get("creationTimestamp", "")), _name(pod)


def _phase(pod: Object) -> str:
    return str(pod.get("status", {}).get("phase", "Pending"))


def _is_going(thing: Object) -> bool:
    return "deletionTimestamp" in thing["metadata"]


def container_statuses(pod: Object) -> list[Object]:
    """The status of each container, in the order in which they have something to do: a pusher comes last."""
    status = pod.get("status", {})
    found = [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]
    return sorted(found, key=lambda each: bool(each["name"] == PUSHER))


def _sidecar(pod: Object) -> Object | None:
    """The status of a pusher beside a trainer, whose own end counts for nothing: it is started again."""
    return next(
        (each for each in pod.get("status", {}).get("initContainerStatuses") or () if each["name"] == PUSHER), None
    )


def _sidecars_ending(pod: Object) -> Ending | None:
    """How a pusher died that is about to be started again."""
    sidecar = _sidecar(pod) or {}
    if ended := _state(sidecar, "terminated"):
        ending = _container_ending(PUSHER, ended)
        return replace(ending, sentence=f"{ending.sentence}; it is started again")
    if (_state(sidecar, "waiting") or {}).get("reason") == "CrashLoopBackOff":
        return Ending("push: its container has died, and is started again in a moment", container=PUSHER)
    return None


def _state(container: Object, kind: Literal["waiting", "running", "terminated"]) -> Object | None:
    return cast(Object | None, (container.get("state") or {}).get(kind))


def _has_run(pod: Object) -> bool:
    return any(_state(each, "running") or _state(each, "terminated") for each in container_statuses(pod))


def _stage(pod: Object) -> StageName | None:
    """The first container that runs, in order; between two it is still the stage of the one that has ended.

    A pusher beside a trainer waits, and is not what is going on: the trainer's log tells when it pushes.
    """
    own = [each for each in container_statuses(pod) if each is not _sidecar(pod)]
    running = [each["name"] for each in own if _state(each, "running") is not None]
    ended = [each["name"] for each in own if _state(each, "terminated") is not None]
    return stage_of(running[0]) if running else stage_of(ended[-1]) if ended else None


def _results(pods: Sequence[Object]) -> dict[StageName, StageResult]:
    """What the stages said at their end, the newest pod's word last."""
    results: dict[StageName, StageResult] = {}
    for pod in pods:
        for container in container_statuses(pod):
            ended = _state(container, "terminated")
            if ended and (result := parse_result(ended.get("message"))):
                results[result.stage] = result
    return results


def parse_result(message: str | None) -> StageResult | None:
    """The StageResult in a termination message; None when a container ended without one."""
    if not message or not message.lstrip().startswith("{"):
        return None
    try:
        return StageResult.model_validate_json(message)
    except ValidationError:
        return None


# ── why it ended ─────────────────────────────────────────────────────────────────────────────────────────────────────

_SIGNALS = {137: "killed (SIGKILL)", 139: "crashed (segmentation fault)", 143: "stopped (SIGTERM)"}


def _ending(pod: Object) -> Ending | None:
    """How a pod came to a bad end; None while it runs and when it ended well."""
    status = pod.get("status", {})
    disrupted = next(
        (
            each
            for each in status.get("conditions") or ()
            if each["type"] == "DisruptionTarget" and each["status"] == "True"
        ),
        None,
    )
    if disrupted or status.get("reason") in ("Evicted", "Preempting", "NodeLost", "Shutdown"):
        source = disrupted or status
        reason = _words(str(source.get("reason") or "Evicted"))
        return Ending(f"{reason}: {_said(source['message'])}" if source.get("message") else reason)
    bad = [
        (str(ended.get("finishedAt", "")), each["name"], ended)
        for each in container_statuses(pod)
        if (ended := _state(each, "terminated")) and ended.get("exitCode") and each is not _sidecar(pod)
    ]
    if bad:
        # The first to end is the cause: what is beside it is told to stop.
        _, container, ended = min(bad, key=lambda each: each[:2])
        return _container_ending(container, ended)
    if _phase(pod) != "Failed":
        return None
    return Ending(_said(status.get("message") or status.get("reason") or "its pod has failed"))


def _container_ending(container: str, ended: Object) -> Ending:
    code = int(ended["exitCode"])
    result = parse_result(ended.get("message"))
    if result:
        sentence = f"{result.stage}: {_one_line(result.message) or result.reason} (exit {code})"
        return Ending(sentence, code, container, result)
    stage = stage_of(container)
    if ended.get("reason") == "OOMKilled":
        return Ending(f"{stage}: out of memory, its container reached its limit (exit {code})", code, container)
    words = _SIGNALS.get(code, "ended without a word")
    text = (ended.get("message") or "").strip()  # FallbackToLogsOnError: the end of the log
    detail = f": {redact(_one_line(text.splitlines()[-1]))}" if text else ""
    return Ending(f"{stage}: {words} (exit {code}){detail}", code, container)


_FAILED_BECAUSE = {
    "BackoffLimitExceeded": "no attempt is left",
    "DeadlineExceeded": "it took longer than its activeDeadlineSeconds",
}


def _why_failed(condition: Object, last: Ending | None) -> Ending:
    """The container's own words where there are any: the Job's are about rules and limits."""
    reason = str(condition.get("reason", ""))
    because = _FAILED_BECAUSE.get(reason)
    if last and reason != "DeadlineExceeded":
        return Ending(
            f"{last.sentence}; {because}" if because else last.sentence, last.exit_code, last.container, last.result
        )
    message = _said(condition.get("message") or reason or "the Job has failed")
    found = re.search(r"Container (\S+) .* exit code (\d+)", message)
    return Ending(because or message, int(found[2]) if found else None, found[1] if found else "")


# ── why it waits ─────────────────────────────────────────────────────────────────────────────────────────────────────

_PULL_ERRORS = ("ImagePullBackOff", "ErrImagePull", "InvalidImageName", "ErrImageNeverPull", "ImageInspectError")
_MOUNT_EVENTS = ("FailedMount", "FailedAttachVolume", "FailedCreatePodSandBox")
_MAKE_ERRORS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def _suspended(job: Object) -> str:
    queue = (job["metadata"].get("labels") or {}).get(QUEUE_LABEL)
    if queue:
        return f"queued by Kueue in {queue}"
    return f'suspended; to go on: kubectl patch job {_name(job)} --type merge -p \'{{"spec":{{"suspend":false}}}}\''


def _is_going_away(pod: Object) -> str:
    node = pod["spec"].get("nodeName")
    return f"a new pod begins when {_name(pod)}{f' on node {node}' if node else ''} is gone"


def _why_pod_waits(pod: Object) -> str | None:
    """What keeps a pod from running, as the scheduler or the kubelet says it; None when nothing does."""
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition["status"] == "False":
            reason, message = condition.get("reason", ""), _said(condition.get("message", ""))
            if reason == "SchedulingGated":
                return f"its pod is held back by a scheduling gate: {message}"
            return f"no node takes its pod: {message}" if message else "no node takes its pod yet"
    if not pod["spec"].get("nodeName"):
        return NO_NODE_YET
    for container in container_statuses(pod):
        waiting = _state(container, "waiting") or {}
        reason, message = waiting.get("reason"), _said(waiting.get("message", ""))
        if reason in _PULL_ERRORS:
            return f"the image {container.get('image', '')} cannot be pulled: {message or reason}"
        if reason in _MAKE_ERRORS:
            return f"container {container['name']} cannot be made: {message or reason}"
    return None


def _event_note(events: Iterable[Object], kind: str, name: str, reasons: Sequence[str]) -> str | None:
    """The newest event's words, of either events API."""
    found = []
    for event in events:
        about = event.get("regarding") or event.get("involvedObject") or {}
        if event.get("reason") in reasons and about.get("kind") == kind and about.get("name") == name:
            series = event.get("series") or {}
            when = (
                series.get("lastObservedTime")
                or event.get("deprecatedLastTimestamp")
                or event.get("lastTimestamp")
                or event.get("eventTime")
                or event["metadata"].get("creationTimestamp")
                or ""
            )
            found.append((str(when), _said(event.get("note") or event.get("message") or event["reason"])))
    return max(found)[1] if found else None


def _said(text: str) -> str:
    """What a scheduler, a kubelet or the Job's controller says, in one line."""
    return shown(_one_line(text))


def _one_line(text: str) -> str:
    """What others have said, fit for a status."""
    return redact(" ".join(str(text).split()))


def _words(reason: str) -> str:
    """`PreemptionByScheduler` → `preemption by scheduler`"""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", reason).lower()


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class ProgressLine:
    """One JSON line of `talk.py`: how far a stage is."""

    stage: StageName
    done: int
    total: int | None
    unit: str
    eta_s: int | None = None
    values: Mapping[str, float] = field(default_factory=dict)


_OWN_KEYS = frozenset({"stage", "task", "done", "total", "unit", "eta_s"})


def parse_progress(log: str) -> ProgressLine | None:
    """The last progress line of a log's end; None when there is none."""
    for line in reversed(log.splitlines()):
        # A container runtime's cut-off first line, and other programs' JSON, are passed over.
        if not line.lstrip().startswith('{"stage"'):
            continue
        try:
            said = json.loads(line)
            return ProgressLine(
                stage=said["stage"],
                done=int(said["done"]),
                total=None if said.get("total") is None else int(said["total"]),
                unit=str(said["unit"]),
                eta_s=None if said.get("eta_s") is None else int(said["eta_s"]),
                values={key: float(value) for key, value in said.items() if key not in _OWN_KEYS},
            )
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):  # int(Infinity) overflows
            continue
    return None
