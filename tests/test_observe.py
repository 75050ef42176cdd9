import pytest

from tests.cluster_objects import ended, make_event, make_job, make_pod, running, waiting
from tuner.cluster.observe import ProgressLine, parse_progress, view_job
from tuner.runspec import StageResult

COMPLETE = ("Complete", "CompletionsReached", "")
LATER = "2026-01-01T01:00:00Z"


def done(stage: str, **values: object) -> str:
    return StageResult.model_validate({"stage": stage, "values": values}).to_message()


def fault(stage: str, code: int, message: str) -> str:
    return StageResult.model_validate(
        {"stage": stage, "exit_code": code, "reason": "DataError", "message": message}
    ).to_message()


# ── running ──────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("states", "stage"),
    [
        ({"preflight": running(), "phi-3": waiting("PodInitializing")}, "preflight"),
        ({"preflight": ended(0), "data-downloader": running(), "phi-3": waiting("PodInitializing")}, "fetch"),
        ({"preflight": ended(0), "puller": running(), "phi-3": waiting("PodInitializing")}, "fetch"),
        ({"preflight": ended(0), "data-downloader": ended(0), "phi-3": running(), "pusher": running()}, "train"),
        (
            {
                "preflight": ended(0),
                "data-downloader": ended(0),
                "phi-3": waiting("PodInitializing"),
                "pusher": running(),
            },
            "fetch",
        ),
        ({"preflight": ended(0), "check": running()}, "prepare"),
    ],
)
def test_the_stage_is_that_of_the_first_container_that_runs(states, stage):
    view = view_job(make_job(), [make_pod(states)])
    assert (view.phase, view.stage, view.has_started) == ("running", stage, True)
    assert view.nodes == ("gpu-1",)


@pytest.mark.parametrize(
    ("states", "stage", "sentence"),
    [
        (
            {"preflight": ended(0), "data-downloader": ended(0), "phi-3": ended(137), "pusher": running()},
            "train",
            "train: killed (SIGKILL) (exit 137)",
        ),
        (
            {"preflight": ended(0), "data-downloader": ended(0), "phi-3": running(), "pusher": ended(137)},
            "train",
            "push: killed (SIGKILL) (exit 137); it is started again",
        ),
        (
            {"preflight": ended(0), "phi-3": running(), "pusher": waiting("CrashLoopBackOff")},
            "train",
            "push: its container has died, and is started again in a moment",
        ),
    ],
)
def test_what_has_failed_is_told_before_the_container_beside_it_has_ended(states, stage, sentence):
    view = view_job(make_job(), [make_pod(states)])
    assert (view.phase, view.stage, view.attempt) == ("running", stage, 1)
    assert view.last is not None
    assert view.last.sentence == sentence


def test_a_complete_job_has_succeeded_and_its_results_are_those_of_its_containers():
    pod = make_pod(
        {"phi-3": ended(0, done("train", steps=7)), "pusher": ended(0, done("push", image="r/a@sha256:1"))},
        phase="Succeeded",
    )
    view = view_job(make_job(active=0, succeeded=1, condition=COMPLETE), [pod])
    assert view.phase == "succeeded"
    assert view.results["push"].values == {"image": "r/a@sha256:1"}
    assert view.results["train"].values == {"steps": 7}


def test_a_complete_job_whose_pods_are_gone_has_succeeded_all_the_same():
    assert view_job(make_job(active=0, succeeded=1, condition=COMPLETE), []).phase == "succeeded"


@pytest.mark.parametrize("condition", [COMPLETE, ("Failed", "PodFailurePolicy", "")])
def test_a_job_has_not_ended_while_the_picture_of_its_pod_is_older(condition):
    view = view_job(make_job(active=0, condition=condition), [make_pod({"phi-3": ended(0), "pusher": running()})])
    assert (view.phase, view.stage) == ("running", "train")


@pytest.mark.parametrize("condition", [COMPLETE, ("Failed", "PodFailurePolicy", "")])
def test_a_job_that_ended_without_a_pod_lacks_its_words(condition):
    assert view_job(make_job(active=0, condition=condition), []).lacks_words


# ── attempts ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_pod_is_an_attempt_and_not_a_failed_job():
    first = make_pod({"phi-3": ended(70, "Traceback\nRuntimeError: boom")}, name="a", phase="Failed")
    second = make_pod({"phi-3": running()}, name="b", created=LATER)
    view = view_job(make_job(failed=1), [second, first])
    assert (view.phase, view.stage) == ("running", "train")
    assert view.retry == "attempt 2 of 4, last: train: ended without a word (exit 70): RuntimeError: boom"


