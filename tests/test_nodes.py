"""Whether a ready node takes a pod: one answer for `tuner submit`, the controller's decisions and what it says."""

from typing import Any

import pytest

from tests.cluster_objects import make_node, make_workspace
from tuner.cluster.job_options import JobOptions
from tuner.cluster.nodes import fitting_nodes, node_affinity, prefers_labels
from tuner.workspace import parse_objects

OPTIONS = JobOptions(image="example.com/tuner:1")


def pod(*, gpus: int = 2, term: Any = None, **spec: Any) -> dict[str, Any]:
    expressions = [{"key": "type", "operator": "In", "values": ["a", "b"]}]
    terms = [{"matchExpressions": expressions}] if term is None else term
    return {
        "containers": [{"name": "main", "resources": {"limits": {"nvidia.com/gpu": str(gpus)}}}, {"name": "other"}],
        "tolerations": [{"key": "sku", "operator": "Equal", "value": "gpu", "effect": "NoSchedule"}],
        "affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms}}},
        **spec,
    }


def node(labels: dict[str, str] | None = None, *taints: dict[str, str], **how: Any) -> dict[str, Any]:
    made = make_node(**{"labels": {"type": "a"} if labels is None else labels, "gpus": 2, **how})
    made["spec"]["taints"] = list(taints)
    return made


def taint(key: str, value: str = "", effect: str = "NoSchedule") -> dict[str, str]:
    return {"key": key, "value": value, "effect": effect}


@pytest.mark.parametrize(
    ("fits", "there"),
    [
        (True, node()),
        (True, node({"type": "b"}, taint("sku", "gpu"), gpus=8)),
        (True, node(None, taint("x", effect="PreferNoSchedule"))),
        (False, node({"type": "c"})),
        (False, node({})),
        (False, node(gpus=1)),
        (False, node(gpus=0)),
        (False, node(ready=False)),
        (False, node(unschedulable=True)),
        (False, node(None, taint("spot", "yes"))),
        (False, node(None, taint("sku", "gpu", "NoExecute"))),
    ],
)
def test_a_node_fits_by_its_labels_gpus_and_taints(fits: bool, there: dict[str, Any]) -> None:
    assert fitting_nodes(pod(), [there]) == (["gpu-1"] if fits else [])


@pytest.mark.parametrize(
    ("tolerations", "fits"),
    [
        ([{"operator": "Exists"}], True),
        ([{"key": "spot", "operator": "Exists"}], True),
        ([{"key": "spot", "value": "yes"}], True),
        ([{"key": "spot", "value": "no"}], False),
        ([{"key": "spot", "operator": "Exists", "effect": "NoExecute"}], False),
        ([], False),
    ],
)
def test_a_taint_is_tolerated_as_the_scheduler_reads_it(tolerations: Any, fits: bool) -> None:
    assert bool(fitting_nodes(pod(tolerations=tolerations), [node(None, taint("spot", "yes"))])) is fits


@pytest.mark.parametrize(
    ("operator", "values", "fits"),
    [
        ("In", ["a", "x"], True),
        ("In", ["x"], False),
        ("NotIn", ["x"], True),
        ("NotIn", ["a"], False),
        ("Exists", [], True),
        ("DoesNotExist", [], False),
        ("Gt", ["7"], False),  # "a" is no number
    ],
)
def test_expressions_are_read_as_the_scheduler_does(operator: str, values: list[str], fits: bool) -> None:
    term = [{"matchExpressions": [{"key": "type", "operator": operator, "values": values}]}]
    assert bool(fitting_nodes(pod(term=term), [node()])) is fits


@pytest.mark.parametrize(("operator", "fits"), [("Gt", True), ("Lt", False)])
def test_numbers_in_labels_are_compared(operator: str, fits: bool) -> None:
    term = [{"matchExpressions": [{"key": "memory", "operator": operator, "values": ["79"]}]}]
    assert bool(fitting_nodes(pod(term=term), [node({"memory": "80"})])) is fits


def test_one_term_is_enough_and_one_that_says_nothing_takes_no_node() -> None:
    by_name = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["gpu-1"]}]}
    other = {"matchExpressions": [{"key": "type", "operator": "In", "values": ["c"]}]}
    assert fitting_nodes(pod(term=[other, by_name]), [node()]) == ["gpu-1"]
    assert fitting_nodes(pod(term=[other]), [node()]) == []
    assert fitting_nodes(pod(term=[{}]), [node()]) == []


def test_a_node_selector_counts_beside_the_affinity() -> None:
    assert fitting_nodes(pod(nodeSelector={"type": "a"}), [node()]) == ["gpu-1"]
    assert fitting_nodes(pod(nodeSelector={"type": "b"}), [node()]) == []


def test_gpus_of_containers_beside_each_other_are_added() -> None:
    both = pod()
    both["containers"][1]["resources"] = {"limits": {"nvidia.com/gpu": "1"}}
    assert fitting_nodes(both, [node()]) == []
    assert fitting_nodes(both, [node(gpus=3)]) == ["gpu-1"]


# ── what a Workspace asks of its node ────────────────────────────────────────────────────────────────────────────────


def workspace(instance_type: str | None, selector: Any = None) -> Any:
    written = make_workspace(instance_type=instance_type)
    if selector is not None:
        written["resource"]["labelSelector"] = selector
    return parse_objects(written).workspace


@pytest.mark.parametrize(
    ("instance_type", "labels", "preferred"),
    [("gpu-box", {}, True), ("gpu-box", {"apps": "phi-3"}, False), (None, {}, False)],
)
def test_labels_that_no_node_has_yet_are_only_preferred(
    instance_type: str | None, labels: dict[str, str], preferred: bool
) -> None:
    assert prefers_labels(workspace(instance_type), OPTIONS, [make_node(labels=labels)]) is preferred


def test_labels_that_kaito_keeps_for_itself_are_not_looked_for() -> None:
    selector = {"matchLabels": {"kaito.sh/workspace": "phi-3"}}
    asked = workspace("gpu-box", selector)
    assert not prefers_labels(asked, OPTIONS, [make_node(labels={})])
    (term,) = node_affinity(asked, OPTIONS)["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]
    assert [each["key"] for each in term["matchExpressions"]] == ["node.kubernetes.io/instance-type"]
