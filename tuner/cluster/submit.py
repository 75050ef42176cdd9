"""The objects of a run → a Job in the cluster: looked for, checked beforehand, created in order, each step once.

    what is there ── what is missing ── dry run of every object ── ConfigMap, Secrets ── check Job ── Job ── owners

Nothing is created before all that the server can say against it has been asked. Doing it again does nothing.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import zip_longest
from typing import Any, Literal

from tuner import pod
from tuner.cluster.api import (
    CLAIM,
    CONFIG_MAP,
    JOB,
    NODE,
    POD,
    SECRET,
    SERVICE_ACCOUNT,
    Api,
    Object,
    Resource,
    refuse_old_server,
    resource_of,
)
from tuner.cluster.api_errors import (
    AlreadyExistsError,
    BadRequestError,
    ConflictError,
    ForbiddenError,
    InvalidError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from tuner.cluster.beside import render_check_job, render_retry_push
from tuner.cluster.checks import quantity
from tuner.cluster.follow import (
    POLL_S,
    JobFailedError,
    Status,
    describe,
    follow_run,
    keeps_results,
    load_run,
    refuse_missing_namespace,
)
from tuner.cluster.job import JobObjects
from tuner.cluster.job_options import DIGEST_ANNOTATION, INSTANCE_TYPE_LABEL
from tuner.cluster.nodes import fitting_nodes, required_labels
from tuner.cluster.observe import QUEUE_LABEL
from tuner.errors import ConfigError, InputMissingError
from tuner.request import HF_TOKEN
from tuner.runspec import Reporter
from tuner.training_settings import name_in_yaml
from tuner.workspace import ConfigMap, WorkspaceFile

_GONE_WITHIN_S = 180.0
_DIFFERENCES = 8
_TRIES = 3


# ── before rendering: what only the cluster knows ────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Nodes:
    """The cluster's nodes; `unread` says why they could not be looked at."""

    items: tuple[Object, ...] = ()
    unread: str | None = None


def read_nodes(api: Api) -> Nodes:
    """Those there are. Listing nodes is often forbidden: then it is said, and a fitting one is assumed."""
    try:
        return Nodes(api.list(NODE).items)
    except ForbiddenError as error:
        return Nodes(unread=f"nodes are not readable, so whether one fits is not known; {error.hint}")


def with_config_map(api: Api, file: WorkspaceFile) -> WorkspaceFile:
    """The file with the ConfigMap that `tuning.config` names, read from the cluster when the file has it not.

    Raises InputMissingError when neither has it.
    """
    name = file.workspace.tuning.config if file.workspace.tuning else None
    if not name or name in file.config_maps:
        return file
    found = api.find(CONFIG_MAP, name)
    if found is None:
        raise InputMissingError(
            f"tuning.config: ConfigMap {name!r} is neither in the Workspace's file nor in namespace {api.namespace}",
            hint="put it into the file as another YAML document, or give --config FILE",
        )
    data = {str(key): str(value) for key, value in (found.get("data") or {}).items()}
    read = ConfigMap(name, data, file=f"configmap/{name}", first_lines=dict.fromkeys(data, 1))
    return replace(file, config_maps={**file.config_maps, name: read})


# ── what is there already ────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Submitted:
    """What became of a submission. `created`: the Job is new. `status`: of the one that was there already."""

    name: str
    namespace: str
    outcome: Literal["created", "there already", "dry run"]
    status: Status | None = None


def differences(objects: JobObjects, live: Object, live_run: Mapping[str, Any] | None, *, job: Object) -> list[str]:
    """What another submission would change of the Job that is there: settings of the run first, then of the Job.

    `live_run` is the RunSpec in its ConfigMap. `job` is the Job that is wanted, as it is or as a server would make it.
    """
    wanted_run = json.loads(objects.config_map["data"][pod.RUN_JSON])
    found = list(_changed(wanted_run, live_run, "", whole=True)) if live_run is not None else []
    if live_run is None and _digest(job) != _digest(live):
        found.append("the run's digest")
    found += _changed(_comparable(job), _comparable(live), "")
    return [_in_words(each) for each in found if not each.startswith("training.origins.")]