def test_between_two_attempts_the_last_one_is_told():
    pod = make_pod({"phi-3": ended(137, reason="OOMKilled")}, phase="Failed")
    view = view_job(make_job(failed=1, active=0), [pod])
    assert view.phase == "waiting"
    assert view.has_started
    assert view.retry == ("attempt 2 of 4, last: train: out of memory, its container reached its limit (exit 137)")


def test_an_eviction_is_told_and_no_attempt():
    target = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "drained"}
    evicted = make_pod({"phi-3": ended(143)}, name="a", phase="Failed", conditions=[target])
    replaced = make_pod({"phi-3": running()}, name="b", created=LATER)
    view = view_job(make_job(failed=0), [evicted, replaced])
    assert view.retry == "attempt 1 of 4, last: eviction by eviction api: drained"


def test_a_pod_that_a_lost_node_does_not_let_go_is_what_is_waited_for():
    lost = {"type": "DisruptionTarget", "status": "True", "reason": "DeletionByTaintManager", "message": "not ready"}
    pod = make_pod({"phi-3": running(), "pusher": running()}, deleting=True, conditions=[lost])
    view = view_job(make_job(), [pod])
    assert (view.phase, view.waiting_for) == ("waiting", "a new pod begins when phi-3-a on node gpu-1 is gone")
    assert view.retry == "attempt 1 of 4, last: deletion by taint manager: not ready"


def test_a_kubelets_eviction_is_told():
    pod = make_pod(phase="Failed", reason="Evicted", message="The node was low on resource: ephemeral-storage.")
    view = view_job(make_job(failed=1, active=0), [pod])
    assert view.last is not None
    assert view.last.sentence == "evicted: The node was low on resource: ephemeral-storage."


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (137, "train: killed (SIGKILL) (exit 137)"),
        (139, "train: crashed (segmentation fault) (exit 139)"),
        (143, "train: stopped (SIGTERM) (exit 143)"),
    ],
)
def test_a_signal_is_named(code, sentence):
    view = view_job(make_job(failed=1, active=0), [make_pod({"phi-3": ended(code)}, phase="Failed")])
    assert view.last is not None
    assert view.last.sentence == sentence


def test_how_a_sidecar_was_ended_is_no_cause():
    """It is told to stop when the trainer has ended, and times are whole seconds."""
    at = "2026-01-01T00:00:09Z"
    states = {"phi-3": ended(74, fault("push", 74, "denied"), at=at), "pusher": ended(137, at=at)}
    view = view_job(make_job(failed=1, active=0), [make_pod(states, phase="Failed")])
    assert view.last is not None
    assert (view.last.sentence, view.last.container) == ("push: denied (exit 74)", "phi-3")
    view = view_job(
        make_job(active=0, succeeded=1, condition=COMPLETE),
        [make_pod({"phi-3": ended(0, done("train", image="r/a@sha256:1")), "pusher": ended(143)}, phase="Succeeded")],
    )
    assert (view.phase, view.last, view.values["image"]) == ("succeeded", None, "r/a@sha256:1")


# ── failed ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_job_says_what_its_container_said():
    pod = make_pod({"data-downloader": ended(65, fault("fetch", 65, "a.parquet: no column 'text'"))}, phase="Failed")
    condition = ("Failed", "PodFailurePolicy", "Container data-downloader for pod team/p failed with exit code 65 …")
    view = view_job(make_job(failed=1, active=0, condition=condition), [pod])
    assert view.phase == "failed"
    assert view.failure is not None
    assert view.failure.sentence == "fetch: a.parquet: no column 'text' (exit 65)"
    assert (view.failure.container, view.failure.exit_code) == ("data-downloader", 65)


def test_a_failed_job_without_pods_says_what_its_condition_says():
    condition = (
        "Failed",
        "PodFailurePolicy",
        "Container phi-3 for pod team/p failed with exit code 77 matching FailJob rule at index 3",
    )
    view = view_job(make_job(failed=1, active=0, condition=condition), [])
    assert view.failure is not None
    assert view.failure.sentence == condition[2]
    assert (view.failure.container, view.failure.exit_code) == ("phi-3", 77)


