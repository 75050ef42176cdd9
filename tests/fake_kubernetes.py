"""A Kubernetes API server in this process: real HTTP on loopback, for the real client.

    with FakeKubernetes() as cluster:
        api = Api.from_config(env={"KUBECONFIG": str(cluster.write_kubeconfig(tmp_path / "kubeconfig"))})
        api.create(job)                                   # with job_controller=True its pod appears, Pending
        cluster.schedule("tune-phi3")
        cluster.start("tune-phi3", "preflight")
        cluster.finish("tune-phi3", "preflight")          # exit code 0; the next init container starts
        cluster.finish("tune-phi3", "tune-phi3", 78, {"stage": "train", "exit_code": 78, …})   # and the Job fails

It is strict where a real one is: unknown fields (fieldValidation=Strict), names, immutable fields, resourceVersion,
status as a subresource, RBAC with the real wording, secrets unreadable unless granted, 410 for versions that are gone,
an owner's deletion takes what it owns, a foreground deletion takes time. `fail`, `cut_watches`, `expire` make trouble.

Objects are moved by the test: `put`, `patch`, `schedule`, `start`, `finish`, `evict`, `log`, `run_job`. The only
controllers inside are the garbage collector and, unless `job_controller=False`, a Job controller without back-off.
"""

import base64
import bisect
import contextlib
import heapq
import itertools
import json
import re
import socket
import ssl
import struct
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

from tests import kubernetes_defaults as defaults
from tests import kubernetes_patches as patches
from tests import kubernetes_rules as rules

Object = dict[str, Any]
Key = tuple[str, str]  # namespace, name
USER = "system:serviceaccount:default:tuner"


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


class Refusal(Exception):
    """An answer other than success, as a Status."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.headers = code, dict(headers or {})
        self.status: Object = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            **({"reason": reason} if reason else {}),
            **({"details": dict(details)} if details is not None else {}),
            "code": code,
        }


class _Cut(Exception):
    """A stream that breaks off in the middle."""


@dataclass
class Fault:
    """What the next `times` requests that match get instead of an answer, or (`after`) instead of hearing it."""

    method: str
    path: re.Pattern[str]
    status: int
    times: int
    reason: str
    message: str
    retry_after_s: int | None
    reset: bool
    after: bool
    delay_s: float


@dataclass(frozen=True)
class Change:
    """One entry of a kind's history. `before` is what a label selector may have matched."""

    version: int
    type: str
    object: Object
    before: Object | None


@dataclass
class Stored:
    """`data_text`: a ControllerRevision's data, which the server keeps as they were sent."""

    object: Object
    owners: patches.Owners = field(default_factory=dict)
    data_text: str = ""


@dataclass
class Kind:
    """One kind: its objects, and what happened to them in this order."""

    group: str
    versions: tuple[str, ...]
    plural: str
    kind: str
    namespaced: bool = True
    has_status: bool = False
    custom: bool = False
    schemas: dict[str, Object] = field(default_factory=dict)
    objects: dict[Key, Stored] = field(default_factory=dict)
    history: list[Change] = field(default_factory=list)
    oldest: int = 0  # a watch from before this version gets 410
    changed: threading.Condition = field(default_factory=threading.Condition)

    @property
    def counts_generations(self) -> bool:
        return self.custom or (self.has_status and (self.group != "" or self.kind == "Pod"))

    @property
    def full_name(self) -> str:
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def api_version(self, version: str | None = None) -> str:
        version = version or self.versions[0]
        return f"{self.group}/{version}" if self.group else version

    @property
    def details(self) -> Object:
        return {"group": self.group, "kind": self.plural} if self.group else {"kind": self.plural}


def _builtin_kinds() -> Iterator[Kind]:
    for line in """
        / v1 pods Pod ns status
        / v1 configmaps ConfigMap ns
        / v1 secrets Secret ns
        / v1 events Event ns
        / v1 services Service ns status
        / v1 serviceaccounts ServiceAccount ns
        / v1 persistentvolumeclaims PersistentVolumeClaim ns status
        / v1 resourcequotas ResourceQuota ns status
        / v1 nodes Node - status
        / v1 namespaces Namespace - status
        batch v1 jobs Job ns status
        apps v1 deployments Deployment ns status
        apps v1 controllerrevisions ControllerRevision ns
        coordination.k8s.io v1 leases Lease ns
        policy v1 poddisruptionbudgets PodDisruptionBudget ns status
        networking.k8s.io v1 networkpolicies NetworkPolicy ns
        rbac.authorization.k8s.io v1 roles Role ns
        rbac.authorization.k8s.io v1 rolebindings RoleBinding ns
        rbac.authorization.k8s.io v1 clusterroles ClusterRole -
        rbac.authorization.k8s.io v1 clusterrolebindings ClusterRoleBinding -
        apiextensions.k8s.io v1 customresourcedefinitions CustomResourceDefinition - status
        admissionregistration.k8s.io v1 validatingwebhookconfigurations ValidatingWebhookConfiguration -
        scheduling.k8s.io v1 priorityclasses PriorityClass -
    """.strip().splitlines():
        group, version, plural, kind, scope, *status = line.split()
        yield Kind(group.strip("/"), (version,), plural, kind, scope == "ns", bool(status))


@dataclass(frozen=True)
class Request:
    verb: str  # get, list, watch, create, update, patch, delete
    method: str
    path: str
    kind: Kind
    version: str
    namespace: str
    name: str
    subresource: str
    query: Mapping[str, str]
    body: Any = None
    content_type: str = ""
    text: str = ""  # the body as it was sent
    warnings: list[str] = field(default_factory=list)  # to be sent with the answer
    flags: set[str] = field(default_factory=set)

    @property
    def group(self) -> str:
        """As it was asked for: Events have two, with rights of their own."""
        return "events.k8s.io" if "/apis/events.k8s.io/" in self.path else self.kind.group

    @property
    def is_dry_run(self) -> bool:
        return bool(self.query.get("dryRun"))


# ── the server ───────────────────────────────────────────────────────────────────────────────────────────────────────


