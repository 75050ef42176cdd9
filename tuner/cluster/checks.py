"""What an API server refuses of a Job although its schema allows it, and what a restricted namespace refuses.

Each rule was tried on an API server or read in its validation; tests/test_cluster_checks.py breaks every one of them.
https://github.com/kubernetes/kubernetes/blob/master/pkg/apis/batch/validation/validation.go
https://kubernetes.io/docs/concepts/security/pod-security-standards/
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal, InvalidOperation
from posixpath import normpath
from typing import Any

from tuner.errors import Problem
from tuner.workspace import LABEL, LABEL_CHARACTERS, SUBDOMAIN

_SPEC = "spec.template.spec"
_POLICY = "spec.podFailurePolicy"
_MOST_RULES, _MOST_VALUES = 20, 255
_ANNOTATION_BYTES = 256 * 1024
_NOT_A_LABEL = "must be at most 63 of a-z, 0-9 and -, a letter or digit at both ends"
_LABEL_KEY = re.compile(rf"({SUBDOMAIN.pattern}/)?[A-Za-z0-9]([-A-Za-z0-9_.]{{0,61}}[A-Za-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_ENV_NAME = re.compile(r"[-._a-zA-Z][-._a-zA-Z0-9]*")
_QUANTITY = re.compile(r"([0-9]+(?:\.[0-9]*)?)(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?")
_UNITS = {"": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3)} | {
    letter + binary: Decimal((1024 if binary else 1000) ** (index + 1))
    for index, letter in enumerate(("K", "M", "G", "T", "P", "E"))
    for binary in ("", "i")
    if letter + binary != "K"
}


def job_problems(job: Mapping[str, Any]) -> list[Problem]:
    """All for which an API server would refuse this Job, or its pods would never start."""
    if problems := shape_problems(job):
        return problems
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    problems += [*_name_problems(job), *_label_problems(job)]
    problems += _policy_problems(spec)
    problems += _container_problems(pod)
    problems += _volume_problems(pod)
    problems += _mount_problems(pod)
    problems += _resource_problems(pod)
    problems += _affinity_problems(pod)
    problems += [
        Problem("has no name", path=f"{_SPEC}.imagePullSecrets[{index}]")
        for index, each in enumerate(pod.get("imagePullSecrets", ()))
        if not each.get("name")
    ]
    return problems


# ── shape ────────────────────────────────────────────────────────────────────────────────────────────────────────────

# What the fields that are looked at here are, wherever in a Job they stand; all others are for the schema to judge.
_MAPPINGS = frozenset((
    "affinity", "capabilities", "emptyDir", "metadata", "nodeAffinity", "onExitCodes", "podFailurePolicy",
    "preference", "projected", "requiredDuringSchedulingIgnoredDuringExecution", "resources", "seccompProfile",
    "secret", "secretKeyRef", "secretRef", "securityContext", "spec", "template", "valueFrom",
))  # fmt: skip
_MAPPINGS_OF_VALUES = frozenset({"annotations", "labels", "limits", "matchLabels", "nodeSelector", "requests"})
_LISTS_OF_MAPPINGS = frozenset((
    "containers", "env", "envFrom", "imagePullSecrets", "initContainers", "matchExpressions", "matchFields",
    "nodeSelectorTerms", "onPodConditions", "ports", "preferredDuringSchedulingIgnoredDuringExecution", "rules",
    "sources", "sysctls", "tolerations", "volumeMounts", "volumes",
))  # fmt: skip
_LISTS_OF_VALUES = frozenset({"add", "args", "command", "drop", "values"})
_VALUES = frozenset((
    "action", "containerName", "key", "medium", "mountPath", "name", "operator", "podReplacementPolicy",
    "procMount", "restartPolicy", "runAsNonRoot", "runAsUser", "sizeLimit", "status", "type", "value", "weight",
))  # fmt: skip
_OWN = frozenset({"metadata", "spec"})  # without them it is no Job


def shape_problems(job: Mapping[str, Any]) -> list[Problem]:
    """Where a patch has put something else than a Job has there. Without any, all other checks can be made."""
    missing = [Problem("is missing", path=key) for key in sorted(_OWN - job.keys())]
    return missing or list(_shapes(job, ""))


def _shapes(value: Mapping[str, Any], path: str) -> Iterator[Problem]:
    for key, each in value.items():
        where = f"{path}.{key}" if path else str(key)
        if key in _VALUES:
            if isinstance(each, Mapping | list):
                yield Problem("must be one value", path=where)
        elif key in _LISTS_OF_VALUES or key in _LISTS_OF_MAPPINGS:
            of = Mapping if key in _LISTS_OF_MAPPINGS else str | int | float
            if not isinstance(each, list) or not all(isinstance(item, of) for item in each):
                yield Problem(f"must be a list of {'mappings' if of is Mapping else 'values'}", path=where)
                continue
            for index, item in enumerate(each):
                if isinstance(item, Mapping):
                    yield from _shapes(item, f"{where}[{index}]")
        elif key in _MAPPINGS_OF_VALUES:
            if not isinstance(each, Mapping) or any(isinstance(item, Mapping | list) for item in each.values()):
                yield Problem("must be a mapping of names to values", path=where)
        elif key in _MAPPINGS and not isinstance(each, Mapping):
            yield Problem("must be a mapping", path=where)
        elif isinstance(each, Mapping):
            yield from _shapes(each, where)


# ── names and labels ─────────────────────────────────────────────────────────────────────────────────────────────────


def _is_label(name: Any) -> bool:
    return isinstance(name, str) and len(name) <= LABEL_CHARACTERS and LABEL.fullmatch(name) is not None


def _name_problems(job: Mapping[str, Any]) -> Iterator[Problem]:
    name = job["metadata"].get("name")
    if not _is_label(name):  # a Job's may have dots, its pods' host names and labels may not
        yield Problem(f"{name!r} {_NOT_A_LABEL}", path="metadata.name")


def _label_problems(job: Mapping[str, Any]) -> Iterator[Problem]:
    for path, metadata in (
        ("metadata", job["metadata"]),
        ("spec.template.metadata", job["spec"]["template"].get("metadata", {})),
    ):
        for key, value in metadata.get("labels", {}).items():
            if not _LABEL_KEY.fullmatch(key):
                yield Problem("is no key that a label can have", path=f"{path}.labels[{key}]")
            if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
                yield Problem(f"{value!r} is no value that a label can have", path=f"{path}.labels[{key}]")
        annotations = metadata.get("annotations", {})
        for key, value in annotations.items():
            if not _LABEL_KEY.fullmatch(key):
                yield Problem("is no key that an annotation can have", path=f"{path}.annotations[{key}]")
            if not isinstance(value, str):
                yield Problem("must be text: put it in quotes", path=f"{path}.annotations[{key}]")
        if sum(len(key) + len(str(value)) for key, value in annotations.items()) > _ANNOTATION_BYTES:
            yield Problem("are more than 256 KiB together", path=f"{path}.annotations")


# ── how a Job ends ───────────────────────────────────────────────────────────────────────────────────────────────────


def _policy_problems(spec: Mapping[str, Any]) -> Iterator[Problem]:
    pod = spec["template"]["spec"]
    restart = pod.get("restartPolicy")
    if restart not in ("Never", "OnFailure"):
        yield Problem(f"must be Never or OnFailure in a Job, not {restart}", path=f"{_SPEC}.restartPolicy")
    policy = spec.get("podFailurePolicy")
    if policy is None:
        return
    if restart == "OnFailure":
        yield Problem("must be Never beside a podFailurePolicy", path=f"{_SPEC}.restartPolicy")
    replacement = spec.get("podReplacementPolicy")
    if replacement not in (None, "Failed"):
        yield Problem(f"must be Failed beside a podFailurePolicy, not {replacement}", path="spec.podReplacementPolicy")
    rules = policy.get("rules", ())
    if len(rules) > _MOST_RULES:
        yield Problem(f"{len(rules)} rules are too many: at most {_MOST_RULES}", path=f"{_POLICY}.rules")
    names = {each.get("name") for each in _containers(pod)}
    for index, rule in enumerate(rules):
        yield from _rule_problems(rule, names, f"{_POLICY}.rules[{index}]")


def _rule_problems(rule: Mapping[str, Any], names: set[str | None], path: str) -> Iterator[Problem]:
    action = rule.get("action")
    if action not in ("FailJob", "FailIndex", "Ignore", "Count"):
        yield Problem(f"must be FailJob, Ignore or Count, not {action}", path=f"{path}.action")
    elif action == "FailIndex":
        yield Problem("FailIndex is for indexed Jobs", path=f"{path}.action")
    codes = rule.get("onExitCodes")
    if (codes is None) == (not rule.get("onPodConditions")):
        yield Problem("must have either onExitCodes or onPodConditions", path=path)
    for index, each in enumerate(rule.get("onPodConditions") or ()):
        if not each.get("type") or each.get("status") not in ("True", "False", "Unknown"):
            yield Problem('must have a type and a status "True"', path=f"{path}.onPodConditions[{index}]")
    if codes is None:
        return
    path = f"{path}.onExitCodes"
    container = codes.get("containerName")
    if container is not None and container not in names:
        yield Problem(f"there is no container {container!r}", path=f"{path}.containerName")
    if codes.get("operator") not in ("In", "NotIn"):
        yield Problem(f"must be In or NotIn, not {codes.get('operator')}", path=f"{path}.operator")
    values = codes.get("values") or ()
    if not 1 <= len(values) <= _MOST_VALUES:
        yield Problem(f"must be 1 to {_MOST_VALUES} exit codes", path=f"{path}.values")
    if any(isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 255 for value in values):
        yield Problem("must be exit codes of 0 to 255", path=f"{path}.values")
    elif list(values) != sorted(set(values)):
        yield Problem("must be ascending, each once", path=f"{path}.values")
    if codes.get("operator") == "In" and 0 in values:
        yield Problem("0 is no failure", path=f"{path}.values")


# ── containers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def _containers(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from pod.get("initContainers") or ()
    yield from pod.get("containers") or ()


def _placed(pod: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every container with its path in words."""
    for kind in ("initContainers", "containers"):
        for each in pod.get(kind) or ():
            yield f"{_SPEC}.{kind}[name={each.get('name')}]", each


