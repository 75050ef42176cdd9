import copy
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest

from tests.cluster_objects import (
    ended,
    make_config_map,
    make_event,
    make_node,
    make_pod,
    make_workspace,
    running,
    waiting,
)
from tests.simulated_cluster import START, WORKSPACE, Cluster, Controller, make_cluster, render
from tuner.cluster.observe import ProgressLine
from tuner.cluster.reconcile import (
    Annotate,
    ApplyStatus,
    Confirm,
    Create,
    Delete,
    Emit,
    Observed,
    Rendered,
    Settings,
    event_manifest,
    plan,
)
from tuner.runspec import StageResult

SETTINGS = Settings(render)


def begun(**how: Any) -> tuple[Cluster, Controller]:
    """A cluster in which the controller has done all there is to do at first."""
    cluster = make_cluster(**how)
    controller = Controller(cluster)
    controller.settle()
    return cluster, controller


def status_of(cluster: Cluster) -> dict[str, Any]:
    return cluster.store[WORKSPACE]["status"]


def condition(status: dict[str, Any], kind: str) -> tuple[str, str, str]:
    found = next(each for each in status["conditions"] if each["type"] == kind)
    return found["status"], found["reason"], found["message"]


def kinds(cluster: Cluster) -> list[str]:
    return sorted(f"{kind}/{name}" for kind, name in cluster.store if kind in ("Job", "ConfigMap"))


def planned_for(cluster: Cluster, **changes: Any) -> Any:
    """The plan for the cluster as it is, with these fields of what is observed changed."""
    controller = Controller(cluster)
    controller.look()
    observed = controller.observed()
    assert observed is not None
    settings = changes.pop("settings", SETTINGS)
    now = changes.pop("now", START + timedelta(hours=1))
    return plan(replace(observed, **changes), settings, now)


def put_pod(cluster: Cluster, states: Any, **how: Any) -> None:
    pod = make_pod(states, **how)
    pod["metadata"]["ownerReferences"] = [{"uid": cluster.store["Job", "phi-3"]["metadata"]["uid"], "controller": True}]
    cluster.put(pod)


NO_NODE = ("False", "NodeNotReady", "Not enough Nodes are ready")
NODE = ("True", "NodesReady", "Enough Nodes are ready")
NO_RESOURCE = ("False", "workspaceResourceStatusNotReady", "node status condition not ready")
RESOURCE = ("True", "workspaceResourceStatusSuccess", "workspace resource is ready")
INITIALIZING = ("False", "workspacePending", "workspace is initializing, tuning job has not started")
RUNNING = ("False", "workspacePending", "workspace has not completed yet, tuning job is running")


