"""The Kubernetes API as the cluster package needs it: plain dicts over the official client's configuration and pool.

    api = Api.from_config(context=None, namespace=None)     # kubeconfig or service account, as kubectl finds them
    jobs = api.list(JOB, label_selector="kaito.sh/workspace")
    for event in api.watch(JOB, jobs.resource_version): ...  # raises GoneError when it must be listed again
    api.create(job, dry_run=True)                            # strict about unknown fields

The `kubernetes` package reads kubeconfig, runs credential plugins, renews tokens and sets up TLS. Its models are not
used: version 37's refuse or drop fields that they do not know. Only what is the same from 31 to 37 is touched.

Every method takes `namespace=None` for the one the Api is for; `ALL_NAMESPACES` where a list or watch is over all.
"""

import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self
from urllib.parse import quote, urlencode

from tuner.cluster.api_errors import (
    AlreadyExistsError,
    Asked,
    ForbiddenError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
    error_of_config,
    error_of_response,
    error_of_transport,
)
from tuner.cluster.server_text import secrets_of, shown
from tuner.errors import ConfigError
from tuner.redaction import hide_header
from tuner.retry import Backoff, Retries

Object = dict[str, Any]
"""A Kubernetes object as JSON has it."""

ALL_NAMESPACES = ""
FIELD_MANAGER = "tuner"

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_CONNECT_S, _READ_S, _WATCH_S, _WATCH_GRACE_S = 10.0, 60.0, 300, 15
_BACKOFF = Backoff(0.25, 8.0, jitter=0.5)
_PAGE = 500
_CONNECTIONS = 32
_CHUNK_BYTES = 1 << 16