def _twice(names: Sequence[Any]) -> list[Any]:
    return [name for name, count in Counter(names).items() if count > 1]


def _container_problems(pod: Mapping[str, Any]) -> Iterator[Problem]:
    if not pod.get("containers"):
        yield Problem("a pod needs a container", path=f"{_SPEC}.containers")
    for path, each in _placed(pod):
        if not _is_label(each.get("name")):
            yield Problem(_NOT_A_LABEL, path=f"{path}.name")
        if not isinstance(each.get("image"), str) or not each["image"].strip():
            yield Problem("is missing", path=f"{path}.image")
        variables = each.get("env") or ()
        for name in _twice([variable.get("name") for variable in variables]):
            yield Problem("is there twice; the last one counts", path=f"{path}.env[name={name}]")
        for variable in variables:
            name, value = variable.get("name"), variable.get("value")
            if not isinstance(name, str) or not _ENV_NAME.fullmatch(name):
                yield Problem("is no name of a variable", path=f"{path}.env[name={name}]")
            if value is not None and not isinstance(value, str):
                yield Problem("must be text: put it in quotes", path=f"{path}.env[name={name}].value")
            if value and variable.get("valueFrom"):
                yield Problem("has a value and a valueFrom", path=f"{path}.env[name={name}]")
    for name in _twice([each.get("name") for each in _containers(pod)]):
        yield Problem(f"two containers are called {name!r}", path=_SPEC)