# ── the beginning ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_new_workspace_gets_revision_1_its_config_map_and_its_job():
    cluster, _ = begun()
    workspace = cluster.store[WORKSPACE]
    annotations = workspace["metadata"]["annotations"]
    assert annotations["workspace.kaito.io/revision"] == "1"
    digest = annotations["workspace.kaito.io/hash"]
    assert len(digest) == 64
    revision = cluster.store["ControllerRevision", f"phi-3-{digest[:5]}"]
    assert revision["revision"] == 1
    assert revision["metadata"]["labels"]["workspace.kaito.io/name"] == "phi-3"
    assert revision["metadata"]["annotations"] == annotations
    assert revision["data"]["tuning"] == workspace["tuning"]
    assert kinds(cluster) == ["ConfigMap/phi-3-config-1", "Job/phi-3"]
    for key in (
        ("Job", "phi-3"),
        ("ConfigMap", "phi-3-config-1"),
        ("ControllerRevision", revision["metadata"]["name"]),
    ):
        (owner,) = cluster.store[key]["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == ("Workspace", workspace["metadata"]["uid"], True)


def test_two_looks_in_a_row_do_nothing_the_second_time():
    cluster, controller = begun()
    before = copy.deepcopy(cluster.store)
    controller.look()
    planned = controller.reconcile()
    assert planned is not None
    assert planned.actions == ()
    assert cluster.store == before


def test_nothing_is_written_to_a_workspace_that_has_changed_meanwhile():
    cluster = make_cluster()
    controller = Controller(cluster)
    controller.look()
    cluster.edit_workspace(lambda it: it["tuning"]["output"].update(image="example.com/b:1"))
    controller.reconcile()
    assert kinds(cluster) == []
    assert "status" not in cluster.store[WORKSPACE]


@pytest.mark.parametrize(
    ("check_job", "instance_type", "node", "first"),
    [
        ("auto", None, False, "phi-3"),
        ("auto", "gpu-box", True, "phi-3"),
        ("auto", "gpu-box", False, "phi-3--check"),
        ("never", "gpu-box", False, "phi-3"),
        ("always", None, True, "phi-3--check"),
    ],
)
def test_a_check_job_comes_first_where_a_node_would_boot(check_job, instance_type, node, first):
    cluster = make_cluster(instance_type=instance_type, node=node)
    Controller(cluster, replace(SETTINGS, check_job=check_job)).settle()
    assert kinds(cluster) == ["ConfigMap/phi-3-config-1", f"Job/{first}"]


def test_nodes_that_may_not_be_listed_are_taken_for_not_there():
    planned = planned_for(make_cluster(instance_type="gpu-box"), nodes=None)
    assert [each.manifest["metadata"]["name"] for each in planned.actions if isinstance(each, Create)][-1] == (
        "phi-3--check"
    )


def test_after_a_good_check_the_job_is_made_of_the_same_objects():
    cluster, controller = begun(instance_type="gpu-box", node=False)
    assert status_of(cluster)["tuning"]["stage"] == "check"
    cluster.step_job("phi-3--check", "starts")
    cluster.step_job("phi-3--check", "succeeds")
    controller.look()
    planned = controller.reconcile()
    assert planned is not None
    assert [type(each) for each in planned.actions[:3]] == [Confirm, Create, Create]
    assert kinds(cluster) == ["ConfigMap/phi-3-config-1", "Job/phi-3", "Job/phi-3--check"]


def test_a_job_finds_its_config_map_when_a_default_was_edited_while_the_check_ran():
    cluster, _ = begun(instance_type="gpu-box", node=False)
    cluster.step_job("phi-3--check", "starts")
    cluster.step_job("phi-3--check", "succeeds")

    def render_anew(*args: Any, **how: Any) -> Rendered:
        made = render(*args, **how)
        (config_map,) = made.objects
        return replace(
            made, objects=({**config_map, "metadata": {**config_map["metadata"], "name": "phi-3-config-new"}},)
        )

    controller = Controller(cluster, Settings(render_anew))
    controller.settle()
    assert kinds(cluster) == [
        "ConfigMap/phi-3-config-1", "ConfigMap/phi-3-config-new", "Job/phi-3", "Job/phi-3--check",
    ]  # fmt: skip


def test_a_check_that_fails_is_the_end_and_says_why():
    cluster, controller = begun(instance_type="gpu-box", node=False)
    cluster.step_job("phi-3--check", "starts")
    cluster.step_job("phi-3--check", "gives-up")
    controller.settle()
    status = status_of(cluster)
    sentence = (
        "tuning job failed: checks failed before a GPU was asked for: train: ended without a word (exit 65): bad row"
    )
    assert status["state"] == "Failed"
    assert condition(status, "JobStarted") == ("False", "WorkspaceTuningJobStatusFailed", sentence)
    assert condition(status, "WorkspaceSucceeded") == ("False", "workspaceFailed", sentence)
    cluster.delete_job_by_hand("phi-3--check")
    controller.settle()
    assert ("Job", "phi-3") not in cluster.store


# ── conditions ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_conditions_before_there_is_a_node():
    cluster, _ = begun(node=False)
    status = status_of(cluster)
    assert (status["state"], status["targetNodeCount"], status["workerNodes"]) == ("Pending", 1, [])
    assert condition(status, "NodesReady") == NO_NODE
    assert condition(status, "ResourceReady") == NO_RESOURCE
    assert condition(status, "JobStarted") == (
        "False",
        "WorkspaceTuningJobStatusPending",
        "Tuning job has not started: its pod has no node yet",
    )
    assert condition(status, "WorkspaceSucceeded") == INITIALIZING
    assert condition(status, "WorkspaceReady") == INITIALIZING


def test_conditions_while_it_runs():
    cluster, controller = begun(node=False)
    put_pod(cluster, {"preflight": ended(0), "data-downloader": running(), "phi-3": waiting("PodInitializing")})
    controller.settle()
    status = status_of(cluster)
    assert (status["state"], status["workerNodes"], status["tuning"]["stage"]) == ("Running", ["gpu-1"], "fetch")
    assert condition(status, "NodesReady") == NODE
    assert condition(status, "ResourceReady") == RESOURCE
    assert condition(status, "JobStarted") == (
        "True",
        "WorkspaceTuningJobStatusStarted",
        "Tuning job has started; stage fetch",
    )
    assert condition(status, "WorkspaceSucceeded") == RUNNING


def test_conditions_at_the_end():
    cluster, controller = begun(node=False)
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    controller.settle()
    status = status_of(cluster)
    assert status["state"] == "Succeeded"
    assert condition(status, "ResourceReady") == RESOURCE
    assert condition(status, "JobStarted") == ("True", "WorkspaceTuningJobStatusStarted", "Tuning job has started")
    succeeded = ("True", "workspaceSucceeded", "workspace succeeds; pushed example.com/a@sha256:1")
    assert condition(status, "WorkspaceSucceeded") == succeeded
    assert condition(status, "WorkspaceReady") == succeeded
    assert status["tuning"]["artifact"] == {"image": "example.com/a@sha256:1", "digest": "sha256:1"}
    assert status["tuning"]["progressPercentage"] == 100


def test_the_end_is_not_told_before_the_pods_words_are_known():
    cluster, controller = begun(node=False)
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    controller.look(("Job", "phi-3"))  # and not of its pod
    observed = controller.observed()
    assert observed is not None
    planned = plan(observed, SETTINGS, START)
    assert (planned.wants_pods, planned.actions) == (True, ())
    told = plan(replace(observed, pods_are_fresh=True), SETTINGS, START)  # there is none any more
    assert any(isinstance(each, ApplyStatus) and each.status["state"] == "Succeeded" for each in told.actions)


def test_conditions_after_a_failure():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "gives-up")
    controller.settle()
    status = status_of(cluster)
    sentence = "tuning job failed: train: ended without a word (exit 65): bad row"
    assert status["state"] == "Failed"
    assert condition(status, "JobStarted") == ("False", "WorkspaceTuningJobStatusFailed", sentence)
    assert condition(status, "WorkspaceSucceeded") == ("False", "workspaceFailed", sentence)


