"""A cluster in a dict, for the controller's decisions: what the API server, the Job controller and the garbage
collector do to the objects of one Workspace, one step at a time and in whatever order a test wants.

    cluster.store        the truth
    Controller(cluster)  has a picture of it that may be old, plans from it, and may be ended between two actions
"""

import copy
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.cluster_objects import (
    Object,
    ended,
    make_config_map,
    make_node,
    make_pod,
    make_pod_spec,
    make_workspace,
    running,
)
from tuner.cluster.reconcile import (
    Annotate,
    ApplyStatus,
    Confirm,
    Create,
    Delete,
    Emit,
    Observed,
    Plan,
    Rendered,
    Settings,
    is_end,
    owner_reference,
    plan,
)
from tuner.errors import ConfigError
from tuner.runspec import StageResult

Key = tuple[str, str]  # kind, name
WORKSPACE: Key = ("Workspace", "phi-3")
START = datetime(2026, 1, 1, tzinfo=UTC)


def render(
    workspace: Object, config_map: Object | None, revision: int, nodes: Sequence[Object] = (), *, gpus: int = 1
) -> Rendered:
    """As small as a revision's objects can be; the real ones are the templates' matter."""
    name = workspace["metadata"]["name"]
    if workspace["tuning"]["preset"]["name"] == "no-such-preset":
        raise ConfigError("tuning.preset.name: no preset is called 'no-such-preset'", hint="tuner presets lists them")
    if config_map is None and workspace["tuning"].get("config"):
        raise ConfigError("tuning.config: there is no such ConfigMap")
    text = config_map["data"]["training_config.yaml"] if config_map else "default"
    image = workspace["tuning"]["output"]["image"]
    metadata = {
        "namespace": "team",
        "labels": {"kaito.sh/workspace": name},
        "annotations": {"workspace.kaito.io/revision": str(revision), "tuner/run-digest": f"{text} {image}"},
        "ownerReferences": [owner_reference(workspace)],
    }

    def job(job_name: str) -> Object:
        return {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {**copy.deepcopy(metadata), "name": job_name},
            "spec": {"backoffLimit": 3, "template": {"spec": make_pod_spec(workspace, gpus)}},
        }

    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {**copy.deepcopy(metadata), "name": f"{name}-config-{revision}"},
        "data": {"run.json": text},
    }
    return Rendered((config,), job(name), job(f"{name}--check"))


