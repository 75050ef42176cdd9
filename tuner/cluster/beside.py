"""The Jobs beside a run's: one that checks it without a GPU, one that pushes what it has left. Each is made of its Job.

What decides whether a pod may run and what it can reach is the Job's; where it runs and in which queue is not. Pure.
"""

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from tuner import pod
from tuner.cluster import templates
from tuner.cluster.job_options import DIGEST_ANNOTATION, QUEUE_PREFIX
from tuner.cluster.templates import Manifest
from tuner.errors import ConfigError
from tuner.request import RESULTS_VOLUME_ANNOTATION
from tuner.workspace import LABEL_CHARACTERS

CHECK_DATA_BYTES = 256 * 2**20  # larger data are left to the run itself


def render_check_job(job: Mapping[str, Any], *, max_data_bytes: int = CHECK_DATA_BYTES) -> Manifest:
    """The Job that asks on a CPU what would stop this one: `preflight`, then data and rows where they are not large."""
    preflight = deepcopy(templates.container(job, pod.PREFLIGHT))
    fetch = deepcopy(_data_container_of(job))
    for container in (preflight, fetch):
        templates.unmount(container, pod.RESULTS_VOLUME)
    check = templates.load_template("job-check.yaml")
    main = templates.container(check, pod.CHECK)
    main["image"], main["volumeMounts"] = fetch["image"], fetch["volumeMounts"]
    main["args"] = ["stage", "check", "--pod", "--max-data", str(max_data_bytes)]
    for variable in fetch["env"]:
        templates.put(main["env"], variable)
    templates.pod_spec(check)["initContainers"] = [preflight]
    sized = templates.pod_spec(check)["volumes"]
    own = {pod.WEIGHTS_VOLUME, pod.TMP_VOLUME}  # the tokenizer is all that is fetched of a model
    if "emptyDir" in templates.volume(job, pod.DATA_VOLUME):
        own.add(pod.DATA_VOLUME)
    used = {mount["name"] for container in (preflight, main) for mount in container["volumeMounts"]}
    templates.pod_spec(check)["volumes"] = [
        next((each for each in sized if each["name"] in own and each["name"] == volume["name"]), deepcopy(volume))
        for volume in templates.pod_spec(job)["volumes"]
        if volume["name"] in used
    ]
    return _made_of(job, check, pod.CHECK_JOB)


def render_retry_push(job: Mapping[str, Any]) -> Manifest:
    """The Job that pushes the adapter which this one left on its claim.

    Raises ConfigError where it has no pusher, or nothing outlives its pod.
    """
    name = job["metadata"]["name"]
    if not templates.has_container(job, pod.PUSHER):
        raise ConfigError(f"Job {name!r} pushes nothing: its adapter goes to a volume")
    results = templates.volume(job, pod.RESULTS_VOLUME)
    if "persistentVolumeClaim" not in results:
        raise ConfigError(
            f"Job {name!r} kept its adapter in the pod, which is gone",
            hint=f"with --results-volume CLAIM, or the annotation {RESULTS_VOLUME_ANNOTATION}, the next run keeps it",
        )
    retry = templates.load_template("job-retry-push.yaml")
    pusher = deepcopy(templates.container(job, pod.PUSHER))
    pusher["args"] = ["stage", "push", "--pod"]
    pusher.pop("restartPolicy", None)  # a sidecar no more: here its end is the Job's
    templates.unmount(pusher, pod.RUN_VOLUME)
    templates.pod_spec(retry)["containers"] = [pusher]
    used = {mount["name"] for mount in pusher["volumeMounts"]}
    templates.pod_spec(retry)["volumes"] = [
        deepcopy(volume) for volume in templates.pod_spec(job)["volumes"] if volume["name"] in used
    ]
    return _made_of(job, retry, pod.PUSH_JOB)


# Of a pod's fields those that decide whether it may run, with whose rights and what it can reach, not where.
_POD_FIELDS = (
    *("serviceAccountName", "imagePullSecrets", "securityContext", "priorityClassName", "schedulerName"),
    *("hostAliases", "dnsConfig", "dnsPolicy"),
)


def _data_container_of(job: Mapping[str, Any]) -> Manifest:
    name = pod.PULLER if templates.has_container(job, pod.PULLER) else pod.DATA_DOWNLOADER
    return templates.container(job, name)


def _made_of(job: Mapping[str, Any], made: Manifest, end: str) -> Manifest:
    """`made` with the names, labels, owner and identity of `job`."""
    metadata, template = job["metadata"], job["spec"]["template"]
    made["metadata"]["name"] = helper_name(metadata["name"], end)
    for key in ("namespace", "ownerReferences"):
        if key in metadata:
            made["metadata"][key] = deepcopy(metadata[key])
    component = {"app.kubernetes.io/component": end.strip("-")}
    made["metadata"]["labels"] = {**_ours(metadata["labels"]), **component}
    made["metadata"]["annotations"] = _ours(metadata.get("annotations", {}))
    templates.pod_template(made)["metadata"]["labels"] = {**_ours(template["metadata"]["labels"]), **component}
    annotations = template["metadata"].get("annotations", {})
    templates.annotate(
        templates.pod_template(made), {key: annotations[key] for key in (DIGEST_ANNOTATION,) if key in annotations}
    )
    for key in _POD_FIELDS:
        if key in template["spec"]:
            templates.pod_spec(made)[key] = deepcopy(template["spec"][key])
    return made


def _ours(labels: Mapping[str, str]) -> dict[str, str]:
    """Not those of the queue: a check costs no quota; nor what the Job controller adds to a live Job."""
    prefixes = (QUEUE_PREFIX, "batch.kubernetes.io/", "kubectl.kubernetes.io/", "deployment.kubernetes.io/")
    return {
        key: value
        for key, value in labels.items()
        if not key.startswith(prefixes) and key not in ("controller-uid", "job-name")
    }


def helper_name(name: str, end: str) -> str:
    """Of a Job beside that of Workspace `name`; `end` is pod.CHECK_JOB or pod.PUSH_JOB.

    A Job's name has at most 63 characters: a long one's end becomes a hash, and a third dash, before which no name can
    end, keeps these apart from the others.
    """
    if len(name) + len(end) <= LABEL_CHARACTERS:
        return name + end
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: LABEL_CHARACTERS - len(end) - 14]}-{digest}-{end}"