class FakeKubernetes:
    """`url` is its address, `token` the only one it takes. Every public method may be called from any thread."""

    def __init__(
        self,
        *,
        version: tuple[int, int] = (1, 36),
        namespaces: Iterable[str] = ("default", "kube-system"),
        workspaces: bool = True,
        job_controller: bool = True,
        termination_s: float = 0.05,
        foreground_s: float = 0.05,
        bookmark_s: float = 60.0,
        kueue: bool = False,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.version, self.token = version, "a-token"
        self.job_controller, self.kueue = job_controller, kueue
        self.termination_s, self.foreground_s, self.bookmark_s = termination_s, foreground_s, bookmark_s
        self.watch_lag_s = 0.0
        self.exit_codes_at_sigterm: dict[str, int] = {}  # container → exit code; 143 else
        self.refuse_pods: dict[str, str] = {}  # namespace → why the Job controller may make no pod there
        self.admission: list[Callable[[Object, Object | None], str | None]] = []  # new, old → why not
        self.evaluates_rules = False  # a CRD's x-kubernetes-validations: as a server does it, and slow
        self.warnings: list[str] = []  # sent with every write
        self.calls: Counter[tuple[str, str]] = Counter()  # (verb, resource) → how often
        self.requests: deque[tuple[str, str]] = deque(maxlen=5000)  # (method, path and query)
        self.rules: list[tuple[Mapping[str, Any], str | None]] | None = None
        self._secrets_readable: set[str] = set()
        self._denied: list[tuple[str, str, str | None]] = []
        self._lock = threading.RLock()
        self._kinds: dict[tuple[str, str], Kind] = {}
        self._versions = itertools.count(1)
        self._now_version = 0
        self._uids = itertools.count(1)
        self._living: dict[str, tuple[Kind, Key]] = {}  # uid → where it is
        self._owned: dict[str, set[tuple[str, str, str, str]]] = {}  # owner's uid → group, plural, namespace, name
        self._counted: set[str] = set()  # uids of ended pods that their Job has counted
        self._jobs_to_look_at: deque[Key] = deque()
        self._orphans_to_look_at: deque[tuple[Kind, Key]] = deque()
        self._settling = False
        self._logs: dict[tuple[str, str, str], list[tuple[str, bytes]]] = {}  # time stamp, line
        self._said: dict[tuple[str, str], str] = {}  # the last words of a pod's sidecar: its uid, its name
        self._log_written = threading.Condition(self._lock)
        self._faults: list[Fault] = []
        self._watch_generation = 0
        self._streams: set[socket.socket] = set()
        self._connections: set[socket.socket] = set()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_added = threading.Condition(self._lock)
        self._timer_ids = itertools.count()
        self._closing = False
        for kind in _builtin_kinds():
            self._serve(kind)
        if workspaces:
            self._serve(Kind("kaito.sh", ("v1beta1", "v1alpha1"), "workspaces", "Workspace", True, True, custom=True))
        for name in namespaces:
            self.put({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        server = type("Server", (ThreadingHTTPServer,), {"daemon_threads": True, "request_queue_size": 128})
        self._server = server(("127.0.0.1", 0), _handler(self))
        if tls:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self._server.server_address[1]}"
        self._threads = [
            threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True),
            threading.Thread(target=self._run_timers, daemon=True),
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._lock:
            self._closing = True
            self._timer_added.notify_all()
            self._log_written.notify_all()
            for one in self._kinds.values():
                one.changed.notify_all()
            connections = list(self._connections)
        self._server.shutdown()
        for connection in connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._server.server_close()
        for thread in self._threads:
            thread.join()

    def write_kubeconfig(self, path: Path, *, namespace: str | None = None, ca: Path | None = None) -> Path:
        """A kubeconfig for it, with the contexts `fake` (current) and `other` (namespace `other`)."""
        cluster: Object = {"server": self.url}
        if ca:
            cluster["certificate-authority"] = str(ca)
        context = {"cluster": "fake", "user": "me", **({"namespace": namespace} if namespace else {})}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": cluster}],
            "users": [{"name": "me", "user": {"token": self.token}}],
            "contexts": [
                {"name": "fake", "context": context},
                {"name": "other", "context": {**context, "namespace": "other"}},
            ],
        }
        path.write_text(json.dumps(config), encoding="utf-8")
        return path

    # ── trouble ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def fail(
        self,
        method: str = "",
        path: str = "",
        *,
        status: int = 500,
        times: int = 1,
        reason: str = "InternalError",
        message: str = "an injected fault",
        retry_after_s: int | None = None,
        reset: bool = False,
        after: bool = False,
        delay_s: float = 0.0,
    ) -> None:
        """The next `times` requests whose method and path match fail. `path` is a regular expression, searched for.

        `reset`: the connection is reset, without an answer. `after`: the request is carried out all the same.
        `delay_s` alone (status=0): they are only slow.
        """
        with self._lock:
            self._faults.append(
                Fault(method, re.compile(path), status, times, reason, message, retry_after_s, reset, after, delay_s)
            )

    def cut_watches(self) -> None:
        """Break every watch and followed log off now, in the middle; they may come again."""
        with self._lock:
            self._watch_generation += 1
            self._log_written.notify_all()
            for kind in self._kinds.values():
                kind.changed.notify_all()

    def expire(self, plural: str = "") -> None:
        """Forget the history (of one kind): a watch from an earlier version gets 410."""
        with self._lock:
            for kind in self._kinds.values():
                if plural in ("", kind.plural):
                    kind.history.clear()
                    kind.oldest = self._now_version

    def deny(self, verb: str, resource: str, namespace: str | None = None) -> None:
        """403 for `verb` ("*" for all) on `resource` (`jobs`, `pods/log`), as RBAC says it."""
        with self._lock:
            self._denied.append((verb, resource, namespace))

    def allow_secrets(self, *verbs: str) -> None:
        """Secrets may be read: get, list and watch are denied else."""
        with self._lock:
            self._secrets_readable.update(verbs or ("get", "list", "watch"))

    def allow_only(self, rules: Iterable[Mapping[str, Any]], namespace: str | None = None) -> None:
        """From now on only what these RBAC rules (and those of earlier calls) allow; in `namespace` as a Role does."""
        with self._lock:
            self.rules = [*(self.rules or ()), *((rule, namespace) for rule in rules)]

    # ── objects, past HTTP ───────────────────────────────────────────────────────────────────────────────────────────

    def put(self, manifest: Mapping[str, Any]) -> Object:
        """Create or replace an object as a whole, its status too; nothing is checked."""
        with self._lock:
            kind, key = self._place(manifest)
            stored = kind.objects.get(key)
            new = patches.copied(manifest)
            new.setdefault("metadata", {})
            if kind.namespaced:
                new["metadata"].setdefault("namespace", key[0])
            if stored is None:
                self._defaults(kind, new)
                self._insert(kind, key, new, {})
            else:
                new["metadata"] = {**stored.object["metadata"], **new["metadata"]}
                self._update(kind, key, new, stored.owners)
            self._settle()
            return patches.copied(kind.objects[key].object) if key in kind.objects else new

    def patch(self, plural: str, name: str, patch: Mapping[str, Any], namespace: str = "default") -> Object:
        """Merge `patch` into an object, its status too."""
        with self._lock:
            kind = self._kind(plural)
            key = (namespace if kind.namespaced else "", name)
            stored = kind.objects[key]
            self._update(kind, key, patches.merged(patches.copied(stored.object), patches.copied(patch)), stored.owners)
            self._settle()
            return patches.copied(kind.objects[key].object)

    def object(self, plural: str, name: str, namespace: str = "default") -> Object | None:
        """A copy of it, or None."""
        with self._lock:
            kind = self._kind(plural)
            stored = kind.objects.get((namespace if kind.namespaced else "", name))
            return patches.copied(stored.object) if stored else None

    def objects(self, plural: str, namespace: str | None = None) -> "tuple[Object, ...]":
        """Copies of all, in the order of their names."""
        with self._lock:
            kind = self._kind(plural)
            found = sorted(kind.objects.items())
            return tuple(patches.copied(stored.object) for key, stored in found if namespace in (None, key[0]))

    def remove(self, plural: str, name: str, namespace: str = "default", *, grace_s: int | None = 0) -> None:
        """Delete it, as `kubectl delete` by somebody else; a pod at once unless `grace_s` is None."""
        with self._lock:
            kind = self._kind(plural)
            self._delete(kind, (namespace if kind.namespaced else "", name), "Background", grace_s)
            self._settle()

    # ── Jobs and pods, moved by the test ─────────────────────────────────────────────────────────────────────────────

    def pod_of(self, job: str, namespace: str = "default") -> Object:
        """The newest pod of a Job, else of that name."""
        with self._lock:
            return patches.copied(self._pod_of(job, namespace))

    def schedule(self, job: str, namespace: str = "default", *, node: str = "gpu-0") -> None:
        """Its pod has a node; nothing runs yet."""
        with self._pod(job, namespace) as pod:
            pod["spec"]["nodeName"] = node
            _set_condition(pod["status"], "PodScheduled", "True", "", "")
            pod["status"].setdefault("startTime", _now())

    def unschedulable(
        self,
        job: str,
        message: str = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu. preemption: 0/1 nodes are available: "
        "1 No preemption victims found for incoming pod.",
        namespace: str = "default",
    ) -> None:
        with self._pod(job, namespace) as pod:
            _set_condition(pod["status"], "PodScheduled", "False", "Unschedulable", message)

    def hold(self, job: str, container: str, reason: str, message: str = "", namespace: str = "default") -> None:
        """The container waits with a reason: ImagePullBackOff, CreateContainerConfigError, …"""
        with self._pod(job, namespace) as pod:
            _container_status(pod, container)["state"] = {"waiting": {"reason": reason, "message": message}}

    def start(self, job: str, container: str, namespace: str = "default") -> None:
        """The container runs (and the pod is scheduled, if it was not)."""
        if not self.pod_of(job, namespace)["spec"].get("nodeName"):
            self.schedule(job, namespace)
        with self._pod(job, namespace) as pod:
            _run(pod, container)

    def finish(
        self,
        job: str,
        container: str,
        exit_code: int = 0,
        message: str | Mapping[str, Any] = "",
        namespace: str = "default",
        *,
        reason: str = "",
    ) -> None:
        """The container ends with this termination message; the next init container or the main ones start.

        When the last of the main containers has ended, or an init container failed, so does the pod, and its Job acts.
        """
        if not self.pod_of(job, namespace)["spec"].get("nodeName"):
            self.schedule(job, namespace)
        text = message if isinstance(message, str) else json.dumps(message)
        with self._pod(job, namespace) as pod:
            assert container not in _sidecars(pod), "the kubelet starts it again: see say"
            _end(pod, container, exit_code, text, reason or ("Completed" if exit_code == 0 else "Error"))
            _go_on(pod, self._said)

    def say(self, job: str, sidecar: str, message: str | Mapping[str, Any], namespace: str = "default") -> None:
        """With what a sidecar ends, once the pod does: exit code 0 and this message."""
        text = message if isinstance(message, str) else json.dumps(message)
        self._said[self.pod_of(job, namespace)["metadata"]["uid"], sidecar] = text

    def evict(self, job: str, namespace: str = "default", *, reason: str = "EvictionByEvictionAPI") -> None:
        """Its pod is evicted: DisruptionTarget, the containers end by SIGTERM, the pod goes."""
        with self._pod(job, namespace) as pod:
            _set_condition(pod["status"], "DisruptionTarget", "True", reason, "Eviction API: evicting")
        with self._lock:
            pod = self._pod_of(job, namespace)
            self._delete(self._kind("pods"), _key(pod), "Background", None)
            self._settle()

    def log(self, job: str, container: str, *lines: str, namespace: str = "default") -> None:
        """Lines on a container's output; who follows it gets them at once."""
        with self._lock:
            name = self._pod_of(job, namespace)["metadata"]["name"]
            written = self._logs.setdefault((namespace, name, container), [])
            written.extend((_precise_now(), line.encode() + b"\n") for line in lines)
            self._log_written.notify_all()

    def run_job(
        self,
        job: str,
        results: Mapping[str, tuple[int, str | Mapping[str, Any]]] | None = None,
        namespace: str = "default",
    ) -> None:
        """Its pod runs through all containers in order; `results`: container → exit code and message, 0 and "" else.

        What a sidecar fails with is what the main container ends with, too.
        """
        pod = self.pod_of(job, namespace)
        uid = pod["metadata"]["uid"]
        results = dict(results or {})
        for name in _sidecars(pod):
            self.say(job, name, results.get(name, (0, ""))[1], namespace)
            if name in results and results[name][0]:
                results.setdefault(pod["spec"]["containers"][0]["name"], results[name])
        for container in (*pod["spec"].get("initContainers", ()), *pod["spec"]["containers"]):
            if container["name"] in _sidecars(pod):
                continue
            code, message = results.get(container["name"], (0, ""))
            self.finish(job, container["name"], code, message, namespace)
            if code and container in pod["spec"].get("initContainers", ()):
                return
            with self._lock:
                if uid not in self._living:
                    return

    def finish_job(
        self, job: str, namespace: str = "default", *, failed: str = "", message: str = "", exit_code: int = 1
    ) -> None:
        """Only the Job's own end, whatever its pods do: Complete, or Failed with the reason `failed`."""
        with self._lock:
            kind = self._kind("jobs")
            stored = kind.objects[(namespace, job)]
            new = patches.copied(stored.object)
            _end_job(new, failed, message)
            self._update(kind, (namespace, job), new, stored.owners)
            self._settle()

    def add_event(
        self,
        about: Mapping[str, Any],
        reason: str,
        message: str,
        *,
        type: str = "Warning",  # noqa: A002
        count: int = 1,
    ) -> None:
        """An Event as a kubelet or a controller writes it."""
        metadata = about["metadata"]
        with self._lock:
            name = f"{metadata['name']}.{next(self._uids):x}"
        self.put(
            {
                "apiVersion": "v1",
                "kind": "Event",
                "metadata": {"name": name, "namespace": metadata.get("namespace", "default")},
                "involvedObject": {
                    "kind": about["kind"],
                    "apiVersion": about["apiVersion"],
                    "name": metadata["name"],
                    "namespace": metadata.get("namespace", ""),
                    "uid": metadata.get("uid", ""),
                },
                "reason": reason,
                "message": message,
                "type": type,
                "count": count,
                "firstTimestamp": _now(),
                "lastTimestamp": _now(),
                "source": {"component": "test"},
            }
        )

    def add_node(
        self,
        name: str,
        labels: Mapping[str, str] | None = None,
        *,
        gpus: int = 0,
        ready: bool = True,
        taints: Iterable[Mapping[str, str]] = (),
        unschedulable: bool = False,
    ) -> None:
        resources = {"cpu": "16", "memory": "64Gi", "pods": "110"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
        self.put(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, **(labels or {})}},
                "spec": {"taints": [dict(taint) for taint in taints], "unschedulable": unschedulable},
                "status": {
                    "capacity": resources,
                    "allocatable": resources,
                    "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
                },
            }
        )

    # ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def answer(self, request: Request) -> Object:
        """The body for everything but a watch and a log; raises Refusal."""
        with self._lock:
            match request.verb:
                case "get":
                    return self._shown(request, self._stored(request).object)
                case "list":
                    return self._listed(request)
                case "create":
                    return self._created(request)
                case "update" | "patch":
                    return self._changed(request)
                case "delete" if request.name:
                    return self._deleted(request)
            raise Refusal(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")

    def authorize(self, request: Request) -> None:
        """Raises 403 as the RBAC authorizer does."""
        plural = f"{request.kind.plural}/{request.subresource}" if request.subresource else request.kind.plural
        with self._lock:
            # A list of one name asks about that name, as the server's request info has it.
            one = re.fullmatch(r"metadata\.name==?([^,=!]+)", request.query.get("fieldSelector", ""))
            name = one[1] if one and not request.name else request.name
            if self.may(request.verb, request.group, plural, request.namespace, name):
                return
        where = f' in the namespace "{request.namespace}"' if request.namespace else " at the cluster scope"
        named = f' "{request.name}"' if request.name else ""
        details = request.kind.details
        if request.group == "events.k8s.io":
            details = {"group": request.group, "kind": "events"}
        resource = f"{details['kind']}.{details['group']}" if "group" in details else details["kind"]
        raise Refusal(
            403,
            "Forbidden",
            f'{resource}{named} is forbidden: User "{USER}" cannot {request.verb} resource "{plural}" '
            f'in API group "{request.group}"{where}',
            {**details, **({"name": request.name} if request.name else {})},
        )

    def may(self, verb: str, group: str, plural: str, namespace: str, name: str = "") -> bool:
        """What RBAC says."""
        with self._lock:
            for denied_verb, resource, where in self._denied:
                if denied_verb in (verb, "*") and resource == plural and where in (None, namespace):
                    return False
            if self.rules is None:
                return plural != "secrets" or verb not in ("get", "list", "watch") or verb in self._secrets_readable
            return any(
                where in (None, namespace) and _rule_allows(rule, verb, group, plural, name)
                for rule, where in self.rules
            )

    def fault_for(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self._faults:
                if fault.method in ("", method) and fault.path.search(path):
                    fault.times -= 1
                    if fault.times <= 0:
                        self._faults.remove(fault)
                    return fault
        return None

    def parse(self, method: str, path: str, query: Mapping[str, str]) -> Request | Object:
        """The request that a URL means, or the discovery document there; raises 404 as the server does."""
        parts = [unquote(part) for part in path.strip("/").split("/")]
        with self._lock:
            if (document := self._discovery(parts)) is not None:
                return document
            if parts[0] == "api" and len(parts) > 2:
                group, version, rest = "", parts[1], parts[2:]
            elif parts[0] == "apis" and len(parts) > 3:
                group, version, rest = parts[1], parts[2], parts[3:]
            else:
                raise _page_not_found()
            namespace = ""
            if rest[0] == "namespaces" and len(rest) > 2 and rest[2] not in ("status", "finalize"):
                namespace, rest = rest[1], rest[2:]
            kind = self._kinds.get((group, rest[0]))
            if group == "events.k8s.io" and rest[0] == "events" and version == "v1":
                kind = self._kinds[("", "events")]
            elif kind is None or version not in kind.versions:
                known = any(one.group == group and version in one.versions for one in self._kinds.values())
                raise _not_served() if known else _page_not_found()
            name = rest[1] if len(rest) > 1 else ""
            subresource = rest[2] if len(rest) > 2 else ""
            if subresource and not (
                (subresource == "status" and kind.has_status) or (subresource == "log" and kind.kind == "Pod")
            ):
                raise _page_not_found()
            if kind.namespaced and not namespace and (name or method == "POST"):
                raise _page_not_found()
        watching = query.get("watch") in ("1", "true")
        verbs = {"POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}
        verb = verbs.get(method) or ("get" if name else "watch" if watching else "list")
        if method == "DELETE" and not name:
            verb = "deletecollection"
        if kind.kind == "Namespace" and not namespace:
            namespace = ""
        return Request(verb, method, path, kind, version, namespace, name, subresource, query)

    def _discovery(self, parts: "list[str]") -> Object | None:
        match parts:
            case ["version"]:
                major, minor = self.version
                return {"major": str(major), "minor": str(minor), "gitVersion": f"v{major}.{minor}.0-fake"}
            case ["healthz" | "livez" | "readyz"]:
                return {"ok": True}
            case ["api"]:
                return {"kind": "APIVersions", "versions": ["v1"]}
            case ["apis"]:
                groups = sorted({kind.group for kind in self._kinds.values() if kind.group})
                return {"kind": "APIGroupList", "apiVersion": "v1", "groups": [{"name": group} for group in groups]}
            case ["api", version]:
                return self._resources("", version)
            case ["apis", group, version]:
                return self._resources(group, version)
        return None

    def _resources(self, group: str, version: str) -> Object:
        kinds = [kind for kind in self._kinds.values() if kind.group == group and version in kind.versions]
        if not kinds:
            raise _page_not_found()
        return {
            "kind": "APIResourceList",
            "groupVersion": f"{group}/{version}" if group else version,
            "resources": [
                {"name": name, "kind": kind.kind, "namespaced": kind.namespaced}
                for kind in kinds
                for name in (kind.plural, *([f"{kind.plural}/status"] if kind.has_status else ()))
            ],
        }

    # ── get, list, watch ─────────────────────────────────────────────────────────────────────────────────────────────

    def _stored(self, request: Request) -> Stored:
        key = (request.namespace, request.name)
        stored = request.kind.objects.get(key)
        if stored is None:
            raise self._not_found(request.kind, request.name)
        return stored

    def _not_found(self, kind: Kind, name: str) -> Refusal:
        return Refusal(404, "NotFound", f'{kind.full_name} "{name}" not found', {"name": name, **kind.details})

    def _shown(self, request: Request, stored: Object) -> Object:
        if request.kind.kind == "Event" and "/apis/events.k8s.io/" in request.path:
            return _to_events_v1(stored)
        return {**stored, "apiVersion": request.kind.api_version(request.version)} if request.kind.custom else stored

    def _listed(self, request: Request) -> Object:
        matches = _selector(request)
        found = [
            (key, self._shown(request, stored.object))
            for key, stored in sorted(request.kind.objects.items())
            if request.namespace in ("", key[0]) and matches(stored.object)
        ]
        version = str(self._now_version)
        start = 0
        if token := request.query.get("continue"):
            version, _, after = base64.b64decode(token).decode().partition(" ")
            if int(version) < request.kind.oldest:
                raise _expired(int(version), self._now_version)
            start = bisect.bisect_right([key for key, _ in found], tuple(json.loads(after)))
        limit = int(request.query.get("limit") or 0)
        page = found[start : start + limit] if limit else found[start:]
        metadata: Object = {"resourceVersion": version, **({"continue": ""} if request.kind.custom else {})}
        if limit and start + limit < len(found):
            metadata["continue"] = base64.b64encode(f"{version} {json.dumps(page[-1][0])}".encode()).decode()
            metadata["remainingItemCount"] = len(found) - start - limit
        items = [item for _, item in page]
        if not request.kind.custom:  # a real server leaves them out of the items of built-in kinds
            items = [
                {name: value for name, value in item.items() if name not in ("apiVersion", "kind")} for item in items
            ]
        group = (
            "events.k8s.io/v1" if "/apis/events.k8s.io/" in request.path else request.kind.api_version(request.version)
        )
        return {"kind": f"{request.kind.kind}List", "apiVersion": group, "metadata": metadata, "items": items}

    def watch(self, request: Request, stream: socket.socket) -> Iterator[bytes]:
        """The lines of a watch as they come; the first element, maybe empty, is there at once."""
        kind, matches = request.kind, _selector(request)
        ends_at = time.monotonic() + float(request.query.get("timeoutSeconds") or 1800)
        asked = request.query.get("resourceVersion", "")
        with self._lock:
            self._streams.add(stream)
            generation = self._watch_generation
            lines = []
            seen = self._now_version if asked in ("", "0") else int(asked)
            if asked in ("", "0"):
                lines = [
                    self._line("ADDED", self._shown(request, stored.object))
                    for key, stored in sorted(kind.objects.items())
                    if request.namespace in ("", key[0]) and matches(stored.object)
                ]
            if seen > self._now_version:
                raise Refusal(504, "Timeout", f"Too large resource version: {seen}, current: {self._now_version}")
        bookmark_at = time.monotonic() + self.bookmark_s
        try:
            yield b"".join(lines)
            while True:
                with self._lock:
                    lines, seen, is_over, is_bookmark = self._next_lines(
                        request, matches, seen, generation, min(ends_at, bookmark_at), ends_at
                    )
                if is_bookmark:
                    bookmark_at = time.monotonic() + self.bookmark_s
                if lines and self.watch_lag_s:
                    time.sleep(self.watch_lag_s)
                if lines:
                    yield b"".join(lines)
                if is_over:
                    return
        finally:
            with self._lock:
                self._streams.discard(stream)

    def _next_lines(
        self,
        request: Request,
        matches: Callable[[Object], bool],
        seen: int,
        generation: int,
        wake_at: float,
        ends_at: float,
    ) -> tuple[list[bytes], int, bool, bool]:
        """Lines, the version up to which they go, whether the watch is over, whether it was time for a bookmark."""
        kind = request.kind
        while True:
            if self._closing or generation != self._watch_generation:
                raise _Cut
            if seen < kind.oldest:
                return [self._line("ERROR", _expired(seen, self._now_version).status)], seen, True, False
            new = kind.history[bisect.bisect_right(kind.history, seen, key=lambda change: change.version) :]
            if new:
                lines = []
                for change in new:
                    type_ = _type_for(change, matches)
                    if type_ and request.namespace in ("", change.object["metadata"].get("namespace", "")):
                        lines.append(self._line(type_, self._shown(request, change.object)))
                return lines, new[-1].version, False, False
            left_s = wake_at - time.monotonic()
            if left_s > 0:
                kind.changed.wait(left_s)
                continue
            metadata = {"resourceVersion": str(self._now_version), "creationTimestamp": None}
            bookmark = {"kind": kind.kind, "apiVersion": kind.api_version(request.version), "metadata": metadata}
            wanted = request.query.get("allowWatchBookmarks") in ("1", "true")
            lines = [self._line("BOOKMARK", bookmark)] if wanted else []
            return lines, self._now_version, time.monotonic() >= ends_at, True

    @staticmethod
    def _line(type_: str, shown: Object) -> bytes:
        return json.dumps({"type": type_, "object": shown}, separators=(",", ":")).encode() + b"\n"

    def read_log(self, request: Request, stream: socket.socket) -> Iterator[bytes]:
        """What a container wrote, and with follow=true what it goes on to write until it ends."""
        with self._lock:
            pod = self._stored(request).object
            names = [one["name"] for part in ("initContainers", "containers") for one in pod["spec"].get(part, ())]
            container = request.query.get("container") or (names[0] if len(names) == 1 else "")
            if container not in names:
                raise Refusal(
                    400,
                    "BadRequest",
                    f"container {container} is not valid for pod {request.name}"
                    if container
                    else f"a container name must be specified for pod {request.name}, choose one of: {names}",
                )
            waiting = _container_status(pod, container)["state"].get("waiting")
            if waiting:
                raise Refusal(
                    400,
                    "BadRequest",
                    f'container "{container}" in pod "{request.name}" is waiting to start: {waiting["reason"]}',
                )
            key = (request.namespace, request.name, container)
            written = self._logs.get(key, [])
            tail = request.query.get("tailLines")
            seen = max(0, len(written) - int(tail)) if tail is not None else 0
            if since := request.query.get("sinceTime"):
                seen = max(
                    seen, next((i for i, (stamp, _) in enumerate(written) if stamp[:19] >= since[:19]), len(written))
                )
            stamped = request.query.get("timestamps") == "true"
            generation = self._watch_generation
            self._streams.add(stream)
        try:
            yield b""
            while True:
                with self._lock:
                    new = self._logs.get(key, [])[seen:]
                    pod = self._kind("pods").objects.get((request.namespace, request.name))
                    running = pod and "running" in _container_status(pod.object, container)["state"]
                    if not new:
                        if request.query.get("follow") != "true" or not running:
                            return
                        if self._closing or generation != self._watch_generation:
                            raise _Cut
                        self._log_written.wait(1.0)
                        continue
                seen += len(new)
                yield b"".join(stamp.encode() + b" " + line if stamped else line for stamp, line in new)
        finally:
            with self._lock:
                self._streams.discard(stream)

    # ── create, update, delete ───────────────────────────────────────────────────────────────────────────────────────

    def _created(self, request: Request) -> Object:
        kind = request.kind
        new = self._decoded(request, request.body)
        metadata = new["metadata"]
        if kind.namespaced:
            if metadata.setdefault("namespace", request.namespace) != request.namespace:
                raise _bad_request(
                    "the namespace of the provided object does not match the namespace sent on the request"
                )
            space = self._kinds[("", "namespaces")].objects.get(("", request.namespace))
            if space is None:
                raise self._not_found(self._kinds[("", "namespaces")], request.namespace)
            if space.object["metadata"].get("deletionTimestamp"):
                raise Refusal(
                    403,
                    "Forbidden",
                    f'{kind.full_name} "{metadata.get("name")}" is forbidden: unable to create new content in '
                    f"namespace {request.namespace} because it is being terminated",
                    {
                        "name": str(metadata.get("name")),
                        **kind.details,
                        "causes": [
                            {
                                "reason": "NamespaceTerminating",
                                "message": f"namespace {request.namespace} is being terminated",
                                "field": "metadata.namespace",
                            }
                        ],
                    },
                )
        if metadata.get("resourceVersion"):
            raise Refusal(500, "", "resourceVersion should not be set on objects to be created")
        if not metadata.get("name") and metadata.get("generateName"):
            metadata["name"] = f"{metadata['generateName']}{next(self._uids):05x}"
        if kind.has_status:
            new.pop("status", None)
        self._defaults(kind, new)
        self._check(request, new, None)
        key = (request.namespace, str(metadata["name"]))
        there = kind.objects.get(key)
        if there:
            being = "object is being deleted: " if there.object["metadata"].get("deletionTimestamp") else ""
            named, details = kind.full_name, kind.details
            if request.group == "events.k8s.io":
                named, details = "events.events.k8s.io", {"group": request.group, "kind": "events"}
            raise Refusal(
                409, "AlreadyExists", f'{being}{named} "{key[1]}" already exists', {"name": key[1], **details}
            )
        owners: patches.Owners = {}
        patches.written({}, new, request.query.get("fieldManager") or "unknown", owners)
        if request.is_dry_run:
            made = {**metadata, "uid": self._uid(), "creationTimestamp": _now()}
            counted = {"generation": 1} if kind.counts_generations else {}
            return self._shown(request, {**new, "metadata": {**made, **counted}})
        shown = self._shown(request, self._insert(kind, key, new, owners))
        if kind.kind == "ControllerRevision":
            kind.objects[key].data_text = _text_of(request.text, "data")
        self._settle()
        return shown

    def _decoded(self, request: Request, body: Any) -> Object:
        """A fresh copy of what was sent; unknown fields are refused or dropped."""
        kind, version = request.kind, request.version
        if not isinstance(body, dict):
            raise _bad_request(
                f"the object provided is unrecognized (must be of type {kind.kind}): couldn't get version/kind; json "
                f"parse error: unexpected end of JSON input ({request.text})"
            )
        new: Object = patches.copied(body)
        events_v1 = "/apis/events.k8s.io/" in request.path
        wanted = "events.k8s.io/v1" if events_v1 else kind.api_version(version)
        if new.setdefault("kind", kind.kind) != kind.kind or new.setdefault("apiVersion", wanted) != wanted:
            raise _bad_request(
                f'{kind.kind} in version "{new["apiVersion"]}" cannot be handled as a {kind.kind}: no kind '
                f'"{new["kind"]}" is registered for version "{new["apiVersion"]}" in scheme '
                '"k8s.io/kubernetes/pkg/api/legacyscheme/scheme.go:30"'
                if new["apiVersion"] != wanted
                else f'{new["kind"]} in version "{version}" cannot be handled as a {kind.kind}'
            )
        if not isinstance(new.setdefault("metadata", {}), dict):
            raise _bad_request("metadata must be an object")
        unknown: Iterable[str] = ()
        cannot = f'{kind.kind} in version "{version}" cannot be handled as a {kind.kind}: '
        group = "events.k8s.io" if events_v1 else kind.group
        checks = request.query.get("fieldValidation") or "Warn"
        if kind.custom:
            if schema := kind.schemas.get(version):
                new, unknown = rules.pruned(new, schema)
        else:
            unknown, wrong = rules.undecodable(new, group, version, kind.kind)
            if wrong:
                raise _bad_request(f"{cannot}json: cannot unmarshal {wrong[0]}")
        named = [f'unknown field "{one}"' for one in unknown]
        if named and checks == "Strict" and request.verb == "patch":
            raise self._unpatchable(request, body, f"strict decoding error: {', '.join(named)}")
        if named and checks == "Strict":
            raise _bad_request(f"{cannot}strict decoding error: {', '.join(named)}")
        if named and checks == "Warn":
            request.warnings.extend(named)
        if not kind.custom:
            new = rules.without_unknown(defaults.as_stored(new, group, version, kind.kind), unknown)
        if kind.kind == "Event" and events_v1:
            new = _from_events_v1(new)
        if kind.kind == "Secret":
            new.setdefault("type", "Opaque")
            if said := rules.undecodable_data(new.get("data") or {}):
                raise _bad_request(cannot + said)
            for name, text in (new.pop("stringData", None) or {}).items():
                new.setdefault("data", {})[name] = base64.b64encode(text.encode()).decode()
        return new

    @staticmethod
    def _unpatchable(request: Request, patched: Object, said: str) -> Refusal:
        """The server quotes the whole object."""
        message = f"Invalid value: {json.dumps(json.dumps(patched))}: {said}"
        cause = {"reason": "FieldValueInvalid", "message": message, "field": "patch"}
        return Refusal(422, "Invalid", f' "" is invalid: patch: {message}', {"causes": [cause]})

    def _check(self, request: Request, new: Object, old: Object | None) -> None:
        """Validation and admission; raises 422 with each cause, or 403."""
        kind, name = request.kind, str(new["metadata"].get("name") or "")
        if kind.kind == "Pod" and old is None and (violated := self._pod_security(request.namespace, new["spec"])):
            raise Refusal(403, "Forbidden", f'pods "{name}" is forbidden: {violated}', {"name": name, **kind.details})
        faults = rules.faults_of(kind.kind, new)
        if kind.kind == "CustomResourceDefinition" and self.evaluates_rules:
            faults += rules.faults_of_crd(new)
        if schema := kind.schemas.get(request.version):
            found, warned = rules.faults_of_custom(new, old, schema, evaluates_rules=self.evaluates_rules)
            faults += found
            request.warnings.extend(warned)
        if old is not None:
            faults += rules.immutable_faults(kind.kind, old, new)
        if faults:
            raise self._invalid(kind, name, faults)
        if kind.kind == "Job" and (violated := self._pod_security(request.namespace, new["spec"]["template"]["spec"])):
            request.warnings.append(f"would {violated.replace('violates', 'violate', 1)}")
        for admit in self.admission:
            if why := admit(new, old):
                raise Refusal(403, "Forbidden", why)

    @staticmethod
    def _invalid(kind: Kind, name: str, faults: Iterable[rules.Fault]) -> Refusal:
        causes = [{"reason": reason, "message": message, "field": path} for path, reason, message in faults]
        title = f"{kind.kind}.{kind.group}" if kind.group else kind.kind
        said = list(dict.fromkeys(f"{each['field']}: {each['message']}" for each in causes))
        whole = said[0] if len(said) == 1 else f"[{', '.join(said)}]"
        details: Object = {"name": name, "group": kind.group, "kind": kind.kind}
        return Refusal(
            422,
            "Invalid",
            f'{title} "{name}" is invalid: {whole}',
            {**{key: value for key, value in details.items() if value}, "causes": causes},
        )

    def _pod_security(self, namespace: str, spec: Object) -> str | None:
        """`violates PodSecurity "restricted:latest": …`, in a namespace that enforces it."""
        space = self._kinds[("", "namespaces")].objects.get(("", namespace))
        labels = (space.object["metadata"].get("labels") or {}) if space else {}
        if labels.get("pod-security.kubernetes.io/enforce") != "restricted":
            return None
        violations = rules.restricted_violations(spec)
        return f'violates PodSecurity "restricted:latest": {", ".join(violations)}' if violations else None

    def _changed(self, request: Request) -> Object:
        kind, key = request.kind, (request.namespace, request.name)
        stored = kind.objects.get(key)
        is_apply = request.content_type.startswith("application/apply-patch")
        if stored is None and is_apply and not request.subresource:
            if not request.query.get("fieldManager"):
                raise _no_field_manager()
            return self._applied_new(request)
        if stored is None:
            raise self._not_found(kind, request.name)
        old, owners = stored.object, {name: set(paths) for name, paths in stored.owners.items()}
        manager = request.query.get("fieldManager") or "unknown"
        if request.verb == "update":
            new = self._decoded(request, request.body)
            self._check_version(request, new, old)
        else:
            new = self._patched(request, old, manager, owners)
        new["apiVersion"], new["kind"] = old["apiVersion"], old["kind"]
        metadata = new["metadata"]
        if (uid := metadata.get("uid") or old["metadata"]["uid"]) != old["metadata"]["uid"]:
            said = f'Invalid value: "{uid}": field is immutable'
            raise self._invalid(kind, request.name, [("metadata.uid", "FieldValueInvalid", said)] * 2)
        for name in ("uid", "creationTimestamp", "generation", "deletionTimestamp", "resourceVersion"):
            if name in old["metadata"]:
                metadata[name] = old["metadata"][name]
            else:
                metadata.pop(name, None)
        metadata["name"], metadata["namespace"] = request.name, request.namespace
        if not kind.namespaced:
            del metadata["namespace"]
        if request.subresource == "status":
            new = {**old, "metadata": old["metadata"], "status": new.get("status", {})}
        elif kind.has_status:
            new.pop("status", None)
            if "status" in old:
                new["status"] = old["status"]
        if kind.custom and (schema := kind.schemas.get(request.version)):
            new, _ = rules.pruned(new, schema)
        self._check(request, new, old)
        if kind.kind == "ControllerRevision":
            # A patch decodes and encodes what it patches, as Go does.
            text = _text_of(request.text, "data") if request.verb == "update" else _as_go(new.get("data"))
            if text != stored.data_text:
                said = f"Invalid value: {_as_go(new['data'])}: field is immutable"
                raise self._invalid(kind, request.name, [("data", "FieldValueInvalid", said)])
        if not is_apply:
            patches.written(old, new, manager, owners)
        if request.is_dry_run:
            return self._shown(request, new)
        self._update(kind, key, new, owners)
        shown = self._shown(request, kind.objects[key].object if key in kind.objects else new)
        self._settle()
        return shown

    @staticmethod
    def _has_atomic_conditions(request: Request) -> bool:
        """Whether a CRD says nothing of its list of conditions: whoever applies it replaces it whole."""
        schema = request.kind.schemas.get(request.version) or {}
        status = schema.get("properties", {}).get("status", {}).get("properties", {})
        return "conditions" in status and status["conditions"].get("x-kubernetes-list-type") != "map"

    def _check_typed(self, request: Request) -> None:
        """What is applied must be of the schema, whatever fieldValidation says."""
        kind, version = request.kind, request.version
        if kind.custom:
            unknown = rules.pruned(request.body, kind.schemas[version])[1] if version in kind.schemas else []
        else:
            unknown = rules.undecodable(request.body, kind.group, version, kind.kind)[0]
        if unknown:
            where = f"/{request.name}; {kind.api_version(version) if kind.group else f'/{version}'}, Kind={kind.kind}"
            raise Refusal(
                500, "", f"failed to create typed patch object ({where}): .{unknown[0]}: field not declared in schema"
            )

    def _applied_new(self, request: Request) -> Object:
        body = {**request.body, "metadata": {**request.body.get("metadata", {}), "name": request.name}}
        made = self._created(replace(request, verb="create", body=body, content_type="application/json"))
        stored = request.kind.objects.get((request.namespace, request.name))
        request.flags.add("made")
        if stored:
            applied = {path for path, _ in patches.leaves(body)}
            stored.owners = {f"{request.query['fieldManager']}/apply": applied}
        return made

    def _check_version(self, request: Request, new: Object, old: Object) -> None:
        if new["metadata"].get("name") != request.name:
            raise _bad_request(
                f"the name of the object ({new['metadata'].get('name')}) does not match the name on the URL "
                f"({request.name})"
            )
        asked = new["metadata"].get("resourceVersion")
        if asked is None and (request.kind.custom or request.kind.kind == "Lease"):
            said = "Invalid value: 0: must be specified for an update"
            by_plural = replace(request.kind, kind=request.kind.plural)
            raise self._invalid(by_plural, request.name, [("metadata.resourceVersion", "FieldValueInvalid", said)])
        if asked is not None and asked != old["metadata"]["resourceVersion"]:
            raise self._conflict(request.kind, request.name)

    @staticmethod
    def _conflict(kind: Kind, name: str) -> Refusal:
        return Refusal(
            409,
            "Conflict",
            f'Operation cannot be fulfilled on {kind.full_name} "{name}": the object has been modified; please apply '
            "your changes to the latest version and try again",
            {"name": name, **kind.details},
        )

    def _patched(self, request: Request, old: Object, manager: str, owners: patches.Owners) -> Object:
        kind_of_patch = request.content_type.partition(";")[0]
        match kind_of_patch:
            case "application/merge-patch+json":
                new = patches.merged(old, request.body)
            case "application/strategic-merge-patch+json" if not request.kind.custom:
                new = patches.strategically_merged(old, request.body)
            case "application/json-patch+json":
                try:
                    new = patches.json_patched(old, request.body)
                except ValueError as error:
                    said = "the server rejected our request due to an error in our request"
                    raise Refusal(422, "Invalid", said, {}) from error
            case "application/apply-patch+yaml":
                if not request.query.get("fieldManager"):
                    raise _no_field_manager()
                return self._applied(request, old, manager, owners)
            case _:
                raise Refusal(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})
        asked = (request.body.get("metadata") or {}).get("resourceVersion") if isinstance(request.body, dict) else None
        if asked is not None and asked != old["metadata"]["resourceVersion"]:
            raise self._conflict(request.kind, request.name)
        return self._decoded(request, new) if request.subresource != "status" else patches.copied(new)

    def _applied(self, request: Request, old: Object, manager: str, owners: patches.Owners) -> Object:
        self._check_typed(request)
        wanted = self._decoded(request, request.body)
        if request.subresource == "status":
            wanted = {
                name: value for name, value in wanted.items() if name in ("apiVersion", "kind", "metadata", "status")
            }
        elif request.kind.has_status:
            wanted.pop("status", None)
        whose = f"{manager}/apply/{request.subresource}" if request.subresource else f"{manager}/apply"
        force = request.query.get("force") == "true"
        new, conflicts = patches.applied(old, wanted, whose, owners, force=force)
        if self._has_atomic_conditions(request) and "conditions" in wanted.get("status", {}):
            new["status"]["conditions"] = patches.copied(wanted["status"]["conditions"])
        if conflicts:
            shown = "\n".join(f"- .{'.'.join(map(str, path))}" for _, path in conflicts)
            count = "1 conflict" if len(conflicts) == 1 else f"{len(conflicts)} conflicts"
            causes = [
                {
                    "reason": "FieldManagerConflict",
                    "message": f'conflict with "{other.partition("/")[0]}"',
                    "field": f".{'.'.join(str(part) for part in path)}",
                }
                for other, path in conflicts
            ]
            said = f'conflict with "{conflicts[0][0].partition("/")[0]}":'
            only = f"{said} {causes[0]['field']}"
            raise Refusal(
                409,
                "Conflict",
                f"Apply failed with {count}: {only if len(conflicts) == 1 else f'{said}{chr(10)}{shown}'}",
                {"causes": causes},
            )
        return new

    def _deleted(self, request: Request) -> Object:
        kind, key = request.kind, (request.namespace, request.name)
        stored = self._stored(request)
        options = request.body if isinstance(request.body, dict) else {}
        metadata = stored.object["metadata"]
        conditions = options.get("preconditions") or {}
        for name, said, why in (
            ("uid", "UID", "The object might have been deleted and then recreated"),
            ("resourceVersion", "ResourceVersion", "The object might have been modified"),
        ):
            if name in conditions and conditions[name] != metadata[name]:
                raise Refusal(
                    409,
                    "Conflict",
                    f'Operation cannot be fulfilled on {kind.kind} "{request.name}": the {said} in the precondition '
                    f"({conditions[name]}) does not match the {said} in record ({metadata[name]}). {why}",
                    {"name": request.name, **kind.details, "kind": kind.kind},
                )
        propagation = options.get("propagationPolicy") or request.query.get("propagationPolicy") or "Background"
        if propagation not in ("Foreground", "Background", "Orphan"):
            said = f'Unsupported value: "{propagation}": supported values: "Foreground", "Background", "Orphan", "nil"'
            options_kind = Kind("meta.k8s.io", ("v1",), "", "DeleteOptions")
            raise self._invalid(options_kind, "", [("propagationPolicy", "FieldValueNotSupported", said)])
        success = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"}
        success["details"] = {"name": key[1], **kind.details, "uid": metadata["uid"]}
        if request.is_dry_run or options.get("dryRun"):
            return success
        grace = options.get("gracePeriodSeconds", request.query.get("gracePeriodSeconds"))
        self._delete(kind, key, propagation, None if grace is None else int(grace))
        self._settle()
        there = kind.objects.get(key)
        if there or kind.kind == "CustomResourceDefinition":
            return self._shown(request, there.object if there else stored.object)
        return success

    # ── the store ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _kind(self, plural: str) -> Kind:
        found = next((kind for kind in self._kinds.values() if plural in (kind.plural, kind.full_name)), None)
        if found is None:
            raise KeyError(plural)
        return found

    def _place(self, manifest: Mapping[str, Any]) -> tuple[Kind, Key]:
        group, _, _ = str(manifest["apiVersion"]).rpartition("/")
        kind = next(one for one in self._kinds.values() if (one.group, one.kind) == (group, manifest["kind"]))
        metadata = manifest["metadata"]
        return kind, (metadata.get("namespace", "default") if kind.namespaced else "", metadata["name"])

    def _serve(self, kind: Kind) -> None:
        kind.changed = threading.Condition(self._lock)
        kind.oldest = self._now_version
        self._kinds[(kind.group, kind.plural)] = kind

    def _uid(self) -> str:
        return f"{next(self._uids):08x}-0000-4000-8000-000000000000"

    def _defaults(self, kind: Kind, new: Object) -> None:
        """What the server fills in."""
        metadata = new["metadata"]
        match kind.kind:
            case "Job":
                spec = new.setdefault("spec", {})
                defaults.fill_in_job(spec)
                if self.kueue and "kueue.x-k8s.io/queue-name" in metadata.get("labels", {}):
                    spec["suspend"] = True
                template = spec.setdefault("template", {})
                labels = template.setdefault("metadata", {}).setdefault("labels", {})
                if "selector" not in spec:
                    uid = metadata.setdefault("uid", self._uid())
                    spec["selector"] = {"matchLabels": {"batch.kubernetes.io/controller-uid": uid}}
                    name = metadata.get("name", "")
                    for prefix in ("batch.kubernetes.io/", ""):
                        labels[f"{prefix}controller-uid"], labels[f"{prefix}job-name"] = uid, name
                if metadata.get("labels") is None:
                    metadata["labels"] = {
                        name: value
                        for name, value in labels.items()
                        if name.rpartition("/")[2] in ("controller-uid", "job-name")
                    }
                new.setdefault("status", {})
            case "Pod":
                spec = new.setdefault("spec", {})
                defaults.fill_in_pod(spec)
                new.setdefault("status", {}).setdefault("phase", "Pending")
                for part, place in (("initContainerStatuses", "initContainers"), ("containerStatuses", "containers")):
                    new["status"].setdefault(part, [_waiting(one) for one in spec.get(place) or ()])
            case "Event":
                for name in ("firstTimestamp", "lastTimestamp"):
                    new.setdefault(name, None)
                new.setdefault("source", {})
            case "Namespace":
                metadata.setdefault("labels", {})["kubernetes.io/metadata.name"] = metadata["name"]
                new.setdefault("spec", {})["finalizers"] = ["kubernetes"]
                new.setdefault("status", {}).setdefault("phase", "Active")

    def _insert(self, kind: Kind, key: Key, new: Object, owners: patches.Owners) -> Object:
        metadata = new["metadata"]
        metadata.setdefault("uid", self._uid())
        metadata.setdefault("creationTimestamp", _now())
        if kind.counts_generations:
            metadata["generation"] = 1
        self._living[metadata["uid"]] = (kind, key)
        self._record(kind, key, "ADDED", new, None, owners)
        if kind.kind == "CustomResourceDefinition":
            self._establish(new)
        return new

    def _update(self, kind: Kind, key: Key, new: Object, owners: patches.Owners) -> None:
        old = kind.objects[key].object
        ignored = ("metadata", "status")
        if _without(new, ignored) != _without(old, ignored) and "generation" in old["metadata"]:
            new["metadata"]["generation"] = old["metadata"]["generation"] + 1
        if new == old:
            kind.objects[key].owners = owners
            return
        if new["metadata"].get("deletionTimestamp") and not new["metadata"].get("finalizers") and kind.kind != "Pod":
            self._drop(kind, key, "Background")
            return
        self._record(kind, key, "MODIFIED", new, old, owners)
        if kind.kind == "CustomResourceDefinition":
            self._establish(new)

    def _record(
        self, kind: Kind, key: Key, type_: str, new: Object, old: Object | None, owners: patches.Owners | None
    ) -> None:
        """The one place where something happens: a new version, the store, the history, whom it concerns."""
        self._now_version = next(self._versions)
        metadata = dict(new["metadata"])
        metadata["resourceVersion"] = str(self._now_version)
        if owners is not None:
            metadata["managedFields"] = [
                {"manager": name.partition("/")[0], "operation": "Apply" if "/apply" in name else "Update"}
                for name in sorted(owners)
            ]
        new["metadata"] = metadata
        if type_ == "DELETED":
            kind.objects.pop(key, None)
        else:
            before = kind.objects.get(key)
            kind.objects[key] = Stored(new, owners or {}, before.data_text if before else "")
            for owner in metadata.get("ownerReferences") or ():
                self._owned.setdefault(owner["uid"], set()).add((kind.group, kind.plural, *key))
                if owner["uid"] not in self._living:
                    self._orphans_to_look_at.append((kind, key))
        kind.history.append(Change(self._now_version, type_, new, old))
        if len(kind.history) > 20_000:
            kind.oldest = kind.history[9_999].version
            del kind.history[:10_000]
        kind.changed.notify_all()
        if kind.kind == "Job":
            self._jobs_to_look_at.append(key)
        elif kind.kind == "Pod":
            self._log_written.notify_all()
            for owner in metadata.get("ownerReferences") or ():
                if owner["kind"] == "Job":
                    self._jobs_to_look_at.append((key[0], owner["name"]))

    def _delete(self, kind: Kind, key: Key, propagation: str, grace_s: int | None) -> None:
        stored = kind.objects.get(key)
        if stored is None:
            return
        old = stored.object
        metadata = old["metadata"]
        if kind.kind == "Pod" and old["spec"].get("nodeName") and grace_s != 0:
            if metadata.get("deletionTimestamp"):
                return
            grace = old["spec"]["terminationGracePeriodSeconds"] if grace_s is None else grace_s
            new = {**old, "metadata": {**metadata, "deletionTimestamp": _now(), "deletionGracePeriodSeconds": grace}}
            self._record(kind, key, "MODIFIED", new, old, stored.owners)
            uid = metadata["uid"]
            self._later(self.termination_s, lambda: self._stop_pod(key, uid))
            return
        if kind.kind == "Namespace" and not metadata.get("deletionTimestamp"):
            new = {**old, "metadata": {**metadata, "deletionTimestamp": _now()}, "status": {"phase": "Terminating"}}
            self._record(kind, key, "MODIFIED", new, old, stored.owners)
            self._empty(key[1])
            return
        dependents = [place for place in self._owned.get(metadata["uid"], ()) if self._object_at(place)]
        finalizers = list(metadata.get("finalizers") or ())
        if propagation == "Foreground" and "foregroundDeletion" not in finalizers:
            finalizers.append("foregroundDeletion")
        if not finalizers:
            self._drop(kind, key, propagation)
            return
        if not metadata.get("deletionTimestamp"):
            new = {**old, "metadata": {**metadata, "deletionTimestamp": _now(), "finalizers": finalizers}}
            self._record(kind, key, "MODIFIED", new, old, stored.owners)
        if "foregroundDeletion" in finalizers:
            for group, plural, *place in dependents:
                self._delete(self._kinds[(group, plural)], (place[0], place[1]), "Background", None)
            uid = metadata["uid"]
            self._later(self.foreground_s, lambda: self._finish_foreground(uid))

    def _empty(self, namespace: str) -> None:
        """Delete what is in a namespace that goes, and then it."""
        inside = [
            (kind, key)
            for kind in self._kinds.values()
            for key in list(kind.objects)
            if kind.namespaced and key[0] == namespace
        ]
        for kind, key in inside:
            self._delete(kind, key, "Background", None)
        self._settle()
        if any(key[0] == namespace for kind in self._kinds.values() if kind.namespaced for key in kind.objects):
            self._later(0.02, lambda: self._empty(namespace))
        elif ("", namespace) in self._kind("namespaces").objects:
            self._drop(self._kind("namespaces"), ("", namespace), "Background")

    def _finish_foreground(self, uid: str) -> None:
        if uid not in self._living:
            return
        kind, key = self._living[uid]
        if any(self._object_at(place) for place in self._owned.get(uid, ())):
            self._later(0.02, lambda: self._finish_foreground(uid))
            return
        old = kind.objects[key].object
        finalizers = [one for one in old["metadata"].get("finalizers", ()) if one != "foregroundDeletion"]
        self._update(
            kind, key, {**old, "metadata": {**old["metadata"], "finalizers": finalizers}}, kind.objects[key].owners
        )

    def _object_at(self, place: tuple[str, str, str, str]) -> Stored | None:
        group, plural, namespace, name = place
        kind = self._kinds.get((group, plural))
        return kind.objects.get((namespace, name)) if kind else None

    def _drop(self, kind: Kind, key: Key, propagation: str) -> None:
        """The object is gone; what it owned is orphaned or goes too."""
        old = kind.objects[key].object
        uid = old["metadata"]["uid"]
        self._living.pop(uid, None)
        self._record(kind, key, "DELETED", dict(old), old, None)
        if kind.kind == "CustomResourceDefinition":
            spec = old["spec"]
            self._kinds.pop((spec["group"], spec["names"]["plural"]), None)
        for group, plural, namespace, name in sorted(self._owned.pop(uid, ())):
            dependent = self._kinds.get((group, plural))
            stored = dependent.objects.get((namespace, name)) if dependent else None
            if dependent is None or stored is None:
                continue
            if propagation == "Orphan":
                references = [one for one in stored.object["metadata"]["ownerReferences"] if one["uid"] != uid]
                metadata = {**stored.object["metadata"], "ownerReferences": references}
                self._record(
                    dependent,
                    (namespace, name),
                    "MODIFIED",
                    {**stored.object, "metadata": metadata},
                    stored.object,
                    stored.owners,
                )
            else:
                self._orphans_to_look_at.append((dependent, (namespace, name)))

    def _stop_pod(self, key: Key, uid: str) -> None:
        """What a kubelet does after SIGTERM: the containers end, then the pod goes."""
        pods = self._kind("pods")
        stored = pods.objects.get(key)
        if stored is None or stored.object["metadata"]["uid"] != uid:
            return
        pod = patches.copied(stored.object)
        if pod["status"]["phase"] in ("Pending", "Running"):
            for status in (*pod["status"]["initContainerStatuses"], *pod["status"]["containerStatuses"]):
                if "terminated" not in status["state"]:
                    code = self.exit_codes_at_sigterm.get(status["name"], 143)
                    _end(pod, status["name"], code, "", "Error")
            pod["status"]["phase"] = "Failed"
            self._update(pods, key, pod, stored.owners)
            self._settle()
        if key in pods.objects:
            self._drop(pods, key, "Background")
            self._settle()

    def _establish(self, crd: Object) -> None:
        """Serve the kind that a CustomResourceDefinition describes."""
        spec = crd["spec"]
        names = spec["names"]
        served = [version for version in spec["versions"] if version.get("served")]
        stored_first = sorted(served, key=lambda version: not version.get("storage"))
        known = self._kinds.get((spec["group"], names["plural"]))
        kind = known or Kind(
            spec["group"], (), names["plural"], names["kind"], spec["scope"] == "Namespaced", custom=True
        )
        kind.versions = tuple(version["name"] for version in stored_first)
        kind.has_status = any("status" in (version.get("subresources") or {}) for version in served)
        kind.schemas = {
            version["name"]: version["schema"]["openAPIV3Schema"]
            for version in served
            if (version.get("schema") or {}).get("openAPIV3Schema")
        }
        if known is None:
            self._serve(kind)
        definitions = self._kinds[("apiextensions.k8s.io", "customresourcedefinitions")]
        key = ("", crd["metadata"]["name"])
        stored = definitions.objects[key]
        new = patches.copied(stored.object)
        for type_, reason in (("NamesAccepted", "NoConflicts"), ("Established", "InitialNamesAccepted")):
            _set_condition(new.setdefault("status", {}), type_, "True", reason, "")
        if new != stored.object:
            self._record(definitions, key, "MODIFIED", new, stored.object, stored.owners)

    # ── what goes on inside ──────────────────────────────────────────────────────────────────────────────────────────

    def _settle(self) -> None:
        """The garbage collector and the Job controller, until nothing is left to do. Called with the lock held."""
        if self._settling:
            return
        self._settling = True
        try:
            while self._orphans_to_look_at or self._jobs_to_look_at:
                while self._orphans_to_look_at:
                    kind, key = self._orphans_to_look_at.popleft()
                    stored = kind.objects.get(key)
                    owners = stored.object["metadata"].get("ownerReferences") or () if stored else ()
                    if owners and all(owner["uid"] not in self._living for owner in owners):
                        self._delete(kind, key, "Background", None)
                while self._jobs_to_look_at:
                    key = self._jobs_to_look_at.popleft()
                    if self.job_controller:
                        self._look_at_job(key)
        finally:
            self._settling = False

    def _look_at_job(self, key: Key) -> None:
        jobs, pods = self._kind("jobs"), self._kind("pods")
        stored = jobs.objects.get(key)
        if stored is None or stored.object["metadata"].get("deletionTimestamp") or _job_end(stored.object):
            return
        job = patches.copied(stored.object)
        spec, status, uid = job["spec"], job["status"], job["metadata"]["uid"]
        own = [
            pods.objects[(namespace, name)].object
            for _, plural, namespace, name in sorted(self._owned.get(uid, ()))
            if plural == "pods" and (namespace, name) in pods.objects
        ]
        active = [pod for pod in own if pod["status"]["phase"] in ("Pending", "Running")]
        leaving = [pod for pod in active if pod["metadata"].get("deletionTimestamp")]
        active = [pod for pod in active if not pod["metadata"].get("deletionTimestamp")]
        if spec["suspend"]:
            _set_condition(status, "Suspended", "True", "JobSuspended", "Job suspended")
            status.pop("startTime", None)
            for pod in own:
                self._counted.add(pod["metadata"]["uid"])
            for pod in active:
                self._delete(pods, _key(pod), "Background", None)
            active = []
        else:
            if "startTime" not in status:
                status["startTime"] = _now()
                if any(one["type"] == "Suspended" for one in status.get("conditions", ())):
                    _set_condition(status, "Suspended", "False", "JobResumed", "Job resumed")
            for pod in own:
                if pod["status"]["phase"] in ("Succeeded", "Failed") and pod["metadata"]["uid"] not in self._counted:
                    self._counted.add(pod["metadata"]["uid"])
                    _count_pod(job, pod)
            if not _job_end(job) and not active and not leaving and not self._pods_that_leave(own):
                made = self._make_pod(job)
                active = [made] if made else []
        if _job_end(job):
            for pod in active:
                self._delete(pods, _key(pod), "Background", None)
            active = []
        status["active"], status["terminating"] = len(active), len(leaving)
        status["ready"] = sum(
            any(one["type"] == "Ready" and one["status"] == "True" for one in pod["status"].get("conditions", ()))
            for pod in active
        )
        for name in ("active", "ready"):
            if not status[name]:
                del status[name]
        if job != stored.object and key in jobs.objects:
            self._update(jobs, key, job, stored.owners)

    @staticmethod
    def _pods_that_leave(own: Iterable[Object]) -> bool:
        """podReplacementPolicy: Failed — no new pod beside one that still ends."""
        return any(pod["metadata"].get("deletionTimestamp") and pod["status"]["phase"] != "Failed" for pod in own)

    def _make_pod(self, job: Object) -> Object | None:
        metadata, template = job["metadata"], job["spec"]["template"]
        namespace = metadata["namespace"]
        why = self.refuse_pods.get(namespace) or self._pod_security(namespace, template["spec"])
        if why:
            text = f'Error creating: pods "{metadata["name"]}-" is forbidden: {why}'
            events = self._kinds[("", "events")].objects.values()
            if not any(one.object.get("message") == text for one in events):
                self.add_event(job, "FailedCreate", text)
            return None
        name = f"{metadata['name'][:57]}-{next(self._uids):05x}"
        pod: Object = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": name,
                "namespace": namespace,
                **{
                    part: dict(template["metadata"][part])
                    for part in ("labels", "annotations")
                    if part in template["metadata"]
                },
                "ownerReferences": [
                    {
                        "apiVersion": "batch/v1",
                        "kind": "Job",
                        "name": metadata["name"],
                        "uid": metadata["uid"],
                        "controller": True,
                        "blockOwnerDeletion": True,
                    }
                ],
            },
            "spec": patches.copied(template["spec"]),
        }
        kind = self._kind("pods")
        self._defaults(kind, pod)
        return self._insert(kind, (namespace, name), pod, {})

    def _pod_of(self, job: str, namespace: str) -> Object:
        pods = self._kind("pods")
        if (namespace, job) in pods.objects:
            return pods.objects[(namespace, job)].object
        own = [
            stored.object
            for (where, _), stored in pods.objects.items()
            if where == namespace
            and any(
                one["kind"] == "Job" and one["name"] == job
                for one in stored.object["metadata"].get("ownerReferences") or ()
            )
        ]
        if not own:
            raise KeyError(f"Job {job} has no pod")
        return max(own, key=lambda pod: int(pod["metadata"]["uid"][:8], 16))

    @contextlib.contextmanager
    def _pod(self, job: str, namespace: str) -> Iterator[Object]:
        """A copy of a Job's pod to change."""
        with self._lock:
            pod = patches.copied(self._pod_of(job, namespace))
            yield pod
            kind, key = self._kind("pods"), _key(pod)
            self._update(kind, key, pod, kind.objects[key].owners)
            self._settle()

    def _later(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._timer_ids), act))
        self._timer_added.notify_all()

    def _run_timers(self) -> None:
        with self._lock:
            while not self._closing:
                now = time.monotonic()
                if self._timers and self._timers[0][0] <= now:
                    heapq.heappop(self._timers)[2]()
                    self._settle()
                else:
                    self._timer_added.wait(self._timers[0][0] - now if self._timers else None)