@dataclass
class Cluster:
    """One namespace with one Workspace. `created` counts the Jobs made, by owner, name and revision."""

    store: dict[Key, Object] = field(default_factory=dict)
    created: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    deleted_by_hand: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    events: list[Object] = field(default_factory=list)
    calls: int = 0
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def put(self, thing: Object) -> Object:
        thing = copy.deepcopy(thing)
        thing["metadata"]["resourceVersion"] = str(next(self.numbers))
        thing["metadata"].setdefault("uid", f"uid-{next(self.numbers)}")
        thing["metadata"].setdefault("creationTimestamp", "2026-01-01T00:00:00Z")
        self.store[thing["kind"], thing["metadata"]["name"]] = thing
        return thing

    def change(self, key: Key, change: Callable[[Object], None]) -> None:
        """What anybody does to an object."""
        if key in self.store:
            thing = copy.deepcopy(self.store[key])
            change(thing)
            self.put(thing)

    def remove(self, key: Key) -> None:
        """An object and what it owns."""
        gone = self.store.pop(key, None)
        if gone is None:
            return
        for other in list(self.store):
            owners = self.store.get(other, {"metadata": {}})["metadata"].get("ownerReferences", ())
            if any(owner["uid"] == gone["metadata"]["uid"] for owner in owners):
                self.remove(other)

    # ── the API server ───────────────────────────────────────────────────────────────────────────────────────────────

    def do(self, action: Any, version: str) -> str | None:
        """The Workspace's version afterwards; None when no further action may follow.

        Each action is one call, so it happens or does not. Writes to the Workspace are to `version`.
        """
        self.calls += 1
        if isinstance(action, Annotate | ApplyStatus) and self._version(WORKSPACE) != version:
            return None
        match action:
            case Confirm(kind, name, wanted):
                return version if self._version((kind, name)) == wanted else None
            case Annotate(annotations):
                self.change(WORKSPACE, lambda thing: thing["metadata"]["annotations"].update(annotations))
                return self._version(WORKSPACE)
            case Create(manifest):
                return version if self._create(manifest) else None
            case Delete(kind, name, uid):
                thing = self.store.get((kind, name))
                if thing and thing["metadata"]["uid"] == uid:
                    if kind == "Job":  # in the foreground: it stays until its pods are gone
                        self.change((kind, name), lambda job: job["metadata"].update(deletionTimestamp="now"))
                    else:
                        self.remove((kind, name))
            case Emit(event):
                if event["metadata"]["name"] not in {each["metadata"]["name"] for each in self.events}:
                    self.events.append(dict(event))
            case ApplyStatus(status):
                self.change(WORKSPACE, lambda thing: thing.update(status=copy.deepcopy(dict(status))))
                return self._version(WORKSPACE)
        return version

    def _version(self, key: Key) -> str | None:
        return self.store[key]["metadata"]["resourceVersion"] if key in self.store else None

    def _create(self, manifest: Any) -> bool:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        owner = manifest["metadata"]["ownerReferences"][0]["uid"]
        if (kind, name) in self.store:
            return bool(kind != "Job")
        self.put(manifest)
        if kind == "Job":
            self.created[owner, name, manifest["metadata"]["annotations"]["workspace.kaito.io/revision"]] += 1
        if all(thing["metadata"]["uid"] != owner for thing in self.store.values()):
            self.remove((kind, name))  # the garbage collector: its owner is no more
        return True

    # ── the Job controller, a kubelet, a person ──────────────────────────────────────────────────────────────────────

    def step_job(self, name: str, outcome: str) -> None:
        """One thing that happens to a Job: `starts`, `fails` (an attempt), `succeeds`, `gives-up`, `is-gone`."""
        job = self.store.get(("Job", name))
        if job is None:
            return
        going = "deletionTimestamp" in job["metadata"]
        if going or outcome == "is-gone":
            if going:
                self.remove(("Job", name))
            return
        if _finished(job):
            return
        status = job.setdefault("status", {})
        failed = status.get("failed", 0)
        pod_name = f"{name}-{failed}"
        pod = ("Pod", pod_name)
        if outcome == "starts":
            self._put_pod(job, pod_name, {name: running()}, "Running")
        elif pod in self.store and outcome == "fails" and failed < 3:
            self._put_pod(job, pod_name, {name: ended(70, "boom")}, "Failed")
            self.change(("Job", name), lambda job: job["status"].update(failed=failed + 1))
        elif pod in self.store and outcome == "succeeds":
            result = StageResult(stage="push", values={"image": "example.com/a@sha256:1"}).to_message()
            self._put_pod(job, pod_name, {name: ended(0), "pusher": ended(0, result)}, "Succeeded")
            self.change(("Job", name), lambda job: _conclude(job, "Complete"))
        elif pod in self.store and outcome == "gives-up":
            self._put_pod(job, pod_name, {name: ended(65, "bad row")}, "Failed")
            self.change(("Job", name), lambda job: _conclude(job, "Failed"))

    def _put_pod(self, job: Object, name: str, states: Any, phase: str) -> None:
        pod = make_pod(states, name=name, job=job["metadata"]["name"], phase=phase)
        uid = job["metadata"]["uid"]
        pod["metadata"] |= {"uid": f"{uid}-{name}", "ownerReferences": [{"uid": uid, "controller": True}]}
        self.put(pod)

    def delete_job_by_hand(self, name: str) -> None:
        job = self.store.get(("Job", name))
        if job:
            owner = job["metadata"]["ownerReferences"][0]["uid"]
            self.deleted_by_hand[owner, name, job["metadata"]["annotations"]["workspace.kaito.io/revision"]] += 1
            self.remove(("Job", name))

    def expire_job(self, name: str) -> None:
        """ttlSecondsAfterFinished: longer than a controller is away, as docs/architecture.md asks for."""
        job, workspace = self.store.get(("Job", name)), self.store.get(WORKSPACE)
        if not job or not workspace or not _finished(job):
            return
        recorded = (workspace.get("status") or {}).get("tuning", {}).get("revision")
        if str(recorded) == job["metadata"]["annotations"]["workspace.kaito.io/revision"]:
            state = workspace["status"]["state"]
            if state in ("Succeeded", "Failed") or (name.endswith("--check") and ("Job", "phi-3") in self.store):
                self.remove(("Job", name))

    def lose_recorded_jobs(self) -> None:
        """Those whose end a ControllerRevision remembers."""
        ended = [it["metadata"]["annotations"]["workspace.kaito.io/revision"] for it in self.ends()]
        for key, job in list(self.store.items()):
            if key[0] == "Job" and job["metadata"]["annotations"]["workspace.kaito.io/revision"] in ended:
                self.remove(key)

    def ends(self) -> list[Object]:
        """The records of how revisions ended."""
        return [it for (kind, _), it in self.store.items() if kind == "ControllerRevision" and is_end(it)]

    def edit_workspace(self, change: Callable[[Object], None]) -> None:
        def edit(workspace: Object) -> None:
            change(workspace)
            workspace["metadata"]["generation"] += 1

        self.change(WORKSPACE, edit)


