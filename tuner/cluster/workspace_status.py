"""How a Workspace stands → its `status`: KAITO's conditions, reasons and words, and below `tuning` what it has not.

    status:
      state: Running                          # Pending, Running, Succeeded, Failed
      conditions: [NodesReady, ResourceReady, JobStarted, WorkspaceSucceeded, WorkspaceReady]
      tuning: {revision, runDigest, stage, attempt, attempts, progressPercentage, step, totalSteps, loss, …}

Where the CRD is KAITO's, which prunes `status.tuning`, the figures go to `status.performance.metrics`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from tuner.cluster.observe import ROUTINE, JobView, Object, ProgressLine
from tuner.redaction import redact
from tuner.runspec import Scalar, StageName

State = Literal["Pending", "Running", "Succeeded", "Failed"]


@dataclass(frozen=True)
class Standing:
    """How a Workspace stands.

    `kind`: `inference` (not ours), `deleting`, `invalid` (`message` says why), `waiting` (for what `message` says),
    `check` (the check Job is what there is), `job` (the Job is), `settled` (finished; nothing is written any more).
    `notice` and `error` are said until it has ended: a change that is not valid, a call that failed.
    """

    kind: Literal["inference", "deleting", "invalid", "waiting", "check", "job", "settled"]
    message: str = ""
    revision: int = 0
    view: JobView | None = None
    progress: ProgressLine | None = None
    run_digest: str | None = None
    fitting: Sequence[str] = ()
    notice: str | None = None
    error: str | None = None


# ── what was written ─────────────────────────────────────────────────────────────────────────────────────────────────


def recorded_revision(workspace: Object) -> int:
    """The revision that the status is about; 0 when it does not say."""
    status = workspace.get("status") or {}
    written = (status.get("tuning") or {}).get("revision") or _metrics(status).get("revision", {}).get("value")
    return int(written) if str(written or "").isdigit() else 0


def settled(workspace: Object, revision: int | None = None, *states: State) -> bool:
    """Whether the status says that this revision has succeeded or failed: then there is nothing more to do for it.

    Without a revision: whether another controller has finished the Workspace as it is now.
    """
    status = workspace.get("status") or {}
    succeeded = _written_conditions(status).get("WorkspaceSucceeded", {})
    if revision is None:
        generation = workspace["metadata"].get("generation", 1)
        return bool(succeeded.get("status") == "True" and succeeded.get("observedGeneration", 1) >= generation)
    state = "Succeeded" if succeeded.get("status") == "True" else status.get("state")
    return recorded_revision(workspace) == revision and state in (states or ("Succeeded", "Failed"))


@dataclass(frozen=True)
class End:
    """How a revision ended: what of a status must outlive it. `image` is what was pushed, `message` why it failed."""

    state: Literal["Succeeded", "Failed"]
    image: str | None = None
    message: str | None = None
    run_digest: str | None = None

    def as_data(self) -> dict[str, str]:
        named = {"state": self.state, "image": self.image, "message": self.message, "runDigest": self.run_digest}
        return {key: value for key, value in named.items() if value is not None}

    @classmethod
    def of_data(cls, data: Any) -> "End | None":
        """None for what is none: who may write such records may write anything into them."""
        if not isinstance(data, Mapping) or data.get("state") not in ("Succeeded", "Failed"):
            return None
        texts = {key: str(data[key]) for key in ("image", "message", "runDigest") if isinstance(data.get(key), str)}
        return cls(data["state"], texts.get("image"), texts.get("message"), texts.get("runDigest"))


def written_end(workspace: Object) -> End | None:
    """The end that the status tells; None while there is none."""
    status = workspace.get("status") or {}
    tuning, succeeded = status.get("tuning") or {}, _written_conditions(status).get("WorkspaceSucceeded", {})
    digest = tuning.get("runDigest")
    if succeeded.get("status") == "True":
        image = (tuning.get("artifact") or {}).get("image") or _metrics(status).get("artifact", {}).get("value")
        return End("Succeeded", image=image, run_digest=digest)
    if status.get("state") == "Failed":
        message = str(succeeded.get("message", "")).removeprefix(_FAILED)
        return End("Failed", message=message or None, run_digest=digest)
    return None


def _metrics(status: Mapping[str, Any]) -> Mapping[str, Any]:
    return (status.get("performance") or {}).get("metrics") or {}


def _written_conditions(status: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    return {each["type"]: each for each in status.get("conditions") or ()}


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────

Condition = tuple[bool, str, str]  # status, reason, message

CONDITION_TYPES = (
    "NodesReady",
    "ResourceReady",
    "JobStarted",
    "WorkspaceSucceeded",
    "WorkspaceReady",
    "WorkspaceDeleting",
    "InferenceReady",
)

_NOT_STARTED = "Tuning job has not started"
_STARTED = "Tuning job has started"
_FAILED = "tuning job failed: "


def _state(standing: Standing) -> State:
    view = standing.view
    if view is None:
        return "Pending"
    if view.phase == "failed":
        return "Failed"
    if standing.kind == "check" or view.phase == "suspended":
        return "Pending"
    if view.phase == "succeeded":
        return "Succeeded"
    return "Running" if view.has_started else "Pending"


def _conditions(standing: Standing, state: State, written: Mapping[str, Any]) -> dict[str, Condition]:
    """Each condition as it is now. WorkspaceReady, for v1alpha1's columns, says the same as WorkspaceSucceeded."""
    ready = _nodes_ready(standing, state, written)
    succeeded = _succeeded(standing, state)
    return {
        "NodesReady": (True, "NodesReady", "Enough Nodes are ready")
        if ready
        else (False, "NodeNotReady", "Not enough Nodes are ready"),
        "ResourceReady": (True, "workspaceResourceStatusSuccess", "workspace resource is ready")
        if ready
        else (False, "workspaceResourceStatusNotReady", "node status condition not ready"),
        "JobStarted": _started(standing, state),
        "WorkspaceSucceeded": succeeded,
        "WorkspaceReady": succeeded,
    }