def _digest(job: Mapping[str, Any]) -> str | None:
    return (job["metadata"].get("annotations") or {}).get(DIGEST_ANNOTATION)


def _comparable(job: Mapping[str, Any]) -> Object:
    """A Job's labels and spec without what may differ between two submissions of the same run.

    ConfigMap and Secret are called after their content: the one is compared by itself, the other changes with each new
    signature. Whether labels are required or preferred depends on the nodes there are at that moment. A queue decides
    when a Job runs and on which nodes; its controller counts pods by a selector.
    """
    spec: Object = json.loads(json.dumps(job["spec"]))
    template, inner = spec["template"]["metadata"], spec["template"]["spec"]
    for volume in inner.get("volumes", ()):
        if volume["name"] in (pod.CONFIG_VOLUME, pod.SOURCES_VOLUME):
            for key in ("configMap", "secret"):
                volume.pop(key, None)
    (template.get("annotations") or {}).pop(DIGEST_ANNOTATION, None)
    labels = job["metadata"].get("labels") or {}
    spec["instanceType"] = list(required_labels(inner).get(INSTANCE_TYPE_LABEL, ()))
    inner.pop("affinity", None)
    if QUEUE_LABEL in labels:
        inner.pop("tolerations", None)
    for key in ("selector", "suspend"):
        spec.pop(key, None)
    template["labels"] = {key: text for key, text in (template.get("labels") or {}).items() if not _is_servers(key)}
    return {"metadata": {"labels": labels}, "spec": spec}


def _is_servers(label: str) -> bool:
    """What a Job's pods are called by, which the server writes into their template."""
    return label.rpartition("/")[2] in ("controller-uid", "job-name")


# Amounts, which a server writes in its own way: 0.5 is 500m.
_AMOUNT = re.compile(r"\.resources\.(limits|requests)\.|\.sizeLimit$")


def _changed(wanted: Any, there: Any, path: str, *, whole: bool = False) -> Iterator[str]:
    """`path: old → new` for each leaf of `wanted` that is not so in `there`, and each item that is only there.

    A server drops what is empty and fills in what is not written, so a field that is only there is no difference,
    unless `there` is `whole`, as we wrote it.
    """
    if isinstance(wanted, Mapping):
        inside = there if isinstance(there, Mapping) else {}
        for key in [*wanted, *(key for key in inside if whole and key not in wanted)]:
            yield from _changed(wanted.get(key), inside.get(key), f"{path}.{key}" if path else str(key), whole=whole)
    elif isinstance(wanted, list) and isinstance(there, list):
        for key, mine, other in _pairs(wanted, there):
            if mine is None or other is None:
                yield f"{path}[{key}]: {' → '.join(_shown(other, mine))}"
            else:
                yield from _changed(mine, other, f"{path}[{key}]", whole=whole)
    elif wanted != there and (wanted or there) and not (_AMOUNT.search(path) and _is_as_much(wanted, there)):
        yield f"{path}: {' → '.join(_shown(there, wanted))}"


def _is_as_much(one: Any, other: Any) -> bool:
    return quantity(one) is not None and quantity(one) == quantity(other)


def _pairs(wanted: Sequence[Any], there: Sequence[Any]) -> Iterator[tuple[str, Any, Any]]:
    """The items of two lists that are about the same thing: by their names, where they have such, else by place."""
    names = [[each.get("name") if isinstance(each, Mapping) else None for each in items] for items in (wanted, there)]
    if all(None not in own and len(set(own)) == len(own) for own in names):
        mine, other = (dict(zip(own, items, strict=True)) for own, items in zip(names, (wanted, there), strict=True))
        yield from ((str(name), mine.get(name), other.get(name)) for name in mine | other)
        return
    for index, pair in enumerate(zip_longest(wanted, there)):
        yield str(index), *pair


_SHOWN_CHARACTERS = 60