# ── volumes ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def _volume_problems(pod: Mapping[str, Any]) -> Iterator[Problem]:
    volumes = pod.get("volumes") or ()
    mounted = {mount.get("name") for each in _containers(pod) for mount in each.get("volumeMounts") or ()}
    for volume in volumes:
        name = volume.get("name")
        path = f"{_SPEC}.volumes[name={name}]"
        if isinstance(name, str) and "." in name:
            yield Problem("a volume's name must not contain dots", path=path)
        elif not _is_label(name):
            yield Problem(_NOT_A_LABEL, path=path)
        kinds = sorted(volume.keys() - {"name"})
        if len(kinds) != 1:
            yield Problem(
                f"must be exactly one kind of volume; it is {', '.join(kinds) or 'none'}",
                path=path,
                hint="a patch to another kind names it in $retainKeys: [name, …]" if kinds else None,
            )
        if name not in mounted:
            yield Problem("no container mounts it", path=path)
    for name in _twice([volume.get("name") for volume in volumes]):
        yield Problem("is there twice", path=f"{_SPEC}.volumes[name={name}]")


def _mount_problems(pod: Mapping[str, Any]) -> Iterator[Problem]:
    volumes = {volume.get("name") for volume in pod.get("volumes") or ()}
    for path, each in _placed(pod):
        mounts = each.get("volumeMounts") or ()
        for mount in mounts:
            name, at = mount.get("name"), mount.get("mountPath")
            if name not in volumes:
                yield Problem(f"there is no volume {name!r}", path=f"{path}.volumeMounts[mountPath={at}]")
            if not isinstance(at, str) or not at.startswith("/") or ":" in at:
                yield Problem(
                    "must be a path from / on, without a colon", path=f"{path}.volumeMounts[name={name}].mountPath"
                )
        for at in _twice([normpath(str(mount.get("mountPath"))) for mount in mounts]):
            names = [mount.get("name") for mount in mounts if normpath(str(mount.get("mountPath"))) == at]
            yield Problem(f"{' and '.join(map(str, names))} are both mounted at {at}", path=f"{path}.volumeMounts")