def _nodes_ready(standing: Standing, state: State, written: Mapping[str, Any]) -> bool:
    """A pod that has a node proves it; before there is one, the nodes that would do tell."""
    view = standing.view if standing.kind == "job" else None
    if state == "Succeeded" or (view and view.nodes):
        return True
    if view and view.phase in ("failed", "stopping"):
        return _written_conditions(written).get("NodesReady", {}).get("status") == "True"
    return bool(standing.fitting)


def _started(standing: Standing, state: State) -> Condition:
    started, pending = "WorkspaceTuningJobStatusStarted", "WorkspaceTuningJobStatusPending"
    view = standing.view
    if state == "Failed" and view and view.failure:
        checks = "checks failed before a GPU was asked for: " if standing.kind == "check" else ""
        return False, "WorkspaceTuningJobStatusFailed", f"{_FAILED}{checks}{view.failure.sentence}"
    if state in ("Running", "Succeeded") and view:
        return True, started, "; ".join(part for part in (_STARTED, *_doing(view, standing.progress)) if part)
    if standing.kind == "check" and view:
        # Its stages, and what every pod waits for, are over in seconds.
        waiting = f"waiting: {view.waiting_for}" if view.waiting_for and view.waiting_for not in ROUTINE else None
        doing = "; ".join(part for part in (view.retry, waiting) if part)
        return False, pending, f"{_NOT_STARTED}: checks run first" + (f"; {doing}" if doing else "")
    reason = (view.waiting_for if view else standing.message) or ""
    if view and view.phase == "stopping":
        reason = "its Job is being stopped"
    return False, pending, f"{_NOT_STARTED}: {reason}" if reason else _NOT_STARTED


