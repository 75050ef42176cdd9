"""The controller: watches, a queue, and for each Workspace a look and what `reconcile.plan` says.

    Workspaces, Jobs, Pods, ConfigMaps, ControllerRevisions, Nodes ──► (namespace, name) ──► queue ──► plan ──► API

Every event only puts a Workspace into the queue; what is done is decided by what there is then. So an event that is
heard twice or never does no harm, and a process that was ended leaves nothing to be taken up.
"""

import json
import re
import sys
import threading
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from tuner.cluster import watched
from tuner.cluster.api import (
    ALL_NAMESPACES,
    CONFIG_MAP,
    CONTROLLER_REVISION,
    CUSTOM_RESOURCE_DEFINITION,
    EVENT,
    JOB,
    NODE,
    POD,
    WORKSPACE,
    Api,
    Resource,
    refuse_old_server,
)
from tuner.cluster.api_errors import (
    AlreadyExistsError,
    ApiError,
    ConflictError,
    ForbiddenError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
)
from tuner.cluster.beside import helper_name
from tuner.cluster.job_options import WORKSPACE_LABEL
from tuner.cluster.kaito import refuse_beside_kaito
from tuner.cluster.lease import Leadership
from tuner.cluster.metrics import Gauges, Metrics, metrics_text, serve_pages
from tuner.cluster.nodes import fitting_nodes, gpus_of
from tuner.cluster.observe import Object, ProgressLine, parse_progress
from tuner.cluster.reconcile import (
    DEFAULT_CONFIG_MAPS,
    NAME_LABEL,
    Action,
    Annotate,
    ApplyStatus,
    Confirm,
    Create,
    Delete,
    Emit,
    Observed,
    Plan,
    Settings,
    about_foreign,
    plan,
    say,
)
from tuner.cluster.watched import Watched, WatchedNamespaces
from tuner.cluster.work_queue import WorkQueue
from tuner.cluster.workspace_status import with_others_conditions
from tuner.pod import CHECK_JOB, PUSH_JOB
from tuner.redaction import redact
from tuner.workspace import TRAINING_CONFIG_KEY

FIELD_MANAGER = "tuner-controller"
LEASE_NAME = "tuner-controller"
WORKERS = 4
PROGRESS_EVERY_S = 30.0
_EVENTS_LAST_S = 300.0
_IN_ONE_BREATH_S = 0.1
_DEFAULTS_EVERY_S = 300.0
_STUCK_AFTER_S = 120.0

Log = Callable[..., None]


@dataclass(frozen=True)
class ControllerOptions:
    """`namespaces`: only there, else everywhere. `home`: where the controller runs, with its Lease and the defaults."""

    home: str
    identity: str
    namespaces: tuple[str, ...] = ()
    selector: str = ""
    progress: Literal["logs", "off"] = "logs"
    metrics_port: int = 8080
    health_port: int = 8081
    leader_election: bool = True
    workers: int = WORKERS
    progress_every_s: float = PROGRESS_EVERY_S
    events_after_s: float = 20.0
    relist_s: float = watched.RELIST_S
    watch_s: int = watched.WATCH_S


def log_json(level: str, message: str, **fields: Any) -> None:
    """One line of JSON on stderr."""
    said = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "level": level, "message": message}
    said |= {name: redact(value) if isinstance(value, str) else value for name, value in fields.items()}
    sys.stderr.write(json.dumps(said, ensure_ascii=False, default=str) + "\n")  # one write: several threads talk
    sys.stderr.flush()


_UNSEEN = "cannot see what is installed"


def _status_schema(crd: Object) -> Mapping[str, Any]:
    """Where the CRD may not be read, the first write of a status tells."""
    version = next(each for each in crd["spec"]["versions"] if each["name"] == WORKSPACE.version)
    schema: Mapping[str, Any] = version["schema"]["openAPIV3Schema"]["properties"].get("status", {})
    return schema


def _has_tuning_status(status: Mapping[str, Any]) -> bool:
    return "tuning" in status.get("properties", {}) or bool(status.get("x-kubernetes-preserve-unknown-fields"))


def _has_atomic_conditions(status: Mapping[str, Any]) -> bool:
    conditions = status.get("properties", {}).get("conditions", {})
    return bool(conditions.get("x-kubernetes-list-type") != "map")


T = TypeVar("T")


