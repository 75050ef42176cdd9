"""What a real API server answers, written down: the truth that tests/fake_kubernetes.py is held to.

    TUNER_TEST_CLUSTER=cluster.json PYTHONPATH=tests python -m tests.record_real_server

writes tests/recorded/kubernetes-VERSION.json (spare_cluster.py says what a cluster.json is): requests as they are
sent, and each answer without what differs from one time to the next: uids, versions, times.
tests/test_recorded_server.py sends the same requests to the fake. It needs cluster-admin, makes namespaces and CRDs in
a group of their own, and takes them away again. Nothing but Kubernetes itself may change or refuse Jobs there.
"""

import copy
import json
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from test_crd import MISTAKES
from test_workspace import changed

from tests.spare_cluster import SpareCluster
from tuner.cluster.api import Api
from tuner.cluster.crd import custom_resource_definition

FOLDER = Path(__file__).parent / "recorded"
NAMESPACE = "of-a-recording"  # in the file; in the cluster each case has one of its own
GROUP = "recorded.tuner.test"  # our CRD's, so that a real one is left alone
NOBODY = "system:serviceaccount:default:tuner"
GOLDEN = Path(__file__).parent / "golden"

MERGE, JSON_PATCH = "application/merge-patch+json", "application/json-patch+json"
STRATEGIC, APPLY = "application/strategic-merge-patch+json", "application/apply-patch+yaml"

V1 = f"/api/v1/namespaces/{NAMESPACE}"
CONFIG_MAPS, SECRETS, PODS, EVENTS = f"{V1}/configmaps", f"{V1}/secrets", f"{V1}/pods", f"{V1}/events"
JOBS = f"/apis/batch/v1/namespaces/{NAMESPACE}/jobs"
REVISIONS = f"/apis/apps/v1/namespaces/{NAMESPACE}/controllerrevisions"
LEASES = f"/apis/coordination.k8s.io/v1/namespaces/{NAMESPACE}/leases"
EVENTS_V1 = f"/apis/events.k8s.io/v1/namespaces/{NAMESPACE}/events"
WORKSPACES = f"/apis/{GROUP}/v1beta1/namespaces/{NAMESPACE}/workspaces"
TRIES = f"/apis/{GROUP}/v1/namespaces/{NAMESPACE}/tries"
CRDS = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


# ── requests ─────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Request:
    """`body` is sent as it stands. `by_nobody`: with an identity that has no rights. `until`: again, until so."""

    method: str
    path: str
    body: str | None = None
    content_type: str = "application/json"
    by_nobody: bool = False
    until: int | None = None

    def as_json(self) -> dict[str, Any]:
        written = {"method": self.method, "path": self.path}
        if self.body is not None:
            written["body"] = self.body
        if self.content_type != "application/json":
            written["contentType"] = self.content_type
        more: dict[str, Any] = {"byNobody": True} if self.by_nobody else {}
        return written | more | ({"until": self.until} if self.until else {})


def text(manifest: Any) -> str:
    """As Python writes it, with spaces: an API server keeps some of it so."""
    return manifest if isinstance(manifest, str) else json.dumps(manifest)


STRICT = "fieldManager=tuner&fieldValidation=Strict"


def create(path: str, manifest: Any, *, dry_run: bool = False, query: str = STRICT, **how: Any) -> Request:
    return Request("POST", f"{path}?{query}{'&dryRun=All' if dry_run else ''}", text(manifest), **how)


def tried(path: str, manifest: Any) -> Request:
    return create(path, manifest, dry_run=True)


def put(path: str, manifest: Any) -> Request:
    return Request("PUT", f"{path}?{STRICT}", text(manifest))


def patch(path: str, body: Any, content_type: str = MERGE, query: str = STRICT) -> Request:
    return Request("PATCH", f"{path}?{query}", text(body), content_type)


def apply(path: str, body: Any, manager: str = "tuner", *, force: bool = False) -> Request:
    query = f"fieldManager={manager}&fieldValidation=Strict&force={'true' if force else 'false'}"
    return patch(path, body, APPLY, query)


def get(path: str) -> Request:
    return Request("GET", path)


def delete(path: str, **options: Any) -> Request:
    return Request("DELETE", path, text({"apiVersion": "v1", "kind": "DeleteOptions", **options}))


# ── objects ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def config_map(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"x": "1"}, **more}


def secret(name: str = "a", **more: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, **more}


def revision(data: str, name: str = "a") -> str:
    """With its data exactly so."""
    head = {"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": {"name": name}, "revision": 1}
    return f'{json.dumps(head)[:-1]}, "data": {data}}}'