# ── HTTP ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _handler(cluster: FakeKubernetes) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True
        wbufsize = -1  # one packet for headers and body

        def setup(self) -> None:
            super().setup()
            with cluster._lock:
                cluster._connections.add(self.connection)

        def finish(self) -> None:
            with cluster._lock:
                cluster._connections.discard(self.connection)
            with contextlib.suppress(OSError, ValueError):
                super().finish()

        def handle(self) -> None:
            with contextlib.suppress(OSError, ValueError):  # the client went away, or did not like our certificate
                super().handle()

        def log_message(self, format: str, *args: Any) -> None: ...  # noqa: A002

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            query = {name: values[-1] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length) if length else b""
            cluster.requests.append((self.command, self.path))
            fault = cluster.fault_for(self.command, self.path)
            if fault and fault.delay_s:
                time.sleep(fault.delay_s)
            if fault and not fault.after and (fault.reset or fault.status):
                self._fail(fault)
                return
            try:
                scheme, _, token = (self.headers.get("Authorization") or "").partition(" ")
                if scheme.lower() != "bearer" or token != cluster.token:
                    raise Refusal(401, "Unauthorized", "Unauthorized")
                found = cluster.parse(self.command, parts.path, query)
                if isinstance(found, dict):
                    self._send(200, found)
                    return
                request = self._with_body(found, body, self.headers.get("Content-Type", ""))
                cluster.calls[(request.verb, request.kind.plural)] += 1
                cluster.authorize(request)
                if request.verb == "watch" or request.subresource == "log":
                    self._stream(request)
                    return
                answer = cluster.answer(request)
                if fault and fault.after:
                    self._fail(fault)
                    return
                made = request.verb == "create" or "made" in request.flags
                self._send(201 if made else 200, answer, warnings=request.warnings)
            except Refusal as refusal:
                self._send(refusal.code, refusal.status, refusal.headers)

        do_POST = do_PUT = do_PATCH = do_DELETE = do_GET

        @staticmethod
        def _with_body(request: Request, body: bytes, content_type: str) -> Request:
            return _with(request, body, content_type) if body else request

        def _fail(self, fault: Fault) -> None:
            if fault.reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
                self.close_connection = True
                return
            headers = {"Retry-After": str(fault.retry_after_s)} if fault.retry_after_s is not None else {}
            refusal = Refusal(fault.status, fault.reason, fault.message)
            self._send(fault.status, refusal.status, headers)

        def _send(
            self,
            status: int,
            answer: Object,
            headers: Mapping[str, str] | None = None,
            warnings: Iterable[str] = (),
        ) -> None:
            content = json.dumps(answer, separators=(",", ":")).encode()
            if status == 404 and not answer.get("reason"):
                content = b"404 page not found\n"
            self.send_response_only(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            for text in (*cluster.warnings, *warnings) if self.command != "GET" else ():
                escaped = text.replace("\\", "\\\\").replace('"', '\\"')
                self.send_header("Warning", f'299 - "{escaped}"')
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)
            self.wfile.flush()

        def _stream(self, request: Request) -> None:
            is_watch = request.verb == "watch"
            chunks = cluster.watch(request, self.connection) if is_watch else cluster.read_log(request, self.connection)
            first = next(chunks, None)  # what is refused is refused before the headers
            self.send_response_only(200)
            self.send_header("Content-Type", "application/json" if is_watch else "text/plain")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            try:
                for chunk in itertools.chain([] if first is None else [first], chunks):
                    if chunk:
                        self.wfile.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
                    self.wfile.flush()
            except _Cut:
                self.close_connection = True
                return
            self.wfile.write(b"0\r\n\r\n")
            self.wfile.flush()

    return Handler