def test_a_condition_keeps_its_time_until_its_status_changes():
    cluster, controller = begun(node=False)
    times = {each["type"]: each["lastTransitionTime"] for each in status_of(cluster)["conditions"]}
    put_pod(cluster, {"preflight": running()})
    controller.settle()
    after = {each["type"]: each["lastTransitionTime"] for each in status_of(cluster)["conditions"]}
    assert after["WorkspaceSucceeded"] == times["WorkspaceSucceeded"]
    assert after["JobStarted"] > times["JobStarted"]
    assert {each["observedGeneration"] for each in status_of(cluster)["conditions"]} == {1}


# ── what goes wrong on the way ───────────────────────────────────────────────────────────────────────────────────────

UNSCHEDULABLE = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("pod", "events", "message"),
    [
        pytest.param(
            {"scheduled": ("Unschedulable", UNSCHEDULABLE)},
            [],
            f"no node takes its pod: {UNSCHEDULABLE}",
            id="unschedulable",
        ),
        pytest.param(
            {"states": {"preflight": waiting("ImagePullBackOff", "Back-off pulling")}},
            [],
            "the image tuner:1 cannot be pulled: Back-off pulling",
            id="image pull error",
        ),
        pytest.param(
            {"states": {"preflight": waiting("PodInitializing")}},
            [make_event("Pod", "phi-3-a", "FailedMount", 'secret "push" not found')],
            'its volumes are not there: secret "push" not found',
            id="missing secret",
        ),
        pytest.param(
            None,
            [make_event("Job", "phi-3", "FailedCreate", 'pods "x" is forbidden: exceeded quota: gpus')],
            'its pod is refused: pods "x" is forbidden: exceeded quota: gpus',
            id="quota",
        ),
    ],
)
def test_what_is_waited_for_is_said(pod, events, message):
    cluster, _ = begun(node=False)
    if pod is not None:
        put_pod(cluster, **{"states": {}, **pod})
    planned = planned_for(cluster, events=events)
    (status,) = [each.status for each in planned.actions if isinstance(each, ApplyStatus)]
    assert status["state"] == "Pending"
    assert condition(status, "JobStarted")[2] == f"Tuning job has not started: {message}"


def test_a_retry_is_running_and_not_failed():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "fails")
    controller.settle()
    status = status_of(cluster)
    assert status["state"] == "Running"
    assert condition(status, "JobStarted") == (
        "True",
        "WorkspaceTuningJobStatusStarted",
        "Tuning job has started; attempt 2 of 4, last: train: ended without a word (exit 70): boom",
    )
    assert condition(status, "WorkspaceSucceeded") == RUNNING
    assert (status["tuning"]["attempt"], status["tuning"]["attempts"]) == (2, 4)


def test_an_eviction_is_said_and_its_replacement_waited_for():
    cluster, controller = begun(node=False)
    target = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
    put_pod(cluster, {"phi-3": ended(143)}, name="a", phase="Failed", conditions=[target])
    put_pod(cluster, {}, name="b", created="2026-01-02T00:00:00Z", scheduled=("Unschedulable", UNSCHEDULABLE))
    controller.settle()
    status = status_of(cluster)
    assert status["state"] == "Running"
    assert condition(status, "JobStarted")[2] == (
        "Tuning job has started; attempt 1 of 4, last: eviction by eviction api: drained; "
        f"waiting: no node takes its pod: {UNSCHEDULABLE}"
    )
    assert condition(status, "NodesReady") == NO_NODE


def test_a_queued_job_is_shown_as_queued_and_left_alone():
    cluster, controller = begun()

    def queue(job: Any) -> None:
        job["spec"]["suspend"] = True
        job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "gpu-queue"

    cluster.change(("Job", "phi-3"), queue)
    planned = controller.settle()
    assert planned.actions == ()
    assert cluster.store["Job", "phi-3"]["spec"]["suspend"] is True
    status = status_of(cluster)
    assert status["state"] == "Pending"
    assert condition(status, "JobStarted") == (
        "False",
        "WorkspaceTuningJobStatusPending",
        "Tuning job has not started: queued by Kueue in gpu-queue",
    )


def test_a_call_that_failed_is_said():
    cluster, _ = begun()
    planned = planned_for(cluster, error="exceeded quota: count/jobs.batch")
    (status,) = [each.status for each in planned.actions if isinstance(each, ApplyStatus)]
    assert condition(status, "JobStarted")[2].endswith("(last reconcile error: exceeded quota: count/jobs.batch)")


@pytest.mark.parametrize("hours", [-48, 48])
def test_a_clock_that_is_wrong_makes_nobody_write_or_wait_for_ever(hours):
    cluster, _ = begun()
    now = START + timedelta(hours=hours)
    assert planned_for(cluster, now=now).actions == ()
    put_pod(cluster, {"phi-3": running()})
    Controller(cluster).settle()
    line = ProgressLine("train", 10, 100, "steps", 90, {"loss": 1.5})
    planned = planned_for(cluster, now=now, progress=line)
    assert [type(each) for each in planned.actions] == [ApplyStatus]


# ── what cannot begin ────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_preset_that_cannot_be_tuned_is_said_and_no_crash():
    cluster = make_cluster()
    cluster.edit_workspace(lambda it: it["tuning"]["preset"].update(name="no-such-preset"))
    controller = Controller(cluster)
    assert controller.settle().actions == ()
    status = status_of(cluster)
    assert status["state"] == "Pending"
    assert condition(status, "JobStarted")[2] == (
        "Tuning job has not started: tuning.preset.name: no preset is called 'no-such-preset' "
        "(tuner presets lists them)"
    )
    assert kinds(cluster) == []
    assert [(event["type"], event["reason"]) for event in cluster.events] == [("Warning", "Invalid")]