# ── resources ────────────────────────────────────────────────────────────────────────────────────────────────────────


def quantity(text: Any) -> Decimal | None:
    """The number that a Kubernetes quantity is, or None where it is none: "100m" → 0.1, "1Gi" → 1073741824"""
    found = _QUANTITY.fullmatch(str(text)) if not isinstance(text, bool) else None
    try:
        return Decimal(found[1]) * _UNITS[found[2] or ""] if found else None
    except InvalidOperation:
        return None


def _resource_problems(pod: Mapping[str, Any]) -> Iterator[Problem]:
    for path, each in _placed(pod):
        resources = each.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        for kind, amounts in (("requests", requests), ("limits", limits)):
            for name, amount in amounts.items():
                if quantity(amount) is None:
                    yield Problem(f"{amount!r} is no amount", path=f"{path}.resources.{kind}[{name}]")
        for name in requests.keys() | limits.keys():
            wanted, most = quantity(requests.get(name)), quantity(limits.get(name))
            where = f"{path}.resources[{name}]"
            if "/" in name and (name not in limits or (name in requests and wanted != most)):
                yield Problem("what a device plugin gives is asked for and limited alike", path=where)
            elif wanted is not None and most is not None and wanted > most:
                yield Problem(f"{requests[name]} are asked for, more than the limit {limits[name]}", path=where)
    yield from _memory_volume_problems(pod)


def _memory_volume_problems(pod: Mapping[str, Any]) -> Iterator[Problem]:
    """A volume in memory counts against its container's limit: a larger one ends in a kill, not in a full disk."""
    for volume in pod.get("volumes") or ():
        empty = volume.get("emptyDir") or {}
        if empty.get("medium") != "Memory":
            continue
        size, path = quantity(empty.get("sizeLimit")), f"{_SPEC}.volumes[name={volume.get('name')}]"
        if size is None:
            yield Problem("is in memory and has no sizeLimit", path=path)
            continue
        for each in _containers(pod):
            mounts = [mount.get("name") for mount in each.get("volumeMounts") or ()]
            most = quantity(((each.get("resources") or {}).get("limits") or {}).get("memory"))
            if volume.get("name") in mounts and most is not None and size > most:
                yield Problem(f"may hold more than {each.get('name')} may use of memory", path=path)


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _affinity_problems(pod: Mapping[str, Any]) -> Iterator[Problem]:
    node = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    path = f"{_SPEC}.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms"
    required = node.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is not None:
        terms = required.get("nodeSelectorTerms") or ()
        if not terms:
            yield Problem("must have a term", path=path)
        for index, term in enumerate(terms):
            yield from _term_problems(term, f"{path}[{index}]")
    path = f"{_SPEC}.affinity.nodeAffinity.preferredDuringSchedulingIgnoredDuringExecution"
    for index, each in enumerate(node.get("preferredDuringSchedulingIgnoredDuringExecution") or ()):
        weight = each.get("weight")
        if not isinstance(weight, int) or not 1 <= weight <= 100:
            yield Problem("must be 1 to 100", path=f"{path}[{index}].weight")
        yield from _term_problems(each.get("preference") or {}, f"{path}[{index}].preference")