def _shown(*values: Any) -> list[str]:
    """Each value as text; of long ones the part where they begin to differ."""
    texts = ["nothing" if each is None else each if isinstance(each, str) else json.dumps(each) for each in values]
    if max(map(len, texts)) <= _SHOWN_CHARACTERS:
        return texts
    alike = next((at for at, pair in enumerate(zip(*texts, strict=False)) if len({*pair}) > 1), 0)
    start = max(0, alike - _SHOWN_CHARACTERS // 3)
    parts = [text[start : start + _SHOWN_CHARACTERS] for text in texts]
    return [
        f"{'…' if start else ''}{part}{'…' if start + len(part) < len(text) else ''}"
        for part, text in zip(parts, texts, strict=True)
    ]


def _in_words(difference: str) -> str:
    """`training.lora.r` is LoraConfig.r to whoever wrote it."""
    if difference.startswith("training."):
        return name_in_yaml(difference.removeprefix("training.")) or difference
    return difference.removeprefix("spec.template.spec.")


def _live_run(api: Api, live: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The RunSpec of a Job that is there; None when it is gone or not ours."""
    volumes = live["spec"]["template"]["spec"].get("volumes") or ()
    name = next((each.get("configMap", {}).get("name") for each in volumes if each["name"] == pod.CONFIG_VOLUME), None)
    config_map = api.find(CONFIG_MAP, name) if name else None
    try:
        run = json.loads((config_map or {}).get("data", {}).get(pod.RUN_JSON, ""))
    except ValueError:
        return None
    return run if isinstance(run, dict) else None


def _as_made(api: Api, job: Object) -> Object | None:
    """The Job as the server would make it now, webhooks included; None where it would not."""
    metadata = {key: value for key, value in job["metadata"].items() if key != "name"}
    metadata["generateName"] = f"{job['metadata']['name'][:40]}-"
    try:
        return api.create({**job, "metadata": metadata}, dry_run=True)
    except (RefusedError, ForbiddenError, BadRequestError, InvalidError):
        return None


def _there_already(api: Api, objects: JobObjects, live: Object) -> Submitted:
    name = str(live["metadata"]["name"])
    if "deletionTimestamp" in live["metadata"]:
        raise ConfigError(f"Job {name} is still being deleted", hint="wait until it is gone, then submit again")
    live_run = _live_run(api, live)
    changed = differences(objects, live, live_run, job=objects.job)
    if changed and (made := _as_made(api, objects.job)):
        changed = differences(objects, live, live_run, job=made)
    if changed:
        more = f" and {len(changed) - _DIFFERENCES} more" if len(changed) > _DIFFERENCES else ""
        raise ConfigError(
            f"Job {name} is there already, of another run: {'; '.join(changed[:_DIFFERENCES])}{more}",
            hint=f"tuner delete {name} first, or give the Workspace another metadata.name",
        )
    status = describe(load_run(api, name), datetime.now(UTC))
    return Submitted(name, api.namespace, "there already", status)


# ── what is missing ──────────────────────────────────────────────────────────────────────────────────────────────────


def missing_things(api: Api, objects: JobObjects) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the pod would wait for in vain, as sentences; and what could not be looked at."""
    spec = objects.job["spec"]["template"]["spec"]
    made = {(each["kind"], each["metadata"]["name"]) for each in objects.objects}
    missing: list[str] = []
    unread: dict[str, str] = {}
    for resource, name, purpose in _named(spec):
        if (resource.kind, name) in made:
            continue
        try:
            found = api.find(resource, name)
        except ForbiddenError as error:
            unread[resource.plural] = (
                f"{resource.plural} are not readable: whether {name} is there shows in the pod; {error.hint}"
            )
            continue
        if found is None:
            missing.append(f"{resource.kind} {name}{purpose}")
        elif resource is SECRET and (fault := _secret_fault(found, purpose)):
            missing.append(fault)
    return tuple(missing), tuple(unread.values())


def _named(spec: Mapping[str, Any]) -> Iterator[tuple[Resource, str, str]]:
    """The objects of the namespace that a pod cannot start without, each once."""
    seen: set[tuple[str, str]] = set()

    def once(resource: Resource, name: str | None, purpose: str) -> Iterator[tuple[Resource, str, str]]:
        if name and (resource.plural, name) not in seen:
            seen.add((resource.plural, name))
            yield resource, name, purpose

    for volume in spec.get("volumes") or ():
        purpose = " (tuning.output.imagePushSecret)" if volume["name"] == pod.PUSH_SECRET_VOLUME else ""
        if volume["name"].startswith(f"{pod.PUSH_SECRET_VOLUME}-"):
            purpose = " (imagePullSecrets)"
        yield from once(SECRET, (volume.get("secret") or {}).get("secretName"), purpose)
        for source in (volume.get("projected") or {}).get("sources") or ():
            yield from once(SECRET, (source.get("secret") or {}).get("name"), purpose)
        yield from once(CLAIM, (volume.get("persistentVolumeClaim") or {}).get("claimName"), f" ({volume['name']})")
        if volume["name"] != pod.CONFIG_VOLUME:
            yield from once(CONFIG_MAP, (volume.get("configMap") or {}).get("name"), f" ({volume['name']})")
    for container in (*(spec.get("initContainers") or ()), *spec["containers"]):
        for variable in container.get("env") or ():
            reference = (variable.get("valueFrom") or {}).get("secretKeyRef") or {}
            purpose = " (presetOptions.modelAccessSecret)" if variable["name"] == HF_TOKEN else ""
            yield from once(SECRET, reference.get("name"), purpose)
    if (account := spec.get("serviceAccountName")) and account != "default":
        yield from once(SERVICE_ACCOUNT, account, " (--service-account)")


def _secret_fault(secret: Mapping[str, Any], purpose: str) -> str | None:
    """A Secret without the key that is read of it."""
    keys = set(secret.get("data") or {})
    needed = {
        " (presetOptions.modelAccessSecret)": (HF_TOKEN,),
        " (tuning.output.imagePushSecret)": pod.DOCKER_CONFIG_KEYS,
    }
    wanted = needed.get(purpose)
    if wanted is None or keys & set(wanted):
        return None
    name, has = secret["metadata"]["name"], ", ".join(sorted(keys)) or "nothing"
    return f"{' or '.join(wanted)} in Secret {name}{purpose}, which has {has}"


# ── submitting ───────────────────────────────────────────────────────────────────────────────────────────────────────


def submit(
    api: Api,
    objects: JobObjects,
    reporter: Reporter,
    *,
    check: bool = False,
    dry_run: bool = False,
    poll_s: float = POLL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> Submitted:
    """Create the objects of a run; the Job only after its check Job, where `check` asks for one.

    Raises ConfigError for a Job of that name of another run, InputMissingError for what is missing, JobFailedError for
    what the check Job found, ApiError for what the server refuses. Until the dry run is through nothing is created.
    """
    name = str(objects.job["metadata"]["name"])
    live = api.find(JOB, name)
    if live is not None:
        return _there_already(api, objects, live)
    refuse_old_server(api)
    refuse_missing_namespace(api)  # without one nothing else is worth a look
    missing, unread = missing_things(api, objects)
    for line in unread:
        reporter.warn(line)
    if missing:
        raise InputMissingError(
            f"namespace {api.namespace} has no {', no '.join(missing)}", hint=_missing_hint(missing, api.namespace)
        )
    check_job = render_check_job(objects.job) if check else None
    for manifest in (*objects.objects, *([check_job] if check_job else ())):
        try:
            api.create(manifest, dry_run=True)
        except AlreadyExistsError:
            if manifest["kind"] == "Job" and manifest is objects.job:
                raise  # it came between our look and now
    if dry_run:
        return Submitted(name, api.namespace, "dry run")
    for manifest in objects.objects[:-1]:
        if not _create(api, manifest)[1] and manifest["kind"] == "Secret" and not _is_ours(manifest, name):
            reporter.note(f"Secret {manifest['metadata']['name']} is there already and is left as it is")
    if check_job:
        _check_first(api, objects, check_job, reporter, poll_s, sleep)
    made, is_new = _create(api, objects.job)
    if not is_new and differences(objects, made, _live_run(api, made), job=objects.job):
        raise ConfigError(f"Job {name} was created by somebody else meanwhile", hint="submit again to see what differs")
    for manifest in objects.objects[:-1]:
        if _is_ours(manifest, name):
            _give_owner(api, manifest, made, reporter)
    if check_job:
        _delete_quietly(api, str(check_job["metadata"]["name"]))
    return Submitted(name, api.namespace, "created")


def _create(api: Api, manifest: Mapping[str, Any]) -> tuple[Object, bool]:
    """The object, and whether it is new. When the answer to a create was lost, it is looked for before another try."""
    resource, name = resource_of(manifest), str(manifest["metadata"]["name"])
    for attempt in range(_TRIES):
        try:
            return api.create(manifest), True
        except AlreadyExistsError:
            if attempt == 0:
                return _there(api, resource, name, manifest), False
            return _there(api, resource, name, manifest), True  # it was ours, whose answer was lost
        except UnavailableError as error:
            if error.not_sent or attempt == _TRIES - 1:
                raise
    raise AssertionError("the last try returns or raises")


def _there(api: Api, resource: Resource, name: str, manifest: Mapping[str, Any]) -> Object:
    """What is there already; what may not be read is taken to be as we would have made it."""
    try:
        return api.get(resource, name)
    except ForbiddenError:
        return dict(manifest)


def _missing_hint(missing: Sequence[str], namespace: str) -> str:
    name = re.search(r"Secret (\S+)", " ".join(missing))
    called = name[1] if name else "NAME"
    if any("imagePushSecret" in each or "imagePullSecrets" in each for each in missing):
        server = "--docker-server … --docker-username … --docker-password …"
        return f"kubectl create secret docker-registry {called} -n {namespace} {server}"
    if any("modelAccessSecret" in each for each in missing):
        return f"kubectl create secret generic {called} -n {namespace} --from-literal {HF_TOKEN}=hf_…"
    return f"--namespace? These names were looked for in {namespace}"


def _is_ours(manifest: Mapping[str, Any], name: str) -> bool:
    """Called by its content and of this run alone; a Secret that stood in the Workspace's file is the user's."""
    return manifest["kind"] == "ConfigMap" or str(manifest["metadata"]["name"]).startswith(f"{name}-sources-")


def _give_owner(api: Api, manifest: Mapping[str, Any], job: Mapping[str, Any], reporter: Reporter) -> None:
    """Deleting the Job takes it along. One left by an earlier Job may be on its way out: then it is made again."""
    metadata = job["metadata"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
    resource, name = resource_of(manifest), str(manifest["metadata"]["name"])
    owned = {**manifest, "metadata": {**manifest["metadata"], "ownerReferences": [owner]}}
    for _ in range(5):
        try:
            api.patch(resource, name, {"metadata": {"ownerReferences": [owner]}})
        except ForbiddenError as error:
            reporter.note(f"{manifest['kind']} {name} will stay when the Job is deleted: {error.message}; {error.hint}")
            return
        except NotFoundError:
            api.create_once(owned)
            continue
        except ConflictError:
            continue
        return


def _check_first(
    api: Api,
    objects: JobObjects,
    check_job: Object,
    reporter: Reporter,
    poll_s: float,
    sleep: Callable[[float], None],
) -> None:
    """Run the check Job to its end; raises JobFailedError with what it found, and leaves it there to be read."""
    name = str(check_job["metadata"]["name"])
    old = api.find(JOB, name)
    if old is not None:
        api.delete(JOB, name, propagation="Foreground", uid=old["metadata"]["uid"])
        _wait_until_gone(api, JOB, name, poll_s, sleep)
    made = api.create(check_job)
    for manifest in objects.objects[:-1]:
        if _is_ours(manifest, str(objects.job["metadata"]["name"])):
            _give_owner(api, manifest, made, reporter)
    reporter.note(f"checking first, without a GPU: Job {name}; whoever leaves before its end has submitted nothing")
    try:
        follow_run(api, name, reporter, poll_s=poll_s, sleep=sleep)
    except JobFailedError as error:
        raise JobFailedError(
            f"the check found: {error.message.removeprefix(f'{name}: ')}; no GPU was asked for",
            error.exit_code,
            hint=f"mend it and submit again; tuner logs {name} has all of it",
        ) from error


def _wait_until_gone(api: Api, resource: Resource, name: str, poll_s: float, sleep: Callable[[float], None]) -> None:
    ends_at = time.monotonic() + _GONE_WITHIN_S
    while api.find(resource, name) is not None:
        if time.monotonic() > ends_at:
            raise ConfigError(
                f"{resource.kind} {name} is still being deleted", hint=f"kubectl describe {resource.plural} {name}"
            )
        sleep(poll_s)


def _delete_quietly(api: Api, name: str) -> bool:
    """Whether there was such a Job. It goes with its pods."""
    try:
        api.delete(JOB, name, propagation="Background")
    except NotFoundError:
        return False
    return True


# ── ending a run ─────────────────────────────────────────────────────────────────────────────────────────────────────


def cancel(
    api: Api,
    name: str,
    reporter: Reporter,
    *,
    poll_s: float = POLL_S,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Stop a run with a checkpoint; a sentence on how, and how to go on.

    With a volume for results the Job is suspended: its pod gets SIGTERM and the trainer its grace period for a
    checkpoint, which the resumed Job goes on from. Without one nothing would be left to go on from, and a queue would
    only start it again: the Job is deleted.
    """
    snapshot = load_run(api, name, progress=False)
    view, job = snapshot.view, snapshot.job
    if view.phase in ("succeeded", "failed"):
        raise ConfigError(f"Job {name} has {view.phase} already: there is nothing to stop", hint=f"tuner delete {name}")
    _refuse_owned(job)
    queue = (job["metadata"].get("labels") or {}).get("kueue.x-k8s.io/queue-name")
    if keeps_results(job) and not queue:
        api.patch(JOB, name, {"spec": {"suspend": True}})
        _wait_for_pods(api, name, job, reporter, poll_s, sleep)
        resume = f'kubectl patch job {name} -n {api.namespace} --type merge -p \'{{"spec":{{"suspend":false}}}}\''
        return f"suspended {name}: its checkpoint is on the results volume; to go on: {resume}"
    why = f"the queue {queue} would start it again" if queue else "without --results-volume nothing outlives its pod"
    api.delete(JOB, name, propagation="Foreground", uid=job["metadata"]["uid"])
    _wait_for_pods(api, name, job, reporter, poll_s, sleep)
    kept = "; its checkpoint is on the results volume, and submitting it again goes on" if keeps_results(job) else ""
    return f"deleted {name}, not suspended, because {why}{kept}"


def _wait_for_pods(
    api: Api, name: str, job: Mapping[str, Any], reporter: Reporter, poll_s: float, sleep: Callable[[float], None]
) -> None:
    grace_s = int(job["spec"]["template"]["spec"].get("terminationGracePeriodSeconds") or 30)
    selector = f"batch.kubernetes.io/job-name={name}"

    def running() -> list[Object]:
        pods = api.list(POD, label_selector=selector).items
        return [each for each in pods if each["status"].get("phase") in ("Pending", "Running")]

    if not running():
        return
    reporter.note(f"stopping: the step in flight and a checkpoint, up to {grace_s} s")
    ends_at = time.monotonic() + grace_s + 30
    while running():
        if time.monotonic() > ends_at:
            reporter.warn("its pod is still there: is its node reachable?")
            return
        sleep(poll_s)


def _refuse_owned(job: Mapping[str, Any]) -> None:
    """A Job of the controller's would be made again."""
    for owner in job["metadata"].get("ownerReferences") or ():
        if owner.get("kind") == "Workspace" and owner.get("controller"):
            raise ConfigError(
                f"Job {job['metadata']['name']} belongs to Workspace {owner['name']}, whose controller makes it again",
                hint=f"kubectl delete workspace {owner['name']}",
            )


def delete_run(api: Api, name: str) -> tuple[str, ...]:
    """Delete a run's Jobs and what was made for it; what was deleted. Volumes and the user's own Secrets stay.

    Raises InputMissingError when there is nothing of it.
    """
    from tuner.cluster.beside import helper_name
    from tuner.cluster.job_options import WORKSPACE_LABEL

    job = api.find(JOB, name)
    gone: list[str] = []
    if job is not None:
        _refuse_owned(job)
        api.delete(JOB, name, propagation="Background", uid=job["metadata"]["uid"])
        gone.append(f"Job {name}")
    for end in (pod.CHECK_JOB, pod.PUSH_JOB):
        helper = helper_name(name, end)
        if _delete_quietly(api, helper):
            gone.append(f"Job {helper}")
    # Those that kubectl applied have no owner that would take them along.
    selector = f"{WORKSPACE_LABEL}={name},app.kubernetes.io/managed-by=tuner"
    leftovers: list[tuple[Resource, str]] = [
        (CONFIG_MAP, str(each["metadata"]["name"])) for each in api.list(CONFIG_MAP, label_selector=selector).items
    ]
    volumes = job["spec"]["template"]["spec"].get("volumes") or () if job else ()
    leftovers += [
        (SECRET, volume["secret"]["secretName"])
        for volume in volumes
        if volume.get("secret", {}).get("secretName", "").startswith(f"{name}-sources-")
    ]
    for resource, called in leftovers:
        try:
            api.delete(resource, called)
        except NotFoundError:
            continue  # its owner has taken it along
        except ForbiddenError as error:
            gone.append(f"not {resource.kind} {called}: {error.message}")
            continue
        gone.append(f"{resource.kind} {called}")
    if not gone:
        raise InputMissingError(f"there is nothing of a run {name} in namespace {api.namespace}", hint="--namespace?")
    return tuple(gone)


def retry_push(
    api: Api, name: str, *, poll_s: float = POLL_S, sleep: Callable[[float], None] = time.sleep
) -> tuple[str, bool]:
    """The name of the Job that pushes the adapter on the results volume, and whether it is new.

    Raises ConfigError while the run goes on, when it has pushed already, and where no volume keeps its adapter.
    """
    snapshot = load_run(api, name, progress=False)
    if snapshot.view.phase == "succeeded":
        raise ConfigError(f"Job {name} has succeeded: its adapter is pushed already", hint=f"tuner status {name}")
    if snapshot.view.phase != "failed":
        raise ConfigError(f"Job {name} is {snapshot.view.phase}: it pushes by itself", hint=f"tuner status {name}")
    push_job = render_retry_push(snapshot.job)
    metadata = snapshot.job["metadata"]
    owner = {"apiVersion": "batch/v1", "kind": "Job", "name": metadata["name"], "uid": metadata["uid"]}
    push_job["metadata"].setdefault("ownerReferences", []).append(owner)
    push_name = str(push_job["metadata"]["name"])
    old = api.find(JOB, push_name)
    if old is not None:
        phase = load_run(api, push_name, progress=False).view.phase
        if phase not in ("succeeded", "failed", "stopping"):
            return push_name, False
        if phase == "succeeded":
            raise ConfigError(f"Job {push_name} has pushed it already", hint=f"tuner status {push_name}")
        api.delete(JOB, push_name, propagation="Foreground")
        _wait_until_gone(api, JOB, push_name, poll_s, sleep)
    api.create(push_job, dry_run=True)
    api.create(push_job)
    return push_name, True


def needs_check(job: Mapping[str, Any], nodes: Nodes, *, instance_type: bool) -> bool:
    """Whether the pod would make a node boot: an instance type is asked for, and no ready node fits."""
    return instance_type and nodes.unread is None and not fitting_nodes(job["spec"]["template"]["spec"], nodes.items)
