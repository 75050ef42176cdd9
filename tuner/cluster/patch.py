"""A user's patch merged into a Job as `kubectl patch --type strategic` does, and what no patch may change.

Lists that have a key are merged by it, all others are replaced. `$patch: delete` takes an item or a mapping out,
`$patch: replace` puts the patch in its place, `$retainKeys` drops what it does not list, null takes a key out.
https://github.com/kubernetes/community/blob/main/contributors/devel/sig-api-machinery/strategic-merge-patch.md
"""

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from tuner import pod
from tuner.cluster import templates
from tuner.cluster.checks import shape_problems
from tuner.cluster.templates import Manifest
from tuner.errors import ConfigError, Problem, did_you_mean
from tuner.yaml_lines import Document, Location, read_documents, read_text, what_is

TRAINER = "trainer"  # in a patch: the container named as the Workspace, whose name a patch for many cannot know

# The patchMergeKeys of a Job in Kubernetes' API; a list that is not here is replaced whole.
_MERGE_KEYS = {
    "containers": "name",
    "env": "name",
    "ephemeralContainers": "name",
    "hostAliases": "ip",
    "imagePullSecrets": "name",
    "initContainers": "name",
    "ports": "containerPort",
    "resourceClaims": "name",
    "topologySpreadConstraints": "topologyKey",
    "volumeDevices": "devicePath",
    "volumeMounts": "mountPath",
    "volumes": "name",
}
# What Kubernetes 1.37 has at the places that patches are for, to tell a typo from what only a newer server knows.
_JOB_SPEC = tuple(
    "activeDeadlineSeconds backoffLimit backoffLimitPerIndex completionMode completions managedBy manualSelector "
    "maxFailedIndexes parallelism podFailurePolicy podReplacementPolicy scheduling selector successPolicy suspend "
    "template ttlSecondsAfterFinished".split()
)
_POD_SPEC = tuple(
    "activeDeadlineSeconds affinity automountServiceAccountToken containers dnsConfig dnsPolicy enableServiceLinks "
    "ephemeralContainers evictionResponders hostAliases hostIPC hostNetwork hostPID hostUsers hostname "
    "hostnameOverride imagePullSecrets initContainers nodeName nodeSelector os overhead preemptionPolicy priority "
    "priorityClassName readinessGates resourceClaims resources restartPolicy runtimeClassName schedulerName "
    "schedulingGates schedulingGroup securityContext serviceAccount serviceAccountName setHostnameAsFQDN "
    "shareProcessNamespace subdomain terminationGracePeriodSeconds tolerations topologySpreadConstraints "
    "volumes".split()
)
_CONTAINER = tuple(
    "args command env envFrom image imagePullPolicy lifecycle livenessProbe name ports readinessProbe resizePolicy "
    "resources restartPolicy restartPolicyRules securityContext startupProbe stdin stdinOnce terminationMessagePath "
    "terminationMessagePolicy tty volumeDevices volumeMounts workingDir".split()
)
_DIRECTIVE, _RETAIN = "$patch", "$retainKeys"
_JOB_KEYS = ("apiVersion", "kind", "metadata", "spec")


# ── reading ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def load_patches(paths: Sequence[Path]) -> tuple[Document, ...]:
    """Every YAML document of every file, in order."""
    patches: list[Document] = []
    for path in paths:
        name = f"--patch {path}"
        patches += parse_patches(read_text(path.expanduser(), name), name)
    return tuple(patches)


def parse_patches(text: str, file: str, first_line: int = 1) -> list[Document]:
    """The patches in a YAML text, which begins on `first_line` of a file.

    Raises ConfigError with all that is wrong in it, and where one is not of the shape of a Job.
    """
    documents, problems = read_documents(text, file, first_line)
    if not documents and not problems:
        raise ConfigError(f"{file}: there is no patch in it")
    for each in documents:
        problems += [each.problem(fault) for fault in each.faults] or _misshapen(each)
    if problems:
        raise ConfigError.of(problems)
    return documents


def _misshapen(patch: Document) -> Iterator[Problem]:
    if not isinstance(patch.value, dict):
        said = f"must be a mapping, as a Job is, not {what_is(patch.value)}"
        yield Problem(said, file=patch.file, line=patch.line, hint="spec: {template: {spec: {…}}}")
    for key in patch.mapping:
        if key not in _JOB_KEYS and not key.startswith("$"):
            hint = did_you_mean(key, _JOB_KEYS) or "what is the pod's stands under spec.template.spec"
            yield Problem(f"a Job has no {key!r}", file=patch.file, line=patch.line_of((key,)), hint=hint)
    if (kind := patch.mapping.get("kind", "Job")) != "Job":
        said = f"is for a {kind}, and only the Job can be patched"
        yield Problem(said, file=patch.file, line=patch.line_of(("kind",)))


# ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────────


class _UnmergeableError(Exception):
    """What a patch cannot say at `path`, which is `location` in it."""

    def __init__(self, message: str, path: str, location: Location, hint: str | None = None) -> None:
        super().__init__(message)
        self.message, self.path, self.location, self.hint = message, path, location, hint


def apply_patches(job: Manifest, patches: Sequence[Document]) -> Manifest:
    """The Job with the patches merged in, one after the other. Raises ConfigError for what a patch cannot say, and
    with every change that would break the run."""
    patched = job
    for each in patches:
        try:
            merged = merge(patched, _with_trainers_name(each.mapping, job["metadata"]["name"]))
        except _UnmergeableError as error:
            line = each.line_of(error.location)
            raise ConfigError.of([Problem(error.message, error.path, each.file, line, error.hint)]) from error
        assert isinstance(merged, dict)
        patched = merged
    problems = shape_problems(patched)
    problems = [Problem(each.message, path=f"patch, {each.path}") for each in problems] or [
        *_misspelt(job, patched),
        *_forbidden(job, patched),
    ]
    if problems:
        raise ConfigError.of(problems)
    return patched


def _with_trainers_name(patch: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The patch with the Workspace's name for the word `trainer`."""
    patch = deepcopy(dict(patch))
    here: Any = patch
    for key in ("spec", "template", "spec", "containers"):
        here = here.get(key) if isinstance(here, dict) else None
    for each in here if isinstance(here, list) else ():
        if isinstance(each, dict) and each.get("name") == TRAINER:
            each["name"] = name
    return patch


def merge(value: Any, patch: Any, path: str = "", location: Location = ()) -> Any:
    """`value` with `patch` merged in, neither of them changed; `path` and `location` say where, for the messages."""
    if not isinstance(patch, Mapping):
        return deepcopy(patch)
    directive = patch.get(_DIRECTIVE, "merge")
    if directive not in ("merge", "replace", "delete"):
        said = f"$patch is merge, replace or delete, not {directive!r}"
        raise _UnmergeableError(said, path, (*location, _DIRECTIVE))
    for key in patch:
        if key.startswith("$") and key not in (_DIRECTIVE, _RETAIN):
            hint = "write the list as it shall be, with {$patch: replace} as one of its items"
            raise _UnmergeableError(f"the directive {key} is not known here", path, (*location, key), hint)
    if directive == "delete":
        return {}
    base = value if isinstance(value, Mapping) and directive == "merge" else {}
    merged = {key: deepcopy(each) for key, each in base.items()}
    if _RETAIN in patch:
        merged = {key: each for key, each in merged.items() if key in patch[_RETAIN]}
    for key, each in patch.items():
        if key.startswith("$"):
            continue
        where = f"{path}.{key}" if path else key
        if each is None or (isinstance(each, Mapping) and each.get(_DIRECTIVE) == "delete"):
            merged.pop(key, None)
        elif isinstance(each, list) and key in _MERGE_KEYS:
            merged[key] = _merge_list(merged.get(key) or [], each, _MERGE_KEYS[key], where, (*location, key))
        else:
            merged[key] = merge(merged.get(key), each, where, (*location, key))
    return merged


def _merge_list(items: Sequence[Any], patch: Sequence[Any], key: str, path: str, location: Location) -> list[Any]:
    for index, each in enumerate(patch):
        if not isinstance(each, Mapping):
            raise _UnmergeableError(f"its items are mappings with a {key}", path, (*location, index))
    if any(set(each) == {_DIRECTIVE} and each[_DIRECTIVE] == "replace" for each in patch):
        return [
            merge({}, each, path, (*location, index)) for index, each in enumerate(patch) if set(each) != {_DIRECTIVE}
        ]
    places = {item.get(key): place for place, item in reversed(list(enumerate(items)))}
    touched: list[tuple[int | None, Any]] = []  # where the item was, and what it is now
    gone: set[int] = set()
    for index, each in enumerate(patch):
        at = (*location, index)
        if not isinstance(each.get(key), str | int):
            raise _UnmergeableError(f"has no {key}, by which such lists are merged", f"{path}[{index}]", at)
        where = f"{path}[{key}={each[key]}]"
        place = places.get(each[key])
        if each.get(_DIRECTIVE) != "delete":
            touched.append((place, merge({} if place is None else items[place], each, where, at)))
        elif place is None:
            raise _UnmergeableError("there is none to delete", where, at)
        else:
            gone.add(place)
    gone |= {place for place, _ in touched if place is not None}
    return _in_order(touched, [(place, item) for place, item in enumerate(items) if place not in gone])


def _in_order(touched: Sequence[tuple[int | None, Any]], others: Sequence[tuple[int, Any]]) -> list[Any]:
    """As kubectl orders them: the patch's items in its own order, new ones before what follows in the list."""
    merged: list[Any] = []
    left = list(others)
    for place, item in touched:
        while place is not None and left and left[0][0] < place:
            merged.append(deepcopy(left.pop(0)[1]))
        merged.append(item)
    return [*merged, *(deepcopy(item) for _, item in left)]


# ── what must not change ─────────────────────────────────────────────────────────────────────────────────────────────

_OUR_LABELS = ("kaito.sh/workspace", "app.kubernetes.io/instance", "app.kubernetes.io/managed-by")
_OUR_ANNOTATIONS = ("workspace.kaito.io/revision", "tuner/run-digest")
# Field of a Job, and why it is not for a patch.
_JOB_FIELDS = {
    "parallelism": "two pods would train into one results volume",
    "completions": "two pods would train into one results volume",
    "completionMode": "a run is one pod",
    "selector": "Kubernetes makes it",
    "manualSelector": "Kubernetes makes the selector",
    "podReplacementPolicy": "two pods would be at one results volume",
    "suspend": "a queue's controller sets it",
}
_POD_FIELDS = {
    "restartPolicy": "podFailurePolicy needs Never",
    "automountServiceAccountToken": "no container of a run needs the API server, and the trainer runs a model's code",
    "shareProcessNamespace": "the trainer could read the other containers' secrets",
    "hostPID": "the trainer could read the other containers' secrets",
}
_CONTAINER_FIELDS = {
    "command": "the image's entry point is tuner",
    "args": "they are the run's stages",
    "restartPolicy": "the trainer ends, and the pusher beside it is started again",
    "terminationMessagePath": "the stage's result is read there",
    "terminationMessagePolicy": "the stage's result is read there",
}


def _forbidden(job: Manifest, patched: Manifest) -> Iterator[Problem]:
    """Changes that would break the run, or give its secrets to those who have no business with them."""
    for key in ("apiVersion", "kind"):
        yield from _changed(job, patched, key, key, "it is a Job that is patched")
    for key in ("name", "namespace", "ownerReferences"):
        yield from _changed(job["metadata"], patched.get("metadata"), key, f"metadata.{key}", "its objects go together")
    for path in ("metadata", "spec.template.metadata"):
        before, after = _at(job, path), _at(patched, path)
        for kind, keys in (("labels", _OUR_LABELS), ("annotations", _OUR_ANNOTATIONS)):
            for key in keys:
                at, here = before.get(kind, {}), after.get(kind, {})
                yield from _changed(at, here, key, f"{path}.{kind}[{key}]", "the run is found by it")
    for key, why in _JOB_FIELDS.items():
        yield from _changed(job["spec"], _at(patched, "spec"), key, f"spec.{key}", why)
    yield from _changed_policy(job, patched)
    before, after = _at(job, "spec.template.spec"), _at(patched, "spec.template.spec")
    for key, why in _POD_FIELDS.items():
        yield from _changed(before, after, key, f"spec.template.spec.{key}", why)
    for kind in ("initContainers", "containers"):
        yield from _changed_containers(before.get(kind, ()), after.get(kind, ()), f"spec.template.spec.{kind}")
    yield from _changed_volumes(job, patched)
    yield from _trainers_secrets(job["metadata"]["name"], patched)


def _misspelt(job: Manifest, patched: Manifest) -> Iterator[Problem]:
    """Fields and containers that are nearly called like one that there is: a server would refuse the first, and start
    the second as one more, beside which the pod may never end."""
    places: list[tuple[str, Any, Sequence[str]]] = [
        ("spec", patched["spec"], _JOB_SPEC),
        ("spec.template", _at(patched, "spec.template"), ("metadata", "spec")),
        ("spec.template.spec", _at(patched, "spec.template.spec"), _POD_SPEC),
    ]
    known = {each["name"]: kind for kind in ("initContainers", "containers") for each in templates.pod_spec(job)[kind]}
    for kind in ("initContainers", "containers"):
        for each in _at(patched, "spec.template.spec").get(kind) or ():
            name, path = str(each.get("name")), f"spec.template.spec.{kind}[name={each.get('name')}]"
            places.append((path, each, _CONTAINER))
            if name not in known and (hint := did_you_mean(name, [*known, TRAINER])):
                yield Problem("is no container of the run", path=f"patch, {path}", hint=hint)
            if known.get(name, kind) != kind:
                yield Problem(f"it is one of {known[name]}", path=f"patch, {path}")
    for path, value, fields in places:
        for key in value:
            if key not in fields and (hint := did_you_mean(key, fields)):
                yield Problem(f"Kubernetes has no {key!r} there", path=f"patch, {path}", hint=hint)


def _at(value: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    """The mapping at a path; an empty one where a patch has left none."""
    for key in path.split("."):
        found = value.get(key)
        value = found if isinstance(found, Mapping) else {}
    return value


def _changed(before: Mapping[str, Any], after: Any, key: str, path: str, why: str) -> Iterator[Problem]:
    if before.get(key) != (after.get(key) if isinstance(after, Mapping) else None):
        yield Problem(f"is not for a patch to change: {why}", path=f"patch, {path}")


def _changed_policy(job: Manifest, patched: Manifest) -> Iterator[Problem]:
    ours = job["spec"]["podFailurePolicy"]["rules"]
    theirs = _at(patched, "spec.podFailurePolicy").get("rules")
    if not isinstance(theirs, list) or theirs[: len(ours)] != ours:
        yield Problem(
            "is not for a patch to change: the rules say which ends of which container are tried again",
            path="patch, spec.podFailurePolicy.rules",
            hint="rules of your own go after these; the first that matches counts",
        )


def _changed_containers(ours: Sequence[Manifest], theirs: Sequence[Manifest], path: str) -> Iterator[Problem]:
    there = {each.get("name"): each for each in theirs}
    for each in ours:
        name = each["name"]
        patched = there.get(name)
        if patched is None:
            yield Problem("the run needs it", path=f"patch, {path}[name={name}]")
            continue
        for key, why in _CONTAINER_FIELDS.items():
            yield from _changed(each, patched, key, f"{path}[name={name}].{key}", why)
        mounts = {mount.get("mountPath"): mount for mount in patched.get("volumeMounts", ())}
        for mount in each["volumeMounts"]:
            if mounts.get(mount["mountPath"]) != mount:
                yield Problem(
                    "is not for a patch to change: the run looks there",
                    path=f"patch, {path}[name={name}].volumeMounts[mountPath={mount['mountPath']}]",
                )
    names = [each["name"] for each in ours if each["name"] in there]
    if names != [each.get("name") for each in theirs if each.get("name") in names]:
        yield Problem("the run's containers have an order", path=f"patch, {path}")


# Whose content is the run's own. Sizes and claims of the others are the user's to choose.
_OUR_VOLUMES = (pod.CONFIG_VOLUME, pod.RUN_VOLUME, pod.PUSH_SECRET_VOLUME, pod.SOURCES_VOLUME, pod.HEADERS_VOLUME)


def _changed_volumes(job: Manifest, patched: Manifest) -> Iterator[Problem]:
    theirs = {each.get("name"): each for each in _at(patched, "spec.template.spec").get("volumes") or ()}
    for volume in templates.pod_spec(job)["volumes"]:
        name = volume["name"]
        path = f"patch, spec.template.spec.volumes[name={name}]"
        if name not in theirs:
            yield Problem("the run needs it", path=path)
        elif (name in _OUR_VOLUMES or "secret" in volume) and theirs[name] != volume:
            yield Problem("is not for a patch to change: it is the run's own", path=path)


def _trainers_secrets(name: str, patched: Manifest) -> Iterator[Problem]:
    """The trainer runs a model's code, and a Workspace promises that it has no credential."""
    spec = _at(patched, "spec.template.spec")
    volumes = {each.get("name"): each for each in spec.get("volumes") or ()}
    for each in spec.get("containers") or ():
        if each.get("name") != name:
            continue
        path = f"patch, spec.template.spec.containers[name={name}]"
        for mount in each.get("volumeMounts") or ():
            if holds_secret(volumes.get(mount.get("name"), {})):
                yield Problem(
                    "a Secret is not for the trainer, which runs a model's code",
                    path=f"{path}.volumeMounts[mountPath={mount.get('mountPath')}]",
                )
        for variable in each.get("env") or ():
            if "secretKeyRef" in (variable.get("valueFrom") or {}):
                yield Problem(
                    "a Secret is not for the trainer, which runs a model's code",
                    path=f"{path}.env[name={variable.get('name')}]",
                )
        if any("secretRef" in source for source in each.get("envFrom") or ()):
            yield Problem("a Secret is not for the trainer, which runs a model's code", path=f"{path}.envFrom")


def holds_secret(volume: Mapping[str, Any]) -> bool:
    """Whether a Secret or a service account's token is in it."""
    sources = (volume.get("projected") or {}).get("sources") or ()
    return "secret" in volume or any("secret" in each or "serviceAccountToken" in each for each in sources)