def _doing(view: JobView, progress: ProgressLine | None) -> tuple[str | None, ...]:
    """What is going on, what went before it, and what is waited for."""
    if view.phase == "succeeded":
        return ()
    if view.phase == "stopping":
        return "it is being stopped", view.retry
    stage = _stage(view, progress)
    return f"stage {stage}" if stage else None, view.retry, view.waiting_for and f"waiting: {view.waiting_for}"


def _stage(view: JobView, progress: ProgressLine | None) -> StageName | None:
    """The trainer's container prepares the rows first, and at the end waits for the push: only its progress tells."""
    if view.stage == "train" and progress and progress.stage in ("prepare", "push"):
        return progress.stage
    return view.stage if view.phase == "running" else None


def _succeeded(standing: Standing, state: State) -> Condition:
    view = standing.view
    if state == "Succeeded" and view:
        image = view.values.get("image")
        return True, "workspaceSucceeded", f"workspace succeeds; pushed {image}" if image else "workspace succeeds"
    if state == "Failed":
        return False, "workspaceFailed", _started(standing, state)[2]
    if state == "Running":
        return False, "workspacePending", "workspace has not completed yet, tuning job is running"
    return False, "workspacePending", "workspace is initializing, tuning job has not started"


# ── the status ───────────────────────────────────────────────────────────────────────────────────────────────────────

_INFERENCE = (
    False,
    "InferenceNotManaged",
    "tuner runs tuning only: this Workspace has an inference section and is left alone",
)


def build_status(
    workspace: Object, standing: Standing, now: datetime, *, tuning_is_pruned: bool = False
) -> dict[str, Any]:
    """The whole status that this controller owns. Times change only where what they are the time of has changed."""
    written: Mapping[str, Any] = workspace.get("status") or {}
    if standing.kind == "inference":
        return {"conditions": _dated({"InferenceReady": _INFERENCE}, workspace, now)}
    if standing.kind == "deleting":
        return _deleting(workspace, now)
    state = _state(standing)
    conditions = _conditions(standing, state, written)
    for kind in ("JobStarted", "WorkspaceSucceeded", "WorkspaceReady"):
        status, reason, message = conditions[kind]
        # What is said of an end is said for good, and these two may be over in a minute.
        if standing.notice and state not in ("Succeeded", "Failed"):
            message += f"; {standing.notice}"
        if standing.error and state not in ("Succeeded", "Failed"):
            message += f" (last reconcile error: {standing.error})"
        conditions[kind] = (status, reason, message[:_MESSAGE_CHARACTERS])
    status_now: dict[str, Any] = {
        "state": state,
        "targetNodeCount": 1,
        "workerNodes": _worker_nodes(standing, written),
        "conditions": _dated(conditions, workspace, now),
    }
    figures = _figures(standing, state, recorded_revision(workspace) == standing.revision, written)
    if tuning_is_pruned:
        return {**status_now, "performance": {"metrics": _as_metrics(figures)}}
    return {**status_now, "tuning": _dated_figures(figures, written.get("tuning") or {}, now)}


def with_others_conditions(status: Mapping[str, Any], written: Mapping[str, Any]) -> dict[str, Any]:
    """With the conditions that are somebody else's, as they are: for a list that is replaced whole."""
    others = [dict(each) for each in written.get("conditions") or () if each["type"] not in CONDITION_TYPES]
    return {**status, "conditions": [*others, *status["conditions"]]}


_MESSAGE_CHARACTERS = 8192  # metav1.Condition has 32,768; nobody reads so much


def _deleting(workspace: Object, now: datetime) -> dict[str, Any]:
    """What was there, and that it goes."""
    written: Mapping[str, Any] = workspace.get("status") or {}
    deleting = {"WorkspaceDeleting": (True, "workspaceDeleted", "workspace is being deleted")}
    kept = [dict(each) for each in written.get("conditions") or () if each["type"] in _OTHERS]
    owned = {key: written[key] for key in ("state", "targetNodeCount", "workerNodes", "tuning") if key in written}
    return {**owned, "conditions": [*kept, *_dated(deleting, workspace, now)]}