# ── kinds ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Resource:
    """One kind of object and where the API server keeps it."""

    group: str
    version: str
    plural: str
    kind: str
    namespaced: bool = True

    @property
    def api_version(self) -> str:
        return f"{self.group}/{self.version}" if self.group else self.version

    @property
    def full_name(self) -> str:
        """`jobs.batch`, as the API server and kubectl write it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural


WORKSPACE = Resource("kaito.sh", "v1beta1", "workspaces", "Workspace")
JOB = Resource("batch", "v1", "jobs", "Job")
POD = Resource("", "v1", "pods", "Pod")
CONFIG_MAP = Resource("", "v1", "configmaps", "ConfigMap")
SECRET = Resource("", "v1", "secrets", "Secret")
CLAIM = Resource("", "v1", "persistentvolumeclaims", "PersistentVolumeClaim")
EVENT = Resource("", "v1", "events", "Event")
EVENT_V1 = Resource("events.k8s.io", "v1", "events", "Event")
NODE = Resource("", "v1", "nodes", "Node", namespaced=False)
NAMESPACE = Resource("", "v1", "namespaces", "Namespace", namespaced=False)
SERVICE_ACCOUNT = Resource("", "v1", "serviceaccounts", "ServiceAccount")
LEASE = Resource("coordination.k8s.io", "v1", "leases", "Lease")
CONTROLLER_REVISION = Resource("apps", "v1", "controllerrevisions", "ControllerRevision")
DEPLOYMENT = Resource("apps", "v1", "deployments", "Deployment")
DISRUPTION_BUDGET = Resource("policy", "v1", "poddisruptionbudgets", "PodDisruptionBudget")
ROLE = Resource("rbac.authorization.k8s.io", "v1", "roles", "Role")
ROLE_BINDING = Resource("rbac.authorization.k8s.io", "v1", "rolebindings", "RoleBinding")
CLUSTER_ROLE = Resource("rbac.authorization.k8s.io", "v1", "clusterroles", "ClusterRole", namespaced=False)
CLUSTER_ROLE_BINDING = Resource(
    "rbac.authorization.k8s.io", "v1", "clusterrolebindings", "ClusterRoleBinding", namespaced=False
)
CUSTOM_RESOURCE_DEFINITION = Resource(
    "apiextensions.k8s.io", "v1", "customresourcedefinitions", "CustomResourceDefinition", namespaced=False
)
VALIDATING_WEBHOOK = Resource(
    "admissionregistration.k8s.io",
    "v1",
    "validatingwebhookconfigurations",
    "ValidatingWebhookConfiguration",
    namespaced=False,
)

OUR_JOBS = "app.kubernetes.io/managed-by=tuner"
"""Label selector of every Job that was rendered here."""
NETWORK_POLICY = Resource("networking.k8s.io", "v1", "networkpolicies", "NetworkPolicy")

RESOURCES: tuple[Resource, ...] = tuple(value for value in list(globals().values()) if isinstance(value, Resource))
_BY_KIND = {(known.api_version, known.kind): known for known in RESOURCES} | {
    ("kaito.sh/v1alpha1", "Workspace"): Resource("kaito.sh", "v1alpha1", "workspaces", "Workspace")
}


def resource_of(manifest: Mapping[str, Any]) -> Resource:
    """The Resource of an object by its apiVersion and kind; raises ConfigError for a kind that we never write."""
    api_version, kind = manifest.get("apiVersion"), manifest.get("kind")
    known = _BY_KIND.get((str(api_version), str(kind)))
    if known is None:
        raise ConfigError(f"{kind} of {api_version}: tuner does not write objects of this kind")
    return known


# ── values ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Listing:
    """A list at one moment: a watch goes on from `resource_version`."""

    items: tuple[Object, ...]
    resource_version: str


@dataclass(frozen=True)
class WatchEvent:
    """A change. Of a BOOKMARK only `resource_version` means something."""

    kind: Literal["ADDED", "MODIFIED", "DELETED", "BOOKMARK"]
    object: Object

    @property
    def resource_version(self) -> str:
        return str(self.object["metadata"]["resourceVersion"])


@dataclass(frozen=True, order=True)
class ServerVersion:
    major: int
    minor: int
    git_version: str = field(default="", compare=False)

    def __str__(self) -> str:
        return self.git_version or f"{self.major}.{self.minor}"


OLDEST_SERVER = ServerVersion(1, 29)  # sidecars; messageExpression and fieldPath in a CRD's rules


# ── the API ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class Api:
    """One API server with one identity, for one namespace; safe to use from several threads.

    Reads are tried again for up to `patience_s` when the connection breaks or the server is busy, writes only when the
    server said that it did nothing (429) or was never reached. `warn` hears the server's own warnings, `tell` the first
    time why something is tried again.
    """

    def __init__(
        self,
        configuration: Any,
        namespace: str,
        *,
        context: str | None = None,
        patience_s: float = 30.0,
        warn: Callable[[str], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> None:
        from kubernetes.client import ApiClient

        configuration.connection_pool_maxsize = _CONNECTIONS
        self.namespace, self.context, self.server = namespace, context, str(configuration.host).rstrip("/")
        self.patience_s = patience_s
        self._warn = warn or (lambda _: None)
        self._warned: set[str] = set()
        self._tell = tell or (lambda _: None)
        self._told = False
        self._configuration = configuration
        try:
            self._pool = ApiClient(configuration).rest_client.pool_manager
        except OSError as error:
            raise error_of_config(error, "the kubeconfig's certificates") from error
        # A watch or a followed log may be silent for minutes: a dead peer must show all the same.
        self._pool.connection_pool_kw["socket_options"] = _keep_alive_options()

    def __repr__(self) -> str:
        return f"Api({self.server}, namespace={self.namespace})"

    @classmethod
    def from_config(
        cls,
        context: str | None = None,
        namespace: str | None = None,
        *,
        env: Mapping[str, str] | None = None,
        patience_s: float = 30.0,
        warn: Callable[[str], None] | None = None,
        tell: Callable[[str], None] | None = None,
    ) -> Self:
        """As kubectl finds it: $KUBECONFIG, else ~/.kube/config, else the pod's service account.

        Raises ConfigError when there is none of them, or no such context.
        """
        found = load_configuration(context, os.environ if env is None else env)
        return cls(
            found.configuration,
            namespace or found.namespace,
            context=found.context,
            patience_s=patience_s,
            warn=warn,
            tell=tell,
        )

    # ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def get(self, resource: Resource, name: str, namespace: str | None = None) -> Object:
        """The object; raises NotFoundError."""
        asked = self._asked("get", resource, namespace, name)
        return self._json("GET", self._path(resource, namespace, name), asked)

    def find(self, resource: Resource, name: str, namespace: str | None = None) -> Object | None:
        """The object, or None when there is none. A missing namespace or kind is none too."""
        try:
            return self.get(resource, name, namespace)
        except NotFoundError:
            return None

    def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
    ) -> Listing:
        """All that match, each with its apiVersion and kind (a server leaves them out of built-in kinds)."""
        items: list[Object] = []
        version = ""
        for page in self.pages(resource, namespace, label_selector=label_selector, field_selector=field_selector):
            items += page.items
            version = page.resource_version
        return Listing(tuple(items), version)

    def pages(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = _PAGE,
    ) -> Iterator[Listing]:
        """The same, so many at a time: for who keeps little of each. All pages are of one moment."""
        path, asked = self._path(resource, namespace), self._asked("list", resource, namespace)
        query = _without_empty(labelSelector=label_selector, fieldSelector=field_selector, limit=str(limit))
        while True:
            page = self._json("GET", path, asked, query=query)
            items = page.get("items") or []
            for item in items:
                item.setdefault("apiVersion", resource.api_version)
                item.setdefault("kind", resource.kind)
            yield Listing(tuple(items), str(page["metadata"]["resourceVersion"]))
            more = page["metadata"].get("continue")
            if not more:
                return
            query = {**query, "continue": more}

    def watch(
        self,
        resource: Resource,
        resource_version: str,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        timeout_s: int = _WATCH_S,
    ) -> Iterator[WatchEvent]:
        """Each change after `resource_version`, and bookmarks. It ends by itself after `timeout_s`: watch again.

        Raises GoneError when the server no longer knows that version (list again), UnavailableError when the connection
        broke.
        Never tried again by itself: only the caller knows how far it came.
        """
        query = _without_empty(
            watch="1",
            resourceVersion=resource_version,
            allowWatchBookmarks="true",
            timeoutSeconds=str(timeout_s),
            labelSelector=label_selector,
            fieldSelector=field_selector,
        )
        asked = self._asked("watch", resource, namespace)
        response = self._request(
            "GET", self._path(resource, namespace), asked, query=query, read_s=timeout_s + _WATCH_GRACE_S, attempts=1
        )
        for line in self._lines(response, asked):
            event = _parsed(line)
            if event["type"] == "ERROR":
                raise error_of_response(asked, int(event["object"].get("code") or 500), event["object"], {})
            event["object"].setdefault("apiVersion", resource.api_version)
            event["object"].setdefault("kind", resource.kind)
            yield WatchEvent(event["type"], event["object"])

    def logs(
        self,
        pod: str,
        container: str,
        namespace: str | None = None,
        *,
        tail_lines: int | None = None,
        previous: bool = False,
        timestamps: bool = False,
        since_time: str = "",
    ) -> str:
        """What the container has written so far; raises ApiError with 400 while it has not started."""
        path, asked = self._log_path(pod, namespace)
        query = _log_query(container, tail_lines, previous=previous, timestamps=timestamps, since_time=since_time)
        response = self._request("GET", path, asked, query=query)
        return self._body(response, asked).decode(errors="replace")

    def follow_logs(
        self,
        pod: str,
        container: str,
        namespace: str | None = None,
        *,
        tail_lines: int | None = None,
        timestamps: bool = False,
        since_time: str = "",
    ) -> Iterator[str]:
        """Each line as it is written, until the container ends. Raises UnavailableError when the connection breaks."""
        path, asked = self._log_path(pod, namespace)
        query = _log_query(container, tail_lines, timestamps=timestamps, since_time=since_time) | {"follow": "true"}
        response = self._request("GET", path, asked, query=query, read_s=None, attempts=1)
        for line in self._lines(response, asked):
            yield line.decode(errors="replace")

    def server_version(self) -> ServerVersion:
        version = self._json("GET", "/version", Asked("get", "the server's version", self.server))
        digits = [int(re.sub(r"\D.*", "", str(version.get(part))) or 0) for part in ("major", "minor")]
        return ServerVersion(digits[0], digits[1], str(version.get("gitVersion", "")))

    def serves(self, resource: Resource) -> bool:
        """Whether the server knows this kind (a CRD may not be installed)."""
        group = f"/apis/{resource.api_version}" if resource.group else f"/api/{resource.version}"
        try:
            known = self._json("GET", group, Asked("get", "the server's kinds", self.server))
        except NotFoundError:
            return False
        return any(entry.get("name") == resource.plural for entry in known.get("resources", ()))

    # ── writing ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def create(
        self, manifest: Mapping[str, Any], namespace: str | None = None, *, dry_run: bool = False, strict: bool = True
    ) -> Object:
        """The object as the server made it; raises AlreadyExistsError. `strict` refuses fields it does not know."""
        resource = resource_of(manifest)
        namespace = namespace or manifest["metadata"].get("namespace")
        asked = self._asked("create", resource, namespace, str(manifest["metadata"].get("name", "")))
        query = _write_query(dry_run=dry_run, strict=strict)
        return self._json("POST", self._path(resource, namespace), asked, query=query, body=manifest)

    def create_once(self, manifest: Mapping[str, Any], namespace: str | None = None) -> Object | None:
        """As `create`, and None when there is one of that name: for what is named by its content."""
        try:
            return self.create(manifest, namespace)
        except AlreadyExistsError:
            return None

    def replace(
        self, manifest: Mapping[str, Any], namespace: str | None = None, *, dry_run: bool = False, strict: bool = True
    ) -> Object:
        """PUT. With metadata.resourceVersion set it raises ConflictError when somebody was quicker."""
        resource = resource_of(manifest)
        name, namespace = str(manifest["metadata"]["name"]), namespace or manifest["metadata"].get("namespace")
        asked = self._asked("update", resource, namespace, name)
        query = _write_query(dry_run=dry_run, strict=strict)
        return self._json("PUT", self._path(resource, namespace, name), asked, query=query, body=manifest)

    def patch(
        self,
        resource: Resource,
        name: str,
        patch: Mapping[str, Any],
        namespace: str | None = None,
        *,
        strict: bool = True,
    ) -> Object:
        """JSON merge patch (RFC 7386): None removes a field, lists are replaced whole."""
        asked = self._asked("patch", resource, namespace, name)
        return self._json(
            "PATCH",
            self._path(resource, namespace, name),
            asked,
            query=_write_query(dry_run=False, strict=strict),
            body=patch,
            content_type="application/merge-patch+json",
        )

    def apply(
        self,
        manifest: Mapping[str, Any],
        namespace: str | None = None,
        *,
        field_manager: str = FIELD_MANAGER,
        force: bool = True,
        dry_run: bool = False,
        subresource: str = "",
    ) -> Object:
        """Server-side apply: what this manager wrote before and leaves out now is removed, others' fields stay."""
        resource = resource_of(manifest)
        name, namespace = str(manifest["metadata"]["name"]), namespace or manifest["metadata"].get("namespace")
        asked = self._asked("patch", resource, namespace, name, subresource)
        query = _write_query(dry_run=dry_run, strict=True)
        query |= {"fieldManager": field_manager, "force": "true" if force else "false"}
        return self._json(
            "PATCH",
            self._path(resource, namespace, name, subresource),
            asked,
            query=query,
            body=manifest,
            content_type="application/apply-patch+yaml",  # JSON is YAML
        )

    def delete(
        self,
        resource: Resource,
        name: str,
        namespace: str | None = None,
        *,
        propagation: Literal["Foreground", "Background", "Orphan"] = "Background",
        uid: str | None = None,
        resource_version: str | None = None,
        grace_period_s: int | None = None,
        dry_run: bool = False,
    ) -> None:
        """Raises NotFoundError, and ConflictError when it is not the object with that uid or version.

        Foreground: the object stays, with a deletionTimestamp, until all that it owns is gone.
        """
        options: Object = {"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": propagation}
        preconditions = _without_empty(uid=uid or "", resourceVersion=resource_version or "")
        if preconditions:
            options["preconditions"] = preconditions
        if grace_period_s is not None:
            options["gracePeriodSeconds"] = grace_period_s
        if dry_run:
            options["dryRun"] = ["All"]
        asked = self._asked("delete", resource, namespace, name)
        self._json("DELETE", self._path(resource, namespace, name), asked, body=options)

    # ── the wire ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _asked(
        self, verb: str, resource: Resource, namespace: str | None, name: str = "", subresource: str = ""
    ) -> Asked:
        namespace = (self.namespace if namespace is None else namespace) if resource.namespaced else ""
        plural = f"{resource.plural}/{subresource}" if subresource else resource.plural
        return Asked(verb, resource.full_name, self.server, resource.group, plural, namespace, name, resource.kind)

    def _path(self, resource: Resource, namespace: str | None, name: str = "", subresource: str = "") -> str:
        namespace = self.namespace if namespace is None else namespace
        parts = ["apis", resource.group, resource.version] if resource.group else ["api", resource.version]
        if resource.namespaced and namespace != ALL_NAMESPACES:
            parts += ["namespaces", namespace]
        parts += [part for part in (resource.plural, name, subresource) if part]
        return "/" + "/".join(quote(part, safe="") for part in parts)

    def _log_path(self, pod: str, namespace: str | None) -> tuple[str, Asked]:
        return self._path(POD, namespace, pod, "log"), self._asked("get", POD, namespace, pod, "log")

    def _json(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
    ) -> Object:
        response = self._request(method, path, asked, query=query, body=body, content_type=content_type)
        content = self._body(response, asked)
        try:
            answer = _parsed(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise UnavailableError(
                f"{self.server}: the answer to {method} {path} is not JSON",
                hint="is this the address of a Kubernetes API server, and is no sign-in page in between?",
            )
        return answer

    def _request(
        self,
        method: str,
        path: str,
        asked: Asked,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        content_type: str = "application/json",
        read_s: float | None = _READ_S,
        attempts: int = 100,
    ) -> Any:
        """The answer with a status below 300, its body not read yet; else raises the ApiError."""
        retries = Retries(_BACKOFF, attempts=attempts)
        while True:
            try:
                return self._attempt(method, path, asked, query, body, content_type, read_s)
            except (ThrottledError, UnavailableError) as error:
                may_repeat = method == "GET" or isinstance(error, ThrottledError) or error.not_sent
                wait_s = retries.next_wait_s(error.retry_after_s, within_s=self.patience_s)
                if error.is_final or not may_repeat or wait_s is None:
                    raise
                if not self._told:
                    self._told = True
                    self._tell(f"{error.message}; trying again for up to {self.patience_s:.0f} s")
            time.sleep(wait_s)

    def _attempt(
        self,
        method: str,
        path: str,
        asked: Asked,
        query: Mapping[str, str] | None,
        body: Mapping[str, Any] | None,
        content_type: str,
        read_s: float | None,
    ) -> Any:
        import urllib3

        authorization = self._authorization()
        secrets = {*authorization.values(), *secrets_of(body)}
        headers = {"Accept": "application/json", "User-Agent": "tuner", **authorization}
        if body is not None:
            headers["Content-Type"] = content_type
        url = self.server + path + (f"?{urlencode(query)}" if query else "")
        try:
            response = self._pool.request(
                method,
                url,
                body=json.dumps(body).encode() if body is not None else None,
                headers=headers,
                timeout=urllib3.Timeout(connect=_CONNECT_S, read=read_s),
                retries=False,
                redirect=False,
                preload_content=False,
            )
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise error_of_transport(self.server, error) from error
        for text in re.findall(r'299 \S+ "((?:[^"\\]|\\.)*)"', response.headers.get("Warning", "")):
            warning = shown(text.replace('\\"', '"'), secrets)
            if warning not in self._warned:
                self._warned.add(warning)
                self._warn(warning)
        if response.status < 300:
            return response
        content = self._body(response, asked)
        try:
            status = _parsed(content)
        except ValueError:
            status = {"message": content.decode(errors="replace").strip()}
        status = status if isinstance(status, dict) else {}
        raise error_of_response(asked, response.status, status, response.headers, secrets)

    def _authorization(self) -> dict[str, str]:
        """Renewed when it is due: `auth_settings` runs the client's hook for that."""
        try:
            settings = self._configuration.auth_settings()
        except Exception as error:  # a credential plugin may raise anything
            raise error_of_config(error, "the credentials of the kubeconfig") from error
        headers = {
            entry["key"]: entry["value"] for entry in settings.values() if entry["in"] == "header" and entry["value"]
        }
        for value in headers.values():
            hide_header(value)
        return headers

    def _body(self, response: Any, asked: Asked) -> bytes:
        import urllib3

        try:
            content: bytes = response.data
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise error_of_transport(asked.server, error) from error
        response.release_conn()
        return content

    def _lines(self, response: Any, asked: Asked) -> Iterator[bytes]:
        """The lines of an answer as they come. What the connection cut off in the middle of a line is no line."""
        import urllib3

        rest = b""
        try:
            for chunk in response.stream(_CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                yield from lines
        except (urllib3.exceptions.HTTPError, OSError) as error:
            raise error_of_transport(asked.server, error) from error
        finally:
            response.close()
        if rest:
            yield rest


def _write_query(*, dry_run: bool, strict: bool) -> dict[str, str]:
    query = {"fieldManager": FIELD_MANAGER, "fieldValidation": "Strict" if strict else "Warn"}
    return query | {"dryRun": "All"} if dry_run else query


def _log_query(
    container: str,
    tail_lines: int | None,
    *,
    previous: bool = False,
    timestamps: bool = False,
    since_time: str = "",
) -> dict[str, str]:
    return _without_empty(
        container=container,
        tailLines="" if tail_lines is None else str(tail_lines),
        previous="true" if previous else "",
        timestamps="true" if timestamps else "",
        sinceTime=since_time,
    )


MAX_LEVELS = 200  # no kind of Kubernetes' own is half as deep
_BRACKETS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[{]|[\]}]', re.DOTALL)


def _parsed(text: bytes) -> Any:
    """JSON; ValueError for what is none. What is nested deeper than Python reads is null.

    A Workspace's `inference` and the data of a ControllerRevision may hold anything, and a page of objects with such a
    one in it must not be lost for all the others.
    """
    try:
        return json.loads(text)
    except RecursionError:
        return json.loads(_shallow(text))


def _shallow(text: bytes) -> bytes:
    """The JSON with null for what is below MAX_LEVELS."""
    kept: list[bytes] = []
    level, begin = 0, 0
    for found in _BRACKETS.finditer(text):
        if found[0] in (b"[", b"{"):
            level += 1
            if level == MAX_LEVELS + 1:
                kept += [text[begin : found.start()], b"null"]
        elif found[0] in (b"]", b"}"):
            if level == MAX_LEVELS + 1:
                begin = found.end()
            level -= 1
    return b"".join([*kept, text[begin:]])


def _without_empty(**values: str) -> dict[str, str]:
    return {name: value for name, value in values.items() if value}


def _keep_alive_options() -> list[tuple[int, int, int]]:
    options = [(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)]
    for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not on every system
            options.append((socket.IPPROTO_TCP, getattr(socket, name), value))
    return options


# ── where the cluster is ─────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Found:
    """The client's own Configuration, and what the kubeconfig says of namespace and context."""

    configuration: Any
    namespace: str
    context: str | None


def load_configuration(context: str | None, env: Mapping[str, str]) -> Found:
    """Raises ConfigError when no kubeconfig and no service account is there, or the kubeconfig is no good."""
    from kubernetes.client import Configuration

    written = env.get("KUBECONFIG", "")
    paths = [Path(path) for path in written.split(os.pathsep) if path] or [
        Path(env.get("HOME") or "~").expanduser() / ".kube" / "config"
    ]
    existing = [path for path in paths if path.exists()]
    if existing:
        return _from_kubeconfig(existing, context)
    if context is None and env.get("KUBERNETES_SERVICE_HOST"):
        return _from_service_account(Configuration())
    if written:
        raise ConfigError(f"$KUBECONFIG: there is no file {written}", hint="set it to your cluster's kubeconfig")
    raise ConfigError(
        f"no Kubernetes cluster is configured: there is no {paths[0]}, $KUBECONFIG is not set, and this is no pod",
        hint="set KUBECONFIG, or let your cloud's command write it (az aks get-credentials, aws eks update-kubeconfig)",
    )


def _from_kubeconfig(paths: list[Path], context: str | None) -> Found:
    from kubernetes.client import Configuration
    from kubernetes.config import kube_config

    files = os.pathsep.join(str(path) for path in paths)
    configuration = Configuration()
    try:
        contexts, current = kube_config.list_kube_config_contexts(config_file=files)
        names = [entry["name"] for entry in contexts]
        if context is not None and context not in names:
            raise ConfigError(
                f"{files}: there is no context {context!r}", hint=f"there is {', '.join(names)}" if names else None
            )
        kube_config.load_kube_config(
            config_file=files, context=context, client_configuration=configuration, persist_config=False
        )
    except ConfigError:
        raise
    except (TypeError, AttributeError, LookupError, UnicodeDecodeError) as error:  # the client trusts in its form
        raise error_of_config(ValueError("no kubeconfig, or one of another form"), files) from error
    except Exception as error:  # ConfigException, YAML errors, missing files and keys: all mean a bad kubeconfig
        raise error_of_config(error, files) from error
    active = next((entry for entry in contexts if entry["name"] == context), None) if context else current
    return Found(
        configuration, (active or {}).get("context", {}).get("namespace") or "default", (active or {}).get("name")
    )


def _from_service_account(configuration: Any) -> Found:
    from kubernetes.config import incluster_config

    try:
        incluster_config.load_incluster_config(client_configuration=configuration)
    except Exception as error:
        raise error_of_config(error, "this pod's service account") from error
    namespace = "default"
    with suppress(OSError):
        namespace = (_SERVICE_ACCOUNT / "namespace").read_text(encoding="utf-8").strip() or namespace
    return Found(configuration, namespace, None)


def refuse_old_server(api: Api) -> None:
    """ConfigError for a server that takes a Job and never runs it: it drops what makes the pusher a sidecar."""
    with suppress(ForbiddenError):
        if (version := api.server_version()) < OLDEST_SERVER:
            raise ConfigError(
                f"this is Kubernetes {version}, and {OLDEST_SERVER} or newer is needed",
                hint="an older one knows no sidecars: the trainer would wait for a pusher that waits for it",
            )