def test_a_missing_config_map_is_said_in_kaitos_words_and_its_coming_begins_the_run():
    cluster = make_cluster(config="config")
    cluster.remove(("ConfigMap", "config"))
    controller = Controller(cluster)
    controller.settle()
    assert condition(status_of(cluster), "JobStarted")[2] == (
        "Tuning job has not started: ConfigMap 'config' specified in 'config' not found in namespace 'team'"
    )
    cluster.put(make_config_map())
    controller.settle()
    assert ("Job", "phi-3") in cluster.store


def test_a_run_goes_on_when_its_config_map_is_deleted():
    cluster, controller = begun(config="config")
    uid = cluster.store["Job", "phi-3"]["metadata"]["uid"]
    cluster.step_job("phi-3", "starts")
    cluster.remove(("ConfigMap", "config"))
    controller.settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["uid"] == uid
    assert condition(status_of(cluster), "JobStarted")[2] == (
        "Tuning job has started; stage train; ConfigMap 'config' specified in 'config' not found in namespace 'team'"
    )


def test_a_change_that_is_not_valid_does_not_end_the_run_that_is():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.edit_workspace(lambda it: it["tuning"]["preset"].update(name="no-such-preset"))
    controller.settle()
    assert "deletionTimestamp" not in cluster.store["Job", "phi-3"]["metadata"]
    status = status_of(cluster)
    assert status["state"] == "Running"
    assert "the change is not valid: tuning.preset.name: no preset" in condition(status, "JobStarted")[2]
    assert cluster.store[WORKSPACE]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "1"


def test_an_inference_workspace_is_left_alone_with_a_condition_that_says_so():
    workspace = make_workspace()
    del workspace["tuning"]
    workspace["inference"] = {"preset": {"name": "phi-3"}}
    planned = plan(Observed(workspace), SETTINGS, START)
    (action,) = planned.actions
    assert isinstance(action, ApplyStatus)
    (only,) = action.status["conditions"]
    assert (only["type"], only["status"], only["reason"]) == ("InferenceReady", "False", "InferenceNotManaged")
    assert "left alone" in only["message"]
    workspace["status"] = action.status
    assert plan(Observed(workspace), SETTINGS, START).actions == ()


def test_a_workspace_that_is_being_deleted_says_so_and_gets_nothing_more():
    cluster, _ = begun()
    cluster.remove(("Job", "phi-3"))
    cluster.change(WORKSPACE, lambda it: it["metadata"].update(deletionTimestamp="now"))
    before = {each["type"]: each for each in status_of(cluster)["conditions"]}
    planned = planned_for(cluster)
    (action,) = planned.actions
    assert isinstance(action, ApplyStatus)
    assert condition(dict(action.status), "WorkspaceDeleting") == (
        "True",
        "workspaceDeleted",
        "workspace is being deleted",
    )
    after = {each["type"]: each for each in action.status["conditions"]}
    assert {kind: after[kind] for kind in before} == before


# ── other people's objects ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_job_that_somebody_else_made_is_left_alone_and_said():
    cluster = make_cluster()
    job = {"kind": "Job", "metadata": {"name": "phi-3", "labels": {}}, "spec": {}}
    cluster.put(job)
    Controller(cluster).settle()
    assert "a Job 'phi-3' is there that this controller did not make" in condition(status_of(cluster), "JobStarted")[2]
    assert "deletionTimestamp" not in cluster.store["Job", "phi-3"]["metadata"]


def test_a_change_of_a_finished_workspace_that_is_not_valid_is_said_in_an_event_and_its_end_stays():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    controller.settle()
    before = copy.deepcopy(status_of(cluster))
    cluster.edit_workspace(lambda it: it["tuning"]["preset"].update(name="no-such-preset"))
    for _ in range(2):
        controller.look()
        controller.reconcile()
    (said,) = [event for event in cluster.events if event["reason"] == "Invalid"]
    assert said["note"].startswith("the change is not valid: tuning.preset.name: no preset is called")
    assert status_of(cluster) == before


def test_a_finished_workspace_stays_so_when_somebody_else_makes_a_job_of_its_name():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    controller.settle()
    cluster.remove(("Job", "phi-3"))
    cluster.put({"kind": "Job", "metadata": {"name": "phi-3", "labels": {}}, "spec": {}})
    assert controller.settle().actions == ()
    assert status_of(cluster)["state"] == "Succeeded"


def test_the_job_of_an_earlier_workspace_of_the_same_name_is_waited_for():
    cluster, controller = begun()
    old = copy.deepcopy(cluster.store["Job", "phi-3"])
    cluster.remove(WORKSPACE)
    workspace = make_workspace()
    workspace["metadata"]["uid"] = "uid-another"
    cluster.put(workspace)
    cluster.put(old)  # the garbage collector takes its time
    controller.settle()
    assert "of an earlier Workspace of this name is not gone yet" in condition(status_of(cluster), "JobStarted")[2]
    cluster.remove(("Job", "phi-3"))
    controller.settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["ownerReferences"][0]["uid"] == "uid-another"