_OTHERS = frozenset(CONDITION_TYPES) - {"WorkspaceDeleting"}


def _worker_nodes(standing: Standing, written: Mapping[str, Any]) -> list[str]:
    if standing.kind != "job" or standing.view is None:
        return []
    ended = standing.view.phase in ("succeeded", "failed")
    return sorted(standing.view.nodes) or (list(written.get("workerNodes") or ()) if ended else [])


def _dated(conditions: Mapping[str, Condition], workspace: Object, now: datetime) -> list[dict[str, Any]]:
    before = _written_conditions(workspace.get("status") or {})
    dated = []
    for kind, (is_true, reason, message) in conditions.items():
        status = "True" if is_true else "False"
        same = before.get(kind, {}).get("status") == status
        dated.append(
            {
                "type": kind,
                "status": status,
                "reason": reason,
                "message": redact(message),
                "observedGeneration": workspace["metadata"].get("generation", 1),
                "lastTransitionTime": before[kind]["lastTransitionTime"] if same else timestamp(now),
            }
        )
    return dated


def timestamp(moment: datetime) -> str:
    """As metav1.Time has it: seconds, UTC."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────

# A key of the stages' results → the field in `status.tuning`. A container says the words of all its stages in one.
_FROM_RESULTS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("base_model", ("baseModel", "id")),
    ("base_model_revision", ("baseModel", "revision")),
    ("base_model_digest", ("baseModel", "digest")),
    ("data_digest", ("dataset", "digest")),
    ("files", ("dataset", "files")),
    ("bytes", ("dataset", "sizeBytes")),
    ("train_rows", ("dataset", "rows")),
    ("steps", ("step",)),
    ("loss", ("loss",)),
    ("eval_loss", ("evalLoss",)),
)

_TEXT = frozenset({"loss", "evalLoss"})  # as Kubeflow's trainerStatus has it: a number of any size, read by people
_PROGRESS_FIELDS = frozenset(
    "progressPercentage step totalSteps loss evalLoss estimatedRemainingSeconds metrics lastUpdatedTime".split()
)
_KEPT_FIELDS = ("artifact", "baseModel", "dataset", "evalLoss", *sorted(_PROGRESS_FIELDS - {"evalLoss"}))


def _figures(standing: Standing, state: State, same_revision: bool, written: Mapping[str, Any]) -> dict[str, Any]:
    """`status.tuning` without its time. What was known before and is of this revision stays until it is known anew."""
    before: Mapping[str, Any] = (written.get("tuning") or {}) if same_revision else {}
    figures: dict[str, Any] = {key: before[key] for key in _KEPT_FIELDS if key in before and key != "lastUpdatedTime"}
    if standing.revision:
        figures["revision"] = standing.revision
    if standing.run_digest:
        figures["runDigest"] = standing.run_digest
    view = standing.view
    if standing.kind == "check":
        return figures if state == "Failed" else {**figures, "stage": "check"}
    if view is None:
        return figures
    figures |= {"attempt": view.attempt, "attempts": view.attempts}
    if stage := _stage(view, standing.progress):
        figures["stage"] = stage
    _put_results(figures, view.values)
    if standing.progress:
        figures |= _of_progress(standing.progress)
    if state == "Succeeded":
        figures["progressPercentage"] = 100
    if state in ("Succeeded", "Failed") or figures.get("stage") == "push":
        figures.pop("estimatedRemainingSeconds", None)
    return figures


def _put_results(figures: dict[str, Any], values: Mapping[str, Scalar]) -> None:
    for key, path in _FROM_RESULTS:
        value = values.get(key)
        if value is None:
            continue
        *outer, last = path
        if outer:
            figures[outer[0]] = {**figures.get(outer[0], {}), last: value}
        else:
            figures[last] = _text(value) if last in _TEXT else value
    image = values.get("image")
    if isinstance(image, str):
        _, at, digest = image.partition("@")
        figures["artifact"] = {"image": image, "digest": digest} if at else {"image": image}


def _of_progress(progress: ProgressLine) -> dict[str, Any]:
    """A training's steps; what other stages count is told by the stage alone."""
    if progress.unit != "steps" or progress.stage != "train":
        return {}
    figures: dict[str, Any] = {"step": progress.done}
    if progress.total:
        figures |= {"totalSteps": progress.total, "progressPercentage": min(100, progress.done * 100 // progress.total)}
    if progress.eta_s is not None:
        figures["estimatedRemainingSeconds"] = progress.eta_s
    if "loss" in progress.values:
        figures["loss"] = _text(progress.values["loss"])
    if "eval_loss" in progress.values:
        figures["evalLoss"] = _text(progress.values["eval_loss"])
    others = {name: value for name, value in progress.values.items() if name not in ("loss", "eval_loss")}
    if others:
        figures["metrics"] = [{"name": name, "value": _text(others[name])} for name in sorted(others)]
    return figures


def _text(value: Any) -> str:
    if isinstance(value, float):
        return str(int(value)) if value.is_integer() else f"{value:.4g}"
    return str(value)


def _dated_figures(figures: dict[str, Any], before: Mapping[str, Any], now: datetime) -> dict[str, Any]:
    same = figures == {key: value for key, value in before.items() if key != "lastUpdatedTime"}
    return {**figures, "lastUpdatedTime": before["lastUpdatedTime"] if same and before else timestamp(now)}


# Our field → the name, description and unit that KAITO's metrics have room for.
_METRICS = (
    ("revision", "revision", "the Workspace's revision that this is about", ""),
    ("progressPercentage", "progress", "how far the training is", "%"),
    ("step", "step", "optimizer steps done", "steps"),
    ("totalSteps", "totalSteps", "optimizer steps in all", "steps"),
    ("loss", "loss", "training loss at the last step", ""),
    ("evalLoss", "evalLoss", "loss on the rows held out", ""),
    ("estimatedRemainingSeconds", "eta", "time left", "s"),
)


def _as_metrics(figures: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    metrics = {
        name: {"description": description, "value": str(figures[key]), **({"unit": unit} if unit else {})}
        for key, name, description, unit in _METRICS
        if key in figures
    }
    for each in figures.get("metrics", ()):
        metrics[each["name"]] = {"description": "as the training reports it", "value": each["value"]}
    if "artifact" in figures:
        metrics["artifact"] = {"description": "the pushed adapter", "value": figures["artifact"]["image"]}
    return metrics


# ── whether to write it ──────────────────────────────────────────────────────────────────────────────────────────────


def status_differs(written: Mapping[str, Any], wanted: Mapping[str, Any]) -> Literal[False, "progress", "more"]:
    """Whether what is there is not what should be, and if so whether only the progress is.

    Conditions of other types are somebody else's.
    """
    before = {kind: each for kind, each in _written_conditions(written).items() if kind in CONDITION_TYPES}
    if before != {kind: each for kind, each in _written_conditions(wanted).items() if kind in CONDITION_TYPES}:
        return "more"
    # An empty list and none are the same to the API server.
    if any(
        (written.get(key) or None) != (wanted.get(key) or None) for key in ("state", "targetNodeCount", "workerNodes")
    ):
        return "more"
    if (written.get("performance") or {}) != wanted.get("performance", written.get("performance") or {}):
        return "progress"
    tuning, wanted_tuning = written.get("tuning") or {}, wanted.get("tuning") or {}
    different = {key for key in tuning.keys() | wanted_tuning.keys() if tuning.get(key) != wanted_tuning.get(key)}
    if not different:
        return False
    return "progress" if different <= _PROGRESS_FIELDS else "more"