def lease(name: str = "a", **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": {"name": name},
        "spec": {"holderIdentity": "me", "leaseDurationSeconds": 15, **spec},
    }


def event(**more: Any) -> dict[str, Any]:
    return {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"name": "a"},
        "eventTime": "2026-01-01T00:00:00.000000Z",
        "reportingController": "tuner.kaito.sh/controller",
        "reportingInstance": "tuner",
        "action": "Reconcile",
        "type": "Normal",
        "reason": "Running",
        "note": "it runs",
        "regarding": {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "namespace": NAMESPACE},
        **more,
    }


def job(name: str = "tune", **spec: Any) -> dict[str, Any]:
    """Small, and with a rule for each kind of failure."""
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "labels": {"kaito.sh/workspace": name}},
        "spec": {
            "suspend": True,  # its controller leaves it alone
            "podFailurePolicy": {
                "rules": [
                    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                    {
                        "action": "FailJob",
                        "onExitCodes": {"containerName": "tune", "operator": "In", "values": [65, 78]},
                    },
                ]
            },
            "template": {
                "metadata": {"labels": {"kaito.sh/workspace": name}},
                "spec": {
                    "restartPolicy": "Never",
                    "initContainers": [{"name": "preflight", "image": "tuner:1"}],
                    "containers": [{"name": "tune", "image": "tuner:1"}],
                },
            },
            **spec,
        },
    }