def test_what_kaito_has_finished_is_not_trained_again():
    succeeded = {
        "type": "WorkspaceSucceeded",
        "status": "True",
        "reason": "workspaceSucceeded",
        "message": "workspace succeeds",
        "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    annotations = {"workspace.kaito.io/revision": "1", "workspace.kaito.io/hash": "kaito's own"}
    cluster = Cluster()
    cluster.put(make_workspace(status={"state": "Succeeded", "conditions": [succeeded]}, annotations=annotations))
    assert Controller(cluster).settle().actions == ()
    assert kinds(cluster) == []
    cluster.edit_workspace(lambda it: it["tuning"]["output"].update(image="example.com/a:2"))
    Controller(cluster).settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


# ── finished stays finished ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("outcome", ["succeeds", "gives-up"])
def test_a_finished_workspace_stays_as_it_is_when_its_job_goes(outcome):
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", outcome)
    controller.settle()
    status = copy.deepcopy(status_of(cluster))
    cluster.delete_job_by_hand("phi-3")
    assert controller.settle().actions == ()
    assert ("Job", "phi-3") not in cluster.store
    assert status_of(cluster) == status


def test_a_job_that_is_deleted_before_its_end_is_made_again():
    cluster, controller = begun()
    cluster.delete_job_by_hand("phi-3")
    controller.settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "1"


def test_the_annotation_retry_runs_the_same_again():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "gives-up")
    controller.settle()
    cluster.change(WORKSPACE, lambda it: it["metadata"]["annotations"].update({"tuner/retry": "1"}))
    controller.settle()
    cluster.step_job("phi-3", "is-gone")
    controller.settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"
    assert status_of(cluster)["state"] == "Pending"


def test_a_second_push_that_gets_through_makes_a_failed_workspace_succeed():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "gives-up")
    controller.settle()
    push = copy.deepcopy(cluster.store["Job", "phi-3"])
    push["metadata"] |= {"name": "phi-3--push", "uid": "uid-push"}
    push["status"] = {"conditions": [{"type": "Complete", "status": "True"}]}
    cluster.put(push)
    result = StageResult(stage="push", values={"image": "example.com/a@sha256:2"}).to_message()
    pod = make_pod({"pusher": ended(0, result)}, name="push", phase="Succeeded")
    pod["metadata"]["ownerReferences"] = [{"uid": "uid-push", "controller": True}]
    cluster.put(pod)
    controller.settle()
    assert status_of(cluster)["state"] == "Succeeded"
    assert status_of(cluster)["tuning"]["artifact"]["digest"] == "sha256:2"


@pytest.mark.parametrize("outcome", ["succeeds", "gives-up"])
def test_an_end_is_remembered_with_its_revision_and_a_lost_status_trains_nothing_again(outcome):
    """`kubectl replace --subresource=status`, a backup that was restored, a CRD that was made anew."""
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", outcome)
    controller.settle()
    before = copy.deepcopy(status_of(cluster))
    (said,) = cluster.ends()
    assert said["metadata"]["ownerReferences"][0]["uid"] == cluster.store[WORKSPACE]["metadata"]["uid"]
    if outcome == "succeeds":
        assert (said["data"]["state"], said["data"]["image"]) == ("Succeeded", "example.com/a@sha256:1")
    else:
        assert said["data"]["state"] == "Failed"
        assert "exit 65" in said["data"]["message"]
    cluster.remove(("Job", "phi-3"))
    cluster.change(WORKSPACE, lambda it: it.pop("status"))
    controller.settle()
    assert sum(cluster.created.values()) == 1
    now = status_of(cluster)
    assert now["state"] == before["state"]
    assert now["tuning"].get("artifact") == before["tuning"].get("artifact")
    assert now["tuning"]["runDigest"] == before["tuning"]["runDigest"]
    for kind in ("JobStarted", "WorkspaceSucceeded"):
        assert condition(now, kind) == condition(before, kind)


def fail_and_edit(cluster: Cluster, controller: Controller, number: int) -> None:
    """The run that there is fails, and the next revision's begins."""
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "gives-up")
    controller.settle()
    cluster.edit_workspace(lambda it: it["tuning"]["output"].update(image=f"example.com/a:{number}"))
    controller.settle()
    cluster.step_job("phi-3", "is-gone")
    controller.settle()


def test_a_record_is_never_changed_after_it_was_made():
    """An API server takes no patch of a ControllerRevision: its data are immutable by bytes, and re-encoded by one."""
    cluster, controller = begun()
    made = {}
    for number in (2, 3):
        fail_and_edit(cluster, controller, number)
        records = {key: it for key, it in cluster.store.items() if key[0] == "ControllerRevision"}
        assert {key: records[key] for key in made} == made
        made = copy.deepcopy(records)
    assert len(made) == 5  # three revisions, and the ends of two


def test_an_end_is_of_its_own_content_and_no_other_run_is_taken_for_finished():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    controller.settle()
    cluster.remove(("Job", "phi-3"))

    def replace_it(workspace):  # kubectl replace of another file: annotations, and with a new CRD the status, are gone
        workspace["metadata"]["annotations"] = {}
        workspace.pop("status")
        workspace["tuning"]["output"]["image"] = "example.com/a:2"

    cluster.edit_workspace(replace_it)
    for key in [
        key for key, it in cluster.store.items() if key[0] == "ControllerRevision" and it not in cluster.ends()
    ]:
        cluster.remove(key)
    controller.settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


def test_an_end_goes_with_its_revision_when_that_is_too_old():
    cluster, controller = begun()
    for number in range(2, 14):
        fail_and_edit(cluster, controller, number)
    assert sorted(it["revision"] for it in cluster.ends()) == list(range(4, 13))


