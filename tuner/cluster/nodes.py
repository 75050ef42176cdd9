"""Where a pod may run: what a Workspace asks of its node, and which nodes take a pod. Pure.

There is one answer to "does a ready node fit", and it is about the pod: `tuner submit`, the controller's decisions and
the status that it writes all ask `fitting_nodes`. It reads labels, taints and GPUs as the scheduler does
(k8s.io/component-helpers/scheduling/corev1). What others have taken of a node counts for nothing: they may be gone by
then.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from tuner.cluster.job_options import GPU, INSTANCE_TYPE_LABEL, JobOptions, written_instance_type
from tuner.cluster.templates import Manifest
from tuner.workspace import Workspace, is_reserved_label

Object = Mapping[str, Any]

_REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
_PREFERRED = "preferredDuringSchedulingIgnoredDuringExecution"


# ── what a Workspace asks of its node ────────────────────────────────────────────────────────────────────────────────


def node_affinity(workspace: Workspace, options: JobOptions) -> Manifest:
    """From labelSelector, instanceType and preferredNodes; empty where none of them says anything."""
    required: list[Manifest] = []
    preferred: list[list[Manifest]] = []
    if instance_type := written_instance_type(workspace, options):
        required.append({"key": INSTANCE_TYPE_LABEL, "operator": "In", "values": [instance_type]})
    labels = list(label_expressions(workspace))
    if labels and options.labels_preferred:
        preferred.append(labels)
    else:
        required += labels
    if nodes := workspace.resource.preferred_nodes:
        preferred.append([{"key": "kubernetes.io/hostname", "operator": "In", "values": list(nodes)}])
    affinity: Manifest = {}
    if required:
        affinity[_REQUIRED] = {"nodeSelectorTerms": [{"matchExpressions": required}]}
    if preferred:
        affinity[_PREFERRED] = [
            {"weight": 100, "preference": {"matchExpressions": expressions}} for expressions in preferred
        ]
    return affinity


def label_expressions(workspace: Workspace) -> Iterator[Manifest]:
    """`labelSelector`, but for the keys that KAITO keeps for itself."""
    selector = workspace.resource.label_selector
    if selector is None:
        return
    for key, value in selector.match_labels.items():
        if not is_reserved_label(key):
            yield {"key": key, "operator": "In", "values": [value]}
    for each in selector.match_expressions:
        if not is_reserved_label(each.key):
            values = {"values": list(each.values)} if each.values else {}
            yield {"key": each.key, "operator": each.operator, **values}


def prefers_labels(workspace: Workspace, options: JobOptions, nodes: Iterable[Object]) -> bool:
    """Whether labelSelector must be a preference: an instance type is asked for, and no node carries the labels yet.

    Karpenter and the autoscaler make no node for a pod that requires labels which they do not know.
    """
    if written_instance_type(workspace, options) is None:
        return False
    expressions = list(label_expressions(workspace))
    return bool(expressions) and not any(_matches(_labels(node), expressions) for node in nodes)


# ── which nodes take a pod ───────────────────────────────────────────────────────────────────────────────────────────


def fitting_nodes(pod: Object, nodes: Iterable[Object]) -> list[str]:
    """The names of the ready nodes that a pod of this spec may go to, sorted."""
    return sorted(str(node["metadata"]["name"]) for node in nodes if _fits(pod, node))


def gpus_of(node: Object) -> int:
    """How many GPUs its device plugin offers, taken or not."""
    return int((node.get("status", {}).get("allocatable") or {}).get(GPU, 0))


def required_labels(pod: Object) -> dict[str, tuple[str, ...]]:
    """What the pod's node affinity requires with `In`: label → values."""
    return {
        expression["key"]: tuple(expression.get("values") or ())
        for term in _required_terms(pod)
        for expression in term.get("matchExpressions") or ()
        if expression.get("operator") == "In"
    }


def _fits(pod: Object, node: Object) -> bool:
    taints = (node.get("spec") or {}).get("taints") or ()
    return (
        _is_ready(node)
        and gpus_of(node) >= _gpus_asked_by(pod)
        and _is_selected(pod, node)
        and all(_is_tolerated(taint, pod.get("tolerations") or ()) for taint in taints)
    )


def _is_ready(node: Object) -> bool:
    if (node.get("spec") or {}).get("unschedulable"):
        return False
    conditions = node.get("status", {}).get("conditions") or ()
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _gpus_asked_by(pod: Object) -> int:
    """Containers run beside each other, init containers one after the other."""

    def asked(container: Object) -> int:
        return int(((container.get("resources") or {}).get("limits") or {}).get(GPU, 0))

    return max([sum(map(asked, pod["containers"])), *map(asked, pod.get("initContainers") or ())])


def _is_selected(pod: Object, node: Object) -> bool:
    labels = _labels(node)
    if any(labels.get(key) != value for key, value in (pod.get("nodeSelector") or {}).items()):
        return False
    terms = _required_terms(pod)
    return not terms or any(_term_matches(term, node) for term in terms)


def _required_terms(pod: Object) -> list[Object]:
    """Of which one has to hold."""
    affinity = (pod.get("affinity") or {}).get("nodeAffinity") or {}
    return list((affinity.get(_REQUIRED) or {}).get("nodeSelectorTerms") or ())


def _term_matches(term: Object, node: Object) -> bool:
    by_label, by_field = term.get("matchExpressions") or (), term.get("matchFields") or ()
    fields = {"metadata.name": str(node["metadata"]["name"])}
    # A term that says nothing takes no node.
    return bool(by_label or by_field) and _matches(_labels(node), by_label) and _matches(fields, by_field)


def _labels(node: Object) -> Mapping[str, str]:
    return node["metadata"].get("labels") or {}


def _matches(labels: Mapping[str, str], expressions: Iterable[Object]) -> bool:
    return all(_holds(labels.get(each["key"]), str(each["operator"]), each.get("values") or ()) for each in expressions)


def _holds(value: str | None, operator: str, values: Sequence[str]) -> bool:
    match operator:
        case "In":
            return value in values
        case "NotIn":
            return value not in values
        case "Exists":
            return value is not None
        case "DoesNotExist":
            return value is None
    if value is None:
        return False
    try:
        number, (limit,) = int(value), map(int, values)
    except ValueError:
        return False
    return number > limit if operator == "Gt" else number < limit


def _is_tolerated(taint: Object, tolerations: Iterable[Object]) -> bool:
    """PreferNoSchedule keeps no pod away. A toleration without a key that says Exists is for every taint."""
    return taint.get("effect") == "PreferNoSchedule" or any(
        each.get("effect") in (None, "", taint.get("effect"))
        and (
            each.get("key") in ("", None, taint["key"])
            if each.get("operator") == "Exists"
            else each.get("key") == taint["key"] and (each.get("value") or "") == (taint.get("value") or "")
        )
        for each in tolerations
    )