def test_the_last_attempt_is_told_as_such():
    pod = make_pod({"phi-3": ended(70)}, phase="Failed")
    condition = ("Failed", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
    view = view_job(make_job(failed=4, active=0, condition=condition), [pod])
    assert view.failure is not None
    assert view.failure.sentence == "train: ended without a word (exit 70); no attempt is left"


def test_a_deadline_is_a_deadline_whatever_its_pods_said():
    pod = make_pod({"phi-3": ended(143)}, phase="Failed")
    view = view_job(make_job(failed=1, active=0, condition=("Failed", "DeadlineExceeded", "Job was …")), [pod])
    assert view.failure is not None
    assert view.failure.sentence == "it took longer than its activeDeadlineSeconds"


def test_a_job_on_its_way_to_failed_is_stopping():
    assert view_job(make_job(condition=("FailureTarget", "PodFailurePolicy", "")), []).phase == "stopping"


def test_a_job_that_is_being_deleted_is_stopping():
    assert view_job(make_job(deleting=True), [make_pod({"phi-3": running()})]).phase == "stopping"


# ── waiting ──────────────────────────────────────────────────────────────────────────────────────────────────────────

UNSCHEDULABLE = "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."


@pytest.mark.parametrize(
    ("pod", "reason"),
    [
        (make_pod(scheduled=("Unschedulable", UNSCHEDULABLE)), f"no node takes its pod: {UNSCHEDULABLE}"),
        (make_pod(scheduled=("SchedulingGated", "gated")), "its pod is held back by a scheduling gate: gated"),
        (make_pod(node=None), "its pod has no node yet"),
        (
            make_pod({"preflight": waiting("ImagePullBackOff", 'Back-off pulling "tuner:1"')}),
            'the image tuner:1 cannot be pulled: Back-off pulling "tuner:1"',
        ),
        (
            make_pod({"preflight": waiting("CreateContainerConfigError", 'secret "hub" not found')}),
            'container preflight cannot be made: secret "hub" not found',
        ),
        (make_pod({"preflight": waiting("PodInitializing")}), "its containers are being made"),
    ],
)
def test_what_a_pod_waits_for_is_said(pod, reason):
    view = view_job(make_job(), [pod])
    assert (view.phase, view.waiting_for, view.has_started) == ("waiting", reason, False)


def test_a_missing_secret_is_found_in_the_pods_events():
    note = 'MountVolume.SetUp failed for volume "docker-config" : secret "acr" not found'
    events = [
        make_event("Pod", "phi-3-a", "FailedMount", "an older one"),
        make_event("Pod", "phi-3-a", "FailedMount", note, LATER),
        make_event("Pod", "another", "FailedMount", "not this pod", LATER),
    ]
    view = view_job(make_job(), [make_pod({"preflight": waiting("PodInitializing")})], events)
    assert view.waiting_for == f"its volumes are not there: {note}"


@pytest.mark.parametrize(
    "note",
    [
        'pods "phi-3-x" is forbidden: exceeded quota: gpus, requested: requests.nvidia.com/gpu=1, used: 4, limited: 4',
        'pods "phi-3-x" is forbidden: violates PodSecurity "restricted:latest": runAsNonRoot != true',
    ],
)
def test_a_refused_pod_is_found_in_the_jobs_events(note):
    view = view_job(make_job(active=0), [], [make_event("Job", "phi-3", "FailedCreate", note)])
    assert view.waiting_for == f"its pod is refused: {note}"


def test_core_events_are_read_as_well():
    event = {
        "metadata": {"name": "x"},
        "involvedObject": {"kind": "Job", "name": "phi-3"},
        "reason": "FailedCreate",
        "message": "quota",
        "lastTimestamp": LATER,
    }
    assert view_job(make_job(active=0), [], [event]).waiting_for == "its pod is refused: quota"


def test_a_queued_job_is_told_from_one_that_somebody_suspended():
    queued = view_job(make_job(suspend=True, active=0, labels={"kueue.x-k8s.io/queue-name": "gpu-queue"}), [])
    assert (queued.phase, queued.waiting_for) == ("suspended", "queued by Kueue in gpu-queue")
    by_hand = view_job(make_job(suspend=True, active=0), [])
    assert by_hand.waiting_for is not None
    assert by_hand.waiting_for.startswith("suspended; to go on: kubectl patch job phi-3")


# ── progress ─────────────────────────────────────────────────────────────────────────────────────────────────────────

LINE = '{"stage": "train", "task": "training", "done": 30, "total": 90, "unit": "steps", "loss": 1.25, "eta_s": 60}'


def test_the_last_progress_line_of_a_log_is_read():
    log = f'{LINE.replace("30", "10")}\n{LINE}\nwarning: a line of words\n{{"stage": "train", cut off'
    assert parse_progress(log) == ProgressLine("train", 30, 90, "steps", 60, {"loss": 1.25})


@pytest.mark.parametrize(
    "log",
    [
        *("", "words only", '{"stage": "train"}', '{"level": "info"}', '{"stage": 1, "done": "x"}'),
        '{"stage"' + ': {"a"' * 5_000,
    ],
)
def test_a_log_without_progress_has_none(log):
    assert parse_progress(log) is None