def test_what_could_not_be_done_beside_an_end_is_not_said_of_it_for_good():
    cluster, _ = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    planned = planned_for(cluster, error="exceeded quota: count/events")
    (status,) = [each.status for each in planned.actions if isinstance(each, ApplyStatus)]
    assert condition(status, "WorkspaceSucceeded")[2] == "workspace succeeds; pushed example.com/a@sha256:1"
    (event,) = [each.event for each in planned.actions if isinstance(each, Emit)]
    assert (event["type"], event["reason"]) == ("Normal", "Succeeded")


def test_a_restored_status_is_believed_and_its_end_recorded_anew():
    """A backup that is restored into another cluster with its status: another uid, and nothing that was owned."""
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    controller.settle()
    restored = copy.deepcopy(cluster.store[WORKSPACE])
    restored["metadata"]["uid"] = "uid-elsewhere"
    elsewhere = Cluster()
    elsewhere.put(restored)
    Controller(elsewhere).settle()
    assert kinds(elsewhere) == []
    (end,) = elsewhere.ends()
    assert end["data"]["image"] == "example.com/a@sha256:1"


def test_the_query_of_a_url_is_in_no_record():
    cluster = make_cluster()
    url = "https://example.com/a.parquet?sv=2024&sig=GEHEIM#sha256=" + "a" * 64
    cluster.edit_workspace(lambda it: it["tuning"]["input"].update(urls=[url]))
    Controller(cluster).settle()
    records = [it["data"] for (kind, _), it in cluster.store.items() if kind == "ControllerRevision"]
    assert [each["tuning"]["input"]["urls"] for each in records] == [["https://example.com/a.parquet?…"]]


def test_a_job_is_deleted_when_its_end_is_recorded_and_its_time_is_over():
    cluster, controller = begun()
    controller.settings = replace(controller.settings, ttl_s=3600)
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "succeeds")
    ended_at = controller.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    cluster.change(("Job", "phi-3"), lambda it: it["status"]["conditions"][0].update(lastTransitionTime=ended_at))
    cluster.change(WORKSPACE, lambda it: it)  # nobody looks for years
    controller.now += timedelta(days=1000)
    controller.look()
    first = controller.reconcile()
    assert first is not None
    assert not any(isinstance(each, Delete) for each in first.actions), "not before it is recorded"
    controller.settle()
    cluster.step_job("phi-3", "is-gone")
    controller.settle()
    assert ("Job", "phi-3") not in cluster.store
    assert status_of(cluster)["state"] == "Succeeded"
    assert sum(cluster.created.values()) == 1


def test_until_its_time_is_over_a_finished_job_stays_and_is_looked_at_again_then():
    cluster, controller = begun()
    controller.settings = replace(controller.settings, ttl_s=3600)
    cluster.step_job("phi-3", "starts")
    cluster.step_job("phi-3", "gives-up")
    ended_at = controller.now.strftime("%Y-%m-%dT%H:%M:%SZ")
    cluster.change(("Job", "phi-3"), lambda it: it["status"]["conditions"][0].update(lastTransitionTime=ended_at))
    planned = controller.settle()
    assert planned.again_in_s is not None
    assert 3000 < planned.again_in_s <= 3600
    assert ("Job", "phi-3") in cluster.store