def with_change(manifest: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    manifest = copy.deepcopy(manifest)
    change(manifest)
    return manifest


def pod_spec(manifest: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = manifest["spec"]["template"]["spec"]
    return spec


def trainer(manifest: dict[str, Any]) -> dict[str, Any]:
    container: dict[str, Any] = pod_spec(manifest)["containers"][0]
    return container


def rule(manifest: dict[str, Any], index: int) -> dict[str, Any]:
    found: dict[str, Any] = manifest["spec"]["podFailurePolicy"]["rules"][index]
    return found


def empties(manifest: dict[str, Any]) -> None:
    """Whatever is empty, false or 0, in fields of every kind, and amounts in unusual forms."""
    manifest["metadata"] |= {"labels": {"empty": "", "kaito.sh/workspace": "tune"}, "annotations": {}}
    rule(manifest, 0)["onExitCodes"] = None
    rule(manifest, 1)["onPodConditions"] = []
    pod = pod_spec(manifest)
    pod |= {
        "tolerations": [], "nodeSelector": {}, "imagePullSecrets": [], "affinity": {}, "securityContext": {},
        "hostNetwork": False, "hostPID": False, "automountServiceAccountToken": False, "serviceAccountName": "",
        "volumes": [
            {"name": "tmp", "emptyDir": {}},
            {"name": "dshm", "emptyDir": {"medium": "", "sizeLimit": "1024Mi"}},
            {"name": "config", "configMap": {"name": "c", "items": [], "defaultMode": 288}},
        ],
    }  # fmt: skip
    trainer(manifest).update(
        env=[{"name": "EMPTY", "value": ""}, {"name": "A", "value": "1"}],
        args=[],
        command=None,
        ports=[],
        volumeMounts=[{"name": "tmp", "mountPath": "/tmp", "readOnly": False, "subPath": ""}],
        securityContext={"allowPrivilegeEscalation": False, "privileged": False, "capabilities": {"drop": []}},
        resources={
            "requests": {"cpu": 0.5, "memory": "2048Mi", "nvidia.com/gpu": 1},
            "limits": {"memory": "4096Mi", "nvidia.com/gpu": "1", "cpu": "1000m"},
        },
        stdin=False,
    )


JOB_FAULTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a long name": lambda it: it["metadata"].update(name="a" * 64),
    "a name with an underscore": lambda it: it["metadata"].update(name="a_b"),
    "no name": lambda it: it["metadata"].pop("name"),
    "a label that is none": lambda it: it["metadata"]["labels"].update({"a b": "c d"}),
    "a pod that starts again": lambda it: pod_spec(it).update(restartPolicy="OnFailure"),
    "a pod that always starts again": lambda it: pod_spec(it).update(restartPolicy="Always"),
    "no restart policy": lambda it: pod_spec(it).pop("restartPolicy"),
    "two pods at once": lambda it: it["spec"].update(podReplacementPolicy="TerminatingOrFailed"),
    "a negative limit": lambda it: it["spec"].update(backoffLimit=-1),
    "a container in capitals": lambda it: trainer(it).update(name="Tune"),
    "two containers of a name": lambda it: trainer(it).update(name="preflight"),
    "no container": lambda it: pod_spec(it).update(containers=[]),
    "no image": lambda it: trainer(it).pop("image"),
    "a volume with a dot": lambda it: pod_spec(it).update(volumes=[{"name": "a.b", "emptyDir": {}}]),
    "two volumes of a name": lambda it: pod_spec(it).update(volumes=[{"name": "a", "emptyDir": {}}] * 2),
    "a volume that is not there": lambda it: trainer(it).update(volumeMounts=[{"name": "none", "mountPath": "/a"}]),
    "fewer GPUs asked for than allowed": lambda it: trainer(it).update(
        resources={"limits": {"nvidia.com/gpu": "2"}, "requests": {"nvidia.com/gpu": "1"}}
    ),
    "GPUs without a limit": lambda it: trainer(it).update(resources={"requests": {"nvidia.com/gpu": "1"}}),
    "more memory than allowed": lambda it: trainer(it).update(
        resources={"limits": {"memory": "1Gi"}, "requests": {"memory": "2Gi"}}
    ),
    "a rule for no container": lambda it: rule(it, 1)["onExitCodes"].update(containerName="x"),
    "codes out of order": lambda it: rule(it, 1)["onExitCodes"].update(values=[78, 65]),
    "a code twice": lambda it: rule(it, 1)["onExitCodes"].update(values=[65, 65]),
    "the code 0": lambda it: rule(it, 1)["onExitCodes"].update(values=[0, 65]),
    "no codes": lambda it: rule(it, 1)["onExitCodes"].update(values=[]),
    "a rule about nothing": lambda it: rule(it, 0).pop("onPodConditions"),
    "a rule about both": lambda it: rule(it, 0).update(rule(it, 1), action="Ignore"),
    "a field that is none": lambda it: trainer(it).update(imagePullPolice="Always"),
    "a number that is a text": lambda it: it["spec"].update(backoffLimit="three"),
    "a list that is a text": lambda it: trainer(it).update(args="stage"),
}


# ── cases ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cases() -> Iterator[tuple[str, list[Request]]]:
    """Each begins with nothing but the namespace."""
    for name in ("quick-start", "patched", "check-job"):
        manifests = list(yaml.safe_load_all((GOLDEN / f"{name}.yaml").read_text()))
        rendered = with_change(next(each for each in manifests if each["kind"] == "Job"), _in_our_namespace)
        yield f"the Job of golden/{name}.yaml", [tried(JOBS, rendered)]
    yield "a Job full of what is empty", [tried(JOBS, with_change(job(), empties)), *_made(JOBS, job())]
    yield "a Job without a name", [tried(JOBS, with_change(job(), _generated))]
    for name, change in JOB_FAULTS.items():
        yield f"a Job with {name}", [tried(JOBS, with_change(job(), change))]
    yield (
        "unknown fields where they are not refused",
        [create(JOBS, with_change(job(), JOB_FAULTS["a field that is none"]), query="fieldValidation=Warn&dryRun=All")],
    )
    other_image = {"spec": {"template": {"spec": {"containers": [{"name": "tune", "image": "other:1"}]}}}}
    yield (
        "changes of a Job",
        [
            create(JOBS, job()),
            patch(f"{JOBS}/tune", {"spec": {"backoffLimit": 4}}),
            patch(f"{JOBS}/tune", other_image, STRATEGIC),
            patch(f"{JOBS}/tune", {"spec": {"template": {"metadata": {"labels": {"more": "labels"}}}}}),
            patch(f"{JOBS}/tune", {"spec": {"completions": 2}}),
            patch(f"{JOBS}/tune", {"metadata": {"annotations": {"a": "b"}}}),
        ],
    )
    yield (
        "ConfigMaps",
        [
            *_made(CONFIG_MAPS, config_map()),
            create(CONFIG_MAPS, config_map()),
            create(CONFIG_MAPS, config_map("Upper")),
            create(CONFIG_MAPS, config_map("key", data={"a b": "c"})),
            create(CONFIG_MAPS, config_map("field", dta={})),
            create(CONFIG_MAPS, config_map("number", data={"a": 1})),
            create(CONFIG_MAPS, config_map("empty", data={}, binaryData={})),
            get(f"{CONFIG_MAPS}/empty"),
            create(CONFIG_MAPS, config_map("version", metadata={"name": "version", "resourceVersion": "1"})),
            create(CONFIG_MAPS, config_map("space", metadata={"name": "space", "namespace": "default"})),
            create(f"/api/v1/namespaces/{NAMESPACE}-missing/configmaps", config_map()),
            create(CONFIG_MAPS, {"kind": "ConfigMap", "apiVersion": "v2", "metadata": {"name": "b"}}),
            create(CONFIG_MAPS, '{"kind": "ConfigMap", '),
            get(f"{CONFIG_MAPS}/missing"),
            get(f"{V1}/nothings/a"),
        ],
    )
    yield (
        "an immutable ConfigMap",
        [
            create(CONFIG_MAPS, config_map(immutable=True)),
            patch(f"{CONFIG_MAPS}/a", {"data": {"x": "2"}}),
            patch(f"{CONFIG_MAPS}/a", {"immutable": False}),
            patch(f"{CONFIG_MAPS}/a", {"metadata": {"labels": {"a": "b"}}}),
        ],
    )
    yield (
        "Secrets",
        [
            *_made(SECRETS, secret(stringData={"a": "b"}, data={"c": "ZA=="})),
            create(SECRETS, secret("b", data={"a": "no base64"})),
            create(SECRETS, secret("c", type="kubernetes.io/dockerconfigjson", data={"a": "Yg=="})),
            create(SECRETS, secret("d", type="kubernetes.io/dockerconfigjson", stringData={".dockerconfigjson": "{"})),
            create(SECRETS, secret("e", data={"a b": "Yg=="})),
            patch(f"{SECRETS}/a", {"immutable": True}),
            patch(f"{SECRETS}/a", {"data": {"a": "eA=="}}),
        ],
    )
    yield (
        "old versions",
        [
            create(CONFIG_MAPS, config_map()),
            put(f"{CONFIG_MAPS}/a", config_map(metadata={"name": "a", "resourceVersion": "1"})),
            patch(f"{CONFIG_MAPS}/a", {"metadata": {"resourceVersion": "1"}}),
            put(f"{CONFIG_MAPS}/a", config_map("b")),
            patch(f"{CONFIG_MAPS}/a", {"metadata": {"uid": "00000000-0000-4000-8000-000000000000"}}),
            delete(f"{CONFIG_MAPS}/a", preconditions={"uid": "00000000-0000-4000-8000-000000000000"}),
            delete(f"{CONFIG_MAPS}/a", preconditions={"resourceVersion": "1"}),
            delete(f"{CONFIG_MAPS}/a", propagationPolicy="Sideways"),
            delete(f"{CONFIG_MAPS}/a", dryRun=["All"]),
            get(f"{CONFIG_MAPS}/a"),
            delete(f"{CONFIG_MAPS}/a"),
            delete(f"{CONFIG_MAPS}/a"),
            create(LEASES, lease()),
            create(LEASES, lease("b", holderIdentity="")),
            put(f"{LEASES}/a", lease(holderIdentity="you")),
        ],
    )
    yield (
        "patches of every kind",
        [
            create(CONFIG_MAPS, config_map(data={"x": "1", "y": "2"})),
            patch(f"{CONFIG_MAPS}/a", {"data": {"x": None, "z": "3"}}),
            patch(f"{CONFIG_MAPS}/a", [{"op": "add", "path": "/data/w", "value": "4"}], JSON_PATCH),
            patch(f"{CONFIG_MAPS}/a", [{"op": "remove", "path": "/data/none"}], JSON_PATCH),
            patch(f"{CONFIG_MAPS}/a", [{"op": "test", "path": "/data/w", "value": "5"}], JSON_PATCH),
            patch(f"{CONFIG_MAPS}/a", {"data": {"v": "5"}}, STRATEGIC),
            patch(f"{CONFIG_MAPS}/a", {"dta": {}}),
            patch(f"{CONFIG_MAPS}/a", {"data": {}}, "text/plain"),
            patch(f"{CONFIG_MAPS}/a", config_map(), APPLY, "fieldValidation=Strict"),
            patch(f"{CONFIG_MAPS}/missing", {"data": {}}),
        ],
    )
    yield (
        "server-side apply",
        [
            apply(f"{CONFIG_MAPS}/a", config_map(data={"x": "1", "y": "2"})),
            apply(f"{CONFIG_MAPS}/a", config_map(data={"x": "1"})),
            apply(f"{CONFIG_MAPS}/a", config_map(data={"x": "2"}), "another"),
            apply(f"{CONFIG_MAPS}/a", config_map(data={"x": "2"}), "another", force=True),
            apply(f"{CONFIG_MAPS}/a", config_map("b")),
            apply(f"{CONFIG_MAPS}/a", config_map(dta={})),
        ],
    )
    spaced, compact = '{"tuning": {"urls": ["https://h/a?b=1&c=é"]}}', '{"tuning":{"urls":["https://h/a?b=1&c=é"]}}'
    as_go = '{"tuning":{"urls":["https://h/a?b=1\\u0026c=é"]}}'
    annotated = {"metadata": {"annotations": {"a": "b"}}}
    applied = {"apiVersion": "apps/v1", "kind": "ControllerRevision", **annotated, "revision": 1}
    for title, data in (("as Python writes it", spaced), ("without spaces", compact), ("as Go writes it", as_go)):
        yield (
            f"changes of a ControllerRevision, its data {title}",
            [
                create(REVISIONS, revision(data)),
                get(f"{REVISIONS}/a"),
                patch(f"{REVISIONS}/a", annotated),
                patch(f"{REVISIONS}/a", annotated, STRATEGIC),
                patch(
                    f"{REVISIONS}/a", [{"op": "add", "path": "/metadata/annotations", "value": {"c": "d"}}], JSON_PATCH
                ),
                apply(f"{REVISIONS}/a", applied),
                put(f"{REVISIONS}/a", revision(data)),
                put(f"{REVISIONS}/a", revision('{"tuning":{}}')),
                patch(f"{REVISIONS}/a", {"revision": 2}),
            ],
        )
    yield (
        "ControllerRevisions",
        [
            create(REVISIONS, revision("null")),
            create(REVISIONS, revision('"text"', "b")),
            create(REVISIONS, with_change(json.loads(revision("{}")), lambda it: it.pop("data"))),
            create(REVISIONS, revision("{}", "A")),
        ],
    )
    about_nothing = {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "namespace": "elsewhere"}
    yield (
        "Events",
        [
            *_made(EVENTS_V1, event()),
            get(f"{EVENTS}/a"),
            create(EVENTS_V1, event()),
            create(EVENTS_V1, event(metadata={"name": "b"}, note="x" * 1025)),
            create(EVENTS_V1, event(metadata={"name": "c"}, regarding=about_nothing)),
            create(EVENTS_V1, event(metadata={"name": "d"}, type="Bad", reason="", action="")),
            create(EVENTS_V1, event(metadata={"name": "e"}, reportingInstance="x" * 129)),
        ],
    )
    yield (
        "lists",
        [
            create(CONFIG_MAPS, config_map("a", metadata={"name": "a", "labels": {"x": "1"}})),
            create(CONFIG_MAPS, config_map("b", metadata={"name": "b", "labels": {"x": "2"}})),
            get(f"{CONFIG_MAPS}?labelSelector=x"),
            get(f"{CONFIG_MAPS}?labelSelector=x%3D2"),
            get(f"{CONFIG_MAPS}?fieldSelector=metadata.name%3Da"),
            get(f"{CONFIG_MAPS}?fieldSelector=data.x%3D1"),
            get(f"{CONFIG_MAPS}?labelSelector=x%20y"),
        ],
    )
    yield "who may do nothing", [
        replace(request, by_nobody=True)
        for request in (
            get(f"{CONFIG_MAPS}/a"), get(CONFIG_MAPS), get(f"{CONFIG_MAPS}?watch=1"), create(CONFIG_MAPS, config_map()),
            patch(f"{JOBS}/tune/status", {}), get("/api/v1/nodes"), create(EVENTS_V1, event()), get(f"{PODS}/a/log"),
            delete(f"{SECRETS}/a"),
        )
    ]  # fmt: skip
    restricted = {"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}}
    yield (
        "a restricted namespace",
        [
            patch(f"/api/v1/namespaces/{NAMESPACE}", restricted),
            tried(PODS, _pod()),
            tried(JOBS, job()),
        ],
    )
    yield (
        "a namespace that goes",
        [
            create(CONFIG_MAPS, config_map(metadata={"name": "a", "finalizers": ["tuner.test/stays"]})),
            delete(f"/api/v1/namespaces/{NAMESPACE}"),
            create(CONFIG_MAPS, config_map("b")),
            create(JOBS, job()),
            patch(f"{CONFIG_MAPS}/a", {"metadata": {"finalizers": None}}),
        ],
    )
    yield from _workspaces()
    yield from _ratcheting()


def _in_our_namespace(manifest: dict[str, Any]) -> None:
    manifest["metadata"]["namespace"] = NAMESPACE


def _generated(manifest: dict[str, Any]) -> None:
    manifest["metadata"] = {**manifest["metadata"], "generateName": f"{manifest['metadata'].pop('name')}-"}


def _made(path: str, manifest: dict[str, Any]) -> list[Request]:
    return [create(path, manifest), get(f"{path}/{manifest['metadata']['name']}")]


def _pod() -> dict[str, Any]:
    spec = pod_spec(job())
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": spec}


# ── our CRD ──────────────────────────────────────────────────────────────────────────────────────────────────────────


OUR_CRD = "@crd"  # in the file, for a body that is as long as all others


def our_crd() -> dict[str, Any]:
    """The Workspaces' CRD in another group."""
    crd = custom_resource_definition()
    crd["metadata"] = {"name": f"workspaces.{GROUP}"}
    crd["spec"]["group"] = GROUP
    for version in crd["spec"]["versions"]:
        del version["additionalPrinterColumns"]
    return crd


def workspace(path: str = "tuning.method", value: Any = "qlora") -> dict[str, Any]:
    written = changed(path, value)
    written["apiVersion"] = f"{GROUP}/v1beta1"
    written["metadata"] = {"name": "tickets", **written["metadata"]}
    written["metadata"].pop("namespace", None)
    return written


def _workspaces() -> Iterator[tuple[str, list[Request]]]:
    made = Request("POST", f"{CRDS}?{STRICT}", OUR_CRD)
    served = replace(get(WORKSPACES), until=200)
    mistakes = [
        tried(WORKSPACES, workspace(path, value))
        for path, value, _ in MISTAKES
        if not (path == "metadata.name" and value == "a" * 64)
    ]
    status = {"state": "Pending", "conditions": []}
    yield (
        "Workspaces",
        [
            made,
            served,
            tried(WORKSPACES, workspace("resource", {})),
            *mistakes,
            *_made(WORKSPACES, workspace()),
            patch(f"{WORKSPACES}/tickets", {"tuning": {"method": "lora"}}),
            patch(f"{WORKSPACES}/tickets", {"tuning": {"preset": {"name": "phi-4"}}}),
            patch(f"{WORKSPACES}/tickets", {"resource": {"instanceType": "other"}}),
            patch(f"{WORKSPACES}/tickets", {"tuning": {"input": {"urls": ["http://169.254.169.254/"]}}}),
            patch(f"{WORKSPACES}/tickets", {"tuning": {"output": {"image": "other.example/a:2"}}}),
            patch(f"{WORKSPACES}/tickets", {"status": status}),
            _apply_status(status),
            _apply_status({"state": "Running", "tuning": {"revision": 1, "unknown": 2}}),
            _apply_status({"state": "Running", "tuning": {"revision": 0}}),
            _apply_status({"state": "Running", "workerNodes": []}),
            patch(f"{WORKSPACES}/tickets", {"tuning": {"nothing": 1}}),
            delete(f"{WORKSPACES}/tickets"),
            delete(f"{CRDS}/workspaces.{GROUP}"),
        ],
    )


def _apply_status(status: dict[str, Any]) -> Request:
    body = {"apiVersion": f"{GROUP}/v1beta1", "kind": "Workspace", "metadata": {"name": "tickets"}, "status": status}
    return apply(f"{WORKSPACES}/tickets/status", body, force=True)


def tries(plural: str = "tries", **schema: Any) -> dict[str, Any]:
    """A CRD with one text, `a`, and a status."""
    properties = {
        "a": {"type": "string", **schema},
        "b": {"type": "string"},
        "status": {"type": "object", "properties": {"state": {"type": "string"}}},
    }
    kind = "Try" if plural == "tries" else "Cost"
    names = {"plural": plural, "singular": kind.lower(), "kind": kind, "listKind": f"{kind}List"}
    version = {
        "name": "v1",
        "served": True,
        "storage": True,
        "subresources": {"status": {}},
        "schema": {"openAPIV3Schema": {"type": "object", "properties": properties}},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{plural}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def _ratcheting() -> Iterator[tuple[str, list[Request]]]:
    """An object that was stored before there were rules."""
    stored = {"apiVersion": f"{GROUP}/v1", "kind": "Try", "metadata": {"name": "a"}, "a": "old", "b": "x"}
    rules = {"x-kubernetes-validations": [{"rule": "self != 'old'", "message": "is old"}]}
    later = {"spec": tries(maxLength=64, **rules)["spec"]}
    yield (
        "rules that came later",
        [
            create(CRDS, tries(maxLength=64)),
            replace(get(TRIES), until=200),
            create(TRIES, stored),
            patch(f"{CRDS}/tries.{GROUP}", later),
            replace(create(TRIES, {**stored, "metadata": {"name": "b"}}), until=422),
            patch(f"{TRIES}/a/status", {"status": {"state": "Running"}}),
            patch(f"{TRIES}/a", {"metadata": {"annotations": {"a": "b"}}}),
            patch(f"{TRIES}/a", {"b": "y"}),
            patch(f"{TRIES}/a", {"a": "new"}),
            patch(f"{TRIES}/a", {"a": "old"}),
            delete(f"{CRDS}/tries.{GROUP}"),
        ],
    )


# ── what rules cost ──────────────────────────────────────────────────────────────────────────────────────────────────

_WORDS = "[a-z]+_HERE|<[a-z ]*>"
_FIND, _ALL = f"self.find(r'{_WORDS}')", f"self.findAll(r'{_WORDS}')"
RULES = (
    "self != 'x'",
    f"self.matches(r'^{_WORDS}$')",
    "!self.matches(r'a') && (self.matches(r'b') || self.size() > 4)",
    f"{_FIND} == ''",
    f"{_FIND}.lowerAscii().substring(2) in ['a', 'b', 'c']",
    f"{_ALL}.size() > 1",
    f"{_ALL}.all(word, word != 'a')",
    "self.contains('://')",
    "self.lowerAscii() in ['lora', 'qlora']",
)
MESSAGES = (
    "'a' + self",
    f"'a ' + {_FIND} + ' b'",
    f"{_ALL}.join(' and ')",
    f"{_ALL}[0] + ' and ' + {_ALL}[1]",
    f"self.matches(r'a') ? ('x' + self) : (self.contains('b') ? {_FIND} : self.lowerAscii())",
    f"'\"' + {_FIND}.substring(1) + '\"'",
)
LENGTHS = (512, 8192, 1_000_000, 10_000_000)


def costs() -> Iterator[dict[str, Any]]:
    """Schemas of one text whose rules a server reckons up: accepted, or by how much too dear."""
    for length in LENGTHS:
        for holds in RULES:
            yield {"type": "string", "maxLength": length, "x-kubernetes-validations": [{"rule": holds, "message": "m"}]}
        for says in MESSAGES:
            rules = [{"rule": "self != 'x'", "message": "m", "messageExpression": says}]
            yield {"type": "string", "maxLength": length, "x-kubernetes-validations": rules}
    for length, most in ((8192, 32), (8192, 2000), (100_000, 32)):
        items = {
            "type": "string",
            "maxLength": length,
            "x-kubernetes-validations": [{"rule": RULES[1], "message": "m"}],
        }
        yield {"type": "array", "maxItems": most, "items": items}


# ── asking ───────────────────────────────────────────────────────────────────────────────────────────────────────────

_UID = re.compile(r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b")
_TIME = re.compile(r"\b\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z")
_VERSION = re.compile(r"(?<=ResourceVersion in record \()\d+")
# An object as Go has it, or with all that others have written.
_DUMP = re.compile(r'(Invalid value: )(?:\{"Volumes":.*\}|"\{.*\}")(: )', re.DOTALL)
_DROPPED = ("resourceVersion", "managedFields", "creationTimestamp", "deletionTimestamp", "uid")


def scrubbed(value: Any) -> Any:
    """An answer without what differs from one time to the next."""
    if isinstance(value, Mapping):
        if value.get("kind") == "CustomResourceDefinition":
            return {"kind": value["kind"]}
        kept = {name: scrubbed(each) for name, each in value.items() if name not in _DROPPED}
        if value.get("kind") in ("Namespace", "Job"):
            kept.pop("status", None)  # controllers write it whenever they come to it
        return kept
    if isinstance(value, list):
        items = [scrubbed(each) for each in value]
        return sorted(items, key=json.dumps) if items and isinstance(items[0], dict) and "reason" in items[0] else items
    if isinstance(value, str):
        plain = _DUMP.sub(r"\1…\2", _VERSION.sub("N", _TIME.sub("TIME", _UID.sub("UID", value))))
        return re.sub(r"^tune-\w{5}$", "tune-xxxxx", plain)
    return value


def bytes_of(step: Mapping[str, Any]) -> bytes | None:
    """The body of a request in the file, as it is sent."""
    body = step.get("body")
    return json.dumps(our_crd()).encode() if body == OUR_CRD else body and body.encode()


Send = Callable[[Mapping[str, Any]], tuple[int, Any, list[str]]]
"""A request as it is in the file → status, body, warnings."""


def answered(steps: Iterable[Mapping[str, Any]], send: Send) -> Iterator[dict[str, Any]]:
    """What is answered to one request after the other."""
    for step in steps:
        deadline = time.monotonic() + 30
        while True:
            status, body, warnings = send(step)
            if step.get("until") in (None, status) or time.monotonic() > deadline:
                break
            time.sleep(0.2)
        yield {"status": status, "body": scrubbed(body)} | ({"warnings": warnings} if warnings else {})


def too_dear(schema: Mapping[str, Any], send: Send) -> list[str]:
    """What a server says of the cost of a schema's rules; nothing where it takes them."""
    crd = tries("costs")
    crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["a"] = schema
    status, body, _ = send(tried(CRDS, crd).as_json())
    assert status in (201, 422), body
    causes = (body.get("details") or {}).get("causes") or ()
    return [
        f"{each['field'].partition('properties[a]')[2]}: {each['message'].partition(' (try')[0]}" for each in causes
    ]


def as_text(version: str, told: Iterable[Mapping[str, Any]], priced: Iterable[Mapping[str, Any]]) -> str:
    """JSON with a line for each request."""

    def line(value: Any) -> str:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"))

    cases = ",\n".join(
        f' {{"name":{line(case["name"])},"steps":[\n  ' + ",\n  ".join(map(line, case["steps"])) + "\n ]}"
        for case in told
    )
    costs = ",\n ".join(map(line, priced))
    return f'{{"server":{line(version)},"cases":[\n{cases}\n],"costs":[\n {costs}\n]}}\n'


def sender(api: Api, namespace: str = "default") -> Send:
    """What sends requests to a real server, with this namespace's name in them."""

    def send(step: Mapping[str, Any]) -> tuple[int, Any, list[str]]:
        headers = {
            "Accept": "application/json",
            "Content-Type": step.get("contentType", "application/json"),
            **api._authorization(),
            **({"Impersonate-User": NOBODY} if step.get("byNobody") else {}),
        }
        body = bytes_of(step)
        answer = api._pool.request(
            step["method"],
            api.server + step["path"].replace(NAMESPACE, namespace),
            body=body and body.replace(NAMESPACE.encode(), namespace.encode()),
            headers=headers,
            retries=False,
        )
        content = answer.data.decode()
        content = content.replace(namespace, NAMESPACE) if namespace != "default" else content
        warnings = re.findall(r'299 - "((?:[^"\\]|\\.)*)"', answer.headers.get("Warning", ""))
        try:
            return answer.status, json.loads(content), warnings
        except ValueError:
            return answer.status, content.strip(), warnings

    return send


def answers_of(api: Api, steps: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a real server answers to one request after the other, in a namespace made for them."""
    namespace = f"tuner-test-{uuid.uuid4().hex[:8]}"
    send = sender(api)
    send(create("/api/v1/namespaces", {"metadata": {"name": namespace}}).as_json())
    account = get(f"/api/v1/namespaces/{namespace}/serviceaccounts/default")
    list(answered([replace(account, until=200).as_json()], send))  # pods are refused before
    answers = list(answered(steps, sender(api, namespace)))
    send(delete(f"/api/v1/namespaces/{namespace}").as_json())
    return answers


def record(api: Api) -> str:
    """The recording of this API server, as it is to be in the file."""
    told = []
    for name, requests in cases():
        steps = [request.as_json() for request in requests]
        answers = answers_of(api, steps)
        told.append({"name": name, "steps": [{**step, "answer": it} for step, it in zip(steps, answers, strict=True)]})
    priced = [{"schema": schema, "says": too_dear(schema, sender(api))} for schema in costs()]
    return as_text(str(api.server_version()), told, priced)


def file_of(api: Api) -> Path:
    """Where the recording of this server's version is."""
    version = api.server_version()
    return FOLDER / f"kubernetes-{version.major}.{version.minor}.json"


def main() -> None:
    cluster = SpareCluster.read()
    if cluster is None:
        sys.exit("no cluster to spare: TUNER_TEST_CLUSTER")
    api = Api.from_config(env={"KUBECONFIG": cluster.kubeconfig})
    file = file_of(api)
    FOLDER.mkdir(exist_ok=True)
    file.write_text(record(api), encoding="utf-8")
    print(file, file.stat().st_size, "bytes", file=sys.stderr)


if __name__ == "__main__":
    main()