def _with(request: Request, body: bytes, content_type: str) -> Request:
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None  # what it says of that is for each kind to say
    return replace(request, body=parsed, content_type=content_type, text=body.decode(errors="replace"))


def _text_of(text: str, key: str) -> str:
    """The value of a top-level key in a JSON text, as it is written there."""
    at = text.index("{") + 1
    decoder = json.JSONDecoder()
    while True:
        at = re.compile(r"[\s,]*").match(text, at).end()  # type: ignore[union-attr]
        if text[at] == "}":
            return ""
        name, at = decoder.raw_decode(text, at)
        at = re.compile(r"\s*:\s*").match(text, at).end()  # type: ignore[union-attr]
        _, end = decoder.raw_decode(text, at)
        if name == key:
            return text[at:end]
        at = end


def _as_go(value: Any) -> str:
    """JSON as encoding/json writes it: sorted, without spaces, with what HTML minds escaped."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _not_served() -> Refusal:
    return Refusal(404, "NotFound", "the server could not find the requested resource", {})


def _page_not_found() -> Refusal:
    return Refusal(404, "", "404 page not found")


def _no_field_manager() -> Refusal:
    said = "Required value: is required for apply patch"
    cause = {"reason": "FieldValueRequired", "message": said, "field": "fieldManager"}
    return Refusal(
        422,
        "Invalid",
        f'PatchOptions.meta.k8s.io "" is invalid: fieldManager: {said}',
        {"group": "meta.k8s.io", "kind": "PatchOptions", "causes": [cause]},
    )


def _bad_request(message: str) -> Refusal:
    return Refusal(400, "BadRequest", message)


def _expired(seen: int, now: int) -> Refusal:
    return Refusal(410, "Expired", f"too old resource version: {seen} ({now})")


def _rule_allows(rule: Mapping[str, Any], verb: str, group: str, plural: str, name: str) -> bool:
    def covers(part: str, value: str) -> bool:
        return "*" in rule.get(part, ()) or value in rule.get(part, ())

    names = rule.get("resourceNames") or ()
    return (
        covers("verbs", verb)
        and covers("apiGroups", group)
        and covers("resources", plural)
        and (not names or name in names)
    )


# ── selectors ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _selector(request: Request) -> Callable[[Object], bool]:
    """Whether an object matches the labelSelector and fieldSelector of a request; raises 400 for a bad one."""
    labels = _label_requirements(request.query.get("labelSelector", ""))
    fields = [part for part in request.query.get("fieldSelector", "").split(",") if part]
    wanted = []
    for part in fields:
        name, sign, value = re.fullmatch(r"([\w./]+)(!=|==?)(.*)", part).groups()  # type: ignore[union-attr]
        if name not in _FIELDS.get(request.kind.kind, ()) and name not in ("metadata.name", "metadata.namespace"):
            raise _bad_request(
                f'"{name}" is not a known field selector: only "metadata.name", "metadata.namespace"'
                if request.kind.kind not in _FIELDS
                else f"field label not supported: {name}"
            )
        wanted.append((_FIELD_PATHS.get(name, name), sign == "!=", value))

    def matches(candidate: Object) -> bool:
        own = candidate["metadata"].get("labels") or {}
        if not all(requirement(own) for requirement in labels):
            return False
        return all((str(_at(candidate, path) or "") == value) != negated for path, negated, value in wanted)

    return matches


_FIELDS = {
    "Pod": ("status.phase", "spec.nodeName", "spec.restartPolicy"),
    "Job": ("status.successful",),
    "Node": ("spec.unschedulable",),
    "Secret": ("type",),
    "Event": (
        *(f"involvedObject.{part}" for part in ("kind", "name", "namespace", "uid")),
        *(f"regarding.{part}" for part in ("kind", "name", "namespace", "uid")),
        "reason",
        "type",
    ),
}
_FIELD_PATHS = {f"regarding.{part}": f"involvedObject.{part}" for part in ("kind", "name", "namespace", "uid")}


def _at(value: Any, path: str) -> Any:
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _label_requirements(text: str) -> list[Callable[[Mapping[str, str]], bool]]:
    found: list[Callable[[Mapping[str, str]], bool]] = []
    for part in re.findall(r"(?:[^,(]|\([^)]*\))+", text):
        part = part.strip()
        if several := re.fullmatch(r"(\S+) (in|notin) \((.*)\)", part):
            name, negated = several[1], several[2] == "notin"
            values = {value.strip() for value in several[3].split(",")}
            found.append(lambda own, n=name, v=values, no=negated: (own.get(n) in v) != no)
        elif one := re.fullmatch(r"([^=!]+?)(!=|==?)([^=]*)", part):
            name, negated, value = one[1], one[2] == "!=", one[3]
            found.append(lambda own, n=name, v=value, no=negated: (own.get(n) == v) != no)
        elif re.fullmatch(r"!?[\w./-]+", part):
            name, negated = part.lstrip("!"), part.startswith("!")
            found.append(lambda own, n=name, no=negated: (n in own) != no)
        else:
            after = part.partition(" ")[2]
            raise _bad_request(f"unable to parse requirement: found '{after}', expected: in, notin, =, ==, !=, gt, lt")
    return found


def _type_for(change: Change, matches: Callable[[Object], bool]) -> str | None:
    """What a watch with a selector hears of a change: an object that no longer matches is DELETED to it."""
    now = matches(change.object) and change.type != "DELETED"
    was = change.before is not None and matches(change.before)
    if now:
        return "MODIFIED" if was else "ADDED"
    return "DELETED" if was else None


# ── Jobs, pods, events ───────────────────────────────────────────────────────────────────────────────────────────────


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _precise_now() -> str:
    """As a kubelet stamps lines of a log: no two are the same."""
    return f"{datetime.now(UTC).strftime('%Y-%m-%dT%H:%M:%S')}.{time.time_ns() % 10**9:09}Z"


def _key(manifest: Object) -> Key:
    return manifest["metadata"].get("namespace", ""), manifest["metadata"]["name"]


def _without(manifest: Object, names: Iterable[str]) -> Object:
    return {name: value for name, value in manifest.items() if name not in names}


def _set_condition(status: Object, type_: str, value: str, reason: str, message: str) -> None:
    new = {"type": type_, "status": value, "lastTransitionTime": _now()}
    new |= {name: text for name, text in (("reason", reason), ("message", message)) if text}
    conditions = status.setdefault("conditions", [])
    for condition in conditions:
        if condition["type"] == type_:
            if condition["status"] == value:
                new["lastTransitionTime"] = condition["lastTransitionTime"]
            condition.clear()
            condition.update(new)
            return
    conditions.append(new)


def _waiting(container: Object) -> Object:
    return {
        "name": container["name"],
        "image": container.get("image", ""),
        "ready": False,
        "restartCount": 0,
        "state": {"waiting": {"reason": "PodInitializing"}},
    }


def _container_status(pod: Object, container: str) -> Object:
    for status in (*pod["status"]["initContainerStatuses"], *pod["status"]["containerStatuses"]):
        if status["name"] == container:
            return status  # type: ignore[no-any-return]
    raise KeyError(f"{pod['metadata']['name']} has no container {container}")


def _run(pod: Object, container: str) -> None:
    status = _container_status(pod, container)
    status["state"] = {"running": {"startedAt": _now()}}
    status["ready"] = True
    if container in [one["name"] for one in pod["spec"]["containers"]]:
        pod["status"]["phase"] = "Running"
        _set_condition(pod["status"], "Initialized", "True", "", "")
        ready = all(one["ready"] for one in pod["status"]["containerStatuses"])
        _set_condition(pod["status"], "Ready", "True" if ready else "False", "", "")


def _end(pod: Object, container: str, exit_code: int, message: str, reason: str) -> None:
    status = _container_status(pod, container)
    began = (status["state"].get("running") or {}).get("startedAt") or _now()
    ended = {"exitCode": exit_code, "reason": reason, "startedAt": began, "finishedAt": _now()}
    if message:
        ended["message"] = message[:4096]
    status["state"], status["ready"] = {"terminated": ended}, False


def _sidecars(pod: Object) -> list[str]:
    return [one["name"] for one in pod["spec"].get("initContainers") or () if one.get("restartPolicy") == "Always"]


def _go_on(pod: Object, said: Mapping[tuple[str, str], str]) -> None:
    """What a kubelet does when a container of a restartPolicy: Never pod has ended."""
    status, sidecars = pod["status"], _sidecars(pod)
    for one in status["initContainerStatuses"]:
        ended = one["state"].get("terminated")
        if ended is None:
            if "waiting" in one["state"]:
                _run(pod, one["name"])
            if one["name"] not in sidecars:
                return
        elif ended["exitCode"]:
            status["phase"] = "Failed"
            return
    mains = status["containerStatuses"]
    if all("waiting" in one["state"] for one in mains):
        for one in mains:
            _run(pod, one["name"])
    ends = [one["state"].get("terminated") for one in mains]
    if all(ends):
        for name in sidecars:
            message = said.get((pod["metadata"]["uid"], name))
            _end(pod, name, 143 if message is None else 0, message or "", "Error" if message is None else "Completed")
        status["phase"] = "Failed" if any(end["exitCode"] for end in ends if end) else "Succeeded"
        _set_condition(status, "Ready", "False", "PodCompleted", "")


def _job_end(job: Object) -> str | None:
    """The type of the condition that ended the Job."""
    for condition in job.get("status", {}).get("conditions", ()):
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


def _end_job(job: Object, failed: str, message: str) -> None:
    status = job["status"]
    if failed:
        _set_condition(status, "FailureTarget", "True", failed, message)
        _set_condition(status, "Failed", "True", failed, message)
    else:
        _set_condition(
            status, "SuccessCriteriaMet", "True", "CompletionsReached", "Reached expected number of succeeded pods"
        )
        _set_condition(status, "Complete", "True", "CompletionsReached", "Reached expected number of succeeded pods")
        status["completionTime"] = _now()
        status["succeeded"] = 1


def _count_pod(job: Object, pod: Object) -> None:
    """What an ended pod means to its Job, by podFailurePolicy and backoffLimit."""
    status, spec = job["status"], job["spec"]
    if pod["status"]["phase"] == "Succeeded":
        _end_job(job, "", "")
        return
    statuses = (*pod["status"]["initContainerStatuses"], *pod["status"]["containerStatuses"])
    codes = {one["name"]: one["state"]["terminated"]["exitCode"] for one in statuses if "terminated" in one["state"]}
    for index, rule in enumerate((spec.get("podFailurePolicy") or {}).get("rules") or ()):
        if on := rule.get("onExitCodes"):
            hit = next(
                (
                    (name, code)
                    for name, code in codes.items()
                    if code and on.get("containerName") in (None, name)
                    if (code in on["values"]) == (on["operator"] == "In")
                ),
                None,
            )
            if hit is None:
                continue
            if rule["action"] == "FailJob":
                status["failed"] = status.get("failed", 0) + 1
                _end_job(
                    job,
                    "PodFailurePolicy",
                    f"Container {hit[0]} for pod {pod['metadata']['namespace']}/{pod['metadata']['name']} failed with "
                    f"exit code {hit[1]} matching FailJob rule at index {index}",
                )
                return
        else:
            held = {(one["type"], one["status"]) for one in pod["status"].get("conditions", ())}
            if not any((one["type"], one.get("status", "True")) in held for one in rule.get("onPodConditions") or ()):
                continue
        if rule["action"] == "Ignore":
            return
        break
    status["failed"] = status.get("failed", 0) + 1
    if status["failed"] > spec["backoffLimit"]:
        _end_job(job, "BackoffLimitExceeded", "Job has reached the specified backoff limit")


_EVENT_NAMES = {  # events.k8s.io → core
    "regarding": "involvedObject",
    "note": "message",
    "reportingController": "reportingComponent",
    "deprecatedSource": "source",
    "deprecatedFirstTimestamp": "firstTimestamp",
    "deprecatedLastTimestamp": "lastTimestamp",
    "deprecatedCount": "count",
}


def _from_events_v1(event: Object) -> Object:
    return {**{_EVENT_NAMES.get(name, name): value for name, value in event.items()}, "apiVersion": "v1"}


def _to_events_v1(event: Object) -> Object:
    names = {core: name for name, core in _EVENT_NAMES.items()}
    return {**{names.get(name, name): value for name, value in event.items()}, "apiVersion": "events.k8s.io/v1"}