# ── revisions ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_change_waits_until_the_old_job_has_saved_its_checkpoint_and_gone():
    cluster, controller = begun()
    cluster.step_job("phi-3", "starts")
    old = cluster.store["Job", "phi-3"]["metadata"]["uid"]
    cluster.edit_workspace(lambda it: it["tuning"]["output"].update(image="example.com/a:2"))
    controller.look()
    planned = controller.reconcile()
    assert planned is not None
    assert [type(each) for each in planned.actions] == [Annotate, Create, Delete, Emit, ApplyStatus]
    controller.settle()
    assert cluster.store["Job", "phi-3"]["metadata"]["uid"] == old
    assert condition(status_of(cluster), "JobStarted")[2] == (
        "Tuning job has not started: revision 2 begins when the Job of revision 1 is gone"
    )
    cluster.step_job("phi-3", "is-gone")
    controller.settle()
    job = cluster.store["Job", "phi-3"]
    assert job["metadata"]["uid"] != old
    assert job["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


def test_an_edit_of_the_config_map_is_a_new_revision():
    cluster, controller = begun(config="config")
    cluster.put(make_config_map(text="training_config: {LoraConfig: {r: 8}}\n"))
    controller.look()
    planned = controller.reconcile()
    assert planned is not None
    confirm = planned.actions[0]
    assert isinstance(confirm, Confirm)
    assert (confirm.kind, confirm.name) == ("ConfigMap", "config")
    assert cluster.store[WORKSPACE]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


def test_an_old_picture_of_the_config_map_begins_nothing():
    cluster, controller = begun(config="config")
    second = Controller(cluster)
    second.look()
    cluster.put(make_config_map(text="training_config: {LoraConfig: {r: 8}}\n"))
    controller.settle()
    second.look(WORKSPACE)  # it hears of the new annotations, and not of the ConfigMap
    second.picture |= {key: it for key, it in cluster.store.items() if key[0] == "ControllerRevision"}
    second.reconcile()
    assert cluster.store[WORKSPACE]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "2"


def test_an_edit_of_a_default_config_map_is_none():
    cluster = make_cluster()
    cluster.put(make_config_map("qlora-params-template", "training_config: {} # today's\n"))
    controller = Controller(cluster)
    controller.settle()
    assert cluster.store["ConfigMap", "phi-3-config-1"]["data"]["run.json"] == "training_config: {} # today's\n"
    cluster.put(make_config_map("qlora-params-template", "training_config: {} # tomorrow's\n"))
    assert controller.settle().actions == ()


def test_what_an_api_server_fills_in_is_no_change():
    cluster, controller = begun()

    def fill_in(workspace: Any) -> None:
        workspace["resource"]["count"] = 1
        workspace["resource"]["preferredNodes"] = []
        workspace["tuning"]["preset"] |= {"accessMode": "public", "presetOptions": {}}
        workspace["tuning"]["config"] = ""

    cluster.edit_workspace(fill_in)
    controller.settle()
    assert cluster.store[WORKSPACE]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "1"


def test_going_back_to_what_was_is_a_revision_of_its_own():
    cluster, controller = begun()
    first = cluster.store[WORKSPACE]["metadata"]["annotations"]["workspace.kaito.io/hash"]
    for image in ("example.com/a:2", "example.com/a:1"):
        cluster.edit_workspace(lambda it, image=image: it["tuning"]["output"].update(image=image))
        controller.settle()
        cluster.step_job("phi-3", "is-gone")
        controller.settle()
    annotations = cluster.store[WORKSPACE]["metadata"]["annotations"]
    assert annotations == {"workspace.kaito.io/revision": "3", "workspace.kaito.io/hash": first}
    assert cluster.store["ControllerRevision", f"phi-3-{first[:5]}"]["revision"] == 3
    assert cluster.store["Job", "phi-3"]["metadata"]["annotations"]["workspace.kaito.io/revision"] == "3"


def test_at_most_ten_revisions_are_kept():
    cluster, controller = begun()
    for number in range(2, 14):
        cluster.edit_workspace(lambda it, n=number: it["tuning"]["output"].update(image=f"example.com/a:{n}"))
        controller.settle()
        cluster.step_job("phi-3", "is-gone")
        controller.settle()
    kept = sorted(it["revision"] for (kind, _), it in cluster.store.items() if kind == "ControllerRevision")
    assert kept == list(range(4, 14))


def test_a_picture_that_is_older_than_the_job_does_nothing():
    cluster, controller = begun()
    old = copy.deepcopy(controller.picture)
    cluster.edit_workspace(lambda it: it["tuning"]["output"].update(image="example.com/a:2"))
    controller.settle()
    cluster.step_job("phi-3", "is-gone")
    controller.settle()
    late = Controller(cluster, picture=old)
    late.look(("Job", "phi-3"))
    planned = late.reconcile()
    assert planned is not None
    assert planned.actions == ()


# ── nodes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_own_node_without_an_instance_type_makes_the_resource_ready_before_there_is_a_pod():
    cluster, _ = begun(node=True)
    assert condition(status_of(cluster), "NodesReady") == NODE
    assert condition(status_of(cluster), "ResourceReady") == RESOURCE


def test_a_node_with_a_taint_that_the_pod_does_not_tolerate_is_not_ready_for_it_and_the_check_comes_first():
    cluster = make_cluster(instance_type="gpu-box", node=True)
    taint = {"key": "team", "value": "other", "effect": "NoSchedule"}
    cluster.change(("Node", "gpu-1"), lambda it: it["spec"].update(taints=[taint]))
    Controller(cluster).settle()
    assert kinds(cluster) == ["ConfigMap/phi-3-config-1", "Job/phi-3--check"]
    assert condition(status_of(cluster), "NodesReady") == NO_NODE


def test_a_node_with_too_few_gpus_is_not_ready_for_the_pod():
    cluster = make_cluster(node=True)
    controller = Controller(cluster, Settings(partial(render, gpus=2)))
    controller.settle()
    assert condition(status_of(cluster), "NodesReady") == NO_NODE
    cluster.put({"kind": "Node", **make_node(gpus=2)})
    controller.settle()
    assert condition(status_of(cluster), "NodesReady") == NODE


def test_while_the_checks_run_a_node_that_has_come_is_said():
    cluster, controller = begun(instance_type="gpu-box", node=False)
    assert condition(status_of(cluster), "NodesReady") == NO_NODE
    cluster.put({"kind": "Node", **make_node(labels={"apps": "phi-3", "node.kubernetes.io/instance-type": "gpu-box"})})
    controller.settle()
    assert condition(status_of(cluster), "NodesReady") == NODE


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LINE = ProgressLine("train", 30, 90, "steps", 60, {"loss": 1.23456, "tokens_per_s": 4100.5})


def training() -> Cluster:
    cluster, controller = begun()
    put_pod(cluster, {"preflight": ended(0), "data-downloader": ended(0), "phi-3": running(), "pusher": running()})
    controller.settle()
    return cluster


def applied(planned: Any) -> dict[str, Any]:
    (status,) = [each.status for each in planned.actions if isinstance(each, ApplyStatus)]
    return dict(status)


def test_progress_is_in_the_status():
    planned = planned_for(training(), progress=LINE)
    assert planned.wants_progress
    tuning = applied(planned)["tuning"]
    assert (tuning["progressPercentage"], tuning["step"], tuning["totalSteps"]) == (33, 30, 90)
    assert (tuning["loss"], tuning["estimatedRemainingSeconds"]) == ("1.235", 60)
    assert tuning["metrics"] == [{"name": "tokens_per_s", "value": "4100"}]
    assert [type(each) for each in planned.actions] == [ApplyStatus]  # no Event for it


def test_preparing_rows_is_told_from_training():
    planned = planned_for(training(), progress=ProgressLine("prepare", 500, 1000, "rows"))
    tuning = applied(planned)["tuning"]
    assert tuning["stage"] == "prepare"
    assert "step" not in tuning


def test_progress_is_written_at_most_every_15_seconds():
    cluster = training()
    now = START + timedelta(hours=1)
    status = applied(planned_for(cluster, progress=LINE, now=now))
    cluster.change(WORKSPACE, lambda it: it.update(status=status))
    more = replace(LINE, done=31)
    soon = planned_for(cluster, progress=more, now=now + timedelta(seconds=5))
    assert soon.actions == ()
    assert soon.again_in_s == pytest.approx(10)
    later = planned_for(cluster, progress=more, now=now + timedelta(seconds=15))
    assert applied(later)["tuning"]["step"] == 31
    same = planned_for(cluster, progress=LINE, now=now + timedelta(hours=1))
    assert same.actions == ()


def test_without_a_new_line_the_last_progress_stays():
    cluster = training()
    cluster.change(WORKSPACE, lambda it: it.update(status=applied(planned_for(cluster, progress=LINE))))
    assert planned_for(cluster, progress=None).actions == ()


def test_what_was_fetched_is_in_the_status():
    cluster, _ = begun()
    result = StageResult.model_validate(
        {
            "stage": "fetch",
            "values": {
                "files": 2,
                "bytes": 13,
                "data_digest": "sha256:d",
                "base_model": "m/x",
                "base_model_digest": "sha256:b",
            },
        }
    )
    put_pod(cluster, {"preflight": ended(0), "data-downloader": ended(0, result.to_message()), "phi-3": running()})
    tuning = applied(planned_for(cluster))["tuning"]
    assert tuning["dataset"] == {"digest": "sha256:d", "files": 2, "sizeBytes": 13}
    assert tuning["baseModel"] == {"id": "m/x", "digest": "sha256:b"}


def test_where_kaitos_crd_drops_the_field_the_figures_go_to_its_metrics():
    cluster = make_cluster()
    settings = replace(SETTINGS, prunes_tuning_status=True)
    controller = Controller(cluster, settings)
    controller.settle()
    put_pod(cluster, {"phi-3": running()}, name="phi-3-0")
    controller.settle()
    status = applied(planned_for(cluster, progress=LINE, settings=settings))
    assert "tuning" not in status
    metrics = status["performance"]["metrics"]
    assert metrics["progress"] == {"description": "how far the training is", "value": "33", "unit": "%"}
    assert metrics["revision"]["value"] == "1"
    cluster.step_job("phi-3", "succeeds")
    controller.settle()
    assert status_of(cluster)["state"] == "Succeeded"
    cluster.delete_job_by_hand("phi-3")
    assert controller.settle().actions == ()
    assert ("Job", "phi-3") not in cluster.store


# ── Events ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_events_tell_the_story_once():
    cluster, controller = begun(instance_type="gpu-box", node=False)
    for name, outcome in (
        ("phi-3--check", "starts"),
        ("phi-3--check", "succeeds"),
        ("phi-3", "starts"),
        ("phi-3", "fails"),
        ("phi-3", "starts"),
        ("phi-3", "succeeds"),
    ):
        cluster.step_job(name, outcome)
        controller.settle()
    assert [(event["type"], event["reason"]) for event in cluster.events] == [
        ("Normal", "Waiting"),  # the checks run first
        ("Normal", "Running"),
        ("Warning", "Retrying"),
        ("Warning", "Retrying"),  # runs again
        ("Normal", "Succeeded"),
    ]
    assert cluster.events[-1]["note"] == "workspace succeeds; pushed example.com/a@sha256:1"
    for event in cluster.events:
        assert event["regarding"]["name"] == "phi-3"
        assert len(event["note"]) < 1024


def test_what_to_know_before_a_run_is_an_event_once():
    def render_with_notes(*args: Any, **how: Any) -> Rendered:
        return replace(render(*args, **how), notes=("a lost node loses the run", "another"))

    cluster = make_cluster(instance_type="gpu-box", node=False)
    controller = Controller(cluster, Settings(render_with_notes))
    controller.settle()
    cluster.step_job("phi-3--check", "starts")
    cluster.step_job("phi-3--check", "succeeds")
    controller.settle()
    assert ("Job", "phi-3") in cluster.store
    notes = [event["note"] for event in cluster.events if event["reason"] == "Note"]
    assert notes == ["a lost node loses the run; another"]


@pytest.mark.parametrize("character", ["x", "ü", "…", "🦙"])
def test_an_events_note_fits_what_a_server_takes_counted_in_bytes(character):
    event = event_manifest(make_cluster().store[WORKSPACE], 1, "Normal", "Note", character * 1100, START)
    size_bytes = len(event["note"].encode())
    assert 1020 < size_bytes <= 1024
    assert set(event["note"]) == {character}


def test_an_event_that_is_said_twice_is_one():
    cluster = make_cluster(instance_type="gpu-box", node=False)
    controller = Controller(cluster)
    controller.look()
    planned = controller.reconcile(dies_after=5)  # after the Event, before the status
    assert planned is not None
    assert [type(each) for each in planned.actions[4:]] == [Emit, ApplyStatus]
    assert len(cluster.events) == 1
    assert "status" not in cluster.store[WORKSPACE]
    controller.settle()
    assert len(cluster.events) == 1
    assert status_of(cluster)["state"] == "Pending"