def _finished(job: Object) -> bool:
    return bool(job.get("status", {}).get("conditions"))


def _conclude(job: Object, kind: str) -> None:
    job.setdefault("status", {})["conditions"] = [{"type": kind, "status": "True", "reason": "", "message": ""}]


@dataclass
class Controller:
    """One process of the controller: a picture of the cluster, and what it does about it."""

    cluster: Cluster
    settings: Settings = field(default_factory=lambda: Settings(render))
    picture: dict[Key, Object] = field(default_factory=dict)
    now: datetime = START

    def look(self, *keys: Key) -> None:
        """Hear of these objects as they are now; of all without keys, as after a list."""
        if not keys:
            self.picture = copy.deepcopy(self.cluster.store)
        for key in keys:
            if key in self.cluster.store:
                self.picture[key] = copy.deepcopy(self.cluster.store[key])
            else:
                self.picture.pop(key, None)

    def observed(self) -> Observed | None:
        workspace = self.picture.get(WORKSPACE)
        if workspace is None:
            return None
        config = workspace.get("tuning", {}).get("config") or "qlora-params-template"
        return Observed(
            workspace=workspace,
            config_map=self.picture.get(("ConfigMap", config)),
            job=self.picture.get(("Job", "phi-3")),
            check_job=self.picture.get(("Job", "phi-3--check")),
            push_job=self.picture.get(("Job", "phi-3--push")),
            pods=[thing for (kind, _), thing in self.picture.items() if kind == "Pod"],
            records=[thing for (kind, _), thing in self.picture.items() if kind == "ControllerRevision"],
            nodes=[thing for (kind, _), thing in self.picture.items() if kind == "Node"],
        )

    def reconcile(self, *, dies_after: int | None = None, before_each: Callable[[], None] | None = None) -> Plan | None:
        """Plan from the picture and do it; `dies_after` so many actions the process ends."""
        observed = self.observed()
        if observed is None:
            return None
        self.now += timedelta(seconds=20)
        planned = plan(observed, self.settings, self.now)
        if planned.wants_pods:
            pods = [copy.deepcopy(thing) for (kind, _), thing in self.cluster.store.items() if kind == "Pod"]
            planned = plan(replace(observed, pods=pods, pods_are_fresh=True), self.settings, self.now)
        version: str = observed.workspace["metadata"]["resourceVersion"]
        for index, action in enumerate(planned.actions):
            if dies_after is not None and index >= dies_after:
                break
            if before_each:
                before_each()
            after = self.cluster.do(action, version)
            if after is None:
                break
            version = after
        return planned

    def settle(self, rounds: int = 30) -> Plan:
        """Look and reconcile until there is nothing to do."""
        for _ in range(rounds):
            self.look()
            planned = self.reconcile()
            assert planned is not None
            if not planned.actions:
                return planned
        raise AssertionError(f"not settled after {rounds} rounds: {planned.actions}")


def make_cluster(*, config: str | None = None, instance_type: str | None = None, node: bool = True) -> Cluster:
    cluster = Cluster()
    cluster.put(make_workspace(config=config, instance_type=instance_type))
    if config:
        cluster.put(make_config_map(config))
    if node:
        labels = {"apps": "phi-3"} | ({"node.kubernetes.io/instance-type": instance_type} if instance_type else {})
        cluster.put({"kind": "Node", **make_node(labels=labels)})
    return cluster
