import json
from collections.abc import Sequence
from typing import Any

import pytest

from tests.cluster_objects import make_config_map, make_node, make_workspace
from tuner.cluster.job_options import JobOptions
from tuner.cluster.reconcile import Rendered
from tuner.cluster.revision import RevisionRenderer
from tuner.errors import ConfigError, TunerError
from tuner.request import Request
from tuner.runspec import Network

R_8 = "training_config:\n  LoraConfig: {r: 8}\n  QuantizationConfig: {load_in_4bit: true}\n"


def rendered(
    workspace: Any, config_map: Any = None, *, nodes: Sequence[Any] = (), network: Network | None = None
) -> Rendered:
    request = Request(place="pod", network=network or Network())
    renderer = RevisionRenderer(request, JobOptions(image="example.com/tuner:1"))
    return renderer(workspace, config_map, 7, nodes)


def rank(made: Rendered) -> Any:
    run = json.loads(made.objects[0]["data"]["run.json"])
    return run["training"]["lora"]["r"]


def test_every_object_is_of_this_revision_and_goes_with_its_workspace():
    made = rendered(make_workspace())
    for thing in (*made.objects, made.job, made.check_job):
        (owner,) = thing["metadata"]["ownerReferences"]
        assert (owner["uid"], owner["blockOwnerDeletion"]) == ("uid-workspace-phi-3", True)
        assert thing["metadata"]["namespace"] == "team"
        assert thing["metadata"]["labels"]["kaito.sh/workspace"] == "phi-3"
    for job in (made.job, made.check_job):
        assert job["metadata"]["annotations"]["workspace.kaito.io/revision"] == "7"
        assert job["metadata"]["annotations"]["tuner/run-digest"].startswith("sha256:")
    assert (made.job["metadata"]["name"], made.check_job["metadata"]["name"]) == ("phi-3", "phi-3--check")


@pytest.mark.parametrize("config", [None, "config"])
def test_the_config_map_holds_whether_it_is_named_or_the_default(config):
    assert rank(rendered(make_workspace(config=config), make_config_map("config", R_8))) == 8


def test_without_any_config_map_our_own_defaults_hold():
    assert rank(rendered(make_workspace())) == 16


def test_a_workspace_as_the_api_server_has_it_is_read():
    workspace = make_workspace(status={"state": "Pending"})
    workspace["metadata"] |= {"managedFields": [], "creationTimestamp": "2026-01-01T00:00:00Z"}
    workspace["tuning"]["method"] = "QLoRA"
    assert rendered(workspace).job["kind"] == "Job"


def test_the_queue_of_a_workspaces_label_is_the_jobs_and_not_the_checks():
    workspace = make_workspace()
    workspace["metadata"]["labels"] = {
        "kueue.x-k8s.io/queue-name": "gpu-queue",
        "kueue.x-k8s.io/priority-class": "high",
    }
    made = rendered(workspace)
    assert made.job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpu-queue"
    assert made.job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert "kueue.x-k8s.io/queue-name" not in made.check_job["metadata"]["labels"]


@pytest.mark.parametrize("preferred", [True, False])
def test_labels_that_no_node_has_are_preferred_and_not_required(preferred):
    workspace = make_workspace(instance_type="Standard_NC24ads_A100_v4")
    nodes = [make_node(labels={} if preferred else {"apps": "phi-3"})]
    affinity = rendered(workspace, nodes=nodes).job["spec"]["template"]["spec"]["affinity"]
    text = json.dumps(affinity["nodeAffinity"].get("preferredDuringSchedulingIgnoredDuringExecution", []))
    assert ('"apps"' in text) is preferred


def test_the_guard_for_urls_opens_only_what_the_controller_was_told_to():
    workspace = make_workspace()
    workspace["tuning"]["input"]["urls"] = ["http://10.1.2.3/a.parquet"]
    with pytest.raises(ConfigError, match=r"tuning.input.urls\[0\]"):
        rendered(workspace)
    assert rendered(workspace, network=Network(allow_cidrs=("10.1.0.0/16",))).job["kind"] == "Job"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda it: it["tuning"]["preset"].update(name="no-such-preset"), "no-such-preset"),
        (lambda it: it["tuning"]["preset"].update(name="./model"), "./model"),
        (lambda it: it["tuning"]["input"].update(urls=["/etc/passwd"]), "pod cannot read"),
        (lambda it: it["tuning"]["output"].pop("imagePushSecret"), "imagePushSecret"),
        (lambda it: it["tuning"].update(method="dora"), "method"),
    ],
)
def test_what_is_wrong_is_a_sentence(change, sentence):
    workspace = make_workspace()
    change(workspace)
    with pytest.raises(TunerError) as caught:
        rendered(workspace)
    assert sentence in str(getattr(caught.value, "problems", "")) + caught.value.message