def _attempt(log: Log, ask: Callable[[], T]) -> T | None:
    """Who is installed for some namespaces may not see the whole cluster."""
    try:
        return ask()
    except (ForbiddenError, NotFoundError) as error:
        log("info", _UNSEEN, error=error.message)
        return None


# ── what was asked of the API server for one look ────────────────────────────────────────────────────────────────────


@dataclass
class _Asked:
    """What is not watched: the end of a log, and Events, each asked for now and then."""

    pod: str | None = None
    progress: ProgressLine | None = None
    progress_at: float = float("-inf")
    events: tuple[Object, ...] = ()
    events_at: float = float("-inf")
    events_every_s: float = 0.0


class _LookAgainError(Exception):
    """Our picture is old, or somebody was quicker: look again when it is newer."""


# ── the controller ───────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class Controller:
    """`run` returns when `stop` was called."""

    api: Api
    settings: Settings
    options: ControllerOptions
    log: Log = log_json
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    metrics: Metrics = field(default_factory=Metrics)

    def __post_init__(self) -> None:
        self._queue = WorkQueue()
        self._stopping = threading.Event()
        self._asked: dict[str, _Asked] = {}
        self._errors: dict[str, str] = {}
        self._said: defaultdict[str, set[str]] = defaultdict(set)  # the names of Events that are there
        self._default_config_maps: dict[str, tuple[float, Object | None]] = {}
        self._turned_at = time.monotonic()
        self._leadership = Leadership(self.api, self.options.home, LEASE_NAME, self.options.identity, self.log)
        self._watches: list[Watched] = []
        self._workspaces = self._watch(
            WORKSPACE, self._heard_workspace, watched.trim_workspace, labels=self.options.selector
        )
        self._jobs = self._watch(
            JOB, self._heard_owned, watched.trim_job, owner_of=_workspace_of, labels=WORKSPACE_LABEL
        )
        self._pods = self._watch(
            POD, self._heard_owned, watched.trim_pod, owner_of=_workspace_of, labels=WORKSPACE_LABEL
        )
        self._records = self._watch(
            CONTROLLER_REVISION,
            self._heard_owned,
            watched.trim_record,
            owner_of=_workspace_of_record,
            labels=NAME_LABEL,
        )
        self._config_maps = self._watch(
            CONFIG_MAP,
            self._heard_config_map,
            watched.trim_config_map(TRAINING_CONFIG_KEY),
            labels=f"!{WORKSPACE_LABEL}",  # ours are named by their content and never change
            fields="metadata.name!=kube-root-ca.crt",
        )
        # Roles grant no nodes: then a pod that gets one tells.
        self._nodes = None if self.options.namespaces else self._watch(NODE, self._heard_node, watched.trim_node)

    def _watch(
        self,
        resource: Resource,
        heard: Callable[[Object | None, Object | None], None],
        trim: Callable[[dict[str, Any]], Object | None],
        *,
        owner_of: Callable[[Object], str | None] = lambda _: None,
        labels: str = "",
        fields: str = "",
    ) -> WatchedNamespaces:
        parts = {
            namespace: Watched(
                self.api,
                resource,
                namespace,
                heard=heard,
                trim=trim,
                owner_of=owner_of,
                label_selector=labels,
                field_selector=fields,
                log=self.log,
                watch_s=self.options.watch_s,
                relist_s=self.options.relist_s,
            )
            for namespace in self.options.namespaces or (ALL_NAMESPACES,)
        }
        self._watches += parts.values()
        return WatchedNamespaces(parts)

    # ── the process ──────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Wait to be the leader, look at everything once, then at what changes. Raises ConfigError beside KAITO
        and on a server that is too old."""
        refuse_old_server(self.api)
        refuse_beside_kaito(self.api, lambda error: self.log("info", _UNSEEN, error=error.message))
        crd = _attempt(self.log, lambda: self.api.find(CUSTOM_RESOURCE_DEFINITION, WORKSPACE.full_name))
        if crd and not _has_tuning_status(_status_schema(crd)):
            self._use_metrics()
        if crd and _has_atomic_conditions(_status_schema(crd)):
            self._keep_others_conditions()
        health = serve_pages(self.options.health_port, {"/healthz": self._health, "/readyz": self._readiness})
        page = serve_pages(self.options.metrics_port, {"/metrics": self._page})
        self.health_port, self.metrics_port = health.server_address[1], page.server_address[1]
        try:
            if self.options.leader_election and not self._leadership.wait(self._stopping):
                return
            self._work()
        finally:
            for server in (health, page):
                server.shutdown()
                server.server_close()
            if self.options.leader_election:
                self._leadership.release()

    def _work(self) -> None:
        # Only now: what a process sees when it begins to lead is newer than all that was done before.
        # And one after the other: whole objects are large, and what is kept of them is small.
        for each in self._watches:
            each.start()
            while not each.synced.wait(0.2):
                if self._stopping.is_set():
                    return
        self.log("info", "synced", workspaces=len(self._workspaces.all()))
        workers = [
            threading.Thread(target=self._turn, name=f"worker {number}", daemon=True)
            for number in range(self.options.workers)
        ]
        for worker in workers:
            worker.start()
        self._stopping.wait()
        self._queue.close()
        for each in self._watches:
            each.stop()
        for worker in workers:
            worker.join(5.0)

    def stop(self) -> None:
        """End in good order: what is being done is done, the lease given back. Safe in a signal's handler."""
        self._stopping.set()

    def _may_write(self) -> bool:
        return not self._stopping.is_set() and (not self.options.leader_election or self._leadership.is_ours)

    # ── what is heard ────────────────────────────────────────────────────────────────────────────────────────────────

    def _heard_workspace(self, before: Object | None, after: Object | None) -> None:
        changed = after or before
        assert changed is not None
        self._queue.add(_key(changed["metadata"]["namespace"], changed["metadata"]["name"]))

    def _heard_owned(self, before: Object | None, after: Object | None) -> None:
        changed = after or before
        assert changed is not None
        owner = _workspace_of(changed) or _workspace_of_record(changed)
        if owner:  # a Job and its pod change in one breath: a moment later one look does for both
            self._queue.add(_key(changed["metadata"]["namespace"], owner), _IN_ONE_BREATH_S)

    def _heard_config_map(self, before: Object | None, after: Object | None) -> None:
        if before and after and before["data"] == after["data"]:
            return
        changed = after or before
        assert changed is not None
        namespace, name = changed["metadata"]["namespace"], changed["metadata"]["name"]
        for workspace in self._workspaces.all():
            wanted = _config_of(workspace)
            if wanted == name and (workspace["metadata"]["namespace"] == namespace or _is_default(workspace)):
                self._heard_workspace(None, workspace)

    def _heard_node(self, before: Object | None, after: Object | None) -> None:
        """Those for which the node may make a difference and that are not finished."""
        there = [node for node in (before, after) if node]
        if not any(map(gpus_of, there)):
            return
        for workspace in self._workspaces.all():
            if (workspace.get("status") or {}).get("state") in ("Succeeded", "Failed"):
                continue
            job = self._jobs.get(workspace["metadata"]["namespace"], workspace["metadata"]["name"])
            # Where there is no Job yet, the look finds out what its pod would ask for.
            if job is None or fitting_nodes(job["spec"]["template"]["spec"], there):
                self._heard_workspace(None, workspace)

    # ── one look ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _turn(self) -> None:
        while not self._stopping.is_set():
            taken = self._queue.take(1.0)
            self._turned_at = time.monotonic()
            if taken:
                key, waited_s = taken
                self.metrics.queue_seconds.observe(waited_s)
                self._look(key)

    def _look(self, key: str) -> None:
        """One Workspace's turn. Whatever goes wrong is this one's matter: it comes again, later each time."""
        began = time.monotonic()
        try:
            result = self._reconcile(key)
        except _LookAgainError:
            self._queue.failed(key)
            result = "again"
        except ApiError as error:
            wait_s = self._queue.failed(key, error.retry_after_s or 0.0)
            self.metrics.api_errors.labels(kind=type(error).__name__).inc()
            self.log("warning", "reconcile", workspace=key, error=say(error), again_in_s=round(wait_s, 3))
            result = "error"
        except Exception as error:
            wait_s = self._queue.failed(key)
            trace = traceback.format_exc()
            self.log("error", "reconcile", workspace=key, error=repr(error), trace=trace, again_in_s=round(wait_s, 3))
            result = "bug"
        self.metrics.reconciles.labels(result=result).inc()
        self.metrics.reconcile_seconds.observe(time.monotonic() - began)

    def _reconcile(self, key: str) -> str:
        observed = self._observe(key)
        if observed is None:
            self._asked.pop(key, None)
            self._errors.pop(key, None)
            self._said.pop(key, None)
            self._queue.done(key)
            self._queue.forget(key)
            return "gone"
        settings, now = self.settings, self.now()
        planned = plan(observed, settings, now)
        if planned.wants_pods:
            observed = replace(observed, pods=self._list_pods(key), pods_are_fresh=True)
            planned = plan(observed, settings, now)
        more = self._ask(key, observed, planned)
        if more is not None:
            observed = more
            planned = plan(observed, settings, now)
        try:
            self._do(key, observed, planned.actions)
        except (ThrottledError, UnavailableError, ConflictError):
            raise
        except ApiError as error:
            self._explain(key, observed, error)
            raise
        cleared = self._errors.pop(key, None)
        self._queue.done(key)
        if cleared:
            self._queue.add(key)  # so that the status no longer says it
        elif planned.again_in_s is not None and (self.options.progress != "off" or not planned.wants_progress):
            self._queue.add(key, planned.again_in_s)
        return "done" if planned.actions else "nothing to do"

    def _observe(self, key: str) -> Observed | None:
        namespace, name = key.split("/")
        workspace = self._workspaces.get(namespace, name)
        if workspace is None:
            return None
        config = _config_of(workspace)
        config_map = self._config_maps.get(namespace, config) if config else None
        if config and config_map is None and _is_default(workspace):
            config_map = self._default_config_map(config)
        asked = self._asked.get(key)
        return Observed(
            workspace=workspace,
            config_map=config_map,
            job=self._jobs.get(namespace, name),
            check_job=self._jobs.get(namespace, helper_name(name, CHECK_JOB)),
            push_job=self._jobs.get(namespace, helper_name(name, PUSH_JOB)),
            pods=self._pods.of(namespace, name),
            records=self._records.of(namespace, name),
            nodes=self._nodes.all() if self._nodes else None,
            events=asked.events if asked else (),
            progress=asked.progress if asked else None,
            error=self._errors.get(key),
        )

    def _default_config_map(self, name: str) -> Object | None:
        """The administrator's, beside the controller; None where there is none, and our own defaults hold."""
        if not self.options.namespaces:
            return self._config_maps.get(self.options.home, name)
        known = self._default_config_maps.get(name)
        if known is None or time.monotonic() - known[0] > _DEFAULTS_EVERY_S:
            try:
                found = self.api.find(CONFIG_MAP, name, self.options.home)
            except ForbiddenError:
                found = None
            trim = watched.trim_config_map(TRAINING_CONFIG_KEY)
            known = self._default_config_maps[name] = (time.monotonic(), trim(found) if found else None)
        return known[1]

    def _ask(self, key: str, observed: Observed, planned: Plan) -> Observed | None:
        """The same with what is worth asking for and due; None when there is nothing."""
        view = planned.standing.view if planned.standing else None
        if view is None:
            self._asked.pop(key, None)
            return None
        asked = self._asked.get(key)
        if asked is None or asked.pod != view.pod:
            asked = self._asked[key] = _Asked(view.pod, events_every_s=self.options.events_after_s)
        now, namespace = time.monotonic(), observed.workspace["metadata"]["namespace"]
        if planned.wants_progress and self.options.progress == "logs" and view.pod:
            if now - asked.progress_at < self.options.progress_every_s:
                return replace(observed, progress=asked.progress)
            asked.progress_at = now
            line = self._last_line(namespace, view.pod, observed.workspace["metadata"]["name"])
            asked.progress = line or asked.progress
            return replace(observed, progress=asked.progress)
        if planned.wants_events and now - asked.events_at >= asked.events_every_s:
            first = asked.events_at == float("-inf")
            asked.events_at = now
            if first:
                return None  # most pods need no explanation: give it a moment
            asked.events_every_s = min(_EVENTS_LAST_S, asked.events_every_s * 2)
            about = view.pod or (observed.check_job or observed.job or {"metadata": {"name": ""}})["metadata"]["name"]
            asked.events = self._events_about(namespace, about)
            return replace(observed, events=asked.events)
        return None

    def _list_pods(self, key: str) -> list[Object]:
        namespace, name = key.split("/")
        listing = self.api.list(POD, namespace, label_selector=f"{WORKSPACE_LABEL}={name}")
        return [watched.trim_pod(pod) for pod in listing.items]

    def _last_line(self, namespace: str, pod: str, container: str) -> ProgressLine | None:
        try:
            return parse_progress(self.api.logs(pod, container, namespace, tail_lines=1))
        except ApiError as error:  # progress is worth no retry
            self.metrics.api_errors.labels(kind=type(error).__name__).inc()
            return None

    def _events_about(self, namespace: str, name: str) -> tuple[Object, ...]:
        try:
            return self.api.list(EVENT, namespace, field_selector=f"involvedObject.name={name}").items
        except ApiError as error:
            self.metrics.api_errors.labels(kind=type(error).__name__).inc()
            return ()

    # ── acting ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _do(self, key: str, observed: Observed, actions: tuple[Action, ...]) -> None:
        """Each action, in order, while this process leads."""
        version = str(observed.workspace["metadata"]["resourceVersion"])
        for action in actions:
            if not self._may_write():
                raise _LookAgainError
            self.metrics.api_requests.labels(action=type(action).__name__).inc()
            version = self._act(key, observed.workspace, action, version)

    def _act(self, key: str, workspace: Object, action: Action, version: str) -> str:
        """The version of the Workspace that is the newest we know."""
        namespace, name = key.split("/")
        match action:
            case Confirm(kind, about, wanted):
                found = self.api.find(WORKSPACE if kind == "Workspace" else CONFIG_MAP, about, namespace)
                if found is None or found["metadata"]["resourceVersion"] != wanted:
                    raise _LookAgainError
            case Annotate(annotations):
                patch = {"metadata": {"annotations": dict(annotations), "resourceVersion": version}}
                try:
                    return str(self.api.patch(WORKSPACE, name, patch, namespace)["metadata"]["resourceVersion"])
                except (ConflictError, NotFoundError):
                    raise _LookAgainError from None
            case Create(manifest):
                self._create(key, workspace, manifest, namespace)
            case Delete(kind, about, uid):
                resource = JOB if kind == "Job" else CONTROLLER_REVISION
                propagation: Literal["Foreground", "Background"] = "Foreground" if kind == "Job" else "Background"
                try:
                    self.api.delete(resource, about, namespace, propagation=propagation, uid=uid)
                except (NotFoundError, ConflictError):
                    pass  # gone, or another by now
                else:
                    self.log("info", "deleted", workspace=key, kind=kind, name=about)
            case Emit(event):
                self._emit(key, event, namespace)
            case ApplyStatus(status):
                return self._apply_status(workspace, status, version)
        return version

    def _create(self, key: str, workspace: Object, manifest: Mapping[str, Any], namespace: str) -> None:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        try:
            self.api.create(manifest, namespace)
        except AlreadyExistsError:
            if kind == "Job":
                there = self.api.find(JOB, name, namespace)
                if there and _workspace_of(there) is None:  # nobody's whom we watch: it will not be heard of
                    raise AlreadyExistsError(about_foreign(there, workspace), status=409) from None
                raise _LookAgainError from None
            return
        self.log("info", "created", workspace=key, kind=kind, name=name)

    def _emit(self, key: str, event: Mapping[str, Any], namespace: str) -> None:
        event = {**event, "reportingInstance": self.options.identity[:128]}
        if event["metadata"]["name"] in self._said[key]:
            return
        try:
            self.api.create(event, namespace)
        except AlreadyExistsError:
            self._said[key].add(event["metadata"]["name"])
            return
        except (ThrottledError, UnavailableError):
            raise
        except ApiError as error:  # refused for good: no reason to leave the rest undone
            self.log("warning", "event", workspace=key, error=error.message)
            return
        self._said[key].add(event["metadata"]["name"])
        self.log("info", "event", workspace=key, type=event["type"], reason=event["reason"], note=event["note"])

    def _apply_status(self, workspace: Object, status: Mapping[str, Any], version: str) -> str:
        """Server-side apply at this version of the Workspace."""
        metadata = workspace["metadata"]
        manifest = {
            "apiVersion": WORKSPACE.api_version,
            "kind": "Workspace",
            "metadata": {
                "name": metadata["name"],
                "namespace": metadata["namespace"],
                "resourceVersion": version,
            },
            "status": dict(status),
        }
        try:
            written = self.api.apply(manifest, field_manager=FIELD_MANAGER, subresource="status")
        except (ConflictError, NotFoundError):
            raise _LookAgainError from None
        except ApiError as error:
            if "tuning" in status and re.search(r"unknown field|not declared in schema", error.server_message):
                self._use_metrics()
                raise _LookAgainError from error
            raise
        if "tuning" in status and "tuning" not in (written.get("status") or {}):
            self._use_metrics()
            raise _LookAgainError
        before = workspace.get("status") or {}
        whole = with_others_conditions(status, before)
        if not self.settings.conditions_are_atomic and len(written["status"]["conditions"]) < len(whole["conditions"]):
            self._keep_others_conditions()
            return self._apply_status(workspace, whole, str(written["metadata"]["resourceVersion"]))
        return str(written["metadata"]["resourceVersion"])

    def _use_metrics(self) -> None:
        """KAITO's CRD has no `status.tuning`: from now on its metrics take the figures."""
        if not self.settings.prunes_tuning_status:
            self.log("info", "the CRD has no status.tuning: progress goes to status.performance.metrics")
            self.settings = replace(self.settings, prunes_tuning_status=True)

    def _keep_others_conditions(self) -> None:
        """KAITO's CRD does not say that conditions are a map: applying ours takes away what others have written."""
        self.settings = replace(self.settings, conditions_are_atomic=True)

    def _explain(self, key: str, observed: Observed, error: ApiError) -> None:
        """Let the status say what could not be done; the rest is for the next look."""
        self._errors[key] = say(error)
        explained = plan(replace(observed, error=self._errors[key]), self.settings, self.now())
        told = tuple(action for action in explained.actions if isinstance(action, Emit | ApplyStatus))
        try:
            version = self.api.get(WORKSPACE, *reversed(key.split("/")))["metadata"]["resourceVersion"]
            for action in told:
                if self._may_write():
                    version = self._act(key, observed.workspace, action, version)
        except (ApiError, _LookAgainError) as second:
            self.log("warning", "reconcile", workspace=key, error=f"the status cannot say so: {second}")

    # ── pages ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _health(self) -> tuple[bool, str]:
        """Whether the queue moves: a worker that hangs in a call for minutes is a reason to start anew."""
        stuck_s = time.monotonic() - self._turned_at
        moves = len(self._queue) == 0 or stuck_s < _STUCK_AFTER_S
        return moves, "ok\n" if moves else f"nothing was done for {stuck_s:.0f} s\n"

    def _readiness(self) -> tuple[bool, str]:
        """A process that waits for the lease is ready to: only the leader has something to be synced."""
        if self.options.leader_election and not self._leadership.is_ours:
            return True, "waiting for the lease\n"
        waits = [each for each in self._watches if not each.synced.is_set()]
        reasons = [f"{each.resource.plural}: {each.failure.message if each.failure else 'listing'}" for each in waits]
        return not waits, "ok\n" if not waits else "\n".join(reasons) + "\n"

    def _page(self) -> tuple[bool, str]:
        states: Counter[str] = Counter(
            str((workspace.get("status") or {}).get("state") or "Unknown") for workspace in self._workspaces.all()
        )
        gauges = Gauges()
        gauges.queue_depth.set(len(self._queue))
        gauges.is_leader.set(not self.options.leader_election or self._leadership.is_ours)
        for state, count in states.items():
            gauges.workspaces.labels(state=state).set(count)
        for each in self._watches:
            gauges.watch_age_seconds.labels(kind=each.resource.plural).set(each.age_s)
        return True, metrics_text(self.metrics, gauges)


# ── keys ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _key(namespace: str, name: str) -> str:
    return f"{namespace}/{name}"


def _workspace_of(thing: Object) -> str | None:
    return (thing["metadata"].get("labels") or {}).get(WORKSPACE_LABEL)


def _workspace_of_record(thing: Object) -> str | None:
    return (thing["metadata"].get("labels") or {}).get(NAME_LABEL)


def _config_of(workspace: Object) -> str | None:
    """The ConfigMap that holds for it: the one it names, else the default for its method."""
    tuning = workspace.get("tuning")
    if not isinstance(tuning, Mapping):
        return None
    return tuning.get("config") or DEFAULT_CONFIG_MAPS.get(str(tuning.get("method", "")).lower())


def _is_default(workspace: Object) -> bool:
    return not (workspace.get("tuning") or {}).get("config")
