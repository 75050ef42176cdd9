"""Jobs, Pods and Events as an API server shows them: plain dicts, as small as they can be and still be true."""

from collections.abc import Mapping, Sequence
from typing import Any

Object = dict[str, Any]

CREATED = "2026-01-01T00:00:00Z"


def make_job(
    name: str = "phi-3",
    *,
    failed: int = 0,
    active: int = 1,
    succeeded: int = 0,
    condition: tuple[str, str, str] | None = None,
    suspend: bool = False,
    labels: Mapping[str, str] | None = None,
    deleting: bool = False,
) -> Object:
    """`condition` is a type that is True, with its reason and message."""
    metadata: Object = {"name": name, "namespace": "team", "uid": f"uid-{name}", "labels": dict(labels or {})}
    metadata["creationTimestamp"] = CREATED
    if deleting:
        metadata["deletionTimestamp"] = CREATED
    status: Object = {"failed": failed, "active": active, "succeeded": succeeded}
    if condition:
        kind, reason, message = condition
        status["conditions"] = [{"type": kind, "status": "True", "reason": reason, "message": message}]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata,
        "spec": {"backoffLimit": 3, "suspend": suspend},
        "status": status,
    }


def make_pod_spec(workspace: Object, gpus: int = 1) -> Object:
    """Of the pod that a Workspace's Job makes: what decides where it goes."""
    resource = workspace["resource"]
    labels = dict(resource["labelSelector"]["matchLabels"])
    if instance_type := resource.get("instanceType"):
        labels["node.kubernetes.io/instance-type"] = instance_type
    expressions = [{"key": key, "operator": "In", "values": [value]} for key, value in labels.items()]
    terms = {"nodeSelectorTerms": [{"matchExpressions": expressions}]}
    return {
        "containers": [{"name": "phi-3", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}},
    }


def running() -> Object:
    return {"running": {"startedAt": CREATED}}


def waiting(reason: str, message: str = "") -> Object:
    return {"waiting": {"reason": reason, "message": message}}


def ended(exit_code: int, message: str = "", *, reason: str = "", at: str = CREATED) -> Object:
    return {
        "terminated": {
            "exitCode": exit_code,
            "message": message,
            "reason": reason or ("Error" if exit_code else "Completed"),
            "finishedAt": at,
        }
    }


INIT = ("preflight", "data-downloader", "puller", "pusher")


def make_pod(
    states: Mapping[str, Object] | None = None,
    *,
    name: str = "phi-3-a",
    job: str = "phi-3",
    phase: str | None = None,
    node: str | None = "gpu-1",
    created: str = CREATED,
    scheduled: tuple[str, str] | None = None,
    conditions: Sequence[Object] = (),
    reason: str = "",
    message: str = "",
    deleting: bool = False,
) -> Object:
    """`states` are by container; `scheduled` is why PodScheduled is False (reason, message)."""
    states = states or {}
    metadata: Object = {"name": name, "namespace": "team", "uid": f"uid-{name}", "creationTimestamp": created}
    metadata["labels"] = {"kaito.sh/workspace": job, "job-name": job, "batch.kubernetes.io/job-name": job}
    metadata["annotations"] = {"kubectl.kubernetes.io/default-container": job}
    if deleting:
        metadata["deletionTimestamp"] = CREATED
    conditions = list(conditions)
    if scheduled:
        node = None
        condition = {"type": "PodScheduled", "status": "False", "reason": scheduled[0], "message": scheduled[1]}
        conditions.append(condition)
    statuses = [
        {"name": container, "image": "tuner:1", "ready": "running" in state, "state": state}
        for container, state in states.items()
    ]
    if phase is None:
        phase = "Running" if any("waiting" not in state for state in states.values()) else "Pending"
    status: Object = {
        "phase": phase,
        "conditions": conditions,
        "initContainerStatuses": [each for each in statuses if each["name"] in INIT],
        "containerStatuses": [each for each in statuses if each["name"] not in INIT],
    }
    if reason:
        status |= {"reason": reason, "message": message}
    spec: Object = {"containers": [{"name": job}]}
    if node:
        spec["nodeName"] = node
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec, "status": status}


def make_event(kind: str, name: str, reason: str, note: str, at: str = CREATED) -> Object:
    return {
        "metadata": {"name": f"{name}.{reason}", "creationTimestamp": at},
        "regarding": {"kind": kind, "name": name},
        "reason": reason,
        "note": note,
        "eventTime": at,
    }


def make_workspace(
    name: str = "phi-3",
    *,
    config: str | None = None,
    instance_type: str | None = None,
    preset: str = "phi-3-mini-4k-instruct",
    annotations: Mapping[str, str] | None = None,
    status: Object | None = None,
    generation: int = 1,
) -> Object:
    tuning: Object = {
        "preset": {"name": preset},
        "method": "qlora",
        "input": {"urls": ["https://example.com/a.parquet"]},
        "output": {"image": "example.com/a:1", "imagePushSecret": "push"},
    }
    if config:
        tuning["config"] = config
    resource: Object = {"labelSelector": {"matchLabels": {"apps": "phi-3"}}}
    if instance_type:
        resource["instanceType"] = instance_type
    workspace: Object = {
        "apiVersion": "kaito.sh/v1beta1",
        "kind": "Workspace",
        "metadata": {
            "name": name,
            "namespace": "team",
            "uid": f"uid-workspace-{name}",
            "resourceVersion": "1",
            "generation": generation,
            "annotations": dict(annotations or {}),
        },
        "resource": resource,
        "tuning": tuning,
    }
    if status is not None:
        workspace["status"] = status
    return workspace


def make_config_map(name: str = "config", text: str = "training_config: {}\n", version: str = "1") -> Object:
    metadata = {"name": name, "namespace": "team", "resourceVersion": version}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"training_config.yaml": text}}


def make_node(
    name: str = "gpu-1",
    *,
    labels: Mapping[str, str] | None = None,
    ready: bool = True,
    gpus: int = 1,
    unschedulable: bool = False,
) -> Object:
    return {
        "metadata": {"name": name, "labels": {"apps": "phi-3"} if labels is None else dict(labels)},
        "spec": {"unschedulable": True} if unschedulable else {},
        "status": {
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
            "allocatable": {"cpu": "8", **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
        },
    }