def _term_problems(term: Mapping[str, Any], path: str) -> Iterator[Problem]:
    if not term.get("matchExpressions") and not term.get("matchFields"):
        yield Problem("is empty: it would match no node", path=path)
    for index, each in enumerate(term.get("matchExpressions") or ()):
        where, values = f"{path}.matchExpressions[{index}]", each.get("values") or ()
        operator = each.get("operator")
        if not isinstance(each.get("key"), str) or not _LABEL_KEY.fullmatch(each["key"]):
            yield Problem("is no key that a label can have", path=f"{where}.key")
        if operator in ("Exists", "DoesNotExist") and values:
            yield Problem(f"{operator} takes no values", path=where)
        elif operator in ("In", "NotIn") and not values:
            yield Problem(f"{operator} needs values", path=where)
        elif operator in ("Gt", "Lt") and len(values) != 1:
            yield Problem(f"{operator} needs one value", path=where)
        elif operator not in ("Exists", "DoesNotExist", "In", "NotIn", "Gt", "Lt"):
            yield Problem(f"{operator} is no operator", path=where)
        for value in values:
            if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
                yield Problem(f"{value!r} is no value that a label can have", path=where)


# ── Pod Security ─────────────────────────────────────────────────────────────────────────────────────────────────────

_RESTRICTED_VOLUMES = frozenset((
    "configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "image", "persistentVolumeClaim", "projected", "secret",
))  # fmt: skip


def restricted_problems(pod: Mapping[str, Any]) -> list[Problem]:
    """All for which a namespace with `pod-security.kubernetes.io/enforce: restricted` would refuse a pod's spec."""
    return list(_restricted(pod))


def _restricted(pod: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield Problem("is refused", path=f"{_SPEC}.{key}")
    for volume in pod.get("volumes") or ():
        for kind in sorted(volume.keys() - {"name"} - _RESTRICTED_VOLUMES):
            yield Problem(f"a {kind} is refused", path=f"{_SPEC}.volumes[name={volume.get('name')}]")
    of_pod = pod.get("securityContext") or {}
    if of_pod.get("sysctls"):
        yield Problem("are refused, but for a few", path=f"{_SPEC}.securityContext.sysctls")
    for path, each in _placed(pod):
        own = each.get("securityContext") or {}
        path = f"{path}.securityContext"
        if own.get("privileged"):
            yield Problem("must not be true", path=f"{path}.privileged")
        if own.get("allowPrivilegeEscalation") is not False:
            yield Problem("must be false", path=f"{path}.allowPrivilegeEscalation")
        capabilities = own.get("capabilities") or {}
        if "ALL" not in (capabilities.get("drop") or ()):
            yield Problem("must have ALL", path=f"{path}.capabilities.drop")
        if set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}:
            yield Problem("may have NET_BIND_SERVICE alone", path=f"{path}.capabilities.add")
        if own.get("runAsNonRoot", of_pod.get("runAsNonRoot")) is not True:
            yield Problem("must be true", path=f"{path}.runAsNonRoot")
        if own.get("runAsUser", of_pod.get("runAsUser")) == 0:
            yield Problem("must not be 0", path=f"{path}.runAsUser")
        profile = own.get("seccompProfile") or of_pod.get("seccompProfile") or {}
        if profile.get("type") not in ("RuntimeDefault", "Localhost"):
            yield Problem("must be RuntimeDefault or Localhost", path=f"{path}.seccompProfile.type")
        if own.get("procMount", "Default") != "Default":
            yield Problem("must be Default", path=f"{path}.procMount")
        if any(port.get("hostPort") for port in each.get("ports") or ()):
            yield Problem("a port of the host is refused", path=path.removesuffix(".securityContext") + ".ports")
