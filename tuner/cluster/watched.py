"""One kind of object, as it is in the cluster: listed, watched, listed again when the watch has been lost.

    list ──► watch from that version, with bookmarks ──► it ends after 300 s: watch on from the last version
      ▲                                                    │
      └──── 410 Gone, or 10 minutes are over ◄─────────────┘     errors: again, later each time

Only what the controller reads is kept of each object: a thousand Jobs are a few megabytes then.
"""

import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from tuner.cluster.api import ALL_NAMESPACES, MAX_LEVELS, Api, Resource
from tuner.cluster.api_errors import ApiError, GoneError
from tuner.cluster.job_options import GPU
from tuner.cluster.reconcile import is_end
from tuner.retry import Backoff, chance

Object = Mapping[str, Any]
Name = tuple[str, str]  # namespace, name

WATCH_S, RELIST_S = 300, 600.0
_BACKOFF = Backoff(0.5, 30.0, jitter=0.5)
_PAGE = 100  # whole objects in memory at a time


class Watched:
    """The objects of one kind. `heard(before, after)` is called for each that has changed, from the watch's thread.

    `trim` keeps what is needed of an object, or None where it is of no use; a change in nothing that is kept is none.
    `owner_of` names the Workspace that an object belongs to, for `of`.
    """

    def __init__(
        self,
        api: Api,
        resource: Resource,
        namespace: str,
        *,
        heard: Callable[[Object | None, Object | None], None],
        trim: Callable[[dict[str, Any]], Object | None],
        owner_of: Callable[[Object], str | None] = lambda _: None,
        label_selector: str = "",
        field_selector: str = "",
        log: Callable[..., None] = lambda *_, **__: None,
        watch_s: int = WATCH_S,
        relist_s: float = RELIST_S,
    ) -> None:
        self._api, self.resource, self._namespace = api, resource, namespace
        self._heard, self._trim, self._owner_of, self._log = heard, trim, owner_of, log
        self._selectors: dict[str, str] = {"label_selector": label_selector, "field_selector": field_selector}
        self._watch_s, self._relist_s = watch_s, relist_s
        self._lock = threading.Lock()
        self._objects: dict[Name, Object] = {}
        self._by_owner: dict[Name, set[Name]] = {}
        self._stop = threading.Event()
        self._last_heard = time.monotonic()
        self.synced = threading.Event()
        self.failure: ApiError | None = None  # why it is not synced

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def get(self, namespace: str, name: str) -> Object | None:
        with self._lock:
            return self._objects.get((namespace, name))

    def all(self) -> list[Object]:
        with self._lock:
            return list(self._objects.values())

    def of(self, namespace: str, owner: str) -> list[Object]:
        """Those that belong to this Workspace."""
        with self._lock:
            return [self._objects[name] for name in self._by_owner.get((namespace, owner), ())]

    @property
    def age_s(self) -> float:
        """Since when nothing was heard, not even that the watch still stands."""
        return time.monotonic() - self._last_heard

    # ── the thread ───────────────────────────────────────────────────────────────────────────────────────────────────

    def start(self) -> None:
        threading.Thread(target=self._run, name=f"watch {self.resource.plural}", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        failures = 0
        version: str | None = None
        listed_at = 0.0
        while not self._stop.is_set():
            began = time.monotonic()
            try:
                if version is None or began - listed_at >= self._relist_s:
                    version, listed_at = self._list(), began
                    self.failure = None
                    self.synced.set()
                version = self._watch(version)
                failures = 0
                if time.monotonic() - began < _BACKOFF.initial_s:  # what hangs up at once must not be asked in a loop
                    self._stop.wait(_BACKOFF.wait_s(1))
            except GoneError:
                version = None
                self._stop.wait(_BACKOFF.wait_s(1))
            except ApiError as error:
                if self._stop.is_set():
                    return
                self.failure = error
                # A watch that stood for a while and broke is no reason to wait long.
                failures = 1 if time.monotonic() - began > _BACKOFF.ceiling_s else failures + 1
                wait_s = max(_BACKOFF.wait_s(failures), error.retry_after_s or 0.0)
                self._log(
                    "warning", "watch", kind=self.resource.plural, error=error.message, again_in_s=round(wait_s, 1)
                )
                self._stop.wait(wait_s)
            except Exception as error:  # a bug of ours, or an object that is none: the other watches go on
                self._log("error", "watch", kind=self.resource.plural, error=f"{type(error).__name__}: {error}")
                version = None
                self._stop.wait(_BACKOFF.ceiling_s)

    def _list(self) -> str:
        there: set[Name] = set()
        version = ""
        for page in self._api.pages(self.resource, self._namespace, **self._selectors, limit=_PAGE):
            self._last_heard = time.monotonic()
            for thing in page.items:
                there.add(_name(thing))
                self._put(thing)
            version = page.resource_version
        for name in self._objects.keys() - there:
            self._drop(name)
        return version

    def _watch(self, version: str) -> str:
        """Hear of changes until the watch ends by itself; the version to go on from."""
        # By chance longer: else all controllers' watches, begun together, end together.
        timeout_s = round(self._watch_s * (1 + 0.2 * chance())) or 1
        for event in self._api.watch(self.resource, version, self._namespace, timeout_s=timeout_s, **self._selectors):
            self._last_heard = time.monotonic()
            version = event.resource_version
            if event.kind == "DELETED":
                self._drop(_name(event.object))
            elif event.kind != "BOOKMARK":
                self._put(event.object)
            if self._stop.is_set():
                break
        self._last_heard = time.monotonic()
        return version

    def _put(self, thing: dict[str, Any]) -> None:
        kept = self._trim(thing)
        if kept is None:
            self._drop(_name(thing))
            return
        name = _name(kept)
        with self._lock:
            before = self._objects.get(name)
            self._objects[name] = kept
            if before is None and (owner := self._owner_of(kept)):
                self._by_owner.setdefault((name[0], owner), set()).add(name)
        if before != kept:
            self._heard(before, kept)

    def _drop(self, name: Name) -> None:
        with self._lock:
            before = self._objects.pop(name, None)
            if before and (owner := self._owner_of(before)):
                belonging = self._by_owner.get((name[0], owner), set())
                belonging.discard(name)
                if not belonging:
                    self._by_owner.pop((name[0], owner), None)
        if before:
            self._heard(before, None)


class WatchedNamespaces:
    """One kind of object in several namespaces, or in all: a part for each, read as one."""

    def __init__(self, parts: Mapping[str, Watched]) -> None:
        self.parts = dict(parts)

    def _part(self, namespace: str) -> Watched | None:
        return self.parts.get(namespace) or self.parts.get(ALL_NAMESPACES)

    def get(self, namespace: str, name: str) -> Object | None:
        part = self._part(namespace)
        return part.get(namespace, name) if part else None

    def of(self, namespace: str, owner: str) -> list[Object]:
        part = self._part(namespace)
        return part.of(namespace, owner) if part else []

    def all(self) -> list[Object]:
        return [thing for part in self.parts.values() for thing in part.all()]


def _name(thing: Object) -> Name:
    metadata = thing["metadata"]
    return metadata.get("namespace", ""), metadata["name"]


# ── what is kept of each kind ────────────────────────────────────────────────────────────────────────────────────────

_METADATA = (
    "name", "namespace", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp", "labels",
    "annotations", "ownerReferences",
)  # fmt: skip
_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"


def _only(thing: Object, keys: Iterable[str]) -> dict[str, Any]:
    return {sys.intern(key): thing[key] for key in keys if key in thing}


def _metadata(thing: Object, *, without_version: bool = False) -> dict[str, Any]:
    kept = _only(thing["metadata"], _METADATA)
    if annotations := kept.get("annotations"):
        kept["annotations"] = {key: value for key, value in annotations.items() if key != _APPLIED}
    if without_version:
        del kept["resourceVersion"]
    return kept


def trim_workspace(thing: Object) -> Object:
    sections = _only(thing, ("apiVersion", "kind", "resource", "inference", "tuning", "status"))
    return {**{key: _shallow(value) for key, value in sections.items()}, "metadata": _metadata(thing)}


def _shallow(value: Any, levels: int = MAX_LEVELS) -> Any:
    """With None below so many levels: what is compared and written as JSON must not be too deep for Python."""
    if isinstance(value, dict):
        return {key: _shallow(each, levels - 1) for key, each in value.items()} if levels else None
    if isinstance(value, list):
        return [_shallow(each, levels - 1) for each in value] if levels else None
    return value


def trim_job(thing: Object) -> Object:
    status = _only(thing.get("status") or {}, ("conditions", "active", "ready", "failed", "succeeded"))
    whole = thing["spec"]["template"]["spec"]
    volumes = whole.get("volumes") or ()
    # What it mounts, and what decides where its pod may go.
    pod = _only(whole, ("nodeSelector", "affinity", "tolerations"))
    pod["volumes"] = [
        _only(each, ("configMap", "secret")) for each in volumes if "configMap" in each or "secret" in each
    ]
    pod["containers"] = [_only(each, ("resources",)) for each in whole["containers"]]
    return {
        "kind": "Job",
        "metadata": _metadata(thing, without_version=True),
        "spec": {**_only(thing["spec"], ("backoffLimit", "suspend")), "template": {"spec": pod}},
        "status": status,
    }


def trim_pod(thing: Object) -> Object:
    status = _only(thing.get("status") or {}, ("phase", "reason", "message", "conditions"))
    for key in ("initContainerStatuses", "containerStatuses"):
        written = (thing.get("status") or {}).get(key) or ()
        status[key] = [_only(each, ("name", "image", "state")) for each in written]
    spec: dict[str, Any] = {"containers": [{"name": each["name"]} for each in thing["spec"]["containers"]]}
    spec |= _only(thing["spec"], ("nodeName",))
    return {"kind": "Pod", "metadata": _metadata(thing, without_version=True), "spec": spec, "status": status}


def trim_node(thing: Object) -> Object:
    """Without what changes with every heartbeat."""
    status = thing.get("status") or {}
    ready = [_only(each, ("type", "status")) for each in status.get("conditions") or () if each["type"] == "Ready"]
    gpus = _only(status.get("allocatable") or {}, (GPU,))
    return {
        "metadata": _only(thing["metadata"], ("name", "labels")),
        "spec": _only(thing.get("spec") or {}, ("unschedulable", "taints")),
        "status": {"conditions": ready, "allocatable": gpus},
    }


def trim_record(thing: Object) -> Object:
    """How a revision ended, whole; of what it is only its number and hash."""
    return {"metadata": _metadata(thing), **(_only(thing, ("data",)) if is_end(thing) else {})}


def trim_config_map(key: str) -> Callable[[Object], Object | None]:
    """Only those with this key, and of those only this key."""

    def trim(thing: Object) -> Object | None:
        data = thing.get("data") or {}
        if key not in data:
            return None
        metadata = _only(thing["metadata"], ("name", "namespace", "resourceVersion"))
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {key: data[key]}}

    return trim
